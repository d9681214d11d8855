"""Quality of representations without labels: spread, rank, correlation, and how the views of a sample agree.

Everything is computed in float64 and defined for any finite features, fewer samples than dimensions, constant features
and a single sample included. Spectra come from the smaller of the two Gram matrices, D×D or N×N.

Shape legend: V views, N samples, D dimensions, K = min(N, D).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-7  # added to the shares of a spectrum by RankMe and LiDAR
LIDAR_DELTA = 1e-4  # added to the covariance within samples
LIMITS = {"variance": (0.01, 0.1), "rank_ratio": (0.1, 0.5), "uniformity": (-0.5, -2.0)}  # collapsed, healthy
_ROUNDING = 1e-12  # of the largest variance: smaller ones are zero but for rounding
_CORRELATED = 512  # dimensions, evenly spaced, whose pairs stand for all


def deviations(x_ND: Tensor) -> Tensor:
    """Standard deviation of each dimension, (D,), with divisor N − 1; zeros for a single sample."""
    x_ND = x_ND.double()
    return (x_ND - x_ND.mean(0)).square().sum(0).div(max(1, len(x_ND) - 1)).sqrt()


def spectrum(x_ND: Tensor, centred: bool = True) -> Tensor:
    """Variances along the principal axes, (K,), descending: squared singular values divided by N − 1."""
    x_ND = x_ND.double()
    x_ND = x_ND - x_ND.mean(0) if centred else x_ND
    gram = x_ND.T @ x_ND if x_ND.shape[0] > x_ND.shape[1] else x_ND @ x_ND.T
    variances = torch.linalg.eigvalsh(gram).flip(0) / max(1, len(x_ND) - 1)
    return torch.where(variances > _ROUNDING * variances[0], variances, 0)


def effective_rank(variances_K: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 without spread.

    Args:
        variances_K: what `spectrum` returns.
    """
    singular = variances_K.sqrt()
    shares = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny)
    return torch.special.entr(shares).sum().exp() * (singular[0] > 0)


def rankme(x_ND: Tensor) -> Tensor:
    """RankMe (Garrido et al. 2023, eq. 2–3): effective rank of the features as they are, not centred."""
    return _smoothed_rank(spectrum(x_ND, centred=False).sqrt())


def _smoothed_rank(values: Tensor) -> Tensor:
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + EPS
    return torch.special.entr(shares).sum().exp() * (values.max() > 0)


def lidar(x_VND: Tensor) -> Tensor:
    """LiDAR (Thilak et al. 2024): effective rank of what tells samples apart, the views of a sample being one class.

    The spectrum is that of Σ_w^(−1/2) Σ_b Σ_w^(−1/2), with Σ_b the covariance of the samples' means and Σ_w that of
    the views around them plus δI, from the smaller of a D×D and a V·N×V·N matrix.

    Args:
        x_VND: (V, N, D) of V ≥ 2 views.
    """
    x_VND = x_VND.double()
    views, samples, dim = x_VND.shape
    means_ND = x_VND.mean(0)
    between = (means_ND - means_ND.mean(0)) / math.sqrt(max(1, samples - 1))
    within = (x_VND - means_ND).flatten(0, 1) / math.sqrt(samples * (views - 1))
    if dim <= len(within):
        root = torch.linalg.cholesky(within.T @ within + LIDAR_DELTA * torch.eye(dim).to(within))
        return _smoothed_rank(spectrum(torch.linalg.solve_triangular(root, between.T, upper=False).T, centred=False))
    # (WᵀW + δI)⁻¹ = (I − Wᵀ(WWᵀ + δI)⁻¹W) / δ
    root = torch.linalg.cholesky(within @ within.T + LIDAR_DELTA * torch.eye(len(within)).to(within))
    explained = torch.linalg.solve_triangular(root, within @ between.T, upper=False)
    return _smoothed_rank(torch.linalg.eigvalsh(between @ between.T - explained.T @ explained).clamp_min(0))


def alpha_req(variances_K: Tensor) -> Tensor:
    """α of the power law λ_j ∝ j^(−α) (Agrawal et al. 2022), by least squares of log λ on log j; nan below 2 variances.

    Each variance weighs 1/j, so that every octave of the spectrum counts alike.
    """
    variances = variances_K[variances_K > 0]
    if len(variances) < 2:
        return variances_K.new_tensor(math.nan)
    j = torch.arange(1, len(variances) + 1, dtype=variances.dtype, device=variances.device)
    weights = 1 / j / (1 / j).sum()
    x, y = j.log(), variances.log()
    x = x - (weights * x).sum()
    return -(weights * x * y).sum() / (weights * x * x).sum()


def isotropy(variances_K: Tensor, dim: int) -> Tensor:
    """IsoScore (Rudman et al. 2022) in closed form: 1 for equal variance in all directions, 0 for one direction.

    Its steps reduce to (P − 1) / (D − 1) with the participation ratio P = (Σλ)² / Σλ².
    """
    participation = variances_K.sum().square() / variances_K.square().sum().clamp_min(torch.finfo(torch.double).tiny)
    return ((participation - 1) / max(1, dim - 1)).clamp_min(0)


def variance_explained(variances_K: Tensor, components: int) -> Tensor:
    """Share of the variance along the first principal axes; 1 without spread."""
    total = variances_K.sum()
    return torch.where(total > 0, variances_K[:components].sum() / total, 1.0)


def correlation(x_ND: Tensor) -> Tensor:
    """Mean absolute correlation of two different dimensions; constant ones correlate with none."""
    spread = deviations(x_ND)
    x_ND = x_ND.double() - x_ND.double().mean(0)
    x_ND = torch.where(spread > 0, x_ND / spread, 0) / math.sqrt(max(1, len(x_ND) - 1))
    dim = x_ND.shape[1]
    matrix = (x_ND.T @ x_ND).abs()
    return (matrix.sum() - matrix.diagonal().sum()) / max(1, dim * (dim - 1))


def uniformity(x_ND: Tensor) -> Tensor:
    """Log of the mean Gaussian potential e^(−2‖u−v‖²) of two samples on the unit sphere (Wang and Isola 2020, eq. 2).

    0 where all samples coincide, about −4 where many spread evenly over many dimensions; nan for a single sample.
    """
    u = F.normalize(x_ND.double(), dim=-1)
    n = len(u)
    potential = (4 * (u @ u.T).clamp(-1, 1) - 4).exp()  # ‖u − v‖² = 2 − 2uᵀv
    pairs = potential.sum() - potential.diagonal().sum()
    return (pairs / (n * (n - 1))).log() if n > 1 else u.new_tensor(math.nan)


def alignment(x_VND: Tensor) -> Tensor:
    """Mean squared distance of two views of a sample on the unit sphere (Wang and Isola 2020, eq. 1, α = 2)."""
    u = F.normalize(x_VND.double(), dim=-1)
    return torch.stack([(a - b).square().sum(-1).mean() for a, b in combinations(u, 2)]).mean()


def report(x_VND: Tensor) -> dict[str, float]:
    """Every metric of features (V, N, D), by name; those that the features do not define are left out.

    Views are samples of their own for all but `uniformity` (mean over views), `alignment` and `lidar`. Features that
    are not finite have a `variance` of nan and no other metric.
    """
    x_VND = x_VND.double()
    x_ND = x_VND.flatten(0, 1)
    spread_D = deviations(x_ND)
    if not spread_D.isfinite().all():
        return {"variance": math.nan}
    dim = x_ND.shape[1]
    norms, variances = x_ND.norm(dim=-1), spectrum(x_ND)
    rank = effective_rank(variances)
    metrics = {
        "std_mean": spread_D.mean(),
        "std_min": spread_D.min(),
        "variance": spread_D.square().mean(),
        "norm_mean": norms.mean(),
        "norm_std": norms.std(correction=0),
        "effective_rank": rank,
        "rank_ratio": rank / dim,
        "rankme": rankme(x_ND),
        "alpha_req": alpha_req(variances),
        "isotropy": isotropy(variances, dim),
        "variance_explained_1": variance_explained(variances, 1),
        "variance_explained_10": variance_explained(variances, 10),
        "correlation": correlation(x_ND[:, :: -(-dim // _CORRELATED)]),
        "uniformity": torch.stack([uniformity(view) for view in x_VND]).mean(),
    }
    if len(x_VND) > 1:
        metrics |= {"alignment": alignment(x_VND), "lidar": lidar(x_VND)}
    values = torch.stack(list(metrics.values())).tolist()
    return {name: value for name, value in zip(metrics, values, strict=True) if math.isfinite(value)}


def verdicts(metrics: Mapping[str, float]) -> dict[str, str]:
    """Judge `variance`, `rank_ratio` and `uniformity` as "collapsed", "low" or "healthy" by `LIMITS`."""
    return {name: _verdict(metrics[name], *limits) for name, limits in LIMITS.items() if name in metrics}


def _verdict(value: float, collapsed: float, healthy: float) -> str:
    sign = 1 if healthy > collapsed else -1
    if not sign * value >= sign * collapsed:  # nan has collapsed
        return "collapsed"
    return "healthy" if sign * value >= sign * healthy else "low"
