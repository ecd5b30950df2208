"""How busy a service of this machine is, by its Prometheus metrics."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from clients.health import DIRECT

SECONDS = 2.0


@dataclass(frozen=True)
class Load:
    """Calls that run and that wait, what is queued behind them (jobs, comparisons, texts), and the
    share of a prompt's tokens that the cache had, None where there is no cache."""

    running: int
    waiting: int
    queued: int
    cache_hits: float | None


async def load_of(metrics: str) -> Load | None:
    """Return the load of the service whose metrics are at HOST:PORT, None if it does not say."""
    try:
        page = await asyncio.to_thread(_read, metrics)
        return _load(text_string_to_metric_families(page))
    except (OSError, ValueError):
        return None


def _read(address: str) -> str:
    with DIRECT.open(f"http://{address}/metrics", timeout=SECONDS) as response:
        return str(response.read(), "utf-8")


def _load(families: Iterable[Metric]) -> Load:
    samples = [sample for family in families for sample in family.samples]

    def total(name: str, **labels: str) -> float:
        return sum(
            sample.value
            for sample in samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    asked = total("vllm:prefix_cache_queries_total")
    return Load(
        running=int(total("tworoads_calls_running")),
        waiting=int(total("tworoads_calls_waiting") + total("vllm:num_requests_waiting")),
        queued=int(total("tworoads_work", state="queued") + total("tworoads_texts_waiting")),
        cache_hits=total("vllm:prefix_cache_hits_total") / asked if asked else None,
    )
