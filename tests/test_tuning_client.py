"""The Python client's jobs and adapters, against a gateway with a fake tuning service."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from grpc import StatusCode
from tworoads.v1 import tuning_pb2 as pb

import clients.streams
from clients.client import Client, TworoadsError
from clients.files import FileError
from clients.jobs import CheckProgress, Finding, Job, JobProgress
from services.runtime.errors import NotReady, Unavailable
from tests.fake_training import LOSSES, FakeTraining
from tests.fake_tuning import CONFIG, WEIGHTS
from tests.small_stack import small_stack

LINES = b'{"question": "a", "answer": "b"}\n' * 50_000
REPEATED = pb.DataFinding(
    file=pb.UPLOADED_FILE_EXAMPLES,
    line=7,
    severity=pb.FINDING_SEVERITY_LEFT_OUT,
    reason="DUPLICATE",
    message="this line says what line 3 says",
    other_line=3,
)


@pytest.fixture
async def tuning() -> FakeTraining:
    return FakeTraining()


@pytest.fixture
async def client(tuning, tmp_path) -> AsyncIterator[Client]:
    async with small_stack(tmp_path / "store", tuning) as stack, Client(stack.address) as opened:
        yield opened


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "examples.jsonl").write_bytes(LINES)
    return tmp_path / "examples.jsonl"


@pytest.fixture
def peft(tmp_path) -> Path:
    """A folder as peft saves an adapter into it, with what else it may hold."""
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 5000)
    (folder / CONFIG).write_text('{"r": 8}')
    (folder / "README.md").write_text("---\nbase_model: tiny\n---\n")
    return folder


async def created(client: Client, *arguments, **options) -> list[Finding | CheckProgress | Job]:
    return [news async for news in client.create_job("style", *arguments, **options)]


async def watched(client: Client, *arguments) -> list[int]:
    return [event.sequence async for event in client.watch_job(*arguments)]


async def test_a_file_becomes_a_job_and_what_the_check_finds_comes_first(tuning, client, file):
    tuning.findings = [REPEATED]
    news = await created(
        client, file, questions=[b"one\n", b"two\n"], corpus="c", context="mixed", epochs=2, seed=0
    )
    message = "this line says what line 3 says"
    assert news[0] == Finding("examples", 7, "left_out", "DUPLICATE", message, 3)
    assert news[-2] == CheckProgress(received=50_000, checked=50_000)
    job = news[-1]
    assert (job.name, job.state, job.jobs_ahead) == ("style", "queued", 2)
    assert (job.options.context, job.options.rank, job.options.epochs) == ("mixed", 16, 2)
    assert (job.data.examples, job.data.overlap, job.progress, job.started) == (10, None) + (
        None,
    ) * 2
    (upload,) = tuning.uploads
    assert (upload.examples, upload.questions) == (LINES, b"one\ntwo\n")
    assert 0 < upload.largest <= 2**20
    assert upload.start.corpus == "c" and upload.start.idempotency_key
    assert upload.start.options.HasField("seed")
    assert not upload.start.options.HasField("held_out_share")


async def test_a_file_is_sent_again_under_the_same_key_if_the_connection_breaks(
    tuning, client, file
):
    tuning.findings = [REPEATED]
    tuning.refusals = [Unavailable("STOPPING", "this replica stops")]
    news = await created(client, file)
    assert [type(item) for item in news if not isinstance(item, CheckProgress)] == [Finding, Job]
    first, second = tuning.uploads
    assert first.start == second.start and first.examples == second.examples == LINES
    assert len(tuning.events) == 1


async def test_what_can_be_read_only_once_is_sent_once(tuning, client):
    tuning.refusals = [Unavailable("STOPPING", "this replica stops")]
    with pytest.raises(TworoadsError) as error:
        await created(client, iter([LINES]))
    assert (error.value.code, error.value.reason) == (StatusCode.UNAVAILABLE, "TUNING_UNAVAILABLE")
    assert len(tuning.uploads) == 1


async def test_sending_again_has_an_end(tuning, client, monkeypatch):
    monkeypatch.setattr(clients.streams, "WAITS", (0.0,) * 10)
    tuning.refusals = [Unavailable("STOPPING", "this replica stops")] * 10
    with pytest.raises(TworoadsError):
        await created(client, LINES)
    assert len(tuning.uploads) == 3


async def test_what_reading_the_examples_raises_is_raised(client, tmp_path):
    def broken() -> Iterator[bytes]:
        yield LINES
        raise ValueError("the disk has gone")

    with pytest.raises(ValueError, match="the disk has gone"):
        await created(client, broken())
    with pytest.raises(FileError, match="cannot read .*absent: No such file or directory"):
        await created(client, tmp_path / "absent")


async def test_a_job_is_watched_to_its_end(tuning, client):
    job = (await created(client, LINES))[-1]
    events = [event async for event in client.watch_job(job.id)]
    assert [event.sequence for event in events] == list(range(1, 9))  # no heartbeat is an event
    states = [event.news.state for event in events if isinstance(event.news, Job)]
    assert states == ["queued", "training", "verifying", "ready"]
    progress = [event.news for event in events if isinstance(event.news, JobProgress)]
    assert [item.loss for item in progress] == list(LOSSES)
    assert (progress[0].held_out_loss, progress[1].held_out_loss) == (None, 2.0)
    assert await watched(client, job.id, 6) == [7, 8]
    last = events[-1].news
    assert last == await client.job(job.id)
    assert (last.ended - last.started).total_seconds() == 92


async def test_a_watch_that_breaks_goes_on_where_it_was(tuning, client):
    job = (await created(client, LINES))[-1]
    tuning.breaks = [3, 1, 0, 0, 2]
    assert await watched(client, job.id) == list(range(1, 9))
    assert tuning.watched == [0, 3, 4, 4, 4, 6]


async def test_a_watch_that_brings_nothing_any_more_ends(tuning, client, monkeypatch):
    monkeypatch.setattr(clients.streams, "WAITS", (0.0,) * 5)
    job = (await created(client, LINES))[-1]
    tuning.breaks = [3] + [0] * 100
    seen = []
    with pytest.raises(TworoadsError) as error:
        async for event in client.watch_job(job.id):
            seen.append(event.sequence)
    assert (seen, error.value.code) == ([1, 2, 3], StatusCode.UNAVAILABLE)
    assert tuning.watched == [0, 3, 3, 3, 3, 3]


async def test_a_job_that_is_left_goes_on_until_it_is_cancelled(tuning, client):
    tuning.held_after = 3
    job = (await created(client, LINES))[-1]
    async for event in client.watch_job(job.id):
        if event.sequence == 3:
            break
    assert (await client.job(job.id)).state == "training"
    assert (await client.cancel_job(job.id)).state == "cancelled"


async def test_all_pages_of_jobs_are_listed(client):
    ids = [(await created(client, LINES))[-1].id for _ in range(5)]
    assert [job.id for job in await client.jobs()] == ids[::-1]


async def test_an_adapter_is_a_plain_value(tuning, client):
    await created(client, LINES, context="retrieved", corpus="c")
    adapter = await client.adapter("style")
    assert adapter.id == f"style@{adapter.hash[:12]}" and adapter.state == "ready"
    assert (adapter.job, adapter.corpus, adapter.options.context) == ("job-0", "c", "retrieved")
    assert adapter.fidelity.trainer_difference == 0.003
    assert [(speed.streams, speed.base_tokens_per_second) for speed in adapter.speeds] == [
        (1, 25),
        (8, 200),
    ]
    assert [file.name for file in adapter.files] == [WEIGHTS, CONFIG]
    assert (adapter.served, adapter.accepted, adapter.accepted_by) == (True, None, "")
    assert await client.adapters() == [adapter]


async def test_an_adapter_is_downloaded_in_spite_of_breaks(tuning, client, tmp_path):
    tuning.chunk = 1000
    weights = bytes(range(256)) * 100
    added = tuning.add("style", files={WEIGHTS: weights, CONFIG: b"{}"})
    tuning.cuts = [10_000, 5_000]
    adapter = await client.download_adapter(added.id, tmp_path / "new")
    assert adapter.id == added.id
    assert [offset for _, offset in tuning.downloads] == [0, 10_000, 15_000]
    files = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert files == {WEIGHTS: weights, CONFIG: b"{}"}


@pytest.mark.parametrize("files", [{WEIGHTS: b"w", CONFIG: b"{}"}, {"../x": b"w", CONFIG: b"{}"}])
async def test_a_download_that_is_not_in_order_leaves_nothing(tuning, client, tmp_path, files):
    added = tuning.add("style", files=files)
    tuning.altered = WEIGHTS in files
    with pytest.raises(FileError, match="did not arrive as it was sent"):
        await client.download_adapter(added.id, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


async def test_a_download_never_writes_over_anything(tuning, client, tmp_path):
    added = tuning.add("style")
    with pytest.raises(FileError, match="is there already"):
        await client.download_adapter(added.id, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot write to .*: File exists"):
        await client.download_adapter(added.id, tmp_path / "file" / "new")
    await client.download_adapter(added.id, tmp_path / "a" / "new")
    assert {path.name for path in (tmp_path / "a" / "new").iterdir()} == {WEIGHTS, CONFIG}
    assert [offset for _, offset in tuning.downloads] == [0, 0]


async def test_an_adapter_that_peft_has_saved_is_imported(tuning, client, peft, file):
    adapter = await client.import_adapter(
        peft, "elsewhere", prompt_version="v1", context="none", examples=file
    )
    assert (adapter.name, adapter.state) == ("elsewhere", "unmeasured")
    (upload,) = tuning.uploads
    assert (upload.start.prompt_version, upload.start.base_model_hash) == ("v1", "")
    assert upload.start.options == pb.TrainingOptions(context=pb.TRAINING_CONTEXT_NONE)
    names = (WEIGHTS, CONFIG)
    assert upload.files == {name: (peft / name).read_bytes() for name in names}
    assert upload.examples == LINES and upload.largest <= 2**20


@pytest.mark.parametrize("lacks", [WEIGHTS, CONFIG])
async def test_a_folder_that_holds_no_adapter_is_refused(tuning, client, peft, lacks):
    (peft / lacks).unlink()
    with pytest.raises(FileError, match=f"is no adapter as peft saves it: {lacks}: No such file"):
        await client.import_adapter(peft, "elsewhere")
    assert tuning.uploads == []


async def test_an_unfaithful_adapter_is_served_once_it_is_accepted(tuning, client):
    tuning.ends = pb.JOB_STATE_UNFAITHFUL
    await created(client, LINES)
    adapter = await client.adapter("style")
    assert (adapter.served, adapter.reason) == (False, "LOG_PROBABILITIES_DIFFER")
    accepted = await client.accept_adapter(adapter.id)
    assert accepted.served and accepted.accepted_by == "default" and accepted.accepted
    await client.delete_adapter(adapter.id)
    assert await client.adapters() == []


@pytest.mark.parametrize(
    ("method", "arguments", "code", "reason"),
    [
        ("job", ["absent"], "NOT_FOUND", "JOB_NOT_FOUND"),
        ("cancel_job", ["absent"], "NOT_FOUND", "JOB_NOT_FOUND"),
        ("adapter", ["absent"], "NOT_FOUND", "ADAPTER_NOT_FOUND"),
        ("adapter", ["../x"], "INVALID_ARGUMENT", "ADAPTER_NAME_INVALID"),
        ("delete_adapter", ["absent@" + "0" * 12], "NOT_FOUND", "ADAPTER_NOT_FOUND"),
        ("accept_adapter", ["\udcff"], "INVALID_ARGUMENT", "NOT_TEXT"),
        ("download_adapter", ["a", Path("absent")], "NOT_FOUND", "ADAPTER_NOT_FOUND"),
    ],
)
async def test_what_is_refused_has_a_reason(client, method, arguments, code, reason):
    with pytest.raises(TworoadsError) as error:
        await getattr(client, method)(*arguments)
    assert (error.value.code, error.value.reason) == (StatusCode[code], reason)


async def test_a_watch_and_an_upload_that_are_refused_have_a_reason(tuning, client):
    with pytest.raises(TworoadsError) as error:
        await watched(client, "absent")
    assert error.value.reason == "JOB_NOT_FOUND"
    tuning.refusals = [NotReady("QUANTIZATION_NEEDS_GPU", "no GPU")]
    with pytest.raises(TworoadsError) as error:
        await created(client, LINES, quantized=True)
    assert error.value.reason == "QUANTIZATION_NEEDS_GPU"
