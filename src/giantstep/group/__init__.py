"""Ranks talking to ranks: one protocol, for a single process, for threads, and over torch.distributed."""
