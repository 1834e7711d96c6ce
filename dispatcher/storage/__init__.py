"""The only SQL: tables, reads, and guarded writes, on the caller's connection or in a transaction of their own.

It knows the domain's values and the databases, and neither Celery nor Redis. The main path enters at `store` (read,
write, begin, finish); everything else is named after the rows that it reads or writes.
"""
