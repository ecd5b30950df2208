"""Chooses how the engine computes, by what the machine has."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # without these bfloat16 is 2-5 times slower than float32


DType = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Processor:
    """What computes. `flags` are the features that /proc/cpuinfo names."""

    gpu: bool
    cores: int
    flags: frozenset[str]

    def dtype(self, wanted: DType) -> DType:
        """Return vLLM's name of the weights' type; `wanted` may be "auto"."""
        if wanted != "auto" or self.gpu:
            return wanted
        return "bfloat16" if BFLOAT16 & self.flags else "float32"

    def executor(self, wanted: str) -> str | None:
        """Return vLLM's name of the executor, None for its own choice; `wanted` may be "auto".

        With several processes one core of a CPU is lost to polling.
        """
        if wanted != "auto":
            return wanted
        return None if self.gpu else "uni"

    def environment(self, executor: str | None, threads: int, cache_gib: int) -> Mapping[str, str]:
        """Return what must be in the environment before torch or vLLM is imported."""
        always = {
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CONFIGURE_LOGGING": "0",
            "VLLM_MAX_N_SEQUENCES": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_PLUGINS": "tworoads",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # forking a process that runs gRPC is not safe
        }
        if self.gpu:
            return always
        count = str(threads or self.cores)
        on_cpu = {"VLLM_CPU_KVCACHE_SPACE": str(cache_gib), "VLLM_HOST_IP": "127.0.0.1"}
        if executor == "uni":
            # vLLM refuses one process on a CPU unless told that the threads are taken care of.
            on_cpu |= {
                "OMP_NUM_THREADS": count,
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            }
        return always | on_cpu


def this_processor() -> Processor:
    """Look at the machine and at the build of vLLM. Imports neither vLLM nor torch."""
    devices = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd")]
    return Processor(
        gpu=bool(devices) and not _cpu_build(),
        cores=len(os.sched_getaffinity(0)),
        flags=_flags(),
    )


def _cpu_build() -> bool:
    try:
        metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def _flags() -> frozenset[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
