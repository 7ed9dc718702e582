"""Which keys a query sees, tile by tile for the loops of the kernels and element by element inside a tile.

Query s of segment a sees key c of segment b if a == b, b != 0, c <= s (causal) and s - c < window. Segments are padded
with 0 to whole tiles, so that what lies beyond the end of an array is padding like any other.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

UNLIMITED = 1 << 30  # a window that no sequence fills
ALIGNMENT = 256  # of padded lengths: a multiple of every tile


class Visibility(NamedTuple):
    """What decides it, as operands of a kernel; NumPy arrays if all of it is known while tracing."""

    queries: Any  # int32 [B or 1, 2, padded S]: segment and index
    keys: Any  # int32 [B or 1, 2, padded C]
    window: Any  # int32 [1]


def padded_length(length: int) -> int:
    """`length` in whole tiles."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def operands(S: int, C: int, segments, kv_segments, window) -> Visibility:
    """From the arguments of a call; segments and window may be None."""
    if segments is None:
        segments, kv_segments = np.ones((1, S), np.int32), np.ones((1, C), np.int32)
    window = UNLIMITED if window is None else window
    window = np.array([window], np.int32) if isinstance(window, int) else window.astype(jnp.int32).reshape(1)
    return Visibility(_with_index(segments), _with_index(kv_segments), window)


def _with_index(segments):
    xp = np if isinstance(segments, np.ndarray) else jnp
    segments = xp.pad(segments.astype(np.int32), ((0, 0), (0, padded_length(segments.shape[1]) - segments.shape[1])))
    index = xp.broadcast_to(xp.arange(segments.shape[1], dtype=np.int32)[None], segments.shape)
    return xp.stack([segments, index], axis=1)


def tile_ranges(seen: Visibility, causal: bool, block_q: int, block_kv: int) -> tuple[Any, Any]:
    """The tiles of keys that each tile of queries visits, and the tiles of queries that each tile of keys does.

    Returns:
      Two arrays int32 [B or 1, tiles, 4]: first tile to visit and end; first tile and end of a run of tiles that need
      no mask.
    """
    xp = np if all(isinstance(x, np.ndarray) for x in seen) else jnp
    q_low, q_high, q_real, q_first = _tiles(xp, seen.queries[:, 0], block_q, 2)
    k_low, k_high, k_real, k_first = _tiles(xp, seen.keys[:, 0], block_kv, 1)
    nearest, farthest = q_first - (k_first + block_kv - 1), q_first + block_q - 1 - k_first  # s - c in a pair of tiles
    touched = (q_low <= k_high) & (k_low <= q_high) & (nearest < seen.window[0])
    full = (q_low == k_high) & (k_low == q_high) & q_real & k_real & (farthest < seen.window[0])
    if causal:
        touched, full = touched & (farthest >= 0), full & (nearest >= 0)
    return _ranges(xp, touched, full), _ranges(xp, touched.swapaxes(1, 2), full.swapaxes(1, 2))


def _tiles(xp, segments, block, new_axis):
    """Lowest and highest segment of each tile, whether it has no padding, and its first index."""
    tiles = segments.reshape(segments.shape[0], -1, block)
    real, limits = tiles != 0, np.iinfo(np.int32)
    low = xp.where(real, tiles, np.int32(limits.max)).min(axis=2)
    high = xp.where(real, tiles, np.int32(limits.min)).max(axis=2)
    first = xp.arange(0, segments.shape[1], block, dtype=np.int32)[None]
    return tuple(xp.expand_dims(x, new_axis) for x in (low, high, real.all(axis=2), first))


def _ranges(xp, touched, full):
    index = xp.arange(touched.shape[2], dtype=np.int32)[None, None]
    stop = xp.where(touched, index + 1, 0).max(axis=2)
    start = xp.where(touched, index, stop[:, :, None]).min(axis=2)
    full_stop = xp.where(full, index + 1, 0).max(axis=2)
    full_start = xp.where(full | (index >= full_stop[:, :, None]), 0, index + 1).max(axis=2)
    return xp.stack([start, stop, full_start, full_stop], axis=2).astype(np.int32)


def hide(z, causal: bool, window, queries, keys, axis: int):
    """In a kernel: `z` with -inf where a query does not see a key.

    Args:
      queries: int32 [2, n] in shared memory, segment and index of the tile's queries. (An index computed here would be
        hoisted out of the loop, and its 64 registers with it.)
      keys: the same of the keys.
      axis: of the tile along which queries lie.
    """

    def spread(row, axis):
        return lax.broadcast_in_dim(row, z.shape, (axis,))

    segments = queries[0]
    segments = spread(jnp.where(segments == 0, -1, segments), axis)
    ahead = spread(queries[1], axis) - spread(keys[1], 1 - axis)
    z = jnp.where(segments == spread(keys[0], 1 - axis), z, -jnp.inf)
    z = jnp.where(ahead < window, z, -jnp.inf)
    return jnp.where(ahead >= 0, z, -jnp.inf) if causal else z
