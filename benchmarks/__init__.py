"""`python -m benchmarks`: this project against raw Celery and DBOS, on the same private servers, in the same run."""
