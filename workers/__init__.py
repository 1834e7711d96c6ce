"""The Celery side: `celery -A workers worker`, `celery -A workers beat`, or `install()` for your Celery app."""

from typing import Any

from workers.tasks import install

__all__ = ["install"]


def __getattr__(name: str) -> Any:
    """`workers.celery`: the Celery app that `celery -A workers` looks for. It is made at first use."""
    if name == "celery":
        from workers.app import app  # noqa: PLC0415 - late, because `install` must not need DISPATCHER_CONFIG

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
