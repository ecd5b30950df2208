import asyncio
import json
import os
import select
import time
from contextlib import aclosing

import pytest

from services.tuning.job import Options, Progress
from services.tuning.training.batches import Tokens, batch_tokens, batches, read, sample, schedule
from services.tuning.training.checkpoints import keep, newest, saving, seal
from services.tuning.training.trainer import (
    LOG_BYTES,
    LOG_TAIL_BYTES,
    ChildTrainer,
    Trained,
    TrainingFailed,
    read_plan,
)

RESULT = 'result {"held_out_loss": 0.5, "seconds": 2.0, "probes": [[-0.1, -0.2]]}'
SAID = '{"step": 1, "steps": 2, "loss": 3.5, "tokens_per_second": 10.0, "seconds_left": 4.0}'


@pytest.fixture
def trainer(tmp_path):
    return ChildTrainer(tmp_path / "model", "float32", 1, module="tests.fake_trainer")


def script(folder, *lines):
    (folder / "training.jsonl").write_text("\n".join(lines))


async def news_of(trainer, folder, options=Options()):  # noqa: B008
    async with aclosing(trainer.train(folder, options)) as news:
        return [item async for item in news]


async def failure_of(trainer, folder):
    with pytest.raises(TrainingFailed) as caught:
        await news_of(trainer, folder)
    return caught.value


def gone(pid):
    """Wait at most 10 s until a process is gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(10_000))
    finally:
        os.close(handle)


async def test_progress_and_the_result_come_from_the_child(trainer, tmp_path):
    script(tmp_path, f"say {SAID}", RESULT)
    assert await news_of(trainer, tmp_path) == [
        Progress(1, 2, 3.5, None, 10.0, 4.0),
        Trained(0.5, 2.0, [[-0.1, -0.2]]),
    ]


async def test_the_child_finds_its_plan_and_no_secret(trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "x")
    options = Options(rank=8, targets=("q_proj",), seed=3)
    script(tmp_path, "environment", RESULT)
    await news_of(trainer, tmp_path, options)
    plan, taken = read_plan(tmp_path)
    assert taken == options
    assert plan["dtype"] == "float32" and plan["threads"] == 1
    environment = json.loads((tmp_path / "log").read_text())
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["OMP_NUM_THREADS"] == "1"
    assert "A_SECRET" not in environment


async def test_a_result_that_nobody_took_is_not_trained_again(trainer, tmp_path):
    script(tmp_path, "exit 1")
    (tmp_path / "result.json").write_text(RESULT.partition(" ")[2])
    assert await news_of(trainer, tmp_path) == [Trained(0.5, 2.0, [[-0.1, -0.2]])]


@pytest.mark.parametrize(
    ("lines", "reason", "message"),
    [
        (["exit 3"], "TRAINER_DIED", "status 3"),
        (["exit 0"], "TRAINER_DIED", "without a result"),
        (["kill"], "TRAINER_DIED", "SIGKILL"),
        (["say nonsense", "wait"], "TRAINER_DIED", "understands"),
        (['say {"stepp": 1}', "wait"], "TRAINER_DIED", "understands"),
        (["say " + "x" * 100_000, "wait"], "TRAINER_DIED", "understands"),
        (['say {"reason": "STORE_FULL", "message": "full"}', "exit 1"], "STORE_FULL", "full"),
        (['say {"reason": "LOSS_NOT_FINITE", "message": "nan"}', "exit 1"], "LOSS_NOT_FINITE", ""),
    ],
)
async def test_a_child_without_a_result_fails_with_a_reason(
    trainer, tmp_path, lines, reason, message
):
    script(tmp_path, "log last words", *lines)
    failed = await failure_of(trainer, tmp_path)
    assert failed.reason == reason
    assert message in failed.message
    assert failed.log_tail in ("last words\n", "")  # it may be killed before all is read


async def test_a_child_killed_for_want_of_memory_is_told_from_others(
    trainer, tmp_path, monkeypatch
):
    counter = tmp_path / "events"
    counter.write_text("oom 0\noom_kill 4\n")
    monkeypatch.setattr("services.tuning.training.trainer.KILL_COUNTERS", (counter,))
    script(tmp_path, "log last words", "pid", "wait")
    with pytest.raises(TrainingFailed) as caught:
        async with aclosing(trainer.train(tmp_path, Options())) as news:
            async for item in news:
                counter.write_text("oom 1\noom_kill 5\n")
                os.kill(item.step, 9)
    assert (caught.value.reason, caught.value.log_tail) == ("OUT_OF_MEMORY", "last words\n")


async def test_a_log_is_bounded_and_its_end_is_told(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("services.tuning.training.trainer.LOG_SECONDS", 25.0)
    script(tmp_path, "flood 20000", "log the end", "exit 1")
    failed = await failure_of(trainer, tmp_path)
    assert failed.log_tail.endswith("x\n\nthe end\n")
    assert len(failed.log_tail.encode()) <= LOG_TAIL_BYTES
    assert (tmp_path / "log").stat().st_size <= LOG_BYTES


async def test_closing_ends_the_child_and_what_it_started_at_once(trainer, tmp_path):
    script(tmp_path, "pid", "grandchild", "wait")
    pids = []
    async with aclosing(trainer.train(tmp_path, Options())) as news:
        async for item in news:
            pids.append(item.step)
            if len(pids) == 2:
                break
        start = time.monotonic()
    assert all([gone(pid) for pid in pids])
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("status", [0, 1])
async def test_a_result_counts_whatever_the_child_leaves_and_however_it_ends(
    trainer, tmp_path, status
):
    script(tmp_path, "orphan", RESULT, f"exit {status}")
    start = time.monotonic()
    orphan, trained = await news_of(trainer, tmp_path)
    assert trained == Trained(0.5, 2.0, [[-0.1, -0.2]])
    assert gone(orphan.step)
    assert time.monotonic() - start < 25


async def test_cancelling_ends_the_child_at_once(trainer, tmp_path):
    script(tmp_path, "pid", "wait")
    pid = asyncio.get_running_loop().create_future()

    async def follow():
        async with aclosing(trainer.train(tmp_path, Options())) as news:
            async for item in news:
                pid.set_result(item.step)

    following = asyncio.create_task(follow())
    started = await pid
    start = time.monotonic()
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following
    assert gone(started)
    assert time.monotonic() - start < 10


def example(length, held_out=False):
    return Tokens(list(range(length - 2)), [7, 8], held_out, False)


def test_examples_are_read_as_they_were_prepared(tmp_path):
    line = {"prompt": [1, 2, 70000], "answer": [4], "held_out": True, "probe": False}
    (tmp_path / "training.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = read(tmp_path / "training.jsonl")
    assert [list(found.prompt), list(found.answer), found.held_out, found.probe] == [*line.values()]


def test_batches_hold_like_lengths_and_no_more_than_the_budget():
    lengths = [5, 90, 6, 5, 30, 31, 5, 29]
    groups = batches([example(length) for length in lengths], 60)
    found = [[len(e) for e in group] for group in groups]
    assert found == [[5, 5, 5, 6], [29, 30], [31], [90]]  # what is longer stands alone


@pytest.mark.parametrize(("count", "tokens"), [(10, 256), (400, 625), (10_000, 1024)])
def test_a_small_set_is_trained_in_small_batches(count, tokens):
    assert batch_tokens([example(50)] * count, 1024) == tokens


def test_each_epoch_has_each_batch_once_in_an_order_that_the_seed_fixes():
    order = schedule(20, 3, seed=1)
    epochs = [order[0:20], order[20:40], order[40:60]]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order == schedule(20, 3, seed=1) != schedule(20, 3, seed=2)


def test_a_sample_is_all_or_what_the_seed_fixes():
    examples = [example(length) for length in range(3, 30)]
    assert len(sample(examples, 100, 0)) == 27
    assert sample(examples, 5, 0) == sample(examples, 5, 0) != sample(examples, 5, 1)


def checkpoint(folder, step, **facts):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"x" * step)
    seal(path, **facts)
    return path


def test_the_newest_whole_checkpoint_counts_and_half_ones_go(tmp_path):
    assert newest(tmp_path) is None
    checkpoint(tmp_path, 2, seconds=1.0)
    good = checkpoint(tmp_path, 10, seconds=3.5)
    cut = checkpoint(tmp_path, 20, seconds=9.0)
    (cut / "weights").write_bytes(b"x")
    (tmp_path / "checkpoint-30").mkdir()
    assert newest(tmp_path) == (good, {"seconds": 3.5})
    assert not cut.exists() and not (tmp_path / "checkpoint-30").exists()
    keep(tmp_path, good, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:820] . PytorchStreamWriter failed"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_has_a_reason_however_a_library_says_it(error):
    with pytest.raises(TrainingFailed) as caught, saving():
        raise error
    assert caught.value.reason == "STORE_FULL"


def test_other_errors_while_saving_stay_what_they_are():
    with pytest.raises(RuntimeError, match="else"), saving():
        raise RuntimeError("something else")
