"""The command line: `dispatcher`.

It calls the façade, the migrations and `dispatcher dev`, and loads them only when a command runs. It enters at
`main.main`.
"""

from dispatcher.cli.main import main

__all__ = ["main"]
