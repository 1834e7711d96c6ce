"""Opens the deployment of the settings, for the commands.

The functions import the library late, because loading SQLAlchemy and Celery takes longer than printing a help text.
"""

from typing import TYPE_CHECKING

from dispatcher.errors import ConfigurationError

if TYPE_CHECKING:
    from dispatcher.dispatcher import Dispatcher
    from dispatcher.settings import Settings
    from dispatcher.storage.database import Database


def read_settings() -> "Settings":
    """The settings. Raises `ConfigurationError`, which names each environment variable with a wrong value."""
    from pydantic import ValidationError  # noqa: PLC0415 - late, as said above

    from dispatcher.settings import Settings  # noqa: PLC0415 - late, as said above

    try:
        return Settings()
    except ValidationError as error:
        problems = [f"{_variable(problem['loc'])}: {problem['msg']}" for problem in error.errors()]
        raise ConfigurationError(
            "; ".join(problems)
        ) from None  # the original error may show a value, perhaps a password


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
