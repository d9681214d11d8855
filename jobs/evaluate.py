"""`tessera evaluate`: a registered encoder on a data set, beside raw pixels and its own random initialisation."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from service.config import RunConfig


def evaluate(tracking_uri: str, model_uri: str, data_uri: str | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """Score an encoder under the protocol of the run that trained it.

    Args:
        tracking_uri: MLflow's address.
        model_uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        data_uri: data set to evaluate on; None takes the one it was trained on.
        overrides: settings of `eval` to change.

    Returns:
        `scores` and `paired` as in a run's result, with the model, the data and both fingerprints.
    """
    from service import tracking
    from service.data.split import read_index
    from service.data.store import Store
    from service.engine.worker import start_worker
    from service.evaluate.protocol import Protocol
    from service.export import load_encoder, read_config

    info = tracking.model_info(tracking_uri, model_uri)
    with tempfile.TemporaryDirectory(prefix="tessera-encoder-") as scratch:
        folder = tracking.download_encoder(tracking_uri, info.uri, Path(scratch))
        trained_by, encoder = read_config(folder), load_encoder(folder)
    config = _with(trained_by, data_uri, overrides)
    store = Store(config.data.uri)
    index = read_index(store)
    worker = start_worker(config.compute)
    protocol = Protocol(config, store, index, worker)
    split = protocol.reported_split
    return {
        "model_uri": info.uri,
        "data": store.uri,
        "fingerprint": index.fingerprint,
        "trained_on": info.tags.get("fingerprint"),
        "reported_split": split,
        **protocol.table(encoder.to(worker.device), split),
    }


def _with(config: RunConfig, data_uri: str | None, overrides: dict[str, Any]) -> RunConfig:
    tree = config.plain()
    tree["data"] |= {"mode": "auto"} | ({"uri": data_uri} if data_uri else {})
    tree["eval"] |= overrides
    tree["compute"] |= {"device": "auto", "threads": None, "compile": False}
    return RunConfig.model_validate(tree)
