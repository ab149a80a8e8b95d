"""Stage 5: the only code that publishes a checkpoint or deletes anything.

`docs/commit-protocol.md` states the order, why it is safe, and what a crash leaves at each point.
"""
