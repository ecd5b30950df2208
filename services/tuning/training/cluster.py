"""The Jobs or TrainJobs of the cluster that this process runs in, by its service account."""

import logging
import os
import ssl
from pathlib import Path
from typing import Any

import httpx

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
SECONDS = 5.0  # that a call may take
MOST_TEXT = 1000  # characters of what the API server says, in the log
# The name of a kind in the API, and the label by which its pods name their job.
KINDS = {
    ("batch/v1", "Job"): ("jobs", "batch.kubernetes.io/job-name"),
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): (
        "trainjobs",
        "jobset.sigs.k8s.io/jobset-name",
    ),
}

Object = dict[str, Any]


class Away(Exception):
    """The API server does not answer, or not now."""


class Refused(Exception):
    """The API server does not do it. What it says is for the log, not for callers."""


class Cluster:
    """The jobs of one kind in the namespace of the service account."""

    def __init__(self, version: str, kind: str, address: str, account: Path = ACCOUNT) -> None:
        """`address` is the API server's, https://HOST:PORT.

        Raises ValueError for a kind that is not known, OSError without a service account.
        """
        if (version, kind) not in KINDS:
            raise ValueError(f"{version} {kind} is neither a Job nor a TrainJob")
        name, self._label = KINDS[version, kind]
        namespace = (account / "namespace").read_text()
        self._jobs = f"/apis/{version}/namespaces/{namespace}/{name}"
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._address = address
        self._account = account
        logging.getLogger("httpx").setLevel(logging.WARNING)  # else it logs every call

    async def get(self, name: str) -> Object | None:
        """Return a job, None if there is none. Raises Away, Refused."""
        return await self._call("GET", f"{self._jobs}/{name}")

    async def create(self, job: Object) -> None:
        """Create a job. Raises Away, and Refused if there is one of this name too."""
        if await self._call("POST", self._jobs, body=job) is None:
            raise Refused("there is no such kind of job, or no such namespace")

    async def delete(self, name: str) -> None:
        """Have a job deleted, if it is there, with its pods before it. Raises Away, Refused."""
        await self._call("DELETE", f"{self._jobs}/{name}", {"propagationPolicy": "Foreground"})

    async def pods(self, name: str) -> list[Object]:
        """Return the pods of a job, ended ones too. Raises Away, Refused."""
        found = await self._call("GET", self._pods, {"labelSelector": f"{self._label}={name}"})
        return list((found or {}).get("items", ()))

    async def is_gone(self, name: str) -> bool:
        """Say whether nothing of a job is left that may still write. Raises Away, Refused."""
        return await self.get(name) is None and not await self.pods(name)

    async def _call(
        self, method: str, path: str, query: dict[str, str] | None = None, body: Any = None
    ) -> Object | None:
        try:
            # Both change while the service runs: a connection of its own takes what is there now.
            token = (self._account / "token").read_text()
            context = ssl.create_default_context(cafile=self._account / "ca.crt")
            async with httpx.AsyncClient(
                base_url=self._address,
                headers={"Authorization": f"Bearer {token}"},
                verify=context,
                timeout=SECONDS,
                trust_env=False,
            ) as client:
                answer = await client.request(method, path, params=query, json=body)
                if answer.status_code == httpx.codes.NOT_FOUND:
                    return None
                if answer.status_code == httpx.codes.TOO_MANY_REQUESTS or answer.is_server_error:
                    raise Away(f"{method} {path}: {answer.text[:MOST_TEXT]}")
                if answer.is_error:
                    raise Refused(f"{method} {path}: {answer.text[:MOST_TEXT]}")
                found: Object = answer.json()
        except (httpx.HTTPError, OSError, ValueError) as error:
            raise Away(f"{method} {path}: {error!r}") from error
        return found


def api_server() -> str:
    """Return the address that every container is told. Raises KeyError outside a cluster."""
    host, port = (os.environ[f"KUBERNETES_SERVICE_{part}"] for part in ("HOST", "PORT"))
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
