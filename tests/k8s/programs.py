"""The programs of a Kubernetes control plane, built from Go modules and kept in the user's cache.

`python -m tests.k8s.programs` builds what is not there yet. The versions stand in cluster/go.mod.
The definitions of resources that are not Kubernetes' own come out of the modules of their makers.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clients.local import cache_folder

MODULE = Path(__file__).parent / "cluster"
PACKAGES = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
    "kwok": "sigs.k8s.io/kwok/cmd/kwok",
}
DEFINITIONS = {
    "github.com/kubeflow/trainer/v2@v2.3.0": (
        "manifests/base/crds/trainer.kubeflow.org_trainingruntimes.yaml",
        "manifests/base/crds/trainer.kubeflow.org_trainjobs.yaml",
    ),
    "github.com/kedacore/keda/v2@v2.21.0": ("config/crd/bases/keda.sh_scaledobjects.yaml",),
    "github.com/cert-manager/cert-manager@v1.21.2": (
        "deploy/crds/cert-manager.io_certificates.yaml",
        "deploy/crds/cert-manager.io_issuers.yaml",
    ),
    "github.com/kubernetes-csi/external-snapshotter/client/v8@v8.7.0": (
        "config/crd/snapshot.storage.k8s.io_volumesnapshots.yaml",
    ),
    "github.com/prometheus-operator/prometheus-operator@v0.85.0": (
        "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml",
        "example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml",
        "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
    ),
}


def programs() -> Path:
    """Return the folder of the programs; build them if they are not there.

    Raises RuntimeError if they have to be built and Go is not installed.
    """
    version = _version()
    folder = cache_folder() / f"kube-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if not all((folder / name).is_file() for name in PACKAGES):
            print(f"Building Kubernetes {version} in {folder}: once, ten minutes.", file=sys.stderr)
            _build(version, folder)
    return folder


def definitions() -> list[Path]:
    """Return the files that define the resources of other programs, such as KEDA and cert-manager.

    Raises RuntimeError if they have to be fetched and Go is not installed.
    """
    folder = programs() / "definitions"
    files = {module: folder / f"{module.replace('/', '-')}.yaml" for module in DEFINITIONS}
    folder.mkdir(exist_ok=True)
    with _alone(folder):
        for module, file in files.items():
            if not file.is_file():
                _fetch(module, file)
    return list(files.values())


def _build(version: str, folder: Path) -> None:
    stamp = f"k8s.io/component-base/version.gitVersion={version}"
    with tempfile.TemporaryDirectory(dir=folder) as out:
        _go(
            ["build", "-trimpath", "-ldflags", f"-s -w -X {stamp}", "-o", f"{out}/"]
            + list(PACKAGES.values())
        )
        for name, package in PACKAGES.items():
            built = "server" if name == "etcd" else package.rpartition("/")[2]
            (Path(out) / built).rename(folder / name)


def _fetch(module: str, file: Path) -> None:
    source = Path(json.loads(_go(["mod", "download", "-json", module]))["Dir"])
    part = file.with_suffix(".part")
    part.write_text("\n---\n".join((source / name).read_text() for name in DEFINITIONS[module]))
    part.rename(file)


def _go(arguments: list[str]) -> str:
    go = shutil.which("go")
    if go is None:
        raise RuntimeError("Kubernetes is built with Go, which is not installed: https://go.dev/dl")
    return subprocess.run(
        ["nice", go, *arguments],
        cwd=MODULE,
        env=os.environ | {"CGO_ENABLED": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def _version() -> str:
    found = re.search(r"^\s*k8s.io/kubernetes (v\S+)", (MODULE / "go.mod").read_text(), re.M)
    assert found
    return found[1]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder for this process: of two test runs, one builds and the other waits."""
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    print(programs())
    definitions()
