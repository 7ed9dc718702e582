"""Backward kernels of `flash_attention`: the probabilities once more from lse, never all of them.

With z = s log2(e), p = 2^(z - lse log2(e)) and delta = sum over the row of out * dout, minus the gradient of lse,

    ds = p (dout V^T - delta)  (times 1 - tanh^2 under a soft cap)
    dq = scale ds K            dk = scale ds^T q          dv = p^T dout

One kernel keeps a tile of queries and streams keys and values; the other keeps a tile of keys, transposed scores, and
streams the queries of all heads that share it, so that a group's sum never leaves the registers.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tiles
from pallas_kernels.flash_attention import visibility
from pallas_kernels.flash_attention.blocks import (
    COMPUTE_REGISTERS,
    MEMORY_REGISTERS,
    ROWS,
    WARPGROUPS,
    items,
    persistent,
    resident,
    ring,
    row_of,
    stage_of,
    stream_keys,
    tuning_key,
    unless_all_seen,
)
from pallas_kernels.numerics import LOG2E, over_columns, over_rows, tanh
from pallas_kernels.tuning import choice, config_for


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work of one kernel is cut."""

    block: int = choice(64, 128)  # keys, or queries, of a streamed tile
    slots: int = choice(1, 2, 3, 4)  # of the ring
    overlap: int = choice(0, 1)  # whether products run while exponentials are computed, which takes registers


def heuristic_dq(head_dim: int, soft_cap: float | None) -> Config:
    """What registers and shared memory hold beside the tiles that stay."""
    if head_dim == 256:
        return Config(block=64, slots=1, overlap=0)
    return Config(block=128 if soft_cap is None or head_dim == 64 else 64, slots=2, overlap=int(soft_cap is None))


def heuristic_dkv(head_dim: int, soft_cap: float | None) -> Config:
    """The same; the slope of a soft cap takes as many registers as the scores."""
    wide = head_dim == 64 and soft_cap is None
    return Config(block=128 if wide else 64, slots=2, overlap=int(head_dim == 128 and soft_cap is None))


def flash_attention_backward(q, k, v, out, lse, dout, dlse, seen: visibility.Visibility, causal, scale, soft_cap):
    """Gradients of `q`, `k` and `v`; `lse` and `dlse` are [B, N, padded S]."""
    delta = jnp.einsum("bsnh,bsnh->bns", out, dout, preferred_element_type=jnp.float32)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, lse.shape[2] - delta.shape[2]))) - dlse
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)  # a query that sees no key has p = 0
    args = q, k, v, dout, lse, delta, seen, causal, scale, soft_cap
    return _dq(*args), *_dkv(*args)


def _probabilities(products, lse, hide, scale, soft_cap):
    """`(p, derivative of the cap or None)` from products of queries and keys."""
    if soft_cap is None:
        return jnp.exp2(hide(products) * (scale * LOG2E) - lse), None
    t = tanh(products * (scale / soft_cap))
    return jnp.exp2(hide(t) * (soft_cap * LOG2E) - lse), 1 - t * t


def _dq(q, k, v, dout, lse, delta, seen, causal, scale, soft_cap):
    B, S, N, H = q.shape
    K = k.shape[2]
    config = config_for("flash_attention_backward_dq", heuristic_dq(H, soft_cap), **tuning_key(q, k, causal, soft_cap))
    block, slots = config.block, config.slots
    rows = WARPGROUPS * ROWS
    query_tiles = pl.cdiv(S, rows)
    ranges, _ = visibility.tile_ranges(seen, causal, rows, block)

    def body(*refs):
        q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, ranges_ref, window_ref, queries_ref, keys_ref = refs[:10]
        dq_ref, stay, k_ring, v_ring, stage = refs[10:]
        warpgroup = lax.axis_index("warpgroup")
        every_item = partial(items, (query_tiles, B, N), ranges_ref, descending=causal)

        @pl.when(warpgroup == WARPGROUPS)
        def _memory():
            def sources(batch, head, queries):
                return (
                    q_ref.at[batch, queries, head],
                    dout_ref.at[batch, queries, head],
                    lse_ref.at[batch, head, queries],
                    delta_ref.at[batch, head, queries],
                    queries_ref.at[row_of(queries_ref, batch), :, queries],
                )

            stream_keys(every_item, stay, sources, k_ring, v_ring, (k_ref, v_ref, keys_ref), block, N // K)

        @pl.when(warpgroup < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            q_tile, _, lse_tile, delta_tile, _ = (tile.at[warpgroup] for tile in stay.tiles)
            (k_tile, key_tile), (v_tile,) = k_ring.tiles, v_ring.tiles
            spread = partial(over_rows, shape=(ROWS, block))

            def visit(item, step, tile, batch, head, ranges):
                start, stop = ranges[:2]
                query = tile * rows + warpgroup * ROWS
                plgpu.barrier_wait(stay.full.at[warpgroup])
                lse = plgpu.load(lse_tile, layout=plgpu.Layout.WGMMA.reduce(1))
                delta = plgpu.load(delta_tile, layout=plgpu.Layout.WGMMA.reduce(1))

                def accumulate(i, dq):
                    slot = k_ring.slot(step + i - start)
                    q_tile, dout_tile, _, _, query_tile = (tile.at[opaque(warpgroup, step + i)] for tile in stay.tiles)

                    def masked(z):
                        z = visibility.hide(z, causal, window_ref[0], query_tile, key_tile.at[slot], 0)
                        plgpu.commit_smem()  # before the slot is filled again
                        return z

                    def hide(z):
                        return unless_all_seen(i, ranges, masked, z)

                    plgpu.barrier_wait(k_ring.full.at[slot])
                    plgpu.barrier_wait(v_ring.full.at[slot])
                    (p, slope), dp = tiles.two_products(
                        (q_tile, k_tile.at[slot].transpose((1, 0))),
                        (dout_tile, v_tile.at[slot].transpose((1, 0))),
                        lambda s: _probabilities(s, spread(lse), hide, scale, soft_cap),
                        overlap=config.overlap,
                    )
                    plgpu.barrier_arrive(v_ring.empty.at[slot])
                    ds = p * (dp - spread(delta))
                    ds = ds if slope is None else ds * slope
                    dq = tiles.accumulate(dq, ds.astype(q.dtype), k_tile.at[slot], stage_of(stage, warpgroup))
                    plgpu.barrier_arrive(k_ring.empty.at[slot])
                    return dq

                zeros = plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), plgpu.Layout.WGMMA)
                dq = lax.fori_loop(start, stop, accumulate, zeros)
                q_tile[...] = (dq * scale).astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[batch, pl.ds(query, ROWS), head])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(stay.empty.at[warpgroup])

            every_item(visit)
            plgpu.wait_smem_to_gmem(0)

    q_tiles = tiles.tile((WARPGROUPS, ROWS, H), q.dtype)
    k_tiles = tiles.tile((slots, block, H), q.dtype)
    row_tiles = plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)
    return persistent(
        "flash_attention_backward_dq",
        body,
        query_tiles * B * N,
        q,
        [
            resident(q_tiles, q_tiles, row_tiles, row_tiles, plgpu.SMEM((WARPGROUPS, 2, ROWS), jnp.int32)),
            ring(slots, k_tiles, plgpu.SMEM((slots, 2, block), jnp.int32)),
            ring(slots, k_tiles),
            tiles.staging((WARPGROUPS, ROWS, block), q.dtype),
        ],
    )(q, k, v, dout, lse, delta, ranges, seen.window, seen.queries, seen.keys)


def _dkv(q, k, v, dout, lse, delta, seen, causal, scale, soft_cap):
    N, H = q.shape[2:]
    B, C, K, _ = k.shape
    group = N // K
    config = config_for(
        "flash_attention_backward_dkv", heuristic_dkv(H, soft_cap), **tuning_key(q, k, causal, soft_cap)
    )
    block, slots = config.block, config.slots
    # Registers hold two accumulators up to a width of 128; beyond, one warpgroup takes dv and the other dk.
    split = H > 128
    parts = 1 if split else WARPGROUPS
    rows = parts * ROWS
    key_tiles = pl.cdiv(C, rows)
    _, ranges = visibility.tile_ranges(seen, causal, block, rows)

    def body(*refs):
        q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, ranges_ref, window_ref, queries_ref, keys_ref = refs[:10]
        dk_ref, dv_ref, stay, full, empty, done, q_ring, dout_ring, stage = refs[10:]
        warpgroup = lax.axis_index("warpgroup")

        every_item = partial(items, (key_tiles, B, K), ranges_ref, descending=False, group=group)

        @pl.when(warpgroup == WARPGROUPS)
        def _memory():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            def visit(item, step, tile, batch, kv_head, ranges):
                start, count = ranges[0], ranges[1] - ranges[0]
                pl.when(item > 0)(lambda: plgpu.barrier_wait(empty))
                for part in range(parts):
                    at = pl.ds(tile * rows + part * ROWS, ROWS)
                    sources = (
                        k_ref.at[batch, at, kv_head],
                        v_ref.at[batch, at, kv_head],
                        keys_ref.at[row_of(keys_ref, batch), :, at],
                    )
                    for source, target in zip(sources, stay, strict=True):
                        plgpu.copy_gmem_to_smem(source, target.at[part], full)

                @pl.loop(0, count * group)
                def _(i):
                    head, at = kv_head * group + lax.div(i, count), pl.ds((start + lax.rem(i, count)) * block, block)
                    queries = queries_ref.at[row_of(queries_ref, batch), :, at]
                    q_ring.fill(step + i, q_ref.at[batch, at, head], lse_ref.at[batch, head, at], queries)
                    dout_ring.fill(step + i, dout_ref.at[batch, at, head], delta_ref.at[batch, head, at])

            steps = every_item(visit)
            plgpu.barrier_wait(empty)
            q_ring.drain(steps)
            dout_ring.drain(steps)

        def compute(wants_dk, wants_dv):
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            part = 0 if split else warpgroup
            (q_tile, lse_tile, query_tile), (dout_tile, delta_tile) = q_ring.tiles, dout_ring.tiles
            spread = partial(over_columns, shape=(ROWS, block))
            along_queries = plgpu.Layout.WGMMA.reduce(0)

            def visit(item, step, tile, batch, kv_head, ranges):
                start, stop = ranges[:2]
                plgpu.barrier_wait(full)

                def accumulate(i, carry):
                    dk, dv = carry
                    slot, query = q_ring.slot(step + i), start + lax.rem(i, stop - start)
                    staged = stage_of(stage, warpgroup)
                    k_tile, v_tile, key_tile = (tile.at[opaque(part, step + i)] for tile in stay)

                    def masked(z):
                        return visibility.hide(z, causal, window_ref[0], query_tile.at[slot], key_tile, 1)

                    def hide(z):
                        return unless_all_seen(query, ranges, masked, z)

                    def probabilities(s):
                        lse = plgpu.load(lse_tile.at[slot], layout=along_queries)
                        return _probabilities(s, spread(lse), hide, scale, soft_cap)

                    plgpu.barrier_wait(q_ring.full.at[slot])
                    plgpu.barrier_wait(dout_ring.full.at[slot])
                    scores = k_tile, q_tile.at[slot].transpose((1, 0))
                    to_weights = v_tile, dout_tile.at[slot].transpose((1, 0))

                    def to_scores(dp):
                        ds = p * (dp - spread(plgpu.load(delta_tile.at[slot], layout=along_queries)))
                        return (ds if slope is None else ds * slope).astype(q.dtype)

                    if config.overlap and wants_dk and wants_dv:
                        (p, slope), dp = tiles.two_products(scores, to_weights, probabilities, overlap=True)
                        for_dv, for_dk = (
                            (p.astype(q.dtype), dout_tile.at[slot]),
                            (lambda: to_scores(dp), q_tile.at[slot]),
                        )
                        dv, dk = tiles.accumulate_two((dv, dk), for_dv, for_dk, staged)
                    else:
                        p, slope = probabilities(tiles.product(*scores))
                        if wants_dv:
                            dv = tiles.accumulate(dv, p.astype(q.dtype), dout_tile.at[slot], staged)
                        if wants_dk:
                            ds = to_scores(tiles.product(*to_weights))
                            dk = tiles.accumulate(dk, ds, q_tile.at[slot], staged)
                    plgpu.commit_smem()  # before the slot is filled again
                    plgpu.barrier_arrive(dout_ring.empty.at[slot])
                    plgpu.barrier_arrive(q_ring.empty.at[slot])
                    return dk, dv

                zeros = plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), plgpu.Layout.WGMMA)
                empties = zeros if wants_dk else None, zeros if wants_dv else None
                dk, dv = lax.fori_loop(0, (stop - start) * group, accumulate, empties)
                if split:
                    plgpu.barrier_arrive(done)
                    plgpu.barrier_wait(done)
                k_tile, v_tile, _ = (tile.at[part] for tile in stay)
                if wants_dk:
                    k_tile[...] = (dk * scale).astype(q.dtype)
                if wants_dv:
                    v_tile[...] = dv.astype(q.dtype)
                plgpu.commit_smem()
                at = pl.ds(tile * rows + part * ROWS, ROWS)
                if wants_dk:
                    plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[batch, at, kv_head])
                if wants_dv:
                    plgpu.copy_smem_to_gmem(v_tile, dv_ref.at[batch, at, kv_head])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(empty)

            every_item(visit)
            plgpu.wait_smem_to_gmem(0)

        if split:
            pl.when(warpgroup == 0)(partial(compute, False, True))
            pl.when(warpgroup == 1)(partial(compute, True, False))
        else:
            pl.when(warpgroup < WARPGROUPS)(partial(compute, True, True))

    k_tiles = tiles.tile((parts, ROWS, H), q.dtype)
    q_tiles = tiles.tile((slots, block, H), q.dtype)
    row_tiles = plgpu.SMEM((slots, block), jnp.float32)
    stay = (k_tiles, k_tiles, plgpu.SMEM((parts, 2, ROWS), jnp.int32))
    return persistent(
        "flash_attention_backward_dkv",
        body,
        key_tiles * B * K,
        [k, v],
        [
            stay,
            plgpu.Barrier(num_arrivals=len(stay) * parts),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            plgpu.Barrier(num_arrivals=WARPGROUPS) if split else None,
            ring(slots, q_tiles, row_tiles, plgpu.SMEM((slots, 2, block), jnp.int32)),
            ring(slots, q_tiles, row_tiles),
            tiles.staging((WARPGROUPS, ROWS, block), q.dtype),
        ],
    )(q, k, v, dout, lse, delta, ranges, seen.window, seen.queries, seen.keys)


def opaque(index, step):
    """`index`, so that the addresses derived from it stay inside the loop over `step >= 0`, and out of registers."""
    return jnp.where(step < 0, index + 1, index)
