"""Names inside a checkpoint directory, and which of them are ours.

Every save has an id that no earlier save used, and all files it writes carry it; so leftovers of a crashed
save can be told from files of the committed one and from files of strangers. Names read from a checkpoint
are matched against these patterns before any use, so none can point outside the directory.
"""

from __future__ import annotations

import datetime as dt
import re

RECORD_NAME = "checkpoint.json"
DATA_DIR = "data"

_SAVE_ID = r"[0-9]{8}T[0-9]{6}-[0-9a-f]{16}"
_DATA = re.compile(rf"{DATA_DIR}/({_SAVE_ID})-r[0-9]{{5,9}}-[0-9]{{1,9}}\.safetensors")
_INDEX = re.compile(rf"({_SAVE_ID})\.index\.safetensors")
_TEMPORARY = re.compile(rf"checkpoint\.json\.({_SAVE_ID})\.tmp")


def new_save_id(now: dt.datetime, random_hex: str) -> str:
    """A save id: UTC time to the microsecond (5 hexadecimal digits of it), and 44 random bits (11 digits).

    Ids of later saves are greater, as far as clocks allow.
    """
    return f"{now:%Y%m%dT%H%M%S}-{now.microsecond:05x}{random_hex[:11]}"


def is_save_id(text: str) -> bool:
    """Whether `text` has the form of a save id."""
    return re.fullmatch(_SAVE_ID, text) is not None


def data_file_name(save_id: str, rank: int, number: int) -> str:
    """Name of the `number`-th data file that `rank` writes."""
    return f"{DATA_DIR}/{save_id}-r{rank:05d}-{number}.safetensors"


def index_file_name(save_id: str) -> str:
    """Name of the index of a save."""
    return f"{save_id}.index.safetensors"


def is_data_file(name: str) -> bool:
    """Whether `name` is a data file's."""
    return _DATA.fullmatch(name) is not None


def is_index_file(name: str) -> bool:
    """Whether `name` is an index's."""
    return _INDEX.fullmatch(name) is not None


def save_id_of(name: str) -> str | None:
    """The id of the save that wrote the file of this name; None for foreign names and for the record."""
    for pattern in (_DATA, _INDEX, _TEMPORARY):
        match = pattern.fullmatch(name)
        if match:
            return match[1]
    return None
