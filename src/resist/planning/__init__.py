"""Planning: who holds which blocks in a round, and which messages lead to the next. Pure functions, no torch."""
