"""Where conversations come from: the builtin ones, a local file, a data set of the hub.

A conversation is `messages: [{role, content}]`, the schema of Tulu (Ivison et al. 2023, arXiv 2311.10702).
"""

import ast
import gc
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import datasets

from lib.errors import UsageError
from lib.paths import from_root

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
BUILTIN_SOURCES = ("pandas", "matplotlib")
BATCH = 1000  # conversations held at once


@dataclass(frozen=True)
class Source:
    """Conversations that can be read, as often as wanted, in batches; only one batch is in memory.

    `identity` changes when they do. `count` is None where it is not known before reading. `facts` go into the record.
    """

    name: str
    identity: dict
    open: Callable[[], Iterator[dict]]
    count: int | None
    facts: dict

    def batches(self) -> Iterator[list]:
        """Lists of `messages`. Raises UsageError where they cannot be read or are none."""
        try:
            for batch in self.open():
                if "messages" not in batch:
                    raise UsageError(
                        f"{self.name} has the columns {', '.join(batch)}; it needs `messages`: "
                        "a list of {role, content} per row"
                    )
                yield batch["messages"]
        except UsageError:
            raise
        except (Exception, RecursionError) as error:
            raise UsageError(f"cannot read {self.name!r}: {first_line(error)}. {KNOWN}") from error


KNOWN = f"Known: 'builtin', a hub id, or the path of a {', '.join(FORMATS)} file."


def first_line(error: BaseException) -> str:
    """An error's message, or its kind where it has none, as the middle of a sentence."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


def source(dataset: str, revision: str = "") -> Source:
    """`builtin`, a local .parquet, .json or .jsonl file, or a hub id, there at `revision` (a branch, tag or commit).

    Raises UsageError where there is no such thing.
    """
    path = local(dataset)
    if dataset == "builtin":
        identity = {name: version(name) for name in BUILTIN_SOURCES}
        return Source(dataset, identity, lambda: _in_batches(builtin()), None, {})
    if path.suffix not in FORMATS:
        return _from_hub(dataset, revision)
    if not path.is_file():
        raise UsageError(f"there is no data file {dataset!r}, seen from {Path.cwd().name}/ or the repository's root")
    stat = path.stat()
    identity = {"path": str(path.resolve()), "bytes": stat.st_size, "changed_ns": stat.st_mtime_ns}
    return Source(dataset, identity, lambda: _from_file(path), None, {})


def _from_file(path: Path) -> Iterator[dict]:
    # Streamed: not streamed, `datasets` first writes an Arrow copy of the whole file.
    found = datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train", streaming=True)
    return found.iter(batch_size=BATCH)


def _from_hub(dataset: str, revision: str) -> Source:
    """A hub's data set, downloaded into the cache of `datasets` once; without a network, what is there already."""
    try:
        builder = datasets.load_dataset_builder(dataset, revision=revision or None)
    except (Exception, RecursionError) as error:
        way_out = "log in with `hf auth login`" if "gated" in str(error) else KNOWN
        raise UsageError(f"cannot load {dataset!r} from the hub: {first_line(error)}. {way_out}") from error
    # Where the hub cannot be asked, `datasets` takes whatever revision its cache holds.
    if re.fullmatch("[0-9a-f]{40}", revision) and builder.hash != revision:
        raise UsageError(
            f"{dataset} at {revision[:12]} cannot be had without the hub; in the cache there is {builder.hash[:12]}"
        )

    def open_it():
        builder.download_and_prepare()
        return builder.as_dataset(split="train").iter(batch_size=BATCH)

    split = (builder.info.splits or {}).get("train")
    count = split.num_examples if split else None
    return Source(dataset, {"id": dataset, "commit": builder.hash}, open_it, count, {"dataset_commit": builder.hash})


def local(path: str) -> Path:
    """A path as given, or from the repository's root where only that exists: notebooks run in either folder."""
    return Path(path) if Path(path).exists() else from_root(path) if from_root(path).exists() else Path(path)


def as_text(messages, turns: str = "roles") -> tuple[str, int]:
    """A conversation as one text, and how many empty turns it lost.

    `turns`: "roles" keeps the role as a line <|role|> before each turn; "joined" puts a space between the turns and
    drops the roles, as the published study did. Raises UsageError for a turn of another form.
    """
    said, empty = [], 0
    for message in messages or []:
        try:
            role, content = message["role"], message["content"]
        except (TypeError, KeyError):
            role = content = 0
        if not (content is None or isinstance(content, str)) or not isinstance(role, str):
            raise UsageError(f"a turn must be {{role: text, content: text}}, not {str(message)[:60]!r}")
        if content is None or not content.strip():
            empty += 1
        else:
            said.append(content if turns == "joined" else f"<|{role}|>\n{content}\n")
    return (" " if turns == "joined" else "").join(said), empty


def _in_batches(talks) -> Iterator[dict]:
    for first in range(0, len(talks), BATCH):
        yield {"messages": list(talks[first : first + BATCH])}


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
