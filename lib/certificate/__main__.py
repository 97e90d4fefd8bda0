"""`python -m lib.certificate WHAT`: is it causal, prefix-equal, the same with a cache, and what its name promises?

WHAT is one of

- a variant of the study, by name or by the path of a .py file that defines `Attention`: every check, in the model that
  the quick profile or --profile builds;
- FILE.py:NAME with --width C: a module (B, T, C) -> (B, T, C), or a function without arguments that builds one;
- FILE.py:NAME: a causal language model, (B, T) token ids -> (B, T, V) logits, or a function that builds one;
- a local folder that transformers' `save_pretrained` wrote: a causal language model.

Prints one table, a row per check. Exit status 0 where all passed, 1 where one failed, 2 where it was asked wrongly.
docs/certificate.md says how to read it. A file that is named is run; a folder's code never is.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from torch import nn

from lib import attention
from lib.certificate import others, show
from lib.certificate.setting import QUICK, Setting
from lib.certificate.variant import certify
from lib.errors import UsageError, one_sentence_when_out_of_memory
from lib.model import GPT2, devices

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.certificate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", help="a variant, FILE.py, FILE.py:NAME or a folder")
    parser.add_argument("--options", default="{}", metavar="YAML", help="of a variant, for example '{window: 64}'")
    parser.add_argument(
        "--profile", metavar="FILE", help="of a variant: the sizes of this YAML file, not the quick ones"
    )
    parser.add_argument("--width", type=int, metavar="C", help="of a module (B, T, C) -> (B, T, C)")
    parser.add_argument("--length", type=int, default=others.LENGTH, metavar="T", help="tokens in a row (%(default)s)")
    parser.add_argument("--rows", type=int, default=3, metavar="B", help="rows (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of a module or language model (%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs (%(default)s)")
    parser.add_argument("--json", action="store_true", help="every measurement, as JSON")
    given = parser.parse_args(words)
    begin = time.perf_counter()
    try:
        said = _examined(given)
    except UsageError as error:
        print(f"python -m lib.certificate: {error}", file=sys.stderr)
        return 2
    said |= {"what": given.what, "seconds": round(time.perf_counter() - begin, 1)}
    print(json.dumps(said, indent=1) if given.json else show.page(said))
    return 0 if said["passed"] else 1


@one_sentence_when_out_of_memory()
def _examined(given) -> dict:
    """`passed`, `measures` and `tested` of what is asked for."""
    if given.length < 3 or given.rows < 1:
        raise UsageError(f"it takes rows and 3 tokens at the least, not --rows {given.rows} --length {given.length}")
    file, _, name = given.what.rpartition(":")
    if file.endswith(".py"):
        model, device = _named(Path(file), name), devices.choose(given.device)
    elif Path(given.what).is_dir():
        model, device = _pretrained(Path(given.what)), devices.choose(given.device)
    else:
        return _variant(given)
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


def _variant(given) -> dict:
    try:
        options = yaml.safe_load(given.options)
        values = QUICK.values() | (yaml.safe_load(Path(given.profile).read_text()) or {} if given.profile else {})
    except (yaml.YAMLError, OSError) as error:
        raise UsageError(f"{given.profile or '--options'} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(options, dict) or not isinstance(values, dict):
        raise UsageError("--options and --profile hold names and values, for example '{window: 64}'")
    try:
        setting = Setting.of(SimpleNamespace(**{"precision": "auto"} | values | {"device": given.device}))
        attention.load(given.what)(setting.config(2), 0, **options)  # refused before anything is examined
    except (ValueError, TypeError) as error:
        raise UsageError(f"{given.what} with {options} cannot be built: {error}") from error
    return certify(given.what, options, setting)


def _named(path: Path, name: str):
    """The module or model that a file calls `name`, built where it is a function or a class."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}, seen from {Path.cwd().name}/")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # what lies beside it can be imported
    try:
        spec.loader.exec_module(found)
        thing = getattr(found, name)
        thing = thing if isinstance(thing, nn.Module) else thing()
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"{path.name}:{name} cannot be built without arguments: {type(error).__name__}: {said}"
        ) from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    if not callable(thing):
        raise UsageError(
            f"{path.name}:{name} is a {type(thing).__name__}; it takes a module, or a function that builds one"
        )
    return thing.eval() if isinstance(thing, nn.Module) else thing


def _pretrained(folder: Path):
    """The causal language model of a folder, without running any code that lies in it."""
    from transformers import AutoModelForCausalLM

    try:
        said = json.loads((folder / "config.json").read_text())
        kind = GPT2 if "attention" in said else AutoModelForCausalLM  # ours would load as a plain GPT-2
        return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} holds no model that can be loaded: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    sys.exit(main())
