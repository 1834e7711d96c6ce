"""Winning customers back: one chain per purchase, on eighteen months of real purchase histories."""
