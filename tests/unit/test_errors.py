"""Errors keep their facts and their text, also across a process boundary."""

import copy
import importlib
import inspect
import pickle
import pkgutil
import signal

import pytest

import dispatcher
from dispatcher.domain.evaluation import GuardFailed
from dispatcher.errors import (
    AmbiguousChain,
    ChainDisabled,
    ChainError,
    ChainLocked,
    ChainMissing,
    ChainNotDue,
    ConfigurationError,
    DatabaseNotMigrated,
    DeliveryPending,
    DispatcherError,
    EnqueueNotPublished,
    InvalidResource,
    NotSerializable,
    PermanentFailure,
    ServiceRefused,
    ServiceUnavailable,
    ends_process,
)

for module in pkgutil.walk_packages(dispatcher.__path__, "dispatcher."):  # the errors of every module count
    if not module.name.startswith(("dispatcher.__main__", "dispatcher.storage.migrations.")):
        importlib.import_module(module.name)


def below(error: type[DispatcherError]) -> list[type[DispatcherError]]:
    return [error] + [found for child in error.__subclasses__() for found in below(child)]


ERRORS = sorted({error for error in below(DispatcherError) if error.__module__.startswith("dispatcher.")}, key=str)

SAMPLES = {"chain_id": 7, "chain_ids": [1, 2], "written": None, "found": None}


def sample(error: type[DispatcherError]) -> DispatcherError:
    """An instance with a telling value for every parameter of its constructor."""
    if error.__init__ is Exception.__init__:
        return error("any", "facts")
    return error(*(SAMPLES.get(name, f"<{name}>") for name in inspect.signature(error).parameters))


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_survives_pickling_with_its_attributes_and_text(error):
    original = sample(error)
    again = pickle.loads(pickle.dumps(original))  # noqa: S301 - our own bytes: what a Celery result does
    assert type(again) is error
    assert vars(again) == vars(original)
    assert str(again) == str(original)
    assert again.args == original.args


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_survives_copying(error):
    original = sample(error)
    assert str(copy.deepcopy(original)) == str(original)


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_shows_every_fact_it_was_given(error):
    original = sample(error)
    shown = [value for value in vars(original).values() if isinstance(value, str)]
    assert [value for value in shown if value not in str(original)] == []


def test_the_text_of_a_failed_guard_survives_pickling_although_its_cause_does_not():
    error = GuardFailed("Reminder", "KeyError: 'cart'")
    error.__cause__ = KeyError("cart")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert again.__cause__ is None
    assert str(again) == "the guard of Reminder raised KeyError: 'cart'"


@pytest.mark.parametrize(
    "error",
    [ConfigurationError, InvalidResource, NotSerializable, AmbiguousChain, ChainLocked, ChainNotDue],
)
def test_errors_for_bad_input_and_for_a_busy_chain_are_value_errors(error):
    assert issubclass(error, ValueError)


@pytest.mark.parametrize("error", [ChainDisabled, DeliveryPending, PermanentFailure, EnqueueNotPublished])
def test_other_errors_are_no_value_errors(error):
    assert not issubclass(error, ValueError)


def test_a_missing_chain_is_a_lookup_error():
    assert issubclass(ChainMissing, LookupError)
    assert str(ChainMissing(7)) == "chain 7 does not exist"


def test_a_configuration_error_begins_with_the_path_to_the_culprit():
    assert str(ConfigurationError("is wrong", "chain type 'a', state 'new'")) == "chain type 'a', state 'new': is wrong"
    assert str(ConfigurationError("is wrong")) == "is wrong"


def test_an_ambiguous_chain_names_the_chains():
    assert str(AmbiguousChain("cart", [3, 5])) == "more than one 'cart' chain has these resources: 3, 5"


def test_a_chain_error_names_the_chain_and_gives_the_detail_if_there_is_one():
    assert str(ChainError(7)) == "chain 7 cannot be used"
    assert str(ChainNotDue(7, "2024-01-01")) == "chain 7 rests until its next update (2024-01-01)"


def test_an_unpublished_enqueue_says_whether_the_request_is_written():
    assert EnqueueNotPublished(7).written is True
    assert str(EnqueueNotPublished(7, "timeout")) == (
        "chain 7: no message was published (timeout); its request is written, so the next sweep does the work"
    )
    unknown = "it is not known whether the request is written: enqueue it again if asking twice does no harm"
    assert str(EnqueueNotPublished(7, "timeout", written=None)) == (
        f"chain 7: no message was published (timeout); {unknown}"
    )
    assert str(EnqueueNotPublished(None, "timeout", written=None)) == f"no message was published (timeout); {unknown}"


def test_a_database_that_is_not_migrated_says_what_to_run():
    assert "has no chain-dispatcher tables" in str(DatabaseNotMigrated(None, "0002"))
    assert "is at revision 0001" in str(DatabaseNotMigrated("0001", "0002"))
    assert str(DatabaseNotMigrated("0001", "0002")).endswith("run `dispatcher db upgrade`")


def test_an_unserialisable_value_is_named_by_its_key():
    error = NotSerializable("initial_context", "cart", "Object of type Cart")
    assert str(error) == "initial_context['cart'] is not JSON-serialisable: Object of type Cart"


def test_an_unreachable_service_is_named_with_its_address():
    error = ServiceUnavailable("database", "postgresql://host/db", "timed out")
    assert str(error) == "cannot reach the database at postgresql://host/db: timed out"
    assert error.written is False


def test_a_database_that_did_not_answer_to_a_commit_is_not_said_to_have_written_nothing():
    error = ServiceUnavailable("database", "postgresql://host/db", "timed out", written=None)
    assert str(error) == (
        "the database at postgresql://host/db did not answer to a commit, which may have succeeded: timed out"
    )


@pytest.mark.parametrize(("advice", "end"), [("free disk space", " (free disk space)"), ("", "")])
def test_a_refusal_says_what_helps(advice, end):
    error = ServiceRefused("database", "postgresql://host/db", "no space", advice=advice)
    assert str(error) == f"the database at postgresql://host/db refuses: no space{end}"
    assert error.written is False


def test_a_permanent_failure_carries_the_callers_text():
    assert str(PermanentFailure("address is gone")) == "address is gone"


def test_only_the_exit_that_a_pool_tells_its_process_to_make_ends_it() -> None:
    assert ends_process(SystemExit(-(256 - signal.SIGTERM)))
    assert not ends_process(SystemExit(1))
    assert not ends_process(SystemExit())
    assert not ends_process(SystemExit("-1"))
    assert not ends_process(ValueError(-1))
