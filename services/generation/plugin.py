"""What vLLM runs in each of its processes before it loads a model."""

import ctypes
import logging
import multiprocessing
import os
import signal

from services.runtime import logs

PR_SET_PDEATHSIG = 1


def register() -> None:
    """Tie a process of the engine to the life and the log of the one that started it.

    Does nothing in the service's own process. However the service ends, the kernel kills the
    engine: nothing of it holds memory or ports afterwards.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it died before the line above
        os._exit(1)
    # Ctrl-C reaches every process of the terminal; the service ends the engine after its calls.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.configure(os.environ.get("TWOROADS_GENERATION_LOG_LEVEL", "INFO"))
    quiet()


def quiet() -> None:
    """Keep of vLLM's log what is a warning or worse."""
    logging.getLogger("vllm").setLevel(logging.WARNING)
