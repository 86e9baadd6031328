"""What ``diffusers.PIAPipeline`` makes of the tiny checkpoint, kept in files, since the pipeline is deprecated.

``python -m tests.unit.pia.golden`` writes the checkpoint and the outputs again, with whatever diffusers is installed.
"""

import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyramid_serve.pia.schedulers import SCHEDULER_CLASSES
from tests.conftest import TESTS
from tests.unit.pia.tiny import SCHEDULER, save_tiny

FOLDER = TESTS / "golden" / "pia"
CHECKPOINT = FOLDER / "checkpoint"
SEED, HEIGHT, WIDTH = 7, 8, 16
PROMPT, NEGATIVE_PROMPT = "a red cat", "dull"
FREE_U = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}

Case = dict[str, Any]
"""``num_frames`` and the like as settings have them; what is left out is as in ``_PLAIN``."""
_PLAIN: Case = {
    "scheduler": "ddim",
    "num_frames": 16,
    "num_inference_steps": 2,
    "guidance_scale": 7.5,
    "strength": 1.0,
    "motion_scale": 0,
    "free_init": None,
    "free_u": None,
    "clip_skip": 0,
}


def _cases() -> dict[str, Case]:
    schedulers = list(SCHEDULER_CLASSES)
    cases: dict[str, Case] = {f"scheduler {name}": {"scheduler": name, "num_inference_steps": 4} for name in schedulers}
    cases |= {f"strength {name}": {"scheduler": name, "strength": 0.5, "num_inference_steps": 4} for name in schedulers}
    cases |= {f"motion {scale}": {"motion_scale": scale} for scale in range(9)}
    for method in ("butterworth", "ideal", "gaussian"):
        for fast in (False, True):
            free_init = {"num_iters": 2, "method": method, "use_fast_sampling": fast}
            cases[f"free init {method}{' fast' if fast else ''}"] = {"free_init": free_init}
    for name in schedulers:
        cases[f"free init {name}"] = {"scheduler": name, "free_init": {"num_iters": 2}, "num_inference_steps": 3}
    odd = {"num_iters": 3, "order": 2, "spatial_stop_frequency": 0.5, "temporal_stop_frequency": 0.4}
    cases |= {
        "free init odd": {"free_init": odd},
        "free init stop 0": {"free_init": {"num_iters": 2, "spatial_stop_frequency": 0.0}},
        "no guidance": {"guidance_scale": 1.0},
        "free u": {"free_u": FREE_U},
        "clip skip 1": {"clip_skip": 1},
        "clip skip 2": {"clip_skip": 2},
        "8 frames": {"num_frames": 8},
        "32 frames": {"num_frames": 32},
    }
    return {name: {**_PLAIN, **case} for name, case in cases.items()}


CASES = _cases()


def picture() -> Image.Image:
    """A picture of the size of the videos, every pixel another."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def latents_of_pipeline(pipeline: Any, case: Case) -> Tensor:
    """Latents (4, F, h, w) of a case by ``diffusers.PIAPipeline``."""
    return _run(pipeline, case, "latent")[0]


def frames_of_pipeline(pipeline: Any, case: Case) -> Tensor:
    """Frames (F, H, W, 3), uint8."""
    return torch.stack([torch.from_numpy(numpy.array(frame)) for frame in _run(pipeline, case, "pil")[0]])


def _run(pipeline: Any, case: Case, output_type: str) -> Any:
    import diffusers

    config = {
        **SCHEDULER, "beta_schedule": "linear", "steps_offset": 1, "clip_sample": False, "skip_prk_steps": True
    }  # fmt: skip
    pipeline.scheduler = getattr(diffusers, SCHEDULER_CLASSES[case["scheduler"]]).from_config(config)
    pipeline.disable_free_init()
    if case["free_init"] is not None:
        pipeline.enable_free_init(**case["free_init"])
    pipeline.unet.disable_freeu()
    if case["free_u"] is not None:
        pipeline.unet.enable_freeu(**case["free_u"])
    return pipeline(
        image=picture(),
        prompt=PROMPT,
        negative_prompt=NEGATIVE_PROMPT,
        height=HEIGHT,
        width=WIDTH,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type=output_type,
        clip_skip=case["clip_skip"] or None,
        **{
            name: case[name]
            for name in ("num_frames", "num_inference_steps", "guidance_scale", "strength", "motion_scale")
        },
    ).frames


def pipeline_of(checkpoint: Path) -> Any:
    """``diffusers.PIAPipeline`` of the tiny checkpoint."""
    import diffusers

    adapter = diffusers.MotionAdapter.from_pretrained(checkpoint / "motion_adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = diffusers.PIAPipeline.from_pretrained(checkpoint, motion_adapter=adapter, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    encoder_class = type(pipeline.text_encoder)
    if not hasattr(pipeline.text_encoder, "text_model"):  # transformers 5 has one level less, which clip_skip expects
        encoder_class.text_model = property(lambda encoder: encoder)
    return pipeline


def golden() -> dict[str, Tensor]:
    """The latents of each case by its name, and "frames" of the case "motion 0"."""
    return load_file(FOLDER / "outputs.safetensors")


def main() -> None:
    """Write the golden files again."""
    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    CHECKPOINT.mkdir(parents=True)
    save_tiny(CHECKPOINT)
    pipeline = pipeline_of(CHECKPOINT)
    outputs = {name: latents_of_pipeline(pipeline, case).contiguous() for name, case in CASES.items()}
    outputs["frames"] = frames_of_pipeline(pipeline, CASES["motion 0"])
    save_file(outputs, FOLDER / "outputs.safetensors")
    sys.stdout.write(f"{FOLDER}: {len(outputs)} outputs\n")


if __name__ == "__main__":
    main()
