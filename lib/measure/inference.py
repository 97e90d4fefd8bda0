"""Inference on one sequence: latency and joules of prefill and decoding, and what the cache holds."""

import copy
import statistics
import time

import torch

from lib.errors import one_sentence_when_out_of_memory
from lib.measure.meter import energy_of
from lib.model import devices


@one_sentence_when_out_of_memory()
@torch.no_grad()
def measured(
    model, contexts: list[int], new_tokens: int, repeats: int, autocast, energy_window_s: float = 0.0
) -> list[dict]:
    """Latency and joules of one sequence by context length: prefill, then greedy decoding with the cache.

    Latencies are medians of `repeats`, after a warm-up at the same length. Cache bytes are counted from the cache
    itself and, beside them, from the variant's formula. Joules are those of `joules`.
    """
    model.eval()
    rows = []
    for context in contexts:
        runs = generations(model, context, new_tokens, repeats, autocast)
        cache = runs[-1]["cache"]
        element_bytes = max(tensor.element_size() for tensor in _tensors(cache))
        rows.append(
            {
                "context": context,
                "prefill_latency_s": statistics.median(run["prefill_s"] for run in runs),
                "decode_latency_s_per_token": statistics.median(run["decode_s"] / new_tokens for run in runs),
                "cache_bytes": cache_bytes(cache),
                "cache_bytes_analytic": sum(
                    block.attn.cache_bytes(context + new_tokens, element_bytes) for block in model.transformer.h
                ),
            }
        )
    energies = joules(model, contexts, new_tokens, energy_window_s, autocast)
    return [row | found for row, found in zip(rows, energies, strict=True)]


@torch.no_grad()
def generations(model, context: int, new_tokens: int, repeats: int, autocast) -> list[dict]:
    """`repeats` times, after a warm-up: `prefill_s` for one sequence of `context` tokens, `decode_s` for `new_tokens`
    greedy steps after it, and the `cache` as they leave it."""
    model.eval()
    ids = torch.arange(context, device=model.device)[None] % model.config.vocab_size
    with autocast():
        _generate(model, ids, 1)
        return [_generate(model, ids, new_tokens) for _ in range(repeats)]


def cache_bytes(cache) -> int:
    """Bytes of all tensors that a cache holds."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(cache))


def _generate(model, ids, new_tokens) -> dict:
    """Prefill, then `new_tokens` greedy steps, each timed from an idle device to an idle device."""
    devices.synchronize(model.device)
    begin = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    devices.synchronize(model.device)
    prefilled = time.perf_counter()
    out = _decode(model, out, new_tokens)
    devices.synchronize(model.device)
    end = time.perf_counter()
    return {"prefill_s": prefilled - begin, "decode_s": end - prefilled, "cache": out.past_key_values}


def _decode(model, out, new_tokens):
    for _ in range(new_tokens):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    return out


@torch.no_grad()
def joules(model, contexts: list[int], new_tokens: int, window_s: float, autocast) -> list[dict]:
    """Joules of what `measured` times, a row per context: one prefill, and one decoded token.

    Each is repeated for `window_s` seconds or more inside one window of the GPU's counter, so 10 s are the least that
    give a number; None has its `null_reason`. Every repetition of decoding starts from a copy of the prompt's cache,
    and the copying counts with it: once per `new_tokens` tokens.
    """
    model.eval()
    rows = []
    for context in contexts:
        ids = torch.arange(context, device=model.device)[None] % model.config.vocab_size
        with autocast():
            prefilled = model(ids, use_cache=True, logits_to_keep=1)

            def prefill(ids=ids):
                model(ids, use_cache=True, logits_to_keep=1)

            def decode(prefilled=prefilled):
                _decode(model, copy.deepcopy(prefilled), new_tokens)

            per_prefill, per_decoding = (energy_of(work, model.device, window_s) for work in (prefill, decode))
        per_token = None if per_decoding.joules is None else per_decoding.joules / new_tokens
        reason = per_prefill.reason or per_decoding.reason
        rows.append({"context": context, "prefill_energy_j": per_prefill.joules})
        rows[-1] |= {"decode_energy_j_per_token": per_token, "energy_null_reason": reason}
    return rows


def _tensors(cache):
    return [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
