"""Follows how many pods are ready, so that a moment with too few of them is not missed."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.k8s.cluster import Cluster, until
from tests.k8s.manifests import Object

Group = Callable[[Object], str]


class Readiness:
    """The lowest number of ready pods in each group since the start, in `lowest`."""

    def __init__(self, pods: list[Object], group: Group) -> None:
        self._group = group
        self._pods = {pod["metadata"]["uid"]: pod for pod in pods}
        self.lowest = self.ready()

    def ready(self) -> Counter[str]:
        """Return how many pods of each group are ready now."""
        return Counter(self._group(pod) for pod in self._pods.values() if is_ready(pod))

    def see(self, event: str, pod: Object) -> None:
        if event == "DELETED":
            self._pods.pop(pod["metadata"]["uid"], None)
        else:
            self._pods[pod["metadata"]["uid"]] = pod
        now = self.ready()
        for group in self.lowest:
            self.lowest[group] = min(self.lowest[group], now[group])

    def versions(self) -> set[str]:
        return {pod["metadata"]["resourceVersion"] for pod in list(self._pods.values())}


def is_ready(pod: Object) -> bool:
    """Tell whether a pod is ready and stays."""
    if "deletionTimestamp" in pod["metadata"]:
        return False
    conditions = pod.get("status", {}).get("conditions", [])
    return any(said["type"] == "Ready" and said["status"] == "True" for said in conditions)


@contextmanager
def followed(cluster: Cluster, namespace: str, group: Group) -> Iterator[Readiness]:
    """Follow the pods of a namespace while the block runs; at its end, nothing is left unseen."""
    path = f"/api/v1/namespaces/{namespace}/pods"
    found = json.loads(cluster.kubectl("get", "--raw", path))
    readiness = Readiness(found["items"], group)
    with cluster.watch(path, found["metadata"]["resourceVersion"]) as events:

        def follow() -> None:
            assert events.stdout is not None
            for line in events.stdout:
                event = json.loads(line)
                readiness.see(event["type"], event["object"])

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield readiness

            def all_seen() -> bool:
                now = json.loads(cluster.kubectl("get", "--raw", path))["items"]
                return readiness.versions() == {pod["metadata"]["resourceVersion"] for pod in now}

            until(all_seen, 60, "the last event of a pod")
        finally:
            events.kill()
            thread.join()
