"""Celery settings of this deployment, for `CELERY_CONFIG_MODULE=celeryconfig`.

The names below are those that `dispatcher.publisher.celery_settings` gives; what follows them overrides them. Not in
the wheel: copy this file into the directory from which a deployment starts its workers, and edit it there.
"""

from dispatcher.embedded.state import embedded_directory, find_running
from dispatcher.messages.queues import celery_settings
from dispatcher.settings import Settings
from dispatcher.urls import broker_url_from_redis

_settings = Settings()
_redis_url = _settings.redis_url or find_running(embedded_directory())
_broker_url = _settings.broker_url or (broker_url_from_redis(_redis_url) if _redis_url else None)

globals().update(celery_settings(_settings, broker_url=_broker_url))

# Beat answers `celery inspect ping` for as long as its schedule ticks: what docker-compose.yml asks for its health.
beat_enable_remote_control = True
