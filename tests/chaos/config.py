"""What `DISPATCHER_CONFIG` names in the chaos suite's workers: the seed's workload, with the failpoints installed."""

import os
import time

from celery import signals

from dispatcher import Transition
from tests.chaos import workload
from tests.chaos.failpoints import NODE_VARIABLE, SEED_VARIABLE, VERSION_VARIABLE, Failpoints
from tests.chaos.sink import SinkReader

_seed = int(os.environ[SEED_VARIABLE])
_points = Failpoints.from_environment()


def _send(transition: Transition, seconds: float) -> None:
    """Call the provider: the effect is one line in the sink."""
    assert _points.attempt is not None and transition.idempotency_key is not None
    delivery_id, attempt = _points.attempt
    key = transition.idempotency_key
    fate = workload.fate(_seed, key, attempt)
    facts = {"delivery": delivery_id, "attempt": attempt}
    _points.hit("before_call")
    time.sleep(seconds)  # how long a provider takes
    if fate in ("raises_before", "gives_up"):
        _points.sink.write("raised", after_effect=False, **facts)
        workload.raise_for(fate)
    _points.sink.write("effect", key=key, chain=transition.chain.id, **facts)
    _points.hit("after_call")
    if fate == "raises_after":
        _points.sink.write("raised", after_effect=True, **facts)
        workload.raise_for(fate)
    _points.sink.write("returned", **facts)


def _verify(transition: Transition) -> bool | None:
    """Ask the provider whether it knows the key; a fifth of the time it cannot say."""
    if workload.chance(_seed, "verify", transition.idempotency_key) < 0.2:
        return None
    lines = SinkReader(_points.sink.path).new_lines()
    return any(line["phase"] == "effect" and line["key"] == transition.idempotency_key for line in lines)


@signals.worker_ready.connect(weak=False)
def _say_ready(**_: object) -> None:
    _points.sink.write("ready", node=os.environ.get(NODE_VARIABLE))


_types = workload.older_types(_seed) if os.environ.get(VERSION_VARIABLE) == "old" else workload.draw(_seed)
CONFIG = workload.configuration(_seed, _types, send=_send, verify=_verify)
_points.install()
