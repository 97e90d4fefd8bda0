"""Conversations to rows of tokens.

A conversation is `messages: [{role, content}]`, the schema of Tulu (Ivison et al. 2023, arXiv 2311.10702). Roles are
kept as `<|role|>` lines, empty turns are dropped and counted, every conversation ends with the end-of-text token.
"""

import ast
import gc
import hashlib
import importlib.util
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lib.errors import UsageError
from lib.record import from_root

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
END_OF_TEXT = "<|endoftext|>"
BUILTIN_SOURCES = ("pandas", "matplotlib")
BUILTIN_VOCABULARY = 4096
IGNORED = -100  # the label that cross-entropy leaves out


@dataclass
class Rows:
    """Rows of at most `context` tokens in one flat array; padding exists only in the batches made from it."""

    tokens: np.ndarray  # (total,) uint32
    starts: np.ndarray  # (rows,)
    lengths: np.ndarray  # (rows,) at most `context`
    context: int
    padding_id: int

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels of some rows, (B, T) int64 each, padded on the right, padding labelled -100."""
        ids = np.full((len(rows), self.context), self.padding_id, dtype=np.int64)
        labels = np.full_like(ids, IGNORED)
        for line, row in enumerate(rows):
            start, length = self.starts[row], self.lengths[row]
            ids[line, :length] = labels[line, :length] = self.tokens[start : start + length]
        return torch.from_numpy(ids), torch.from_numpy(labels)

    def order(self, count: int, seed: int) -> np.ndarray:
        """The first `count` rows of an endless stream: every row once in a shuffled order, then again, reshuffled."""
        generator = np.random.default_rng(seed)
        rounds = -(-count // len(self))
        return np.concatenate([generator.permutation(len(self)) for _ in range(rounds)])[:count]


@dataclass
class Corpus:
    """Rows to train on, rows to validate on, and what is known about them."""

    train: Rows
    validation: Rows
    vocabulary: int
    facts: dict = field(default_factory=dict)


def load(dataset: str, tokenizer: str, context: int, packing: bool, validation_share: float) -> Corpus:
    """Conversations as token rows, split into train and validation by a hash of each conversation's text.

    `packing` False: a conversation a row, cut at `context`. True: conversations one after the other in full rows.
    Raises UsageError for data that cannot be had, has no conversations, or is too small to split.
    """
    talks, encoder = conversations(dataset), load_tokenizer(tokenizer)
    parts = {"train": [], "validation": []}
    counts = {"conversations": 0, "empty_turns": 0, "empty_conversations": 0, "cut_conversations": 0}
    end = encoder.convert_tokens_to_ids(encoder.eos_token)
    for batch in talks.iter(batch_size=1000):
        texts = []
        for messages in batch["messages"]:
            text, empty_turns = as_text(messages)
            counts["empty_turns"] += empty_turns
            counts["empty_conversations"] += not text
            if text:
                texts.append(text)
        encoded = encoder(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        for text, ids in zip(texts, encoded, strict=True):
            counts["conversations"] += 1
            counts["cut_conversations"] += not packing and len(ids) >= context
            is_validation = _fraction(text) < validation_share
            parts["validation" if is_validation else "train"].append(np.array([*ids, end], dtype=np.uint32))
    if not counts["conversations"]:
        raise UsageError(f"{dataset} holds no conversation with a word in it")
    rows = {name: _rows(part, context, packing, end) for name, part in parts.items()}
    for name, part in rows.items():
        if not len(part):
            raise UsageError(
                f"{dataset} leaves no row of {context} tokens for {name}; give more data, a shorter context "
                "or another validation_share"
            )
    facts = {
        **counts,
        "train_rows": len(rows["train"]),
        "validation_rows": len(rows["validation"]),
        "train_tokens": int(rows["train"].lengths.sum()),
        "padding_share": 1 - float(rows["train"].lengths.mean()) / context,
        "token_sha256": fingerprint(rows),
    }
    return Corpus(rows["train"], rows["validation"], len(encoder), facts)


def conversations(dataset: str) -> datasets.Dataset:
    """`builtin`, a local .parquet, .json or .jsonl file, or a hub id, as a `datasets.Dataset` with `messages`."""
    if dataset == "builtin":
        return datasets.Dataset.from_list([{"messages": messages} for messages in builtin()])
    path = local(dataset)
    try:
        if path.suffix in FORMATS:
            if not path.is_file():
                raise UsageError(
                    f"there is no data file {dataset!r}, seen from {Path.cwd().name}/ or the repository's root"
                )
            found = datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
        else:
            found = datasets.load_dataset(dataset, split="train")
    except UsageError:
        raise
    except Exception as error:
        what = "read" if path.suffix in FORMATS else "load from the hub"
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"cannot {what} {dataset!r}: {first_line.rstrip('.')}. Known: 'builtin', a hub id, "
            f"or the path of a {', '.join(FORMATS)} file."
        ) from error
    if "messages" not in found.column_names:
        raise UsageError(
            f"{dataset} has the columns {', '.join(found.column_names)}; it needs `messages`: "
            "a list of {role, content} per row"
        )
    return found


def local(path: str) -> Path:
    """A path as given, or from the repository's root where only that exists: notebooks run in either folder."""
    return Path(path) if Path(path).exists() else from_root(path) if from_root(path).exists() else Path(path)


def as_text(messages) -> tuple[str, int]:
    """A conversation as one text, and how many empty turns it lost. Raises UsageError for a turn of another form."""
    turns, empty = [], 0
    for message in messages or []:
        try:
            role, content = message["role"], message["content"]
        except (TypeError, KeyError):
            raise UsageError(f"a turn must be {{role, content}}, not {str(message)[:60]!r}") from None
        if content is None or not str(content).strip():
            empty += 1
        else:
            turns.append(f"<|{role}|>\n{content}\n")
    return "".join(turns), empty


def load_tokenizer(name: str):
    """`builtin`, a hub id or a local folder, as a transformers tokenizer with an end-of-text token."""
    if name == "builtin":
        return builtin_tokenizer()
    try:
        encoder = AutoTokenizer.from_pretrained(str(local(name)))
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"cannot load the tokenizer {name!r}: {first_line.rstrip('.')}. Known: 'builtin', a hub id, a local folder."
        ) from error
    if encoder.eos_token is None:
        raise UsageError(f"the tokenizer {name!r} has no end-of-text token to end a conversation with")
    return encoder


@cache
def builtin() -> tuple[list[dict], ...]:
    """About 4 MB of English prose as conversations: the docstrings of pandas and matplotlib.

    Read from the sources of the pinned versions, never imported, so the text is the same wherever the pins hold.
    """
    # Every few syntax trees the garbage collector would walk all of PyTorch's objects: 6.6 s instead of 2.1.
    gc.disable()
    try:
        return tuple(_builtin())
    finally:
        gc.enable()


def _builtin():
    seen = set()
    for package in BUILTIN_SOURCES:
        root = Path(importlib.util.find_spec(package).origin).parent
        for file in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
            parts = file.relative_to(root).with_suffix("").parts
            if "tests" in parts:
                continue
            for name, text in _docstrings(ast.parse(file.read_text(encoding="utf-8")), ".".join((package, *parts))):
                if len(text) >= 80 and text not in seen:
                    seen.add(text)
                    question = {"role": "user", "content": f"What is {name.removesuffix('.__init__')}?"}
                    yield [question, {"role": "assistant", "content": text}]


def _docstrings(node: ast.AST, name: str):
    text = ast.get_docstring(node)
    if text:
        yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _docstrings(child, f"{name}.{child.name}")


@cache
def builtin_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909) of 4,096 tokens, trained here on the builtin corpus."""
    trained = ByteLevelBPETokenizer()
    texts = (as_text(messages)[0] for messages in builtin())
    trained.train_from_iterator(texts, BUILTIN_VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=END_OF_TEXT)


def _rows(conversations: list[np.ndarray], context: int, packing: bool, padding_id: int) -> Rows:
    tokens = np.concatenate(conversations) if conversations else np.empty(0, np.uint32)
    if packing:  # the last tokens that fill no row are left out
        starts = np.arange(len(tokens) // context) * context
        lengths = np.full(len(starts), context)
    else:
        sizes = np.array([len(ids) for ids in conversations], dtype=np.int64)
        starts, lengths = np.cumsum(sizes) - sizes, np.minimum(sizes, context)
    return Rows(tokens, starts, lengths, context, padding_id)


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, so that a copy of a conversation falls on the same side."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def fingerprint(rows: dict[str, Rows]) -> str:
    """SHA-256 of the tokens and row borders of both parts."""
    digest = hashlib.sha256()
    for name in ("train", "validation"):
        part = rows[name]
        for array in (part.tokens.astype("<u4"), part.starts.astype("<i8"), part.lengths.astype("<i8")):
            digest.update(array.tobytes())
    return digest.hexdigest()
