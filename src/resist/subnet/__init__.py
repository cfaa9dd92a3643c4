"""Sub-networks: shallower networks in one flat tensor."""
