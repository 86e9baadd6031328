"""Teach the text encoders of a checkpoint further words: `python -m tools.shapes.more_words --out DIR`.

Training from nothing teaches all words of `scenes.py` at once. This is for a checkpoint whose transformer is trained
already: prompts in words that it knew are encoded as before, and those in new words so that linear heads which tell the
four words from the old encoders tell them from the new ones too. Writes a whole checkpoint to start the transformer's
further training from.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tools.shapes.evaluate import CHECKPOINT
from tools.shapes.phrases import PHRASES
from tools.shapes.text import (
    TextEncoders,
    corpus,
    load_encoders,
    mark,
    new_heads,
    sample_prompts,
    write_clip_tokenizer,
    write_t5_tokenizer,
)
from tools.shapes.training import rate_at

logger = logging.getLogger(__name__)

NUM_PROMPTS = 192  # in a step
NUM_HEAD_STEPS = 300
NUM_STEPS = 800


def is_known(prompt: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether each word of a prompt is in the vocabulary of T5's tokenizer."""
    vocabulary = tokenizer.get_vocab()
    return all(f"\u2581{word}" in vocabulary for word in re.findall(r"[a-z]+", prompt.lower()))


@torch.no_grad()
def copy_weights(old: TextEncoders, new: TextEncoders) -> None:
    """Everything that the old encoders know; a new token begins as the mean of the old ones that spell it. In place."""
    for old_encoder, new_encoder, old_tokenizer, new_tokenizer in (
        (old.clip, new.clip, old.clip_tokenizer, new.clip_tokenizer),
        (old.t5, new.t5, old.t5_tokenizer, new.t5_tokenizer),
    ):
        tokens, table = (cast(nn.Embedding, one.get_input_embeddings()).weight for one in (old_encoder, new_encoder))
        own, others = new_encoder.state_dict(), old_encoder.state_dict()
        assert own.keys() == others.keys()
        for name, value in own.items():
            if value.shape == others[name].shape:
                value.copy_(others[name])
        known = old_tokenizer.get_vocab()
        for token, index in new_tokenizer.get_vocab().items():
            word = token.removeprefix("\u2581").removesuffix("</w>")
            spelt = [known[token]] if token in known else old_tokenizer(word, add_special_tokens=False)["input_ids"]
            table[index] = tokens[spelt].mean(0) if spelt else tokens.mean(0)


def fit_heads(encoders: TextEncoders, *, num_steps: int, seed: int) -> nn.ModuleList:
    """Heads that tell the words from encoders as they are, by prompts in words that those know."""
    heads = new_heads()
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(num_steps):
        prompts, scenes = sample_prompts(NUM_PROMPTS, np.random.default_rng((seed, step)))
        known = [i for i, prompt in enumerate(prompts) if is_known(prompt, encoders.t5_tokenizer)]
        with torch.no_grad():
            encoded = encoders([prompts[i] for i in known])
        loss, share = mark(heads, encoded, [scenes[i] for i in known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logger.info("heads on the old encoders and words: %.1f %% right", 100 * share)
    return heads.requires_grad_(False)


def measure_distance(old: TextEncoders, new: TextEncoders, prompts: list[str]) -> Tensor:
    """Squared error of the new encoders over the variance of what the old ones give, added over T5's and CLIP's."""
    with torch.no_grad():
        embeds, mask, pooled = old(prompts)
    new_embeds, _, new_pooled = new(prompts)
    pairs = ((new_embeds[mask], embeds[mask]), (new_pooled, pooled))
    distance: Tensor = torch.stack([F.mse_loss(one, other) / other.var() for one, other in pairs]).sum()
    return distance


def teach(old: TextEncoders, new: TextEncoders, heads: nn.ModuleList, *, num_steps: int, seed: int) -> None:
    """Have the heads tell all prompts' words from the new encoders, and known prompts be encoded as by the old ones."""
    optimizer = torch.optim.AdamW(new.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    for step in range(num_steps):
        prompts, scenes = sample_prompts(NUM_PROMPTS, np.random.default_rng((seed, step)))
        known = [prompt for prompt in prompts if is_known(prompt, old.t5_tokenizer)]
        loss, share = mark(heads, new(prompts), scenes)
        distance = measure_distance(old, new, known)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate_at(step, num_steps=num_steps, num_warmup=20, num_decay=num_steps // 2)
        optimizer.zero_grad()
        (loss + 10 * distance).backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            logger.info("step %d: %.1f %% right, away by %.4f", step + 1, 100 * share, float(distance.detach()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(args.seed)
    shutil.copytree(args.checkpoint, args.out)
    write_clip_tokenizer(args.out / "tokenizer", corpus())
    write_t5_tokenizer(args.out / "tokenizer_2", corpus())
    old, new = load_encoders(args.checkpoint), TextEncoders(args.out)
    copy_weights(old, new)
    heads = fit_heads(old, num_steps=NUM_HEAD_STEPS, seed=args.seed)
    teach(old, new, heads, num_steps=NUM_STEPS, seed=args.seed + 1)
    new.save(args.out)
    rng = np.random.default_rng(args.seed)
    scenes, prompts = [phrase.scene(rng) for phrase in PHRASES], [phrase.prompt for phrase in PHRASES]
    for name, encoders in (("old", old), ("new", new)):
        with torch.no_grad():
            _, share = mark(heads, encoders(prompts), scenes)
        logger.info(
            "words of a person's own prompts that are told right from the %s encoders: %.1f %%", name, 100 * share
        )


if __name__ == "__main__":
    main()
