"""What both trainings share: the optimiser, the learning rate's course, averaged weights, the state on disk, the loop.

Hidden matrices (and convolutions, flattened) are stepped by Muon: momentum, brought close to an orthogonal matrix by a
few Newton-Schulz iterations (Jordan et al. 2024), scaled to the size of an Adam step (Liu et al. 2025). All other
parameters are stepped by AdamW.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyramid_serve.precision import suitable_dtype

logger = logging.getLogger(__name__)

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def autocast(device: torch.device) -> torch.autocast:
    """Products in bfloat16 where the device computes that fast."""
    dtype = suitable_dtype(device).dtype
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def orthogonalize(matrices: Tensor, *, num_iterations: int = 5) -> Tensor:
    """Matrices (N, R, C) with their singular values brought near to 1, in the dtype that suits their device."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices.to(suitable_dtype(matrices.device).dtype)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = x.mT if tall else x
    return out


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for weights of two axes or more, the first being the output's."""

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95, run: Callable[..., Any] = map
    ) -> None:
        """`run` is `map`, or a pool's, to step weights of different shapes side by side."""
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self._run = run

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            waiting: dict[torch.Size, list[nn.Parameter]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    waiting.setdefault(param.shape, []).append(param)
            # The largest first, so that none is left to the end alone.
            alike = sorted(waiting.values(), key=lambda params: -len(params) * params[0].numel())
            list(self._run(partial(self._step_alike, lr=group["lr"], momentum=group["momentum"]), alike))

    @torch.no_grad()
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

    def __init__(
        self,
        params: dict[str, nn.Parameter],
        hidden: set[str],
        *,
        muon_lr: float,
        adam_lr: float,
        run: Callable[..., Any] = map,
    ) -> None:
        self._all: list[torch.optim.Optimizer] = [
            Muon([p for name, p in params.items() if name in hidden], lr=muon_lr, run=run),
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
    return rate_of(1 - step / num_steps, step, num_warmup=num_warmup, decay_share=num_decay / num_steps)


def rate_of(left: float, step: int, *, num_warmup: int, decay_share: float) -> float:
    """The same, by what is left of the training and over how much of it the rate falls."""
    return max(0.0, min(1.0, (step + 1) / num_warmup, left / decay_share))


class Averaged:
    """Exponential moving average of parameters, with a shorter memory at the beginning."""

    def __init__(self, params: dict[str, nn.Parameter], *, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in params.items()}

    @torch.no_grad()
    def update(self, params: dict[str, nn.Parameter], step: int) -> None:
        weight = 1 - min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.values.values()), [params[name].detach() for name in self.values], weight)


@dataclass(frozen=True)
class Options:
    """How a training runs; all but `out` have defaults on the command line."""

    out: Path
    num_steps: int
    num_decay_steps: int
    muon_lr: float
    adam_lr: float
    seed: int
    num_threads: int
    device: str = "cpu"
    seconds: float | None = None
    """Train for so long, over all runs, instead of up to the last step; the rates fall over the same share of it."""

    @property
    def decay_share(self) -> float:
        """Over how much of the training, at its end, the learning rates fall to nothing, 0..1."""
        return self.num_decay_steps / self.num_steps

    @staticmethod
    def add_to(parser: argparse.ArgumentParser, **defaults: float) -> None:
        parser.add_argument("--out", type=Path, required=True, help="the training's state; it goes on from there")
        parser.add_argument("--steps", type=int, default=defaults["steps"])
        parser.add_argument("--decay-steps", type=int, default=defaults["decay_steps"])
        parser.add_argument("--muon-lr", type=float, default=defaults["muon_lr"])
        parser.add_argument("--adam-lr", type=float, default=defaults["adam_lr"])
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--threads", type=int, default=2)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Options:
        return cls(args.out, args.steps, args.decay_steps, args.muon_lr, args.adam_lr, args.seed, args.threads)


class Training:
    """A module on its way: weights, optimisers, averaged weights and the step, kept in one file between runs."""

    def __init__(
        self,
        module: nn.Module,
        hidden: Callable[[str, nn.Parameter], bool],
        options: Options,
        *,
        average: float,
        run: Callable[..., Any] = map,
    ) -> None:
        """`hidden` tells which parameters Muon steps; `average` is the averaged weights' decay a step.

        Moves the module to the options' device.
        """
        self.module, self.options = module.to(options.device), options
        self.params = dict(module.named_parameters())
        names = {name for name, param in self.params.items() if hidden(name, param)}
        self.optimizers = Optimizers(self.params, names, muon_lr=options.muon_lr, adam_lr=options.adam_lr, run=run)
        self.averaged = Averaged(self.params, decay=average)
        self.step = 0
        self.seconds = 0.0  # that were trained for
        if options.out.exists():
            state = load_state(options.out)
            module.load_state_dict(state["weights"])
            self.optimizers.load_state_dict(state["optimizers"])
            self.averaged.values = {name: value.to(options.device) for name, value in state["averaged"].items()}
            self.step, self.seconds = state["step"], state.get("seconds", 0.0)
        sizes = {name: param.numel() / 1e6 for name, param in self.params.items()}
        by_muon = sum(sizes[name] for name in names)
        logger.info("%.2f million parameters, %.2f of them by Muon", sum(sizes.values()), by_muon)

    def run(self, take: Callable[[int], Sequence[Tensor]], *, num_warmup: int, log_every: int, save_every: int) -> None:
        """Go on to the end. `take` computes a step's gradients and returns figures to log, of no axes."""
        first, first_seconds = self.step, self.seconds
        began = time.monotonic() - first_seconds
        # Left where they are: on a GPU, reading one waits for all that was asked of it.
        figures: deque[Tensor] = deque(maxlen=log_every)
        while (left := self._left()) > 0:
            step = self.step
            figures.append(torch.stack(list(take(step))))
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizers.step(rate_of(left, step, num_warmup=num_warmup, decay_share=self.options.decay_share))
            self.averaged.update(self.params, step)
            self.step, self.seconds = step + 1, time.monotonic() - began
            if self.step % log_every == 0:
                pace = (self.seconds - first_seconds) / (self.step - first)
                means = " ".join(f"{value:.4f}" for value in torch.stack(list(figures)).mean(0).tolist())
                logger.info("step %d: %s, %.2f s a step", self.step, means, pace)
            if self.step % save_every == 0:
                self.save()
        if self.step % save_every != 0:
            self.save()

    def _left(self) -> float:
        """What is left of the whole training, 0..1."""
        if self.options.seconds is None:
            return 1 - self.step / self.options.num_steps
        return 1 - self.seconds / self.options.seconds

    def save(self) -> None:
        save_state(
            self.options.out,
            {
                "weights": self.module.state_dict(),
                "averaged": self.averaged.values,
                "optimizers": self.optimizers.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
            },
        )


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write aside, then move: a killed training never leaves half a file."""
    aside = path.with_suffix(".writing")
    torch.save(state, aside)
    os.replace(aside, path)


def load_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
