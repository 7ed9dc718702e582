"""In which dtype the hardware multiplies best."""

import jax


def hardware_dtype(device: jax.Device | None = None) -> str:
    """bfloat16 on a TPU and on GPUs of compute capability 8.0 or more, float16 on older ones, float32 on a CPU.

    Args:
      device: None: the first of this process.
    """
    device = jax.local_devices()[0] if device is None else device
    if device.platform == "cpu":
        return "float32"
    capability = str(getattr(device, "compute_capability", ""))  # "7.5"; of AMD's, all of which have it, "gfx90a"
    major = capability.partition(".")[0]
    return "float16" if major.isdigit() and int(major) < 8 else "bfloat16"
