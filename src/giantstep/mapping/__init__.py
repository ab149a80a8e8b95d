"""Stage 1: from the user's nested state to shards, regions with their bytes, and common state."""
