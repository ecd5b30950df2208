"""What can be set. Every setting is a flag and an environment variable TWOROADS_EVALUATION_NAME."""

from pathlib import Path

from pydantic import Field

from services.runtime.settings import ServerSettings, settings_config


class Settings(ServerSettings):
    """Compares the paths on questions with known answers, and says which to take."""

    model_config = settings_config("evaluation")

    listen: str = "127.0.0.1:50055"
    """Address to serve on, HOST:PORT."""

    folder: Path = Path("evaluation")
    """Folder of the comparisons; one process at a time uses it."""

    gateway: str = "127.0.0.1:50050"
    """Address of the gateway, which answers."""

    max_comparisons: int = Field(1, gt=0)
    """Comparisons that run at once, which disturb each other's latency; the others wait, and
    tenants take turns."""

    max_queued: int = Field(100, gt=0)
    """Comparisons of a tenant that may wait; the next is refused with RESOURCE_EXHAUSTED."""

    upload_mb: int = Field(256, gt=0)
    """The largest upload of questions and documents that is taken, in MiB."""

    patience_seconds: float = Field(300.0, ge=0)
    """How long a service may be away before a comparison that needs it fails."""

    currency: str = "EUR"
    """Currency of the prices."""

    answering_second: float = Field(0.00003, ge=0)
    """Price of a second of the processor that answers."""

    training_second: float = Field(0.00003, ge=0)
    """Price of a second of the processor that trains and indexes."""

    answers_per_training: int = Field(100_000, gt=0)
    """Answers that the cost of one training is spread over."""

    judge_url: str = ""
    """Address of an OpenAI-compatible server that may judge answers; empty means no judge."""

    judge_model: str = ""
    """Model of the judge."""

    judge_key_file: Path | None = None
    """File with the judge's key."""
