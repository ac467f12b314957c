"""From finished scores to keep lists: exact cuts of any size, de-duplication, balance, and comparisons."""
