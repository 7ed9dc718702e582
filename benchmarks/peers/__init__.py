"""What `benchmarks.end_to_end` compares, each in a process of its own."""
