"""The oracle after every test of deliveries."""

from collections.abc import Iterator

import pytest

from tests.integration import shop
from tests.integration.conftest import DispatcherFactory


@pytest.fixture(autouse=True)
def _history_is_consistent(make_dispatcher: DispatcherFactory) -> Iterator[None]:
    """Every test here ends with the oracle."""
    yield
    shop.assert_consistent(make_dispatcher.made[-1])
