"""Opens the deployment of the settings, for the commands.

The functions import the library late, because loading SQLAlchemy and Celery takes longer than printing a help text.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dispatcher.dispatcher import Dispatcher
    from dispatcher.settings import Settings
    from dispatcher.storage.database import Database


def read_settings() -> "Settings":
    """The settings. Raises pydantic's `ValidationError`, which `setting_problems` puts into words."""
    from dispatcher.settings import Settings  # noqa: PLC0415 - late, as said above

    return Settings()


def setting_problems(error: ValueError) -> str:
    """What is wrong with each environment variable, without its value; any other error is raised again."""
    from pydantic import ValidationError  # noqa: PLC0415 - late, as said above

    if not isinstance(error, ValidationError):
        raise error
    return "; ".join(f"{_variable(problem['loc'])}: {problem['msg']}" for problem in error.errors())


def open_dispatcher(settings: "Settings | None" = None) -> "Dispatcher":
    """The dispatcher of the configuration that `DISPATCHER_CONFIG` names."""
    from dispatcher.dispatcher import Dispatcher  # noqa: PLC0415 - late, as said above

    return Dispatcher.from_settings(settings if settings is not None else read_settings())


def open_database() -> "Database":
    """The database of the settings, for commands that need no configuration."""
    from dispatcher import addresses  # noqa: PLC0415 - late, as said above
    from dispatcher.services import open_database as at_url  # noqa: PLC0415 - late, as said above

    settings = read_settings()
    return at_url(settings, addresses.database_url(settings))


def _variable(location: tuple[int | str, ...]) -> str:
    return f"DISPATCHER_{str(location[0]).upper()}" if location else "settings"
