"""A tuning service whose jobs go as a test has written them down."""

import asyncio
import hashlib
from dataclasses import dataclass, field

from google.protobuf.timestamp_pb2 import Timestamp
from tworoads.v1 import tuning_pb2 as pb

from services.runtime.errors import InvalidInput, NotFound, NotReady, ServiceError, Unavailable
from tests.fake_tuning import CONFIG, WEIGHTS, FakeTuning

DATA = pb.DataReport(
    lines=12,
    examples=10,
    held_out=2,
    tokens=1234,
    answer_tokens=345,
    answer_tokens_min=3,
    answer_tokens_p50=30,
    answer_tokens_p95=60,
    answer_tokens_max=70,
    duplicates=2,
    hash="cd" * 32,
)
LOSSES = (2.0, 1.5, 1.25, 1.0)
PAGE = 2


@dataclass
class Uploaded:
    """What came of an upload: its start, and the files."""

    start: pb.CreateJobStart | pb.ImportAdapterStart
    examples: bytes = b""
    questions: bytes = b""
    largest: int = 0
    files: dict[str, bytes] = field(default_factory=dict)


class FakeTraining(FakeTuning):
    """Takes any examples, and has all events of a job ready once it is created.

    `findings` are sent of the next uploads, which fail if one is an error. `refusals` fail the next
    uploads when they are complete. `ends` is the last state of new jobs. `breaks` cuts each of the
    next watches after so many events, `held_after` lets every one wait for ever after so many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uploads: list[Uploaded] = []
        self.findings: list[pb.DataFinding] = []
        self.refusals: list[ServiceError] = []
        self.ends = pb.JOB_STATE_READY
        self.breaks: list[int] = []
        self.held_after: int | None = None
        self.watched: list[int] = []  # after which sequence
        self.events: dict[str, list[pb.WatchJobResponse]] = {}

    async def CreateJob(self, requests, context):
        upload = Uploaded(pb.CreateJobStart())
        self.uploads.append(upload)
        async for request in requests:
            match request.WhichOneof("part"):
                case "start":
                    upload.start = request.start
                    for finding in self.findings:
                        yield pb.CreateJobResponse(finding=finding)
                case "examples":
                    upload.examples += request.examples
                    upload.largest = max(upload.largest, len(request.examples))
                    lines = upload.examples.count(b"\n")
                    progress = pb.CheckProgress(received=lines, checked=lines)
                    yield pb.CreateJobResponse(progress=progress)
                case "questions":
                    upload.questions += request.questions
        if self.refusals:
            raise self.refusals.pop(0)
        if any(f.severity == pb.FINDING_SEVERITY_ERROR for f in self.findings):
            raise InvalidInput("EXAMPLES_INVALID", "some examples are not in order")
        yield pb.CreateJobResponse(job=self.create(upload.start))

    def create(self, start: pb.CreateJobStart) -> pb.Job:
        """Write down how a job goes; return it as it is at first."""
        job = pb.Job(
            id=f"job-{len(self.events)}",
            name=start.name,
            state=pb.JOB_STATE_QUEUED,
            base_model="tiny",
            corpus=start.corpus,
            options=start.options,
            prompt_version="v1",
            data=DATA,
            jobs_ahead=2,
            create_time=Timestamp(seconds=1_800_000_000),
        )
        job.options.rank = job.options.rank or 16
        queued = pb.Job.FromString(job.SerializeToString())
        events: list[pb.Job | pb.JobProgress] = [queued]

        def then(state: pb.JobState.ValueType, **fields: object) -> None:
            job.MergeFrom(pb.Job(state=state, **fields))
            events.append(pb.Job.FromString(job.SerializeToString()))

        job.jobs_ahead = 0
        then(pb.JOB_STATE_TRAINING, start_time=Timestamp(seconds=1_800_000_100))
        for step, loss in enumerate(LOSSES, 1):
            progress = pb.JobProgress(
                step=step,
                steps=len(LOSSES),
                loss=loss,
                tokens_per_second=1500,
                seconds_left=80 - 20 * step,
            )
            if step > 1:
                progress.held_out_loss = loss + 0.5
            events.append(progress)
        job.progress.CopyFrom(progress)
        end = Timestamp(seconds=1_800_000_192)
        if self.ends == pb.JOB_STATE_FAILED:
            fields = {"reason": "OUT_OF_MEMORY", "message": "the trainer ran out of memory"}
            then(self.ends, end_time=end, log_tail="Traceback\nMemoryError\x1b[2J", **fields)
        else:
            adapter = self.trained(start)
            then(pb.JOB_STATE_VERIFYING, adapter=adapter.id)
            message = "they differ" if adapter.reason else ""
            then(self.ends, end_time=end, reason=adapter.reason, message=message)
        self.events[job.id] = [
            pb.WatchJobResponse(sequence=sequence, **{_kind(event): event})
            for sequence, event in enumerate(events, 1)
        ]
        return queued

    def trained(self, start: pb.CreateJobStart) -> pb.Adapter:
        """Keep the adapter of a job, as it is when the job has ended."""
        name = pb.JobState.Name(self.ends).replace("JOB", "ADAPTER")
        adapter = self.add(
            start.name, pb.AdapterState.Value(name), context=start.options.context, rank=16
        )
        adapter.MergeFrom(
            pb.Adapter(
                job=f"job-{len(self.events)}",
                corpus=start.corpus,
                examples_hash=DATA.hash,
                held_out_loss=1.5,
                training_seconds=90,
                create_time=Timestamp(seconds=1_800_000_190),
            )
        )
        if self.ends == pb.JOB_STATE_UNMEASURED:
            adapter.reason = "TOO_FEW_PROBES"
            return adapter
        unfaithful = self.ends == pb.JOB_STATE_UNFAITHFUL
        adapter.reason = "LOG_PROBABILITIES_DIFFER" if unfaithful else ""
        adapter.fidelity.CopyFrom(
            pb.Fidelity(
                probes=16,
                tokens=321,
                trainer_difference=0.5 if unfaithful else 0.003,
                trainer_difference_max=0.9 if unfaithful else 0.01,
                bound=0.05,
                base_difference=1.25,
            )
        )
        for streams in (1, 8):
            adapter.speeds.add(
                streams=streams,
                adapter_tokens_per_second=20.0 * streams,
                base_tokens_per_second=25.0 * streams,
            )
        return adapter

    async def WatchJob(self, request, context):
        self.watched.append(request.after_sequence)
        count = self.breaks.pop(0) if self.breaks else None
        events = self._events(request.id)[request.after_sequence :]
        for number, event in enumerate(events):
            if number == count:
                raise Unavailable("STOPPING", "this replica stops")
            if request.after_sequence + number == self.held_after:
                await asyncio.Event().wait()
            yield event
            heartbeat = pb.WatchHeartbeat()
            yield pb.WatchJobResponse(sequence=event.sequence, heartbeat=heartbeat)

    async def GetJob(self, request, context):
        return pb.GetJobResponse(job=self._job(request.id))

    async def ListJobs(self, request, context):
        ids = list(reversed(self.events))
        start = int(request.page_token or 0)
        jobs = [self._job(id) for id in ids[start : start + PAGE]]
        more = str(start + PAGE) if start + PAGE < len(ids) else ""
        return pb.ListJobsResponse(jobs=jobs, next_page_token=more)

    async def CancelJob(self, request, context):
        events, job = self._events(request.id), self._job(request.id)
        if self.held_after is None:
            raise NotReady("JOB_ENDED", f"the job is {pb.JobState.Name(job.state)} already")
        cancelled = pb.Job.FromString(events[0].job.SerializeToString())
        cancelled.state = pb.JOB_STATE_CANCELLED
        events[self.held_after :] = [
            pb.WatchJobResponse(sequence=self.held_after + 1, job=cancelled)
        ]
        return pb.CancelJobResponse(job=cancelled)

    async def ImportAdapter(self, requests, context):
        upload = Uploaded(pb.ImportAdapterStart())
        self.uploads.append(upload)
        promised: dict[str, pb.AdapterFile] = {}
        current = ""
        async for request in requests:
            match request.WhichOneof("part"):
                case "start":
                    upload.start = request.start
                case "file":
                    current = request.file.name
                    promised[current] = request.file
                    upload.files[current] = b""
                case "chunk":
                    upload.files[current] += request.chunk
                    upload.largest = max(upload.largest, len(request.chunk))
                case "examples":
                    upload.examples += request.examples
        for name, content in upload.files.items():
            given = (promised[name].size, promised[name].sha256)
            if given != (len(content), hashlib.sha256(content).hexdigest()):
                raise InvalidInput("FILE_HASH_MISMATCH", f"{name} is not what was promised")
        if set(upload.files) != {WEIGHTS, CONFIG}:
            raise InvalidInput("FILE_MISSING", "an adapter has two files")
        state = pb.ADAPTER_STATE_UNMEASURED
        adapter = self.add(upload.start.name, state, files=upload.files)
        return pb.ImportAdapterResponse(adapter=adapter)

    async def AcceptAdapter(self, request, context):
        adapter = self._find(request.adapter).adapter
        if adapter.state != pb.ADAPTER_STATE_UNFAITHFUL:
            raise NotReady("ADAPTER_NOT_UNFAITHFUL", "it needs no acceptance")
        adapter.accepted_by = "default"
        adapter.accept_time.FromSeconds(1_800_000_300)
        return pb.AcceptAdapterResponse(adapter=adapter)

    async def DeleteAdapter(self, request, context):
        self.kept.remove(self._find(request.adapter))
        return pb.DeleteAdapterResponse()

    def _events(self, id: str) -> list[pb.WatchJobResponse]:
        if self.error:
            raise self.error
        if id not in self.events:
            raise NotFound("JOB_NOT_FOUND", f"there is no job {id!r}")
        return self.events[id]

    def _job(self, id: str) -> pb.Job:
        """The job as its last event, up to where it is held, left it."""
        events = self._events(id)[: self.held_after]
        return [event.job for event in events if event.HasField("job")][-1]


def _kind(event: pb.Job | pb.JobProgress) -> str:
    return "job" if isinstance(event, pb.Job) else "progress"
