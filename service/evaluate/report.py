"""One protocol for every representation: few-label and full linear probes and k-NN, compared by paired intervals.

Raw pixels, the encoder at random weights and the trained encoder all pass through `evaluate_features`, with the same
label draws and the same test samples, so that their differences can be taken draw by draw and sample by sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets_prep.errors import UserError
from service.data.draws import key, permutation
from service.evaluate import knn, linear_probe

_STREAM = 0x1ABE1  # keeps label draws apart from other uses of the seed
_CHUNK = 1 << 26  # numbers in the features or the weights of the label draws that are fitted together


@dataclass(frozen=True)
class Score:
    """One column: an outcome in percent for each label draw, or 0 and 100 for each test sample."""

    outcomes: NDArray[np.float64]

    @property
    def percent(self) -> float:
        """Mean outcome: top-1 accuracy in percent."""
        return float(self.outcomes.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean: binomial where outcomes are test samples."""
        correction = 0 if np.isin(self.outcomes, (0.0, 100.0)).all() else 1
        return float(self.outcomes.std(ddof=correction) / len(self.outcomes) ** 0.5)


Scores = dict[str, Score]


def label_draws(labels: NDArray[Any], classes: int, per_class: int, draws: int, seed: int) -> NDArray[np.int64]:
    """Choose the training samples whose labels a few-label probe may see.

    A class's draw depends on nothing but (seed, draw, class); fewer labels are always part of more.

    Args:
        labels: (N,) integers below `classes`.
        classes: K.
        per_class: labels wanted of each class.
        draws: R.
        seed: of the protocol, not of the run.

    Returns:
        (R, K × per_class) positions in `labels`.

    Raises:
        UserError: a class has fewer samples.
    """
    members = [np.flatnonzero(labels == c) for c in range(classes)]
    smallest = min(range(classes), key=lambda c: len(members[c]))
    if len(members[smallest]) < per_class:
        raise UserError(
            f"eval.labels_per_class={per_class} exceeds the {len(members[smallest])} training samples of class "
            f"{smallest}: ask for fewer labels"
        )
    return np.stack(
        [
            np.concatenate(
                [m[permutation(key(seed, _STREAM, r, c), len(m))[:per_class]] for c, m in enumerate(members)]
            )
            for r in range(draws)
        ]
    )


def evaluate_features(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    classes: int,
    c: float,
    k: int,
    temperature: float,
    labels_per_class: Sequence[int],
    draws: int,
    seed: int,
) -> Scores:
    """Score frozen features on the device they lie on.

    Args:
        train_x: (N, D) features; without labels, they set the centre and the scale of everything below.
        train_y: (N,) labels below `classes`.
        test_x: (M, D) features.
        test_y: (M,) labels.
        classes: number of classes.
        c: inverse L2 strength of the probes.
        k: neighbours of k-NN.
        temperature: of k-NN's weights.
        labels_per_class: few-label probes to fit, each over the same `draws`.
        draws: label draws of each few-label probe.
        seed: of the label draws.

    Returns:
        A score for each of `labels_per_class`, for "all" labels and for "knn".

    Raises:
        UserError: a sample has no label, or a class has fewer samples than labels are asked for.
    """
    for name, labels in (("training", train_y), ("test", test_y)):
        _check_labels(name, labels, classes)
    train_x, test_x = linear_probe.standardise(train_x.float(), test_x.float())
    train_y, test_y = train_y.long(), test_y.long()
    scores: Scores = {}
    for count in labels_per_class:
        chosen = label_draws(train_y.cpu().numpy(), classes, count, draws, seed)
        index = torch.from_numpy(chosen).to(train_x.device)
        scores[str(count)] = Score(_few_labels(train_x, train_y, test_x, test_y, index, classes, c))
    probe = linear_probe.fit(train_x, train_y, classes, c)
    scores["all"] = _per_sample(linear_probe.predict(probe, test_x), test_y)
    voted = knn.predict(train_x, train_y, test_x, classes=classes, k=k, temperature=temperature)
    scores["knn"] = _per_sample(voted, test_y)
    return scores


def _check_labels(name: str, labels: Tensor, classes: int) -> None:
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        raise UserError(
            f"{int(outside.sum())} of {len(labels)} {name} samples have a label outside 0…{classes - 1}, such as "
            f"{int(labels[outside][0])}: evaluate on splits whose samples all have labels"
        )


def _per_sample(predicted: Tensor, truth: Tensor) -> Score:
    return Score(100 * (predicted == truth).double().cpu().numpy())


def _few_labels(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, index_RN: Tensor, classes: int, c: float
) -> NDArray[np.float64]:
    """Accuracy in percent of each of the R label draws."""
    together = max(1, _CHUNK // (train_x.shape[1] * max(index_RN.shape[1], classes)))
    parts = []
    for index in index_RN.split(together):
        probe = linear_probe.fit(train_x[index], train_y[index], classes, c)
        parts.append(linear_probe.accuracy(probe, test_x, test_y)[0].cpu().numpy())
    return np.concatenate(parts)


def percentages(scores: Scores) -> dict[str, float]:
    """Return the plain numbers of `scores`, ready for JSON and MLflow."""
    return {column: round(score.percent, 3) for column, score in scores.items()}


def paired_interval(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
    """Compare two paired series of outcomes.

    Over label draws the interval tells how the choice of labels moves the difference, the test set being given; over
    test samples it tells how the choice of test samples does.

    Args:
        a: (R,) outcomes.
        b: (R,) outcomes of the same draws or samples, R ≥ 2.

    Returns:
        Mean of a − b and half the width of its 95 % interval (Student's t).
    """
    from scipy.special import stdtrit

    difference = np.asarray(a) - np.asarray(b)
    freedom = len(difference) - 1
    half = stdtrit(freedom, 0.975) * difference.std(ddof=1) / len(difference) ** 0.5
    return float(difference.mean()), float(half)


def gains(rows: Mapping[str, Scores]) -> dict[str, dict[str, Any]]:
    """Compare the last row with the best of the others, column by column, ready for JSON."""
    *baselines, (_, trained) = rows.items()
    found = {}
    for column, score in trained.items():
        name, best = max(((name, scores[column]) for name, scores in baselines), key=lambda row: row[1].percent)
        mean, half = paired_interval(score.outcomes, best.outcomes)
        found[column] = {"over": name, "points": round(mean, 3), "half_width": round(half, 3)}
    return found
