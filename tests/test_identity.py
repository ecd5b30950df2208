"""Who gets in, as whom, and what they may do there."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tworoads.v1.embedding_pb2 import EmbedResponse

from clients.client import Client
from clients.errors import TworoadsError
from services.gateway import keys, reloading
from services.gateway.audit import Audit
from services.gateway.forward import PUBLIC
from services.gateway.gate import ANSWERS, METHODS, Identified, role_for
from services.gateway.identity import Role
from services.gateway.keys import Keys
from services.gateway.quotas import Limits, Quotas
from services.runtime.call import current
from services.runtime.channel import connect
from services.runtime.errors import Unauthenticated, error_info
from tests.issuer import (
    by_hand,
    claims,
    ec_key,
    jwk,
    public_pem,
    rsa_key,
    token,
    tokens,
    write_keys,
)
from tests.probe import Probe, failure, probe
from tests.small_stack import small_stack

AUTHORIZATION = "authorization"


class Given:
    """Keys in a file, a key set, and what the text of each key is."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "keys.json"
        self.key_set = write_keys(folder / "jwks.json")
        self.texts: dict[str, str] = {}
        for role in ("reader", "writer", "admin"):
            self.add(role, role=role)
        self.add("other", tenant="other")
        self.add("revoked")
        keys.revoke(self.file, self.id("revoked"))
        self.add("expired", expires=datetime.now(UTC) - timedelta(seconds=1))

    def add(
        self,
        name: str,
        tenant: str = "acme",
        role: Role = "writer",
        expires: datetime | None = None,
    ) -> str:
        _, self.texts[name] = keys.add(self.file, tenant, name, role, expires)
        return self.texts[name]

    def id(self, name: str) -> str:
        return self.texts[name].split("_")[1]

    def secret(self, name: str) -> str:
        return self.texts[name].split("_", 2)[2]

    def hash(self, name: str) -> str:
        return next(key.hash for key in keys.read(self.file) if key.id == self.id(name))

    def gate(self) -> Identified:
        return Identified(Keys(self.file), tokens(self.key_set), Quotas(Limits()), Audit())


@pytest.fixture
def given(tmp_path: Path) -> Given:
    return Given(tmp_path)


def bearer(text: str) -> tuple[tuple[str, str], ...]:
    return ((AUTHORIZATION, f"Bearer {text}"),)


async def whoami(request: Any, context: Any) -> EmbedResponse:
    call = current.get()
    return EmbedResponse(model_hash=f"{call.tenant} {call.principal}")


@pytest.fixture
async def server(given: Given) -> AsyncIterator[Probe]:
    async with probe(embed=whoami, gate=given.gate()) as running:
        yield running


GOOD: dict[str, tuple[Callable[[Given], str], str]] = {
    "a key": (lambda g: f"Bearer {g.texts['writer']}", "acme writer"),
    "a scheme in lower case": (lambda g: f"bearer {g.texts['other']}", "other other"),
    "a scheme in capitals": (lambda g: f"BEARER {g.texts['writer']}", "acme writer"),
    "RS256": (lambda g: f"Bearer {token()}", "acme ann"),
    "ES256": (lambda g: f"Bearer {token(ec_key(), 'ES256', {'kid': 'ec'})}", "acme ann"),
    "one of several audiences": (lambda g: f"Bearer {token(aud=['x', 'tworoads'])}", "acme ann"),
    "expired within the leeway": (
        lambda g: f"Bearer {token(exp=claims()['exp'] - 315)}",
        "acme ann",
    ),
}


@pytest.mark.parametrize("what", GOOD)
async def test_who_has_credentials_gets_in_as_whom_they_name(
    what: str, given: Given, server: Probe
) -> None:
    header, expected = GOOD[what]
    response = await server.embed(metadata=((AUTHORIZATION, header(given)),))
    assert response.model_hash == expected


Bad = Callable[[Given], str]
HEADERS: dict[str, Bad] = {
    "an empty header": lambda g: "",
    "a scheme alone": lambda g: "Bearer",
    "Basic": lambda g: "Basic dXNlcjpwYXNzd29yZA==",
    "another scheme": lambda g: f"Token {g.texts['writer']}",
    "no scheme": lambda g: g.texts["writer"],
    "two spaces": lambda g: f"Bearer  {g.texts['writer']}",
    "a space inside": lambda g: f"Bearer {g.texts['writer'][:20]} {g.texts['writer'][20:]}",
    "two in one header": lambda g: f"Bearer {g.texts['writer']},Bearer {g.texts['writer']}",
    "more than 8,192 characters": lambda g: f"Bearer {g.texts['writer']}{'a' * 7000}{'b' * 1200}",
}
KEYS: dict[str, Bad] = {
    "an unknown id": lambda g: f"trk_00000000_{g.secret('writer')}",
    "another secret": lambda g: f"trk_{g.id('writer')}_{'A' * 43}",
    "the secret of another key": lambda g: f"trk_{g.id('writer')}_{g.secret('other')}",
    "no secret": lambda g: f"trk_{g.id('writer')}_",
    "no id": lambda g: f"trk__{g.secret('writer')}",
    "a truncated secret": lambda g: g.texts["writer"][:-1],
    "a longer secret": lambda g: g.texts["writer"] + "A",
    "the hash instead of the secret": lambda g: f"trk_{g.id('writer')}_{g.hash('writer')}",
    "another prefix": lambda g: g.texts["writer"].replace("trk", "TRK"),
    "a revoked key": lambda g: g.texts["revoked"],
    "an expired key": lambda g: g.texts["expired"],
}
ZERO = bytes(64)  # a signature that an ECDSA without checks takes for every message
TOKENS: dict[str, Bad] = {
    "no token": lambda g: "hello",
    "alg none": lambda g: by_hand({"alg": "none", "kid": "rsa"}, signature=b""),
    "alg nOnE with a signature": lambda g: by_hand({"alg": "nOnE", "kid": "rsa"}),
    "HS256 with the public key": lambda g: by_hand(
        {"alg": "HS256", "kid": "rsa"}, secret=public_pem()
    ),
    "HS256 with nothing": lambda g: by_hand({"alg": "HS256", "kid": "rsa"}),
    "another RSA key": lambda g: token(rsa_key("other")),
    "RS512": lambda g: token(algorithm="RS512"),
    "PS256": lambda g: token(algorithm="PS256"),
    "ES384": lambda g: token(ec_key("384", ec.SECP384R1), "ES384", {"kid": "ec"}),
    "the algorithm of another key": lambda g: token(header={"kid": "ec"}),
    "a signature of zeros": lambda g: by_hand({"alg": "ES256", "kid": "ec"}, signature=ZERO),
    "an unknown kid": lambda g: token(header={"kid": "none"}),
    "no kid": lambda g: token(header={}),
    "a path as kid": lambda g: by_hand({"alg": "HS256", "kid": "../../../../dev/null"}),
    "SQL as kid": lambda g: by_hand({"alg": "HS256", "kid": "x' UNION SELECT 'k"}, secret=b"k"),
    "a kid that is no text": lambda g: by_hand({"alg": "HS256", "kid": ["rsa"]}),
    "a key of its own": lambda g: token(
        rsa_key("own"), header={"kid": "own", "jwk": jwk(rsa_key("own"), "own")}
    ),
    "an address of keys": lambda g: token(
        rsa_key("own"), header={"kid": "own", "jku": "http://127.0.0.1:1/jwks"}
    ),
    "an extension that must be known": lambda g: token(
        header={"kid": "rsa", "crit": ["x"], "x": 1}
    ),
    "another audience": lambda g: token(aud="others"),
    "no audience": lambda g: token(aud=None),
    "another issuer": lambda g: token(iss="https://issuer.example.evil"),
    "no issuer": lambda g: token(iss=None),
    "expired": lambda g: token(exp=claims()["exp"] - 340),
    "no end": lambda g: token(exp=None),
    "an end that is no time": lambda g: by_hand(
        {"alg": "RS256", "kid": "rsa"}, claims(exp=[]), signature=b"x"
    ),
    "not valid yet": lambda g: token(nbf=claims()["exp"] - 200),
    "issued in the future": lambda g: token(iat=claims()["exp"]),
    "no subject": lambda g: token(sub=None),
    "a subject of two lines": lambda g: token(sub="ann\nx-tworoads-tenant: other"),
    "a subject too long": lambda g: token(sub="a" * 201),
    "no tenant": lambda g: token(tenant=None),
    "a path as tenant": lambda g: token(tenant="../other"),
    "an empty tenant": lambda g: token(tenant=""),
    "two tenants": lambda g: token(tenant=["acme", "other"]),
    "no role": lambda g: token(role=None),
    "an unknown role": lambda g: token(role="root"),
    "a truncated token": lambda g: token()[:-20],
    "no signature": lambda g: token().rpartition(".")[0] + ".",
    "other claims under its signature": lambda g: ".".join(
        [token().split(".")[0], by_hand({}, claims(tenant="other")).split(".")[1]]
        + [token().split(".")[2]]
    ),
    "an encrypted token": lambda g: token() + ".a.b",
    "deeply nested": lambda g: by_hand(b"[" * 5000),
    "no JSON": lambda g: by_hand(b"\xff{", signature=b"x"),
}
BAD = {
    **HEADERS,
    **{name: lambda g, bad=bad: f"Bearer {bad(g)}" for name, bad in {**KEYS, **TOKENS}.items()},
}


@pytest.mark.parametrize("what", BAD)
async def test_bad_credentials_are_refused(what: str, given: Given, server: Probe) -> None:
    seen = await failure(server.embed(metadata=((AUTHORIZATION, BAD[what](given)),)))
    info = error_info(seen)
    assert seen.code() == StatusCode.UNAUTHENTICATED
    assert info and info.reason == "CREDENTIALS_INVALID"


async def test_no_credentials_are_refused_as_missing(server: Probe) -> None:
    seen = await failure(server.embed())
    info = error_info(seen)
    assert seen.code() == StatusCode.UNAUTHENTICATED
    assert info and info.reason == "CREDENTIALS_MISSING"


async def test_two_headers_are_refused_even_if_both_are_good(given: Given, server: Probe) -> None:
    seen = await failure(server.embed(metadata=bearer(given.texts["writer"]) * 2))
    assert seen.code() == StatusCode.UNAUTHENTICATED


async def test_a_token_of_20_kb_gets_nowhere(given: Given, server: Probe) -> None:
    text = token(padding="a" * 15_000)
    with pytest.raises(Unauthenticated, match="neither"):
        given.gate().enter("/tworoads.v1.EmbeddingService/Embed", bearer(text), {})
    seen = await failure(server.embed(metadata=bearer(text)))  # gRPC itself takes 16 KiB
    assert seen.code() in (StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAUTHENTICATED)
    assert await server.embed(metadata=bearer(given.texts["writer"]))


async def test_streams_are_refused_too(server: Probe) -> None:
    for call in (server.watch(b""), server.generate()):
        assert (await failure(call)).code() == StatusCode.UNAUTHENTICATED
    assert (await failure(server.upload(iter([b"a"])))).code() == StatusCode.UNAUTHENTICATED


async def test_strangers_may_ask_for_the_health_and_for_nothing_else(
    given: Given, server: Probe
) -> None:
    health = health_pb2_grpc.HealthStub(server.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status
    reflect = reflection_pb2_grpc.ServerReflectionStub(server.channel).ServerReflectionInfo
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await reflect(iter([question])).read()
    assert refused.value.code() == StatusCode.UNAUTHENTICATED
    answer = await reflect(iter([question]), metadata=bearer(given.texts["reader"])).read()
    assert answer.list_services_response.service


async def test_a_refusal_is_logged_with_the_address_that_it_came_from(
    given: Given, server: Probe, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        await failure(server.embed(metadata=bearer("trk_x_y")))
        async with asyncio.timeout(10):
            while "UNAUTHENTICATED" not in caplog.text:
                await asyncio.sleep(0.01)
    assert " ms from ipv4:127.0.0.1:" in caplog.text


async def test_a_refusal_says_nothing_about_what_was_wrong(given: Given, server: Probe) -> None:
    said = {
        (await failure(server.embed(metadata=bearer(bad(given))))).details()
        for bad in KEYS.values()
        if bad(given).startswith("trk_")
    }
    assert said == {"the key is not valid"}


@pytest.mark.parametrize("name", ["x-tworoads-tenant", "x-tworoads-principal"])
async def test_what_callers_say_of_themselves_counts_for_nothing(
    name: str, given: Given, server: Probe
) -> None:
    metadata = ((name, "other"), *bearer(given.texts["writer"]), (name, "other"))
    assert (await server.embed(metadata=metadata)).model_hash == "acme writer"
    assert (await failure(server.embed(metadata=((name, "acme"),)))).code() == (
        StatusCode.UNAUTHENTICATED
    )


WRITER = {
    "CreateCorpus",
    "PutDocuments",
    "DeleteDocuments",
    "CreateJob",
    "CancelJob",
    "ImportAdapter",
    "CreateComparison",
    "CancelComparison",
}
ADMIN = {"DeleteCorpus", "SetPolicy", "AcceptAdapter", "DeleteAdapter"}


def role_of(path: str) -> Role:
    name = path.rpartition("/")[2]
    return "admin" if name in ADMIN else "writer" if name in WRITER else "reader"


async def test_each_role_may_call_its_methods_and_no_others(given: Given, tmp_path: Path) -> None:
    order = ["reader", "writer", "admin"]
    async with (
        small_stack(tmp_path / "store", gate=given.gate()) as stack,
        connect(stack.address, ANSWERS, *PUBLIC) as channel,
    ):
        for path, method in METHODS.items():
            for role in order:
                kind = f"{_kind(method.client_streaming)}_{_kind(method.server_streaming)}"
                request = iter([b""]) if method.client_streaming else b""
                call = getattr(channel, kind)(path)(
                    request, metadata=bearer(given.texts[role]), timeout=10
                )
                refused = await _reason(call) == "ROLE_MISSING"
                assert refused == (order.index(role) < order.index(role_of(path))), (path, role)
    assert len(METHODS) == 2 + sum(map(len, PUBLIC.values()))


def _kind(streaming: bool) -> str:
    return "stream" if streaming else "unary"


async def _reason(call: Any) -> str:
    """Return why a call fails, empty if it does not."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        info = error_info(error)
        return info.reason if info else error.code().name
    return ""


def test_a_method_that_nobody_knows_is_for_admins() -> None:
    assert role_for("/tworoads.v1.GenerationService/Generate") == "admin"
    assert role_for("/tworoads.v1.AnswerService/Destroy") == "admin"


async def accepted(server: Probe, text: str) -> bool:
    try:
        await server.embed(metadata=bearer(text))
    except grpc.aio.AioRpcError as error:
        assert error.code() == StatusCode.UNAUTHENTICATED
        return False
    return True


async def until_accepted(server: Probe, text: str, expected: bool = True) -> None:
    async with asyncio.timeout(10):
        while await accepted(server, text) is not expected:
            await asyncio.sleep(0.01)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reloading, "SECONDS", 0.02)


async def test_a_key_is_swapped_under_load_without_a_failure(
    given: Given, server: Probe, quick: None
) -> None:
    old = new = given.texts["writer"]
    calls = 0
    stop = False

    async def load() -> None:
        nonlocal calls
        while not stop:
            assert (await server.embed(metadata=bearer(new))).model_hash == "acme writer"
            calls += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(load())
        _, fresh = keys.add(given.file, "acme", "writer", "writer")
        await until_accepted(server, fresh)
        assert await accepted(server, old)  # both are valid
        new, before = fresh, calls
        async with asyncio.timeout(10):
            while calls < before + 16:  # what began with the old one has ended
                await asyncio.sleep(0.01)
        keys.revoke(given.file, given.id("writer"))
        await until_accepted(server, old, False)
        before = calls
        async with asyncio.timeout(10):
            while calls < before + 16:
                await asyncio.sleep(0.01)
        stop = True


async def test_a_key_that_is_revoked_ends_its_uploads(given: Given, quick: None) -> None:
    received = asyncio.Semaphore(0)

    async def upload(requests: Any, context: Any) -> bytes:
        async for _ in requests:
            received.release()
        return b""

    async with probe(gate=given.gate(), upload=upload) as server:
        call = server.upload(metadata=bearer(given.texts["writer"]))
        kept = server.upload(metadata=bearer(token()))
        for each in (call, kept):
            await each.write(b"a")
            await asyncio.wait_for(received.acquire(), 10)
        keys.revoke(given.file, given.id("writer"))
        await until_accepted(server, given.texts["writer"], False)
        await call.write(b"a")
        assert (await failure(call)).code() == StatusCode.UNAUTHENTICATED
        await kept.write(b"a")
        await kept.done_writing()
        assert await kept == b""


@pytest.mark.parametrize("text", ["trk_a_b\ntrk_c_d", "trk_a b", "trk_\x00", "trk_schlüssel"])
def test_a_client_does_not_send_what_cannot_be_a_key(text: str) -> None:
    with pytest.raises(TworoadsError, match="no key") as refused:
        Client("127.0.0.1:1", key=text)
    assert refused.value.reason == "KEY_INVALID" and "trk_" not in str(refused.value)


@pytest.mark.parametrize("content", ["", "[", "{}", '[{"id": "a"}]', "twice"])
async def test_a_broken_file_changes_nothing_and_is_logged_once(
    content: str, given: Given, server: Probe, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    entries = given.file.read_text()
    broken = json.dumps(json.loads(entries) * 2) if content == "twice" else content
    given.file.write_text(broken)
    async with asyncio.timeout(10):
        while "cannot be used" not in caplog.text:
            assert await accepted(server, given.texts["writer"])
    given.file.unlink()  # another change that is none for the better
    async with asyncio.timeout(10):
        while "No such file" not in caplog.text:
            assert await accepted(server, given.texts["writer"])
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 2
    given.file.write_text(entries)
    text = given.add("new")
    await until_accepted(server, text)


async def test_a_secret_volume_that_swaps_its_link_is_read_again(
    given: Given, tmp_path: Path, quick: None
) -> None:
    """As Kubernetes does it: the file is a link into `..data`, which is a link to a folder."""
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys.json").write_bytes(given.file.read_bytes())
        (tmp_path / version / "keys.json").chmod(0o666)  # no matter there: the volume is read-only
        late = given.texts.get("late") or given.add("late")
    given.file.unlink()
    given.file.symlink_to("..data/keys.json")
    (tmp_path / "..data").symlink_to("one")
    async with probe(embed=whoami, gate=given.gate()) as server:
        assert not await accepted(server, late)
        (tmp_path / "..new").symlink_to("two")
        (tmp_path / "..new").replace(tmp_path / "..data")
        await until_accepted(server, late)


async def test_keys_of_an_issuer_are_swapped_too(given: Given, server: Probe, quick: None) -> None:
    fresh = token(rsa_key("next"), header={"kid": "next"})
    assert await accepted(server, token()) and not await accepted(server, fresh)
    write_keys(given.key_set, jwk(rsa_key("next"), "next"))
    await until_accepted(server, fresh)
    assert not await accepted(server, token())
