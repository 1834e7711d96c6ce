"""Tests of `dispatcher.embedded`."""
