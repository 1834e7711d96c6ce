"""Tests of `dispatcher.delivery`."""
