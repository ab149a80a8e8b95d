"""Stage 4: from host bytes to data files, checksummed on the way."""
