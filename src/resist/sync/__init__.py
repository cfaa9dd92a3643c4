"""Synchronization: average each block over its holders and hand blocks over between workers."""
