"""What beat is told: every entry comes often, and its pass's interval is a whole number of its ticks."""

import pytest

from dispatcher.messages.queues import PRUNE, RELAY, SWEEP, celery_settings
from dispatcher.settings import Settings


@pytest.mark.parametrize("sweep_seconds", [0.5, 1, 60, 61, 70, 119, 3600, 86_400])
def test_beat_ticks_at_least_once_a_minute_and_meets_the_interval(sweep_seconds: float) -> None:
    settings = Settings(sweep_seconds=sweep_seconds, relay_seconds=3600, retention_days=30)
    schedule = celery_settings(settings, broker_url=None)["beat_schedule"]

    assert set(schedule) == {SWEEP, RELAY, PRUNE}
    for name, interval in {SWEEP: sweep_seconds, RELAY: 3600, PRUNE: 86_400}.items():
        every = schedule[name]["schedule"]
        assert 0 < every <= 60 and every <= interval
        assert interval / every == pytest.approx(round(interval / every))


def test_an_interval_of_a_minute_or_less_is_beat_s_own() -> None:
    schedule = celery_settings(Settings(sweep_seconds=45, relay_seconds=10), broker_url=None)["beat_schedule"]
    assert {name: entry["schedule"] for name, entry in schedule.items()} == {SWEEP: 45, RELAY: 10}
