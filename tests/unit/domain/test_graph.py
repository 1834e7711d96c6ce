"""The graph of a chain type, checked against brute force."""

import re

from hypothesis import given
from hypothesis import strategies as st

from dispatcher.domain.graph import Edge, StateGraph
from dispatcher.states import DONE, NEW

CART = StateGraph.build(
    {
        NEW: [("Complete", DONE), ("Reminder", "reminded")],
        "reminded": [("Complete", DONE), ("Reminder", "reminded"), ("Offer", "offered")],
        "orphan": [("Rescue", "island")],
        DONE: [],
    }
)

NAMES = st.sampled_from([NEW, DONE, "a", "b", "c", "d"])
TRANSITIONS = st.dictionaries(NAMES, st.lists(st.tuples(st.just("T"), NAMES), max_size=4), max_size=6)


def closure(transitions: dict[str, list[tuple[str, str]]]) -> set[tuple[str, str]]:
    """All pairs that one move or more connect, by Warshall's algorithm."""
    pairs = {(state, final) for state, out in transitions.items() for _, final in out}
    states = {state for pair in pairs for state in pair}
    for middle in states:
        pairs |= {(a, c) for a in states for c in states if (a, middle) in pairs and (middle, c) in pairs}
    return pairs


def test_states_come_in_the_order_of_the_configuration():
    assert CART.states == (NEW, "reminded", "orphan", DONE, "offered", "island")


def test_edges_come_in_the_order_of_the_candidates():
    assert CART.edges[:2] == (Edge(NEW, "Complete", DONE), Edge(NEW, "Reminder", "reminded"))


def test_an_empty_graph_has_the_reserved_states():
    assert StateGraph.build({}).states == (NEW, DONE)


def test_successors_are_listed_once():
    graph = StateGraph.build({NEW: [("A", "x"), ("B", "y"), ("C", "x")]})
    assert graph.successors(NEW) == ("x", "y")
    assert graph.successors("elsewhere") == ()


def test_states_that_no_chain_can_come_to_are_found():
    assert CART.unreachable() == ("orphan", "island")


def test_done_is_not_called_unreachable():
    assert StateGraph.build({NEW: [("A", "x")]}).unreachable() == ()


def test_states_that_nothing_leaves_are_terminal():
    assert CART.terminal() == (DONE, "offered", "island")


def test_a_state_that_leads_to_itself_is_on_a_cycle():
    assert CART.cyclic() == {"reminded"}


@given(TRANSITIONS, NAMES)
def test_reachability_agrees_with_brute_force(transitions, start):
    expected = {start} | {c for a, c in closure(transitions) if a == start}
    assert StateGraph.build(transitions).reachable(start) == expected


@given(TRANSITIONS)
def test_cycles_agree_with_brute_force(transitions):
    assert StateGraph.build(transitions).cyclic() == {a for a, c in closure(transitions) if a == c}


@given(TRANSITIONS)
def test_a_state_is_terminal_exactly_when_it_has_no_successor(transitions):
    graph = StateGraph.build(transitions)
    assert set(graph.terminal()) == {state for state in graph.states if not transitions.get(state)}


@given(TRANSITIONS)
def test_unreachable_states_are_the_complement_of_the_reachable_ones(transitions):
    graph = StateGraph.build(transitions)
    assert set(graph.unreachable()) | graph.reachable() | {DONE} == set(graph.states)
    assert not set(graph.unreachable()) & (graph.reachable() | {DONE})


def test_the_picture_shows_start_moves_and_ends():
    graph = StateGraph.build({NEW: [("Remind", "reminded"), ("Complete", DONE)], "reminded": [("Complete", DONE)]})
    assert graph.mermaid() == (
        "stateDiagram-v2\n"
        '    state "new" as s0\n'
        '    state "reminded" as s1\n'
        '    state "done" as s2\n'
        "    [*] --> s0\n"
        "    s0 --> s1: Remind\n"
        "    s0 --> s2: Complete\n"
        "    s1 --> s2: Complete\n"
        "    s2 --> [*]\n"
    )


def test_the_picture_leaves_out_a_done_that_nothing_leads_to():
    assert "done" not in StateGraph.build({NEW: [("A", "x")]}).mermaid()


TEXT = r'((?:[^"#:;\n]|#\d+;)*)'
STATE = re.compile(rf'    state "{TEXT}" as (s\d+)')
MOVE = re.compile(rf"    (s\d+) --> (s\d+): {TEXT}")
START_OR_END = re.compile(r"    (?:\[\*\] --> (s\d+)|(s\d+) --> \[\*\])")


def shown(label: str) -> str:
    """What Mermaid shows for a label, its entity codes resolved."""
    return re.sub(r"#(\d+);", lambda match: chr(int(match[1])), label)


@given(TRANSITIONS)
def test_the_picture_names_every_state_that_it_draws(transitions):
    lines = StateGraph.build(transitions).mermaid().splitlines()
    named = {match[2] for line in lines if (match := STATE.fullmatch(line))}
    drawn = {match[end] for line in lines if (match := MOVE.fullmatch(line)) for end in (1, 2)}
    drawn |= {match[1] or match[2] for line in lines if (match := START_OR_END.fullmatch(line))}
    assert named == drawn


HOSTILE = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(
    ['say "hi"', "a;b:c", "back\\nslash", "<br>", "#35;", "%%{init: {}}%%", "two\nlines", "tab\there", "\u2028", "\r\n"]
)


@given(state=HOSTILE, name=HOSTILE)
def test_no_name_can_break_out_of_its_place_in_the_picture(state, name):
    lines = StateGraph.build({NEW: [(name, state)]}).mermaid().rstrip("\n").split("\n")
    assert lines[0] == "stateDiagram-v2"
    assert all(STATE.fullmatch(line) or MOVE.fullmatch(line) or START_OR_END.fullmatch(line) for line in lines[1:])
    assert "%%" not in "".join(lines)


@given(state=HOSTILE, name=HOSTILE)
def test_the_picture_shows_names_as_they_are(state, name):
    lines = StateGraph.build({NEW: [(name, state)]}).mermaid().rstrip("\n").split("\n")
    states = [shown(match[1]) for line in lines if (match := STATE.fullmatch(line))]
    moves = [shown(match[3]) for line in lines if (match := MOVE.fullmatch(line))]
    assert state in states
    assert moves == [name]
