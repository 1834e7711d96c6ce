"""The embedded default: a real Valkey or Redis server and an SQLite file in `./.dispatcher/`.

It starts and stops processes, and knows nothing about chains. `dispatcher dev` enters at `terminal.run_dev`; all other
processes only call `state.find_running` to get the server's URL.
"""
