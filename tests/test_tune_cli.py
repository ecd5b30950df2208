"""The commands about training, as a user types them."""

import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tworoads.v1 import tuning_pb2 as pb

from clients.cli.output import duration
from clients.cli.sparkline import sparkline
from services.runtime.errors import Overloaded
from tests.command import Ran, in_a_thread, on_a_terminal, tworoads, typed
from tests.fake_training import FakeTraining
from tests.fake_tuning import CONFIG, WEIGHTS
from tests.small_stack import SmallStack, small_stack

LINES = '{"question": "a", "answer": "b"}\n' * 12
REPORT = """\
10 examples, 2 of them held out; 1,234 tokens, 345 of them in answers.
Answers have 3 to 70 tokens, half of them at most 30, 95 % at most 60.
Left out: 2 that repeat an earlier line, 0 too long for the context.
"""
TRAINING = """\
style waits for 2 jobs before it
style: training
step 1 of 4, loss 2.000, 1,500 tokens/s, 1 min 0 s left
step 2 of 4, loss 1.500, held-out loss 2.000, 1,500 tokens/s, 40 s left
step 3 of 4, loss 1.250, held-out loss 1.750, 1,500 tokens/s, 20 s left
step 4 of 4, loss 1.000, held-out loss 1.500, 1,500 tokens/s
"""
MEASURED = """\
Held-out loss: 1.500 nats per answer token.
Fidelity: over 16 answers with 321 tokens, generation and trainer differ by 0.0030 nats per token,\
 by 0.0100 in the worst answer; up to 0.05 is faithful.
Effect: it moves the model by 1.250 nats per token on them.
Speed, 1 answer at a time: 20.0 tokens/s with it, 25.0 without (0.80 of that).
Speed, 8 answers at a time: 160.0 tokens/s with it, 200.0 without (0.80 of that).
"""

Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[SmallStack]:
    with in_a_thread(small_stack(tmp_path_factory.mktemp("store"), FakeTraining())) as running:
        yield running


@pytest.fixture
def tuning(stack) -> FakeTraining:
    """The fake service, as new."""
    stack.tuning.__init__()
    return stack.tuning


@pytest.fixture
def run(stack, tuning, monkeypatch, capsys) -> Run:
    """Type a command; `stdin` is what is piped into it."""
    monkeypatch.setenv("TWOROADS_ADDRESS", stack.address)
    return lambda *words, stdin=b"": typed(words, stdin, monkeypatch, capsys)


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "examples.jsonl").write_text(LINES)
    return tmp_path / "examples.jsonl"


@pytest.fixture
def style(run, file) -> str:
    """An adapter that a job has made, NAME@HASH."""
    return run("tune", file, "--name", "style", "--json").json["adapter"]["id"]


def finding(line: int, severity: str, reason: str, message: str) -> pb.DataFinding:
    return pb.DataFinding(
        file=pb.UPLOADED_FILE_EXAMPLES,
        line=line,
        severity=pb.FindingSeverity.Value(f"FINDING_SEVERITY_{severity}"),
        reason=reason,
        message=message,
    )


def test_examples_become_an_adapter_and_the_next_command_is_told(run, tuning, file):
    tuning.findings = [
        finding(5, "LEFT_OUT", "DUPLICATE", "line 3 says the same"),
        finding(9, "WARNING", "SECRET_LIKE", "this looks like a key"),
    ]
    ran = run("tune", file, "--name", "style")
    (id,) = [kept.adapter.id for kept in tuning.kept]
    found = (
        "line 5: left out: line 3 says the same (DUPLICATE)\n"
        "line 9: warning: this looks like a key (SECRET_LIKE)\n"
    )
    assert ran.err == f"{found}{REPORT}{TRAINING}style: measuring {id}\n"
    assert ran.out == (
        f"{id} is ready after 1 min 32 s.\n"
        f"{MEASURED}"
        'Ask it: tworoads ask "..." --path tuned --adapter style\n'
    )
    assert ran.code == 0
    assert tuning.uploads[0].examples.decode() == LINES


def test_the_options_of_a_training_reach_the_service(run, tuning, file, tmp_path):
    (tmp_path / "questions.jsonl").write_text("questions")
    words = ["--corpus", "c", "--epochs", "2", "--rank", "8", "--alpha", "4", "--seed", "7"]
    words += ["--learning-rate", "0.01", "--held-out", "0.25", "--quantized"]
    words += ["--target", "q_proj", "--target", "v_proj"]
    ran = run("tune", file, "-n", "style", "--questions", tmp_path / "questions.jsonl", *words)
    assert ran.out.splitlines()[-1] == (
        'Ask it: tworoads ask "..." --path hybrid --corpus c --adapter style'
    )
    (upload,) = tuning.uploads
    assert (upload.start.corpus, upload.questions) == ("c", b"questions")
    assert upload.start.options == pb.TrainingOptions(
        context=pb.TRAINING_CONTEXT_RETRIEVED,
        epochs=2,
        rank=8,
        alpha=4,
        seed=7,
        learning_rate=0.01,
        held_out_share=0.25,
        quantized=True,
        targets=["q_proj", "v_proj"],
    )


def test_what_is_left_open_is_left_to_the_service(run, tuning, file):
    run("tune", file, "-n", "style", "--corpus", "c", "--context", "none")
    run("tune", file, "-n", "style")
    for upload in tuning.uploads:
        assert upload.start.options == pb.TrainingOptions(context=pb.TRAINING_CONTEXT_NONE, seed=0)


def test_examples_are_read_from_standard_input(run, tuning):
    assert run("tune", "-", "--name", "style", stdin=LINES.encode()).code == 0
    assert tuning.uploads[0].examples.decode() == LINES


def test_a_finished_training_as_json_is_the_job_and_its_adapter(run, file):
    ran = run("tune", file, "--name", "style", "--json")
    job, adapter = ran.json["job"], ran.json["adapter"]
    assert (job["state"], job["adapter"], job["data"]["examples"]) == ("ready", adapter["id"], 10)
    assert job["ended"] == "2027-01-15T08:03:12+00:00" and job["progress"]["loss"] == 1.0
    assert adapter["fidelity"]["trainer_difference"] == 0.003
    assert [speed["streams"] for speed in adapter["speeds"]] == [1, 8]
    assert run("jobs", "watch", job["id"], "--json").json == ran.json


def test_a_detached_training_is_in_the_queue(run, file):
    ran = run("tune", file, "--name", "style", "--detach")
    assert (ran.code, ran.err) == (0, REPORT)
    assert ran.out == "Job job-0 is in the queue. Watch it: tworoads jobs watch job-0\n"
    ran = run("tune", file, "--name", "style", "--detach", "--json")
    assert (ran.json["id"], ran.json["state"]) == ("job-1", "queued")


def test_lines_that_are_not_in_order_are_named_and_there_is_no_job(run, tuning, file):
    tuning.findings = [
        finding(7, "ERROR", "EMPTY", "the answer is empty"),
        finding(9, "ERROR", "NOT_JSON", "this is no JSON \x1b[2J"),
    ]
    ran = run("tune", file, "--name", "style")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == (
        "line 7: the answer is empty (EMPTY)\n"
        "line 9: this is no JSON [2J (NOT_JSON)\n"
        "Error: some examples are not in order; mend these lines, then run this again\n"
    )
    assert tuning.events == {}


def test_the_overlap_with_a_question_set_is_told(run, tuning, file, monkeypatch):
    overlap = pb.Overlap(questions=40, exact=1, near=2, shared_document=3, lines=range(1, 31))
    report = pb.DataReport(examples=10, overlap=overlap, secret_like=4)
    monkeypatch.setattr("tests.fake_training.DATA", report)
    ran = run("tune", file, "--name", "style", "--questions", file, "--detach")
    assert ran.err.splitlines()[2:] == [
        "Lines that seem to hold a secret: 4.",
        "Of 40 questions, 1 are examples too, 2 almost, 3 share a document with one.",
        f"Their lines: {', '.join(map(str, range(1, 21)))} and 10 more.",
    ]


def test_a_job_that_fails_says_why_with_the_end_of_its_log(run, tuning, file):
    tuning.ends = pb.JOB_STATE_FAILED
    ran = run("tune", file, "--name", "style")
    assert ran.code == 1
    assert ran.out == (
        "  Traceback\n"
        "  MemoryError[2J\n"
        "The job job-0 has failed: the trainer ran out of memory (OUT_OF_MEMORY).\n"
    )
    ran = run("tune", file, "--name", "style", "--json")
    assert (ran.code, ran.json["job"]["reason"], ran.json["adapter"]) == (1, "OUT_OF_MEMORY", None)


def test_an_unfaithful_adapter_answers_once_it_is_accepted(run, tuning, file):
    tuning.ends = pb.JOB_STATE_UNFAITHFUL
    ran = run("tune", file, "--name", "style")
    (id,) = [kept.adapter.id for kept in tuning.kept]
    end = f"{id} is unfaithful after 1 min 32 s: they differ (LOG_PROBABILITIES_DIFFER).\n"
    assert ran.code == 1 and ran.out.startswith(end)
    assert ran.out.endswith(f"Let it answer all the same: tworoads adapters accept {id}\n")
    assert "State: not served: generation does not do what" in run("adapters", "show", id).out
    ran = run("adapters", "accept", id)
    assert ran.out.splitlines() == [
        f"{id} answers from now on.",
        'Ask it: tworoads ask "..." --path tuned --adapter style',
    ]
    assert (
        "State: served, because default accepted it on 2027-01-15"
        in run("adapters", "show", id).out
    )


def test_a_training_is_drawn_on_a_terminal(stack, tuning, file):
    tuning.breaks = [6]
    out, shown = on_a_terminal(stack.address, "tune", str(file), "--name", "style")
    assert out.endswith("--path tuned --adapter style\n")
    assert "style is ready" in shown
    assert "step 4 of 4, loss 1.000, held-out loss 1.500" in shown
    assert "█▅▃▁" in shown and "━" * 40 in shown


def test_ctrl_c_leaves_the_job_running_and_says_how_to_go_on(stack, tuning, file):
    tuning.held_after = 3
    with tworoads(stack.address, "tune", str(file), "--name", "style") as process:
        shown = ""
        while "step 1 of 4" not in shown:
            shown += process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err == (
        "The job goes on. `tworoads jobs watch job-0` shows it again,"
        " `tworoads jobs cancel job-0` stops it.\n"
    )


def test_jobs_are_listed_shown_and_cancelled(run, tuning, file):
    assert "tworoads tune FILE --name NAME" in run("jobs").out
    for name in ("one", "two", "three"):
        run("tune", file, "--name", name)
    table = run("jobs").out.splitlines()
    assert table[0].split() == "JOB STATE NAME EXAMPLES STEP CREATED ADAPTER".split()
    assert [row.split()[:5] for row in table[1:]] == [
        ["job-2", "ready", "three", "10", "4/4"],
        ["job-1", "ready", "two", "10", "4/4"],
        ["job-0", "ready", "one", "10", "4/4"],
    ]
    assert [job["name"] for job in run("jobs", "--json").json] == ["three", "two", "one"]
    shown = run("jobs", "show", "job-1").out
    assert shown.startswith("two is ready.\nBase model: tiny.\nTraining: context none, rank 16")
    assert REPORT in shown and "Adapter: two@" in shown
    assert run("jobs", "show", "job-1", "--json").json["name"] == "two"
    assert run("jobs", "cancel", "job-1").err == "Error: the job is JOB_STATE_READY already\n"
    tuning.held_after = 2
    assert run("jobs", "cancel", "job-1").out == "two was cancelled.\n"
    tuning.held_after = None
    ran = run("jobs", "watch", "job-1")
    assert (ran.code, ran.out) == (1, "The job job-1 was cancelled.\n")


def test_a_job_that_failed_is_shown_with_its_log(run, tuning, file):
    tuning.ends = pb.JOB_STATE_FAILED
    run("tune", file, "--name", "style")
    shown = run("jobs", "show", "job-0").out
    assert "Why: the trainer ran out of memory (OUT_OF_MEMORY).\n" in shown
    assert shown.endswith("The end of the trainer's log:\n  Traceback\n  MemoryError[2J\n")


def test_adapters_are_listed_shown_and_deleted(run, style):
    table = run("adapters").out.splitlines()
    assert table[0].split() == ["ADAPTER", "STATE", "BASE", "MODEL", "CONTEXT", "RANK", "CREATED"]
    assert table[1].split()[:5] == [style, "ready", "tiny", "none", "16"]
    assert [adapter["id"] for adapter in run("adapters", "--json").json] == [style]
    ran = run("adapters", "show", "style")
    made, ready = ran.out.split(MEASURED)
    assert re.fullmatch(
        rf"""{style}
State: ready\.
Made by: job job-0 on 2027-01-1\d \d\d:\d\d, 0\.0 MiB\.
Base model: tiny \(abababababab\)\.
Examples: cdcdcdcdcdcd\.
Training: context none, rank 16, prompts v1, in 1 min 30 s\.
""",
        made,
    )
    assert ready == 'Ask it: tworoads ask "..." --path tuned --adapter style\n'
    assert run("adapters", "show", style, "--json").json["id"] == style
    assert run("adapters", "delete", style).out == f"{style} is deleted.\n"
    assert run("adapters").out == (
        "There is no adapter yet. Train one: tworoads tune FILE --name NAME\n"
    )


def test_an_adapter_goes_out_as_files_and_comes_in_again(run, tuning, style, file, tmp_path):
    new = tmp_path / "new"
    assert run("adapters", "download", style, new).out == f"{style} is in {new}.\n"
    assert {path.name for path in new.iterdir()} == {WEIGHTS, CONFIG}
    ran = run("adapters", "download", style, new)
    assert (ran.code, ran.err) == (1, f"Error: {new} is there already: name a new folder\n")
    ran = run("adapters", "import", new, "--name", "copy", "--examples", file)
    assert re.match(r"copy@[0-9a-f]{12}: served, but nothing could measure it\.\n", ran.out)
    assert tuning.uploads[-1].examples.decode() == LINES
    again = ("adapters", "import", new, "--name", "copy", "--context", "mixed", "--json")
    assert run(*again).json["state"] == "unmeasured"
    assert tuning.uploads[-1].start.options.context == pb.TRAINING_CONTEXT_MIXED
    ran = run("adapters", "import", tmp_path, "--name", "copy")
    assert (ran.code, ran.out) == (1, "")
    assert f"Error: {tmp_path} is no adapter as peft saves it: {WEIGHTS}: No such file" in ran.err


def test_an_answer_says_which_adapter_gave_it(run, tuning, stack, style):
    stack.generation.answer = "In the house style."
    ran = run("ask", "How?", "--path", "tuned", "--adapter", "style")
    assert ran == Ran(0, "In the house style.\n", f"Adapter: {style}\n")
    answer = run("ask", "How?", "--path", "tuned", "--adapter", "style", "--json").json
    assert (answer["adapter"], answer["warnings"]) == (style, [])


def test_an_adapter_on_a_path_that_it_was_not_trained_for_is_warned_about(
    run, tuning, style, file, tmp_path
):
    (tmp_path / "leave.txt").write_text("Employees get 27 days of paid leave.")
    run("ingest", tmp_path / "leave.txt", "--corpus", "leave")
    ran = run("ask", "How many?", "--path", "hybrid", "--adapter", style, "--corpus", "leave")
    answers, warning = ran.err.splitlines()
    assert (ran.code, answers) == (0, f"Adapter: {style}")
    assert warning.startswith("Warning: this adapter never saw passages")
    run("tune", file, "--name", "reader", "--corpus", "leave")
    ran = run("ask", "How many?", "--path", "tuned", "--adapter", "reader")
    assert "Warning: this adapter was always shown passages" in ran.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tune", "absent.jsonl", "--name", "a"], "cannot read absent.jsonl: No such file"),
        (["jobs", "show", "absent"], "there is no job 'absent'; see which there are with `tworo"),
        (["jobs", "watch", "absent"], "see which there are with `tworoads jobs`"),
        (["jobs", "cancel", "absent"], "see which there are with `tworoads jobs`"),
        (["adapters", "show", "absent"], "see which there are with `tworoads adapters`"),
        (["adapters", "accept", "absent"], "see which there are with `tworoads adapters`"),
        (["adapters", "delete", "absent"], "see which there are with `tworoads adapters`"),
        (["adapters", "download", "absent", "x"], "see which there are with `tworoads adapters`"),
        (["adapters", "import", "absent", "--name", "a"], "absent is no adapter as peft saves it"),
        (["ask", "How?", "--path", "tuned"], "name it with --adapter"),
        (["ask", "How?", "--path", "tuned", "--adapter", "a"], "with `tworoads adapters`"),
    ],
)
def test_an_error_is_one_sentence_that_says_what_to_do(run, words, says):
    ran = run(*words)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("Error: ") and ran.err.count("\n") == 1
    assert says in ran.err


def test_a_service_that_is_full_is_told(run, tuning, file):
    tuning.refusals = [Overloaded("QUEUE_FULL", "too many jobs wait; try again later")]
    ran = run("tune", file, "--name", "style")
    assert ran == Ran(1, "", "Error: too many jobs wait; try again later\n")


@pytest.mark.parametrize(
    "words",
    [
        ["tune", "-", "--name", "a"],
        ["jobs"],
        ["jobs", "watch", "a"],
        ["adapters"],
        ["adapters", "show", "a"],
    ],
)
def test_without_a_stack_the_error_says_how_to_start_one(run, words):
    with socket.socket() as taken:  # its port never listens
        taken.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
        ran = run(*words, "--address", nobody)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"Error: nothing answers at {nobody}: start it with `tworoads up`")


@pytest.mark.parametrize(
    "words",
    [
        ["tune"],
        ["tune", "a"],
        ["tune", "a", "--name", "b", "--context", "all"],
        ["tune", "a", "--name", "b", "--held-out", "0.9"],
        ["jobs", "show"],
        ["jobs", "sing"],
        ["adapters", "import", "a"],
        ["adapters", "download", "a"],
    ],
)
def test_wrong_usage_exits_with_2(run, words):
    ran = run(*words)
    assert (ran.code, ran.out) == (2, "")
    assert "Usage: tworoads" in ran.err


@pytest.mark.parametrize(
    "words",
    [
        ["tune"],
        ["jobs"],
        *(["jobs", command] for command in ("show", "watch", "cancel")),
        ["adapters"],
        *(["adapters", command] for command in ("show", "import", "accept", "download")),
    ],
)
def test_the_help_shows_the_docstring_and_json(run, words):
    ran = run(*words, "-h")
    assert ran.code == 0
    assert f"Usage: tworoads {' '.join(words)}" in ran.out and "--json" in ran.out


def test_a_sparkline_has_the_shape_of_its_numbers():
    assert sparkline([], 10) == ""
    assert sparkline([2.0], 10) == "▁"
    assert sparkline([3, 3, 3], 10) == "▁▁▁"
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 10) == "█▇▆▅▄▃▂▁"
    assert sparkline([1, 1, float("nan"), 9, 9, 5, 5], 3) == "▁█▅"
    assert len(sparkline(range(1000), 48)) == 48


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599.9, "1 h 0 min"), (90000, "25 h 0 min")],
)
def test_a_time_span_in_words(seconds, words):
    assert duration(seconds) == words
