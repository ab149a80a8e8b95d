"""Opening a checkpoint, fetching verified bytes, and putting them where they belong."""
