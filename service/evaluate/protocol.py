"""What is measured of a run: a validation probe to choose by, and one report on the test split at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datasets_prep.index import Index
from service.config import RunConfig
from service.data.split import DataSplit
from service.data.store import Store
from service.engine.worker import Worker
from service.evaluate import linear_probe, quality
from service.evaluate.features import RawPixels, extract, extract_views
from service.evaluate.report import Scores, evaluate_features, gains, percentages
from service.models.encoder import build_encoder, every_level

Features = tuple[Tensor, Tensor]  # (N, D) and labels (N,)
_NOTHING: Mapping[str, Features] = {}
_DRAW_SEED = 0  # of the label draws: of the protocol, not of the run, so that runs compare draw by draw
_VERSION = "linear-v1"
_QUALITY_SAMPLES = 1024  # of a split, in its random order: metrics of rank compare at equal numbers only


def random_encoder(config: RunConfig) -> nn.Module:
    """Build the run's encoder as it was before its first step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_encoder(image_size=config.data.image_size, **config.family.encoder_options())


@dataclass(frozen=True)
class Protocol:
    """Evaluation of encoders on one data set; all ranks extract features and compute the same scores."""

    config: RunConfig
    store: Store
    index: Index
    worker: Worker

    def validation(self, encoder: nn.Module) -> dict[str, float]:
        """Accuracy of a linear probe on the validation split and its standard error, in percent."""
        data = self.config.data
        train, held_out = (self._features(encoder, name) for name in (data.train_split, data.val_split))
        return self._validation(train, held_out, slice(None))

    def _validation(self, train: Features, held_out: Features, part: slice) -> dict[str, float]:
        x, queries = linear_probe.standardise(train[0][:, part], held_out[0][:, part])
        probe = linear_probe.fit(x, train[1], self._classes, self.config.eval.probe_c)
        accuracy, error = linear_probe.accuracy(probe, queries, held_out[1])
        return {"val_linear": float(accuracy), "val_linear_se": float(error)}

    @property
    def reported_split(self) -> str:
        """The test split, or the validation split of a data set that has no other."""
        data = self.config.data
        return data.test_split if data.test_split in self.index.splits else data.val_split

    def final(self, encoder: nn.Module, others: Mapping[str, nn.Module] | None = None) -> dict[str, Any]:
        """Validation scores, and the table of `encoder` and of `others` on the reported split."""
        reported = self.reported_split
        data = self.config.data
        # Names what `val_linear` measures: encoders compare only under one name.
        protocol = (
            f"{_VERSION} C={self.config.eval.probe_c:g} {data.train_split}-{data.val_split} {data.eval_image_size}px"
        )
        head = {"protocol": protocol, "reported_split": reported}
        module, parts = every_level(encoder)
        known = {name: self._features(module, name) for name in (data.train_split, data.val_split)}
        validation = self._validation(known[data.train_split], known[data.val_split], parts["trained"])
        return validation | head | self.table(encoder, reported, others, known)

    def table(
        self,
        encoder: nn.Module,
        split: str,
        others: Mapping[str, nn.Module] | None = None,
        known: Mapping[str, Features] = _NOTHING,
    ) -> dict[str, Any]:
        """Scores and quality of representations on `split`, and paired intervals of the trained one's gains.

        Rows are raw pixels, the encoder at random weights, the trained one, each level of it if it has levels, and the
        `others` that were trained beside it. Gains are over the first two. `known` holds features of all levels of
        `encoder`, by split, that need no second pass.
        """
        random = random_encoder(self.config).to(self.worker.device)
        random = random.double() if self.config.compute.precision == "fp64" else random
        single = {"raw_pixels": RawPixels(), "random_encoder": random}
        baselines = {name: self._measure(module, {name: slice(None)}, split)[name] for name, module in single.items()}
        rows = baselines | self._measure(*every_level(encoder), split, known)
        for name, module in (others or {}).items():
            rows |= self._measure(module, {name: slice(None)}, split)
        return {
            "scores": {name: percentages(scores) for name, (scores, _) in rows.items()},
            "paired": gains({name: rows[name][0] for name in (*baselines, "trained")}),
            "quality": {name: found for name, (_, found) in rows.items()},
        }

    def _measure(
        self, encoder: nn.Module, parts: Mapping[str, slice], split: str, known: Mapping[str, Features] = _NOTHING
    ) -> dict[str, tuple[Scores, dict[str, Any]]]:
        """Scores and quality of some dimensions of a representation, by name, from one pass over the data."""
        names = self.config.data.train_split, split
        train, held_out = (known[name] if name in known else self._features(encoder, name) for name in names)
        views = self._views(encoder, split)
        found: dict[tuple[int, int], tuple[Scores, dict[str, Any]]] = {}
        for part in parts.values():
            if (part.start, part.stop) not in found:
                measured = self._scores(train, held_out, part), _quality(held_out[0][:, part], views[..., part])
                found[part.start, part.stop] = measured
        return {name: found[part.start, part.stop] for name, part in parts.items()}

    def _scores(self, train: Features, held_out: Features, part: slice) -> Scores:
        options = self.config.eval
        return evaluate_features(
            train[0][:, part],
            train[1],
            held_out[0][:, part],
            held_out[1],
            classes=self._classes,
            c=options.probe_c,
            k=options.knn_k,
            temperature=options.knn_temperature,
            labels_per_class=options.labels_per_class,
            draws=options.label_draws,
            seed=_DRAW_SEED,
        )

    def _views(self, encoder: nn.Module, split: str) -> Tensor:
        """Features of two augmented views of some of a split's samples, (2, N, D)."""
        return extract_views(
            encoder,
            DataSplit(self.store, self.index, split),
            data=self.config.data,
            compute=self.config.compute,
            worker=self.worker,
            samples=_QUALITY_SAMPLES,
            views=2,
        )

    @property
    def _classes(self) -> int:
        return len(self.index.classes)

    def _features(self, encoder: nn.Module, name: str) -> Features:
        """Encode a split's labelled, readable samples."""
        split = DataSplit(self.store, self.index, name)
        features, readable = extract(
            encoder,
            split,
            data=self.config.data,
            compute=self.config.compute,
            worker=self.worker,
            batch_size=self.config.eval.batch_size,
        )
        labels = torch.from_numpy(split.labels.astype(np.int64))
        chosen = readable & (labels >= 0)
        return features[chosen], labels[chosen]


def _quality(features: Tensor, views: Tensor) -> dict[str, Any]:
    """Metrics of features (N, D), with those of two augmented views (2, N, D) beside, and verdicts."""
    metrics = quality.report(features[None, :_QUALITY_SAMPLES])
    metrics |= {"alignment": float(quality.alignment(views)), "lidar": float(quality.lidar(views))}
    rounded = {name: float(f"{value:.6g}") for name, value in metrics.items()}
    return rounded | {"verdicts": quality.verdicts(metrics)}
