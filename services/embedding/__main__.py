"""`python -m services.embedding`"""

import asyncio

from tworoads.v1.embedding_pb2 import DESCRIPTOR
from tworoads.v1.embedding_pb2_grpc import add_EmbeddingServiceServicer_to_server

from services.embedding.batcher import Batcher, Model
from services.embedding.service import EmbeddingService
from services.embedding.settings import Settings
from services.runtime.server import run, running

NAME = DESCRIPTOR.services_by_name["EmbeddingService"].full_name


def _load(settings: Settings) -> tuple[Model, int]:
    # Here, because torch takes seconds to import: --help does without, health answers meanwhile.
    from services.embedding.model import SentenceTransformerModel

    model = SentenceTransformerModel(settings.model, settings.dtype, settings.threads)
    return model, settings.max_batch_tokens or (32_768 if model.on_gpu else 2_048)


async def main(settings: Settings) -> None:
    async with running(settings, [NAME]) as server:
        try:
            model, max_tokens = await asyncio.to_thread(_load, settings)
        except (OSError, ValueError) as error:
            raise SystemExit(f"cannot load the model {settings.model}: {error}") from error
        async with Batcher(model, max_tokens, settings.max_texts) as batcher:
            service = EmbeddingService(model, batcher)
            await server.serve(lambda s: add_EmbeddingServiceServicer_to_server(service, s))
            await server.until_stopped()


if __name__ == "__main__":
    chosen = Settings(_cli_parse_args=True)  # type: ignore[call-arg]
    run(lambda: main(chosen), chosen)
