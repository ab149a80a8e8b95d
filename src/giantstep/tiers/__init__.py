"""Checkpoints on the nodes' own disks or memory, kept safe by what other hosts hold for them."""
