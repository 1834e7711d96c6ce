"""Attempts at deliveries: begin, look once more, ask hours and rates, call, record the end, and keep the leases.

It knows storage, rate limits and the publisher, and nothing of sweeps. The main path enters at
`attempts.Attempts.deliver` (in a worker) or `local` (in the process that called `execute`).
"""
