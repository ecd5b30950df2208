"""What can be set. Every setting is a flag and an environment variable TWOROADS_GATEWAY_NAME."""

from pathlib import Path

from pydantic import Field

from services.runtime.settings import ServerSettings, settings_config


class Settings(ServerSettings):
    """The gateway: the only address that a client needs."""

    model_config = settings_config("gateway")

    listen: str = "127.0.0.1:50050"
    """Address to serve on, HOST:PORT."""

    internal: str = ""
    """Address for our own services, HOST:PORT, which are believed whom they call for; empty serves
    them nowhere."""

    public_tls: Path | None = None
    """Folder with tls.crt and tls.key, read again when they change, of the address for clients;
    `tls` is for the internal one and for the services behind."""

    keys: Path | None = None
    """File of API keys, written by `tworoads keys`, read again when it changes. Without keys and
    tokens every caller is let in, as the tenant "default"."""

    jwt_keys: Path | None = None
    """File with the public keys (JWKS) of who issues tokens, read again when it changes."""

    jwt_issuer: str = ""
    """Whose tokens are taken: their claim `iss`."""

    jwt_audience: str = ""
    """For whom these are: their claim `aud`."""

    jwt_tenant: str = "tenant"
    """Name of the claim with the tenant."""

    jwt_role: str = "role"
    """Name of the claim with the role: reader, writer or admin."""

    requests_per_minute: int = Field(0, ge=0)
    """Calls that a principal may make in a minute, by each gateway replica; 0 has no limit."""

    tokens_per_minute: int = Field(0, ge=0)
    """Tokens that a principal's answers may read and write in a minute; 0 has no limit."""

    streams: int = Field(0, ge=0)
    """Streams that a principal may have open at once; 0 has no limit."""

    ingest_mb_per_minute: int = Field(0, ge=0)
    """MiB that a principal may upload in a minute; an upload beyond breaks off. 0 has no limit."""

    audit: Path | None = None
    """File that gets a line of JSON for each write; none writes them to standard error."""

    retrieval: str = "127.0.0.1:50052"
    """Address of the retrieval service."""

    embedding: str = "127.0.0.1:50051"
    """Address of the embedding service."""

    generation: str = "127.0.0.1:50053"
    """Address of the generation service."""

    tuning: str = "127.0.0.1:50054"
    """Address of the tuning service."""

    evaluation: str = "127.0.0.1:50055"
    """Address of the evaluation service, which is a client of this one."""
