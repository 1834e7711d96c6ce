"""Makes all parts of a deployment and connects them. This is the only place that does so."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

from dispatcher.coordination.limiter import RateLimiter
from dispatcher.coordination.locks import ChainLocks
from dispatcher.delivery.attempts import Attempts
from dispatcher.delivery.ends import Ends
from dispatcher.delivery.groups import Groups
from dispatcher.delivery.leases import Leases
from dispatcher.delivery.local import LocalAttempts
from dispatcher.delivery.pacing import Pacing
from dispatcher.delivery.watchdog import Watchdog
from dispatcher.domain.config import DispatcherConfig
from dispatcher.execution.dry_run import DryRun
from dispatcher.execution.executor import Executor
from dispatcher.execution.paused import PausedTypes
from dispatcher.messages.publisher import CeleryApp, Publisher
from dispatcher.operators.doctor import Doctor
from dispatcher.operators.operations import Operations
from dispatcher.passes.pages import Pages
from dispatcher.passes.parking import Parking
from dispatcher.passes.prune import Pruner
from dispatcher.passes.relay import Relay
from dispatcher.passes.sweep import Sweeper
from dispatcher.passes.turns import Turns
from dispatcher.passes.waking import Waker
from dispatcher.requests.requests import Requests
from dispatcher.settings import Settings
from dispatcher.storage.database import Database
from dispatcher.storage.migrations.revisions import Migrated
from dispatcher.storage.portable import PortableStore
from dispatcher.storage.postgresql import PostgresqlStore
from dispatcher.storage.store import Store

Clock: TypeAlias = Callable[[], datetime]
"""Gives the domain time, as an aware datetime."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The parts of one deployment."""

    config: DispatcherConfig
    settings: Settings
    database: Database
    store: Store
    migrated: Migrated
    locks: ChainLocks
    publisher: Publisher
    requests: Requests
    executor: Executor
    dry_run: DryRun
    attempts: Attempts
    local_attempts: LocalAttempts
    leases: Leases
    watchdog: Watchdog
    pages: Pages
    sweeper: Sweeper
    relay: Relay
    pruner: Pruner
    operations: Operations
    doctor: Doctor


def store_of(database: Database) -> Store:
    """The implementation of the hot reads and writes for a database."""
    return PostgresqlStore(database) if database.dialect == "postgresql" else PortableStore(database)


def open_database(
    settings: Settings, url: str, clock: Clock | None = None, engine_options: Mapping[str, Any] | None = None
) -> Database:
    """The database at `url`; nothing is connected yet."""
    return Database(url, connect_seconds=settings.connect_seconds, clock=clock, engine_options=engine_options)


def wire(
    config: DispatcherConfig,
    settings: Settings,
    *,
    database_url: str,
    redis_url: str | None,
    broker_url: str | None,
    celery_app: CeleryApp | None,
    clock: Clock | None,
    engine_options: Mapping[str, Any] | None = None,
) -> Services:
    """The parts of a deployment. They open connections when they need them."""
    database = open_database(settings, database_url, clock, engine_options)
    locks = ChainLocks(
        redis_url,
        prefix=settings.prefix,
        lock_seconds=settings.lock_seconds,
        connect_seconds=settings.connect_seconds,
    )
    publisher = Publisher(settings, broker_url=broker_url, app=celery_app)
    store = store_of(database)
    migrated = Migrated(database)
    paused = PausedTypes(database)
    turns = Turns(database)
    pages = Pages(config=config, settings=settings, locks=locks, publisher=publisher)
    pacing = Pacing(limiter=RateLimiter(locks.client, prefix=settings.prefix), own_clock=clock is not None)
    ends = Ends(settings=settings, database=database, store=store, publisher=publisher, random=random.random)
    leases = Leases(database, store_of, lease_seconds=settings.lease_seconds)
    watchdog = Watchdog(callback_seconds=settings.callback_seconds)
    parking = Parking(database)
    operations = Operations(config=config, settings=settings, database=database, parking=parking)
    dry_run = DryRun(config=config, database=database, locks=locks, paused=paused)
    return Services(
        config=config,
        settings=settings,
        database=database,
        store=store,
        migrated=migrated,
        locks=locks,
        publisher=publisher,
        requests=Requests(
            config=config,
            settings=settings,
            database=database,
            store=store,
            migrated=migrated,
            publisher=publisher,
            plan=dry_run.plan_as_worker,
        ),
        executor=Executor(
            config=config,
            settings=settings,
            database=database,
            locks=locks,
            publisher=publisher,
            store=store,
            paused=paused,
        ),
        dry_run=dry_run,
        attempts=Attempts(
            settings=settings,
            groups=Groups(
                config=config,
                settings=settings,
                database=database,
                store=store,
                paused=paused,
                pacing=pacing,
                leases=leases,
                watchdog=watchdog,
                ends=ends,
            ),
            ends=ends,
        ),
        local_attempts=LocalAttempts(config=config, database=database, store=store, leases=leases),
        leases=leases,
        watchdog=watchdog,
        pages=pages,
        sweeper=Sweeper(
            config=config,
            settings=settings,
            database=database,
            pages=pages,
            publisher=publisher,
            turns=turns,
            waker=Waker(config=config, settings=settings, database=database),
            parking=parking,
        ),
        relay=Relay(
            config=config,
            settings=settings,
            database=database,
            publisher=publisher,
            turns=turns,
            random=random.random,
        ),
        pruner=Pruner(settings=settings, database=database, turns=turns),
        operations=operations,
        doctor=Doctor(
            config=config,
            settings=settings,
            database=database,
            locks=locks,
            publisher=publisher,
            operations=operations,
        ),
    )
