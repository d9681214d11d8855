"""Linear probe: multinomial logistic regression on frozen features, full batch, deterministic.

The objective is scikit-learn's `LogisticRegression(C=c)`: the sum of cross-entropies plus ‖W‖² / (2c), biases free.
It is convex, so the probe has one answer and no training recipe of its own.

Shapes: R problems fitted at once, N samples, D features, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from datasets_prep.errors import UserError
from service import watchdog

_log = logging.getLogger(__name__)

_CHUNK = 1 << 24  # numbers in the largest temporary
_MEMORY = 10  # curvature pairs of L-BFGS
_HALVINGS = 30


class Probe(NamedTuple):
    """Linear classifier(s): weight (…, D, K) and bias (…, K)."""

    weight: Tensor
    bias: Tensor


def standardise(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Centre features and divide them by one scale, so that the mean variance of the D features of `train` is 1.

    Ratios between features stay, unlike under whitening: the strength of a feature is part of a representation, and
    whitening blows up pixels and units that hardly ever vary.

    Args:
        train: (N, D) features whose statistics are used; no labels are involved.
        others: (…, D) features that get the same shift and scale.

    Returns:
        `train` and `others`, standardised.

    Raises:
        UserError: a feature is infinite or not a number.
    """
    variance, mean = torch.var_mean(train, 0, correction=0)
    broken = int((~variance.isfinite()).sum())
    if broken:
        raise UserError(
            f"{broken} of {len(variance)} features hold infinite values or NaN: the encoder diverged, "
            "so train it again with a lower optim.lr or with optim.clip_norm"
        )
    scale = variance.mean().sqrt().clamp_min(torch.finfo(train.dtype).tiny)  # constant features become zeros
    return tuple((part - mean) / scale for part in (train, *others))


def fit(
    features: Tensor, labels: Tensor, classes: int, c: float, *, tolerance: float = 1e-6, iterations: int = 2000
) -> Probe:
    """Fit one probe, or R independent ones at once.

    Args:
        features: (N, D) or (R, N, D), best standardised.
        labels: (N,) or (R, N) integers below `classes`.
        classes: K.
        c: inverse strength of the L2 penalty.
        tolerance: the fit ends when no entry of the gradient exceeds `tolerance` × N.
        iterations: bound on L-BFGS steps; a warning is logged when it is reached.

    Returns:
        The probe(s), in the type of the features.
    """
    if features.dim() == 2:
        single = fit(features[None], labels[None], classes, c, tolerance=tolerance, iterations=iterations)
        return Probe(single.weight[0], single.bias[0])
    _, n, d = features.shape
    if n >= d:
        objective = _Objective(features, labels, classes, c)
        solution = _minimise(objective, tolerance * n, iterations).to(features.dtype)
        return Probe(solution[:, :-1], solution[:, -1])
    # The optimum lies in the span of the samples: solve in N coordinates of an orthonormal basis, which keeps ‖W‖.
    basis, coordinates = torch.linalg.qr(features.mT)
    inner = fit(coordinates.mT.double(), labels, classes, c, tolerance=tolerance, iterations=iterations)
    return Probe(basis @ inner.weight.to(basis.dtype), inner.bias.to(basis.dtype))


def predict(probe: Probe, features: Tensor) -> Tensor:
    """Return the most likely classes, (…, N) for probes (…, D, K) and features (N, D)."""
    rows = max(1, _CHUNK // probe.bias.numel())
    parts = [(part @ probe.weight + probe.bias[..., None, :]).argmax(-1) for part in features.split(rows)]
    return torch.cat(parts, -1)


def accuracy(probe: Probe, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return top-1 accuracy in percent and its binomial standard error, each of the probes' leading shape."""
    share = (predict(probe, features) == labels).double().mean(-1)
    return 100 * share, 100 * (share * (1 - share) / len(labels)).sqrt()


class _Objective:
    """Value, gradient and a bound on the curvature of R problems, at parameters (R, D + 1, K): weights above biases."""

    def __init__(self, features_RND: Tensor, labels_RN: Tensor, classes: int, c: float) -> None:
        self.x, self.y, self.classes = features_RND, labels_RN, classes
        d = features_RND.shape[-1]
        self.penalty = torch.full((d + 1, 1), 1 / c, dtype=torch.float64, device=features_RND.device)
        self.penalty[-1] = 0.0

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        r, _, d = self.x.shape
        rows = max(1, _CHUNK // (r * max(d, self.classes)))
        yield from zip(self.x.split(rows, 1), self.y.split(rows, 1), strict=True)

    def start(self) -> Tensor:
        r, _, d = self.x.shape
        return torch.zeros(r, d + 1, self.classes, dtype=torch.float64, device=self.x.device)

    def preconditioner(self) -> Tensor:
        """Inverse of X̃ᵀX̃ / 2 + penalty, which bounds the Hessian of every class from above (Böhning 1992)."""
        ones = (F.pad(x, (0, 1), value=1.0) for x, _ in self._chunks())
        gram = sum((x.mT @ x).double() for x in ones)
        return torch.cholesky_inverse(torch.linalg.cholesky(gram / 2 + torch.diag(self.penalty[:, 0])))

    def __call__(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the R values and their gradients, summed in float64; products run in the type of the features."""
        value = (self.penalty * theta**2).sum((1, 2)) / 2
        gradient = self.penalty * theta
        weights = theta.to(self.x.dtype)
        for x, y in self._chunks():
            log_p = torch.log_softmax(x @ weights[:, :-1] + weights[:, -1:], -1)
            value -= log_p.gather(-1, y[..., None]).double().sum((1, 2))
            residual = log_p.exp() - F.one_hot(y, self.classes)
            gradient[:, :-1] += x.mT @ residual
            gradient[:, -1] += residual.sum(1)
        return value, gradient


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)


def _direction(gradient: Tensor, pairs: list[tuple[Tensor, Tensor]], inverse: Tensor) -> Tensor:
    """Two-loop recursion of L-BFGS, preconditioned by the curvature bound."""
    q, undo = gradient, []
    for s, y in reversed(pairs):
        sy = _dot(s, y)
        rho = torch.where(sy > 0, 1 / sy, 0.0)  # a problem that did not move has no curvature to tell
        alpha = rho * _dot(s, q)
        q = q - alpha * y
        undo.append((s, y, rho, alpha))
    q = inverse @ q
    if pairs:
        s, y = pairs[-1]
        sy, yy = _dot(s, y), _dot(y, inverse @ y)
        q = q * torch.where(sy > 0, sy / yy, 1.0)
    for s, y, rho, alpha in reversed(undo):
        q = q + (alpha - rho * _dot(y, q)) * s
    return -q


def _minimise(objective: _Objective, tolerance: float, iterations: int) -> Tensor:
    """L-BFGS with backtracking, each of the R problems with its own step length and end."""
    inverse = objective.preconditioner()
    theta = objective.start()
    value, gradient = objective(theta)
    pairs: list[tuple[Tensor, Tensor]] = []
    for _ in range(iterations):
        watchdog.beat()
        moving = gradient.abs().amax((1, 2), keepdim=True) > tolerance
        if not moving.any():
            return theta
        step = _direction(gradient, pairs, inverse) * moving
        new_theta, new_value, new_gradient = _backtrack(objective, theta, value, gradient, step)
        if new_theta is theta:
            break
        pairs = [*pairs[1 - _MEMORY :], (new_theta - theta, new_gradient - gradient)]
        theta, value, gradient = new_theta, new_value, new_gradient
    _log.warning(
        "the linear probe stopped early, at a gradient of %.2g (wanted ≤ %.2g): lower eval.probe_c",
        gradient.abs().max().item(),
        tolerance,
    )
    return theta


def _backtrack(
    objective: _Objective, theta: Tensor, value: Tensor, gradient: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Halve each problem's step until all values fall enough (Armijo), to the accuracy of the arithmetic.

    Returns:
        The new parameters, values and gradients; the old ones where no step will do.
    """
    slope = _dot(gradient, step)[:, 0, 0]
    slack = 10 * torch.finfo(objective.x.dtype).eps * value
    length = torch.ones_like(value)
    for _ in range(_HALVINGS):
        trial = theta + length[:, None, None] * step
        new_value, new_gradient = objective(trial)
        fits = new_value <= value + 1e-4 * length * slope + slack
        if fits.all():
            return trial, new_value, new_gradient
        length = torch.where(fits, length, length / 2)
    return theta, value, gradient
