"""The periodic passes: sweep, waking of changed states, relay, prune.

They find what is due or owed in the rows and publish messages; they run no user code. The main path enters at
`sweep.Sweeper.sweep` and `relay.Relay.relay`, which beat starts through their tasks.
"""
