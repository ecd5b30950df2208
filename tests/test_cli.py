"""The commands that talk to the gateway, as a user types them."""

import io
import json
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.cli.ask import Printer
from services.gateway.citations.sentences import SentenceSplitter
from services.runtime.errors import Overloaded
from tests.command import Ran, in_a_thread, on_a_terminal, tworoads, typed
from tests.small_stack import FakeGeneration, SmallStack, small_stack

LEAVE = "Employees get 27 days of paid leave. Ask for leave ten days ahead."
QUESTION = "How many days of leave?"
EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"  # clears the screen, renames the window, turns text


Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[SmallStack]:
    with in_a_thread(small_stack(tmp_path_factory.mktemp("store"))) as running:
        yield running


@pytest.fixture
def generation(stack) -> FakeGeneration:
    """The fake model, as new."""
    stack.generation.__init__()
    return stack.generation


@pytest.fixture
def run(stack, generation, monkeypatch, capsys) -> Run:
    """Type a command; `stdin` is what is piped into it."""
    monkeypatch.setenv("TWOROADS_ADDRESS", stack.address)
    monkeypatch.delenv("TWOROADS_CORPUS", raising=False)

    return lambda *words, stdin=b"": typed(words, stdin, monkeypatch, capsys)


@pytest.fixture
def corpus(run, tmp_path) -> str:
    """A corpus that holds one document, leave.txt."""
    name = re.sub("[^a-z0-9]+", "-", tmp_path.name.lower()).strip("-")
    (tmp_path / "leave.txt").write_text(LEAVE)
    assert run("ingest", tmp_path / "leave.txt", "--corpus", name).code == 0
    return name


@pytest.fixture
def here(tmp_path, monkeypatch) -> None:
    """A working folder with a file, a.txt, and a folder with none, nothing."""
    (tmp_path / "a.txt").write_text("Some words.")
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nothing answers: its port is taken and never listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_a_folder_of_mixed_files_is_ingested_listed_and_deleted(run, tmp_path):
    (tmp_path / "faq.jsonl").write_text('{"id": "q1", "text": "One."}\n{"id": "q2", "text": "2."}')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text("# Leave\n\nSome words.")
    (tmp_path / "rows.csv").write_text("name,days\nAda,27\n")
    (tmp_path / "logo.png").write_bytes(b"\x89PNG")
    words = ("ingest", tmp_path, "--corpus", "mixed")
    assert run(*words) == Ran(0, "4 indexed, 0 unchanged, 0 failed in corpus mixed.\n", "")
    assert run(*words).out == "0 indexed, 4 unchanged, 0 failed in corpus mixed.\n"
    listed = run("documents", "mixed").out.splitlines()
    assert listed[0].split() == ["ID", "TITLE", "PASSAGES", "CHARACTERS", "UPDATED"]
    assert [line.split()[0] for line in listed[1:]] == ["q1", "q2", "rows.csv", "sub/a.md"]
    rows = run("documents", "mixed", "--json").json
    assert [row["id"] for row in rows] == ["q1", "q2", "rows.csv", "sub/a.md"]
    assert rows[3]["title"] == "Leave" and rows[3]["uri"] == (tmp_path / "sub/a.md").as_uri()
    assert {"corpus": "mixed", "documents": 4, "embedder": "fake"} in run(
        "documents", "--json"
    ).json
    gone = run("delete", "q1", "absent", "--corpus", "mixed")
    assert gone.out == "1 of 2 documents deleted from corpus mixed.\n"
    assert run("delete", "q2", "-c", "mixed", "--json").json == {"corpus": "mixed", "deleted": 1}
    assert run("delete", "--whole-corpus", "-c", "mixed").out == "The corpus mixed is deleted.\n"
    assert "mixed" not in run("documents").out


def test_documents_that_fail_are_told_and_the_others_are_indexed(run, tmp_path):
    (tmp_path / "a.pdf").write_text("no PDF")
    (tmp_path / "b.jsonl").write_text('{"id": "q1", "text": "One."}\n{"id": "q2"\n')
    (tmp_path / "c.txt").write_text("Some words.")
    ran = run("ingest", tmp_path, "--corpus", "broken")
    assert (ran.code, ran.out) == (1, "2 indexed, 0 unchanged, 2 failed in corpus broken.\n")
    assert [line.split(": ")[1] for line in ran.err.splitlines()] == ["a.pdf", "b.jsonl, line 2"]
    ran = run("ingest", tmp_path, "--corpus", "broken", "--json")
    assert ran.code == 1
    assert (ran.json["indexed"], ran.json["unchanged"]) == (0, 2)
    assert [(f["id"], f["reason"]) for f in ran.json["failed"]] == [
        ("a.pdf", "MEDIA_TYPE_MISMATCH"),
        ("b.jsonl, line 2", "MALFORMED"),
    ]


def test_an_answer_has_its_marks_behind_the_sentences_and_the_quotes_below(run, corpus, generation):
    generation.answer = "Employees get 27 days of paid leave. They get 99 days. Bye"
    ran = run("ask", QUESTION, "--corpus", corpus)
    assert ran.out == (
        "Employees get 27 days of paid leave. [1] They get 99 days. [?] Bye [?]\n"
        '\n[1] "Employees get 27 days of paid leave."\n'
        "    leave.txt, characters 0-36\n"
        "\n[?] no passage supports this sentence\n"
    )
    assert (ran.code, ran.err) == (0, "")


def test_an_answer_as_json_has_the_promised_shape(run, corpus, generation):
    generation.answer = "Employees get 27 days of paid leave. They get 99 days."
    answer = run("ask", QUESTION, "--corpus", corpus, "--path", "rag", "--json").json
    assert answer["answer"] == generation.answer
    assert (answer["path"], answer["reason"]) == ("rag", "ASKED")
    (citation,) = answer["citations"]
    assert citation.pop("support") > 0.9
    assert citation == {
        "answer_start": 0,
        "answer_end": 36,
        "document": "leave.txt",
        "source_start": 0,
        "source_end": 36,
        "quote": LEAVE[:36],
    }
    assert answer["unsupported"] == [[37, 54]]
    assert answer["passages"][0]["document"] == "leave.txt"
    assert answer["usage"]["output_tokens"] == 11
    assert answer["timings_ms"]["prefill"] == 2


def test_a_question_is_read_from_standard_input(run, generation):
    generation.answer = "Some."
    question = "How many däys?\n"
    assert run("ask", "-", "--path", "base", stdin=question.encode()).out == "Some.\n"
    assert generation.requests[0].messages[-1].parts[-1].text.rstrip().endswith("How many däys?")


def test_nothing_found_is_said_and_nothing_is_written(run, tmp_path):
    (tmp_path / "a.txt").write_text("Some words.")
    run("ingest", tmp_path, "-c", "empty")
    run("delete", "a.txt", "-c", "empty")
    ran = run("ask", QUESTION, "-c", "empty", "--path", "rag")
    assert (ran.code, ran.out) == (
        0,
        "Nothing in the corpus answers this, so nothing was written.\n",
    )
    assert run("search", QUESTION, "-c", "empty").out == "Nothing was found.\n"
    assert "tworoads ingest FOLDER --corpus empty" in run("documents", "empty").out


def test_a_search_prints_passages_with_where_they_stand(run, corpus):
    assert re.fullmatch(
        rf"1\. leave\.txt \(\d\.\d{{4}}\)\n   {re.escape(LEAVE)}\n\n",
        run("search", "paid leave", "-c", corpus).out,
    )
    (passage,) = run("search", "paid leave", "-c", corpus, "--mode", "text", "--json").json
    assert (passage["document"], passage["start"], passage["end"]) == ("leave.txt", 0, len(LEAVE))
    assert passage["text"] == LEAVE


def test_what_a_terminal_might_obey_is_never_printed(run, tmp_path, generation):
    evil = json.dumps({"id": "a\x9b\u202eb", "text": LEAVE + EVIL, "title": EVIL})
    (tmp_path / "evil.jsonl").write_text(evil)
    (tmp_path / "bad\x1b[31m\udcff.pdf").write_text("no PDF")
    generation.answer = f"Employees get 27 days of paid leave. {EVIL} Then more."
    words = ("-c", "evil")
    for ran in (
        run("ingest", tmp_path, *words),
        run("documents", *words[1:]),
        run("search", "leave", *words),
        run("ask", QUESTION, *words),
        run("ingest", tmp_path, *words, "--json"),
        run("documents", *words[1:], "--json"),
        run("search", "leave", *words, "--json"),
        run("ask", QUESTION, *words, "--json"),
        run("ask", EVIL, "-c", EVIL),
        run("ingest", tmp_path / EVIL),
    ):
        assert ran.out + ran.err
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\udcff]", ran.out + ran.err)
    assert run("ask", QUESTION, *words, "--json").json["answer"] == generation.answer


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ask", QUESTION, "-c", "absent"], "tworoads ingest FOLDER --corpus NAME"),
        (["search", QUESTION, "-c", "absent"], "tworoads ingest FOLDER --corpus NAME"),
        (["documents", "absent"], "tworoads ingest FOLDER --corpus NAME"),
        (["delete", "a", "-c", "absent"], "there is no corpus 'absent'"),
        (["delete", "--whole-corpus", "-c", "absent"], "there is no corpus 'absent'"),
        (["ingest", "absent.txt"], "cannot read absent.txt: No such file or directory"),
        (["ingest", "a.txt", "-c", "No Name"], "a corpus name is 1 to 64 of a-z"),
        (["ingest", "nothing"], "there is no file to ingest"),
        (["ask", " ", "--path", "base"], "the question is empty; say what you want to know"),
        (["ask", "a" * 10_000_000], "the question is too long"),
        (["ask", "\udcff"], "what was sent is not UTF-8 text"),
        (["ask", "-"], "standard input is not UTF-8 text"),
        (["ask", QUESTION, "--path", "tuned"], "name it with --adapter"),
        (["ask", QUESTION, "--path", "tuned", "--adapter", "a"], "with `tworoads adapters`"),
    ],
)
def test_an_error_is_one_sentence_that_says_what_to_do(run, here, words, says):
    ran = run(*words, stdin=b"\xff")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("Error: ") and ran.err.count("\n") == 1
    assert says in ran.err


def test_a_service_that_is_full_is_told(run, generation):
    assert run("ask", QUESTION, "--path", "base").code == 0
    generation.error = Overloaded("QUEUE_FULL", "the engine is busy; try again later")
    ran = run("ask", QUESTION, "--path", "base")
    assert ran == Ran(1, "", "Error: the engine is busy; try again later\n")


def test_an_answer_that_takes_too_long_ends_its_line_and_says_so(run, generation):
    generation.hold_after = 2
    ran = run("ask", QUESTION, "--path", "base", "--timeout", "1")
    assert (ran.code, ran.out) == (1, "I do\n")
    assert ran.err.startswith("Error: ") and "--timeout" in ran.err


@pytest.mark.parametrize(
    "words",
    [
        ["ask", QUESTION],
        ["search", QUESTION],
        ["documents"],
        ["delete", "a"],
        ["ingest", "a.txt"],
    ],
)
def test_without_a_stack_the_error_says_how_to_start_one(run, here, nobody, words):
    ran = run(*words, "--address", nobody)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"Error: nothing answers at {nobody}: start it with `tworoads up`")


@pytest.mark.parametrize(
    "words",
    [
        ["ask"],
        ["ask", QUESTION, "--path", "sideways"],
        ["ask", QUESTION, "--limit", "0"],
        ["search", QUESTION, "--mode", "none"],
        ["ingest"],
        ["delete"],
        ["delete", "a", "--whole-corpus"],
        ["sing"],
    ],
)
def test_wrong_usage_exits_with_2(run, words):
    ran = run(*words)
    assert (ran.code, ran.out) == (2, "")
    assert "Usage: tworoads" in ran.err


@pytest.mark.parametrize("command", ["ingest", "documents", "delete", "search", "ask"])
def test_the_help_shows_the_docstring_and_json(run, command):
    ran = run(command, "--help")
    assert ran.code == 0
    assert f"Usage: tworoads {command}" in ran.out and "--json" in ran.out


def test_ctrl_c_ends_an_answer_without_a_traceback(stack, generation):
    generation.hold_after = 2
    with tworoads(stack.address, "ask", QUESTION, "--path", "base") as process:
        assert process.stdout.read(4) == "I do"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode != 0
    assert "Traceback" not in err and "Error" not in err


def test_a_reader_that_leaves_gets_no_traceback(stack, generation):
    generation.answer = "word " * 50_000
    with tworoads(stack.address, "ask", QUESTION, "--path", "base") as process:
        assert process.stdout.read(4) == "word"
        process.stdout.close()
        err = process.stderr.read()
    assert "Traceback" not in err and "Exception" not in err


def test_a_terminal_sees_progress_and_a_pipe_does_not(stack, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("Some words.")
    words = ("ingest", str(tmp_path), "--corpus", "progress")
    out, shown = on_a_terminal(stack.address, *words)
    assert "3/3" in shown and "3 passages" in shown
    assert out == "3 indexed, 0 unchanged, 0 failed in corpus progress.\n"
    with tworoads(stack.address, *words) as process:
        assert process.communicate() == (
            "0 indexed, 3 unchanged, 0 failed in corpus progress.\n",
            "",
        )


SENTENCES = (
    "It costs 3.50 euros. ",
    'She said "no." ',
    "Ask Dr. Who in Sec. 5 of it.\n",
    "Made by Foo Inc. The rest follows.\n\n",
    "See there [3]. [4] ",
    "- An item\n",
    "1. The first\n",
    "Wait... what?! ",
    "是的。",
    "No end",
    "\n   \n",
)


@given(
    st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=6).map("".join),
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
)
def test_marks_stand_exactly_behind_their_sentences_however_the_text_was_cut(text, sizes):
    whole = SentenceSplitter()
    ends = [end for _, end, _ in whole.feed(text) + whole.finish()]
    expected = text
    for end in reversed(ends):
        expected = f"{expected[:end]} [?]{expected[end:]}"

    printer, splitter = Printer(), SentenceSplitter()
    position = 0
    with redirect_stdout(io.StringIO()) as printed:
        while position < len(text):
            size = sizes[position % len(sizes)]
            piece = text[position : position + size]
            position += size
            printer.text(piece)
            for _, end, _ in splitter.feed(piece):
                printer.mark(end, "[?]")
        for _, end, _ in splitter.finish():
            printer.mark(end, "[?]")
        printer.end()
    assert printed.getvalue() == expected + "\n"
