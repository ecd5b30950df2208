"""The manifests against the services' own settings, and against each other."""

import copy
import functools
import importlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
from pydantic import ValidationError

from services.runtime.settings import ServerSettings
from tests.manifests import FOREIGN, ROOT, Object, everything, folders, problems, render

SERVICES = ("gateway", "embedding", "retrieval", "generation", "tuning", "evaluation")
NAMESPACE = "tworoads"
DOMAIN = f".{NAMESPACE}.svc.cluster.local"
ADDRESS = re.compile(rf"(?:dns:///)?([a-z-]+){re.escape(DOMAIN)}:(\d+)")
WORKLOADS = ("Deployment", "StatefulSet")
TASKS = ("Job", "CronJob")
BACKUP = "components/backup"
DOWNLOAD = "components/model-download"
CERTIFICATES = "components/cert-manager"
KEDA = "components/keda"
# What the base needs and does not make; keys are the files.
SECRETS = {
    **{f"tworoads-tls-{service}": {"tls.crt", "tls.key", "ca.crt"} for service in SERVICES},
    "tworoads-public-tls": {"tls.crt", "tls.key"},
    "tworoads-keys": {"keys.json"},
    "weaviate-key": {"key", "admin"},
}
Rule = tuple[str, str, int]  # from, to, port


@functools.cache
def objects(folder: str, *components: str) -> list[Object]:
    return render(folder, *components)


def of_kind(found: list[Object], *kinds: str) -> dict[str, Object]:
    return {each["metadata"]["name"]: each for each in found if each["kind"] in kinds}


def pod(workload: Object) -> Any:
    spec = workload["spec"]
    return spec.get("jobTemplate", {}).get("spec", spec)["template"]["spec"]


def main_container(workload: Object) -> Any:
    [container] = pod(workload)["containers"]
    return container


def containers(found: list[Object]) -> Iterator[tuple[str, Any]]:
    for name, workload in of_kind(found, *WORKLOADS, *TASKS).items():
        spec = pod(workload)
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            yield f"{name}/{container['name']}", container


def environment(container: Any) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container.get("env", ()) if "value" in one}


def settings_class(service: str) -> type[ServerSettings]:
    chosen: type[ServerSettings] = importlib.import_module(f"services.{service}.settings").Settings
    return chosen


def settings(service: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what the service reads from the environment that its manifest gives."""
    container = main_container(of_kind(objects(folder), "Deployment")[service])
    for name, value in environment(container).items():
        monkeypatch.setenv(name, value)
    return settings_class(service)()


def ports(container: Any) -> set[int]:
    return {port["containerPort"] for port in container["ports"]}


def addresses(container: Any) -> set[tuple[str, int]]:
    """Return the (service, port) that a container's environment names."""
    found = (ADDRESS.fullmatch(value) for value in environment(container).values())
    return {(match[1], int(match[2])) for match in found if match}


@pytest.mark.parametrize(("folder", "components"), list(everything()))
def test_every_overlay_is_valid_with_each_component_and_with_all(
    folder: str, components: tuple[str, ...]
) -> None:
    assert list(problems(objects(folder, *components))) == []


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ("spec", "replica"), 2),
        ("Deployment", ("spec", "replicas"), "two"),
        ("NetworkPolicy", ("spec", "egres"), []),
        ("Certificate", ("spec", "dnsName"), "gateway"),
        ("ScaledObject", ("spec", "minReplicas"), 0),
        ("Namespace", ("kind",), "Namespaces"),
    ],
)
def test_a_mistake_in_a_manifest_is_found(kind: str, path: tuple[str, ...], value: Any) -> None:
    found = objects("overlays/cpu", CERTIFICATES, KEDA)
    wrong = copy.deepcopy(next(each for each in found if each["kind"] == kind))
    assert list(problems([wrong])) == []
    *way, last = path
    at = wrong
    for step in way:
        at = at[step]
    at[last] = value
    assert len(list(problems([wrong]))) == 1


@pytest.mark.parametrize("components", [(), (BACKUP, DOWNLOAD)])
@pytest.mark.parametrize("folder", folders())
def test_every_container_is_restricted(folder: str, components: tuple[str, ...]) -> None:
    found = objects(folder, *components)
    for workload in of_kind(found, *WORKLOADS, *TASKS).values():
        spec = pod(workload)
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert (context["runAsUser"], context["runAsGroup"]) == (10001, 10001)
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "secret", "persistentVolumeClaim"}
    for name, container in containers(found):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["readOnlyRootFilesystem"] is True, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert not {"privileged", "runAsUser", "procMount"} & set(context), name
        assert not any("hostPort" in port for port in container.get("ports", ())), name
        for want in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][want]), name


@pytest.mark.parametrize("folder", folders())
def test_the_namespace_is_restricted_and_holds_everything(folder: str) -> None:
    found = objects(folder)
    labels = of_kind(found, "Namespace")[NAMESPACE]["metadata"]["labels"]
    for mode in ("enforce", "warn", "audit"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
    outside = {each["kind"] for each in found if each["metadata"].get("namespace") != NAMESPACE}
    assert outside == {"Namespace", "PriorityClass"}


@pytest.mark.parametrize("folder", folders())
def test_every_image_is_pinned(folder: str) -> None:
    for name, container in containers(objects(folder, BACKUP, DOWNLOAD)):
        assert re.fullmatch(r"[a-z./-]+:\d+\.\d+\.\d+(-gpu)?", container["image"]), name


@pytest.mark.parametrize("folder", folders())
@pytest.mark.parametrize("service", SERVICES)
def test_the_environment_is_one_that_the_service_has_settings_for(
    service: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = main_container(of_kind(objects(folder), "Deployment")[service])
    prefix = f"TWOROADS_{service.upper()}_"
    named = {name for name in environment(container) if name.startswith("TWOROADS_")}
    known = {f"{prefix}{field.upper()}" for field in settings_class(service).model_fields}
    assert named - known == set()
    read = settings(service, folder, monkeypatch)
    assert read.model_fields_set == {name.removeprefix(prefix).lower() for name in named}


def test_an_environment_that_does_not_fit_the_settings_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TWOROADS_GATEWAY_CALLERS", "evaluation")  # no JSON
    with pytest.raises((ValidationError, ValueError)):
        settings_class("gateway")()


@pytest.mark.parametrize("folder", folders())
@pytest.mark.parametrize("service", SERVICES)
def test_a_service_listens_on_the_ports_that_its_pod_names(
    service: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = main_container(of_kind(objects(folder), "Deployment")[service])
    read = settings(service, folder, monkeypatch)
    listening = [read.listen, read.health, read.metrics]
    if service == "gateway":
        listening.append(read.internal)
    assert {int(address.rpartition(":")[2]) for address in listening} == ports(container)
    assert {address.rpartition(":")[0] for address in listening} == {"0.0.0.0"}
    assert read.health.endswith(":8081") and read.metrics.endswith(":9090")


@pytest.mark.parametrize("folder", folders())
def test_services_lead_to_ports_of_the_pods_that_they_choose(folder: str) -> None:
    found = objects(folder, "components/load-balancer")
    workloads = of_kind(found, *WORKLOADS)
    for name, service in of_kind(found, "Service").items():
        selector = service["spec"]["selector"]
        [chosen] = [
            each
            for each in workloads.values()
            if selector.items() <= each["spec"]["template"]["metadata"]["labels"].items()
        ]
        named = {port["name"]: port for port in main_container(chosen)["ports"]}
        for port in service["spec"]["ports"]:
            target = named[port["targetPort"]]
            assert target["containerPort"] == port["port"], name
            assert target.get("protocol") == port.get("protocol"), name
        if name in SERVICES:
            assert service["spec"]["clusterIP"] == "None"
    for name, workload in workloads.items():
        chosen = workload["spec"]["selector"]["matchLabels"]
        assert chosen == {"app.kubernetes.io/name": name}
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert labels == {**chosen, "app.kubernetes.io/part-of": NAMESPACE}


@pytest.mark.parametrize("folder", folders())
def test_every_address_is_a_port_of_a_service(folder: str) -> None:
    found = objects(folder)
    services = of_kind(found, "Service")
    for name, container in containers(found):
        texts = [*environment(container).values(), *container.get("args", ())]
        for host, port in re.findall(rf"([a-z-]+){re.escape(DOMAIN)}(?::(\d+))?", " ".join(texts)):
            offered = {one["port"] for one in services[host]["spec"]["ports"]}
            assert not port or int(port) in offered, f"{name}: {host}:{port}"


@pytest.mark.parametrize("folder", folders())
def test_addresses_of_our_services_are_names_that_show_every_replica(folder: str) -> None:
    for service in SERVICES:
        container = main_container(of_kind(objects(folder), "Deployment")[service])
        for name, value in environment(container).items():
            if (match := ADDRESS.fullmatch(value)) and match[1] in SERVICES:
                assert value.startswith("dns:///"), name
                calls = name.removeprefix(f"TWOROADS_{service.upper()}_").lower()
                assert calls == match[1]
        reached = {host for host, _ in addresses(container)}
        fields = set(settings_class(service).model_fields)
        assert {each for each in SERVICES if each in fields} <= reached, "an address is the default"


@pytest.mark.parametrize("folder", folders())
def test_policies_allow_what_the_addresses_say_and_nothing_else(folder: str) -> None:
    found = objects(folder)
    policies = of_kind(found, "NetworkPolicy")
    deny = policies.pop("default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    dns = policies.pop("dns")["spec"]
    assert dns["policyTypes"] == ["Egress"] and dns["podSelector"] == {}
    [to] = dns["egress"]
    assert {port["port"] for port in to["ports"]} == {53}
    metrics = policies.pop("metrics")["spec"]
    assert metrics["policyTypes"] == ["Ingress"]
    [scrape] = metrics["ingress"]
    assert scrape["ports"] == [{"port": 9090}]
    assert all("namespaceSelector" in peer for peer in scrape["from"])

    workloads = of_kind(found, *WORKLOADS)
    assert set(policies) == set(workloads)
    wanted = {
        (name, host, port)
        for name, workload in workloads.items()
        for host, port in addresses(main_container(workload))
        if name != "weaviate"
    }
    peers = {("weaviate", "weaviate", port) for port in (7000, 7001, 8300, 8301)}
    clients = {("", "gateway", 50050)}
    ingress, egress = _rules(policies, "ingress"), _rules(policies, "egress")
    assert ingress == wanted | peers | clients
    assert egress == wanted | peers


def _rules(policies: dict[str, Object], way: str) -> set[Rule]:
    found: set[Rule] = set()
    for name, policy in policies.items():
        spec = policy["spec"]
        assert spec["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": name}}
        assert (way in spec) <= (way.capitalize() in spec["policyTypes"])
        for rule in spec.get(way, ()):
            assert rule["ports"], "a rule without ports allows all of them"
            for peer in rule.get("from", rule.get("to", ({},))):
                assert set(peer) <= {"podSelector"}
                labels = peer.get("podSelector", {}).get("matchLabels", {})
                other = labels.get("app.kubernetes.io/name", "")
                ends = (other, name) if way == "ingress" else (name, other)
                found |= {(*ends, port["port"]) for port in rule["ports"]}
    return found


@pytest.mark.parametrize("folder", folders())
def test_probes_ask_the_health_port_and_wait_for_a_model(folder: str) -> None:
    for name, workload in of_kind(objects(folder), *WORKLOADS).items():
        container = main_container(workload)
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if name == "weaviate":
                assert container[probe]["httpGet"]["port"] == "http"
            else:
                assert container[probe]["grpc"]["port"] == 8081
        startup = container["startupProbe"]
        seconds = startup["periodSeconds"] * startup["failureThreshold"]
        assert seconds >= (1200 if name == "generation" else 120), name
        liveness = container["livenessProbe"]
        assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60, name


@pytest.mark.parametrize("folder", folders())
@pytest.mark.parametrize("service", SERVICES)
def test_a_pod_has_the_time_to_end_its_calls(
    service: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = of_kind(objects(folder), "Deployment")[service]
    read = settings(service, folder, monkeypatch)
    before = main_container(workload)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert before > 0 and read.drain_seconds > 0
    grace = pod(workload)["terminationGracePeriodSeconds"]
    assert grace >= before + read.drain_seconds + read.grace_seconds + 10
    if service in ("gateway", "generation"):
        from services.runtime.interceptors import MOST_SECONDS

        assert read.grace_seconds >= MOST_SECONDS


@pytest.mark.parametrize("folder", ["overlays/cpu", "overlays/gpu"])
def test_what_has_replicas_is_spread_and_has_a_disruption_budget(folder: str) -> None:
    found = objects(folder)
    scaled = {
        each["spec"]["scaleTargetRef"]["name"]
        for each in of_kind(found, "HorizontalPodAutoscaler").values()
    }
    workloads = of_kind(found, *WORKLOADS)
    several = {
        name for name, each in workloads.items() if each["spec"].get("replicas", 2) > 1
    } | scaled
    assert several == {"gateway", "embedding", "generation", "weaviate"}
    budgets = of_kind(found, "PodDisruptionBudget")
    assert set(budgets) == several  # one for a single replica would hold every drain, or nothing
    for name in several:
        spec = budgets[name]["spec"]
        assert spec["maxUnavailable"] == 1
        selector = {"matchLabels": {"app.kubernetes.io/name": name}}
        assert spec["selector"] == selector
        spread = pod(workloads[name])["topologySpreadConstraints"]
        assert {one["topologyKey"] for one in spread} == {
            "kubernetes.io/hostname",
            "topology.kubernetes.io/zone",
        }
        assert all(one["labelSelector"] == selector for one in spread)


@pytest.mark.parametrize("folder", folders())
def test_a_folder_has_one_process(folder: str) -> None:
    found = objects(folder)
    claims = of_kind(found, "PersistentVolumeClaim")
    assert set(claims) == {"tuning", "evaluation"}
    for name in claims:
        spec = of_kind(found, "Deployment")[name]["spec"]
        assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


@pytest.mark.parametrize("folder", folders())
def test_no_two_processes_write_passages(folder: str) -> None:
    spec = of_kind(objects(folder), "Deployment")["retrieval"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


@pytest.mark.parametrize("folder", folders())
def test_what_the_settings_name_is_mounted(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for service in SERVICES:
        workload = of_kind(objects(folder), "Deployment")[service]
        read = settings(service, folder, monkeypatch)
        mounts = {one["mountPath"]: one for one in main_container(workload)["volumeMounts"]}
        paths = {
            str(value)
            for value in environment(main_container(workload)).values()
            if value.startswith("/")
        }
        for path in paths:
            assert any(path == at or path.startswith(f"{at}/") for at in mounts), (service, path)
        for at, mount in mounts.items():
            assert mount.get("readOnly", False) is at.startswith(("/secrets", "/models")), at
        secure = folder != "overlays/kind"
        assert (read.tls is not None, read.insecure) == (secure, not secure)


@pytest.mark.parametrize("folder", folders())
def test_every_mount_has_a_volume_and_every_volume_is_mounted(folder: str) -> None:
    for workload in of_kind(objects(folder), *WORKLOADS).values():
        spec = pod(workload)
        volumes = {volume["name"] for volume in spec["volumes"]}
        volumes |= {
            one["metadata"]["name"] for one in workload["spec"].get("volumeClaimTemplates", ())
        }
        every = (*spec.get("initContainers", ()), *spec["containers"])
        assert {mount["name"] for each in every for mount in each["volumeMounts"]} == volumes


@pytest.mark.parametrize("folder", folders())
def test_secrets_are_the_documented_ones_and_never_in_the_environment(folder: str) -> None:
    found = objects(folder)
    used = set()
    for workload in of_kind(found, *WORKLOADS).values():
        for volume in pod(workload)["volumes"]:
            if secret := volume.get("secret"):
                used.add(secret["secretName"])
                files = {item["key"] for item in secret.get("items", ())}
                assert files <= SECRETS[secret["secretName"]]
    made = set(of_kind(found, "Secret"))
    assert used == ({"weaviate-key"} if made else set(SECRETS))
    documented = (ROOT / "base" / "kustomization.yaml").read_text()
    for name in SECRETS:
        assert re.sub("tls-[a-z]+$", "tls-SERVICE", name) in documented
    for name, container in containers(found):
        for one in container.get("env", ()):
            assert "secretKeyRef" not in one.get("valueFrom", {}), name
        assert "envFrom" not in container


def test_certificates_carry_the_word_of_their_service_and_no_other_name() -> None:
    certificates = of_kind(objects("overlays/cpu", CERTIFICATES), "Certificate")
    made = {}
    for each in certificates.values():
        spec = each["spec"]
        made[spec["secretName"]] = spec.get("dnsNames")
        if not spec.get("isCA"):
            assert (spec["duration"], spec["renewBefore"]) == ("2160h", "720h")
    inside = {f"tworoads-tls-{service}": [service] for service in SERVICES}
    assert {name: names for name, names in made.items() if name in inside} == inside
    assert set(made) - set(inside) == {"tworoads-public-tls", "tworoads-ca"}
    issuers = of_kind(objects("overlays/cpu", CERTIFICATES), "Issuer")
    for each in certificates.values():
        assert each["spec"]["issuerRef"]["name"] in issuers


@pytest.mark.parametrize("folder", ["overlays/cpu", "overlays/gpu"])
def test_those_who_may_call_are_those_who_have_the_address(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployments = of_kind(objects(folder), "Deployment")
    reached = {name: addresses(main_container(each)) for name, each in deployments.items()}
    for service in SERVICES:
        callers = settings(service, folder, monkeypatch).callers
        assert set(callers) == {
            name for name, to in reached.items() if service in {host for host, _ in to}
        }


def test_weaviate_keeps_others_out_and_holds_three_copies() -> None:
    [weaviate] = of_kind(objects("overlays/cpu"), "StatefulSet").values()
    said = environment(main_container(weaviate))
    nodes = [f"weaviate-{number}" for number in range(weaviate["spec"]["replicas"])]
    assert said["RAFT_JOIN"] == ",".join(nodes)
    assert said["RAFT_BOOTSTRAP_EXPECT"] == said["REPLICATION_MINIMUM_FACTOR"] == "3"
    off = ("AUTHENTICATION_ANONYMOUS_ACCESS_ENABLED", "AUTOSCHEMA_ENABLED")
    assert {said[name] for name in (*off, "DEBUG_ENDPOINTS_ENABLED")} == {"false"}
    on = ("AUTHENTICATION_APIKEY_ENABLED", "AUTHORIZATION_RBAC_ENABLED", "DISABLE_TELEMETRY")
    assert {said[name] for name in (*on, "GO_PROFILING_DISABLE")} == {"true"}
    assert said["AUTHENTICATION_APIKEY_USERS"] == "retrieval,admin"
    assert said["AUTHORIZATION_RBAC_ROOT_USERS"] == "admin"


@pytest.mark.parametrize("folder", folders())
def test_generation_has_one_autoscaler_which_is_in_no_hurry_to_scale_in(folder: str) -> None:
    plain = objects(folder)
    [autoscaler] = of_kind(plain, "HorizontalPodAutoscaler").values()
    assert of_kind(plain, "ScaledObject") == {}
    with_keda = objects(folder, KEDA)
    [scaled] = of_kind(with_keda, "ScaledObject").values()
    assert of_kind(with_keda, "HorizontalPodAutoscaler") == {}
    keda = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]
    for each in (autoscaler["spec"], keda):
        assert each["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 300
    for target in (autoscaler["spec"]["scaleTargetRef"], scaled["spec"]["scaleTargetRef"]):
        deployment = of_kind(plain, "Deployment")[target["name"]]
        assert "replicas" not in deployment["spec"], "an apply would fight with the autoscaler"
    for trigger in scaled["spec"]["triggers"]:
        assert trigger["metadata"]["ignoreNullValues"] == "false"
    assert scaled["spec"]["fallback"]["replicas"] > 0


@pytest.mark.parametrize(
    ("scraped", "silent"),
    [
        (("gateway", "embedding", "generation"), set()),
        (("gateway", "embedding"), set()),  # no replica: nothing to do, which is no failure
        (("embedding", "generation"), {"demand"}),
        ((), {"demand"}),
    ],
)
def test_a_scrape_that_fails_does_not_look_like_nobody_asking(
    scraped: tuple[str, ...], silent: set[str]
) -> None:
    [scaled] = of_kind(objects("overlays/cpu", KEDA), "ScaledObject").values()
    triggers = {one["name"]: one["metadata"]["query"] for one in scaled["spec"]["triggers"]}
    answered = {name for name, query in triggers.items() if _answers(promql.parse(query), scraped)}
    assert triggers.keys() - answered == silent


def _answers(expression: Any, scraped: tuple[str, ...]) -> bool:
    """Tell whether an expression has a value when these services have had no call yet."""
    match expression:
        case promql.VectorSelector(name=name, matchers=matchers):
            apps = {m.value for m in matchers.matchers if m.name == "app"} or set(scraped)
            exposing = {"tworoads_unserved_total": set(scraped), "tworoads_calls_total": set()}
            return bool(apps & exposing.get(str(name), {"generation"}) & set(scraped))
        case promql.MatrixSelector(vector_selector=inner):
            return _answers(inner, scraped)
        case promql.AggregateExpr(expr=inner) | promql.ParenExpr(expr=inner):
            return _answers(inner, scraped)
        case promql.Call(args=arguments):
            return all(_answers(argument, scraped) for argument in arguments)
        case promql.BinaryExpr(op=operator, lhs=left, rhs=right):
            either = any if str(operator) == "or" else all
            return either(_answers(side, scraped) for side in (left, right))
        case promql.NumberLiteral():
            return True
    raise AssertionError(f"{type(expression).__name__} is not known here")


def test_the_autoscalers_agree_on_the_load_of_a_replica() -> None:
    [plain] = of_kind(objects("overlays/cpu"), "HorizontalPodAutoscaler").values()
    [scaled] = of_kind(objects("overlays/cpu", KEDA), "ScaledObject").values()
    waiting, cache = (one["external"]["target"] for one in plain["spec"]["metrics"])
    triggers = {one["name"]: one["metadata"] for one in scaled["spec"]["triggers"]}
    assert waiting["averageValue"] == triggers["waiting"]["threshold"]
    assert cache["averageValue"] == f"{float(triggers['cache-use']['threshold']) * 1000:.0f}m"
    assert "vllm:num_requests_waiting" in triggers["waiting"]["query"]
    assert "vllm:kv_cache_usage_perc" in triggers["cache-use"]["query"]


def test_gpus_are_asked_for_where_models_compute_and_only_there() -> None:
    workloads = of_kind(objects("overlays/gpu"), *WORKLOADS)
    for name, workload in workloads.items():
        container = main_container(workload)
        computes = name in ("generation", "tuning")
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) is computes
        assert container["image"].endswith("-gpu") is computes
        assert ("tolerations" in pod(workload)) is computes
    assert workloads["generation"]["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0


def test_a_model_of_ones_own_comes_from_a_volume_that_is_only_read() -> None:
    found = of_kind(objects("overlays/gpu", "components/model-volume"), "Deployment")
    for name in ("generation", "tuning"):
        spec = pod(found[name])
        assert "initContainers" not in spec
        [models] = [volume for volume in spec["volumes"] if volume["name"] == "models"]
        claim = {"claimName": "model", "readOnly": True}
        assert models == {"name": "models", "persistentVolumeClaim": claim}


def test_a_downloaded_model_is_in_the_claim_that_replicas_read() -> None:
    found = objects("overlays/gpu", "components/model-volume", DOWNLOAD)
    claim = of_kind(found, "PersistentVolumeClaim")["model"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    job = of_kind(found, "Job")["model"]
    [models] = [one for one in pod(job)["volumes"] if "persistentVolumeClaim" in one]
    assert models["persistentVolumeClaim"] == {"claimName": "model"}
    container = main_container(job)
    assert {"name": models["name"], "mountPath": "/models"} in container["volumeMounts"]
    dockerfile = (ROOT.parent / "Dockerfile").read_text()
    assert '"--out", "/models", "--link", "/models/model"]' in dockerfile
    assert container["args"][0] == "--model" and "command" not in container
    for name in ("generation", "tuning"):
        said = environment(main_container(of_kind(found, "Deployment")[name]))
        assert said[f"TWOROADS_{name.upper()}_MODEL"] == "/models/model"


def test_a_backup_reaches_weaviate_and_weaviate_its_bucket() -> None:
    plain, found = objects("overlays/cpu"), objects("overlays/cpu", BACKUP)
    [base], [with_bucket] = (of_kind(one, "StatefulSet").values() for one in (plain, found))
    [before], [after] = main_container(base)["args"], main_container(with_bucket)["args"]
    start, end = before.split("exec ")
    assert after.startswith(start) and after.endswith(f"exec {end}")
    assert environment(main_container(with_bucket))["ENABLE_MODULES"] == "backup-s3"
    policies = of_kind(found, "NetworkPolicy")
    assert _reached(policies["weaviate-backup"], "egress") == {("weaviate", 8080)}
    assert _reached(policies["weaviate-for-backup"], "ingress") == {("weaviate-backup", 8080)}
    [job] = of_kind(found, "CronJob").values()
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    assert "--http weaviate.tworoads.svc.cluster.local:8080 " in main_container(job)["args"][0]


def _reached(policy: Object, way: str) -> set[tuple[str, int]]:
    peer = {"ingress": "from", "egress": "to"}[way]
    return {
        (one["podSelector"]["matchLabels"]["app.kubernetes.io/name"], port["port"])
        for rule in policy["spec"][way]
        for one in rule[peer]
        for port in rule["ports"]
    }


def test_the_variables_of_the_bucket_come_out_of_files(tmp_path: Path) -> None:
    [weaviate] = of_kind(objects("overlays/cpu", BACKUP), "StatefulSet").values()
    [script] = main_container(weaviate)["args"]
    for name, text in {
        "weaviate/key": "one",
        "weaviate/admin": "two\n",
        "bucket/BACKUP_S3_BUCKET": "copies",
        "bucket/AWS_SECRET_ACCESS_KEY": "with $ign and 'quotes' ",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    script = script.replace("/secrets", str(tmp_path)).partition("exec ")[0] + "exec env"
    command = [*main_container(weaviate)["command"], script]
    path = {"PATH": os.environ["PATH"]}
    lines = subprocess.run(command, env=path, capture_output=True, text=True).stdout.splitlines()
    assert {
        "AUTHENTICATION_APIKEY_ALLOWED_KEYS=one,two",
        "BACKUP_S3_BUCKET=copies",
        "AWS_SECRET_ACCESS_KEY=with $ign and 'quotes' ",
    } <= set(lines)


@pytest.mark.parametrize(
    ("given", "work", "id"),
    [
        ({}, "create", r"nightly-\d{4}-\d\d-\d\d-\d{6}"),
        ({"WORK": "restore", "ID": "nightly-1"}, "restore", "nightly-1"),
    ],
)
def test_a_copy_of_weaviate_is_made_and_brought_back_by_its_name(
    given: dict[str, str], work: str, id: str
) -> None:
    [job] = of_kind(objects("overlays/cpu", BACKUP), "CronJob").values()
    [script] = main_container(job)["args"]
    said = script.replace("exec /opt/venv/bin/python", "echo")
    shell = [*main_container(job)["command"], said]
    environment = {"PATH": os.environ["PATH"], **given}
    words = subprocess.run(shell, env=environment, capture_output=True, text=True).stdout.split()
    assert words[:4] == ["-P", "-m", "services.retrieval.stores.weaviate_backup", work]
    assert re.fullmatch(id, words[4])
    options = {words[at]: words[at + 1] for at in range(5, len(words), 2)}
    assert options.keys() == {"--http", "--key-file", "--backend"}
    [mount] = [one for one in main_container(job)["volumeMounts"] if one["mountPath"] != "/tmp"]
    assert options["--key-file"] == f"{mount['mountPath']}/admin"


def test_every_kind_without_a_schema_is_one_that_is_checked_by_name() -> None:
    kinds = {
        (each["apiVersion"], each["kind"])
        for folder, components in everything()
        for each in objects(folder, *components)
    }
    own = ("v1", "apps/v1", "batch/v1", "policy/v1", "autoscaling/v2")
    outside = {kind for kind in kinds if kind[0] not in own and not kind[0].endswith(".k8s.io/v1")}
    assert outside <= set(FOREIGN)
