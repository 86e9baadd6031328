"""LoRA files (arXiv 2106.09685), which are added to a model's weights when it is loaded, and then forgotten.

Files of diffusers and of kohya are read, as diffusers and peft read them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyramid_serve.checkpoints.sources import CheckpointError
from pyramid_serve.pia.model_files import LoraFile
from pyramid_serve.reasons import first_line

_UNET = "unet"
_TEXT_ENCODER = "text_encoder"
_DOWN = ("lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight")
"""How the keys of the first of a layer's two matrices end; there is one for each layer."""


def fuse_into_unet(unet: Any, loras: Sequence[LoraFile]) -> None:
    """Add LoRA files to a UNet. Raises ``CheckpointError`` for one that does not fit, and where peft is missing."""
    for lora in loras:
        _fuse(_read(lora), _UNET, unet, lora.scale)


def fuse_into_text_encoder(encoder: Any, loras: Sequence[LoraFile]) -> None:
    """The same for the text encoder, which many files leave as it is."""
    for lora in loras:
        _fuse(_read(lora), _TEXT_ENCODER, encoder, lora.scale)


class _Content(NamedTuple):
    """What a file has: weights under the names of diffusers, and what each layer is scaled by in those of kohya."""

    path: Path
    weights: Mapping[str, Any]
    alphas: Mapping[str, Any] | None

    def num_layers(self, part: str) -> int:
        return sum(name.startswith(f"{part}.") and name.endswith(_DOWN) for name in self.weights)


def _loader() -> Any:
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin  # here, since it takes seconds to import

    return StableDiffusionLoraLoaderMixin


def _read(lora: LoraFile) -> _Content:
    path = lora.path()
    if not path.is_file():
        raise CheckpointError(f"{path}: no such LoRA file")
    try:
        import peft  # noqa: F401  # diffusers needs it
    except ImportError:
        raise CheckpointError(f"{path}: needs peft: pip install 'pyramid-serve[lora]'") from None
    try:
        weights, alphas = _loader().lora_state_dict(str(path.parent), weight_name=path.name, local_files_only=True)
    except Exception as error:  # safetensors and diffusers raise many classes
        raise CheckpointError(f"{path}: no LoRA file: {type(error).__name__}: {first_line(error)}") from error
    content = _Content(path, weights, alphas)
    if not content.num_layers(_UNET) + content.num_layers(_TEXT_ENCODER):
        raise CheckpointError(f"{path}: has no layers of LoRA for Stable Diffusion 1.5")
    return content


def _fuse(content: _Content, part: str, model: Any, scale: float) -> None:
    """Add what a file has for a part of a model, so many times."""
    from diffusers.utils import peft_utils
    from peft.tuners.tuners_utils import BaseTunerLayer

    path, weights, alphas = content
    num_layers = content.num_layers(part)
    if not num_layers:
        return
    try:
        if part == _UNET:
            _loader().load_lora_into_unet(weights, alphas, model)
        else:
            _loader().load_lora_into_text_encoder(weights, alphas, model, prefix=part)
    except Exception as error:  # peft and torch raise many classes
        raise CheckpointError(f"{path}: does not fit the model: {type(error).__name__}: {first_line(error)}") from error
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if len(layers) != num_layers:
        raise CheckpointError(f"{path}: does not fit the model: {len(layers)} of its {num_layers} layers are in it")
    for layer in layers:
        layer.scale_layer(scale)
        layer.merge()
    remove: Any = peft_utils.recurse_remove_peft_layers
    remove(model)
    # What tells the model that it has LoRA; without it a second file would be its second adapter.
    del model.peft_config
    model._hf_peft_config_loaded = False
