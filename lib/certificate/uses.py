"""What is asked of the ways in which a model is used: packed rows, padding of every kind, dropout, a cache that is cut,
reordered, moved or given room, weights that are saved. All against the same text read plainly.
"""

import contextlib

import torch

from lib import attention
from lib.certificate.examinations import slope_off
from lib.certificate.measures import TOLERANCE, deviation, fact, largest, relative, within
from lib.certificate.probes import Tokens
from lib.certificate.twins import VOCABULARY, Twins, attentions, loud
from lib.model import build_model
from lib.model.caches import branched, roomy_cache
from lib.model.llama import rotary

REFUSED = (ValueError, NotImplementedError)  # with which a variant says that it cannot
TINY = 1e-12  # of the largest gradient: what a sum that cancels leaves
SHORT, LONG, PACKED = 140, 200, 420  # tokens of a text whose cache is handled, of a padded row, of a packed one
ROUNDED = {"fp32": 1e-4, "bf16": 0.1}  # root mean square that rounding may cost a whole model


def _packings(n: int) -> list[list[int]]:
    """Lengths of documents in three rows of n tokens: borders on and off chunks' ends, the fewest in the first row."""
    rows = ([min(64, n // 2)], [1, n // 5, 3, n // 4], [n // 3, n // 3])
    return [_filled(row, n) for row in rows]


def _filled(lengths: list[int], n: int) -> list[int]:
    found = []
    for length in (*lengths, n):
        length = min(length, n - sum(found))
        found += [length] * (length > 0)
    return found


def with_documents(twins: Twins):
    """`documents_equal`: each document of a packed row is what it is alone, in values and slopes, and has no slope by
    another; of rows that are read one after another, loud, and in the run's precision too."""
    model, n = twins.exact, min(twins.setting.longest, max(PACKED, 3 * twins.longest_option))
    if not model.keeps_documents:
        yield fact("documents_equal", "packed rows", None, "its forward names no seq_idx, so such rows are refused")
        return
    ids, packings = twins.tokens.draw(3, n), _packings(n)
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in packings]
    seq_idx = torch.stack(rows).to(ids.device)
    try:
        yield from _packed(twins, ids, seq_idx, packings)
    except REFUSED as error:
        yield fact("documents_equal", "packed rows", None, f"it refuses: {error}")
        return
    finally:
        model.eval()
    yield within(
        "documents_equal", "gradient by another document, training, float64", _leaks(twins, ids, seq_idx), TINY
    )
    few = _packings(min(n, LONG))[1]
    of = torch.repeat_interleave(torch.arange(len(few)), torch.tensor(few)).to(ids.device)
    parts = [(ids[:1, part], part) for part in torch.arange(len(of), device=ids.device).split(few)]
    apart = _slopes_apart(twins, {"input_ids": ids[:1, : len(of)], "seq_idx": of[None]}, slice(None), parts)
    yield within("documents_equal", f"gradients of a row of {len(of):,} tokens, training, float64", apart, TOLERANCE)


@torch.no_grad()
def _packed(twins: Twins, ids, seq_idx, packings):
    model, n = twins.exact, ids.shape[1]
    few = [0, 2]  # rows that are read again

    def alone(rows):
        places = ((row, part) for row in rows for part in torch.arange(n, device=ids.device).split(packings[row]))
        return [(row, part, model(ids[row : row + 1, part], use_cache=False).logits[0]) for row, part in places]

    def apart(packed, expected, rows):
        top = largest(packed)
        return max(relative(packed[rows.index(row), part], one, top) for row, part, one in expected)

    every, expected = [0, 1, 2], alone([0, 1, 2])
    packed = model(ids, seq_idx=seq_idx, use_cache=False).logits
    off = apart(packed, expected, every)
    turned = model(ids.roll(1, 0), seq_idx=seq_idx.roll(1, 0), use_cache=False).logits  # as long, packed otherwise
    off = max(off, apart(turned.roll(-1, 0), expected, every))
    model.train()
    off = max(off, apart(model(ids, seq_idx=seq_idx, use_cache=False).logits, expected, every))
    model.eval()
    yield within("documents_equal", f"3 rows of {n:,} tokens, float64", off, TOLERANCE)
    with loud(model):
        off = apart(model(ids[few], seq_idx=seq_idx[few], use_cache=False).logits, alone(few), few)
    yield within("documents_equal", "loud, float64", off, TOLERANCE)
    yield _in_the_run_s("documents_equal", "packed rows", twins, packed, ids, seq_idx=seq_idx)


def _in_the_run_s(check: str, what: str, twins: Twins, expected, ids, real=slice(None), **given):
    """How far the timed model is from `expected` in its own precision, beside how far it is from float64 plainly."""
    given = {name: value.to(twins.device) for name, value in given.items()}
    with twins.autocast():
        mine, plainly = (twins.plain(ids.to(twins.device), use_cache=False, **more).logits for more in (given, {}))
    rounding = deviation(plainly.cpu(), twins.exact(ids, use_cache=False).logits.cpu())
    off = deviation(mine.cpu()[real], expected.cpu()[real])
    return within(check, f"{what}, {twins.setting.precision}", off, 3 * rounding + ROUNDED[twins.setting.precision])


def _slopes_apart(twins: Twins, given: dict, real, parts) -> float:
    """How far gradients by the attentions' weights are, of a batch and of its texts alone, from each other, over the
    largest; in training. `real` are the batch's tokens that count, in the order in which `parts` hold the texts: ids
    (1, T) and their places among those of the batch."""
    model = twins.exact.train()
    weights = [weight for layer in attentions(model) for weight in layer.parameters()]
    generator = torch.Generator().manual_seed(2)
    try:
        with torch.enable_grad():
            out = model(**given, use_cache=False).logits
            out = out[0] if real == slice(None) else out[real]
            towards = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
            losses = [(out * towards).sum()]
            alone = [model(ids, use_cache=False).logits[0] for ids, _ in parts]
            losses.append(sum((one * towards[place]).sum() for one, (_, place) in zip(alone, parts, strict=True)))
            mine, theirs = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in losses)
    finally:
        model.eval()
    flat = [
        torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(found, weights, strict=True)])
        for found in (mine, theirs)
    ]
    return relative(*flat)


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
        yield _slopes_of_padded(twins, n)
        yield fact("padding_equal", f"gradients are finite, {twins.setting.precision}", _is_finite_padded(twins, n))
    except REFUSED as error:
        yield fact("padding_equal", "left padding", None, f"it refuses: {error}")


def _left(twins: Twins, n: int, shift: int = 0):
    """A mask (3, n) of rows of unequal length, padded on the left, and tokens for all places; with a `shift` no row is
    whole."""
    lengths = [max(1, n - 2 * shift), max(1, n - 4 - shift), max(1, n // (3 + shift))]
    ids = twins.tokens.draw(3, n)
    mask = torch.stack([torch.arange(n) >= n - length for length in lengths]).long().to(ids.device)
    return mask, ids


def _slopes_of_padded(twins: Twins, n: int):
    mask, ids = _left(twins, n)
    real, places, begin = mask.bool(), [], 0
    for row, kept in enumerate(real):
        count = int(kept.sum())
        places.append((ids[row : row + 1, kept], slice(begin, begin + count)))
        begin += count
    apart = _slopes_apart(twins, {"input_ids": ids, "attention_mask": mask}, real, places)
    return within("padding_equal", f"gradients of {n:,} tokens, training, float64", apart, TOLERANCE)


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
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    yield _in_the_run_s("padding_equal", "padded rows", twins, expected, ids, mask.bool().cpu(), attention_mask=mask)
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
    """`training_equal`, `gradients`, of a run with dropout: it rests in evaluation, acts in training, each kind alone
    and on average as if it were not there, and is all that differs; gradients are of the numbers that it left."""
    s, what = twins.setting, "dropout"
    if not s.dropout:
        yield fact("training_equal", what, None, "the run has none")
        return
    ids = twins.tokens.draw(2, min(s.context, LONG))
    expected = twins.tokens(ids)
    barely = twins.build(1e-12).cpu().double()
    barely.load_state_dict(twins.exact.state_dict())
    barely = barely.to(ids.device)
    mine, given = twins.tokens_of(twins.timed), ids.to(twins.device)
    try:
        apart = relative(Tokens(barely.train(), VOCABULARY, ids.device, use_cache=False)(ids), expected)
        yield within("training_equal", "dropout of 1e-12 in training, float64", apart, TOLERANCE)
        plain = twins.tokens_of(twins.plain)(given)
        yield within("training_equal", "dropout rests in evaluation", relative(mine(given), plain), 0.0)
        yield _slope_of_one_draw(twins, ids[:1])
        for kind, named in (("attn_pdrop", "attention's"), ("resid_pdrop", "residual")):
            yield from _one_dropout(twins, kind, f"{named} dropout alone")
    except REFUSED as error:
        yield fact("training_equal", what, None, f"it refuses: {error}")


@torch.enable_grad()
def _slope_of_one_draw(twins: Twins, ids):
    model = twins.build(twins.setting.dropout).cpu().double()
    model.load_state_dict(twins.exact.state_dict())
    tokens = Tokens(model.to(ids.device).train(), VOCABULARY, ids.device, use_cache=False)

    def run():
        torch.manual_seed(twins.seed)
        return tokens(ids)

    what = f"slope along a drawn direction, one draw of dropout, {ids.shape[1]} tokens, training, float64"
    return within("gradients", what, *slope_off(model, run))


def _one_dropout(twins: Twins, kind: str, what: str):
    """Of layers with one kind of dropout: whether it acts, by row, and what it is on average over many draws."""
    p, config = twins.setting.dropout, twins.config()
    setattr(config, kind, p)
    model = build_model(twins.name, config, twins.seed, **twins.options).to(twins.device)
    model.load_state_dict(twins.plain.state_dict())
    hidden = twins.hidden(1, 48, twins.device, torch.float32).repeat(16, 1, 1)  # rows alike
    acts, by_row, off = [], [], 0.0
    must = [  # where as_gpt2 says so there are weights of a query, which sum up linearly
        kind == "resid_pdrop" or hasattr(twins.parts[twins.name_at(index)][0], "as_gpt2")
        for index in range(twins.setting.layers)
    ]
    with twins.autocast():
        for layer, is_linear in zip(attentions(model), must, strict=True):
            plain, drawn = layer.eval()(hidden)[0].double(), layer.train()(hidden)[0].double()
            acts.append(relative(drawn, plain) > 1e-3)
            by_row.append(relative(drawn[0], drawn[1]) > 1e-3)
            if is_linear:  # behind a norm an average is not what is without
                off = max(off, abs(((drawn * plain).sum() / plain.square().sum()).item() - 1))
    if not any(acts) and not any(must):
        yield fact("training_equal", what, None, "it acts on nothing: there may be no weights of a query")
        return
    as_said = all(one or not needed for one, needed in zip(acts, must, strict=True))
    yield fact("training_equal", f"{what} acts, in each row by itself", as_said and by_row == acts)
    if any(must):
        yield within("training_equal", f"{what}, on average off what is without", off, 0.7 * p)


@torch.no_grad()
def cache_handled(twins: Twins):
    """`cached_equal`: a cache whose rows are reordered, repeated and chosen, that is cut, emptied, moved, or given room
    as what is timed, goes on as the text that is left; padded on the left where the variant takes that; float64."""
    model, n = twins.exact, min(twins.setting.decoded, SHORT) - 6
    if n < 6:
        return
    mask, ids = _left(twins, n)
    try:
        model(ids, attention_mask=mask, use_cache=True)
    except REFUSED:
        mask = torch.ones_like(mask)
    new = twins.tokens.draw(3, 3)

    def read(cache=None, until=n, order=(0, 1, 2)):
        cache, order = model.new_cache() if cache is None else cache, list(order)
        for begin, end in ((0, until - 2), (until - 2, until - 1), (until - 1, until)):
            _go_on(model, ids[order, begin:end], mask[order, :end], cache)
        return cache

    def expected(row: int, until: int):
        text = torch.cat([ids[row, :until][mask[row, :until].bool()], new[row]])[None]
        return model(text, use_cache=False).logits[0, -3:]

    whole = [expected(row, n) for row in range(3)]
    for what, (needed, handled) in HANDLED.items():
        lacks = [name for name in needed for layer in model.new_cache().layers if not hasattr(layer, name)]
        if lacks:
            yield fact("cached_equal", what, None, f"its cache has no {lacks[0]}")
            continue
        try:
            rows, until, cache = handled(model, read, n)
        except REFUSED as error:
            refuses = isinstance(error, NotImplementedError) or what not in OFFERED
            said = "it refuses" if refuses else "the model offers this, and the cache refuses"
            yield fact("cached_equal", what, None if refuses else False, f"{said}: {error}")
            continue
        seen, got = mask[rows, :until], []
        for piece in new[rows].split((1, 2), dim=1):
            seen = torch.cat([seen, torch.ones_like(piece)], dim=1)
            got.append(_go_on(model, piece, seen, cache))
        got, apart = torch.cat(got, dim=1), 0.0
        for place, row in enumerate(rows):
            right = whole[row] if until == n else expected(row, until)
            apart = max(apart, relative(got[place], right))
        yield within("cached_equal", f"{what}, float64", apart, TOLERANCE)


def _go_on(model, ids, mask, cache):
    return model(ids.contiguous(), attention_mask=mask, past_key_values=cache, use_cache=True).logits


def _reordered(model, read, n, cache=None):
    cache, rows = read(cache), [2, 0, 0]
    cache.reorder_cache(torch.tensor(rows, device=model.device))
    return rows, n, cache


def _repeated_and_chosen(model, read, n):
    cache = read()
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 4], device=model.device))
    return [0, 2], n, cache


def _taken_back(model, read, n):
    if model._is_stateful:
        raise NotImplementedError("no token can be taken out of a state")
    cache = model.new_cache()
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
    read(cache).crop(-4)
    return [0, 1, 2], n - 4, cache


def _emptied(model, read, n):
    cache = read(order=(1, 2, 0))
    cache.reset()
    return [0, 1, 2], n, read(cache)


def _offloaded(model, read, n):
    return [0, 1, 2], n, read(model.new_cache(offloading=True))


def _roomy(model, read, n, room=3):
    return [0, 1, 2], n, read(roomy_cache(model, n + room))


def _beyond_its_room(model, read, n):
    return _roomy(model, read, n, room=1)


def _roomy_and_reordered(model, read, n):
    return _reordered(model, read, n, roomy_cache(model, n + 3))


def _branched(model, read, n):
    """A branch is read on with another text; what it came from must not see that."""
    cache = read(roomy_cache(model, n + 3))
    model(torch.ones(3, 2, dtype=torch.long, device=model.device), past_key_values=branched(cache), use_cache=True)
    return [0, 1, 2], n, cache


HANDLED = {  # and the methods that a layer of the cache needs for it
    "rows reordered": (("reorder_cache",), _reordered),
    "rows repeated and chosen": (("batch_repeat_interleave", "batch_select_indices"), _repeated_and_chosen),
    "tokens taken back": (("crop",), _taken_back),
    "emptied and read anew": (("reset",), _emptied),
    "moved to the host and back": (("offload", "prefetch"), _offloaded),
    "with room, as decoding is timed": ((), _roomy),
    "beyond its room": ((), _beyond_its_room),
    "with room, rows reordered": (("reorder_cache",), _roomy_and_reordered),
    "behind a branch, as joules are counted": ((), _branched),
}
OFFERED = ("tokens taken back", "emptied and read anew")  # by every model whose cache is not a state, and by every one


@torch.no_grad()
def of_positions(twins: Twins):
    """`reference`, in Llama's layers: of a layer that turns queries and keys the distance of tokens counts, and nothing
    else of where they stand; float64, the angles in fp32."""
    s, model = twins.setting, twins.exact
    if not model._rotates:
        return
    n = max(2, min(60, s.longest // 3))
    hidden, places = twins.hidden(1, n, twins.exact_device, torch.float64), torch.arange(n, device=twins.exact_device)
    for index, layer in twins.of_each_kind(attentions(model)).items():
        if not attention.rotates(layer):
            continue
        odd = places % 2  # every second token moved away from its neighbours, so that each one's own place counts
        here, shifted, *apart = (
            layer(hidden, position_embeddings=rotary(at[None], s.width // s.heads, hidden))[0]
            for at in (places, places + n, 3 * places, places + n * odd, places + n * (1 - odd))
        )
        what = twins.about(twins.name_at(index), f"layer {index}, {n} tokens: all positions shifted")
        yield within("reference", what, relative(shifted, here), 1e-4)
        moved = all(relative(one, here) > 1e-3 for one in apart)
        yield fact("reference", f"layer {index}: apart at other distances, tokens count otherwise", moved)


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
