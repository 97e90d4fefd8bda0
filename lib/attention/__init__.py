"""The variants: one file each, the file's name is the variant's name. Read `sdpa.py` to write your own.

A variant file defines `class Attention(torch.nn.Module)` and nothing outside it is told about the variant:

| member | promise |
| --- | --- |
| `paper` | where the definition stands (title, year, section, arXiv number) |
| `__init__(config, layer_idx, **options)` | of a `transformers.GPT2Config`; a bad option raises ValueError that says \
what to do |
| `forward(hidden_states, past_key_values=None, padding_mask=None, **_)` | (B, T, C) -> `((B, T, C), None)`. \
`past_key_values.layers[layer_idx]` is what `new_cache` made. `padding_mask` is None or a (B, S) bool, False where a \
key is padding. Padding behind all tokens comes only where the cache does not keep every key (a window, a \
state); elsewhere causality deals with it |
| `new_cache()` | an empty cache of the variant's own kind for one layer (`transformers.cache_utils`). One that grows, \
and is of a class of its own, may have `reserve(tokens)`: room for so many, so that no update moves what is there |
| `core_flops(context, dense=False)` | FLOPs of one forward over one sequence outside the projections, with causality, \
windows and buckets honoured; `dense=True`: as if every score were computed |
| `cache_bytes(context, element_bytes)` | bytes of one layer's cache for one sequence of `context` tokens |
| `reference(hidden_states)` | the same output from an independent slow form with the same weights |

Parameters named `c_attn` and `c_proj` start as GPT-2's do; matrices of any other name start as N(0, 0.02), vectors as
the constructor leaves them (`lib.model`). More members may be left out:

| member | promise |
| --- | --- |
| `forward(..., seq_idx=None)` | named by a variant that keeps the documents of a packed row apart: None, or (B, T) \
integers, equal within a document, each of which is as if alone. No cache comes with it. Without the name \
such a row is refused |
| `forward(..., position_ids=None)` | named by a variant that has positions of its own: (B or 1, T) integers; without \
the name a variant knows the order of tokens alone |
| `forward(..., position_embeddings=None)` | named by a variant that turns queries and keys by what Llama's layers \
give: (cos, sin), (B or 1, T, D) each, or None; its `reference` then takes it too |
| `needs_no_positions` | True: it knows the order of tokens by itself. Llama's layers take no variant without any of \
the three |
| `causal` | False: a later token moves an earlier output, so that padding behind all tokens comes in `padding_mask` |
| `by_content` | True: which keys a query sees is in the data, so that `core_flops` can only be right on average |
| `title` | what figures and tables call it, with the option that matters: "Window 128"; without one the file's name |
| `own_initialisation` | True: all weights stay as the constructor leaves them |
| `as_gpt2(config)` | a static method: options with which it is GPT-2's own attention, with weights of the same names, \
so that the certificate can hold `reference` against that |
| `sized(config, context, numbers)` | a static method: options with which the cache of a sequence of `context` tokens \
holds about so many numbers; `match: state` asks it for SDPA's |
| `projection_flops(context)` | FLOPs of the weights in one forward, where they are not two per token and weight of \
every matrix |

Wherever a variant is named, a pattern may be: names or paths joined by commas, one a layer, repeated over the layers of
the model (`Pattern`). `linear,linear,linear,sdpa` is three layers of one to one of the other.
"""

import ast
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import itertools
import os
import sys
import sysconfig
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

# The paper's eight, in its order: what a study trains where no variants are named. What exists is what has a file.
STUDY_ORDER = ("baseline", "sdpa", "gqa", "linear", "sliding_window", "lsh", "flash", "mla")
REFERENCE = "sdpa"  # of all ratios
CONTROL = "sdpa_again"  # the A/A control: the reference, run a second time
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def variants() -> tuple[str, ...]:
    """Names of the variants that have a file here: the paper's in its order, then the others by name."""
    found = {path.stem for path in HERE.glob("*.py")} - {"__init__"}
    return (*(name for name in STUDY_ORDER if name in found), *sorted(found - set(STUDY_ORDER)))


def parts(name: str) -> tuple[str, ...]:
    """The variants of a pattern, layer by layer until it repeats; of a variant, itself. Raises ValueError for an empty
    one, and for two files of one name."""
    if "," not in name or any(map(os.path.isfile, (name, ROOT / name))):  # a folder's name may have one
        return (name.strip(),)
    found = [one.strip() for one in name.split(",")]
    if not all(found):
        raise ValueError(f"attention {name!r} has an empty name beside a comma; join names by single commas")
    count = len(found)
    period = next(n for n in range(1, count + 1) if count % n == 0 and found == found[:n] * (count // n))
    called = {stem(one): one for one in found}
    odd = next((one for one in found if called[stem(one)] != one), None)
    if odd:
        raise ValueError(f"a pattern goes by its files' names, and {odd!r} is called as {called[stem(odd)]!r} is")
    return tuple(found[:period])


def find(name: str) -> Path:
    """The file of a variant, given its name or the path of a .py file. Raises ValueError if there is none."""
    if name.endswith(".py"):
        for path in (Path(name), ROOT / name):
            if path.is_file():
                return path
        raise ValueError(f"there is no attention file {name!r}, seen from {Path.cwd().name}/ or the repository's root")
    if name not in variants():
        guess = get_close_matches(name, variants(), n=1)
        hint = f" Did you mean {guess[0]!r}?" if guess else ""
        raise ValueError(
            f"there is no attention variant {name!r}; known: {', '.join(variants())}, or the path of a .py file.{hint}"
        )
    return HERE / f"{name}.py"


@dataclass(frozen=True)
class _Definition:
    """A variant's file as it was read: the module that was made of these very bytes, and the fingerprint of them and of
    what they import of one's own."""

    sha256: str
    module: ModuleType


_made: dict[tuple[Path, str], _Definition] = {}  # by file and fingerprint: the same text is run once
_pinned: dict[Path, _Definition] = {}  # what a run of this process goes by, whatever becomes of the file


class _Read(importlib.machinery.SourceFileLoader):
    """Makes a module of source that is in hand, so that what is hashed and what runs are the same bytes."""

    def __init__(self, name: str, path: Path, source: bytes):
        super().__init__(name, str(path))
        self.source = source

    def get_code(self, fullname):
        return self.source_to_code(self.source, self.path)


def _read(name: str) -> _Definition:
    path = find(name).resolve()
    source = path.read_bytes()
    beside = _imported(path, source)
    sha256 = _sha256(source, beside)
    if (path, sha256) not in _made:
        _forget_older(beside)
        _made[path, sha256] = _Definition(sha256, _module(path, source, sha256))
    return _made[path, sha256]


def _sha256(source: bytes, beside: dict[Path, bytes]) -> str:
    """Of a file, and of what it imports of one's own; of a file that imports none, its own bytes' alone."""
    digests = [hashlib.sha256(text).hexdigest() for text in (source, *beside.values())]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _imported(path: Path, source: bytes) -> dict[Path, bytes]:
    """Files that a variant's file imports, and those that they import, with their bytes and in one order: but for
    installed packages, which versions name, and the standard library. Nothing is run to know them."""
    if path.parent == HERE:
        return {}
    found, todo = {path: source}, [(source, "")]
    while todo:
        for name in _names_imported(*todo.pop()):
            for file, package in _files_of(name):
                if file not in found:
                    found[file] = file.read_bytes()
                    todo += [(found[file], package)] if file.suffix == ".py" else []
    return {file: found[file] for file in sorted(found) if file != path}


@functools.lru_cache(maxsize=64)  # a variant's file is read at every turn, to see whether it changed
def _names_imported(source: bytes, package: str) -> frozenset[str]:
    """Full names of what a text of `package` imports, wherever in it; what is imported from a module may be one."""
    try:
        lines = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):  # said when it is run
        return frozenset()
    found = {one.name for line in lines if isinstance(line, ast.Import) for one in line.names}
    for line in lines:
        if isinstance(line, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - line.level] if line.level else []
            base = ".".join([*above, *([line.module] if line.module else [])])
            found |= {base, *(f"{base}.{one.name}" for one in line.names)}
    return frozenset(found - {""})


NAMED_BY_VERSION = {"torch", "transformers"} | sys.stdlib_module_names
INSTALLED = tuple(Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib"))


def _files_of(name: str):
    """The files of one's own of a module and the packages around it, of lib the module's alone, each with the package
    that its relative imports begin at."""
    parts, search = name.split("."), None
    if parts[0] in NAMED_BY_VERSION:
        return
    for count in range(1, len(parts) + 1):
        full = ".".join(parts[:count])
        spec = getattr(sys.modules.get(full), "__spec__", None)
        spec = spec or importlib.machinery.PathFinder.find_spec(full, search)
        if spec is None or (count > 1 and search is None):
            return
        search = spec.submodule_search_locations
        file = Path(spec.origin or "").resolve()
        installed = {"site-packages", "dist-packages"} & {*file.parts} or any(map(file.is_relative_to, INSTALLED))
        if installed:
            return
        if file.is_file() and (parts[0] != "lib" or count == len(parts)):
            yield file, full if search is not None else full.rpartition(".")[0]


_ran: dict[Path, bytes] = {}  # what a variant's file imported of one's own, as it was then


def _forget_older(beside: dict[Path, bytes]) -> None:
    """Python imports a module once; where the text of one has changed, all of them are imported anew."""
    mine = {file: text for file, text in beside.items() if not file.is_relative_to(HERE.parent)}
    if any(_ran.get(file) != text for file, text in mine.items()):
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "").resolve() in mine:
                del sys.modules[name]
        importlib.invalidate_caches()
        _ran.update(mine)


def _module(path: Path, source: bytes, sha256: str) -> ModuleType:
    is_ours = path.parent == HERE
    name = f"{__name__}.{path.stem}" if is_ours else f"attention_{sha256[:12]}"
    if is_ours and name in sys.modules and not isinstance(sys.modules[name].__loader__, _Read):
        return sys.modules[name]  # another file has imported it as a part of its own
    spec = importlib.util.spec_from_loader(name, _Read(name, path, source))
    module = importlib.util.module_from_spec(spec)
    writes_none, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # an edit within a second would not show
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path.name} cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        sys.dont_write_bytecode = writes_none
    if is_ours:
        sys.modules[name] = module
        setattr(sys.modules[__name__], path.stem, module)
    return module


def _definition(name: str) -> _Definition:
    return _pinned.get(find(name).resolve()) or _read(name)


def pin(name: str) -> None:
    """Reads a variant's file now, and from now on `load` and `source_sha256` are of this text, until the next `pin`.

    A run begins with it: its file may be edited while it goes on. Raises ValueError as `load` does.
    """
    definitions = {part: _read(part) for part in parts(name)}
    for part, definition in definitions.items():
        _class(part, definition)
        _pinned[find(part).resolve()] = definition


def load(name: str) -> "type | Pattern":
    """The class `Attention` of a variant, by name or by the path of a .py file (which is run), as pinned or as it is;
    of a pattern, what makes the layers in its stead.

    Raises ValueError where there is no such variant, or its file defines no `Attention`.
    """
    names = parts(name)
    return Pattern(names) if len(names) > 1 else _class(names[0], _definition(names[0]))


class Pattern:
    """Several variants over the layers of one model, where one variant's class may stand.

    `names`: the variants layer by layer, until they repeat. Called as a variant's class is, it makes the layer that
    stands at `layer_idx`. An option goes to the variant that has it, or to one by its name: `{"sliding_window":
    {"window": 64}}`. Raises ValueError for an option that none has, or that several have and none is named.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.variants = {name: load(name) for name in dict.fromkeys(names)}

    @property
    def paper(self) -> str:
        return "; ".join(dict.fromkeys(variant.paper for variant in self.variants.values()))

    def __call__(self, config, layer_idx: int, **options):
        if len(self.names) > config.n_layer:
            raise ValueError(f"{','.join(self.names)} names {len(self.names)} layers, the model has {config.n_layer}")
        name = self.names[layer_idx % len(self.names)]
        own = self.options_of(options)[name]
        try:
            return self.variants[name](config, layer_idx, **own)
        except ValueError as error:
            raise ValueError(f"{stem(name)}: {error}") from None

    def options_of(self, options: dict) -> dict[str, dict]:
        """The options of each variant."""
        found = {name: {} for name in self.variants}
        by_stem = {stem(name): name for name in found}
        for option, value in options.items():
            if isinstance(value, dict):
                if option not in by_stem:
                    hint = _meant(option, by_stem, "")
                    raise ValueError(f"options of {option!r}, which is not among {', '.join(by_stem)}{hint}")
                _take(found[by_stem[option]], value, option)
                continue
            owners = [name for name in found if option in defaults(self.variants[name])]
            if not owners:
                known = sorted({known for variant in self.variants.values() for known in defaults(variant)})
                hint = _meant(option, known, f"; they have: {', '.join(known) or 'none'}.")
                raise ValueError(f"none of {', '.join(by_stem)} has an option {option!r}{hint}")
            if len(owners) > 1:
                raise ValueError(
                    f"{' and '.join(map(stem, owners))} have an option {option!r} each; say whose it is: "
                    f"{{{stem(owners[0])}: {{{option}: {value}}}}}"
                )
            _take(found[owners[0]], {option: value}, stem(owners[0]))
        return found


def _meant(given: str, known, otherwise: str) -> str:
    """What ends a sentence about a name that is not `known`: the nearest, if one is near."""
    guess = get_close_matches(str(given), known, n=1)
    return f"; did you mean {guess[0]!r}?" if guess else otherwise


def check_options(name: str, options: dict) -> None:
    """Raises ValueError, in one sentence, for an option that a variant, or one of a pattern, does not have."""
    for part, (variant, own) in by_part(name, options).items():
        known = defaults(variant)
        for option in own:
            if option not in known:
                hint = _meant(option, known, f"; it has: {', '.join(known) or 'none'}.")
                raise ValueError(f"{part} has no option {option!r}{hint}")


def _take(own: dict, given: dict, name: str) -> None:
    """Adds options to a variant's own. Raises ValueError for one that it has already, as another."""
    for option, value in given.items():
        if own.get(option, value) != value:
            raise ValueError(f"{name}'s {option} is given twice, as {own[option]!r} and as {value!r}; give it once")
        own[option] = value


def by_part(name: str, options: dict) -> dict[str, tuple["type", dict]]:
    """Each different variant of a pattern, by its name: the class and its own options. Of a variant, itself."""
    found = load(name)
    if isinstance(found, Pattern):
        own = found.options_of(options)
        return {part: (variant, own[part]) for part, variant in found.variants.items()}
    return {name: (found, options)}


def defaults(variant: "type | Pattern") -> dict[str, object]:
    """A variant's own options and their defaults, from its constructor's signature; of a pattern, those that one of its
    variants alone has."""
    if isinstance(variant, Pattern):
        every = [pair for each in variant.variants.values() for pair in defaults(each).items()]
        names = [name for name, _ in every]
        return {name: default for name, default in every if names.count(name) == 1}
    return {name: option.default for name, option in list(inspect.signature(variant).parameters.items())[2:]}


def layers(name: str, config, **options) -> list:
    """A layer for each of `config.n_layer`, as a model has them."""
    made = load(name)
    return [made(config, layer, **options) for layer in range(config.n_layer)]


def is_ours(name: str) -> bool:
    """Whether a variant, or each of a pattern, has a file here: what a record or a folder names may be anything."""
    try:
        return set(parts(name)) <= set(variants())
    except ValueError:
        return False


def _class(name: str, definition: _Definition) -> type:
    found = getattr(definition.module, "Attention", None)
    if not isinstance(found, type):
        raise ValueError(f"{find(name).name} defines no class `Attention`; lib/attention/sdpa.py shows what one needs")
    if not any(base.__module__.startswith("torch.nn.") and base.__name__ == "Module" for base in found.__mro__):
        raise ValueError(
            f"{find(name).name}'s class `Attention` is no torch.nn.Module: begin it as `class "
            "Attention(torch.nn.Module)`, as lib/attention/sdpa.py does"
        )
    return found


def keeps_documents(layer) -> bool:
    """Whether a variant, or a layer of one, keeps the documents of a packed row apart: its forward names `seq_idx`."""
    return "seq_idx" in inspect.signature(layer.forward).parameters


def rotates(layer) -> bool:
    """Whether a variant, or a layer of one, turns queries and keys by `position_embeddings`: its forward names them."""
    return "position_embeddings" in inspect.signature(layer.forward).parameters


def knows_order_in_llama(layer) -> bool:
    """Whether a variant, or a layer of one, learns from Llama's layers, or by itself, where tokens stand."""
    own = "position_ids" in inspect.signature(layer.forward).parameters or getattr(layer, "needs_no_positions", False)
    return rotates(layer) or own


def source_sha256(name: str) -> str:
    """Fingerprint of a variant's file and of what it imports of one's own, so that a record says which definition it
    measured: the pinned one, if any. Of a pattern, that of its variants' fingerprints."""
    names = parts(name)
    if len(names) > 1:
        return hashlib.sha256("".join(map(source_sha256, names)).encode()).hexdigest()
    (name,) = names
    path = find(name).resolve()
    if path in _pinned:
        return _pinned[path].sha256
    source = path.read_bytes()
    return _sha256(source, _imported(path, source))


def title(layers, attention: str) -> str:
    """What figures and tables call a variant, given its `layers` in a model: the first one's own `title`, or the file's
    name; of a pattern each's, such as "3 × Window 128 + SDPA".

    A file of one's own that still has the title of the reference, which it was copied from, goes by its name too.
    """
    names = parts(attention)
    return _joined([_title(layer, name) for layer, name in zip(layers, names, strict=False)], " + ", " × ")


def _title(layer, name: str) -> str:
    own = str(getattr(layer, "title", "") or stem(name))
    return stem(name) if name.endswith(".py") and own == load(REFERENCE).title else own


def label(attention: str) -> str:
    """A variant's name, or a file's without folders and ending; of a pattern each's, such as "3xlinear+sdpa"."""
    return _joined([stem(part) for part in parts(attention)], "+", "x")


def _joined(names: list[str], plus: str, times: str) -> str:
    counted = [(len(list(alike)), name) for name, alike in itertools.groupby(names)]
    return plus.join(f"{count}{times}{name}" if count > 1 else name for count, name in counted)


def stem(attention: str) -> str:
    """A variant's name, or a file's without folders and ending."""
    return attention.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".py")
