"""Tests of `dispatcher.operators`."""
