"""The settings that every service has: each a flag, and an environment variable with a prefix."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


def settings_config(service: str) -> SettingsConfigDict:
    """Return the configuration of a service's settings: flags, variables TWOROADS_SERVICE_NAME."""
    return SettingsConfigDict(
        env_prefix=f"TWOROADS_{service.upper()}_",
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_prog_name=f"python -m services.{service}",
        cli_hide_none_type=True,
    )


class ServerSettings(BaseSettings):
    """How a server listens, and how much it takes on."""

    listen: str = "127.0.0.1:0"
    """Address to serve on, HOST:PORT."""

    tls: Path | None = None
    """Folder with tls.crt, tls.key and ca.crt, read again when they change. With it this service
    takes calls only from those who have a certificate of that authority, and shows its own."""

    callers: list[str] = []
    """DNS names of the certificates that may call; empty takes every one of the authority."""

    insecure: bool = False
    """Serve other machines even so where nothing tells who calls."""

    health: str = ""
    """Address of a port for health checks alone, without TLS, HOST:PORT; empty has none."""

    metrics: str = ""
    """Address of the Prometheus metrics, HOST:PORT; empty serves none."""

    max_running: int = Field(256, gt=0)
    """Calls that are worked on at once."""

    max_waiting: int = Field(256, ge=0)
    """Calls that may wait beyond that; the next is refused with RESOURCE_EXHAUSTED."""

    connection_age_seconds: float = Field(60.0, gt=0)
    """After how long clients are told to connect again: only then do they learn of new replicas."""

    drain_seconds: float = Field(0.0, ge=0)
    """How long to go on serving after SIGTERM, so that balancers see that this replica goes."""

    grace_seconds: float = Field(30.0, ge=0)
    """How long calls may run on after that before they are cancelled."""

    traces: str = ""
    """Address of an OpenTelemetry collector (OTLP over gRPC), HOST:PORT; empty traces nothing."""

    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""
