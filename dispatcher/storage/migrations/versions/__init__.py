"""One module per revision. A released one is never edited: it is followed by another."""
