"""Tests of `dispatcher.domain`."""
