"""The stages of a run, in order: what each needs, what it writes, and when it is already done."""
