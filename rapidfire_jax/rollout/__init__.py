"""Generation: prefill, decode loop, sampling."""
