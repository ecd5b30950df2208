"""What can be set of the generation service."""

from typing import Literal, Self

from pydantic import Field, model_validator

from services.runtime.settings import ServerSettings, settings_config


class Settings(ServerSettings):
    """Writes text with a language model."""

    model_config = settings_config("generation")

    model: str
    """Folder of the checkpoint, as `python -m services.generation.prepare` makes it."""

    name: str = ""
    """Name of the model, for people; empty takes the folder's."""

    context_length: int = Field(4096, ge=64)
    """Tokens of prompt and answer together; less if the model can do less."""

    max_sequences: int = Field(64, gt=0)
    """Requests that share a step of the engine; more wait in it, the interactive ones in front."""

    max_loras: int = Field(4, gt=0)
    """Adapters that share a step of the engine."""

    max_adapters: int = Field(32, gt=0)
    """Adapters that are kept loaded and on disk; beyond that the least recently used one goes."""

    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = 16
    """Highest rank of an adapter; memory is set aside for it."""

    adapters: str = ""
    """Folder of the adapters that were pulled, for this replica alone; empty keeps none for the
    next run."""

    tuning: str = "127.0.0.1:50054"
    """Address of the tuning service, which has the adapters."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the weights. Auto on a CPU is bfloat16 if the processor has it, else float32."""

    executor: Literal["auto", "uni", "mp"] = "auto"
    """One process that computes (uni) or more. Auto is uni on a CPU, vLLM's choice on a GPU."""

    threads: int = Field(0, ge=0)
    """Threads that compute, on a CPU; 0 means all cores that the process may use."""

    cache_gib: int = Field(2, gt=0)
    """Memory of the key-value cache in GiB, on a CPU."""

    gpu_memory: float = Field(0.9, gt=0, le=1)
    """Share of the memory that the engine takes, on a GPU."""

    @model_validator(mode="after")
    def _adapters_fit(self) -> Self:
        if self.max_adapters < self.max_loras:
            raise ValueError("max_adapters must not be less than max_loras")
        return self
