"""Where a sweep is in the due chains of each type, and how the types share the room of a queue."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias

from dispatcher.domain.config import ChainType
from dispatcher.domain.records import DuePosition
from dispatcher.messages.queues import CHAINS_QUEUE

ReadPage: TypeAlias = Callable[[DuePosition | None, int], list[DuePosition]]
"""Gives at most so many due chains after a position, in the order (due_at, id)."""


@dataclass(slots=True)
class Cursor:
    """The due chains of one chain type within a sweep, in the order (due_at, id).

    A sweep that resumes at `after` reads to the end, begins anew with the oldest due chain, and ends where it resumed.
    `turn` is the number of the last sweep with too little room in which the type got some: the lowest goes first.
    """

    chain_type: ChainType
    after: DuePosition | None
    turn: int = 0
    waiting: list[DuePosition] = field(default_factory=list)
    """Read, and not taken yet: at most one page."""

    queued: Collection[int] | None = None
    """Which of these were queued already when somebody looked; None: nobody has looked yet."""

    exhausted: bool = False
    held_back: bool = False
    got_room: bool = False
    _resumed_at: DuePosition | None = field(init=False)
    _ends_at: DuePosition | None = None
    _last_page: bool = False

    def __post_init__(self) -> None:
        self._resumed_at = self.after

    @property
    def queue(self) -> str:
        """The queue of the type's executions."""
        return self.chain_type.queue or CHAINS_QUEUE

    @property
    def going(self) -> bool:
        """Whether the sweep has more to do for this type."""
        return not self.exhausted and not self.held_back

    def fill(self, read: ReadPage, size: int) -> bool:
        """Whether chains wait to be taken; reads the next page of `size` if none is left."""
        if not self.waiting and not self.exhausted:
            page = read(self.after, size)
            ends_at = self._ends_at
            self.waiting = page if ends_at is None else [one for one in page if _key(one) <= _key(ends_at)]
            self.queued = None
            self._last_page = len(self.waiting) < size
            if not self.waiting:
                self._end()
        return bool(self.waiting)

    def take(self, most: int) -> tuple[list[int], int]:
        """At most `most` chains that are not known to be queued, and how many were passed, those included."""
        known = self.queued or ()
        taken: list[int] = []
        passed = 0
        for position in self.waiting:
            if len(taken) == most:
                break
            passed += 1
            if position.chain_id not in known:
                taken.append(position.chain_id)
        self.after = self.waiting[passed - 1]
        del self.waiting[:passed]
        if not self.waiting and self._last_page:
            self._end()
        return taken, passed

    def _end(self) -> None:
        """All is read to the end: begin anew with the oldest, if this sweep has resumed in the middle."""
        self.exhausted = self._resumed_at is None
        self.after, self._ends_at, self._resumed_at = None, self._resumed_at, None


def _key(position: DuePosition) -> tuple[datetime, int]:
    return position.due_at, position.chain_id


def in_turn(cursors: Sequence[Cursor]) -> list[Cursor]:
    """The cursors in the order in which they get room."""
    return sorted(cursors, key=lambda cursor: cursor.turn)


def shares(cursors: Sequence[Cursor], room: int) -> Iterator[tuple[Cursor, int]]:
    """The room of each of these cursors, in messages. What one does not need is shared again in the next round."""
    share, left_over = divmod(room, len(cursors))
    for number, cursor in enumerate(cursors):
        part = share + (number < left_over)
        if part:
            yield cursor, part


def turns_of(cursors: Sequence[Cursor]) -> dict[str, int]:
    """`{chain type: turn}` for the next sweep, of the types whose queue had too little room."""
    tight = {cursor.queue for cursor in cursors if cursor.held_back}
    now = 1 + max((cursor.turn for cursor in cursors), default=0)
    turns = {
        cursor.chain_type.chain_type: now if cursor.got_room else cursor.turn
        for cursor in cursors
        if cursor.queue in tight
    }
    return {type_name: turn for type_name, turn in turns.items() if turn}
