"""The settings of the embedding service."""

from typing import Literal

from pydantic import Field

from services.runtime.settings import ServerSettings, settings_config


class Settings(ServerSettings):
    """Turns texts into vectors with a sentence-transformers model."""

    model_config = settings_config("embedding")

    model: str = "all-MiniLM-L6-v2"
    """Folder of the model, or the hub id of one that was downloaded. The default is packaged."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the model; auto takes bfloat16 where the processor or the GPU computes in it."""

    threads: int = Field(0, ge=0)
    """Threads of the model on a processor. 0 takes half of the cores: the other half generates."""

    max_batch_tokens: int = Field(0, ge=0)
    """Most tokens in one batch. 0 takes 2,048 on a processor, 32,768 on a GPU."""

    max_texts: int = Field(2048, ge=256)
    """Texts of each kind that may be inside; a call beyond that is refused with QUEUE_FULL."""
