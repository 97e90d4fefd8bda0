"""The parameters of a run, whose only definition is the parameters cell of train.ipynb.

This module reads that cell, checks what a person gave against it, and says in one sentence what is wrong.
"""

import ast
import functools
import importlib
import inspect
import json
import math
from dataclasses import dataclass
from difflib import get_close_matches
from types import SimpleNamespace

from pydantic import BaseModel, ValidationError

from lib import attention, paths
from lib.errors import UsageError
from lib.record.names import (
    LONGEST_TEXT,
    check_label,
    check_name,
    digest,
    display_name,
    printable,
    run_name,
    setting,
)  # fmt: skip
from lib.record.names import file_stem as file_name
from lib.record.schema import (
    ARCHITECTURES,
    DEVICES,
    LIMITS,
    MATCHES,
    MOST_CONTEXTS,
    MOST_STEPS,
    POSITION_EMBEDDINGS,
    PRECISIONS,
)
from lib.startup import quick_imports

# Names of records, which hold the parameters, and so are made there.
__all__ = ["digest", "display_name", "file_name", "run_name", "setting"]

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
DEEPEST = 20  # lists or mappings within each other
PLAIN = (bool, int, float, str, type(None))  # what a record holds an option as, alone or in a list
CHOICES = {
    "device": DEVICES,
    "precision": PRECISIONS,
    "schedule": ("cosine", "constant"),
    "turns": ("roles", "joined"),
    "packing": (False, True, "documents"),
    "position_embedding": POSITION_EMBEDDINGS,
    "architecture": ARCHITECTURES,
    "match": MATCHES,
}


@dataclass(frozen=True)
class Declared:
    """One line of the parameters cell."""

    type: str
    default: object


def declared(source: str) -> dict[str, Declared]:
    """The parameters that a cell's source defines: `name: type = default` lines."""
    lines = [node for node in ast.parse(source).body if isinstance(node, ast.AnnAssign) and node.value is not None]
    return {node.target.id: Declared(ast.unparse(node.annotation), ast.literal_eval(node.value)) for node in lines}


def check_names(names, known) -> None:
    """Raises UsageError for the first name that is not a parameter, with the nearest that is."""
    for name in names:
        if name not in known:
            guess = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {guess[0]!r}?" if guess else f"known: {', '.join(known)}."
            raise UsageError(f"there is no parameter {name!r}; {hint}")


def check_types(values: dict, known: dict[str, Declared]) -> dict:
    """The values with whole numbers made floats where a float is declared. Raises UsageError for a wrong type, and for
    a number that is not finite or too large, also within a list or dict."""
    checked = {}
    for name, value in values.items():
        wanted = TYPES[known[name].type]
        _check_plain(name, value)
        if wanted is float and type(value) is int:
            value = float(value)
        others = [choice for choice in CHOICES.get(name, ()) if type(choice) is not wanted]
        if type(value) is not wanted and not (isinstance(value, str) and value in others):
            kinds = " or ".join([known[name].type, *map(repr, others)])
            raise UsageError(f"{name} must be {kinds}, not {_shown(value)}{_way_out(wanted, value)}")
        checked[name] = value
    return checked


def modelled(kind: type[BaseModel], values: dict) -> BaseModel:
    """`values` as a model. Raises UsageError, in one line, with the name of the first that is wrong."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(printable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")) from None


def _check_plain(name: str, value, depth: int = 0) -> None:
    """Raises UsageError for numbers that are none, and texts that no page, terminal or record can show."""
    if depth > DEEPEST:
        raise UsageError(f"{name} is nested more than {DEEPEST} deep")
    if isinstance(value, dict):
        for option, one in value.items():
            _check_plain(f"a name in {name}", option, depth + 1)
            _check_plain(name, one, depth + 1)
    elif isinstance(value, list):
        for one in value:
            _check_plain(name, one, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} must be a finite number, not {value}")
    elif isinstance(value, int) and abs(value) > 2**53:
        raise UsageError(f"{name} must be a number of at most 2**53, not one of {value.bit_length()} bits")
    elif isinstance(value, str) and not (value.isprintable() and len(value) <= LONGEST_TEXT):
        raise UsageError(f"{name} must be a text on one line that can be printed, not {_shown(value)}")


def _shown(value) -> str:
    """A value as a sentence shows it: a number of thousands of digits, which Python does not write, by its size."""
    try:
        return printable(repr(value), 100)
    except ValueError:
        return f"one of {value.bit_length()} bits"


def _way_out(wanted: type, value) -> str:
    if wanted is float and isinstance(value, str):
        try:
            return f"; YAML reads 1e-4 as text, write {float(value):.1e} with its point"
        except ValueError:
            return ""
    if wanted in (dict, list):
        example = "{window: 64}" if wanted is dict else "[64, 256]"
        return f"; on the command line, for example: -y 'name: {example}'"
    return ""


def portable(values: dict) -> dict:
    """The values with paths as seen from the repository's root, so that no record names a machine's folders."""
    found = dict(values)
    for name in ("dataset", "tokenizer", "save_model"):
        if name in values:
            found[name] = paths.portable(values[name])
    if "attention" in values:
        found["attention"] = portable_attention(values["attention"])
    return found


def portable_attention(name: str) -> str:
    """A variant's name or path, or a pattern's, each as seen from the repository's root, and the pattern once.

    Raises UsageError where it is no pattern."""
    try:
        return ",".join(map(paths.portable, attention.parts(name)))
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_values(values: dict) -> None:
    """Raises UsageError where values make no run: out of range, unknown variant, refused option, context too long."""
    p = SimpleNamespace(**values)
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            raise UsageError(f"{name} must be one of {', '.join(choices)}, not {_shown(values[name])}")
    for name, (least, most) in LIMITS.items():
        if not least <= values[name] <= most:
            bound = f"at least {least}" if values[name] < least else f"at most {most}"
            raise UsageError(f"{name} must be {bound}, not {values[name]}")
    if p.steps_per_epoch * p.epochs > MOST_STEPS:
        raise UsageError(
            f"steps_per_epoch x epochs must be at most {MOST_STEPS:,}, not {p.steps_per_epoch * p.epochs:,}"
        )
    for name in ("dropout", "validation_share"):
        if not 0 <= values[name] < 1:
            raise UsageError(f"{name} must be at least 0 and below 1, not {values[name]}")
    if not p.learning_rate > 0:
        raise UsageError(f"learning_rate must be above 0, not {p.learning_rate}")
    if p.width % p.heads:
        raise UsageError(f"heads must divide width: {p.heads} heads do not divide {p.width}")
    if p.architecture == "llama" and p.position_embedding == "learned" and p.width // p.heads % 2:
        raise UsageError(
            f"rotary positions turn pairs: {p.heads} heads of {p.width // p.heads} numbers must be of even width"
        )
    if p.convolution == 1:
        raise UsageError("convolution must be 0, or at least 2: of 1 token it mixes none; 4 is usual")
    if p.context > p.positions:
        raise UsageError(f"context {p.context} is longer than the model's {p.positions} positions; raise positions too")
    if len(p.inference_contexts) > MOST_CONTEXTS:
        raise UsageError(f"inference_contexts must be at most {MOST_CONTEXTS} lengths, not {len(p.inference_contexts)}")
    for length in p.inference_contexts:
        if type(length) is not int or length < 1 or length + p.new_tokens > p.positions:
            raise UsageError(
                f"inference_contexts: {length!r} tokens and {p.new_tokens} new ones must fit {p.positions} positions"
            )
    check_device(p.device)
    check_options(p.options)
    pin(p.attention)
    named(values, check_attention(p))
    if p.match == "parameters":
        _config(values)
    if p.save_model:
        check_folder(p.save_model, run_name(portable(values)))


def matched(values: dict) -> dict:
    """The values with the options that `match: state` chooses; others are left as they are. Raises UsageError."""
    if values["match"] != "state":
        return values
    check_values(values)
    config = _config(values)
    from lib.model.matching import options_of_state

    try:
        return values | {"options": options_of_state(config, values["context"], values["attention"], values["options"])}
    except ValueError as error:
        raise UsageError(str(error)) from None


def _config(values: dict):
    from lib.model import config_of

    try:
        return config_of(values, 2)
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_device(name: str) -> None:
    """Raises UsageError where there is no such device here."""
    import torch  # here, because notebooks that need no PyTorch check their parameters too

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device is 'cuda', but PyTorch finds no CUDA device here; use device 'auto' or 'cpu'")


SAVED = "attention_study.json"  # in the folder of a saved model: which record it belongs to


def check_folder(name: str, record_name: str) -> None:
    """Raises UsageError where a model saved there would lie among, or replace, what is not this run's."""
    folder = paths.from_root(name)
    there = next(part for part in (folder, *folder.parents) if part.exists())
    if not there.is_dir():  # of a study it is the folder of the runs' own
        raise UsageError(f"save_model: {there.name} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            found = json.loads(paths.read_bounded(folder / SAVED, 1 << 20)).get("record")
        except (OSError, ValueError, AttributeError):
            found = None
        if found != record_name:
            raise UsageError(f"save_model: {name} holds something else already; name an empty folder, or a new one")


def check_options(given: dict, of: str = "") -> None:
    """Raises UsageError for an option that no record could hold."""
    for option, value in given.items():
        if isinstance(value, dict) and not of:  # of one variant of a pattern
            check_options(value, f"{_shown(option)}: ")
        elif not isinstance(option, str) or not all(isinstance(one, PLAIN) for one in _listed(value)):
            raise UsageError(f"options: {of}{_shown(option)} must be a number, text, true, false, or a list of such")


def _listed(value) -> list:
    return value if isinstance(value, list) else [value]


def pin(name: str) -> None:
    """From here on this process knows the variant as its file is now: certified, trained and recorded is one text."""
    try:
        for part in attention.parts(name):
            attention.find(part)  # a misspelt name is told before anything is waited for
        with quick_imports():  # what `sdpa.py` and its likes ask for; not the file itself, which may ask for anything
            importlib.import_module("transformers.models.llama.modeling_llama")
        attention.pin(name)
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_attention(p) -> list:
    """Builds a layer of each variant that `p.attention` names without memory and returns them, so that what is refused
    is said before anything runs."""
    try:
        names = attention.parts(p.attention)
        if len(names) > p.layers:
            raise ValueError(
                f"{p.attention} names {len(names)} layers and the model has {p.layers}; set layers to a multiple of "
                f"{len(names)}, or name fewer"
            )
        own = {part: given for part, (_, given) in attention.by_part(p.attention, p.options).items()}
        made = {part: _checked_layer(part, own[part], p) for part in own}
    except ValueError as error:
        raise UsageError(str(error)) from None
    return [made[part] for part in names]


def _checked_layer(name: str, given: dict, p):
    import torch

    from lib.model import gpt2_config

    attention.check_options(name, given)
    variant = attention.load(name)
    known = attention.defaults(variant)
    for option, value in given.items():
        kind = type(known[option])
        if kind in (bool, int, str) and type(value) is not kind:
            raise UsageError(f"{name}'s option {option} must be {kind.__name__}, not {value!r}")
    if getattr(p, "packing", False) == "documents" and not attention.keeps_documents(variant):
        raise UsageError(
            f"{name} cannot keep the documents of a row apart; use packing true or false, or a forward that "
            "names seq_idx (lib/attention/__init__.py)"
        )
    if getattr(p, "architecture", "gpt2") == "llama" and not attention.knows_order_in_llama(variant):
        raise UsageError(
            f"{name} does not hear where tokens stand in Llama's layers: its forward must name position_embeddings, or "
            "the class say needs_no_positions = True (lib/attention/__init__.py)"
        )
    try:
        with torch.device("meta"):
            config = gpt2_config(
                p.layers, p.width, p.heads, p.positions, 2, architecture=getattr(p, "architecture", "gpt2")
            )
            layer = variant(config, 0, **given)
        build = functools.partial(variant, config, 0, **given)
    except ValueError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, MemoryError):
            raise
        said = error if isinstance(error, TypeError) else f"{type(error).__name__}: {error}"
        raise UsageError(printable(f"{name} cannot be built with the options {given}: {said}", 300)) from None
    check_contract(name, layer, p.width, getattr(p, "context", p.positions), build)
    return layer


MEMBERS = {  # of the contract in lib/attention/__init__.py, and how each is called
    "forward": "forward(hidden_states, past_key_values=None, padding_mask=None, **_)",
    "new_cache": "new_cache()",
    "core_flops": "core_flops(context, dense=False)",
    "cache_bytes": "cache_bytes(context, element_bytes)",
    "reference": "reference(hidden_states)",
}
MOST_BUILT = 10**7  # weights of a layer that is built only to look at what it returns
CONTRACT = "lib/attention/__init__.py lists what a variant has, and sdpa.py shows it"


def check_contract(name: str, layer, width: int, context: int, build) -> None:
    """Raises UsageError where a `layer` of the variant `name`, built without memory, lacks a member of the contract, or
    has one that takes or gives something else. `build` makes it in memory, for what cannot be run without."""
    import torch

    if not isinstance(getattr(layer, "paper", None), str):
        raise UsageError(f"{name} has no text `paper`, which says where its definition stands; {CONTRACT}")
    for member, call in MEMBERS.items():
        if not callable(getattr(layer, member, None)) or getattr(type(layer), member, 0) is torch.nn.Module.forward:
            raise UsageError(f"{name} has no `{call}`; {CONTRACT}")
    hidden = torch.empty(1, min(context, 8), width, device="meta")
    given = {
        "forward": (
            (hidden,),
            {"past_key_values": None, "padding_mask": None, "use_cache": False, "position_ids": None},
        ),
        "new_cache": ((), {}),
        "core_flops": ((context,), {"dense": True}),
        "cache_bytes": ((context, 2), {}),
        "reference": ((hidden,), {}),
    }
    for member, (values, named_values) in given.items():
        try:
            inspect.signature(getattr(layer, member)).bind(*values, **named_values)
        except TypeError as error:
            raise UsageError(f"{name} cannot be called as `{MEMBERS[member]}`: {error}; {CONTRACT}") from None
    for member in ("core_flops", "cache_bytes"):
        _check_number(name, member, layer, *given[member])
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                found = layer(hidden, **given["forward"][1])
            except Exception:  # not every operator runs without memory
                if sum(weight.numel() for weight in layer.parameters()) > MOST_BUILT:
                    return
                found = build()(torch.zeros(hidden.shape), **given["forward"][1])
    except Exception:  # what is wrong with it is said by the run
        return
    is_pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], torch.Tensor)
    if not is_pair or found[0].shape != hidden.shape:
        gave = type(found).__name__
        if isinstance(found, tuple):
            gave = f"a tuple of {len(found)}: {', '.join(type(one).__name__ for one in found[:3])}"
        gave = f"{tuple(found[0].shape)} for {tuple(hidden.shape)}" if is_pair else gave
        raise UsageError(
            f"{name}'s forward must return ((B, T, C), None), not {gave}: `return output, None`; {CONTRACT}"
        )


def _check_number(name: str, member: str, layer, values: tuple, named_values: dict) -> None:
    try:
        found = getattr(layer, member)(*values, **named_values)
    except Exception as error:
        said = printable(f"{type(error).__name__}: {error}", 200)
        raise UsageError(f"{name}'s {member}{values} raises {said}; {CONTRACT}") from None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found) or found < 0:
        raise UsageError(f"{name}'s {member}{values} must give a number, not {_shown(found)}; {CONTRACT}")


class Refused:
    """Stands where checked parameters would: whatever is asked of it says again what is wrong."""

    def __init__(self, error: UsageError):
        object.__setattr__(self, "_error", error)

    def __getattribute__(self, _):
        raise object.__getattribute__(self, "_error")


def resolve(history: list[str], namespace: dict, name: str = "p") -> SimpleNamespace:
    """The parameters of the notebook that is running, checked.

    `history` is IPython's `In`: the cells as they ran, among them the parameters cell and papermill's injected one
    (which papermill itself does not check). `namespace` is the notebook's `globals()`, where the result will be called
    `name`. Raises UsageError with the way out, and then leaves no older result under that name: JupyterLab may run
    the cells below all the same, and they would train what the page no longer says.

    A profile of params/ given whole (`papermill -f`) may have the section `study`, which is no run's: it is said so.
    """
    try:
        values = matched(checked(history, namespace, beside=("study",)))
        check_values(values)
    except UsageError as error:
        namespace[name] = Refused(error)
        raise
    return SimpleNamespace(**portable(values))


def checked(history: list[str], namespace: dict, beside: tuple[str, ...] = ()) -> dict:
    """The parameters of any notebook that is running, names and types checked; see `resolve`. `beside`: sections of a
    profile that are about many runs, and only named."""
    cells = [index for index, source in enumerate(history) if _is_parameters(source)]
    if cells:
        known = declared(history[cells[-1]])
        injected = [source for source in history[cells[-1] + 1 :] if source.startswith("# Parameters\n")]
        for source in (history[cells[-1]], *injected):
            names = _assigned(source)
            for name in set(names) & set(beside):
                print(
                    f"{name}: is for `python -m lib.{name}`, which makes many runs of a profile; this is one of them."
                )
            check_names([name for name in names if name not in beside], known)
    else:  # nbval runs cells without keeping history; nothing is injected there
        known = {name: Declared(kind.__name__, None) for name, kind in namespace.get("__annotations__", {}).items()}
    if not known:
        raise UsageError("run the parameters cell at the top first")
    return check_types({name: namespace[name] for name in known}, known)


KINDS = (ast.AnnAssign, ast.Assign)


def _is_parameters(source: str) -> bool:
    """Whether a cell declares parameters and does nothing else; a line that lost its type is still one of it."""
    try:
        lines = ast.parse(source).body
    except (SyntaxError, ValueError):
        return False
    return bool(lines) and isinstance(lines[0], ast.AnnAssign) and all(isinstance(line, KINDS) for line in lines)


def _assigned(source: str) -> list[str]:
    """Names that a cell assigns at its top level, annotated or not."""
    names = []
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if hasattr(node, "target") else []
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def named(values: dict, layers: list) -> dict[str, str]:
    """Label and title of a variant's runs. Raises UsageError where they cannot be shown, or pass for another's."""
    found = {"label": display_name(values), "title": title(values, layers)}
    try:
        check_label(found["label"], portable_attention(values["attention"]))
        check_name(found["title"], "title")
    except ValueError as error:
        raise UsageError(str(error)) from None
    return found


def title(values: dict, layers) -> str:
    """What figures and tables call a run: its label, or what its attention calls itself, given its `layers`."""
    if values["label"] == attention.CONTROL:
        return f"{attention.title(layers, values['attention'])}, again (A/A)"
    return values["label"] or attention.title(layers, values["attention"])
