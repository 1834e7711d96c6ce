"""The workers' app, with a time limit of attempts that a test can wait for: `celery -A tests.acceptance.hurried`."""

import os

from dispatcher.messages.queues import DELIVER
from workers.app import app

app.tasks[DELIVER].time_limit = float(os.environ["HURRIED_SECONDS"])
