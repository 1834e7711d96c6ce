"""The Celery app of `celery -A workers worker` and `celery -A workers beat`.

`DISPATCHER_*` variables configure it. The settings of the module that `CELERY_CONFIG_MODULE` names win over them.
"""

import os
import sys
from importlib import import_module
from typing import Any, NoReturn

from celery import Celery, signals
from celery.app.defaults import DEFAULTS
from pydantic import ValidationError

from dispatcher import Dispatcher, DispatcherError, ServiceUnavailable, Settings
from dispatcher.messages.publisher import NO_BROKER
from dispatcher.messages.queues import celery_settings
from workers.tasks import install


def _fail(error: Exception) -> NoReturn:
    print(f"dispatcher: {error}", file=sys.stderr, flush=True)  # noqa: T201 - logging is not set up yet
    raise SystemExit(1) from error


def _lay_over(celery: Celery, module: str) -> None:
    """Let the settings of a module win. If Celery alone loaded the module, the earlier settings would win."""
    try:
        celery.config_from_object(module, force=True)
        names = vars(import_module(module))
    except ImportError as error:
        _fail(error)
    celery.conf.update({name: value for name, value in names.items() if name in DEFAULTS})


def _make() -> tuple[Celery, Dispatcher]:
    celery = Celery("workers", set_as_current=True)
    try:
        dispatcher = Dispatcher.from_settings(Settings(), celery_app=celery)
        if dispatcher.broker_url is None and "CELERY_CONFIG_MODULE" not in os.environ:
            raise ServiceUnavailable("broker", "", NO_BROKER)
    except (DispatcherError, ValidationError) as error:
        _fail(error)
    type_queues = [chain_type.queue for chain_type in dispatcher.config.chains if chain_type.queue is not None]
    celery.conf.update(celery_settings(dispatcher.settings, broker_url=dispatcher.broker_url, queues=type_queues))
    if "CELERY_CONFIG_MODULE" in os.environ:
        _lay_over(celery, os.environ["CELERY_CONFIG_MODULE"])
    # A pool process that is spawned, not forked, gets a copy of the app without its tasks, and imports these modules.
    celery.conf.include = [*(celery.conf.include or ()), __name__]
    install(celery, dispatcher)
    return celery, dispatcher


app, dispatcher = _make()


@signals.celeryd_init.connect
def _check_before_work(**_: Any) -> None:
    """End a worker that cannot use its database or broker with one line, instead of a loop of tracebacks."""
    try:
        dispatcher.check()
    except DispatcherError as error:
        _fail(error)
    dispatcher.close()


@signals.beat_init.connect
def _check_before_ticking(**_: Any) -> None:
    try:
        dispatcher.check_broker()
    except DispatcherError as error:
        _fail(error)
