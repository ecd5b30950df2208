"""How the engine runs on what the machine has."""

from collections.abc import Mapping

from services.runtime.processor import Processor


def executor(processor: Processor, wanted: str) -> str | None:
    """Return vLLM's name of the executor, None for its own choice; `wanted` may be "auto".

    With several processes one core of a CPU is lost to polling.
    """
    if wanted != "auto":
        return wanted
    return None if processor.gpu else "uni"


def environment(
    processor: Processor, executor: str | None, threads: int, cache_gib: int
) -> Mapping[str, str]:
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
    if processor.gpu:
        return always
    count = str(threads or processor.cores)
    on_cpu = {"VLLM_CPU_KVCACHE_SPACE": str(cache_gib), "VLLM_HOST_IP": "127.0.0.1"}
    if executor == "uni":
        # vLLM refuses one process on a CPU unless told that the threads are taken care of.
        on_cpu |= {
            "OMP_NUM_THREADS": count,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    return always | on_cpu
