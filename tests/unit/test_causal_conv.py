import pytest
import torch

from pyramid_serve.pyramid_flow.causal_conv import Carry, CausalConv3d


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("chunks", [[1, 8, 8], [9, 8], [1, 2, 4, 8, 2]])
@torch.no_grad()
def test_chunks_give_what_the_whole_gives(stride: tuple[int, int, int], chunks: list[int]) -> None:
    conv = CausalConv3d(3, 4, stride=stride)
    x = torch.randn(2, 3, 17, 6, 8)
    whole = conv(x, Carry(None))
    memory, parts = None, []
    for chunk in x.split(chunks, dim=2):
        carry = Carry(memory)
        parts.append(conv(chunk, carry))
        memory = carry.memory()
    assert torch.allclose(torch.cat(parts, dim=2), whole, atol=1e-6)


@torch.no_grad()
def test_a_frame_sees_no_later_frame() -> None:
    conv = CausalConv3d(3, 4)
    x = torch.randn(1, 3, 5, 4, 4)
    changed = x.clone()
    changed[:, :, 3:] += 1
    same = conv(x, Carry(None)) == conv(changed, Carry(None))
    assert same[:, :, :3].all()
    assert not same[:, :, 3:].any()


def test_memory_holds_only_the_frames_that_are_needed() -> None:
    carry = Carry(None)
    carry.prepend(torch.randn(1, 3, 50, 4, 4), num_padding=2, num_kept=2)
    ((kept,),) = carry.memory()
    assert kept.untyped_storage().nbytes() == 3 * 2 * 4 * 4 * 4


def test_memory_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="do not continue"):
        Carry([(torch.zeros(1, 3, 2, 4, 4),)]).prepend(torch.zeros(1, 3, 1, 8, 8), num_padding=2, num_kept=2)


def test_memory_of_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        Carry([(torch.zeros(1, 3, 2, 4, 4),)]).memory()
    with pytest.raises(ValueError, match="too short"):
        Carry([]).prepend(torch.zeros(1, 3, 1, 4, 4), num_padding=2, num_kept=2)
