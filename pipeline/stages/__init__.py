"""The stages of a run, one module each; `runner` knows their order."""
