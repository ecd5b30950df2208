"""Everything that a stack knows is destroyed and comes back from its backup."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.real.stack import COMMAND, RunningStack, start_stack

HANDBOOK = Path(__file__).parents[2] / "examples" / "handbook"
QUESTION = "Who leads the security team?"


def known(stack: RunningStack) -> dict[str, Any]:
    """Return what the stack says of all that it keeps."""
    comparison = stack.json("comparisons")[0]["id"]
    return {
        "documents": stack.json("documents", "handbook"),
        "search": stack.json("search", QUESTION, "--corpus", "handbook"),
        "policies": stack.json("policies"),
        "comparisons": stack.json("comparisons"),
        "answers": stack.tworoads("comparisons", "answers", comparison),
        "jobs": stack.json("jobs"),
        "adapters": stack.json("adapters"),
    }


def test_what_a_stack_knew_is_there_again_after_all_was_destroyed(tmp_path: Path) -> None:
    data, copy = tmp_path / "data", tmp_path / "copy"
    questions = tmp_path / "questions.jsonl"
    questions.write_text(f'{{"question": "{QUESTION}", "answers": ["Lena Okafor"]}}\n')
    examples = tmp_path / "examples.jsonl"
    line = '{{"question": "Say {0}", "answer": "{0}"}}\n'
    examples.write_text("".join(line.format(number) for number in range(20)))
    with start_stack(data) as stack:
        stack.tworoads("ingest", str(HANDBOOK), "--corpus", "handbook")
        stack.tworoads("tune", str(examples), "--name", "numbers", "--epochs", "1")
        stack.tworoads("policies", "set", "handbook", "hybrid", "--adapter", "numbers")
        stack.tworoads("compare", str(questions), "--corpus", "handbook", "--paths", "rag")
        before = known(stack)
        with pytest.raises(subprocess.CalledProcessError):  # it runs
            subprocess.run([COMMAND, "backup", copy, "--data", data], check=True)
    assert before["documents"] and before["jobs"] and before["adapters"]
    subprocess.run([COMMAND, "backup", copy, "--data", data], check=True)
    shutil.rmtree(data)
    subprocess.run([COMMAND, "restore", copy, "--data", data], check=True)
    with start_stack(data) as stack:
        assert known(stack) == before
        again = stack.json("ingest", str(HANDBOOK), "--corpus", "handbook")
        assert (again["indexed"], again["failed"]) == (0, [])  # all of it unchanged
        answer = stack.json("ask", QUESTION, "--corpus", "handbook", "--max-tokens", "8")
        assert answer["path"] == "hybrid" and answer["adapter"].startswith("numbers@")
