"""Trainings as jobs of a real API server: by the account of tuning, with the shipped manifests."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from services.tuning.job import Options, Progress
from services.tuning.training.cluster import Cluster as Jobs
from services.tuning.training.launcher import JobTrainer, filled
from services.tuning.training.trainer import Trained, TrainingFailed
from tests.fake_cluster import pod_process
from tests.k8s.cluster import Cluster, Node, running, until
from tests.k8s.conftest import NAMESPACE
from tests.k8s.manifests import K8S, Object, name, of_kind, render
from tests.k8s.programs import definitions
from tests.k8s.readiness import is_ready

COMPONENT = K8S / "components" / "training-job"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:tuning"
MINE = frozenset(
    {
        "Namespace",
        "ServiceAccount",
        "Role",
        "RoleBinding",
        "ConfigMap",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
    }
)
SAID = '{"step": 1, "steps": 2}'
RESULT = '{"held_out_loss": 0.5, "seconds": 2.0, "probes": [[-0.1]]}'


@dataclass(frozen=True)
class Place:
    """A cluster with a GPU that trains, and the account of tuning as its pod would have it."""

    cluster: Cluster
    account: Path
    manifests: dict[str, Object]

    def trainer(self, kind: str = "job.yaml") -> JobTrainer:
        job = self.manifests[kind]
        jobs = Jobs(job["apiVersion"], job["kind"], self.address(), self.account)
        return JobTrainer(job, jobs, "/models/model", poll_seconds=0.1, lag_seconds=1)

    def address(self) -> str:
        config = json.loads((self.cluster.folder / "kubeconfig").read_text())
        return str(config["clusters"][0]["cluster"]["server"])

    def pods(self, folder: Path) -> list[Object]:
        label = f"batch.kubernetes.io/job-name=training-{folder.name}"
        return list(self.cluster.get("pods", "-n", NAMESPACE, "-l", label))

    def say(self, pod: Object, **status: object) -> None:
        """Say of a pod what its node would, who says nothing of one that is deleted by now."""
        patch = json.dumps({"status": status})
        done = self.cluster.run(
            *("patch", "pod", name(pod), "-n", NAMESPACE),
            *("--subresource=status", "--type=merge", "-p", patch),
        )
        assert not done.returncode or "NotFound" in done.stderr, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("training")
    (folder / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "resources": [_within(K8S / "overlays" / "gpu", folder)],
                "components": [_within(COMPONENT, folder)],
            }
        )
    )
    objects = render(folder)
    claim = [each for each in of_kind(objects, "PersistentVolumeClaim") if name(each) == "tuning"]
    [shipped] = [each for each in of_kind(objects, "ConfigMap") if "job.yaml" in each["data"]]
    with running((Node("node-a", "a"), Node("gpu-a", "a", gpus=1))) as cluster:
        for file in definitions():
            cluster.kubectl("create", "-f", str(file))
        cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=120s")
        cluster.apply([each for each in objects if each["kind"] in MINE] + claim)
        account = folder / "account"
        account.mkdir()
        shutil.copy(cluster.folder / "certs" / "apiserver.crt", account / "ca.crt")
        (account / "namespace").write_text(NAMESPACE)
        token = cluster.kubectl("create", "token", "tuning", "-n", NAMESPACE)
        (account / "token").write_text(token.strip())
        manifests = {key: yaml.safe_load(text) for key, text in shipped["data"].items()}
        yield Place(cluster, account, manifests)


def _within(part: Path, folder: Path) -> str:
    return os.path.relpath(part, folder.resolve())


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    made = tmp_path / "tuning" / "jobs" / f"{abs(hash(request.node.name)):032x}"
    made.mkdir(parents=True)
    return made


def script(folder: Path, *lines: str) -> None:
    (folder / "training.jsonl").write_text("\n".join(lines))


def run(pod: Object, volume: Path) -> "subprocess.Popen[bytes]":
    [container] = pod["spec"]["containers"]
    return pod_process(container, volume)


async def started(place: Place, folder: Path) -> Object:
    """Wait until the pod of a training runs, as the cluster says."""

    def runs() -> Object | None:
        return next((pod for pod in place.pods(folder) if is_ready(pod)), None)

    return await asyncio.to_thread(until, runs, 120, "a pod that trains")


async def test_a_training_runs_on_a_gpu_by_the_account_of_tuning(
    place: Place, folder: Path, tmp_path: Path
) -> None:
    script(folder, f"say {SAID}", f"result {RESULT}")
    async with aclosing(place.trainer().train(folder, Options())) as news:
        first = asyncio.create_task(anext(news))
        pod = await started(place, folder)
        assert pod["spec"]["nodeName"] == "gpu-a"
        assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        process = run(pod, tmp_path)
        assert await asyncio.to_thread(process.wait, 120) == 0
        place.say(pod, phase="Succeeded")
        items = [await first, *[item async for item in news]]
    assert items[-1] == Trained(0.5, 2.0, [[-0.1]])
    assert place.pods(folder) == []
    assert place.cluster.get("jobs", "-n", NAMESPACE) == []


async def test_closing_deletes_the_job_and_its_pods(place: Place, folder: Path) -> None:
    following = asyncio.create_task(anext(place.trainer().train(folder, Options())))
    await started(place, folder)
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following
    assert place.pods(folder) == []
    assert place.cluster.get("jobs", "-n", NAMESPACE) == []


async def test_a_service_that_comes_back_follows_what_runs(
    place: Place, folder: Path, tmp_path: Path
) -> None:
    script(folder, f"say {SAID}", "wait")
    first = place.trainer()
    news = first.train(folder, Options())
    said = asyncio.create_task(anext(news))
    pod = await started(place, folder)
    process = run(pod, tmp_path)
    assert await said == Progress(1, 2)
    first.leave()
    await news.aclose()
    async with aclosing(place.trainer().train(folder, Options())) as again:
        assert await anext(again) == Progress(1, 2)
        assert [name(each) for each in place.pods(folder)] == [name(pod)]
        process.terminate()
        process.wait()
        (folder / "result.json").write_text(RESULT)
        assert await anext(again) == Trained(0.5, 2.0, [[-0.1]])
    assert place.pods(folder) == []


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({"reason": "Evicted"}, "TRAINER_DIED"),
        (
            {
                "containerStatuses": [
                    {
                        "name": "training",
                        "image": "training",
                        "imageID": "",
                        "ready": False,
                        "restartCount": 0,
                        "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
                    }
                ]
            },
            "OUT_OF_MEMORY",
        ),
    ],
)
async def test_a_pod_that_fails_is_not_started_again_by_the_cluster(
    place: Place, folder: Path, status: Object, reason: str
) -> None:
    following = asyncio.create_task(anext(place.trainer().train(folder, Options())))
    pod = await started(place, folder)
    place.say(pod, phase="Failed", **status)
    with pytest.raises(TrainingFailed) as caught:
        await following
    assert caught.value.reason == reason
    assert place.pods(folder) == []


async def test_a_training_without_a_free_gpu_waits(
    place: Place, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = folder.with_name("f" * 32)
    other.mkdir()
    holding = asyncio.create_task(anext(place.trainer().train(other, Options())))
    await started(place, other)
    script(folder, f"say {SAID}", "wait")
    async with aclosing(place.trainer().train(folder, Options())) as news:
        said = asyncio.create_task(anext(news))
        await asyncio.to_thread(
            until, lambda: "Insufficient nvidia.com/gpu" in caplog.text, 120, "a line in the log"
        )
        holding.cancel()
        process = run(await started(place, folder), tmp_path)
        assert await said == Progress(1, 2)
        process.terminate()


@pytest.mark.parametrize(
    ("may", "verb", "what"),
    [
        *((True, verb, "jobs.batch") for verb in ("create", "get", "delete")),
        *((True, verb, "trainjobs.trainer.kubeflow.org") for verb in ("create", "get", "delete")),
        (True, "list", "pods"),
        *((False, verb, "jobs.batch") for verb in ("list", "watch", "patch", "deletecollection")),
        *((False, verb, "pods") for verb in ("get", "create", "delete", "patch")),
        (False, "create", "pods/exec"),
        (False, "get", "pods/log"),
        *((False, verb, "secrets") for verb in ("get", "list")),
        *((False, "get", what) for what in ("configmaps", "nodes", "deployments.apps")),
        (False, "create", "roles.rbac.authorization.k8s.io"),
    ],
)
def test_the_account_may_do_what_training_takes_and_nothing_else(
    place: Place, may: bool, verb: str, what: str
) -> None:
    answer = place.cluster.run("auth", "can-i", verb, what, "--as", ACCOUNT, "-n", NAMESPACE)
    assert answer.stdout.strip() == ("yes" if may else "no")
    elsewhere = place.cluster.run("auth", "can-i", verb, what, "--as", ACCOUNT, "-n", "default")
    assert elsewhere.stdout.strip() == "no"


def _pod(job: Object) -> Object:
    return dict(job["spec"]["template"]["spec"])


SECRET: Object = {"name": "a", "secret": {"secretName": "weaviate-key"}}
CLAIM: Object = {"name": "a", "persistentVolumeClaim": {"claimName": "evaluation"}}
FROM: Object = {"name": "A", "valueFrom": {"secretKeyRef": {"name": "weaviate-key", "key": "key"}}}
SOURCE: Object = {"secretRef": {"name": "weaviate-key"}}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("job.yaml", lambda job: _pod(job)["volumes"].append(SECRET)),
        ("job.yaml", lambda job: _pod(job)["volumes"].append(CLAIM)),
        ("job.yaml", lambda job: _pod(job)["containers"][0].update(env=[FROM])),
        ("job.yaml", lambda job: _pod(job)["initContainers"][0].update(envFrom=[SOURCE])),
        (
            "job.yaml",
            lambda job: job["spec"]["template"]["spec"].update(serviceAccountName="tuning"),
        ),
        (
            "job.yaml",
            lambda job: job["spec"]["template"]["spec"].pop("automountServiceAccountToken"),
        ),
        ("trainjob.yaml", lambda job: job["spec"]["trainer"].update(env=[FROM])),
        ("trainjob.yaml", lambda job: job["spec"].update(runtimePatches=[{"manager": "a/b"}])),
        ("trainjob.yaml", lambda job: job["spec"]["runtimeRef"].update(name="other")),
    ],
)
def test_a_training_cannot_have_what_other_services_have(
    place: Place, kind: str, change: Callable[[Object], object]
) -> None:
    job = filled(place.manifests[kind], "training-a", "a")
    create = ("create", "--dry-run=server", "--as", ACCOUNT, "-n", NAMESPACE, "-f", "-")
    place.cluster.kubectl(*create, given=json.dumps(job))
    change(job)

    def refused() -> bool:  # a policy holds a moment after it was made
        return "tworoads-train" in place.cluster.run(*create, given=json.dumps(job)).stderr

    until(refused, 120, "a refusal")


def test_the_trainjob_and_its_runtime_are_as_kubeflow_defines_them(place: Place) -> None:
    runtime = yaml.safe_load((COMPONENT / "runtime.yaml").read_text())
    job = filled(place.manifests["trainjob.yaml"], "training-a", "a")
    job["metadata"]["namespace"] = NAMESPACE
    place.cluster.apply([runtime, job])
    [made] = place.cluster.get("trainjobs.trainer.kubeflow.org", "-n", NAMESPACE)
    assert made["spec"]["trainer"]["env"] == [{"name": "JOB", "value": "a"}]
    place.cluster.kubectl("delete", "trainjob", "--all", "-n", NAMESPACE)


async def test_a_trainjob_is_created_followed_and_deleted(place: Place, folder: Path) -> None:

    def there() -> list[Object]:
        return list(place.cluster.get("trainjobs.trainer.kubeflow.org", "-n", NAMESPACE))

    async with aclosing(place.trainer("trainjob.yaml").train(folder, Options())) as news:
        said = asyncio.create_task(anext(news))
        [job] = await asyncio.to_thread(until, there, 120, "a TrainJob")
        assert name(job) == f"training-{folder.name}"
        (folder / "news.json").write_text(SAID)
        assert await said == Progress(1, 2)
    assert there() == []


def test_the_runtime_runs_the_pod_of_the_job(place: Place) -> None:
    runtime = yaml.safe_load((COMPONENT / "runtime.yaml").read_text())
    [replicated] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    theirs = replicated["template"]["spec"]["template"]
    ours = place.manifests["job.yaml"]["spec"]["template"]
    [node] = theirs["spec"]["containers"]
    [container] = ours["spec"]["containers"]
    wanted = place.manifests["trainjob.yaml"]["spec"]["trainer"]["resourcesPerNode"]
    assert {**node, "name": "training", "resources": wanted} == container
    assert {**theirs["spec"], "containers": []} == {**ours["spec"], "containers": []}
    assert theirs["metadata"] == ours["metadata"]
