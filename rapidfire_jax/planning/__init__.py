"""Whether a run fits on a device, and what each of its programs takes there, before any weight is loaded."""
