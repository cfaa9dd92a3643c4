"""State of a job between two rounds: what is saved, under which names, and how it is loaded."""
