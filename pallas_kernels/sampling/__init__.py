"""One token a row from logits, truncated or not, with its log-probability."""
