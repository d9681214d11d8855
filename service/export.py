"""A kept encoder, from its files and back: weights and config in, a module, a pt2 program or a pyfunc model out.

Nothing pickled is loaded: safetensors hold the weights, JSON the rest. The pt2 program is an export, never read back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn

from datasets_prep.errors import UserError
from service.config import RunConfig
from service.data.augment import MEAN, STD, resize_normalise
from service.models.encoder import build_encoder

if TYPE_CHECKING:
    from service.data.store import Store

WEIGHTS, CONFIG, PREPROCESSING, PROGRAM = "model.safetensors", "config.json", "preprocessing.json", "model.pt2"


class ServedEncoder(nn.Module):
    """Encoder with its preprocessing inside: uint8 images (B, H, W, 3) → representations (B, D) float32."""

    def __init__(self, encoder: nn.Module, image_size: int) -> None:
        super().__init__()
        self.encoder, self.image_size = encoder, image_size

    def forward(self, images: Tensor) -> Tensor:
        """Encode images of any one size."""
        return self.encoder(resize_normalise(images.permute(0, 3, 1, 2), self.image_size)).float()


def weights(encoder: nn.Module) -> bytes:
    """Give an encoder's weights as safetensors."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()})


def write_encoder(store: Store, encoder: nn.Module, config: RunConfig) -> None:
    """Write what registration, serving and `init_from` load: weights, config, preprocessing."""
    described = describe_preprocessing(config.data.eval_image_size, encoder.dim)  # pyright: ignore[reportArgumentType]
    store.put(WEIGHTS, weights(encoder))
    store.put(CONFIG, json.dumps(config.plain(), indent=1).encode())
    store.put(PREPROCESSING, json.dumps(described, indent=1).encode())


def read_config(folder: Path) -> RunConfig:
    """Config of the run that trained a kept encoder."""
    try:
        return RunConfig.model_validate_json((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / CONFIG} does not describe an encoder that this version can build: {error}"
        ) from error


def load_encoder(folder: Path) -> nn.Module:
    """Build the encoder that a folder's config describes and load its weights, in evaluation mode, float32."""
    config = read_config(folder)
    encoder = build_encoder(image_size=config.data.image_size, **config.family.encoder_options())
    encoder.load_state_dict(load_file(folder / WEIGHTS))
    return encoder.float().eval()


def export_program(folder: Path) -> Path:
    """Write `model.pt2` (torch.export) beside the weights: uint8 (B, S, S, 3) → float32 (B, D), any batch size B."""
    config = read_config(folder)
    size = config.data.eval_image_size
    served = ServedEncoder(load_encoder(folder), size).eval()
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(served, (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / PROGRAM)
    return folder / PROGRAM


class PyfuncEncoder:
    """What MLflow's pyfunc loads: numpy in, numpy out."""

    def __init__(self, folder: Path) -> None:
        self._served = ServedEncoder(load_encoder(folder), read_config(folder).data.eval_image_size).eval()

    def predict(self, images: NDArray[np.uint8], params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Encode uint8 images (B, H, W, 3) to (B, D)."""
        with torch.inference_mode():
            return self._served(torch.from_numpy(np.ascontiguousarray(images))).numpy()


def _load_pyfunc(path: str) -> PyfuncEncoder:
    """Entry point that MLflow calls by name."""
    return PyfuncEncoder(Path(path))


def describe_preprocessing(image_size: int, dim: int) -> dict[str, Any]:
    """Describe for `preprocessing.json` what goes in, what is done to it, and what comes out."""
    return {
        "input": {"dtype": "uint8", "shape": [-1, -1, -1, 3]},
        "resize": [image_size, image_size],
        "mean": MEAN,
        "std": STD,
        "output": {"dtype": "float32", "shape": [-1, dim]},
    }
