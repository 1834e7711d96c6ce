"""Celery settings of this deployment, for `CELERY_CONFIG_MODULE=celeryconfig`.

The names below are those that `dispatcher.messages.queues.celery_settings` gives; what follows them overrides them.
This file is not in the wheel: copy it into the directory from which a deployment starts its workers, and edit it there.
"""

from dispatcher import addresses
from dispatcher.messages.queues import celery_settings
from dispatcher.settings import Settings

_settings = Settings()
_broker_url = addresses.broker_url(_settings, addresses.redis_url(_settings))

globals().update(celery_settings(_settings, broker_url=_broker_url))

# Beat answers `celery inspect ping` for as long as its schedule ticks: what docker-compose.yml asks for its health.
beat_enable_remote_control = True
