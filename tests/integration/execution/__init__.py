"""Tests of `dispatcher.execution`."""
