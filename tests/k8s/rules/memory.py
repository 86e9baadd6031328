"""How much memory replicas take: the table of README.md ("The published checkpoints"), for the options of a model."""

from deployments.config import ModelOptions
from deployments.planning.published import (
    GB,
    MODELS,
    decoder_gpu_bytes,
    denoiser_gpu_bytes,
    process_bytes,
    text_encoder_gpu_bytes,
)

_PROCESS = 0.5 * GB


def gpu_bytes(model: ModelOptions, role: str) -> float:
    """What a replica of ``TextEncoder``, ``Denoiser`` or ``Decoder`` takes of a GPU."""
    published = MODELS[model.source, model.variant]
    if role == "TextEncoder":
        return text_encoder_gpu_bytes(published)
    if role == "Denoiser":
        return denoiser_gpu_bytes(published)
    config = model.decoder_config
    return decoder_gpu_bytes(
        published, memory_budget_bytes=config.memory_budget_bytes, max_batch_size=config.max_batch_size
    )


def host_bytes(model: ModelOptions | None, role: str, *, has_gpu: bool) -> float:
    """What a replica takes of its pod's memory, beside the object store. Weights pass through it on their way.

    model: None for a replica that computes nothing.
    """
    if model is None:
        return _PROCESS
    published = MODELS[model.source, model.variant]
    process = process_bytes(has_gpu=has_gpu)
    if role == "TextEncoder":
        return process + published.text_encoder + model.text_encoder_config.cache_bytes
    if role == "Denoiser":
        return process + published.denoiser
    config = model.decoder_config
    return process + published.decoder + config.host_budget_bytes + (0 if has_gpu else config.memory_budget_bytes)
