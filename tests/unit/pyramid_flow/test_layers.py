import torch

from pyramid_serve.pyramid_flow.layers import apply_rope, gelu, modulate, rope_table, timestep_sinusoids


def test_rotated_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 16).unbind(0)

    def product(a: float, b: float) -> torch.Tensor:
        turned = [apply_rope(x, rope_table(torch.tensor([[at]]), (16,))) for x, at in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum()

    assert torch.allclose(product(3.0, 1.0), product(10.0, 8.0), atol=1e-5)
    assert not torch.allclose(product(3.0, 1.0), product(3.0, 2.0), atol=1e-3)


def test_position_zero_is_not_rotated() -> None:
    x = torch.randn(5, 2, 16)
    assert torch.equal(apply_rope(x, rope_table(torch.zeros(5, 3), (4, 6, 6))), x)


def test_each_axis_turns_its_own_dimensions() -> None:
    rope = rope_table(torch.tensor([[0.0, 2.0, 0.0]]), (4, 6, 6))
    x = torch.randn(1, 1, 16)
    same = apply_rope(x, rope) == x
    assert same[..., :4].all()
    assert not same[..., 4:10].any()
    assert same[..., 10:].all()


def test_sinusoids_begin_with_cosines_and_stay_float32() -> None:
    embedding = timestep_sinusoids(torch.tensor([0.0, 999.5], dtype=torch.float64))
    assert embedding.dtype == torch.float32
    assert embedding[0].tolist() == [1.0] * 128 + [0.0] * 128
    assert torch.allclose(embedding[1, 0], torch.tensor(999.5).cos())


def test_modulation_of_normalised_tokens() -> None:
    x = torch.randn(4, 8) * 3 + 2
    shift, gain = torch.full((1, 8), 0.5), torch.full((1, 8), 2.0)
    out = modulate(x, shift, gain, slice(0, 1))
    assert torch.allclose(out.mean(dim=-1), torch.full((4,), 0.5), atol=1e-5)
    assert torch.allclose(out.std(dim=-1, correction=0), torch.full((4,), 2.0), atol=1e-3)
    assert torch.allclose(modulate(x, shift, gain, torch.zeros(4, dtype=torch.long)), out, atol=1e-6)


def test_gelu_is_that_of_torch() -> None:
    x = torch.linspace(-12, 12, 10001)
    expected = torch.nn.functional.gelu(x.double(), approximate="tanh")
    assert (gelu(x) - expected).abs().max() <= 1e-6
    half = x.bfloat16()
    assert torch.equal(gelu(half), torch.nn.functional.gelu(half, approximate="tanh"))
