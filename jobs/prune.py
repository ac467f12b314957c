"""The whole job, all stages.

Usage: `ray job submit --working-dir . -- python -m jobs.prune --config CONFIG`
"""

from jobs.entry import main

if __name__ == "__main__":
    main("run", __doc__)
