import pytest

from benchmarks.library import KNOWN_PETAFLOP, SHAPES, decode_flops, unit_flops
from benchmarks.pia_gpu import PACKS, PUBLISHED, measure_pia, row_flops


def test_the_decoder_counts_as_much_arithmetic_as_the_published_one() -> None:
    shape = SHAPES["384p 5 s"]
    first, other = decode_flops(shape.pixel_size)
    petaflop = (first + 15 * other) / 1e15
    assert petaflop == pytest.approx(KNOWN_PETAFLOP["sd3", "384p 5 s"][1], rel=0.05)


def test_a_unit_counts_as_much_arithmetic_as_its_tokens_need() -> None:
    # Two halves, 20 steps a stage, 24 blocks. A token takes 2 FLOP for each weight of a block's image stream (12 D^2),
    # and so does one of text, but in the last block, where text is keys and values only.
    shape, width, text = SHAPES["384p 5 s"], 1536, 128
    tokens = [shape.num_tokens_at(stage) for stage in range(3)]
    linear = sum(24 * 24 * width**2 * n + 23 * 24 * width**2 * text for n in tokens)
    attention = sum(24 * 4 * width * (n + text) ** 2 for n in tokens)
    assert unit_flops("sd3", shape.pixel_size, 0) == pytest.approx(2 * 20 * (linear + attention), rel=0.03)


def test_a_row_of_pia_counts_as_much_arithmetic_as_the_published_unet() -> None:
    assert 50 * row_flops(PUBLISHED) == pytest.approx(884e12, rel=0.01)


def test_the_section_on_pia_runs_on_a_cpu_with_the_tiny_model() -> None:
    about, *rows = measure_pia("cpu", compare=False, seconds=60.0)
    assert about["device"] == "cpu" and about["matrix_tflops"] > 0
    assert [row["part"] for row in rows] == ["warm-up", "same bits", *["step"] * len(PACKS), "video"]
    assert rows[1]["again"] and rows[1]["differs_from_first_way"] == 0
    assert [row["packed"] for row in rows[2:-1]] == list(PACKS) and rows[-1]["seconds"] > 0
