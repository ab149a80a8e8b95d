"""The dtypes that giantstep stores, and how each one appears inside a safetensors file.

Codes are part of the format (`docs/format.md`) and never reused. Not here: torch, NumPy arrays.
Called by `format` (entries of data files, index columns), `mapping` and `reading`.
"""

from __future__ import annotations

from dataclasses import dataclass

from giantstep.errors import BadArgumentError


@dataclass(frozen=True, slots=True)
class DType:
    """One storable dtype.

    Attributes:
        code: number in the index.
        name: our name; the safetensors name where that library knows the dtype.
        torch_name: `torch.<torch_name>`.
        item_bytes: bytes of one element as torch counts elements.
        container: dtype of the safetensors entry.
        values_per_item: container values per element; 2 for complex stored as pairs and for packed fp4.
        numpy_name: NumPy or ml_dtypes name of an array of these elements.
    """

    code: int
    name: str
    torch_name: str
    item_bytes: int
    container: str
    values_per_item: int
    numpy_name: str

    def container_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the safetensors entry for elements of `shape`.

        Packed fp4 doubles the last dimension, as the library does; complex pairs add a last dimension of 2.
        """
        if self.values_per_item == 1:
            return shape
        if self.container == "F4" and shape:
            return (*shape[:-1], shape[-1] * 2)
        return (*shape, 2)


_TABLE = (
    DType(1, "BOOL", "bool", 1, "BOOL", 1, "bool"),
    DType(2, "U8", "uint8", 1, "U8", 1, "uint8"),
    DType(3, "I8", "int8", 1, "I8", 1, "int8"),
    DType(4, "U16", "uint16", 2, "U16", 1, "uint16"),
    DType(5, "I16", "int16", 2, "I16", 1, "int16"),
    DType(6, "U32", "uint32", 4, "U32", 1, "uint32"),
    DType(7, "I32", "int32", 4, "I32", 1, "int32"),
    DType(8, "U64", "uint64", 8, "U64", 1, "uint64"),
    DType(9, "I64", "int64", 8, "I64", 1, "int64"),
    DType(10, "F16", "float16", 2, "F16", 1, "float16"),
    DType(11, "BF16", "bfloat16", 2, "BF16", 1, "bfloat16"),
    DType(12, "F32", "float32", 4, "F32", 1, "float32"),
    DType(13, "F64", "float64", 8, "F64", 1, "float64"),
    DType(14, "C64", "complex64", 8, "C64", 1, "complex64"),
    DType(15, "C128", "complex128", 16, "F64", 2, "complex128"),
    DType(16, "C32", "complex32", 4, "F16", 2, "float16"),
    DType(17, "F8_E4M3", "float8_e4m3fn", 1, "F8_E4M3", 1, "float8_e4m3fn"),
    DType(18, "F8_E5M2", "float8_e5m2", 1, "F8_E5M2", 1, "float8_e5m2"),
    DType(19, "F8_E8M0", "float8_e8m0fnu", 1, "F8_E8M0", 1, "float8_e8m0fnu"),
    DType(20, "F8_E4M3FNUZ", "float8_e4m3fnuz", 1, "F8_E4M3FNUZ", 1, "float8_e4m3fnuz"),
    DType(21, "F8_E5M2FNUZ", "float8_e5m2fnuz", 1, "F8_E5M2FNUZ", 1, "float8_e5m2fnuz"),
    DType(22, "F4X2", "float4_e2m1fn_x2", 1, "F4", 2, "uint8"),
)

BY_CODE: dict[int, DType] = {dtype.code: dtype for dtype in _TABLE}
BY_NAME: dict[str, DType] = {dtype.name: dtype for dtype in _TABLE}
BY_TORCH_NAME: dict[str, DType] = {dtype.torch_name: dtype for dtype in _TABLE}

# Bytes of one element by code, for vectorised sizes; 0 marks codes that do not exist.
ITEM_BYTES: tuple[int, ...] = tuple(BY_CODE[code].item_bytes if code in BY_CODE else 0 for code in range(256))


def dtype_of_torch_name(torch_name: str) -> DType:
    """The dtype for `str(tensor.dtype)` with or without its `torch.`; raises `BadArgumentError` for others."""
    found = BY_TORCH_NAME.get(torch_name.removeprefix("torch."))
    if found is None:
        raise BadArgumentError(
            f"dtype {torch_name} cannot be stored: expected one of {', '.join(sorted(BY_TORCH_NAME))}. "
            "Convert the tensor, or take it apart into tensors of these dtypes."
        )
    return found
