"""The blocks that the encoder and the decoder of the VAE are built of.

B videos, C channels, F frames, H W size at a block. Every causal layer takes the frames before from a ``Carry``.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pyramid_serve.pyramid_flow.causal_conv import Carry, CausalConv3d, in_order_of

NORM_EPS = 1e-6


class FrameGroupNorm(nn.GroupNorm):
    """Group norm of each frame by itself: (B, C, T, H, W) -> same."""

    def forward(self, input: Tensor) -> Tensor:
        frames = super().forward(rearrange(input, "b c t h w -> (b t) c h w"))
        out: Tensor = rearrange(frames, "(b t) c h w -> b c t h w", b=input.shape[0])
        return out

    def activated_after(self, before: Tensor, x: Tensor) -> Tensor:
        """``before`` and behind it the SiLU of the normed ``x``: what the next convolution reads, as a ``Join``.

        Compiled, that is one kernel after that of the statistics, which writes the convolution's input once.
        """
        return in_order_of(x, torch.cat([before, F.silu(self(x))], dim=2))


class ResnetBlock(nn.Module):
    """Norm, SiLU, causal convolution, twice, around a residual."""

    def __init__(self, in_channels: int, out_channels: int, *, num_groups: int) -> None:
        super().__init__()
        self.norm1 = FrameGroupNorm(num_groups, in_channels, eps=NORM_EPS)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = FrameGroupNorm(num_groups, out_channels, eps=NORM_EPS)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = (
            CausalConv3d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        h: Tensor = self.conv1(x, carry, self.norm1.activated_after)
        h = self.conv2(h, carry, self.norm2.activated_after)
        shortcut: Tensor = x if self.conv_shortcut is None else self.conv_shortcut(x, carry)
        return shortcut + h


class SpatialAttention(nn.Module):
    """One-head attention over the pixels of each frame, around a residual."""

    def __init__(self, channels: int, *, num_groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(num_groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        b, _, _, height, _ = x.shape
        frames = self.group_norm(rearrange(x, "b c t h w -> (b t) c h w"))
        tokens = rearrange(frames, "n c h w -> n 1 (h w) c")
        attended = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        out: Tensor = rearrange(self.to_out[0](attended), "(b t) 1 (h w) c -> b c t h w", b=b, h=height)
        return x + out


class MidBlock(nn.Module):
    def __init__(self, channels: int, *, num_groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, num_groups=num_groups) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialAttention(channels, num_groups=num_groups)])

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        x = self.resnets[0](x, carry)
        x = self.attentions[0](x)
        out: Tensor = self.resnets[1](x, carry)
        return out


class Downsample(nn.Module):
    """Halve the size or the number of frames by a strided convolution."""

    def __init__(self, channels: int, *, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        out: Tensor = self.conv(x, carry)
        return out


class SpatialUpsample(nn.Module):
    """Double the size: a convolution to 4x channels, unfolded into 2 x 2 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, 4 * channels)

    def unfold(self, x: Tensor) -> Tensor:
        """(B, 4 C, T, H, W) -> (B, C, T, 2 H, 2 W)."""
        return in_order_of(x, rearrange(x, "b (c p1 p2) t h w -> b c t (h p1) (w p2)", p1=2, p2=2))

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return self.unfold(self.conv(x, carry))


class TemporalUpsample(nn.Module):
    """Double the frames: a convolution to 2x channels, unfolded into time. A video's first frame stays single."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, 2 * channels)

    def unfold(self, x: Tensor) -> Tensor:
        """(B, 2 C, T, H, W) -> (B, C, 2 T, H, W)."""
        return in_order_of(x, rearrange(x, "b (c p) t h w -> b c (t p) h w", p=2))

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        x = self.unfold(self.conv(x, carry))
        return x[:, :, 1:] if carry.is_first else x


def resnets(in_channels: int, out_channels: int, *, num_layers: int, num_groups: int) -> nn.ModuleList:
    """Residual blocks one after the other, the first of which changes the number of channels."""
    channels = [in_channels] + [out_channels] * num_layers
    return nn.ModuleList(ResnetBlock(a, b, num_groups=num_groups) for a, b in pairwise(channels))


class DownBlock(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, *, num_layers: int, spatial: bool, temporal: bool, num_groups: int
    ) -> None:
        super().__init__()
        self.resnets = resnets(in_channels, out_channels, num_layers=num_layers, num_groups=num_groups)
        self.downsamplers = nn.ModuleList([Downsample(out_channels, stride=(1, 2, 2))] if spatial else [])
        self.temporal_downsamplers = nn.ModuleList([Downsample(out_channels, stride=(2, 1, 1))] if temporal else [])

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.temporal_downsamplers):
            x = layer(x, carry)
        return x


class UpBlock(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, *, num_layers: int, spatial: bool, temporal: bool, num_groups: int
    ) -> None:
        super().__init__()
        self.resnets = resnets(in_channels, out_channels, num_layers=num_layers, num_groups=num_groups)
        self.upsamplers = nn.ModuleList([SpatialUpsample(out_channels)] if spatial else [])
        self.temporal_upsamplers = nn.ModuleList([TemporalUpsample(out_channels)] if temporal else [])

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers, *self.temporal_upsamplers):
            x = layer(x, carry)
        return x
