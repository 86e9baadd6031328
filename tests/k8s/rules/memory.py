"""How much memory replicas take: the table of README.md ("The published checkpoints") as code.

Weights are in bfloat16. What an activation takes is not measured: the allowances are guesses on the safe side.
"""

from dataclasses import dataclass

from deployments.config import ModelOptions

GB = 10**9

_PROCESS_WITH_GPU = 3 * GB
"""Of the host: Python, torch, the CUDA context, and what loading takes beside the weights."""
_PROCESS_WITH_TORCH = 0.8 * GB
_PROCESS = 0.5 * GB
_CONTEXT = GB
"""Of the GPU, for each process that uses it."""


@dataclass(frozen=True)
class Published:
    """Bytes of one model and variant."""

    text_encoder: float
    denoiser: float
    decoder: float
    decoder_memory: float
    """Of one video that the decoder is in the middle of."""
    activations: float
    """Of the denoiser, at its token budget."""


MODELS = {
    ("rain1011/pyramid-flow-miniflux", "384p"): Published(10 * GB, 3.9 * GB, 0.7 * GB, 2.2 * GB, 8 * GB),
    ("rain1011/pyramid-flow-miniflux", "768p"): Published(10 * GB, 3.9 * GB, 0.7 * GB, 8.9 * GB, 20 * GB),
    ("rain1011/pyramid-flow-sd3", "384p"): Published(11 * GB, 4.1 * GB, 0.7 * GB, 2.2 * GB, 8 * GB),
    ("rain1011/pyramid-flow-sd3", "768p"): Published(11 * GB, 4.1 * GB, 0.7 * GB, 8.9 * GB, 20 * GB),
    ("shapes", None): Published(0.1 * GB, 0.1 * GB, 0.1 * GB, 0.1 * GB, 0.1 * GB),
}


def gpu_bytes(model: ModelOptions, role: str) -> float:
    """What a replica of ``TextEncoder``, ``Denoiser`` or ``Decoder`` takes of a GPU."""
    published = MODELS[model.source, model.variant]
    if role == "TextEncoder":
        return _CONTEXT + published.text_encoder + GB  # 16 prompts of 128 tokens
    if role == "Denoiser":
        return _CONTEXT + published.denoiser + published.activations
    config = model.decoder_config
    # While a unit is decoded its old memory and its new one are both there; the old one is within the budget.
    in_work = (config.max_batch_size or 1) * published.decoder_memory
    return _CONTEXT + published.decoder + config.memory_budget_bytes + in_work + 2 * GB


def host_bytes(model: ModelOptions | None, role: str, *, has_gpu: bool) -> float:
    """What a replica takes of its pod's memory, beside the object store. Weights pass through it on their way.

    model: None for a replica that computes nothing.
    """
    if model is None:
        return _PROCESS
    published = MODELS[model.source, model.variant]
    process = _PROCESS_WITH_GPU if has_gpu else _PROCESS_WITH_TORCH
    if role == "TextEncoder":
        return process + published.text_encoder + model.text_encoder_config.cache_bytes
    if role == "Denoiser":
        return process + published.denoiser
    config = model.decoder_config
    return process + published.decoder + config.host_budget_bytes + (0 if has_gpu else config.memory_budget_bytes)
