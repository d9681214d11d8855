"""Weighted k-nearest-neighbour classification of frozen features (Wu, Xiong, Yu and Lin 2018, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 1 << 24  # numbers in the largest temporary


def predict(train: Tensor, labels: Tensor, queries: Tensor, *, classes: int, k: int, temperature: float) -> Tensor:
    """Let the k most similar training samples vote, each with weight exp(cosine / temperature).

    Args:
        train: (N, D) features.
        labels: (N,) integers below `classes`.
        queries: (M, D) features.
        classes: number of classes.
        k: voters; all N where there are fewer.
        temperature: the lower, the more the nearest decide.

    Returns:
        (M,) classes, int64.
    """
    k = min(k, len(train))
    bank = F.normalize(train, dim=1).T
    rows = max(1, _CHUNK // max(len(train), k * classes))
    return torch.cat([_vote(part @ bank, labels, classes, k, temperature) for part in F.normalize(queries).split(rows)])


def _vote(similarity: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    nearest, index = similarity.topk(k, dim=1)
    weight = torch.exp((nearest - nearest[:, :1]) / temperature)  # relative to the nearest: no overflow
    votes = F.one_hot(labels[index], classes).to(weight.dtype)
    return torch.einsum("bk,bkc->bc", weight, votes).argmax(1)  # a sum over k, unlike scatter_add, keeps its order


def accuracy(
    train: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, *, classes: int, k: int, temperature: float
) -> tuple[float, float]:
    """Return top-1 accuracy in percent and its binomial standard error; arguments as in `predict`."""
    hits = predict(train, labels, queries, classes=classes, k=k, temperature=temperature) == truth
    share = hits.double().mean().item()
    return 100 * share, 100 * (share * (1 - share) / len(truth)) ** 0.5
