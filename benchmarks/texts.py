"""Documents of made-up text, ingested for one measurement."""

import random
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

from clients.client import Client
from clients.documents import Ingested, NewDocument

SYLLABLES = "ka lo mir ven tu sar bel dor fen gri hol jas nek pol rud sil tam vor wyn zan".split()
SUBJECTS = (
    "the harbour|the old lighthouse|the town council|the ferry master|every second household"
    "|the salt market|a travelling clockmaker|the school on the hill|the northern ropewalk"
).split("|")
VERBS = (
    "repairs|counts|paints|sells|remembers|stores|measures|celebrates|exports|forbids|collects"
).split("|")
OBJECTS = (
    "smoked herring|blue sailcloth|the spring tide|copper bells|wooden toys|the winter nets"
    "|seven kinds of rope|letters from abroad|glass floats|the annual regatta"
).split("|")
ENDINGS = (
    "before the first snow|once in a decade|with great care|for the neighbouring islands"
    "|since the bridge was built|at the end of every month|whenever the wind turns|for a small fee"
).split("|")


def places(count: int) -> list[str]:
    """Return different names of places, others each time: no cache knows them."""
    chance = random.Random()
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(chance.choices(SYLLABLES, k=3)).capitalize()] = None
    return list(names)


def sentences(place: str, count: int) -> str:
    """Return sentences about a place, the same ones each time, of about 15 tokens each."""
    chance = random.Random(place)
    return " ".join(
        f"In {place} {chance.choice(SUBJECTS)} {chance.choice(VERBS)} {chance.choice(OBJECTS)}"
        f" {chance.choice(ENDINGS)}."
        for _ in range(count)
    )


def about(names: Sequence[str], length: int = 9) -> list[NewDocument]:
    """Return a document of `length` sentences about each place; up to nine are one passage."""
    return [
        NewDocument(id=name, title=f"The town of {name}", content=sentences(name, length).encode())
        for name in names
    ]


@asynccontextmanager
async def ingested(client: Client, documents: Iterable[NewDocument]) -> AsyncIterator[str]:
    """Ingest documents into a corpus of its own; delete it at the end."""
    name = f"benchmark-{uuid.uuid4().hex[:8]}"
    await client.create_corpus(name, allow_existing=False)
    try:
        await put(client, name, documents)
        yield name
    finally:
        await client.delete_corpus(name)


async def put(client: Client, corpus: str, documents: Iterable[NewDocument]) -> int:
    """Ingest documents; return how many passages they have."""
    passages = 0
    async for news in client.ingest(corpus, documents):
        if isinstance(news, Ingested):
            if news.outcome != "indexed":
                raise RuntimeError(f"{news.id}: {news.outcome} {news.message}")
            passages += news.passages
    return passages
