"""The contract of the hot reads and writes. `portable` and `postgresql` implement it; `services` chooses between them.

The docstrings below are the specification, and the conformance tests run it against each implementation on each
database. What holds for all of it:

- **Batches.** Every operation takes any number of rows. Each row is guarded for itself: a row whose guard fails is left
  out of the result and is not changed, and the others are written.
- **Transactions.** Each operation commits by itself, as a whole or not at all. After a deadlock, a serialization
  failure or a busy database the whole operation is run again.
- **Locks.** Rows of one table are locked in the order of their ids; of a chain and its delivery the delivery is first.
- **Errors.** `ServiceUnavailable` when the database cannot be reached; its `written` is None if the commit may have
  succeeded. Any other `DBAPIError` is raised as it is, and nothing is written.
- **Bad rows.** A row whose JSON cannot be used is read and begun like the others. The value of that column is then an
  `Unreadable`, which raises `UnreadableRow` for whoever uses it.
- **Time.** `now` is domain time, given by the caller. Machine time is the database's clock (`clock`), read when the
  operation is carried out.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Protocol, TypeAlias

from dispatcher.domain.records import (
    Begun,
    ChainRecord,
    DeliveryRecord,
    Finished,
    Owed,
    Request,
    Timing,
    Write,
    Written,
)
from dispatcher.domain.resources import Resource
from dispatcher.errors import ChainMissing

Limit: TypeAlias = Callable[[int], int | None]
"""How many plans a chain type may have in one hour, given an estimated number of its chains."""


class Store(Protocol):
    """The hot reads and writes of one database."""

    def read(self, chain_ids: Sequence[int]) -> tuple[dict[int, ChainRecord], datetime | None]:
        """The chains with these ids by id, and the database's clock as of the same statement (None without any chain).

        Missing chains are left out. Resources are sorted; moments are aware UTC.
        """

    def write(
        self, writes: Sequence[Write], *, now: datetime, timing: Timing, limits: Mapping[str, Limit] | None = None
    ) -> Written:
        """Write what came of executions. At most one write for each chain.

        Guard of a move and of a plan: the chain exists, has the `version` that was read, is not disabled, and has no
        open delivery. Guard of a rest: these, and the `wake` that was read, because an enqueue that came since must not
        lose its wake-up.

        - *Move*: state, version + 1, moves + 1, failures 0, rest and due time, `entered_at`; one `state_transition`
          event.
        - *Plan*: a delivery (begun at once where `timing` has a lease), version + 1, failures 0, not due; one `planned`
          event.
        - *Rest*: due time and failures, and one event where it has one; the version stays.

        A move and a plan take the request out of the row, unless an enqueue came since the read, or the write says that
        it takes none. The delivery of a plan remembers the request that it took.

        `limits` names chain types with a limit of plans per hour (moves count as plans). Their rows are locked first,
        in the order of the mapping. What goes beyond a limit, or belongs to a paused type, is `Written.refused`; a type
        that wanted more than its limit is paused, and named in `Written.paused`.
        """

    def write_request(self, chain_id: int, request: Request) -> None:
        """Write an application's request to a chain's row: `wake` + 1, and due at once or at the end of its rest.

        A chain that is disabled or has an open delivery keeps an empty due time. An earlier, different request leaves a
        `request_replaced` event; requests are compared as JSON values (2 equals 2.0, the order of keys does not
        matter). Raises `ChainMissing`.
        """

    def request_chain(self, type_name: str, resources: Sequence[Resource], request: Request, *, due: bool) -> int:
        """As `write_request`, for the chain with exactly these resources; its id.

        A chain that does not exist is created in NEW, due at once where `due` says so; its `created` event has the
        request's `requested_by`. Concurrent callers get the same chain.
        """

    def begin(self, owed: Sequence[Owed], *, lease_seconds: float) -> list[Begun]:
        """Begin those of these attempts that may begin, in the order of their ids.

        Guard: the delivery is pending, its last attempt is the one before, its `next_attempt_at` is reached by the
        database's clock, its `publish_after` is set (it is NULL while the delivery is parked), its chain waits for it
        and is not disabled. The rows in `Begun` are those after the write: running, with the new attempt and lease, and
        one more of `begins`. What the delivery waited for before stands there as it was. They say that the callbacks
        are not called yet (`uncalled`): `mark_called` must come before the call.
        """

    def begin_anew(self, running: Sequence[DeliveryRecord], *, lease_seconds: float) -> list[Begun]:
        """These running attempts with their chains as they are now, and a new lease, in the order of their ids.

        Guard: the delivery is running, has this attempt and this number of `begins`, its chain waits for it and is not
        disabled. `attempt`, `begins` and `uncalled` stay.
        """

    def mark_called(self, running: Sequence[DeliveryRecord], *, lease_seconds: float) -> set[str]:
        """Say of running attempts that their callbacks may be called from now on; the ids of those that are still ours.

        They get a new lease. Guard: the delivery is running, has this attempt and this number of `begins`.
        """

    def renew(self, running: Sequence[DeliveryRecord], *, lease_seconds: float) -> None:
        """Give running attempts a new lease. Guard: the delivery is running, has this attempt and this `begins`.

        A row that another transaction has locked is left out, so that nobody waits: its end is just being recorded.
        """

    def finish(self, finished: Sequence[Finished], *, now: datetime) -> set[str]:
        """Record delivered attempts and move their chains; the ids of the deliveries that were recorded.

        Guard: the delivery is running, has this attempt and this number of `begins`, and its chain waits for it. The
        delivery is closed, the chain moves to the delivery's `final_state`, and the history gets one
        `state_transition`. A request in the row is kept, except where the new state is terminal (no due time is given).
        """

    def create_many(
        self, type_name: str, resource_sets: Sequence[Sequence[Resource]], *, now: datetime | None, due: bool
    ) -> list[tuple[int, bool]]:
        """`(chain id, created here)` for the chain with exactly each of these resource sets, in their order.

        New chains are in NEW, due at once where `due` says so, with one `created` event. `now` None takes the
        database's clock. A set that is given twice is created once, and `created here` is True for its first place.
        """


def read_one(store: Store, chain_id: int) -> ChainRecord:
    """The chain with this id; `ChainMissing` if there is none."""
    record = store.read([chain_id])[0].get(chain_id)
    if record is None:
        raise ChainMissing(chain_id)
    return record
