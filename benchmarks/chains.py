"""The configuration of the measured fleets. Guards and callbacks cost almost nothing."""

from typing import Any, Final

from benchmarks import progress
from dispatcher import NEW, Transition

MOVED: Final = "moved"


class Never(Transition):
    final_state = MOVED

    def is_valid(self) -> bool:
        progress.tick()
        self.errors.append("not yet")
        return False


class Always(Transition):
    final_state = MOVED

    def is_valid(self) -> bool:
        return True


class Silent(Always):
    callback = None


def count(_: Transition, **__: Any) -> None:
    """A callback that counts its calls."""
    progress.tick()


def answer(_: Transition, **__: Any) -> None:
    """A callback that tells the waiting lane that it was called."""
    progress.answer()


def _chain_type(name: str, transition: type[Transition], **options: Any) -> dict[str, Any]:
    return {"chain_type": name, "transitions": {NEW: [transition], MOVED: []}, **options}


def config(*names: str) -> dict[str, Any]:
    """The configuration with the chain types of these names, so that a lane has only the types that it needs."""
    by_name = {
        "still": _chain_type("still", Never, callback=count),
        "step": _chain_type("step", Always, callback=count),
        "on_demand": _chain_type("on_demand", Always, callbacks={"answer": answer}, recheck_seconds=None),
        "silent": _chain_type("silent", Silent),
    }
    return {"chains": [by_name[name] for name in names]}


CONFIG = config("still", "step", "on_demand", "silent")
