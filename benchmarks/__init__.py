"""`python -m benchmarks`: compares this project with raw Celery and DBOS, on the same private servers."""
