"""Tolerances of the suite. A test may tighten them; loosening one needs a comment that names the cause."""

F32 = {"rtol": 1e-5, "atol": 1e-5}  # elementwise and short reductions
F32_LONG = {"rtol": 1e-4, "atol": 1e-4}  # whole forward passes
