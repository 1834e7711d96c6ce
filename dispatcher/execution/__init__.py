"""One batch of chains is executed: lock, read, evaluate, write guarded, unlock, publish.

It knows storage, locks and the publisher, and nothing of attempts or periodic passes. The main path enters at
`executor.Executor.execute`.
"""
