"""Draining nodes and rolling updates never take more pods than the manifests allow."""

from collections.abc import Iterator

import pytest

from tests.k8s.cluster import until
from tests.k8s.conftest import NAMESPACE, Installed
from tests.k8s.manifests import (
    Object,
    most_missing,
    name,
    reference,
    replicas,
    selects,
)
from tests.k8s.readiness import Readiness, followed

TIMEOUT = "--timeout=60s"


@pytest.fixture
def nodes(installed: Installed) -> Iterator[list[str]]:
    """The names of the nodes, which are open again afterwards with every pod ready."""
    nodes = [name(node) for node in installed.cluster.get("nodes")]
    if len(nodes) == 1:
        pytest.skip("the pods of the only node have nowhere to go")
    yield nodes
    installed.cluster.kubectl("uncordon", *nodes)
    until(installed.is_ready, 180, "every pod ready again")


def test_a_drain_of_two_nodes_is_held_by_the_budget(installed: Installed, nodes: list[str]) -> None:
    cluster = installed.cluster
    budgets = cluster.get("pdb", "-n", NAMESPACE)
    least = {name(budget): budget["status"]["desiredHealthy"] for budget in budgets}
    drained = _nodes_of_one(budgets, cluster.get("pods", "-n", NAMESPACE))
    drain = ("drain", "--ignore-daemonsets", "--delete-emptydir-data", *drained)
    cluster.kubectl("cordon", *nodes)  # what is evicted cannot come back elsewhere
    with followed(cluster, NAMESPACE, lambda pod: _budget(budgets, pod)) as readiness:
        held = cluster.run(*drain, "--timeout=15s")
        assert held.returncode != 0
        assert "would violate the pod's disruption budget" in held.stderr
        cluster.kubectl("uncordon", *(node for node in nodes if node not in drained))
        cluster.kubectl(*drain, "--timeout=180s")
    assert _too_few(readiness, least) == {}
    left = cluster.get("pods", "-n", NAMESPACE)
    assert {pod["spec"].get("nodeName") for pod in left}.isdisjoint(drained)


def test_a_rolling_update_never_has_fewer_ready_pods_than_allowed(installed: Installed) -> None:
    cluster = installed.cluster
    rolled = installed.workloads()
    budgets = cluster.get("pdb", "-n", NAMESPACE)
    least = {}
    for each in rolled:
        labels = each["spec"]["template"]["metadata"]["labels"]
        wanted = [
            budget["status"]["desiredHealthy"]
            for budget in budgets
            if selects(budget["spec"]["selector"], labels)
        ]
        least[reference(each)] = max(replicas(each) - most_missing(each), *wanted, 0)
    with followed(cluster, NAMESPACE, lambda pod: _workload(rolled, pod)) as readiness:
        for each in rolled:
            cluster.kubectl("rollout", "restart", reference(each), "-n", NAMESPACE)
        until(installed.is_ready, 180, "every pod ready again")
    assert _too_few(readiness, least) == {}


def _too_few(readiness: Readiness, least: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Return the lowest number seen and the one allowed, of those that were below it."""
    lowest = readiness.lowest
    return {group: (lowest[group], one) for group, one in least.items() if lowest[group] < one}


def _nodes_of_one(budgets: list[Object], pods: list[Object]) -> list[str]:
    """Return two nodes that both have a pod of the same budget."""
    for budget in budgets:
        nodes = sorted({pod["spec"]["nodeName"] for pod in pods if _budget([budget], pod)})
        if len(nodes) > 1:
            return nodes[:2]
    raise AssertionError("no budget has pods on two nodes")


def _budget(budgets: list[Object], pod: Object) -> str:
    """Return the name of the budget that counts a pod, or an empty name."""
    labels = pod["metadata"]["labels"]
    return next((name(one) for one in budgets if selects(one["spec"]["selector"], labels)), "")


def _workload(running: list[Object], pod: Object) -> str:
    labels = pod["metadata"]["labels"]
    return next(
        (reference(each) for each in running if selects(each["spec"]["selector"], labels)), ""
    )
