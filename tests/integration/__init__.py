"""Tests against databases and Redis servers that the run starts itself."""
