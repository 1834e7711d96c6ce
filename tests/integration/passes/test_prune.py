"""When the prune that beat asks for does something. What it deletes is in `test_sweep`."""

from datetime import timedelta
from typing import Final

import pytest

from dispatcher import NEW, Dispatcher
from dispatcher.storage import clock
from tests.integration import shop

pytestmark = pytest.mark.integration

CONFIG: Final = shop.cart({NEW: [shop.Remind], "reminded": [shop.Never]}, callback=shop.Sink())
HOUR: Final = timedelta(hours=1)


def prunes(dispatcher: Dispatcher, hours: int) -> int:
    """How many of the prunes of so many hours do something, with a tick every half hour."""
    done = 0
    for half in range(2 * hours):
        with clock.shift(timedelta(seconds=1800 * half)):
            done += dispatcher.prune(tick=True) != {"claimed": False}
    return done


def test_a_prune_runs_once_a_day_however_often_beat_ticks(make_dispatcher: shop.Make) -> None:
    assert prunes(make_dispatcher(CONFIG, retention_days=30), 48) == 3  # after 0.9 of a day each


def test_a_prune_that_did_not_end_continues_after_an_hour(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = make_dispatcher(CONFIG, retention_days=30)
    with monkeypatch.context() as patch:
        patch.setattr("dispatcher.passes.prune.pass_seconds", lambda _: -1.0)
        assert dispatcher.prune(tick=True) == {"events": 0, "deliveries": 0, "actions": 0}
    assert dispatcher.prune(tick=True) == {"claimed": False}

    with clock.shift(HOUR):
        assert dispatcher.prune(tick=True) != {"claimed": False}
    with clock.shift(2 * HOUR):
        assert dispatcher.prune(tick=True) == {"claimed": False}, "it has ended"


def test_a_prune_that_was_killed_continues_after_an_hour(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = make_dispatcher(CONFIG, retention_days=30)
    with monkeypatch.context() as patch:
        patch.setattr("dispatcher.storage.history.prune_events", shop.Raises(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            dispatcher.prune(tick=True)

    with clock.shift(HOUR):
        assert dispatcher.prune(tick=True) != {"claimed": False}
