"""Benchmarks: plain scripts that print tables; memory is kept when it is free, as in the processes that compute."""

from pipeline.allocator import keep_freed_memory

keep_freed_memory()
