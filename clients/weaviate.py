"""A Weaviate server in a stack. `python -m clients.weaviate` finds or makes its program."""

import asyncio
import os
from pathlib import Path

from clients.supervisor import Child
from services.retrieval.stores.weaviate_server import WeaviateServer, find_binary
from services.runtime.errors import NotReady

BINARY = "TWOROADS_WEAVIATE_BINARY"  # the user may name one; the preparation tells the server's


def children(folder: Path, preparation: tuple[str, ...]) -> tuple[dict[str, str], list[Child]]:
    """Return retrieval's settings for a server of its own, and the processes that it needs.

    The server keeps its data in FOLDER/weaviate and takes a new key each time, from a file that
    only its user may read. `preparation` is the command line that runs this module.
    """
    server = WeaviateServer(Path(), folder / "weaviate")
    key_file = folder / "weaviate.key"
    key_file.unlink(missing_ok=True)
    key_file.touch(mode=0o600)
    key_file.write_text(server.api_key)
    _, port = server.http_address.split(":")
    start = f'exec "${BINARY}" --scheme http --host 127.0.0.1 --port {port}'
    settings = {
        "WEAVIATE_HTTP": server.http_address,
        "WEAVIATE_GRPC": server.grpc_address,
        "WEAVIATE_KEY_FILE": str(key_file),
    }
    return settings, [
        Child("weaviate-program", preparation, once=True, gives=(BINARY,)),
        Child(
            "weaviate",
            ("/bin/sh", "-c", start),
            server.environment(),
            server.http_address,
            f"http://{server.http_address}/v1/.well-known/ready",
        ),
    ]


async def main() -> None:
    named = os.environ.get(BINARY)
    try:
        print(await find_binary(Path(named) if named else None, print))
    except NotReady as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    asyncio.run(main())
