"""What can be set. Every setting is a flag and an environment variable TWOROADS_GATEWAY_NAME."""

from services.runtime.settings import ServerSettings, settings_config


class Settings(ServerSettings):
    """The gateway: the only address that a client needs."""

    model_config = settings_config("gateway")

    listen: str = "127.0.0.1:50050"
    """Address to serve on, HOST:PORT."""

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
