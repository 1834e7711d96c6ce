"""Workers of one deployment in pools of any kind, and a relay that the test itself runs."""

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

from dispatcher import Chain, Dispatcher
from dispatcher.domain.records import DeliveryRecord
from dispatcher.settings import Settings
from tests.acceptance.nodes import Deployment, WorkerNode, eventually

POOLS = ["prefork", "threads", "solo", "gevent"]
LEASE_SECONDS = 2.0
RELAY_SECONDS = 0.25
SLACK_SECONDS = 4.0
SETTINGS = {"lease_seconds": LEASE_SECONDS, "lock_seconds": 2, "callback_seconds": 30, "queued_seconds": 2}
TAKEN_UP_SECONDS = LEASE_SECONDS + Settings(**SETTINGS).lapse_seconds + 2 * RELAY_SECONDS + SLACK_SECONDS
"""A killed process's work goes on within a lease, what a relay waits after it has seen its end, and two relays."""


class Fleet:
    """Workers of one deployment, and a relay that the test itself runs."""

    def __init__(self, deployment: Deployment, client: Dispatcher, stack: ExitStack, directory: Path) -> None:
        self.deployment = deployment
        self.client = client
        self.sink = deployment.sink
        self.settled = 0
        self._stack = stack
        self._files = (directory / f"file-{number}" for number in range(1000))

    def worker(self, *args: str, app: str = "workers", **env: str) -> WorkerNode:
        """A worker that runs until the test ends."""
        (node,) = self.workers(1, *args, app=app, **env)
        return node

    def workers(self, count: int, *args: str, app: str = "workers", **env: str) -> list[WorkerNode]:
        """Workers that run until the test ends. They start at the same time."""
        command = WorkerNode.command(*args, app=app)
        nodes = [WorkerNode(command, self.deployment.directory, {**self.deployment.env, **env}) for _ in range(count)]
        for node in nodes:  # from this thread: they are killed when the thread that has started them ends
            self._stack.callback(self._end, node)
            self.deployment.nodes.append(node)
            node.start()
        for node in nodes:
            node.wait_until_ready()
        return nodes

    def _end(self, node: WorkerNode) -> None:
        self.deployment.nodes.remove(node)
        node.kill()
        eventually(lambda: not node.processes(), f"the end of {node.name}")

    def file(self) -> Path:
        """A file for the context of a chain: guard or callback waits until it is unlinked."""
        path = next(self._files)
        path.touch()
        return path

    def chain(self, chain_type: str = "single", **context: Any) -> Chain:
        """A new chain that is enqueued."""
        resource = ("test", f"{id(self)}-{time.monotonic_ns()}")
        chain = self.client.get_or_create_resource_chain(chain_type, [resource], initial_context=context)
        chain.enqueue()
        return chain

    def calls(self, chain: Chain) -> list[dict[str, Any]]:
        return self.sink.lines("called", chain_id=chain.id)

    def called(self, chain: Chain, times: int = 1) -> dict[str, Any]:
        """The last call of a chain, once there are so many."""
        self.deployment.eventually(lambda: len(self.calls(chain)) >= times, f"call {times} of {chain!r}")
        return self.calls(chain)[-1]

    def delivery(self, chain: Chain) -> DeliveryRecord:
        (delivery,) = chain.refresh().deliveries
        return delivery

    def relay(self) -> None:
        self.settled += self.client.relay()["settled"]

    def relaying(self, condition: Callable[[], Any], what: str, *, seconds: float = 45) -> None:
        """As `eventually`, with relays meanwhile."""
        last = 0.0

        def look() -> Any:
            nonlocal last
            if time.monotonic() - last >= RELAY_SECONDS:
                self.relay()
                last = time.monotonic()
            return condition()

        self.deployment.eventually(look, what, seconds=seconds)

    def nobody_settles(self, seconds: float) -> None:
        """Let this time pass, with relays; no attempt may be settled."""
        until = time.monotonic() + seconds
        self.relaying(lambda: time.monotonic() >= until, "the time", seconds=seconds + 30)
        assert self.settled == 0

    def assert_delivered(self, chain: Chain, *, calls: int = 1, attempt: int | None = None) -> None:
        """The chain has moved once; it was called so often, always with the same key."""
        made = self.calls(chain)
        assert len(made) == calls
        assert {call["key"] for call in made} == {self.delivery(chain).idempotency_key}
        delivery = self.delivery(chain)
        assert (delivery.status, delivery.attempt) == ("delivered", calls if attempt is None else attempt)
        assert [event.action for event in chain.events if event.action == "state_transition"] == ["state_transition"]


def main_pid(node: WorkerNode) -> int:
    assert node.process is not None
    return node.process.pid


def owner_of(call: dict[str, Any], nodes: list[WorkerNode]) -> WorkerNode:
    """The worker whose process has made a call."""
    (owner,) = [node for node in nodes if call["pid"] in {process.pid for process in node.processes()}]
    return owner


def is_gone(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def send(pid: int, number: signal.Signals) -> None:
    psutil.Process(pid).send_signal(number)
