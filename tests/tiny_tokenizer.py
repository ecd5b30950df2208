"""A tokenizer as small as can be that still knows special tokens and a chat template.

Its tokens are the bytes and, to have a longer one, "passage". It has the part of the interface of
transformers that `Renderer` uses, without importing that library.
"""

from types import SimpleNamespace

from jinja2 import Template
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

START, END, ODD = "<|start|>", "<|end|>", "|>odd"
LONGEST = len("passage")
MERGES = [("p", "a"), ("s", "s"), ("pa", "ss"), ("a", "g"), ("ag", "e"), ("pass", "age")]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


class TinyTokenizer:
    is_fast = True
    chat_template = TEMPLATE

    def __init__(self) -> None:
        words = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
        model = BPE({word: i for i, word in enumerate(words)}, MERGES)
        self._tokenizer = Tokenizer(model)
        self._tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = ByteLevelDecoder()
        self._tokenizer.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in (START, END, ODD)]
        )
        self.tokenised: list[str] = []

    @property
    def eos_token_id(self) -> int:
        return self.id(END)

    @property
    def special_ids(self) -> set[int]:
        return set(self.get_added_vocab().values())

    def id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        assert found is not None
        return found

    def text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        return {text: self.id(text) for text in (START, END, ODD)}

    def apply_chat_template(
        self, turns: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        return Template(self.chat_template, keep_trailing_newline=True).render(
            messages=turns, add_generation_prompt=add_generation_prompt
        )

    def __call__(self, texts: list[str], add_special_tokens: bool) -> SimpleNamespace:
        assert not add_special_tokens
        self.tokenised += texts
        return SimpleNamespace(
            input_ids=[self._tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
        )
