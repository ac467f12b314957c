"""Training on the kept pairs and on baselines.

Usage: `ray job submit --working-dir . -- python -m jobs.evaluate --config CONFIG`
"""

from jobs.entry import main

if __name__ == "__main__":
    main("evaluate", __doc__)
