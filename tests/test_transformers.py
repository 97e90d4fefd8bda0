"""What a caller of transformers may expect: each argument gives the right value, or one sentence and nothing runs."""

import contextlib
import inspect
import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from surface import CELLS, CONFIG, NEW, OPTIONS, PAGE, close, documented, ids_of, lively, outcome
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.loss.loss_utils import ForCausalLMLoss

from lib import attention
from lib.model import GPT2, build_model, gpt2_config, meta_model
from lib.model.arguments import Unsupported
from lib.model.gpt2 import HONOURED, mean_loss
from lib.paths import ROOT

SQUARE = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).tril().bool()[None, None]  # two documents
REPORTS = ROOT / "tests" / "test_reports.py"
PUBLISHED = [f"lib/published/{name}.py" for name in attention.STUDY_ORDER]
PATTERN = "sliding_window,linear"  # of two kinds of cache
every_variant = pytest.mark.parametrize("name", attention.variants())
every_cell = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A file written after an older sdpa.py: its forward names neither `seq_idx` nor `position_embeddings`."""
    source = attention.find("sdpa").read_text()
    older = source.replace(
        "seq_idx=None, position_embeddings=None, **_\n    ):\n",
        "**_\n    ):\n        seq_idx = position_embeddings = None\n",
    )
    assert older != source
    path = tmp_path_factory.mktemp("stranger") / "older.py"
    path.write_text(older)
    return str(path)


@pytest.fixture(scope="module", params=[*attention.variants(), "a file", PATTERN])
def name(request, stranger):
    return stranger if request.param == "a file" else request.param


@pytest.fixture(
    scope="module", params=[*attention.variants(), *PUBLISHED, "a file"], ids=lambda name: name.replace("/", ".")
)
def anybody(request, stranger):
    return stranger if request.param == "a file" else request.param


def fresh(name, **options):
    return build_model(name, CONFIG, seed=1, **(OPTIONS.get(name, {}) | options)).eval()


@cache
def small(name, **options):
    """One model for all tests that leave it as it is, in float64."""
    return fresh(name, **options).double()


# --- the table ---


@every_cell
@every_variant
def test_the_table_says_what_happens(name, cell):
    assert outcome(name, cell) == documented()[name, cell], "python tests/surface.py --write"


def test_the_page_lists_what_is_run_and_nothing_else():
    page = PAGE.read_text()
    assert set(documented()) == {(name, cell) for name in attention.variants() for cell in CELLS}
    tried, listed = (set(re.findall(r"#(\d{3,})", text)) for text in (REPORTS.read_text(), page))
    assert len(tried) >= 10 and tried == listed


def test_a_wrong_value_would_be_seen(monkeypatch):
    """The cells can fail: a mask that is dropped, documents that are not kept apart, a cache that is not cut."""
    faults = {
        "left padding": ("lib.model.arguments.read_mask", lambda *_: (None, None)),
        "packed documents": ("lib.attention.sdpa.visible_keys", lambda T, S, *_: torch.ones(T, S).tril().bool()),
        "tokens taken back (`crop`)": ("lib.model.caches.VariantCache.crop", lambda *_: None),
        "`reset`": ("lib.model.caches.VariantCache.reset", lambda self: [layer.reset() for layer in self.layers]),
        "static cache": ("lib.model.gpt2._check_cache", lambda *_: None),
    }
    for cell, (place, fault) in faults.items():
        with monkeypatch.context() as patch:
            patch.setattr(place, fault)
            if cell == "static cache":
                assert outcome("sdpa", cell) == "yes"  # not refused, and answered by the variant's own cache
            else:
                with pytest.raises(AssertionError):
                    outcome("sdpa", cell)


# --- padding and documents ---


def real_tokens(name, row, mask):
    """The logits of a row's real tokens, each row without its padding."""
    return small(name)(row[mask][None]).logits[0]


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_padding_stands_anywhere_and_comes_in_pieces(name, data):
    """Before, between and behind the tokens, in prefill and in decoding: each row gives what it gives without it."""
    T = data.draw(st.integers(2, 14), label="T")
    rows = st.lists(st.booleans(), min_size=T, max_size=T).filter(any)
    mask = torch.tensor([data.draw(rows, label="mask"), data.draw(rows, label="mask")])
    ids = ids_of(2, T)
    model = small(name)
    pieces = data.draw(st.lists(st.integers(1, 5), min_size=T, max_size=T), label="pieces")
    cache, done, parts = model.new_cache(), 0, []
    while done < T:
        piece = ids[:, done : done + pieces.pop()]
        done += piece.shape[1]
        parts.append(model(piece, attention_mask=mask[:, :done].long(), past_key_values=cache).logits)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    for got in (torch.cat(parts, dim=1), whole):
        assert got.isfinite().all()
        for row in range(2):
            close(got[row, mask[row]], real_tokens(name, ids[row], mask[row]))


def test_a_prompt_that_is_filled_up_goes_on_where_it_ended(name):
    """The row of the report, with the variant's own options."""
    model = build_model(name, CONFIG, seed=1).double().eval()
    cache = model.new_cache()
    model(torch.tensor([[11, 12, 13, 49, 49]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]]), past_key_values=cache)
    more = {"attention_mask": torch.tensor([[1, 1, 1, 0, 0, 1]]), "past_key_values": cache}
    close(model(torch.tensor([[14]]), **more).logits[0, -1], model(torch.tensor([[11, 12, 13, 14]])).logits[0, -1])


@pytest.mark.parametrize("new_cache", [GPT2.new_cache, lambda _: DynamicCache()], ids=["ours", "transformers'"])
@pytest.mark.parametrize("later", [[1, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1]])
def test_what_a_state_has_read_as_a_token_cannot_become_padding(name, later, new_cache):
    model, ids = small(name), torch.tensor([[11, 12, 13, 49, 49]])
    cache = new_cache(model)
    model(ids, past_key_values=cache)
    more = {"attention_mask": torch.tensor([later]), "past_key_values": cache}
    if model._keeps_every_key:  # transformers' way: the newest mask says what is hidden
        if later[0]:  # the tokens before it have not read it either: causality
            alone = model(torch.tensor([[11, 12, 13, 14]])).logits
            close(model(torch.tensor([[14]]), **more).logits, alone[:, -1:])
    else:
        with pytest.raises(Unsupported, match="unlike when they were read"):
            model(torch.tensor([[14]]), **more)


@pytest.mark.parametrize("mask", [None, [[1] * 6]])
def test_what_a_state_has_read_as_padding_cannot_become_a_token(name, mask):
    """Nor by a mask that is left out, which says that nothing is padding."""
    model, ids, cache = small(name), torch.tensor([[11, 12, 13, 49, 49]]), small(name).new_cache()
    model(ids, attention_mask=torch.tensor([[1, 1, 1, 0, 0]]), past_key_values=cache)
    more = {"attention_mask": mask and torch.tensor(mask), "past_key_values": cache}
    if model._keeps_every_key:  # transformers' way: the newest mask says what is hidden
        assert model(torch.tensor([[14]]), **more).logits.isfinite().all()
    else:
        with pytest.raises(Unsupported, match="unlike when they were read"):
            model(torch.tensor([[14]]), **more)
        assert cache.get_seq_length() == 5


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_each_document_of_a_row_is_as_if_alone(data):
    """Whatever their lengths, beside padding too, and their gradients."""
    name = data.draw(st.sampled_from(attention.variants()), label="variant")
    lengths = data.draw(st.lists(st.integers(1, 11), min_size=1, max_size=4), label="lengths")
    padding = data.draw(st.integers(0, 3), label="padding before")
    model, ids = small(name), ids_of(1, padding + sum(lengths))
    seq_idx = torch.cat([torch.full((1, n), 7 * k) for k, n in enumerate([padding + lengths[0], *lengths[1:]])], dim=1)
    mask = (torch.arange(ids.shape[1]) >= padding)[None]
    packed = model(ids, seq_idx=seq_idx, attention_mask=mask, use_cache=False).logits[:, padding:]
    alone = torch.cat([model(one).logits for one in ids[:, padding:].split(lengths, dim=1)], dim=1)
    close(packed, alone)
    for got, expected in zip(
        *(torch.autograd.grad(out.square().sum(), list(model.parameters())) for out in (packed, alone)), strict=True
    ):
        close(got, expected)


@every_variant
def test_transformers_own_collator_packs_what_is_honoured(name):
    lengths = (4, 1, 6)
    documents = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in ids_of(11).split(lengths)]
    model = small(name)
    for options in ({}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}):
        batch = DataCollatorWithFlattening(return_tensors="pt", **options)(documents)
        alone = [model(torch.tensor([one["input_ids"]])).logits[0] for one in documents]
        out = model(**batch)
        close(out.logits[0], torch.cat(alone))
        torch.testing.assert_close(out.loss, ForCausalLMLoss(torch.cat(alone), batch["labels"][0], 50))


def test_a_packed_row_is_refused_where_it_cannot_be_kept_apart(stranger):
    ids, seq_idx = ids_of(1, 6), torch.tensor([[0, 0, 0, 1, 1, 1]])
    square = (torch.ones(6, 6).tril().bool() & (seq_idx[0, :, None] == seq_idx[0]))[None, None]
    for one in (stranger, *(path for path in PUBLISHED if "baseline" not in path)):
        for said in (
            {"seq_idx": seq_idx},
            {"attention_mask": square},
            {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
        ):
            with pytest.raises(Unsupported, match="cannot keep the documents of a row apart"):
                small(one)(ids, use_cache=False, **said)


def test_a_packed_row_has_no_cache():
    model, ids, seq_idx = small("sdpa"), ids_of(1, 4), torch.tensor([[0, 0, 1, 1]])
    assert model(ids, seq_idx=seq_idx).past_key_values is None
    for asked in ({"use_cache": True}, {"past_key_values": model.new_cache()}):
        with pytest.raises(Unsupported, match="no cache to go on from"):
            model(ids, seq_idx=seq_idx, **asked)


def causal(*shape):
    return torch.ones(shape).tril(shape[-1] - shape[-2]).bool()


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(2, 7), r"attention_mask is \(2, 7\), but 2 rows of 0 cached and 6 new tokens need \(2, 6\)"),
        (torch.ones(3, 6), r"need \(2, 6\)"),
        (torch.ones(2, 6, 6), "not 3 dimensions"),
        ({"full_attention": None}, "not dict"),
        (torch.tensor([[1, 1, 1, 2, 2, 2]]), "tell documents apart by seq_idx"),
        (causal(2, 4, 6, 6), r"need \(2, 1, 6, 6\)"),
        (torch.ones(2, 1, 6, 6).bool(), "hides or shows other keys"),
        (causal(2, 1, 6, 6) & (torch.arange(6) != 2), None),  # a key that nobody sees is padding
        (causal(2, 1, 6, 6) & ~torch.eye(6).roll(2, 0).bool(), "hides or shows other keys"),
        (causal(2, 1, 6, 6) & torch.ones(6, 6).triu(-2).bool(), "hides or shows other keys"),  # a window
        (causal(2, 1, 6, 6).long(), "must be bool, or floats"),
        (torch.zeros(2, 1, 6, 6), "hides or shows other keys"),  # added to the scores, it hides nothing
        (torch.zeros(2, 1, 6, 6).masked_fill(~causal(6, 6), -1e4), "adds a bias to scores"),
        (torch.zeros(2, 1, 6, 6).masked_fill(~causal(6, 6), -torch.inf), None),
        (causal(1, 1, 6, 6), None),  # for all rows
    ],
)
def test_a_mask_is_honoured_or_said_in_one_sentence(mask, said):
    model, ids = small("sdpa"), ids_of(2, 6)
    if said is None:
        model(ids, attention_mask=mask)
        return
    with pytest.raises(Unsupported, match=said) as error:
        model(ids, attention_mask=mask)
    assert "\n" not in str(error.value)


@every_variant
def test_a_square_mask_may_hide_padding_behind_a_cache(name):
    model, ids = small(name), ids_of(1, 9)
    cache = model.new_cache()
    padded = causal(1, 1, 9, 9) & (torch.arange(9) >= 3)
    out = [model(ids[:, :5], attention_mask=padded[..., :5, :5], past_key_values=cache).logits]
    out.append(model(ids[:, 5:], attention_mask=padded[..., 5:, :], past_key_values=cache).logits)
    close(torch.cat(out, dim=1)[:, 3:], model(ids[:, 3:]).logits)
    with pytest.raises(Unsupported, match="without a cache"):
        model(
            ids[:, :2],
            attention_mask=causal(1, 1, 2, 11) & (torch.arange(11) != torch.tensor([[4], [5]])),
            past_key_values=cache,
        )


# --- caches ---


@every_variant
def test_a_cache_is_cut_or_says_that_it_cannot(name):
    """The row of the report: 12 tokens, the variant's own options, nothing recorded before."""
    model = build_model(name, CONFIG, seed=1).double().eval()
    ids, cache = ids_of(2, 12), model.new_cache()
    model(ids, past_key_values=cache)
    if model._is_stateful:
        with pytest.raises(ValueError, match="no token can be taken back"):
            cache.crop(-3)
    else:
        cache.crop(-3)
        assert cache.get_seq_length() == 9
        close(model(ids[:, 9:], past_key_values=cache).logits, model(ids).logits[:, 9:])
        cache.crop(-12)
        assert cache.get_seq_length() == 0
        close(model(ids, past_key_values=cache).logits, model(ids).logits)
    assert model.new_cache().crop(0) is None


@pytest.mark.parametrize("pattern", ["sdpa,retention", "lsh,linear", "moba,gated_deltanet", "gated,kda", "gqa,sinks"])
def test_where_one_layer_refuses_to_give_tokens_back_none_gives_any(pattern):
    model, ids = small(pattern, **({"window": 4} if "sinks" in pattern else {})), ids_of(2, 20)
    cache = model.new_cache()
    model(ids[:, :10], past_key_values=cache)
    with pytest.raises(ValueError):
        cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [10, 10]
    close(model(ids[:, 10:], past_key_values=cache).logits, model(ids).logits[:, 10:])


@pytest.mark.parametrize(
    ("name", "own", "other", "others"),
    [
        ("sinks", {"window": 0}, "sdpa", {}),
        ("sinks", {"window": 8}, "sliding_window", {"window": 8}),
        ("mamba2", {"conv": 4}, None, {"conv": 0}),
        ("gated", {"qk_norm": True}, None, {"qk_norm": False}),
    ],
)
def test_weights_that_a_variant_lacks_are_not_left_out_in_silence(name, own, other, others, tmp_path):
    build_model(name, CONFIG, **own).save_pretrained(tmp_path)
    asked = {"attention": other, "attention_options": others}
    with pytest.raises(Unsupported, match=r"are not those of '\w+' with these options, which has no .*attn") as error:
        GPT2.from_pretrained(tmp_path, **asked)
    assert "\n" not in str(error.value)
    loaded = GPT2.from_pretrained(tmp_path, **asked, ignore_mismatched_sizes=True)
    assert loaded.config.attention == (other or name)
    assert GPT2.from_pretrained(tmp_path).config.attention_options == own


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_the_causal_mask_that_older_gpt2_files_hold_is_no_weight(prefix, tmp_path):
    theirs = GPT2LMHeadModel(CONFIG).eval()
    theirs.save_pretrained(tmp_path)
    held = {prefix + key.removeprefix("transformer."): value for key, value in theirs.state_dict().items()}
    del held[f"{prefix}lm_head.weight"]
    for layer in range(2):
        held[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        held[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file({key: value.clone() for key, value in held.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    ids = ids_of(1, 9)
    torch.testing.assert_close(GPT2.from_pretrained(tmp_path, attention="sdpa").eval()(ids).logits, theirs(ids).logits)


def test_a_window_cannot_take_back_what_it_let_go_unless_it_is_told_before():
    model, ids = small("sliding_window", window=5), ids_of(1, 12)
    cache = model.new_cache()
    model(ids[:, :4], past_key_values=cache)
    cache.crop(-1)
    close(model(ids[:, 3:], past_key_values=cache).logits, model(ids).logits[:, 3:])
    with pytest.raises(ValueError, match=r"activate_past_recording\(\) before"):
        cache.crop(-3)
    cache.activate_past_recording()
    model(ids[:, :2], past_key_values=cache)
    cache.crop(-2)
    assert cache.get_seq_length() == 12 and cache.layers[0].keys.shape[2] == 4
    with pytest.raises(ValueError, match="has let go"):
        cache.crop(-1)


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_whatever_is_done_to_a_cache_its_rows_are_the_text_that_is_left(name, data):
    """With padding in the rows too, which a cache remembers of each."""
    model, vocabulary, padded = small(name), 50, data.draw(st.booleans(), label="padded")
    cache, rows = model.new_cache(), torch.zeros(2, 2, 0, dtype=torch.long)  # tokens, and which of them are no padding
    cache.activate_past_recording()

    def read(new, said):
        """Reads tokens and what of them is no padding, and sees that all are as without a cache."""
        nonlocal rows
        rows = torch.cat([rows, new], dim=2)
        text, mask = rows
        got = model(new[0], attention_mask=mask if said else None, past_key_values=cache).logits
        whole = model(text, attention_mask=mask if padded else None, use_cache=False).logits
        real = new[1].bool()
        close(got[real], whole[:, -new.shape[2] :][real])

    steps = ["read", "repeat", "select", "reorder", "reset", *(() if model._is_stateful else ("crop", "crop"))]
    for step in ["read", *data.draw(st.lists(st.sampled_from(steps), max_size=6), label="steps")]:
        B, T = rows.shape[1:]
        if step == "read" and T < 40:
            new = torch.randint(1, vocabulary, (B, recorded := data.draw(st.integers(1, 8), label="tokens")))
            mask = torch.ones_like(new)
            if padded:
                mask = torch.tensor([[data.draw(st.integers(0, 1)) for _ in range(recorded)] for _ in range(B)])
                mask[:, -1] = 1 if T == 0 else mask[:, -1]  # no row is padding alone
            read(torch.stack([new, mask]), said=padded)
        elif step == "crop":
            remove = data.draw(st.integers(0, recorded), label="remove")
            cache.crop(-remove)
            rows, recorded = rows[:, :, : T - remove], 0
        elif step == "repeat" and B <= 4:
            cache.batch_repeat_interleave(2)
            rows = rows.repeat_interleave(2, dim=1)
        elif step == "select":
            kept = torch.tensor(data.draw(st.lists(st.integers(0, B - 1), min_size=1, max_size=3)))
            cache.batch_select_indices(kept)
            rows = rows[:, kept]
        elif step == "reorder":
            order = torch.tensor(data.draw(st.permutations(range(B))))
            cache.reorder_cache(order)
            rows = rows[:, order]
        elif step == "reset":
            cache.reset()
            rows, recorded = rows[:, :, :0], 0
        assert cache.get_seq_length() == rows.shape[2]
    new = ids_of(rows.shape[1], 2)
    read(torch.stack([new, torch.ones_like(new)]), said=padded)


CHANGES = {"crop": [0, 1, 2], "reorder": [2, 0, 1], "repeat": [0, 0, 1, 1, 2, 2], "select": [2, 1], "none": [0, 1, 2]}


@pytest.mark.parametrize("change", CHANGES)
def test_padding_stays_with_the_rows_of_a_cache(change):
    """What the property above may miss in few examples: each change, with rows that differ in their padding. A window
    lets keys go, so what was padding when it was read still has to be."""
    model, ids, left = small("sliding_window", window=5), ids_of(3, 8), CHANGES[change]
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5, [1, 1, 0, 0, 1, 1, 1, 1]])
    cache = model.new_cache()
    cache.activate_past_recording()
    model(ids, attention_mask=mask, past_key_values=cache)
    if change == "crop":
        cache.crop(-2)
    elif change == "reorder":
        cache.reorder_cache(torch.tensor(left))
    elif change == "repeat":
        cache.batch_repeat_interleave(2)
    elif change == "select":
        cache.batch_select_indices(torch.tensor(left))
    ids, mask = (rows[left][:, : cache.get_seq_length()] for rows in (ids, mask))
    new = ids_of(len(left), 2, seed=1)
    whole = torch.cat([mask, torch.ones_like(new)], dim=1)
    for unlike in (None, torch.ones_like(whole)):
        with pytest.raises(Unsupported, match="unlike when they were read"):
            model(new, attention_mask=unlike, past_key_values=cache)
    got = model(new, attention_mask=whole, past_key_values=cache).logits
    for row in range(len(left)):
        alone = torch.cat([ids[row][mask[row].bool()], new[row]])[None]
        close(got[row], model(alone, use_cache=False).logits[0, -2:])


@every_variant
def test_an_offloaded_cache_is_on_the_device_only_while_its_block_computes(name, monkeypatch):
    model = fresh(name)
    cache, seen = model.new_cache(offloading=True), []
    for index, layer in enumerate(cache.layers):
        for what in ("prefetch", "offload"):
            monkeypatch.setattr(layer, what, lambda index=index, what=what: seen.append((what, index)))
        block = model.transformer.h[index]
        monkeypatch.setattr(block.mlp, "forward", lambda x, index=index: seen.append(("computes", index)) or x)
    model(ids_of(1, 4), past_key_values=cache)
    assert seen == [(what, index) for index in range(2) for what in ("prefetch", "computes", "offload")]
    seen.clear()
    model(ids_of(1, 4))
    assert seen == [("computes", 0), ("computes", 1)]


@every_variant
def test_offloading_takes_along_all_that_a_layer_holds(name, monkeypatch):
    model, ids = small(name), torch.cat([ids_of(2, 6), ids_of(2, 3)], dim=1)
    cache, moved = model.new_cache(), []
    model(ids, attention_mask=torch.tensor([[1] * 9, [0] * 4 + [1] * 5]), past_key_values=cache)
    layer = cache.layers[0]
    held = {key for key, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    place = {id(getattr(layer, key)): key for key in held}
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *_, **__: moved.append(place[id(x)]) or x)
    layer.offload()
    assert sorted(moved) == sorted(held)


def test_other_caches_are_refused_before_anything_runs(anybody, monkeypatch):
    model, ids = fresh(anybody), ids_of(1, 4)
    monkeypatch.setattr(model, "transformer", None)  # nothing could run
    for implementation in ("static", "offloaded_static", "sliding_window", "hybrid", "quantized", "paged"):
        with pytest.raises(Unsupported, match=f"'{implementation}' is not offered"):
            model.generate(ids, **NEW, cache_implementation=implementation)
        with pytest.raises(Unsupported, match="is not offered"):
            model.generate(ids, GenerationConfig(**NEW, cache_implementation=implementation))
    with pytest.raises(Unsupported, match="'paged' is not offered"):
        model.generate_batch([[1, 2, 3]])


def test_a_cache_of_other_layers_is_refused():
    model, ids = small("linear"), ids_of(1, 4)
    full = DynamicCache()
    GPT2LMHeadModel(CONFIG)(ids, past_key_values=full)
    for other in (full, StaticCache(config=CONFIG, max_cache_len=9), small("lsh").new_cache()):
        with pytest.raises(Unsupported, match=r"not 2 x StateLayer; use model.new_cache\(\)"):
            model(ids, past_key_values=other)
    with pytest.raises(Unsupported, match="must be a cache"):
        model(ids, past_key_values=((ids, ids),))
    with pytest.raises(Unsupported, match="this StaticCache holds 2 x StaticLayer"):
        small("sdpa").generate(ids, **NEW, past_key_values=StaticCache(config=CONFIG, max_cache_len=20))


@every_variant
def test_a_cache_goes_on_in_another_generate(name):
    model, ids = lively(name), ids_of(1, 9)
    cache = model.new_cache()
    first = model.generate(ids, **NEW, past_key_values=cache)
    longer = torch.cat([first, ids_of(1, 3, seed=3)], dim=1)
    assert torch.equal(
        model.generate(longer, **NEW, past_key_values=cache), model.generate(longer, **NEW, use_cache=False)
    )


# --- arguments ---


def test_forward_takes_transformers_arguments_in_transformers_order():
    theirs, ours = (list(inspect.signature(one.forward).parameters) for one in (GPT2LMHeadModel, GPT2))
    assert ours[: len(theirs) - 1] == theirs[:-1] and ours[-1] == theirs[-1] == "kwargs"


REFUSED = [
    ({"output_attentions": True}, "attention weights are not kept"),
    ({"head_mask": torch.ones(2, 4)}, "no argument 'head_mask'"),
    ({"cache_position": torch.arange(6)}, "no argument 'cache_position'"),
    ({"is_causal": True}, "no argument 'is_causal'"),
    ({"encoder_hidden_states": torch.ones(2, 3, 32)}, "no argument 'encoder_hidden_states'"),
    ({"encoder_attention_mask": torch.ones(2, 3)}, "no argument 'encoder_attention_mask'"),
    ({"inputs_embeds": torch.ones(2, 6, 32)}, "either input_ids or inputs_embeds"),
    ({"input_ids": None}, "either input_ids or inputs_embeds"),
    ({"position_ids": torch.arange(7)[None]}, "position_ids is"),
    ({"seq_idx": torch.zeros(2, 5)}, "seq_idx is"),
    ({"seq_idx": torch.zeros(2, 6), "attention_mask": SQUARE}, "not by both"),
    ({"cu_seq_lens_q": torch.tensor([0, 3, 6])}, "honoured for one row"),
    ({"shift_labels": torch.ones(2, 6).long()}, "beside labels"),
    ({"input_ids": ids_of(2, 65)}, "65 tokens are more than the model's 64 positions"),
]


def test_an_argument_that_is_not_honoured_is_said_in_one_sentence(anybody):
    model = small(anybody)
    for arguments, said in REFUSED:
        with pytest.raises(Unsupported, match=said) as error:
            model(**({"input_ids": ids_of(2, 6)} | arguments))
        assert "\n" not in str(error.value)


def test_generate_beyond_the_positions_is_said_in_one_sentence():
    with pytest.raises(Unsupported, match="65 tokens are more than the model's 64 positions"):
        small("sdpa").generate(ids_of(1, 60), max_new_tokens=10, do_sample=False, pad_token_id=0)
    padded, mask = ids_of(1, 64), (torch.arange(64) >= 30)[None].long()  # 34 tokens fill 34 positions
    assert small("sdpa").generate(padded, attention_mask=mask, **NEW).shape == (1, 72)


def test_what_transformers_gives_back_is_given_back():
    """`baseline` beside transformers' own model with its weights, by each argument that asks for more or for less."""
    theirs = GPT2LMHeadModel._from_config(CONFIG, attn_implementation="eager").eval()
    ours = build_model("baseline", CONFIG).eval()
    ours.load_state_dict(theirs.state_dict())
    ids, kinds = ids_of(2, 9), ids_of(2, 9, seed=1)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    for asked in (
        {"output_hidden_states": True}, {"token_type_ids": kinds}, {"logits_to_keep": 3}, {"return_dict": False},
        {"logits_to_keep": torch.tensor([1, 4])}, {"labels": ids, "shift_labels": shifted}, {"use_cache": False},
        {"labels": ids, "num_items_in_batch": 7}, {"labels": ids, "ignore_index": 5},
        {"position_ids": torch.arange(9)[None] + 3},
    ):  # fmt: skip
        got, expected = ours(ids, **asked), theirs(ids, **asked)
        if "return_dict" in asked:
            assert isinstance(got, tuple) and len(got) == len(expected)
            got, expected = {"logits": got[0]}, {"logits": expected[0]}
        assert set(got) == set(expected), asked
        torch.testing.assert_close(got["logits"], expected["logits"])
        for name in {"loss", "hidden_states"} & set(expected):
            torch.testing.assert_close(got[name], expected[name], msg=f"{asked} {name}")


def test_attn_implementation_is_refused_not_ignored(tmp_path):
    model = fresh("sdpa")
    model.save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="is not honoured"):
        model.set_attn_implementation("eager")
    for load in (GPT2.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(Unsupported, match="name a variant by attention="):
            load(tmp_path, attn_implementation="eager")


def test_a_config_that_changes_attention_is_refused(anybody):
    for option, value in HONOURED.items():
        config = GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=50, **{option: not value})
        with pytest.raises(Unsupported, match=f"{option} is .* only {value} is honoured"):
            build_model(anybody, config)


def test_gradient_checkpointing_in_training_refuses_a_cache():
    model, ids = fresh("sdpa").train(), ids_of(1, 5)
    model.gradient_checkpointing_enable()
    for asked in ({"use_cache": True}, {"past_key_values": model.new_cache()}):
        with pytest.raises(Unsupported, match="keeps no cache"):
            model(ids, **asked)


# --- training ---


@pytest.mark.parametrize("heads", [1, 2])
def test_one_head_and_a_length_off_every_grid_trains_and_decodes(anybody, heads):
    """A view of what is not contiguous is refused by GPT-2's projections."""
    if heads == 1 and anybody in ("lib/published/gqa.py", "differential"):
        pytest.skip("it has its eight heads, or an even number of them")
    model = build_model(anybody, gpt2_config(1, 32, heads, 256, 50)).train()
    ids = ids_of(2, 200)
    model(ids, labels=ids).loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    model.eval()
    cache = model.new_cache()
    for piece in ids.split([131, 1, 5, 63], dim=1):
        model(piece, past_key_values=cache)


def test_a_row_without_a_label_counts_nothing_in_the_mean(anybody):
    model = fresh(anybody).train()
    one, rows = ids_of(1, 1), ids_of(2, 6)
    loss = model(one, labels=one).loss
    loss.backward()
    assert loss == 0 and all(weight.grad is None or not weight.grad.any() for weight in model.parameters())
    labels = rows.clone()
    labels[1] = -100
    if anybody != "lib/published/lsh.py":  # which draws other buckets each time
        torch.testing.assert_close(model(rows, labels=labels).loss, model(rows[:1], labels=rows[:1]).loss)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_loss_is_transformers_where_there_is_a_label(data):
    labels = torch.tensor([data.draw(st.lists(st.sampled_from([-100, 3, 7]), min_size=2, max_size=6))])
    logits = torch.randn(1, labels.shape[1], 9)
    count = data.draw(st.sampled_from([None, 4, torch.tensor(5)]))
    expected = ForCausalLMLoss(logits, labels, 9, count)
    got = mean_loss(logits, labels, 9, count)
    assert torch.equal(got, expected) or (expected.isnan() and got == 0)


# --- folders ---


def test_a_variant_s_folder_loads_as_itself_or_not_at_all(tmp_path):
    """Not as a softmax GPT-2 with the same names of weights: its type is its own."""
    fresh("linear").save_pretrained(tmp_path)
    assert '"model_type": "gpt2"' not in (tmp_path / "config.json").read_text()
    again = GPT2.from_pretrained(tmp_path)
    assert again.config.attention_options == {"chunk": 4} and again.transformer.h[0].attn.chunk == 4
    other = GPT2.from_pretrained(tmp_path, attention="sdpa")  # because the caller says so
    assert other.config.attention == "sdpa" and other.config.attention_options == {}
    assert GPT2.from_pretrained(tmp_path, attention_options={"chunk": 8}).transformer.h[0].attn.chunk == 8


@pytest.mark.parametrize("path", [*PUBLISHED, "a file"])
def test_a_model_of_a_file_comes_back_where_the_file_is_named(path, stranger, tmp_path):
    path = stranger if path == "a file" else path
    model = fresh(path)
    model.save_pretrained(tmp_path)
    again = GPT2.from_pretrained(tmp_path, attention=path)
    assert [weight.dtype for weight in again.parameters()] == [weight.dtype for weight in model.parameters()]
    for got, expected in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_no_way_of_loading_runs_a_file_that_the_caller_did_not_name(tmp_path):
    trap = tmp_path / "trap.py"
    source = attention.find("sdpa").read_text()
    trap.write_text(source)
    fresh(str(trap)).save_pretrained(tmp_path / "saved")
    trap.write_text(f"raise SystemExit('it ran')\n{source}")
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert config.attention == str(trap)
    ways = {
        "from_pretrained": lambda: GPT2.from_pretrained(tmp_path / "saved"),
        "a subfolder": lambda: GPT2.from_pretrained(tmp_path, subfolder="saved"),
        "its config": lambda: GPT2.from_pretrained(tmp_path / "saved", config=config),
        "the auto class": lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
        "the auto class, named": lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attention=str(trap)),
        "from_config": lambda: AutoModelForCausalLM.from_config(config),
        "the class": lambda: GPT2(config),
    }
    for way, load in ways.items():
        with pytest.raises(Unsupported, match="pass attention=<that file>"):
            pytest.fail(f"{way} gave {load()}")


def test_gpt2_s_weights_in_another_shape_are_refused_or_start_anew(tmp_path):
    theirs = GPT2LMHeadModel(CONFIG)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="this config names no attention"):
        GPT2.from_pretrained(tmp_path)
    with pytest.raises(
        Unsupported, match=r"not those of 'gqa', which has transformer.h.0.attn.c_attn.bias and 3 others"
    ):
        GPT2.from_pretrained(tmp_path, attention="gqa")


@pytest.mark.parametrize("name", attention.variants())
def test_what_of_an_attention_no_file_holds_is_as_in_a_new_model(tmp_path, name):
    theirs = GPT2LMHeadModel(CONFIG)
    theirs.save_pretrained(tmp_path)
    with uninitialised_memory():
        torch.manual_seed(5)
        anew = GPT2.from_pretrained(tmp_path, attention=name, ignore_mismatched_sizes=True)
    assert torch.equal(anew.transformer.wte.weight, theirs.transformer.wte.weight)
    held, (new, other) = theirs.state_dict(), (build_model(name, CONFIG, seed).state_dict() for seed in (5, 6))
    for key, value in anew.state_dict().items():
        assert torch.isfinite(value).all(), key
        if key in held and held[key].shape == value.shape:
            assert torch.equal(value, held[key]), key
        elif "weight" in key or torch.equal(new[key], other[key]):  # what a module draws itself is of any seed
            assert torch.equal(value, new[key]), key


def test_a_buffer_that_is_not_saved_is_as_it_was_made(tmp_path):
    source, made_here = attention.find("sdpa").read_text(), "super().__init__()"
    path = tmp_path / "mine.py"
    path.write_text(source.replace(made_here, f"{made_here}; self.register_buffer('table', torch.arange(9.0), False)"))
    made = build_model(str(path), CONFIG)
    made.save_pretrained(tmp_path / "model")
    with uninitialised_memory():
        loaded = GPT2.from_pretrained(tmp_path / "model", attention=str(path))
    assert loaded.transformer.h[0].attn.table.tolist() == list(range(9))


@contextlib.contextmanager
def uninitialised_memory():
    """What `torch.empty` gives is nan, as it may be anything."""
    torch.use_deterministic_algorithms(True)  # with fill_uninitialized_memory, its default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(Unsupported, match="a model of type 'llama'"):
        GPT2.from_pretrained(tmp_path, attention="sdpa")


def test_a_count_without_weights_is_of_the_same_model():
    assert meta_model("mla", CONFIG).config.to_dict() == fresh("mla").config.to_dict()
