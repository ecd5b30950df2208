"""How many cores a process counts on, in a container and outside."""

import os
from pathlib import Path

import pytest

from services.runtime.processor import cores

V2 = "cpu.max"
QUOTA, PERIOD = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"
EIGHT = set(range(8))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({V2: "400000 100000\n"}, 4),
        ({V2: "150000 100000\n"}, 2),  # one and a half keep two busy now and then
        ({V2: "10000 100000\n"}, 1),
        ({V2: "6400000 100000\n"}, 8),  # more than there are
        ({V2: "max 100000\n"}, 8),
        ({V2: ""}, 8),
        ({}, 8),
        ({QUOTA: "200000\n", PERIOD: "100000\n"}, 2),
        ({QUOTA: "-1\n", PERIOD: "100000\n"}, 8),
        ({QUOTA: "200000\n"}, 8),
    ],
)
def test_a_limit_of_the_container_counts_as_much_as_the_cores_of_the_machine(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: EIGHT)
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert cores(tmp_path) == expected


def test_a_process_that_is_kept_to_one_core_counts_one(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cores(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, before)
