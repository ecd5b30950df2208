"""An API server that knows jobs and their pods, over TLS on loopback.

Of a job that is created it starts the pod, if `plays` says so: the process that its container would
run, on the folder that it would see, with tests.fake_trainer in the place of what trains.
"""

import json
import os
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.certificates import Authority, write

Object = dict[str, Any]
ROOT = Path(__file__).parents[1]
NAMESPACE = "tworoads"


def pod_process(container: Object, volume: Path) -> "subprocess.Popen[bytes]":
    """Start what a container of a training pod runs. `volume` is the one that has the jobs."""
    environment = {one["name"]: one["value"] for one in container["env"]}
    [mount] = [one for one in container["volumeMounts"] if "subPathExpr" in one]
    inside = mount["subPathExpr"].replace("$(JOB)", environment["JOB"])
    command = [*container["command"][1:], *container["args"], "tests.fake_trainer"]
    seen = [part.replace(mount["mountPath"], str(volume / inside)) for part in command]
    return subprocess.Popen(
        ["setpriv", "--pdeathsig=KILL", "--", sys.executable, *seen],
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], **environment},
    )


class FakeCluster:
    """`jobs` and `pods` are by the name of the job. `answers` are statuses to give instead, by
    method, `calls` what was asked for: method, kind and name. Deleted jobs stay while `held`."""

    def __init__(self, volume: Path, account: Path, plays: bool = True) -> None:
        self.jobs: dict[str, Object] = {}
        self.pods: dict[str, Object] = {}
        self.created: list[Object] = []
        self.answers: dict[str, int] = {}
        self.calls: list[str] = []
        self.tokens: list[str] = []
        self.held = False
        self.account = account
        self._plays = plays
        self._volume = volume
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "FakeCluster":
        authority = Authority()
        tls = write(self.account.with_name("tls"), *authority.issue("127.0.0.1"), authority.pem)
        self.account.mkdir()
        (self.account / "ca.crt").write_bytes(authority.pem)
        (self.account / "token").write_text("first")
        (self.account / "namespace").write_text(NAMESPACE)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(tls / "tls.crt", tls / "tls.key")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        # The thread of a connection shakes hands, not the one that accepts them: a caller who is
        # cancelled in the middle of it would keep all others waiting.
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.address = f"https://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for name in list(self._processes):
            self.end(name)

    def end(self, name: str) -> None:
        """End the process of a pod as a node does."""
        if process := self._processes.pop(name, None):
            process.terminate()
            process.wait()

    def finish(self, name: str, condition: str, **status: Any) -> None:
        """Say of a job how it ended, and of its pod how that is."""
        if name in self.jobs:
            self.jobs[name]["status"] = {"conditions": [{"type": condition, "status": "True"}]}
            self.pods[name] = {"status": status}

    def released(self) -> None:
        """Let deleted jobs go."""
        self.held = False
        for name, job in list(self.jobs.items()):
            if "deletionTimestamp" in job["metadata"]:
                self._forget(name)

    def answer(self, method: str, kind: str, name: str, body: Object) -> tuple[int, Object]:
        self.calls.append(f"{method} {kind} {name}".strip())
        if status := self.answers.get(method):
            return status, {"message": "something of the inside"}
        if kind == "pods":
            return 200, {"items": [self.pods[each] for each in self.pods if name in ("", each)]}
        if method == "POST":
            name = body["metadata"]["name"]
            if name in self.jobs:
                return 409, {}
            self.jobs[name], self.pods[name] = body, {"status": {}}
            self.created.append(body)
            if self._plays:
                self._play(name, body)
            return 201, body
        if name not in self.jobs:
            return 404, {}
        if method == "DELETE":
            self.jobs[name]["metadata"]["deletionTimestamp"] = "now"
            self.end(name)
            if not self.held:
                self._forget(name)
        return 200, self.jobs.get(name, {})

    def _forget(self, name: str) -> None:
        del self.jobs[name], self.pods[name]

    def _play(self, name: str, job: Object) -> None:
        [container] = job["spec"]["template"]["spec"]["containers"]
        started = threading.Event()

        def play() -> None:  # in the thread that starts it, with which it would die
            process = self._processes[name] = pod_process(container, self._volume)
            started.set()
            self.finish(name, "Failed" if process.wait() else "Complete")

        threading.Thread(target=play, daemon=True).start()
        started.wait()

    def _handler(cluster) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def handle_one(self) -> None:
                path, _, query = self.path.partition("?")
                _, _, rest = path.partition(f"/namespaces/{NAMESPACE}/")
                kind, _, name = rest.partition("/")
                name = name or query.partition("job-name%3D")[2]
                size = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(size)) if size else {}
                cluster.tokens.append(self.headers["Authorization"])
                status, answer = cluster.answer(self.command, kind, name, body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            do_GET = do_POST = do_DELETE = handle_one  # noqa: N815

            def log_message(self, *arguments: Any) -> None:
                pass

        return Handler
