"""The parameters of a run, whose only definition is the parameters cell of train.ipynb.

This module reads that cell, checks what a person gave against it, and says in one sentence what is wrong.
"""

import ast
import hashlib
import inspect
import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from types import SimpleNamespace

from lib import attention, paths
from lib.errors import UsageError
from lib.record.schema import DEVICES, PRECISIONS

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
CHOICES = {
    "device": DEVICES,
    "precision": PRECISIONS,
    "schedule": ("cosine", "constant"),
    "turns": ("roles", "joined"),
    "packing": (False, True, "documents"),
}
AT_LEAST = {
    "seed": 0, "layers": 1, "width": 1, "heads": 1, "positions": 1, "context": 2, "batch_size": 1, "accumulation": 1,
    "steps_per_epoch": 1, "epochs": 1, "warmup_steps": 1, "lr_warmup_steps": 0, "weight_decay": 0, "clip_norm": 0,
    "validation_sequences": 1, "new_tokens": 1, "inference_repeats": 1, "inference_window_s": 0,
    "phase_steps": 0, "idle_s": 0,
}  # fmt: skip
WHO = ("attention", "options", "label", "seed")  # what differs within a study; all else is its setting


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
            guess = get_close_matches(name, known, n=1)
            hint = f"did you mean {guess[0]!r}?" if guess else f"known: {', '.join(known)}."
            raise UsageError(f"there is no parameter {name!r}; {hint}")


def check_types(values: dict, known: dict[str, Declared]) -> dict:
    """The values with whole numbers made floats where a float is declared. Raises UsageError for a wrong type."""
    checked = {}
    for name, value in values.items():
        wanted = TYPES[known[name].type]
        if wanted is float and type(value) is int:
            value = float(value)
        others = [choice for choice in CHOICES.get(name, ()) if type(choice) is not wanted]
        if type(value) is not wanted and not (isinstance(value, str) and value in others):
            kinds = " or ".join([known[name].type, *map(repr, others)])
            raise UsageError(f"{name} must be {kinds}, not {value!r}{_way_out(wanted, value)}")
        checked[name] = value
    return checked


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
    for name in ("attention", "dataset", "tokenizer"):
        found[name] = paths.portable(values[name])
    return found


def check_values(values: dict) -> None:
    """Raises UsageError where values make no run: out of range, unknown variant, refused option, context too long."""
    p = SimpleNamespace(**values)
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            raise UsageError(f"{name} must be one of {', '.join(choices)}, not {values[name]!r}")
    for name, least in AT_LEAST.items():
        if values[name] < least:
            raise UsageError(f"{name} must be at least {least}, not {values[name]}")
    for name in ("dropout", "validation_share"):
        if not 0 <= values[name] < 1:
            raise UsageError(f"{name} must be at least 0 and below 1, not {values[name]}")
    if not p.learning_rate > 0:
        raise UsageError(f"learning_rate must be above 0, not {p.learning_rate}")
    if p.width % p.heads:
        raise UsageError(f"heads must divide width: {p.heads} heads do not divide {p.width}")
    if p.context > p.positions:
        raise UsageError(f"context {p.context} is longer than the model's {p.positions} positions; raise positions too")
    for length in p.inference_contexts:
        if type(length) is not int or length < 1 or length + p.new_tokens > p.positions:
            raise UsageError(
                f"inference_contexts: {length!r} tokens and {p.new_tokens} new ones must fit {p.positions} positions"
            )
    import torch  # here, because notebooks that need no PyTorch check their parameters too

    if p.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device is 'cuda', but PyTorch finds no CUDA device here; use device 'auto' or 'cpu'")
    check_attention(p)


def check_attention(p):
    """Builds one layer without memory and returns it, so that what is refused is said before anything runs."""
    import torch

    from lib.model import gpt2_config

    try:
        variant = attention.load(p.attention)
        known = options(variant)
        for option, value in p.options.items():
            if option not in known:
                guess = get_close_matches(option, known, n=1)
                hint = f"did you mean {guess[0]!r}?" if guess else f"it has: {', '.join(known) or 'none'}."
                raise UsageError(f"{p.attention} has no option {option!r}; {hint}")
            kind = type(known[option])
            if kind in (bool, int, str) and type(value) is not kind:
                raise UsageError(f"{p.attention}'s option {option} must be {kind.__name__}, not {value!r}")
        if getattr(p, "packing", False) == "documents" and not attention.keeps_documents(variant):
            raise UsageError(
                f"{p.attention} cannot keep the documents of a row apart; use packing true or false, or a forward that "
                "names seq_idx (lib/attention/__init__.py)"
            )
        with torch.device("meta"):
            return variant(gpt2_config(p.layers, p.width, p.heads, p.positions, 2), 0, **p.options)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except TypeError as error:
        raise UsageError(f"{p.attention} cannot be built with the options {p.options}: {error}") from None


def options(variant: type) -> dict[str, object]:
    """A variant's own options and their defaults, from its constructor's signature."""
    return {name: option.default for name, option in list(inspect.signature(variant).parameters.items())[2:]}


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
    """
    try:
        values = checked(history, namespace)
        check_values(values)
    except UsageError as error:
        namespace[name] = Refused(error)
        raise
    return SimpleNamespace(**portable(values))


def checked(history: list[str], namespace: dict) -> dict:
    """The parameters of any notebook that is running, names and types checked; see `resolve`."""
    cells = [index for index, source in enumerate(history) if _is_parameters(source)]
    if cells:
        known = declared(history[cells[-1]])
        injected = [source for source in history[cells[-1] + 1 :] if source.startswith("# Parameters\n")]
        for source in (history[cells[-1]], *injected):
            check_names(_assigned(source), known)
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


def setting(values: dict) -> str:
    """Eight hex digits of everything but the variant and the seed: runs are compared only where these agree."""
    return digest({name: value for name, value in values.items() if name not in WHO})


def run_name(values: dict) -> str:
    """The name of a run's record and notebook: variant, seed and a hash of all parameters."""
    return f"{file_name(display_name(values))}-seed{values['seed']}-{digest(values)}"


def display_name(values: dict) -> str:
    """What tells a run apart from others: its label, or its variant's name."""
    return values["label"] or attention.stem(values["attention"])


def title(values: dict, layer) -> str:
    """What figures and tables call a run: its label, or what its attention `layer` calls itself."""
    if values["label"] == attention.CONTROL:
        return f"{attention.title(layer, values['attention'])}, again (A/A)"
    return values["label"] or attention.title(layer, values["attention"])


def file_name(label: str) -> str:
    """A label as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", label)


def digest(values: dict) -> str:
    """Eight hex digits of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
