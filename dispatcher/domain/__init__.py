"""The pure core: what a configuration means, what comes next, and the values that all other folders exchange.

It knows no database, no broker and no clock: everything it needs is passed in. Only user code may do more: loaders and
guards in `contexts` and `evaluation`, a rest and the `delay()` of a retry policy in `decisions`. The main path enters
at `contexts.evaluate_record` and leaves at `decisions.decide`, which says what must be written.
"""
