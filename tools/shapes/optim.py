"""What both trainings share: the optimiser, the learning rate's course, averaged weights, the training's state on disk.

Hidden matrices (and convolutions, flattened) are stepped by Muon: momentum, brought close to an orthogonal matrix by a
few Newton-Schulz iterations (Jordan et al. 2024), scaled to the size of an Adam step (Liu et al. 2025). All other
parameters are stepped by AdamW.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, *, num_iterations: int = 5) -> Tensor:
    """Matrices (N, R, C) with their singular values brought near to 1, in bfloat16."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for weights of two axes or more, the first being the output's."""

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            waiting: dict[torch.Size, list[nn.Parameter]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    waiting.setdefault(param.shape, []).append(param)
            for params in waiting.values():
                self._step_alike(params, lr=group["lr"], momentum=group["momentum"])

    def _step_alike(self, params: list[nn.Parameter], *, lr: float, momentum: float) -> None:
        """Step parameters of one shape, in one batch of matrices."""
        ahead = []
        for param in params:
            grad, state = cast(Tensor, param.grad), self.state[param]
            if not state:
                state["momentum"] = torch.zeros_like(param)
            state["momentum"].lerp_(grad, 1 - momentum)
            ahead.append(grad.lerp(state["momentum"], momentum).flatten(1))
        size = 0.2 * max(ahead[0].shape) ** 0.5
        for param, update in zip(params, orthogonalize(torch.stack(ahead)), strict=True):
            param.add_(update.reshape(param.shape).to(param.dtype), alpha=-lr * size)


class Optimizers:
    """Muon for the hidden weights of `modules`, AdamW for the rest, with one course of the learning rate."""

    def __init__(self, params: dict[str, nn.Parameter], hidden: set[str], *, muon_lr: float, adam_lr: float) -> None:
        self._all: list[torch.optim.Optimizer] = [
            Muon([p for name, p in params.items() if name in hidden], lr=muon_lr),
            torch.optim.AdamW(
                [p for name, p in params.items() if name not in hidden],
                lr=adam_lr,
                betas=(0.9, 0.98),
                weight_decay=0.0,
                fused=True,
            ),
        ]
        self._rates = (muon_lr, adam_lr)

    def step(self, scale: float) -> None:
        """One step at `scale` times the learning rates; clears the gradients."""
        for optimizer, rate in zip(self._all, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self._all]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        for optimizer, part in zip(self._all, state, strict=True):
            optimizer.load_state_dict(part)


def rate_at(step: int, *, num_steps: int, num_warmup: int, num_decay: int) -> float:
    """Warm up, hold, decay linearly to nothing over the last `num_decay` steps: 0..1."""
    return max(0.0, min(1.0, (step + 1) / num_warmup, (num_steps - step) / num_decay))


class Averaged:
    """Exponential moving average of parameters, with a shorter memory at the beginning."""

    def __init__(self, params: dict[str, nn.Parameter], *, decay: float = 0.998) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in params.items()}

    @torch.no_grad()
    def update(self, params: dict[str, nn.Parameter], step: int) -> None:
        weight = 1 - min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.values.values()), [params[name].detach() for name in self.values], weight)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write aside, then move: a killed training never leaves half a file."""
    aside = path.with_suffix(".writing")
    torch.save(state, aside)
    os.replace(aside, path)


def load_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
