"""The configuration (`DISPATCHER_CONFIG=examples.win_back.config:CONFIG`): one chain type and its callback."""

from typing import Any, Final

from dispatcher import DONE, NEW, Transition
from examples.win_back import sink
from examples.win_back.transitions import BoughtAgain, Lapsed180, Offer90, Reminder30

TYPE_NAME: Final = "win_back"


def send(transition: Transition, **callback_kwargs: Any) -> None:
    """Send the reminder or the offer; in this example, write a line to the sink."""
    context = transition.build_context()
    sink.append(
        sink.Effect(
            customer=context["customer"],
            order=context["order"],
            transition=type(transition).__name__,
            day=transition.now.date(),
            idempotency_key=str(transition.idempotency_key),
        )
    )


CONFIG: Final[dict[str, Any]] = {
    "chains": [
        {
            "chain_type": TYPE_NAME,
            "callback": send,
            "continue": True,  # evaluate again at once after a move, to find when the next step is due
            "transitions": {
                NEW: [BoughtAgain, Reminder30],
                Reminder30.final_state: [BoughtAgain, Offer90],
                Offer90.final_state: [BoughtAgain, Lapsed180],
                DONE: [],
            },
        }
    ]
}
