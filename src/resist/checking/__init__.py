"""Checking: whether the sub-networks of a network compute what they should, seen on one batch."""
