"""The pictures and the tables of the architecture page, made from the code: `make pictures`.

A picture looks its functions, queues, tables and settings up by import, so a rename breaks it instead of making it
wrong. Equal code gives equal files, and `tests/unit/test_architecture.py` compares them with what is committed.
"""
