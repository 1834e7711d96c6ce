"""Redis: chain locks, queued markers, crash counters and rate limits.

Redis saves work and decides nothing, because the rows are the truth. Every function works when the server is away. The
main path enters at `locks.ChainLocks.acquire` and, before a callback, at `limiter.RateLimiter.peek` and `.count`.
"""
