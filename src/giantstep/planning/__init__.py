"""Stage 2: from everybody's shards to who moves which bytes. Pure, vectorised with NumPy."""
