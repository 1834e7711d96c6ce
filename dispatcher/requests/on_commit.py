"""Runs actions when a session of the caller commits."""

import logging
from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

_WAITING: Final = "chain_dispatcher_waiting"
_Waiting = list[tuple[SessionTransaction | None, Callable[[], Any]]]


def run_after_commit(session: Session, action: Callable[[], Any]) -> None:
    """Run `action` once when the session's outermost transaction commits; forget it if its transaction rolls back.

    An action that was added inside a savepoint is forgotten when that savepoint rolls back. The error of an action is
    logged, and the other actions still run.
    """
    if _WAITING not in session.info:
        session.info[_WAITING] = []
        event.listen(session, "after_commit", _run)
        event.listen(session, "after_soft_rollback", _forget)
        event.listen(session, "after_transaction_end", _clear)
    begun_in = session.get_nested_transaction() or session.get_transaction() or session.begin()
    session.info[_WAITING].append((begun_in, action))


def _run(session: Session) -> None:
    if session.in_nested_transaction():
        return
    waiting: _Waiting = session.info[_WAITING]
    session.info[_WAITING] = []
    for _, action in waiting:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - an error from the caller's commit would mean that the commit failed
            emit(
                logger,
                Action.ENQUEUE_ON_COMMIT_FAILED,
                "an enqueue after a commit failed: the caller's transaction is committed, its enqueue may not be done",
                error=error,
            )


def _forget(session: Session, rolled_back: SessionTransaction) -> None:
    waiting: _Waiting = session.info[_WAITING]
    session.info[_WAITING] = [(begun_in, action) for begun_in, action in waiting if not _within(begun_in, rolled_back)]


def _clear(session: Session, ended: SessionTransaction) -> None:
    if ended.parent is None:  # a session that is closed without a commit sends no rollback event
        session.info[_WAITING] = []


def _within(transaction: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while transaction is not None and transaction is not outer:
        transaction = transaction.parent
    return transaction is outer
