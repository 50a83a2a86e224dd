"""What of the painted tiles is used, and whether they are copies."""
