"""Values from user code become texts and moments that can be stored, logged and sent, whatever they are."""

import unicodedata
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.bounds import (
    EARLIEST,
    LATEST,
    MAX_ERROR,
    MAX_REASON,
    MAX_REASONS,
    bounded,
    describe,
    refuse_awaitable,
    refuse_unstarted,
    safe_reasons,
    safe_text,
)

BREAKS = dict.fromkeys(map(ord, "\n\t"))


class Mute(Exception):  # noqa: N818 - it is about its text
    def __str__(self) -> str:
        raise self.args[0]


class Later:
    def __await__(self):
        yield


class NoText:
    def __str__(self):
        return 7  # noqa: PLE0307 - on purpose


@given(st.text(), st.integers(min_value=1, max_value=50))
def test_a_text_is_bounded_and_printable(text, limit):
    found = safe_text(text, limit)
    assert len(found) <= limit
    assert not any(
        unicodedata.category(character) in ("Cc", "Cs", "Cn", "Zl", "Zp") for character in found.translate(BREAKS)
    )


def test_a_short_printable_text_stays_as_it_is():
    assert safe_text("déjà vu\n\t10\xa0000\u202f€", 50) == "déjà vu\n\t10\xa0000\u202f€"


@pytest.mark.parametrize(("text", "shown"), [("\x1b[31m", "\\x1b[31m"), ("a\x00b", "a\\x00b"), ("\ud800", "\\ud800")])
def test_control_characters_are_escaped(text, shown):
    assert safe_text(text, 50) == shown


@pytest.mark.parametrize("value", [Mute(ValueError("no")), Mute(RecursionError()), Mute(SystemExit(3)), NoText()])
def test_a_text_that_raises_is_described(value):
    assert "whose text raises" in safe_text(value, 100)
    assert type(value).__name__ in safe_text(value, 100)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(-241)])
def test_a_text_does_not_keep_the_process_from_ending(error):
    with pytest.raises(type(error)):
        safe_text(Mute(error), 100)


def test_an_error_is_described_by_type_and_text():
    assert describe(ValueError("no such address")) == "ValueError: no such address"
    assert len(describe(ValueError("x" * 10_000_000))) == MAX_ERROR
    assert describe(Mute(ValueError())).startswith("Mute: <Mute, whose text raises")


def test_of_many_reasons_the_first_are_kept():
    assert safe_reasons(["a", 7, "x" * 9000]) == ("a", "7", "x" * (MAX_REASON - 1) + "\u2026")
    many = safe_reasons(str(number) for number in range(10**9))
    assert len(many) == MAX_REASONS + 1 and many[-1] == "... more than 50 reasons"


@given(st.datetimes(timezones=st.just(UTC)))
def test_a_moment_can_be_stored_in_every_time_zone(moment):
    found = bounded(moment)
    assert EARLIEST <= found <= LATEST
    for hours in (-12, 14):
        found + timedelta(hours=hours)
    assert found == moment or not EARLIEST <= moment <= LATEST


def test_a_coroutine_is_refused_and_closed(recwarn):
    async def send():
        """Never runs."""

    with pytest.raises(TypeError, match="the callback gave a coroutine"):
        refuse_awaitable(send(), "the callback")
    refuse_awaitable(None, "the callback")
    assert not recwarn.list


def test_an_answer_that_must_be_awaited_is_refused_but_not_a_callback_s_that_has_run():
    with pytest.raises(TypeError, match="awaitable"):
        refuse_awaitable(Later(), "is_valid()")
    refuse_unstarted(Later(), "the callback")


def test_a_generator_is_refused():
    async def steps():
        yield

    for value in ((step for step in [1]), steps()):
        with pytest.raises(TypeError, match="yield"):
            refuse_unstarted(value, "the callback")


class NotATime(datetime):
    """As pandas' NaT: neither before nor after any other."""

    def __lt__(self, other):
        return False

    __gt__ = __le__ = __ge__ = __lt__


def test_a_datetime_that_has_no_place_in_time_is_refused():
    with pytest.raises(TypeError, match="no moment"):
        bounded(NotATime(2030, 1, 1, tzinfo=UTC))


def test_the_ends_of_time_are_within_the_range():
    assert bounded(datetime.max.replace(tzinfo=UTC)) == LATEST
    assert bounded(datetime.min.replace(tzinfo=UTC)) == EARLIEST
