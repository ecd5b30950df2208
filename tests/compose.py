"""Reads docker-compose.yml."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).parents[1] / "docker-compose.yml"
SERVICES = ("gateway", "embedding", "retrieval", "generation", "tuning", "evaluation")
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")
ADDRESS = re.compile(r"(?:dns:///)?([a-z-]+):(\d+)")


@cache
def compose() -> dict[str, Any]:
    """Return the file, its anchors and merges resolved, its variables as they are by default."""
    content: dict[str, Any] = yaml.safe_load(VARIABLE.sub(r"\2", FILE.read_text()))
    return content


def services() -> dict[str, dict[str, Any]]:
    """Return all services by name."""
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


def ours() -> dict[str, dict[str, Any]]:
    """Return the services that have settings of ours, variants for GPUs too."""
    return {name: one for name, one in services().items() if word(name) in SERVICES}


def word(name: str) -> str:
    """Return a service's short word: those for GPUs have the same as those without."""
    return name.removesuffix("-gpu")


def seconds(duration: str) -> int:
    """Return the seconds of 45s or 20m."""
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]
