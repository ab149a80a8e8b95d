"""The bytes of a checkpoint: commit record, index, data files, object codec. Pure: bytes in, values out.

`docs/format.md` is the normative description.
"""
