"""A digest of the candidates of a state. A sweep compares it to notice that the configuration has changed."""

import hashlib

from dispatcher.domain.callbacks import choose_callback
from dispatcher.domain.config import ChainType
from dispatcher.transition import TypeDefault


def fingerprint(chain_type: ChainType, state: str) -> str:
    """A short digest of the candidates of `state` and their options; it changes when they change."""
    parts = [
        (
            candidate.__name__,
            candidate.final_state,
            chain_type.recheck_seconds
            if isinstance(candidate.recheck_seconds, TypeDefault)
            else candidate.recheck_seconds,
            choose_callback(chain_type, candidate, None).kind,
        )
        for candidate in chain_type.candidates(state)
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
