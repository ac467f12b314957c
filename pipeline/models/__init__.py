"""open_clip models as proxies: building them, their families, and the files that hold their checkpoints."""
