"""Host loops, checkpoints, run directory, progress, plots."""
