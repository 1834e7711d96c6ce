"""Hostile input: whoever writes to the broker, or into a field of the application, has chains looked at, no more."""

import ast
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from celery import Celery
from celery.app.trace import build_tracer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu import Connection, Exchange, Queue
from sqlalchemy import select

import dispatcher as package
import workers
from dispatcher import (
    DONE,
    NEW,
    Chain,
    ConfigurationError,
    Dispatcher,
    DispatcherError,
    InvalidResource,
    PermanentFailure,
    RetryPolicy,
    Settings,
)
from dispatcher.coordination.locks import ChainLocks
from dispatcher.domain.resources import clean_resources
from dispatcher.messages.queues import CHAINS_QUEUE, DELIVER, EXECUTE, FAN_OUT, PRUNE, RELAY, SWEEP, celery_settings
from dispatcher.storage.database import Database
from dispatcher.storage.models import ChainRow, ResourceRow
from tests.integration import shop

pytestmark = pytest.mark.integration

TASKS = [SWEEP, FAN_OUT, RELAY, PRUNE, EXECUTE, DELIVER]
quick = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
slow = settings(quick, max_examples=40)

# --- what a stranger may send ----------------------------------------------------------------------------------------

NASTY = [
    "", " ", "\x00", "a\x00b", "\ud800", "\udfff\ud800", "\u202e", "\r\n\x1b[31m", "é", "e\u0301", "ﬃ", "😀" * 10,
    "\U0010ffff", "'; DROP TABLE chain_dispatcher_chain; --", '" OR 1=1 --', "%s %(x)s {0} {x.__class__}", "../../x",
    "os.system", "os:system", "builtins:eval", "__import__('os')", "named:send", "send", "NEW", "new", "done",
    "x" * 100, "x" * 101, "x" * 255, "x" * 256, "x" * 70_000, "😀" * 100, "😀" * 255, "NaN", "null", "1", "1 ",
]  # fmt: skip
texts = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(codec=None), max_size=300),  # surrogates included
    st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl"]), max_size=20),
)
numbers = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([-(2**63), 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**400]),
    st.floats(),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """What a message says is decided before the database sees it; the strings below go to each kind."""
    return sqlite_url


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def any_database_url(request: pytest.FixtureRequest) -> str:
    """The URL of a migrated database, on each kind in turn."""
    fixtures = {"sqlite": "sqlite_url", "postgresql": "postgres_url", "mariadb": "mariadb_url"}
    url: str = request.getfixturevalue(fixtures[request.param])
    return url


class Deployment:
    """Chains in every standing, the worker's app, and what happened to them."""

    def __init__(self, make: shop.Make) -> None:
        self.sink = shop.Sink()
        self.clock = shop.Clock()
        wins = shop.transition("Wins", "won", retry=RetryPolicy(base_seconds=0, jitter=0))
        config = shop.cart(
            {NEW: [wins], "won": [shop.transition("Finish", DONE, valid=False)], DONE: []},
            callback=self.sink,
            callbacks={"send": self.sink},
        )
        self.app = Celery("hostile", set_as_current=False)
        given = make(config, clock=self.clock)
        self.app.conf.update(celery_settings(given.settings, broker_url=given.broker_url))
        self.dispatcher = make(config, clock=self.clock, celery_app=self.app)
        workers.install(self.app, self.dispatcher)
        self.chains = {
            name: self.dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("standing", name)])
            for name in ("due", "resting", "disabled", "terminal", "owing", "running")
        }
        shop.change_chain(self.dispatcher, self.chains["resting"].id, next_update_at=self.clock.now + timedelta(days=9))
        shop.change_chain(self.dispatcher, self.chains["terminal"].id, due_at=None)
        self.chains["disabled"].disable()
        self.deliveries = {name: shop.planned(self.dispatcher, self.chains[name]) for name in ("owing", "running")}
        self.kept = {name: self.row(name) for name in ("resting", "disabled")}

    def row(self, name: str) -> tuple[Any, ...]:
        """A chain's row."""
        with self.dispatcher.database.read() as connection:
            return tuple(
                connection.execute(select(ChainRow.__table__).where(ChainRow.id == self.chains[name].id)).one()
            )

    def receive(self, task: str, args: Any, kwargs: Any) -> Any:
        """What a worker makes of a message: the task's outcome, or the exception that it ends with."""
        tracer = build_tracer(task, self.app.tasks[task], app=self.app)
        request = {"delivery_info": {"routing_key": "dispatcher.requests"}, "id": "x", "task": task, "retries": 9}
        traced = tracer("00000000-0000-4000-8000-000000000000", args, kwargs, request)
        return traced.retval if traced.info is None else traced.info.retval

    def assert_untouched(self) -> None:
        """No chain was made, lost, or changed but by an evaluation that was its due."""
        assert (
            shop.count_rows(self.dispatcher, ChainRow)
            == len(self.chains)
            == shop.count_rows(self.dispatcher, ResourceRow)
        )
        shop.assert_consistent(self.dispatcher)
        for name, row in self.kept.items():
            assert self.row(name) == row, name
        known = {delivery.idempotency_key for delivery in self.dispatcher.find_deliveries(limit=1000)}
        assert {call.key for call in self.sink.calls} <= known
        assert len({call.key for call in self.sink.calls}) == len(self.sink.calls), "called back twice"
        assert all(call.kwargs == {} for call in self.sink.calls), "a message brought arguments"


@pytest.fixture
def deployment(make_dispatcher: shop.Make) -> Deployment:
    return Deployment(make_dispatcher)


def messages(deployment: Deployment) -> st.SearchStrategy[tuple[str, Any, Any]]:
    """A task's name, args and kwargs; many that nearly fit, and real ids among them.

    Celery itself refuses args that are no list and kwargs that are no object.
    """
    ids = st.sampled_from([chain.id for chain in deployment.chains.values()])
    delivery_ids = st.sampled_from([delivery.id for delivery in deployment.deliveries.values()])
    pairs = st.lists(st.one_of(delivery_ids, ids, leaves), max_size=3) | st.tuples(delivery_ids, numbers).map(list)
    values = {
        "chain_ids": st.lists(ids | anything, max_size=5) | anything,
        "chain_type": st.just(shop.CHAIN_TYPE) | anything,
        "deliveries": st.lists(pairs | anything, max_size=5) | anything,
        "dry_run": st.booleans() | anything,
        "self": anything,
    }
    some = st.fixed_dictionaries({}, optional=values)
    others = {**values, "x": anything, "callback": texts}
    kwargs = some | st.fixed_dictionaries({}, optional=others) | st.dictionaries(texts, anything, max_size=3)
    args = st.just([]) | st.lists(st.one_of(*values.values()), max_size=4)
    return st.tuples(st.sampled_from(TASKS), args, kwargs)


@given(data=st.data())
@quick
def test_a_task_answers_any_json_with_an_outcome_and_at_most_looks_at_chains(
    deployment: Deployment, data: st.DataObject
) -> None:
    task, args, kwargs = data.draw(messages(deployment))
    # What a broker can carry at all.
    args, kwargs = json.loads(json.dumps([args, kwargs]))

    outcome = deployment.receive(task, args, kwargs)

    if isinstance(outcome, BaseException):
        assert isinstance(outcome, TypeError), outcome
        assert any(word in str(outcome) for word in ("argument", "mapping", "keywords")), outcome
    else:
        json.dumps(outcome)
    deployment.assert_untouched()


@pytest.mark.parametrize("callback", ["os.system", "os:system", "builtins:print", "tests.servers:free_port"])
def test_no_import_path_is_taken_from_a_message_a_call_or_a_row(
    deployment: Deployment, callback: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher, chain = deployment.dispatcher, deployment.chains["due"]
    called = []
    monkeypatch.setattr("os.system", called.append)

    for call in (chain.enqueue, chain.execute):
        with pytest.raises(ConfigurationError, match="registered"):
            call(callback=callback)  # type: ignore[operator]
    request = {"context": None, "callback": callback, "kwargs": {"command": "true"}, "requested_by": None}
    shop.change_chain(dispatcher, chain.id, request=request, wake=1)
    (result,) = dispatcher.execute_chains([chain.id])
    assert result.outcome == "unknown_definition"
    delivery = deployment.deliveries["owing"]
    for kind in (callback, f"named:{callback}"):
        shop.change_delivery(dispatcher, delivery.id, callback=kind, next_attempt_at=shop.LONG_AGO)
        assert shop.attempt(dispatcher, delivery).outcome == "unknown_definition"
    assert shop.delivery_of(dispatcher, deployment.chains["owing"]).status == "pending", (
        "left to a worker that knows it"
    )

    assert called == [] and len(deployment.sink) == 0


def test_the_tasks_are_those_of_the_app_that_they_were_installed_in_alone(deployment: Deployment) -> None:
    """Shared ones, Celery's default, would run with another app's dispatcher."""
    other = Celery("neighbour", set_as_current=False)

    assert set(TASKS) <= set(deployment.app.tasks)
    assert not set(TASKS) & set(other.tasks)


# --- nothing but JSON ------------------------------------------------------------------------------------------------


class Bomb:
    """What unpickling runs."""

    def __reduce__(self) -> Any:
        return print, ("unpickled",)


def test_the_worker_s_app_accepts_json_alone(deployment: Deployment, capfd: pytest.CaptureFixture[str]) -> None:
    conf = deployment.app.conf
    assert list(conf.accept_content) == ["json"]
    assert set(conf.result_accept_content or ["json"]) == {"json"}
    assert {conf.task_serializer, conf.event_serializer, conf.result_serializer} == {"json"}
    assert {deployment.app.tasks[name].serializer for name in TASKS} == {"json"}

    bodies = {
        "application/x-python-serialize": pickle.dumps(Bomb()),
        "application/x-yaml": b"!!python/object/apply:builtins.print [unpickled]",
    }
    with Connection(deployment.dispatcher.broker_url) as connection, connection.channel() as channel:
        queue = Queue(CHAINS_QUEUE, Exchange(CHAINS_QUEUE), routing_key=CHAINS_QUEUE)(channel)
        queue.declare()
        for content_type, body in bodies.items():
            message = channel.prepare_message(body, content_type=content_type, content_encoding="binary")
            channel.basic_publish(message, exchange=CHAINS_QUEUE, routing_key=CHAINS_QUEUE)
            received = queue.get(no_ack=True)
            received.accept = deployment.app.amqp.TaskConsumer(channel, [queue]).accept
            with pytest.raises(Exception, match=r"disabled|Refusing|untrusted|serializer"):
                received.decode()
    assert "unpickled" not in capfd.readouterr().out


# --- any string, anywhere --------------------------------------------------------------------------------------------


def calls(dispatcher: Dispatcher, chain: Chain) -> dict[str, Callable[[str], Any]]:
    """Every public call that takes text, with that text."""
    return {
        "type": lambda text: dispatcher.get_or_create_resource_chain(text, shop.BOOKING),
        "resource type": lambda text: dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [(text, "1")]),
        "resource id": lambda text: dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("t", text)]),
        "subset": lambda text: dispatcher.get_or_create_resource_chain(
            shop.CHAIN_TYPE, [("t", text)], can_be_subset=True
        ),
        "resources": lambda text: dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, text),  # type: ignore[arg-type]
        "stored context": lambda text: dispatcher.get_or_create_resource_chain(
            shop.CHAIN_TYPE, [("context", text)], initial_context={text: text}
        ),
        "enqueue": lambda text: dispatcher.enqueue(shop.CHAIN_TYPE, [("t", text)]),
        "enqueue type": lambda text: dispatcher.enqueue(text, shop.BOOKING),
        "request": lambda text: chain.enqueue(initial_context={text: [text]}, callback_kwargs={text: text}),
        "callback": lambda text: chain.enqueue(callback=text),
        "dry run": lambda text: chain.enqueue(initial_context={"a": text}, dry_run=True),
        "dry run of another": lambda text: dispatcher.enqueue(shop.CHAIN_TYPE, [("t", text)], dry_run=True),
        "requested by": lambda text: chain.enqueue(requested_by=text),
        "disable": chain.disable,
        "enable": chain.enable,
        "reset": chain.reset,
        "reasons": lambda text: chain.disable(reason=text).enable(reason=text).reset(reason=text),
        "state": lambda text: chain.move_to(text, "because"),
        "reason": lambda text: chain.move_to("won", text),
        "mover": lambda text: chain.move_to("won", "because", text),
        "retry": lambda text: chain.refresh().retry_delivery(text, reason=text),
        "cancel": lambda text: chain.refresh().cancel_delivery("me", text),
        "skip": lambda text: chain.refresh().skip_delivery(text, text),
        "execute": lambda text: chain.execute(initial_context={text: text}, callback=text),
        "executor": lambda text: chain.execute(callback=lambda _: None, requested_by=text),
        "find type": lambda text: dispatcher.find_chains(chain_type=text),
        "find state": lambda text: dispatcher.find_chains(state=text),
        "find resource": lambda text: dispatcher.find_chains(resource=("t", text)),
        "find deliveries": lambda text: dispatcher.find_deliveries(chain_type=text),
        "find ids": lambda text: dispatcher.find_deliveries(delivery_ids=[text]),
        "find status": lambda text: dispatcher.find_deliveries(statuses=[text]),  # type: ignore[list-item]
        "disable resource": lambda text: dispatcher.disable_resource(("t", text), text),
        "enable resource": lambda text: dispatcher.enable_resource((text, "1")),
        "resource reason": lambda text: dispatcher.disable_resource(("t", text), reason=text),
        "eraser": lambda text: dispatcher.erase_resource(("nothing", "has it"), requested_by=text, reason=text),
        "erase resource": lambda text: dispatcher.erase_resource(("nothing has it", text)),
        "pause": lambda text: dispatcher.pause(text, "because"),
        "pause reason": lambda text: dispatcher.pause(shop.CHAIN_TYPE, text),
        "resume": dispatcher.resume,
        "resumer": lambda text: dispatcher.resume(shop.CHAIN_TYPE, requested_by=text, reason=text),
        "map": lambda text: dispatcher.map_states(shop.CHAIN_TYPE, text, "won"),
        "map to": lambda text: dispatcher.map_states(shop.CHAIN_TYPE, NEW, text),
        "mapper": lambda text: dispatcher.map_states(shop.CHAIN_TYPE, DONE, "won", requested_by=text),
    }


@pytest.fixture
def text_dispatcher(any_database_url: str, redis_url: str) -> Iterator[Dispatcher]:
    config = shop.cart(
        {NEW: [shop.transition("Wins", "won")], "won": [shop.transition("Finish", DONE, valid=False)], DONE: []},
        callback=shop.Sink(),
    )
    broker = redis_url.removesuffix("/0") + "/1"
    with Dispatcher(config, database_url=any_database_url, redis_url=redis_url, broker_url=broker) as made:
        yield made


def result_or_refusal(call: Callable[[], Any]) -> Any:
    """What a call gives, or the error that it says no with."""
    try:
        return call()
    except (DispatcherError, ValueError) as error:
        return error


@given(data=st.data(), text=texts)
@settings(quick, max_examples=250)
def test_any_text_is_taken_whole_or_refused_by_name(
    text_dispatcher: Dispatcher, data: st.DataObject, text: str
) -> None:
    chain = text_dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, shop.BOOKING)
    every = calls(text_dispatcher, chain)
    name = data.draw(st.sampled_from(sorted(every)))
    before = shop.dump_rows(text_dispatcher)

    result = result_or_refusal(lambda: every[name](text))

    if isinstance(result, Exception):
        # A plain ValueError: ours, or that of a status that is none. Never a driver's or a codec's.
        assert type(result) is ValueError or isinstance(result, DispatcherError), repr(result)
        assert shop.dump_rows(text_dispatcher) == before, "refused, and yet written"
    elif isinstance(result, Chain):
        result.refresh()
        if name in ("resource id", "stored context"):
            assert result.resources[0][1] == text
        if name == "resource type":
            assert result.resources[0][0] == text
    text_dispatcher.resume(shop.CHAIN_TYPE)
    assert set(text_dispatcher.find_chains(limit=10_000)) >= {chain}


@pytest.mark.parametrize(
    ("first", "second"),
    [("a", "a "), ("a", "A"), ("e\u0301", "é"), ("ss", "ß"), ("1", "\uff11"), ("a", "a\t"), ("a", "\uff41")],
)
def test_resources_are_the_same_only_if_they_are_the_same_bytes(
    text_dispatcher: Dispatcher, first: str, second: str
) -> None:
    """Databases fold case, accents and trailing spaces unless told not to."""
    one, other, both = (
        text_dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("t", text) for text in these])
        for these in ([first], [second], [first, second])
    )
    assert len({one.id, other.id, both.id}) == 3
    assert text_dispatcher.find_chains(resource=("t", first)) == [one, both]
    assert text_dispatcher.find_chains(resource=("t", second)) == [other, both]
    assert text_dispatcher.disable_resource(("t", second)) == 2
    assert not one.refresh().disabled


# --- what user code says ---------------------------------------------------------------------------------------------


@given(text=texts)
@slow
def test_any_text_of_an_error_is_kept_and_ends_nothing(any_database_url: str, text: str) -> None:
    """A guard's or a callback's exception, and a guard's reasons, are whatever some library made of its input."""
    verdict = {"guard": None}

    def guard(self: Any) -> bool:
        if verdict["guard"] == "raises":
            raise RuntimeError(text)
        if verdict["guard"] == "rejects":
            self.errors.append(text)
            return False
        return True

    wins = shop.transition("Wins", "won", guard, retry=RetryPolicy(max_attempts=2, base_seconds=0, jitter=0))
    sink = shop.Sink(shop.Raises(RuntimeError(text)))
    with Dispatcher(shop.cart({NEW: [wins], "won": []}, callback=sink), database_url=any_database_url) as dispatcher:
        chain = dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, shop.BOOKING)
        try:
            verdict["guard"] = "raises"
            (result,) = dispatcher.execute_chains([chain.id])
            assert result.outcome == "guard_failed"
            verdict["guard"] = None
            delivery = shop.planned(dispatcher, chain)
            assert shop.attempt(dispatcher, delivery).outcome == "retrying"
            verdict["guard"] = "rejects"
            assert shop.attempt(dispatcher, delivery, 2).outcome == "cancelled"
            verdict["guard"] = None
            delivery = shop.planned(dispatcher, chain)
            sink.effect = shop.Raises(PermanentFailure(text))
            assert shop.attempt(dispatcher, delivery).outcome == "dead"
            chain.refresh().cancel_delivery("me")
            sink.effect = shop.Raises(RuntimeError(text))
            with pytest.raises(RuntimeError):
                chain.execute()
            assert chain.refresh().state == NEW and chain.events[-1].action == "cancelled"
        finally:
            dispatcher.erase_resource(shop.BOOKING[0])


# --- statements ------------------------------------------------------------------------------------------------------

ALLOWED_FRAGMENTS = {"PRAGMA busy_timeout = "}


def test_no_statement_is_built_from_strings() -> None:
    """`text()`, `exec_driver_sql()`, `execute()` and `DDL()` get constants; what is read from outside is bound."""
    found = []
    for path in sorted(Path(package.__file__).parent.rglob("*.py")) + sorted(
        Path(workers.__file__).parent.rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if called not in (
                "text",
                "exec_driver_sql",
                "execute",
                "DDL",
                "literal_column",
                "prefix_with",
                "suffix_with",
            ):
                continue
            first = node.args[0] if node.args else None
            if isinstance(first, ast.JoinedStr) and _start(first) in ALLOWED_FRAGMENTS:
                assert all(
                    isinstance(part.value, ast.Name) and part.value.id.isupper()
                    for part in first.values
                    if isinstance(part, ast.FormattedValue)
                ), "constants of the module only"
                continue
            if isinstance(first, ast.JoinedStr | ast.BinOp) or _is_format(first):
                found.append(f"{path.name}:{node.lineno}")
    assert found == []


def _start(node: ast.JoinedStr) -> Any:
    return node.values[0].value if isinstance(node.values[0], ast.Constant) else None


def _is_format(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("format", "join")


# --- secrets ---------------------------------------------------------------------------------------------------------

PASSWORD_ALPHABET = "sS3cr€t/?#@:%&+=;!$'\"\\ []{}<>|^`~*()_-.,é😀"
passwords = st.text(PASSWORD_ALPHABET, min_size=6, max_size=30).map(lambda text: f"hunter2{text}hunter2")


def _nowhere(scheme: str, password: str, path: str) -> str:
    return f"{scheme}://user:{password}@127.0.0.1:1/{path}"


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg", "mysql", "mariadb+pymysql"])
@given(password=passwords, quoted=st.booleans())
@slow
def test_a_database_s_password_is_shown_nowhere(
    scheme: str, password: str, quoted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    url = _nowhere(scheme, quote(password, safe="") if quoted else password, "rows?connect_timeout=2")
    shown = []
    try:
        database = Database(url, connect_seconds=2)
        shown += [repr(database), str(database), database.address]
        with Dispatcher([], database_url=url, redis_url=None, settings=Settings(connect_seconds=2)) as made:
            shown += [repr(made), repr(made.settings)]
            made.check()
    except (DispatcherError, ValueError) as error:
        shown += _texts(error)
    else:
        raise AssertionError("nobody listens there")
    shown += [repr(Settings(database_url=url)), caplog.text]
    assert "hunter2" not in "\n".join(shown)


@pytest.mark.parametrize("scheme", ["redis", "rediss", "amqp"])
@given(password=passwords, quoted=st.booleans())
@slow
def test_a_broker_s_and_lock_server_s_password_is_shown_nowhere(
    scheme: str, password: str, quoted: bool, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    url = _nowhere(scheme, quote(password, safe="") if quoted else password, "0")
    shown = [repr(Settings(redis_url=url, broker_url=url))]
    config = shop.cart({NEW: [shop.transition("Wins", "won")]}, callback=shop.Sink())

    def attempts() -> Iterator[Callable[[], Any]]:
        if scheme != "amqp":
            locks = ChainLocks(url, prefix="x", lock_seconds=5, connect_seconds=1)
            shown.append(repr(locks))
            yield from (lambda: locks.acquire([1]), locks.check)
        urls = {"database_url": sqlite_url, "redis_url": None if scheme == "amqp" else url, "broker_url": url}
        with Dispatcher(config, settings=Settings(connect_seconds=1), **urls) as made:
            shown.append(repr(made))
            chain = made.get_or_create_resource_chain(shop.CHAIN_TYPE, shop.BOOKING)
            yield from (
                chain.enqueue,
                lambda: chain.enqueue(best_effort=True),
                made.check,
                made.check_locks,
                made.sweep,
                made.relay,
                lambda: shown.append(repr(made.examine())),
                lambda: made.execute_chains([chain.id]),
            )

    steps = attempts()
    while True:
        try:
            step = next(steps, None)
            if step is None:
                break
            step()
        except (DispatcherError, ValueError) as error:
            shown += _texts(error)
    assert "hunter2" not in "\n".join([*shown, caplog.text])


def _texts(error: BaseException) -> list[str]:
    """What a face or a log would show of an error: not its causes, which only a traceback has."""
    return [str(error), repr(error), repr(error.args)]


def test_invalid_settings_do_not_show_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPATCHER_DATABASE_URL", "hunter2 without a scheme")
    with pytest.raises(ValueError, match="is not a URL") as caught:
        Settings()
    assert "hunter2" not in str(caught.value)


def test_over_long_and_wrong_resources_are_shown_short() -> None:
    with pytest.raises(InvalidResource) as caught:
        clean_resources([("x" * 10_000, "1")])
    assert len(str(caught.value)) < 500
