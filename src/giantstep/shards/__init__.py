"""Region algebra, flat ranges, index splitting, dtypes and tree paths: pure, without torch or I/O."""
