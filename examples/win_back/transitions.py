"""The lifecycle of one order: remind after 30 days, offer after 90, give up after 180, stop at the next purchase.

Guards use only `self.now`, and say with `not_before` when their answer can change. So an order is due only on days on
which something can change.
"""

from datetime import timedelta
from typing import Any, ClassVar

from dispatcher import DONE, Transition
from examples.win_back.purchases import Order, histories


class BoughtAgain(Transition):
    """The customer has bought again. No sweep looks for this, because the shop enqueues the chain at a purchase."""

    final_state = DONE
    recheck_seconds = None

    def is_valid(self) -> bool:
        order = Order.of(self.chain.resources)
        if any(order.bought_on < day <= self.now.date() for day in histories()[order.customer]):
            return True
        self.errors.append("no later purchase so far")
        return False


class DaysAfterPurchase(Transition):
    """Valid when `days` days have passed since the purchase."""

    days: ClassVar[int]

    def is_valid(self) -> bool:
        due_on = Order.of(self.chain.resources).bought_on + timedelta(days=self.days)
        return self.not_before(due_on, f"less than {self.days} days since the purchase")

    def build_context(self) -> dict[str, Any]:
        return dict(self.chain.resources)


class Reminder30(DaysAfterPurchase):
    """30 days without another purchase: a reminder is sent."""

    final_state = "reminder_30_sent"
    days = 30


class Offer90(DaysAfterPurchase):
    """90 days without another purchase: an offer is sent."""

    final_state = "offer_90_sent"
    days = 90


class Lapsed180(DaysAfterPurchase):
    """180 days without another purchase: the customer is given up. A transition to DONE calls no callback."""

    final_state = DONE
    days = 180
