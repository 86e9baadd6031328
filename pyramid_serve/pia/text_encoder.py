"""Prompts to embeddings, with the CLIP of a Stable Diffusion 1.5 model as transformers saved it.

L = 77 tokens, D width, K layers that may be left out.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pyramid_serve.checkpoints.sources import CheckpointError, Source, resolve
from pyramid_serve.checkpoints.text_encoders import load_encoder
from pyramid_serve.pia.lora import fuse_into_text_encoder
from pyramid_serve.pia.model_files import LoraFile
from pyramid_serve.pia.settings import MAX_CLIP_SKIP
from pyramid_serve.precision import check_finite

TEXT_ENCODER_PART = "text_encoder"


class TextEncoder:
    """The text encoder with its tokenizer. Not thread-safe, since tokenizers are not."""

    def __init__(
        self, source: Source, *, dtype: torch.dtype, device: torch.device, loras: Sequence[LoraFile] = ()
    ) -> None:
        """Load ``text_encoder/`` and ``tokenizer/`` of a base model, with what LoRA files add to it.

        Raises ``CheckpointError``.
        """
        folder = resolve(source, parts=[TEXT_ENCODER_PART, "tokenizer"])
        loaded = load_encoder(folder / TEXT_ENCODER_PART, dtype, device)
        if loaded.architecture != "CLIPTextModel":
            raise CheckpointError(f"{loaded.part}: architecture {loaded.architecture}: must be CLIPTextModel")
        self._model = cast(Any, loaded.model)
        fuse_into_text_encoder(self._model, loras)
        self._tokenizer = loaded.tokenizer
        self._device = device
        self._num_tokens = min(self._tokenizer.model_max_length, self._model.config.max_position_embeddings)

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Embeddings (1 + K, L, D) of a prompt: with all layers, without the last, and so on. What is too long is cut.

        Raises ``NonFiniteError`` where they hold NaN or infinity.
        """
        tokens = self._tokenizer(
            [prompt], padding="max_length", max_length=self._num_tokens, truncation=True, return_tensors="pt"
        )
        # No mask, as the base models were trained.
        output = self._model(input_ids=tokens["input_ids"].to(self._device), output_hidden_states=True)
        num_skips = min(MAX_CLIP_SKIP, len(output.hidden_states) - 1)
        embeds = [output.last_hidden_state[0]]
        embeds += [self._normed(output.hidden_states[-1 - skipped][0]) for skipped in range(1, num_skips + 1)]
        stacked = torch.stack(embeds)
        check_finite(stacked, "prompt embeddings")
        return stacked

    def truncated_at(self, prompt: str) -> int | None:
        """The character at which the encoder stops reading a prompt; None where it reads all of it."""
        (encoding,) = self._tokenizer([prompt], max_length=self._num_tokens, truncation=True).encodings
        return max(end for _, end in encoding.offsets) if encoding.overflowing else None

    def _normed(self, hidden_states: Tensor) -> Tensor:
        """What the last layer is followed by."""
        inner = getattr(self._model, "text_model", self._model)  # transformers 5 has one level less
        normed: Tensor = inner.final_layer_norm(hidden_states)
        return normed
