"""Log-probability and entropy of a linear head."""
