"""What is decided for a chain that was evaluated, and after its callback."""

from datetime import UTC, datetime, timedelta

import pytest

from dispatcher.domain.decisions import rest_after_call
from dispatcher.transition import ChainSnapshot, Transition

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)


def asking(rest):
    class Asking(Transition):
        final_state = "asked"

        @property
        def date_next_update(self):
            if isinstance(rest, BaseException):
                raise rest
            return rest

        def is_valid(self):
            return True

    return Asking(ChainSnapshot(1, "cart", "new", (("cart", "1"),), NOW), {})


class TestRestAfterCall:
    """The effect has taken place, so the chain moves whatever its transition asks for; a process that ends, ends."""

    def test_it_is_the_rest_that_the_transition_asks_for(self):
        after = rest_after_call(asking(NOW + timedelta(days=2)), 1, NOW)
        assert (after.next_update_at, after.problem) == (NOW + timedelta(days=2), "")

    def test_a_rest_that_cannot_be_read_is_one_day(self):
        after = rest_after_call(asking(ZeroDivisionError("no such day")), 1, NOW)
        assert after.next_update_at == NOW + timedelta(days=1)
        assert "no such day" in after.problem

    @pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(-15)])
    def test_a_process_that_must_end_is_not_kept(self, end):
        with pytest.raises(type(end)):
            rest_after_call(asking(end), 1, NOW)
