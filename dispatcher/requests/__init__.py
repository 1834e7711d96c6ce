"""What an application asks: arguments checked, the request written to the chain's row, one task published.

It knows storage and the publisher. The main path enters at `requests.Requests.write_committed` and `.publish`.
"""
