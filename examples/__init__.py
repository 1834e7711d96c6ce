"""Examples, to be run from the root of the repository."""
