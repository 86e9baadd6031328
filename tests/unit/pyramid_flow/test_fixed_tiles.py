"""The product with one tile, run by Triton's interpreter on the CPU, and compiled ahead for a GPU that is not there.

Triton is no dependency: it comes with torch for CUDA. Whether bits are the same is for a GPU to say (tests/gpu), since
the interpreter leaves the product of a tile to NumPy.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

INTERPRETED = """
import torch
from pyramid_serve.pyramid_flow.fixed_tiles import fixed_tile_product

torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 5e-2)):
    for rows, inner, columns in ((5, 24, 20), (300, 192, 576), (130, 70, 300), (1, 64, 1)):
        x, weight, bias = torch.randn(rows, 3 * inner), torch.randn(columns, inner), torch.randn(columns)
        x = x.to(dtype)[:, inner : 2 * inner]  # rows with others between them
        weight, bias = weight.to(dtype), bias.to(dtype)
        out = fixed_tile_product(x, weight, bias)
        exact = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
        assert out.dtype == dtype
        assert torch.allclose(out.float(), exact, atol=tolerance), (dtype, rows)
        assert torch.allclose(fixed_tile_product(x, weight, None) + bias, out, atol=tolerance)
"""

COMPILED_AHEAD = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pyramid_serve.pyramid_flow.fixed_tiles import _product_kernel

arguments = ["x", "weight", "bias", "out", "num_rows", "num_columns", "num_inner", "row_stride"]
tiles = {"tile_rows": 128, "tile_columns": 128, "tile_inner": 64, "group_size": 8, "has_bias": True}
kinds = dict.fromkeys(arguments[:4], "*bf16") | dict.fromkeys(arguments[4:], "i32") | dict.fromkeys(tiles, "constexpr")
aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arguments))}
source = ASTSource(_product_kernel, kinds, constexprs=tiles, attrs=aligned)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
assert "wgmma" in compiled.asm["ptx"], "not by the tensor cores"
assert "cp.async" in compiled.asm["ptx"], "loads wait for products"
assert compiled.metadata.shared <= 227 * 1024
"""


@pytest.mark.parametrize("program", [INTERPRETED, COMPILED_AHEAD], ids=["interpreted", "compiled-ahead"])
def test_the_kernel(program: str) -> None:
    more = {"TRITON_INTERPRET": "1"} if program is INTERPRETED else {}
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, **more})
