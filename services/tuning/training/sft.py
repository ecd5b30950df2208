"""trl's SFTTrainer, with the loss on answers alone computed in the cheapest way that is exact."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import AttentionInterface, PrinterCallback, Trainer
from trl.trainer.sft_trainer import SFTTrainer

from services.tuning.training.batches import Tokens
from services.tuning.training.checkpoints import keep, saving, seal
from services.tuning.training.packing import ATTENTION, Packed, attend, pack
from services.tuning.training.reporting import Reporter

HEAD_TOKENS = 256  # whose logits are in memory at a time
CLOSE = {torch.bfloat16: 0.1, torch.float32: 0.001}  # nats a token, between two ways to compute
IGNORED = -100  # the label of what carries no loss

AttentionInterface.register(ATTENTION, attend)


class AnswerTrainer(SFTTrainer):
    """Trains on `groups`, batches of examples, in the `order` that their indices have there.

    On a CPU a batch is packed (see packing.py) unless that computes something else for this model;
    otherwise it is padded and trl computes the loss.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tokens]],
        order: Sequence[int],
        held_out: Sequence[Sequence[Tokens]],
        reporter: Reporter,
        **arguments: Any,
    ) -> None:
        evaluated = range(len(held_out))
        super().__init__(
            train_dataset=Dataset.from_dict({"batch": list(order)}),
            eval_dataset=Dataset.from_dict({"batch": list(evaluated)}) if held_out else None,
            **arguments,
        )
        self.remove_callback(PrinterCallback)
        self.processing_class = None  # else each checkpoint has the tokenizer too
        self._groups = groups
        self._held_out = held_out
        self._reporter = reporter
        self._adapted = cast(Any, self.model)
        self._base = self._adapted.get_base_model()
        self._cpu = self.args.device.type == "cpu"
        self._half = self._cpu and self._base.dtype == torch.bfloat16
        for module in self._adapted.modules() if self._half else ():
            if hasattr(module, "lora_A"):
                module.cast_input_dtype_enabled = False  # autocast does it, to bfloat16
        self._plain = self._base.config._attn_implementation
        self._packs = self._cpu and not self.aux_loss_enabled and self._agrees()
        if self._packs:  # for good: gradients are computed, and some layers again, outside of here
            self._base.config._attn_implementation = ATTENTION

    def get_train_dataloader(self) -> "DataLoader[Any]":
        return self._loader(self.train_dataset, self._groups)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if "packed" in inputs:
            packed = inputs["packed"]
            answers, tokens = len(packed.answer), packed.size
            total = self._loss_sum(packed)
            loss = total / answers
        else:
            answers = (inputs["labels"][:, 1:] != IGNORED).sum()
            tokens = inputs["attention_mask"].sum()
            with self._autocast():
                loss = super().compute_loss(model, inputs, num_items_in_batch=answers)  # type: ignore[no-untyped-call]
            self._metrics["train"].clear()
            total = loss * answers
        self._reporter.trained(total.detach(), answers, tokens)
        return loss

    def evaluate(self, *unused: Any, **others: Any) -> dict[str, float]:
        """Return the mean loss per answer token, all held-out examples together."""
        self._adapted.eval()
        total, answers = 0.0, 0
        with torch.no_grad():
            for group in self._held_out:
                answers += sum(len(example.answer) for example in group)
                if self._packs:
                    total += float(self._loss_sum(pack(group)))
                else:
                    total -= sum(sum(self.log_probabilities(example)) for example in group)
        metrics = {"eval_loss": total / answers}
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log_probabilities(self, example: Tokens) -> list[float]:
        """Return those of the answer's tokens, computed alone and without packing, as served."""
        self._adapted.eval()
        device, count = self.args.device, len(example.answer)
        ids = torch.tensor([[*example.prompt, *example.answer]], device=device)
        with torch.no_grad(), self._attention(self._plain), self._autocast():
            logits = self._adapted(input_ids=ids, use_cache=False, logits_to_keep=count + 1).logits
        scores = logits[0, -count - 1 : -1].float().log_softmax(-1)
        chosen = scores.gather(1, ids[0, -count:, None])
        return [float(score) for score in chosen[:, 0]]

    def _loader(self, rows: Any, groups: Sequence[Sequence[Tokens]]) -> "DataLoader[Any]":
        def collate(batch: list[dict[str, int]]) -> dict[str, Any]:
            group = groups[batch[0]["batch"]]
            if self._packs:
                packed = pack(group)
                return {"input_ids": packed.ids, "packed": packed}
            padded: Any = self.data_collator
            return dict(padded([_labelled(example) for example in group]))

        return DataLoader(rows, batch_size=1, collate_fn=collate)

    def _loss_sum(self, packed: Packed) -> Tensor:
        """Return the sum of the losses of the answers' tokens, in nats."""
        with self._autocast():
            hidden = self._base.base_model(
                input_ids=packed.ids,
                position_ids=packed.positions,
                use_cache=False,
                layout=packed.layout,
            ).last_hidden_state[0]
            before = hidden.index_select(0, packed.before)
            if len(before) <= HEAD_TOKENS:
                return self._head(before, packed.answer)
            # The logits of a large vocabulary outweigh all else: they are computed again.
            parts = zip(
                torch.split(before, HEAD_TOKENS),
                torch.split(packed.answer, HEAD_TOKENS),
                strict=True,
            )
            losses = [checkpoint(self._head, *part, use_reentrant=False) for part in parts]
            return torch.stack(losses).sum()

    def _head(self, hidden: Tensor, answer: Tensor) -> Tensor:
        logits = self._base.get_output_embeddings()(hidden)
        return F.cross_entropy(logits.float(), answer, reduction="sum")

    def _agrees(self) -> bool:
        """Say whether packing computes what the model does, on two examples."""
        examples = sorted((example for group in self._groups for example in group), key=len)
        two = [examples[0], examples[min(len(examples) - 1, len(examples) // 4)]]
        try:
            with torch.no_grad(), self._attention(ATTENTION):
                self._adapted.eval()
                packed = -float(self._loss_sum(pack(two)))
        except Exception as error:  # whatever a model does not know: trl's own way works too
            print(f"batches are padded, not packed: {error}", file=sys.stderr)
            return False
        alone = sum(sum(self.log_probabilities(example)) for example in two)
        difference = abs(packed - alone) / sum(len(example.answer) for example in two)
        if difference > CLOSE.get(self._base.dtype, 0.001):
            print(f"batches are padded, not packed: {difference} nats apart", file=sys.stderr)
            return False
        return True

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        config = self._base.config
        before = config._attn_implementation
        config._attn_implementation = name
        try:
            yield
        finally:
            config._attn_implementation = before

    def _autocast(self) -> torch.autocast:
        half = self._half or not self._cpu
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=half)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began = time.monotonic()
        folder = Path(str(self.args.output_dir))
        with saving():
            Trainer._save_checkpoint(self, model, trial)  # trl's writes a model card besides
            name = f"checkpoint-{self.state.global_step}"
            seal(folder / name, seconds=self._reporter.seconds)
            keep(folder, name, self.state.best_model_checkpoint)
        self._reporter.saved(began)


def _labelled(example: Tokens) -> dict[str, list[int]]:
    labels = [IGNORED] * len(example.prompt) + list(example.answer)
    return {"input_ids": [*example.prompt, *example.answer], "labels": labels}
