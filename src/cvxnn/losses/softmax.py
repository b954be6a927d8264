"""Computations with softmax rows: accurate logarithms, the proximal operator and the best intercept."""

import math

import torch
from torch import Tensor

from cvxnn.losses.roots import increasing_root

NEWTON_STEPS = 8
INTERCEPT_STEPS = 40


def log_softmax(T: Tensor) -> Tensor:
    """Logarithm of softmax rows (n, c), relatively exact also where a probability is almost 1."""
    top = T.argmax(1, keepdim=True)
    gaps = T - T.gather(1, top)
    others = gaps.exp().scatter(1, top, 0.0).sum(1, keepdim=True)
    return gaps - torch.log1p(others)


def balance(rows: Tensor, main: Tensor) -> Tensor:
    """Rows (n, c) with the entries at ``main`` (n, 1) replaced by minus the sum of the others."""
    others = rows.scatter(1, main, 0.0)
    return others.scatter(1, main, -others.sum(1, keepdim=True))


def softmax_error(T: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """mass * softmax(T) - Y with rows that sum to 0, and mass * softmax(T), (n, c); mass: sum of Y_i."""
    P = Y.sum(1, keepdim=True) * log_softmax(T).exp()
    return balance(P - Y, Y.argmax(1, keepdim=True)), P


def _newton(T: Tensor, Y: Tensor, a: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Newton steps for S - T + a (mass softmax(S) - Y) = 0, (n, c), and the rows (n,) that converged.

    The Hessian I + a mass (diag p - p p^T) is inverted by the Sherman-Morrison formula. The Newton error of
    such a function is at most about the square of the step, in the logits: a step below sqrt(eps) is the
    last one needed.
    """
    eps = torch.finfo(T.dtype).eps
    mass = Y.sum(1, keepdim=True).clamp(min=torch.finfo(T.dtype).tiny)
    done = torch.zeros_like(a, dtype=torch.bool)
    for _ in range(NEWTON_STEPS):
        error, P = softmax_error(S, Y)
        residual = S - T + a[:, None] * error
        curvature = a[:, None] * P
        means = (P / mass) / (1 + curvature)
        mean = (means * residual).sum(1, keepdim=True) / means.sum(1, keepdim=True)
        step = (residual + curvature * mean) / (1 + curvature)
        S = torch.where(done[:, None], S, S - step)
        done |= step.abs().amax(1) <= 0.5 * math.sqrt(eps) + 8 * eps * S.abs().amax(1)
        if bool(done.all()):
            break
    return S, done


def _log_omega(x: Tensor) -> Tensor:
    """Solution y of y + exp(y) = x (log of the Wright omega function), to about 1e-12."""
    large = x.clamp(min=1)
    y = torch.where(x > 1, (large - large.log()).log(), x - torch.log1p(x.clamp(max=1).exp()))
    for _ in range(4):
        omega = y.exp()
        y = y - (y + omega - x) / (1 + omega)
    return y


def _scalar_dual(T: Tensor, Y: Tensor, a: Tensor) -> Tensor:
    """S (n, c) with S - T + a (mass softmax(S) - Y) = 0 to about 1e-6, whatever the scales; a > 0.

    With A = a mass, V = T + a Y and l = log sum exp S of a row, S + A exp(S - l) = V gives A softmax(S) =
    omega(V - l + log A) entry by entry, omega the Wright omega function, and l is the root of log sum omega
    = log A, which falls in l. The root is between max(V) - A and log sum exp V.
    """
    scale = (a * Y.sum(1))[:, None]
    V = T + a[:, None] * Y
    log_scale = scale.log()

    def excess(level: Tensor) -> tuple[Tensor, Tensor]:
        logs = _log_omega(V - level + log_scale)
        total = torch.logsumexp(logs, 1, keepdim=True)
        slope = ((logs - total).exp() / (1 + logs.exp())).sum(1, keepdim=True)
        return log_scale - total, slope

    lower, upper = V.amax(1, keepdim=True) - scale, torch.logsumexp(V, 1, keepdim=True)
    level = increasing_root(excess, lower, upper, start=upper, tolerance=1e-8)
    log_probabilities = _log_omega(V - level + log_scale) - log_scale
    return log_probabilities + level


def prox_rows(T: Tensor, Y: Tensor, a: Tensor, start: Tensor) -> Tensor:
    """Minimiser over S of sum_i a_i f(s_i, y_i) + 1/2 ||S - T||_F^2 for the cross-entropy f, (n, c).

    Newton steps from ``start`` (n, c). Rows that do not converge are solved from the scalar dual problem, in
    double precision, and finished by Newton steps.
    """
    S, done = _newton(T, Y, a, start)
    if bool(done.all()):
        return S
    left = ~done
    T_left, Y_left, a_left = T[left].double(), Y[left].double(), a[left].double()
    rescued, _ = _newton(T_left, Y_left, a_left, _scalar_dual(T_left, Y_left, a_left))
    S[left] = rescued.to(S.dtype)
    return S


def _intercept_newton(T: Tensor, Y: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, bool]:
    """Minimiser (c,) of sum_i w_i f(t_i + b, y_i) where every class has a target, and whether it was reached.

    Newton steps with backtracking. Where no multiple of one lowers the loss enough, the step is b_c += log
    of the ratio of target and predicted frequency, which lowers the loss by Jensen's inequality.
    """
    eps, tiny = torch.finfo(T.dtype).eps, torch.finfo(T.dtype).tiny
    targets = w @ Y
    total = targets.sum()
    ones = torch.ones_like(b)
    converged, previous = False, math.inf

    def loss(b: Tensor) -> Tensor:
        return -(w[:, None] * Y * log_softmax(T + b)).sum()

    value = loss(b)
    for _ in range(INTERCEPT_STEPS):
        error, P = softmax_error(T + b, Y)
        gradient = (w[:, None] * error).sum(0)
        size = float(gradient.abs().amax() / total)
        stalled = size <= 16 * eps * math.sqrt(len(w)) and size >= 0.5 * previous
        converged, previous = size <= 2 * eps or stalled, size
        if converged:
            break
        predicted = w @ P
        weight = w / Y.sum(1).clamp(min=tiny)
        hessian = torch.diag(predicted) - P.T @ (weight[:, None] * P)
        trace = hessian.trace().clamp(min=tiny)
        ridge = torch.diag(4 * eps * trace * ones) + trace * torch.outer(ones, ones) / len(b) ** 2
        step = -torch.linalg.solve_ex(hessian + ridge, gradient)[0]
        step = step - step.mean()
        decrease = gradient @ step
        accepted = False
        for halvings in range(7):
            trial = b + 0.5**halvings * step
            trial_value = loss(trial)
            bound = value + 1e-4 * 0.5**halvings * decrease + 4 * eps * value.abs()
            # Where all predictions are saturated, the Hessian underflows and the step is not finite.
            if bool((decrease <= 0) & (trial_value <= bound) & trial.isfinite().all()):
                accepted = True
                break
        if not accepted:
            trial = b + (targets.clamp(min=tiny) / predicted.clamp(min=tiny)).log()
            trial_value = loss(trial)
        change = (trial - b).abs().amax()
        b, value = trial, trial_value
        converged = bool(change <= 2 * eps * (1 + b.abs().amax()) and b.isfinite().all())
        if converged:
            break
    return b, converged


def _intercept_present(T: Tensor, Y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Minimiser (c,) of mean 0 of sum_i w_i f(t_i + b, y_i) where every class has a target.

    Where Newton steps from ``b`` do not converge, as happens when the loss is almost piecewise linear, the
    scores are first divided by a temperature, which is then lowered to 1 step by step.
    """
    result, converged = _intercept_newton(T, Y, w, b)
    if converged:
        return result
    spread = float((T.amax(1) - T.amin(1)).amax())
    temperature, b = max(1.0, spread / 8), torch.zeros_like(b)
    while temperature > 1:
        b = temperature * _intercept_newton(T / temperature, Y, w, b / temperature)[0]
        temperature = max(1.0, temperature / 2)
    return _intercept_newton(T, Y, w, b)[0]


def intercept(T: Tensor, Y: Tensor, w: Tensor, start: Tensor | None = None) -> Tensor:
    """Minimiser (c,) of mean 0 over b of sum_i w_i f(t_i + b, y_i), all w_i > 0.

    Classes without any target get the largest value that keeps their predicted probabilities at or below eps.
    """
    present = (w @ Y) > 0
    first = T.new_zeros(int(present.sum())) if start is None else start[present]
    b = T.new_zeros(T.shape[1])
    b[present] = _intercept_present(T[:, present], Y[:, present], w, first - first.mean())
    levels = torch.logsumexp(T[:, present] + b[present], 1, keepdim=True)
    b[~present] = (levels - T[:, ~present]).amin(0) + math.log(torch.finfo(T.dtype).eps)
    return b - b.mean()
