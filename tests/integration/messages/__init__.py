"""Tests of `dispatcher.messages`."""
