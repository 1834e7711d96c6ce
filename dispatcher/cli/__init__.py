"""The command line: `dispatcher`.

It knows the façade and how to print, and loads both only when a command runs. It enters at `main.main`.
"""

from dispatcher.cli.main import main

__all__ = ["main"]
