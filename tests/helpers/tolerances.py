"""Tolerances of the suite. A test may tighten them; loosening one needs a comment that names the cause."""

F32 = {"rtol": 1e-5, "atol": 1e-5}  # elementwise and short reductions
F32_LONG = {"rtol": 1e-4, "atol": 1e-4}  # whole forward passes

# Kernels against the reference in float32 on the same inputs: error as a fraction of the result's largest value.
# Half precision rounds operands of the second product and the result: 2^-9 for bfloat16, 2^-12 for float16, each once
# or twice.
KERNEL = {
    "rms_norm": {"float32": 1e-6, "bfloat16": 6e-3, "float16": 1e-3},
}
