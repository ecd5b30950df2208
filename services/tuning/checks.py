"""Turns requests into plain values, and refuses those that can never succeed."""

import base64
import binascii
import re
from dataclasses import dataclass
from importlib.util import find_spec

from tworoads.v1 import tuning_pb2 as pb

from services.runtime.errors import InvalidInput, NotFound, NotReady
from services.tuning.adapters.base_model import BaseModel
from services.tuning.adapters.registry import NAME, check_name
from services.tuning.job import Options
from services.tuning.messages import context_of

KEY = re.compile(r"[ -~]{0,64}")
MOST_ALPHA = 1024.0
MOST_EPOCHS = 100
MOST_LEARNING_RATE = 0.1
MOST_HELD_OUT = 0.5
MOST_PAGE = 1000
DEFAULT_PAGE = 100
LARGE_MODEL = 1_000_000_000  # parameters from which a smaller learning rate is chosen
MOST_NUMBER = 2**63 - 1  # SQLite's integers


@dataclass(frozen=True)
class Start:
    """What a CreateJobStart asks for, with nothing left open."""

    name: str
    corpus: str
    options: Options
    idempotency_key: str


def start(given: pb.CreateJobStart, base: BaseModel, max_rank: int, gpu: bool) -> Start:
    """Return what to train. Raises InvalidInput, NotFound (BASE_MODEL_NOT_FOUND, CORPUS_NOT_FOUND)
    and NotReady (QUANTIZATION_NEEDS_GPU, QUANTIZATION_UNAVAILABLE) as the proto says."""
    if given.base_model not in ("", base.id):
        raise NotFound("BASE_MODEL_NOT_FOUND", f"generation runs {base.id!r} and no other model")
    if given.corpus and not NAME.fullmatch(given.corpus):
        raise NotFound("CORPUS_NOT_FOUND", f"there is no corpus {given.corpus!r}")
    if not KEY.fullmatch(given.idempotency_key):
        raise InvalidInput(
            "IDEMPOTENCY_KEY_INVALID", "an idempotency key is at most 64 printable ASCII characters"
        )
    check_name(given.name)
    return Start(
        name=given.name,
        corpus=given.corpus,
        options=options(given.options, base, max_rank, gpu),
        idempotency_key=given.idempotency_key,
    )


def options(given: pb.TrainingOptions, base: BaseModel, max_rank: int, gpu: bool) -> Options:
    """Return how to train. Raises as `start` does."""
    rank = given.rank or min(Options.rank, max_rank)
    if rank > max_rank:
        raise InvalidInput("RANK_OUT_OF_RANGE", f"rank is from 1 to {max_rank}")
    alpha = given.alpha or 2.0 * rank
    if not 0 < alpha <= MOST_ALPHA:
        raise InvalidInput("ALPHA_OUT_OF_RANGE", f"alpha is above 0 to {MOST_ALPHA:g}")
    epochs = given.epochs or Options.epochs
    if epochs > MOST_EPOCHS:
        raise InvalidInput("EPOCHS_OUT_OF_RANGE", f"epochs is from 1 to {MOST_EPOCHS}")
    rate = given.learning_rate or (1e-3 if base.parameters < LARGE_MODEL else 2e-4)
    if not 0 < rate <= MOST_LEARNING_RATE:
        raise InvalidInput(
            "LEARNING_RATE_OUT_OF_RANGE", f"learning_rate is above 0 to {MOST_LEARNING_RATE:g}"
        )
    share = given.held_out_share if given.HasField("held_out_share") else None
    if share is not None and not 0 <= share <= MOST_HELD_OUT:
        raise InvalidInput(
            "HELD_OUT_OUT_OF_RANGE", f"held_out_share is from 0 to {MOST_HELD_OUT:g}"
        )
    base.check_targets(given.targets)
    if given.quantized and not gpu:
        raise NotReady("QUANTIZATION_NEEDS_GPU", "a base model in 4 bits needs a GPU to train on")
    if given.quantized and find_spec("bitsandbytes") is None:
        raise NotReady(
            "QUANTIZATION_UNAVAILABLE",
            "a base model in 4 bits needs bitsandbytes, which is not installed here",
        )
    return Options(
        context=context_of(given.context),
        rank=rank,
        alpha=alpha,
        epochs=epochs,
        learning_rate=rate,
        targets=tuple(sorted(set(given.targets))) or base.targets,
        seed=given.seed,
        quantized=given.quantized,
        held_out_share=share,
    )


def page_size(given: int) -> int:
    """Return how many entries a page has. Raises InvalidInput (PAGE_SIZE_OUT_OF_RANGE)."""
    if given > MOST_PAGE:
        raise InvalidInput("PAGE_SIZE_OUT_OF_RANGE", f"page_size is from 1 to {MOST_PAGE}")
    return given or DEFAULT_PAGE


def page_token(number: int) -> str:
    """Return the token of the page behind the entry of this number."""
    return base64.urlsafe_b64encode(str(number).encode()).decode()


def before(token: str) -> int:
    """Return the number that a page token stands for; that of the empty one is above all.

    Raises InvalidInput (PAGE_TOKEN_INVALID).
    """
    if not token:
        return MOST_NUMBER
    try:
        digits = base64.b64decode(token, altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        digits = ""
    if not re.fullmatch(r"[0-9]{1,18}", digits):
        raise InvalidInput("PAGE_TOKEN_INVALID", "there is no page of this token")
    return int(digits)
