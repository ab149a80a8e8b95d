"""What settings must be. Called by `options`."""

from __future__ import annotations

from giantstep.errors import BadArgumentError


def require(condition: bool, field: str, value: object, expected: str) -> None:
    """Raise `BadArgumentError` naming field and value unless the condition holds."""
    if not condition:
        raise BadArgumentError(f"{field}={value!r} cannot be: expected {expected}")


def require_int(field: str, value: object, low: int, high: int) -> None:
    """Raise `BadArgumentError` unless it is an int in the range."""
    require(
        isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        field,
        value,
        f"an int from {low} to {high}",
    )


def require_secs(field: str, value: object) -> None:
    """Raise `BadArgumentError` unless it is a positive number of seconds."""
    require(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9,
        field,
        value,
        "a positive number of seconds",
    )
