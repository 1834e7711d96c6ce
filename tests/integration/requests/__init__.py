"""Tests of `dispatcher.requests`."""
