"""Small open_clip model configs (JSON) for first looks, demos and tests."""
