"""docker-compose.yml against the services' own settings, the Dockerfile and each other."""

import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from services.generation.prepare import DEFAULT
from services.retrieval.stores.weaviate_server import VERSION, WeaviateServer
from services.runtime.settings import ServerSettings
from tests.compose import ADDRESS, FILE, SERVICES, VARIABLE, compose, ours, seconds, services, word
from tests.dockerfile import image, sources, stages

OURS = sorted(ours())
ALL = sorted(services())
WEAVIATE = services()["weaviate"]["environment"]
LONGEST_CALL = 300  # seconds that a call with a deadline may take: services/runtime/interceptors.py


def settings(name: str, monkeypatch: pytest.MonkeyPatch) -> ServerSettings:
    """Return a service's settings as its environment sets them."""
    for key, value in services()[name]["environment"].items():
        monkeypatch.setenv(key, value)
    made: ServerSettings = import_module(f"services.{word(name)}.settings").Settings()
    return made


def listened(name: str) -> set[str]:
    """Return the ports that others may call."""
    environment = services()[name]["environment"]
    if name == "weaviate":
        [http] = re.findall(r"--port (\d+)", services()[name]["command"][0])
        return {http, environment["GRPC_PORT"]}
    prefix = f"TWOROADS_{word(name).upper()}_"
    addresses = (environment.get(prefix + key, "") for key in ("LISTEN", "INTERNAL"))
    return {address.rpartition(":")[2] for address in addresses if address}


def test_every_service_of_the_stack_is_there() -> None:
    assert {*SERVICES, "weaviate", "model"} <= services().keys()
    folders = {path.parent.name for path in Path("services").glob("*/__main__.py")}
    assert folders == set(SERVICES)


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_and_its_value_is_taken(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(name, monkeypatch)
    prefix = type(made).model_config["env_prefix"]
    named = {key.removeprefix(prefix).lower() for key in services()[name]["environment"]}
    assert named <= type(made).model_fields.keys()
    assert named == made.model_fields_set
    assert made.insecure and not made.tls


@pytest.mark.parametrize("name", OURS)
def test_every_address_of_another_service_is_one_where_it_listens(name: str) -> None:
    for key, value in services()[name]["environment"].items():
        if found := ADDRESS.fullmatch(value):
            assert found[2] in listened(found[1]), key
            assert {"inside"} <= set(services()[found[1]]["networks"])


@pytest.mark.parametrize("name", OURS)
def test_every_address_in_the_settings_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = settings(name, monkeypatch)
    others = {*SERVICES, "weaviate_http", "weaviate_grpc", "listen", "health", "metrics"}
    for key in others & type(made).model_fields.keys():
        host = getattr(made, key).rpartition(":")[0]
        assert host == "0.0.0.0" if key in ("listen", "health", "metrics") else "127" not in host


@pytest.mark.parametrize("name", OURS)
def test_the_time_to_stop_is_longer_than_drain_and_grace(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(name, monkeypatch)
    service = services()[name]
    assert seconds(service["stop_grace_period"]) >= made.drain_seconds + made.grace_seconds + 10
    if word(name) == "generation":
        assert made.grace_seconds >= LONGEST_CALL


@pytest.mark.parametrize("name", OURS)
def test_health_is_asked_where_it_is_answered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test = services()[name]["healthcheck"]["test"]
    assert test[:4] == ["CMD", *image(word(name)).entrypoint[:3]]
    assert find_spec(test[4])
    assert test[5].rpartition(":")[2] == settings(name, monkeypatch).health.rpartition(":")[2]


@pytest.mark.parametrize("name", [name for name in ALL if name != "weaviate"])
def test_an_image_is_a_target_that_starts_a_module_as_the_user(name: str) -> None:
    service = services()[name]
    engine = service["build"].get("args", {}).get("ENGINE", "cpu")
    target = service["build"]["target"]
    assert target == word(name)
    assert engine == ("gpu" if name.endswith("-gpu") else "cpu")
    made = image(target, engine)
    python, safe, flag, module, *_ = made.entrypoint
    assert (python, safe, flag) == ("/opt/venv/bin/python", "-P", "-m")
    assert find_spec(f"{module}.__main__" if target in SERVICES else module)
    assert made.user == service["user"] == "10001:10001"
    assert service["image"].startswith(f"tworoads/{target}:{made.labels[VERSION_LABEL]}")


VERSION_LABEL = "org.opencontainers.image.version"


@pytest.mark.parametrize("name", ALL)
def test_a_container_has_no_more_rights_than_it_needs(name: str) -> None:
    service = services()[name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"][0].startswith("/tmp:size=")
    assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}
    assert not {"privileged", "container_name", "network_mode", "pid", "cap_add"} & service.keys()
    for port in service.get("ports", ()):
        assert (name, port) == ("gateway", "127.0.0.1:50050:50050")
    for volume in service.get("volumes", ()):
        source = volume.partition(":")[0]
        assert source in compose()["volumes"] or source == "/data"


@pytest.mark.parametrize("name", OURS)
def test_what_is_written_goes_to_a_place_that_can_be_written(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes = services()[name].get("volumes", ())
    made: Any = settings(name, monkeypatch)
    for key in ("folder", "adapters"):
        path = str(getattr(made, key, ""))
        if key in made.model_fields_set:
            assert path.startswith("/data/") and any(v.endswith("/data") for v in volumes)
    if hasattr(made, "model") and name != "embedding":
        assert str(made.model) == "/models/model" and "models:/models:ro" in volumes
        link = image("model").entrypoint
        assert link[link.index("--link") + 1] == str(made.model)


def test_generation_scales() -> None:
    for name in ("generation", "generation-gpu"):
        service = services()[name]
        assert "ports" not in service
        assert all(volume in ("models:/models:ro", "/data") for volume in service["volumes"])
    gateway = services()["gateway"]["environment"]
    assert gateway["TWOROADS_GATEWAY_GENERATION"].startswith("dns:///generation:")


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_profile_has_each_service_once_under_its_name(profile: str) -> None:
    chosen = {n: s for n, s in services().items() if profile in s.get("profiles", [profile])}
    assert {word(name) for name in chosen} == {*SERVICES, "weaviate", "model"}
    assert len({word(name) for name in chosen}) == len(chosen)
    for name, service in chosen.items():
        inside = service["networks"]
        if name != word(name):
            assert inside == {"inside": {"aliases": [word(name)]}}
        for needed in service.get("depends_on", {}):
            assert needed in chosen


def test_weaviate_lets_in_who_has_the_key_and_is_the_version_of_the_tests(tmp_path: Path) -> None:
    assert services()["weaviate"]["image"].endswith(f"/weaviate:{VERSION}")
    tested = WeaviateServer(tmp_path, tmp_path).environment()
    same = [key for key in tested if key.startswith(("AUTH", "AUTO", "DISABLE", "ENABLE", "GO_"))]
    keys = "AUTHENTICATION_APIKEY_ALLOWED_KEYS"
    assert {k: WEAVIATE[k] for k in same if k != keys} == {k: tested[k] for k in same if k != keys}
    assert keys not in WEAVIATE, "a key in the environment of the file"
    [command] = services()["weaviate"]["command"]
    [secret] = services()["weaviate"]["secrets"]
    assert f'{keys}="$$(cat {secret["target"]})"' in command
    assert secret == services()["retrieval"]["secrets"][0]
    assert (
        secret["target"]
        == (services()["retrieval"]["environment"]["TWOROADS_RETRIEVAL_WEAVIATE_KEY_FILE"])
    )


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_holds_a_services_own_source_and_what_it_may_import(name: str) -> None:
    shared = {f"services/{part}" for part in ("__init__.py", "runtime", "prompts", "questions")}
    copied = {path for path in sources(name) if path.startswith("services/")}
    assert copied == shared | {f"services/{name}"}


@pytest.mark.parametrize("engine", ["cpu", "gpu"])
def test_an_image_is_built_in_a_stage_that_it_does_not_contain(engine: str) -> None:
    made = stages(engine)
    for name in (*SERVICES, "model"):
        base = made[name].base
        while base in made:
            assert not base.startswith("build") and not base.endswith("-build")
            base = made[base].base
        assert base.startswith("python:3.11.")


def test_the_model_that_is_chosen_stays_and_reaches_those_who_serve_it() -> None:
    text = FILE.read_text()
    assert set(VARIABLE.findall(text)) == {("TWOROADS_MODEL", DEFAULT), ("HF_TOKEN", "")}
    assert services()["model"]["command"] == ["--model", DEFAULT]
    # What has another label is made anew: it reads the model when it starts.
    for name in ("generation", "tuning", "generation-gpu", "tuning-gpu"):
        assert services()[name]["labels"] == {"org.tworoads.model": DEFAULT}


@pytest.mark.parametrize("umask", ["022", "077"])
def test_the_secrets_made_as_the_file_says_are_for_the_containers_alone(
    umask: str, tmp_path: Path
) -> None:
    header = FILE.read_text().partition("\nname:")[0]
    lines = re.findall(r"^#   ((?:install|chmod|tworoads keys) .*)", header, re.MULTILINE)
    assert len(lines) == 6
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).touch(0o600)
    script = "\n".join([f"set -e; umask {umask}", *lines])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env={"PATH": path}, check=True)
    secrets = tmp_path / "secrets"
    assert secrets.stat().st_mode & 0o777 == 0o700
    files = [file for file in secrets.rglob("*") if file.is_file()]
    assert {str(file.relative_to(secrets)) for file in files} == {
        "weaviate-key",
        "keys/keys.json",
        "public-tls/tls.crt",
        "public-tls/tls.key",
    }
    for made in secrets.rglob("*"):  # the containers' user is no owner of anything
        assert made.stat().st_mode & 0o007 == (0o004 if made.is_file() else 0o005), made
    assert len((secrets / "weaviate-key").read_text().strip()) == 44
