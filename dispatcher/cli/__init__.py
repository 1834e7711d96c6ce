"""The command line: `dispatcher`."""

from dispatcher.cli.main import main

__all__ = ["main"]
