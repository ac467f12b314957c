"""The proxy run.

Usage: `ray job submit --working-dir . -- python -m jobs.train --config CONFIG`
"""

from jobs.entry import main

if __name__ == "__main__":
    main("train", __doc__)
