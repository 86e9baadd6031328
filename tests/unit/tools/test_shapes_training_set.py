"""What the transformer is trained on: clips and pictures with the tokens of their prompts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tools.shapes.evaluate import CHECKPOINT
from tools.shapes.text import TextEncoders, Tokens, load_encoders
from tools.shapes.training import save_state
from tools.shapes.training_set import ROLLOUTS, TrainingSet

PROMPTS = {
    "clips": [["a red circle spins on black"], ["blue square, gray", "a blue square stays still on a gray background"]],
    "pictures": [["star"], ["a white star"], ["white star on brown"]],
    "rollouts": [["an animation of one triangle in orange which swells; behind it all is white"], ["cyan ball"]],
}


@pytest.fixture(scope="module")
def text() -> TextEncoders:
    return load_encoders(CHECKPOINT)


def write(folder: Path, kind: str, mark: float, *, name: str = "000") -> None:
    num = len(PROMPTS[kind])
    latents = mark + torch.arange(num).view(-1, 1, 1, 1, 1).expand(-1, 2, 3, 4, 4).half()
    state = {"latents": latents, "prompts": PROMPTS[kind]}
    save_state(folder / f"{kind}_{name}.pt", state if kind == "pictures" else {**state, "worn": -latents})


def words_of(training_set: TrainingSet, text: TextEncoders, row: int) -> str:
    return str(text.t5_tokenizer.decode(training_set.tokens.t5[row][training_set.tokens.t5_mask[row]][:-1]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "clips", 10)
    write(tmp_path, "pictures", 50)
    return tmp_path


def check_samples(training_set: TrainingSet, text: TextEncoders, expected: dict[float, list[str]]) -> None:
    """Each latent goes with a prompt of its own clip, or with none."""
    sources = [training_set.clips, training_set.pictures]
    (clips, pictures), rows = training_set.sample_rows(sources, [300, 200], np.random.default_rng(0))
    marks = [
        float(source.shown.latents[index, 0, 0, 0, 0])
        for source, picked in zip(sources, (clips, pictures), strict=True)
        for index in picked
    ]
    said = [words_of(training_set, text, int(row)) for row in rows]
    seen: dict[float, set[str]] = {}
    for mark, words in zip(marks, said, strict=True):
        seen.setdefault(mark, set()).update({words} - {""})
    assert seen == {mark: set(prompts) for mark, prompts in expected.items()}
    assert np.mean([not words for words in said]) == pytest.approx(0.1, abs=0.04)
    assert all(
        training_set.lengths[row] == len(text.t5_tokenizer(words)["input_ids"])
        for row, words in zip(rows, said, strict=True)
    )


def test_clips_and_pictures_come_with_their_own_prompts(folder: Path, text: TextEncoders) -> None:
    training_set = TrainingSet(folder, text, seed=1, device="cpu")
    drawn = {10.0 + i: own for i, own in enumerate(PROMPTS["clips"])}
    drawn |= {50.0 + i: own for i, own in enumerate(PROMPTS["pictures"])}
    check_samples(training_set, text, drawn)


def test_rollouts_that_come_later_are_taken_in(folder: Path, text: TextEncoders) -> None:
    training_set = TrainingSet(folder, text, seed=1, device="cpu")
    drawn = {10.0 + i: own for i, own in enumerate(PROMPTS["clips"])}
    drawn |= {50.0 + i: own for i, own in enumerate(PROMPTS["pictures"])}
    for name, mark in (("000", 20), ("001", 30)):
        write(folder, "rollouts", mark, name=name)
        training_set.refresh()
        drawn |= {mark + i: own for i, own in enumerate(PROMPTS["rollouts"])}
        check_samples(training_set, text, drawn)
        np.testing.assert_allclose(training_set.clips.shown.chances[:2].sum(), 1 - ROLLOUTS)
    before = training_set.tokens
    training_set.refresh()
    assert training_set.tokens is before


def test_tokens_made_longer_are_encoded_as_before(text: TextEncoders) -> None:
    short, long = (text.tokenize(PROMPTS[kind][0]) for kind in ("pictures", "rollouts"))
    together = Tokens.concatenated([short, long])
    assert together.t5.shape[1] == long.t5.shape[1] > short.t5.shape[1]
    with torch.no_grad():
        embeds, pooled = text.encode(together[torch.tensor([0])])
        own_embeds, own_pooled = text.encode(short)
    torch.testing.assert_close(embeds[:, : short.t5.shape[1]], own_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, own_pooled, atol=1e-5, rtol=1e-5)
