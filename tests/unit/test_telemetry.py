"""Every line of level INFO or above has an action, and the actions are those of the reference page."""

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dispatcher.telemetry import ERRORS, WARNINGS, Action, LogEvent, emit, level_of, listen

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "logging.md"
SOURCES = [path for folder in ("dispatcher", "workers") for path in sorted((ROOT / folder).rglob("*.py"))]
BELOW_INFO = {"debug", "isEnabledFor", "getChild", "setLevel"}

logger = logging.getLogger("dispatcher.test")


class Mute(Exception):  # noqa: N818 - it is about its text
    """An error whose text raises."""

    def __str__(self):
        raise self.args[0] if self.args else RuntimeError("no text")


def fail(text):
    raise RuntimeError(text)


def raised(work, cause=None):
    """The error that `work` raises, as it is caught."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - it is the result
        if cause is not None:
            error.__cause__ = cause
        return error
    raise AssertionError("nothing was raised")


@pytest.fixture
def told() -> Iterator[list[LogEvent]]:
    events: list[LogEvent] = []
    end = listen(events.append)
    yield events
    end()


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def described() -> dict[str, str]:
    """`{action: level}` of the page's table."""
    rows = re.findall(r"^\| (`[^|]+`) \| ([A-Z]+)", PAGE.read_text(), re.MULTILINE)
    return {action: level for names, level in rows for action in re.findall(r"`(\w+)`", names)}


class TestTheCode:
    @pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
    def test_logs_at_info_and_above_through_emit_alone(self, path):
        if path.name == "telemetry.py":
            return
        direct = [
            f"line {call.lineno}: {ast.unparse(call.func)}"
            for call in calls(ast.parse(path.read_text()))
            if isinstance(call.func, ast.Attribute)
            and re.fullmatch(r"(\w*logger|logging)", ast.unparse(call.func.value))
            and call.func.attr in {"info", "warning", "error", "exception", "critical", "log", "warn", "fatal"}
        ]
        assert direct == []

    def test_uses_every_action_and_names_no_other(self):
        text = "\n".join(path.read_text() for path in SOURCES if path.name != "telemetry.py")
        used = set(re.findall(r"\bAction\.([A-Z_]+)", text))
        computed = {action.name for action in Action if action.startswith("attempt_")}  # from an outcome or a status
        assert used | computed | {"NO_CALLBACK", "UNKNOWN_DEFINITION"} == set(Action.__members__)


class TestThePage:
    def test_lists_exactly_the_actions_of_the_code(self):
        assert set(described()) == {*map(str, Action), "listener_failed"}

    def test_gives_each_its_level(self):
        levels = {str(action): logging.getLevelName(level_of(action)) for action in Action}
        assert {action: level for action, level in described().items() if action in levels} == levels


class TestEmit:
    def test_writes_the_line_with_its_action_and_facts_where_it_was_called(self, caplog):
        with caplog.at_level(logging.INFO, "dispatcher.test"):
            emit(logger, Action.CHAIN_MOVED, "chain %s moved to %s", 7, "paid", chain_id=7)
        (record,) = caplog.records
        assert (record.getMessage(), record.action, record.chain_id) == ("chain 7 moved to paid", "chain_moved", 7)
        assert (record.name, record.levelno) == ("dispatcher.test", logging.INFO)
        assert Path(record.pathname) == Path(__file__), "the line of the caller, not of telemetry"

    @pytest.mark.parametrize("action", Action)
    def test_takes_the_level_of_the_action(self, caplog, action):
        with caplog.at_level(logging.DEBUG, "dispatcher.test"):
            emit(logger, action, "x")
        expected = logging.ERROR if action in ERRORS else logging.WARNING if action in WARNINGS else logging.INFO
        assert [record.levelno for record in caplog.records] == [expected]

    def test_an_action_that_is_less_important_than_usual_can_say_so(self, caplog, told):
        with caplog.at_level(logging.INFO, "dispatcher.test"):
            emit(logger, Action.RELAYED, "relay", level=logging.DEBUG, relayed=0)
        assert caplog.records == []
        assert [(event.action, event.level) for event in told] == [(Action.RELAYED, logging.DEBUG)]

    def test_an_error_comes_with_its_traceback(self, caplog, told):
        error = ValueError("no such address")
        emit(logger, Action.ATTEMPT_DEAD, "dead", error=error)
        assert "ValueError: no such address" in caplog.text
        assert told[0].error is error

    def test_an_ordinary_error_is_logged_as_it_is(self, caplog):
        error = raised(lambda: int("x"), cause=KeyError("cart"))
        emit(logger, Action.ATTEMPT_DEAD, "dead", error=error)
        assert caplog.records[0].exc_info[1] is error
        assert "KeyError: 'cart'" in caplog.text and "direct cause" in caplog.text

    @pytest.mark.parametrize("as_cause", [True, False], ids=["cause", "context"])
    def test_an_endless_text_is_cut_also_in_what_an_error_came_from(self, caplog, as_cause):
        first = ValueError("first " + "x" * 10_000_000 + " first")
        error = raised(lambda: fail("second " + "y" * 10_000_000 + " second"), cause=first if as_cause else None)
        if not as_cause:
            error.__context__ = first
        emit(logger, Action.ATTEMPT_DEAD, "dead", error=error)
        assert len(caplog.text) < 25_000
        assert caplog.text.index("ValueError: first xxx") < caplog.text.index("direct cause" if as_cause else "During")
        assert "RuntimeError: second yyy" in caplog.text and "in fail" in caplog.text
        assert error.args[0].endswith(" second"), "the error itself is left alone"

    def test_what_an_error_hides_stays_hidden(self, caplog):
        error = raised(lambda: fail("y" * 100_000))
        error.__context__, error.__suppress_context__ = KeyError("hidden"), True
        emit(logger, Action.ATTEMPT_DEAD, "dead", error=error)
        assert "hidden" not in caplog.text and "RuntimeError: yyy" in caplog.text

    def test_an_error_that_came_from_itself_ends(self, caplog):
        error = raised(lambda: fail("y" * 100_000))
        other = ValueError("z" * 100_000)
        error.__cause__, other.__context__ = other, error
        emit(logger, Action.ATTEMPT_DEAD, "dead", error=error)
        assert "RuntimeError: yyy" in caplog.text and "ValueError: zzz" in caplog.text

    def test_an_endless_traceback_keeps_its_beginning_and_its_end(self, caplog):
        def ping(left):
            return pong(left)

        def pong(left):
            return ping(left - 1) if left else fail("at last")

        emit(logger, Action.ATTEMPT_DEAD, "dead", error=raised(lambda: ping(200)))
        assert len(caplog.text) < 25_000
        beginning, _, end = caplog.text.partition("characters are left out")
        assert "Traceback (most recent call last)" in beginning and "in raised" in beginning
        assert "in fail" in end and end.strip().endswith("RuntimeError: at last")

    def test_an_endless_chain_of_errors_keeps_its_beginning_and_its_end(self, caplog):
        error = ValueError("the first")
        for number in range(2000):
            error = raised(lambda number=number: fail(f"error {number}"), cause=error)
        emit(logger, Action.ATTEMPT_DEAD, "dead", error=error)
        assert len(caplog.text) < 25_000
        assert "RuntimeError: error 1999" in caplog.text and "characters are left out" in caplog.text

    def test_an_error_whose_text_raises_is_described(self, caplog):
        error = raised(lambda: fail("y"), cause=Mute())
        emit(logger, Action.ATTEMPT_DEAD, "dead", error=error)
        assert "<Mute, whose text raises RuntimeError>" in caplog.text and "RuntimeError: y" in caplog.text

    def test_a_text_does_not_keep_the_process_from_ending(self):
        with pytest.raises(KeyboardInterrupt):
            emit(logger, Action.ATTEMPT_DEAD, "dead", error=Mute(KeyboardInterrupt()))

    def test_no_level_is_both(self):
        assert not ERRORS & WARNINGS


class TestListeners:
    def test_hear_each_event_whatever_the_log_level(self, told):
        logger.setLevel(logging.CRITICAL)
        try:
            emit(logger, Action.CHAIN_MOVED, "moved", chain_id=7)
        finally:
            logger.setLevel(logging.NOTSET)
        assert told == [LogEvent(Action.CHAIN_MOVED, logging.INFO, {"chain_id": 7}, None)]

    def test_hear_nothing_once_they_have_ended(self):
        events: list[LogEvent] = []
        end = listen(events.append)
        end()
        end()
        emit(logger, Action.CHAIN_MOVED, "moved")
        assert events == []

    def test_one_that_fails_is_logged_and_keeps_nobody_else_from_hearing(self, caplog, told):
        def fail(event: LogEvent) -> None:
            raise RuntimeError("the metrics server is away")

        end = listen(fail)
        after: list[LogEvent] = []
        end_after = listen(after.append)
        try:
            emit(logger, Action.CHAIN_MOVED, "moved")
        finally:
            end()
            end_after()
        assert len(told) == len(after) == 1
        failures = [record for record in caplog.records if getattr(record, "action", "") == "listener_failed"]
        assert len(failures) == 1 and "the metrics server is away" in caplog.text
