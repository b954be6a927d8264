"""Certificates of one random problem of self-attention, held against the interval around its optimum."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

import cvxnn
from cvxnn.operators import attention
from tests.soundness.attention_problems import AttentionInstance, random_attention_instance
from tests.soundness.check import Checker, Report, random_direction
from tests.soundness.reference import Reference
from tests.soundness.tamper import tampered

__all__ = ["AttentionReference", "check_attention_problem"]

_RELU_SOLVERS = ("bm_global", "interior_point", "frank_wolfe", "bm_projected_gd")
_STARTS = 6


def check_attention_problem(seed: int, index: int, tamper: str | None = None) -> Report:
    """Check problem number `index` of a seed; every fourth one is of ReLU.

    `tamper` names a deliberate mistake of `tests.soundness.tamper`, made in the certificates only.
    """
    begin = time.perf_counter()
    relu = index % 4 == 3
    # Indices of each kind are consecutive, so that losses, outputs and reductions all come up.
    instance = random_attention_instance(seed, index // 4 if relu else index - index // 4, relu)
    report = Report(index, instance.loss, instance.reduction, instance.output_bias, instance.norms)
    if relu and instance.tokens.shape[2] > 1:
        checker: Checker = _NetworkChecker(instance, report)
    else:
        checker = (_ReluChecker if relu else _AttentionChecker)(instance, report)
    with tampered(tamper):
        checker.check_all(np.random.default_rng([seed, index, 1]))
    report.relative_width = checker.interval.relative_width
    report.seconds = time.perf_counter() - begin
    return report


class AttentionReference(Reference):
    """The problem in NumPy; a ReLU block of one feature is the one with the gates 1 and -1."""

    def make_features(self) -> tuple[tuple[int, int, int], np.ndarray]:
        instance = self.instance
        X = instance.tokens.astype(np.longdouble)
        d, c = X.shape[2], self.Y.shape[1]
        active = instance.patterns.astype(np.longdouble)
        per_token = np.einsum("ntsk,nsp,nta,nsl->ntkpal", active, X, X, X)
        rows = instance.rows(per_token)[self.used]
        return (active.shape[3], d * d, d * c), rows.reshape(len(self.Y), -1)


class _AttentionChecker(Checker):
    """Linear and gated blocks, their dual norms from whole blocks and from parts in turn."""

    instance: AttentionInstance

    def make_reference(self) -> Reference:
        return AttentionReference(self.instance)

    def make_problem(self, **options: Any) -> cvxnn.Problem:
        instance = self.instance
        Y = instance.Y
        if instance.output == "tokens":
            # What is at padding must not matter.
            Y = np.full((*instance.valid.shape, Y.shape[1]), np.nan)
            Y[instance.valid] = instance.Y
        tokens = np.where(instance.valid[:, :, None], instance.tokens, np.nan)
        activation = "linear" if instance.gates is None else "gated_relu"
        options = {"activation": activation, "gates": instance.gates, "output": instance.output} | options
        return cvxnn.attention_problem(tokens, Y, mask=instance.mask, **options)

    def check_all(self, rng: np.random.Generator) -> None:
        if self.report.index % 2 == 0:
            super().check_all(rng)
            return
        sizes = attention._BLOCK_BYTES, attention._SLAB_BYTES
        attention._BLOCK_BYTES = attention._SLAB_BYTES = 64
        try:
            super().check_all(rng)
        finally:
            attention._BLOCK_BYTES, attention._SLAB_BYTES = sizes

    def patterns_are_right(self) -> bool:
        found, expected = self.problem.patterns.numpy(), self.instance.patterns
        # Without gates and a mask of pairs, what is said of padding is of no consequence.
        both = self.instance.valid[:, :, None, None] & self.instance.valid[:, None, :, None]
        return np.array_equal(found & both, expected & both)


class _ReluChecker(_AttentionChecker):
    """ReLU blocks of one feature and one output: two cells, and certificates of factors in their cones."""

    def make_reference(self) -> Reference:
        return AttentionReference(replace(self.instance, gates=np.array([[[1.0]], [[-1.0]]])))

    def make_problem(self, **options: Any) -> cvxnn.Problem:
        options = {"activation": "relu", "gates": "enumerate"} | options
        return super().make_problem(**options)

    def check_all(self, rng: np.random.Generator) -> None:
        if self.problem.scope != "relu_network":
            self.violated("problem", "one feature has two cells", 1.0)
        self.check_beta_max()
        for name in _RELU_SOLVERS:
            result = cvxnn.solve(self.problem, name, tol=1e-6, max_iter=200, time_limit=10.0)
            self.check(f"solution of {name}", result.certificate, {})
            if result.status == "certified":
                suboptimality = (result.objective - self.interval.upper) / self.interval.size
                self.expect(f"solution of {name}", "certified to the tolerance", suboptimality - 1e-6)
        for name, arguments in self.networks(rng):
            self.check(name, cvxnn.certify(self.problem, **arguments), arguments)

    def networks(self, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, Any]]]:
        """Random heads, in their cones or not: all are networks."""
        size = np.sqrt(np.abs(self.interval.Z).sum()) or 1.0
        P, p, q = self.problem.operator.block_shape
        for scale in (0.3, 1.0, 3.0):
            U, V = (scale * size * rng.normal(size=(P, side, 2)) for side in (p, q))
            yield f"random heads, scale {scale:g}", {"factors": (U, V)}
            yield "with a dual point", {"factors": (U, V), "dual": random_direction(rng, self.problem.Y.shape)}


class _NetworkChecker(_ReluChecker):
    """ReLU blocks of two features: lower bounds hold for the networks that long runs of L-BFGS find."""

    def make_reference(self) -> Reference:
        # beta and sizes are those of the linear block; nothing else is taken from it.
        return AttentionReference(self.instance)

    def check_all(self, rng: np.random.Generator) -> None:
        if self.problem.scope != "relu_network":
            return
        bounds = []
        for name in ("bm_global", "frank_wolfe"):
            result = cvxnn.solve(self.problem, name, tol=1e-6, time_limit=10.0)
            bounds.append((name, result.certificate.lower_bound, result))
            self.report.n_certificates += 1
        for _ in range(_STARTS):
            value = self.long_run(rng)
            for name, lower, result in bounds:
                self.expect(f"solution of {name}", "lower_bound <= value of a network", (lower - value) / value)
                if result.status == "certified":
                    excess = (result.objective - value) / value - 1e-6
                    self.expect(f"solution of {name}", "certified to the tolerance", excess)

    def long_run(self, rng: np.random.Generator) -> float:
        """Value of a network of 8 heads that L-BFGS has trained, in extended precision."""
        instance, loss = self.instance, self.reference.loss
        d, c, m = instance.tokens.shape[2], self.reference.Y.shape[1], 8
        X, M = torch.from_numpy(instance.tokens), torch.from_numpy(instance.pairs)
        cut = m * d * d

        def outputs(x: torch.Tensor) -> torch.Tensor:
            U, V = x[:cut].view(m, d, d), x[cut : cut + m * d * c].view(m, d, c)
            scores = torch.einsum("nta,jab,nsb->jnts", X, U, X).clamp_min(0) * M
            per_token = torch.einsum("jnts,nsl,jlc->ntc", scores, X, V)
            valid = torch.from_numpy(instance.valid)
            if instance.output == "tokens":
                rows = per_token[valid]
            else:
                rows = (per_token * valid[:, :, None]).sum(1) / valid.sum(1, keepdim=True)
            return rows + (x[cut + m * d * c :] if instance.output_bias else 0)

        used = torch.from_numpy(self.reference.used)

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            x = torch.from_numpy(flat).requires_grad_()
            T = outputs(x)[used]
            slope = torch.from_numpy(loss.gradient(T.detach().numpy()).astype(float))
            weights = x[: cut + m * d * c]
            penalty = self.reference.beta / 2 * weights.square().sum()
            (gradient,) = torch.autograd.grad((T * slope).sum() + penalty, x)
            return float(loss.value(T.detach().numpy())) + float(penalty.detach()), gradient.numpy()

        start = rng.normal(size=cut + m * d * c + (c if instance.output_bias else 0)) * rng.choice([0.3, 1.0])
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
        return float(objective(found.x)[0])
