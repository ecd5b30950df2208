"""Replaces the documents that change in the midst of a comparison, once."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tworoads.v1 import retrieval_pb2

from services.evaluation.asking import Gateway
from services.evaluation.comparison import CHANGED, Comparison
from services.evaluation.gathering import Gatherer
from services.runtime import disk
from services.runtime.call import outgoing
from services.runtime.status import real_status
from services.runtime.threads import in_thread

SENT = "changed.json"
CHUNK = 512 * 1024  # bytes


@dataclass(frozen=True)
class Change:
    """What came of the change. `time` is when it was sent, in seconds since 1970; `seconds` is
    about how long indexing the whole corpus takes. `refused` says of the documents that cannot be
    indexed, by id, why: they stay as they were."""

    time: float = 0.0
    seconds: float = 0.0
    refused: Mapping[str, str] = field(default_factory=dict)


class Changer:
    """Replaces the documents in `folder` of a comparison's corpus."""

    def __init__(
        self, gateway: Gateway, gatherer: Gatherer, comparison: Comparison, folder: Path
    ) -> None:
        self._gateway = gateway
        self._gatherer = gatherer
        self._corpus = comparison.plan.corpus
        self._count = comparison.changed_documents
        self._folder = folder

    async def change(self) -> Change:
        """Replace the documents, or return what came of it if that was done. Raises what a Gatherer
        raises, and ServiceError."""
        path = self._folder / SENT
        sent = json.loads(await in_thread(path.read_bytes)) if path.exists() else {}
        if "seconds" not in sent:
            if "time" not in sent:  # of the first try: some may have been replaced by it
                sent = {"time": time.time()}
                await self._keep(sent)
            start = time.perf_counter()
            refused = await self._gatherer.patiently(self._put)
            seconds = time.perf_counter() - start
            documents = (await self._gatherer.corpus(self._corpus)).documents
            sent["seconds"] = seconds * documents / self._count
            sent["refused"] = refused
            await self._keep(sent)
        return Change(**sent)

    async def _keep(self, sent: Mapping[str, Any]) -> None:
        await in_thread(disk.put, self._folder / SENT, json.dumps(sent).encode())

    async def _put(self) -> dict[str, str]:
        refused = {}
        call = self._gateway.retrieval.PutDocuments(
            self._requests(), metadata=outgoing()["metadata"]
        )
        try:
            async with real_status(call):
                async for response in call:
                    result = response.result
                    if result.outcome == retrieval_pb2.DOCUMENT_OUTCOME_FAILED:
                        refused[result.id] = result.message
        finally:
            call.cancel()
        return refused

    async def _requests(self) -> AsyncIterator[retrieval_pb2.PutDocumentsRequest]:
        start = retrieval_pb2.PutDocumentsStart(corpus=self._corpus)
        yield retrieval_pb2.PutDocumentsRequest(start=start)
        folder = self._folder / CHANGED
        for number in range(1, self._count + 1):
            header = await in_thread((folder / f"{number}.document").read_bytes)
            document = retrieval_pb2.PutDocumentsDocument.FromString(header)
            yield retrieval_pb2.PutDocumentsRequest(document=document)
            content = await in_thread((folder / f"{number}.content").read_bytes)
            for at in range(0, len(content), CHUNK):
                yield retrieval_pb2.PutDocumentsRequest(chunk=content[at : at + CHUNK])
        yield retrieval_pb2.PutDocumentsRequest(end=retrieval_pb2.PutDocumentsEnd())
