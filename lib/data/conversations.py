"""Where conversations come from: the builtin ones, local files, a data set of the hub; and what one must look like.

A conversation is `messages: [{role, content}]`, the schema of Tulu (Ivison et al. 2023, arXiv 2311.10702), or
ShareGPT's `conversations: [{from, value}]`. Every row is checked by the same rules, wherever it stands; what of it is
not trained on is counted by its kind.
"""

import ast
import gc
import importlib.util
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from lib.data import files
from lib.data.cache import remember, remembered
from lib.data.files import Place, Row
from lib.errors import UsageError
from lib.paths import from_root

BUILTIN_SOURCES = ("pandas", "matplotlib")
BATCH = 1000  # conversations held at once


@dataclass(frozen=True)
class Source:
    """Rows that can be read, as often as wanted; only a batch of them is ever in memory.

    `identity` changes when they do. `count` is None where it is not known before reading. `facts` go into the record.
    """

    name: str
    identity: dict
    open: Callable[[], Iterator[Row]]
    count: int | None
    facts: dict

    def batches(self) -> Iterator[list[Row]]:
        """Lists of rows with their places. Raises UsageError where they cannot be read."""
        batch = []
        try:
            for row in self.open():
                batch.append(row)
                if len(batch) == BATCH:
                    yield batch
                    batch = []
        except UsageError:
            raise
        except (Exception, RecursionError) as error:
            raise UsageError(f"cannot read {self.name!r}: {first_line(error)}. {KNOWN}") from error
        if batch:
            yield batch


KNOWN = f"Known: {files.KNOWN}."


def first_line(error: BaseException) -> str:
    """An error's message, or its kind where it has none, as the middle of a sentence."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


def source(dataset: str, revision: str = "") -> Source:
    """`builtin`, a local data file or a folder of them, or a hub id, there at `revision` (a branch, tag or commit).

    Raises UsageError where there is no such thing.
    """
    path = local(dataset)
    if dataset == "builtin":
        here = Source(dataset, {name: version(name) for name in BUILTIN_SOURCES}, _from_builtin, None, {})
    elif dataset.strip() and path.is_dir():
        paths, others = files.in_folder(path)
        named = [(one, one.relative_to(path).as_posix()) for one in paths]
        here = _from_files(dataset, named, {"data_files": len(paths), "other_files": others})
    elif files.ending(path.name):
        if not path.is_file():
            seen_from = f"seen from {Path.cwd().name}/ or the repository's root"
            raise UsageError(f"there is no data file {dataset!r}, {seen_from}")
        here = _from_files(dataset, [(path, path.name)], {})
    elif path.is_file():
        raise UsageError(f"cannot read {dataset!r}, by its name no data file. {KNOWN}")
    else:
        return _from_hub(dataset, revision)
    if revision:
        raise UsageError(
            f"dataset_revision {revision!r} is of a hub's data set, and {dataset!r} is none; leave it empty"
        )
    return here


def _from_files(dataset: str, named: list[tuple[Path, str]], facts: dict) -> Source:
    """`named`: files, and what places call them."""
    try:
        states = [_state(path) for path, _ in named]
        identity = [[files.ending(name), files.fingerprint(path)] for path, name in named]
    except OSError as error:
        raise UsageError(f"cannot read {dataset!r}: {error.strerror}. {KNOWN}") from error

    def rows():
        for (path, name), state in zip(named, states, strict=True):
            yield from files.rows(path, files.plain(name))
            if _state(path) != state:
                raise UsageError(f"{name} changed while it was read; run this again when nobody writes to it")

    return Source(dataset, {"files": identity}, rows, None, facts)


def _state(path: Path) -> tuple:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _from_hub(dataset: str, revision: str) -> Source:
    """A hub's data set, its files downloaded once into the hub's own cache; without a network, what is there already.

    `datasets` says which files are the training part. It does not read them: it guesses types from the first rows.
    """
    found = _asked_of_hub(dataset, revision)
    commit, names = found["commit"], found["files"]
    unread = [name for name in names if not files.ending(name)]
    if unread or not names:
        what = f"holds {unread[0]}" if unread else "has no files to train on"
        raise UsageError(f"{dataset} {what}; this study reads {', '.join(files.ENDINGS)} files")

    def rows():
        from huggingface_hub import hf_hub_download

        for name in names:
            yield from files.rows(
                Path(hf_hub_download(dataset, name, repo_type="dataset", revision=commit)), files.plain(name)
            )

    return Source(dataset, {"id": dataset, "commit": commit}, rows, found["count"], {"dataset_commit": commit})


def _asked_of_hub(dataset: str, revision: str) -> dict:
    """A data set's commit, the files of its training part and, where known, their rows; the hub's last answer where it
    cannot be asked now. Raises UsageError where the hub says no, or cannot be asked and never was."""
    import datasets  # here, because it takes a second that only a hub's data needs

    try:
        builder = datasets.load_dataset_builder(dataset, revision=revision or None)
        splits = builder.config.data_files
        if splits is None:  # read from the cache of `datasets`, which names no files
            raise ConnectionError("the hub does not answer")
    except (Exception, RecursionError) as error:
        said_no = isinstance(error, datasets.exceptions.DatasetsError | datasets.data_files.EmptyDatasetError)
        answer = None if said_no else _last_answer(dataset, revision)
        if answer:
            return answer
        way_out = "log in with `hf auth login`" if "gated" in str(error) else KNOWN
        raise UsageError(f"cannot load {dataset!r} from the hub: {first_line(error)}. {way_out}") from error
    prefix, split = f"hf://datasets/{dataset}@{builder.hash}/", (builder.info.splits or {}).get("train")
    answer = {
        "commit": builder.hash,
        "files": [url.removeprefix(prefix) for url in splits.get("train", [])],
        "count": split.num_examples if split else None,
    }
    for name in {revision, builder.hash}:
        remember({"hub": dataset, "revision": name}, answer)
    return answer


def _last_answer(dataset: str, revision: str) -> dict | None:
    found = remembered({"hub": dataset, "revision": revision})
    newest = remembered({"hub": dataset, "revision": ""})
    if not found and newest:
        raise UsageError(
            f"{dataset} at {revision[:12]} cannot be had without the hub; in the cache there is {newest['commit'][:12]}"
        )
    return found


def local(path: str) -> Path:
    """A path as given, or from the repository's root where only that exists: notebooks run in either folder."""
    return Path(path) if Path(path).exists() else from_root(path) if from_root(path).exists() else Path(path)


def is_here(dataset: str) -> bool:
    """Whether a data set is on this machine, or by its name should be, rather than on a hub."""
    return dataset == "builtin" or bool(files.ending(dataset)) or (bool(dataset.strip()) and local(dataset).exists())


class Turn(NamedTuple):
    role: str
    content: str


TURN = "a turn must be {role: text, content: text}"
KEYS = ("messages", "conversations")
FORMS = (("role", "content"), ("from", "value"))  # of a turn; the second is ShareGPT's
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
ROLE = re.compile(r"[\w][\w .:/@+-]{0,63}")  # nothing that could end the line <|role|> or begin another
MOST_NAMES = 20  # of fields in a record; the rarer ones share an entry


@dataclass
class Counts:
    """What was found, and what of it is not trained on, by kind."""

    conversations: int = 0
    empty_conversations: int = 0  # without a word
    empty_turns: int = 0
    turns_without_text: int = 0  # dropped although another field of theirs holds something
    dropped_turn_fields: Counter = field(default_factory=Counter)  # fields that held something, by name
    dropped_row_fields: Counter = field(default_factory=Counter)
    escaped_lines: int = 0  # of content, that looked like the line of a role
    unknown_tokens: int = 0  # signs for which the tokenizer has nothing

    def facts(self) -> dict:
        """For the record."""
        return {name: _named(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


def _named(counts: Counter) -> dict[str, int]:
    """The most frequent names as they can stand in a record, whatever somebody's file calls its fields."""
    often, found = counts.most_common(MOST_NAMES), Counter()
    for name, count in often:
        found[files.plain(name[:60])] += count
    rest = counts.total() - sum(count for _, count in often)
    return dict(sorted(found.items())) | ({"(others)": rest} if rest else {})


def conversation(row: object, place: Place, counts: Counts) -> list[Turn]:
    """The turns of a row that hold text; what else it holds is counted. Raises UsageError, with the place, for a row of
    another form."""
    if not isinstance(row, dict):
        raise UsageError(f"{place}: a row must be {{messages: [{{role, content}}]}}, not {_shown(row)}")
    key = next((key for key in KEYS if _holds(row.get(key))), next((key for key in KEYS if key in row), None))
    if key is None:
        columns = files.plain(", ".join(map(str, row))[:200]) or "nothing"
        raise UsageError(f"{place} has the columns {columns}; it needs `messages`: a list of {{role, content}} per row")
    for name, value in row.items():
        if name != key and _holds(value):
            counts.dropped_row_fields[name] += 1
    talk = [] if row[key] is None else row[key]
    if not isinstance(talk, list):
        raise UsageError(f"{place}: `{key}` must be a list, in which {TURN}, not {_shown(talk)}")
    return [turn for turn in (_turn(one, place, counts) for one in talk) if turn]


def _turn(turn: object, place: Place, counts: Counts) -> Turn | None:
    role, content, others = _parts(turn)
    if not isinstance(role, str) or not (content is None or isinstance(content, str)):
        raise UsageError(f"{place}: {TURN}, not {_shown(turn)}")
    if not ROLE.fullmatch(role):
        raise UsageError(f"{place}: a role must be a name such as user, not {_shown(role)}")
    for name in others:
        counts.dropped_turn_fields[name] += 1
    if content is None or not content.strip():
        counts.turns_without_text += bool(others)
        counts.empty_turns += not others
        return None
    try:
        if not content.isascii():  # a quick look that spares most texts the slow one
            content.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{place}: a turn holds half of a surrogate pair, which is no text; mend it there") from None
    return Turn(role, content)


def _parts(turn: object) -> tuple[object, object, list[str]]:
    """What a turn gives as its role and its text, and the names of its other fields that hold something. A role of
    None stands for a turn of no form, or of no content whatever."""
    if not isinstance(turn, dict):
        return None, None, []
    who, what = FORMS[1] if _holds(turn.get("from")) and not _holds(turn.get("role")) else FORMS[0]
    others = [name for name, value in turn.items() if name not in (who, what) and _holds(value)]
    if what not in turn and not others:
        return None, None, []
    role = turn.get(who)
    if who == "from" and isinstance(role, str):
        role = SHAREGPT_ROLES.get(role, role)
    return role, turn.get(what), others


def _holds(value: object) -> bool:
    """Whether a field holds anything: a table has all of its fields in every row."""
    return value is not None and value != "" and value != [] and value != {}


def _shown(value: object) -> str:
    """The begin of what stands there, on one line."""
    return reprlib.repr(value)[:100]


def as_text(talk: list[Turn], turns: str = "roles") -> tuple[str, int]:
    """A conversation as one text, and how many lines of its content had to be escaped.

    `turns`: "roles" keeps the role as a line <|role|> before each turn; "joined" puts a space between the turns and
    drops the roles, as the published study did. With roles the text says the same as the turns, whatever they hold: a
    line of content that looks like a role's gets a backslash more than it has.
    """
    if turns == "joined":
        return " ".join(content for _, content in talk), 0
    said, escaped = [], 0
    for role, content in talk:
        if BAR.search(content):
            lines = content.split("\n")
            marked = [f"\\{line}" if _looks_like_a_role(line) else line for line in lines]
            escaped += sum(len(new) - len(old) for new, old in zip(marked, lines, strict=True))
            content = "\n".join(marked)
        said.append(f"<|{role}|>\n{content}\n")
    return "".join(said), escaped


BAR = re.compile("[|｜]")
ROLE_LINE = re.compile(r"\\*<\|.*\|>", re.DOTALL)


def _looks_like_a_role(line: str) -> bool:
    """Whether a line is <|...|>, perhaps behind backslashes, or becomes that in a tokenizer that folds signs that look
    alike and drops accents, spaces and control signs."""
    plain = "".join(sign for sign in unicodedata.normalize("NFKD", line) if unicodedata.category(sign)[0] not in "CMZ")
    return ROLE_LINE.fullmatch(plain) is not None


def _from_builtin() -> Iterator[Row]:
    for number, messages in enumerate(builtin(), 1):
        yield Place("builtin", number), {"messages": messages}


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
