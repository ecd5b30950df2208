"""What can be set. Every setting is a flag and an environment variable TWOROADS_RETRIEVAL_NAME."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from services.runtime.settings import ServerSettings, settings_config


class Settings(ServerSettings):
    """The retrieval service: corpora, documents, search."""

    model_config = settings_config("retrieval")

    embedding: str = "127.0.0.1:50051"
    """Address of the embedding service."""

    store: Literal["lancedb", "weaviate"] = "lancedb"
    """Where documents and passages are kept: LanceDB in this process, or a Weaviate server."""

    folder: Path = Path("store")
    """Folder of the LanceDB store."""

    weaviate_http: str = "127.0.0.1:8080"
    """HTTP address of Weaviate."""

    weaviate_grpc: str = "127.0.0.1:50051"
    """gRPC address of Weaviate."""

    weaviate_key_file: Path | None = None
    """File that holds Weaviate's API key."""

    max_corpora: int = Field(1000, gt=0, le=10_000)
    """The most corpora that a tenant may have."""

    parser_processes: int = Field(1, gt=0)
    """Child processes that parse documents."""

    parse_seconds: float = Field(20.0, gt=0)
    """The most time that one document may take to parse."""

    parse_memory_mb: int = Field(1024, gt=0)
    """The most memory that a parsing process may take, in MiB."""

    document_mb: int = Field(64, gt=0)
    """The largest document that is taken, in MiB as sent."""
