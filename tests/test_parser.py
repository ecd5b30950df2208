import asyncio
import json
import os
import select
import signal
import sys

import pytest

from services.retrieval.parser import Parser
from services.retrieval.parsing import Limits, Section, parse
from services.runtime.errors import InvalidInput, Unavailable

SLOW = "tests.slow_parsing"


async def reason_of(parser, data):
    with pytest.raises(InvalidInput) as caught:
        await parser.parse(data, "text/plain")
    return caught.value.reason


async def text_of(parser, data):
    return (await parser.parse(data, "text/plain")).text


async def ended(pid):
    """Waits until a process, not a child of this one, is gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    try:
        return bool(await asyncio.to_thread(poll.poll, 30_000))
    finally:
        os.close(handle)


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


async def test_a_document_comes_back_as_if_it_was_parsed_here():
    data = "# Ünï\n\ntext 😀\n\n## Two\n\nmore".encode()
    large = b"# A\n\n" + b"Some words. " * 50_000
    async with Parser() as parser:
        for document in (data, large):
            there = await parser.parse(document, "text/markdown")
            assert there == parse(document, "text/markdown")


async def test_an_error_of_the_parser_keeps_its_reason_and_message():
    async with Parser(limits=Limits(characters=100)) as parser:
        with pytest.raises(InvalidInput, match="line 1 is not a JSON object") as caught:
            await parser.parse(b"nope", "application/jsonl")
        assert caught.value.reason == "MALFORMED"
        assert await reason_of(parser, b"x" * 101) == "TOO_LARGE"
        assert await text_of(parser, b"fine") == "fine"


async def test_a_document_that_is_too_large_is_not_even_sent():
    async with Parser(limits=Limits(input_bytes=3), module="no.such.module") as parser:
        assert await reason_of(parser, b"four") == "TOO_LARGE"


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"hang", "PARSE_TIMEOUT"),
        (b"hog", "PARSE_MEMORY"),
        (b"kill", "PARSE_CRASHED"),
        (b"segfault", "PARSE_CRASHED"),
        (b"exit", "PARSE_CRASHED"),
        (b"lie", "PARSE_CRASHED"),
    ],
)
async def test_a_document_that_takes_its_process_down_harms_no_other(document, reason):
    seconds = 4 if document == b"hang" else 20
    async with Parser(seconds=seconds, memory_mb=400, module=SLOW) as parser:
        before = await text_of(parser, b"pid")
        first, second = await asyncio.gather(
            reason_of(parser, document), parser.parse(b"next", "text/plain")
        )
        assert first == reason
        assert second.text == "next"
        assert second.sections == (Section(0, 4, ("a", "b"), 3),)
        assert await text_of(parser, b"pid") != before
        assert await ended(int(before))


async def test_a_hung_document_does_not_stop_those_beside_it():
    async with Parser(processes=2, seconds=60, module=SLOW) as parser:
        hung = asyncio.create_task(reason_of(parser, b"hang"))
        assert [await text_of(parser, b"x") for _ in range(50)] == ["x"] * 50
        assert not hung.done()
        hung.cancel()


async def test_a_process_that_dies_while_idle_is_replaced():
    async with Parser(module=SLOW) as parser:
        pid = int(await text_of(parser, b"pid"))
        os.kill(pid, signal.SIGKILL)
        assert await ended(pid)
        assert int(await text_of(parser, b"pid")) != pid


async def test_a_caller_that_leaves_frees_its_process(fifo):
    async with Parser(module=SLOW) as parser:
        caller = asyncio.create_task(parser.parse(f"tell {fifo}".encode(), "text/plain"))
        pid = int(await asyncio.to_thread(fifo.read_text))
        waiting = asyncio.create_task(text_of(parser, b"next"))
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert await waiting == "next"
        assert await ended(pid)


async def test_a_caller_that_leaves_the_queue_costs_nothing(fifo):
    async with Parser(module=SLOW) as parser:
        holder = asyncio.create_task(parser.parse(f"tell {fifo}".encode(), "text/plain"))
        gone = asyncio.create_task(text_of(parser, b"gone"))
        last = asyncio.create_task(text_of(parser, b"last"))
        await asyncio.to_thread(fifo.read_text)
        gone.cancel()
        holder.cancel()
        assert await last == "last"
        assert gone.cancelled()


async def test_callers_are_served_in_the_order_they_came():
    served = []

    async def call(number):
        served.append(await text_of(parser, str(number).encode()))

    async with Parser(module=SLOW) as parser:
        await asyncio.gather(*(call(number) for number in range(30)))
    assert served == [str(number) for number in range(30)]


async def test_what_a_library_prints_is_not_taken_for_an_answer():
    async with Parser(module=SLOW) as parser:
        assert await text_of(parser, b"print") == "print"
        assert await text_of(parser, b"next") == "next"


async def test_the_process_has_none_of_our_files_and_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    secret = os.open(tmp_path / "secret", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(secret, True)
    async with Parser(module=SLOW) as parser:
        files = await text_of(parser, b"files")
        assert "secret" not in files and "pipe:" in files
        assert await text_of(parser, b"environment API_KEY") == "unset"
    os.close(secret)


async def test_closing_ends_the_processes():
    async with Parser(processes=2, module=SLOW) as parser:
        pids = [int(await text_of(parser, b"pid")) for _ in range(2)]
        assert len(set(pids)) == 2
    assert [await ended(pid) for pid in pids] == [True, True]


async def test_closing_is_no_fault_of_the_documents_in_work(fifo):
    async with Parser(module=SLOW) as parser:
        busy = asyncio.create_task(parser.parse(f"tell {fifo}".encode(), "text/plain"))
        waiting = asyncio.create_task(text_of(parser, b"next"))
        pid = int(await asyncio.to_thread(fifo.read_text))
    for caller in (busy, waiting):
        with pytest.raises(Unavailable) as caught:
            await caller
        assert caught.value.reason == "PARSER_CLOSED"
    assert await ended(pid)


async def test_a_parser_that_does_not_start_is_unavailable():
    async with Parser(module="no.such.module") as parser:
        with pytest.raises(Unavailable) as caught:
            await parser.parse(b"x", "text/plain")
        assert caught.value.reason == "PARSER_NOT_STARTED"


PARENT = """
import asyncio, json, sys
from services.retrieval.parser import Parser

async def main():
    async with Parser(processes=2, module="tests.slow_parsing") as parser:
        idle = (await parser.parse(b"pid", "text/plain")).text
        print(json.dumps(int(idle)), flush=True)
        await asyncio.gather(
            *(parser.parse(f"tell {path}".encode(), "text/plain") for path in sys.argv[1:])
        )

asyncio.run(main())
"""


async def test_no_process_outlives_a_parent_that_is_killed(tmp_path):
    fifos = [tmp_path / "1", tmp_path / "2"]
    for path in fifos:
        os.mkfifo(path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT, *map(str, fifos)),
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    assert parent.stdout is not None
    first = json.loads(await parent.stdout.readline())
    busy = [int(await asyncio.to_thread(path.read_text)) for path in fifos]
    assert first in busy
    parent.kill()
    await parent.wait()
    assert [await ended(pid) for pid in busy] == [True, True]


async def test_small_documents_are_quick():
    """500 in a second, through one process; ten times slower is a fault even of a busy machine."""
    document = b"A small document with a sentence. " * 50
    async with Parser() as parser:
        await text_of(parser, document)
        clock = asyncio.get_running_loop().time
        start = clock()
        await asyncio.gather(*(text_of(parser, document) for _ in range(500)))
        assert clock() - start < 10
