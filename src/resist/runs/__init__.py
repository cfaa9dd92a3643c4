"""Runs: the options of a run, and the files that it leaves in its directory."""
