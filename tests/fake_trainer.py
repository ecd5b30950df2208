"""A child that does what the lines of FOLDER/training.jsonl say, instead of training."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

folder = Path(sys.argv[1])
for line in (folder / "training.jsonl").read_text().splitlines():
    action, _, rest = line.partition(" ")
    if action == "say":
        print(rest, flush=True)
    elif action == "log":
        print(rest, file=sys.stderr, flush=True)
    elif action == "flood":
        print(("x" * 99 + "\n") * int(rest), file=sys.stderr, flush=True)
    elif action == "pid":
        print(json.dumps({"step": os.getpid(), "steps": 0}), flush=True)
    elif action == "grandchild":
        child = subprocess.Popen(["sleep", "1000"])
        print(json.dumps({"step": child.pid, "steps": 0}), flush=True)
    elif action == "orphan":  # it holds standard error open, as what a library starts does
        child = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL)
        print(json.dumps({"step": child.pid, "steps": 0}), flush=True)
    elif action == "environment":
        print(json.dumps(dict(os.environ)), file=sys.stderr, flush=True)
    elif action == "result":
        (folder / "result.json").write_text(rest)
    elif action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "read":  # waits until somebody writes to the pipe FOLDER/go
        (folder / "go").open().readline()
    elif action == "wait":
        signal.pause()
    elif action == "exit":
        sys.exit(int(rest))
