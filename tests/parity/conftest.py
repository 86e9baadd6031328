"""A golden folder, as the parity tests read it."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pyramid_serve.pyramid_flow.noise import RecordedNoise
from pyramid_serve.pyramid_flow.pack import ClipSequence, PromptEmbeds
from pyramid_serve.pyramid_flow.pipeline import PyramidFlow, VideoSettings
from pyramid_serve.pyramid_flow.settings import SamplingSettings
from tests.conftest import golden_folders


@dataclass(frozen=True)
class Golden:
    """What the published code made of a tiny checkpoint: settings, tensors, and the checkpoint itself, loaded."""

    folder: Path
    spec: dict[str, Any]
    tensors: dict[str, Tensor]

    @cached_property
    def pipeline(self) -> PyramidFlow:
        return PyramidFlow.from_pretrained(
            self.folder / "checkpoint", variant=self.spec["variant"], dtype=torch.float32, device="cpu"
        )

    def settings(self, run: str) -> VideoSettings:
        """The settings of the ``t2v`` or the ``i2v`` run; what the latter does not name, it has from the former."""
        spec = dict(self.spec)
        if run == "i2v":  # its steps are those of the units after the picture
            steps = self.spec["i2v"].get("num_inference_steps", self.spec["video_num_inference_steps"])
            spec |= {"video_num_inference_steps": steps, **self.spec["i2v"]}
        sampling = SamplingSettings(
            num_inference_steps=tuple(spec["num_inference_steps"]),
            video_num_inference_steps=tuple(spec["video_num_inference_steps"]),
            guidance_scale=spec["guidance_scale"],
            video_guidance_scale=spec["video_guidance_scale"],
        )
        return self.pipeline.settings(
            width=spec["width"], height=spec["height"], num_latent_frames=spec["temp"], sampling=sampling
        )

    def noise(self, run: str, *, first_unit: int = 0) -> RecordedNoise:
        prefix = f"{run}.block_noise."
        names = sorted((name for name in self.tensors if name.startswith(prefix)), key=lambda n: int(n[len(prefix) :]))
        return RecordedNoise(
            self.tensors[f"{run}.initial_noise"][0], [self.tensors[name][0] for name in names], first_unit
        )

    @property
    def num_dit_calls(self) -> int:
        return len({name.split(".")[1] for name in self.tensors if name.startswith("dit.")})

    def dit_call(self, index: int) -> tuple[list[ClipSequence], Tensor]:
        """One recorded call of the transformer: its batch as sequences, and the predictions (B, 16, T, h, w)."""
        call = {name.removeprefix(f"dit.{index}."): x for name, x in self.tensors.items()}
        clips = [call[f"clip.{i}"] for i in range(sum(name.startswith("clip.") for name in call))]
        sequences = []
        for row, timestep in enumerate(call["timestep"].tolist()):
            valid = call["prompt_attention_mask"][row].bool()
            prompt = PromptEmbeds(call["prompt_embeds"][row][valid], call["pooled_prompt_embeds"][row])
            sequences.append(ClipSequence(prompt, tuple(clip[row] for clip in clips), timestep))
        return sequences, call["output"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        folders = golden_folders(metafunc.config)
        metafunc.parametrize("golden", folders, ids=[f.name for f in folders], indirect=True, scope="session")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Golden:
    folder: Path = request.param
    return Golden(folder, json.loads((folder / "golden.json").read_text()), load_file(folder / "golden.safetensors"))
