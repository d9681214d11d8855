"""From shards to batches; `ShardDataset` serves programs that use nothing else of Tessera."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.data.dataset import ShardDataset

__all__ = ["ShardDataset"]


def __getattr__(name: str) -> Any:
    """Import `ShardDataset`, and torch with it, when it is asked for."""
    if name != "ShardDataset":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from service.data.dataset import ShardDataset

    return ShardDataset
