"""A chain type's states as a graph: reachability, cycles, and a Mermaid picture. Values only, no I/O."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dispatcher.states import DONE, NEW

_SPECIAL: Final = re.compile(r'["#%:;<>\\]|[^\S ]')


@dataclass(frozen=True, slots=True)
class Edge:
    """One transition as an edge between two states."""

    from_state: str
    transition: str
    to_state: str


@dataclass(frozen=True, slots=True)
class StateGraph:
    """The states and edges of one chain type, in the order of its configuration."""

    edges: tuple[Edge, ...]
    states: tuple[str, ...]

    @classmethod
    def build(cls, transitions: Mapping[str, Sequence[tuple[str, str]]]) -> "StateGraph":
        """The graph of `{state: [(transition name, final state), ...]}`; NEW and DONE are always states."""
        edges = tuple(Edge(state, name, final) for state, out in transitions.items() for name, final in out)
        states = dict.fromkeys([NEW, *transitions, *(edge.to_state for edge in edges), DONE])
        return cls(edges=edges, states=tuple(states))

    def successors(self, state: str) -> tuple[str, ...]:
        """The states that a chain can reach from `state` with one move."""
        return tuple(dict.fromkeys(edge.to_state for edge in self.edges if edge.from_state == state))

    def reachable(self, start: str = NEW) -> frozenset[str]:
        """All states that a chain can reach from `start` with any number of moves; includes `start`."""
        seen, todo = {start}, [start]
        while todo:
            new = [state for state in self.successors(todo.pop()) if state not in seen]
            seen.update(new)
            todo.extend(new)
        return frozenset(seen)

    def unreachable(self) -> tuple[str, ...]:
        """The states, except DONE, that a chain cannot reach from NEW."""
        reachable = self.reachable()
        return tuple(state for state in self.states if state not in reachable and state != DONE)

    def terminal(self) -> tuple[str, ...]:
        """The states without transitions that leave them."""
        leaving = {edge.from_state for edge in self.edges}
        return tuple(state for state in self.states if state not in leaving)

    def cyclic(self) -> frozenset[str]:
        """The states that lie on a cycle: a chain can come back to them."""
        return frozenset(
            state
            for state in self.states
            if any(state in self.reachable(successor) for successor in self.successors(state))
        )

    def mermaid(self) -> str:
        """A `stateDiagram-v2` of the graph. (Mermaid, https://mermaid.js.org/syntax/stateDiagram.html)"""
        ids = {state: f"s{number}" for number, state in enumerate(self.states)}
        shown = {NEW, *(state for edge in self.edges for state in (edge.from_state, edge.to_state))}
        lines = ["stateDiagram-v2"]
        lines += [f'    state "{_label(state)}" as {ids[state]}' for state in self.states if state in shown]
        lines.append(f"    [*] --> {ids[NEW]}")
        lines += [
            f"    {ids[edge.from_state]} --> {ids[edge.to_state]}: {_label(edge.transition)}" for edge in self.edges
        ]
        lines += [f"    {ids[state]} --> [*]" for state in self.terminal() if state in shown]
        return "\n".join(lines) + "\n"


def _label(name: str) -> str:
    # Mermaid's entity codes (https://mermaid.js.org/syntax/flowchart.html#entity-codes-to-escape-characters)
    return _SPECIAL.sub(lambda match: f"#{ord(match[0])};", name)
