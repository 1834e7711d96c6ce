"""What the library knows of Celery: names of tasks and queues, Celery's settings, and the publisher.

A message carries ids and no decisions. The main path enters at `publisher.Publisher.execute` and `.deliver`.
"""
