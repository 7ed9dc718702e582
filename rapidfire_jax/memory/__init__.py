"""What a run needs of a device: memory, and the time that saving it costs."""
