"""SGD on the Burer-Monteiro factors of one stage (equation (126), Appendix C.2), an epoch at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cvxnn.errors import StorageError
from cvxnn.layerwise.features import Among, BatchFeatures, evaluate_outputs
from cvxnn.layerwise.options import SgdOptions, StageOptions
from cvxnn.problem import Problem

__all__ = ["Factors", "Sgd", "epoch_seed", "first_factors"]

#: An epoch with a loss so many times that of outputs 0 has diverged.
_EXPLODED = 1e3


def epoch_seed(seed: int, *place: int) -> int:
    """A seed of its own for every stage, epoch and use."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])


@dataclass
class Factors:
    """Filters u (r, h), weights (r a, c) of the hidden outputs and the intercept (c,)."""

    u: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def outputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Outputs (B, c) of hidden outputs (B, r a)."""
        return torch.addmm(self.bias, hidden, self.weight)

    def copy(self) -> Factors:
        """The numbers, detached."""
        return Factors(*(part.detach().clone() for part in self.parts()))

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """u, weight, bias."""
        return self.u, self.weight, self.bias

    def finite(self) -> bool:
        """Whether all numbers are."""
        return all(bool(torch.isfinite(part).all()) for part in self.parts())

    def squares(self) -> float:
        """||u||^2 + ||weight||^2."""
        return float(self.u.detach().double().square().sum() + self.weight.detach().double().square().sum())


def first_factors(problem: Problem, rank: int, seed: int) -> Factors:
    """Uniform within 1 / sqrt(fan-in), as torch initialises its convolutions and linear layers; the intercept is 0."""
    op = problem.operator
    n_gates, h, _ = op.block_shape
    r = n_gates * rank
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, fan_in: int) -> torch.Tensor:
        values = torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1
        return (values / math.sqrt(fan_in)).to(op.device, op.dtype)

    u = draw(r, h, fan_in=h)
    weight = draw(r * op.width, op.n_outputs, fan_in=r * op.width)
    return Factors(u, weight, weight.new_zeros(op.n_outputs))


class Sgd:
    """Momentum SGD with weight decay beta on both factors and mini-batches in a new order per epoch.

    Parameters
    ----------
    problem : Problem
        Its loss, targets and beta; with ``reduction="mean"``.
    features : BatchFeatures
        Of the samples of this process; gradients are added up over all processes.
    start : Factors
    stage : StageOptions
    options : SgdOptions
    seed : int
        The order of epoch e depends on it, on the stage and on e only.
    """

    def __init__(
        self,
        problem: Problem,
        features: BatchFeatures,
        start: Factors,
        stage: StageOptions,
        options: SgdOptions,
        seed: int,
    ) -> None:
        self.problem, self.features = problem, features
        self.group = problem.operator.group
        self.stage, self.options, self.seed = stage, options, seed
        self.factors = start.copy()
        self.epoch = 0
        trained = [self.factors.u, self.factors.weight]
        groups: list[dict[str, Any]] = [{"params": trained, "weight_decay": problem.beta}]
        if problem.output_bias:
            groups.append({"params": [self.factors.bias], "weight_decay": 0.0})
        for group in groups:
            for part in group["params"]:
                part.requires_grad_()
        self.optimizer = torch.optim.SGD(groups, lr=stage.step, momentum=options.momentum)

    @property
    def step(self) -> float:
        """Step of the coming epoch."""
        return self.stage.step * self.options.decay ** (self.epoch // self.options.decay_every)

    def run_epoch(self) -> dict[str, Any]:
        """One epoch; loss and accuracy are those of its batches as they were seen."""
        problem, factors = self.problem, self.factors
        step = self.step
        for group in self.optimizer.param_groups:
            group["lr"] = step
        n, device = problem.n_samples, problem.device
        place = (self.stage.number, self.epoch)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch_seed(self.seed, *place, 0)))
        self.features.start_epoch(epoch_seed(self.seed, *place, 1))
        total = torch.zeros((), dtype=torch.float64, device=device)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        for batch in order.to(device).split(self.options.batch_size):
            rows, local, among = self._own(batch)
            Y = problem.Y[rows]
            weights = Y.new_full((len(rows),), 1 / len(batch))
            outputs = factors.outputs(self.features.hidden(local, factors.u, among))
            with torch.no_grad():
                seen = outputs.detach()
                total += len(batch) * problem.loss.value(seen, Y, weights)
                correct += (seen.argmax(1) == Y.argmax(1)).sum()
            self.optimizer.zero_grad(set_to_none=True)
            outputs.backward(problem.loss.gradient(seen, Y, weights))
            if self.group is not None:
                self.group.add_up(*(part.grad for part in factors.parts() if part.grad is not None))
            self.optimizer.step()
        if self.group is not None:
            self.group.add_up(total, correct)
        self.epoch += 1
        loss = float(total) / n
        return {
            "epoch": self.epoch,
            "step": step,
            "loss": loss,
            "objective": loss + problem.beta / 2 * factors.squares(),
            "accuracy": int(correct) / n,
        }

    def _own(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Among | None]:
        """Those of the samples of a batch that are in this process, as numbers among all and here, and their places."""
        if self.group is None:
            return batch, batch, None
        share = self.group.share(self.problem.n_samples)
        place = ((batch >= share.start) & (batch < share.stop)).nonzero()[:, 0]
        return batch[place], batch[place] - share.start, (place, len(batch))

    def has_diverged(self, loss: float) -> bool:
        """Whether the loss of an epoch is far above that of outputs 0, or numbers are not finite."""
        return not loss <= _EXPLODED * self.loss_at_zero or not self.factors.finite()

    @cached_property
    def loss_at_zero(self) -> float:
        """F at outputs 0."""
        problem = self.problem
        return float(problem.loss.value(torch.zeros_like(problem.Y64), problem.Y64, problem.weights))

    def outputs(self, features: BatchFeatures) -> torch.Tensor:
        """Outputs (n, c) of the present factors on the samples of some features."""
        return evaluate_outputs(features, self.factors.u.detach(), self.factors.outputs)

    def state(self) -> dict[str, np.ndarray]:
        """Factors and momentum, from which :meth:`load_state` goes on to the same result."""
        arrays = {}
        for name, part in zip(("u", "weight", "bias"), self.factors.parts(), strict=True):
            arrays[name] = part.detach().cpu().numpy()
            momentum = self.optimizer.state.get(part, {}).get("momentum_buffer")
            if momentum is not None:
                arrays[f"momentum.{name}"] = momentum.cpu().numpy()
        return arrays

    def load_state(self, epoch: int, arrays: dict[str, np.ndarray]) -> None:
        """Continue after an epoch.

        Raises
        ------
        StorageError
            Arrays of other shapes.
        """
        self.epoch = epoch
        for name, part in zip(("u", "weight", "bias"), self.factors.parts(), strict=True):
            for key in (name, f"momentum.{name}"):
                if key in arrays and arrays[key].shape != tuple(part.shape):
                    raise StorageError(
                        f"the checkpoint has {key} of shape {arrays[key].shape}; {tuple(part.shape)} is wanted"
                    )
            with torch.no_grad():
                part.copy_(torch.from_numpy(arrays[name]))
            if f"momentum.{name}" in arrays:
                buffer = torch.from_numpy(arrays[f"momentum.{name}"]).to(part)
                self.optimizer.state[part]["momentum_buffer"] = buffer.clone()
