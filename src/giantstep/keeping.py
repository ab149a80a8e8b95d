"""`write_with_digests`: what a save that keeps digests for the next one writes, if it is compared with no step before.

Called by `saving`. Not here: digests of incremental saves, which must be known before a byte is written (`comparison`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from giantstep.format.data_file import DataFilePlan
from giantstep.options import SaveOptions, Threads
from giantstep.planning.contents import ContentReport
from giantstep.sources import Content, content_report
from giantstep.storage.base import Store
from giantstep.writing.contents import digests_of
from giantstep.writing.write import Written, write


def write_with_digests(
    store: Store,
    save_id: str,
    rank: int,
    plans: Sequence[DataFilePlan],
    content: Content,
    options: SaveOptions,
    threads: Threads,
    check: Callable[[], None],
) -> tuple[Written, ContentReport]:
    """As `write`, with digests of all entries: of bytes in memory they are taken as these go by to the files."""
    sources = content.sources
    # What is made piece by piece is held until its turn comes. If that is much, all digests are taken before.
    held = int(sources.bytes[sources.address == 0].sum()) <= options.buffer_bytes
    before = digests_of(sources, np.arange(0 if held else len(sources.bytes)), threads.memory, check)
    written = write(store, save_id, rank, plans, sources, options, threads, check, digests=held)
    return written, content_report(content, written.digest if held else before)
