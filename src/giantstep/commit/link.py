"""Files of an earlier step as files of a new one, without copying them. Called by `reusing`, on rank 0 alone."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field

from giantstep.format.names import DATA_DIR
from giantstep.format.record import FileEntry
from giantstep.storage.base import NotAFileError, Store

# What file systems say that have no further names for files, not between these places, or none for this user or file.
_CANNOT = frozenset({errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EMLINK})


@dataclass(slots=True)
class Links:
    """What came of linking.

    Attributes:
        there: names that the new step has now.
        made: those of them that it did not have before.
        problem: why others could not be linked, in words; "" if all were.
    """

    there: set[str] = field(default_factory=set)
    made: list[str] = field(default_factory=list)
    problem: str = ""


def link_files(store: Store, source: Store, files: Sequence[FileEntry], links: Links) -> None:
    """Give data files of an earlier step the same names in a new one; durable when it returns.

    A file is a file of the new step from then on, whatever becomes of the earlier one. Those that cannot be linked, or are
    gone or of another size, are left out. A name that is there already is of the same file: no other save uses it.

    Args:
        store: of the new step, prepared.
        source: of the earlier one; may be the same place.
        files: of the earlier step.
        links: filled in, so that the caller knows what was made if this raises.

    Raises:
        OSError: a storage operation failed.
    """
    for entry in files:
        try:
            store.link(entry.name, source, entry.name)
            links.made.append(entry.name)
        except FileExistsError:
            pass
        except FileNotFoundError:
            links.problem = f"{entry.name} is gone from {source.location}"
            continue
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            links.problem = f"{store.location} cannot share files with {source.location}: {error}"
            if error.errno == errno.EMLINK:
                continue
            break
        _look_at(store, source, entry, links)
    # Invariant: names are durable before anything refers to them.
    if links.there:
        store.sync_names(DATA_DIR)


def _look_at(store: Store, source: Store, entry: FileEntry, links: Links) -> None:
    """Note a name that was made, or was there, if it is the file."""
    try:
        found = store.size(entry.name)
    except FileNotFoundError:
        # A symbolic link to nowhere has the name, or somebody deletes what lies here.
        links.problem = f"{entry.name} cannot be had in {store.location}"
        return
    except NotAFileError as error:
        links.problem = f"{entry.name} in {source.location} is {error.strerror}"
        _take_back(store, entry.name, links)
        return
    if found == entry.bytes:
        links.there.add(entry.name)
    else:
        links.problem = f"{entry.name} in {source.location} has {found} bytes, expected {entry.bytes}"
        _take_back(store, entry.name, links)


def _take_back(store: Store, name: str, links: Links) -> None:
    if links.made and links.made[-1] == name:
        store.delete(name)
        links.made.pop()


def unlink_files(store: Store, links: Links) -> None:
    """Delete the names that were made for a save that was given up before it was published."""
    for name in links.made:
        store.delete(name)
    if links.made:
        store.sync_names(DATA_DIR)
    links.made, links.there = [], set()
