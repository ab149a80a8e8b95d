"""`compare`: in what two checkpoints differ; `giantstep diff`.

    indexes of both -compare_chunks-> equal, different, not known -(read what is not known)-> difference

Layouts need not be the same: what the indexes do not decide is read region by region, in bounded memory. Not here: looking
into one checkpoint (`Checkpoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import GiantstepError, StoreError, UnsupportedTypeError
from giantstep.format.codec import Unregistered
from giantstep.opening import open_checkpoint
from giantstep.planning.index_difference import DIFFERENT, EQUAL, UNKNOWN, Side, States, compare_chunks, compare_objects
from giantstep.reading.checkpoint import Checkpoint
from giantstep.reading.index_reader import TensorEntry
from giantstep.reading.norms import Norms, NormsSoFar
from giantstep.shards.dtypes import BY_CODE
from giantstep.shards.object_keys import COMMON_KEY
from giantstep.shards.paths import Path, dotted
from giantstep.shards.region import Region, split_region
from giantstep.storage.locate import StoreLike

_PIECE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class FormDifference:
    """A tensor that both have, with another dtype or shape: (name of the dtype in torch, shape) of each."""

    key: str
    first: tuple[str, tuple[int, ...]]
    second: tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ValueDifference:
    """A tensor of the same dtype and shape with other values; `norms` if they were asked for and the dtype has them."""

    key: str
    norms: Norms | None


@dataclass(frozen=True, slots=True)
class Difference:
    """In what two checkpoints differ. Keys are sorted.

    Attributes:
        first, second: path or URL of each.
        tensors: how many keys of tensors were looked at.
        only_first, only_second: tensors that only one has.
        form: tensors of another dtype or shape.
        values: tensors of other values, to the bit.
        objects_only_first, objects_only_second: keys of objects that only one has.
        objects: keys of objects that are stored otherwise; not the common state.
        common: paths in the common state that only one has, or whose values differ.
        bytes: of the data files of the first.
        bytes_read: of tensors and objects of both, besides the indexes.
    """

    first: str
    second: str
    tensors: int
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    form: tuple[FormDifference, ...]
    values: tuple[ValueDifference, ...]
    objects_only_first: tuple[str, ...]
    objects_only_second: tuple[str, ...]
    objects: tuple[str, ...]
    common: tuple[str, ...]
    bytes: int
    bytes_read: int

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        tensors = (self.only_first, self.only_second, self.form, self.values)
        return not any((*tensors, self.objects_only_first, self.objects_only_second, self.objects, self.common))


def compare(
    first: StoreLike, second: StoreLike, *, norms: bool = False, match: Callable[[str], bool] | None = None
) -> Difference:
    """Compare two checkpoints. Needs no ranks and no device.

    What the indexes tell is not read: chunks that lie in one file are equal; so are those with equal digests
    (`SaveOptions.digests`) or equal blocks. All else is read, piece by piece, and compared to the bit.

    Args:
        first, second: a directory, a `file://` or `memory://` URL, or a `Store`.
        norms: measure by how much values differ; reads all of the tensors that do.
        match: which tensors to look at, by key; then objects and common state are left out. None: everything.

    Raises:
        OpenError: one of them is no committed checkpoint.
        CorruptionError: something that had to be read is damaged.
        StoreError: reading failed.
    """
    return _Comparison(open_checkpoint(first), open_checkpoint(second), norms, match).difference()


class _Comparison:
    """One comparison in progress."""

    def __init__(self, first: Checkpoint, second: Checkpoint, norms: bool, match: Callable[[str], bool] | None) -> None:
        self._first, self._second = first, second
        self._norms = norms
        self._match = match
        self._sides = _side(first), _side(second)

    def difference(self) -> Difference:
        """All of it."""
        ours, theirs = (
            {key: row for row, key in enumerate(side.keys) if self._match is None or self._match(key)} for side in self._sides
        )
        form, values = self._tensors({key: row for key, row in ours.items() if key in theirs})
        objects = self._objects() if self._match is None else _NO_OBJECTS
        return Difference(
            first=self._first.location,
            second=self._second.location,
            tensors=len(ours | theirs),
            only_first=tuple(key for key in ours if key not in theirs),
            only_second=tuple(key for key in theirs if key not in ours),
            form=tuple(form),
            values=tuple(values),
            objects_only_first=objects.only_first,
            objects_only_second=objects.only_second,
            objects=objects.other,
            common=objects.common,
            bytes=sum(file.bytes for file in self._first.record.files),
            bytes_read=self._first.bytes_read + self._second.bytes_read,
        )

    # Tensors.

    def _tensors(self, common: dict[str, int]) -> tuple[list[FormDifference], list[ValueDifference]]:
        """Of the tensors that both have, by key and row of the first."""
        states, ends = compare_chunks(*self._sides), self._sides[0].index.tensor_chunk_ends
        numbers = {key: row for row, key in enumerate(self._sides[1].keys)}
        forms = [_Forms(side) for side in self._sides]
        form: list[FormDifference] = []
        values: list[ValueDifference] = []
        for key, row in common.items():
            ours, theirs = forms[0].of(row), forms[1].of(numbers[key])
            if ours != theirs:
                form.append(FormDifference(key, ours, theirs))
                continue
            state = states[ends[row] : ends[row + 1]]
            if not (state == EQUAL).all() and self._values_differ(key, row, state):
                values.append(ValueDifference(key, self._norms_of(row, state) if self._norms else None))
        return form, values

    def _values_differ(self, key: str, row: int, state: States) -> bool:
        if (state == DIFFERENT).any():
            return True
        entry = self._first.index_tables().tensor(row)
        for chunk in np.flatnonzero(state == UNKNOWN).tolist():
            for region in _pieces(entry, entry.chunks[chunk].region):
                _, ours = self._first.read_words(key, region)
                _, theirs = self._second.read_words(key, region)
                if not (_bytes(ours) == _bytes(theirs)).all():
                    return True
        return False

    def _norms_of(self, row: int, state: States) -> Norms | None:
        entry = self._first.index_tables().tensor(row)
        if not NormsSoFar.can(entry.dtype):
            return None
        found = NormsSoFar(entry.dtype)
        for chunk, known in zip(entry.chunks, state.tolist(), strict=True):
            for region in _pieces(entry, chunk.region):
                _, ours = self._first.read_words(entry.key, region)
                theirs = ours if known == EQUAL else self._second.read_words(entry.key, region)[1]
                found.add(ours, theirs)
        return found.norms()

    # Objects.

    def _objects(self) -> _Objects:
        ours, theirs = (list(side.object_keys) for side in self._sides)
        both = set(ours) & set(theirs)
        states = dict(zip(ours, compare_objects(*self._sides).tolist(), strict=True))
        other = [key for key in ours if key in both and states[key] != EQUAL and self._object_differs(key, states[key])]
        common: tuple[str, ...] = ()
        if COMMON_KEY in set(ours) ^ set(theirs) or COMMON_KEY in other:
            common = tuple(_paths(self._first.common, self._second.common, ()))
        return _Objects(
            tuple(key for key in ours if key not in both and key != COMMON_KEY),
            tuple(key for key in theirs if key not in both and key != COMMON_KEY),
            tuple(key for key in other if key != COMMON_KEY),
            common,
        )

    def _object_differs(self, key: str, state: int) -> bool:
        return state == DIFFERENT or self._first.encoded_object(key) != self._second.encoded_object(key)


@dataclass(frozen=True, slots=True)
class _Objects:
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    other: tuple[str, ...]
    common: tuple[str, ...]


_NO_OBJECTS = _Objects((), (), (), ())


class _Forms:
    """Names of dtypes and shapes of the tensors of one checkpoint."""

    def __init__(self, side: Side) -> None:
        self._ends, self._dims = side.index.tensor_dims_ends.tolist(), side.index.tensor_dims.tolist()
        self._codes = side.index.tensor_dtype.tolist()

    def of(self, row: int) -> tuple[str, tuple[int, ...]]:
        return BY_CODE[self._codes[row]].torch_name, tuple(self._dims[self._ends[row] : self._ends[row + 1]])


def _side(checkpoint: Checkpoint) -> Side:
    tables, record = checkpoint.index_tables(), checkpoint.record
    try:
        index, keys, object_keys = tables.load_all(), tables.tensor_keys(), tables.object_keys()
    except OSError as error:
        if isinstance(error, GiantstepError):
            raise
        raise StoreError(f"{checkpoint.location} cannot be read: {error}") from error
    return Side(index, keys, object_keys, [file.name for file in record.files], record.block_bytes)


def _pieces(entry: TensorEntry, region: Region) -> Iterator[Region]:
    """A region of a tensor in parts of bounded size."""
    yield from split_region(region, max(1, _PIECE_BYTES // entry.dtype.item_bytes))


def _bytes(words: NDArray[Any]) -> NDArray[np.uint8]:
    return words.reshape(-1).view(np.uint8)


def _paths(first: Any, second: Any, path: Path) -> Iterator[str]:
    """Dotted paths at which two trees of plain values differ; "" for the whole."""
    if isinstance(first, dict) and isinstance(second, dict) and type(first) is type(second):
        for key in dict.fromkeys((*first, *second)):
            if key not in first or key not in second:
                yield dotted((*path, key))
            else:
                yield from _paths(first[key], second[key], (*path, key))
    elif isinstance(first, list | tuple) and type(first) is type(second) and len(first) == len(second):
        for place, (ours, theirs) in enumerate(zip(first, second, strict=True)):
            yield from _paths(ours, theirs, (*path, place))
    elif isinstance(first, Unregistered) and isinstance(second, Unregistered) and _are_of_one_type(first, second):
        yield from _paths(first.value, second.value, path)
    elif not _same(first, second, path):
        yield dotted(path)


def _are_of_one_type(first: Unregistered, second: Unregistered) -> bool:
    return (first.name, first.members) == (second.name, second.members)


def _same(first: Any, second: Any, path: Path) -> bool:
    """Whether two values would be stored alike. Those that cannot be, such as sets of unregistered ones, count as different."""
    try:
        return OBJECT_CODEC.encode(first, path) == OBJECT_CODEC.encode(second, path)
    except UnsupportedTypeError:
        return False
