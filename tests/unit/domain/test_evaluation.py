"""Evaluation: who is asked, who wins, and when to ask again."""

import sys
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.domain.evaluation import GuardFailed, Plan, Verdict, evaluate
from dispatcher.errors import DispatcherError
from dispatcher.states import DONE, NEW
from dispatcher.transition import ChainSnapshot, Transition

NOW = datetime(2024, 3, 10, 15, 30, tzinfo=UTC)
CHAIN = ChainSnapshot(
    id=1, chain_type="cart", state=NEW, resources=(("customer", "7"),), created_at=NOW - timedelta(days=9)
)


def guard(name, is_valid, **attributes):
    """A transition class whose guard is the given function of `self`."""
    return type(name, (Transition,), {"final_state": name.lower(), "is_valid": is_valid, **attributes})


def says(name, answer, *reasons, **attributes):
    def is_valid(self):
        self.errors.extend(reasons)
        return answer

    return guard(name, is_valid, **attributes)


def waits(name, *delays, **attributes):
    """A transition that is not valid before `now` plus each of the delays (seconds)."""

    def is_valid(self):
        answers = [self.not_before(NOW + timedelta(seconds=delay), "early") for delay in delays]
        return all(answers)

    return guard(name, is_valid, **attributes)


def plan(*candidates, context=None, **options):
    return evaluate(CHAIN, candidates, context or {}, NOW, **options)


def seconds_until_due(*candidates, next_update_at=None, **options):
    due_at = plan(*candidates, **options).due_at(NOW, next_update_at)
    return None if due_at is None else (due_at - NOW).total_seconds()


class TestOrder:
    def test_the_first_valid_candidate_wins(self):
        first, second = says("First", True), says("Second", True)
        assert isinstance(plan(first, second).winner, first)
        assert isinstance(plan(second, first).winner, second)

    def test_candidates_are_asked_in_order_and_those_after_the_winner_are_not(self):
        asked = []

        def candidate(name, answer):
            return guard(name, lambda self: asked.append(name) or answer)

        result = plan(candidate("A", False), candidate("B", True), candidate("C", True))
        assert asked == ["A", "B"]
        assert [verdict.transition for verdict in result.verdicts] == ["A", "B"]

    def test_a_later_candidate_is_not_even_constructed(self):
        def refuse(self, *args, **kwargs):
            raise AssertionError("constructed")

        assert plan(says("A", True), says("B", True, __init__=refuse)).winner is not None

    @given(st.lists(st.booleans(), max_size=6))
    def test_the_winner_is_the_first_yes_whatever_the_answers(self, answers):
        result = plan(*(says(f"T{number}", answer) for number, answer in enumerate(answers)))
        first = answers.index(True) if True in answers else None
        assert (result.winner and str(result.winner)) == (None if first is None else f"<T{first}>")
        assert len(result.verdicts) == (len(answers) if first is None else first + 1)

    def test_no_valid_candidate_gives_no_winner_and_all_reasons(self):
        result = plan(says("A", False, "too young", "no mail"), says("B", False))
        assert result.winner is None
        assert result.errors == {"<A>": ["too young", "no mail"], "<B>": []}

    def test_reasons_of_the_winner_are_not_reported_as_errors(self):
        result = plan(says("A", False, "no"), says("B", True, "only a note"))
        assert result.errors == {"<A>": ["no"]}
        assert result.verdicts[1].errors == ("only a note",)

    def test_a_state_without_candidates_is_terminal(self):
        assert plan().terminal is True
        assert plan().winner is None
        assert plan(says("A", False)).terminal is False

    def test_a_plan_names_the_state_it_was_made_for(self):
        assert plan().state == plan(says("A", True)).state == NEW

    def test_done_is_a_winner_like_any_other(self):
        assert plan(says("Complete", True, final_state=DONE)).winner.final_state == DONE


class TestWhatAGuardSees:
    def test_it_sees_the_chain_the_time_and_the_context(self):
        seen = []
        plan(guard("A", lambda self: seen.append((self.chain, self.now, self.context))), context={"cart": 1})
        assert seen == [(CHAIN, NOW, {"resources": [("customer", "7")], "cart": 1})]

    def test_the_context_of_the_class_wins(self):
        result = plan(says("A", True, initial_context={"cart": "class"}), context={"cart": "call", "x": 1})
        assert result.winner.context == {"resources": [("customer", "7")], "cart": "class", "x": 1}

    def test_the_context_of_one_class_is_not_seen_by_the_next(self):
        result = plan(says("A", False, initial_context={"cart": "class"}), says("B", True))
        assert result.winner.context == {"resources": [("customer", "7")]}

    def test_what_one_guard_writes_into_its_context_is_not_seen_by_the_next(self):
        context = {"cart": 1}
        a = guard("A", lambda self: self.context.update(cart=2, extra=3))
        assert plan(a, says("B", True), context=context).winner.context["cart"] == 1
        assert context == {"cart": 1}

    def test_the_winner_is_the_object_that_said_yes(self):
        def is_valid(self):
            self.remembered = "cart 7"
            return True

        assert plan(guard("A", is_valid)).winner.remembered == "cart 7"

    def test_the_same_candidate_makes_a_new_object_at_every_evaluation(self):
        candidate = says("A", True)
        assert plan(candidate).winner is not plan(candidate).winner


class TestReasonsDoNotLeak:
    def test_between_evaluations(self):
        candidate = says("A", False, "too young")
        assert [plan(candidate).errors for _ in range(3)] == [{"<A>": ["too young"]}] * 3

    def test_between_chains(self):
        def is_valid(self):
            if self.chain.id == 1:
                self.errors.append("only chain 1")
            return False

        candidate = guard("A", is_valid)
        other = ChainSnapshot(id=2, chain_type="cart", state=NEW, resources=(), created_at=NOW)
        assert evaluate(CHAIN, [candidate], {}, NOW).errors == {"<A>": ["only chain 1"]}
        assert evaluate(other, [candidate], {}, NOW).errors == {"<A>": []}

    def test_between_candidates_of_one_class_tree(self):
        base = says("Base", False, "base")
        child = type("Child", (base,), {"final_state": "child"})
        assert plan(base, child).errors == {"<Base>": ["base"], "<Child>": ["base"]}

    def test_even_when_the_class_has_an_errors_list_as_the_ancestors_had(self):
        candidate = says("A", False, "too young", errors=[])
        assert plan(candidate).errors == plan(candidate).errors == {"<A>": ["too young"]}
        assert candidate.errors == []

    def test_from_a_plan_to_the_transition_and_back(self):
        result = plan(says("A", False, "no"))
        result.errors["<A>"].append("written by a caller")
        assert result.errors == {"<A>": ["no"]}


class TestAnswers:
    @pytest.mark.parametrize("answer", [True, 1, "yes", [0], object()])
    def test_a_truthy_answer_is_a_yes(self, answer):
        assert plan(says("A", answer)).verdicts[0].valid is True

    @pytest.mark.parametrize("answer", [False, 0, "", [], None])
    def test_a_falsy_answer_is_a_no(self, answer):
        result = plan(says("A", answer))
        assert result.winner is None
        assert result.verdicts[0].valid is False

    def test_reasons_of_any_type_become_text(self):
        candidate = says("A", False, 7, None, ValueError("no mail"), ("a", 1))
        assert plan(candidate).errors == {"<A>": ["7", "None", "no mail", "('a', 1)"]}

    def test_a_candidate_is_labelled_by_its_own_text(self):
        assert plan(says("A", False, "no", __str__=lambda self: "my label")).errors == {"my label": ["no"]}


class Unprintable:
    def __str__(self):
        raise LookupError("no text")


def raises(self, *args, **kwargs):
    raise LookupError("cart is gone")


def forgets_its_base(self, *args, **kwargs):
    self.errors = []


class TestFailures:
    @pytest.mark.parametrize(
        ("attributes", "cause"),
        [
            ({"is_valid": raises}, LookupError),
            ({"__init__": raises}, LookupError),
            ({"__str__": raises}, LookupError),
            ({"__init__": lambda self: None}, TypeError),
            ({"__init__": forgets_its_base}, AttributeError),
            ({"is_valid": lambda self: self.errors.append(Unprintable())}, LookupError),
            ({"is_valid": lambda self: setattr(self, "errors", None)}, TypeError),
            ({"is_valid": lambda self: self.not_before("tomorrow", "early")}, TypeError),
        ],
        ids=[
            "guard",
            "constructor",
            "label",
            "constructor of another shape",
            "constructor without super()",
            "reason without text",
            "errors replaced",
            "time that is none",
        ],
    )
    def test_whatever_user_code_raises_fails_the_guard_with_its_cause(self, attributes, cause):
        with pytest.raises(GuardFailed) as caught:
            plan(guard("Reminder", **{"is_valid": lambda self: False, **attributes}))
        assert caught.value.transition == "Reminder"
        assert isinstance(caught.value.__cause__, cause)

    def test_the_text_says_which_guard_raised_what(self):
        with pytest.raises(GuardFailed, match=r"^the guard of Reminder raised LookupError: cart is gone$"):
            plan(guard("Reminder", raises))

    def test_a_failed_guard_is_a_dispatcher_error_and_no_value_error(self):
        assert issubclass(GuardFailed, DispatcherError)
        assert not issubclass(GuardFailed, ValueError)

    def test_candidates_after_a_failed_one_are_not_asked(self):
        asked = []
        with pytest.raises(GuardFailed):
            plan(guard("A", raises), guard("B", lambda self: asked.append("B")))
        assert asked == []

    def test_a_guard_after_the_winner_cannot_fail(self):
        assert plan(says("A", True), guard("B", raises)).winner is not None

    def test_a_guard_that_ends_its_process_in_python_fails_its_chain_alone(self):
        with pytest.raises(GuardFailed, match="SystemExit: 3"):
            plan(guard("A", lambda self: sys.exit(3)))

    def test_a_time_limit_that_ends_the_process_is_no_failure_of_the_guard(self):
        with pytest.raises(SystemExit):
            plan(guard("A", lambda self: sys.exit(-241)))

    def test_an_interrupt_from_the_keyboard_is_no_failure_of_the_guard(self):
        def is_valid(self):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            plan(guard("A", is_valid))


class TestDueAt:
    def test_a_terminal_state_is_never_due(self):
        assert seconds_until_due() is None

    def test_a_rejected_candidate_is_asked_again_at_the_next_sweep(self):
        assert seconds_until_due(says("A", False)) == 0

    def test_the_types_recheck_holds_for_candidates_without_their_own(self):
        assert seconds_until_due(says("A", False), recheck_seconds=3600) == 3600

    @pytest.mark.parametrize(("own", "due"), [(0, 0), (5, 5), (0.5, 0.5), (None, None)])
    def test_the_transitions_own_recheck_goes_before_the_types(self, own, due):
        assert seconds_until_due(says("A", False, recheck_seconds=own), recheck_seconds=3600) == due

    def test_a_type_that_waits_for_enqueues_is_never_due_by_itself(self):
        assert seconds_until_due(says("A", False), says("B", False), recheck_seconds=None) is None

    def test_not_before_replaces_the_recheck(self):
        assert seconds_until_due(waits("A", 500), recheck_seconds=60) == 500
        assert seconds_until_due(waits("A", 500, recheck_seconds=9999)) == 500

    def test_not_before_wakes_a_candidate_that_is_otherwise_only_enqueued(self):
        assert seconds_until_due(waits("A", 500, recheck_seconds=None)) == 500

    def test_of_several_times_in_one_guard_the_earliest_counts(self):
        assert seconds_until_due(waits("A", 900, 300, 600)) == 300

    def test_a_time_that_has_come_does_not_count(self):
        assert seconds_until_due(waits("A", -5, 300, recheck_seconds=60)) == 300

    def test_a_guard_that_is_past_its_time_but_rejects_otherwise_is_rechecked(self):
        candidate = guard("A", lambda self: self.not_before(NOW, "early") and False, recheck_seconds=60)
        assert seconds_until_due(candidate) == 60

    def test_of_several_candidates_the_earliest_counts(self):
        assert seconds_until_due(waits("A", 900), waits("B", 300), says("C", False, recheck_seconds=600)) == 300
        assert seconds_until_due(waits("A", 900), says("B", False, recheck_seconds=600)) == 600

    def test_a_candidate_that_is_only_enqueued_does_not_hold_back_the_others(self):
        assert seconds_until_due(says("A", False, recheck_seconds=None), waits("B", 300)) == 300

    @pytest.mark.parametrize(("rest", "due"), [(1000, 1000), (300, 300), (100, 300)])
    def test_a_chain_is_never_due_before_its_next_update(self, rest, due):
        assert seconds_until_due(waits("A", 300), next_update_at=NOW + timedelta(seconds=rest)) == due

    def test_a_next_update_alone_makes_nothing_due(self):
        assert seconds_until_due(says("A", False, recheck_seconds=None), next_update_at=NOW) is None

    def test_a_time_that_the_winner_looked_at_is_forgotten(self):
        candidate = guard("A", lambda self: self.not_before(NOW + timedelta(days=1), "early") or True)
        assert plan(candidate).verdicts[0].not_before is None

    @given(
        st.lists(
            st.tuples(
                st.none() | st.integers(min_value=1, max_value=10**6),
                st.none() | st.integers(min_value=0, max_value=10**6),
            ),
            max_size=5,
        ),
        st.none() | st.integers(min_value=-(10**6), max_value=10**6),
    )
    def test_it_is_the_earliest_news_of_any_candidate_but_not_before_the_rest_ends(self, candidates, rest):
        verdicts = tuple(
            Verdict(
                transition="T",
                label="<T>",
                valid=False,
                errors=(),
                not_before=None if delay is None else NOW + timedelta(seconds=delay),
                recheck_seconds=recheck,
            )
            for delay, recheck in candidates
        )
        next_update_at = None if rest is None else NOW + timedelta(seconds=rest)
        news = [delay if delay is not None else recheck for delay, recheck in candidates]
        news = [seconds for seconds in news if seconds is not None]
        due_at = Plan(NEW, None, verdicts).due_at(NOW, next_update_at)
        if not news:
            assert due_at is None
        else:
            expected = min(news) if rest is None else max(min(news), rest)
            assert due_at == NOW + timedelta(seconds=expected)
