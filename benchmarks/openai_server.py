"""vLLM's own OpenAI server, with the engine as the generation service starts it.

`python -m benchmarks.openai_server --port N` takes the settings of the generation service from the
environment and becomes the server.
"""

import argparse
import asyncio
import os
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from benchmarks.stack import leashed
from clients import health
from services.generation.engine import BLOCK
from services.generation.processor import environment, executor
from services.generation.settings import Settings
from services.runtime import checkpoint
from services.runtime.processor import this_processor

MODEL = "served"


@asynccontextmanager
async def openai_server(settings: Mapping[str, str], address: str) -> AsyncIterator[Process]:
    """Run the server on `address`, HOST:PORT, while the block runs; it is ready before."""
    command = leashed("benchmarks.openai_server", "--port", address.rpartition(":")[2])
    process = await asyncio.create_subprocess_exec(*command, env=settings)
    try:
        async with aclosing(health.watch(address, f"http://{address}/health")) as answers:
            async for ready in answers:
                if ready:
                    break
                if process.returncode is not None:
                    raise RuntimeError("vLLM's server ended")
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def _become(settings: Settings, port: int) -> None:
    processor = this_processor()
    how = executor(processor, settings.executor)
    os.environ.update(environment(processor, how, settings.threads, settings.cache_gib))
    folder = Path(settings.model)
    options: dict[str, object] = {
        "model": folder,
        "served-model-name": MODEL,
        "host": "127.0.0.1",
        "port": port,
        "dtype": processor.dtype(settings.dtype),
        "max-model-len": checkpoint.context_length(folder, settings.context_length),
        "max-num-seqs": settings.max_sequences,
        "max-loras": settings.max_loras,
        "max-lora-rank": settings.max_lora_rank,
        "scheduling-policy": "priority",
        "uvicorn-log-level": "warning",
    }
    flags = ["enable-prefix-caching", "enable-lora", "disable-uvicorn-access-log"]
    if how:
        options["distributed-executor-backend"] = how
    if processor.gpu:
        options["gpu-memory-utilization"] = settings.gpu_memory
    else:
        options["block-size"] = BLOCK
        flags.append("enforce-eager")
    arguments = [f"--{name}={value}" for name, value in options.items()]
    arguments += [f"--{name}" for name in flags]
    module = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    os.execv(sys.executable, [*module, *arguments])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    os.environ["TWOROADS_GENERATION_LOG_LEVEL"] = "ERROR"
    _become(Settings(), parser.parse_args().port)  # type: ignore[call-arg]
