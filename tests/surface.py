"""What of transformers' surface a variant supports: every cell of the table in docs/transformers.md, run.

`python tests/surface.py --write` runs all and writes the table; tests/test_transformers.py holds each cell.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers.cache_utils import DynamicCache

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib import attention
from lib.model import GPT2, build_model, gpt2_config
from lib.paths import ROOT

PAGE = ROOT / "docs" / "transformers.md"
BEGIN, END = "<!-- the table, written by tests/surface.py -->", "<!-- end of the table -->"
# Small enough that the sequences below cross every border.
OPTIONS = {
    "sliding_window": {"window": 5}, "sinks": {"window": 5}, "linear": {"chunk": 4}, "retention": {"chunk": 4},
    "lsh": {"chunk_length": 4}, "gated_deltanet": {"chunk": 8}, "mamba2": {"chunk": 4, "state": 8}, "kda": {"chunk": 8},
    "moba": {"block_length": 2},
}  # fmt: skip
CONFIG = gpt2_config(layers=2, width=32, heads=4, positions=64, vocabulary=50)
NEW = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}


def lively(name, seed=4, config=CONFIG, **options):
    """In float64, with weights so large that greedy decoding wanders instead of repeating one token."""
    model = build_model(name, config, seed=seed, **(OPTIONS.get(name, {}) | options)).double().eval()
    for parameter in model.parameters():
        parameter.data *= 12 if parameter.dim() >= 2 else 1
    return model


def ids_of(*shape, seed=0):
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(seed))


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def same_tokens(model, expected_options, **options):
    ids = ids_of(1, 9)
    torch.manual_seed(0)
    got = model.generate(ids, **(NEW | options))
    torch.manual_seed(0)
    expected = model.generate(ids, **(NEW | expected_options))
    assert torch.equal(got, expected) and got[:, 9:].unique().numel() > 1


def greedy(model):
    same_tokens(model, {"use_cache": False})


def sampling(model):
    same_tokens(model, {"do_sample": True, "use_cache": False}, do_sample=True)


def beams(model):
    same_tokens(model, {"num_beams": 3, "use_cache": False}, num_beams=3)


def prompt_lookup(model):
    ids = ids_of(1, 4).repeat(1, 4)  # something to look up
    expected = model.generate(ids, **NEW, use_cache=False)
    assert torch.equal(model.generate(ids, **NEW, prompt_lookup_num_tokens=3), expected)


def assisted(model):
    same_tokens(model, {"use_cache": False}, assistant_model=lively("baseline", seed=2))


def assists(model):
    main, ids = lively("baseline", seed=2), ids_of(1, 9)
    assert torch.equal(main.generate(ids, **NEW, assistant_model=model), main.generate(ids, **NEW))


def chunked_prefill(model):
    same_tokens(model, {"use_cache": False}, prefill_chunk_size=4)


def left_padding(model):
    short, long = ids_of(1, 5), ids_of(1, 9, seed=1)
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1), long])
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    logits = model(padded, attention_mask=mask).logits
    tokens = model.generate(padded, attention_mask=mask, **NEW)[:, 9:]
    for row, ids in enumerate((short, long)):
        close(logits[row, -ids.shape[1] :], model(ids).logits[0])
        assert torch.equal(tokens[row], model.generate(ids, **NEW, use_cache=False)[0, ids.shape[1] :])


def right_padding_with_cache(model):
    """Prompts of two lengths, filled up behind; then each goes on where it ended."""
    short, long, more = ids_of(1, 7), ids_of(1, 11, seed=1), ids_of(2, 3, seed=2)
    prompt = torch.cat([torch.cat([short, torch.zeros(1, 4, dtype=torch.long)], dim=1), long])
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, 7:11] = 0
    cache = model.new_cache()
    out = [model(prompt, attention_mask=mask[:, :11], past_key_values=cache).logits]
    for t in range(3):
        given = {"attention_mask": mask[:, : 12 + t], "past_key_values": cache}
        out.append(model(more[:, t : t + 1], **given).logits)
    out = torch.cat(out, dim=1)
    close(out[0, torch.arange(14)[mask[0] == 1]], model(torch.cat([short, more[:1]], dim=1)).logits[0])
    close(out[1], model(torch.cat([long, more[1:]], dim=1)).logits[0])


def packed_documents(model):
    """Said in each of the ways that transformers' callers have."""
    lengths = (6, 1, 9, 5)
    ids = ids_of(1, sum(lengths))
    alone = torch.cat([model(one, use_cache=False).logits for one in ids.split(lengths, dim=1)], dim=1)
    seq_idx = torch.cat([torch.full((1, n), index) for index, n in enumerate(lengths)], dim=1)
    positions = torch.cat([torch.arange(n)[None] for n in lengths], dim=1)
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    square = ((seq_idx[:, :, None] == seq_idx[:, None]) & torch.ones(21, 21).tril().bool())[:, None]
    added = torch.zeros(square.shape, dtype=torch.float64).masked_fill(~square, torch.finfo(torch.float64).min)
    flash = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 9, "max_length_k": 9}
    for said in (
        {"seq_idx": seq_idx},
        {"position_ids": positions},
        {"position_ids": positions, **flash},
        {"attention_mask": square, "position_ids": positions},
        {"attention_mask": added},
    ):
        close(model(ids, **said).logits, alone)


def static_cache(model):
    same_tokens(model, {"use_cache": False}, cache_implementation="static")


def offloaded_cache(model):
    same_tokens(model, {"use_cache": False}, cache_implementation="offloaded")


def take_back(model):
    """Tokens that were read are taken out of the cache again, as transformers' assisted decoding does it."""
    ids = ids_of(2, 12)
    cache = model.new_cache()
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 9
    close(model(ids[:, 9:], past_key_values=cache).logits, model(ids).logits[:, 9:])


def reset(model):
    ids, cache = ids_of(2, 12), model.new_cache()
    model(ids, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    close(model(ids, past_key_values=cache).logits, model(ids).logits)


def choose_rows(model):
    """A cache's rows are repeated, chosen from and put in another order."""
    ids, more, cache = ids_of(2, 12), ids_of(3, 2, seed=1), model.new_cache()
    model(ids, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    rows = torch.cat([ids[[1, 0, 0]], more], dim=1)
    close(model(more, past_key_values=cache).logits, model(rows).logits[:, 12:])


def dynamic_cache(model):
    """A cache of transformers' own, empty, as callers make one; it then keeps the whole contract."""
    ids = ids_of(2, 12)
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        for _ in range(2):
            model(ids[:, :7], past_key_values=cache)
            close(model(ids[:, 7:], past_key_values=cache).logits, model(ids).logits[:, 7:])
            cache.reset()
            assert isinstance(cache, DynamicCache) and cache.get_seq_length() == 0


def inputs_embeds(model):
    ids = ids_of(1, 9)
    embedded = model.get_input_embeddings()(ids)
    close(model(inputs_embeds=embedded).logits, model(ids).logits)
    assert torch.equal(model.generate(inputs_embeds=embedded, **NEW), model.generate(ids, **NEW)[:, 9:])


def compiled(model):
    """The loss and the gradients of a layer in training; no kernel is built."""
    torch._dynamo.reset()
    model.transformer.h = model.transformer.h[:1]
    ids, weights = ids_of(2, 61), list(model.train().parameters())

    def trained(whole):
        loss = whole(ids, labels=ids, use_cache=False, num_items_in_batch=torch.tensor(ids.numel())).loss
        return [loss, *torch.autograd.grad(loss, weights)]

    for got, expected in zip(
        trained(torch.compile(model, fullgraph=True, backend="aot_eager")), trained(model), strict=True
    ):
        close(got, expected)


def checkpointing(model):
    ids = ids_of(2, 13)
    model = lively(model.config.attention).train()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [weight.grad for weight in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for got, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(got, expected)


def save_and_load(model):
    ids = ids_of(2, 12)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is GPT2 and loaded.config.attention == model.config.attention
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def gpt2_s_weights(model):
    """A plain GPT-2 folder gives its weights to the variant, all of them, or is refused."""
    ids = ids_of(2, 12)
    theirs = GPT2LMHeadModel(CONFIG).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = GPT2.from_pretrained(folder, attention=model.config.attention)
    expected = build_model(model.config.attention, CONFIG).eval()
    expected.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(ids).logits, expected(ids).logits)


def attention_weights(model):
    assert model(ids_of(1, 9), output_attentions=True).attentions[0] is not None


CELLS = {
    "greedy decoding": greedy,
    "sampling": sampling,
    "beams": beams,
    "prompt lookup": prompt_lookup,
    "assisted": assisted,
    "as the assistant": assists,
    "chunked prefill": chunked_prefill,
    "left padding": left_padding,
    "right padding, with a cache": right_padding_with_cache,
    "packed documents": packed_documents,
    "`inputs_embeds`": inputs_embeds,
    "an empty `DynamicCache`": dynamic_cache,
    "static cache": static_cache,
    "offloaded cache": offloaded_cache,
    "tokens taken back (`crop`)": take_back,
    "`reset`": reset,
    "rows repeated, chosen, reordered": choose_rows,
    "`torch.compile`, one graph": compiled,
    "gradient checkpointing": checkpointing,
    "save, and load by `AutoModelForCausalLM`": save_and_load,
    "GPT-2's own weights": gpt2_s_weights,
    "`output_attentions`": attention_weights,
}


def outcome(name: str, cell: str) -> str:
    """What came of it: "yes" and the right value, or "refused" in one sentence; anything else is raised."""
    try:
        CELLS[cell](lively(name))
    except ValueError as error:
        assert "\n" not in str(error)
        return "refused"
    return "yes"


def table(outcomes: dict[tuple[str, str], str]) -> str:
    names = attention.variants()
    lines = [f"| | {' | '.join(f'`{name}`' for name in names)} |", f"| --- |{' --- |' * len(names)}"]
    return "\n".join(lines + [f"| {cell} | {' | '.join(outcomes[name, cell] for name in names)} |" for cell in CELLS])


def documented() -> dict[tuple[str, str], str]:
    """The cells of the page's table, by variant and row."""
    rows = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    head, *rows = [[part.strip() for part in row.strip("|").split("|")] for row in rows if "---" not in row]
    names = [name.strip("`") for name in head[1:]]
    return {(name, row[0]): said for row in rows for name, said in zip(names, row[1:], strict=True)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = table({(name, cell): outcome(name, cell) for name in attention.variants() for cell in CELLS})
    if "--write" in sys.argv:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{found}\n{END}{rest.partition(END)[2]}")
    print(found)
