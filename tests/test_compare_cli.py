"""The commands about comparisons and policies, as a user types them."""

import json
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tworoads.v1 import answer_pb2, retrieval_pb2, tuning_pb2
from tworoads.v1 import evaluation_pb2 as pb

from services.runtime.errors import Overloaded
from tests.command import Ran, in_a_thread, on_a_terminal, tworoads, typed
from tests.fake_evaluation import (
    FakeEvaluation,
    Serving,
    decided,
    result,
    router,
    serving,
    undecided,
)

LINES = '{"question": "a", "answers": ["b"]}\n' * 12
COMPARING = """\
Comparison comparison-0 waits in the queue
Comparison comparison-0: 12 questions to 2 candidates
asks the questions; base 3/12, strict 0.00, format-blind 0.50;\
 rag 3/12, strict 0.25, format-blind 0.75; 1 min 0 s left
asks the questions; base 6/12, strict 0.00, format-blind 0.50;\
 rag 6/12, strict 0.25, format-blind 0.75; 40 s left
asks the questions; base 9/12, strict 0.00, format-blind 0.50;\
 rag 9/12, strict 0.25, format-blind 0.75; 20 s left
computes the verdict; base 12/12, strict 0.00, format-blind 0.50, 1 failed;\
 rag 12/12, strict 0.25, format-blind 0.75, 1 failed; 0 s left
"""
TABLE = """\
CANDIDATE  STRICT             FORMAT-BLIND       P95       COST PER 1,000
base       0.12 [0.00, 0.25]  0.25 [0.12, 0.38]  1,234 ms  0.125 EUR
rag *      0.62 [0.50, 0.75]  0.75 [0.62, 0.88]  1,234 ms  0.125 EUR
Scores are from 0 to 1, with their 95 % intervals in brackets. * is what the verdict names.
rag failed on 1 question, which is not scored: 1 GENERATION_UNAVAILABLE.
"""
VERDICT = f"""\
Take RAG: it answers 50 points more questions than the model alone.

{TABLE}
Why:
- 9 of 12 need the documents. (knowledge_gap)

What would change it:
- A price of 2 EUR for 1,000 answers.

What it does not know:
- Whether the questions are like those of users.

"""
STEPS = """\
Its report: tworoads comparisons report comparison-0
Let AUTO follow it: tworoads comparisons apply comparison-0
"""

Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with in_a_thread(serving()) as running:
        yield running


@pytest.fixture
def evaluation(served) -> FakeEvaluation:
    """The fake services, as new."""
    served.policies.__init__()
    served.evaluation.__init__()
    return served.evaluation


@pytest.fixture
def run(served, evaluation, monkeypatch, capsys) -> Run:
    """Type a command; `stdin` is what is piped into it."""
    monkeypatch.setenv("TWOROADS_ADDRESS", served.address)
    monkeypatch.delenv("TWOROADS_CORPUS", raising=False)
    return lambda *words, stdin=b"": typed(words, stdin, monkeypatch, capsys)


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "questions.jsonl").write_text(LINES)
    return tmp_path / "questions.jsonl"


def finding(line: int, severity: str, reason: str, message: str) -> tuning_pb2.DataFinding:
    return tuning_pb2.DataFinding(
        file=tuning_pb2.UPLOADED_FILE_QUESTIONS,
        line=line,
        severity=tuning_pb2.FindingSeverity.Value(f"FINDING_SEVERITY_{severity}"),
        reason=reason,
        message=message,
    )


def test_questions_become_a_verdict_and_the_next_command_is_told(run, evaluation, file):
    evaluation.findings = [finding(5, "LEFT_OUT", "DUPLICATE", "line 3 says the same")]
    ran = run("compare", file, "--corpus", "handbook")
    found = "line 5: left out: line 3 says the same (DUPLICATE)\n"
    assert ran == Ran(0, VERDICT + STEPS, found + COMPARING)
    (upload,) = evaluation.uploads
    assert upload.questions.decode() == LINES and upload.start.corpus == "handbook"


def test_what_is_left_open_is_left_to_the_service(run, evaluation, file):
    run("compare", file)
    (upload,) = evaluation.uploads
    upload.start.ClearField("idempotency_key")
    assert upload.start == pb.CreateComparisonStart(seed=0)


def test_the_options_of_a_comparison_reach_the_service(run, evaluation, file, tmp_path):
    (tmp_path / "shown.jsonl").write_text('{"question": "q", "answer": "a", "relevant": []}\n\n')
    (tmp_path / "leave.md").write_text("now")
    words = ["-c", "handbook", "--adapter", "style", "-a", "form@0123456789ab", "--shots", "2"]
    words += ["--examples", tmp_path / "shown.jsonl", "--changed", tmp_path / "leave.md"]
    words += ["--max-cost", "0.5", "--max-p95", "2000", "--min-quality", "0.25", "--margin", "0"]
    words += ["--concurrency", "8", "--seed", "7", "--scorer", "label", "--judge"]
    words += ["--format-blind", "numeric", "--tolerance", "0.5"]
    assert run("compare", file, *words).code == 0
    (upload,) = evaluation.uploads
    upload.start.ClearField("idempotency_key")
    assert upload.start == pb.CreateComparisonStart(
        corpus="handbook",
        adapters=["style", "form@0123456789ab"],
        examples=[answer_pb2.Turn(question="q", answer="a")],
        shots=2,
        scoring=pb.ScoringOptions(
            strict=pb.SCORER_LABEL,
            format_blind=pb.SCORER_NUMERIC,
            numeric_tolerance=0.5,
            judge=True,
        ),
        constraints=pb.Constraints(max_cost_per_correct=0.5, max_p95_ms=2000, min_quality=0.25),
        concurrency=8,
        margin=0,
        seed=7,
    )
    assert [(d.id, content) for d, content in upload.documents] == [("leave.md", b"now")]


def test_paths_are_chosen_by_name(run, evaluation, file, tmp_path):
    (tmp_path / "shown.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    words = ["--corpus", "c", "--examples", tmp_path / "shown.jsonl", "--adapter"]
    run("compare", file, *words, "style", "--paths", "base, few-shot,rag,hybrid")
    run("compare", file, *words, "style@0123456789ab", "-a", "form", "--paths", "tuned,hybrid")
    one, two = (upload.start for upload in evaluation.uploads)
    assert not one.adapters and not two.adapters
    assert [(c.id, c.path, c.adapter) for c in one.candidates] == [
        ("base", retrieval_pb2.PATH_BASE, ""),
        ("few-shot", retrieval_pb2.PATH_BASE, ""),
        ("rag", retrieval_pb2.PATH_RAG, ""),
        ("hybrid", retrieval_pb2.PATH_HYBRID, "style"),
    ]
    shown = one.candidates[1].options.examples
    assert [(turn.question, turn.answer) for turn in shown] == [("q", "a")]
    assert [(c.id, c.adapter) for c in two.candidates] == [
        ("tuned-style", "style@0123456789ab"),
        ("tuned-form", "form"),
        ("hybrid-style", "style@0123456789ab"),
        ("hybrid-form", "form"),
    ]


def test_questions_are_read_from_standard_input(run, evaluation):
    assert run("compare", "-", stdin=LINES.encode()).code == 0
    assert evaluation.uploads[0].questions.decode() == LINES


def test_a_finished_comparison_as_json_is_all_of_it(run, file, evaluation):
    evaluation.candidates.append(
        pb.Candidate(id="tuned", path=retrieval_pb2.PATH_TUNED, adapter="style@0123456789ab")
    )
    ran = run("compare", file, "--corpus", "handbook", "--json")
    found = ran.json
    assert (found["state"], found["verdict"]["candidate"]) == ("finished", "rag")
    assert found["results"][1]["scores"]["format_blind"] == {
        "value": 0.75,
        "low": 0.625,
        "high": 0.875,
    }
    assert found["ended"] == "2027-01-15T08:03:12+00:00"
    assert run("comparisons", "show", "1", "--json").json == found
    assert run("comparisons", "watch", found["id"], "--json").json == found


def test_a_detached_comparison_is_in_the_queue(run, file):
    ran = run("compare", file, "--detach")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == (
        "Comparison comparison-0 is in the queue."
        " Watch it: tworoads comparisons watch comparison-0\n"
    )
    ran = run("compare", file, "--detach", "--json")
    assert (ran.json["id"], ran.json["state"]) == ("comparison-1", "queued")


def test_the_report_is_written_and_the_verdict_applied_when_asked(
    run, evaluation, file, served, tmp_path
):
    target = tmp_path / "report.html"
    ran = run("compare", file, "-c", "handbook", "--report", target, "--apply")
    assert ran.code == 0
    assert ran.out == (
        f"{VERDICT}Its report is in {target}.\nAUTO takes rag for corpus handbook from now on.\n"
    )
    assert target.read_bytes() == evaluation.content
    assert served.policies.kept["handbook"].comparison == "comparison-0"
    ran = run("compare", file, "-c", "handbook", "--apply", "--json")
    assert ran.json["id"] == "comparison-1"
    assert ran.err.endswith("\nAUTO takes rag for corpus handbook from now on.\n")


def test_a_report_that_cannot_be_written_hides_no_verdict(run, file):
    ran = run("compare", file, "-c", "handbook", "--report", file / "report.html")
    assert (ran.code, ran.out) == (1, VERDICT)
    assert re.search(
        r"\nError: cannot write to .*report.html: (File exists|Not a dir.*)\n", ran.err
    )


def test_too_few_questions_are_no_failure_and_leave_the_policy(run, evaluation, file, served):
    evaluation.verdict = undecided()
    ran = run("compare", file, "-c", "handbook", "--apply")
    assert ran.code == 0
    assert "- 12 questions are too few. (not_enough_evidence)\n" in ran.out
    assert "\nAbout 1,288 more questions would decide.\n" in ran.out
    assert ran.out.endswith("\nChoose a path yourself: tworoads policies set handbook PATH\n")
    assert ran.err.endswith("\nThe verdict names no path, so no policy was set.\n")
    assert served.policies.kept == {}


def test_a_verdict_that_no_policy_can_say_is_told_and_not_applied(run, evaluation, file, served):
    turns = [answer_pb2.Turn(question="q", answer="a")]
    evaluation.candidates[0].id = "few-shot"
    evaluation.candidates[0].options.examples.extend(turns)
    evaluation.verdict = decided(path=retrieval_pb2.PATH_BASE, candidate="few-shot")
    ran = run("compare", file, "-c", "handbook", "--apply")
    assert ran.code == 1 and "Why:" in ran.out
    told = run("comparisons", "show", "1").out
    assert "AUTO cannot follow it: the verdict names few-shot, whose examples" in told
    assert ran.err.endswith(
        "\nError: the verdict names few-shot, whose examples a policy cannot keep: send them with"
        " each question, as `examples` in its options; or set another path with `tworoads policies"
        " set`\n"
    )
    assert served.policies.kept == {}


def test_types_failed_paths_and_overlap_are_told(run, evaluation, file):
    failed = result("tuned", 0.5)
    failed.failed = True
    failed.errors["ADAPTER_GONE"] = 12
    seen = result("hybrid", 0.5)
    seen.degraded = 2
    seen.overlap.MergeFrom(tuning_pb2.Overlap(questions=12, exact=3, near=1))
    evaluation.results = [failed, seen]
    types = [
        pb.TypeVerdict(
            type="label",
            path=retrieval_pb2.PATH_TUNED,
            candidate="tuned",
            reasons=[pb.VerdictReason(code=pb.VERDICT_CODE_BEHAVIOUR_GAP, message="Form.")],
        )
    ]
    evaluation.verdict = decided(types=types)
    out = run("compare", file, "-c", "handbook").out
    assert re.search(r"^tuned +failed +- +- +-$", out, re.MULTILINE)
    assert "tuned failed on 12 questions, and is not compared: 12 ADAPTER_GONE.\n" in out
    assert "hybrid answered 2 with something left out.\n" in out
    assert "hybrid: 4 of 12 questions are in the adapter's training examples, or almost.\n" in out
    assert "By type of question:\n- label: tuned: Form.\n- AUTO would not gain" in out
    evaluation.verdict = decided(types=types, router=router())
    assert "- AUTO can tell the types apart.\n" in run("compare", file, "-c", "handbook").out


def test_a_failed_comparison_says_why(run, evaluation, file):
    evaluation.ends = pb.COMPARISON_STATE_FAILED
    ran = run("compare", file, "--report", "absent/report.html", "--apply")
    says = "has failed: every candidate failed [2J (EVERY_CANDIDATE_FAILED).\n"
    assert (ran.code, ran.out) == (1, f"Comparison comparison-0 {says}")
    assert run("comparisons", "show", "1").out == ran.out
    assert evaluation.downloads == []


def test_what_the_server_says_cannot_command_the_terminal(run, evaluation, file):
    evil = "evil\x1b[2J\nline\u202e"
    evaluation.verdict = decided(
        summary=evil,
        reasons=[pb.VerdictReason(code=pb.VERDICT_CODE_COST_CAP, message=evil)],
        would_change=[evil],
        unknown=[evil],
    )
    evaluation.candidates.append(pb.Candidate(id=evil, path=retrieval_pb2.PATH_RAG))
    evaluation.results.append(result(evil, 0.5))
    ran = run("compare", file, "--corpus", evil)
    assert ran.code == 0 and "evil[2J line" in ran.out and "evil[2J line" in ran.err
    answers = run("comparisons", "answers", "1")
    for shown in (ran.out, ran.err, run("comparisons").out, answers.out):
        assert "\x1b" not in shown and "\u202e" not in shown


def test_lines_that_are_not_in_order_are_named_and_there_is_no_comparison(run, evaluation, file):
    evaluation.findings = [
        finding(7, "ERROR", "ANSWERS_MISSING", "there is no answer"),
        finding(9, "ERROR", "NOT_JSON", "this is no JSON \x1b[2J"),
    ]
    ran = run("compare", file)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == (
        "line 7: there is no answer (ANSWERS_MISSING)\n"
        "line 9: this is no JSON [2J (NOT_JSON)\n"
        "Error: some questions are not in order; mend these lines, then run this again\n"
    )
    assert evaluation.events == {}


def test_ctrl_c_leaves_the_comparison_running_and_says_how_to_go_on(served, evaluation, file):
    evaluation.held_after = 3
    with tworoads(served.address, "compare", str(file), "--corpus", "handbook") as process:
        for said in process.stderr:
            if said.startswith("asks the questions"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest == (
        "The comparison goes on. `tworoads comparisons watch comparison-0` shows it again,"
        " `tworoads comparisons cancel comparison-0` stops it.\n"
    )
    evaluation.held_after = None
    assert "comparison-0" in evaluation.events


def test_on_a_terminal_every_path_has_a_bar(served, evaluation, file):
    out, shown = on_a_terminal(served.address, "compare", str(file), "--corpus", "handbook")
    assert out == VERDICT + STEPS
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    for candidate in ("base", "rag"):
        assert re.search(rf"{candidate} +━+ +12/12, strict", text)


def test_comparisons_are_listed_and_named_by_number(run, evaluation, file):
    assert run("comparisons").out.startswith("There is no comparison yet. Make one: tworoads com")
    run("compare", file, "-c", "handbook")
    evaluation.verdict = undecided()
    run("compare", file)
    evaluation.held_after = 2
    run("compare", file, "--detach")
    header, *rows = [line.split() for line in run("comparisons").out.splitlines()]
    assert header[:3] == ["N", "COMPARISON", "STATE"]
    assert [row[:5] for row in rows] == [
        ["1", "comparison-2", "running", "-", "12"],
        ["2", "comparison-1", "running", "-", "12"],
        ["3", "comparison-0", "running", "handbook", "12"],
    ]
    evaluation.held_after = None
    ends = [line.split()[-1] for line in run("comparisons").out.splitlines()[1:]]
    assert ends == ["decided", "decided", "rag"]
    assert [one["id"] for one in run("comparisons", "--json").json] == [
        f"comparison-{number}" for number in (2, 1, 0)
    ]
    assert VERDICT in run("comparisons", "show", "3").out
    for number in (0, 4):
        ran = run("comparisons", "show", number)
        assert (ran.code, ran.out) == (1, "")
        assert ran.err.startswith(f"Error: there is no comparison number {number}: see which")


def test_a_running_comparison_is_shown_and_cancelled(run, evaluation, file):
    evaluation.held_after = 3
    run("compare", file, "--detach")
    assert run("comparisons", "show", "1").out == (
        "Comparison comparison-0: 12 questions to 2 candidates.\n"
        "See it go on: tworoads comparisons watch comparison-0\n"
    )
    assert run("comparisons", "cancel", "1").out == "Comparison comparison-0 was cancelled.\n"
    evaluation.held_after = None
    ran = run("comparisons", "watch", "1")
    assert (ran.code, ran.out) == (1, "Comparison comparison-0 was cancelled.\n")


def test_every_answer_is_printed_as_a_line_of_json(run, file):
    run("compare", file)
    ran = run("comparisons", "answers", "1")
    assert "\x1b" not in ran.out
    answers = [json.loads(line) for line in ran.out.splitlines()]
    assert [answer["sequence"] for answer in answers] == [1, 2, 3]
    assert answers[1]["right_answers"] == ["27 days", "27"]
    assert answers[1]["citations"][0]["quote"] == "27 days"
    words = ["--candidate", "rag", "--phase", "oracle"]
    assert json.loads(run("comparisons", "answers", "1", *words).out)["error"]


def test_a_report_is_downloaded_later(run, evaluation, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("compare", file)
    assert run("comparisons", "report", "1").out == (
        "The report is in compare-comparison-0.html.\n"
    )
    run("comparisons", "report", "1", "--format", "markdown")
    run("comparisons", "report", "1", "--output", "mine.json")
    assert [format for _, format, _ in evaluation.downloads] == [
        pb.REPORT_FORMAT_HTML,
        pb.REPORT_FORMAT_MARKDOWN,
        pb.REPORT_FORMAT_JSON,
    ]
    for name in ("compare-comparison-0.html", "compare-comparison-0.md", "mine.json"):
        assert (tmp_path / name).read_bytes() == evaluation.content


def test_a_report_goes_to_standard_output(served, evaluation, run, file):
    run("compare", file)
    evaluation.content = b"# Report\n"
    with tworoads(served.address, "comparisons", "report", "1", "-o", "-") as process:
        assert process.stdout.read() == "# Report\n"


def test_a_verdict_is_applied_later_and_the_policies_are_listed(run, file):
    assert run("policies").out.startswith("There is no policy yet: AUTO retrieves")
    run("compare", file, "-c", "handbook")
    assert run("comparisons", "apply", "1").out == (
        "AUTO takes rag for corpus handbook from now on.\n"
    )
    ran = run("policies", "set", "other", "tuned", "--adapter", "style@0123456789ab")
    assert ran.out == "AUTO takes tuned with style@0123456789ab for corpus other from now on.\n"
    header, first, second = (line.split() for line in run("policies").out.splitlines())
    assert header == ["CORPUS", "PATH", "ADAPTER", "BY", "TYPE", "COMPARISON", "WHO", "WHEN"]
    assert first[:6] == ["handbook", "rag", "-", "-", "comparison-0", "default"]
    assert second[:6] == ["other", "tuned", "style@0123456789ab", "-", "-", "default"]
    assert [one["corpus"] for one in run("policies", "--json").json] == ["handbook", "other"]


def test_a_policy_by_type_is_told(run, evaluation, file):
    evaluation.verdict = decided(
        types=[pb.TypeVerdict(type="label", path=retrieval_pb2.PATH_BASE, candidate="base")],
        router=router(),
    )
    run("compare", file, "-c", "handbook")
    says = "AUTO takes rag for corpus handbook, base for label from now on.\n"
    assert run("comparisons", "apply", "1").out == says
    assert "  label: base  " in run("policies").out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compare", "absent.jsonl"], "cannot read absent.jsonl: No such file or directory"),
        (["compare", "FILE", "--examples", "absent"], "cannot read absent: No such file"),
        (["compare", "FILE", "--examples", "FILE"], 'line 1: not a JSON object with "question"'),
        (["compare", "FILE", "--changed", "absent.md"], "cannot read absent.md"),
        (["comparisons", "show", "absent"], "see which there are with `tworoads comparisons`"),
        (["comparisons", "apply", "absent"], "there is no comparison 'absent'"),
        (["policies", "set", "absent", "rag"], "or see which there are with `tworoads documents`"),
    ],
)
def test_an_error_is_one_sentence_that_says_what_to_do(run, file, words, says):
    ran = run(*(file if word == "FILE" else word for word in words))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("Error: ") and ran.err.count("\n") == 1
    assert says in ran.err


def test_a_service_that_is_full_is_told(run, evaluation, file):
    evaluation.refusals = [Overloaded("QUEUE_FULL", "too many comparisons wait; try again later")]
    assert run("compare", file) == Ran(1, "", "Error: too many comparisons wait; try again later\n")


@pytest.mark.parametrize(
    "words",
    [["compare", "-"], ["comparisons"], ["comparisons", "watch", "a"], ["policies"]],
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
        ["compare"],
        ["compare", "-", "--min-quality", "2"],
        ["compare", "-", "--scorer", "bleu"],
        ["compare", "-", "--paths", "auto"],
        ["compare", "-", "--paths", "tuned"],
        ["compare", "-", "--paths", "few-shot"],
        ["compare", "-", "--detach", "--apply"],
        ["comparisons", "show"],
        ["comparisons", "sing"],
        ["comparisons", "report", "1", "--format", "pdf"],
        ["policies", "set", "handbook", "auto"],
    ],
)
def test_wrong_usage_exits_with_2(run, words):
    ran = run(*words)
    assert (ran.code, ran.out) == (2, "")
    assert "Usage: tworoads" in ran.err


@pytest.mark.parametrize(
    "words",
    [
        ["compare"],
        ["comparisons"],
        *(["comparisons", command] for command in ("show", "watch", "cancel", "apply")),
        ["policies"],
        ["policies", "set"],
    ],
)
def test_the_help_shows_the_docstring_and_json(run, words):
    ran = run(*words, "-h")
    assert ran.code == 0
    assert f"Usage: tworoads {' '.join(words)}" in ran.out and "--json" in ran.out
