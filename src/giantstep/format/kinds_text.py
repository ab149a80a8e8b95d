"""The kinds of the object codec whose values are texts or few integers: paths, dates and times, UUIDs, decimals."""

from __future__ import annotations

import datetime as dt
import decimal
import pathlib
import uuid

from giantstep.errors import UnsupportedTypeError
from giantstep.format.codec import Kind, Reader, Writer
from giantstep.format.object_text import Json
from giantstep.format.payload import int_of, items_of, plain_text, same_text, text_of
from giantstep.shards.paths import Path, dotted


def _path_kind(tag: str, cls: type[pathlib.PurePath]) -> Kind:
    def decode(payload: Json, _reader: Reader) -> pathlib.PurePath:
        found = cls(text_of(payload))
        same_text(str(found), payload)
        return found

    return Kind(tag, cls, lambda v, w, p: plain_text(str(v), p), decode)


def _encode_moment(value: dt.datetime | dt.time, _writer: Writer, path: Path) -> Json:
    zone = value.tzinfo
    if zone is None:
        return [value.isoformat(), value.fold]
    if type(zone) is not dt.timezone:
        raise UnsupportedTypeError(
            f"{type(value).__name__} at {dotted(path)!r} is in time zone {zone}, whose rules cannot be stored. "
            "Convert it with astimezone(datetime.UTC) before saving."
        )
    name = zone.tzname(None)
    plain = [value.isoformat(), value.fold]
    return plain if name == dt.timezone(zone.utcoffset(None)).tzname(None) else [*plain, plain_text(name, path)]


def _moment_kind(tag: str, cls: type[dt.datetime | dt.time]) -> Kind:
    def decode(payload: Json, _reader: Reader) -> dt.datetime | dt.time:
        text, fold, *name = items_of(payload)
        found = cls.fromisoformat(text_of(text)).replace(fold=int_of(fold, 0, 1))
        same_text(found.isoformat(), text)
        offset = found.utcoffset()
        if not name:
            return found
        if len(name) > 1 or offset is None:
            raise ValueError("a name of a time zone where there is none")
        return found.replace(tzinfo=dt.timezone(offset, text_of(name[0])))

    return Kind(tag, cls, _encode_moment, decode)


def _decode_date(payload: Json, _reader: Reader) -> dt.date:
    found = dt.date.fromisoformat(text_of(payload))
    same_text(found.isoformat(), payload)
    return found


def _decode_timedelta(payload: Json, _reader: Reader) -> dt.timedelta:
    days, seconds, microseconds = items_of(payload, 3)
    return dt.timedelta(int_of(days, -999_999_999, 999_999_999), int_of(seconds, 0, 86_399), int_of(microseconds, 0, 999_999))


def _decode_uuid(payload: Json, _reader: Reader) -> uuid.UUID:
    found = uuid.UUID(hex=text_of(payload))
    same_text(str(found), payload)
    return found


def _decimal_text(value: decimal.Decimal) -> str:
    # In a context of its own: the user's may write the exponent differently.
    return decimal.Context(capitals=1).to_sci_string(value)


def _decode_decimal(payload: Json, _reader: Reader) -> decimal.Decimal:
    # Exact, whatever the precision of the context; in one of its own, so that the flags of the user's stay as they are.
    found = decimal.Decimal(text_of(payload), decimal.Context())
    same_text(_decimal_text(found), payload)
    return found


TEXT_KINDS: tuple[Kind, ...] = (
    _path_kind("path", type(pathlib.Path())),
    _path_kind("pure_path", pathlib.PurePosixPath),
    _path_kind("pure_windows_path", pathlib.PureWindowsPath),
    _moment_kind("datetime", dt.datetime),
    _moment_kind("time", dt.time),
    Kind("date", dt.date, lambda v, w, p: v.isoformat(), _decode_date),
    Kind("timedelta", dt.timedelta, lambda v, w, p: [v.days, v.seconds, v.microseconds], _decode_timedelta),
    Kind("uuid", uuid.UUID, lambda v, w, p: str(v), _decode_uuid),
    Kind("decimal", decimal.Decimal, lambda v, w, p: _decimal_text(v), _decode_decimal),
)
