"""Other people's models: any module (B, T, C) -> (B, T, C), and any causal language model, token ids -> logits."""

import inspect
import math

import torch
from torch import nn
from transformers.utils import ModelOutput

from lib.certificate.measures import TOLERANCE, Measure, collected, fact, largest, relative, within
from lib.certificate.probes import (
    Floats,
    NoSlope,
    Tokens,
    changed_tails,
    gradient_leaks,
    logits_of,
    moved_later,
    pieces_of,
    prefix_difference,
    row_difference,
)
from lib.errors import UsageError, is_out_of_memory

TOLERANCES = {torch.float64: TOLERANCE, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
LENGTH = 2111  # tokens, unless told otherwise: two chunks of a thousand and more, and prime: a multiple of no chunk
BORDERS = (64, 128, 256, 512, 1000, 1024, 2000, 2048)  # lengths that are multiples of usual chunks
ODD = (1, 2, 3, 63, 65, 100, 257, 999, 1025)
TRAINED = 640  # tokens in training, where some models take whole chunks only
ALL_PREFIXES = 200  # tokens up to which every prefix is tried
WITH_MORE = (tuple, ModelOutput)  # what a module may return that begins with (B, T, C)
CACHES = ("past_key_values", "cache_params")  # what transformers' models call what they decode with


def examine(module, x: torch.Tensor) -> dict:
    """What can be said of any `module`: (B, T, C) -> (B, T, C), or a tuple that begins so, at the input `x`, T >= 3.

    - `causal`: no later token changes an output, or has any gradient on it, however small
    - `prefix_equal`: f(x[:t]) = f(x)[:t], for every t up to 200 tokens, else for many
    - `mixes`: changing a token changes an output after it
    - `receptive_field`: how many tokens the last output depends on, itself included
    - `rows_independent`, where x has several rows: no row has a gradient on another, and each is alone what it is there
    """
    subject, length, allowed = Floats(module, x.shape[-1], x), x.shape[1], _tolerance(x.dtype)
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        with torch.no_grad():
            out = subject(x)
            moved = max(changed_tails(subject, x, out, shift) for shift in range(8))
            cut = prefix_difference(subject, x, out, _prefixes(length))
            later = moved_later(subject, x, out)
            alone = row_difference(subject, x, out) if len(x) > 1 else None
        leak, other = gradient_leaks(subject, x, rounds=3)
        traced, (leaf,) = subject.traced(x)
        weight = torch.randn(out.shape[0], out.shape[-1]).to(out)  # a plain sum may cancel
        (gradient,) = torch.autograd.grad((traced[:, -1] * weight).sum(), leaf)
    found = {
        "causal": leak == 0 and moved <= allowed,
        "prefix_equal": cut <= allowed,
        "mixes": later > TOLERANCE and math.isfinite(later),  # at the same shape: no rounding between them
        "receptive_field": int((gradient.abs().amax(dim=(0, 2)) > 0).sum()),
    }
    return found if alone is None else found | {"rows_independent": other == 0 and alone <= allowed}


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCES.get(dtype, TOLERANCES[torch.float32])


def _prefixes(length: int) -> list[int]:
    """All, or of a long row those at which usual chunks end, and odd ones."""
    if length <= ALL_PREFIXES:
        return list(range(1, length))
    spread = [length * i // 16 for i in range(1, 16)]
    return sorted({n for n in (*BORDERS, *ODD, *spread, length - 1) if 0 < n < length})


def examine_module(module, width: int, length: int, rows: int, dtype, device) -> list[Measure]:
    """The measurements of a module (B, T, C) -> (B, T, C), for the command: of `length` tokens at the most."""
    module = module.to(device, dtype) if isinstance(module, nn.Module) else module
    subject = Floats(module, width, torch.empty(0, dtype=dtype, device=device))
    _check_module(subject, length, rows)
    return _confirmed(lambda: _asked(module, subject, length, rows, _tolerance(dtype)))


@torch.no_grad()
def _check_module(subject: Floats, length: int, rows: int) -> None:
    """Raises UsageError where a module takes no (B, T, C), or gives no (B, T, *) for it: then it was asked wrongly."""
    width, refused = subject.width, None
    for tokens in dict.fromkeys((min(length, TRAINED), length, min(length, BORDERS[0]), 1)):
        x = subject.draw(rows, tokens)
        try:
            given = subject.module(x)
        except Exception as error:
            if isinstance(error, MemoryError) or is_out_of_memory(str(error)):
                raise
            refused = refused or f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]
            continue
        out = given if isinstance(given, torch.Tensor) else given[0] if given and isinstance(given, WITH_MORE) else None
        if not isinstance(out, torch.Tensor) or out.dim() != 3 or out.shape[:2] != x.shape[:2]:
            gave = f"a {type(given).__name__}" if out is None else f"{tuple(getattr(out, 'shape', ()))}"
            raise UsageError(
                f"the module gives {gave} for {tuple(x.shape)}; it takes one that returns (B, T, C), or a tuple that "
                "begins with it"
            )
        return
    raise UsageError(f"the module takes no (B, T, {width}), {refused}; say the C of its (B, T, C) as --width")


def examine_language_model(model: nn.Module, length: int, rows: int, dtype, device) -> list[Measure]:
    """The measurements of a causal language model, (B, T) token ids -> (B, T, V) logits, for the command.

    Of `length` tokens at the most, or as many as its configuration has positions for.
    """
    if not isinstance(model, nn.Module):
        raise NoLogits("it is no nn.Module")
    model = model.to(device, dtype)
    config = getattr(model, "config", None)
    names = ("max_position_embeddings", "n_positions")
    length = min([length, *(getattr(config, name) for name in names if getattr(config, name, None))])
    if length < 3:
        raise UsageError(f"the model has {length} positions; nothing can be said of fewer than 3")
    options = {"use_cache": False} if hasattr(config, "use_cache") and accepts(model, "use_cache") else {}
    vocabulary = _vocabulary(model, options, length, device)
    subject = Tokens(model, min(vocabulary, getattr(config, "vocab_size", vocabulary)), device, **options)

    def ask():
        decoding = collected(("cached_equal", "prefill_equal"), lambda: _decoded(subject, min(length, 400), dtype))
        return _asked(model, subject, length, rows, _tolerance(dtype)) + decoding

    return _confirmed(ask)


class NoLogits(Exception):
    """What is no causal language model."""


@torch.no_grad()
def _vocabulary(model, options: dict, length: int, device) -> int:
    """How many logits there are for a token. Raises NoLogits where there are none at any of several lengths."""
    refused = None
    for tokens in dict.fromkeys((2, min(length, TRAINED), length, min(length, BORDERS[0]))):
        try:
            logits = logits_of(model(torch.zeros(1, tokens, dtype=torch.long, device=device), **options))
        except Exception as error:
            if isinstance(error, MemoryError) or is_out_of_memory(str(error)):
                raise
            refused = refused or error
            continue
        if not isinstance(logits, torch.Tensor) or logits.shape[:2] != (1, tokens) or logits.dim() != 3:
            raise NoLogits(f"it gives {getattr(logits, 'shape', type(logits).__name__)} for (1, {tokens}) ids")
        if logits.shape[-1] < 2:
            raise NoLogits("it gives one logit for a token, so no token can be changed")
        return logits.shape[-1]
    raise NoLogits(f"{type(refused).__name__}: {(str(refused).splitlines() or [''])[0]}") from refused


def _confirmed(ask) -> list[Measure]:
    """What `ask` measures; again, with other tokens, where all that fails could be a tie that rounding broke."""
    found = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = ask()
        failed = [one for one in found if one.passed is False]
        if not failed or not all(one.is_close_call for one in failed):
            break
    return found


def _asked(model, subject, length: int, rows: int, allowed: float) -> list[Measure]:
    """What is asked of modules and language models alike."""
    found = collected(("causal", "rows_independent"), lambda: _slopes(model, subject, length, rows))
    checks = ("prefix_equal", "causal", "rows_independent", "mixes", "repeatable")
    return found + collected(checks, lambda: _values(subject, length, rows, allowed))


def _slopes(model, subject, length, rows):
    """`causal`, `rows_independent`, by gradient; in training too, where the model is a module that can be trained."""
    modes = [("evaluation", length)] + [("training", min(length, TRAINED))] * isinstance(model, nn.Module)
    for mode, tokens in modes:
        if isinstance(model, nn.Module):
            model.train(mode == "training")
        x, where = subject.draw(rows, tokens), f"{mode}, {rows} x {tokens:,} tokens"
        try:
            later, other = gradient_leaks(subject, x, rounds=3)
        except NoSlope as error:
            yield fact("causal", f"gradient by a later token, {where}", None, str(error))
            continue
        except (ValueError, AssertionError, NotImplementedError) as error:  # a length or a mode that it does not take
            yield fact("causal", f"gradient by a later token, {where}", None, f"it refuses: {error}"[:200])
            continue
        finally:
            if isinstance(model, nn.Module):
                model.eval()
        yield within("causal", f"gradient by a later token, {where}", later, 0.0)
        if other is not None:
            yield within("rows_independent", f"gradient by another row, {where}", other, 0.0)


@torch.no_grad()
def _values(subject, length, rows, allowed):
    """The other checks, by what outputs are; at lengths that are multiples of usual chunks, and at odd ones."""
    x = subject.draw(rows, length)
    out = subject(x)
    lengths = _prefixes(length)
    cut = prefix_difference(subject, x, out, lengths)
    yield within("prefix_equal", f"{len(lengths)} prefixes of {length:,} tokens", cut, allowed)
    moved = max(changed_tails(subject, x, out, shift) for shift in range(0, 8, 2))
    yield within("causal", f"all later tokens drawn anew, {length:,} tokens", moved, allowed)
    for n in [n for n in (64, 256, 1000, 1024, 2000) if n < length]:
        part = subject(x[:, :n])
        moved = max(changed_tails(subject, x[:, :n], part, shift) for shift in (1, 3))
        yield within("causal", f"all later tokens drawn anew, {n:,} tokens", moved, allowed)
    if rows > 1:
        alone = row_difference(subject, x, out)
        yield within("rows_independent", "a row alone, and beside others", alone, allowed)
    moved, again = (
        moved_later(subject, x, out),
        relative(subject(x), out),
    )  # at the same shape: no rounding between them
    mixes = moved > max(TOLERANCE, again) and math.isfinite(moved)
    yield fact("mixes", "a changed token moves a later output", mixes)
    yield within("repeatable", "the same input again, after others", again, allowed)


@torch.no_grad()
def _decoded(subject: Tokens, length: int, dtype):
    """`cached_equal`, `prefill_equal`: with whatever the model returns to decode with."""
    model, ids, allowed = subject.model, subject.draw(2, length), _tolerance(dtype)
    out = subject(ids)
    scale = largest(out)

    def feed(pieces):
        kept, parts = {}, []
        for piece in ids[:, : sum(pieces)].split(pieces, dim=1):
            given = model(piece, **kept, use_cache=True)
            name = next((name for name in CACHES if getattr(given, name, None) is not None), None)
            if name is None:
                return None
            kept = {name: getattr(given, name)}
            parts.append(logits_of(given))
        return torch.cat(parts, dim=1)

    if not accepts(model, "use_cache") or feed([min(4, length)]) is None:
        yield fact("cached_equal", "token by token", None, f"it returns none of {', '.join(CACHES)}")
        return
    first, half = min(length, 80), length // 2
    one_by_one = feed([1] * first)
    yield within("cached_equal", f"{first} tokens, one by one", relative(one_by_one, out[:, :first], scale), allowed)
    tail = min(20, length - half)
    after = feed([half, *[1] * tail])
    yield within(
        "cached_equal",
        f"a prefill of {half:,} and {tail} tokens",
        relative(after, out[:, : half + tail], scale),
        allowed,
    )
    in_pieces = feed(pieces_of(length))
    yield within(
        "prefill_equal",
        f"{length:,} tokens in {len(pieces_of(length))} pieces",
        relative(in_pieces, out, scale),
        allowed,
    )


def accepts(model, argument: str) -> bool:
    """Whether a model's forward takes an argument by this name."""
    known = inspect.signature(model.forward).parameters
    return argument in known or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
