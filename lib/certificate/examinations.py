"""What is asked of a variant's model, one examination after another; each yields the measurements of its checks.

Where numbers must be exactly zero, they are taken from the model that is timed: its dtype under its autocast, on its
device, in training and in evaluation. Where two ways must agree, the twin in float64 answers, because rounding there
hides nothing; how far the timed model is from the twin is a measurement of its own.
"""

import contextlib
import copy
import dataclasses
import math

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lib import attention
from lib.certificate import counts
from lib.certificate.measures import TOLERANCE, deviation, fact, is_of_a_signal, largest, relative, within
from lib.certificate.probes import (
    Floats,
    changed_tails,
    gradient_leaks,
    moved_later,
    pieces_of,
    places,
    prefix_difference,
    row_difference,
)
from lib.certificate.twins import Twins, as_reference, attentions, cache_of, loud
from lib.errors import is_out_of_memory
from lib.model import convolution

FLOOR = {"fp32": 1e-5, "bf16": 0.03}  # root mean square that rounding alone may cost a layer, relative
WORSE = 4.0  # how much further than its reference of rounded weights a layer may be, which rounds on the way as well
TIES = 2.0  # the same of a definition by content, whose ties break now here, now there
GRADIENTS_WORSE = 5.0  # and its gradients: a product more on the way
LENGTH = 0.08  # relative, of a gradient along the right one
WEIGHT_LENGTH, NOTHING = 0.1, 1e-3  # the same of each weight's, of those that are more than nothing beside the largest
TOKEN_LENGTH = 0.02  # the same of the median token's, which no single value moves
STEP = 1e-7  # relative; of a finite difference in float64
WIDE, NOISY = 1e-5, 0.02  # where the function itself rounds to fp32: a wider step, and the most noise allowed for
SLOPE = 1e-4  # relative; what such a difference may be off
SEEN = 1e-12  # of the largest gradient; what less moves nothing
CLEARLY = 1e-9  # and what more is seen beyond doubt: a definition that decays crosses the line between
PASS_OVER_USEFUL = 3.5  # FLOPs counted in one pass over those of the formula: masks, fills and blocks are computed too
STEP_OVER_USEFUL = 1.25  # in decoding, where there is next to nothing to mask; one of the two has to hold
COUNTED_OVER_DENSE = {True: 1.55, False: 1.75}  # where full is of T x T scores, and where it is not
DENSE_OVER_COUNTED = 2.0
ASKED = 12  # queries of which the pairs seen are counted
SHARES_APART = 1.1  # between the formula's share of scores and that seen
ROUNDS, SCATTERED = 4.5, 8.0  # and by content, above and below: a pair may be met in several rounds, buckets be uneven
BY_HEADS = 2.0  # times the heads, each of which sees others by content: what any of them sees is counted
USEFUL_OVER_COUNTED = 1.05
GROWTH_APART = 0.4  # between the exponents of T, of the formula and of what is counted
LOUD = 90  # tokens whose cache is tried with scores of hundreds
DECODED = 256  # tokens that are decoded one by one in a low precision
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
BYTES, KEPT = 1e-3, 0.01  # relative; what the formula for the cache may be off, and be kept alive beside it
MOVED = 0.9  # share of a weight's numbers with a gradient that a step has to move
COUNTED_AT = 1024  # tokens, where what does not grow with T no longer counts
SMALL_AT = 16  # and where little else does


def by_gradient(twins: Twins):
    """`causal`, `rows_independent`: exactly no gradient by a later token or another row, in the model that is timed."""
    s, model = twins.setting, twins.timed
    tokens = twins.tokens_of(model)
    passes = [("training", s.rows, s.length), ("evaluation", s.rows_at(s.longest), s.longest)]
    if (s.batch_size, s.context) != (s.rows, s.length):
        passes.insert(1, ("training", s.batch_size, s.context))
    for mode, rows, length in passes:
        for volume, turned in (("", contextlib.nullcontext), (", loud", lambda: loud(model))):
            model.train(mode == "training")
            with turned():
                length, (later, other) = _leaks_as_far_as_memory_goes(s, tokens, rows, length, shift=len(volume))
            model.eval()
            where = f"{mode}, {rows} x {length:,} tokens, {s.precision}{volume}"
            yield within("causal", f"gradient by a later token, {where}", later, 0.0)
            if other is not None:
                yield within("rows_independent", f"gradient by another row, {where}", other, 0.0)


def _leaks_as_far_as_memory_goes(s, tokens, rows: int, length: int, shift: int):
    """The tokens, at most `length`, that there is memory for, and their `gradient_leaks`.

    A run needs gradients of its context only: for no more than these must there be memory.
    """
    while True:
        try:
            return length, gradient_leaks(tokens, tokens.draw(rows, length), 1 if rows > 2 else 2, shift)
        except (RuntimeError, MemoryError) as error:
            if length <= s.context or not (isinstance(error, MemoryError) or is_out_of_memory(str(error))):
                raise
        length = max(s.context, length // 2)  # here, where the error no longer holds what was computed


def by_value(twins: Twins):
    """`causal`, `prefix_equal`, `rows_independent`, `mixes`, `training_equal`, `repeatable`: in float64, all layers."""
    s, model, tokens = twins.setting, twins.exact, twins.tokens
    with torch.no_grad():
        long = tokens.draw(s.rows_at(s.longest), s.longest)
        several = tokens.draw(s.rows, s.length)
        full, out = tokens(long), tokens(several)
        # for what more rows add nothing to
        few, out_of_few, one, out_of_one = several[:3], out[:3], long[:1], full[:1]
        cut = prefix_difference(tokens, one, out_of_one, s.prefixes)
        yield within("prefix_equal", f"{len(s.prefixes)} prefixes of {s.longest:,} tokens, float64", cut, TOLERANCE)
        power = long[:, : 2 ** (s.longest.bit_length() - 1)]
        of_power = full if power.shape == long.shape else tokens(power)
        for x, y, shifts in ((long, full, (0, 30)), (power, of_power, (2,)), (few, out_of_few, (3,))):
            moved = max(changed_tails(tokens, x, y, shift) for shift in shifts)
            where = f"{x.shape[0]} x {x.shape[1]:,} tokens, float64"
            yield within("causal", f"all later tokens drawn anew, {where}", moved, TOLERANCE)
        alone = row_difference(tokens, several, out)
        yield within("rows_independent", "a row alone, and beside others, float64", alone, TOLERANCE)
        yield from _to_the_bit(twins, several[:3])
        moved = moved_later(tokens, one, out_of_one)
        yield fact("mixes", "a changed token moves a later output", moved > TOLERANCE and math.isfinite(moved))
        model.train()
        trained, long_trained, again = tokens(few), tokens(one), tokens(one)
        model.eval()
        after_all = relative(tokens(few), out_of_few)
        yield within("training_equal", "several rows, float64", relative(trained, out_of_few), TOLERANCE)
        yield within("training_equal", f"{s.longest:,} tokens, float64", relative(long_trained, out_of_one), TOLERANCE)
        yield within("repeatable", "the same input again, in training", relative(again, long_trained), TOLERANCE)
        yield within("repeatable", "the same input again, after all this", after_all, TOLERANCE)


def _to_the_bit(twins: Twins, ids):
    """What tokens and rows that are drawn anew move in the model that is timed, in its own precision: nothing at all,
    unless its float64 twin, too, computes in another order then."""
    at, fresh = ids.shape[1] // 2, twins.tokens.draw(*ids.shape)
    tail, row = ids.clone(), ids.clone()
    tail[:, at:], row[-1] = fresh[:, at:], fresh[-1]
    for check, other, what in (
        ("causal", tail, "all later tokens drawn anew"), ("rows_independent", row, "another row drawn anew")
    ):  # fmt: skip
        kept = (slice(None), slice(at)) if check == "causal" else (slice(-1),)
        moved = [
            relative(subject(other.to(subject.device))[kept], subject(ids.to(subject.device))[kept])
            for subject in (twins.tokens, twins.tokens_of(twins.plain))
        ]
        if moved[0] == 0:
            yield within(check, f"{what}, {twins.setting.precision}, to the bit", moved[1], 0.0)


def by_layer(twins: Twins):
    """`precision`, and `causal`, `prefix_equal`, `training_equal`, `cached_equal`, `prefill_equal` in that precision.

    Each layer in the run's precision, on the same input as its twin in float64. A deviation is a root mean square over
    that of what is expected, and what is allowed depends on how far rounding alone moves the definition.
    """
    worst: dict[tuple[str, str], tuple[float, float]] = {}
    for layer, twin in twins.layers():
        for check, what, found, allowed in _of_layer(twins, layer, twin):
            before = worst.get((check, what), (-math.inf, 1.0))
            if not found / allowed <= before[0] / before[1]:  # NaN is the worst
                worst[check, what] = found, allowed
    for (check, what), (found, allowed) in worst.items():
        yield within(check, f"{what}, {twins.setting.precision}, the worst layer", found, allowed)


def _of_layer(twins: Twins, layer, twin):
    """(check, what, found, allowed) of one layer."""
    s = twins.setting
    length = min(max(s.context, s.decoded), twins.reference_length)
    hidden = twins.hidden(1, length, twins.device, torch.float32)
    exact = hidden.to(twins.exact_device, torch.float64)
    layer_s, twin_s = twins.placed(layer), twins.placed(twin)
    subject = Floats(layer_s, s.width, hidden, twins.autocast)
    first, middle, last = (t + 1 for t in places(length, 3))
    with torch.no_grad():
        expected = twin_s(exact)[0].to(twins.device)
        allowed = _allowed(twins, twin, exact)
        out = subject(hidden)
        yield "precision", "output, evaluation", deviation(out, expected), allowed
        for n in (n for n in _kernel_lengths(s) if n < length):
            off, of_few = deviation(subject(hidden[:, :n].contiguous()), expected[:, :n]), allowed
            if off > allowed and s.precision != "fp32":  # of few tokens a single tie is more
                of_few = max(allowed, _allowed(twins, twin, exact[:, :n]))
            yield "precision", "output of the first tokens alone, at each length that a kernel may like", off, of_few
        fresh = torch.cat([hidden[:, :middle], subject.draw(1, length - middle)], dim=1)
        moved = deviation(subject(fresh)[:, :middle], out[:, :middle])
        yield "causal", "all later tokens drawn anew, alone", moved, allowed
        for n in (first, last):
            yield "prefix_equal", "alone", deviation(subject(hidden[:, :n]), out[:, :n]), allowed
        cache, pieces = cache_of(attentions(twins.plain)), _prefill_and_tokens(hidden, 4)
        with twins.autocast():
            prefill, *tokens = twins.decoded(layer, pieces, cache)
        ends = expected.split([prefill.shape[1], length - prefill.shape[1]], dim=1)
        yield "prefill_equal", "alone", deviation(prefill, ends[0]), allowed
        yield (
            "cached_equal",
            f"{len(tokens)} tokens, alone",
            deviation(torch.cat(tokens, dim=1), ends[1]),
            2 * allowed,
        )
        if s.precision != "fp32":  # where what is added up, rounded and kept would drift
            n, cache = min(length, DECODED), cache_of(attentions(twins.plain))
            with twins.autocast():
                tokens = twins.decoded(layer, hidden[:, :n].split(1, 1), cache)
            late = slice(3 * n // 4, n)
            off = deviation(torch.cat(tokens, dim=1)[:, late], expected[:, late])
            yield "cached_equal", f"the last of {n} tokens, one by one, alone", off, allowed
    layer.train()
    ours, trained = _gradients(subject, layer, hidden)
    layer.eval()
    yield "training_equal", "alone", deviation(trained, expected), allowed
    theirs, _ = _gradients(Floats(twin_s, s.width, exact), twin, exact)
    is_steady = allowed <= FLOOR[s.precision]  # else rounding alone moves the definition far
    off, allowed = deviation(ours, theirs), GRADIENTS_WORSE * allowed
    if off > allowed and s.precision != "fp32":
        allowed, is_steady = max(allowed, _allowed_of_gradients(twins, twin, exact)), False
    yield "precision", "gradients, training", off, allowed
    tokens, exact_tokens = (found[: hidden.numel()].view(-1, s.width) for found in (ours, theirs))
    slopes = (tokens * exact_tokens).sum(-1) / exact_tokens.square().sum(-1)  # a few may be what rounding makes of them
    at_token = abs(slopes.nanmedian().item() - 1)
    yield "precision", "length of the median token's gradient along float64's, training", at_token, TOKEN_LENGTH
    along = abs((ours @ theirs / (theirs @ theirs)).item() - 1)  # rounding turns them, and leaves their length
    yield "precision", "length of the gradients along float64's, training", along, LENGTH if is_steady else allowed
    with torch.random.fork_rng(devices=[]):
        found = _by_weight(twins, layer, twin)
    yield "precision", "length of each weight's gradient along float64's, two rows", *found


def _kernel_lengths(s) -> list[int]:
    """Those of the run, and those at which code may change its way."""
    own = [n for c in s.inference_contexts for n in (c, c + s.new_tokens)]
    return sorted({s.context, *own, *(2**k for k in range(4, s.positions.bit_length()))})


def _by_weight(twins: Twins, layer, twin) -> tuple[float, float]:
    """How far the length of a weight's gradient along float64's is off, of the weight where that is worst, and allowed:
    more where the reference with rounded weights and input is further off. A gradient that is nothing in float64, as
    that of a key's bias, has no length."""
    s, found = twins.setting, []
    hidden = twins.hidden(2, s.gradient_length, twins.device, torch.float32)
    exact = hidden.to(twins.exact_device, torch.float64)
    sizes = [hidden.numel(), *(weight.numel() for weight in layer.parameters())]

    def off(ours, theirs):
        pairs = [(a @ b / (b @ b) - 1).abs() for a, b in zip(ours.split(sizes), theirs.split(sizes), strict=True)]
        return torch.stack(pairs).where(is_there, 0.0)

    for own, at, autocast in ((layer, hidden, twins.autocast), (twin, exact, contextlib.nullcontext)):
        own.train()
        found.append(_gradients(Floats(twins.placed(own), s.width, at, autocast), own, at)[0])
        own.eval()
    ours, theirs = found
    spread = torch.stack([part.square().mean().sqrt() for part in theirs.split(sizes)])
    is_there = spread > NOTHING * spread.max()
    apart = off(ours, theirs)
    allowed = torch.full_like(apart, WEIGHT_LENGTH)
    if (apart > allowed).any() and s.precision != "fp32":
        forms = (_rounded(twin), exact.bfloat16().double()), (twin, exact)
        moved, right = (
            _gradients(Floats(twins.placed(form, "reference"), s.width, at), form, at)[0] for form, at in forms
        )
        allowed = torch.maximum(allowed, (WORSE * off(moved, right)).nan_to_num(nan=0.0))
    worst = (apart / allowed).argmax()  # NaN is the worst
    return apart[worst].item(), allowed[worst].item()


def _allowed(twins: Twins, twin, hidden) -> float:
    """How far a layer may be from float64: rounding's own share, or some times what rounding does to the definition.

    A definition by content, such as a hash, answers otherwise where rounding breaks a tie, and one that divides by what
    may be small multiplies it: its reference, given rounded weights and a rounded input, says how much that is.
    """
    precision = twins.setting.precision
    if precision == "fp32":
        return FLOOR[precision]
    with torch.no_grad():
        moved = deviation(
            twins.placed(_rounded(twin), "reference")(hidden.bfloat16().double()),
            twins.placed(twin, "reference")(hidden),
        )
    worse = WORSE * (TIES if getattr(twin, "by_content", False) else 1)
    return max(FLOOR[precision], worse * moved) if math.isfinite(moved) else FLOOR[precision]


def _allowed_of_gradients(twins: Twins, twin, hidden) -> float:
    """The same of gradients, where there is doubt: the reference's backward pass is slow."""
    moved, theirs = (
        _gradients(Floats(twins.placed(layer, "reference"), hidden.shape[-1], at), layer, at)[0]
        for layer, at in ((_rounded(twin), hidden.bfloat16().double()), (twin, hidden))
    )
    off = deviation(moved, theirs)
    return WORSE * off if math.isfinite(off) else 0.0


def _rounded(twin):
    """The layer with its weights rounded to bf16."""
    rounded = copy.deepcopy(twin)
    with torch.no_grad():
        for weight in rounded.parameters():
            weight.copy_(weight.bfloat16().double())
    return rounded


def _gradients(subject, layer, hidden) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients by the input and all weights of a fixed sum of the outputs, in one vector; and the output."""
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(hidden)
    out, leaves = subject.traced(hidden)
    wanted = [*leaves, *layer.parameters()]
    found = torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)
    found = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]
    return torch.cat([g.double().cpu().flatten() for g in found]), out.detach()


@torch.no_grad()
def with_cache(twins: Twins):
    """`cached_equal`, `prefill_equal`: token by token, in one and in pieces; float64, all layers, and the caches."""
    s, model, tokens = twins.setting, twins.exact, twins.tokens
    n = s.decoded
    ids = tokens.draw(2, n)
    out = tokens(ids)
    scale = largest(out)

    def feed(pieces, cache=None, begin=0):
        """The cache behind the pieces of the text from `begin` on, and how far its logits are from one pass's."""
        cache, apart = model.new_cache() if cache is None else cache, 0.0
        for size in pieces:
            end = begin + size
            logits = model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits
            apart, begin = max(apart, relative(logits, out[:, begin:end], scale)), end
        return cache, apart

    first, more = min(n, 72), [1] * min(3, max(0, n - 72))
    cache, apart = feed([1] * first)
    yield within("cached_equal", f"{first} tokens, one by one, float64", apart, TOLERANCE)
    apart = max(feed(more, behind, first)[1] for behind in (cache, feed([first])[0]))
    yield within("prefill_equal", f"tokens behind {first} that came in one, and one by one", apart, TOLERANCE)
    prompts = sorted({min(length, n - 1) for length in (*s.inference_contexts, s.context, 1)})
    apart = max(feed([prompt, *[1] * min(4, n - prompt)])[1] for prompt in prompts)
    yield within("cached_equal", f"tokens behind prefills of {prompts}, float64", apart, TOLERANCE)
    pieces = pieces_of(max(1, n - 3))
    cache, apart = feed(pieces)
    yield within("prefill_equal", f"{n:,} tokens in {len(pieces)} pieces, float64", apart, TOLERANCE)
    apart = max(
        feed([1] * (n - max(1, n - 3)), behind, max(1, n - 3))[1] for behind in (cache, feed([max(1, n - 3)])[0])
    )
    yield within("prefill_equal", f"tokens behind {n - 3:,} that came in one, and in pieces", apart, TOLERANCE)
    pieces = [max(1, n // 9), n - max(1, n // 9)]
    yield within(
        "prefill_equal", f"a piece of {pieces[1]:,} behind one of {pieces[0]:,}, float64", feed(pieces)[1], TOLERANCE
    )
    few = min(n, LOUD)
    with loud(model):
        several = model(ids[:, :few], use_cache=False).logits
        cache, apart = model.new_cache(), 0.0
        for piece, expected in zip(*(x.split(_steps(few), dim=1) for x in (ids[:, :few], several)), strict=True):
            got = model(piece.contiguous(), past_key_values=cache, use_cache=True).logits
            apart = max(apart, relative(got, expected, largest(several)))
    for check in ("cached_equal", "prefill_equal"):
        yield within(check, f"{few} tokens, loud, in pieces and one by one, float64", apart, TOLERANCE)
    finite, cache = True, twins.plain.new_cache()
    with loud(twins.plain), twins.autocast():
        for piece in ids[:, :few].to(twins.device).split(_steps(few), dim=1):
            logits = twins.plain(piece.contiguous(), past_key_values=cache, use_cache=True).logits
            finite &= bool(torch.isfinite(logits).all())
    yield fact("cached_equal", f"{few} tokens, loud, finite in {s.precision}", finite)
    half = n // 2
    cache, _ = feed([half])
    model(tokens.draw(2, half), use_cache=True)  # another text, with a cache of its own
    _, apart = feed([1], cache, half)
    yield within("prefill_equal", "with another text's prefill in between, float64", apart, TOLERANCE)


def _steps(n: int) -> list[int]:
    """A way through n tokens: a prefill, tokens one by one, as many at once."""
    last = max(0, (n - 2) // 2)
    return [n - 2 - last if n > 2 else n, *([1, 1] if n > 2 else []), *([last] if last else [])]


def against_reference(twins: Twins):
    """`reference`: the whole model's output and gradients beside one whose layers are their references; float64."""
    s, model, tokens = twins.setting, twins.exact, twins.tokens
    ids = tokens.draw(2, s.gradient_length)
    weights = {name: weight for name, weight in model.named_parameters() if ".attn." in name}

    def outcome():
        out, leaves = tokens.traced(ids)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
        wanted = [*leaves, *weights.values()]
        found = torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)
        return out.detach(), [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]

    out, ours = outcome()
    with as_reference(model):
        expected, theirs = outcome()
    yield within("reference", f"output, {ids.shape[1]:,} tokens", relative(out, expected), TOLERANCE)
    top = max(largest(gradient) for gradient in theirs)
    apart = max(relative(a, b, max(largest(b), 1e-3 * top)) for a, b in zip(ours, theirs, strict=True))
    yield within("reference", f"gradients, {ids.shape[1]:,} tokens", apart, TOLERANCE)
    length = twins.reference_length
    if length > ids.shape[1]:
        long = tokens.draw(1, length)
        with torch.no_grad():
            out = tokens(long)
            with as_reference(model):
                expected = tokens(long)
        yield within("reference", f"output, {length:,} tokens", relative(out, expected), TOLERANCE)


def of_the_reference(twins: Twins):
    """`reach`, `reference_causal`, `gpt2_equal`: what the reference itself sees, layer by layer; float64."""
    s, length = twins.setting, twins.setting.gradient_length
    far = twins.reference_length
    leak, cut, unlike, unlike_far = 0.0, 0.0, 0, 0
    ends = twins.of_each_kind(attentions(twins.exact)).values()
    for layer in attentions(twins.exact):
        hidden = twins.hidden(1, length, twins.exact_device, torch.float64)
        mine, (own_leaf,) = Floats(layer, s.width, hidden).traced(hidden)  # first: some draw what the reference reads
        theirs, (leaf,) = Floats(layer.reference, s.width, hidden).traced(hidden)
        ours, expected = _moved(mine, own_leaf, length - 1), _moved(theirs, leaf, length - 1)
        unlike += int((_only_in(ours, expected) | _only_in(expected, ours)).sum())
        half = length // 2
        gradient = _gradient(theirs, leaf, half)
        leak = max(leak, _ratio(largest(gradient[half + 1 :]), largest(gradient)))
        with torch.no_grad():
            layer(hidden[:, :half].contiguous())
            prefix = layer.reference(hidden[:, :half].contiguous())
        cut = max(cut, relative(prefix, theirs[:, :half], largest(theirs)))
        if far > length and layer in ends:
            hidden = twins.hidden(1, far, twins.exact_device, torch.float64)
            seen = []
            for form in (layer, layer.reference):
                out, (leaf,) = Floats(form, s.width, hidden).traced(hidden)
                seen.append(_moved(out, leaf, far - 1))
            unlike_far += int((_only_in(*seen) | _only_in(*seen[::-1])).sum())
    yield within("reach", f"of {length:,} tokens, seen by layer or reference alone", unlike, 0.0)
    if far > length:
        yield within("reach", f"of {far:,} tokens, seen by layer or reference alone", unlike_far, 0.0)
    yield within("reference_causal", "gradient of the reference by a later token", leak, 0.0)
    yield within("reference_causal", "a prefix of the reference's input", cut, TOLERANCE)
    yield from _beside_gpt2(twins)


def receptive_field(twins: Twins) -> int:
    """How many tokens the last of `context` depends on in one layer, itself included: in that which sees least."""
    hidden = twins.hidden(1, twins.setting.context, twins.exact_device, torch.float64)
    fields = []
    for layer in attentions(twins.exact):
        out, (leaf,) = Floats(layer, twins.setting.width, hidden).traced(hidden)
        fields.append(int((_moved(out, leaf, hidden.shape[1] - 1) > SEEN).sum()))
    return min(fields)


def _gradient(out, leaf, t) -> torch.Tensor:
    """How much each token moves output t: (T,)."""
    weight = torch.randn(out.shape[-1], dtype=out.dtype).to(out.device)  # a plain sum may cancel
    (gradient,) = torch.autograd.grad((out[:, t] * weight).sum(), leaf, retain_graph=True)
    return gradient.abs().amax(dim=(0, 2))


def _moved_at(module, hidden, asked: list[int], rows: int) -> torch.Tensor:
    """`_moved` of several outputs of one sequence: (asked, T). Each is asked in a row of its own, `rows` at once, so
    that a slow reference goes back through its steps a few times only. One that takes a row alone is asked so."""
    try:
        return torch.cat([_moved_by_row(module, hidden, asked[i : i + rows]) for i in range(0, len(asked), rows)])
    except (RuntimeError, ValueError, TypeError, IndexError, MemoryError) as error:
        if rows == 1 or is_of_a_signal(error):
            raise
    return _moved_at(module, hidden, asked, 1)


def _moved_by_row(module, hidden, asked: list[int]) -> torch.Tensor:
    out, (leaf,) = Floats(module, hidden.shape[-1], hidden).traced(hidden.expand(len(asked), -1, -1))
    weight = torch.randn(out.shape[-1], dtype=out.dtype).to(out.device)
    (gradient,) = torch.autograd.grad((out[range(len(asked)), asked] * weight).sum(), leaf)
    gradient = gradient.abs().amax(dim=2)
    return gradient / gradient.amax(dim=1, keepdim=True)


def _moved(out, leaf, t) -> torch.Tensor:
    """How much each token moves output t, over the most that one does: (T,)."""
    gradient = _gradient(out, leaf, t)
    return gradient / gradient.max()


def _only_in(one, other) -> torch.Tensor:
    """Tokens that are seen in `one` and not at all in `other`, or clearly against hardly: (T,) bool."""
    return ((one > SEEN) & (other == 0)) | ((one > CLEARLY) & (other <= SEEN))


def _fades(moved, far: int) -> bool:
    """Whether what is older counts so much less that of `far` tokens the oldest would no longer be seen."""
    third = max(1, len(moved) // 3)
    apart = len(moved) - third  # tokens between the middles of both thirds
    return bool((moved[:third].median() / moved[-third:].median()) ** (far / apart) <= CLEARLY)


def _beside_gpt2(twins: Twins):
    """Each variant's reference beside GPT-2's own attention, with the options that it says make it so."""
    for name, (variant, options) in twins.parts.items():
        for one in _one_beside_gpt2(twins, variant, options):
            yield dataclasses.replace(one, what=twins.about(name, one.what))


def _one_beside_gpt2(twins: Twins, variant: type, options: dict):
    s, config = twins.setting, twins.config()
    if not hasattr(variant, "as_gpt2"):
        yield fact("gpt2_equal", "GPT-2's own attention", None, "it names no options (as_gpt2) that make it GPT-2's")
        return
    options = options | variant.as_gpt2(config)
    gpt2, apart = attention.load("baseline")(config, 0).double().eval(), 0.0
    for index in sorted({0, s.layers - 1}):
        layer = variant(config, index, **options).double().eval()
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, 0.0, 1 / math.sqrt(s.width))
        missing = gpt2.load_state_dict(layer.state_dict(), strict=False)
        if missing.missing_keys or missing.unexpected_keys:
            said = "with as_gpt2's options its weights have other names"
            yield fact("gpt2_equal", "GPT-2's own attention", False, said)
            return
        hidden = torch.randn(2, s.gradient_length, s.width, dtype=torch.float64)
        with torch.no_grad():
            apart = max(apart, relative(layer.reference(hidden), gpt2(hidden)[0]))
    said = "as_gpt2 says that it is; a variant that computes something else leaves as_gpt2 out"
    yield dataclasses.replace(within("gpt2_equal", "output, float64", apart, TOLERANCE), says=said)


def of_gradients(twins: Twins):
    """`gradients`: slopes along a drawn direction of all weights, beside differences; float64, training."""
    s, model, tokens = twins.setting, twins.exact, twins.tokens
    length = min(s.context, twins.reference_length)
    ids = tokens.draw(1, length)
    model.train()
    try:
        off, allowed = slope_off(model, lambda: tokens(ids))
    finally:
        model.eval()
    yield within("gradients", f"slope along a drawn direction, {length:,} tokens, training, float64", off, allowed)


def slope_off(model, run) -> tuple[float, float]:
    """How far the gradient of what `run()` gives, along a drawn direction of all weights, is off a difference; and what
    is allowed. Relative to the directions' own slopes. `run` gives the same for the same weights."""
    weights = list(model.parameters())
    direction = [torch.randn_like(weight) * weight.abs().mean() for weight in weights]
    out = run()
    towards = torch.randn(out.shape, dtype=torch.float64).to(out)
    found = torch.autograd.grad((out * towards).sum(), weights, allow_unused=True)
    terms = [(g * d).sum() for g, d in zip(found, direction, strict=True) if g is not None]
    slope = torch.stack(terms).sum().item()
    scale = torch.stack(terms).square().sum().sqrt().item()

    def difference(step: float) -> float:
        ends = []
        with torch.no_grad():
            for move in (step, -2 * step):
                for weight, along in zip(weights, direction, strict=True):
                    weight.add_(along, alpha=move)
                ends.append((run() * towards).sum().item())
            for weight, along in zip(weights, direction, strict=True):
                weight.add_(along, alpha=step)
        return (ends[0] - ends[1]) / (2 * step)

    off, allowed = abs(difference(STEP) - slope), SLOPE
    if not off <= SLOPE * scale:  # code that rounds to fp32 on its way needs a wider step, whose noise is measured
        wide, wider = difference(WIDE), difference(1.5 * WIDE)
        off, allowed = abs(wide - slope), min(NOISY, max(SLOPE, 5 * abs(wide - wider) / scale if scale else 0.0))
    return (off / scale if scale > 0 else math.inf), allowed


def of_weights(twins: Twins):
    """`weights_trained`: each is a parameter, of which every row and column has a gradient, and a step moves it."""
    s, model = twins.setting, twins.build().train()
    layers = attentions(model)
    outside = sorted({name for index, layer in enumerate(layers) for name in _drawn_outside(twins, layer, index)})
    yield _none("no drawn tensor is outside the parameters", outside)
    yield _none("no weight is frozen", [name for name, weight in _named(layers) if not weight.requires_grad])

    tokens = twins.tokens_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.learning_rate, weight_decay=0.0)
    out = tokens(tokens.draw(s.rows_at(s.length), s.length)).float()
    (out * torch.randn(out.shape).to(out)).sum().backward()
    yield _none("every row and column of a weight has a gradient", list(_without_gradient(layers)))
    before = {name: weight.detach().clone() for name, weight in _named(layers)}
    optimizer.step()
    stuck = []
    for name, weight in _named(layers):
        live = None if weight.grad is None else weight.grad != 0
        if live is None or (live.any() and (weight.detach() != before[name])[live].double().mean() < MOVED):
            stuck.append(name)
    yield _none("a step moves every weight", stuck)
    yield within("weights_trained", "form and decoding follow changed weights", _left_behind(twins), TOLERANCE)
    found, allowed = _left_behind_timed(twins)
    yield within("weights_trained", f"the same in {s.precision}, the worst layer", found, allowed)


def _none(what: str, found: list[str]):
    return fact("weights_trained", what, not found, ", ".join(found[:3]))


def _named(layers):
    return [
        (f"layer {index}: {name}", weight)
        for index, one in enumerate(layers)
        for name, weight in one.named_parameters()
    ]


def _without_gradient(layers):
    """Weights, of a matrix also rows and columns, whose gradient is missing or zero."""
    for index, layer in enumerate(layers):
        for path, module in layer.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear | Conv1D) and isinstance(weight, nn.Parameter):
                moved = weight.grad is not None and weight.grad != 0
                if weight.grad is None or not (moved.any(0).all() and moved.any(1).all()):
                    yield f"layer {index}: {path}.weight"
        for name, weight in layer.named_parameters():
            if weight.grad is None or not torch.isfinite(weight.grad).all():
                yield f"layer {index}: {name}"


def _drawn_outside(twins: Twins, layer, index: int):
    """Names of random tensors of a layer that no optimizer moves although its output has a slope by them.

    Random is what another seed makes otherwise. A buffer without a slope, such as the rotations of a hash, is none.
    """
    other = twins.layer_of_another_seed(index)
    theirs = dict(_unregistered(other))
    for name, tensor in _unregistered(layer):
        if name in theirs and _differs(tensor, theirs[name]):
            yield f"layer {index}: {name}"
    theirs = dict(other.named_buffers())
    for name, tensor in layer.named_buffers():
        if tensor.is_floating_point() and _differs(tensor, theirs[name]) and _has_slope(twins, layer, name, tensor):
            yield f"layer {index}: {name}"


def _differs(mine, theirs) -> bool:
    return mine.shape != theirs.shape or not torch.equal(mine.detach().cpu(), theirs.detach().cpu())


def _unregistered(layer):
    """(name, tensor) of floating tensors that a layer keeps beside its parameters and buffers."""
    for path, module in layer.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            for thing in value if isinstance(value, list | tuple) else [value]:
                if isinstance(thing, nn.Module):
                    yield from (
                        (f"{path}.{key}.{name}".lstrip("."), weight) for name, weight in thing.named_parameters()
                    )
                elif isinstance(thing, torch.Tensor) and thing.is_floating_point():
                    yield f"{path}.{key}".lstrip("."), thing


def _has_slope(twins: Twins, layer, name: str, buffer) -> bool:
    hidden = twins.hidden(1, min(40, twins.setting.length), buffer.device, torch.float32)
    moved = buffer.detach().clone().requires_grad_()
    with torch.enable_grad(), twins.autocast():
        out = functional_call(layer, {name: moved}, (hidden,))[0]
    if not out.requires_grad:
        return False
    (slope,) = torch.autograd.grad(out.float().square().sum(), moved, allow_unused=True)
    return slope is not None and bool(slope.any())


@torch.no_grad()
def _left_behind(twins: Twins) -> float:
    """How far a layer that has run, and decoded, is from its reference once its weights are others; float64."""
    layers, worst = attentions(twins.exact), 0.0
    hidden = twins.hidden(1, min(40, twins.setting.length), twins.exact_device, torch.float64)
    pieces = _prefill_and_tokens(hidden, 2)

    def both(layer):
        cache = cache_of(layers)
        decoded = [layer(piece.contiguous(), past_key_values=cache)[0] for piece in pieces]
        return layer(hidden)[0], torch.cat(decoded, dim=1)

    for layer in layers:
        both(layer)
        before = [weight.clone() for weight in layer.parameters()]
        for weight in layer.parameters():
            weight.mul_(torch.rand(weight.shape, dtype=torch.float64).to(weight) + 0.5)
        given = both(layer)
        expected = layer.reference(hidden)
        worst = max([worst, *(relative(one, expected) for one in given)])
        for weight, old in zip(layer.parameters(), before, strict=True):
            weight.copy_(old)
    return worst


@torch.no_grad()
def _left_behind_timed(twins: Twins) -> tuple[float, float]:
    """The same of the first and the last layer in the run's precision: how far, and how far rounding may take it.

    Twice what other checks allow: what is left behind is off by tenths, and by chance few tokens round the same way.
    """
    pairs, worst = list(twins.layers()), (0.0, 1.0)
    hidden = twins.hidden(2, min(40, twins.setting.length), twins.device, torch.float32)
    exact = hidden.to(twins.exact_device, torch.float64)
    for layer, twin in pairs[:: max(1, len(pairs) - 1)]:

        def both(layer=layer):
            cache = cache_of(attentions(twins.plain))
            with twins.autocast():
                decoded = [layer(piece, past_key_values=cache)[0] for piece in _prefill_and_tokens(hidden, 4)]
                return layer(hidden)[0], torch.cat(decoded, dim=1)

        both()
        before = [[weight.clone() for weight in one.parameters()] for one in (layer, twin)]
        for mine, its in zip(layer.parameters(), twin.parameters(), strict=True):
            turned = torch.rand(its.shape, dtype=torch.float64) + 0.5
            its.mul_(turned.to(its))
            mine.copy_(its)
        given, expected, allowed = both(), twin.reference(exact), 2 * _allowed(twins, twin, exact)
        for form in given:
            off = deviation(form, expected.to(form.device))
            if not off / allowed <= worst[0] / worst[1]:
                worst = off, allowed
        for one, kept in zip((layer, twin), before, strict=True):
            for weight, old in zip(one.parameters(), kept, strict=True):
                weight.copy_(old)
    return worst


def of_gpt2(twins: Twins):
    """`gpt2_projection`, `gpt2_initialisation`: what surrounds the mixing, and how training begins, is GPT-2's."""
    hidden = twins.hidden(1, min(40, twins.setting.length), twins.exact_device, torch.float64)
    used = [_uses_projection(layer, hidden) for layer in attentions(twins.exact)]
    yield fact("gpt2_projection", "a (C, C) matrix and a bias named c_proj, which the output goes through", all(used))
    odd = list(_initialised_otherwise(twins.build(), twins.setting.layers))
    yield fact("gpt2_initialisation", "N(0, 0.02), the projection's over √(2 L), biases 0", not odd, ", ".join(odd[:3]))


@torch.no_grad()
def _uses_projection(layer, hidden) -> bool:
    """Whether the output goes through a (C, C) matrix and a bias named c_proj, as GPT-2's does."""
    projection, width = getattr(layer, "c_proj", None), hidden.shape[-1]
    if projection is None or tuple(projection.weight.shape) != (width, width) or projection.bias is None:
        return False
    before, bias = layer(hidden)[0], projection.bias.clone()
    projection.bias += 1.0
    shifted = layer(hidden)[0] - before
    projection.bias.copy_(bias)
    return bool((shifted - 1.0).abs().max() < TOLERANCE)


def _initialised_otherwise(model, layers: int):
    """Weights of attention that do not begin as GPT-2's: as `lib.model` draws them."""
    for name, weight in model.named_parameters():
        if ".attn." in name and weight.dim() >= 2:
            expected = 0.02 / math.sqrt(2 * layers) if name.endswith("c_proj.weight") else 0.02
            by_chance = 5 / math.sqrt(2 * weight.numel())  # five standard errors of a standard deviation
            if not abs(weight.std().item() / expected - 1) <= max(0.1, by_chance):
                yield name
        elif ".attn." in name and name.endswith("bias") and weight.any():
            yield name


def of_cache_bytes(twins: Twins):
    """`cache_bytes`: the formula beside what a cache holds, after a prefill and some tokens, in the run's precision."""
    model, tokens = twins.plain, twins.tokens_of(twins.plain)
    off, kept = 0.0, 0.0
    for n in sorted({max(1, twins.setting.decoded // 3), twins.setting.decoded}):
        cache, ids, length = model.new_cache(), tokens.draw(1, n), 0
        for piece in _prefill_and_tokens(ids, 3):
            with torch.no_grad(), twins.autocast():
                model(piece, past_key_values=cache, use_cache=True)
            length, held = length + piece.shape[1], counts.held(cache)
            formula = sum(
                layer.cache_bytes(length, ELEMENT_BYTES[twins.setting.precision]) for layer in attentions(model)
            )
            off = max(off, abs(counts.bytes_of(held) - formula) / max(1, formula))
            kept = max(kept, counts.storage_bytes(held) / max(1, counts.bytes_of(held)) - 1)
    yield within("cache_bytes", "the formula off what the cache holds", off, BYTES)
    yield within("cache_bytes", "memory kept alive beyond that", kept, KEPT)


def of_core_flops(twins: Twins):
    """`core_flops`: the formula beside what is counted, in one pass, in decoding and over a doubling of the length."""
    for name, layer in twins.layers_for(COUNTED_AT).items():
        for one in _core_flops(layer, twins.layers_for(SMALL_AT)[name], twins.setting.width):
            yield dataclasses.replace(one, what=twins.about(name, one.what))
    by_formula = _exponents(twins, lambda layer, x: layer.core_flops(x.shape[1]))
    counted = _exponents(twins, lambda layer, x: sum(counts.core_operations(layer, x)))
    for name in twins.parts:
        what = twins.about(name, "exponent of the length, formula and counted apart")
        yield within("core_flops", what, abs(by_formula[name] - counted[name]), GROWTH_APART)
    few = sorted({1, 2, 3, 50, twins.setting.gradient_length, twins.setting.context})
    for index, layer in _unlike(twins).items():
        yield from _seen_and_counted(twins, convolution.bare(layer), f"layer {index}")
        found = [layer.core_flops(n) - layer.core_flops(n - 1) for n in few if n > 1] + [layer.core_flops(1)]
        found += [layer.core_flops(n, dense=True) - layer.core_flops(n) for n in few]
        yield fact("core_flops", f"layer {index}: a token more costs more, full no less than causal", min(found) >= 0)


def _unlike(twins: Twins) -> dict[int, torch.nn.Module]:
    """The first and the last layer of each variant, and those between that see another number of tokens than these."""
    layers, n = attentions(twins.exact), twins.setting.gradient_length
    found = twins.of_each_kind(layers)
    if len(found) == len(layers):
        return found

    def seen(index):
        hidden = twins.hidden(1, n, twins.exact_device, torch.float64)
        out, (leaf,) = Floats(layers[index], twins.setting.width, hidden).traced(hidden)
        reach = [int((_moved(out, leaf, t) > SEEN).sum()) for t in (n // 2, n - 1)]
        return twins.name_at(index), *reach

    known = {seen(index) for index in found}
    for index, layer in enumerate(layers):
        if index not in found and not getattr(layer, "by_content", False) and seen(index) not in known:
            known.add(seen(index))
            found[index] = layer
    return found


def _core_flops(layer, small, width: int):
    T, hidden = COUNTED_AT, torch.randn(1, COUNTED_AT, width, dtype=torch.float64)
    products, elementwise = counts.core_operations(layer, hidden)
    useful, dense = layer.core_flops(T), layer.core_flops(T, dense=True)
    step = counts.step_operations(layer, hidden)
    per_step = useful - layer.core_flops(T - 1)
    yield within(
        "core_flops", f"causal over counted, {T:,} tokens", _ratio(useful, products + elementwise), USEFUL_OVER_COUNTED
    )
    what = f"counted over full T x T, {T:,} tokens"
    yield within("core_flops", what, _ratio(products, dense), COUNTED_OVER_DENSE[_is_quadratic(layer)])
    if not _is_quadratic(layer):
        yield within(
            "core_flops", f"full over counted, {T:,} tokens", _ratio(dense, products + elementwise), DENSE_OVER_COUNTED
        )
    if hasattr(small, "projection_flops"):
        beyond, _ = counts.core_operations(small, hidden[:, :SMALL_AT])
        over = _ratio(beyond, small.core_flops(SMALL_AT, dense=True))
        what = f"counted beyond `projection_flops` over full, {SMALL_AT} tokens"
        yield within("core_flops", what, over, COUNTED_OVER_DENSE[_is_quadratic(layer)])
    in_pass, in_step = _ratio(products, useful), _ratio(step, per_step)
    if in_step > STEP_OVER_USEFUL:
        yield within("core_flops", f"counted over causal, {T:,} tokens", in_pass, PASS_OVER_USEFUL)
    else:
        yield within("core_flops", f"counted over causal, the token after {T - 1:,}", in_step, STEP_OVER_USEFUL)


def _is_quadratic(layer) -> bool:
    """Whether the full count is of T x T scores; else it is of a form whose work does not grow so."""
    return layer.core_flops(2 * COUNTED_AT, dense=True) > 3 * layer.core_flops(COUNTED_AT, dense=True)


def _seen_and_counted(twins: Twins, layer, where: str):
    """The formula's share of causal in all scores, beside that of the pairs which the reference sees."""
    n = twins.setting.gradient_length
    if not _is_quadratic(layer) or n < 12:
        return
    hidden = twins.hidden(1, n, twins.exact_device, torch.float64)
    seen, in_one_piece = 0, True
    asked = [int((i + 0.5) * n / ASKED) for i in range(ASKED)]
    rows = min(ASKED, 2 * twins.setting.layers)  # one layer of so many, as `against_reference` has two of all layers
    for t, moved in zip(asked, _moved_at(layer.reference, hidden, asked, rows), strict=True):
        mine = moved[: t + 1] > SEEN
        seen += int(mine.sum())
        in_one_piece &= bool(mine[t + 1 - int(mine.sum()) :].all())
    pairs, share = seen / (n * ASKED), _ratio(layer.core_flops(n), layer.core_flops(n, dense=True))
    by_content = getattr(layer, "by_content", False) or not in_one_piece  # then the formula takes an even spread
    scattered = max(SCATTERED, BY_HEADS * twins.setting.heads)
    over, bound = (ROUNDS, scattered) if by_content else (SHARES_APART, SHARES_APART)
    yield within("core_flops", f"{where}: causal share of the scores over that seen", share / pairs, over)
    yield within("core_flops", f"{where}: share seen over the causal one", _ratio(pairs, share), bound)


def _exponents(twins: Twins, count) -> dict[str, float]:
    """Exponent of T of `count(layer, hidden)`, by variant: of a small layer and its input at two lengths, each with as
    many positions, since what derives from them grows too."""
    width, found = 8 * twins.setting.heads, {}
    for n in (COUNTED_AT, 2 * COUNTED_AT):
        hidden = torch.randn(1, n, width, dtype=torch.float64)
        for name, layer in twins.layers_for(n, width).items():
            found.setdefault(name, []).append(count(layer, hidden))
    return {name: counts.exponent(*pair) for name, pair in found.items()}


def flops_growth(twins: Twins) -> float:
    """Exponent of T of the analytic count: of a pattern, that of the variant which grows fastest."""
    return max(_exponents(twins, lambda layer, x: layer.core_flops(x.shape[1])).values())


def memory_growth(twins: Twins) -> float:
    """Exponent of T of what a layer keeps for its backward pass: of a pattern, of that which grows fastest."""
    return max(_exponents(twins, lambda layer, x: counts.activation_bytes(layer.train(), x)).values())


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0 if a <= 0 else math.inf


def _prefill_and_tokens(x, after: int) -> list[torch.Tensor]:
    """A sequence as a prefill and the last `after` tokens, as far as there are so many."""
    after = min(after, x.shape[1] - 1)
    first = x.shape[1] - after
    return [x[:, :first].contiguous(), *(token.contiguous() for token in x[:, first:].split(1, dim=1) if after)]
