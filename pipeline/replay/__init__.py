"""The proxy's training run and its record: everything that an exact replay of it needs."""
