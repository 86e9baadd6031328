"""New words for text encoders that are trained already."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tools.shapes import text
from tools.shapes.more_words import copy_weights, fit_heads, is_known, measure_distance, teach
from tools.shapes.scenes import plain_prompt, sample_scene
from tools.shapes.text import (
    TextEncoders,
    corpus,
    mark,
    sample_prompts,
    teach_words,
    write_clip_tokenizer,
    write_t5_tokenizer,
)

OLD = ["a red circle moves right on a black background", "a blue star spins on a white background"]
NEW = ["a red circle is stationary on a black background", "a blue star revolves on a white background"]


def encoders(folder: Path, prompts: list[str]) -> TextEncoders:
    write_clip_tokenizer(folder / "tokenizer", prompts)
    write_t5_tokenizer(folder / "tokenizer_2", prompts)
    return TextEncoders(folder)


def test_a_prompt_is_known_where_each_of_its_words_is(tmp_path: Path) -> None:
    tokenizer = encoders(tmp_path, OLD).t5_tokenizer
    assert is_known("Blue circle moves right, white", tokenizer)
    assert not is_known("blue circle rises, white", tokenizer)


def test_what_was_known_is_encoded_as_before_when_weights_are_copied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    old = encoders(tmp_path / "old", OLD)
    new = encoders(tmp_path / "new", [*OLD, *NEW])
    assert len(new.t5_tokenizer) > len(old.t5_tokenizer) and len(new.clip_tokenizer) > len(old.clip_tokenizer)
    with torch.no_grad():
        assert float(measure_distance(old, new, OLD)) > 0.1
    copy_weights(old, new)
    with torch.no_grad():
        assert float(measure_distance(old, new, OLD)) < 1e-6


@pytest.mark.slow
def test_new_words_come_to_be_told_and_known_ones_stay_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    plain = [plain_prompt(sample_scene(rng)) for _ in range(200)]
    old = encoders(tmp_path / "old", plain)
    with monkeypatch.context() as patch:
        patch.setattr(text, "sample_prompt", lambda scene, rng: plain_prompt(scene))
        teach_words(old, num_steps=60, batch=48)
    new = encoders(tmp_path / "new", corpus(500))
    copy_weights(old, new)
    heads = fit_heads(old, num_steps=60, seed=0)
    prompts, scenes = sample_prompts(64, rng)

    def loss() -> float:
        with torch.no_grad():
            return float(mark(heads, new(prompts), scenes)[0])

    before = loss()
    teach(old, new, heads, num_steps=40, seed=1)
    assert loss() < 0.5 * before
    with torch.no_grad():
        assert float(measure_distance(old, new, plain[:40])) < 0.1
