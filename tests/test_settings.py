import importlib

import pytest

from services.runtime.settings import ServerSettings

SERVICES = ["embedding", "evaluation", "gateway", "generation", "retrieval", "tuning"]


@pytest.mark.parametrize("service", SERVICES)
def test_no_service_gives_a_setting_of_every_server_another_meaning(service: str) -> None:
    settings = importlib.import_module(f"services.{service}.settings").Settings
    own = settings.__annotations__.keys() & ServerSettings.model_fields.keys()
    assert own <= {"listen"}
