"""Tests with real worker and beat processes, driven by pytest-celery."""
