"""The TextEncoder deployment: prompts to embeddings, in batches, with a cache of what was encoded before."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from cachetools import LRUCache
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from ray import serve

from deployments.pools.model_config import ModelConfig, reported_if_not_finite
from deployments.pools.tensors import all_to_wire
from deployments.pools.wire import EncodedPrompt
from deployments.telemetry.forwards import EngineStats, Forward, ReplicaStats, replica_stats
from deployments.telemetry.logs import configure_logging
from deployments.telemetry.replicas import CallMetrics, ForwardMetrics, replica_name

MIB = 2**20


class TextEncoderConfig(ModelConfig):
    max_batch_size: PositiveInt = 16
    """Prompts of one forward."""
    batch_wait_timeout_s: NonNegativeFloat = 0.01
    """How long a prompt waits for others."""
    cache_bytes: NonNegativeInt = 256 * MIB
    """Embeddings kept; one takes at most 1 MiB with the published models in bfloat16."""


def embeds_cache(num_bytes: int) -> LRUCache[str, EncodedPrompt]:
    """Embeddings by prompt, of ``num_bytes`` at most; the least recently used are dropped first."""
    return LRUCache(num_bytes, getsizeof=lambda embeds: embeds.num_bytes)


def keep(cache: LRUCache[str, EncodedPrompt], prompt: str, embeds: EncodedPrompt) -> None:
    """Keep the embeddings of a prompt, unless they alone are larger than the cache."""
    if embeds.num_bytes <= cache.maxsize:
        cache[prompt] = embeds


class TextEncoder:
    """Holds the text part of a model."""

    def __init__(self, config: TextEncoderConfig) -> None:
        """Loads the part and encodes the empty prompt, so the first call finds everything set up."""
        self._replica = replica_name()
        configure_logging(self._replica)
        config.set_up_torch()
        self._part = config.model_family.load_text(config.part_source())
        self._computed = config.computed_as("text_encoder", self._part.dtype)
        with reported_if_not_finite():
            self._embed([""])
        self._cache = embeds_cache(config.cache_bytes)
        self._thread = config.compute_thread("text_encoder")
        self._calls, self._metrics = CallMetrics(), ForwardMetrics()
        self._stats = EngineStats()
        self._num_waiting = 0
        batched = serve.batch(max_batch_size=config.max_batch_size, batch_wait_timeout_s=config.batch_wait_timeout_s)
        self._encode_batched = batched(self._encode_batch)

    async def encode(self, prompt: str) -> EncodedPrompt:
        """The embeddings of a prompt just as it stands: its suffix is the caller's to add.

        Raises ``DeviceFailedError``.
        """
        with self._calls.of("encode"):
            cached = self._cache.get(prompt)
            if cached is not None:
                return cached
            self._num_waiting += 1
            try:
                embeds: EncodedPrompt | Exception = await self._encode_batched(prompt)
                if isinstance(embeds, Exception):
                    raise embeds
                return embeds
            finally:
                self._num_waiting -= 1

    async def stats(self) -> ReplicaStats:
        return replica_stats(self._replica, replace(self._stats, num_present=self._num_waiting))

    async def check_health(self) -> None:
        self._thread.check()

    async def _encode_batch(self, prompts: list[str]) -> list[EncodedPrompt | Exception]:
        """Each prompt's embeddings, or the error that it alone has; equal prompts, and those that a batch before this
        one has brought, are encoded once.
        """
        found: dict[str, EncodedPrompt | Exception] = {}
        for prompt in prompts:
            cached = self._cache.get(prompt)
            if cached is not None:
                found[prompt] = cached
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if missing:
            started = time.time()
            encoded = await self._thread.run(lambda: self._encode(missing))
            self._record(Forward(len(missing), 0, started, time.time()))
            for prompt, result in zip(missing, encoded, strict=True):
                found[prompt] = result
                if not isinstance(result, Exception):
                    keep(self._cache, prompt, result)
        return [found[prompt] for prompt in prompts]

    def _encode(self, prompts: Sequence[str]) -> list[EncodedPrompt | Exception]:
        """As ``_embed``, but a prompt that fails does not fail those beside it."""
        try:
            return [*self._embed(prompts)]
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                self._metrics.out_of_memory()
            if len(prompts) == 1:
                return [error.with_traceback(None)]
        return [embeds for prompt in prompts for embeds in self._encode([prompt])]

    def _embed(self, prompts: Sequence[str]) -> list[EncodedPrompt]:
        return [
            EncodedPrompt(all_to_wire(encoded.tensors), encoded.truncated_at, self._computed)
            for encoded in self._part.encode(prompts)
        ]

    def _record(self, forward: Forward) -> None:
        self._stats = replace(
            self._stats,
            num_forwards=self._stats.num_forwards + 1,
            num_slots=self._stats.num_slots + forward.num_slots,
            busy_seconds=self._stats.busy_seconds + forward.seconds,
        )
        self._metrics.record(forward, replace(self._stats, queue_depth=max(self._num_waiting - forward.num_slots, 0)))
