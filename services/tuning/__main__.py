"""`python -m services.tuning --model FOLDER`"""

import asyncio
import math
import os
import sys
from contextlib import closing
from pathlib import Path

from tworoads.v1.generation_pb2 import DESCRIPTOR as GENERATION
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub
from tworoads.v1.retrieval_pb2 import DESCRIPTOR as RETRIEVAL
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub
from tworoads.v1.tuning_pb2 import DESCRIPTOR
from tworoads.v1.tuning_pb2_grpc import add_TuningServiceServicer_to_server

from services.prompts.rendering import PromptTooLong, Renderer
from services.prompts.words import DEFAULT_VERSION
from services.runtime.channel import connect
from services.runtime.checkpoint import Unfit
from services.runtime.database import Database
from services.runtime.owner import owned
from services.runtime.processor import this_processor
from services.runtime.server import run, running
from services.tuning.adapters import base_model
from services.tuning.adapters.registry import Registry
from services.tuning.adapters.verifying import Verifier
from services.tuning.data.examples import Examples
from services.tuning.jobs import GIBIBYTE, Jobs
from services.tuning.schema import SCHEMA
from services.tuning.service import TuningService
from services.tuning.settings import Settings
from services.tuning.training.launcher import JobTrainer, open_launcher
from services.tuning.training.trainer import ChildTrainer
from services.tuning.uploads import MEBIBYTE, Uploads

NAME = DESCRIPTOR.services_by_name["TuningService"].full_name


def open_renderer(model: Path) -> Renderer:
    """Read the tokenizer of a checkpoint. Blocks."""
    # Only the trainer, a process of its own, needs torch: here it would take 400 MiB and 3 s.
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    # What a tokenizer cuts or pads by itself is not what generation renders; and uploads share it.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return Renderer(tokenizer)


def check_length(renderer: Renderer, context_length: int) -> None:
    """Exit if the prompt alone takes the whole context."""
    try:
        Examples(renderer, context_length, DEFAULT_VERSION)
    except PromptTooLong as error:
        raise SystemExit(
            f"a context length of {context_length} tokens has no room for examples: {error}"
        ) from error


def launcher_of(settings: Settings) -> JobTrainer | None:
    """Return what launches trainings, None without a launcher. Exits if it cannot be used."""
    if settings.launcher is None:
        return None
    try:
        return open_launcher(settings.launcher, settings.model, settings.dtype, settings.threads)
    except ValueError as error:
        raise SystemExit(str(error)) from error


async def main(settings: Settings) -> None:
    generation = GENERATION.services_by_name["GenerationService"].full_name
    retrieval = RETRIEVAL.services_by_name["RetrievalService"].full_name
    launcher = launcher_of(settings)
    gpu = launcher.gpu if launcher else this_processor().gpu
    async with (
        running(settings, [NAME]) as server,
        connect(settings.generation, generation, tls=settings.tls) as generation_channel,
        connect(settings.retrieval, retrieval, tls=settings.tls) as retrieval_channel,
    ):
        with (
            owned(settings.folder) as folder,
            closing(Database(folder / "tuning.db", SCHEMA)) as database,
        ):
            try:
                base = await asyncio.to_thread(
                    base_model.load, settings.model, settings.name, settings.context_length
                )
                renderer = await asyncio.to_thread(open_renderer, settings.model)
            except Unfit as error:
                raise SystemExit(f"cannot train {settings.model}: {error}") from error
            check_length(renderer, base.context_length)
            registry = Registry(folder, database)
            searching = RetrievalServiceStub(retrieval_channel)
            async with Jobs(
                folder,
                database,
                registry,
                base,
                renderer,
                launcher or ChildTrainer(settings.model, settings.dtype, settings.threads),
                Verifier(GenerationServiceStub(generation_channel)),
                searching,
                max_jobs=settings.max_jobs,
                max_queued=settings.max_queued,
                retry_seconds=settings.retrieval_seconds,
                training_seconds=settings.max_training_hours * 3600,
                most_bytes=settings.max_tenant_gb * GIBIBYTE or math.inf,
            ) as jobs:
                tmp, max_rank = folder / "tmp", settings.max_lora_rank
                most_bytes = settings.upload_mb * MEBIBYTE
                uploads = Uploads(tmp, jobs, base, renderer, searching, max_rank, gpu, most_bytes)
                service = TuningService(jobs, uploads, registry, base, max_rank, tmp)
                await server.serve(lambda s: add_TuningServiceServicer_to_server(service, s))
                stopping = asyncio.create_task(server.stopping())
                stopping.add_done_callback(lambda _: jobs.stop())
                if launcher:
                    stopping.add_done_callback(lambda _: launcher.leave())
                await server.until_stopped()


if __name__ == "__main__":
    chosen = Settings(_cli_parse_args=True)  # type: ignore[call-arg]
    run(lambda: main(chosen), chosen)
