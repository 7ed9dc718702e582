"""Generalised advantage estimation over the positions where a mask is True."""
