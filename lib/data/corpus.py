"""Conversations to rows of tokens.

Roles are kept as `<|role|>` lines, empty turns are dropped and counted, every conversation ends with the end-of-text
token. Text is text: none that a turn holds becomes a role's line or a special token, whatever it spells. Tokens are
made once, kept in a cache on disk, and read from there without holding them all in memory.
"""

import hashlib
import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lib.data.cache import forget, made_once
from lib.data.conversations import Counts, Source, Turn, as_text, builtin, conversation, first_line, local, source
from lib.data.files import Place
from lib.errors import UsageError
from lib.paths import read_bounded

END_OF_TEXT = "<|endoftext|>"
BUILTIN_VOCABULARY = 4096
IGNORED = -100  # the label that cross-entropy leaves out
PARTS = ("train", "validation")
DOCUMENTS = "documents"  # of `packing`: rows are filled, and the documents in them kept apart
FORM = 3  # of the cached tokens; another number makes them anew
CHUNK = 1 << 22  # tokens looked at together, where all at once would fill the memory


@dataclass
class Rows:
    """Rows of at most `context` tokens in one flat array; padding exists only in the batches made from it."""

    tokens: np.ndarray  # (total,) uint16 or uint32, on disk
    starts: np.ndarray  # (rows,)
    lengths: np.ndarray  # (rows,) at most `context`
    context: int
    padding_id: int
    train_on_padding: bool = False
    ends: np.ndarray | None = None  # where in `tokens` documents end that are kept apart; None: a row is not split

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels of some rows, (B, T) int64 each, padded on the right.

        Padding is labelled -100, or with its own token where it is trained on; the first token of a document that is
        kept apart, -100: nothing before it says what it is.
        """
        ids = np.full((len(rows), self.context), self.padding_id, dtype=np.int64)
        labels = np.full_like(ids, self.padding_id if self.train_on_padding else IGNORED)
        for line, row in enumerate(rows):
            start, length = self.starts[row], self.lengths[row]
            ids[line, :length] = labels[line, :length] = self.tokens[start : start + length]
        if self.ends is not None:
            documents = self._documents(rows)
            labels[:, 1:][documents[:, 1:] != documents[:, :-1]] = IGNORED
        return torch.from_numpy(ids), torch.from_numpy(labels)

    def seq_idx(self, rows: np.ndarray) -> torch.Tensor | None:
        """Which document each token of some rows is of, (B, T) int64; None where documents are not kept apart."""
        return None if self.ends is None else torch.from_numpy(self._documents(rows))

    def _documents(self, rows: np.ndarray) -> np.ndarray:
        places = self.starts[rows][:, None] + np.arange(self.context)  # (B, T)
        return np.searchsorted(self.ends, places, side="right")

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


def load(p) -> Corpus:
    """Conversations as token rows, by the parameters `p` (`lib.parameters.resolve`).

    A hash of each conversation's text says whether it is for validation. `packing` False: a conversation a row, cut at
    `context`, and left out where it has no token to predict. True: conversations one after the other in full rows.
    "documents": the same rows, in which each conversation is kept apart; what a row's end cuts off goes on in the next
    as a document of its own. Raises UsageError for data that cannot be had, has no conversations, or is too small to
    split.
    """
    talks, encoder = source(p.dataset, p.dataset_revision), load_tokenizer(p.tokenizer)
    end = encoder.convert_tokens_to_ids(encoder.eos_token)
    if p.turns == "roles" and not _keeps_lines(encoder):
        raise UsageError(
            f"the tokenizer {p.tokenizer!r} makes spaces of line breaks, so that a role's line could not be told from "
            "text; use turns 'joined', or another tokenizer"
        )
    what = {
        "form": FORM, "source": talks.identity, "tokenizer": _identity(encoder), "turns": p.turns,
        "validation_share": p.validation_share,
    }  # fmt: skip
    folder = made_once(what, lambda scratch: _tokenize(talks, encoder, end, p, scratch))
    try:
        counts, parts = _read(folder, len(encoder))
    except (OSError, ValueError, KeyError, TypeError):  # cut short by a full disk, or changed by somebody
        forget(folder)
        if folder.exists():
            raise UsageError(
                f"the cache's {folder} is not what was written there, and cannot be removed; remove it"
            ) from None
        counts, parts = _read(made_once(what, lambda scratch: _tokenize(talks, encoder, end, p, scratch)), len(encoder))
    rows = {name: _rows(*parts[name], p.context, p.packing, end) for name in PARTS}
    for name, part in rows.items():
        if not len(part):
            raise UsageError(
                f"{p.dataset} leaves no sequence of {p.context} tokens for {name}; give more data, a shorter context "
                "or another validation_share"
            )
    if len(rows["train"]) < p.batch_size * p.accumulation:
        raise UsageError(
            f"{p.dataset} makes {len(rows['train'])} sequences of {p.context} tokens to train on, fewer than the "
            f"{p.batch_size * p.accumulation} of one step; lower batch_size or accumulation, or give more data"
        )
    rows["train"].train_on_padding = p.train_on_padding
    facts = {
        **talks.facts,
        **counts,
        "cut_conversations": sum(_cut(lengths, p.context, p.packing) for _, lengths in parts.values()),
        "unlabelled_conversations": 0 if p.packing else int(sum((lengths < 2).sum() for _, lengths in parts.values())),
        # Of both parts: of conversations that were cut, or the last ones where rows are filled.
        "tokens_in_no_row": int(sum(len(parts[name][0]) - rows[name].lengths.sum() for name in PARTS)),
        "train_sequences": len(rows["train"]),
        "validation_sequences": len(rows["validation"]),
        "train_tokens": int(rows["train"].lengths.sum()),
        "padding_share": 1 - float(rows["train"].lengths.mean()) / p.context,
        "token_sha256": fingerprint(rows),
    }
    return Corpus(rows["train"], rows["validation"], len(encoder), facts)


def load_tokenizer(name: str):
    """`builtin`, a hub id or a local folder, as a transformers tokenizer with an end-of-text token."""
    if name == "builtin":
        return builtin_tokenizer()
    try:
        encoder = AutoTokenizer.from_pretrained(str(local(name)), trust_remote_code=False)  # None would ask
    except (Exception, RecursionError) as error:
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"the tokenizer {name!r} brings code of its own (auto_map), which never runs here; use one without"
            ) from None
        raise UsageError(
            f"cannot load the tokenizer {name!r}: {first_line(error)}. Known: 'builtin', a hub id, a local folder."
        ) from error
    if encoder.eos_token is None:
        raise UsageError(f"the tokenizer {name!r} has no end-of-text token to end a conversation with")
    return encoder


def builtin_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909) of 4,096 tokens, trained here on the builtin corpus."""
    what = {"form": FORM, "source": source("builtin").identity, "tokenizers": version("tokenizers")}
    # Written by Python, whose errors say that a disk is full; the tokenizer's own is of no kind.
    folder = made_once(what, lambda scratch: (scratch / "tokenizer.json").write_text(_trained(), encoding="utf-8"))
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=END_OF_TEXT)


def _trained() -> str:
    trained = ByteLevelBPETokenizer()
    talks = (conversation({"messages": messages}, Place("builtin", 1), Counts()) for messages in builtin())
    texts = (as_text(talk)[0] for talk in talks)
    trained.train_from_iterator(texts, BUILTIN_VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False)
    return trained.to_str()


def _identity(encoder) -> str:
    """Changes with anything that changes the tokens."""
    content = encoder.backend_tokenizer.to_str() if encoder.is_fast else json.dumps(encoder.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{type(encoder).__name__} {encoder.eos_token} {content}".encode()).hexdigest()


def _keeps_lines(encoder) -> bool:
    one, other = _encode(encoder, ["a\nb", "a b"])
    return one != other


def _tokenize(talks: Source, encoder, end: int, p, folder: Path) -> None:
    """Writes the tokens of each part one conversation after the other, their lengths, and what was counted."""
    kind = np.dtype("<u2" if len(encoder) <= 1 << 16 else "<u4")
    lengths = {name: [] for name in PARTS}
    counts = Counts()
    bar = tqdm(total=talks.count, unit=" conversations", delay=2, leave=False, disable=p.dataset == "builtin")
    with bar, open(folder / "train.tokens", "wb") as train, open(folder / "validation.tokens", "wb") as validation:
        files = dict(zip(PARTS, (train, validation), strict=True))
        for batch in talks.batches():
            found = [(place, conversation(row, place, counts)) for place, row in batch]
            for text, ids in _encoded(found, encoder, end, p, counts):
                part = "validation" if _fraction(text) < p.validation_share else "train"
                files[part].write(ids.astype(kind).tobytes())
                lengths[part].append(len(ids))
            bar.update(len(batch))
    if not counts.conversations:
        raise UsageError(f"{p.dataset} holds no conversation with a word in it")
    for name in PARTS:
        np.save(folder / f"{name}.lengths.npy", np.array(lengths[name], dtype=np.int64))
    sha256 = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
    facts = {"dtype": kind.str, "counts": counts.facts(), "sha256": sha256}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _encoded(found: list[tuple[Place, list[Turn]]], encoder, end: int, p, counts: Counts):
    """Pairs of each conversation's text and its tokens with the end-of-text token, of those that hold a word.

    Raises UsageError, with the place, for tokens that are not the text's own.
    """
    told = [(place, *as_text(talk, p.turns)) for place, talk in found if talk]
    counts.conversations += len(told)
    counts.empty_conversations += len(found) - len(told)
    counts.escaped_lines += sum(escaped for _, _, escaped in told)
    unknown = encoder.unk_token_id
    try:
        tokens = _encode(encoder, [text for _, text, _ in told])
    except Exception as error:
        where = f"{told[0][0]} to {told[-1][0]}"
        raise UsageError(f"the tokenizer {p.tokenizer!r} fails in {where}: {first_line(error)}; use another") from error
    for (place, text, _), own in zip(told, tokens, strict=True):
        ids = np.array([*own, end], dtype=np.int64)
        if not own:
            raise UsageError(f"{place}: the tokenizer {p.tokenizer!r} has no token for it; it is damaged, use another")
        if ids.max() >= len(encoder):
            raise UsageError(
                f"the tokenizer {p.tokenizer!r} gives token {ids.max()}, beyond its vocabulary of "
                f"{len(encoder)}; it is damaged, or its added tokens are not its own"
            )
        if end in own:
            raise UsageError(
                f"{place}: the tokenizer {p.tokenizer!r} makes its end-of-text token {encoder.eos_token!r} of a text; "
                "take that text out, or use another tokenizer"
            )
        counts.unknown_tokens += 0 if unknown is None else own.count(unknown)
        yield text, ids


def _encode(encoder, texts: list[str]) -> list[list[int]]:
    """Tokens of texts as they stand: what spells a special token is cut into ordinary ones."""
    if not texts:
        return []
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    return encoder(texts, **plain, return_attention_mask=False, verbose=False)["input_ids"]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_count(value) -> bool:
    """Whether it is a count, or counts by name."""
    if isinstance(value, dict):
        return all(type(one) is int and one >= 0 for one in value.values())
    return type(value) is int and value >= 0


def _read(folder: Path, vocabulary: int) -> tuple[dict, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The counts, and each part's tokens and lengths. Raises ValueError, KeyError or TypeError where not as written."""
    facts = json.loads(read_bounded(folder / "facts.json", 1 << 20))
    if not isinstance(facts, dict) or facts["dtype"] not in ("<u2", "<u4"):
        raise ValueError("facts.json is of another kind")
    counts, kind, parts = facts["counts"], np.dtype(facts["dtype"]), {}
    if not isinstance(counts, dict) or not all(map(_is_count, counts.values())):
        raise ValueError("facts.json has other counts")
    for name in PARTS:
        sizes, path = folder / f"{name}.lengths.npy", folder / f"{name}.tokens"
        for file in (sizes, path):
            if not file.is_file() or _sha256(file) != facts["sha256"][file.name]:
                raise ValueError(f"{file.name} is not what was written")
        lengths = np.array(np.lib.format.open_memmap(sizes, mode="r"))  # no zip, no pickle, no size but its own
        size = path.stat().st_size
        if lengths.ndim != 1 or lengths.dtype != np.int64 or ((lengths < 1) | (lengths > size)).any():
            raise ValueError(f"{sizes.name} holds no lengths")
        if size != lengths.sum() * kind.itemsize:
            raise ValueError(f"{path.name} is not whole")
        tokens = np.memmap(path, dtype=kind, mode="r") if len(lengths) else np.empty(0, kind)
        for first in range(0, len(tokens), CHUNK):
            if tokens[first : first + CHUNK].max() >= vocabulary:
                raise ValueError(f"{path.name} holds tokens beyond the vocabulary")
        parts[name] = (tokens, lengths)
    return counts, parts


def _rows(tokens: np.ndarray, sizes: np.ndarray, context: int, packing: bool | str, padding_id: int) -> Rows:
    ends = np.cumsum(sizes)
    if packing:  # the last tokens that fill no row are left out
        starts = np.arange(len(tokens) // context) * context
        lengths = np.full(len(starts), context)
    else:  # one token alone is predicted by nothing and predicts nothing: in a batch of its own its loss is 0 / 0
        labelled = sizes > 1
        starts, lengths = (ends - sizes)[labelled], np.minimum(sizes, context)[labelled]
    return Rows(tokens, starts, lengths, context, padding_id, ends=ends if packing == DOCUMENTS else None)


def _cut(sizes: np.ndarray, context: int, packing: bool | str) -> int:
    """Conversations that are not seen whole: of those that fill rows, only where they are kept apart."""
    if packing == DOCUMENTS:
        ends = np.cumsum(sizes)
        return int(((ends - sizes) // context != (ends - 1) // context).sum())
    return 0 if packing else int((sizes > context).sum())


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, so that a copy of a conversation falls on the same side."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def fingerprint(rows: dict[str, Rows]) -> str:
    """SHA-256 of the tokens and row borders of both parts."""
    digest = hashlib.sha256()
    for name in PARTS:
        part = rows[name]
        borders = [] if part.ends is None else [(part.ends, "<i8")]
        for array, kind in ((part.tokens, "<u4"), (part.starts, "<i8"), (part.lengths, "<i8"), *borders):
            for first in range(0, len(array), CHUNK):
                digest.update(array[first : first + CHUNK].astype(kind).tobytes())
    return digest.hexdigest()
