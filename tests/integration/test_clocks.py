"""Clocks that step: every stored moment that is compared with now, and what becomes of it.

`MOMENTS` names all of them. It is compared with the tables and the sources, so a new one cannot be forgotten. In each
test of the second part the clock steps, something is written, the clock is right again, and the work goes on within
its own length. The clock is the database's; on SQLite, which has none, it is this host's.
"""

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import JSON, select

import dispatcher as package
from dispatcher import NEW, Dispatcher, RetryPolicy
from dispatcher.domain.records import DeliveryRecord, Owed
from dispatcher.storage import chain_types, clock, deliveries, moments, ticks
from dispatcher.storage.models import Base, TickRow, UtcDateTime
from tests.integration import shop

pytestmark = pytest.mark.integration

SOURCES: Final = Path(package.__file__).parent

# --- the table -------------------------------------------------------------------------------------------------------

A_WAIT = "an end of a wait or a lease: it begins anew (test_a_lost_message, test_a_retry, test_a_lease)"
DOMAIN = "domain time, may be years ahead; the doctor asks when it was written (TestTheDoctor)"
WRITTEN = "says when something happened to a chain; the doctor names one in the future (TestTheDoctor)"
KEPT = "compared with the retention only: kept longer by the step (test_what_has_ended_is_kept_longer_by_the_step)"
SHOWN = "for people, compared with nothing"
USERS = "holds values of users, and no moment of ours"

MOMENTS: Final = {
    "chain.next_update_at": DOMAIN,
    "chain.due_at": DOMAIN,
    "chain.created_at": SHOWN,
    "chain.updated_at": WRITTEN,
    "chain.started_at": WRITTEN,
    "chain.entered_at": WRITTEN,
    "chain.context": USERS,
    "chain.request": USERS,
    "event.created_at": KEPT,
    "delivery.next_attempt_at": A_WAIT,
    "delivery.publish_after": A_WAIT,
    "delivery.lease_until": A_WAIT,
    "delivery.waits_since": "when a wait began, and so what shows that the clock was wrong",
    "delivery.lapse_seen_at": "a mark of a lease; emptied when it begins anew (test_a_lease_that_ends_while...)",
    "delivery.planned_at": "in the future it asks for the last look (test_a_plan_of_the_future_is_looked_at_again)",
    "delivery.finished_at": KEPT,
    "delivery.rest_until": "domain time; becomes the chain's next_update_at",
    "delivery.kwargs": USERS,
    "delivery.context": USERS,
    "delivery.request": USERS,
    "tick.last_at": "not believed when it lies an interval ahead (TestTicks)",
    "tick.position": "where a pass stopped; the sweep's holds a due_at (test_a_sweep_that_stopped_in_the_future)",
    "type.window_at": "the hour begins anew (test_the_hour_of_a_budget)",
    "type.estimated_at": "outdated in the future (test_an_estimate)",
    "type.fingerprints": "in the future counts as seen now (test_a_fingerprint)",
    "suppression.created_at": SHOWN,
    "action.created_at": KEPT,
}

POSITIONS: Final = {
    "passes/sweep.py": "due_at and id of the last chain",
    "passes/waking.py": "ids",
    "passes/prune.py": "no moment",
    "operators/operations.py": "ids",
    "storage/pauses.py": "the end of a spread, with its length: more than that cannot be left (`seconds_left`)",
}

KEYS: Final = {
    "lock": "ends with its TTL, which Redis counts",
    "queued": "ends with its TTL",
    "crash": "a number; ends with its TTL",
    "rate": "windows of calls and the next free places of lines: tests/integration/coordination/test_clock_steps.py",
}


def test_the_table_names_every_column_that_holds_a_moment_or_json() -> None:
    columns = {
        f"{table.name.removeprefix('chain_dispatcher_')}.{column.name}"
        for table in Base.metadata.tables.values()
        for column in table.columns
        if isinstance(column.type, UtcDateTime | JSON)
    }
    assert columns == set(MOMENTS), "say in MOMENTS what becomes of a moment that lies in the future, and test it"


def test_the_tests_that_the_table_names_exist() -> None:
    text = Path(__file__).read_text()
    named = re.findall(r"\b(test_\w+|Test\w+)", " ".join(MOMENTS.values()))
    assert named and all(re.search(rf"(def|class) {name}", text) for name in named)


def test_the_table_names_every_place_that_remembers_where_a_pass_stopped() -> None:
    assert {name for name, text in sources().items() if "ticks.write_position" in text} == set(POSITIONS)


def test_the_table_names_every_key_in_redis() -> None:
    found: set[str] = set()
    for name, text in sources().items():
        if name.startswith("coordination/"):
            found.update(re.findall(r"prefix \.\. ':(\w+):'", text))  # in a script
            found.update(re.findall(r"_key\(\"(\w+)\"", text))
            found.update(re.findall(r"\{(?:self\._?)?prefix\}:(\w+)", text))
            found.update(re.findall(r"f\"(\w+)/\{limit", text))
    assert found == set(KEYS), "say in KEYS when a key ends, and test it"


# --- what the sources write ------------------------------------------------------------------------------------------

ENDS = {"lease_until", "next_attempt_at", "publish_after"}
WAITS = {"leased", "wait_times"}
"""Functions that give the columns of a whole wait. In the statements for PostgreSQL `{_LEASED}` does."""
SHOWS_A_WAIT = "follow_disabling"
"""Parks deliveries and frees them: it begins no wait and ends none."""


def sources() -> dict[str, str]:
    return {path.relative_to(SOURCES).as_posix(): path.read_text() for path in sorted(SOURCES.rglob("*.py"))}


def written(text: str) -> Iterator[tuple[str, set[str]]]:
    """For each dict and each call of `values` in a module: the function around it, and the columns that it gives."""
    tree = ast.parse(text)
    functions = {
        node: function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names: set[str] = set()
        if isinstance(node, ast.Dict):
            names = {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
            names |= {key.attr for key in node.keys if isinstance(key, ast.Attribute)}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and "values" in node.func.attr:
            names = {word.arg for word in node.keywords if word.arg is not None}
            pairs = [pair for value in node.args for pair in ast.walk(value) if isinstance(pair, ast.Tuple)]
            names |= {pair.elts[0].attr for pair in pairs if isinstance(pair.elts[0], ast.Attribute)}
        if any(isinstance(part, ast.Call) and getattr(part.func, "id", "") in WAITS for part in ast.walk(node)):
            names = names and names | {"waits_since"}
        yield functions.get(node, ""), names


def statements(text: str) -> Iterator[str]:
    """Each INSERT and UPDATE of a text in SQL, up to what it gives back."""
    yield from re.findall(r"(?:INSERT INTO|UPDATE) chain_dispatcher_.*?(?=\bWHERE\b|\bRETURNING\b|\Z)", text, re.DOTALL)


def test_whatever_writes_an_end_of_a_wait_writes_its_beginning() -> None:
    forgotten, seen = [], 0
    for name, text in sources().items():
        if not name.startswith("storage/") or "migrations" in name:
            continue
        for function, columns in written(text):
            if columns & ENDS and function != SHOWS_A_WAIT:
                seen += 1
                if "waits_since" not in columns:
                    forgotten.append(f"{name}: {function} writes {columns & ENDS}")
        for statement in statements(text):
            if any(end in statement for end in ENDS):
                seen += 1
                if "waits_since" not in statement and "{_LEASED}" not in statement:
                    forgotten.append(f"{name}: {statement}")
    assert forgotten == [] and seen > 8


def test_whatever_writes_when_a_chain_is_due_writes_that_it_has_written_it() -> None:
    forgotten, seen = [], 0
    for name, text in sources().items():
        if not name.startswith("storage/") or "migrations" in name:
            continue
        for function, columns in written(text):
            if "due_at" in columns:
                seen += 1
                if "updated_at" not in columns:
                    forgotten.append(f"{name}: {function}")
        # Most of the SQL of a move is in a text of its own.
        for statement in [*statements(text), *re.findall(r'_MOVED: Final = """(.*?)"""', text, re.DOTALL)]:
            if re.search(r"\bdue_at\b", statement) and "chain_dispatcher_event" not in statement:
                seen += 1
                if "updated_at" not in statement and "{_MOVED}" not in statement:
                    forgotten.append(f"{name}: {statement}")
    assert forgotten == [] and seen > 8


# --- the clock steps -------------------------------------------------------------------------------------------------

STEPS: Final = {
    "+2d": timedelta(days=2),
    "-2d": timedelta(days=-2),
    "+2s": timedelta(seconds=2),
    "-2s": -timedelta(seconds=2),
}
MINUTE: Final = 60
LOOK: Final = 60
"""Within so many seconds a wait that began in the future is found."""

SLACK: Final = 12
"""A relay's interval, and the two seconds of a small step."""


@pytest.fixture(params=STEPS)
def step(request: pytest.FixtureRequest) -> timedelta:
    return STEPS[request.param]


@pytest.fixture
def wrong(step: timedelta) -> Callable[[], Any]:
    """The clock is wrong while the block runs."""
    return lambda: clock.shift(step)


Wrong = Callable[[], Any]


@contextmanager
def later(seconds: float) -> Iterator[None]:
    with clock.shift(timedelta(seconds=seconds)):
        yield


def relays(dispatcher: Dispatcher, seconds: float) -> dict[str, int]:
    """What the relays of so many seconds do together, beat's, one every ten seconds from now on."""
    counts = {"relayed": 0, "settled": 0}
    for at in range(0, int(seconds) + 1, 10):
        with later(at):
            result = dispatcher.relay(tick=True)
            counts = {name: count + result.get(name, 0) for name, count in counts.items()}
    return counts


TRANSITIONS = {NEW: [shop.Remind], "reminded": [shop.Never]}


def sold(
    make_dispatcher: shop.Make, sink: shop.Sink | None = None, candidate: Any = shop.Remind, **options: Any
) -> Dispatcher:
    transitions = {NEW: [candidate], "reminded": [shop.Never]}
    return make_dispatcher(shop.cart(transitions, callback=shop.Sink() if sink is None else sink), **options)


def machine_now(dispatcher: Dispatcher) -> datetime:
    with dispatcher.database.read() as connection:
        return dispatcher.database.machine_now(connection)


class TestTicks:
    @pytest.mark.parametrize("name", ["sweep", "relay", "prune"])
    def test_a_pass_has_its_turn_within_its_interval(self, make_dispatcher: shop.Make, wrong: Wrong, name: str) -> None:
        dispatcher = sold(make_dispatcher, retention_days=30)
        interval = {"sweep": 60, "relay": 10, "prune": 86_400}[name]
        run = getattr(dispatcher, name)
        with wrong():
            assert run(tick=True) != {"claimed": False}

        turns = 0
        for seconds in (0, interval + SLACK):
            with later(seconds):
                turns += run(tick=True) != {"claimed": False}

        assert turns >= 1

    def test_a_tick_more_than_an_interval_ahead_is_claimed_at_once_and_logged(
        self, make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture
    ) -> None:
        dispatcher = sold(make_dispatcher)
        with clock.shift(timedelta(days=2)):
            dispatcher.sweep(tick=True)

        assert dispatcher.sweep(tick=True) != {"claimed": False}
        assert dispatcher.sweep(tick=True) == {"claimed": False}

        (line,) = [one for one in caplog.records if getattr(one, "action", "") == "tick_ahead"]
        assert line.levelname == "WARNING" and line.tick == "dispatcher.sweep"  # type: ignore[attr-defined]
        assert abs(line.seconds - 172_800) < MINUTE  # type: ignore[attr-defined]

    def test_a_tick_less_than_an_interval_ahead_is_waited_for(self, make_dispatcher: shop.Make) -> None:
        dispatcher = sold(make_dispatcher, sweep_seconds=3600)
        with later(3000):
            dispatcher.sweep(tick=True)

        assert dispatcher.sweep(tick=True) == {"claimed": False}
        with later(3000 + 3600 * 0.9 + 1):
            assert dispatcher.sweep(tick=True) != {"claimed": False}

    @pytest.mark.parametrize(("seconds", "turns"), [(60, 61), (3600, 2)])
    def test_a_long_interval_is_kept_although_beat_ticks_every_minute(
        self, make_dispatcher: shop.Make, seconds: float, turns: int
    ) -> None:
        """Whoever restarts beat: it ticks a minute after its start, and the row decides."""
        dispatcher = sold(make_dispatcher, sweep_seconds=seconds)
        results = []
        for at in range(0, 3601, 60):
            with later(at):
                results.append(dispatcher.sweep(tick=True))
        assert len(results) - results.count({"claimed": False}) == turns


@pytest.fixture
def owing(make_dispatcher: shop.Make, wrong: Wrong) -> tuple[Dispatcher, shop.Sink, DeliveryRecord]:
    """A delivery that was planned while the clock was wrong, and whose message is lost."""
    sink = shop.Sink()
    dispatcher = sold(make_dispatcher, sink)
    with wrong():
        dispatcher.relay(tick=True)
        delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
    return dispatcher, sink, delivery


def test_a_lost_message_is_published_again(owing: tuple[Dispatcher, shop.Sink, DeliveryRecord]) -> None:
    dispatcher, sink, delivery = owing

    assert relays(dispatcher, MINUTE + SLACK)["relayed"] >= 1

    with later(MINUTE + SLACK):
        assert shop.attempt(dispatcher, delivery).outcome == "delivered"
    assert len(sink) == 1


def test_a_retry_has_its_own_wait_and_no_more(make_dispatcher: shop.Make, step: timedelta) -> None:
    sink = shop.Sink(shop.Raises(OSError("down"), times=1))
    patient = shop.transition("Patient", "reminded", retry=RetryPolicy(base_seconds=600, jitter=0))
    dispatcher = sold(make_dispatcher, sink, patient)
    with clock.shift(step):
        delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
        assert shop.attempt(dispatcher, delivery).outcome == "retrying"

    dispatcher.relay(tick=True)
    if step > timedelta(0):  # else the clock leapt past it
        with later(590):
            assert shop.attempt(dispatcher, delivery, 2).outcome == "stale", "it is never ended early"
    with later(600 + SLACK):
        assert shop.attempt(dispatcher, delivery, 2).outcome == "delivered"


def begun(dispatcher: Dispatcher, delivery: DeliveryRecord) -> None:
    """Begin the first attempt at a delivery; its worker is killed."""
    seconds = dispatcher.settings.lease_seconds
    assert len(dispatcher._services.store.begin([Owed(delivery.id, 1)], lease_seconds=seconds)) == 1


def test_a_lease_ends_after_its_own_length_and_not_before(make_dispatcher: shop.Make, step: timedelta) -> None:
    dispatcher = sold(make_dispatcher)
    with clock.shift(step):
        delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
        begun(dispatcher, delivery)
    seconds = dispatcher.settings.lease_seconds

    early = relays(dispatcher, seconds - SLACK)["settled"]
    with later(seconds - SLACK):
        status = dispatcher.find_deliveries()[0].status
    late = relays_from(dispatcher, seconds - SLACK + 10, 4 * 10)["settled"]

    if step > timedelta(0):
        assert (early, status) == (0, "running"), "it is never ended early, because the attempt may be running"
    assert early + late == 1
    with later(seconds + 50):
        assert shop.attempt(dispatcher, delivery, 2).outcome == "delivered"


def relays_from(dispatcher: Dispatcher, start: float, seconds: float) -> dict[str, int]:
    with later(start):
        return relays(dispatcher, seconds)


def test_a_lease_that_ends_while_the_clock_is_wrong_is_settled(make_dispatcher: shop.Make, step: timedelta) -> None:
    """Whatever the relays of the wrong clock have marked."""
    dispatcher = sold(make_dispatcher)
    delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
    begun(dispatcher, delivery)
    with clock.shift(step):
        before = relays(dispatcher, 0)["settled"]

    after = relays(dispatcher, dispatcher.settings.lease_seconds + LOOK + 4 * SLACK)["settled"]

    assert before + after == 1


def test_what_a_relay_of_the_wrong_clock_has_published_keeps_its_wait(make_dispatcher: shop.Make) -> None:
    """The relay's own wait begins anew, and no other: the retry's was written by the right clock."""
    sink = shop.Sink(shop.Raises(OSError("down"), times=1))
    patient = shop.transition("Patient", "reminded", retry=RetryPolicy(base_seconds=3600, jitter=0))
    dispatcher = sold(make_dispatcher, sink, patient)
    delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
    assert shop.attempt(dispatcher, delivery).outcome == "retrying"
    with clock.shift(timedelta(days=2)):
        assert dispatcher.relay(tick=True)["relayed"] == 1

    relays(dispatcher, LOOK)

    with later(3590):
        assert shop.attempt(dispatcher, delivery, 2).outcome == "stale"
    with later(3600 + SLACK):
        assert shop.attempt(dispatcher, delivery, 2).outcome == "delivered"


def test_a_parked_delivery_is_found_when_it_is_freed(
    owing: tuple[Dispatcher, shop.Sink, DeliveryRecord], wrong: Wrong
) -> None:
    dispatcher, sink, delivery = owing
    chain = dispatcher.chain(delivery.chain_id)
    with wrong():
        chain.disable()
    relays(dispatcher, LOOK)
    with later(LOOK):
        chain.enable()

    with later(LOOK + 10):
        relays(dispatcher, LOOK)
        with later(LOOK + SLACK):
            assert shop.attempt(dispatcher, delivery).outcome == "delivered"
    assert len(sink) == 1


def test_a_delivery_that_is_parked_while_its_wait_begins_anew_stays_parked(make_dispatcher: shop.Make) -> None:
    dispatcher = sold(make_dispatcher)
    with clock.shift(timedelta(days=2)):
        delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
        dispatcher.chain(delivery.chain_id).disable()
    shop.change_delivery(dispatcher, delivery.id, publish_after=None)

    now = machine_now(dispatcher)
    count = dispatcher.database.write(lambda connection: moments.begin_anew(connection, [delivery.id], machine_now=now))

    (row,) = dispatcher.find_deliveries()
    assert count == 1 and row.publish_after is None and row.waits_since == now


def test_a_lease_that_is_renewed_meanwhile_is_left_alone(make_dispatcher: shop.Make) -> None:
    dispatcher = sold(make_dispatcher)
    database = dispatcher.database
    with clock.shift(timedelta(days=2)):
        delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
        begun(dispatcher, delivery)
    with database.read() as connection:
        (found,) = moments.future_waits(connection, after=None, limit=10)
    (running,) = dispatcher.find_deliveries()
    assert database.write(lambda connection: bool(deliveries.renew(connection, [running], lease_seconds=600)))
    (renewed,) = dispatcher.find_deliveries()

    now = machine_now(dispatcher)
    ids = [found.delivery_id]
    assert database.write(lambda connection: moments.begin_anew(connection, ids, machine_now=now)) == 0

    assert dispatcher.find_deliveries() == [renewed]


@pytest.mark.parametrize("name", ["sweep", "prune"])
def test_a_tick_ahead_has_the_waits_looked_at_at_once(make_dispatcher: shop.Make, name: str) -> None:
    """Whichever pass finds it, and although somebody has looked just now."""
    dispatcher = sold(make_dispatcher, retention_days=30)
    dispatcher.relay(tick=True)
    with clock.shift(timedelta(hours=2)):
        delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
        getattr(dispatcher, name)(tick=True)

    with later(6):
        dispatcher.sweep(tick=True)
        now = machine_now(dispatcher)

    (row,) = dispatcher.find_deliveries()
    assert row.id == delivery.id and row.waits_since is not None and row.publish_after is not None
    assert abs(row.waits_since - now) < timedelta(seconds=5)
    assert row.publish_after - row.waits_since == pytest.approx(timedelta(seconds=60), abs=timedelta(seconds=1))


def test_many_waits_begin_anew_and_are_logged(make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture) -> None:
    dispatcher = sold(make_dispatcher, chains_per_task=1000)
    ids = [one for one, _ in dispatcher.bulk_get_or_create(shop.CHAIN_TYPE, ([("cart", str(n))] for n in range(1100)))]
    with clock.shift(timedelta(days=2)):
        for start in (0, 550):
            dispatcher.execute_chains(ids[start : start + 550])

    dispatcher.relay(tick=True)

    now = machine_now(dispatcher)
    waits = [one.waits_since for one in dispatcher.find_deliveries(limit=2000)]
    assert len(waits) == 1100 and all(one is not None and one <= now for one in waits)
    (line,) = [one for one in caplog.records if getattr(one, "action", "") == "waits_begun_anew"]
    assert line.waits == 1100 and line.levelname == "WARNING"  # type: ignore[attr-defined]


def test_a_plan_of_the_future_is_looked_at_again(make_dispatcher: shop.Make, step: timedelta) -> None:
    wanted = [True]
    picky = shop.transition("Picky", "reminded", lambda _: wanted[0])
    dispatcher = sold(make_dispatcher, candidate=picky, last_look_seconds=3600)
    with clock.shift(step):
        delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
    wanted[0] = False

    dispatcher.relay(tick=True)
    with later(SLACK):
        outcome = shop.attempt(dispatcher, delivery).outcome

    assert outcome == ("delivered" if abs(step) < timedelta(hours=1) else "cancelled")


def test_the_hour_of_a_budget_begins_anew_with_its_count(
    make_dispatcher: shop.Make, wrong: Wrong, step: timedelta
) -> None:
    config = shop.cart(TRANSITIONS, callback=shop.Sink(), max_plans_per_hour=2)
    dispatcher = make_dispatcher(config)
    chains = [shop.new_chain(dispatcher, number) for number in range(5)]

    def outcome(number: int) -> str:
        (result,) = dispatcher.execute_chains([chains[number].id or 0])
        return str(result.outcome)

    with wrong():
        assert outcome(0) == "planned"
    assert outcome(1) == "planned"
    with later(3600 + SLACK):
        assert [outcome(2), outcome(3)] == ["planned", "planned"]
        if step > timedelta(0):
            (row,) = dispatcher.find_types()
            assert row.window_plans == 2
        assert outcome(4) == "paused"


def test_an_hour_of_the_future_keeps_its_count(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink(), max_plans_per_hour=1))
    chains = [shop.new_chain(dispatcher, number) for number in range(2)]
    with clock.shift(timedelta(days=2)):
        dispatcher.execute_chains([chains[0].id or 0])

    (result,) = dispatcher.execute_chains([chains[1].id or 0])

    assert result.outcome == "paused"


def test_an_estimate_is_counted_again_within_its_hour(make_dispatcher: shop.Make, wrong: Wrong) -> None:
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink(), max_plans_per_hour="100%"))
    chains = [shop.new_chain(dispatcher, number) for number in range(2)]
    with wrong():
        dispatcher.execute_chains([chains[0].id or 0])
    shop.new_chain(dispatcher, 2)

    with later(3600 + SLACK):
        dispatcher.execute_chains([chains[1].id or 0])
        (row,) = dispatcher.find_types()

    assert row.chains_estimate == 3


def test_a_fingerprint_is_out_of_use_after_ten_sweeps(make_dispatcher: shop.Make, wrong: Wrong) -> None:
    old, new = sold(make_dispatcher), sold(make_dispatcher, candidate=shop.transition("Other", "reminded"))
    with wrong():
        old.sweep(tick=True)

    for seconds in (0, 300, 600 + SLACK):
        with later(seconds):
            new.sweep(tick=True)

    with new.database.read() as connection:
        states = chain_types.read_fingerprints(connection, [shop.CHAIN_TYPE])[shop.CHAIN_TYPE]
    assert [len(seen) for seen in states.values()] == [1] * len(states)
    with later(600 + SLACK):
        now = machine_now(new)
    assert all(datetime.fromisoformat(one) <= now for seen in states.values() for one in seen.values())


def test_a_sweep_that_stopped_in_the_future_begins_at_the_oldest_chain(
    make_dispatcher: shop.Make, step: timedelta
) -> None:
    dispatcher = sold(make_dispatcher)
    shop.new_chain(dispatcher)
    position = {shop.CHAIN_TYPE: [(machine_now(dispatcher) + step).isoformat(), 10**6]}
    dispatcher.database.write(lambda connection: ticks.write_position(connection, "dispatcher.sweep", position))

    with later(SLACK):
        assert dispatcher.sweep(tick=True)["enqueued"] == 1


def test_what_has_ended_is_kept_longer_by_the_step(make_dispatcher: shop.Make, wrong: Wrong, step: timedelta) -> None:
    dispatcher = sold(make_dispatcher)
    with wrong():
        shop.attempt(dispatcher, shop.planned(dispatcher, shop.new_chain(dispatcher)))
        dispatcher.pause(shop.CHAIN_TYPE, "an audit")

    with clock.shift(timedelta(days=30) + max(step, timedelta(0)) + timedelta(seconds=SLACK)):
        counts = dispatcher.prune(days=30)

    assert counts["deliveries"] == counts["actions"] == 1 and counts["events"] > 0


# --- what only the doctor can tell -----------------------------------------------------------------------------------


def ahead(dispatcher: Dispatcher) -> list[str]:
    return [str(one) for one in dispatcher.examine() if "in the future" in one.problem]


def rests(dispatcher: Dispatcher) -> int:
    """A chain that rests for an hour by its guard."""
    chain = shop.new_chain(dispatcher)
    (result,) = dispatcher.execute_chains([chain.id or 0])
    assert result.outcome == "none"
    return chain.id or 0


def backs_off(dispatcher: Dispatcher) -> int:
    chain = shop.new_chain(dispatcher, chain_type="fails")
    (result,) = dispatcher.execute_chains([chain.id or 0])
    assert result.outcome == "guard_failed"
    return chain.id or 0


def asks(dispatcher: Dispatcher) -> int:
    chain = shop.new_chain(dispatcher)
    chain.enqueue(best_effort=True)
    return chain.id or 0


def moves(dispatcher: Dispatcher) -> int:
    chain = shop.new_chain(dispatcher, chain_type="moves")
    (result,) = dispatcher.execute_chains([chain.id or 0])
    assert result.outcome == "moved"
    return chain.id or 0


WRITES: Final = {"rests": rests, "backs off": backs_off, "is asked": asks, "moves": moves}
Patient = shop.transition("Patient", "reminded", lambda self: self.not_before(self.now + timedelta(hours=1), "early"))
Fails = shop.transition("Fails", "reminded", shop.Raises(RuntimeError("no")))
Moves = shop.transition("Moves", "reminded", callback=None)


class TestTheDoctor:
    @pytest.fixture
    def dispatcher(self, make_dispatcher: shop.Make) -> Dispatcher:
        config = {
            "chains": [
                {"chain_type": name, "callback": shop.Sink(), "transitions": {NEW: [candidate], "reminded": [Patient]}}
                for name, candidate in {shop.CHAIN_TYPE: Patient, "fails": Fails, "moves": Moves}.items()
            ]
        }
        return make_dispatcher(config, redis_url=None, broker_url=None)

    @pytest.mark.parametrize("write", WRITES)
    def test_names_chains_of_the_future_and_makes_them_due(
        self, dispatcher: Dispatcher, step: timedelta, write: str
    ) -> None:
        others = [shop.new_chain(dispatcher, number).id for number in (1, 2)]
        untouched = [shop.row_of(dispatcher, one) for one in others]
        with clock.shift(step):
            chain_id = WRITES[write](dispatcher)

        found = ahead(dispatcher)
        if step < timedelta(seconds=5):
            assert found == []
            return
        (line,) = found
        assert line.startswith(
            f"chain: 1 chains were created, moved or written in the future, while a clock was wrong: {chain_id}; "
        )
        assert line.endswith("--repair sets these moments to now and makes the chains due")
        gone, _ = dispatcher.repair()
        assert [str(one) for one in gone] == found and ahead(dispatcher) == []

        now = machine_now(dispatcher)
        row = shop.row_of(dispatcher, chain_id)
        assert max(row.due_at, row.updated_at, row.entered_at, row.started_at) <= now
        assert [shop.row_of(dispatcher, one) for one in others] == untouched
        (result,) = dispatcher.execute_chains([chain_id])
        assert result.outcome in ("none", "guard_failed")

    def test_leaves_alone_what_a_person_or_a_delivery_keeps(self, dispatcher: Dispatcher) -> None:
        with clock.shift(timedelta(days=2)):
            disabled, resting, owed = (shop.new_chain(dispatcher, number) for number in range(3))
            disabled.disable()
        until = machine_now(dispatcher) + timedelta(hours=7)
        shop.change_chain(dispatcher, resting.id, next_update_at=until, due_at=until)
        shop.change_chain(dispatcher, owed.id, pending_delivery_id="0" * 32, due_at=None)

        finding = next(one for one in dispatcher.examine() if "in the future" in one.problem)
        assert finding.repair is not None
        finding.repair()

        assert shop.row_of(dispatcher, disabled.id).due_at is None and shop.row_of(dispatcher, disabled.id).disabled
        assert shop.row_of(dispatcher, resting.id).due_at == until
        assert shop.row_of(dispatcher, owed.id).due_at is None
        assert ahead(dispatcher) == []

    def test_keeps_what_a_worker_is_about_to_write_of_the_old_row_out(self, dispatcher: Dispatcher) -> None:
        gate = shop.Gate()
        with clock.shift(timedelta(days=2)):
            chain = shop.new_chain(dispatcher)

        def guard(self: Any) -> bool:
            gate.wait()
            return self.not_before(self.now + timedelta(days=9), "early")  # type: ignore[no-any-return]

        slow = shop.transition("Patient", "reminded", guard)
        worker = Dispatcher(
            shop.cart({NEW: [slow], "reminded": []}, callback=None),
            database_url=dispatcher.database.url.render_as_string(hide_password=False),
            broker_url=shop.NOBODY,
        )
        with gate.during(lambda: worker.execute_chains([chain.id or 0])) as result:
            dispatcher.repair()

        assert [str(one.outcome) for one in result.result()] == ["stale"]
        assert shop.row_of(dispatcher, chain.id).due_at <= machine_now(dispatcher)
        worker.close()

    def test_repairs_more_than_a_page_and_counts_them(self, dispatcher: Dispatcher) -> None:
        with clock.shift(timedelta(days=2)):
            carts = ([("cart", str(number))] for number in range(1100))
            ids = [one for one, _ in dispatcher.bulk_get_or_create(shop.CHAIN_TYPE, carts)]

        (line,) = ahead(dispatcher)
        shown = ", ".join(map(str, sorted(ids)[:20]))
        assert line.startswith("chain: 1100 chains were created") and f"wrong: {shown}, ...; " in line
        dispatcher.repair()
        assert ahead(dispatcher) == []

    def test_repairs_nothing_while_the_clock_is_still_wrong(self, dispatcher: Dispatcher) -> None:
        chain = shop.new_chain(dispatcher)
        before = shop.row_of(dispatcher, chain.id)

        with clock.shift(timedelta(days=-2)):
            (line,) = ahead(dispatcher)
            dispatcher.repair()

        assert line.endswith("; synchronise the clocks first")
        assert shop.row_of(dispatcher, chain.id) == before

    def test_names_a_tick_of_the_future_and_lets_the_pass_run(self, dispatcher: Dispatcher) -> None:
        with clock.shift(timedelta(minutes=50)):
            dispatcher.prune(days=1, tick=True)
        assert dispatcher.prune(days=1, tick=True) == {"claimed": False}

        (line,) = ahead(dispatcher)
        assert re.match(
            r"beat: dispatcher.prune last ran (2999|3000) s in the future, while the clock was wrong; ", line
        )
        assert line.endswith("--repair lets it run again at once")
        dispatcher.repair()

        assert ahead(dispatcher) == []
        with dispatcher.database.read() as connection:
            query = select(TickRow.last_at).where(TickRow.name == "dispatcher.prune")
            assert connection.execute(query).scalar_one() is None
        assert dispatcher.prune(days=1, tick=True) != {"claimed": False}
