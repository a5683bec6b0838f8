"""One AMP step at any layer: its plans, its random numbers, batch statistics."""
