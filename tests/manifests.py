"""The manifests of k8s/: rendered by kustomize, validated. `python -m tests.manifests` does it all.

Kinds of Kubernetes are checked strictly against its own schema. Those that other programs bring
(cert-manager, KEDA, the Prometheus operator) have none here: only their fields' names are checked.
"""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

KUBERNETES = "1.36"
KUSTOMIZE = "v5.8.2"
ROOT = Path(__file__).parents[1] / "k8s"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tworoads" / "bin"
BUILD_SECONDS = 600
RENDER_SECONDS = 60
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where libyaml is

Object = dict[str, Any]

# Required fields of the spec, then those that it may have besides.
FOREIGN: dict[tuple[str, str], tuple[set[str], set[str]]] = {
    ("cert-manager.io/v1", "Issuer"): (set(), {"selfSigned", "ca", "acme", "vault"}),
    ("cert-manager.io/v1", "Certificate"): (
        {"secretName", "issuerRef", "duration", "renewBefore", "privateKey"},
        {"dnsNames", "usages", "isCA", "commonName"},
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): (
        {"scaleTargetRef", "minReplicaCount", "maxReplicaCount", "triggers", "fallback"},
        {"pollingInterval", "cooldownPeriod", "advanced"},
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): ({"groups"}, set()),
    ("monitoring.coreos.com/v1", "PodMonitor"): (
        {"selector", "podMetricsEndpoints"},
        {"namespaceSelector", "podTargetLabels", "jobLabel"},
    ),
}


class Missing(Exception):
    """There is no kustomize, and no Go to build one."""


@functools.cache
def kustomize() -> tuple[str, ...]:
    """Return the command that renders a folder: the one that was built before, the PATH's, or the
    one that Go builds now, which takes a minute, once. Raises Missing."""
    ours = CACHE / f"kustomize-{KUSTOMIZE}"
    if ours.exists():
        return (str(ours), "build")
    if found := shutil.which("kustomize"):
        return (found, "build")
    if go := shutil.which("go"):
        _build(go, ours)
        return (str(ours), "build")
    if found := shutil.which("kubectl"):
        return (found, "kustomize")
    raise Missing("rendering k8s/ takes kustomize or kubectl, or Go 1.26 to build kustomize")


def _build(go: str, target: Path) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=CACHE) as folder:
        module = f"sigs.k8s.io/kustomize/kustomize/v5@{KUSTOMIZE}"
        environment = os.environ | {"GOBIN": folder, "GOFLAGS": ""}
        subprocess.run([go, "install", module], env=environment, check=True, timeout=BUILD_SECONDS)
        (Path(folder) / "kustomize").replace(target)  # whole or not at all


@functools.cache
def _rendered(folder: str, components: tuple[str, ...]) -> str:
    with TemporaryDirectory() as made:
        at = Path(made).resolve()
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(ROOT / folder, at)],
            "components": [os.path.relpath(ROOT / component, at) for component in components],
        }
        (at / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        done = subprocess.run(
            [*kustomize(), str(at)], capture_output=True, text=True, timeout=RENDER_SECONDS
        )
    if done.returncode:
        raise ValueError(f"{folder} with {components} does not render: {done.stderr}")
    return done.stdout


def render(folder: str, *components: str) -> list[Object]:
    """Return the objects of a folder of k8s/ with these components. Raises ValueError, Missing."""
    return [each for each in yaml.load_all(_rendered(folder, components), LOADER) if each]


def folders() -> list[str]:
    """Return every folder that may be applied."""
    return [f"overlays/{name.name}" for name in sorted((ROOT / "overlays").iterdir())]


def components() -> list[str]:
    """Return every component that an overlay may be applied with."""
    found = (file.parent for file in sorted(ROOT.rglob("kustomization.yaml")))
    return [
        str(folder.relative_to(ROOT))
        for folder in found
        if yaml.safe_load((folder / "kustomization.yaml").read_text())["kind"] == "Component"
    ]


def everything() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every overlay alone, with each component, and with all of them."""
    each = components()
    for folder in folders():
        yield folder, ()
        yield from ((folder, (component,)) for component in each)
        yield folder, tuple(each)


def problems(objects: Sequence[Object]) -> Iterator[str]:
    """Yield what is wrong with each object by its schema, the first mistake of each."""
    import kubernetes_validate

    for each in objects:
        name = f"{each['kind']} {each['metadata']['name']}"
        if (foreign := FOREIGN.get((each["apiVersion"], each["kind"]))) is not None:
            required, optional = foreign
            fields = set(each["spec"])
            if not required <= fields <= required | optional:
                yield f"{name}: spec has {sorted(fields)}, needs {sorted(required)}"
            continue
        try:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as e:
            yield f"{name}: {getattr(e, 'message', e)}"


def main() -> int:
    try:
        kustomize()
    except Missing as error:
        print(f"k8s/ is not checked: {error}")
        return 1 if os.environ.get("CI") else 0
    wrong = rendered = 0
    for folder, chosen in everything():
        rendered += 1
        for problem in problems(render(folder, *chosen)):
            print(f"k8s/{folder} {' '.join(chosen)}: {problem}")
            wrong += 1
    print(f"k8s/: {rendered} renderings, {wrong} mistakes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
