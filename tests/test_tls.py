import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tworoads.v1.embedding_pb2 import EmbedResponse
from tworoads.v1.generation_pb2 import GenerateResponse

from services.runtime import call as calls
from services.runtime import renewing
from services.runtime.address import is_loopback
from services.runtime.channel import connect
from services.runtime.errors import Stopping, Unauthenticated, error_info
from services.runtime.gate import Caller, Entry, Gate, Inside, Open
from services.runtime.server import Server, running
from services.runtime.settings import ServerSettings
from services.runtime.tls import CertificateFolder
from tests.certificates import Authority
from tests.probe import EMBEDDING, NAMES, Probe, failure, handlers, probe, soon

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
EMBED = f"/{EMBEDDING}/Embed"
KEY = "tr_a-key"


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewing, "STALE_SECONDS", 0.02)
    monkeypatch.setattr(renewing, "POLL_SECONDS", 0.02)


@asynccontextmanager
async def serving(
    settings: ServerSettings, gate: Gate | None = None, public: Path | None = None, **methods: Any
) -> AsyncIterator[Server]:
    async with running(settings, NAMES, gate, public_tls=public) as server:
        await server.serve(handlers(**methods))
        yield server


def settings(tls: Path | None = None, **changes: Any) -> ServerSettings:
    return ServerSettings(**{"grace_seconds": 0, "tls": tls, **changes})


@asynccontextmanager
async def mutual(
    authority: Authority, path: Path, seconds: float = 60, **methods: Any
) -> AsyncIterator[Probe]:
    """A server of the folder `path`/server, and a channel to it with that of `path`/client."""
    server_folder = authority.folder(path / "server", "embedding")
    client_folder = authority.folder(path / "client", "gateway")
    chosen = settings(server_folder, callers=["gateway"], connection_age_seconds=seconds)
    async with serving(chosen, **methods) as server:
        async with connect(f"127.0.0.1:{server.port}", *NAMES, tls=client_folder) as channel:
            yield Probe(server, channel)


async def handshake(
    port: int, trusts: bytes | None = None, key: bytes | None = None, chain: bytes | None = None
) -> StatusCode:
    """Return how a call over a new connection ends."""
    options = [
        ("grpc.ssl_target_name_override", "embedding"),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    target = f"127.0.0.1:{port}"
    if trusts is None:
        channel = grpc.aio.insecure_channel(target, options)
    else:
        credentials = grpc.ssl_channel_credentials(trusts, key, chain)
        channel = grpc.aio.secure_channel(target, credentials, options)
    async with channel:
        call = channel.unary_unary(EMBED)(b"", timeout=10)
        code: StatusCode = await call.code()
        return code


class Seen:
    """A method that notes the certificate of each of its callers."""

    def __init__(self) -> None:
        self.certificate = b""

    async def embed(self, request: Any, context: Any) -> EmbedResponse:
        (self.certificate,) = context.auth_context()["x509_pem_cert"]
        return EmbedResponse()


async def until_shown(seen: Seen, server: Probe, folder: Path) -> None:
    """Call until the certificate that is in `folder` now arrives."""
    async with asyncio.timeout(25):
        while seen.certificate != (folder / "tls.crt").read_bytes():
            await server.embed()


Shown = Callable[[Authority], tuple[bytes | None, ...]]


def _of(other: Authority, authority: Authority) -> tuple[bytes | None, ...]:
    chain, key = other.issue("gateway")
    return authority.pem, key, chain


def _expired(authority: Authority) -> tuple[bytes | None, ...]:
    chain, key = authority.issue("gateway", days=-1)
    return authority.pem, key, chain


@pytest.mark.parametrize(
    ("shown", "code"),
    [
        pytest.param(lambda ours: _of(ours, ours), StatusCode.OK, id="ours"),
        pytest.param(lambda ours: (None,), StatusCode.UNAVAILABLE, id="plaintext"),
        pytest.param(lambda ours: (ours.pem,), StatusCode.UNAVAILABLE, id="no certificate"),
        pytest.param(_expired, StatusCode.UNAVAILABLE, id="expired"),
        pytest.param(
            lambda ours: _of(Authority("authority"), ours),
            StatusCode.UNAVAILABLE,
            id="another authority of the same name",
        ),
        pytest.param(
            lambda ours: _of(Authority("gateway"), ours), StatusCode.UNAVAILABLE, id="self-signed"
        ),
    ],
)
async def test_a_service_takes_calls_only_from_those_with_a_certificate(
    authority: Authority, tmp_path: Path, shown: Shown, code: StatusCode
) -> None:
    called: list[bool] = []

    async def embed(request: Any, context: Any) -> EmbedResponse:
        called.append(True)
        return EmbedResponse()

    folder = authority.folder(tmp_path / "server", "embedding")
    async with serving(settings(folder, callers=["gateway"]), embed=embed) as server:
        assert await handshake(server.port, *shown(authority)) == code
    assert bool(called) == (code == StatusCode.OK)


@pytest.mark.parametrize(
    "names",
    [("retrieval",), ("gateway.example",), ("gatewa", "way"), ("*",), ()],
)
async def test_a_service_that_is_not_among_the_callers_is_refused(
    authority: Authority, tmp_path: Path, names: tuple[str, ...]
) -> None:
    folder = authority.folder(tmp_path / "server", "embedding")
    client = authority.folder(tmp_path / "client", *names)
    async with serving(settings(folder, callers=["gateway", "tuning"])) as server:
        async with connect(f"127.0.0.1:{server.port}", *NAMES, tls=client) as channel:
            refused = await failure(channel.unary_unary(EMBED)(b""))
    info = error_info(refused)
    assert refused.code() == StatusCode.UNAUTHENTICATED
    assert info and info.reason == "PEER_UNKNOWN"


@pytest.mark.parametrize("shown", [("retrieval",), ("127.0.0.1", "localhost"), ()])
async def test_a_server_with_the_certificate_of_another_service_is_not_called(
    authority: Authority, tmp_path: Path, shown: tuple[str, ...]
) -> None:
    folder = authority.folder(tmp_path / "server", *shown)
    client = authority.folder(tmp_path / "client", "gateway")
    async with serving(settings(folder)) as server:
        async with connect(f"127.0.0.1:{server.port}", *NAMES, tls=client) as channel:
            refused = await failure(channel.unary_unary(EMBED)(b""))
    assert refused.code() == StatusCode.UNAVAILABLE


async def test_the_tenant_and_the_principal_arrive(authority: Authority, tmp_path: Path) -> None:
    arrived: list[tuple[str, str]] = []

    async def embed(request: Any, context: Any) -> EmbedResponse:
        call = calls.current.get()
        arrived.append((call.tenant, call.principal))
        return EmbedResponse()

    async with mutual(authority, tmp_path, embed=embed) as server:
        token = calls.current.set(calls.Call(tenant="acme", principal="ann"))
        await server.embed(**calls.outgoing())
        calls.current.reset(token)
    assert arrived == [("acme", "ann")]


async def test_the_authority_and_all_certificates_rotate_without_a_failed_call(
    authority: Authority, tmp_path: Path
) -> None:
    """As an operator does it: believe both authorities, then show the new one, then believe it."""
    seen, done = Seen(), asyncio.Event()
    counted = 0

    async def load(server: Probe) -> None:
        nonlocal counted
        while not done.is_set():
            await server.embed()
            counted += 1

    new = Authority("new")
    both = authority.pem + new.pem
    async with mutual(authority, tmp_path, seconds=0.2, embed=seen.embed) as server:
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(load(server))
            for issuer, trusts in ((authority, both), (new, both), (new, new.pem)):
                issuer.folder(tmp_path / "server", "embedding", trusts=trusts)
                client = issuer.folder(tmp_path / "client", "gateway", trusts=trusts)
                await until_shown(seen, server, client)
                enough = counted + 50
                while counted < enough:
                    await server.embed()
            done.set()
        port = server.server.port
        assert await handshake(port, *_of(new, new)) == StatusCode.OK
        assert await handshake(port, *_of(authority, authority)) == StatusCode.UNAVAILABLE
        assert await handshake(port, *_of(authority, new)) == StatusCode.UNAVAILABLE


async def test_calls_that_run_while_the_client_rotates_end_as_they_would(
    authority: Authority, tmp_path: Path
) -> None:
    seen, go_on = Seen(), asyncio.Event()

    async def generate(request: Any, context: Any) -> AsyncIterator[GenerateResponse]:
        yield GenerateResponse(text="a")
        await go_on.wait()
        yield GenerateResponse(text="b")

    async with mutual(authority, tmp_path, embed=seen.embed, generate=generate) as server:
        call = server.generate()
        upload = server.upload()
        assert (await call.read()).text == "a"
        await upload.write(b"a")
        for _ in range(2):
            client = authority.folder(tmp_path / "client", "gateway")
            await until_shown(seen, server, client)
        go_on.set()
        await upload.write(b"b")
        await upload.done_writing()
        assert await soon(upload) == b"ab"
        assert (await call.read()).text == "b"
        assert await call.code() == StatusCode.OK


async def test_a_certificate_that_the_server_does_not_know_yet_waits(
    authority: Authority, tmp_path: Path
) -> None:
    seen, new = Seen(), Authority("new")
    both = authority.pem + new.pem
    async with mutual(authority, tmp_path, embed=seen.embed) as server:
        await server.embed()
        old = seen.certificate
        client = new.folder(tmp_path / "client", "gateway", trusts=both)
        assert await handshake(server.server.port, *_of(new, authority)) != StatusCode.OK
        for _ in range(20):
            await asyncio.sleep(0.02)  # time for what must not happen
            await server.embed()
            assert seen.certificate == old
        authority.folder(tmp_path / "server", "embedding", trusts=both)
        await until_shown(seen, server, client)


async def test_a_client_without_a_connection_takes_the_new_certificate_at_once(
    authority: Authority, tmp_path: Path
) -> None:
    new = Authority("new")
    server_folder = new.folder(tmp_path / "server", "embedding")
    client = authority.folder(tmp_path / "client", "gateway")
    async with serving(settings(server_folder)) as server:
        async with connect(f"127.0.0.1:{server.port}", *NAMES, tls=client) as channel:
            embed = channel.unary_unary(EMBED)
            assert (await failure(embed(b""))).code() == StatusCode.UNAVAILABLE
            new.folder(client, "gateway")
            await asyncio.sleep(renewing.STALE_SECONDS)
            await soon(embed(b""))


@pytest.mark.parametrize("why", ["it has expired", "its authority is no longer believed"])
async def test_a_connection_outlives_its_certificate_no_longer_than_the_age(
    authority: Authority, tmp_path: Path, why: str
) -> None:
    server_folder = authority.folder(tmp_path / "server", "embedding")
    days = 6 / 86_400 if why == "it has expired" else 1
    async with serving(settings(server_folder, connection_age_seconds=0.2)) as server:
        client = authority.folder(tmp_path / "client", "gateway", days=days)
        async with connect(f"127.0.0.1:{server.port}", *NAMES, tls=client) as channel:
            embed = channel.unary_unary(EMBED)
            await embed(b"")
            if why != "it has expired":
                authority.folder(server_folder, "embedding", trusts=Authority("other").pem)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async with asyncio.timeout(30):
                    while True:
                        await embed(b"")
    assert caught.value.code() == StatusCode.UNAVAILABLE


def _cut(folder: Path) -> None:
    file = folder / "tls.crt"
    file.write_bytes(file.read_bytes()[:100])


def _exchange_key(folder: Path) -> None:
    (folder / "tls.key").write_bytes(Authority().issue("embedding")[1])


BREAKS: list[Any] = [
    pytest.param(_cut, id="half a certificate"),
    pytest.param(_exchange_key, id="another key"),
    pytest.param(lambda folder: (folder / "tls.key").unlink(), id="no key"),
    pytest.param(lambda folder: (folder / "ca.crt").write_bytes(b""), id="no authority"),
]


@pytest.mark.parametrize("break_it", BREAKS)
async def test_broken_new_files_leave_the_old_ones_in_use_until_they_are_whole(
    authority: Authority,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    break_it: Callable[[Path], None],
) -> None:
    new = Authority("new")
    folder = authority.folder(tmp_path / "server", "embedding")
    async with serving(settings(folder)) as server:
        new.folder(folder, "embedding")
        break_it(folder)
        caplog.clear()
        for _ in range(3):
            assert await handshake(server.port, *_of(authority, authority)) == StatusCode.OK
        said = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert len(said) == 1 and str(folder) in said[0].getMessage()
        new.folder(folder, "embedding")
        assert await handshake(server.port, *_of(new, new)) == StatusCode.OK


@pytest.mark.parametrize("break_it", BREAKS)
async def test_files_that_cannot_be_used_stop_the_start(
    authority: Authority, tmp_path: Path, break_it: Callable[[Path], None]
) -> None:
    folder = authority.folder(tmp_path / "server", "embedding")
    break_it(folder)
    with pytest.raises(ValueError, match=str(folder)):
        async with running(settings(folder), NAMES):
            pass
    with pytest.raises(ValueError, match=str(folder)):
        connect("127.0.0.1:1", *NAMES, tls=folder)


def test_a_folder_is_read_only_when_it_changed(authority: Authority, tmp_path: Path) -> None:
    path = authority.folder(tmp_path / "server", "embedding")
    folder = CertificateFolder(path)
    first = folder.current
    assert not folder.changed() and folder.current is first
    authority.folder(path, "embedding")
    assert folder.changed() and folder.current != first
    assert folder.current.chain == (path / "tls.crt").read_bytes()
    assert not folder.changed()


async def test_health_has_a_port_of_its_own_without_tls(
    authority: Authority, tmp_path: Path
) -> None:
    folder = authority.folder(tmp_path / "server", "embedding")
    async with running(settings(folder, health="127.0.0.1:0"), NAMES) as server:
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{server.health_port}") as probing,
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as outside,
        ):
            health = health_pb2_grpc.HealthStub(probing)

            async def all_are(status: Any) -> bool:
                checks = [
                    health.Check(health_pb2.HealthCheckRequest(service=name))
                    for name in ("", *NAMES)
                ]
                return {answer.status for answer in await asyncio.gather(*checks)} == {status}

            assert await all_are(NOT_SERVING)
            await server.serve(handlers())
            assert await all_are(SERVING)
            await server.report(NOT_SERVING)
            assert await all_are(NOT_SERVING)
            refused = await failure(probing.unary_unary(EMBED)(b""))
            assert refused.code() == StatusCode.UNIMPLEMENTED
            request = health_pb2.HealthCheckRequest()
            refused = await failure(health_pb2_grpc.HealthStub(outside).Check(request))
            assert refused.code() == StatusCode.UNAVAILABLE
            unknown = health_pb2.HealthCheckRequest(service="tworoads.v1.Other")
            assert (await failure(health.Check(unknown))).code() == StatusCode.NOT_FOUND


class Keyed:
    """A gate that asks for a key."""

    def enter(self, method: str, metadata: Any, peer: Any) -> Entry:
        if ("authorization", f"Bearer {KEY}") not in tuple(metadata):
            raise Unauthenticated("CREDENTIALS_MISSING", "none")
        return Entry(Caller())


EVERYWHERE = ("0.0.0.0:0", "[::]:0", "192.0.2.2:0", "a-host:0", ":0", "ipv4:0.0.0.0:0")


@pytest.mark.parametrize("listen", EVERYWHERE)
@pytest.mark.parametrize(
    ("gate", "tls", "public", "advice"),
    [
        (None, False, False, "--tls"),
        (Inside(["gateway"]), False, False, "--tls"),
        (None, False, True, "--tls"),  # nobody inside shows that certificate
        (Open(), False, False, "keys"),
        (Open(), False, True, "keys"),
        (Open(), True, True, "keys"),
        (Keyed(), False, False, "--public-tls"),
        (Keyed(), True, False, "--public-tls"),  # `tls` is for inside
    ],
)
async def test_other_machines_are_not_served_unguarded(
    authority: Authority,
    tmp_path: Path,
    listen: str,
    gate: Gate | None,
    tls: bool,
    public: bool,
    advice: str,
) -> None:
    folder = authority.folder(tmp_path / "server", "embedding")
    chosen = settings(folder if tls else None, listen=listen)
    with pytest.raises(ValueError, match=f"{advice}.*--insecure") as refused:
        async with running(chosen, NAMES, gate, public_tls=folder if public else None):
            pass
    assert listen in str(refused.value)


@pytest.mark.parametrize(
    ("listen", "gate", "tls", "public", "insecure"),
    [
        ("0.0.0.0:0", None, True, False, False),
        ("0.0.0.0:0", Keyed(), False, True, False),
        ("0.0.0.0:0", None, False, False, True),
        ("0.0.0.0:0", Open(), False, False, True),
        ("localhost:0", Open(), False, False, False),
        ("127.0.0.2:0", Keyed(), False, False, False),
    ],
)
async def test_what_may_listen(
    authority: Authority,
    tmp_path: Path,
    listen: str,
    gate: Gate | None,
    tls: bool,
    public: bool,
    insecure: bool,
) -> None:
    folder = authority.folder(tmp_path / "server", "embedding")
    chosen = settings(folder if tls else None, listen=listen, insecure=insecure)
    async with running(chosen, NAMES, gate, public_tls=folder if public else None) as server:
        assert server.port


@pytest.mark.parametrize(
    ("address", "answer"),
    [
        ("127.0.0.1:50051", True),
        ("127.0.0.9:50051", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("unix:/tmp/socket", True),
        ("unix-abstract:name", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("ipv4:127.0.0.1:1,192.0.2.2:1", False),
        ("dns://127.0.0.1/other:1", False),
        ("dns:///127.0.0.1.example.com:1", False),
        ("localhost.example.com:1", False),
        ("xds:///localhost:1", False),
        ("127.0.0.1:1:1", False),
        ("[::]:1", False),
        ("", False),
    ],
)
def test_which_addresses_never_leave_this_machine(address: str, answer: bool) -> None:
    assert is_loopback(address) == answer


@pytest.mark.parametrize("address", ["192.0.2.2:50050", "gateway.example.com:443"])
def test_a_key_does_not_go_over_a_network_in_the_clear(address: str) -> None:
    with pytest.raises(ValueError, match="TLS") as refused:
        connect(address, *NAMES, key=KEY)
    assert KEY not in str(refused.value)


async def test_it_does_where_that_is_said_to_be_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOROADS_INSECURE", "1")
    await connect("192.0.2.2:50050", *NAMES, key=KEY).close()


async def call_every_kind(server: Probe) -> None:
    await server.embed(metadata=(("x-request-id", "one"),))
    assert [response async for response in server.generate()]
    assert await server.upload(iter([b"a", b"b"])) == b"ab"
    assert [response async for response in server.put(iter([]))] == []


@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_key_goes_with_calls_of_every_kind(
    authority: Authority, tmp_path: Path, encrypted: bool
) -> None:
    public = authority.folder(tmp_path / "public", "localhost", "127.0.0.1") if encrypted else None
    (tmp_path / "authority.pem").write_bytes(authority.pem)
    ca = tmp_path / "authority.pem" if encrypted else None
    async with serving(settings(), Keyed(), public) as server:
        address = f"127.0.0.1:{server.port}"
        async with connect(address, *NAMES, key=KEY, ca=ca) as channel:
            await call_every_kind(Probe(server, channel))
        async with connect(address, *NAMES, ca=ca) as channel:
            refused = await failure(channel.unary_unary(EMBED)(b""))
    assert refused.code() == StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("shown", "ca", "code"),
    [
        (("localhost", "127.0.0.1"), True, StatusCode.OK),
        (("gateway.example.com",), True, StatusCode.UNAVAILABLE),
        (("localhost", "127.0.0.1"), False, StatusCode.UNAVAILABLE),  # not of the system's
    ],
)
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_the_public_server_must_be_the_host_that_was_called(
    authority: Authority,
    tmp_path: Path,
    host: str,
    shown: tuple[str, ...],
    ca: bool,
    code: StatusCode,
) -> None:
    public = authority.folder(tmp_path / "public", *shown)
    (public / "ca.crt").unlink()  # it has no need of one
    file = tmp_path / "authority.pem"
    file.write_bytes(authority.pem)
    async with serving(settings(), Open(), public) as server:
        address = f"{host}:{server.port}"
        async with connect(address, *NAMES, ca=file if ca else None, public=True) as channel:
            assert await channel.unary_unary(EMBED)(b"").code() == code


@asynccontextmanager
async def either(kind: str, authority: Authority, path: Path, **methods: Any) -> Any:
    """A probe, over a plain channel or over one that shows certificates and has changed them."""
    async with AsyncExitStack() as stack:
        if kind == "plain":
            yield await stack.enter_async_context(probe(**methods))
            return
        seen, chosen = Seen(), methods.pop("embed", None)

        async def embed(request: Any, context: Any) -> Any:
            if seen.certificate != (path / "client" / "tls.crt").read_bytes():
                return await seen.embed(request, context)
            return await (chosen or seen.embed)(request, context)

        server = await stack.enter_async_context(mutual(authority, path, embed=embed, **methods))
        await server.embed()
        await until_shown(seen, server, authority.folder(path / "client", "gateway"))
        yield server


KINDS = pytest.mark.parametrize("kind", ["plain", "rotated"])


@KINDS
async def test_a_cancelled_call_ends_at_the_server(
    authority: Authority, tmp_path: Path, kind: str
) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def generate(request: Any, context: Any) -> AsyncIterator[GenerateResponse]:
        try:
            yield GenerateResponse(text="a")
            began.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with either(kind, authority, tmp_path, generate=generate) as server:
        call = server.generate()
        await call.read()
        await soon(began.wait())
        call.cancel()
        await soon(ended.wait())


@KINDS
async def test_a_deadline_arrives_and_ends_the_call(
    authority: Authority, tmp_path: Path, kind: str
) -> None:
    ended = asyncio.Event()

    async def generate(request: Any, context: Any) -> AsyncIterator[GenerateResponse]:
        try:
            assert 0 < context.time_remaining() < 4  # gRPC rounds it up
            yield GenerateResponse(text="a")
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with either(kind, authority, tmp_path, generate=generate) as server:
        late = await failure(server.generate(timeout=3))
        await soon(ended.wait())
    assert late.code() == StatusCode.DEADLINE_EXCEEDED


@KINDS
async def test_a_stream_is_tried_again_before_its_first_message(
    authority: Authority, tmp_path: Path, kind: str
) -> None:
    attempts = 0

    async def generate(request: Any, context: Any) -> AsyncIterator[GenerateResponse]:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise Stopping("STOPPING", "this replica is starting or stopping")
        yield GenerateResponse(text="a")

    async with either(kind, authority, tmp_path, generate=generate) as server:
        assert [response.text async for response in server.generate()] == ["a"]
    assert attempts == 3


@KINDS
async def test_uploads_and_streams_both_ways_arrive_whole(
    authority: Authority, tmp_path: Path, kind: str
) -> None:
    blocks = [bytes([number % 256]) * 100_000 for number in range(50)]
    async with either(kind, authority, tmp_path) as server:
        assert await server.upload(iter(blocks)) == b"".join(blocks)
        assert [part async for part in server.watch(blocks[0])] == [blocks[0]]
