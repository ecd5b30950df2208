"""What can be set. Every setting is a flag and an environment variable TWOROADS_TUNING_NAME."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from services.runtime.processor import DType
from services.runtime.settings import ServerSettings, settings_config


class Settings(ServerSettings):
    """Trains LoRA adapters from examples and keeps them."""

    model_config = settings_config("tuning")

    listen: str = "127.0.0.1:50054"
    """Address to serve on, HOST:PORT."""

    folder: Path = Path("tuning")
    """Folder of the jobs and the adapters; one process at a time uses it."""

    model: Path
    """Folder of the checkpoint that generation runs."""

    name: str = ""
    """Name of the model, for people; empty takes the folder's."""

    context_length: int = Field(4096, ge=64)
    """Tokens of prompt and answer together, as generation has it; less if the model can do less."""

    generation: str = "127.0.0.1:50053"
    """Address of the generation service, which measures adapters."""

    retrieval: str = "127.0.0.1:50052"
    """Address of the retrieval service, which finds the passages that examples are shown."""

    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = 16
    """Highest rank of an adapter, as generation has it."""

    max_jobs: int = Field(1, gt=0)
    """Jobs that are made at once; the others wait, and tenants take turns."""

    max_queued: int = Field(100, gt=0)
    """Jobs of a tenant that may wait; the next is refused with RESOURCE_EXHAUSTED."""

    upload_mb: int = Field(256, gt=0)
    """The largest upload of examples and questions that is taken, in MiB."""

    max_tenant_gb: float = Field(0.0, ge=0)
    """What the jobs and adapters of a tenant may take of the disk, in GiB; 0 for all of it."""

    max_training_hours: float = Field(72.0, gt=0)
    """How long a training may take, from its last start on; one that takes longer fails."""

    retrieval_seconds: float = Field(300.0, ge=0)
    """How long retrieval may be away before a job that needs it fails."""

    launcher: Path | None = None
    """Manifest of the Job or TrainJob that trains, as YAML; without it a child process trains."""

    dtype: DType = "auto"
    """Type of the weights in training. Auto is what this machine computes fastest with."""

    threads: int = Field(0, ge=0)
    """Threads that train, on a CPU; 0 means all cores that the process may use."""
