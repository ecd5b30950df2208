"""The file of keys, the command that writes it, and how a client comes to its key."""

import asyncio
import json
import os
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tworoads.v1.retrieval_pb2 import ListCorporaRequest
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub
from typer.testing import CliRunner, Result

from clients.cli.app import app
from clients.client import Client, TworoadsError
from clients.credentials import credentials
from clients.health import is_ready
from clients.stack import free_addresses, module
from services.gateway import keys
from services.gateway.__main__ import gate
from services.gateway.audit import Audit
from services.gateway.gate import Identified
from services.gateway.keys import Keys
from services.gateway.quotas import Limits, Quotas
from services.gateway.settings import Settings
from services.runtime.channel import connect
from services.runtime.errors import error_info
from services.runtime.gate import Open
from tests.certificates import Authority
from tests.issuer import ec_key, jwk, rsa_key, tokens, write_keys
from tests.probe import failure
from tests.small_stack import ANSWERS, RETRIEVAL, small_stack

VARIABLES = ("KEY", "KEY_FILE", "CA", "TLS", "INSECURE", "ADDRESS")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"TWOROADS_{name}", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["keys", *map(str, words)])


def added(file: Path, *options: str) -> str:
    done = run("add", file, "--tenant", "acme", "--principal", "ann", "--role", "writer", *options)
    assert done.exit_code == 0
    return done.stdout.strip()


def test_a_key_is_printed_once_and_only_its_hash_is_kept(file: Path) -> None:
    text = added(file)
    prefix, id, secret = text.split("_", 2)
    assert prefix == "trk" and len(secret) == 43
    assert secret not in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    identity = Keys(file).identity(text)
    assert (identity.caller.tenant, identity.caller.principal) == ("acme", "ann")
    assert identity.role == "writer"
    assert [entry["id"] for entry in json.loads(file.read_text())] == [id]


def test_keys_are_listed_with_their_state(file: Path) -> None:
    valid, ending, revoked = added(file), added(file, "--days", "3"), added(file)
    assert run("revoke", file, revoked.split("_")[1]).exit_code == 0
    keys.add(file, "acme", "bob", "reader", datetime.now(UTC) - timedelta(days=1))
    rows = json.loads(run("list", file, "--json").stdout)
    assert [row["state"] for row in rows] == ["valid", "valid", "revoked", "expired"]
    assert rows[1]["id"] == ending.split("_")[1] and rows[1]["expires"]
    lines = run("list", file).stdout.splitlines()
    assert lines[0].split()[:4] == ["ID", "TENANT", "PRINCIPAL", "ROLE"]
    assert lines[1].split()[:2] == [valid.split("_")[1], "acme"] and len(lines) == 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["revoke", "FILE", "nobody"], "There is no key nobody"),
        (["list", "MISSING"], "No such file"),
        (["add", "FILE", "--tenant", "../x", "--principal", "a", "--role", "admin"], "a tenant"),
        (["add", "FILE", "--tenant", "x", "--principal", "a b", "--role", "admin"], "a principal"),
        (["list", "BROKEN"], "not in order"),
    ],
)
def test_what_goes_wrong_is_one_sentence(words: list[str], said: str, file: Path) -> None:
    added(file)
    broken = file.with_name("broken.json")
    broken.write_text('[{"id": "a", "hash": "secret-of-mine"}]')
    places = {"FILE": file, "MISSING": file.with_name("none"), "BROKEN": broken}
    argv = [str(places.get(word, word)) for word in words]
    done = subprocess.run(
        [*module("clients.cli"), "keys", *argv], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1 and said in done.stderr and "secret-of-mine" not in done.stderr
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1


async def test_keys_that_are_made_side_by_side_are_all_kept(file: Path) -> None:
    names = [f"p{number}" for number in range(20)]
    await asyncio.gather(
        *(asyncio.to_thread(keys.add, file, "acme", name, "reader") for name in names)
    )
    assert sorted(key.principal for key in keys.read(file)) == sorted(names)


def test_a_write_that_fails_leaves_the_file_as_it_was(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added(file)
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        keys.add(file, "acme", "bob", "reader")
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_changed_file_keeps_its_owner_and_its_mode(file: Path) -> None:
    key, _ = keys.add(file, "acme", "web", "reader", None)
    os.chown(file, 10001, 10002)
    file.chmod(0o640)
    keys.add(file, "acme", "app", "reader", None)
    keys.revoke(file, key.id)
    found = file.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (10001, 10002, 0o640)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(mode: int, file: Path) -> None:
    added(file)
    file.chmod(mode)
    with pytest.raises(ValueError, match="chmod 600"):
        Keys(file)


def test_without_keys_everybody_is_let_in() -> None:
    assert isinstance(gate(Settings()), Open)


def test_keys_and_tokens_are_taken_side_by_side(file: Path, tmp_path: Path) -> None:
    added(file)
    key_set = write_keys(tmp_path / "jwks.json")
    settings = Settings(keys=file, jwt_keys=key_set, jwt_issuer="i", jwt_audience="a", streams=3)
    assert isinstance(gate(settings), Identified)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"requests_per_minute": 1}, "quotas"),
        ({"jwt_keys": "JWKS"}, "--jwt-issuer"),
        ({"jwt_keys": "JWKS", "jwt_issuer": "i"}, "--jwt-audience"),
        ({"jwt_issuer": "i", "jwt_audience": "a"}, "--jwt-keys"),
    ],
)
def test_settings_that_would_let_in_more_than_meant_are_refused(
    fields: dict[str, object], said: str, tmp_path: Path
) -> None:
    if "jwt_keys" in fields:
        fields = {**fields, "jwt_keys": write_keys(tmp_path / "jwks.json")}
    with pytest.raises(ValueError, match=said):
        gate(Settings(**fields))


PRIVATE = {"kty": "RSA", "kid": "a", "n": "AQAB", "e": "AQAB", "d": "AQAB"}
KEY_SETS: dict[str, Sequence[dict[str, object]] | str] = {
    "nothing": "",
    "no set": "[]",
    "a list of words": '{"keys": ["a"]}',
    "no keys": '{"keys": []}',
    "only a secret": [{"kty": "oct", "kid": "a", "k": "AAAA"}],
    "a private key": [PRIVATE],
    "no id": [{"kty": "RSA", "n": "AQAB", "e": "AQAB"}],
    "no number": [{"kty": "RSA", "kid": "a", "e": "AQAB"}],
}


@pytest.mark.parametrize("what", KEY_SETS)
def test_a_key_set_that_proves_nothing_is_refused(what: str, tmp_path: Path) -> None:
    found = KEY_SETS[what]
    path = tmp_path / "jwks.json"
    path.write_text(found if isinstance(found, str) else json.dumps({"keys": found}))
    with pytest.raises(ValueError):
        tokens(path)


def test_rsa_keys_that_are_too_short_or_twice_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2048"):
        tokens(write_keys(tmp_path / "short.json", jwk(rsa_key("short", 1024), "a")))
    with pytest.raises(ValueError, match="of its own"):
        twice = write_keys(tmp_path / "twice.json", jwk(rsa_key(), "a"), jwk(ec_key(), "a"))
        tokens(twice)


LOCAL = "127.0.0.1:50050"


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({}, {}, ("", None, False)),
        ({"KEY": " k\n"}, {}, ("k", None, False)),
        ({"KEY_FILE": "FILE"}, {}, ("in-the-file", None, False)),
        ({"KEY_FILE": "FILE", "KEY": "k"}, {}, ("in-the-file", None, False)),
        ({"KEY_FILE": "FILE"}, {"key": "given"}, ("given", None, False)),
        ({"TLS": "1"}, {}, ("", None, True)),
        ({"TLS": "0"}, {}, ("", None, False)),
        ({"CA": "FILE"}, {}, ("", "FILE", True)),
        ({}, {"ca": "FILE"}, ("", "FILE", True)),
    ],
)
def test_a_client_takes_from_the_environment_what_it_is_not_given(
    environment: dict[str, str],
    arguments: dict[str, str],
    expected: tuple[str, str | None, bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "key"
    file.write_text("in-the-file\n")
    named = {"FILE": str(file)}
    for name, value in environment.items():
        monkeypatch.setenv(f"TWOROADS_{name}", named.get(value, value))
    found = credentials(LOCAL, **{k: named.get(v, v) for k, v in arguments.items()})
    key, ca, tls = expected
    assert (found.key, found.ca, found.tls) == (key, file if ca else None, tls)
    assert not found.key or found.key not in repr(found)


@pytest.mark.parametrize(
    "address",
    ["gateway.example:50050", "10.0.0.1:1", "dns:///gateway:50050", "0.0.0.0:1", "[::2]:1"],
)
def test_a_key_goes_over_a_network_only_when_it_is_encrypted(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TworoadsError, match="for all to read") as caught:
        Client(address, "trk_a_secret")
    assert caught.value.reason == "KEY_IN_THE_CLEAR" and "secret" not in str(caught.value)
    assert Client(address) and Client(address, "trk_a_secret", tls=True)
    monkeypatch.setenv("TWOROADS_INSECURE", "1")
    assert Client(address, "trk_a_secret")


@pytest.mark.parametrize("address", [LOCAL, "localhost:1", "[::1]:1", "unix:/tmp/socket"])
def test_a_key_goes_to_this_machine_as_it_is(address: str) -> None:
    assert credentials(address, "trk_a_secret").key


@pytest.mark.parametrize(
    ("name", "reason"), [("KEY_FILE", "KEY_FILE_UNREADABLE"), ("CA", "CA_UNREADABLE")]
)
def test_a_file_that_is_not_there_is_named(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"TWOROADS_{name}", "/none/of/these")
    with pytest.raises(TworoadsError, match="/none/of/these") as caught:
        Client(LOCAL)
    assert caught.value.reason == reason


async def test_the_client_and_the_command_line_send_the_key_with_every_call(
    file: Path, tmp_path: Path
) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(keys.add(file, "acme", "ann", "admin")[1])
    _, reader = keys.add(file, "acme", "bob", "reader")
    front = Identified(Keys(file), None, Quotas(Limits()), Audit())
    async with small_stack(tmp_path / "store", gate=front) as stack:

        async def typed(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
            return await asyncio.to_thread(
                subprocess.run,
                [*module("clients.cli"), *words, "--address", stack.address],
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                timeout=30,
            )

        async with Client(stack.address, key_file.read_text()) as client:
            await client.create_corpus("c")
            assert (await client.set_policy("c", "base")).author == "ann"
            assert (await client.ask("Who?", path="base")).text == stack.generation.answer
        async with Client(stack.address, reader) as client:
            assert [corpus.name for corpus in await client.corpora()] == ["c"]
            with pytest.raises(TworoadsError) as caught:
                await client.delete_corpus("c")
            assert caught.value.reason == "ROLE_MISSING"
        done = await typed("documents", TWOROADS_KEY_FILE=str(key_file))
        assert done.returncode == 0 and "c" in done.stdout
        done = await typed("ask", "Who?", "--path", "base", TWOROADS_KEY=reader)
        assert done.returncode == 0 and stack.generation.answer in done.stdout
        done = await typed("documents")
        assert done.returncode == 1 and "TWOROADS_KEY_FILE" in done.stderr
        done = await typed("documents", TWOROADS_KEY=reader[:-1])
        assert done.returncode == 1 and "ask the operator for a new one" in done.stderr


async def test_a_gateway_for_other_machines_takes_keys_in_front_and_certificates_inside(
    file: Path, tmp_path: Path
) -> None:
    authority = Authority()
    front = authority.folder(tmp_path / "front", "127.0.0.1")
    inside = authority.folder(tmp_path / "inside", "gateway")
    own = authority.folder(tmp_path / "own", "evaluation")
    other = authority.folder(tmp_path / "other", "retrieval")
    ca = tmp_path / "ca.crt"
    ca.write_bytes(authority.pem)
    text = added(file)
    public, internal, health = free_addresses(3)
    said = {"LISTEN": public, "INTERNAL": internal, "HEALTH": health, "KEYS": file}
    said |= {"PUBLIC_TLS": front, "TLS": inside, "CALLERS": '["evaluation"]'}
    environment = {f"TWOROADS_GATEWAY_{name}": str(value) for name, value in said.items()}
    with subprocess.Popen(module("services.gateway"), env={**os.environ, **environment}) as process:
        try:
            async with asyncio.timeout(20):
                while not await is_ready(health, "tworoads.v1.AnswerService", 0.5):
                    assert process.poll() is None
            async with Client(public, text, ca) as client:
                with pytest.raises(TworoadsError) as caught:  # nobody is behind the gateway
                    await client.corpora()
                assert caught.value.reason == "RETRIEVAL_UNAVAILABLE"
            async with Client(public, ca=ca) as client:
                with pytest.raises(TworoadsError) as caught:
                    await client.corpora()
                assert caught.value.reason == "CREDENTIALS_MISSING"
            for folder, reason in ((own, "RETRIEVAL_UNAVAILABLE"), (other, "PEER_UNKNOWN")):
                async with connect(internal, ANSWERS, RETRIEVAL, tls=folder) as channel:
                    listing = RetrievalServiceStub(channel).ListCorpora(ListCorporaRequest())
                    info = error_info(await failure(listing))
                    assert info and info.reason == reason
        finally:
            process.terminate()
        assert process.wait(20) == 0
