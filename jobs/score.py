"""Scores of every pair.

Usage: `ray job submit --working-dir . -- python -m jobs.score --config CONFIG`
"""

from jobs.entry import main

if __name__ == "__main__":
    main("score", __doc__)
