"""Sub-networks: the blocks of a network, and shallower networks whose weights are views into one flat tensor."""
