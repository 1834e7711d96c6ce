"""One deployment, wired."""

from dataclasses import dataclass

from dispatcher.delivery.attempts import Attempts
from dispatcher.domain.config import DispatcherConfig
from dispatcher.execution.executor import Executor
from dispatcher.operators.operations import Operations
from dispatcher.requests.requests import Requests
from dispatcher.settings import Settings
from dispatcher.storage.database import Database


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The parts of one deployment that its chains use."""

    config: DispatcherConfig
    settings: Settings
    database: Database
    requests: Requests
    executor: Executor
    attempts: Attempts
    operations: Operations
