"""The errors that this library raises, all below `DispatcherError`.

An error keeps its facts as attributes and passes its raw arguments to `super().__init__`. The text is made in
`__str__`, because an error with a formatted message cannot be unpickled, and Celery pickles results.
"""


class DispatcherError(Exception):
    """The root of every error that this library raises on purpose."""


def ends_process(error: BaseException) -> bool:
    """Whether the error means that the process must end (a hard time limit, Ctrl-C), and is not an error of user code.

    Celery's pool raises `SystemExit` with a negative code from its SIGTERM handler, at any place in the code.
    (billiard/common.py, `_shutdown_cleanup`.)
    """
    if isinstance(error, KeyboardInterrupt | GeneratorExit):
        return True
    return isinstance(error, SystemExit) and isinstance(error.code, int) and error.code < 0


class ConfigurationError(DispatcherError, ValueError):
    """The configuration is wrong; `path` says where (chain type, state, transition)."""

    def __init__(self, problem: str, path: str = "") -> None:
        super().__init__(problem, path)
        self.problem = problem
        self.path = path

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem


class InvalidResource(DispatcherError, ValueError):
    """A resource is not a pair of non-empty strings, or it is too long."""

    def __init__(self, problem: str, pair: str) -> None:
        super().__init__(problem, pair)
        self.problem = problem
        self.pair = pair

    def __str__(self) -> str:
        return f"{self.problem}: {self.pair}"


class NotSerializable(DispatcherError, ValueError):
    """A value that must be sent to another process is not JSON; `key` names it."""

    def __init__(self, what: str, key: str, problem: str) -> None:
        super().__init__(what, key, problem)
        self.what = what
        self.key = key
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.what}[{self.key!r}] is not JSON-serialisable: {self.problem}"


class AmbiguousChain(DispatcherError, ValueError):
    """More than one chain has all of the given resources; `chain_ids` lists some of them."""

    def __init__(self, chain_type: str, chain_ids: list[int]) -> None:
        super().__init__(chain_type, chain_ids)
        self.chain_type = chain_type
        self.chain_ids = chain_ids

    def __str__(self) -> str:
        ids = ", ".join(map(str, self.chain_ids))
        return f"more than one {self.chain_type!r} chain has these resources: {ids}"


class ChainError(DispatcherError):
    """The root of the errors about one chain; `chain_id` names it."""

    reason = "cannot be used"

    def __init__(self, chain_id: int, detail: str = "") -> None:
        super().__init__(chain_id, detail)
        self.chain_id = chain_id
        self.detail = detail

    def __str__(self) -> str:
        return f"chain {self.chain_id} {self.reason}" + (f" ({self.detail})" if self.detail else "")


class ChainMissing(ChainError, LookupError):
    """The chain does not exist (any more)."""

    reason = "does not exist"


class ChainLocked(ChainError, ValueError):
    """Another process is evaluating the chain."""

    reason = "is locked by another process"


class ChainNotDue(ChainError, ValueError):
    """The chain rests until its `next_update_at`."""

    reason = "rests until its next update"


class ChainDisabled(ChainError):
    """The chain is disabled."""

    reason = "is disabled"


class ChainPaused(ChainDisabled):
    """The chain's type is paused."""

    reason = "is not executed, because its chain type is paused"


class DeliveryPending(ChainError):
    """The chain waits for an open delivery, or an attempt at its delivery is running."""

    reason = "waits for an open delivery"


class NoOpenDelivery(ChainError):
    """The chain has no open delivery that could be retried, cancelled or skipped."""

    reason = "has no open delivery"


class DeliveryChanged(DispatcherError):
    """A delivery is not what it was when the caller saw it, or its chain does not wait for it; it was left alone.

    `chain_id` and `delivery_id` name it, and `change` says what is different.
    """

    def __init__(self, chain_id: int, delivery_id: str, change: str) -> None:
        super().__init__(chain_id, delivery_id, change)
        self.chain_id = chain_id
        self.delivery_id = delivery_id
        self.change = change

    def __str__(self) -> str:
        return (
            f"delivery {self.delivery_id} of chain {self.chain_id} is left alone, because {self.change}: "
            "read it again, and decide about what is there now"
        )


class DryRunRefused(DispatcherError):
    """`DISPATCHER_DRY_RUN` is set, so an operator's act was refused and nothing was written; `act` names it."""

    def __init__(self, act: str) -> None:
        super().__init__(act)
        self.act = act

    def __str__(self) -> str:
        return f"refused to {self.act}, because DISPATCHER_DRY_RUN is set; nothing was written: unset it to do this"


class UnknownDefinition(ChainError):
    """The name of a chain's type, state, transition or callback is not in this process's configuration."""

    reason = "uses a name that this configuration does not know"


class UnreadableRow(DispatcherError):
    """The JSON in a column of a row cannot be used; `problem` says why. Another tool or version has written it."""

    def __init__(self, column: str, problem: str) -> None:
        super().__init__(column, problem)
        self.column = column
        self.problem = problem

    def __str__(self) -> str:
        return f"the row's {self.column} cannot be read: {self.problem}"


class EnqueueNotPublished(DispatcherError):
    """No message could be published.

    If `written` is True, the request is in the chain's row, and the next sweep does the work. If it is None, the
    database did not answer to the commit: the request is in the row or not, and may be answered already. For an enqueue
    by resources `chain_id` may then be None.
    """

    def __init__(self, chain_id: int | None, problem: str = "", written: bool | None = True) -> None:
        super().__init__(chain_id, problem, written)
        self.chain_id = chain_id
        self.problem = problem
        self.written = written

    def __str__(self) -> str:
        where = "" if self.chain_id is None else f"chain {self.chain_id}: "
        if self.written:
            row = "its request is written, so the next sweep does the work"
        else:
            row = "it is not known whether the request is written: enqueue it again if asking twice does no harm"
        return f"{where}no message was published ({self.problem}); {row}"


class PermanentFailure(DispatcherError):
    """A callback raises this when further attempts cannot help; the delivery is dead at once."""


class DatabaseNotMigrated(DispatcherError):
    """The database has no tables, or their revision is not the one that this library needs."""

    def __init__(self, found: str | None, expected: str) -> None:
        super().__init__(found, expected)
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        found = f"is at revision {self.found}" if self.found else "has no chain-dispatcher tables"
        return f"the database {found}, this version needs {self.expected}: run `dispatcher db upgrade`"


class WorkersNotStopped(DispatcherError):
    """The tables cannot be upgraded now, because programs of the version before must not run beside the new revision.

    `found` and `expected` are the revisions before and after. `problem` says what shows that such programs may run; it
    is empty if nobody has said that they are stopped.
    """

    def __init__(self, found: str, expected: str, problem: str = "") -> None:
        super().__init__(found, expected, problem)
        self.found = found
        self.expected = expected
        self.problem = problem

    def __str__(self) -> str:
        upgrade = f"the upgrade of the database from revision {self.found} to {self.expected} needs stopped workers"
        stop = "stop all workers, beats and applications"
        if self.problem:
            upgrade, stop = f"{upgrade}, but {self.problem}", f"{stop}, wait a minute"
        return f"{upgrade}: {stop}, then run `dispatcher db upgrade --workers-stopped`"


class ServiceUnavailable(DispatcherError):
    """A database, Redis or broker cannot be reached; `service` says which.

    `address` has no password. It is empty if no such service is configured; `problem` then says what to do. `written`
    is False if nothing was written, and None if a database did not answer to a commit, which may have succeeded.
    """

    def __init__(self, service: str, address: str, problem: str, written: bool | None = False) -> None:
        super().__init__(service, address, problem, written)
        self.service = service
        self.address = address
        self.problem = problem
        self.written = written

    def __str__(self) -> str:
        if not self.address:
            return f"no {self.service} is configured: {self.problem}"
        where = f"the {self.service} at {self.address}"
        if self.written is None:
            return f"{where} did not answer to a commit, which may have succeeded: {self.problem}"
        return f"cannot reach {where}: {self.problem}"


class ServiceRefused(ServiceUnavailable):
    """A database answers, but it refuses: it is read-only or full, has no free connection, or finds it too large.

    `advice` says what helps. Otherwise as `ServiceUnavailable`.
    """

    def __init__(
        self, service: str, address: str, problem: str, written: bool | None = False, advice: str = ""
    ) -> None:
        super().__init__(service, address, problem, written)
        self.args = (service, address, problem, written, advice)
        self.advice = advice

    def __str__(self) -> str:
        advice = f" ({self.advice})" if self.advice else ""
        if self.written is None:
            return f"{super().__str__()}{advice}"
        return f"the {self.service} at {self.address} refuses: {self.problem}{advice}"
