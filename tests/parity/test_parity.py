"""Our numbers against those of the published code, part by part. ``--golden DIR`` compares with another folder."""

import re

import pytest
import torch
from PIL import Image
from torch import Tensor

from pyramid_serve.pyramid_flow.attention import block_attention, dense_attention, reference_flex_attention
from pyramid_serve.pyramid_flow.autoencoder import DecoderMemory, Tiling
from pyramid_serve.pyramid_flow.pipeline import VideoInput
from pyramid_serve.pyramid_flow.schedule import stage
from tests.parity.conftest import Golden

TOLERANCE = 1e-4
PIXEL_TOLERANCE = 2e-3  # the golden pixels are stored as float16


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours.float() - theirs.float()).abs().max().item()


def vae_latents(golden: Golden) -> Tensor:
    return golden.pipeline.latent_scale.to_vae(golden.tensors["t2v.latents"])


def picture(golden: Golden) -> Tensor:
    image = Image.open(golden.folder / "i2v_image.png").convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    return pixels.permute(2, 0, 1)[None, :, None].float() / 127.5 - 1


def test_schedule_is_the_published_one(golden: Golden) -> None:
    scheduler = golden.spec["scheduler"]
    for i in range(3):
        assert stage(i).start == pytest.approx(scheduler["start_sigmas"][str(i)], abs=1e-6)
        assert stage(i).end == pytest.approx(scheduler["end_sigmas"][str(i)], abs=1e-6)
        assert stage(i).uncorrected_start == pytest.approx(scheduler["ori_start_sigmas"][str(i)], abs=1e-6)
    for key, table in scheduler["table"].items():
        num_steps, index = map(int, key.split("."))
        assert stage(index).timesteps(num_steps) == pytest.approx(table["timesteps"], abs=1e-4)
        assert stage(index).sigmas(num_steps) == pytest.approx(table["sigmas"], abs=1e-9)


def test_text_embeddings_are_the_published_ones(golden: Golden) -> None:
    for i, prompt in enumerate(golden.spec["prompts"]):
        (embeds,) = golden.pipeline.text_encoder.encode([prompt])
        valid = golden.tensors[f"text.{i}.prompt_attention_mask"][0].bool()
        assert difference(embeds.prompt_embeds, golden.tensors[f"text.{i}.prompt_embeds"][0][valid]) <= TOLERANCE
        pooled = golden.tensors[f"text.{i}.pooled_prompt_embeds"][0]
        assert difference(embeds.pooled_prompt_embeds, pooled) <= TOLERANCE


@pytest.mark.parametrize("attention", [block_attention, dense_attention, reference_flex_attention])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_predictions_are_the_published_ones(golden: Golden, attention) -> None:  # type: ignore[no-untyped-def]
    assert golden.num_dit_calls > 0
    for i in range(golden.num_dit_calls):
        sequences, output = golden.dit_call(i)
        assert difference(torch.stack(golden.pipeline.transformer(sequences, attention=attention)), output) <= TOLERANCE


def test_text_to_video_latents_are_the_published_ones(golden: Golden) -> None:
    video = VideoInput(golden.spec["prompts"][0], noise=golden.noise("t2v"))
    latents = golden.pipeline.generate_latents([video], golden.settings("t2v"))
    assert difference(latents, golden.tensors["t2v.latents"]) <= TOLERANCE


def test_image_to_video_latents_are_the_published_ones(golden: Golden) -> None:
    image = Image.open(golden.folder / "i2v_image.png")
    prompt = golden.spec["i2v"].get("prompt", golden.spec["prompts"][-1])
    video = VideoInput(prompt, image=image, noise=golden.noise("i2v", first_unit=1))
    latents = golden.pipeline.generate_latents([video], golden.settings("i2v"))
    assert difference(latents, golden.tensors["i2v.latents"]) <= TOLERANCE


def test_encoded_picture_is_the_published_one(golden: Golden) -> None:
    moments = golden.pipeline.vae.encode(picture(golden))
    assert difference(moments.mean, golden.tensors["encode.mean"]) <= TOLERANCE
    assert difference(moments.logvar, golden.tensors["encode.logvar"]) <= TOLERANCE


def test_encoded_clip_is_the_published_one(golden: Golden) -> None:
    clip = golden.tensors["decode.whole"].float().clamp(-1, 1)
    assert difference(golden.pipeline.vae.encode(clip).mean, golden.tensors["encode.clip_mean"]) <= TOLERANCE


def test_whole_decode_is_the_published_one(golden: Golden) -> None:
    pixels = golden.pipeline.vae.decode(vae_latents(golden))
    assert difference(pixels, golden.tensors["decode.whole"]) <= PIXEL_TOLERANCE


def test_decoding_unit_by_unit_gives_the_published_pixels(golden: Golden) -> None:
    theirs, memory = golden.tensors["decode.whole"], None
    first = 0
    for latents in vae_latents(golden).split(1, dim=2):
        frames, memory = golden.pipeline.vae.decode_unit(latents, memory)
        assert isinstance(memory, DecoderMemory)
        assert difference(frames, theirs[:, :, first : first + frames.shape[2]]) <= PIXEL_TOLERANCE
        first += frames.shape[2]
    assert first == theirs.shape[2]


def test_tiled_decode_is_the_published_one(golden: Golden) -> None:
    tiled = {name: re.fullmatch(r"decode\.tiling1\.window\d+\.tile(\d+)", name) for name in golden.tensors}
    sizes = {name: int(match[1]) for name, match in tiled.items() if match}
    if not sizes:
        pytest.skip(f"{golden.folder.name} has no tiled decode")
    for name, size in sizes.items():
        pixels = golden.pipeline.vae.decode(vae_latents(golden), tiling=Tiling(size))
        assert difference(pixels, golden.tensors[name]) <= PIXEL_TOLERANCE
