"""The faults: what each does to a deployment, how often, and how it is made (the text of the report's table)."""

import os
import random
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.chaos.deployment import SETTINGS, Deployment
from tests.chaos.failpoints import KILLING

Later = Callable[[float, Callable[[], None]], None]
Strike = Callable[[Deployment, random.Random, Later], None]

_LOCK_SECONDS: Final = float(SETTINGS["lock_seconds"])
_KILL_SHARE: Final = 0.01


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
    proxied: bool = False
    beats: int = 1
    alone_only: bool = False


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
    """Stop a whole worker or one child for longer than a lock, now and then for longer than a lease."""
    seconds = _LOCK_SECONDS * rng.uniform(1.2, 1.8)
    if rng.random() < 0.15:
        seconds = float(SETTINGS["callback_seconds"]) + 16
    node = rng.choice(deployment.workers)
    children = node.children()
    if rng.random() < 0.5 or not children:
        process = node.process
        node.signal_all(signal.SIGSTOP)
        later(seconds, lambda: node.signal_all(signal.SIGCONT) if node.process is process else None)
        return
    pid = rng.choice(children)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)

    def resume() -> None:
        if pid in node.children():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    later(seconds, resume)


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
    _ask_redis(_either_port(deployment, rng), "FLUSHALL")


def _restart_redis(deployment: Deployment, rng: random.Random, later: Later) -> None:
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
    _ask_redis(_either_port(deployment, rng), "CLIENT", "PAUSE", str(rng.randint(1000, 4000)), "ALL")


def _kill_clients(deployment: Deployment, rng: random.Random, later: Later) -> None:
    _ask_redis(_either_port(deployment, rng), "CLIENT", "KILL", "TYPE", "normal")


def _start_servers(deployment: Deployment) -> None:
    for server in (deployment.postgres, deployment.broker, deployment.locks):
        if server.process is None:
            server.start()


# --- PostgreSQL ------------------------------------------------------------------------------------------------------


def _crash_postgres(deployment: Deployment, rng: random.Random, later: Later) -> None:
    server = deployment.postgres
    if server.process is None:
        return
    server.stop(signal.SIGQUIT)
    later(rng.uniform(0.0, 1.0), lambda: server.start() if server.process is None else None)


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
    proxy = rng.choice(list(deployment.proxies.values()))
    proxy.silent = True
    later(rng.uniform(1, 5), proxy.speak)


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
    deployment.set_clock(0, 600)


def _killing(point: str) -> Fault:
    return Fault(
        f"kill_{point}",
        f"SIGKILL of the pool child, a tenth of the time of its whole worker, at the failpoint `{point}`",
        failpoints={point: _KILL_SHARE},
    )


_ALL: Final = (
    Fault("none", "nothing: the workload alone, with its own failing guards and callbacks"),
    *map(_killing, KILLING),
    Fault("kill_child", "SIGKILL of a random pool child every 0.3 to 1 s", _kill_child, (0.3, 1.0)),
    Fault(
        "kill_worker",
        "SIGKILL of a whole worker or of the beat every 3 to 6 s; a supervisor restarts it",
        _kill_worker,
        (3.0, 6.0),
    ),
    Fault(
        "suspend",
        "SIGSTOP of a worker or a pool child for longer than the lock's time to live, at times than the lease; "
        "then SIGCONT",
        _suspend,
        (2.0, 4.0),
        calm=_resume_all,
    ),
    Fault("redis_flushall", "`FLUSHALL` on the lock server or the broker every 1 to 3 s", _flush, (1.0, 3.0)),
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


def merged(names: list[str]) -> tuple[list[Fault], dict[str, Any]]:
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
