"""Every overlay is admitted, scheduled and bound, and its objects find each other."""

import json
from collections import Counter

import pytest
import yaml

from tests.k8s.conftest import NAMESPACE, WAYS, Installed
from tests.k8s.manifests import K8S, name, needed, of_kind, reference, replicas, selects
from tests.k8s.readiness import is_ready


def test_the_api_server_accepts_everything_without_a_warning(installed: Installed) -> None:
    assert installed.warnings == ""


def test_pods_are_held_to_the_restricted_standard(installed: Installed) -> None:
    spaces = of_kind(installed.objects, "Namespace")
    assert [name(space) for space in spaces] == [NAMESPACE]
    assert spaces[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_every_pod_has_a_node_and_runs(installed: Installed) -> None:
    pods = installed.pods()
    wanted = sum(replicas(workload) for workload in installed.workloads())
    assert len(pods) == wanted > 0
    assert [name(pod) for pod in pods if not (pod["spec"].get("nodeName") and is_ready(pod))] == []


def test_what_computes_on_gpus_and_nothing_else_has_them(installed: Installed) -> None:
    machines = {node.name for node in installed.way.nodes if node.gpus}
    pods = installed.pods()
    found = {
        pod["metadata"]["labels"]["app.kubernetes.io/name"]
        for pod in pods
        if pod["spec"]["nodeName"] in machines
    }
    assert found == installed.way.on_gpus


def test_every_volume_is_bound(installed: Installed) -> None:
    claims = installed.cluster.get("pvc", "-n", NAMESPACE)
    assert claims
    assert [name(claim) for claim in claims if claim["status"]["phase"] != "Bound"] == []


def test_every_secret_and_file_that_a_pod_needs_is_there(installed: Installed) -> None:
    cluster = installed.cluster
    there = set()
    for found in cluster.get("secrets,configmaps", "-n", NAMESPACE):
        for key in ("", *found.get("data", {})):
            there.add((found["kind"], name(found), key))
    pods = cluster.get("pods", "-n", NAMESPACE)
    wanted = {need for pod in pods for need in needed(pod["spec"])}
    assert wanted - there == set()


def test_nothing_that_can_be_installed_is_left_out() -> None:
    there = {str(file.parent.relative_to(K8S)) for file in K8S.rglob("kustomization.yaml")}
    assert there - {"base"} == {part for way in WAYS for part in (way.overlay, *way.components)}


def test_every_pod_is_scraped(installed: Installed) -> None:
    monitors = of_kind(installed.objects, "PodMonitor")
    if not monitors:
        pytest.skip("installed without k8s/monitoring")
    (monitor,) = monitors
    scraped = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    for pod in installed.pods():
        ports = {
            port["name"]
            for container in pod["spec"]["containers"]
            for port in container.get("ports", [])
        }
        assert selects(monitor["spec"]["selector"], pod["metadata"]["labels"]), name(pod)
        assert ports & scraped, name(pod)


def test_every_service_leads_to_ready_pods(installed: Installed) -> None:
    slices = installed.cluster.get("endpointslices", "-n", NAMESPACE)
    ready: Counter[str] = Counter()
    for found in slices:
        assert found["ports"], name(found)
        service = found["metadata"]["labels"]["kubernetes.io/service-name"]
        for endpoint in found["endpoints"] or []:
            ready[service] += endpoint["conditions"]["ready"]
    services = of_kind(installed.objects, "Service")
    assert [name(service) for service in services if not ready[name(service)]] == []


def test_every_policy_selects_a_pod(installed: Installed) -> None:
    pods = installed.cluster.get("pods", "-n", NAMESPACE)
    labels = [pod["metadata"]["labels"] for pod in pods]
    for task in of_kind(installed.objects, "CronJob"):  # has pods at night alone
        template = task["spec"]["jobTemplate"]["spec"]["template"]
        labels.append(template["metadata"]["labels"])
    selectors = [
        (name(budget), budget["spec"]["selector"])
        for budget in of_kind(installed.objects, "PodDisruptionBudget")
    ]
    for policy in of_kind(installed.objects, "NetworkPolicy"):
        spec = policy["spec"]
        selectors.append((name(policy), spec["podSelector"]))
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            for peer in [*rule.get("from", []), *rule.get("to", [])]:
                if not {"namespaceSelector", "ipBlock"} & peer.keys():  # pods that others run
                    selectors.append((name(policy), peer["podSelector"]))
    assert selectors
    assert [
        (policy, selector)
        for policy, selector in selectors
        if not any(selects(selector, each) for each in labels)
    ] == []


def test_a_task_is_admitted_and_ends(installed: Installed) -> None:
    cluster = installed.cluster
    tasks = of_kind(installed.objects, "Job", "CronJob")
    if not tasks:
        pytest.skip("installed without tasks")
    for task in tasks:
        job = reference(task)
        if task["kind"] == "CronJob":
            job = "job/now"
            source = f"--from={reference(task)}"
            cluster.kubectl("create", "job", "now", source, "-n", NAMESPACE)
        cluster.kubectl("wait", "--for=condition=Complete", job, "-n", NAMESPACE, "--timeout=120s")
        if task["kind"] == "CronJob":
            cluster.kubectl("delete", job, "-n", NAMESPACE)


def test_a_copy_is_brought_back_by_the_task_that_made_it(installed: Installed) -> None:
    cluster = installed.cluster
    if not of_kind(installed.objects, "CronJob"):
        pytest.skip("installed without backups")
    source = ("restore", "--from=cronjob/weaviate-backup", "-n", NAMESPACE)
    made = cluster.kubectl("create", "job", *source, "--dry-run=client", "-o", "yaml")
    said = ("WORK=restore", "ID=nightly-1")
    changed = cluster.kubectl("set", "env", "--local", "-f", "-", *said, "-o", "yaml", given=made)
    told = cluster.run("apply", "--dry-run=server", "-f", "-", given=changed)
    assert (told.returncode, told.stderr) == (0, "")
    [container] = yaml.safe_load(changed)["spec"]["template"]["spec"]["containers"]
    given = {one["name"]: one["value"] for one in container["env"]}
    assert given == {"WORK": "restore", "ID": "nightly-1"}


def test_volumes_are_copied_by_snapshots(installed: Installed) -> None:
    file = str(K8S / "components" / "backup" / "snapshots.yaml")
    said = "jsonpath={.spec.source.persistentVolumeClaimName}{'\\n'}"
    command = ("create", "-f", file, "--dry-run=server", "--validate=strict", "-o", said)
    copied = installed.cluster.kubectl(*command).split()
    claims = {name(claim) for claim in of_kind(installed.objects, "PersistentVolumeClaim")}
    assert set(copied) == claims - {"model"}  # which can be downloaded again


def test_what_runs_more_than_once_has_a_budget_that_lets_one_go(installed: Installed) -> None:
    budgets = installed.cluster.get("pdb", "-n", NAMESPACE)
    for workload in installed.workloads():
        if replicas(workload) == 1:
            continue
        labels = workload["spec"]["template"]["metadata"]["labels"]
        own = [found for found in budgets if selects(found["spec"]["selector"], labels)]
        assert [found["status"]["expectedPods"] for found in own] == [replicas(workload)]
        assert own[0]["status"]["disruptionsAllowed"] > 0, json.dumps(own[0]["status"])


def test_replicas_are_spread_over_nodes_and_zones(installed: Installed) -> None:
    nodes = installed.cluster.get("nodes")
    zone_of = {
        name(node): node["metadata"]["labels"].get("topology.kubernetes.io/zone") for node in nodes
    }
    zones = len(set(zone_of.values()))
    pods = installed.cluster.get("pods", "-n", NAMESPACE)
    for workload in installed.workloads():
        selector = workload["spec"]["selector"]
        own = [pod for pod in pods if selects(selector, pod["metadata"]["labels"])]
        used = [pod["spec"]["nodeName"] for pod in own]
        assert len({zone_of[node] for node in used}) == min(len(own), zones), name(workload)
        assert len(set(used)) == min(len(own), len(nodes)), name(workload)
