"""`python -m tests.fake_service NAME LISTEN FOLDER [--fail | --stubborn | --with-child]`

A service with nothing but health. It writes its name to FOLDER/stopped when it is told to stop.
"""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

from services.runtime.server import running
from services.runtime.settings import ServerSettings


async def main(name: str, listen: str, folder: Path, how: str = "") -> None:
    if how == "--fail":
        sys.exit(f"{name} cannot find its model")
    if how == "--with-child":
        child = subprocess.Popen(["sleep", "1000"])
        (folder / "child").write_text(str(child.pid))
    async with running(ServerSettings(listen=listen, grace_seconds=0), [f"fake.{name}"]) as server:
        await server.serve()
        if how == "--stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            await asyncio.Event().wait()
        await server.until_stopped()
        with (folder / "stopped").open("a") as stopped:
            stopped.write(name + "\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:]))
