"""What the numbers in the names of a node-local checkpoint's data files say.

Chunks whose twins are the same lie in one group of files of their writer; of the `number`-th file of a group the name has
`group * FILES_PER_GROUP + number`. Parity has numbers of its own, by stripe and by block within the stripe.
"""

from __future__ import annotations

from giantstep.errors import BadArgumentError

FILES_PER_GROUP = 10_000
_FIRST_PARITY = 900_000_000
_BLOCKS_PER_STRIPE = 256


def group_numbers(group: int, files: int) -> list[int]:
    """Numbers of so many files of a group."""
    first = group * FILES_PER_GROUP
    if files > FILES_PER_GROUP or first + FILES_PER_GROUP > _FIRST_PARITY:
        raise BadArgumentError(
            f"{files} files in group {group} of a rank's cannot be numbered: allow larger ones (SaveOptions.max_file_bytes)"
        )
    return [*range(first, first + files)]


def number_in(name: str) -> int:
    """The number that a data file's name has."""
    return int(name.rpartition("-")[2].partition(".")[0])


def group_of_file(name: str) -> int:
    """The group of a data file that is no parity."""
    return number_in(name) // FILES_PER_GROUP


def parity_number(stripe: int, block: int) -> int:
    """Number of a file of parity."""
    return _FIRST_PARITY + stripe * _BLOCKS_PER_STRIPE + block


def parity_of_file(name: str) -> tuple[int, int] | None:
    """Stripe, and block within it, of a file of parity; None for other data files."""
    number = number_in(name) - _FIRST_PARITY
    return divmod(number, _BLOCKS_PER_STRIPE) if number >= 0 else None
