"""The published models and cards: what their replicas take of memory, and how much arithmetic their videos are.

Weights are in bfloat16. What an activation takes is not measured: the allowances are guesses on the safe side.
"""

from dataclasses import dataclass
from pathlib import Path

from deployments.planning.stage_times import StageTimes

GB = 10**9

_PROCESS_WITH_GPU = 3 * GB
"""Of the host: Python, torch, the CUDA context, and what loading takes beside the weights."""
_PROCESS_WITH_TORCH = 0.8 * GB
_CONTEXT = GB
"""Of the GPU, for each process that uses it."""


@dataclass(frozen=True)
class Arithmetic:
    """FLOP of a transformer: n tokens of one sequence take ``token`` n + ``token_squared`` n^2."""

    token: float
    token_squared: float


SD3 = Arithmetic(1.375e9, 8.77e4)
MINIFLUX = Arithmetic(2.155e9, 1.082e5)
DECODER_FIRST_PIXEL_FLOP = 4.44e7
"""Of each pixel of the first unit, which is one frame; from ``python -m benchmarks.library flops``, as all of these."""
DECODER_PIXEL_FLOP = 1.94e7
_TEXT_ENCODER_FLOP = 2 * 4.8e9 * 128
"""Of a prompt: two for each parameter and token."""


@dataclass(frozen=True)
class Published:
    """One model and variant: bytes of its parts, and its arithmetic where it is known."""

    text_encoder: float
    denoiser: float
    decoder: float
    decoder_memory: float
    """Of one video that the decoder is in the middle of."""
    activations: float
    """Of the denoiser, at its token budget."""
    arithmetic: Arithmetic | None = None


MODELS = {
    ("rain1011/pyramid-flow-miniflux", "384p"): Published(10 * GB, 3.9 * GB, 0.7 * GB, 2.2 * GB, 8 * GB, MINIFLUX),
    ("rain1011/pyramid-flow-miniflux", "768p"): Published(10 * GB, 3.9 * GB, 0.7 * GB, 8.9 * GB, 20 * GB, MINIFLUX),
    ("rain1011/pyramid-flow-sd3", "384p"): Published(11 * GB, 4.1 * GB, 0.7 * GB, 2.2 * GB, 8 * GB, SD3),
    ("rain1011/pyramid-flow-sd3", "768p"): Published(11 * GB, 4.1 * GB, 0.7 * GB, 8.9 * GB, 20 * GB, SD3),
    ("shapes", None): Published(0.1 * GB, 0.1 * GB, 0.1 * GB, 0.1 * GB, 0.1 * GB),
}

_CONFIGS = Path(__file__).parent / "configs"
"""The configurations of the published transformers, so that no network is needed to plan for them."""


def published_of(model: str, variant: str | None) -> Published | None:
    """The published model that a Hub id, or a copy of it in a folder or at a URL of the same name, stands for."""
    name = _published_name(model)
    return None if name is None else MODELS.get((name, variant))


def check_variant(model: str, variant: str | None) -> None:
    """Raise ``ValueError`` naming the variants of a published model on the Hub where this is not one of them."""
    variants = [known for name, known in MODELS if name == model and known is not None]
    if not variants or variant in variants or Path(model).is_dir():
        return
    given = "missing" if variant is None else variant
    raise ValueError(f"--variant {given}: must be one of {', '.join(variants)} for --model {model}")


def config_source(model: str, variant: str | None) -> str:
    """Where a model's configuration is read: in the package for a published one that is not at hand as a folder."""
    folder = _CONFIGS / _last(model)
    is_known = published_of(model, variant) is not None and folder.is_dir()
    return str(folder) if is_known and not Path(model).is_dir() else model


def _published_name(model: str) -> str | None:
    """The key in ``MODELS`` of a model. An id of another owner is another model, whatever its last name."""
    is_copy = "://" in model or model.startswith(("/", "./", "../", "~")) or Path(model).is_dir()
    for name, _ in MODELS:
        if model == name or (is_copy and _last(model) == _last(name)):
            return name
    return None


def _last(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


def text_encoder_gpu_bytes(published: Published) -> float:
    """What a replica of the text encoder takes of a GPU."""
    return _CONTEXT + published.text_encoder + GB  # 16 prompts of 128 tokens


def denoiser_gpu_bytes(published: Published) -> float:
    """What a replica of the denoiser takes of a GPU."""
    return _CONTEXT + published.denoiser + published.activations


def decoder_gpu_bytes(published: Published, *, memory_budget_bytes: float, max_batch_size: int | None) -> float:
    """What a replica of the decoder takes of a GPU with these settings.

    While a unit is decoded its old memory and its new one are both there; the old one is within the budget.
    """
    in_work = (max_batch_size or 1) * published.decoder_memory
    return _CONTEXT + published.decoder + memory_budget_bytes + in_work + 2 * GB


def process_bytes(*, has_gpu: bool) -> float:
    """What a replica with torch takes of its pod's memory, beside weights and what it keeps."""
    return _PROCESS_WITH_GPU if has_gpu else _PROCESS_WITH_TORCH


@dataclass(frozen=True)
class Card:
    """A GPU: its bfloat16 matrix rate in FLOP a second, its bytes, and where the rate is from."""

    rate: float
    num_bytes: float
    rate_source: str


CARDS = {
    "H200": Card(792e12, 141 * GB, "measured"),
    "H100": Card(989e12, 80 * GB, "data sheet, dense"),
    "A100": Card(312e12, 80 * GB, "data sheet, dense"),
    "L40S": Card(362e12, 48 * GB, "data sheet, dense"),
}
SHARE = 0.22
"""Of the matrix rate that the transformer reached on an H200 before it was compiled (docs/performance.md)."""
DECODER_SHARE = 0.41
FLOOR_S = 0.038
"""Of a step on an H200, however small: the time to launch it from Python, before it was compiled."""
_HOST_LINK = 20 * GB
"""Bytes a second between a card and its host: a guess for PCIe 4."""


def times_of_card(
    published: Published,
    arithmetic: Arithmetic,
    card: Card,
    *,
    name: str,
    share: float,
    decoder_share: float,
    floor_s: float,
) -> StageTimes:
    """The times by arithmetic on a card: ``share`` of its matrix rate, and at least ``floor_s`` a step.

    What lies between forwards was measured by ``pyramid-serve bench`` on two CPU cores, and the making of fragments on
    one (docs/performance.md, "Encoding a unit").
    """
    rate, decoder_rate = card.rate * share, card.rate * decoder_share
    return StageTimes(
        source=f"arithmetic at {share:.0%} (decoder {decoder_share:.0%}) of {name}'s {card.rate / 1e12:.0f} TFLOP/s "
        f"({card.rate_source}), at least {1000 * floor_s:g} ms a step",
        num_text_tokens=128,
        forward_floor_s=floor_s,
        forward_fixed_s=0.0,
        unit_s=0.0,
        token_s=arithmetic.token / rate,
        token_squared_s=arithmetic.token_squared / rate,
        decode_fixed_s=0.0,
        first_pixel_s=DECODER_FIRST_PIXEL_FLOP / decoder_rate,
        pixel_s=DECODER_PIXEL_FLOP / decoder_rate,
        memory_move_s=published.decoder_memory / _HOST_LINK,
        encode_s=max(_TEXT_ENCODER_FLOP / rate, floor_s),
        save_fixed_s=0.004,
        save_pixel_s=2.7e-8,
        begin_s=0.1,
        handover_s=0.06,
        join_s=0.2,
    )
