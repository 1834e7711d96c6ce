"""An enqueue whose commit got no answer: its row is read, and it never says what it does not know."""

import logging
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from dispatcher import NEW, Dispatcher, EnqueueNotPublished, ServiceUnavailable, Transition
from dispatcher.storage import chains, database
from tests.chaos.proxy import Proxy
from tests.integration import shop
from tests.servers import PostgresServer

pytestmark = pytest.mark.integration

CONFIG = shop.cart({NEW: [shop.OnRequest]})
WRITES = rb"(?<!AUTO)COMMIT(?!TED)|request_replaced"
"""In what is sent to write a request: a COMMIT, or the statement that commits by itself."""

on_servers = pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)  # a file is never away
ways = pytest.mark.parametrize("way", ["a chain", "a new chain"])


class Line(Proxy):
    """The way to a database, on which answers can get lost."""

    def __init__(self, url: str) -> None:
        there = make_url(url)
        assert there.port is not None
        super().__init__(there.port)
        self.url = there.set(port=self.port).render_as_string()

    def close(self) -> None:
        if self._thread.is_alive():
            super().close()


@pytest.fixture
def line(database_url: str) -> Iterator[Line]:
    made = Line(database_url)
    yield made
    made.close()


def enqueue_of(way: str, dispatcher: Dispatcher) -> Callable[..., str | None]:
    """An enqueue of a chain that exists, or of one that it makes."""
    if way == "a chain":
        return shop.new_chain(dispatcher).enqueue
    dispatcher.find_chains()  # so that it is connected, and knows that the tables are there
    return lambda **asked: dispatcher.enqueue(shop.CHAIN_TYPE, [("online_booking", "b0")], **asked)


@ways
@on_servers
def test_an_enqueue_whose_answer_got_lost_finds_its_request_in_the_row(
    make_dispatcher: shop.Make, broker_url: str, line: Line, way: str
) -> None:
    dispatcher = make_dispatcher(CONFIG, database_url=line.url)
    enqueue = enqueue_of(way, dispatcher)
    line.lose_answers(WRITES)

    task_id = enqueue(initial_context={"a": 1}, requested_by="the shop")

    assert line.lost == 1
    (chain,) = dispatcher.find_chains()
    row = shop.row_of(dispatcher, chain.id)
    assert (row.request["context"], row.wake) == ({"a": 1}, 1), "written once"
    (message,) = shop.take_messages(broker_url, shop.REQUESTS)
    assert (message.id, message.kwargs) == (task_id, {"chain_ids": [chain.id]})


@pytest.mark.parametrize("best_effort", [False, True])
@ways
@on_servers
def test_an_enqueue_whose_row_cannot_be_read_afterwards_says_that_it_does_not_know(
    make_dispatcher: shop.Make,
    broker_url: str,
    line: Line,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    *,
    best_effort: bool,
) -> None:
    dispatcher = make_dispatcher(CONFIG, database_url=line.url)
    enqueue = enqueue_of(way, dispatcher)
    then_away(line, monkeypatch)

    with pytest.raises(EnqueueNotPublished, match="not known") as caught:
        enqueue(initial_context={"a": 1}, best_effort=best_effort)

    (chain,) = make_dispatcher(CONFIG).find_chains()
    assert (caught.value.written, caught.value.chain_id) == (None, chain.id if way == "a chain" else None)
    assert isinstance(caught.value.__cause__, ServiceUnavailable) and caught.value.__cause__.written is False
    assert shop.queue_length(broker_url, shop.REQUESTS) == 0


def then_away(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to the next write of a request gets lost, and the database is away from then on."""
    line.lose_answers(WRITES)
    commit = database.commit

    def close_after(step: Callable[[], Any]) -> Any:
        try:
            return commit(step)
        finally:
            line.close()

    monkeypatch.setattr(database, "commit", close_after)


def asked(name: str, to_state: str) -> type[Transition]:
    """A transition that only a request with `{"please": True}` takes."""
    return shop.transition(name, to_state, lambda self: bool(self.context.get("please")), recheck_seconds=None)


@on_servers
@pytest.mark.parametrize("meanwhile", ["it is answered", "a newer one comes"])
def test_a_request_that_may_have_been_dealt_with_is_not_written_again(
    make_dispatcher: shop.Make, line: Line, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    sink = shop.Sink()
    config = shop.cart({NEW: [asked("First", "one")], "one": [asked("Second", "two")], "two": []}, callback=sink)
    dispatcher, others = make_dispatcher(config, database_url=line.url), make_dispatcher(config)
    chain = shop.new_chain(dispatcher)
    line.lose_answers(WRITES)
    read = chains.read_many

    def read_later(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(chains, "read_many", read)
        if meanwhile == "it is answered":
            shop.attempt(others, shop.planned(others, chain))
        else:
            others.chain(chain.id).enqueue(initial_context={"newer": True})
        return read(*args, **options)

    monkeypatch.setattr(chains, "read_many", read_later)
    with pytest.raises(EnqueueNotPublished, match="not known") as caught:
        chain.enqueue(initial_context={"please": True})

    assert (caught.value.written, caught.value.chain_id) == (None, chain.id)
    if meanwhile == "it is answered":
        assert [result.outcome for result in others.execute_chains([chain.id])] == ["none"]
        assert sink.names == ["First"], "one enqueue, one step"
    else:
        assert shop.row_of(others, chain.id).request["context"] == {"newer": True}


@ways
@on_servers
def test_an_enqueue_that_cannot_connect_says_that_nothing_was_written(
    make_dispatcher: shop.Make, line: Line, way: str
) -> None:
    dispatcher = make_dispatcher(CONFIG, database_url=line.url)
    enqueue = enqueue_of(way, dispatcher)
    before = shop.dump_rows(dispatcher)
    dispatcher.database.dispose()
    line.close()

    with pytest.raises(ServiceUnavailable) as caught:
        enqueue(initial_context={"a": 1})

    assert caught.value.written is False
    assert shop.dump_rows(make_dispatcher(CONFIG)) == before


@on_servers
def test_an_enqueue_that_is_cut_off_before_its_commit_is_done_again(make_dispatcher: shop.Make, line: Line) -> None:
    dispatcher = make_dispatcher(CONFIG, database_url=line.url)
    enqueue = enqueue_of("a new chain", dispatcher)
    line.lose_answers(b"INSERT INTO chain_dispatcher_resource")

    enqueue(initial_context={"a": 1})

    assert line.lost == 1
    assert len(make_dispatcher(CONFIG).find_chains()) == 1


@on_servers
def test_an_enqueue_that_is_cut_off_twice_before_its_commit_says_that_nothing_was_written(
    make_dispatcher: shop.Make, line: Line
) -> None:
    dispatcher = make_dispatcher(CONFIG, database_url=line.url)
    enqueue = enqueue_of("a new chain", dispatcher)
    line.lose_answers(b"INSERT INTO chain_dispatcher_resource", times=2)

    with pytest.raises(ServiceUnavailable) as caught:
        enqueue(initial_context={"a": 1})

    assert line.lost == 2
    assert caught.value.written is False
    assert make_dispatcher(CONFIG).find_chains() == []


@ways
def test_an_answer_that_gets_lost_on_any_database(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    dispatcher = make_dispatcher(CONFIG)
    enqueue = enqueue_of(way, dispatcher)
    lost: list[object] = []

    def lose_answer(step: Callable[[], Any]) -> Any:
        step()
        lost.append(step)
        raise OperationalError("COMMIT", None, OSError("connection reset by peer"), connection_invalidated=True)

    monkeypatch.setattr(database, "commit", lose_answer)
    assert isinstance(enqueue(initial_context={"a": 1}), str)

    assert len(lost) == 1
    (chain,) = dispatcher.find_chains()
    assert shop.row_of(dispatcher, chain.id).request["context"] == {"a": 1}


@ways
def test_a_commit_that_never_arrives_is_sent_once_more(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    dispatcher = make_dispatcher(CONFIG)
    enqueue, commit, lost = enqueue_of(way, dispatcher), database.commit, []

    def lose_statement(step: Callable[[], Any]) -> Any:
        if lost:
            return commit(step)
        lost.append(step)
        raise OperationalError("COMMIT", None, OSError("connection reset by peer"), connection_invalidated=True)

    monkeypatch.setattr(database, "commit", lose_statement)
    assert isinstance(enqueue(initial_context={"a": 1}), str)

    (chain,) = dispatcher.find_chains()
    row = shop.row_of(dispatcher, chain.id)
    assert (row.request["context"], row.wake) == ({"a": 1}, 1)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_an_enqueue_right_after_a_restart_does_not_meet_a_second_dead_connection(
    make_dispatcher: shop.Make, postgres_server: PostgresServer, database_url: str
) -> None:
    dispatcher = make_dispatcher(CONFIG)
    chain = shop.new_chain(dispatcher)
    with dispatcher.database.read(), dispatcher.database.read(), dispatcher.database.read():
        pass  # three connections are idle now, and were just used
    connections = sql.SQL("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = {}")
    with postgres_server.connect() as admin:
        admin.execute(connections.format(sql.Literal(database_url.rpartition("/")[2])))

    assert isinstance(chain.enqueue(initial_context={"a": 1}), str)

    assert shop.row_of(dispatcher, chain.id).request["context"] == {"a": 1}


@on_servers
def test_an_enqueue_after_a_commit_that_gets_no_answer_is_logged_and_not_raised(
    make_dispatcher: shop.Make,
    line: Line,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dispatcher = make_dispatcher(CONFIG, database_url=line.url)
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.sqlite'}")
    with Session(engine) as session:
        dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING)
        dispatcher.find_chains()
        then_away(line, monkeypatch)
        session.commit()
    engine.dispose()

    (record,) = [
        record
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith("dispatcher.")
    ]
    assert vars(record)["action"] == "enqueue_on_commit_failed"
    assert record.exc_info is not None and isinstance(record.exc_info[1], EnqueueNotPublished)
    assert record.exc_info[1].written is None


# --- written, and then not published ---------------------------------------------------------------------------------


def refuse(*_: Any, **__: Any) -> str:
    raise ValueError("s3cret is no port")  # as kombu does for a URL that it cannot use


@ways
def test_whatever_keeps_the_message_the_request_is_written(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    dispatcher = make_dispatcher(CONFIG)
    enqueue = enqueue_of(way, dispatcher)
    monkeypatch.setattr("celery.app.amqp.AMQP.send_task_message", refuse)

    with pytest.raises(EnqueueNotPublished, match="ValueError") as caught:
        enqueue(initial_context={"a": 1})

    (chain,) = dispatcher.find_chains()
    assert (caught.value.written, caught.value.chain_id) == (True, chain.id)
    assert "s3cret" not in str(caught.value)
    assert shop.row_of(dispatcher, chain.id).request["context"] == {"a": 1}
    assert enqueue(best_effort=True) is None


@pytest.mark.parametrize("shares", [True, False])
def test_whatever_keeps_the_message_a_commit_raises_nothing(
    make_dispatcher: shop.Make,
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    shares: bool,
) -> None:
    dispatcher = make_dispatcher(CONFIG)
    engine = create_engine(database_url if shares else f"sqlite:///{tmp_path / 'shop.sqlite'}")
    monkeypatch.setattr("celery.app.amqp.AMQP.send_task_message", refuse)

    with Session(engine) as session:
        dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING, initial_context={"a": 1})
        session.commit()
    engine.dispose()

    (chain,) = dispatcher.find_chains()
    assert shop.row_of(dispatcher, chain.id).request["context"] == {"a": 1}
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert vars(record)["action"] == "request_not_published", "it is written, and nothing is lost"


def test_whatever_fails_after_a_commit_is_logged_and_not_raised(
    make_dispatcher: shop.Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    naive = datetime(2030, 7, 1, 12)  # noqa: DTZ001 - on purpose
    dispatcher = make_dispatcher(CONFIG, clock=lambda: naive)
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.sqlite'}")
    with Session(engine) as session:
        dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING)
        dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING, dry_run=True)
        session.commit()
    engine.dispose()

    said = [vars(record)["action"] for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == ["enqueue_on_commit_failed"] * 2
