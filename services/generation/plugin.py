"""What vLLM runs in each of its processes before it loads a model."""

import logging
import multiprocessing
import os
import signal

from services.runtime import logs
from services.runtime.child import die_with_parent


def register() -> None:
    """Tie a process of the engine to the life and the log of the one that started it.

    Does nothing in the service's own process. However the service ends, the kernel kills the
    engine: nothing of it holds memory or ports afterwards.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    assert parent.pid is not None
    die_with_parent(parent.pid)
    # Ctrl-C reaches every process of the terminal; the service ends the engine after its calls.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.configure(os.environ.get("TWOROADS_GENERATION_LOG_LEVEL", "INFO"))
    quiet()


def quiet() -> None:
    """Keep of vLLM's log what is a warning or worse."""
    logging.getLogger("vllm").setLevel(logging.WARNING)
