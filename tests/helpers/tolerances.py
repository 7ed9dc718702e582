"""Tolerances of the suite. A test may tighten them; loosening one needs a comment that names the cause."""

F32 = {"rtol": 1e-5, "atol": 1e-5}  # elementwise and short reductions
F32_LONG = {"rtol": 1e-4, "atol": 1e-4}  # whole forward passes

# Kernels against the reference in float32 on the same inputs: error as a fraction of the result's largest value.
# Half precision rounds operands of the second product and the result: 2^-9 for bfloat16, 2^-12 for float16, each once
# or twice.
KERNEL = {
    # Of parameter and scales; where one bit of them or of a code differs, see the test.
    "adamw_8bit": {"float32": 1e-6, "bfloat16": 1e-6},
    "decode_attention": {"bfloat16": 6e-3, "float16": 1e-3},
    "flash_attention": {"bfloat16": 6e-3, "float16": 1e-3},
    "gae": {"float32": 1e-6, "bfloat16": 1e-6},
    "linear_logprob": {"bfloat16": 8e-3, "float16": 1e-3},
    "ppo_loss": {"float32": 1e-6},  # of sums
    "quantized_matmul": {"bfloat16": 6e-3, "float16": 1e-3},
    "rms_norm": {"float32": 1e-6, "bfloat16": 8e-3, "float16": 1e-3},  # rounds three times: sum, unit, result
    "sampling": {"float32": 1e-6, "bfloat16": 1e-6},  # of tokens, which are equal then, and log-probabilities
}
