"""What the child says while it trains, and when it saves its work."""

import math
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from services.tuning.training.trainer import TrainingFailed

SECONDS = 1.0  # between two lines
SAVING_SHARE = 0.05  # of the time, at most, goes into checkpoints that only save work


class Reporter(TrainerCallback):
    """Tells `say` the fields of a Progress about once a second.

    checkpoint_seconds: work that may be lost, at most. start: when training began, on the monotonic
    clock. earlier: seconds that went into what is in the checkpoint.
    """

    def __init__(
        self,
        say: Callable[[dict[str, Any]], None],
        checkpoint_seconds: float,
        start: float,
        earlier: float,
    ) -> None:
        self._say = say
        self._checkpoint_seconds = checkpoint_seconds
        self._start = start - earlier
        self._saved = self._said = time.monotonic()
        self._saving = 0.0
        self._loss: Tensor | float = 0.0
        self._answers: Tensor | int = 0
        self._tokens: Tensor | int = 0
        self._held_out_loss: float | None = None
        self._first = 0
        self._began = 0.0

    @property
    def seconds(self) -> float:
        """What training has taken until now, over all attempts."""
        return time.monotonic() - self._start

    def trained(self, loss: Tensor, answers: Tensor | int, tokens: Tensor | int) -> None:
        """Count a batch: the sum of its losses, its answer tokens, its tokens."""
        self._loss += loss
        self._answers += answers
        self._tokens += tokens

    def saved(self, began: float) -> None:
        """Note that a checkpoint is whole that was begun at that time."""
        self._saved = time.monotonic()
        self._saving = self._saved - began

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._first = state.global_step
        self._began = self._saved = time.monotonic()
        if state.best_metric is not None:
            self._held_out_loss = state.best_metric
        self.report(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        now = time.monotonic()
        if now - self._said >= SECONDS:
            self.report(state)
        if now - self._saved >= max(self._checkpoint_seconds, self._saving / SAVING_SHARE):
            control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._held_out_loss = _finite(others["metrics"]["eval_loss"])

    def report(self, state: Any) -> None:
        """Say how far it is. Raises TrainingFailed if the loss is no number any more."""
        now = time.monotonic()
        answers, tokens = int(self._answers), int(self._tokens)
        done = state.global_step - self._first
        left = (now - self._began) / done * (state.max_steps - state.global_step) if done else None
        self._say(
            {
                "step": state.global_step,
                "steps": state.max_steps,
                "loss": _finite(float(self._loss) / answers) if answers else None,
                "held_out_loss": self._held_out_loss,
                "tokens_per_second": tokens / (now - self._said) if answers else 0.0,
                "seconds_left": left,
            }
        )
        self._loss, self._answers, self._tokens, self._said = 0.0, 0, 0, now


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise TrainingFailed(
            "LOSS_NOT_FINITE", "the loss is no number any more: try a lower learning rate"
        )
    return loss
