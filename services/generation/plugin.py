"""What vLLM runs in each of its processes before it loads a model."""

import logging
import multiprocessing
import os
import signal

from services.runtime import logs
from services.runtime.child import die_with_parent

WRAPPER = "services.generation.grouped_lora.GroupedLora"


def register() -> None:
    """Choose how adapters are computed on a CPU, and tie a process of the engine to the life and
    the log of the one that started it.

    However the service ends, the kernel kills the engine: nothing of it holds memory or ports
    afterwards. The service's own process is tied to nothing.
    """
    group_lora()
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    assert parent.pid is not None
    die_with_parent(parent.pid)
    # Ctrl-C reaches every process of the terminal; the service ends the engine after its calls.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.configure(os.environ.get("TWOROADS_GENERATION_LOG_LEVEL", "INFO"))
    quiet()


def group_lora() -> None:
    """Have vLLM compute adapters on a CPU by `grouped_lora`; elsewhere its own way is good."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # vLLM imports what the name says when it loads a model with adapters.
        setattr(type(current_platform), "get_punica_wrapper", classmethod(lambda cls: WRAPPER))  # noqa: B010


def quiet() -> None:
    """Keep of vLLM's log what is a warning or worse."""
    logging.getLogger("vllm").setLevel(logging.WARNING)
