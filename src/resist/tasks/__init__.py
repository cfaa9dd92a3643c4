"""What a network is trained for: the loss of a batch and the metric of a test set."""
