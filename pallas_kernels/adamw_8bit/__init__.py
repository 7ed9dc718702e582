"""AdamW with moments of 8 bits, block by block and in place."""
