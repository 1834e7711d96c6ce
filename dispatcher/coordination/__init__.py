"""Redis: chain locks, queued markers, crash counters and rate limits.

It saves work and decides nothing: every function answers when the server is away, because the rows are the truth. The
main path enters at `locks.ChainLocks.acquire` and, before a callback, at `limiter.RateLimiter.ask`.
"""
