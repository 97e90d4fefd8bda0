"""The certificate of a variant: every examination of the model that a run builds, kept by content."""

import ctypes
import gc
import hashlib
import inspect
import json
import math
import sys
from importlib import metadata
from pathlib import Path

import torch

from lib import attention, paths
from lib.certificate import examinations, show, uses
from lib.certificate.measures import CLAIMS, Measure, collected
from lib.certificate.setting import Setting
from lib.certificate.twins import Twins, attentions
from lib.data import cache
from lib.errors import is_out_of_memory, one_sentence_when_out_of_memory
from lib.model import meta_model

EXAMINATIONS = {  # and the checks that each has a say in
    examinations.by_gradient: ("causal", "rows_independent"),
    examinations.by_value: (
        "causal", "prefix_equal", "rows_independent", "mixes", "repeatable", "training_equal",
    ),
    examinations.by_layer: (
        "precision", "causal", "prefix_equal", "training_equal", "cached_equal", "prefill_equal",
    ),
    examinations.with_cache: ("cached_equal", "prefill_equal"),
    uses.cache_handled: ("cached_equal",),
    uses.with_padding: ("padding_equal",),
    uses.with_documents: ("documents_equal",),
    uses.with_dropout: ("training_equal", "gradients"),
    uses.of_state: ("repeatable",),
    uses.of_positions: ("reference",),
    examinations.against_reference: ("reference",),
    examinations.of_the_reference: ("reach", "reference_causal", "gpt2_equal"),
    examinations.of_gradients: ("gradients",),
    examinations.of_weights: ("weights_trained",),
    examinations.of_gpt2: ("gpt2_projection", "gpt2_initialisation"),
    examinations.of_cache_bytes: ("cache_bytes",),
    examinations.of_core_flops: ("core_flops",),
}  # fmt: skip


@one_sentence_when_out_of_memory()
def examined(name: str, options: dict, setting: Setting, checks=tuple(CLAIMS), seed: int = 0) -> list[Measure]:
    """The measurements of a variant's model that have a say in `checks`, all by default.

    What fails by a number that has a tolerance is drawn a second time, with other weights and tokens, and fails where
    it fails again: rounding may break a tie of a hash one way in one form and another way in the other.
    """
    twins, again, found = Twins(name, options, setting, seed), None, []
    for examination, about in EXAMINATIONS.items():
        if not set(about) & set(checks):
            continue
        measures = measured(examination, about, twins)
        if any(one.is_close_call for one in measures) and not any(_fails(one) for one in found + measures):
            again = again or Twins(name, options, setting, seed + 1)
            measures = measured(examination, about, again)
        found += measures
    return found


def _fails(measure: Measure) -> bool:
    """Beyond any tie: without a tolerance, or without a number."""
    return measure.passed is False and not measure.is_close_call


def measured(examination, about, twins: Twins) -> list[Measure]:
    """What one examination says, on random numbers of its own: the caller's are left alone."""
    with torch.random.fork_rng(devices=[twins.device] if twins.device.type == "cuda" else []):
        torch.manual_seed(twins.seed)
        return collected(about, lambda: examination(twins))


SMALL = Setting()


def certify(name: str, options: dict, setting: Setting | None = None) -> dict:
    """The certificate of a variant, by name or path, in the model that `setting` builds; without one, in a small model.

    A bool per check of `CLAIMS` that was there from the first, with `passed` for all of them, numbers, and

    - `measures`: what each check rests on (`measures.Measure`), with the largest difference found and allowed
    - `tested`: the sizes, lengths, precision and devices that it was examined at
    - `scope`: the same and what a certificate cannot say, as sentences
    - `receptive_field`: how many tokens the last of `tested["context"]` depends on in one layer, itself included
    - `parameters_vs_baseline`: weights of the attention over those of GPT-2's own
    - `memory_growth`, `flops_growth`: exponents of T, of what is kept for the backward pass and of the analytic count

    That of a run is made once and then kept, by content: the variant's file, those it imports and inherits from,
    options, setting, versions and this code. Raises OutOfMemory where there is too little, UsageError where the cache
    folder cannot be written.
    """
    if setting is None:
        return _certificate(name, options, SMALL)
    what = {
        "certificate": _digest([*_files_beside(__file__), *_files_beside(inspect.getfile(meta_model))]),
        "variant": attention.source_sha256(name),
        "inherited": [_digest(_inherited_files(variant)) for variant, _ in attention.by_part(name, options).values()],
        "options": options,
        "setting": setting.values(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "fla-core", "triton")},
        "machine": _machine(setting),
    }

    def build(folder: Path):
        paths.write_whole(folder / KEPT_AS, json.dumps(_certificate(name, options, setting)))

    folder = cache.made_once(what, build)
    try:
        return json.loads((folder / KEPT_AS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # damaged: made anew
        cache.forget(folder)
        return json.loads((cache.made_once(what, build) / KEPT_AS).read_text(encoding="utf-8"))


KEPT_AS = "certificate.json"


def _files_beside(file: str) -> list[Path]:
    return sorted(Path(file).parent.glob("*.py"))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _digest(files: list[Path]) -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def _inherited_files(variant: type) -> list[Path]:
    """Files of the classes that a variant inherits from, those of installed packages left out: versions name them."""
    found = {Path(inspect.getfile(kind)).resolve() for kind in variant.__mro__[1:] if kind is not object}
    return sorted(path for path in found if "site-packages" not in path.parts)


def _machine(setting: Setting) -> str:
    if setting.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.backends.cpu.get_cpu_capability()}"


@one_sentence_when_out_of_memory()
def _certificate(name: str, options: dict, setting: Setting) -> dict:
    measures = examined(name, options, setting)
    twins = Twins(name, options, setting, 0)
    said = summary(measures) | _numbers(twins) | {"tested": setting.values() | twins.where()}
    del twins
    _give_back_memory()
    return said | {"scope": show.scope(said)}


def _give_back_memory() -> None:
    """What the examination had is not to be seen in the peaks of a run that goes on in this process.

    Else a run that found its certificate ready would seem to need less than one that made it.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)


def summary(measures: list[Measure]) -> dict:
    """Measurements as a certificate shows them: the first checks by name, two differences, and whether all passed."""
    said = {check: verdict(measures, check) for check in CLAIMS}
    return {
        **{check: said[check] is True for check in NAMED},
        "reference_difference": _largest(measures, "output"),
        "reference_gradient_difference": _largest(measures, "gradients"),
        "passed": all(one is not False for one in said.values()) and all(said[check] for check in NAMED),
        "measures": [vars(one) for one in measures],
    }


NAMED = ("causal", "prefix_equal", "mixes", "cached_equal", "gpt2_projection", "gpt2_initialisation")


def verdict(measures, check: str) -> bool | None:
    """Whether a check passed: every one of its measurements; None where none could be had."""
    passed = [one.passed for one in measures if one.check == check and one.passed is not None]
    return all(passed) if passed else None


def _largest(measures: list[Measure], what: str) -> float | None:
    found = [one.largest for one in measures if one.check == "reference" and one.what.startswith(what)]
    return None if not found or None in found else max(found)


def _numbers(twins: Twins) -> dict:
    """Numbers that a reader compares variants by. None where the variant dies of being asked."""
    s = twins.setting
    mine, gpt2 = (
        sum(weight.numel() for layer in attentions(model) for weight in layer.parameters())
        for model in (meta_model(twins.name, twins.config(), **twins.options), meta_model("baseline", twins.config()))
    )
    found = {"parameters_vs_baseline": mine / gpt2}
    for number, ask in (
        ("receptive_field", examinations.receptive_field),
        ("memory_growth", examinations.memory_growth),
        ("flops_growth", examinations.flops_growth),
    ):
        with torch.random.fork_rng(devices=[twins.device] if twins.device.type == "cuda" else []):
            torch.manual_seed(s.positions)
            try:
                value = ask(twins)
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
                if is_out_of_memory(str(error)):
                    raise
                value = None
        found[number] = value if value is None or math.isfinite(value) else None
    return found
