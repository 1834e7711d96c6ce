"""Tests of `dispatcher.coordination`."""
