"""A Weaviate server of one's own, on this machine. https://docs.weaviate.io"""

import asyncio
import ctypes
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from services.runtime.errors import NotReady

log = logging.getLogger(__name__)

VERSION = "1.39.0"
MODULE = f"github.com/weaviate/weaviate/cmd/weaviate-server@v{VERSION}"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tworoads" / "bin"
READY_SECONDS = 60.0
STOP_SECONDS = 20.0
PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent ends

_libc = ctypes.CDLL(None)


class WeaviateServer:
    """Use as `async with WeaviateServer(binary, folder) as server`: ready inside, stopped after.

    The server listens on ports of 127.0.0.1 that were free, keeps its data and its log in `folder`,
    lets in who has `api_key`, and never outlives this process. `stop` and `start` restart it at the
    same addresses. Raises NotReady (WEAVIATE_FAILED) if it does not get ready.
    """

    def __init__(self, binary: Path, folder: Path, api_key: str = "") -> None:
        self.api_key = api_key or secrets.token_urlsafe(32)
        self._binary = binary
        self._folder = folder
        self._ports = free_ports(1, 1, 2, 2)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def http_address(self) -> str:
        """HOST:PORT of its REST API."""
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def grpc_address(self) -> str:
        """HOST:PORT of its gRPC API."""
        return f"127.0.0.1:{self._ports[1]}"

    @property
    def log_file(self) -> Path:
        """What the server says."""
        return self._folder / "weaviate.log"

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the server and wait until it is ready."""
        self._folder.mkdir(parents=True, exist_ok=True)
        _, port = self.http_address.split(":")
        with self.log_file.open("ab") as output:
            self._process = subprocess.Popen(
                [self._binary, "--host", "127.0.0.1", "--port", port, "--scheme", "http"],
                env=os.environ | self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the parent, which stops things in order
                preexec_fn=_dying_with(os.getpid()),
            )
        try:
            async with asyncio.timeout(READY_SECONDS), httpx.AsyncClient() as client:
                while not await self._is_ready(client):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            await self.stop()
            raise self._failed(f"did not get ready in {READY_SECONDS:.0f} s") from None

    async def stop(self) -> None:
        """Stop the server; it keeps its data."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)

    async def _is_ready(self, client: httpx.AsyncClient) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise self._failed("stopped while it started")
        try:
            answer = await client.get(f"http://{self.http_address}/v1/.well-known/ready")
        except httpx.HTTPError:
            return False
        return answer.status_code == httpx.codes.OK

    def _failed(self, what: str) -> NotReady:
        return NotReady("WEAVIATE_FAILED", f"the Weaviate server {what}; see {self.log_file}")

    def environment(self) -> dict[str, str]:
        _, grpc, gossip, raft = self._ports
        return {
            "PERSISTENCE_DATA_PATH": str(self._folder / "data"),
            "GRPC_PORT": str(grpc),
            "CLUSTER_HOSTNAME": "node1",
            "CLUSTER_IN_LOCALHOST": "true",
            "CLUSTER_ADVERTISE_ADDR": "127.0.0.1",  # or it waits for itself at an outside address
            "CLUSTER_GOSSIP_BIND_PORT": str(gossip),
            "CLUSTER_DATA_BIND_PORT": str(gossip + 1),  # Weaviate finds its own ports by adding one
            "RAFT_PORT": str(raft),
            "RAFT_INTERNAL_RPC_PORT": str(raft + 1),
            "RAFT_BOOTSTRAP_EXPECT": "1",
            "GO_PROFILING_DISABLE": "true",
            "DISABLE_TELEMETRY": "true",
            "ENABLE_API_BASED_MODULES": "false",
            "ENABLE_MODULES": "backup-filesystem",
            "BACKUP_FILESYSTEM_PATH": str(self._folder / "backups"),
            "DEFAULT_VECTORIZER_MODULE": "none",
            "AUTOSCHEMA_ENABLED": "false",
            "AUTHENTICATION_ANONYMOUS_ACCESS_ENABLED": "false",
            "AUTHENTICATION_APIKEY_ENABLED": "true",
            "AUTHENTICATION_APIKEY_ALLOWED_KEYS": self.api_key,
            "AUTHENTICATION_APIKEY_USERS": "tworoads",
            "AUTHORIZATION_ADMINLIST_ENABLED": "true",
            "AUTHORIZATION_ADMINLIST_USERS": "tworoads",
        }


def free_ports(*counts: int) -> list[int]:
    """Return for each count the first of so many ports in a row on which nobody listens now."""
    with ExitStack() as held:
        return [_first_port(count, held) for count in counts]


def _first_port(count: int, held: ExitStack) -> int:
    while True:
        with ExitStack() as tried:
            first = 0
            try:
                for number in range(count):
                    one = tried.enter_context(socket.socket())
                    one.bind(("", first + number if first else 0))
                    first = first or one.getsockname()[1]
            except OSError:  # the next one is taken
                continue
            held.push(tried.pop_all())
            return first


async def find_binary(named: Path | None = None, say: Callable[[str], None] = log.info) -> Path:
    """Return the server's binary: `named`, else the one on PATH, else ours, which Go builds or
    which is downloaded the first time; `say` gets a sentence before that takes minutes. Raises
    NotReady (WEAVIATE_MISSING)."""
    if named is not None:
        if not os.access(named, os.X_OK) or named.is_dir():
            raise NotReady("WEAVIATE_MISSING", f"{named} is no program")
        return named
    for name in ("weaviate-server", "weaviate"):
        if path := shutil.which(name):
            return Path(path)
    ours = CACHE / "weaviate-server"
    if not ours.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        go = shutil.which("go")
        if not (go and await _build(go, say)):
            await _download(ours, say)
    return ours


async def _build(go: str, say: Callable[[str], None]) -> bool:
    say(f"building Weaviate {VERSION} with Go into {CACHE}; this takes up to 10 minutes, once")
    process = await asyncio.create_subprocess_exec(
        *(go, "install", MODULE),
        env=os.environ | {"GOBIN": str(CACHE)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        _, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        log.warning("Go could not build Weaviate: %s", said.decode(errors="replace")[-2000:])
    return process.returncode == 0


async def _download(binary: Path, say: Callable[[str], None]) -> None:
    say(f"downloading Weaviate {VERSION} into {CACHE}, once")
    try:
        await asyncio.to_thread(_download_now, binary)
    except (OSError, RuntimeError) as error:
        raise NotReady(
            "WEAVIATE_MISSING",
            "there is no Weaviate server, no Go 1.26 toolchain to build one, and none could be "
            "downloaded; install one of these, or give the address of a running server",
        ) from error


def _download_now(binary: Path) -> None:
    from weaviate.embedded import EmbeddedOptions, EmbeddedV4

    options = EmbeddedOptions(version=VERSION, binary_path=str(CACHE), persistence_data_path="/tmp")
    download = EmbeddedV4(options)
    download.ensure_weaviate_binary_exists()
    os.replace(download._weaviate_binary_path, binary)


def _dying_with(parent: int) -> Callable[[], None]:
    """Return what a child runs first, so that it is killed when the process `parent` ends."""

    def prepare() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before prctl
            os._exit(1)

    return prepare
