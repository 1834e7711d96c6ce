"""What `DISPATCHER_CONFIG` names in the chaos suite's workers: the run's workload, with the failpoints installed."""

import os
import time
from collections.abc import Mapping, Sequence

from celery import signals

from dispatcher import Transition
from dispatcher.transition import ChainSnapshot
from tests.chaos import profile, workload
from tests.chaos.failpoints import NODE_VARIABLE, VERSION_VARIABLE, Failpoints
from tests.chaos.sink import SinkReader
from tests.chaos.truth import chance, facts_at
from tests.chaos.workload import Surroundings

_profile = profile.own()
_seed = _profile.seed
_points = Failpoints.from_environment()
_SLOW_LOADS = 0.15


def _send(transition: Transition, seconds: float) -> None:
    """Call the provider: the effect is one line in the sink."""
    assert transition.idempotency_key is not None
    key = transition.idempotency_key
    facts = {**_points.facts_of(key), "key": key, "chain": transition.chain.id, "type": transition.chain.chain_type}
    facts["transition"] = type(transition).__name__
    short = {name: facts[name] for name in ("delivery", "attempt", "begins")}
    _points.sink.write("calling", **facts)
    _points.hit("before_call")
    fate = workload.fate(_seed, key, facts["attempt"])
    time.sleep(seconds + workload.outlasts(_profile, key, facts["attempt"]))  # how long a provider takes
    if fate in ("raises_before", "gives_up"):
        _points.sink.write("raised", after_effect=False, **short)
        workload.raise_for(fate)
    _points.sink.write("effect", **facts)
    _points.hit("after_call")
    if fate == "raises_after":
        _points.sink.write("raised", after_effect=True, **short)
        workload.raise_for(fate)
    _points.sink.write("returned", **short)
    _points.await_outage()


def _verify(transition: Transition) -> bool | None:
    """Ask the provider whether it knows the key; a fifth of the time it cannot say."""
    if chance(_seed, "verify", transition.idempotency_key) < 0.2:
        return None
    lines = SinkReader(_points.sink.path).new_lines()
    return any(line["phase"] == "effect" and line["key"] == transition.idempotency_key for line in lines)


def _load(snapshots: Sequence[ChainSnapshot]) -> Mapping[int, Mapping[str, bool]]:
    """Ask where the facts are: as of the moment of the answer. In attempts that takes time, now and then."""
    ids = [snapshot.id for snapshot in snapshots if snapshot.id is not None]
    delivering = _points.thread.delivering
    if delivering:
        _points.sink.write("loading", chains=ids)
        _points.hit("in_load")
        drawn = chance(_seed, "load", time.monotonic())
        time.sleep(0.5 * drawn / _SLOW_LOADS if drawn < _SLOW_LOADS else 0)
    facts = {chain_id: facts_at(_profile, chain_id, time.monotonic()) for chain_id in ids}
    if delivering:
        _points.sink.write("loaded", chains=ids)
    return facts


@signals.worker_ready.connect(weak=False)
def _say_ready(**_: object) -> None:
    _points.sink.write("ready", node=os.environ.get(NODE_VARIABLE))


_types = workload.older_types(_seed) if os.environ.get(VERSION_VARIABLE) == "old" else workload.draw(_seed)
CONFIG = workload.configuration(
    _profile, _types, Surroundings(send=_send, verify=_verify, load=_load, asking=_points.asking)
)
_points.install()
