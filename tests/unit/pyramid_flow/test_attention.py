import pytest
import torch

from pyramid_serve.pyramid_flow.attention import (
    FLEX_BLOCK,
    GROUP_SIZE,
    Attention,
    _block_mask,
    attention_by_name,
    block_attention,
    dense_attention,
    fastest_on,
    reference_flex_attention,
)
from pyramid_serve.pyramid_flow.pack import PADDING_TIME, PackLayout, SequenceShape, layout_of

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

PACK = (
    SequenceShape(7, ((1, 4, 6),)),
    SequenceShape(1, ((9, 2, 3), (1, 4, 6), (1, 8, 12), (1, 8, 12))),
    SequenceShape(40, ((2, 16, 10), (1, 16, 20))),
    SequenceShape(3, ((1, 1, 1),)),
)


def random_pack(
    shapes: tuple[SequenceShape, ...], *, tile: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PackLayout]:
    layout = layout_of(shapes, torch.device("cpu"), tile)
    q, k, v = torch.randn(3, layout.num_tokens, 2, 16).unbind(0)
    return q, k, v, layout


@pytest.mark.parametrize("fast", [block_attention, reference_flex_attention])
def test_fast_attention_equals_the_dense_one(fast: Attention) -> None:
    q, k, v, layout = random_pack(PACK)
    assert torch.allclose(fast(q, k, v, layout), dense_attention(q, k, v, layout), atol=1e-5)


@pytest.mark.parametrize("fast", [block_attention, reference_flex_attention])
def test_random_packs_equal_the_dense_attention(fast: Attention) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(10):
        shapes = tuple(
            SequenceShape(draw(1, 130), tuple((draw(1, 4), draw(1, 9), draw(1, 17)) for _ in range(draw(1, 4))))
            for _ in range(draw(1, 5))
        )
        q, k, v, layout = random_pack(shapes, tile=draw(1, 140))
        tokens = layout.time != PADDING_TIME
        assert torch.allclose(fast(q, k, v, layout)[tokens], dense_attention(q, k, v, layout)[tokens], atol=1e-5)


@pytest.mark.parametrize("attention", [dense_attention, block_attention, reference_flex_attention])
def test_a_token_sees_no_later_frame_and_no_other_sequence(attention: Attention) -> None:
    q, k, v, layout = random_pack(PACK[:2])
    before = attention(q, k, v, layout)
    changed = (layout.sequence == 0) | (layout.time == layout.time.max())
    after = attention(
        q, torch.where(changed[:, None, None], 9.0, k), torch.where(changed[:, None, None], 9.0, v), layout
    )
    assert torch.equal(before[~changed], after[~changed])
    assert not torch.equal(before[changed], after[changed])


def test_text_sees_text_and_the_first_frame() -> None:
    q, k, v, layout = random_pack((SequenceShape(4, ((3, 2, 2),)),))
    out = block_attention(q, k, v, layout)[:4]
    alone = torch.nn.functional.scaled_dot_product_attention(*(x[:8].transpose(0, 1) for x in (q, k, v)))
    assert torch.allclose(out, alone.transpose(0, 1)[:4], atol=1e-5)


def test_large_frames_take_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: torch.Tensor, attn_mask: torch.Tensor | None) -> torch.Tensor:
        masks.append(None if attn_mask is None else attn_mask.numel())
        return plain(*args, attn_mask=attn_mask)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", spy)
    q, k, v, layout = random_pack((SequenceShape(2, ((1, 16, GROUP_SIZE // 16), (1, 16, GROUP_SIZE // 16))),))
    block_attention(q, k, v, layout)
    assert masks == [None, None]


def test_an_unknown_attention_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"attention='fast': must be one of dense, blocks, flex"):
        attention_by_name("fast")


def test_the_blocks_that_flex_attention_visits_are_those_that_are_needed() -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(20):
        shapes = tuple(
            SequenceShape(draw(1, 130), tuple((draw(1, 4), draw(1, 16), draw(1, 24)) for _ in range(draw(1, 5))))
            for _ in range(draw(1, 6))
        )
        layout = layout_of(shapes, torch.device("cpu"), draw(1, 140))
        is_padding, last = (
            layout.time == PADDING_TIME,
            torch.tensor([sum(t for t, _, _ in s.grids) - 1 for s in shapes]),
        )
        is_text = torch.arange(layout.num_tokens) < layout.num_text
        time = torch.where(is_padding, torch.where(is_text, 0, last[layout.sequence]), layout.time)
        sees = (layout.sequence[:, None] == layout.sequence) & (time[:, None] >= time) & ~is_padding
        mask = _block_mask(layout.spans, layout.num_tokens, torch.device("cpu"))
        for row, queries in enumerate(sees.split(FLEX_BLOCK)):
            blocks = queries.split(FLEX_BLOCK, dim=1)
            needed = {column for column, block in enumerate(blocks) if block.any()}
            partial = visited(mask.kv_num_blocks, mask.kv_indices, row)
            full = visited(mask.full_kv_num_blocks, mask.full_kv_indices, row)
            assert not partial & full
            assert partial | full == needed
            assert all(blocks[column].all() for column in full)


def visited(counts: torch.Tensor | None, indices: torch.Tensor | None, row: int) -> set[int]:
    assert counts is not None
    assert indices is not None
    return set(indices[0, 0, row, : int(counts[0, 0, row])].tolist())


@pytest.mark.parametrize(("device", "name"), [("cuda:1", "flex"), ("cpu", "blocks"), ("meta", "blocks")])
def test_flex_is_taken_on_cuda_alone(device: str, name: str) -> None:
    assert fastest_on(torch.device(device)) == name
