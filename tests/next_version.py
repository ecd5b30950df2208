"""The API as a later release may have it, beside today's: one more field in every message, one more
member in every oneof, one more value in every enum, one more method in every service."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import grpc
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from tworoads.v1 import answer_pb2, evaluation_pb2

from services.runtime.call import outgoing
from services.runtime.errors import downstream
from services.runtime.status import real_status

PACKAGE = "tworoads.v1."
NUMBER = 1000  # of the first field that today's services do not know
NEWS = "of the next version"


def _pool() -> DescriptorPool:
    pool, added = DescriptorPool(), set()

    def add(today: Any) -> None:
        if today.name in added:
            return
        added.add(today.name)
        for imported in today.dependencies:
            add(imported)
        file = FileDescriptorProto()
        today.CopyToProto(file)
        if file.name.startswith("tworoads/"):
            for message in file.message_type:
                _grow_message(message)
            for enum in file.enum_type:
                _grow_enum(enum)
            for service in file.service:
                method = service.method.add()
                method.CopyFrom(service.method[-2])
                method.name = "Next"
        pool.AddSerializedFile(file.SerializeToString())

    add(answer_pb2.DESCRIPTOR)
    add(evaluation_pb2.DESCRIPTOR)
    return pool


def _grow_message(message: DescriptorProto) -> None:
    if message.options.map_entry:
        return
    for nested in message.nested_type:
        _grow_message(nested)
    for enum in message.enum_type:
        _grow_enum(enum)
    text = {"type": FieldDescriptorProto.TYPE_STRING, "label": FieldDescriptorProto.LABEL_OPTIONAL}
    for index, oneof in enumerate(message.oneof_decl):
        if not oneof.name.startswith("_"):  # else it is what `optional` makes
            name, number = f"next_{oneof.name}", NUMBER + 1 + index
            message.field.add(name=name, number=number, oneof_index=index, **text)
    message.field.add(name="next", number=NUMBER, **text)


def _grow_enum(enum: EnumDescriptorProto) -> None:
    name = enum.value[0].name.removesuffix("UNSPECIFIED") + "NEXT"
    enum.value.add(name=name, number=max(value.number for value in enum.value) + 1)


POOL = _pool()


def message(name: str) -> Any:
    """Return the class of a message of the next version."""
    return GetMessageClass(POOL.FindMessageTypeByName(PACKAGE + name))


def parts(message: Any) -> Iterator[Any]:
    """Yield a message of ours and all that are in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        values = [value]
        if field.message_type.GetOptions().map_entry:
            values = [value[key] for key in value]
        elif field.is_repeated:
            values = list(value)
        for one in values:
            if isinstance(one, Message) and one.DESCRIPTOR.full_name.startswith(PACKAGE):
                yield from parts(one)


def grown(message: Any) -> Any:
    """Return a copy with every new field set."""
    copy = type(message)()
    copy.CopyFrom(message)
    for part in list(parts(copy)):
        part.next = NEWS
    return copy


def filled(message: Any, depth: int = 5) -> Any:
    """Put a message into every field of a message that takes some, and a letter into texts."""
    begun = set[str]()  # oneofs that have a member
    for field in message.DESCRIPTOR.fields:
        oneof = field.containing_oneof
        if field.number >= NUMBER or (oneof and oneof.name in begun):
            continue
        if oneof:
            begun.add(oneof.name)
        value = getattr(message, field.name)
        if field.message_type is None:
            if isinstance(value, str):
                setattr(message, field.name, "c")
        elif field.message_type.full_name.startswith(PACKAGE) and depth:
            if not field.is_repeated:
                value.SetInParent()
                filled(value, depth - 1)
            elif not field.message_type.GetOptions().map_entry:
                filled(value.add(), depth - 1)
    return message


def with_fields(message: Any) -> list[Any]:
    """Set every new field."""
    return [grown(message)]


def with_values(message: Any) -> list[Any]:
    """Set every enum to its new value."""
    for part in list(parts(message)):
        for field in part.DESCRIPTOR.fields:
            if field.enum_type is None:
                continue
            newest = field.enum_type.values[-1].number
            if field.is_repeated:
                getattr(part, field.name)[:] = [newest] * len(getattr(part, field.name))
            else:
                setattr(part, field.name, newest)
    return [message]


def with_events(message: Any) -> list[Any]:
    """Say something new as well, as the new member of a oneof where a stream has one."""
    names = [oneof.name for oneof in message.DESCRIPTOR.oneofs if not oneof.name.startswith("_")]
    news = type(message)(**{f"next_{names[0]}" if names else "next": NEWS})
    return [message, news]


class NextVersion(grpc.GenericRpcHandler):
    """Answers as services of the next version would: as those of today at `channels`, by full name,
    and with what `change` makes of each message. Keeps the requests in `asked`."""

    def __init__(
        self, channels: Mapping[str, grpc.aio.Channel], change: Callable[[Any], list[Any]]
    ) -> None:
        self._channels = channels
        self._change = change
        self.asked: list[Any] = []

    def service(self, handler_call_details: Any) -> Any:
        path = handler_call_details.method
        service, _, name = path.lstrip("/").partition("/")
        if service not in self._channels:
            return None
        method = POOL.FindServiceByName(service).methods_by_name[name]
        asks, answers = ("stream" if streams else "unary" for streams in kind(method))
        call_next = getattr(self._channels[service], f"{asks}_{answers}")(path)
        request_class = GetMessageClass(method.input_type)
        response_class = GetMessageClass(method.output_type)

        def changed(response: bytes) -> list[bytes]:
            parsed = response_class.FromString(response)
            return [message.SerializeToString() for message in self._change(parsed)]

        async def noted(requests: Any) -> AsyncIterator[bytes]:
            async for request in requests:
                self.asked.append(request_class.FromString(request))
                yield request

        async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
            if method.client_streaming:
                request = noted(request)
            else:
                self.asked.append(request_class.FromString(request))
            with downstream("next"):
                call = call_next(request, **outgoing())
                try:
                    async with real_status(call):
                        if not method.server_streaming:
                            yield changed(await call)[0]
                        else:
                            async for response in call:
                                for message in changed(response):
                                    yield message
                finally:
                    call.cancel()

        async def unary(request: Any, context: Any) -> bytes:
            [response] = [response async for response in stream(request, context)]
            return response

        handle = stream if method.server_streaming else unary
        return getattr(grpc, f"{asks}_{answers}_rpc_method_handler")(handle)


def kind(method: Any) -> tuple[bool, bool]:
    """Say whether requests, and whether responses of a method are a stream."""
    return method.client_streaming, method.server_streaming


async def call(channel: grpc.aio.Channel, path: str, *requests: Any) -> list[Any]:
    """Call a method with requests of the next version; return its responses in that version."""
    service, _, name = path.partition("/")
    method = POOL.FindServiceByName(service).methods_by_name[name]
    asks, answers = ("stream" if streams else "unary" for streams in kind(method))
    multi = getattr(channel, f"{asks}_{answers}")(
        f"/{path}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    made = multi(iter(requests) if method.client_streaming else requests[0], timeout=20)
    async with real_status(made):
        return [response async for response in made] if method.server_streaming else [await made]
