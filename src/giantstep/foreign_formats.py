"""Recognising checkpoints that others have written, by names and first bytes. Nothing of them is decoded or unpickled.

Called by `diagnosis`.
"""

from __future__ import annotations

import json
from collections.abc import Collection

from giantstep.storage.base import NotAFileError, Store, read_all, reading

_MAX_JSON_BYTES = 1 << 20
# In a directory, so many files are looked into.
_MOST_FILES = 50


def foreign_format(store: Store, names: Collection[str]) -> str:
    """What files in a directory are, in words; "" if they are not recognised.

    Raises:
        OSError: a file cannot be read.
    """
    if "metadata.json" in names:
        backend = _torch_dist_backend(store)
        if backend:
            return f"a checkpoint of Megatron-Core's dist_checkpointing (metadata.json, backend {backend!r:.40})"
    if ".metadata" in names:
        return "a checkpoint of torch.distributed.checkpoint (a file .metadata, which is a pickle)"
    if "model.safetensors.index.json" in names or "model.safetensors" in names:
        return "a model in safetensors files, as transformers writes it"
    for name in sorted(names)[:_MOST_FILES]:
        found = foreign_file(store, name)
        if found:
            return f"{found} ({name})"
    return ""


def foreign_file(store: Store, name: str) -> str:
    """What one file is, in words; "" if it is not recognised; raises as `foreign_format`."""
    try:
        with reading(store, name) as handle:
            size = handle.size
            first = bytearray(min(16, size))
            handle.read_into(0, memoryview(first))
    except (FileNotFoundError, NotAFileError):
        # A link to nowhere or in a circle, a pipe, or gone by now.
        return ""
    head = bytes(first)
    if head[:4] == b"PK\x03\x04":
        return "a zip archive, as torch writes its files"
    # A pickle of protocol 2 to 5 begins with the opcode PROTO and the number.
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle, as old versions of torch write their files"
    header = int.from_bytes(head[:8], "little")
    if len(head) == 16 and head[8:9] == b"{" and 2 <= header <= size - 8:
        return "a safetensors file"
    return ""


def _torch_dist_backend(store: Store) -> str:
    try:
        if store.size("metadata.json") > _MAX_JSON_BYTES:
            return ""
        fields = json.loads(read_all(store, "metadata.json", _MAX_JSON_BYTES))
    except (ValueError, RecursionError, FileNotFoundError, NotAFileError):
        return ""
    found = fields.get("sharded_backend") if isinstance(fields, dict) else None
    return found if isinstance(found, str) else ""
