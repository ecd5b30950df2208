import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clients.cli.app import app
from clients.cli.logs import Tail, parse, readable
from clients.stack import module


def entry(time: str, message: str, **fields: str) -> str:
    record = {"time": f"2026-01-01T00:00:{time}Z", "level": "INFO", "request": "-"}
    return json.dumps(record | {"message": message} | fields) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "a.log").write_text(
        entry("01.000", "one") + "not JSON\n" + entry("03.000", "three", request="r1")
    )
    (logs / "b.log").write_text(entry("02.000", "two") + entry("04.000", "four", exception="E\nF"))
    return tmp_path


def lines(folder: Path, *options: str) -> list[str]:
    result = CliRunner().invoke(app, ["logs", "--data", str(folder), *options])
    assert result.exit_code == 0
    return result.stdout.splitlines()


def test_the_lines_of_all_services_come_in_the_order_of_their_times(folder: Path) -> None:
    shown = [line.partition(":00:")[2] or line for line in lines(folder)]
    assert shown == [
        "01 a INFO one",
        "a not JSON",
        "02 b INFO two",
        "03 a INFO three [r1]",
        "04 b INFO four",
        "E",
        "F",
    ]


def test_one_service_and_its_last_lines_can_be_chosen(folder: Path) -> None:
    assert [line.split()[-2:] for line in lines(folder, "a", "-n", "2")] == [
        ["not", "JSON"],
        ["three", "[r1]"],
    ]


def test_json_has_one_object_a_line_with_the_service(folder: Path) -> None:
    entries = [json.loads(line) for line in lines(folder, "--json")]
    assert [(e["service"], e["message"]) for e in entries] == [
        ("a", "one"),
        ("a", "not JSON"),
        ("b", "two"),
        ("a", "three"),
        ("b", "four"),
    ]


def test_following_shows_what_is_written_later(folder: Path) -> None:
    argv = [*module("clients.cli"), "logs", "--data", str(folder), "--follow", "a"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for end in ("one", "JSON", "[r1]"):
            assert process.stdout.readline().rstrip().endswith(end)
        with (folder / "logs" / "a.log").open("a") as log:
            log.write(entry("05.000", "five"))
        assert process.stdout.readline().rstrip().endswith("five")
        process.terminate()


def test_a_tail_goes_on_with_the_log_of_the_next_stack_and_with_whole_lines(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("old\nhal")
    tail = Tail("a", log)
    assert [e["message"] for e in tail.read()] == ["old"]
    with log.open("a") as file:
        file.write("f\n")
    log.rename(tmp_path / "a.log.1")
    log.write_text("new\n")
    assert [e["message"] for e in tail.read()] == ["half", "new"]
    assert tail.read() == []


@pytest.mark.parametrize(
    "line", ["plain", "3", "[]", '{"message": "m", "level": null}', '{"message']
)
def test_a_line_that_is_no_entry_is_shown_as_it_is(line: str) -> None:
    assert readable(parse(line)) == line


def test_what_a_terminal_might_obey_is_left_out() -> None:
    assert readable(parse("a\x1b[2Jb\tc")) == "a[2Jb\tc"


def test_the_log_of_an_unknown_service_names_those_that_there_are(folder: Path) -> None:
    result = CliRunner().invoke(app, ["logs", "c", "--data", str(folder)])
    assert "there are: a, b" in str(result.exception)
