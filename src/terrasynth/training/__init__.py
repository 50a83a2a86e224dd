"""The training loop that every system and task shares, its keys and its checkpoints."""
