"""The periodic passes (sweep, waking of changed states, relay, prune), and what a pause parks and its end frees.

They find what is due or owed in the rows and publish messages. The only user code that they run is a retry policy's
`delay()`, without a connection in use. The main path enters at `sweep.Sweeper.sweep` and `relay.Relay.relay`, which
beat starts through their tasks.
"""
