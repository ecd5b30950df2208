"""`python -m services.retrieval.stores.weaviate_role --http HOST:PORT ...`

Gives a user of Weaviate the rights that the store needs, and no more: it may make our collections
and change what is in them, but neither delete a collection, nor see others', nor give rights. Waits
for the server; does no harm when it is done again.
"""

import argparse
import asyncio
from pathlib import Path

import httpx

OURS = "Tworoads*"  # what weaviate_schema.py calls its collections
ROLE = "tworoads"
WAIT_SECONDS = 300.0
RETRY_SECONDS = 1.0
COLLECTIONS = ("create_collections", "read_collections", "update_collections")
TENANTS = ("create_tenants", "read_tenants", "update_tenants", "delete_tenants")
DATA = ("create_data", "read_data", "update_data", "delete_data")


def permissions() -> list[dict[str, object]]:
    """Return the permissions of the role, as Weaviate's REST API writes them."""
    mine = {"collection": OURS}
    tenants = {**mine, "tenant": "*"}
    rights: list[dict[str, object]] = []
    rights += [{"action": action, "collections": mine} for action in COLLECTIONS]
    rights += [{"action": action, "tenants": tenants} for action in TENANTS]
    rights += [{"action": action, "data": {**tenants, "object": "*"}} for action in DATA]
    return rights


async def give(http_address: str, root_key: str, user: str) -> None:
    """Give `user` the role, whose permissions become these. Raises httpx.HTTPError."""
    async with httpx.AsyncClient(
        base_url=f"http://{http_address}/v1/authz",
        headers={"authorization": f"Bearer {root_key}"},
        timeout=30.0,
        trust_env=False,
    ) as client:
        made = await client.post("/roles", json={"name": ROLE, "permissions": permissions()})
        if made.status_code == httpx.codes.CONFLICT:
            body = {"permissions": permissions()}
            made = await client.post(f"/roles/{ROLE}/add-permissions", json=body)
        made.raise_for_status()
        body_of_user = {"roles": [ROLE], "userType": "db"}
        given = await client.post(f"/users/{user}/assign", json=body_of_user)
        given.raise_for_status()


async def main(http_address: str, root_key: str, user: str) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            try:
                await give(http_address, root_key, user)
            except httpx.HTTPStatusError as error:
                if error.response.is_client_error:  # the key is wrong: waiting does not help
                    raise SystemExit(f"Weaviate refused: {error.response.text}") from error
                print(f"Weaviate is not ready: {error}", flush=True)
            except httpx.HTTPError as error:
                print(f"Weaviate is away: {type(error).__name__} {error}", flush=True)
            else:
                print(f"{user} has the role {ROLE}", flush=True)
                return
            await asyncio.sleep(RETRY_SECONDS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[2])
    parser.add_argument("--http", required=True, help="HOST:PORT of Weaviate's REST API")
    parser.add_argument("--root-key-file", type=Path, required=True, help="file with a root's key")
    parser.add_argument("--user", required=True, help="who gets the rights")
    chosen = parser.parse_args()
    key = chosen.root_key_file.read_text().strip()
    asyncio.run(main(chosen.http, key, chosen.user))
