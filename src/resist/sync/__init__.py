"""Synchronization: average the copies of each block, hand blocks over, carry both between workers."""
