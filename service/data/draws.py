"""Random numbers as a pure function of integers: the same on every rank, device, restart and library version.

`datasets_prep.permute` holds the mixer and its numpy half; here is the same arithmetic for torch tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from datasets_prep.permute import GOLDEN, MASK, MIX1, MIX2, hash_numpy, key, permutation

if TYPE_CHECKING:
    import torch

__all__ = ["hash_numpy", "hash_torch", "key", "normal", "permutation", "uniform"]


def _signed(value: int) -> int:
    """Return the 64-bit pattern of `value` as a signed integer, torch's only 64-bit type with full arithmetic."""
    value &= MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # logical: torch shifts int64 arithmetically


def hash_torch(key_: int, counters: torch.Tensor) -> torch.Tensor:
    """As `hash_numpy`, bit for bit, in int64 on the device of `counters`."""
    z = (counters ^ _signed(key_)) + _signed(GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(MIX1)
    z = (z ^ _shift(z, 27)) * _signed(MIX2)
    return z ^ _shift(z, 31)


def uniform(key_: int, ids: torch.Tensor, draws: int) -> torch.Tensor:
    """Draw uniforms in [0, 1) for samples.

    Args:
        key_: what else the draws depend on, from `key(seed, epoch, …)`.
        ids: (B,) int64 sample ids.
        draws: numbers wanted for each sample, K.

    Returns:
        (B, K) float32 with 24 random bits, equal on CPU and GPU.
    """
    import torch

    per_sample = hash_torch(key_, ids)[:, None]
    columns = hash_torch(~key_ & MASK, torch.arange(draws, device=ids.device))[None, :]
    return _shift(hash_torch(0, per_sample ^ columns), 40).to(torch.float32) * 2.0**-24


def normal(u: torch.Tensor) -> torch.Tensor:
    """Turn uniforms of `uniform` into standard normals, up to 5.4 standard deviations either way."""
    import torch

    return torch.special.ndtri(u.clamp(min=2.0**-25))  # 0 is drawn, 1 is not
