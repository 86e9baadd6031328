"""The tiny CLIP and T5 text encoders of the shapes model, and their tokenizers, made from the prompts' own words.

Both tokenizers read the words that the prompts are made of and leave out every other one, with brackets and the like,
so known words mean the same whatever stands around them.
"""

from __future__ import annotations

import json
import logging
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from tools.shapes.scenes import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene, sample_prompt, sample_scene
from tools.shapes.training import rate_at

logger = logging.getLogger(__name__)

WIDTH = 96
_WORDS = {"color": tuple(COLORS), "shape": SHAPES, "motion": MOTIONS, "background": tuple(BACKGROUNDS)}
START, END = "<|startoftext|>", "<|endoftext|>"


def corpus(num_prompts: int = 12000) -> list[str]:
    """Prompts in all their wordings."""
    rng = np.random.default_rng(0)
    return [sample_prompt(sample_scene(rng), rng) for _ in range(num_prompts)]


def words_of(prompts: Sequence[str]) -> Counter[str]:
    """How often each word is in the prompts, in lower case."""
    return Counter(word for prompt in prompts for word in re.findall(r"[a-z]+", prompt.lower()))


def known_words_only(words: Iterable[str]) -> normalizers.Normalizer:
    """In lower case, only these words, with commas, full stops and semicolons between them, as in the corpus."""
    known = "|".join(sorted(words))
    rules = [
        (r"\d*\.?\d+", " "),
        (r"[!?]", "."),
        (r":(?=\s*[a-z])", ","),
        (r"(?<!\bfive)-|-(?!pointed\b)", " "),  # a hyphen stands in "five-pointed" alone
        (r"[^a-z,.;\-]+", " "),
        (rf"\b(?!(?:{known})\b)[a-z]+\b", ""),
        (r"(?<![a-z])-|-(?![a-z])", " "),
        (r"[,.;](?=\s*[,.;])", ""),  # of marks with nothing between them the last is left
        (r"\s+(?=[,.;])", ""),
        (r"(?<=[,.;])(?=[a-z])", " "),
        (r"\s+", " "),
        (r"^[ ,.;]+|[ ,;]+$", ""),
    ]
    replace = [normalizers.Replace(Regex(pattern), content) for pattern, content in rules]
    return normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), *replace])


def write_t5_tokenizer(folder: Path, prompts: Sequence[str]) -> None:
    """A unigram tokenizer of the prompts' words and of all single characters; it leaves out all other words."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = words_of(prompts)
    words = [f"\u2581{word}" for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    characters = ["\u2581", *string.ascii_lowercase, *string.digits, *string.punctuation]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(word, -2.0) for word in words] + [(c, -4.0) for c in characters]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = known_words_only(counts)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Split(Regex(r"[^\w\u2581]"), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 128,
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
    )


def write_clip_tokenizer(folder: Path, prompts: Sequence[str]) -> None:
    """A byte-level BPE tokenizer as CLIP's, trained on the prompts; it leaves out words that are not in them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>", fuse_unk=False))
    tokenizer.normalizer = normalizers.Lowercase()  # the merges are learned from whole prompts
    tokenizer.pre_tokenizer = _clip_pre_tokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1600,
        initial_alphabet=alphabet,
        # Known from the start: else their ids, by which ties between merges are broken, are others each time.
        special_tokens=[f"{character}</w>" for character in alphabet],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([*prompts, *alphabet], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in trained["merges"]]
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(merge.split(" ")) for merge in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    save_clip_tokenizer(folder, vocabulary, merges, words_of(prompts))


def save_clip_tokenizer(folder: Path, vocabulary: dict[str, int], merges: Sequence[str], words: Iterable[str]) -> None:
    """The tokenizer of a vocabulary, the merges that make its tokens, and the words that it reads."""
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    known = Tokenizer(models.BPE(vocabulary, pairs, unk_token=END, end_of_word_suffix="</w>", fuse_unk=False))
    known.normalizer = known_words_only(words)
    known.pre_tokenizer = _clip_pre_tokenizer()
    known.decoder = decoders.ByteLevel()
    known.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        pair=f"{START} $A {END} {START} $B {END}",
        special_tokens=[(token, vocabulary[token]) for token in (START, END)],
    )
    known.add_special_tokens([START, END])
    known.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 77,
            "bos_token": START,
            "eos_token": END,
            "unk_token": END,
            "pad_token": END,
        },
    )


def _clip_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@dataclass(frozen=True)
class Tokens:
    """Prompts as both encoders read them: CLIP's ids (B, Lc), T5's ids (B, L) and which of these are the prompt's."""

    clip: Tensor
    t5: Tensor
    t5_mask: Tensor

    def __getitem__(self, rows: Tensor) -> Tokens:
        return Tokens(self.clip[rows], self.t5[rows], self.t5_mask[rows])

    @classmethod
    def concatenated(cls, parts: Sequence[Tokens]) -> Tokens:
        """All rows, made as long as the longest by repeating their last tokens, an end or a padding."""
        num_clip, num_t5 = (max(x.shape[1] for x in xs) for xs in ([p.clip for p in parts], [p.t5 for p in parts]))
        return cls(
            torch.cat([_lengthened(part.clip, num_clip) for part in parts]),
            torch.cat([_lengthened(part.t5, num_t5) for part in parts]),
            torch.cat([F.pad(part.t5_mask, (0, num_t5 - part.t5_mask.shape[1])) for part in parts]),
        )

    def shortened(self, length: int) -> Tokens:
        """With no more of T5's tokens than that."""
        return Tokens(self.clip, self.t5[:, :length], self.t5_mask[:, :length])

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(self.clip.to(device), self.t5.to(device), self.t5_mask.to(device))


def _lengthened(ids: Tensor, length: int) -> Tensor:
    return torch.cat([ids, ids[:, -1:].expand(-1, length - ids.shape[1])], dim=1)


class TextEncoders(nn.Module):
    """Both encoders and their tokenizers."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds `tokenizer/` and `tokenizer_2/`, see the `write_` functions."""
        super().__init__()
        self.clip_tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.t5_tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / "tokenizer_2")
        begin, end = (cast(int, self.clip_tokenizer.convert_tokens_to_ids(token)) for token in (START, END))
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.clip_tokenizer),
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                projection_dim=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                bos_token_id=begin,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(self.t5_tokenizer),
                d_model=WIDTH,
                d_ff=2 * WIDTH,
                d_kv=24,
                num_heads=4,
                num_layers=2,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=0,
                eos_token_id=1,
                is_encoder_decoder=False,
                use_cache=False,
            )
        )

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        clip = self.clip_tokenizer(list(prompts), padding=True, truncation=True, max_length=77, return_tensors="pt")
        t5 = self.t5_tokenizer(list(prompts), padding=True, truncation=True, max_length=128, return_tensors="pt")
        return Tokens(clip["input_ids"], t5["input_ids"], t5["attention_mask"].bool())

    def encode(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """T5's hidden states (B, L, D) and CLIP's pooled vectors (B, D)."""
        pooled: Tensor = self.clip(input_ids=tokens.clip).pooler_output
        embeds: Tensor = self.t5(input_ids=tokens.t5, attention_mask=tokens.t5_mask.long()).last_hidden_state
        return embeds, pooled

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """T5's hidden states (B, L, D), their mask (B, L) and CLIP's pooled vectors (B, D)."""
        tokens = self.tokenize(prompts).to(self.t5.device)
        embeds, pooled = self.encode(tokens)
        return embeds, tokens.t5_mask, pooled

    def save(self, folder: Path) -> None:
        """Write `text_encoder` and `text_encoder_2` in bfloat16, as transformers saves them."""
        for name, model in (("text_encoder", self.clip), ("text_encoder_2", self.t5)):
            copy: PreTrainedModel = deepcopy(model).bfloat16()
            copy.save_pretrained(folder / name)


def load_encoders(checkpoint: Path) -> TextEncoders:
    """Both encoders of a checkpoint, in float32, and their tokenizers."""
    encoders = TextEncoders(checkpoint)
    clip = CLIPTextModel.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32)
    t5 = T5EncoderModel.from_pretrained(checkpoint / "text_encoder_2", dtype=torch.float32)
    encoders.clip.load_state_dict(clip.state_dict())
    encoders.t5.load_state_dict(t5.state_dict())
    return encoders


def sample_prompts(num_prompts: int, rng: np.random.Generator) -> tuple[list[str], list[Scene]]:
    """Prompts in all words, and their scenes."""
    scenes = [sample_scene(rng) for _ in range(num_prompts)]
    return [sample_prompt(scene, rng) for scene in scenes], scenes


def new_heads() -> nn.ModuleList:
    """Linear heads that tell the four words from CLIP's pooled vector and from the mean of T5's hidden states."""
    return nn.ModuleList([nn.Linear(WIDTH, sum(len(words) for words in _WORDS.values())) for _ in range(2)])


def mark(heads: nn.ModuleList, encoded: tuple[Tensor, Tensor, Tensor], scenes: Sequence[Scene]) -> tuple[Tensor, float]:
    """Cross entropy of both heads' answers for what `TextEncoders` gives, and the share of them that is right."""
    embeds, mask, pooled = encoded
    mean = (embeds * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    (clip_loss, clip_share), (t5_loss, t5_share) = (
        _mark_head(head(vectors), scenes) for head, vectors in zip(heads, (pooled, mean), strict=True)
    )
    return clip_loss + t5_loss, (clip_share + t5_share) / 2


def _mark_head(logits: Tensor, scenes: Sequence[Scene]) -> tuple[Tensor, float]:
    """Cross entropy of a head's answers (B, sum of words), added over the kinds of word; the share that is right."""
    losses, shares = [], []
    parts = logits.split([len(words) for words in _WORDS.values()], dim=1)
    for (kind, words), part in zip(_WORDS.items(), parts, strict=True):
        answers = torch.tensor([words.index(getattr(scene, kind)) for scene in scenes])
        losses.append(F.cross_entropy(part, answers))
        shares.append((part.argmax(1) == answers).float().mean())
    return torch.stack(losses).sum(), float(torch.stack(shares).mean())


def teach_words(encoders: TextEncoders, *, num_steps: int, batch: int = 96, lr: float = 1e-3, seed: int = 3) -> float:
    """Have the pooled vector and the mean of the hidden states tell a prompt's four words, by linear heads.

    Returns the share of right answers in the last step.
    """
    heads = new_heads()
    optimizer = torch.optim.AdamW(chain(encoders.parameters(), heads.parameters()), lr=lr, weight_decay=0.0, fused=True)
    share = 0.0
    for step in range(num_steps):
        rng = np.random.default_rng((seed, step))
        prompts, scenes = sample_prompts(batch, rng)
        loss, share = mark(heads, encoders(prompts), scenes)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_at(step, num_steps=num_steps, num_warmup=20, num_decay=num_steps // 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            logger.info("words: step %d loss %.3f, %.1f %% right", step + 1, float(loss.detach()), 100 * share)
    return share


def _write(path: Path, content: dict[str, object] | dict[str, int] | dict[str, str]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
