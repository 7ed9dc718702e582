"""Attention of one new token a row over a key/value cache, which may be quantised to int8."""
