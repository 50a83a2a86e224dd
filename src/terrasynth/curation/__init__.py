"""What of the painted tiles is used: rules on what a segmentor of the real tiles finds in them."""
