"""Ray: actors that score shards, resumable tasks, restarts, retries, progress and metrics."""
