"""What of the painted tiles is kept, and whether they are copies; no model and no task."""
