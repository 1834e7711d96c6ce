"""Attempts at deliveries: begin, wait for hours and rates, look once more, call, record the end.

It knows storage, rate limits and the publisher, and nothing of sweeps. The main path enters at
`attempts.Attempts.deliver` (in a worker) or `local` (in the process that called `execute`).
"""
