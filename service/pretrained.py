"""Weights to start from: a kept encoder's folder, or a safetensors file with timm's or torchvision's parameter names.

What our encoders do not have is left out: classifiers, class and register tokens with their positions. All else has to
fit, but for the grid of the position embedding, which is resampled.
"""

from __future__ import annotations

import hashlib
import json
import math

import torch
from safetensors.torch import load
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from datasets_prep.errors import UserError
from service.config import RunConfig
from service.data.store import Store
from service.export import WEIGHTS
from service.models.encoder import build_encoder
from service.models.resnet import ResNet

Shapes = dict[str, tuple[int, ...]]
_LEFT_OUT = ("head.", "fc.", "cls_token", "reg_token")
_POSITIONS = "pos_embed"
_OURS_ALONE = "fpn."  # starts at random where the weights have none
_LARGEST_HEADER = 100 << 20  # bytes, as in safetensors itself
_SHOWN = 8


def check_initial(config: RunConfig) -> str:
    """Check from a file's header alone that `init_from` fits the encoder of a config, and return its SHA-256.

    Raises:
        UserError: no such file, no safetensors, or weights of another encoder; it lists what differs.
    """
    assert config.init_from is not None
    store, name = _locate(config.init_from)
    theirs = _read_shapes(store, name)
    with torch.device("meta"):
        encoder = build_encoder(image_size=config.data.image_size, **config.family.encoder_options())
    _compare({key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}, theirs, config.init_from)
    digest = hashlib.sha256()
    for chunk in store.stream(name):
        digest.update(chunk)
    return digest.hexdigest()


def load_initial(family: nn.Module, uri: str) -> None:
    """Load the weights at `uri` into every encoder of a family, target encoders too."""
    store, name = _locate(uri)
    weights = load(store.get(name))
    for encoder in family.modules():
        if isinstance(encoder, ResNet | VisionTransformer):
            load_encoder_weights(encoder, weights, uri)


def load_encoder_weights(encoder: nn.Module, weights: dict[str, Tensor], uri: str) -> None:
    """Load weights read from `uri` into an encoder, with the positions of its own grid."""
    ours = {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}
    _compare(ours, {key: tuple(tensor.shape) for key, tensor in weights.items()}, uri)
    chosen = {key: tensor for key, tensor in weights.items() if not key.startswith(_LEFT_OUT)}
    if _POSITIONS in ours:
        chosen[_POSITIONS] = _resample(chosen[_POSITIONS].float(), ours[_POSITIONS][1])
    encoder.load_state_dict(chosen, strict=False)  # compared above


def _locate(uri: str) -> tuple[Store, str]:
    if not uri.endswith(".safetensors"):
        return Store(uri), WEIGHTS
    folder, _, name = uri.rpartition("/")
    return Store(folder or "."), name


def _read_shapes(store: Store, name: str) -> Shapes:
    """Shapes from the header of a safetensors file, without the rest of it."""
    uri = f"{store.uri}/{name}"
    try:
        length = int.from_bytes(store.ranges(name, [0], [8])[0], "little")
        if not 0 < length <= _LARGEST_HEADER:
            raise ValueError(f"its header would have {length} bytes")
        header = json.loads(store.ranges(name, [8], [length])[0])
        return {key: tuple(each["shape"]) for key, each in header.items() if key != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{uri} is no safetensors file ({error}): save weights with safetensors.torch.save_file"
        ) from error


def _compare(ours: Shapes, theirs: Shapes, uri: str) -> None:
    """Raise a `UserError` that lists what of `theirs` does not fit `ours`."""
    theirs = {key: shape for key, shape in theirs.items() if not key.startswith(_LEFT_OUT)}
    needed = [key for key in ours if not key.endswith("num_batches_tracked") and not key.startswith(_OURS_ALONE)]
    faults = [f"{key} is missing" for key in needed if key not in theirs]
    faults += [f"{key} has no counterpart" for key in theirs if key not in ours]
    for key, shape in ours.items():
        if key in theirs and theirs[key] != shape and not _can_resample(key, shape, theirs[key]):
            faults.append(f"{key} is {theirs[key]}, the encoder's is {shape}")
    if faults:
        more = f"; {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise UserError(
            f"init_from={uri} does not fit family.encoder: {'; '.join(faults[:_SHOWN])}{more}: "
            "choose weights of the same architecture, or change family.encoder"
        )


def _can_resample(key: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    return key == _POSITIONS and len(theirs) == 3 and ours[-1] == theirs[-1]


def _resample(positions: Tensor, count: int) -> Tensor:
    """Position embedding (1, P + N, D) of P prefix tokens and a square grid to (1, `count`, D) of another."""
    side = math.isqrt(positions.shape[1])
    grid = positions[:, positions.shape[1] - side**2 :]
    return resample_abs_pos_embed(grid, [math.isqrt(count)] * 2, [side] * 2, num_prefix_tokens=0)
