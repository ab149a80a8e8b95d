"""Checkpoints in each node's own place: who copies what to whom, what is where after a loss, and how it is fetched."""
