"""The Celery side: `celery -A workers worker`, `celery -A workers beat`, or `install()` for an app of your own."""

from typing import Any

from workers.tasks import install

__all__ = ["install"]


def __getattr__(name: str) -> Any:
    """`workers.celery` is the Celery app that `celery -A workers` looks for; made when it is asked for."""
    if name == "celery":
        from workers.app import app  # noqa: PLC0415 - not at the top: `install` must not need DISPATCHER_CONFIG

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
