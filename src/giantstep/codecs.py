"""The codec of this library's objects: the base kinds, torch's once something of torch's is met, and the user's types.

Called by `saving`, `loading` and `opening`; `register_type` is part of the public API.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

from giantstep.errors import BadArgumentError
from giantstep.format.codec import Codec, Kind
from giantstep.format.kinds import base_kinds, late_kinds
from giantstep.format.registry import TypeRegistry
from giantstep.mapping.tree import keep_whole

T = TypeVar("T")


def _torch_kinds() -> Iterable[Kind]:
    # Looking into a checkpoint needs torch only where torch's values are.
    from giantstep.mapping.torch_kinds import torch_kinds  # noqa: PLC0415 - imports torch

    return torch_kinds()


# Where the types are from whose kinds are fetched late: to register another type must not import torch.
_LATE_PACKAGES = ("numpy", "torch")


def _package_of(cls: type) -> str:
    return str(cls.__module__).partition(".")[0]


_TYPES = TypeRegistry()

OBJECT_CODEC = Codec(base_kinds(_TYPES), late_kinds, _torch_kinds)
"""The object codec: what goes in comes out, nothing else ever does."""


@overload
def register_type(
    cls: type[T],
    *,
    name: str | None = None,
    encode: Callable[[T], Any] | None = None,
    decode: Callable[[Any], T] | None = None,
) -> type[T]: ...


@overload
def register_type(
    *,
    name: str | None = None,
    encode: Callable[[Any], Any] | None = None,
    decode: Callable[[Any], Any] | None = None,
) -> Callable[[type[T]], type[T]]: ...


def register_type(
    cls: Any = None,
    *,
    name: str | None = None,
    encode: Callable[[Any], Any] | None = None,
    decode: Callable[[Any], Any] | None = None,
) -> Any:
    """Let values of a class of yours be saved and loaded, in this process; before both.

        @gs.register_type
        @dataclass
        class Schedule:
            warmup: int
            peak: float = 3e-4

        gs.register_type(Tokenizer, encode=lambda t: t.vocabulary, decode=Tokenizer)

    Dataclasses and NamedTuples are stored as their fields by name, enums as the names of their members. On load,
    dataclasses are made by calling the class, so **`__init__` and `__post_init__` run**. It is your code, in your
    process, because you registered it: nothing that is stored is ever run, and a stored name leads to no class but the
    one registered under it. Afterwards every field is set as it was stored; a field that is not
    stored takes its default, and attributes that are no fields are what the class makes of them.

    Only values of exactly this class are meant; register subclasses too.

    Args:
        cls: the class. Without it the result is a decorator.
        name: what is stored to name the class: default its `__qualname__`, without the module. Give one if you rename
            the class later, or if two classes have one name.
        encode: value -> plain values (lists, dicts, arrays, other registered types ...), for classes that are no
            dataclass, NamedTuple or enum, or to store one of these otherwise.
        decode: the inverse of `encode`; must be given with it.

    Returns:
        The class.

    Raises:
        BadArgumentError: the class is stored already without being registered, class or name are registered
            otherwise, or it needs encode and decode.
    """
    if cls is None:
        return lambda decorated: register_type(decorated, name=name, encode=encode, decode=decode)
    if isinstance(cls, type) and OBJECT_CODEC.has_kind_for(cls, fetch=_package_of(cls) in _LATE_PACKAGES):
        raise BadArgumentError(f"type {cls.__qualname__} can be stored as it is: it needs no register_type, and allows none")
    _TYPES.register(cls, name, encode, decode)
    if issubclass(cls, dict):
        keep_whole(cls)
    return cls
