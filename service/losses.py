"""Losses as pure functions: tensors and numbers in, scalars out. Statistics span the global batch.

Shape legend: B samples of this rank, G samples of all ranks, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from service.collectives import all_gather_rows, all_reduce_sum, rank, world_size
from service.precision import at_least_fp32

VARIANCE_EPS = 1e-4


def vicreg_terms(
    *views_BD: Tensor, gamma: float, cov_norm: Literal["paper", "offdiag_mean"], local: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """Unweighted terms of VICReg (Bardes, Ponce and LeCun 2022, eq. 1–6) in at least fp32.

    The invariance term is the mean over samples *and* dimensions, as in the published code; the paper's eq. 5
    sums over dimensions. Variance and covariance terms are twice the mean over views: of two views the sum.

    Args:
        views_BD: embeddings of two or more global views, (B, D) each.
        gamma: standard deviation that the hinge asks for.
        cov_norm: divisor of the squared off-diagonal covariances: `paper` D, `offdiag_mean` D(D−1).
        local: embeddings of local crops, (B, D) each.

    Returns:
        `inv` (of this rank's samples), `std` and `cov` (of the global batch), scalars.
    """
    views_BD, local = tuple(map(at_least_fp32, views_BD)), [at_least_fp32(z) for z in local]
    with torch.autocast(views_BD[0].device.type, enabled=False):
        found = [variance_covariance(z, gamma=gamma, cov_norm=cov_norm) for z in (*views_BD, *local)]
    std, cov = (2 * torch.stack(term).mean() for term in zip(*found, strict=True))
    return {"inv": pair_distance(views_BD, local), "std": std, "cov": cov}


def invariance(views_BD: Sequence[Tensor], local: Sequence[Tensor] = ()) -> Tensor:
    """Mean squared distance of all views from the mean of the global ones (Balestriero and LeCun 2025, LeJEPA).

    Args:
        views_BD: embeddings of the global views, (B, D) each.
        local: embeddings of local crops, (B, D) each.

    Returns:
        Mean over views, this rank's samples and dimensions, a scalar in at least fp32.
    """
    views_BD, local = [at_least_fp32(z) for z in views_BD], [at_least_fp32(z) for z in local]
    centre = sum(views_BD[1:], views_BD[0]) / len(views_BD)
    return torch.stack([F.mse_loss(z, centre) for z in (*views_BD, *local)]).mean()


def pair_distance(views_BD: Sequence[Tensor], local: Sequence[Tensor] = ()) -> Tensor:
    """`invariance` on the scale of VICReg's eq. 5: without local crops the mean squared distance of pairs of views."""
    return invariance(views_BD, local) * (2 * len(views_BD) / (len(views_BD) - 1))


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
    with torch.autocast(z1_BD.device.type, enabled=False):
        views = [F.normalize(at_least_fp32(z), dim=1) for z in (z1_BD, z2_BD)]
        own = torch.stack(views, 1).flatten(0, 1)  # views of an image side by side
        logits = own @ all_gather_rows(own).T / temperature
    here = torch.arange(len(own), device=own.device)
    itself = here + len(own) * rank()
    logits = logits.index_put((here, itself), logits.new_tensor(-torch.inf))
    return F.cross_entropy(logits, itself ^ 1)


def prediction_losses(predicted: Tensor, wanted: Tensor, kind: Literal["smooth_l1", "mse", "cosine"]) -> Tensor:
    """Mean distance of each sample's predicted tokens (B, …, D) to wanted ones, (B,).

    Smooth-L1 with β = 1, squared, or 1 − cosine.
    """
    if kind == "cosine":
        return 1 - F.cosine_similarity(predicted, wanted, dim=-1).flatten(1).mean(1)
    distance = F.smooth_l1_loss if kind == "smooth_l1" else F.mse_loss
    return distance(predicted, wanted, reduction="none").flatten(1).mean(1)
