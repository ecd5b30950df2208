"""What the manifests say, as kubectl renders them."""

import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.k8s.programs import programs

K8S = Path(__file__).parents[2] / "k8s"

Object = dict[str, Any]


def render(folder: Path) -> list[Object]:
    """Return the objects of a kustomization."""
    done = subprocess.run(
        [programs() / "kubectl", "kustomize", folder], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def of_kind(objects: Iterable[Object], *kinds: str) -> list[Object]:
    return [found for found in objects if found["kind"] in kinds]


def workloads(objects: Iterable[Object]) -> list[Object]:
    """Return what keeps pods running."""
    return of_kind(objects, "Deployment", "StatefulSet")


def name(found: Object) -> str:
    return str(found["metadata"]["name"])


def reference(found: Object) -> str:
    """Return how kubectl names an object, KIND/NAME."""
    return f"{found['kind']}/{name(found)}".lower()


def replicas(workload: Object) -> int:
    return int(workload["spec"].get("replicas", 1))


def most_missing(workload: Object) -> int:
    """Return how many of its pods a rolling update may take away at once."""
    spec = workload["spec"]
    if workload["kind"] == "StatefulSet":
        return 1
    strategy = spec.get("strategy", {})
    if strategy.get("type") == "Recreate":
        return replicas(workload)
    allowed = strategy.get("rollingUpdate", {}).get("maxUnavailable", "25%")
    if isinstance(allowed, int):
        return allowed
    return replicas(workload) * int(allowed.rstrip("%")) // 100


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Tell whether a label selector selects an object with these labels."""
    wanted = selector.get("matchLabels", {})
    if not all(labels.get(key) == value for key, value in wanted.items()):
        return False
    for rule in selector.get("matchExpressions", []):
        has = labels.get(rule["key"])
        match rule["operator"]:
            case "In":
                fits = has in rule["values"]
            case "NotIn":
                fits = has not in rule["values"]
            case "Exists":
                fits = has is not None
            case _:
                fits = has is None
        if not fits:
            return False
    return True


def needed(pod: Object) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, name, key) of all without which a pod would not start.

    The kind is Secret or ConfigMap; an empty key means that any will do.
    """
    for volume in pod.get("volumes", []):
        for source in [volume, *volume.get("projected", {}).get("sources", [])]:
            for kind, field in (("Secret", "secret"), ("ConfigMap", "configMap")):
                wanted = source.get(field, {"optional": True})
                if not wanted.get("optional"):
                    named = wanted.get("secretName") or wanted["name"]
                    for item in wanted.get("items", [{"key": ""}]):
                        yield kind, named, item["key"]
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        for source in container.get("envFrom", []):
            for kind, field in (("Secret", "secretRef"), ("ConfigMap", "configMapRef")):
                if field in source:
                    yield kind, source[field]["name"], ""
        for variable in container.get("env", []):
            value = variable.get("valueFrom", {})
            for kind, field in (("Secret", "secretKeyRef"), ("ConfigMap", "configMapKeyRef")):
                if field in value:
                    yield kind, value[field]["name"], value[field]["key"]
