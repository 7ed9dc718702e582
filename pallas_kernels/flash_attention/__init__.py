"""Attention whose scores never leave the chip: causal, windowed, packed, grouped, soft-capped."""
