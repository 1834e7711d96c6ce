"""Requests of applications: arguments are checked, the request is written to the chain's row, one task is published.

It knows storage and the publisher. The main path enters at `requests.Requests.enqueue` and
`.enqueue_chain`.
"""
