"""The faults: what each does to a deployment, how often, and how it is made (the text of the report's table)."""

import os
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from dispatcher import Settings
from tests.chaos import profile
from tests.chaos.deployment import SETTINGS, Deployment
from tests.chaos.failpoints import KILLING
from tests.chaos.observed import Later
from tests.chaos.profile import Profile

Strike = Callable[[Deployment, random.Random, Later], None]

_LOCK_SECONDS: Final = float(SETTINGS["lock_seconds"])
_LEASE_SECONDS: Final = Settings(**SETTINGS).lease_seconds  # type: ignore[arg-type]
_KILL_SHARE: Final = 0.01
_KILL_SHARES: Final = {"in_load": 0.04, "in_look": 0.02}
"""Of failpoints that are passed less often than others."""

_WITH_CHILDREN: Final = ("prefork", "threads")
_CLOCK_STEPS: Final = (-172_800, -600, -2, 0, 2, 600, 172_800)


@dataclass(frozen=True)
class Fault:
    """One fault. `strike` is called every `every` seconds (drawn between the two) while the faults last."""

    name: str
    how: str
    strike: Strike | None = None
    every: tuple[float, float] = (2.0, 4.0)
    failpoints: Mapping[str, float] = field(default_factory=dict)
    prepare: Callable[[Deployment], None] = lambda _: None
    calm: Callable[[Deployment], None] = lambda _: None
    asked: Callable[[Deployment, Later], None] | None = None
    """What happens when a callback that returned asks for the outage that `strike` wanted."""

    proxied: bool = False
    beats: int = 1
    alone_only: bool = False
    lasts: float = 0.0
    """Seconds that the faults last at least, so that this one can strike once and end."""

    pools: tuple[str, ...] | None = None
    """The pools of the workers; None: by the seed. Likewise `grouped`."""

    grouped: bool | None = None
    late_seconds: float = 0.0
    """How late it lets answers of Redis and of the database come."""

    long_seconds: float = 0.0
    """How long it lets some first attempts take."""


# --- processes -------------------------------------------------------------------------------------------------------


def _kill_child(deployment: Deployment, rng: random.Random, later: Later) -> None:
    pids = [pid for node in deployment.workers for pid in node.children()]
    if pids:
        with suppress(ProcessLookupError):
            os.kill(rng.choice(pids), signal.SIGKILL)


def _kill_worker(deployment: Deployment, rng: random.Random, later: Later) -> None:
    node = rng.choice(deployment.nodes)
    if node.alive:
        node.signal_all(signal.SIGKILL)


def _suspend(deployment: Deployment, rng: random.Random, later: Later) -> None:
    """Stop a whole worker or one child for longer than a lock, now and then until its attempts are taken over."""
    seconds = _LOCK_SECONDS * rng.uniform(1.2, 1.8)
    if rng.random() < 0.15:
        seconds = _LEASE_SECONDS + 14
    node = rng.choice(deployment.workers)
    children = node.children()
    pids = [rng.choice(children)] if children and rng.random() < 0.5 else node.pids()
    deployment.suspend(node, pids, seconds, later)


def _stop_child(seconds: float) -> Strike:
    """Stop one child of a worker for so long; a whole worker where its pool has no children."""

    def strike(deployment: Deployment, rng: random.Random, later: Later) -> None:
        node = rng.choice(deployment.workers)
        children = node.children()
        deployment.suspend(node, [rng.choice(children)] if children else node.pids(), seconds, later)

    return strike


def _resume_all(deployment: Deployment) -> None:
    for node in deployment.nodes:
        if node.alive:
            node.signal_all(signal.SIGCONT)


# --- Redis -----------------------------------------------------------------------------------------------------------


def _ask_redis(port: int, *command: str) -> None:
    with (
        suppress(redis.RedisError, OSError),
        redis.Redis(port=port, socket_timeout=5, retry=Retry(NoBackoff(), 0)) as client,
    ):
        client.execute_command(*command)


def _either_port(deployment: Deployment, rng: random.Random) -> int:
    return rng.choice((deployment.broker, deployment.locks)).port


def _flush(deployment: Deployment, rng: random.Random, later: Later) -> None:
    port = _either_port(deployment, rng)
    if port == deployment.locks.port:
        deployment.seen.rates_lost.add("the lock server was emptied")
    _ask_redis(port, "FLUSHALL")


def _flush_locks(deployment: Deployment, rng: random.Random, later: Later) -> None:
    deployment.seen.rates_lost.add("the lock server was emptied")
    _ask_redis(deployment.locks.port, "FLUSHALL")


def _restart_redis(deployment: Deployment, rng: random.Random, later: Later) -> None:
    deployment.seen.rates_lost.add("the lock server was killed")
    _restart(deployment, "locks", rng, later)


def _restart_broker(deployment: Deployment, rng: random.Random, later: Later) -> None:
    _restart(deployment, "broker", rng, later)


def _restart(deployment: Deployment, name: str, rng: random.Random, later: Later) -> None:
    server = getattr(deployment, name)
    if server.process is None:
        return
    server.kill()
    later(rng.uniform(0.2, 2.0), lambda: server.start() if server.process is None else None)


def _pause_clients(deployment: Deployment, rng: random.Random, later: Later) -> None:
    port = _either_port(deployment, rng)
    if port == deployment.locks.port:
        deployment.seen.rates_lost.add("the lock server did not answer")
    _ask_redis(port, "CLIENT", "PAUSE", str(rng.randint(1000, 4000)), "ALL")


def _kill_clients(deployment: Deployment, rng: random.Random, later: Later) -> None:
    _ask_redis(_either_port(deployment, rng), "CLIENT", "KILL", "TYPE", "normal")


def _start_servers(deployment: Deployment) -> None:
    deployment.start_database()
    for server in (deployment.broker, deployment.locks):
        if server.process is None:
            server.start()


# --- PostgreSQL ------------------------------------------------------------------------------------------------------


def _crash_postgres(deployment: Deployment, rng: random.Random, later: Later) -> None:
    deployment.stop_database(rng.uniform(0.0, 1.0), later)


def _want_outage(deployment: Deployment, rng: random.Random, later: Later) -> None:
    if not deployment.seen.outage.lasts:
        deployment.want_outage()


def _away_after_return(deployment: Deployment, later: Later) -> None:
    deployment.stop_database(20, later)


def _away_until_relay(deployment: Deployment, later: Later) -> None:
    """Keep the workers, and only them, from the database for a minute; relays see it again before the workers do."""
    proxy = deployment.proxies["postgres"]
    if proxy.refuses:
        return
    deployment.seen.outage.begin()
    proxy.refuse()

    def relay() -> None:
        deployment.seen.cut_off.begin()
        with suppress(Exception):
            deployment.client.relay()

    for seconds in (60, 61, 62):
        later(seconds, relay)
    later(62.5, lambda: _let_workers_in(deployment))


def _let_workers_in(deployment: Deployment) -> None:
    deployment.proxies["postgres"].refuses = False
    deployment.seen.outage.end()
    deployment.seen.cut_off.end()


_TERMINATE: Final = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = %s"


def _terminate_sessions(deployment: Deployment, rng: random.Random, later: Later) -> None:
    if deployment.postgres.process is not None:
        with suppress(psycopg.Error), deployment.postgres.connect() as connection:
            connection.execute(_TERMINATE, ["chain-dispatcher"])


# --- the network -----------------------------------------------------------------------------------------------------


def _cut(deployment: Deployment, rng: random.Random, later: Later) -> None:
    rng.choice(list(deployment.proxies.values())).cut()


def _delay(deployment: Deployment, rng: random.Random, later: Later) -> None:
    proxy = rng.choice(list(deployment.proxies.values()))
    proxy.delay_seconds = rng.uniform(0.01, 0.15)
    later(rng.uniform(1, 3), lambda: setattr(proxy, "delay_seconds", 0.0))


def _half_open(deployment: Deployment, rng: random.Random, later: Later) -> None:
    name, proxy = rng.choice(list(deployment.proxies.items()))
    proxy.silent = True
    if name == "locks":
        deployment.seen.rates_lost.add("the lock server did not answer")
    if name == "postgres":
        deployment.seen.outage.begin()

    def speak() -> None:
        proxy.speak()
        if name == "postgres":
            deployment.seen.outage.end()

    later(rng.uniform(1, 5), speak)


def _calm_network(deployment: Deployment) -> None:
    for proxy in deployment.proxies.values():
        proxy.delay_seconds = 0.0
        proxy.speak()


# --- more than one of a thing ----------------------------------------------------------------------------------------


def _relay_and_sweep_beside(deployment: Deployment, rng: random.Random, later: Later) -> None:
    """A relay and a sweep that ask for no tick, while the beats' own run."""
    with suppress(Exception):  # the database or the broker may be away, in combinations
        deployment.client.relay()
        deployment.client.sweep()


def _old_version(deployment: Deployment) -> None:
    deployment.set_version(0, "old")


def _deploy(deployment: Deployment, rng: random.Random, later: Later) -> None:
    """A rolling deploy, and back: the other worker gets the version that this one has."""
    node = rng.choice(deployment.workers)
    number = deployment.workers.index(node)
    deployment.set_version(number, rng.choice(("old", "new")))
    if node.alive:
        node.signal_all(signal.SIGKILL)


def _new_version(deployment: Deployment) -> None:
    for number, node in enumerate(deployment.workers):
        deployment.set_version(number, "new")
        node.kill()  # the driver starts it again


def _shift_clocks(deployment: Deployment) -> None:
    deployment.set_clock(deployment.workers[0], 600)


def _step_clock(deployment: Deployment, rng: random.Random, later: Later) -> None:
    """Kill a worker or the beat; its clock shows another time when the driver has started it again."""
    node = rng.choice(deployment.nodes)
    if node.alive:
        node.kill()
        deployment.set_clock(node, rng.choice(_CLOCK_STEPS))


def _right_clocks(deployment: Deployment) -> None:
    for node in deployment.nodes:
        node.kill()
        deployment.set_clock(node, 0)


# --- operators -------------------------------------------------------------------------------------------------------


def _pause(deployment: Deployment, rng: random.Random, later: Later) -> None:
    assert deployment.operators is not None
    deployment.operators.pause_one(rng, rng.uniform(2.5, 6))


def _disable(deployment: Deployment, rng: random.Random, later: Later) -> None:
    assert deployment.operators is not None
    for _ in range(4):
        deployment.operators.disable_one(rng, rng.uniform(0.5, 4))


def _killing(point: str) -> Fault:
    return Fault(
        f"kill_{point}",
        f"SIGKILL of the pool child, a tenth of the time of its whole worker, at the failpoint `{point}`",
        failpoints={point: _KILL_SHARES.get(point, _KILL_SHARE)},
    )


_ALL: Final = (
    Fault("none", "nothing: the workload alone, with its own failing guards and callbacks"),
    *map(_killing, KILLING),
    Fault(
        "kill_child",
        "SIGKILL of a random pool child every 0.3 to 1 s",
        _kill_child,
        (0.3, 1.0),
        pools=_WITH_CHILDREN,
    ),
    Fault(
        "kill_worker",
        "SIGKILL of a whole worker or of the beat every 3 to 6 s; a supervisor restarts it",
        _kill_worker,
        (3.0, 6.0),
    ),
    Fault(
        "suspend",
        "SIGSTOP of a worker or a pool child for longer than the lock's time to live, at times until its attempts are "
        "taken over; then SIGCONT",
        _suspend,
        (2.0, 4.0),
        calm=_resume_all,
    ),
    Fault(
        "stop_10",
        "SIGSTOP of a pool child for 10 s: less than what lets others take over its attempts",
        _stop_child(10),
        (3.0, 6.0),
        calm=_resume_all,
        pools=_WITH_CHILDREN,
        lasts=24,
    ),
    Fault(
        "stop_30",
        "SIGSTOP of a pool child for 30 s: its attempts are taken over, and it goes on",
        _stop_child(30),
        (4.0, 10.0),
        calm=_resume_all,
        pools=_WITH_CHILDREN,
        lasts=45,
    ),
    Fault(
        "callback_outlasts_lease",
        f"one first attempt of twenty takes {_LEASE_SECONDS + 14:g} s in the pool `threads`, which has no time limit",
        lasts=_LEASE_SECONDS + 20,
        pools=("threads", "threads"),
        long_seconds=_LEASE_SECONDS + 14,
        alone_only=True,
    ),
    Fault("redis_flushall", "`FLUSHALL` on the lock server or the broker every 1 to 3 s", _flush, (1.0, 3.0)),
    Fault(
        "limits_emptied",
        "`FLUSHALL` on the lock server, which counts the calls for the limits, every 0.5 to 1.5 s",
        _flush_locks,
        (0.5, 1.5),
    ),
    Fault(
        "redis_restart",
        "the lock server killed and started again, empty, every 4 to 8 s",
        _restart_redis,
        (4.0, 8.0),
        calm=_start_servers,
    ),
    Fault(
        "broker_restart",
        "the broker killed and started again, empty, every 5 to 9 s",
        _restart_broker,
        (5.0, 9.0),
        calm=_start_servers,
    ),
    Fault(
        "redis_pause",
        "`CLIENT PAUSE` of 1 to 4 s (socket timeout: 2 s) on the lock server or the broker",
        _pause_clients,
        (5.0, 8.0),
    ),
    Fault(
        "redis_client_kill",
        "`CLIENT KILL TYPE normal` on the lock server or the broker every 2 to 4 s",
        _kill_clients,
        (2.0, 4.0),
    ),
    Fault("messages_dropped", "one message of eight is not sent", failpoints={"drop": 0.125}),
    Fault("messages_doubled", "one message of three is sent twice", failpoints={"double": 0.33}),
    Fault("messages_reordered", "one message of four is held back until the next one", failpoints={"reorder": 0.25}),
    Fault(
        "postgres_crash",
        "PostgreSQL stopped as `stop -m immediate` and started again every 3 to 6 s",
        _crash_postgres,
        (3.0, 6.0),
        calm=_start_servers,
    ),
    Fault(
        "database_away_20",
        "PostgreSQL away for 20 s, from the moment when a callback has returned; more than once",
        _want_outage,
        (5.0, 9.0),
        calm=_start_servers,
        lasts=40,
        asked=_away_after_return,
        alone_only=True,
    ),
    Fault(
        "database_away_60",
        "no worker reaches PostgreSQL for 62 s, from the moment when a callback has returned, while others take 60 s "
        "(pool `threads`); relays beside them reach it during the last 2 s",
        _want_outage,
        (5.0, 9.0),
        calm=_let_workers_in,
        lasts=90,
        asked=_away_until_relay,
        proxied=True,
        pools=("threads", "threads"),
        long_seconds=60,
        alone_only=True,
    ),
    Fault(
        "postgres_terminate",
        "`pg_terminate_backend` of all the workers' sessions every 0.5 to 2 s",
        _terminate_sessions,
        (0.5, 2.0),
    ),
    Fault(
        "commit_lies",
        "one COMMIT of fifty succeeds while its caller gets an OperationalError",
        failpoints={"commit_lies": 0.02},
    ),
    Fault(
        "proxy_cut",
        "a TCP proxy before PostgreSQL, broker and lock server resets all connections of one of them every 1 to 3 s",
        _cut,
        (1.0, 3.0),
        proxied=True,
    ),
    Fault(
        "proxy_delay",
        "the proxy delays every packet of one of them by up to 150 ms, for 1 to 3 s",
        _delay,
        (2.0, 4.0),
        calm=_calm_network,
        proxied=True,
        late_seconds=0.6,
    ),
    Fault(
        "proxy_half_open",
        "the proxy swallows all bytes of one of them for 1 to 5 s and closes nothing, then resets",
        _half_open,
        (4.0, 8.0),
        calm=_calm_network,
        proxied=True,
    ),
    Fault(
        "clock_skew",
        "one of the workers lives 10 minutes in the future (LD_PRELOAD)",
        prepare=_shift_clocks,
        alone_only=True,
    ),
    Fault(
        "clock_steps",
        "a worker or the beat killed and started again with a clock that is 2 s, 10 minutes or 2 days ahead or behind",
        _step_clock,
        (3.0, 6.0),
        calm=_right_clocks,
        alone_only=True,
    ),
    Fault(
        "pause_storm",
        "an operator pauses a chain type and resumes it after 2.5 to 6 s, again and again",
        _pause,
        (0.5, 1.5),
        grouped=True,
    ),
    Fault(
        "disable_storm",
        "an operator disables the chains of a resource and enables them after 0.5 to 4 s, eight a second",
        _disable,
        (0.3, 0.7),
        grouped=True,
    ),
    Fault(
        "two_relays",
        "three beats, and a relay and a sweep without a tick beside them",
        _relay_and_sweep_beside,
        (0.3, 1.0),
        beats=3,
    ),
    Fault(
        "two_versions",
        "workers killed and restarted with the version before (lacks a chain type and a transition, orders another's) "
        "or with this one",
        _deploy,
        (4.0, 8.0),
        prepare=_old_version,
        calm=_new_version,
    ),
)

FAULTS: Final[Mapping[str, Fault]] = {fault.name: fault for fault in _ALL}


def combination(seed: int) -> list[str]:
    """Three to five faults that go together, drawn by the seed."""
    rng = random.Random(f"combination:{seed}")
    names = [name for name, fault in FAULTS.items() if name != "none" and not fault.alone_only]
    return sorted(rng.sample(names, rng.randint(3, 5)))


def merged(names: Sequence[str]) -> tuple[list[Fault], dict[str, Any]]:
    """These faults, and what a deployment must be made with for all of them."""
    faults = [FAULTS[name] for name in names]
    points: dict[str, float] = {}
    for fault in faults:
        points.update(fault.failpoints)
    return faults, {
        "failpoints": points,
        "proxied": any(fault.proxied for fault in faults),
        "beats": max(fault.beats for fault in faults),
    }


def drawn_profile(names: Sequence[str], seed: int, *, chains: int, fault_seconds: float) -> Profile:
    """The profile of a run with these faults, which may ask for pools and groups."""
    faults = [FAULTS[name] for name in names]
    pools = [fault.pools for fault in faults if fault.pools is not None]
    grouped = [fault.grouped for fault in faults if fault.grouped is not None]
    return profile.draw(
        seed,
        names,
        chains=chains,
        fault_seconds=fault_seconds,
        pools=pools[0] if pools else None,
        grouped=grouped[0] if grouped else None,
        long_seconds=max(fault.long_seconds for fault in faults),
    )
