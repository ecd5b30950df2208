"""Reads the Dockerfile, and does without a container engine what it says.

`build` does the steps of a stage in a folder that stands for the root of its file system. Two
things differ: the base image is this machine's Python, and what `service` and those on it add by
RUN is not done (folders, packages of the distribution).
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Template

CHECKOUT = Path(__file__).parents[1]
ABSOLUTE = re.compile(r"(?<![\w./])/(?=(?:opt|build)\b)")  # the folders that stages fill
MOUNT = re.compile(r"--mount=\S+\s+")
UV = "pip install --no-cache-dir uv==${UV} && "  # this machine has it


@dataclass
class Stage:
    """One FROM and what follows: instructions in upper case, each with its arguments."""

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Image:
    """`folder` is the root of the file system, as far as steps filled it."""

    folder: Path
    environment: dict[str, str]
    workdir: str
    user: str
    entrypoint: tuple[str, ...]
    labels: dict[str, str]


@cache
def stages(engine: str = "cpu") -> dict[str, Stage]:
    """Return the stages by name, for one value of the build argument ENGINE."""
    text = (CHECKOUT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    arguments: dict[str, str] = {}
    found: dict[str, Stage] = {}
    steps: list[tuple[str, str]] = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = Template(rest).substitute(arguments | {"ENGINE": engine}).split()
            found[name] = Stage(base)
            steps = found[name].steps
        elif instruction == "ARG" and not found:
            arguments |= _pairs(rest)
        elif instruction:
            steps.append((instruction, rest))
    return found


def image(target: str, engine: str = "cpu", folder: Path = Path()) -> Image:
    """Return what an image of a target is started with. Nothing is built."""
    environment, workdir, user, entrypoint = {}, "/", "0:0", ()
    labels: dict[str, str] = {}
    for stage in _chain(target, engine):
        for instruction, rest in stage.steps:
            if instruction == "ENV":
                environment |= _pairs(rest)
            elif instruction == "LABEL":
                labels |= _pairs(rest)
            elif instruction == "WORKDIR":
                workdir = rest
            elif instruction == "USER":
                user = rest
            elif instruction == "ENTRYPOINT":
                entrypoint = tuple(json.loads(rest))
    return Image(folder, environment, workdir, user, entrypoint, labels)


def build(target: str, folder: Path, **environment: str) -> Image:
    """Do the steps of a target below `folder`; what is there already stays as it is.

    `environment` has the last word; an empty value takes a variable away. Raises
    CalledProcessError if a step fails.
    """
    return image(target, folder=_build(target, folder, environment))


def sources(target: str) -> list[str]:
    """Return the paths of the checkout that go into an image."""
    found = []
    for stage in _chain(target, "cpu"):
        for instruction, rest in stage.steps:
            if instruction != "COPY":
                continue
            *paths, _ = rest.split()
            if paths[0].startswith("--from="):
                found += sources(paths[0].removeprefix("--from="))
            else:
                found += paths
    return found


def _chain(target: str, engine: str) -> list[Stage]:
    """Return a stage and those that it is made from, the first one first."""
    stage = stages(engine)[target]
    before = _chain(stage.base, engine) if stage.base in stages(engine) else []
    return [*before, stage]


def _build(name: str, folder: Path, override: dict[str, str]) -> Path:
    root = folder / name
    if root.exists():
        return root
    stage = stages()[name]
    making = folder / f".{name}"
    if stage.base in stages():
        _copy(_build(stage.base, folder, override), making)
    else:
        making.mkdir(parents=True)
    is_source = any(what == "COPY" and "--from" not in rest for what, rest in stage.steps)
    environment = {"ENGINE": "cpu"}
    for before in _chain(name, "cpu"):
        for instruction, rest in before.steps:
            if instruction in ("ENV", "ARG"):
                environment |= _pairs(Template(rest).safe_substitute(environment))
    environment |= override
    making.rename(root)
    workdir = root / image(name).workdir.lstrip("/")
    workdir.mkdir(parents=True, exist_ok=True)
    for instruction, rest in stage.steps:
        if instruction == "COPY":
            _copy_step(rest, root, workdir, folder, override)
        elif instruction == "RUN" and (is_source or "venv" in rest):
            _run(rest, root, workdir, environment)
    return root


def _copy_step(
    rest: str, root: Path, workdir: Path, folder: Path, override: dict[str, str]
) -> None:
    *what, target = rest.split()
    to = root / target.lstrip("/") if target.startswith("/") else workdir / target
    if what[0].startswith("--from="):
        source = _build(what[0].removeprefix("--from="), folder, override)
        _copy(source / what[1].lstrip("/"), to)
        return
    for path in what:
        if (CHECKOUT / path).is_dir():
            _copy(CHECKOUT / path, to)
        else:
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / path, to)


def _copy(source: Path, target: Path) -> None:
    """Copy a folder from the checkout, or link the files of one that another stage made."""
    if source.is_relative_to(CHECKOUT):
        ignored = shutil.ignore_patterns("__pycache__", "*_pb2*")  # as .dockerignore says
        shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
    else:
        shutil.copytree(source, target, symlinks=True, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    os.link(source, target, follow_symlinks=False)


def _run(rest: str, root: Path, workdir: Path, environment: dict[str, str]) -> None:
    """Run a step with the programs of this machine, in no environment but the stage's own."""
    there = {key: ABSOLUTE.sub(f"{root}/", value) for key, value in environment.items() if value}
    here = {key: value for key, value in os.environ.items() if not key.startswith("UV_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # which has uv
    command = ABSOLUTE.sub(f"{root}/", MOUNT.sub("", rest)).removeprefix(UV)
    # Without it uv would take the next environment that it finds, such as this one.
    assert there["VIRTUAL_ENV"].startswith(f"{root}/")
    subprocess.run(
        ["/bin/sh", "-ec", command],
        cwd=workdir,
        env=here | there | {"PATH": path},
        check=True,
        capture_output=True,
        text=True,
    )


def _pairs(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(text) if "=" in word)
