import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pyramid_serve.checkpoints.sources import CheckpointError
from pyramid_serve.pyramid_flow.text_encoder import DEFAULT_NEGATIVE_PROMPT, DEFAULT_PROMPT_SUFFIX, TextEncoder

GOLDEN = Path(__file__).parents[2] / "golden"
FAMILIES = ["mmdit", "miniflux"]


@pytest.fixture(scope="module", params=FAMILIES)
def golden(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / str(request.param)


@pytest.fixture(scope="module")
def encoder(golden: Path) -> TextEncoder:
    return TextEncoder.from_pretrained(golden / "checkpoint")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(GOLDEN / "miniflux/checkpoint" / part, tmp_path / part)
    return tmp_path


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.float() - right.float()).abs().max())


def test_embeddings_are_the_published_ones(golden: Path, encoder: TextEncoder) -> None:
    prompts = json.loads((golden / "golden.json").read_text())["prompts"]
    embeds, mask, pooled = encoder.encode_padded(prompts)
    with safe_open(golden / "golden.safetensors", framework="pt") as stored:
        for index in range(len(prompts)):
            expected = {
                name: stored.get_tensor(f"text.{index}.{name}")[0]
                for name in ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
            }
            valid = expected["prompt_attention_mask"].bool()
            assert torch.equal(mask[index].bool(), valid)
            assert difference(embeds[index][valid], expected["prompt_embeds"][valid]) <= 1e-4
            assert difference(pooled[index], expected["pooled_prompt_embeds"]) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_among_others_has_the_bits_that_it_has_alone(golden: Path, dtype: torch.dtype) -> None:
    encoder = TextEncoder.from_pretrained(golden / "checkpoint", dtype=dtype)
    prompts = ["a red ball", "", "a cat on a wall in the rain" + DEFAULT_PROMPT_SUFFIX]
    for prompt, together in zip(prompts, encoder.encode(prompts), strict=True):
        (alone,) = encoder.encode([prompt])
        assert torch.equal(together.prompt_embeds, alone.prompt_embeds)
        assert torch.equal(together.pooled_prompt_embeds, alone.pooled_prompt_embeds)


def test_padding_is_dropped(encoder: TextEncoder) -> None:
    _, mask, _ = encoder.encode_padded(["a red ball"])
    (embeds,) = encoder.encode(["a red ball"])
    assert embeds.prompt_embeds.shape[0] == mask.sum() < 128


def test_the_empty_prompt_is_its_end_token_alone(encoder: TextEncoder) -> None:
    (embeds,) = encoder.encode([""])
    assert embeds.prompt_embeds.shape[0] == 1


def test_a_long_prompt_is_cut_at_128_tokens(encoder: TextEncoder) -> None:
    (embeds,) = encoder.encode([DEFAULT_NEGATIVE_PROMPT * 10])
    assert embeds.prompt_embeds.shape[0] == 128


def test_no_prompts_give_no_embeddings(encoder: TextEncoder) -> None:
    assert encoder.encode([]) == []


def test_a_bare_string_is_refused(encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match="must be a list"):
        encoder.encode("a red ball")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.25), (torch.float16, 0.05)])
def test_half_precision_stays_close(golden: Path, encoder: TextEncoder, dtype: torch.dtype, tolerance: float) -> None:
    (exact,) = encoder.encode(["a red ball"])
    (half,) = TextEncoder.from_pretrained(golden / "checkpoint", dtype=dtype).encode(["a red ball"])
    assert half.prompt_embeds.dtype == half.pooled_prompt_embeds.dtype == dtype
    assert difference(half.prompt_embeds, exact.prompt_embeds) < tolerance
    assert difference(half.pooled_prompt_embeds, exact.pooled_prompt_embeds) < tolerance


def test_embeddings_move_together(encoder: TextEncoder) -> None:
    moved = encoder.encode(["a red ball"])[0].to("cpu", torch.bfloat16)
    assert moved.prompt_embeds.dtype == moved.pooled_prompt_embeds.dtype == torch.bfloat16


def test_nothing_but_the_text_parts_is_needed(checkpoint: Path) -> None:
    assert len(TextEncoder.from_pretrained(checkpoint).modules) == 2


def test_a_checkpoint_without_text_encoders_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"looked for text_encoder\*/, tokenizer\*/"):
        TextEncoder.from_pretrained(tmp_path)


def test_a_missing_tokenizer_is_named(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "tokenizer_2")
    with pytest.raises(CheckpointError, match="tokenizer_2: no such folder"):
        TextEncoder.from_pretrained(checkpoint)


def test_an_unknown_architecture_is_named(checkpoint: Path) -> None:
    (checkpoint / "text_encoder/config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(CheckpointError, match="architecture BertModel; known are CLIPTextModelWithProjection"):
        TextEncoder.from_pretrained(checkpoint)


def test_a_missing_t5_is_an_error(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "text_encoder_2")
    with pytest.raises(CheckpointError, match="one or more CLIP and one T5; there are text_encoder: CLIPTextModel"):
        TextEncoder.from_pretrained(checkpoint)


def test_missing_keys_are_named_and_not_made_up(checkpoint: Path) -> None:
    file = checkpoint / "text_encoder/model.safetensors"
    state = load_file(file)
    (dropped,) = (name for name in state if name.endswith("final_layer_norm.weight"))
    del state[dropped]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing: .*final_layer_norm.weight"):
        TextEncoder.from_pretrained(checkpoint)


def test_misshapen_keys_are_named(checkpoint: Path) -> None:
    file = checkpoint / "text_encoder/model.safetensors"
    state = load_file(file)
    (name,) = (name for name in state if name.endswith("final_layer_norm.weight"))
    state[name] = state[name][:-1].clone()
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 misshapen: .*final_layer_norm.weight"):
        TextEncoder.from_pretrained(checkpoint)


def test_a_broken_file_names_its_part(checkpoint: Path) -> None:
    (checkpoint / "text_encoder/model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="text_encoder: cannot be loaded"):
        TextEncoder.from_pretrained(checkpoint)


@pytest.mark.parametrize("filler", ["a red ball rolls to the left, ", "circle ", "\u00fcber (caf\u00e9) \u6f22! "])
def test_what_comes_after_the_place_where_a_prompt_was_cut_has_no_effect(encoder: TextEncoder, filler: str) -> None:
    prompt = filler * 60
    (whole,) = encoder.encode([prompt])
    assert whole.truncated_at is not None and 0 < whole.truncated_at < len(prompt)
    after = whole.truncated_at + len(filler)  # beyond the word that the place may be in
    (other,) = encoder.encode([prompt[:after] + " and something else" * 60])
    torch.testing.assert_close(other.prompt_embeds, whole.prompt_embeds)
    (changed,) = encoder.encode(["x" + prompt[1:]])
    assert not torch.equal(changed.prompt_embeds[:3], whole.prompt_embeds[:3])


def test_a_prompt_that_just_fits_is_not_called_cut(encoder: TextEncoder) -> None:
    assert encoder.truncated_at("a red ball") is None
    assert encoder.truncated_at("") is None
