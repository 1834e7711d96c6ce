"""The hot writes on PostgreSQL: one statement, which commits by itself, for each transaction of `portable`.

A batch with writes of several kinds is one transaction that first locks all its chains in id order. Chain types with a
budget are written by `portable`.

Each statement takes a whole batch as arrays, one array per column, sorted by id. The guards are those of `portable`.
When another transaction has changed a row after the statement began, PostgreSQL waits, and then checks the guard again
on the new row. It does not check again what a guard asks of a row of *another* table. Each such guard must therefore be
visible in the written row as well: the delivery of a disabled chain has no `publish_after`.

The statements are written for the driver, not for SQLAlchemy, because SQLAlchemy's part would be most of the cost of a
chain. Two tricks are for PostgreSQL's planner, as `EXPLAIN (ANALYZE) EXECUTE` of a prepared statement shows:

- An array parameter stands in a sub-select, `unnest((SELECT %(ids)s::bigint[]))`. Without it the planner sees the
  array's length and plans anew for every call, which takes longer than the execution.
- `LIMIT (SELECT cardinality(...))` hides the number of rows. The planner then expects few rows and looks up each by its
  key (`Index Scan using pk_chain_dispatcher_chain`), also by a plan that was made while the tables were small. Without
  it, such a plan would read the whole table (`Seq Scan on chain_dispatcher_chain`).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeAlias

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from dispatcher.domain.records import (
    MAX_DETAIL,
    Begun,
    ChainRecord,
    DeliveryRecord,
    Finished,
    Move,
    Owed,
    PlannedDelivery,
    Request,
    Rest,
    Timing,
    Write,
    Written,
    by_kind,
    idempotency_key,
    new_uid,
)
from dispatcher.domain.resources import Resource, resource_key
from dispatcher.errors import ChainMissing
from dispatcher.states import NEW
from dispatcher.storage import chains
from dispatcher.storage.database import Database, run_statement
from dispatcher.storage.models import storable
from dispatcher.storage.portable import PortableStore, in_their_order
from dispatcher.storage.rows import MACHINE_NOW, RESOURCES, Found, chain_list, chains_of, deliveries_of, delivery_list
from dispatcher.storage.statements import new_id
from dispatcher.storage.store import Limit

_Run: TypeAlias = Callable[[str, Mapping[str, Any]], Found]
"""Runs a statement with its parameters and gives its rows: `Database.write_statement`, or one within a transaction."""

_FINISHES: Final = 10

_CHAIN: Final = f"""{chain_list("c")},
  ARRAY(SELECT ARRAY[r.resource_type, r.resource_id]::text[]
        FROM chain_dispatcher_resource r WHERE r.chain_id = c.id) AS {RESOURCES},
  clock_timestamp() AS {MACHINE_NOW}"""

# What a move writes into a chain's row, from a row `m` with the new state, rest and due time.
_MOVED: Final = """state = m.to_state, version = c.version + 1, moves = c.moves + 1, pending_delivery_id = NULL,
    failures = 0, next_update_at = m.next_update_at, due_at = CASE WHEN NOT c.disabled THEN m.due_at END,
    updated_at = %(now)s, entered_at = %(now)s"""

_READ: Final = f"""
SELECT
  {_CHAIN}
FROM (
  SELECT unnest((SELECT %(ids)s::bigint[])) AS id LIMIT (SELECT cardinality(%(ids)s::bigint[]))
) i JOIN chain_dispatcher_chain c ON c.id = i.id"""

_LOCK: Final = """
SELECT id FROM chain_dispatcher_chain WHERE id = ANY(%(ids)s::bigint[]) ORDER BY id FOR NO KEY UPDATE"""

_MOVE: Final = f"""
WITH i AS (
  SELECT * FROM unnest(
    (SELECT %(ids)s::bigint[]), (SELECT %(versions)s::bigint[]), (SELECT %(wakes)s::bigint[]),
    (SELECT %(from_states)s::text[]), (SELECT %(to_states)s::text[]), (SELECT %(rests)s::timestamptz[]),
    (SELECT %(dues)s::timestamptz[]), (SELECT %(names)s::text[]), (SELECT %(by)s::text[]))
  AS t (id, version, wake, from_state, to_state, next_update_at, due_at, transition, requested_by)
  LIMIT (SELECT cardinality(%(ids)s::bigint[]))
), moved AS (
  UPDATE chain_dispatcher_chain c
  SET {_MOVED}, request = CASE WHEN c.wake <> m.wake THEN c.request END
  FROM i AS m
  WHERE c.id = m.id AND c.version = m.version AND NOT c.disabled AND c.pending_delivery_id IS NULL
  RETURNING m.*
)
INSERT INTO chain_dispatcher_event (chain_id, chain_version, move_version, action, value, from_state, to_state,
  requested_by, detail, created_at)
SELECT id, version + 1, version + 1, 'state_transition', to_state, from_state, to_state, requested_by, transition,
  %(now)s
FROM moved
RETURNING chain_id"""

_REST: Final = """
WITH i AS (
  SELECT * FROM unnest(
    (SELECT %(ids)s::bigint[]), (SELECT %(versions)s::bigint[]), (SELECT %(wakes)s::bigint[]),
    (SELECT %(states)s::text[]), (SELECT %(dues)s::timestamptz[]), (SELECT %(failures)s::int[]),
    (SELECT %(clears)s::bool[]), (SELECT %(actions)s::text[]), (SELECT %(details)s::text[]))
  AS t (id, version, wake, state, due_at, failures, clears, action, detail)
  LIMIT (SELECT cardinality(%(ids)s::bigint[]))
), rested AS (
  UPDATE chain_dispatcher_chain c
  SET due_at = i.due_at, failures = i.failures, request = CASE WHEN NOT i.clears THEN c.request END,
    updated_at = %(now)s
  FROM i
  WHERE c.id = i.id AND c.version = i.version AND c.wake = i.wake
    AND NOT c.disabled AND c.pending_delivery_id IS NULL
  RETURNING i.*
), history AS (
  INSERT INTO chain_dispatcher_event (chain_id, chain_version, action, value, from_state, to_state, detail, created_at)
  SELECT id, version, action, state, state, state, detail, %(now)s FROM rested WHERE action IS NOT NULL
)
SELECT id FROM rested"""

_PLAN: Final = """
WITH i AS (
  SELECT * FROM unnest(
    (SELECT %(ids)s::bigint[]), (SELECT %(versions)s::bigint[]), (SELECT %(wakes)s::bigint[]),
    (SELECT %(from_states)s::text[]), (SELECT %(delivery_ids)s::uuid[]), (SELECT %(keys)s::uuid[]),
    (SELECT %(names)s::text[]), (SELECT %(final_states)s::text[]), (SELECT %(callbacks)s::text[]),
    (SELECT %(max_attempts)s::int[]), (SELECT %(kwargs)s::text[]), (SELECT %(contexts)s::text[]),
    (SELECT %(requests)s::text[]), (SELECT %(rests)s::timestamptz[]), (SELECT %(by)s::text[]))
  AS t (id, version, wake, from_state, delivery_id, idempotency_key, transition, final_state, callback,
    max_attempts, kwargs, context, request, rest_until, requested_by)
  LIMIT (SELECT cardinality(%(ids)s::bigint[]))
), planned AS (
  UPDATE chain_dispatcher_chain c
  SET version = c.version + 1, pending_delivery_id = i.delivery_id, due_at = NULL, failures = 0,
    updated_at = %(now)s, request = CASE WHEN c.wake <> i.wake THEN c.request END
  FROM i
  WHERE c.id = i.id AND c.version = i.version AND NOT c.disabled AND c.pending_delivery_id IS NULL
  RETURNING i.*
), owed AS (
  INSERT INTO chain_dispatcher_delivery (id, idempotency_key, chain_id, chain_version, transition, from_state,
    final_state, callback, status, attempt, begins, max_attempts, requested_by, kwargs, context, request, rest_until,
    planned_at, waits_since, next_attempt_at, publish_after, lease_until)
  SELECT delivery_id, idempotency_key, id, version + 1, transition, from_state, final_state, callback,
    CASE WHEN l.seconds IS NULL THEN 'pending' ELSE 'running' END, CASE WHEN l.seconds IS NULL THEN 0 ELSE 1 END,
    CASE WHEN l.seconds IS NULL THEN 0 ELSE 1 END, max_attempts, requested_by, kwargs::json, context::json,
    request::json, rest_until, clock_timestamp(), clock_timestamp(),
    clock_timestamp(),
    clock_timestamp() + make_interval(secs => coalesce(l.seconds, %(publish_seconds)s::float8)),
    clock_timestamp() + make_interval(secs => l.seconds)
  FROM planned CROSS JOIN (SELECT %(lease_seconds)s::float8 AS seconds) l
), history AS (
  INSERT INTO chain_dispatcher_event (chain_id, chain_version, action, value, from_state, to_state, requested_by,
    detail, created_at)
  SELECT id, version + 1, 'planned', transition, from_state, final_state, requested_by, callback, %(now)s
  FROM planned
)
SELECT id FROM planned"""

# `jsonb` refuses some escapes that `json` has stored, and halves of surrogate pairs: there the texts are compared.
_REQUEST: Final = """
WITH old AS (
  SELECT id, version, request, coalesce(%(now)s::timestamptz, clock_timestamp()) AS now
  FROM chain_dispatcher_chain WHERE id = %(id)s FOR NO KEY UPDATE
), written AS (
  UPDATE chain_dispatcher_chain c
  SET wake = c.wake + 1, request = %(request)s::json, updated_at = old.now,
    due_at = CASE WHEN c.pending_delivery_id IS NULL AND NOT c.disabled THEN greatest(old.now, c.next_update_at) END
  FROM old
  WHERE c.id = old.id
), history AS (
  INSERT INTO chain_dispatcher_event (chain_id, chain_version, action, requested_by, created_at)
  SELECT id, version, 'request_replaced', %(by)s, now FROM old
  WHERE CASE WHEN request::text ~* '\\\\u(0000|d[89a-f])' THEN request::text <> %(request)s::json::text
    ELSE request::jsonb <> %(request)s::jsonb END
)
SELECT id FROM old"""


_LEASED: Final = """waits_since = clock_timestamp(), lapse_seen_at = NULL,
  lease_until = clock_timestamp() + make_interval(secs => %(lease_seconds)s::float8),
  publish_after = clock_timestamp() + make_interval(secs => %(lease_seconds)s::float8)"""

# `publish_after` is asked in a CASE, because the planner would otherwise search the relay's index instead of the key.
_BEGIN: Final = f"""
UPDATE chain_dispatcher_delivery d
SET status = 'running', attempt = d.attempt + 1, begins = d.begins + 1, next_attempt_at = clock_timestamp(),
  uncalled = d.begins + 1, {_LEASED}
FROM (
  SELECT * FROM unnest((SELECT %(ids)s::uuid[]), (SELECT %(attempts)s::int[])) AS t (id, attempt)
  LIMIT (SELECT cardinality(%(ids)s::uuid[]))
) i, chain_dispatcher_chain c
WHERE d.id = i.id AND d.attempt = i.attempt - 1 AND d.status = 'pending'
  AND CASE WHEN d.publish_after IS NULL THEN false ELSE d.next_attempt_at <= clock_timestamp() END
  AND c.id = d.chain_id AND c.pending_delivery_id = d.id AND NOT c.disabled
RETURNING {delivery_list("d")},
  {_CHAIN}"""

_RUNNING: Final = """
  SELECT * FROM unnest((SELECT %(ids)s::uuid[]), (SELECT %(attempts)s::int[]), (SELECT %(begins)s::int[]))
  AS t (id, attempt, begins)
  LIMIT (SELECT cardinality(%(ids)s::uuid[]))"""

_BEGIN_ANEW: Final = f"""
UPDATE chain_dispatcher_delivery d
SET {_LEASED}
FROM ({_RUNNING}
) i, chain_dispatcher_chain c
WHERE d.id = i.id AND d.attempt = i.attempt AND d.begins IS NOT DISTINCT FROM i.begins AND d.status = 'running'
  AND c.id = d.chain_id AND c.pending_delivery_id = d.id AND NOT c.disabled
RETURNING {delivery_list("d")},
  {_CHAIN}"""

_MARK_CALLED: Final = f"""
UPDATE chain_dispatcher_delivery d
SET uncalled = NULL, {_LEASED}
FROM ({_RUNNING}
) i
WHERE d.id = i.id AND d.attempt = i.attempt AND d.begins IS NOT DISTINCT FROM i.begins AND d.status = 'running'
RETURNING d.id::text AS id"""

# One statement, because the connection may swallow everything from any moment on: between the statements of a
# transaction the server would hold the locks of the rows, and the end of an attempt would wait for them.
_RENEW: Final = f"""
UPDATE chain_dispatcher_delivery d
SET next_attempt_at = least(d.next_attempt_at, clock_timestamp()), {_LEASED}
FROM (
  SELECT r.id FROM ({_RUNNING}
  ) i JOIN chain_dispatcher_delivery r ON r.id = i.id
  WHERE r.attempt = i.attempt AND r.begins IS NOT DISTINCT FROM i.begins AND r.status = 'running'
  ORDER BY r.id FOR NO KEY UPDATE OF r SKIP LOCKED
) free
WHERE d.id = free.id
RETURNING d.id::text AS id"""

# A single statement cannot ROLLBACK. It divides by zero to abort itself when fewer chains moved than deliveries closed,
# because a chain was taken from its delivery while the statement waited for a row; `finish` then runs it again.
_DIVISION_BY_ZERO: Final = "22012"
_FINISH: Final = f"""
WITH i AS (
  SELECT * FROM unnest(
    (SELECT %(ids)s::uuid[]), (SELECT %(attempts)s::int[]), (SELECT %(begins)s::int[]),
    (SELECT %(rests)s::timestamptz[]), (SELECT %(dues)s::timestamptz[]))
  AS t (id, attempt, begins, next_update_at, due_at)
  LIMIT (SELECT cardinality(%(ids)s::uuid[]))
), closed AS (
  UPDATE chain_dispatcher_delivery d
  SET status = 'delivered', finished_at = clock_timestamp(), lease_until = NULL, next_attempt_at = NULL,
    publish_after = NULL, waits_for = NULL, waits_reason = NULL, waits_since = NULL, has_place = false,
    kwargs = NULL, context = NULL, request = NULL
  FROM i, chain_dispatcher_chain c
  WHERE d.id = i.id AND d.attempt = i.attempt AND d.begins IS NOT DISTINCT FROM i.begins AND d.status = 'running'
    AND c.id = d.chain_id AND c.pending_delivery_id = d.id
  RETURNING d.id, d.chain_id, d.transition, d.from_state, d.final_state AS to_state, d.requested_by, i.next_update_at,
    i.due_at
), moved AS (
  UPDATE chain_dispatcher_chain c
  SET {_MOVED}, request = CASE WHEN m.due_at IS NOT NULL THEN c.request END
  FROM closed AS m
  WHERE c.id = m.chain_id AND c.pending_delivery_id = m.id
  RETURNING m.*, c.version
), history AS (
  INSERT INTO chain_dispatcher_event (chain_id, chain_version, move_version, action, value, from_state, to_state,
    requested_by, detail, created_at)
  SELECT chain_id, version, version, 'state_transition', to_state, from_state, to_state, requested_by, transition,
    %(now)s
  FROM moved
)
SELECT (SELECT array_agg(id::text) FROM moved) AS finished,
  1 / (CASE WHEN (SELECT count(*) FROM closed) = (SELECT count(*) FROM moved) THEN 1 ELSE 0 END) AS whole"""


_CREATE: Final = """
WITH i AS (
  SELECT * FROM unnest((SELECT %(keys)s::text[]), (SELECT %(uids)s::uuid[])) AS t (resource_key, uid)
  LIMIT (SELECT cardinality(%(keys)s::text[]))
), m AS (
  SELECT coalesce(%(now)s::timestamptz, clock_timestamp()) AS now
), made AS (
  INSERT INTO chain_dispatcher_chain (chain_type, resource_key, uid, state, due_at, created_at, updated_at, started_at,
    entered_at)
  SELECT %(type_name)s::text, i.resource_key, i.uid, %(new)s::text, CASE WHEN %(due)s::bool THEN m.now END,
    m.now, m.now, m.now, m.now
  FROM i CROSS JOIN m ORDER BY i.resource_key
  ON CONFLICT (chain_type, resource_key) DO NOTHING
  RETURNING id, resource_key, created_at
), resources AS (
  INSERT INTO chain_dispatcher_resource (chain_id, resource_type, resource_id)
  SELECT made.id, r.resource_type, r.resource_id
  FROM made JOIN unnest(
    (SELECT %(owners)s::text[]), (SELECT %(resource_types)s::text[]), (SELECT %(resource_ids)s::text[]))
  AS r (resource_key, resource_type, resource_id) USING (resource_key)
), history AS (
  INSERT INTO chain_dispatcher_event (chain_id, chain_version, action, value, to_state, created_at)
  SELECT id, 0, 'created', %(new)s::text, %(new)s::text, created_at FROM made ORDER BY id
)
SELECT id, resource_key FROM made"""


class PostgresqlStore:
    """The store of one PostgreSQL database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._portable = PortableStore(database)

    def read(self, chain_ids: Sequence[int]) -> tuple[dict[int, ChainRecord], datetime | None]:
        with self._database.read() as connection:
            found = run_statement(connection, _READ, {"ids": list(chain_ids)})
        moments = found.column(MACHINE_NOW)
        records = {record.id: record for record in chains_of(found)}
        return records, moments[0].astimezone(UTC) if moments else None

    def write(
        self, writes: Sequence[Write], *, now: datetime, timing: Timing, limits: Mapping[str, Limit] | None = None
    ) -> Written:
        if limits:
            return self._portable.write(writes, now=now, timing=timing, limits=limits)
        if len({type(change) for change in writes}) == 1:
            return Written(_write(self._database.write_statement, writes, now=now, timing=timing))

        def statements(connection: Connection) -> dict[int, str | None]:
            run = partial(run_statement, connection)
            # Each statement locks its chains in id order; this lock makes it the order over all statements.
            run(_LOCK, {"ids": [change.record.id for change in writes]})
            return _write(run, writes, now=now, timing=timing)

        return Written(self._database.write(statements))

    def write_request(self, chain_id: int, request: Request) -> None:
        clock = self._database.clock
        parameters = {
            "id": chain_id,
            "request": json.dumps(request.to_json()),
            "by": request.requested_by,
            "now": None if clock is None else clock(),
        }
        if not self._database.write_statement(_REQUEST, parameters).rows:
            raise ChainMissing(chain_id)

    def request_chain(self, type_name: str, resources: Sequence[Resource], request: Request, *, due: bool) -> int:
        with self._database.read() as connection:
            chain_id = chains.find_exact(connection, type_name, resources)
        if chain_id is not None:
            with suppress(ChainMissing):  # erased since the read
                self.write_request(chain_id, request)
                return chain_id
        return self._portable.request_chain(type_name, resources, request, due=due)

    def begin(self, owed: Sequence[Owed], *, lease_seconds: float) -> list[Begun]:
        owed = sorted(owed, key=lambda message: message.delivery_id)
        found = self._database.write_statement(
            _BEGIN,
            {
                "ids": [message.delivery_id for message in owed],
                "attempts": [message.attempt for message in owed],
                "lease_seconds": lease_seconds,
            },
        )
        return _all_begun(found)

    def begin_anew(self, running: Sequence[DeliveryRecord], *, lease_seconds: float) -> list[Begun]:
        if not running:
            return []
        return _all_begun(self._database.write_statement(_BEGIN_ANEW, _ours(running, lease_seconds)))

    def mark_called(self, running: Sequence[DeliveryRecord], *, lease_seconds: float) -> set[str]:
        return set(self._database.write_statement(_MARK_CALLED, _ours(running, lease_seconds)).column("id"))

    def renew(self, running: Sequence[DeliveryRecord], *, lease_seconds: float) -> None:
        self._database.write_statement(_RENEW, _ours(running, lease_seconds))

    def finish(self, finished: Sequence[Finished], *, now: datetime) -> set[str]:
        finished = sorted(finished, key=lambda end: end.delivery.id)
        parameters = {
            "ids": [end.delivery.id for end in finished],
            "attempts": [end.delivery.attempt for end in finished],
            "begins": [end.delivery.begins for end in finished],
            "rests": [end.next_update_at for end in finished],
            "dues": [end.due_at for end in finished],
            "now": now,
        }
        for turn in range(_FINISHES + 1):
            try:
                found = self._database.write_statement(_FINISH, parameters)
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) != _DIVISION_BY_ZERO or turn == _FINISHES:
                    raise
            else:
                return set(found.column("finished")[0] or ())
        raise AssertionError("unreachable")

    def create_many(
        self, type_name: str, resource_sets: Sequence[Sequence[Resource]], *, now: datetime | None, due: bool
    ) -> list[tuple[int, bool]]:
        keys = [resource_key(pairs) for pairs in resource_sets]
        by_key = dict(zip(keys, resource_sets, strict=True))
        with self._database.read() as connection:
            found = chains.ids_by_key(connection, type_name, by_key)
        missing = sorted(by_key.keys() - found.keys())
        if not missing:
            return in_their_order(keys, found, ())
        pairs = [(key, kind, identity) for key in missing for kind, identity in by_key[key]]
        rows = self._database.write_statement(
            _CREATE,
            {
                "type_name": type_name,
                "keys": missing,
                "uids": [new_uid() for _ in missing],
                "owners": [key for key, _, _ in pairs],
                "resource_types": [kind for _, kind, _ in pairs],
                "resource_ids": [identity for _, _, identity in pairs],
                "new": NEW,
                "due": due,
                "now": now,
            },
        )
        made = dict(zip(rows.column("resource_key"), rows.column("id"), strict=True))
        others = [key for key in missing if key not in made]  # another caller was faster
        with self._database.read() as connection:
            found.update(chains.ids_by_key(connection, type_name, others), **made)
        return in_their_order(keys, found, made)


def _write(run: _Run, writes: Sequence[Write], *, now: datetime, timing: Timing) -> dict[int, str | None]:
    """Write what came of executions: `{chain id: id of its new delivery, if any}` of the chains that are unchanged."""
    moves, rests, planned = by_kind(writes)
    done: dict[int, str | None] = {}
    if moves:
        done.update(dict.fromkeys(_write_moves(run, moves, now=now)))
    if rests:
        done.update(dict.fromkeys(_write_rests(run, rests, now=now)))
    if planned:
        done.update(_write_plans(run, planned, now=now, timing=timing))
    return done


def _write_moves(run: _Run, moves: Sequence[Move], *, now: datetime) -> set[int]:
    """Move chains; the ids of those that are unchanged since they were read. A request that came since is kept."""
    moves = sorted(moves, key=lambda move: move.record.id)
    found = run(
        _MOVE,
        {
            **_read_as(move.record for move in moves),
            "wakes": _wakes(moves),
            "from_states": [move.record.state for move in moves],
            "to_states": [move.to_state for move in moves],
            "rests": [move.next_update_at for move in moves],
            "dues": [move.due_at for move in moves],
            "names": [move.transition for move in moves],
            "by": [move.requested_by for move in moves],
            "now": now,
        },
    )
    return set(found.column("chain_id"))


def _write_rests(run: _Run, rests: Sequence[Rest], *, now: datetime) -> set[int]:
    """Let chains stay; the ids of those that are unchanged since they were read and were not enqueued meanwhile."""
    rests = sorted(rests, key=lambda rest: rest.record.id)
    found = run(
        _REST,
        {
            **_read_as(rest.record for rest in rests),
            "states": [rest.record.state for rest in rests],
            "dues": [rest.due_at for rest in rests],
            "failures": [rest.failures for rest in rests],
            "clears": [rest.clear_request for rest in rests],
            "actions": [None if rest.event is None else rest.event.value for rest in rests],
            "details": [storable(rest.detail[:MAX_DETAIL]) if rest.detail else None for rest in rests],
            "now": now,
        },
    )
    return set(found.column("id"))


def _write_plans(
    run: _Run,
    planned: Sequence[PlannedDelivery],
    *,
    now: datetime,
    timing: Timing,
) -> dict[int, str]:
    """Plan deliveries; their ids by chain id. A chain that has changed since it was read gets none."""
    planned = sorted(planned, key=lambda plan: plan.record.id)
    ids = [new_id() for _ in planned]
    found = run(
        _PLAN,
        {
            **_read_as(plan.record for plan in planned),
            "wakes": _wakes(planned),
            "from_states": [plan.record.state for plan in planned],
            "delivery_ids": ids,
            "keys": [idempotency_key(plan.record, plan.transition) for plan in planned],
            "names": [plan.transition for plan in planned],
            "final_states": [plan.final_state for plan in planned],
            "callbacks": [plan.callback for plan in planned],
            "max_attempts": [plan.max_attempts for plan in planned],
            "kwargs": [_json(plan.kwargs) for plan in planned],
            "contexts": [_json(plan.context) for plan in planned],
            "requests": [_json(plan.stored_request) for plan in planned],
            "rests": [plan.rest_until for plan in planned],
            "by": [plan.requested_by for plan in planned],
            "now": now,
            "publish_seconds": timing.publish_seconds,
            "lease_seconds": timing.lease_seconds,
        },
    )
    applied = set(found.column("id"))
    return {plan.record.id: made for plan, made in zip(planned, ids, strict=True) if plan.record.id in applied}


def _json(value: Mapping[str, Any] | None) -> str | None:
    return json.dumps(dict(value)) if value else None


def _read_as(records: Iterable[ChainRecord]) -> dict[str, list[int]]:
    read = list(records)
    return {
        "ids": [record.id for record in read],
        "versions": [record.version for record in read],
        "wakes": [record.wake for record in read],
    }


def _ours(running: Sequence[DeliveryRecord], lease_seconds: float) -> dict[str, Any]:
    running = sorted(running, key=lambda delivery: delivery.id)
    return {
        "ids": [delivery.id for delivery in running],
        "attempts": [delivery.attempt for delivery in running],
        "begins": [delivery.begins for delivery in running],
        "lease_seconds": lease_seconds,
    }


def _all_begun(found: Found) -> list[Begun]:
    """The begun attempts in the rows of a statement, in the order of their ids."""
    rows = zip(deliveries_of(found), chains_of(found), found.column(MACHINE_NOW), strict=True)
    return sorted((_begun(*row) for row in rows), key=lambda attempt: attempt.delivery.id)


def _begun(delivery: DeliveryRecord, chain: ChainRecord, machine_now: datetime) -> Begun:
    if chain.state != delivery.from_state:
        # The statement read the chain before it waited for the delivery, and meanwhile a mapping has renamed the state.
        chain = replace(chain, state=delivery.from_state)
    return Begun(delivery, chain, machine_now.astimezone(UTC))


_NO_WAKE: Final = -1


def _wakes(writes: Iterable[Move | PlannedDelivery]) -> list[int]:
    """The wakes as they were read: where the row has another one, its request stays. So it does where none is taken."""
    return [write.record.wake if write.takes_request else _NO_WAKE for write in writes]
