"""What the tests of PIA share: the tiny checkpoint, and one thread, since threads make such small tensors slow."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.pia.golden import CHECKPOINT


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="package")
def tiny() -> Path:
    """A Stable Diffusion 1.5 folder with a motion adapter in it."""
    return CHECKPOINT
