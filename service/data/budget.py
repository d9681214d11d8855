"""Samples that cannot be decoded: which other one takes their place, and how many of them are too many."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from datasets_prep.errors import UserError
from service.data.draws import hash_numpy, key
from service.data.plan import Plan

ATTEMPTS = 8  # replacements that are tried for one sample
_SHOWN = 5


def replacement(plan: Plan, id_: int, attempt: int) -> int:
    """Id of the sample that takes the place of sample `id_`: another of its shard, which is open already."""
    number, row = (int(part[0]) for part in plan.locate(np.array([id_])))
    others = plan.shard_samples[number] - 1
    if others == 0:
        return id_
    drawn = int(hash_numpy(key(attempt), np.array([id_]))[0] % np.uint64(others))
    return id_ - row + (row + 1 + drawn) % (others + 1)


class ErrorBudget:
    """Counts the bad samples that a rank met in an epoch.

    Args:
        most: bad samples that an epoch may have; the first one more is an error.
    """

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0
        self._epoch = -1
        self._last: deque[str] = deque(maxlen=_SHOWN)

    def spend(self, epoch: int, faults: Sequence[str]) -> None:
        """Count faults, each the name and the reason; UserError when the epoch has too many."""
        if epoch != self._epoch:
            self._epoch, self.used = epoch, 0
        self.used += len(faults)
        self._last.extend(faults)
        if self.used > self.most:
            raise over_budget(self.used, self.most, list(self._last))


def over_budget(found: int, most: int, faults: Sequence[str]) -> UserError:
    """Error that gives the number of bad samples, the budget, and some of them by name."""
    shown = "\n  ".join(faults[-_SHOWN:])
    return UserError(
        f"{found} sample{'s' * (found > 1)} cannot be decoded, and data.max_bad={most} allows {most} in an epoch: "
        f"shard again without them, or raise data.max_bad:\n  {shown}"
    )
