"""The configuration: what is accepted, what is refused and how, and which callback a winner gets."""

import logging
import os
import subprocess
import sys
from datetime import UTC, date, datetime, time, timedelta
from functools import cached_property

import pytest

from dispatcher.domain.callbacks import (
    MOVE_WITHOUT,
    NO_CALLBACK_FOUND,
    CallbackChoice,
    choose_callback,
    limits_of,
    resolve_callback,
)
from dispatcher.domain.config import MAX_NAME, NOT_GIVEN, ChainType, DispatcherConfig
from dispatcher.domain.fingerprints import fingerprint
from dispatcher.domain.hours import DeliveryHours
from dispatcher.errors import ConfigurationError
from dispatcher.rates import RateLimit, rate_limit
from dispatcher.retry import MAX_WAIT_SECONDS, RetryPolicy
from dispatcher.states import DONE, NEW
from dispatcher.transition import ChainSnapshot, Transition


class Complete(Transition):
    final_state = DONE
    recheck_seconds = None

    def is_valid(self):
        return False


class Reminder(Transition):
    final_state = "reminded"

    def is_valid(self):
        return True


class Offer(Transition):
    final_state = "offered"

    def is_valid(self):
        return True


class WithOwn(Reminder):
    def callback(self, **kwargs):
        return (self, kwargs)


class WithoutAny(Reminder):
    callback = None


def send(transition, **kwargs):
    return ("sent", transition, kwargs)


def send_sms(transition, **kwargs):
    return ("sms", transition, kwargs)


def send_piecewise(transition, **kwargs):
    yield transition


async def send_later(transition, **kwargs):
    return None


def cart(transitions=None, **options):
    return ChainType(
        **{
            "chain_type": "abandoned_cart",
            "transitions": {NEW: [Complete, Reminder], "reminded": [Complete], DONE: []}
            if transitions is None
            else transitions,
            **options,
        }
    )


def variant(base=Reminder, name=None, **attributes):
    return type(name or base.__name__, (base,), attributes)


def candidate(**attributes):
    """A transition class named Broken with the given attributes over a working one."""
    return variant(Reminder, "Broken", **attributes)


class TestAccepted:
    def test_the_ancestors_dict_and_the_typed_form_are_equal(self):
        loader = dict
        options = {
            "callback": send,
            "callbacks": {"sms": send_sms},
            "load_context": loader,
            "queue": "carts",
            "recheck_seconds": 60,
            "on_unknown": "hold",
            "on_dead": "skip",
        }
        transitions = {NEW: [Complete, Reminder], DONE: []}
        raw = {"chain_type": "abandoned_cart", "transitions": transitions, "continue": True, **options}
        typed = ChainType(chain_type="abandoned_cart", transitions=transitions, continue_=True, **options)
        assert DispatcherConfig.parse({"chains": [raw]}) == DispatcherConfig([typed])

    def test_the_shortest_configuration_has_the_documented_defaults(self):
        chain = DispatcherConfig.parse({"chains": [{"chain_type": "a", "transitions": {}}]}).get("a")
        assert chain.callback is NOT_GIVEN
        assert repr(chain.callback) == "NOT_GIVEN"
        assert chain.callbacks == {}
        assert chain.load_context is None
        assert chain.queue is None
        assert chain.recheck_seconds == 0
        assert chain.continue_ is False
        assert chain.on_unknown == "retry"
        assert chain.on_dead == "hold"
        assert (chain.rate, chain.hours, chain.zone.key) == (None, None, "UTC")

    def test_rates_hours_and_time_zones_are_values(self):
        chain = cart(rate_limit="100/m", delivery_hours="22:00-06:00", time_zone="Europe/Berlin")
        assert chain.rate == RateLimit("type/abandoned_cart", 100, 60)
        assert chain.hours == DeliveryHours(time(22), time(6))
        assert chain.zone.key == "Europe/Berlin"

    def test_typed_objects_dicts_and_lists_of_both_are_parsed(self):
        typed, raw = cart(chain_type="a"), {"chain_type": "b", "transitions": {}}
        assert list(DispatcherConfig.parse([typed, raw]).by_type) == ["a", "b"]
        assert list(DispatcherConfig.parse({"chains": (typed, raw)}).by_type) == ["a", "b"]
        assert DispatcherConfig.parse([]).chains == ()

    def test_a_parsed_configuration_is_parsed_to_itself(self):
        config = DispatcherConfig([cart()])
        assert DispatcherConfig.parse(config) is config

    def test_candidates_keep_their_order(self):
        assert cart({NEW: [Reminder, Complete, Offer]}).candidates(NEW) == (Reminder, Complete, Offer)

    def test_states_without_candidates_and_unknown_states_have_none(self):
        assert cart().candidates(DONE) == cart().candidates("elsewhere") == ()

    def test_the_states_are_those_with_candidates_those_led_to_and_the_reserved_ones(self):
        assert cart({"trial": [Reminder]}).states == {NEW, "trial", "reminded", DONE}

    def test_transitions_are_found_by_their_class_names(self):
        assert cart().by_name == {"Complete": Complete, "Reminder": Reminder}

    def test_one_transition_may_be_a_candidate_of_several_states(self):
        assert cart({NEW: [Complete], "x": [Complete]}).by_name == {"Complete": Complete}

    def test_changing_the_callers_dict_afterwards_changes_nothing(self):
        transitions = {NEW: [Complete]}
        chain = cart(transitions)
        transitions[NEW].append(Reminder)
        transitions["x"] = [Reminder]
        assert chain.transitions == {NEW: (Complete,)}

    def test_the_graph_shows_names_and_final_states(self):
        assert cart().graph.successors(NEW) == (DONE, "reminded")

    def test_a_chain_type_is_found_by_its_name(self):
        chain = cart()
        assert DispatcherConfig([chain]).get("abandoned_cart") is chain

    @pytest.mark.parametrize("seconds", [None, 0, 0.5, 86400, MAX_WAIT_SECONDS])
    def test_recheck_seconds_may_be_a_number_or_none_on_type_and_transition(self, seconds):
        assert cart({NEW: [candidate(recheck_seconds=seconds)]}, recheck_seconds=seconds)

    @pytest.mark.parametrize(
        "rest",
        [date(2030, 1, 1), datetime(2030, 1, 1, tzinfo=UTC), None, property(lambda self: None), cached_property(repr)],
    )
    def test_a_rest_after_the_move_may_be_a_date_or_computed(self, rest):
        assert cart({NEW: [candidate(date_next_update=rest)]})

    def test_a_guard_may_be_inherited_static_or_a_lambda(self):
        guards = [lambda self: True, staticmethod(lambda: True), classmethod(lambda cls: True)]
        assert cart({NEW: [variant(Reminder, f"T{n}", is_valid=guard) for n, guard in enumerate(guards)]})

    def test_names_may_be_as_long_as_the_columns(self):
        longest = "x" * MAX_NAME
        assert cart({longest: [variant(final_state=longest)]}, chain_type=longest, callbacks={longest: send})

    def test_an_own_callback_on_the_way_to_done_is_warned_about(self, caplog):
        with caplog.at_level(logging.WARNING, logger="dispatcher.domain.config"):
            cart({NEW: [variant(WithOwn, final_state=DONE)]})
        assert "chain type 'abandoned_cart', state 'new', transition WithOwn" in caplog.text

    def test_a_callback_of_none_on_the_way_to_done_is_not_warned_about(self, caplog):
        cart({NEW: [variant(WithoutAny, final_state=DONE)]})
        assert caplog.text == ""


def refused(make, *parts):
    """The error's text, which must have all of the parts."""
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert isinstance(caught.value, ValueError)
    assert [part for part in parts if part not in str(caught.value)] == []
    return caught.value


class TestRefusedTransitions:
    """Each is named with chain type, state and transition."""

    @pytest.mark.parametrize(
        ("broken", "problem"),
        [
            (candidate(final_state=None), "has no `final_state`"),
            (type("Broken", (Transition,), {"is_valid": lambda self: True}), "has no `final_state`"),
            (candidate(final_state=""), "final_state must be a non-empty string"),
            (candidate(final_state=7), "final_state must be a non-empty string"),
            (candidate(final_state="x" * (MAX_NAME + 1)), "at most 100 characters"),
            (candidate(final_state="two\nlines"), "control characters"),
            (type("Broken", (Transition,), {"final_state": "x"}), "has no `is_valid()`"),
            (candidate(is_valid=None), "has no `is_valid()`"),
            (candidate(is_valid=True), "has no `is_valid()`"),
            (candidate(is_valid=send_later), "`is_valid` must not be an async function"),
            (candidate(is_valid=send_piecewise), "`is_valid` must not contain `yield`, because nothing iterates it"),
            (candidate(callback="send"), "`callback` must be a method"),
            (candidate(callback=send_later), "`callback` must not be an async function"),
            (candidate(retry=5), "`retry` must be a RetryPolicy"),
            (candidate(initial_context=None), "`initial_context` must be a dict"),
            (candidate(initial_context=[1]), "`initial_context` must be a dict"),
            (candidate(date_next_update="2030-01-01"), "`date_next_update` must be a date"),
            (candidate(date_next_update=timedelta(days=1)), "`date_next_update` must be a date"),
            (candidate(date_next_update=lambda self: None), "`date_next_update` must be a date"),
            (candidate(recheck_seconds=-1), "`recheck_seconds` must be a number"),
            (candidate(recheck_seconds=True), "`recheck_seconds` must be a number"),
            (candidate(recheck_seconds="60"), "`recheck_seconds` must be a number"),
            (candidate(recheck_seconds=float("inf")), "`recheck_seconds` must be a number"),
            (candidate(recheck_seconds=float("nan")), "`recheck_seconds` must be a number"),
            (candidate(recheck_seconds=1e13), "`recheck_seconds` must be a number"),
        ],
    )
    def test_a_broken_transition(self, broken, problem):
        refused(
            lambda: cart({"reminded": [Complete, broken]}),
            problem,
            "chain type 'abandoned_cart', state 'reminded', transition Broken",
        )

    def test_an_over_long_class_name(self):
        refused(lambda: cart({NEW: [variant(name="T" * (MAX_NAME + 1))]}), "transition name", "at most 100 characters")

    @pytest.mark.parametrize("wrong", [object, Reminder(ChainSnapshot(1, "a", NEW, (), datetime.now(UTC))), "Reminder"])
    def test_a_candidate_that_is_no_transition_class(self, wrong):
        refused(
            lambda: cart({NEW: [wrong]}), "is not a Transition class", repr(wrong), "'abandoned_cart'", "state 'new'"
        )

    @pytest.mark.parametrize("states", [(NEW, NEW), (NEW, "reminded")])
    def test_two_transitions_of_one_class_name(self, states):
        transitions = {}
        for state, found in zip(states, (Reminder, variant()), strict=True):
            transitions.setdefault(state, []).append(found)
        refused(
            lambda: cart(transitions),
            "the same class name",
            f"chain type 'abandoned_cart', state {states[1]!r}, transition Reminder",
        )

    def test_one_class_name_in_two_chain_types_is_fine(self):
        config = DispatcherConfig([cart({NEW: [Reminder]}), cart({NEW: [variant()]}, chain_type="other")])
        assert len(config.chains) == 2

    def test_a_transition_listed_twice_for_one_state(self):
        refused(lambda: cart({NEW: [Reminder, Reminder]}), "listed twice", "'abandoned_cart'", "state 'new'")

    def test_a_way_out_of_done(self):
        refused(lambda: cart({DONE: [Reminder]}), "nothing may leave DONE", "'abandoned_cart'", "state 'done'")


class TestRefusedChainTypes:
    @pytest.mark.parametrize("wrong", [None, [Reminder], "new"])
    def test_transitions_that_are_no_dict(self, wrong):
        refused(lambda: ChainType(chain_type="abandoned_cart", transitions=wrong), "must be a dict", "'abandoned_cart'")

    @pytest.mark.parametrize("wrong", [Reminder, None, "Reminder", b"Reminder", {Reminder}, {Reminder: 1}, iter([])])
    def test_candidates_that_have_no_order_or_are_no_list(self, wrong):
        refused(lambda: cart({NEW: wrong}), "must be a list of transitions", "'abandoned_cart'", "state 'new'")

    @pytest.mark.parametrize("wrong", ["", None, 7, "x" * (MAX_NAME + 1), "a\x00b"])
    def test_a_bad_state_name(self, wrong):
        refused(lambda: cart({wrong: []}), "a state must", "'abandoned_cart'", f"state {wrong!r}")

    @pytest.mark.parametrize("wrong", ["", None, 7, "x" * (MAX_NAME + 1), "a\tb"])
    def test_a_bad_chain_type_name(self, wrong):
        refused(lambda: cart(chain_type=wrong), "a chain type must", f"chain type {wrong!r}")

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"callback": "send"}, "`callback` must be callable"),
            ({"callback": send_later}, "`callback` must not be an async function"),
            ({"callbacks": None}, "`callbacks` must be a dict"),
            ({"callbacks": [send]}, "`callbacks` must be a dict"),
            ({"callbacks": {"": send}}, "a callback name must"),
            ({"callbacks": {7: send}}, "a callback name must"),
            ({"callbacks": {"sms": "send_sms"}}, "`callbacks`['sms'] is not callable"),
            ({"callbacks": {"sms": send_later}}, "`callbacks`['sms'] must not be an async function"),
            ({"load_context": {}}, "`load_context` must be callable"),
            ({"load_context": send_later}, "`load_context` must not be an async function"),
            ({"queue": ""}, "a queue must"),
            ({"queue": 1}, "a queue must"),
            ({"recheck_seconds": -1}, "`recheck_seconds` must be a number"),
            ({"recheck_seconds": False}, "`recheck_seconds` must be a number"),
            ({"continue_": 1}, "`continue` must be True or False"),
            ({"on_unknown": "skip"}, '`on_unknown` must be "retry" or "hold"'),
            ({"on_dead": "retry"}, '`on_dead` must be "hold" or "skip"'),
            ({"rate_limit": "100 per minute"}, '`rate_limit` must be a rate such as "10/s"'),
            ({"rate_limit": 100}, "`rate_limit` must be a rate"),
            ({"delivery_hours": "8-20"}, '`delivery_hours` must be hours such as "08:00-20:00"'),
            ({"delivery_hours": "08:00-08:00"}, "`delivery_hours` must begin and end at different times"),
            ({"time_zone": "Berlin"}, "`time_zone` must be the name of a time zone"),
            ({"time_zone": None}, "`time_zone` must be the name of a time zone"),
        ],
    )
    def test_a_bad_option(self, options, problem):
        refused(lambda: cart(**options), problem, "chain type 'abandoned_cart'")

    @pytest.mark.parametrize("missing", ["chain_type", "transitions"])
    def test_a_dict_without_a_required_key(self, missing):
        raw = {"chain_type": "abandoned_cart", "transitions": {}}
        del raw[missing]
        refused(lambda: DispatcherConfig.parse({"chains": [raw]}), f"`{missing}` is missing", "`chains`[0]")

    def test_a_dict_without_transitions_is_named(self):
        refused(lambda: DispatcherConfig.parse({"chains": [{"chain_type": "cart"}]}), "chain type 'cart'")

    @pytest.mark.parametrize("option", ["calback", "continue_", "by_name", "states", 7])
    def test_an_unknown_option(self, option):
        raw = {"chain_type": "abandoned_cart", "transitions": {}, option: None}
        refused(lambda: DispatcherConfig.parse({"chains": [raw]}), f"unknown option {option!r}", "'abandoned_cart'")


class TestRefusedConfigurations:
    @pytest.mark.parametrize(
        ("config", "problem"),
        [
            ({}, "the configuration has no `chains`"),
            ({"chain": []}, "the configuration has no `chains`"),
            ({"chains": [], "callback": send}, "unknown key 'callback' beside `chains`"),
            ({"chains": None}, "`chains`: must be a list of chain types"),
            ({"chains": "abandoned_cart"}, "`chains`: must be a list of chain types"),
            ({"chains": {"chain_type": "a", "transitions": {}}}, "`chains`: must be a list of chain types"),
            ("module:ATTRIBUTE", "`chains`: must be a list of chain types"),
            (None, "`chains`: must be a list of chain types"),
            ({"chains": [None]}, "`chains`[0]: a chain must be a dict"),
            ([cart(), "cart"], "`chains`[1]: a chain must be a dict"),
        ],
    )
    def test_a_configuration_of_another_shape(self, config, problem):
        refused(lambda: DispatcherConfig.parse(config), problem)

    def test_typed_chains_that_are_none(self):
        refused(lambda: DispatcherConfig([{"chain_type": "a", "transitions": {}}]), "must be a ChainType")

    def test_a_chain_type_that_is_configured_twice(self):
        chain = cart()
        refused(lambda: DispatcherConfig([chain, cart()]), "chain type 'abandoned_cart': is configured twice")
        refused(lambda: DispatcherConfig([chain, chain]), "chain type 'abandoned_cart': is configured twice")

    @pytest.mark.parametrize("wrong", ["chain_type", "", None, 7])
    def test_an_unknown_chain_type_is_named_beside_the_known_ones(self, wrong):
        config = DispatcherConfig([cart(), cart(chain_type="trial")])
        refused(lambda: config.get(wrong), f"chain type {wrong!r}: unknown", "configured: 'abandoned_cart', 'trial'")

    def test_an_unknown_chain_type_where_none_is_configured(self):
        refused(lambda: DispatcherConfig([]).get("a"), "configured: none")


class TestChoosingACallback:
    """First wins: the transition's own, the one that the request names, the type's."""

    FULL = cart({NEW: [Complete, Reminder]}, callback=send, callbacks={"sms": send_sms})

    def chosen(self, transition, requested=None, **options):
        return choose_callback(cart({NEW: [transition]}, **options) if options else self.FULL, transition, requested)

    def test_the_transitions_own_goes_before_all_others(self):
        choice = self.chosen(WithOwn, "sms")
        assert choice.kind == "own"
        transition = WithOwn(ChainSnapshot(1, "a", NEW, (), datetime.now(UTC)))
        assert choice.call(transition, template="b") == (transition, {"template": "b"})

    def test_the_requested_one_goes_before_the_types(self):
        assert self.chosen(Reminder, "sms") == CallbackChoice("named:sms", send_sms)

    def test_the_types_is_taken_where_nobody_else_says_anything(self):
        assert self.chosen(Reminder) == CallbackChoice("type", send)

    def test_an_inherited_callback_is_an_own_one(self):
        assert self.chosen(variant(WithOwn)).kind == "own"

    @pytest.mark.parametrize("requested", [None, "sms"])
    def test_none_on_the_transition_moves_without_one_whatever_is_requested(self, requested):
        assert self.chosen(WithoutAny, requested) is MOVE_WITHOUT

    def test_none_on_a_subclass_takes_an_inherited_callback_away(self):
        assert self.chosen(variant(WithOwn, callback=None)) is MOVE_WITHOUT

    def test_none_on_the_type_moves_without_one(self):
        assert self.chosen(Reminder, callback=None) is MOVE_WITHOUT

    def test_a_request_goes_before_none_on_the_type(self):
        assert self.chosen(Reminder, "sms", callback=None, callbacks={"sms": send_sms}).call is send_sms

    def test_nothing_said_anywhere_is_no_move(self):
        assert self.chosen(Reminder, queue="q") is NO_CALLBACK_FOUND

    def test_moving_without_one_and_finding_none_differ(self):
        assert MOVE_WITHOUT != NO_CALLBACK_FOUND
        assert MOVE_WITHOUT.kind == ""
        assert MOVE_WITHOUT.call is NO_CALLBACK_FOUND.call is None

    @pytest.mark.parametrize("requested", [None, "sms", "unregistered"])
    @pytest.mark.parametrize("base", [Complete, WithOwn, WithoutAny])
    def test_done_never_has_a_callback(self, base, requested):
        assert self.chosen(variant(base, final_state=DONE), requested) is MOVE_WITHOUT

    def test_an_unregistered_name_is_reported_by_that_name(self):
        with pytest.raises(KeyError, match="fax"):
            self.chosen(Reminder, "fax")

    def test_a_callable_object_can_be_a_callback(self):
        class Mailer:
            def __call__(self, transition, **kwargs):
                return kwargs

        mailer = Mailer()
        assert self.chosen(Reminder, callback=mailer) == CallbackChoice("type", mailer)


class TestResolvingADeliverysCallback:
    @pytest.mark.parametrize("requested", [None, "sms"])
    @pytest.mark.parametrize("transition", [Reminder, WithOwn])
    def test_what_was_chosen_is_found_again_by_its_kind(self, transition, requested):
        chain = cart({NEW: [transition]}, callback=send, callbacks={"sms": send_sms})
        choice = choose_callback(chain, transition, requested)
        assert resolve_callback(chain, transition, choice.kind) is choice.call

    @pytest.mark.parametrize(
        ("kind", "transition", "options"),
        [
            ("own", Reminder, {"callback": send}),
            ("own", WithoutAny, {"callback": send}),
            ("type", Reminder, {}),
            ("type", Reminder, {"callback": None}),
            ("named:fax", Reminder, {"callbacks": {"sms": send}}),
            ("named:", Reminder, {"callbacks": {"sms": send}}),
            ("sms", Reminder, {"callbacks": {"sms": send}}),
            ("local", Reminder, {"callback": send, "callbacks": {"local": send}}),
            ("missing", Reminder, {"callback": send}),
            ("", Reminder, {"callback": send}),
        ],
    )
    def test_a_kind_that_this_configuration_does_not_have_is_a_key_error(self, kind, transition, options):
        with pytest.raises(KeyError):
            resolve_callback(cart({NEW: [transition]}, **options), transition, kind)


def digest(candidates, state=NEW, **options):
    return fingerprint(cart({state: candidates, "x": []}, **options), state)


class TestFingerprints:
    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ([Complete], [Complete, Reminder]),
            ([Complete, Reminder], [Complete]),
            ([Complete, Reminder], [Reminder, Complete]),
            ([Reminder], [Offer]),
            ([Reminder], [variant(final_state="elsewhere")]),
            ([Reminder], [variant(recheck_seconds=60)]),
            ([Reminder], [variant(recheck_seconds=None)]),
            ([Reminder], [variant(callback=None)]),
            ([Reminder], [variant(callback=send)]),
            ([Reminder], []),
        ],
    )
    def test_a_change_of_the_candidates_changes_it(self, before, after):
        assert digest(before) != digest(after)

    def test_a_callback_that_a_base_class_gains_changes_it(self):
        base = variant(name="Base")
        child = variant(base, "Child")
        before = digest([child])
        base.callback = lambda self: None
        assert digest([child]) != before

    @pytest.mark.parametrize(
        "options", [{"recheck_seconds": 60}, {"recheck_seconds": None}, {"callback": send}, {"callback": None}]
    )
    def test_an_option_of_the_type_that_counts_for_a_candidate_changes_it(self, options):
        assert digest([Reminder], **options) != digest([Reminder])

    def test_giving_a_type_without_a_callback_one_differs_from_moving_without(self):
        assert digest([Reminder], callback=send) != digest([Reminder], callback=None)

    @pytest.mark.parametrize("options", [{"recheck_seconds": 60}, {"callback": send}, {"callback": None}])
    def test_an_option_that_counts_for_no_candidate_does_not_change_it(self, options):
        own = variant(WithOwn, recheck_seconds=5)
        assert digest([own], **options) == digest([own])

    @pytest.mark.parametrize("options", [{"recheck_seconds": 60}, {"callback": send}])
    def test_a_terminal_state_keeps_it_so_that_finished_chains_are_not_woken(self, options):
        assert fingerprint(cart(**options), DONE) == fingerprint(cart(), DONE)

    @pytest.mark.parametrize("options", [{"queue": "q"}, {"on_dead": "skip"}, {"callbacks": {"sms": send_sms}}])
    def test_other_options_do_not_change_it(self, options):
        assert digest([Complete, Reminder], **options) == digest([Complete, Reminder])

    def test_candidates_of_other_states_do_not_change_it(self):
        assert fingerprint(cart({NEW: [Reminder], "x": [Offer]}), NEW) == digest([Reminder])

    def test_another_function_as_callback_or_a_redefined_class_does_not_change_it(self):
        assert digest([Reminder], callback=send) == digest([Reminder], callback=send_sms)
        assert digest([Reminder]) == digest([variant(retry=RetryPolicy(max_attempts=2))])

    def test_names_cannot_be_joined_into_another_list_of_candidates(self):
        one = variant(Offer, "A", final_state="x', 0, 'missing'), ('B', 'y")
        two = [variant(Offer, "A", final_state="x"), variant(Offer, "B", final_state="y")]
        assert digest([one]) != digest(two)

    def test_it_is_short_and_the_same_in_every_process_whatever_the_hash_seed(self):
        program = (
            "from dispatcher.domain.config import ChainType\n"
            "from dispatcher.domain.fingerprints import fingerprint\n"
            "from dispatcher.transition import Transition\n"
            "def make(name): return type(name, (Transition,), {'final_state': name, 'is_valid': lambda self: True})\n"
            "chain = ChainType(chain_type='a', transitions={'new': [make(n) for n in 'ABCDE']}, callback=print)\n"
            "print(fingerprint(chain, 'new'))\n"
        )
        found = {
            subprocess.run(
                [sys.executable, "-c", program],
                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
                check=True,
                capture_output=True,
                text=True,
                timeout=60,
            ).stdout.strip()
            for seed in ("0", "1", "4242")
        }
        assert len(found) == 1
        assert len(found.pop()) == 16


class TestPlansPerHour:
    @pytest.mark.parametrize("limit", [0, -1, True, 1.5, "", "5", "0%", "101%", "-1%", "5 %", "5%%", [5]])
    def test_what_is_neither_a_number_nor_a_share_is_refused(self, limit):
        with pytest.raises(ConfigurationError, match=r"chain type 'cart': `max_plans_per_hour`"):
            ChainType(chain_type="cart", transitions={}, max_plans_per_hour=limit)

    @pytest.mark.parametrize(
        ("limit", "chains", "number"),
        [(None, 1000, None), (7, 1000, 7), ("5%", 1000, 50), ("0.1%", 10, 1), ("100%", 3, 3)],
    )
    def test_a_share_is_that_of_the_chains_and_at_least_one(self, limit, chains, number):
        chain_type = ChainType(chain_type="cart", transitions={}, max_plans_per_hour=limit)
        assert chain_type.plans_per_hour(chains) == number


class TestRateLimits:
    """A delivery is limited by its chain type and by the callback that it calls."""

    @staticmethod
    def limited(rate, name):
        return rate_limit(rate, name=name)(lambda transition, **kwargs: None)

    def test_each_kind_of_callback_has_its_own(self):
        own = variant(Reminder, "Own", callback=self.limited("1/s", "own"))
        chain = cart(
            {NEW: [own, Reminder]},
            callback=self.limited("2/s", "type"),
            callbacks={"type": self.limited("3/s", "named"), "free": send},
            rate_limit="100/m",
        )
        of_type = RateLimit("type/abandoned_cart", 100, 60)
        assert limits_of(chain, own, "own") == (of_type, RateLimit("callback/own", 1, 1))
        assert limits_of(chain, Reminder, "type") == (of_type, RateLimit("callback/type", 2, 1))
        assert limits_of(chain, Reminder, "named:type") == (of_type, RateLimit("callback/named", 3, 1))
        assert limits_of(chain, Reminder, "named:free") == (of_type,)

    def test_without_any_there_are_none(self):
        assert limits_of(cart(callback=send), Reminder, "type") == ()

    def test_several_callbacks_and_types_may_share_one(self):
        callbacks = {name: self.limited("1/s", "mail") for name in ("a", "b")}
        types = [cart(chain_type=name, callbacks=callbacks) for name in ("x", "y")]
        assert len({limits_of(chain, Reminder, f"named:{name}") for chain in types for name in callbacks}) == 1
        assert DispatcherConfig(types)

    def test_one_limit_with_two_rates_is_refused(self):
        types = [
            cart(chain_type=name, callback=self.limited(rate, "mail")) for name, rate in (("x", "1/s"), ("y", "2/s"))
        ]
        refused(lambda: DispatcherConfig(types), "'callback/mail' has two rates: 1/s and 2/s", "chain type 'y'")

    def test_a_callback_has_all_limits_that_it_was_given(self):
        sends = rate_limit("10/s", name="mail")(
            rate_limit("1/d", key=lambda _: 1, name="mail")(self.limited("9/h", "a"))
        )
        chain = cart(callback=sends, rate_limit="100/m")
        assert [str(limit) for limit in limits_of(chain, Reminder, "type")] == ["100/m", "10/s", "1/d", "9/h"]
        assert DispatcherConfig([chain])

    def test_two_functions_may_give_the_keys_of_one_limit(self):
        types = [
            cart(chain_type=name, callback=rate_limit("1/d", key=lambda _: 1, name="mail")(lambda _: None))
            for name in ("x", "y")
        ]
        assert len({limits_of(chain, Reminder, "type") for chain in types}) == 1
        assert DispatcherConfig(types)

    def test_one_limit_with_other_rates_besides_is_refused(self):
        both = rate_limit("9/m", name="mail")(self.limited("1/s", "mail"))
        types = [cart(chain_type="x", callback=self.limited("1/s", "mail")), cart(chain_type="y", callback=both)]
        refused(lambda: DispatcherConfig(types), "'callback/mail' has two rates: 1/s and 1/s with 9/m", "'y'")

    def test_a_key_function_that_must_be_awaited_is_refused(self):
        async def customer(_):
            return 1

        def customers(_):
            yield 1

        for key, problem in ((customer, "an async function"), (customers, "`yield`")):
            callback = rate_limit("1/d", key=key, name="mail")(lambda _: None)
            own = variant(Reminder, "Own", callback=callback)
            for options in ({"callback": callback}, {"callbacks": {"mail": callback}}, {"transitions": {NEW: [own]}}):
                transitions = options.pop("transitions", {NEW: [Reminder]})
                with pytest.raises(ConfigurationError, match="the `key` of the rate limit 'key/mail'") as caught:
                    cart(transitions, **options)
                assert problem in str(caught.value)
