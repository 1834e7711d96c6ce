"""Where a deployment's database, Redis and broker are: an argument, else the settings, else the embedded default.

The library, the command line, `dispatcher dev` and `celeryconfig.py` all ask here, so that they agree.
"""

from dispatcher.embedded.state import default_database_url, embedded_directory, find_running
from dispatcher.settings import Settings
from dispatcher.urls import broker_url_from_redis


def database_url(settings: Settings, given: str | None = None) -> str:
    """The SQLAlchemy URL of the rows; without any, an SQLite file in `./.dispatcher/`."""
    return given or settings.database_url or default_database_url(embedded_directory())


def redis_url(settings: Settings, given: str | None = None) -> str | None:
    """The redis-py URL of locks and rate limits; without any, the server that runs in `./.dispatcher/`, or None.

    Takes a second at most, because a server that runs is asked whether it answers.
    """
    return given or settings.redis_url or find_running(embedded_directory())


def broker_url(settings: Settings, redis: str | None, given: str | None = None) -> str | None:
    """The Celery broker URL; without any, the server at the URL `redis`, or None."""
    return given or settings.broker_url or (broker_url_from_redis(redis) if redis else None)
