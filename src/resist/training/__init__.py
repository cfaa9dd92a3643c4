"""Training: the trainer behind `resist train`."""
