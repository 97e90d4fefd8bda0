"""Reports from other projects' trackers, tried on every variant: docs/transformers.md says what came out of each."""

import pytest
import torch
from surface import CONFIG, NEW, OPTIONS, close, ids_of, lively
from transformers.cache_utils import DynamicCache

from lib import attention
from lib.model import GPT2, build_model, gpt2_config

pytestmark = pytest.mark.parametrize("name", attention.variants())


def fresh(name):
    return build_model(name, CONFIG, seed=1, **OPTIONS.get(name, {}))


def padded(*lengths, seed=0):
    """Rows of these lengths, their ids, padding before them and the mask."""
    rows = [ids_of(1, n, seed=seed + k) for k, n in enumerate(lengths)]
    T = max(lengths)
    mask = torch.tensor([[0] * (T - n) + [1] * n for n in lengths])
    return rows, torch.cat([torch.cat([ids_of(1, T - row.shape[1], seed=9), row], dim=1) for row in rows]), mask


def test_padding_is_masked_in_a_batch_of_one(name):
    """huggingface/transformers#46773: it was only masked where a batch has two rows."""
    model, ids = lively(name), ids_of(1, 11)
    mask = (torch.arange(11) >= 4).long()[None]
    close(model(ids, attention_mask=mask).logits[:, 4:], model(ids[:, 4:]).logits)
    tokens = model.generate(ids, attention_mask=mask, **NEW)[:, 11:]
    assert torch.equal(tokens, model.generate(ids[:, 4:], **NEW)[:, 7:])


def test_padding_in_the_middle_of_a_conversation_is_masked(name):
    """huggingface/transformers#18104, #47086: a second batch of turns, padded before, behind a cache of the first."""
    model = lively(name)
    first, ids, mask = padded(3, 9)
    second, more, mask_of_more = padded(6, 2, seed=2)
    cache = model.new_cache()
    model(ids, attention_mask=mask, past_key_values=cache)
    given = {"attention_mask": torch.cat([mask, mask_of_more], dim=1), "past_key_values": cache}
    got = model(more, **given).logits
    for row in range(2):
        n = second[row].shape[1]
        close(got[row, -n:], model(torch.cat([first[row], second[row]], dim=1)).logits[0, -n:])


def test_an_assistant_drafts_beyond_its_window(name):
    """huggingface/transformers#48280: from the second token of a burst on, keys and mask were of two lengths."""
    model, ids = lively(name), ids_of(1, 15)  # three windows
    if model._is_stateful:
        with pytest.raises(ValueError, match="one of another kind"):
            lively("sdpa", seed=2).generate(ids, assistant_model=model, **NEW)
        return
    main = lively("sdpa", seed=2)
    for model.generation_config.num_assistant_tokens in (2, 7):
        got = main.generate(ids, assistant_model=model, **(NEW | {"max_new_tokens": 30}))
        assert torch.equal(got, main.generate(ids, **(NEW | {"max_new_tokens": 30})))


def test_every_beam_keeps_its_own_cache(name):
    """huggingface/transformers#46612, #29730: the caches of Mamba and others were silently not reordered."""
    model, (_, ids, mask) = lively(name), padded(5, 9)
    options = NEW | {"num_beams": 4, "num_return_sequences": 4, "attention_mask": mask}
    got = model.generate(ids, **options)
    assert torch.equal(got, model.generate(ids, **options, use_cache=False))
    assert len({tuple(row) for row in got.tolist()}) == 8


def test_generation_goes_on_from_one_embedded_token(name):
    """huggingface/transformers#41863, #27174: of one token it gave nonsense, without a cache an error."""
    model = lively(name)
    for T in (1, 6):
        ids = ids_of(1, T)
        embedded = model.get_input_embeddings()(ids)
        expected = model.generate(ids, **NEW)[:, T:]
        for options in ({}, {"use_cache": False}):
            got = model.generate(inputs_embeds=embedded, attention_mask=torch.ones(1, T), **NEW, **options)
            assert torch.equal(got, expected)


def test_embeddings_are_read_piece_by_piece_into_one_cache(name):
    """huggingface/transformers#35707: progressive generation, each time with more embeddings than the cache holds."""
    model, ids, cache = lively(name), ids_of(1, 13), DynamicCache()
    embedded = model.get_input_embeddings()(ids)
    for T in (4, 9, 13):
        mask = torch.ones(1, T)
        got = model.generate(
            inputs_embeds=embedded[:, :T], attention_mask=mask, past_key_values=cache, **(NEW | {"max_new_tokens": 1})
        )
        assert got.item() == model(ids[:, :T]).logits[0, -1].argmax()
        assert cache.get_seq_length() == T


def test_a_row_that_sees_only_padding_is_finite_and_so_are_gradients(name):
    """unslothai/unsloth#9848, pytorch/pytorch#103749: NaN from a query without a key spread through the row."""
    model, (rows, ids, mask) = fresh(name).train(), padded(2, 9)
    mask[1] = 0  # a row that is padding alone, as the last batch of a data set may be filled up
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 7] = -100  # the first token: padding would predict it
    out = model(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    torch.testing.assert_close(out.loss, model(rows[0], labels=rows[0]).loss)


def test_a_vocabulary_that_grew_comes_back(name, tmp_path):
    """unslothai/unsloth#237, huggingface/transformers#36092: sizes of saved and configured embeddings disagreed."""
    model, ids = fresh(name).eval(), ids_of(1, 9)
    before = model(ids).logits
    model.resize_token_embeddings(60)
    assert model.config.vocab_size == 60
    more = torch.cat([ids, torch.tensor([[59]])], dim=1)
    torch.testing.assert_close(model(ids).logits[..., :50], before)
    assert model(more, labels=more).loss.isfinite()
    model.save_pretrained(tmp_path)
    again = GPT2.from_pretrained(tmp_path)
    assert torch.equal(again(more).logits, model(more).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_comes_back_tied_or_not(name, tied, tmp_path):
    """huggingface/transformers#41038, #37031: loading tied what was saved apart, or lost the one that was saved."""
    config = gpt2_config(layers=1, width=32, heads=4, positions=64, vocabulary=50)
    config.tie_word_embeddings = tied
    model, ids = build_model(name, config, seed=1).eval(), ids_of(1, 9)
    model.lm_head.weight.data += 1
    model.save_pretrained(tmp_path)
    again = GPT2.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.transformer.wte.weight) == tied
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_cache_that_was_read_elsewhere_goes_on_at_its_own_position(name):
    """huggingface/transformers#47597: prompt and decoding apart, with a longer mask, put the token at a wrong place."""
    model, ids = lively(name), ids_of(1, 9)
    cache = model.new_cache()
    model(ids[:, :8], past_key_values=cache)
    for mask in (None, torch.ones(1, 9)):
        given = {} if mask is None else {"attention_mask": mask}
        cache_of_it = model.new_cache()
        model(ids[:, :8], past_key_values=cache_of_it)
        got = model(ids[:, 8:], past_key_values=cache_of_it, **given).logits
        close(got, model(ids).logits[:, 8:])
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 20\)"):  # of a prompt that was compressed
        model(ids[:, 8:], past_key_values=cache, attention_mask=torch.ones(1, 20))


def test_accumulation_divides_by_the_tokens_of_all_parts(name):
    """huggingface/transformers#35438: with `num_items_in_batch` the loss of two parts was twice the loss of one."""
    model, ids = fresh(name).double(), ids_of(4, 9)
    labels = ids.clone()
    labels[0, 3:] = labels[2, 5:] = -100
    n = (labels[:, 1:] != -100).sum()
    parts = [model(ids[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=n).loss for i in (0, 2)]
    torch.testing.assert_close(sum(parts), model(ids, labels=labels).loss)  # transformers' loss is in float32
