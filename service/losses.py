"""Losses as pure functions: tensors and numbers in, scalars out. Statistics span the global batch.

Shape legend: B samples of this rank, G samples of all ranks, D dimensions.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from service.collectives import all_gather_rows, all_reduce_sum, rank, world_size

VARIANCE_EPS = 1e-4


def vicreg_terms(
    z1_BD: Tensor, z2_BD: Tensor, *, gamma: float, cov_norm: Literal["paper", "offdiag_mean"]
) -> dict[str, Tensor]:
    """Unweighted terms of VICReg (Bardes, Ponce and LeCun 2022, eq. 1–6) in at least fp32.

    The invariance term is the mean over samples *and* dimensions, as in the published code; the paper's eq. 5
    sums over dimensions. Variance and covariance terms are summed over the two views.

    Args:
        z1_BD: embeddings of the first view, (B, D).
        z2_BD: embeddings of the second view, (B, D).
        gamma: standard deviation that the hinge asks for.
        cov_norm: divisor of the squared off-diagonal covariances: `paper` D, `offdiag_mean` D(D−1).

    Returns:
        `inv` (of this rank's samples), `std` and `cov` (of the global batch), scalars.
    """
    z1_BD, z2_BD = (z if z.dtype == torch.float64 else z.float() for z in (z1_BD, z2_BD))
    terms = {"inv": (z1_BD - z2_BD).square().mean()}
    with torch.autocast(z1_BD.device.type, enabled=False):
        views = [variance_covariance(z, gamma=gamma, cov_norm=cov_norm) for z in (z1_BD, z2_BD)]
    return terms | {"std": views[0][0] + views[1][0], "cov": views[0][1] + views[1][1]}


def variance_covariance(
    z_BD: Tensor, *, gamma: float, cov_norm: Literal["paper", "offdiag_mean"]
) -> tuple[Tensor, Tensor]:
    """Variance hinge (eq. 1) and covariance penalty (eq. 3–4) of one view, over the global batch.

    With fewer samples than dimensions the samples are gathered and ‖ZᵀZ‖² is computed as ‖ZZᵀ‖² on the G×G Gram
    matrix; otherwise the D×D moments are summed over ranks, so nothing larger than D×D travels.
    """
    dim = z_BD.shape[1]
    samples = z_BD.shape[0] * world_size()
    if samples < dim:
        z_GD = all_gather_rows(z_BD)
        z_GD = z_GD - z_GD.mean(0)
        variance_D = z_GD.square().sum(0) / (samples - 1)
        gram = z_GD @ z_GD.T
    else:
        z_BD = z_BD - all_reduce_sum(z_BD.sum(0)) / samples
        gram = all_reduce_sum(z_BD.T @ z_BD)
        variance_D = gram.diagonal() / (samples - 1)
    off_diagonal = gram.square().sum() / (samples - 1) ** 2 - variance_D.square().sum()
    hinge = torch.relu(gamma - torch.sqrt(variance_D + VARIANCE_EPS)).mean()
    return hinge, off_diagonal / (dim if cov_norm == "paper" else dim * (dim - 1))


def nt_xent(z1_BD: Tensor, z2_BD: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy (Chen et al. 2020, SimCLR, eq. 1) in at least fp32.

    Each embedding has to find the other view of its image among all other embeddings of the global batch, both views.

    Args:
        z1_BD: embeddings of the first view, (B, D), of any length: similarity is the cosine.
        z2_BD: embeddings of the second view, (B, D).
        temperature: divisor of the cosines.

    Returns:
        Mean over this rank's 2B embeddings, a scalar.
    """
    views = [z if z.dtype == torch.float64 else z.float() for z in (z1_BD, z2_BD)]
    with torch.autocast(z1_BD.device.type, enabled=False):
        own = torch.stack([F.normalize(z, dim=1) for z in views], 1).flatten(0, 1)  # views of an image side by side
        logits = own @ all_gather_rows(own).T / temperature
    here = torch.arange(len(own), device=own.device)
    itself = here + len(own) * rank()
    logits = logits.index_put((here, itself), logits.new_tensor(-torch.inf))
    return F.cross_entropy(logits, itself ^ 1)


def prediction_loss(predicted: Tensor, wanted: Tensor, kind: Literal["smooth_l1", "mse", "cosine"]) -> Tensor:
    """Mean distance of predicted tokens (…, D) to wanted ones: smooth-L1 with β = 1, squared, or 1 − cosine."""
    if kind == "smooth_l1":
        return F.smooth_l1_loss(predicted, wanted)
    if kind == "mse":
        return F.mse_loss(predicted, wanted)
    return 1 - F.cosine_similarity(predicted, wanted, dim=-1).mean()
