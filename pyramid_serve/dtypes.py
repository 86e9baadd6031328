"""Names of dtypes, for code that must not import torch."""

from typing import Literal

DTypeName = Literal["float32", "bfloat16", "float16"]
