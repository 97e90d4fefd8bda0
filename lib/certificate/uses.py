"""What is asked of the ways in which a model is used: packed rows, padding of every kind, dropout, a cache that is cut,
reordered, moved or given room, weights that are saved. All against the same text read plainly.
"""

import contextlib

import torch

from lib.certificate.measures import TOLERANCE, fact, largest, relative, within
from lib.certificate.probes import Tokens
from lib.certificate.twins import VOCABULARY, Twins, attentions, loud
from lib.model.caches import branched, roomy_cache

REFUSED = (ValueError, NotImplementedError)  # with which a variant says that it cannot
TINY = 1e-12  # of the largest gradient: what a sum that cancels leaves
SHORT, LONG = 90, 200  # tokens of a text whose cache is handled, and of a packed or padded row


def _packings(n: int) -> list[list[int]]:
    """Lengths of documents in three rows of n tokens: borders on and off chunks' ends, the fewest in the first row."""
    rows = ([min(64, n // 2)], [1, n // 5, 3, n // 4], [n // 3, n // 3])
    return [[length for length in (*row, n - sum(row)) if length > 0] for row in rows]


def with_documents(twins: Twins):
    """`documents_equal`: each document of a packed row is what it is alone, and has no slope by another."""
    model, n = twins.exact, min(twins.setting.longest, LONG)
    if not model.keeps_documents:
        yield fact("documents_equal", "packed rows", None, "its forward names no seq_idx, so such rows are refused")
        return
    ids, packings = twins.tokens.draw(3, n), _packings(n)
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in packings]
    seq_idx = torch.stack(rows).to(ids.device)
    apart = 0.0
    try:
        with torch.no_grad():
            for training in (False, True):
                model.train(training)
                packed = model(ids, seq_idx=seq_idx, use_cache=False).logits
                for row, lengths in enumerate(packings):
                    for part in torch.arange(n, device=ids.device).split(lengths):
                        alone = twins.tokens(ids[row : row + 1, part])[0]
                        apart = max(apart, relative(packed[row, part], alone, largest(packed)))
    except REFUSED as error:
        yield fact("documents_equal", "packed rows", None, f"it refuses: {error}")
        return
    finally:
        model.eval()
    yield within("documents_equal", f"3 rows of {n:,} tokens, float64", apart, TOLERANCE)
    yield within(
        "documents_equal", "gradient by another document, training, float64", _leaks(twins, ids, seq_idx), TINY
    )


def _leaks(twins: Twins, ids, seq_idx) -> float:
    """The largest gradient of the last documents' tokens by another's, over the largest there is."""
    model = twins.exact.train()
    try:
        out, leaves = Tokens(model, VOCABULARY, ids.device, use_cache=False, seq_idx=seq_idx).traced(ids)
    finally:
        model.eval()
    own = seq_idx == seq_idx[:, -1:]
    picked = out[own]
    (given,) = torch.autograd.grad((picked * torch.randn(picked.shape).to(picked)).sum(), leaves[:1])
    moved = given.abs().amax(-1)
    return largest(moved[~own]) / max(largest(moved), TINY)


def with_padding(twins: Twins):
    """`padding_equal`: rows padded on the left are what they are alone in every way of reading, in float64, and have
    finite gradients in the run's precision; whether rows padded elsewhere are, too, is told."""
    model, n = twins.exact, min(twins.setting.decoded, 150) - 1
    try:
        yield from _padded_left(twins, n)
        if twins.setting.longest - 1 > n:
            mask, ids = _left(twins, min(twins.setting.longest - 1, 2 * LONG))
            with torch.no_grad():
                yield _one_pass(twins, model, ids, mask, f"{ids.shape[1]:,} tokens, float64")
        yield from _padded_elsewhere(twins, min(n, SHORT))
        yield fact("padding_equal", f"gradients are finite, {twins.setting.precision}", _is_finite_padded(twins, n))
    except REFUSED as error:
        yield fact("padding_equal", "left padding", None, f"it refuses: {error}")


def _left(twins: Twins, n: int, shift: int = 0):
    """A mask (3, n) of rows of unequal length, padded on the left, and tokens for all places."""
    lengths = [n, max(1, n - 4 - shift), max(1, n // (3 + shift))]
    ids = twins.tokens.draw(3, n)
    mask = torch.stack([torch.arange(n) >= n - length for length in lengths]).long().to(ids.device)
    return mask, ids


def _one_pass(twins: Twins, model, ids, mask, what: str):
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    apart = 0.0
    for row in range(len(ids)):
        alone = twins.tokens(ids[row : row + 1, mask[row].bool()])[0]
        apart = max(apart, relative(logits[row, mask[row].bool()], alone, largest(alone)))
    return within("padding_equal", what, apart, TOLERANCE)


@torch.no_grad()
def _padded_left(twins: Twins, n: int):
    model = twins.exact
    mask, ids = _left(twins, n)
    yield _one_pass(twins, model, ids, mask, f"{n:,} tokens, float64")
    other, _ = _left(twins, n, shift=1)
    yield _one_pass(twins, model, ids, other, "as many tokens, other padding, float64")
    model.train()
    try:
        yield _one_pass(twins, model, ids, mask, "in training, float64")
    finally:
        model.eval()
    with loud(model):
        yield _one_pass(twins, model, ids, mask, "loud, float64")
    yield _behind(twins, ids, mask, (1, 4, 2), "tokens, then several at once, behind it, float64")


@torch.no_grad()
def _padded_elsewhere(twins: Twins, n: int):
    if n < 12:
        return
    ids, mask = twins.tokens.draw(3, n), torch.ones(3, n, dtype=torch.long)
    mask[1, n - 4 :] = mask[2, n // 3 :] = 0
    yield _told(_behind(twins, ids, mask.to(ids.device), (1, 1, 3), "behind padding on the right, float64"))
    mask[2, n // 3 :] = 1
    mask[0, 3 : n // 2] = mask[1] = 0
    mask[1, ::2] = 1
    try:
        yield _told(_one_pass(twins, twins.exact, ids, mask.to(ids.device), "padding within a row, float64"))
    except REFUSED as error:
        yield fact("padding_equal", "padding within a row", None, f"it refuses: {error}")


def _told(one):
    """No run pads so: what goes wrong there is told, and fails nothing."""
    if one.passed:
        return one
    return fact(one.check, one.what, None, f"it takes padding on the left alone: off by {one.largest or 0:.2g}")


def _behind(twins: Twins, ids, mask, sizes, what: str):
    """Tokens behind padded prompts, fed in pieces of `sizes`, beside the same texts without padding."""
    model, rows, most = twins.exact, len(ids), sum(sizes)
    new, cache, got = twins.tokens.draw(rows, most), model.new_cache(), []
    model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    for piece in new.split(sizes, dim=1):
        mask = torch.cat([mask, torch.ones_like(piece)], dim=1)
        got.append(model(piece, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
    got, apart = torch.cat(got, dim=1), 0.0
    for row in range(rows):
        text = torch.cat([ids[row, mask[row, : ids.shape[1]].bool()], new[row]])[None]
        alone = twins.tokens(text)[0]
        apart = max(apart, relative(got[row], alone[-most:], largest(alone)))
    return within("padding_equal", what, apart, TOLERANCE)


def _is_finite_padded(twins: Twins, n: int) -> bool:
    model, (mask, ids) = twins.plain, _left(twins, n)
    ids, mask = ids.to(twins.device), mask.to(twins.device)
    model.train()
    try:
        with torch.enable_grad(), twins.autocast():
            logits = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float()
        weights = [weight for layer in attentions(model) for weight in layer.parameters()]
        given = torch.autograd.grad(logits.square().mean(), weights, allow_unused=True)
    finally:
        model.eval()
    return all(gradient is None or bool(torch.isfinite(gradient).all()) for gradient in given)


@torch.no_grad()
def with_dropout(twins: Twins):
    """`training_equal`, of a run with dropout: it rests in evaluation, acts in training, and is all that differs."""
    s, what = twins.setting, "dropout"
    if not s.dropout:
        yield fact("training_equal", what, None, "the run has none")
        return
    ids = twins.tokens.draw(2, min(s.context, LONG))
    expected = twins.tokens(ids)
    barely = twins.build(1e-12).cpu().double()
    barely.load_state_dict(twins.exact.state_dict())
    barely = barely.to(ids.device)
    timed = twins.timed
    mine, given = twins.tokens_of(timed), ids.to(twins.device)
    try:
        apart = relative(Tokens(barely.train(), VOCABULARY, ids.device, use_cache=False)(ids), expected)
        yield within("training_equal", "dropout of 1e-12 in training, float64", apart, TOLERANCE)
        plain = twins.tokens_of(twins.plain)(given)
        yield within("training_equal", "dropout rests in evaluation", relative(mine(given), plain), 0.0)
        timed.train()
        hidden = twins.hidden(2, 64, twins.device, torch.float32)
        with twins.autocast():  # layer by layer: the rest of GPT-2 has dropout of its own
            acts = all(relative(layer(hidden)[0], layer(hidden)[0]) > 0 for layer in attentions(timed))
    except REFUSED as error:
        yield fact("training_equal", what, None, f"it refuses: {error}")
        return
    finally:
        timed.eval()
    yield fact("training_equal", "dropout acts in training", acts)


@torch.no_grad()
def cache_handled(twins: Twins):
    """`cached_equal`: a cache whose rows are reordered, repeated and chosen, that is cut, moved, or given room as what
    is timed, goes on as the text that is left; float64."""
    model, n = twins.exact, min(twins.setting.decoded, SHORT)
    if n < 12:
        return
    ids = twins.tokens.draw(3, n - 6)
    for what, (needed, handled) in HANDLED.items():
        lacks = [name for name in needed for layer in model.new_cache().layers if not hasattr(layer, name)]
        if lacks:
            yield fact("cached_equal", what, None, f"its cache has no {lacks[0]}")
            continue
        try:
            text, cache = handled(model, ids)
        except REFUSED as error:
            yield fact("cached_equal", what, None, f"it refuses: {error}")
            continue
        new = twins.tokens.draw(len(text), 3)
        got = [model(piece, past_key_values=cache, use_cache=True).logits for piece in new.split((1, 2), dim=1)]
        whole = twins.tokens(torch.cat([text, new], dim=1))
        apart = relative(torch.cat(got, dim=1), whole[:, -3:], largest(whole))
        yield within("cached_equal", f"{what}, float64", apart, TOLERANCE)


def _read(model, ids, cache=None):
    cache = model.new_cache() if cache is None else cache
    for piece in (ids[:, :-2], ids[:, -2:-1], ids[:, -1:]):
        model(piece.contiguous(), past_key_values=cache, use_cache=True)
    return cache


def _reordered(model, ids):
    cache, rows = _read(model, ids), torch.tensor([2, 0, 0], device=ids.device)
    cache.reorder_cache(rows)
    return ids[rows], cache


def _repeated_and_chosen(model, ids):
    cache = _read(model, ids)
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([1, 4], device=ids.device)
    cache.batch_select_indices(rows)
    return ids.repeat_interleave(2, dim=0)[rows], cache


def _cut(model, ids):
    if model._is_stateful:
        raise NotImplementedError("no token can be taken out of a state")
    cache = _read(model, ids[:, :-5])
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
    model(ids[:, -5:].contiguous(), past_key_values=cache, use_cache=True)
    cache.crop(-4)
    return ids[:, :-4], cache


def _offloaded(model, ids):
    return ids, _read(model, ids, model.new_cache(offloading=True))


def _roomy(model, ids):
    return ids, _read(model, ids, roomy_cache(model, ids.shape[1] + 3))


def _branched(model, ids):
    """A branch is read on with another text; what it came from must not see that."""
    cache = _read(model, ids, roomy_cache(model, ids.shape[1] + 3))
    branch = branched(cache)
    model(ids[:, :2].contiguous(), past_key_values=branch, use_cache=True)
    return ids, cache


HANDLED = {  # and the methods that a layer of the cache needs for it
    "rows reordered": (("reorder_cache",), _reordered),
    "rows repeated and chosen": (("batch_repeat_interleave", "batch_select_indices"), _repeated_and_chosen),
    "tokens taken back": (("crop",), _cut),
    "moved to the host and back": (("offload", "prefetch"), _offloaded),
    "with room, as decoding is timed": ((), _roomy),
    "behind a branch, as joules are counted": ((), _branched),
}


@torch.no_grad()
def of_state(twins: Twins):
    """`repeatable`: weights that are saved and loaded into another model give the same, and a pass draws nothing."""
    tokens, model = twins.tokens, twins.exact
    ids = tokens.draw(2, min(twins.setting.context, LONG))
    expected = tokens(ids)
    other = twins.build_another().double()
    with contextlib.suppress(RuntimeError):  # of names that are missing: what follows differs
        other.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    other = other.to(ids.device).eval()
    apart = relative(Tokens(other, VOCABULARY, ids.device, use_cache=False)(ids), expected)
    yield within("repeatable", "its saved weights in another model, float64", apart, TOLERANCE)
    torch.rand(1)  # or a pass that sets the generator would find it as it left it
    before = torch.get_rng_state()
    tokens(ids)
    yield fact("repeatable", "evaluation draws no random number", torch.equal(before, torch.get_rng_state()))
