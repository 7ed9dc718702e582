"""Benchmarks: `python -m benchmarks.NAME` prints a table and appends its rows to `benchmarks/results/NAME.csv`."""
