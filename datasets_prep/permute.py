"""Permutations and stratified choices as pure functions of integers: the same on every machine and numpy version.

The mixer is SplitMix64's finaliser (Steele, Lea and Flood 2014) in wrapping 64-bit integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB
MASK = (1 << 64) - 1


def key(*parts: int) -> int:
    """Fold integers into one 64-bit key; the order of `parts` matters."""
    state = 0
    for part in parts:
        state = _mix((state ^ (part & MASK)) + GOLDEN)
    return state


def _mix(z: int) -> int:
    z &= MASK
    z = ((z ^ (z >> 30)) * MIX1) & MASK
    z = ((z ^ (z >> 27)) * MIX2) & MASK
    return z ^ (z >> 31)


def hash_numpy(key_: int, counters: NDArray[Any]) -> NDArray[np.uint64]:
    """Mix `counters` (any shape, integers) with a key into uint64 of the same shape."""
    with np.errstate(over="ignore"):
        z = counters.astype(np.uint64) ^ np.uint64(key_)
        z += np.uint64(GOLDEN)  # in place from here: large counters stay in a core's cache
        z ^= z >> np.uint64(30)
        z *= np.uint64(MIX1)
        z ^= z >> np.uint64(27)
        z *= np.uint64(MIX2)
        z ^= z >> np.uint64(31)
        return z


def permutation(key_: int, n: int) -> NDArray[np.int64]:
    """Return a permutation of `range(n)` that depends on nothing but the key."""
    return np.argsort(hash_numpy(key_, np.arange(n)), kind="stable")


def stratified(key_: int, labels: NDArray[Any], count: int) -> NDArray[np.bool_]:
    """Choose `count` of (N,) labels so that each class keeps its share, by largest remainder.

    Returns:
        (N,) mask of the chosen; it depends on the key and the labels only.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * count
    wanted = exact // len(labels)
    by_remainder = np.argsort(-(exact % len(labels)), kind="stable")
    wanted[by_remainder[: count - wanted.sum()]] += 1
    chosen = np.zeros(len(labels), bool)
    for class_, want in zip(classes, wanted, strict=True):
        members = np.flatnonzero(labels == class_)
        chosen[members[permutation(key(key_, int(class_)), len(members))[:want]]] = True
    return chosen
