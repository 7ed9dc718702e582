"""Matrix product with weights of 8 or 4 bits."""
