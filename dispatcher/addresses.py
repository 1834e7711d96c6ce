"""The URLs of a deployment's database, Redis and broker: an argument, else a setting, else the embedded default.

The library, the command line, `dispatcher dev` and `celeryconfig.py` all use these functions, so that they agree.
"""

from dispatcher.embedded.state import default_database_url, embedded_directory, find_running
from dispatcher.settings import Settings
from dispatcher.urls import broker_url_from_redis


def database_url(settings: Settings, given: str | None = None) -> str:
    """The SQLAlchemy URL of the rows. If none is given or set: an SQLite file in `./.dispatcher/`."""
    return given or settings.database_url or default_database_url(embedded_directory())


def redis_url(settings: Settings, given: str | None = None) -> str | None:
    """The redis-py URL of locks and rate limits. If none is given or set: the server of `./.dispatcher/`, or None.

    Takes a second at most, because it asks that server whether it is alive.
    """
    return given or settings.redis_url or find_running(embedded_directory())


def broker_url(settings: Settings, redis: str | None, given: str | None = None) -> str | None:
    """The Celery broker URL. If none is given or set: the server at the URL `redis`, or None."""
    return given or settings.broker_url or (broker_url_from_redis(redis) if redis else None)
