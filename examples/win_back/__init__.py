"""Wins customers back: one chain per order, on eighteen months of real purchase histories."""
