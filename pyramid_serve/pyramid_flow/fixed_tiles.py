"""Matrix products on a CUDA device whose result for a row depends on that row alone. Needs Triton.

A library chooses its kernel by the number of rows, and each sums up in an order of its own. Here one kernel with one
size of tile sums up every row over the inner dimension from its beginning to its end. It never tunes itself, so every
replica on the same kind of card gets the same bits.
"""

import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _INNER = 128, 128, 64
"""The tile of a program: rows and columns of the result, and how much of the inner dimension is added at a time."""
_GROUP = 8
"""Tiles of rows that programs next to each other share a part of the weight for, so that it is read from the cache."""


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _product_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    out,
    num_rows,
    num_columns,
    num_inner,
    row_stride,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_inner: tl.constexpr,
    group_size: tl.constexpr,
    has_bias: tl.constexpr,
):
    """A tile of ``x @ weight.T + bias``: x (num_rows, num_inner), weight (num_columns, num_inner)."""
    program = tl.program_id(0)
    tiles_of_rows, tiles_of_columns = tl.cdiv(num_rows, tile_rows), tl.cdiv(num_columns, tile_columns)
    group = program // (group_size * tiles_of_columns)
    in_group = tl.minimum(tiles_of_rows - group * group_size, group_size)
    place = program % (group_size * tiles_of_columns)
    rows = (group * group_size + place % in_group) * tile_rows + tl.arange(0, tile_rows)
    columns = (place // in_group) * tile_columns + tl.arange(0, tile_columns)
    inner = tl.arange(0, tile_inner)
    of_x = x + rows.to(tl.int64)[:, None] * row_stride
    of_weight = weight + columns.to(tl.int64)[None, :] * num_inner
    total = tl.zeros((tile_rows, tile_columns), tl.float32)
    for start in range(0, num_inner, tile_inner):
        at = start + inner
        a = tl.load(of_x + at[None, :], mask=(rows[:, None] < num_rows) & (at[None, :] < num_inner), other=0.0)
        b = tl.load(
            of_weight + at[:, None], mask=(columns[None, :] < num_columns) & (at[:, None] < num_inner), other=0.0
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    if has_bias:
        total += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    of_out = out + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(of_out, total.to(out.dtype.element_ty), mask=(rows[:, None] < num_rows) & (columns[None, :] < num_columns))


def fixed_tile_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` of rows (L, in), weight (out, in) and bias (out,): (L, out), summed up in float32."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[0])
    grid = (triton.cdiv(x.shape[0], _ROWS) * triton.cdiv(weight.shape[0], _COLUMNS),)
    _product_kernel[grid](
        x,
        weight.contiguous(),
        bias,
        out,
        *out.shape,
        x.shape[1],
        x.stride(0),
        tile_rows=_ROWS,
        tile_columns=_COLUMNS,
        tile_inner=_INNER,
        group_size=_GROUP,
        has_bias=bias is not None,
        num_warps=8 if x.element_size() == 2 else 4,
        num_stages=3 if x.element_size() == 2 else 2,
    )
    return out
