import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from deployments.pools.tensors import all_from_wire, all_to_wire
from deployments.pools.text_encoder import TextEncoder, TextEncoderConfig, embeds_cache, keep
from deployments.pools.wire import EncodedPrompt
from deployments.telemetry.forwards import ReplicaStats
from pyramid_serve.pyramid_flow import text_encoder
from tests.serve.conftest import deployed, quick

Handle = Any


@pytest.fixture(scope="module")
def encoder(local_ray: None, miniflux: Path) -> Iterator[Handle]:
    config = TextEncoderConfig(source=str(miniflux), dtype="float32", batch_wait_timeout_s=0.5)
    with deployed(quick(TextEncoder, max_ongoing_requests=16).bind(config), "text_encoder") as handle:
        yield handle


@pytest.mark.asyncio
async def test_a_prompt_is_encoded_as_by_the_library(encoder: Handle, miniflux: Path) -> None:
    prompts = ["A red ball rolls across a green field", "", "FPV flying over the Great Wall, " * 30]
    embeds = await asyncio.gather(*(encoder.encode.remote(prompt) for prompt in prompts))
    library = text_encoder.TextEncoder.from_pretrained(miniflux)
    for prompt, wire in zip(prompts, embeds, strict=True):
        (expected,) = library.encode([prompt])
        got = all_from_wire(wire.tensors)
        assert torch.equal(got["prompt_embeds"], expected.prompt_embeds)
        assert torch.equal(got["pooled_prompt_embeds"], expected.pooled_prompt_embeds)


@pytest.mark.asyncio
async def test_prompts_share_a_forward_equal_ones_count_once_and_known_ones_need_none(encoder: Handle) -> None:
    before: ReplicaStats = await encoder.stats.remote()
    prompts = ["one", "two", "one", "three", "two", "one"]
    first = await asyncio.gather(*(encoder.encode.remote(prompt) for prompt in prompts))
    after: ReplicaStats = await encoder.stats.remote()
    assert after.num_slots - before.num_slots == 3
    assert after.num_forwards - before.num_forwards < 3
    again = await asyncio.gather(*(encoder.encode.remote(prompt) for prompt in prompts))
    assert (await encoder.stats.remote()).num_forwards == after.num_forwards
    for one, other in zip(first, again, strict=True):
        for name, tensor in all_from_wire(one.tensors).items():
            assert torch.equal(tensor, all_from_wire(other.tensors)[name])
    assert (await encoder.stats.remote()).num_present == 0


@pytest.mark.asyncio
async def test_a_prompt_that_overflows_does_not_fail_those_beside_it(
    local_ray: None, miniflux: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(miniflux, checkpoint)
    break_word(checkpoint, "zebra", beside="a ball two balls")
    config = TextEncoderConfig(source=str(checkpoint), dtype="float32", batch_wait_timeout_s=0.5)
    with deployed(quick(TextEncoder, max_ongoing_requests=16).bind(config), "broken_text_encoder") as handle:
        prompts = ["a ball", "a zebra", "two balls"]
        results = await asyncio.gather(*(handle.encode.remote(p) for p in prompts), return_exceptions=True)
    assert [isinstance(result, Exception) for result in results] == [False, True, False]
    assert "prompt embeddings: NaN among the values" in str(results[1])


def break_word(checkpoint: Path, word: str, *, beside: str) -> None:
    """Give one of T5's tokens of a word, that is none of those of ``beside``, an embedding that is not finite."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer_2")
    others = set(tokenizer(beside)["input_ids"])
    token = next(i for i in tokenizer(word, add_special_tokens=False)["input_ids"] if i not in others)
    for path in (checkpoint / "text_encoder_2").glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors.keys() & {"shared.weight", "encoder.embed_tokens.weight"}:
            tensors[name][token] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})


def embeds_of(num_bytes: int) -> EncodedPrompt:
    return EncodedPrompt(all_to_wire({"prompt_embeds": torch.zeros(num_bytes, dtype=torch.uint8)}))


def test_the_cache_drops_the_least_recently_used_beyond_its_bytes() -> None:
    cache = embeds_cache(200)
    keep(cache, "a", embeds_of(100))
    keep(cache, "b", embeds_of(100))
    assert cache.get("a") is not None
    keep(cache, "c", embeds_of(100))
    assert [prompt for prompt in "abc" if cache.get(prompt) is not None] == ["a", "c"]


def test_the_cache_counts_a_prompt_that_comes_again_once_and_keeps_nothing_too_large() -> None:
    cache = embeds_cache(200)
    for _ in range(3):
        keep(cache, "a", embeds_of(100))
    keep(cache, "b", embeds_of(100))
    assert cache.get("a") is not None
    keep(cache, "c", embeds_of(201))
    assert cache.get("c") is None
