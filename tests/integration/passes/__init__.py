"""Tests of `dispatcher.passes`."""
