"""Makes plain values of messages."""

from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

# What times are called here, and in messages.
TIMES = {
    "created": "create_time",
    "updated": "update_time",
    "started": "start_time",
    "ended": "end_time",
}

T = TypeVar("T")


def plain(cls: type[T], message: Message, **others: Any) -> T:
    """Return a dataclass whose fields are those of a message with the same names, or `others`.

    Fields of messages become dataclasses by their annotations, enums their names as people write
    them, and what is unset None where the annotation allows it.
    """
    hints = _hints(cls)  # type: ignore[arg-type]
    for part in fields(cls):  # type: ignore[arg-type]
        if part.name not in others:
            others[part.name] = _value(hints[part.name], message, part.name)
    return cls(**others)


def _value(hint: Any, message: Message, name: str) -> Any:
    described: Any = message.DESCRIPTOR.fields_by_name
    if get_origin(hint) is UnionType:
        [hint] = [kind for kind in get_args(hint) if kind is not NoneType]
        if hint is datetime:
            return time(message, TIMES.get(name, name))
        if not message.HasField(name):
            return None
    value = getattr(message, name)
    if get_origin(hint) is tuple:
        return tuple(_plain(get_args(hint)[0], item, described[name]) for item in value)
    if get_origin(hint) is dict:
        return dict(value)
    return _plain(hint, value, described[name])


def _plain(hint: Any, value: Any, described: Any) -> Any:
    if get_origin(hint) is Mapping:
        return MessageToDict(value, preserving_proto_field_name=True)
    if isinstance(value, Message):
        return plain(hint, value)
    if described.enum_type:
        names = described.enum_type.values_by_number
        zero = names[0].name[: -len("UNSPECIFIED")]
        return names[value].name[len(zero) :].lower() if value in names and value else ""
    return value


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def same(cls: type[T], message: Message, **others: Any) -> T:
    """Return a dataclass whose fields are those of a message with the same names, or `others`."""
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name not in others:
            value = getattr(message, field.name)
            plain = value if isinstance(value, str | int | float) else tuple(value)
            others[field.name] = plain
    return cls(**others)


def optional(message: Message, *names: str) -> dict[str, Any]:
    """Return these fields of a message, None for those that are unset."""
    return {name: getattr(message, name) if message.HasField(name) else None for name in names}


def enum_name(enum: Any, value: int) -> str:
    """Return the name of an enum's value as people write it, such as "ready"; zero is empty, and so
    is a value of a newer server."""
    if not value or value not in enum.values():
        return ""
    zero = str(enum.Name(0))
    return str(enum.Name(value))[len(zero) - len("UNSPECIFIED") :].lower()


def time(message: Message, name: str) -> datetime | None:
    """Return a time, None if it is unset."""
    stamp: Timestamp = getattr(message, name)
    return stamp.ToDatetime(UTC) if message.HasField(name) else None
