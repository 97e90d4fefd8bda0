"""The trained model as a folder: loaded by transformers, it stops, chats as it was trained, and names its record."""

import json
from types import SimpleNamespace

import pytest
import torch
from make import TINY, make_record
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib import attention, parameters
from lib.data import conversations, corpus
from lib.errors import UsageError
from lib.measure import assemble, saved
from lib.model import build_model, gpt2_config, meta_model
from lib.model.gpt2 import GPT2
from lib.study import plan

TALK = [
    conversations.Turn("system", "Be\nbrief."),
    conversations.Turn("user", "2 + 2?"),
    conversations.Turn("assistant", "4"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.builtin_tokenizer()


def saved_to(folder, tokenizer, turns="roles", **config):
    p = SimpleNamespace(
        save_model=str(folder), tokenizer="builtin", turns=turns, positions=64, attention="gqa", options={}
    )
    made = build_model("gqa", gpt2_config(1, 32, 4, 64, len(tokenizer), **config), seed=1)
    return made, assemble.save_model(made, p, make_record("gqa"))


def test_a_saved_model_is_loaded_with_tokenizer_end_token_and_the_record_s_name(tmp_path, tokenizer):
    folder = tmp_path / "model"
    made, said = saved_to(folder, tokenizer, position_embedding="none")
    assert said == f"model saved to {folder}"
    model, found = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, GPT2) and model.config.position_embedding == "none"
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids).logits, made.eval()(ids).logits)
    end = found.convert_tokens_to_ids(corpus.END_OF_TEXT)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == found.eos_token_id == end
    assert json.loads((folder / parameters.SAVED).read_text())["record"] == make_record("gqa").name
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(found)))  # whatever it has learned, now it says the end
    model.lm_head.bias.data[end] = 1e4
    assert model.generate(ids, max_new_tokens=9, do_sample=False)[0, 12:].tolist() == [end]


@pytest.mark.parametrize("turns", ["roles", "joined"])
def test_the_chat_template_gives_the_tokens_that_were_trained_on(tmp_path, tokenizer, turns):
    saved_to(tmp_path / "model", tokenizer, turns)
    found = AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [turn._asdict() for turn in TALK]
    text, _ = conversations.as_text(TALK, turns)
    assert found.apply_chat_template(messages, tokenize=False) == text
    got = found.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert got == corpus._encode(tokenizer, [text])[0]
    asked = found.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked) and (turns == "joined" or asked.endswith("<|assistant|>\n"))


def test_nothing_is_saved_where_nothing_is_asked_for_and_nothing_else_is_replaced(tmp_path, tokenizer, monkeypatch):
    assert saved.save_model(None, SimpleNamespace(save_model=""), None) is None
    saved_to(tmp_path / "model", tokenizer)
    parameters.check_folder(str(tmp_path / "model"), make_record("gqa").name)
    parameters.check_folder(str(tmp_path / "new"), "whatever")
    with pytest.raises(UsageError, match="holds something else already; name an empty folder"):
        parameters.check_folder(str(tmp_path / "model"), "another")
    (tmp_path / "file").write_text("")
    for name in ("file", "file/of-a-run"):  # a study's runs have folders of their own below it
        with pytest.raises(UsageError, match=r"^save_model: file is a file; name a folder$"):
            parameters.check_folder(str(tmp_path / name), "another")
    with pytest.raises(UsageError, match=r"cannot be saved to .*; its record is written"):
        saved_to(tmp_path / "file" / "below", tokenizer)


def test_where_a_model_is_kept_neither_names_a_run_nor_sets_it_apart_and_a_study_s_runs_have_folders_of_their_own():
    plain, kept = (plan.runs_of(TINY | more, ["sdpa", "gqa"], 2) for more in ({}, {"save_model": "models"}))
    for of in (parameters.run_name, parameters.setting):
        assert [of(run["values"]) for run in plain] == [of(run["values"]) for run in kept]
    assert [run["given"]["save_model"] for run in kept] == [
        f"models/{parameters.run_name(run['values'])}" for run in kept
    ]
    none, learned = (
        plan.runs_of(TINY | {"position_embedding": of}, ["sdpa"], 1)[0]["values"] for of in ("none", "learned")
    )
    assert parameters.setting(learned) == parameters.setting(plain[0]["values"]) != parameters.setting(none)
    before = {name: value for name, value in learned.items() if name not in ("position_embedding", "save_model")}
    assert parameters.run_name(before) == parameters.run_name(learned)  # of the records from before there were these


@pytest.mark.parametrize("name", attention.variants())
def test_without_an_embedding_of_positions_only_the_attention_knows_the_order(name):
    sizes = (2, 32, 4, 64, 50)
    with_them, without = (meta_model(name, gpt2_config(*sizes, position_embedding=of)) for of in ("learned", "none"))
    counted = [sum(weight.numel() for weight in model.parameters()) for model in (with_them, without)]
    assert counted[0] - counted[1] == 64 * 32
    model = build_model(name, gpt2_config(*sizes, position_embedding="none")).eval()
    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))
    shifted = model(ids, position_ids=torch.arange(5, 25)[None].expand(2, 20)).logits
    torch.testing.assert_close(shifted, model(ids, position_ids=torch.arange(20)[None].expand(2, 20)).logits)
    new = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(new, expected)


def test_sequences_beyond_the_positions_are_one_sentence():
    model = build_model("sdpa", gpt2_config(1, 32, 4, 16, 50))
    for run in (
        lambda: model(torch.zeros(1, 17, dtype=torch.long)),
        lambda: model.generate(torch.zeros(1, 15, dtype=torch.long), max_new_tokens=5),
    ):
        with pytest.raises(UsageError, match="17 tokens are more than the model's 16 positions; give fewer"):
            run()
