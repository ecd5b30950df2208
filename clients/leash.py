"""Runs a command that the kernel kills when its parent dies: python leash.py PARENT COMMAND...

It runs in the process that becomes the command, since code between fork and exec of a process with
threads may deadlock. Only Linux can do it; elsewhere the command runs all the same.
"""

import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
