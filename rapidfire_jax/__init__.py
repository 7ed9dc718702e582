"""RLHF in JAX: PPO as pure functions, with fused policy and value passes."""

import lazy_loader

# The exports are listed in __init__.pyi. Loading them on first use keeps Flax away from those who only want the maths.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
