"""Inference on one sequence: latency and joules of prefill and decoding, and what the cache holds.

Decoding is timed with a cache that has room for all its tokens before the first. transformers' own, and with it every
variant's that grows, joins the past and the new token anew at each step: at 4,096 tokens sdpa would copy 16.8 MB to
attend to 8.4, and the copy would stand in every latency, slope, crossover and joule as if it were attention's.
"""

import statistics
import time

import torch

from lib.certificate import counts
from lib.errors import one_sentence_when_out_of_memory
from lib.measure.meter import energy_of
from lib.model import devices
from lib.model.caches import branched, roomy_cache


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
        rows.append(
            {
                "context": context,
                "prefill_latency_s": statistics.median(run["prefill_s"] for run in runs),
                "decode_latency_s_per_token": statistics.median(run["decode_s"] / new_tokens for run in runs),
                "cache_bytes": cache_bytes(cache),
                "cache_bytes_analytic": counts.formula_bytes(
                    [block.attn for block in model.transformer.h], cache, context + new_tokens
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
    cache = roomy_cache(model, ids.shape[1] + new_tokens)
    devices.synchronize(model.device)
    begin = time.perf_counter()
    out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
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

    Each is repeated for `window_s` seconds or more inside one window of the GPU's counter, so 2 s are the least that
    give a number; None has its `null_reason`. Every repetition of decoding starts from the prompt's cache: what has
    room is overwritten behind the prompt, what does not grow is copied, which counts with it, once per `new_tokens`.
    """
    model.eval()
    rows = []
    for context in contexts:
        ids = torch.arange(context, device=model.device)[None] % model.config.vocab_size
        with autocast():
            room = context + new_tokens
            prefilled = model(ids, past_key_values=roomy_cache(model, room), use_cache=True, logits_to_keep=1)

            def prefill(ids=ids, room=room):
                model(ids, past_key_values=roomy_cache(model, room), use_cache=True, logits_to_keep=1)

            def decode(prefilled=prefilled):
                branch = type(prefilled)(logits=prefilled.logits, past_key_values=branched(prefilled.past_key_values))
                _decode(model, branch, new_tokens)

            per_prefill, per_decoding = (energy_of(work, model.device, window_s) for work in (prefill, decode))
        per_token = None if per_decoding.joules is None else per_decoding.joules / new_tokens
        reason = per_prefill.reason or per_decoding.reason
        rows.append({"context": context, "prefill_energy_j": per_prefill.joules})
        rows[-1] |= {"decode_energy_j_per_token": per_token, "energy_null_reason": reason}
    return rows


def _tensors(cache):
    return [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
