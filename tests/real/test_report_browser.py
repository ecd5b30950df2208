"""The report in a real browser, driven over its devtools."""

import asyncio
import base64
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pypdfium2
from websockets.asyncio.client import ClientConnection, connect

from tests.test_report import NASTY, _write

LONG = "W" * 900 + " \u05e9\u05dc\u05d5\u05dd \U0001f600 "


async def _ask(socket: ClientConnection, seen: list[str], method: str, **params: Any) -> Any:
    await socket.send(json.dumps({"id": 1, "method": method, "params": params}))
    while True:
        message = json.loads(await socket.recv())
        _note(message, seen)
        if message.get("id") == 1:
            assert "error" not in message, message
            return message["result"]


def _note(message: Any, seen: list[str]) -> None:
    if message.get("method") == "Network.requestWillBeSent":
        seen.append(message["params"]["request"]["url"])
    elif "method" in message:
        seen.append(message["method"])


async def test_the_report_runs_nothing_asks_nothing_fits_a_phone_and_prints(
    tmp_path: Path,
) -> None:
    _write(tmp_path, 20, LONG + NASTY)
    browser = shutil.which("chromium")
    assert browser, "no chromium: apt-get install chromium"
    profile = tmp_path / "profile"
    process = await asyncio.create_subprocess_exec(
        browser,
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"),
        f"--user-data-dir={profile}",
        "about:blank",
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr
        async with asyncio.timeout(60):
            while b"DevTools listening on" not in (told := await process.stderr.readline()):
                assert told, "chromium ended"
        port = told.decode().split(":")[2].split("/")[0]
        page = await _page(port)
        async with asyncio.timeout(60), connect(page, max_size=None) as socket:
            seen: list[str] = []
            for domain in ("Network", "Page"):
                await _ask(socket, seen, f"{domain}.enable")
            await _ask(
                socket, seen, "Emulation.setDeviceMetricsOverride",
                width=360, height=740, deviceScaleFactor=1, mobile=False,
            )  # fmt: skip
            file = (tmp_path / "report.html").as_uri()
            await _ask(socket, seen, "Page.navigate", url=file)
            while "Page.loadEventFired" not in seen:
                _note(json.loads(await socket.recv()), seen)
            width = await _ask(
                socket, seen, "Runtime.evaluate",
                expression="document.documentElement.scrollWidth", returnByValue=True,
            )  # fmt: skip
            printed = await _ask(socket, seen, "Page.printToPDF")
        assert width["result"]["value"] <= 360
        assert "Page.javascriptDialogOpening" not in seen
        assert [url for url in seen if "://" in url and url != file] == []
        document = pypdfium2.PdfDocument(base64.b64decode(printed["data"]))
        assert "RAG" in document[0].get_textpage().get_text_range()
    finally:
        process.terminate()
        await process.communicate()


async def _page(port: str) -> str:
    """Return the address of the first page's devtools, once there is a page."""
    async with asyncio.timeout(60), httpx.AsyncClient(trust_env=False, timeout=60) as client:
        while True:
            for one in (await client.get(f"http://127.0.0.1:{port}/json/list")).json():
                if one["type"] == "page":
                    return str(one["webSocketDebuggerUrl"])
            await asyncio.sleep(0.1)
