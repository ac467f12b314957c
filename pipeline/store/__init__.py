"""What a run keeps on storage, and how it gets there so that a crash never leaves a half-written file."""
