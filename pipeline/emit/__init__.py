"""Hands a selection over to training: manifests, uid lists, pruned tars, the command, the card, and their check."""
