"""The embedded model's tokenizer: byte-level BPE with single digits, and a chat template with one token per role."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from buddy_routing.train.document import Document
from buddy_routing.train.example import Example

START, USER, ASSISTANT, SYSTEM, TOOL, END = (
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|tool|>",
    "<|end|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'system' if message.role == 'developer' else message.role %}"
    "{{ '<|' + role + '|>' + (message.content or '') + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class TrainingTokenizer:
    """Encodes documents for training. Serving uses only the published files, through transformers."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        vocabulary = self._tokenizer.get_vocab()
        self._ids = {name: vocabulary[name] for name in (START, USER, ASSISTANT, SYSTEM, END)}

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, prompt: str, history: tuple[tuple[str, str], ...] = ()) -> list[int]:
        """The messages (role, content) and a user's prompt as the chat template renders them, with a generation
        prompt."""
        ids = [self._ids[START]]
        for role, content in (*history, ("user", prompt)):
            ids += [self._ids[f"<|{role}|>"], *self.encode(content), self._ids[END]]
        return [*ids, self._ids[ASSISTANT]]

    def encode_answer(self, answer: str) -> list[int]:
        return [*self.encode(answer), self._ids[END]]

    def encode_example(self, document: Document) -> Example:
        """Raises ValueError for a document without a prompt."""
        if document.prompt is None:
            raise ValueError(f"a router learns from conversations; this document has no prompt: {document.text[:60]!r}")
        prompt = self.encode_prompt(document.prompt, document.history)
        return Example((*prompt, *self.encode_answer(document.text)), len(prompt))

    def encode_document(self, document: Document) -> tuple[list[int], list[bool]]:
        """Token ids and, for each, whether it belongs to what the model should learn to write."""
        if document.prompt is None:
            text = self.encode(document.text)
            return [self._ids[START], *text], [False, *[True] * len(text)]
        prompt, answer = self.encode_prompt(document.prompt, document.history), self.encode_answer(document.text)
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_context: int, directory: Path) -> None:
    """Train the BPE and publish it as a Hugging Face tokenizer with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    # Digits stay single so that arithmetic sees columns; words keep their leading space.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?\p{L}+| ?[^\s\p{L}\d]|\s+(?!\S)|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START, END, USER, ASSISTANT, SYSTEM, TOOL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A plain text begins as in training; the chat template writes its own beginning.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, tokenizer.token_to_id(START))]
    )
    published = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=START,
        model_max_length=max_context,
        clean_up_tokenization_spaces=False,
    )
    published.chat_template = CHAT_TEMPLATE
    published.save_pretrained(directory)
