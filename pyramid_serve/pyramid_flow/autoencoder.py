"""The causal video VAE, streaming: pixels <-> latents, a chunk at a time.

B videos, C channels, F pixel frames, T latent frames, H W in pixels, h w = H / 8, W / 8.

One latent frame decodes to 1 pixel frame at the start of a video and to 8 after that. What a unit needs of the units
before it is its ``DecoderMemory``, which the caller holds. Source: the published checkpoints; arXiv 2410.05954, 4.1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pyramid_serve.checkpoints.configs import Count, Features, Flag, Layers, parse_config
from pyramid_serve.checks import whole_multiple
from pyramid_serve.pyramid_flow.causal_conv import Carry, CausalConv3d, LayerFrames
from pyramid_serve.pyramid_flow.shapes import SPATIAL_FACTOR, TEMPORAL_FACTOR, num_latent_frames_of
from pyramid_serve.pyramid_flow.vae_blocks import NORM_EPS, DownBlock, FrameGroupNorm, MidBlock, UpBlock

_Sizes = Annotated[tuple[Features, ...], Field(min_length=1, max_length=16)]
_Layers = Annotated[tuple[Layers, ...], Field(min_length=1, max_length=16)]
_Flags = Annotated[tuple[Flag, ...], Field(min_length=1, max_length=16)]


class VAEConfig(BaseModel):
    """The sizes in a published ``config.json`` of the VAE, all from the outermost block inwards."""

    model_config = ConfigDict(frozen=True)

    latent_channels: Features = Field(validation_alias="encoder_out_channels")
    encoder_channels: _Sizes = Field(validation_alias="encoder_block_out_channels")
    encoder_layers: _Layers = Field(validation_alias="encoder_layers_per_block")
    encoder_spatial: _Flags = Field(validation_alias="encoder_spatial_down_sample")
    encoder_temporal: _Flags = Field(validation_alias="encoder_temporal_down_sample")
    encoder_num_groups: Count = Field(validation_alias="encoder_norm_num_groups")
    decoder_channels: _Sizes = Field(validation_alias="decoder_block_out_channels")
    decoder_layers: _Layers = Field(validation_alias="decoder_layers_per_block")
    decoder_spatial: _Flags = Field(validation_alias="decoder_spatial_up_sample")
    decoder_temporal: _Flags = Field(validation_alias="decoder_temporal_up_sample")
    decoder_num_groups: Count = Field(validation_alias="decoder_norm_num_groups")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Raises ``ValueError`` unless the compression is 8 x 8 x 8, which the rest of the model relies on."""
        parsed = parse_config(cls, config)
        parsed._check_half("encoder", "down", parsed.encoder_channels, parsed.encoder_num_groups)
        parsed._check_half("decoder", "up", parsed.decoder_channels, parsed.decoder_num_groups)
        return parsed

    def _check_half(self, half: str, direction: str, channels: Sequence[int], num_groups: int) -> None:
        """Raise ``ValueError`` unless the sizes of the encoder or decoder fit each other."""
        for key, name, factor in (
            (f"{half}_spatial_{direction}_sample", f"{half}_spatial", SPATIAL_FACTOR),
            (f"{half}_temporal_{direction}_sample", f"{half}_temporal", TEMPORAL_FACTOR),
            (f"{half}_layers_per_block", f"{half}_layers", None),
        ):
            values = getattr(self, name)
            if len(values) != len(channels):
                raise ValueError(f"{key}: {len(values)} blocks, but {half}_block_out_channels has {len(channels)}")
            if factor is not None and 2 ** sum(values) != factor:
                raise ValueError(f"{key}: compresses {2 ** sum(values)} times, must be {factor} times")
        if any(size % num_groups for size in channels):
            raise ValueError(f"{half}_norm_num_groups={num_groups}: must divide each of {list(channels)}")


class Moments(NamedTuple):
    """The encoder's diagonal Gaussian: mean and log variance, each (B, 16, T, h, w)."""

    mean: Tensor
    logvar: Tensor


@dataclass(frozen=True)
class Tiling:
    """Work in square tiles of ``size`` pixels that overlap by a quarter; slower, and a slightly other picture.

    The device has to hold only what one tile computes with. Between units the causal frames lie in host memory, where
    they need more than without tiling, as tiles overlap (1.6 times as much for 256 pixels at 1280x768).
    """

    size: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", whole_multiple("tiling", self.size, of=4 * SPATIAL_FACTOR))


@dataclass(frozen=True)
class DecoderMemory:
    """What the next unit needs of the units decoded before: the last frames at every causal layer, video by video.

    Memories stack and come apart again without a copy.
    """

    layers: tuple[LayerFrames, ...]
    copied: torch.cuda.Event | None = None
    """The end of the copy that puts these frames in host memory. None: they are there."""

    @property
    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer)

    def to(self, device: torch.device | str) -> "DecoderMemory":
        """On another device. From CUDA to host memory the copy goes on beside what the device computes next."""
        if torch.device(device).type != "cpu" or not any(x.is_cuda for layer in self.layers for x in layer):
            self.wait()
            return DecoderMemory(tuple(tuple(x.to(device) for x in layer) for layer in self.layers))
        beside = torch.cuda.Stream(next(x.device for layer in self.layers for x in layer if x.is_cuda))
        beside.wait_stream(torch.cuda.current_stream(beside.device))
        with torch.cuda.stream(beside):
            layers = tuple(tuple(_to_pinned(x, beside) for x in layer) for layer in self.layers)
            return DecoderMemory(layers, beside.record_event())

    def wait(self) -> None:
        """Return when the frames are there. Whoever reads them calls this first."""
        if self.copied is not None:
            self.copied.synchronize()

    @staticmethod
    def stack(memories: Sequence["DecoderMemory"]) -> "DecoderMemory":
        """Memories of several videos (of equal size) as one, in the order of a stacked batch of latents."""
        for memory in memories:
            memory.wait()
        return DecoderMemory(tuple(tuple(chain(*layer)) for layer in zip(*(m.layers for m in memories), strict=True)))

    def unstack(self) -> list["DecoderMemory"]:
        """The memory of each video, which holds nothing of the others."""
        self.wait()
        return [DecoderMemory(tuple((x,) for x in video)) for video in zip(*self.layers, strict=True)]


def _to_pinned(x: Tensor, stream: torch.cuda.Stream) -> Tensor:
    """A copy in pinned host memory, which ``stream`` fills while the host goes on."""
    copy = torch.empty_like(x, device="cpu", pin_memory=True)
    copy.copy_(x, non_blocking=True)
    x.record_stream(stream)  # so that the memory of x is not used again before
    return copy


def from_config(config: Mapping[str, Any]) -> "CausalVideoVAE":
    """The VAE that a published ``config.json`` describes, without its weights."""
    return CausalVideoVAE(VAEConfig.from_dict(config))


class CausalVideoVAE(nn.Module):
    """Encoder and decoder with the published checkpoint's parameter names."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        moments, latents = 2 * config.latent_channels, config.latent_channels
        self.quant_conv = CausalConv3d(moments, moments, kernel_size=1)
        self.post_quant_conv = CausalConv3d(latents, latents, kernel_size=1)

    @property
    def dtype(self) -> torch.dtype:
        return self.post_quant_conv.conv.weight.dtype

    def encode(self, pixels: Tensor, *, tiling: Tiling | None = None) -> Moments:
        """Encode pictures (F = 1) or clips (F = 8 n + 1).

        pixels: (B, 3, F, H, W) in [-1, 1], H and W multiples of 8. Returns moments (B, 16, T, h, w) in float32, in
        the VAE's own scale. The clip is processed in chunks of 1 and then 8 frames, which is exact, so memory
        does not grow with F. Raises ``ValueError`` for another number of frames or size.
        """
        if pixels.ndim != 5 or pixels.shape[1] != 3:
            raise ValueError(f"pixels: shape {tuple(pixels.shape)}, must be (B, 3, F, H, W)")
        num_latent_frames_of(pixels.shape[2])
        if pixels.shape[3] % SPATIAL_FACTOR or pixels.shape[4] % SPATIAL_FACTOR:
            raise ValueError(f"pixels: size {tuple(pixels.shape[3:])}, must be multiples of {SPATIAL_FACTOR}")
        memory: tuple[LayerFrames, ...] | None = None
        chunks = []
        for chunk in pixels.split([1] + [TEMPORAL_FACTOR] * ((pixels.shape[2] - 1) // TEMPORAL_FACTOR), dim=2):
            carry = Carry(memory, keep_on=_memory_device(tiling))
            chunks.append(_tiled(self._encode_chunk, chunk.to(self.dtype), carry, tiling, SPATIAL_FACTOR, 1).float())
            memory = carry.memory()
        mean, logvar = torch.cat(chunks, dim=2).chunk(2, dim=1)
        return Moments(mean, logvar.clamp(-30.0, 20.0))

    def decode_unit(
        self, latents: Tensor, memory: DecoderMemory | None, *, tiling: Tiling | None = None
    ) -> tuple[Tensor, DecoderMemory]:
        """Decode the next latent frame of each of B videos, one after the other.

        A convolution of several videos may sum up in another order than that of one, so that a video's frames would
        depend on which others are decoded with it.

        latents: (B, 16, 1, h, w) in the VAE's own scale; memory: None at the start of the videos, else what the call
        for the frame before returned, with the same tiling, on any device. Returns frames (B, 3, 1 or 8, H, W) in
        about [-1, 1], in the VAE's dtype, and the memory for the next frame. Raises ``ValueError`` where memory and
        latents do not fit.
        """
        if latents.ndim != 5 or latents.shape[1] != self.config.latent_channels or latents.shape[2] != 1:
            raise ValueError(
                f"latents: shape {tuple(latents.shape)}, must be (B, {self.config.latent_channels}, 1, h, w)"
            )
        num_videos = latents.shape[0]
        memories = [None] * num_videos if memory is None else memory.unstack()
        if len(memories) != num_videos:
            raise ValueError(f"memory: of {len(memories)} videos, but the latents are of {num_videos}")
        frames, after = [], []
        for video, before in zip(latents.to(self.dtype).split(1), memories, strict=True):
            carry = Carry(None if before is None else before.layers, keep_on=_memory_device(tiling))
            frames.append(_tiled(self._decode_chunk, video, carry, tiling, 1, SPATIAL_FACTOR))
            after.append(DecoderMemory(carry.memory()))
        return torch.cat(frames), DecoderMemory.stack(after)

    def decode_units(self, latents: Tensor, *, tiling: Tiling | None = None) -> Iterator[Tensor]:
        """Frames of each latent frame in turn: (B, 16, T, h, w) -> T times (B, 3, 1 or 8, H, W)."""
        memory: DecoderMemory | None = None
        for latent_frame in latents.split(1, dim=2):
            frames, memory = self.decode_unit(latent_frame, memory, tiling=tiling)
            yield frames

    def decode(self, latents: Tensor, *, tiling: Tiling | None = None) -> Tensor:
        """Decode whole videos: (B, 16, T, h, w) in the VAE's own scale -> (B, 3, F, H, W) in about [-1, 1]."""
        return torch.cat(list(self.decode_units(latents, tiling=tiling)), dim=2)

    def _encode_chunk(self, pixels: Tensor, carry: Carry) -> Tensor:
        moments: Tensor = self.quant_conv(self.encoder(pixels, carry), carry)
        return moments

    def _decode_chunk(self, latents: Tensor, carry: Carry) -> Tensor:
        frames: Tensor = self.decoder(self.post_quant_conv(latents, carry), carry)
        return frames


def _memory_device(tiling: Tiling | None) -> torch.device | None:
    """Where causal frames are kept between chunks: in host memory with tiling, otherwise on their own device (None)."""
    return None if tiling is None else torch.device("cpu")


def _tiled(
    chunk_fn: Callable[[Tensor, Carry], Tensor], x: Tensor, carry: Carry, tiling: Tiling | None, down: int, up: int
) -> Tensor:
    """``chunk_fn`` over the whole of ``x`` (B, C, T, H, W), or over tiles of it, blended where they overlap.

    The function's output is ``up / down`` times the size of ``x``. Tiles run in raster order with one carry.
    """
    tile_in = None if tiling is None else tiling.size // SPATIAL_FACTOR * down
    if tile_in is None or max(x.shape[3:]) <= tile_in:
        return chunk_fn(x, carry)
    tile_out = tile_in // down * up
    step_in, blend, step_out = tile_in - tile_in // 4, tile_out // 4, tile_out - tile_out // 4
    rows: list[list[Tensor]] = []
    for top in range(0, x.shape[3], step_in):
        row: list[Tensor] = []
        for left in range(0, x.shape[4], step_in):
            tile = chunk_fn(x[:, :, :, top : top + tile_in, left : left + tile_in], carry)
            if rows:
                tile = _blend(rows[-1][len(row)], tile, blend, dim=3)
            if row:
                tile = _blend(row[-1], tile, blend, dim=4)
            row.append(tile)
        rows.append(row)
    kept = [torch.cat([tile[:, :, :, :step_out, :step_out] for tile in row], dim=4) for row in rows]
    return torch.cat(kept, dim=3)


def _blend(before: Tensor, tile: Tensor, extent: int, *, dim: int) -> Tensor:
    """Fade from the end of the tile ``before`` into the beginning of ``tile``, linearly over ``extent``."""
    extent = min(extent, before.shape[dim], tile.shape[dim])
    shape = [-1 if axis == dim else 1 for axis in range(tile.ndim)]
    weight = (torch.arange(extent, device=tile.device, dtype=torch.float32) / extent).to(tile.dtype).view(shape)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    faded = end * (1 - weight) + tile.narrow(dim, 0, extent) * weight
    return torch.cat([faded, tile.narrow(dim, extent, tile.shape[dim] - extent)], dim=dim)


class Encoder(nn.Module):
    """Pixels (B, 3, F, H, W) -> moments (B, 32, T, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, num_groups = config.encoder_channels, config.encoder_num_groups
        self.conv_in = CausalConv3d(3, channels[0])
        self.down_blocks = nn.ModuleList(
            DownBlock(a, b, num_layers=n, spatial=s, temporal=t, num_groups=num_groups)
            for a, b, n, s, t in zip(
                (channels[0], *channels[:-1]),
                channels,
                config.encoder_layers,
                config.encoder_spatial,
                config.encoder_temporal,
                strict=True,
            )
        )
        self.mid_block = MidBlock(channels[-1], num_groups=num_groups)
        self.conv_norm_out = FrameGroupNorm(num_groups, channels[-1], eps=NORM_EPS)
        self.conv_out = CausalConv3d(channels[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        x = self.conv_in(x, carry)
        for block in self.down_blocks:
            x = block(x, carry)
        x = self.mid_block(x, carry)
        out: Tensor = self.conv_out(x, carry, self.conv_norm_out.activated_after)
        return out


class Decoder(nn.Module):
    """Latents (B, 16, T, h, w) -> pixels (B, 3, F, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, num_groups = config.decoder_channels[::-1], config.decoder_num_groups
        self.conv_in = CausalConv3d(config.latent_channels, channels[0])
        self.mid_block = MidBlock(channels[0], num_groups=num_groups)
        self.up_blocks = nn.ModuleList(
            UpBlock(a, b, num_layers=n, spatial=s, temporal=t, num_groups=num_groups)
            for a, b, n, s, t in zip(
                (channels[0], *channels[:-1]),
                channels,
                config.decoder_layers,
                config.decoder_spatial,
                config.decoder_temporal,
                strict=True,
            )
        )
        self.conv_norm_out = FrameGroupNorm(num_groups, channels[-1], eps=NORM_EPS)
        self.conv_out = CausalConv3d(channels[-1], 3)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        x = self.conv_in(x, carry)
        x = self.mid_block(x, carry)
        for block in self.up_blocks:
            x = block(x, carry)
        out: Tensor = self.conv_out(x, carry, self.conv_norm_out.activated_after)
        return out
