import pytest
import torch

from pyramid_serve.pyramid_flow.noise import RecordedNoise, SeededNoise, block_noise, halve_noise
from pyramid_serve.pyramid_flow.shapes import LatentShape

SHAPE = LatentShape(4, 16, 24)


def test_the_same_seed_unit_and_stage_give_the_same_bits() -> None:
    for a, b in ((SeededNoise(7, SHAPE), SeededNoise(7, SHAPE)),):
        assert torch.equal(a.initial(3), b.initial(3))
        assert torch.equal(a.block(3, 2), b.block(3, 2))


def test_another_seed_unit_or_stage_gives_other_noise() -> None:
    source = SeededNoise(7, SHAPE)
    assert not torch.equal(source.initial(0), source.initial(1))
    assert not torch.equal(source.initial(0), SeededNoise(8, SHAPE).initial(0))
    assert not torch.equal(source.block(0, 2), source.block(1, 2))
    # Drawn from normals of its own, not from those that the unit began with.
    assert not torch.equal(source.block(0, 2), block_noise(source.initial(0)))
    wide = SeededNoise(7, LatentShape(4, 32, 48))
    assert not torch.equal(wide.block(0, 1), source.block(0, 2))


def test_noise_does_not_depend_on_the_length_of_the_video() -> None:
    longer = SHAPE._replace(num_latent_frames=9)
    assert torch.equal(SeededNoise(1, SHAPE).initial(2), SeededNoise(1, longer).initial(2))


def test_noise_has_the_size_of_its_stage() -> None:
    source = SeededNoise(0, SHAPE)
    assert source.initial(0).shape == (16, 1, 16, 24)
    assert source.block(0, 1).shape == (16, 1, 8, 12)
    assert source.block(0, 2).shape == (16, 1, 16, 24)


def test_drawing_noise_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    SeededNoise(0, SHAPE).block(0, 1)
    assert torch.equal(before, torch.get_rng_state())


def test_block_noise_has_variance_1_and_covariance_minus_a_third_within_blocks() -> None:
    noise = block_noise(torch.randn(16, 16, 128, 128))
    blocks = noise.unfold(2, 2, 2).unfold(3, 2, 2).reshape(-1, 4)
    covariance = blocks.T @ blocks / blocks.shape[0]
    expected = torch.full((4, 4), -1 / 3).fill_diagonal_(1.0)
    assert torch.allclose(covariance, expected, atol=0.01)
    assert blocks.sum(dim=1).abs().max() < 1e-5


def test_halved_noise_keeps_its_variance() -> None:
    halved = halve_noise(torch.randn(16, 8, 64, 64))
    assert halved.shape == (16, 8, 32, 32)
    assert halved.std().item() == pytest.approx(1.0, rel=0.02)


def test_recorded_noise_is_read_in_order_of_use() -> None:
    initial = torch.arange(3.0).view(1, 3, 1, 1)
    recorded = RecordedNoise(initial, [torch.tensor(float(i)) for i in range(6)], first_unit=1)
    assert [recorded.initial(unit).item() for unit in (1, 2, 3)] == [0, 1, 2]
    assert [recorded.block(unit, stage).item() for unit in (1, 2) for stage in (1, 2)] == [0, 1, 2, 3]
