"""PostgreSQL's own way of the hot paths: one statement, which commits by itself, for what `portable` does in several.

Where a batch has writes of several kinds they share a transaction, after one lock in id order; types with a budget are
written by the statements of `portable`.

Each statement takes a whole batch as arrays, one per column, in the order of the rows' ids. The guards are those of
`portable`. A row that another transaction changed after the statement began is locked and its guard asked again as it
then is; what a guard asks of *another* table's row is not asked again, so each guard that matters there stands in the
written row as well (a delivery of a disabled chain has no `publish_after`).

The statements are in the driver's own words: `portable` needs SQLAlchemy to speak to three databases, this module
speaks to one, and what SQLAlchemy costs would be most of what a chain costs. Two things in them are for the planner: an
array in a sub-select is planned once (one whose length it sees is planned anew each time, which takes longer than to
execute it), and behind a LIMIT that it does not see it expects one row, and looks each up by its key, even by a plan
that was made when the tables were small.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

from sqlalchemy.exc import DBAPIError

from dispatcher.domain.records import (
    MAX_DETAIL,
    Begun,
    ChainRecord,
    Finished,
    Move,
    Owed,
    PlannedDelivery,
    Request,
    Rest,
    Timing,
    Write,
    by_kind,
    idempotency_key,
)
from dispatcher.storage.deliveries import LostChain
from dispatcher.storage.models import storable
from dispatcher.storage.rows import DELIVERY_WIDTH, chain_of, delivery_of
from dispatcher.storage.statements import new_id

Run: TypeAlias = Callable[[str, Mapping[str, Any]], list[Any]]
"""Runs a statement with its parameters and gives its rows: `Database.write_statement`, or one within a transaction."""

_READ: Final = """
SELECT
  c.id, c.chain_type, c.state, c.disabled, c.next_update_at, c.due_at, c.version, c.wake, c.moves,
  c.pending_delivery_id::text, c.failures, c.created_at, c.updated_at, c.context, c.request,
  ARRAY(SELECT ARRAY[r.resource_type, r.resource_id]::text[]
        FROM chain_dispatcher_resource r WHERE r.chain_id = c.id),
  clock_timestamp()
FROM (
  SELECT unnest((SELECT %(ids)s::bigint[])) AS id LIMIT (SELECT cardinality(%(ids)s::bigint[]))
) i JOIN chain_dispatcher_chain c ON c.id = i.id"""

_LOCK: Final = """
SELECT id FROM chain_dispatcher_chain WHERE id = ANY(%(ids)s::bigint[]) ORDER BY id FOR NO KEY UPDATE"""

_MOVE: Final = """
WITH i AS (
  SELECT * FROM unnest(
    (SELECT %(ids)s::bigint[]), (SELECT %(versions)s::bigint[]), (SELECT %(wakes)s::bigint[]),
    (SELECT %(from_states)s::text[]), (SELECT %(to_states)s::text[]), (SELECT %(rests)s::timestamptz[]),
    (SELECT %(dues)s::timestamptz[]), (SELECT %(names)s::text[]), (SELECT %(by)s::text[]))
  AS t (id, version, wake, from_state, to_state, next_update_at, due_at, transition, requested_by)
  LIMIT (SELECT cardinality(%(ids)s::bigint[]))
), moved AS (
  UPDATE chain_dispatcher_chain c
  SET state = i.to_state, version = c.version + 1, moves = c.moves + 1, failures = 0,
    next_update_at = i.next_update_at, due_at = i.due_at, updated_at = %(now)s,
    request = CASE WHEN c.wake <> i.wake THEN c.request END
  FROM i
  WHERE c.id = i.id AND c.version = i.version AND NOT c.disabled AND c.pending_delivery_id IS NULL
  RETURNING i.*
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
  SET due_at = i.due_at, failures = i.failures, request = CASE WHEN NOT i.clears THEN c.request END
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
    (SELECT %(by)s::text[]))
  AS t (id, version, wake, from_state, delivery_id, idempotency_key, transition, final_state, callback,
    max_attempts, kwargs, context, requested_by)
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
    final_state, callback, status, attempt, max_attempts, requested_by, kwargs, context, planned_at, next_attempt_at,
    publish_after, lease_until)
  SELECT delivery_id, idempotency_key, id, version + 1, transition, from_state, final_state, callback,
    CASE WHEN l.seconds IS NULL THEN 'pending' ELSE 'running' END, CASE WHEN l.seconds IS NULL THEN 0 ELSE 1 END,
    max_attempts, requested_by, kwargs::json, context::json, clock_timestamp(),
    CASE WHEN l.seconds IS NULL THEN clock_timestamp() END,
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

_REQUEST: Final = """
WITH old AS (
  SELECT id, version, request, coalesce(%(now)s::timestamptz, clock_timestamp()) AS now
  FROM chain_dispatcher_chain WHERE id = %(id)s FOR NO KEY UPDATE
), written AS (
  UPDATE chain_dispatcher_chain c
  SET wake = c.wake + 1, request = %(request)s::json,
    due_at = CASE WHEN c.pending_delivery_id IS NULL AND NOT c.disabled THEN greatest(old.now, c.next_update_at) END
  FROM old
  WHERE c.id = old.id
), history AS (
  INSERT INTO chain_dispatcher_event (chain_id, chain_version, action, requested_by, created_at)
  SELECT id, version, 'request_replaced', %(by)s, now FROM old WHERE request::text <> %(request)s::text
)
SELECT id FROM old"""


# That a delivery is given to the relay is asked in a CASE, or its small index would be searched instead of its key.
_BEGIN: Final = """
UPDATE chain_dispatcher_delivery d
SET status = 'running', attempt = d.attempt + 1,
  lease_until = clock_timestamp() + make_interval(secs => %(lease_seconds)s::float8),
  publish_after = clock_timestamp() + make_interval(secs => %(lease_seconds)s::float8)
FROM (
  SELECT * FROM unnest((SELECT %(ids)s::uuid[]), (SELECT %(attempts)s::int[])) AS t (id, attempt)
  LIMIT (SELECT cardinality(%(ids)s::uuid[]))
) i, chain_dispatcher_chain c
WHERE d.id = i.id AND d.attempt = i.attempt - 1 AND d.status = 'pending'
  AND CASE WHEN d.publish_after IS NULL THEN false ELSE d.next_attempt_at <= clock_timestamp() END
  AND c.id = d.chain_id AND c.pending_delivery_id = d.id AND NOT c.disabled
RETURNING
  d.id::text, d.idempotency_key::text, d.chain_id, d.chain_version, d.transition, d.from_state, d.final_state,
  d.callback, d.status, d.attempt, d.max_attempts, d.unknown, d.next_attempt_at, d.publish_after, d.lease_until,
  d.planned_at, d.finished_at, d.requested_by, d.last_error, d.kwargs, d.context,
  c.id, c.chain_type, c.state, c.disabled, c.next_update_at, c.due_at, c.version, c.wake, c.moves,
  c.pending_delivery_id::text, c.failures, c.created_at, c.updated_at, c.context, c.request,
  ARRAY(SELECT ARRAY[r.resource_type, r.resource_id]::text[]
        FROM chain_dispatcher_resource r WHERE r.chain_id = c.id),
  clock_timestamp()"""

# Fewer moved than closed must undo the whole statement: dividing by zero is how a statement says so itself.
_DIVISION_BY_ZERO: Final = "22012"
_FINISH: Final = """
WITH i AS (
  SELECT * FROM unnest(
    (SELECT %(ids)s::uuid[]), (SELECT %(attempts)s::int[]), (SELECT %(rests)s::timestamptz[]),
    (SELECT %(dues)s::timestamptz[]))
  AS t (id, attempt, next_update_at, due_at)
  LIMIT (SELECT cardinality(%(ids)s::uuid[]))
), closed AS (
  UPDATE chain_dispatcher_delivery d
  SET status = 'delivered', finished_at = clock_timestamp(), lease_until = NULL, next_attempt_at = NULL,
    publish_after = NULL, kwargs = NULL, context = NULL
  FROM i, chain_dispatcher_chain c
  WHERE d.id = i.id AND d.attempt = i.attempt AND d.status = 'running'
    AND c.id = d.chain_id AND c.pending_delivery_id = d.id
  RETURNING d.id, d.chain_id, d.transition, d.from_state, d.final_state, d.requested_by, i.next_update_at, i.due_at
), moved AS (
  UPDATE chain_dispatcher_chain c
  SET state = d.final_state, version = c.version + 1, moves = c.moves + 1, pending_delivery_id = NULL, failures = 0,
    next_update_at = d.next_update_at, due_at = CASE WHEN NOT c.disabled THEN d.due_at END,
    request = CASE WHEN d.due_at IS NOT NULL THEN c.request END, updated_at = %(now)s
  FROM closed d
  WHERE c.id = d.chain_id AND c.pending_delivery_id = d.id
  RETURNING d.*, c.version
), history AS (
  INSERT INTO chain_dispatcher_event (chain_id, chain_version, move_version, action, value, from_state, to_state,
    requested_by, detail, created_at)
  SELECT chain_id, version, version, 'state_transition', final_state, from_state, final_state, requested_by,
    transition, %(now)s
  FROM moved
)
SELECT (SELECT array_agg(id::text) FROM moved),
  1 / (CASE WHEN (SELECT count(*) FROM closed) = (SELECT count(*) FROM moved) THEN 1 ELSE 0 END)"""


def read(run: Run, chain_ids: Sequence[int]) -> tuple[dict[int, ChainRecord], datetime | None]:
    """As `chains.read_with_clock`."""
    rows = run(_READ, {"ids": list(chain_ids)})
    records = {row[0]: chain_of(row) for row in rows}
    return records, rows[0][-1].astimezone(UTC) if rows else None


def lock(run: Run, chain_ids: Sequence[int]) -> None:
    """Lock these chains, in id order, until the transaction ends."""
    run(_LOCK, {"ids": list(chain_ids)})


def write(run: Run, writes: Sequence[Write], *, now: datetime, timing: Timing) -> dict[int, str | None]:
    """Write what came of executions: `{chain id: id of its new delivery, if any}` of the chains that are unchanged."""
    moves, rests, planned = by_kind(writes)
    done: dict[int, str | None] = {}
    if moves:
        done.update(dict.fromkeys(move(run, moves, now=now)))
    if rests:
        done.update(dict.fromkeys(rest(run, rests, now=now)))
    if planned:
        done.update(plan(run, planned, now=now, timing=timing))
    return done


def move(run: Run, moves: Sequence[Move], *, now: datetime) -> set[int]:
    """Move chains; the ids of those that are as they were read, with a request that came in meanwhile kept."""
    moves = sorted(moves, key=lambda one: one.record.id)
    rows = run(
        _MOVE,
        {
            **_read_as(one.record for one in moves),
            "from_states": [one.record.state for one in moves],
            "to_states": [one.to_state for one in moves],
            "rests": [one.next_update_at for one in moves],
            "dues": [one.due_at for one in moves],
            "names": [one.transition for one in moves],
            "by": [one.requested_by for one in moves],
            "now": now,
        },
    )
    return {row[0] for row in rows}


def rest(run: Run, rests: Sequence[Rest], *, now: datetime) -> set[int]:
    """Let chains stay; the ids of those that are as they were read and that nobody enqueued meanwhile."""
    rests = sorted(rests, key=lambda one: one.record.id)
    rows = run(
        _REST,
        {
            **_read_as(one.record for one in rests),
            "states": [one.record.state for one in rests],
            "dues": [one.due_at for one in rests],
            "failures": [one.failures for one in rests],
            "clears": [one.clear_request for one in rests],
            "actions": [None if one.event is None else one.event.value for one in rests],
            "details": [storable(one.detail[:MAX_DETAIL]) if one.detail else None for one in rests],
            "now": now,
        },
    )
    return {row[0] for row in rows}


def plan(
    run: Run,
    planned: Sequence[PlannedDelivery],
    *,
    now: datetime,
    timing: Timing,
) -> dict[int, str]:
    """The new deliveries' ids, by chain; chains that are not as they were read get none."""
    planned = sorted(planned, key=lambda one: one.record.id)
    ids = [new_id() for _ in planned]
    rows = run(
        _PLAN,
        {
            **_read_as(one.record for one in planned),
            "from_states": [one.record.state for one in planned],
            "delivery_ids": ids,
            "keys": [idempotency_key(one.record.id, one.record.moves, one.transition) for one in planned],
            "names": [one.transition for one in planned],
            "final_states": [one.final_state for one in planned],
            "callbacks": [one.callback for one in planned],
            "max_attempts": [one.max_attempts for one in planned],
            "kwargs": [_json(one.kwargs) for one in planned],
            "contexts": [_json(one.context) for one in planned],
            "by": [one.requested_by for one in planned],
            "now": now,
            "publish_seconds": timing.publish_seconds,
            "lease_seconds": timing.lease_seconds,
        },
    )
    applied = {row[0] for row in rows}
    return {one.record.id: made for one, made in zip(planned, ids, strict=True) if one.record.id in applied}


def write_request(run: Run, chain_id: int, request: Request, *, now: datetime | None) -> bool:
    """Write a request to a chain's row and make it due (`now` None: by the database's clock); False without a row."""
    text = json.dumps(request.to_json())
    return bool(run(_REQUEST, {"id": chain_id, "request": text, "by": request.requested_by, "now": now}))


def begin(run: Run, owed: Sequence[Owed], *, lease_seconds: float) -> list[Begun]:
    """Begin those of these attempts that may begin, in id order; the others are left as they are."""
    owed = sorted(owed, key=lambda one: one.delivery_id)
    rows = run(
        _BEGIN,
        {
            "ids": [one.delivery_id for one in owed],
            "attempts": [one.attempt for one in owed],
            "lease_seconds": lease_seconds,
        },
    )
    begun = [
        Begun(
            delivery_of(row),
            chain_of(row[DELIVERY_WIDTH:]),
            row[-1].astimezone(UTC),
        )
        for row in rows
    ]
    return sorted(begun, key=lambda one: one.delivery.id)


def finish(run: Run, finished: Sequence[Finished], *, now: datetime) -> set[str]:
    """Record delivered attempts and move their chains; the ids of those that were still this process's to finish.

    None of them is recorded, and `LostChain` raised, when a chain was taken from its delivery meanwhile.
    """
    finished = sorted(finished, key=lambda one: one.delivery.id)
    parameters = {
        "ids": [one.delivery.id for one in finished],
        "attempts": [one.delivery.attempt for one in finished],
        "rests": [one.next_update_at for one in finished],
        "dues": [one.due_at for one in finished],
        "now": now,
    }
    try:
        rows = run(_FINISH, parameters)
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == _DIVISION_BY_ZERO:
            raise LostChain from error
        raise
    return set(rows[0][0] or ())


def _json(value: Mapping[str, Any] | None) -> str | None:
    return json.dumps(dict(value)) if value else None


def _read_as(records: Iterable[ChainRecord]) -> dict[str, list[int]]:
    read = list(records)
    return {
        "ids": [record.id for record in read],
        "versions": [record.version for record in read],
        "wakes": [record.wake for record in read],
    }
