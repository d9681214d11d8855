"""The one error that users see without a traceback."""

from collections.abc import Sequence

_SHOWN = 5


class UserError(Exception):
    """Something the user can mend: the message states the value, the constraint and the fix, and names URIs."""


def refuse(where: object, faults: Sequence[str], fix: str) -> None:
    """Raise one UserError that counts `faults` and shows the first five; return if there are none."""
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise UserError(f"{where}: {'; '.join(faults[:_SHOWN])}{more}: {fix}")
