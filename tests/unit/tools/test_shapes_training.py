"""The training of the shapes model: its forward against the library's, its words, its optimiser, going on."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from pyramid_serve.pyramid_flow import flux, schedule
from pyramid_serve.pyramid_flow.history import history_clips
from pyramid_serve.pyramid_flow.pack import ClipSequence, PromptEmbeds
from pyramid_serve.pyramid_flow.shapes import NUM_STAGES
from tools.shapes import draw, rollouts
from tools.shapes.draw import (
    SHRINK_WEIGHT,
    SPIN_WEIGHTS,
    STAR_WEIGHT,
    STILL_WEIGHT,
    LatentClips,
    chances_of,
    latents_of,
    mixed,
    read_files,
    sample_pictures,
    sample_scenes,
)
from tools.shapes.evaluate import Model
from tools.shapes.latents import transformer_latents
from tools.shapes.scenes import render, sample_scene, to_pixels
from tools.shapes.teacher_forcing import forward, pyramid
from tools.shapes.text import TextEncoders, corpus, teach_words, write_clip_tokenizer, write_t5_tokenizer
from tools.shapes.train_transformer import misdrawn, noised
from tools.shapes.training import Options, Training, orthogonalize

CONFIG = {
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "axes_dims_rope": [16, 24, 24],
    "in_channels": 64,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
}


def test_units_that_share_their_history_are_predicted_as_the_packed_forward_does() -> None:
    torch.manual_seed(0)
    model = flux.from_config(CONFIG)
    latents = torch.randn(2, 16, 5, 16, 16)
    embeds, pooled = torch.randn(2, 6, 24), torch.randn(2, 20)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    timesteps = torch.tensor([700.0, 321.0])
    levels = pyramid(latents)
    units = (0, 1, 2, 4)
    for stage in range(3):
        noisy = torch.randn(2, 16, len(units), *levels[stage].shape[3:])
        with torch.no_grad():
            together = forward(
                model,
                stage=stage,
                units=units,
                noisy=noisy,
                history=levels,
                timesteps=timesteps,
                prompt_embeds=embeds,
                prompt_mask=mask,
                pooled=pooled,
            )
            for clip in range(2):
                prompt = PromptEmbeds(embeds[clip, mask[clip]], pooled[clip])
                for index, unit in enumerate(units):
                    clips = (*history_clips(latents[clip, :, :unit], stage), noisy[clip, :, index : index + 1])
                    (alone,) = model([ClipSequence(prompt, clips, float(timesteps[clip]))])
                    torch.testing.assert_close(together[clip, :, index : index + 1], alone, atol=2e-5, rtol=2e-4)


@pytest.mark.slow
def test_the_text_encoders_learn_to_tell_the_four_words(tmp_path: Path) -> None:
    write_clip_tokenizer(tmp_path / "tokenizer", corpus(500))
    write_t5_tokenizer(tmp_path / "tokenizer_2", corpus(500))
    torch.manual_seed(0)
    assert teach_words(TextEncoders(tmp_path), num_steps=60, batch=48) > 0.9


def test_orthogonalized_matrices_keep_their_directions_and_lose_their_sizes() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 48) * torch.tensor([0.01, 1.0, 100.0]).view(3, 1, 1)
    sizes = torch.linalg.svdvals(orthogonalize(matrices).float())
    assert float(sizes.min()) > 0.5 and float(sizes.max()) < 1.5


def test_a_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def train(out: Path, *, stop: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
        options = Options(out, 8, 4, muon_lr=1e-2, adam_lr=1e-2, seed=0, num_threads=1)
        training = Training(model, lambda name, param: param.ndim == 2, options, average=0.9)

        def take(step: int) -> list[torch.Tensor]:
            if step == stop:
                raise KeyboardInterrupt
            loss = (model(torch.arange(6.0) + step) - 1).square().mean()
            loss.backward()
            return [loss.detach()]

        training.run(take, num_warmup=1, log_every=100, save_every=2)
        return torch.cat([values.flatten() for values in training.averaged.values.values()])

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped.pt", stop=5)
    torch.testing.assert_close(train(tmp_path / "stopped.pt"), train(tmp_path / "whole.pt"))


def test_a_training_by_the_clock_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, rates = [0.0], list[float]()
    monkeypatch.setattr("tools.shapes.training.time.monotonic", lambda: now[0])

    def new_training() -> Training:
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        return Training(model, lambda name, param: name == "0.weight", options, average=0.9)

    options = Options(tmp_path / "state.pt", 10, 5, muon_lr=1e-2, adam_lr=1.0, seed=0, num_threads=1, seconds=100.0)
    training = new_training()

    def take(step: int) -> list[torch.Tensor]:
        now[0] += 4.0 if step < 10 else 6.0  # something else came to run beside it
        loss = training.module(torch.ones(3)).square().mean()
        loss.backward()
        return [loss.detach()]

    monkeypatch.setattr(training.optimizers, "step", rates.append)
    training.run(take, num_warmup=2, log_every=100, save_every=100)
    # 10 steps of 4 s, 10 of 6 s; the rate falls over the last 50.
    assert training.step == 20
    assert rates[:3] == [0.5, 1.0, 1.0]
    np.testing.assert_allclose(rates[12:], [left / 50 for left in (48, 42, 36, 30, 24, 18, 12, 6)])
    again = new_training()
    again.run(take, num_warmup=2, log_every=100, save_every=100)
    assert again.step == 20


def test_files_are_drawn_whole_or_in_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "CLIPS_PER_FILE", 1)
    monkeypatch.setattr(draw, "PICTURES_PER_FILE", 2)

    def drawn(name: str, *more: str) -> dict[str, LatentClips]:
        monkeypatch.setattr("sys.argv", ["draw", "--out", str(tmp_path / name), "--clips=3", "--pictures=4", *more])
        draw.main()
        return {kind: read_files(tmp_path / name, kind) for kind in ("clips", "pictures")}

    whole = drawn("whole")
    assert [len(whole[kind].prompts) for kind in ("clips", "pictures")] == [3, 4]
    drawn("shares", "--files", "0", "2")
    assert {path.name for path in (tmp_path / "shares").iterdir()} == {"clips_000.pt", "pictures_000.pt"}
    shares = drawn("shares", "--files", "2", "9")
    for kind in whole:
        assert torch.equal(whole[kind].latents, shares[kind].latents)
        assert whole[kind].prompts == shares[kind].prompts


def test_the_flow_leads_to_the_clean_unit_whatever_the_lower_stage_left() -> None:
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(3, 16, 2, 16, 16, generator=generator)
    one, other = torch.randn(2, 3, 16, 2, 8, 8, generator=generator)
    sigma = torch.tensor([0.0, 0.4, 1.0]).view(-1, 1, 1, 1, 1)
    last = NUM_STAGES - 1
    levels = []
    for below in (one, other):
        level, flow = noised(clean, below, last, sigma, torch.Generator().manual_seed(2))
        torch.testing.assert_close(level - sigma * flow, clean, atol=1e-5, rtol=0)
        levels.append(level)
    apart = (1 - schedule.stage(last).start) * (one - other).repeat_interleave(2, 3).repeat_interleave(2, 4)
    torch.testing.assert_close(levels[0] - levels[1], sigma * apart, atol=1e-5, rtol=0)


def test_a_misdrawn_unit_is_a_little_wrong_where_its_shape_is() -> None:
    scene = sample_scene(np.random.default_rng(2), shape="star", motion="spins")
    units = transformer_latents(to_pixels(render(scene, num_frames=17).transpose(0, 1)[None]))[:, :, 1:]
    units = units.expand(40, -1, -1, -1, -1)
    left = misdrawn(units, units, torch.Generator().manual_seed(3))
    wrong = (left - units).square().mean(dim=(1, 3, 4)).flatten()
    size = (units[:1] - units[:1, :, :, :1, :1]).square().mean()
    assert wrong.min() > 0
    assert wrong.unique().numel() == 80
    assert wrong.median() < size / 4
    corner = (left - units)[..., 0, 0].abs()
    assert corner.max() < 1e-3


def test_the_same_prompts_make_the_same_tokenizers(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_clip_tokenizer(tmp_path / name / "tokenizer", corpus(1000))
        write_t5_tokenizer(tmp_path / name / "tokenizer_2", corpus(1000))
    first, second = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("first", "second")
    )
    assert len(first) == 4 and first == second


def test_what_is_hard_is_drawn_more_often() -> None:
    drawn = [("star", "spins"), ("circle", "spins"), ("star", "stays still"), ("square", "spins")]
    drawn += [("circle", "shrinks")]
    chances = chances_of(drawn)
    weights = [SPIN_WEIGHTS["star"], 1, STAR_WEIGHT * STILL_WEIGHT, SPIN_WEIGHTS["square"], SHRINK_WEIGHT]
    np.testing.assert_allclose(chances / chances[1], weights)
    words = [(scene.shape, scene.motion) for scene in sample_scenes(4000, np.random.default_rng(0))]
    of_squares = [sum(word == (shape, "spins") for word in words) for shape in ("square", "star")]
    np.testing.assert_allclose(of_squares[1] / of_squares[0], SPIN_WEIGHTS["star"] / SPIN_WEIGHTS["square"], rtol=0.2)


def test_half_of_the_clips_are_as_large_as_pictures_and_the_rest_of_any_size() -> None:
    rng = np.random.default_rng(0)
    clips = sample_scenes(4000, rng, motions=["stays still"])
    small = np.array([scene.start_radius < 25.5 for scene in clips if scene.shape == "square"])  # of 18 to 33
    assert small.mean() == pytest.approx(0.25, abs=0.05)
    pictures = [scene for scene in sample_pictures(500, rng) if scene.shape == "square"]
    assert min(scene.start_radius for scene in pictures if scene.motion == "stays still") > 25.5


def test_rollouts_are_taken_as_often_as_told() -> None:
    def clips(drawn: list[tuple[str, str]], mark: float) -> LatentClips:
        latents = torch.full((len(drawn), 16, 1, 4, 4), mark)
        chances = np.arange(1.0, len(drawn) + 1) / np.arange(1.0, len(drawn) + 1).sum()
        return LatentClips(latents, latents + 1, [[shape] for shape, _ in drawn], chances)

    both = mixed(clips([("star", "spins"), ("circle", "grows")], 1), clips([("square", "grows")] * 2, 5), share=0.3)
    assert both.worn is not None
    assert both.latents[:, 0, 0, 0, 0].tolist() == [1, 1, 5, 5]
    assert both.worn[:, 0, 0, 0, 0].tolist() == [2, 2, 6, 6]
    assert both.prompts == [["star"], ["circle"], ["square"], ["square"]]
    np.testing.assert_allclose(both.chances, [0.7 / 3, 0.7 * 2 / 3, 0.3 / 3, 0.3 * 2 / 3])


def test_rollouts_are_put_right_every_few_units_or_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def go_on(
        model: object,
        prompts: list[str],
        seeds: range,
        *,
        num_latent_frames: int,
        histories: list[torch.Tensor],
        **_: object,
    ) -> torch.Tensor:
        """Everything stands where it stood at the end of its history."""
        assert len(set(seeds)) == len(prompts)
        return torch.stack(
            [torch.cat([own, *[own[:, -1:]] * (num_latent_frames - own.shape[1])], 1) for own in histories]
        )

    monkeypatch.setattr(rollouts, "make_latents", go_on)
    monkeypatch.setattr(rollouts, "settings_of", lambda model: None)
    rng = np.random.default_rng(0)
    words = [("star", "grows"), ("star", "stays still"), ("square", "spins")]
    scenes = [
        sample_scene(rng, shape=shape, motion=motion, color="white", background="black") for shape, motion in words
    ]
    rollouts.write_file(tmp_path / "rollouts_000.pt", cast(Model, None), scenes, seed=1)

    found = read_files(tmp_path, "rollouts")
    assert found.worn is not None
    clips = latents_of(map(render, scenes))
    assert torch.equal(found.latents[:2], clips[:2])
    assert found.worn[0, 0, 1:].diff(dim=0).abs().amax((1, 2)).gt(0).nonzero().flatten().tolist() == [3, 7, 11]
    assert torch.equal(found.worn[1:, :, 15], clips[1:, :, 0])
    # The square was seen to stand still: what is asked for has it a unit's turn further than that, in every unit.
    asked, stood = (
        -np.angle(rollouts.corners_of_units(latents[2].float(), "square")) / 4
        for latents in (found.latents, found.worn)
    )
    np.testing.assert_allclose(np.degrees(asked - stood)[2:] % 90, 8 * 0.9, atol=3)


@pytest.mark.parametrize("shape", ["triangle", "square", "star"])
def test_a_clip_is_turned_to_where_the_unit_before_is_seen(shape: str) -> None:
    scene = sample_scene(np.random.default_rng(4), shape=shape, motion="spins", color="red", background="gray")
    ahead = torch.linspace(0, 0.25, 49)
    made, clip = latents_of([render(scene, num_frames=49, turned=turned) for turned in (ahead, 0 * ahead)]).float()
    own, true = (rollouts.corners_of_units(latents, shape) for latents in (made, clip))
    turns = rollouts.turned_after(own, true, shape)
    of_units = [0, *ahead[1:].view(6, 8).mean(1).tolist()]
    np.testing.assert_allclose(turns, [0, *of_units[:-1]], atol=0.04)
