import pytest
import torch
import torch.nn.functional as F

from pyramid_serve.pyramid_flow.causal_conv import Carry, CausalConv3d, Conv3d


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


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 1, 1)])
def test_a_convolution_is_torchs_own_with_its_gradients(batch: int, stride: tuple[int, int, int]) -> None:
    conv = Conv3d(5, 4, 3, stride=stride, padding=(0, 1, 1))
    x, same_x = (torch.randn(batch, 5, 6, 8, 8).requires_grad_() for _ in range(2))
    same_x.data.copy_(x.data)
    expected = F.conv3d(same_x, conv.weight, conv.bias, stride=stride, padding=(0, 1, 1))
    out = conv(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), same_x)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
@torch.no_grad()
def test_one_video_in_float32_is_not_convolved_by_the_slow_general_code() -> None:
    conv, few_frames = CausalConv3d(16, 16), torch.randn(1, 16, 4, 8, 8)
    with torch.profiler.profile() as profile:
        conv(few_frames, Carry(None))
    names = {event.key for event in profile.key_averages()}
    assert "aten::mkldnn_convolution" in names
    assert "aten::slow_conv3d_forward" not in names
