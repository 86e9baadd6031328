import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deployments.pools.tensors import all_from_wire, all_to_wire, from_wire, to_wire
from deployments.pools.wire import EncodedPrompt, latents_from_wire, latents_to_wire


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(3, 4).bfloat16(),
        torch.randint(0, 255, (2, 5), dtype=torch.uint8),
        torch.tensor(7),
        torch.zeros(16, 0, 8, 8),
        torch.randn(4, 6)[1:, ::2].T,
        torch.tensor([True, False]),
    ],
    ids=["float32", "bfloat16", "uint8", "scalar", "empty", "strided", "bool"],
)
def test_a_tensor_comes_back_as_it_was(tensor: Tensor) -> None:
    wire = pickle.loads(pickle.dumps(to_wire(tensor), protocol=5))
    back = from_wire(wire)
    assert back.dtype == tensor.dtype
    assert wire.num_bytes == tensor.numel() * tensor.element_size()
    assert torch.equal(back, tensor)


def test_what_comes_back_is_a_copy_and_may_come_from_read_only_bytes() -> None:
    wire = to_wire(torch.zeros(4))
    wire.data.flags.writeable = False
    from_wire(wire).add_(1)
    assert torch.equal(from_wire(wire), torch.zeros(4))


def test_bytes_that_do_not_fit_are_refused() -> None:
    wire = to_wire(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"24 bytes of uint8, must be 28 .* shape \(7,\)"):
        from_wire(replace(wire, shape=(7,)))
    with pytest.raises(ValueError, match="dtype='nonsense'"):
        from_wire(replace(wire, dtype="nonsense"))


def test_named_tensors_come_back_as_they_were() -> None:
    tensors = {"prompt_embeds": torch.randn(5, 8).bfloat16(), "pooled_prompt_embeds": torch.randn(6)}
    wire = all_to_wire(tensors)
    assert EncodedPrompt(wire).num_bytes == 5 * 8 * 2 + 6 * 4
    back = all_from_wire(wire)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_latents_come_back_as_they_were_and_nothing_else_passes_for_them() -> None:
    latents = torch.randn(16, 1, 4, 4)
    wire = latents_to_wire(latents.numpy())
    assert torch.equal(from_wire(wire), latents)
    assert (latents_from_wire(to_wire(latents)) == latents.numpy()).all()
    with pytest.raises(ValueError, match="latents: bfloat16, must be float32"):
        latents_from_wire(to_wire(latents.bfloat16()))
