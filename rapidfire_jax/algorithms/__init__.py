"""Pure maths and pure steps. Takes arrays, never models."""
