"""`python -m lib.certificate WHAT`: is it causal, prefix-equal, the same with a cache, and what its name promises?

WHAT is one of

- a variant of the study, by name or by the path of a .py file that defines `Attention`: every check, in the model that
  the quick profile or --profile builds;
- FILE.py:NAME with --width C: a module (B, T, C) -> (B, T, C), or a function without arguments that builds one;
- FILE.py:NAME: a causal language model, (B, T) token ids -> (B, T, V) logits, or a function without arguments that
  builds one;
- a local folder that transformers' `save_pretrained` wrote: a causal language model.

Prints one table, a row per check. Exit status 0 where all passed, 1 where one failed, 2 where it was asked wrongly.
docs/certificate.md says how to read it. A file that is named is run; a folder's code never is.
"""

import argparse
import importlib.util
import json
import sys
import time
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from lib import attention, parameters
from lib.certificate import others, show
from lib.certificate.setting import Setting
from lib.certificate.variant import certify
from lib.errors import UsageError, is_out_of_memory, one_sentence_when_out_of_memory
from lib.model import GPT2, devices
from lib.record.names import printable
from lib.study import plan

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
WORDS = {  # that are of one kind of WHAT alone, with their defaults
    "options": "{}", "profile": None, "width": None, "length": others.LENGTH, "rows": 3, "dtype": "fp32",
}  # fmt: skip
TAKES = {  # what each kind of WHAT is, and its words
    "variant": ("a variant", ("options", "profile")),
    "file": ("what a file defines", ("width", "length", "rows", "dtype")),
    "folder": ("a folder's language model", ("length", "rows", "dtype")),
}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.certificate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", help="a variant, FILE.py, FILE.py:NAME or a folder")
    parser.add_argument("--options", metavar="YAML", help="of a variant, for example '{window: 64}'")
    parser.add_argument(
        "--profile", metavar="FILE", help="of a variant: the sizes of this YAML file, not the quick ones"
    )
    parser.add_argument("--width", type=int, metavar="C", help="of a module (B, T, C) -> (B, T, C)")
    parser.add_argument("--length", type=int, metavar="T", help=f"tokens in a row, of no variant ({others.LENGTH})")
    parser.add_argument("--rows", type=int, metavar="B", help=f"rows, of no variant ({WORDS['rows']})")
    parser.add_argument("--dtype", choices=DTYPES, help=f"of a module or language model ({WORDS['dtype']})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where it runs (the profile's, or auto)")
    parser.add_argument("--json", action="store_true", help="every measurement, as JSON")
    given = parser.parse_args(words)
    begin = time.perf_counter()
    try:
        said = _examined(given)
    except UsageError as error:
        print(f"python -m lib.certificate: {error}", file=sys.stderr)
        return 2
    except SystemExit as error:  # of the code that is examined
        print(f"python -m lib.certificate: {given.what} ends the program (SystemExit: {error})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; nothing of it is kept", file=sys.stderr)
        return 130
    said |= {"what": given.what, "seconds": round(time.perf_counter() - begin, 1)}
    print(json.dumps(said, indent=1) if given.json else show.page(said))
    return 0 if said["passed"] else 1


@one_sentence_when_out_of_memory()
def _examined(given) -> dict:
    """`passed`, `measures` and `tested` of what is asked for."""
    if not given.what.strip():
        raise UsageError("name a variant, FILE.py, FILE.py:NAME or a folder; --help says more")
    file, _, name = given.what.rpartition(":")
    if file.endswith(".py"):
        _check_words(given, "file")
    elif given.what not in attention.variants() and Path(given.what).is_dir():
        _check_words(given, "folder")
    else:
        _check_words(given, "variant")
        return _variant(given)
    if given.length < 3 or given.rows < 1:
        raise UsageError(f"it takes rows and 3 tokens at the least, not --rows {given.rows} --length {given.length}")
    if given.width is not None and given.width < 1:
        raise UsageError(f"--width is the C of a module (B, T, C) -> (B, T, C), 1 or more, not {given.width}")
    parameters.check_device(given.device or "auto")
    device = devices.choose(given.device or "auto")
    model = _named(Path(file), name) if file.endswith(".py") else _pretrained(Path(given.what))
    sizes = {"length": given.length, "rows": given.rows, "dtype": DTYPES[given.dtype], "device": device}
    if given.width is not None:
        measures = others.examine_module(model, given.width, **sizes)
    else:
        try:
            measures = others.examine_language_model(model, **sizes)
        except others.NoLogits as error:
            raise UsageError(
                f"{given.what} gives no (B, T, V) logits for token ids ({error}); of a module (B, T, C) -> (B, T, C) "
                "say its --width C"
            ) from error
    passed = all(one.passed is not False for one in measures)
    tested = sizes | {"dtype": given.dtype, "device": device.type}
    said = {"passed": passed, "measures": [vars(one) for one in measures], "tested": tested}
    return said | {"scope": list(show.CANNOT)}


def _check_words(given, kind: str) -> None:
    """Fills in the defaults of what was left out. Raises UsageError for a word that would be read by nobody."""
    what, own = TAKES[kind]
    for word, default in WORDS.items():
        if getattr(given, word) is None:
            setattr(given, word, default)
        elif word not in own:
            takes = " and ".join(f"--{one}" for one in own)
            raise UsageError(f"{given.what!r} is {what}, which takes {takes}, not --{word}")


def _variant(given) -> dict:
    try:
        options = plan.plain_yaml(given.options)
    except ValueError as error:
        raise UsageError(f"--options cannot be read: {printable(error)}") from error
    if not isinstance(options, dict):
        raise UsageError("--options holds names and values, for example '{window: 64}'")
    overrides, _ = plan.read_profile(given.profile)
    values = {name: line.default for name, line in plan.known_parameters().items()} | overrides
    values |= {"device": given.device} if given.device else {}
    about = {"attention": given.what, "options": options, "save_model": "", "label": "certificate"}  # is in no table
    values = parameters.matched(values | about)
    parameters.check_values(values)  # refused before anything is examined, as a run would be
    return certify(given.what, values["options"], Setting.of(SimpleNamespace(**values)))


def _named(path: Path, name: str):
    """The module or model that a file calls `name`, built where it is a function or a class."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}, seen from {Path.cwd().name}/")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # what lies beside it can be imported
    try:
        spec.loader.exec_module(found)
        if not hasattr(found, name):
            raise UsageError(f"{path.name} has no name {name!r}; {_names_of(found, name)}")
        thing = getattr(found, name)
        thing = thing if isinstance(thing, nn.Module) else thing()
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        _raise_memory(error)
        raise UsageError(f"{path.name}:{name} cannot be built without arguments: {_brief(error)}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    if not callable(thing):
        raise UsageError(
            f"{path.name}:{name} is a {type(thing).__name__}; it takes a module, or a function without arguments that "
            "builds one"
        )
    return thing.eval() if isinstance(thing, nn.Module) else thing


def _names_of(module, name: str) -> str:
    """The name of a file that is nearest to `name`, or all that could be meant."""
    known = [one for one, what in vars(module).items() if callable(what) and not one.startswith("_")]
    guess = get_close_matches(name, known, n=1)
    return f"did you mean {guess[0]!r}?" if guess else f"it has: {', '.join(known) or 'none that can be called'}"


def _pretrained(folder: Path):
    """The causal language model of a folder, without running any code that lies in it."""
    from transformers import AutoModelForCausalLM

    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise ValueError("its config.json is no mapping of names to values")
        kind = GPT2 if "attention" in said else AutoModelForCausalLM  # ours would load as a plain GPT-2
        return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    except Exception as error:  # whatever lies there: sizes that are texts, weights of other shapes
        _raise_memory(error)
        raise UsageError(f"{folder} holds no model that can be loaded: {_brief(error)}") from error


def _raise_memory(error: BaseException) -> None:
    """Memory that runs out is told in a sentence of its own."""
    if isinstance(error, MemoryError) or is_out_of_memory(str(error)):
        raise error


def _brief(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}", 300)


if __name__ == "__main__":
    sys.exit(main())
