"""Blocks: which modules of a network are residual blocks, and which of them can take the place of each other."""
