"""Sub-networks: chains of blocks, and shallower networks in one flat tensor."""
