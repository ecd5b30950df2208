"""Turns messages into token ids: one way, for serving and for training.

The chat template is rendered once around placeholders; the texts are tokenised apart from it, so
that nothing in them is ever taken for a special token, and a part has the same tokens in every
prompt.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

from services.prompts.words import Message

PLACEHOLDER = "\ue000{}\ue001"  # private use: no template contains it
SPLIT = re.compile("\ue000(\\d+)\ue001")
CACHED_LENGTH = 8192  # code points of a text whose tokens are worth keeping


class PromptTooLong(ValueError):
    """The prompt does not fit even without its droppable parts.

    `tokens` is what it has, at least: a text that is far too long is not counted to its end.
    """

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(f"the prompt has at least {tokens} tokens, and {limit} fit")
        self.tokens = tokens
        self.limit = limit


@dataclass(frozen=True)
class Rendered:
    """A prompt's token ids, and the ids of the droppable parts that are in it."""

    token_ids: list[int]
    used_parts: list[str]


class Renderer:
    """Renders for one model. `tokenizer` is its fast tokenizer of the library transformers."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast or not tokenizer.chat_template:
            raise ValueError("the model needs a fast tokenizer with a chat template")
        self._tokenizer = tokenizer
        added = sorted((str(t) for t in tokenizer.get_added_vocab()), key=len, reverse=True)
        self._reserved = re.compile("|".join(re.escape(token) for token in added) or r"(?!)")
        self._longest = max(map(len, tokenizer.get_vocab()))  # code points of a token, at most
        self._template = lru_cache(maxsize=256)(self._template_ids)
        self._short = lru_cache(maxsize=1024)(self._text_ids)

    def render(self, messages: Sequence[Message], limit: int) -> Rendered:
        """Return the prompt that the assistant continues, of at most `limit` tokens.

        Droppable parts are left out from the end until it fits. Raises PromptTooLong if it does
        not fit without them.
        """
        parts = [part for message in messages for part in message.parts]
        droppable = [i for i, part in enumerate(parts) if part.droppable]
        # What cannot fit by its length alone is neither rendered nor tokenised: that takes long.
        most = limit * self._longest
        least = len(messages) * self._longest + sum(len(part.text) for part in parts)
        while least > most and droppable:
            least -= len(parts[droppable.pop()].text)
        if least > most:
            raise PromptTooLong(least // self._longest, limit)
        kept = set(droppable)
        ids = [
            () if part.droppable and i not in kept else self._part(part.text)
            for i, part in enumerate(parts)
        ]
        fixed = self._template(tuple(message.role for message in messages), True)
        total = sum(map(len, fixed)) + sum(map(len, ids))
        while total > limit and droppable:
            last = droppable.pop()
            total -= len(ids[last])
            ids[last] = ()
        if total > limit:
            raise PromptTooLong(total, limit)
        texts = iter(ids)
        token_ids = list(fixed[0])
        for message, after in zip(messages, fixed[1:], strict=True):
            for _ in message.parts:
                token_ids += next(texts)
            token_ids += after
        return Rendered(token_ids, [parts[i].id for i in droppable])

    def continuation(self, text: str, limit: int) -> list[int]:
        """Return the tokens of an assistant's turn that says `text`, up to its end-of-turn token.

        Raises PromptTooLong if there are more than `limit`.
        """
        if len(text) > limit * self._longest:
            raise PromptTooLong(len(text) // self._longest, limit)
        end = self._template(("user", "assistant"), False)[-1]
        eos = self._tokenizer.eos_token_id
        stop = end[: end.index(eos) + 1] if eos in end else [eos]
        ids = [*self._part(text), *stop]
        if len(ids) > limit:
            raise PromptTooLong(len(ids), limit)
        return ids

    def exchange(
        self, messages: Sequence[Message], text: str, context_length: int
    ) -> tuple[Rendered, list[int]]:
        """Return a prompt and its continuation as they are scored and trained on: together at most
        `context_length` - 1 tokens, since the engine writes one token after it scored.

        Droppable parts are left out from the end until it fits. Raises PromptTooLong.
        """
        limit = context_length - 1
        continuation = self.continuation(text, limit)
        return self.render(messages, limit - len(continuation)), continuation

    def _part(self, text: str) -> tuple[int, ...]:
        return self._short(text) if len(text) <= CACHED_LENGTH else self._text_ids(text)

    def _template_ids(self, roles: tuple[str, ...], prompt: bool) -> list[list[int]]:
        """Return the ids between the messages' texts: one list more than there are messages."""
        turns = [{"role": role, "content": PLACEHOLDER.format(i)} for i, role in enumerate(roles)]
        text = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=prompt
        )
        pieces = SPLIT.split(text)
        if [int(index) for index in pieces[1::2]] != list(range(len(roles))):
            raise ValueError("the chat template does not show every message once, in order")
        return self._ids(pieces[::2])

    def _text_ids(self, text: str) -> tuple[int, ...]:
        """Tokenise plain text. Words that look like special tokens are cut apart."""
        pieces: list[str] = []
        start = 0
        while match := self._reserved.search(text, start):  # what is cut may overlap the next one
            middle = match.start() + 1
            pieces.append(text[start:middle])
            start = middle
        pieces.append(text[start:])
        return tuple(chain.from_iterable(self._ids(pieces)))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return list(self._tokenizer(texts, add_special_tokens=False).input_ids)
