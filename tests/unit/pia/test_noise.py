import torch

from pyramid_serve.pia.noise import SeededNoise


def test_the_same_seed_and_purpose_give_the_same_noise() -> None:
    assert torch.equal(SeededNoise(3).initial((4, 2, 2, 2)), SeededNoise(3).initial((4, 2, 2, 2)))


def test_each_purpose_of_a_seed_has_noise_of_its_own() -> None:
    noise, shape = SeededNoise(3), (4, 2, 2, 2)
    drawn = [noise.initial(shape), noise.strength(shape), noise.free_init(1, shape), noise.free_init(2, shape)]
    drawn += [torch.randn(shape, generator=noise.step(*place)) for place in ((0, 0), (0, 1), (1, 0))]
    drawn += [noise.picture(shape), SeededNoise(4).initial(shape)]
    assert len({tuple(each.flatten().tolist()) for each in drawn}) == len(drawn)


def test_the_noise_of_a_seed_never_changes() -> None:
    expected = torch.tensor([0.11281, 0.711708, 0.997319, 0.533212])
    torch.testing.assert_close(SeededNoise(3).initial((4,)), expected)
