"""`python -m services.retrieval.stores.weaviate_backup create|restore ID --http HOST:PORT ...`

Copies our collections, all tenants of them, by Weaviate's own backups, while it serves, and brings
them back. The server needs the module of the backend: `backup-s3` and others for a cluster,
`backup-filesystem` for one node. Restoring is refused while a collection of the backup exists.
https://docs.weaviate.io/deploy/configuration/backups
"""

import argparse
import asyncio
from pathlib import Path
from typing import Any, Literal

import httpx

from services.retrieval.stores.weaviate_role import OURS

PREFIX = OURS.rstrip("*")
POLL_SECONDS = 0.5
CALL_SECONDS = 60.0
# Weaviate names the logs of its vector index by the second, and leaves the newest out of a backup:
# of a tenant that was made in the same second no vector would come back (seen in 1.39).
LOG_SECONDS = 1.1


class BackupFailed(Exception):
    """Weaviate says why."""


async def back_up(http_address: str, key: str, backend: str, id: str) -> list[str]:
    """Copy all our collections to the backend; return their names, none before there is a corpus.
    Raises BackupFailed."""
    async with _client(http_address, key) as client:
        schema = await _asked(client, "GET", "/schema")
        classes = [one["class"] for one in schema["classes"] if one["class"].startswith(PREFIX)]
        if not classes:
            return []
        await asyncio.sleep(LOG_SECONDS)
        await _asked(client, "POST", f"/backups/{backend}", {"id": id, "include": classes})
        await _ended(client, f"/backups/{backend}/{id}")
        return classes


async def restore(http_address: str, key: str, backend: str, id: str) -> list[str]:
    """Bring the collections of a backup back; return their names. Raises BackupFailed, also if one
    of them exists."""
    async with _client(http_address, key) as client:
        path = f"/backups/{backend}/{id}/restore"
        started = await _asked(client, "POST", path, {})
        await _ended(client, path)
        return list(started["classes"])


def _client(http_address: str, key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"http://{http_address}/v1",
        headers={"authorization": f"Bearer {key}"},
        timeout=CALL_SECONDS,
        trust_env=False,
    )


async def _ended(client: httpx.AsyncClient, path: str) -> None:
    while True:
        said = await _asked(client, "GET", path)
        if said["status"] == "SUCCESS":
            return
        if said["status"] in ("FAILED", "CANCELED"):
            raise BackupFailed(said.get("error") or said["status"].lower())
        await asyncio.sleep(POLL_SECONDS)


async def _asked(
    client: httpx.AsyncClient,
    method: Literal["GET", "POST"],
    path: str,
    body: dict[str, Any] | None = None,
) -> Any:
    try:
        response = await client.request(method, path, json=body)
    except httpx.HTTPError as error:
        raise BackupFailed(f"Weaviate does not answer: {type(error).__name__} {error}") from error
    if not response.is_success:
        raise BackupFailed(f"Weaviate refused: {response.text}")
    return response.json()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[2])
    parser.add_argument("work", choices=("create", "restore"))
    parser.add_argument("id", help="name of the backup: small letters, digits, - and _")
    parser.add_argument("--http", required=True, help="HOST:PORT of Weaviate's REST API")
    parser.add_argument("--key-file", type=Path, required=True, help="file with a root's key")
    parser.add_argument("--backend", default="s3", help="s3, gcs, azure or filesystem")
    chosen = parser.parse_args()
    work = back_up if chosen.work == "create" else restore
    try:
        names = asyncio.run(
            work(chosen.http, chosen.key_file.read_text().strip(), chosen.backend, chosen.id)
        )
    except BackupFailed as error:
        raise SystemExit(str(error)) from error
    print(f"{chosen.work}: {', '.join(names) or 'there is nothing yet'}")
