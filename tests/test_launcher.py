"""Training by a job of the cluster: started, followed, ended, and what goes wrong on the way."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import yaml
from tworoads.v1 import tuning_pb2 as pb

from services.tuning.__main__ import launcher_of
from services.tuning.job import Options, Progress
from services.tuning.settings import Settings
from services.tuning.training.cluster import Away, Cluster
from services.tuning.training.launcher import JobTrainer, filled, judged, open_launcher
from services.tuning.training.trainer import (
    LOG_BYTES,
    LOG_TAIL_BYTES,
    Trained,
    TrainingFailed,
    read_plan,
)
from tests.fake_cluster import ROOT, FakeCluster
from tests.k8s.manifests import selects
from tests.manifests import problems, render
from tests.small_tuning import created, small_tuning
from tests.small_tuning import ended as job_that_ended
from tests.test_trainer import gone

COMPONENT = ROOT / "k8s" / "components" / "training-job"
JOB = yaml.safe_load((COMPONENT / "job.yaml").read_text())
TRAIN_JOB = yaml.safe_load((COMPONENT / "trainjob.yaml").read_text())
ID = "0123456789abcdef0123456789abcdef"
NAME = f"training-{ID}"
RESULT = 'result {"held_out_loss": 0.5, "seconds": 2.0, "probes": [[-0.1, -0.2]]}'
SAID = '{"step": 1, "steps": 2, "loss": 3.5, "tokens_per_second": 10.0, "seconds_left": 4.0}'
PROGRESS = Progress(1, 2, 3.5, None, 10.0, 4.0)
TRAINED = Trained(0.5, 2.0, [[-0.1, -0.2]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tuning" / "jobs" / ID
    made.mkdir(parents=True)
    return made


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[FakeCluster]:
    with FakeCluster(tmp_path, tmp_path / "account") as running:
        yield running


@pytest.fixture
def podless(tmp_path: Path) -> Iterator[FakeCluster]:
    """A cluster in which no pod ever runs."""
    with FakeCluster(tmp_path, tmp_path / "account", plays=False) as running:
        yield running


def trainer_of(cluster: FakeCluster, **options: float) -> JobTrainer:
    reached = Cluster("batch/v1", "Job", cluster.address, cluster.account)
    times = {"poll_seconds": 0.02, "lag_seconds": 0.1, "start_seconds": 0.1, **options}
    return JobTrainer(JOB, reached, "/models/model", "float32", 1, **times)


def script(folder: Path, *lines: str) -> None:
    (folder / "training.jsonl").write_text("\n".join(lines))


async def news_of(trainer: JobTrainer, folder: Path) -> list[Progress | Trained]:
    async with asyncio.timeout(20), aclosing(trainer.train(folder, Options())) as news:
        return [item async for item in news]


async def failure_of(trainer: JobTrainer, folder: Path) -> TrainingFailed:
    with pytest.raises(TrainingFailed) as caught:
        await news_of(trainer, folder)
    return caught.value


async def until(is_true: Callable[[], Any]) -> Any:
    async with asyncio.timeout(20):
        while not (answer := is_true()):
            await asyncio.sleep(0.01)
        return answer


async def test_progress_and_the_result_come_from_the_pod(
    cluster: FakeCluster, folder: Path
) -> None:
    script(folder, "log words", f"say {SAID}", "wait")
    async with aclosing(trainer_of(cluster).train(folder, Options(rank=8, seed=3))) as news:
        assert await anext(news) == PROGRESS
        plan, taken = read_plan(folder)
        assert taken == Options(rank=8, seed=3)
        assert (plan["model"], plan["dtype"], plan["threads"]) == ("/models/model", "float32", 1)
        assert (folder / "log").read_text() == "words\n"
        (folder / "result.json").write_text(RESULT.partition(" ")[2])
        assert await anext(news) == TRAINED
    assert cluster.jobs == {}


async def test_a_training_that_ends_at_once_is_not_missed(
    cluster: FakeCluster, folder: Path
) -> None:
    script(folder, RESULT)
    assert (await news_of(trainer_of(cluster), folder))[-1] == TRAINED
    assert cluster.jobs == {}


async def test_a_result_that_nobody_took_is_not_trained_again(
    cluster: FakeCluster, folder: Path
) -> None:
    (folder / "result.json").write_text(RESULT.partition(" ")[2])
    assert await news_of(trainer_of(cluster), folder) == [TRAINED]
    assert cluster.created == []


@pytest.mark.parametrize(
    ("lines", "reason", "message"),
    [
        (["exit 3"], "TRAINER_DIED", "status 3"),
        (["kill"], "TRAINER_DIED", "SIGKILL"),
        (["say nonsense", "wait"], "TRAINER_DIED", "understands"),
        (['say {"reason": "STORE_FULL", "message": "full"}', "exit 1"], "STORE_FULL", "full"),
        (['say {"reason": "LOSS_NOT_FINITE", "message": "nan"}', "exit 1"], "LOSS_NOT_FINITE", ""),
    ],
)
async def test_why_a_pod_fails_comes_with_the_end_of_its_log(
    cluster: FakeCluster, folder: Path, lines: list[str], reason: str, message: str
) -> None:
    script(folder, "flood 20000", "log last words", *lines)
    failed = await failure_of(trainer_of(cluster), folder)
    assert (failed.reason, message in failed.message) == (reason, True)
    assert failed.log_tail.strip("x\n") in ("last words", "")  # it may be killed before all is read
    assert len(failed.log_tail.encode()) <= LOG_TAIL_BYTES
    assert (folder / "log").stat().st_size <= LOG_BYTES
    assert cluster.jobs == {}  # so the next attempt has the folder for itself


@pytest.mark.parametrize("content", ["[]", "nothing", '{"stepp": 1}', '{"reason": 1, "x": 2}'])
async def test_news_that_nobody_understands_fail(
    podless: FakeCluster, folder: Path, content: str
) -> None:
    following = asyncio.create_task(failure_of(trainer_of(podless), folder))
    await until(lambda: podless.created)
    (folder / "news.json").write_text(content)
    failed = await following
    assert (failed.reason, "understands" in failed.message) == ("TRAINER_DIED", True)


def ended(reason: str) -> dict[str, Any]:
    return {"containerStatuses": [{"state": {"terminated": {"reason": reason}}}]}


@pytest.mark.parametrize(
    ("condition", "status", "reason", "message"),
    [
        ("Failed", ended("OOMKilled"), "OUT_OF_MEMORY", "too little memory"),
        ("Failed", {"reason": "Evicted"}, "TRAINER_DIED", "Evicted"),
        ("Failed", ended("Error"), "TRAINER_DIED", "without a result"),
        ("Complete", ended("Completed"), "TRAINER_DIED", "without a result"),
    ],
)
async def test_a_pod_that_is_ended_from_outside_fails_with_a_reason(
    podless: FakeCluster,
    folder: Path,
    condition: str,
    status: dict[str, Any],
    reason: str,
    message: str,
) -> None:
    (folder / "log").write_text("last words")
    following = asyncio.create_task(failure_of(trainer_of(podless), folder))
    await until(lambda: podless.created)
    podless.finish(NAME, condition, **status)
    failed = await following
    assert (failed.reason, failed.log_tail) == (reason, "last words")
    assert message in failed.message
    assert podless.jobs == {}


async def test_a_job_that_somebody_deletes_fails(podless: FakeCluster, folder: Path) -> None:
    following = asyncio.create_task(failure_of(trainer_of(podless), folder))
    await until(lambda: podless.created)
    podless.jobs.clear()
    podless.pods.clear()
    failed = await following
    assert (failed.reason, "deleted" in failed.message) == ("TRAINER_DIED", True)


async def test_a_result_that_a_volume_shows_late_counts(podless: FakeCluster, folder: Path) -> None:
    trainer = trainer_of(podless, lag_seconds=20)
    following = asyncio.create_task(news_of(trainer, folder))
    await until(lambda: podless.created)
    podless.finish(NAME, "Complete")
    seen = len(podless.calls)
    await until(lambda: len(podless.calls) > seen + 4)
    (folder / "result.json").write_text(RESULT.partition(" ")[2])
    assert await following == [TRAINED]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422])
async def test_a_job_that_the_cluster_refuses_fails_and_says_nothing_of_the_inside(
    podless: FakeCluster, folder: Path, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    podless.answers["POST"] = status
    failed = await failure_of(trainer_of(podless), folder)
    assert failed.reason == "LAUNCH_FAILED"
    assert "inside" not in failed.message
    assert "inside" in caplog.text or status == 404


async def test_a_pod_that_cannot_start_fails_after_a_while(
    podless: FakeCluster, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    following = asyncio.create_task(failure_of(trainer_of(podless), folder))
    await until(lambda: podless.created)
    waiting = {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}
    podless.pods[NAME] = {"status": {"initContainerStatuses": [{"state": waiting}]}}
    assert (await following).reason == "LAUNCH_FAILED"
    assert "ErrImagePull" in caplog.text


async def test_a_pod_without_a_node_waits_and_the_log_says_so_once(
    podless: FakeCluster, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    following = asyncio.create_task(news_of(trainer_of(podless), folder))
    await until(lambda: podless.created)
    condition = {"type": "PodScheduled", "status": "False", "message": "too few GPUs"}
    podless.pods[NAME] = {"status": {"conditions": [condition]}}
    seen = len(podless.calls)
    await until(lambda: len(podless.calls) > seen + 20)
    assert not following.done()
    podless.pods[NAME] = {"status": {}}
    (folder / "result.json").write_text(RESULT.partition(" ")[2])
    assert await following == [TRAINED]
    assert caplog.text.count("too few GPUs") == 1


async def test_an_api_server_that_is_away_does_not_hold_what_runs(
    cluster: FakeCluster, folder: Path
) -> None:
    script(folder, f"say {SAID}", "wait")
    async with aclosing(trainer_of(cluster).train(folder, Options())) as news:
        assert await anext(news) == PROGRESS
        cluster.answers = {"GET": 503, "DELETE": 503}
        (folder / "news.json").write_text('{"step": 2, "steps": 2}')
        assert await anext(news) == Progress(2, 2)
        (folder / "result.json").write_text(RESULT.partition(" ")[2])
        last = asyncio.create_task(anext(news))
        await until(lambda: f"DELETE jobs {NAME}" in cluster.calls)
        assert not last.done()  # the pod may write still
        cluster.answers = {}
        assert await last == TRAINED


async def test_an_api_server_that_is_away_at_first_is_asked_again(
    cluster: FakeCluster, folder: Path
) -> None:
    script(folder, RESULT)
    cluster.answers["POST"] = 429
    following = asyncio.create_task(news_of(trainer_of(cluster), folder))
    await until(lambda: cluster.calls.count("POST jobs") == 2)
    cluster.answers = {}
    assert (await following)[-1] == TRAINED
    assert len(cluster.created) == 1


async def test_closing_ends_the_pod_and_waits_until_it_is_gone(
    cluster: FakeCluster, folder: Path
) -> None:
    script(folder, "pid", "wait")
    news = trainer_of(cluster).train(folder, Options())
    item = await anext(news)
    assert isinstance(item, Progress)
    cluster.held = True
    closing = asyncio.create_task(news.aclose())
    await until(lambda: f"DELETE jobs {NAME}" in cluster.calls)
    seen = len(cluster.calls)
    await until(lambda: len(cluster.calls) > seen + 2)
    assert not closing.done()
    cluster.released()
    await until(closing.done)
    assert gone(item.step)


async def test_cancelling_deletes_the_job(podless: FakeCluster, folder: Path) -> None:
    following = asyncio.create_task(news_of(trainer_of(podless), folder))
    await until(lambda: podless.jobs)
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following
    assert podless.jobs == {}


async def test_a_job_that_is_being_deleted_is_waited_for(
    podless: FakeCluster, folder: Path
) -> None:
    podless.jobs[NAME] = {"metadata": {"deletionTimestamp": "now"}}
    podless.pods[NAME] = {}
    following = asyncio.create_task(news_of(trainer_of(podless), folder))
    await until(lambda: len(podless.calls) > 3)
    assert podless.created == []
    podless.released()
    await until(lambda: podless.created)
    (folder / "result.json").write_text(RESULT.partition(" ")[2])
    assert await following == [TRAINED]


@pytest.mark.parametrize("graceful", [True, False])
async def test_the_next_service_goes_on_with_what_runs(
    cluster: FakeCluster, folder: Path, graceful: bool
) -> None:
    script(folder, f"say {SAID}", "wait")
    first = trainer_of(cluster)
    news = first.train(folder, Options())
    assert await anext(news) == PROGRESS
    if graceful:
        first.leave()
        await news.aclose()
    async with aclosing(trainer_of(cluster).train(folder, Options())) as again:
        assert await anext(again) == PROGRESS
        (folder / "result.json").write_text(RESULT.partition(" ")[2])
        assert await anext(again) == TRAINED
    assert len(cluster.created) == 1
    await news.aclose()


async def test_what_fails_while_the_service_stops_is_not_left(
    cluster: FakeCluster, folder: Path
) -> None:
    script(folder, "exit 3")
    trainer = trainer_of(cluster)
    trainer.leave()
    await failure_of(trainer, folder)
    assert cluster.jobs == {}


async def test_old_news_do_not_count_for_a_new_attempt(cluster: FakeCluster, folder: Path) -> None:
    (folder / "news.json").write_text('{"reason": "TRAINER_DIED", "message": "before"}')
    script(folder, RESULT)
    assert (await news_of(trainer_of(cluster), folder))[-1] == TRAINED


async def test_a_token_that_changes_is_taken_at_the_next_call(
    podless: FakeCluster, folder: Path
) -> None:
    following = asyncio.create_task(news_of(trainer_of(podless), folder))
    await until(lambda: podless.created)
    (podless.account / "token").write_text("second")
    await until(lambda: "Bearer second" in podless.tokens)
    (folder / "result.json").write_text(RESULT.partition(" ")[2])
    await following
    assert set(podless.tokens) == {"Bearer first", "Bearer second"}


async def test_a_job_outlives_the_service_unless_it_is_cancelled(
    podless: FakeCluster, tmp_path: Path
) -> None:
    first = trainer_of(podless)
    async with small_tuning(tmp_path / "tuning", first) as stack:
        job = await created(stack.stub)
        await until(lambda: podless.created)
        first.leave()
    async with small_tuning(tmp_path / "tuning", trainer_of(podless)) as stack:
        folder = stack.folder / "jobs" / job.id
        (folder / "news.json").write_text(SAID)
        async for event in stack.stub.WatchJob(pb.WatchJobRequest(id=job.id)):
            if event.HasField("progress"):
                break
        assert (event.progress.step, event.progress.steps) == (1, 2)
        assert len(podless.created) == 1
        await stack.stub.CancelJob(pb.CancelJobRequest(id=job.id))
        await until(lambda: not folder.exists())
        assert podless.jobs == {}


@pytest.mark.parametrize(
    ("fails", "reason", "attempts"), [("OOMKilled", "OUT_OF_MEMORY", 3), ("", "LAUNCH_FAILED", 0)]
)
async def test_what_may_go_well_the_next_time_is_launched_again(
    podless: FakeCluster, tmp_path: Path, fails: str, reason: str, attempts: int
) -> None:
    if not fails:
        podless.answers["POST"] = 403
    async with small_tuning(tmp_path / "tuning", trainer_of(podless)) as stack:
        id = (await created(stack.stub)).id
        for attempt in range(attempts):
            await until(lambda: len(podless.created) > attempt)  # noqa: B023
            podless.finish(f"training-{id}", "Failed", **ended(fails))
        job = await job_that_ended(stack.stub, id)
    assert (job.state, job.reason) == (pb.JOB_STATE_FAILED, reason)
    assert job.restarts == max(0, attempts - 1)
    assert len(podless.created) == attempts


@pytest.mark.parametrize("lost", ["token", "ca.crt", "server"])
async def test_what_cannot_be_asked_is_away(podless: FakeCluster, lost: str) -> None:
    address = "https://127.0.0.1:1" if lost == "server" else podless.address
    cluster = Cluster("batch/v1", "Job", address, podless.account)
    if lost != "server":
        (podless.account / lost).unlink()
    with pytest.raises(Away):
        await cluster.get(NAME)


def started(folder: Path) -> "subprocess.Popen[bytes]":
    plan = {"model": "/models/model", "dtype": "float32", "threads": 1, "checkpoint_seconds": 60}
    options = {"targets": []}
    (folder / "plan.json").write_text(json.dumps({**plan, "options": options}))
    command = [sys.executable, "-P", "-m", "services.tuning.training.pod", str(folder)]
    return subprocess.Popen(
        [*command, "tests.fake_trainer"],
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        stderr=subprocess.DEVNULL,
    )


async def test_a_pod_that_is_told_to_end_does_so_with_all_that_it_started(folder: Path) -> None:
    script(folder, "pid", "wait")
    process = started(folder)
    await until((folder / "news.json").exists)
    pid = json.loads((folder / "news.json").read_text())["step"]
    process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(process.wait, 10) == 128 + signal.SIGTERM
    assert gone(pid)


async def test_a_pod_ends_when_its_folder_is_removed(folder: Path) -> None:
    script(folder, f"say {SAID}", "read", f"say {SAID}", "wait")
    os.mkfifo(folder / "go")
    process = started(folder)
    await until((folder / "news.json").exists)
    gate = os.open(folder / "go", os.O_RDWR)
    folder.rename(folder.with_name("away"))
    os.write(gate, b"\n")
    assert await asyncio.to_thread(process.wait, 10) == 1
    os.close(gate)


RUNNING = {"conditions": [{"type": "PodScheduled", "status": "True"}]}
FAILED = {"status": {"conditions": [{"type": "Failed", "status": "True"}]}}


@pytest.mark.parametrize(
    ("job", "statuses", "expected"),
    [
        ({}, [RUNNING], ("", "")),
        ({}, [], ("waits", "it has no pod yet")),
        (
            {"status": {"conditions": [{"type": "Suspended", "status": "True"}]}},
            [RUNNING],
            ("", ""),
        ),
        ({"status": {"conditions": [{"type": "Failed", "status": "False"}]}}, [RUNNING], ("", "")),
        (FAILED, [], ("ended", "without a result")),
        (FAILED, [{"reason": "NodeLost"}], ("ended", "NodeLost")),
        (FAILED, [ended("ContainerCannotRun")], ("ended", "ContainerCannotRun")),
        (FAILED, [{**ended("OOMKilled"), "reason": "Evicted"}], ("ended", "OOMKilled")),
        (None, [], ("ended", "deleted")),
    ],
)
def test_how_a_job_is_follows_from_its_pods(
    job: Any, statuses: list[Any], expected: tuple[str, str]
) -> None:
    assert judged(job, [{"status": status} for status in statuses]) == expected


@pytest.mark.parametrize("manifest", [JOB, TRAIN_JOB], ids=["Job", "TrainJob"])
def test_only_the_name_a_label_and_a_variable_are_filled_in(manifest: Any) -> None:
    job = filled(manifest, NAME, ID)
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?", job["metadata"].pop("name"))
    assert job["metadata"]["labels"].pop("app.kubernetes.io/instance") == ID
    spec = job["spec"]
    node = spec["trainer"] if "trainer" in spec else spec["template"]["spec"]["containers"][0]
    assert node.pop("env") == [{"name": "JOB", "value": ID}]
    assert job == manifest


def test_what_the_manifest_has_stays_beside_what_is_filled_in() -> None:
    manifest = yaml.safe_load((COMPONENT / "trainjob.yaml").read_text())
    manifest["spec"]["trainer"]["env"] = [{"name": "A", "value": "b"}]
    names = [one["name"] for one in filled(manifest, NAME, ID)["spec"]["trainer"]["env"]]
    assert names == ["A", "JOB"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "- a list",
        "a: [",
        "kind: Job",
        "{apiVersion: batch/v1, kind: Job, spec: {}}",
        "{apiVersion: batch/v1, kind: CronJob, spec: {}}",
        "{apiVersion: v1, kind: TrainJob, spec: {}}",
    ],
)
def test_a_manifest_that_is_no_job_is_refused_at_the_start(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    (tmp_path / "job.yaml").write_text(content)
    with pytest.raises(ValueError):
        open_launcher(tmp_path / "job.yaml", Path("model"), "auto", 0)


def test_outside_a_cluster_nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ValueError, match="KUBERNETES_SERVICE_HOST"):
        open_launcher(COMPONENT / "job.yaml", Path("model"), "auto", 0)


@pytest.mark.parametrize(("manifest", "gpu"), [(JOB, True), (TRAIN_JOB, True), ({}, False)])
def test_a_manifest_that_asks_for_a_gpu_may_train_in_4_bits(
    podless: FakeCluster, manifest: Any, gpu: bool
) -> None:
    cluster = Cluster("batch/v1", "Job", podless.address, podless.account)
    assert JobTrainer(manifest, cluster, "model").gpu is gpu


def test_a_launcher_that_cannot_be_used_ends_the_service(tmp_path: Path) -> None:
    settings = Settings(model=tmp_path, launcher=tmp_path / "job.yaml")
    with pytest.raises(SystemExit, match="job.yaml"):
        launcher_of(settings)
    assert launcher_of(Settings(model=tmp_path)) is None


@pytest.fixture(scope="module")
def installed() -> list[Any]:
    return render("overlays/gpu", "components/training-job")


def named(objects: list[Any], kind: str, name: str) -> Any:
    [found] = [x for x in objects if (x["kind"], x["metadata"]["name"]) == (kind, name)]
    return found


def test_the_job_is_valid_and_its_images_are_those_of_the_overlay(installed: list[Any]) -> None:
    job = filled(JOB, NAME, ID)
    assert list(problems([job])) == []
    pod = named(installed, "Deployment", "tuning")["spec"]["template"]["spec"]
    ours, theirs = (
        {each["image"] for each in (*spec["initContainers"], *spec["containers"])}
        for spec in (job["spec"]["template"]["spec"], pod)
    )
    assert ours == theirs


def test_tuning_finds_its_launcher_and_the_pod_its_folder(
    installed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = named(installed, "Deployment", "tuning")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    for one in container["env"]:
        monkeypatch.setenv(one["name"], one["value"])
    settings = Settings()  # type: ignore[call-arg]
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    [config] = [one["configMap"] for one in pod["volumes"] if one["name"] == "launcher"]
    assert settings.launcher is not None
    assert str(settings.launcher.parent) == mounts["launcher"]
    assert settings.launcher.name in named(installed, "ConfigMap", config["name"])["data"]
    [data] = [one for one in pod["volumes"] if one["name"] == "data"]
    spec = JOB["spec"]["template"]["spec"]
    assert data in spec["volumes"]
    [trainer] = spec["containers"]
    [mount] = [one for one in trainer["volumeMounts"] if one["name"] == "data"]
    jobs = settings.folder.relative_to(mounts["data"]) / "jobs"
    assert (mount["mountPath"], mount["subPathExpr"]) == (trainer["args"][0], f"{jobs}/$(JOB)")
    assert any(one["mountPath"] == str(settings.model.parent) for one in trainer["volumeMounts"])


def test_what_trains_has_no_network_and_tuning_no_gpu(installed: list[Any]) -> None:
    labels = JOB["spec"]["template"]["metadata"]["labels"]
    for policy in (each for each in installed if each["kind"] == "NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        if "Egress" in policy["spec"]["policyTypes"] and selects(selector, labels):
            assert policy["metadata"]["name"] == "default-deny"
            assert not policy["spec"].get("egress")
    tuning = named(installed, "Deployment", "tuning")["spec"]["template"]["spec"]
    assert "gpu" not in json.dumps(
        [tuning["containers"][0]["resources"], tuning.get("tolerations")]
    )
    assert "nodeSelector" not in tuning
