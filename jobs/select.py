"""The choice of the pairs to keep.

Usage: `ray job submit --working-dir . -- python -m jobs.select --config CONFIG`
"""

from jobs.entry import main

if __name__ == "__main__":
    main("select", __doc__)
