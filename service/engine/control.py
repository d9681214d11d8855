"""Flags that ranks raise while they train, and on which all of them act at the same step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from service.collectives import own_group


class Control:
    """Flags by name; one that any rank raises counts for all.

    A call starts the exchange of this step's flags and returns what the last step's came to, so that nobody waits for
    it. A process alone has its own at once. All ranks make one, before they train, and call it once a step.
    """

    def __init__(self, *names: str) -> None:
        self._names, self._group = names, own_group()
        self._exchange: tuple[dist.Work, Tensor] | None = None

    def __call__(self, **raised: bool) -> set[str]:
        """Offer this rank's flags; returns those that are raised for all."""
        own = torch.tensor([raised[name] for name in self._names], dtype=torch.int32)
        if self._group is None:
            return self._named(own)
        agreed = self._finished()
        work = dist.all_reduce(own, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._exchange = work, own
        return agreed

    def _finished(self) -> set[str]:
        if self._exchange is None:
            return set()
        work, flags = self._exchange
        work.wait()
        return self._named(flags)

    def _named(self, flags: Tensor) -> set[str]:
        return {name for name, flag in zip(self._names, flags.tolist(), strict=True) if flag}
