"""What of the painted tiles is kept; tensors in, tensors out, no model and no task."""
