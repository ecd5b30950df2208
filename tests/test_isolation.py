"""One tenant learns nothing of another, whatever it asks for."""

import json
import random
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from tworoads.v1 import evaluation_pb2, retrieval_pb2, tuning_pb2
from tworoads.v1.evaluation_pb2_grpc import EvaluationServiceStub
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from services.gateway import keys
from services.gateway.audit import Audit
from services.gateway.forward import PUBLIC
from services.gateway.gate import ANSWERS, METHODS, Identified
from services.gateway.keys import Keys
from services.gateway.quotas import Limits, Quotas
from services.runtime.channel import connect
from services.runtime.errors import error_info
from services.runtime.status import real_status
from tests.small_stack import small_stack
from tests.small_tuning import small_tuning
from tests.small_tuning import upload as examples_for
from tests.test_retrieval import END, document, start

REQUESTS = 5000
SECONDS = 5.0  # for one call: what waits longer is a stream that has nothing more to say
CANARY = "canary-5f1d"  # in everything of A that B never says itself
TEXT = f"Employees of {CANARY} get 27 days of paid leave. Ask {CANARY} for leave ten days ahead."
TEXTS = ["", "leave", "Employees get 27 days of paid leave.", "é" * 40, "../..", "a'; DROP TABLE x"]
NUMBERS = [0, 1, 2, 50, 2**31 - 1]
NAMED = re.compile("corpus|name|id$|ids|document|adapter|job|comparison|candidate|token|etag|key")

Metadata = tuple[tuple[str, str], ...]


@dataclass
class Names:
    """What B may say. At the same place: a name of A's in `foreign`, one of nobody's in `unknown`,
    of the same shape. `own` are B's, and tokens of A's pages, which have no counterpart."""

    foreign: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)

    def add(self, foreign: str) -> None:
        """Take a name of A's, and invent the one that is nobody's."""
        self.foreign.append(foreign)
        self.unknown.append(
            foreign.translate(str.maketrans("0123456789abcdef", "3456789012cdefab"))
        )


@dataclass
class Said:
    """How a call ended: what came, and the error's code, reason and message."""

    messages: bytes
    code: str = "OK"
    reason: str = ""
    details: str = ""
    trailing: str = ""

    def like(self, names: list[str]) -> tuple[str, str, str]:
        """Return the error with every name in its place by the number of that name."""
        details = self.details
        for number, name in sorted(enumerate(names), key=lambda pair: -len(pair[1])):
            details = details.replace(name, f"<{number}>")
        return self.code, self.reason, details


class Tenant:
    """A caller with a key of its own."""

    def __init__(self, channel: grpc.aio.Channel, key: str) -> None:
        self.metadata: Metadata = (("authorization", f"Bearer {key}"),)
        self.retrieval = RetrievalServiceStub(channel)
        self.tuning = TuningServiceStub(channel)
        self.evaluation = EvaluationServiceStub(channel)
        self._channel = channel

    async def call(self, path: str, requests: list[Any]) -> Said:
        method = METHODS[path]
        raw = [request.SerializeToString() for request in requests]
        kind = "_".join(
            "stream" if streaming else "unary"
            for streaming in (method.client_streaming, method.server_streaming)
        )
        call = getattr(self._channel, kind)(path)(
            iter(raw) if method.client_streaming else raw[0],
            metadata=self.metadata,
            timeout=SECONDS,
        )
        came = bytearray()
        try:
            async with real_status(call):
                if method.server_streaming:
                    async for message in call:
                        came += message
                else:
                    came += await call
        except grpc.aio.AioRpcError as error:
            info = error_info(error)
            return Said(
                bytes(came),
                error.code().name,
                info.reason if info else "",
                error.details() or "",
                repr((error.trailing_metadata(), info)),
            )
        return Said(bytes(came))


async def fill(tenant: Tenant, text: str, prefix: str, secret: str) -> dict[str, str]:
    """Give a tenant two corpora with policies, two adapters that were trained, and a comparison;
    return what they are called but for those that have `secret` as name."""
    mine: dict[str, Any] = {"metadata": tenant.metadata}
    corpus = f"{prefix}-c0de"
    for name in (corpus, secret):
        create = retrieval_pb2.CreateCorpusRequest(name=name)
        await tenant.retrieval.CreateCorpus(create, **mine)
        policy = retrieval_pb2.SetPolicyRequest(corpus=name, path=retrieval_pb2.PATH_RAG)
        await tenant.retrieval.SetPolicy(policy, **mine)
    fields = {"title": f"Leave {text}", "uri": f"file:///{text}"}
    metadata = {"about": retrieval_pb2.MetadataValue(string_value=text)}
    parts = [
        start(corpus),
        *document(f"{prefix}-d0c", text, **fields, metadata=metadata),
        *document(f"{text} as an id", text),
        END,
    ]
    async for _ in tenant.retrieval.PutDocuments(iter(parts), **mine):
        pass
    await trained(tenant, secret, text)
    adapter = await trained(tenant, f"{prefix}-ada", text)
    asked = {"answers": [text]}
    lines = "\n".join(json.dumps({"question": f"{n} of {text}?", **asked}) for n in range(12))
    wanted = evaluation_pb2.CreateComparisonStart(
        corpus=corpus,
        candidates=[
            evaluation_pb2.Candidate(id=secret, path=retrieval_pb2.PATH_BASE),
            evaluation_pb2.Candidate(id="rag", path=retrieval_pb2.PATH_RAG),
        ],
        idempotency_key=f"{prefix}-beef",
    )
    sent = [
        evaluation_pb2.CreateComparisonRequest(start=wanted),
        evaluation_pb2.CreateComparisonRequest(questions=lines.encode()),
        evaluation_pb2.CreateComparisonRequest(end=evaluation_pb2.CreateComparisonEnd()),
    ]
    comparison = ""
    async for response in tenant.evaluation.CreateComparison(iter(sent), **mine):
        comparison = response.comparison.id or comparison
    async for _ in tenant.evaluation.WatchComparison(
        evaluation_pb2.WatchComparisonRequest(id=comparison), **mine
    ):
        pass
    return {"corpus": corpus, "document": f"{prefix}-d0c", "comparison": comparison, **adapter}


async def trained(tenant: Tenant, name: str, text: str) -> dict[str, str]:
    mine: dict[str, Any] = {"metadata": tenant.metadata}
    rows = [{"question": f"What is {n} of {text}?", "answer": f"{n} {text}"} for n in range(40)]
    job = ""
    async for response in tenant.tuning.CreateJob(
        examples_for(rows, name=name, idempotency_key=f"{name}-feed"), **mine
    ):
        job = response.job.id or job
    async for _ in tenant.tuning.WatchJob(tuning_pb2.WatchJobRequest(id=job), **mine):
        pass
    found = await tenant.tuning.GetJob(tuning_pb2.GetJobRequest(id=job), **mine)
    assert found.job.adapter, found.job.message
    return {"job": job, "adapter": found.job.adapter, "name": name, "key": f"{name}-feed"}


async def state(tenant: Tenant, names: dict[str, str]) -> list[bytes]:
    """Return all that a tenant sees of its own things."""
    mine: dict[str, Any] = {"metadata": tenant.metadata}
    corpus = retrieval_pb2.GetCorpusRequest(name=names["corpus"])
    id = names["comparison"]
    seen = [
        await tenant.retrieval.GetCorpus(corpus, **mine),
        await tenant.retrieval.ListCorpora(retrieval_pb2.ListCorporaRequest(), **mine),
        await tenant.retrieval.ListDocuments(
            retrieval_pb2.ListDocumentsRequest(corpus=names["corpus"]), **mine
        ),
        await tenant.retrieval.ListPolicies(retrieval_pb2.ListPoliciesRequest(), **mine),
        await tenant.tuning.ListJobs(tuning_pb2.ListJobsRequest(), **mine),
        await tenant.tuning.ListAdapters(tuning_pb2.ListAdaptersRequest(), **mine),
        await tenant.evaluation.GetComparison(evaluation_pb2.GetComparisonRequest(id=id), **mine),
        await tenant.evaluation.ListComparisons(evaluation_pb2.ListComparisonsRequest(), **mine),
    ]
    return [message.SerializeToString(deterministic=True) for message in seen]


class Requests:
    """Makes random requests. The same `chance` with other `names` makes the same ones with the
    names of others."""

    def __init__(self, chance: random.Random, names: list[str], own: list[str]) -> None:
        self._chance = chance
        self._names = names
        self._own = own
        self._filled = chance.choice((0.2, 0.5, 0.9))

    def of(self, method: Any) -> list[Any]:
        if not method.client_streaming:
            return [self._message(method.input_type, 0)]
        first, *others = method.input_type.oneofs[0].fields
        parts = [first, *self._chance.choices(others, k=self._chance.randint(0, 4)), others[-1]]
        if self._chance.random() < 0.2:
            self._chance.shuffle(parts)
        return [self._only(method.input_type, part) for part in parts]

    def _only(self, descriptor: Descriptor, part: FieldDescriptor) -> Any:
        message = GetMessageClass(descriptor)()
        self._set(message, part, 1)
        return message

    def _message(self, descriptor: Descriptor, depth: int) -> Any:
        message = GetMessageClass(descriptor)()
        for own in descriptor.fields:
            often = 0.95 if NAMED.search(own.name) else self._filled
            if depth < 4 and self._chance.random() < often:
                self._set(message, own, depth)
        return message

    def _set(self, message: Any, own: FieldDescriptor, depth: int) -> None:
        if own.message_type and own.message_type.GetOptions().map_entry:
            values = own.message_type.fields_by_name["value"].message_type
            value = self._message(values, depth + 1)
            getattr(message, own.name)[self._text("key")].CopyFrom(value)
            return
        count = self._chance.randint(0, 3) if own.is_repeated else 1
        values = [self._value(own, depth) for _ in range(count)]
        if own.is_repeated:
            getattr(message, own.name).extend(values)
        elif own.message_type:
            getattr(message, own.name).SetInParent()
            getattr(message, own.name).CopyFrom(values[0])
        else:
            setattr(message, own.name, values[0])

    def _value(self, own: FieldDescriptor, depth: int) -> Any:
        chance = self._chance
        if own.message_type:
            return self._message(own.message_type, depth + 1)
        if own.enum_type:
            return chance.choice([*(value.number for value in own.enum_type.values), 99])
        if own.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            if own.type == FieldDescriptor.TYPE_BYTES:
                return self._bytes()
            return self._text(own.name)
        if own.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return chance.random() < 0.5
        if own.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
            return chance.choice([0.0, 0.5, 2.0, -1.0])
        return chance.choice(NUMBERS)

    def _text(self, name: str) -> str:
        which = self._chance.random()
        if not NAMED.search(name):
            return self._chance.choice([*TEXTS, *self._names] if which < 0.5 else TEXTS)
        fit = [
            index for index, kind in enumerate(KINDS) if kind in name or (name, kind) in ALSO
        ] or range(len(KINDS))
        chosen = (
            self._chance.choice(list(fit)) if which < 0.6 else self._chance.randrange(len(KINDS))
        )
        if which < 0.8:
            return self._names[chosen]
        return self._chance.choice([*self._own, *TEXTS])

    def _bytes(self) -> bytes:
        row = {"question": self._text("text"), "answer": "a", "answers": ["b"], "relevant": []}
        row["relevant"] = [self._text("document")]
        lines = [json.dumps({**row, "id": str(n)}).encode() for n in range(12)]
        return self._chance.choice([b"\n".join(lines), b"", b"\xff\x00", b"{", b"plain text"])


# The kinds of names, in the order in which they are added, and fields that are called otherwise.
KINDS = ("corpus", "document", "comparison", "job", "adapter", "name", "key")
ALSO = {
    ("name", "corpus"),
    ("id", "job"),
    ("id", "comparison"),
    ("id", "document"),
    ("ids", "document"),
    ("pinned_documents", "document"),
    ("idempotency_key", "key"),
    ("adapters", "adapter"),
}


@dataclass
class Both:
    """Tenant A with its things, tenant B that asks, and what B may say."""

    a: Tenant
    b: Tenant
    things: dict[str, str]
    names: Names


@pytest.fixture
async def both(tmp_path: Path) -> AsyncIterator[Both]:
    file = tmp_path / "keys.json"
    _, key_a = keys.add(file, "a", "ann", "admin")
    _, key_b = keys.add(file, "b", "ann", "admin")  # the same principal of another tenant
    gate = Identified(Keys(file), None, Quotas(Limits()), Audit(tmp_path / "audit"))
    async with (
        small_tuning(tmp_path / "tuning") as tuning,
        small_stack(tmp_path / "store", gate=gate, tuning_address=tuning.address) as stack,
        connect(stack.address, ANSWERS, *PUBLIC) as channel,
    ):
        a, b = Tenant(channel, key_a), Tenant(channel, key_b)
        things = await fill(a, TEXT, "aaaa", CANARY)
        mine = await fill(b, "Employees get 27 days of paid leave.", "bbbb", "other")
        names = Names(own=list(mine.values()))
        for kind in KINDS:
            names.add(things[kind])
        page = retrieval_pb2.ListDocumentsRequest(corpus=things["corpus"], page_size=1)
        found = await a.retrieval.ListDocuments(page, metadata=a.metadata)
        names.own.append(found.next_page_token)
        policy = retrieval_pb2.GetPolicyRequest(corpus=things["corpus"])
        names.own.append((await a.retrieval.GetPolicy(policy, metadata=a.metadata)).policy.etag)
        yield Both(a, b, things, names)


async def test_nothing_of_another_tenant_is_in_any_answer(both: Both) -> None:
    names, chance = both.names, random.Random(6)
    before = await state(both.a, both.things)
    assert any(CANARY.encode() in message for message in before)  # there is something to find
    seen: dict[str, set[str]] = {path: set() for path in METHODS}
    twins = 0
    for number in range(REQUESTS):
        path = list(METHODS)[number % len(METHODS)]
        beginning = chance.getstate()
        requests = Requests(chance, names.foreign, names.own).of(METHODS[path])
        end = chance.getstate()
        chance.setstate(beginning)
        like = Requests(chance, names.unknown, names.own).of(METHODS[path])
        chance.setstate(end)
        said = await both.b.call(path, requests)
        context = f"{path} {requests} {said}"
        for text in (said.messages.decode("utf-8", "replace"), said.details, said.trailing):
            assert CANARY not in text, context
        seen[path].add(said.code)
        if requests != like:
            twins += 1
            other = await both.b.call(path, like)
            assert said.like(names.foreign) == other.like(names.unknown), context
    assert await state(both.a, both.things) == before
    assert twins > REQUESTS / 3
    answered = [path for path, codes in seen.items() if "OK" in codes]
    missed = [path for path, codes in seen.items() if "NOT_FOUND" in codes]
    assert len(answered) > 15 and len(missed) > 15, seen  # they were not all refused for their form
