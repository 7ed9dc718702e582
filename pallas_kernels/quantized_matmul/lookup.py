"""Look-ups in tables of shared memory: what restores a weight from its code.

Each thread gathers what it holds of a tile, in instructions of its own that the simulator cannot follow; there, jax
gathers.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import is_simulated


def lookup(table, index: jax.Array) -> jax.Array:
    """`table[index]` of a table in shared memory and an `index [64]` in registers, laid out as rows of a product."""
    if is_simulated():
        return table[...][index.astype(jnp.int32)]
    row = plgpu.Layout.WGMMA.reduce(1)
    result = plgpu.ShapeDtypeStruct(index.shape, table.dtype, layout=row)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), row), return_type=result)
    def gather(_, table, index):
        element = ir.MemRefType(table.type).element_type
        start = mgpu_utils.memref_ptr(table)

        def load(code):
            offset = arith.extui(ir.IntegerType.get_signless(32), _only(code))
            loaded = llvm.load(element, mgpu_utils.getelementptr(start, [offset], element))
            return vector.broadcast(ir.VectorType.get((1,), element), loaded)

        registers = np.vectorize(load, otypes=[object])(index.registers)
        return mgpu.FragmentedArray(_registers=registers, _layout=index.layout, _is_signed=None)

    return gather(table, index)


def _only(register):
    return vector.extract(register, dynamic_position=[], static_position=[0])


def lookup_pairs(codes, table, scales: list[jax.Array]) -> jax.Array:
    """64 rows of 4-bit codes as left operand of wgmma: `CODEBOOK[code] * scale`, groups of 64 columns side by side.

    Args:
      codes: `[G, 8, 256]` bytes in shared memory, 32 of each row and group: byte 8 t + j has the codes of elements
        8 j + 2 t (low half) and 8 j + 2 t + 1, so that thread t of four loads in one go what it feeds to wgmma.
      table: `[256, 32]` in shared memory: the two values of a byte as one uint32, once for each bank.
      scales: `[64]` for each group, in the dtype of the values.
    """
    dtype = scales[0].dtype
    if is_simulated():
        pairs = table[...][:, 0][codes[...].astype(jnp.int32)].reshape(len(scales), 64, 4, 8).transpose(1, 0, 3, 2)
        values = jax.lax.bitcast_convert_type(pairs, dtype).reshape(64, len(scales), 64)
        scale = jax.lax.broadcast_in_dim(jnp.stack(scales), values.shape, (1, 0))
        return (values * scale).reshape(64, -1)
    row, result = plgpu.Layout.WGMMA.reduce(1), (64, 64 * len(scales))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), *[row] * len(scales)),
        return_type=plgpu.ShapeDtypeStruct(result, dtype, layout=plgpu.Layout.WGMMA),
    )
    def gather(_, codes, table, *scales):
        i8, i32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), scales[0].mlir_dtype)

        def const(x):
            return mgpu_utils.c(x, i32)

        thread = arith.remui(mgpu_utils.thread_idx(), const(128))
        warp, lane = arith.divui(thread, const(32)), arith.remui(thread, const(32))
        first = arith.addi(arith.muli(warp, const(512)), arith.muli(lane, const(8)))
        bank = arith.muli(lane, const(4))
        table_start = mgpu_utils.memref_ptr(table)
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape(result), object)
        by_column = registers.reshape(len(scales), 8, 2)  # group, 8 columns, upper or lower 8 of a warp's rows
        for g, half in itertools.product(range(len(scales)), range(2)):
            group = mgpu_utils.memref_ptr(mgpu_utils.memref_slice(codes, g))
            offset = arith.addi(first, const(256 * half))
            eight = llvm.load(ir.VectorType.get((2,), i32), mgpu_utils.getelementptr(group, [offset], i8), alignment=8)
            scale = vector.broadcast(pair, _only(scales[g].registers.flat[half]))
            for j in range(8):
                word = vector.extract(eight, dynamic_position=[], static_position=[j // 4])
                shift = 8 * (j % 4) - 7  # a row of the table has 128 bytes
                moved = arith.shrui(word, const(shift)) if shift > 0 else arith.shli(word, const(-shift))
                entry = arith.ori(arith.andi(moved, const(0x7F80)), bank)
                loaded = llvm.load(i32, mgpu_utils.getelementptr(table_start, [entry], i8))
                by_column[g, j, half] = arith.mulf(mgpu_utils.bitcast(loaded, pair), scale)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return gather(codes, table, *scales)
