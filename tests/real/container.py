"""Runs the containers of a pod's manifest without a container engine, as a kubelet would.

Each gets a root file system of its own in a mount namespace: read-only, with nothing in it but its
image's parts and the volumes of its manifest at their paths. It runs as the user of the manifest,
without rights, with the environment of the manifest and nothing else. That takes root.

The one thing that differs is where it listens: all pods are on 127.0.0.1, so each port of each pod
gets one of its own, in addresses and arguments alike (`Network`). Host names stay as they are.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients.stack import free_addresses
from tests import dockerfile

HOST = "127.0.0.1"
REPOSITORY = Path(__file__).parents[2]
SYSTEM = ("/usr", "/sys")
LINKED = ("/bin", "/lib", "/lib64", "/sbin")
DEVICES = ("null", "zero", "full", "random", "urandom")
NAME = r"([a-z-]+)\.tworoads\.svc\.cluster\.local"


@dataclass(frozen=True)
class Image:
    """What an image brings: its command, its environment, its files (path in it: path here)."""

    entrypoint: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    workdir: str = "/"
    system: Sequence[str] = LINKED


def ours(target: str) -> Image:
    """Return what stands in for an image of ours: what the Dockerfile says of its target, with this
    interpreter's packages and the part of this source that it copies."""
    built = dockerfile.image(target)
    files = {
        sys.base_prefix: Path(sys.base_prefix),
        "/opt/venv": Path(sys.prefix),
        "/opt/tworoads/tworoads": REPOSITORY / "protos" / "tworoads",
    }
    for path in dockerfile.sources(target):
        if path.startswith("services/"):
            files[f"/opt/tworoads/{path}"] = REPOSITORY / path
    path = "/opt/venv/bin:/usr/bin:/bin"
    return Image(built.entrypoint, {"PATH": path, **built.environment}, files, built.workdir)


def weaviate(binary: Path) -> Image:
    """Return what stands in for Weaviate's image: its program and a shell."""
    files = {"/bin/weaviate": binary, "/bin/sh": Path("/bin/sh"), "/bin/cat": Path("/bin/cat")}
    linked = tuple(path for path in LINKED if path != "/bin")
    return Image(("/bin/weaviate",), {"PATH": "/bin"}, files, system=linked)


class Network:
    """Which port on 127.0.0.1 stands for a port of a pod."""

    def __init__(self, ports: Mapping[str, Sequence[int]]) -> None:
        """`ports` are those of each pod, by its name."""
        pairs = [(pod, port) for pod, numbers in ports.items() for port in dict.fromkeys(numbers)]
        free = free_addresses(len(pairs))
        self._port = {
            pair: int(address.rpartition(":")[2]) for pair, address in zip(pairs, free, strict=True)
        }
        self.hosts = "".join(
            f"{HOST} {name}.tworoads.svc.cluster.local\n"
            for pod in ports
            for name in (pod, f"{pod}-peers")
        )

    def port(self, pod: str, port: int) -> int:
        return self._port[pod, port]

    def address(self, pod: str, port: int) -> str:
        return f"{HOST}:{self.port(pod, port)}"

    def rewritten(self, text: str, pod: str) -> str:
        """Return an address, or arguments with one, as it is on this machine."""

        def elsewhere(found: re.Match[str]) -> str:
            return f"{found[0].rpartition(':')[0]}:{self.port(found[1], int(found[2]))}"

        def here(found: re.Match[str]) -> str:
            return f"{found[1]}{HOST}{found[2]}{self.port(pod, int(found[3]))}"

        text = re.sub(rf"{NAME}:(\d+)", elsewhere, text)
        return re.sub(r"(^|--host )0\.0\.0\.0(:| --port )(\d+)", here, text)

    def environment(self, container: Any, pod: str) -> dict[str, str]:
        """Return the environment of a container, as a kubelet makes it."""
        node = {"status.podIP": HOST, "metadata.name": f"{pod}-0"}
        said: dict[str, str] = {}
        for one in container.get("env", ()):
            if "valueFrom" in one:
                value = node[one["valueFrom"]["fieldRef"]["fieldPath"]]
            else:
                value = re.sub(r"\$\((\w+)\)", lambda found: said[found[1]], one["value"])
            if one["name"].endswith("_PORT"):
                value = str(self.port(pod, int(value)))
            said[one["name"]] = self.rewritten(value, pod)
        return said


class Pod:
    """The containers of a workload's manifest. `folder` keeps its volumes and roots; `secrets` are
    the files of each Secret."""

    def __init__(
        self,
        workload: Any,
        folder: Path,
        network: Network,
        secrets: Mapping[str, Mapping[str, bytes]],
    ) -> None:
        self.name = workload["metadata"]["name"]
        self.spec = workload["spec"]["template"]["spec"]
        self._folder = folder / self.name
        self._network = network
        self._context = self.spec["securityContext"]
        self._volumes = self._make_volumes(workload, secrets)

    def log(self, container: str) -> Path:
        """Return the file with what a container says."""
        return self._folder / f"{container}.log"

    def start(self, container: Any, image: Image) -> subprocess.Popen[bytes]:
        """Start a container; it ends when the thread ends that called this."""
        command = [*container.get("command", image.entrypoint), *container.get("args", ())]
        command = [self._network.rewritten(part, self.name) for part in command]
        environment = {
            **image.environment,
            "HOSTNAME": f"{self.name}-0",
            **self._network.environment(container, self.name),
        }
        script = self._folder / f"{container['name']}.sh"
        script.write_text(self._script(container, image, command, environment))
        with self.log(container["name"]).open("ab") as log:
            return subprocess.Popen(
                ["unshare", "--mount", "/bin/sh", "-eu", str(script)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _make_volumes(
        self, workload: Any, secrets: Mapping[str, Mapping[str, bytes]]
    ) -> dict[str, Path]:
        """Make a folder for each volume; a memory volume gets None as its source in the script."""
        made: dict[str, Path] = {}
        claims = workload["spec"].get("volumeClaimTemplates", ())
        for volume in (*self.spec["volumes"], *({**c["metadata"]} for c in claims)):
            folder = self._folder / "volumes" / volume["name"]
            folder.mkdir(parents=True)
            made[volume["name"]] = folder
            if secret := volume.get("secret"):
                files = secrets[secret["secretName"]]
                shown = {one["key"]: one["path"] for one in secret.get("items", ())}
                shown = shown or {key: key for key in files}
                write_secret(folder, {path: files[key] for key, path in shown.items()})
            else:  # fsGroup
                os.chown(folder, 0, self._context["fsGroup"])
                folder.chmod(0o2770)
        return made

    def _script(
        self, container: Any, image: Image, command: Sequence[str], environment: Mapping[str, str]
    ) -> str:
        root = self._folder / "roots" / container["name"]
        root.mkdir(parents=True)
        lines = [
            # Only what this shell mounts, and only for itself.
            "mount --make-rprivate /",
            f"mount -t tmpfs -o mode=755 root {root}",
            f"mkdir -p {root}/proc {root}/dev/shm {root}/etc {root}{image.workdir}",
            f"mount --rbind /proc {root}/proc",
        ]
        read_only: list[str] = []

        def bind(source: Path | str, path: str, writable: bool = False) -> None:
            target = f"{root}{path}"
            if Path(source).is_dir():
                lines.append(f"mkdir -p {target}")
            else:
                lines.append(f"mkdir -p {os.path.dirname(target)}; : > {target}")
            lines.append(f"mount --bind {source} {target}")
            if not writable:
                read_only.append(target)

        for path in SYSTEM:
            bind(path, path)
        for path in image.system:
            if Path(path).is_symlink():
                lines.append(f"ln -s {os.readlink(path)} {root}{path}")
            elif Path(path).is_dir():
                bind(path, path)
        for name in DEVICES:
            bind(f"/dev/{name}", f"/dev/{name}", writable=True)
        lines.append(f"mount -t tmpfs -o size=64m shm {root}/dev/shm")
        user, group = self._context["runAsUser"], self._context["runAsGroup"]
        etc = {
            "passwd": f"tworoads:x:{user}:{group}::/tmp:/usr/sbin/nologin\n",
            "group": f"tworoads:x:{group}:\n",
            "hosts": f"{HOST} localhost {self.name}-0\n{self._network.hosts}",
            "nsswitch.conf": "hosts: files\n",
        }
        for name, text in etc.items():
            lines.append(f"printf %s {shlex.quote(text)} > {root}/etc/{name}")
        for path in ("/etc/ld.so.cache", "/etc/ssl"):
            if Path(path).exists():
                bind(path, path)
        for path, here in image.files.items():
            bind(here, path)
        kinds = {volume["name"]: volume for volume in self.spec["volumes"]}
        for mount in sorted(container["volumeMounts"], key=lambda one: len(one["mountPath"])):
            path = mount["mountPath"]
            volume = kinds.get(mount["name"], {})
            if (volume.get("emptyDir") or {}).get("medium") == "Memory":
                size = volume["emptyDir"]["sizeLimit"].removesuffix("i").lower()
                own = f"mode=2770,gid={self._context['fsGroup']},size={size}"
                lines.append(f"mount -t tmpfs -o {own} memory {root}{path}")
            else:
                bind(self._volumes[mount["name"]], path, not mount.get("readOnly", False))
        lines += [f"mount -o remount,bind,ro {target}" for target in read_only]
        lines.append(f"mount -o remount,ro {root}")
        said = [f"{name}={value}" for name, value in environment.items()]
        who = f"--reuid={user} --regid={group} --groups={self._context['fsGroup']}"
        lines.append(
            f"exec chroot {root} /usr/bin/setpriv {who} --inh-caps=-all --bounding-set=-all"
            f" --no-new-privs --pdeathsig=KILL -- /usr/bin/env -i --chdir={image.workdir}"
            f" {shlex.join((*said, *command))}"
        )
        return "\n".join(lines) + "\n"


def write_secret(folder: Path, files: Mapping[str, bytes]) -> None:
    """Show files as a Secret volume does: links into a folder that is exchanged whole."""
    data = folder / "..first"
    data.mkdir()
    (folder / "..data").symlink_to(data.name)
    for name, content in files.items():
        (data / name).write_bytes(content)
        (folder / name).symlink_to(f"..data/{name}")


def ended(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Ask a container to end, as a kubelet does after preStop; return its exit code."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
