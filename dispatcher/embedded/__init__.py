"""The embedded default: a real Valkey or Redis server and an SQLite file in `./.dispatcher/`.

It starts and stops processes, and knows nothing of chains. `dispatcher dev` enters at `terminal.run_dev`; every other
process only asks `state.find_running` for the server's URL.
"""
