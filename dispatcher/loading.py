"""Objects named as `package.module:ATTRIBUTE` in settings. Never from a message or a row."""

import importlib
import sys
from pathlib import Path
from typing import Any

from dispatcher.errors import ConfigurationError


def load_object(path: str, setting: str) -> Any:
    """The object that `path` names, with the current directory importable; `ConfigurationError` names `setting`.

    An import error inside the module goes on unchanged.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ConfigurationError(f"must be package.module:ATTRIBUTE, not {path!r}", setting)
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigurationError(f"there is no module {error.name!r}", setting) from error
        raise
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ConfigurationError(f"module {module_name!r} has no {attribute!r}", setting) from error
