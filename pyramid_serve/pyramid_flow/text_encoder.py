"""Prompts to embeddings, with the text encoders of a checkpoint as transformers saved them.

Shapes: B prompts, L = 128 T5 tokens, D width of T5, P width of the pooled vector.
Which encoders there are is read from their configs: every CLIP gives a pooled vector, and these are joined in the order
of the folders; the T5 gives the sequence. That covers SD3 (CLIP-L, CLIP-G, T5) and miniFLUX (CLIP-L, T5).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyramid_serve.checkpoints.sources import CheckpointError, Source, resolve
from pyramid_serve.checkpoints.text_encoders import load_encoder
from pyramid_serve.precision import check_finite
from pyramid_serve.pyramid_flow.capabilities import DEFAULT_NEGATIVE_PROMPT, DEFAULT_PROMPT_SUFFIX
from pyramid_serve.pyramid_flow.pack import PromptEmbeds

__all__ = ["DEFAULT_NEGATIVE_PROMPT", "DEFAULT_PROMPT_SUFFIX", "MAX_PROMPT_TOKENS", "PromptEmbeds", "TextEncoder"]

MAX_PROMPT_TOKENS = 128
MAX_CLIP_TOKENS = 77
_PARTS = ("text_encoder*", "tokenizer*")


class TextEncoder:
    """The text encoders of one checkpoint. Not thread-safe, since tokenizers are not."""

    def __init__(self, clips: Sequence[tuple[nn.Module, Any]], t5: tuple[nn.Module, Any], device: torch.device) -> None:
        """Each encoder with its tokenizer, all on ``device``."""
        self._clips = tuple(clips)
        self._t5 = t5
        self.device = device

    @classmethod
    def from_pretrained(
        cls,
        source: Source,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "TextEncoder":
        """Load the ``text_encoder*/`` of a checkpoint with their ``tokenizer*/``, and nothing else of it.

        Raises ``CheckpointError`` for an encoder that is missing, broken or of an architecture not known here.
        """
        folder = resolve(source, parts=_PARTS)
        device = torch.device(device)
        loaded = [load_encoder(part, dtype, device) for part in _encoder_folders(folder)]
        clips = [(each.model, each.tokenizer) for each in loaded if each.architecture.startswith("CLIP")]
        t5s = [(each.model, each.tokenizer) for each in loaded if each.architecture.startswith("T5")]
        if not clips or len(t5s) != 1:
            found = ", ".join(f"{each.part.name}: {each.architecture}" for each in loaded)
            raise CheckpointError(f"{folder}: text encoders must be one or more CLIP and one T5; there are {found}")
        return cls(clips, t5s[0], device)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The encoders in the order of their folders' roles, CLIPs first, for offloading."""
        return (*(model for model, _ in self._clips), self._t5[0])

    def encode(self, prompts: Sequence[str]) -> list[PromptEmbeds]:
        """Embed prompts just as they are: the caller adds the suffix.

        Each is encoded by itself, since a product of several may sum up in another order than that of one, so that a
        prompt's embeddings would depend on which others are encoded with it.

        What exceeds 77 tokens for CLIP and 128 for T5 is cut off, as by the published model; each result says where
        T5 stopped. Raises ``NonFiniteError`` where embeddings hold NaN or infinity.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r}: must be a list of strings")
        return [self._encode(prompt) for prompt in prompts]

    def _encode(self, prompt: str) -> PromptEmbeds:
        (embeds,), (mask,), (pooled,) = self.encode_padded([prompt])
        check_finite(embeds, "prompt embeddings")
        check_finite(pooled, "pooled prompt embeddings")
        return PromptEmbeds(embeds[mask.bool()], pooled, self.truncated_at(prompt))

    def truncated_at(self, prompt: str) -> int | None:
        """The character at which T5 stops reading a prompt, after 128 tokens; None where it reads all of it."""
        _, tokenizer = self._t5
        (encoding,) = tokenizer([prompt], max_length=MAX_PROMPT_TOKENS, truncation=True).encodings
        return max(end for _, end in encoding.offsets) if encoding.overflowing else None

    @torch.no_grad()
    def encode_padded(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (B, 128, D) with padding, their mask (B, 128) of 1 and 0, and pooled vectors (B, P)."""
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts={prompts!r}: must be a list of at least one string")
        pooled = torch.cat([self._pool(model, tokenizer, prompts) for model, tokenizer in self._clips], dim=-1)
        model, tokenizer = self._t5
        tokens = self._tokenize(tokenizer, prompts, MAX_PROMPT_TOKENS)
        embeds = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        return embeds, tokens["attention_mask"], pooled

    def _pool(self, model: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        tokens = self._tokenize(tokenizer, prompts, min(tokenizer.model_max_length, MAX_CLIP_TOKENS))
        # No mask, as published: the padding comes after the end token, which is where CLIP is read.
        output = model(input_ids=tokens["input_ids"])
        pooled: Tensor = output.text_embeds if "text_embeds" in output else output.pooler_output
        return pooled

    def _tokenize(self, tokenizer: Any, prompts: Sequence[str], length: int) -> dict[str, Tensor]:
        tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}


def _encoder_folders(folder: Path) -> list[Path]:
    """``text_encoder``, ``text_encoder_2``, ... in the order of their numbers."""

    def number(part: Path) -> int:
        suffix = part.name.removeprefix("text_encoder").removeprefix("_")
        if suffix and not suffix.isdecimal():
            raise CheckpointError(f"{part}: text encoders are named text_encoder, text_encoder_2, ...")
        return int(suffix or 1)

    return sorted((part for part in folder.glob("text_encoder*") if part.is_dir()), key=number)
