"""Tests of `dispatcher.storage`."""
