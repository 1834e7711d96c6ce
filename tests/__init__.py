"""The tests: `unit`, `integration` (real database and Redis), `acceptance` (real workers)."""
