"""The shapes checkpoint's tokenizers and the variance of its latents."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from pyramid_serve.pyramid_flow.autoencoder import from_config
from tools.shapes.export import set_variance
from tools.shapes.latents import GAIN
from tools.shapes.text import TextEncoders, corpus, known_words_only, words_of, write_clip_tokenizer, write_t5_tokenizer
from tools.shapes.train_vae import CONFIG, NOISE


def test_the_variance_is_that_of_the_noise_in_training() -> None:
    torch.manual_seed(0)
    vae = from_config(CONFIG).eval()
    pixels = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pixels).mean
        set_variance(vae)
        moments = vae.encode(pixels)
    torch.testing.assert_close(moments.mean, before)
    torch.testing.assert_close(moments.logvar, torch.full_like(before, 2 * math.log(GAIN * NOISE / 2)))


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("A Red (Circle)", "a red circle"),
        ("a ((red)) {circle:1.3} moves up, 8K", "a red circle moves up"),
        ("masterpiece, best quality; a red circle!!", "a red circle."),
        ("a_red-circle moves\nup", "a red circle moves up"),
        ("video: a five-pointed star, gray", "video, a five-pointed star, gray"),
        ("a dragon", "a"),
        ("<|endoftext|> a red circle </s>", "a red circle"),
        ("", ""),
    ],
)
def test_only_known_words_are_read(prompt: str, read: str) -> None:
    assert known_words_only(words_of(corpus(2000))).normalize_str(prompt) == read


def test_the_corpus_is_read_as_it_stands() -> None:
    prompts = corpus(2000)
    normalizer = known_words_only(words_of(prompts))
    for prompt in prompts:
        assert normalizer.normalize_str(prompt) == prompt.lower()


def test_an_unknown_word_is_no_error(tmp_path: Path) -> None:
    prompts = corpus(300)
    write_clip_tokenizer(tmp_path / "tokenizer", prompts)
    write_t5_tokenizer(tmp_path / "tokenizer_2", prompts)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        for prompt in ("a zebra pirouettes on caf\u00e9 \u6f22\u5b57!", "", "a red circle"):
            ids = tokenizer(prompt)["input_ids"]
            assert max(ids) < len(tokenizer)
    encoders = TextEncoders(tmp_path)
    embeds, mask, pooled = encoders(["a zebra pirouettes", ""])
    assert embeds.shape[:2] == mask.shape
    assert pooled.isfinite().all()


def test_case_does_not_matter_to_the_tokenizers(tmp_path: Path) -> None:
    write_clip_tokenizer(tmp_path / "tokenizer", corpus(300))
    write_t5_tokenizer(tmp_path / "tokenizer_2", corpus(300))
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer("A Red Circle")["input_ids"] == tokenizer("a red circle")["input_ids"]
