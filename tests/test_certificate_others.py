"""The certificate pointed at other people's attention: transformers' own modules and models, as they are."""

import json
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV2Config, GPT2Config, GPT2LMHeadModel, LlamaConfig, MistralConfig, ReformerConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from lib import attention
from lib.certificate import Setting, examine, variant
from lib.certificate import __main__ as command
from lib.certificate.others import examine_language_model, examine_module
from lib.errors import UsageError

OTHERS = Path(__file__).with_name("others.py")

C, H, T = 32, 4, 70


def lively(module):
    """Weights so large that attention is far from uniform."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return module.eval()


def band(length, window=None):
    """The additive mask of causal, perhaps windowed, attention: (1, 1, T, T)."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & (distance < (window or length))
    return torch.zeros(length, length, dtype=torch.float64).masked_fill(~visible, -torch.inf)[None, None]


def gpt2(causal=True):
    config = GPT2Config(n_embd=C, n_head=H, n_positions=T, n_layer=1)
    config._attn_implementation = "eager"
    layer = lively(GPT2Attention(config, layer_idx=0).double())
    return lambda x: layer(x, attention_mask=band(x.shape[1]) if causal else None)


def llama():
    config = LlamaConfig(hidden_size=C, num_attention_heads=H, num_key_value_heads=2, max_position_embeddings=T)
    config._attn_implementation = "eager"
    layer, rotary = lively(LlamaAttention(config, 0).double()), LlamaRotaryEmbedding(config)
    return lambda x: layer(x, rotary(x, torch.arange(x.shape[1])[None]), band(x.shape[1]))


def mistral(window=8):
    config = MistralConfig(
        hidden_size=C, num_attention_heads=H, num_key_value_heads=2, head_dim=8, sliding_window=window
    )
    config._attn_implementation = "eager"
    layer, rotary = lively(MistralAttention(config, 0).double()), LlamaRotaryEmbedding(config)
    return lambda x: layer(x, rotary(x, torch.arange(x.shape[1])[None]), band(x.shape[1], window))


def deepseek():
    config = DeepseekV2Config(
        hidden_size=C, num_attention_heads=H, num_key_value_heads=H, q_lora_rank=None, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=T,
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer, rotary = lively(DeepseekV2Attention(config, 0).double()), DeepseekV2RotaryEmbedding(config)
    return lambda x: layer(
        x, attention_mask=band(x.shape[1]), position_embeddings=rotary(x, torch.arange(x.shape[1])[None])
    )


def reformer():
    config = ReformerConfig(
        hidden_size=C, num_attention_heads=H, attention_head_size=8, lsh_attn_chunk_length=16, num_hashes=2,
        num_buckets=8, is_decoder=True, hash_seed=1, attn_layers=["lsh"], max_position_embeddings=4096,
        lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = lively(LSHSelfAttention(config, 0).double())

    def run(x):
        state = torch.get_rng_state()  # a hash seed makes it reset the global random state
        padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 16))  # it takes whole chunks only
        out = layer(padded).hidden_states[:, : x.shape[1]]
        torch.set_rng_state(state)
        return out

    return run


@pytest.mark.parametrize(("make", "receptive_field"), [(gpt2, T), (llama, T), (mistral, 8), (deepseek, T)])
def test_causal_modules_pass_with_the_receptive_field_that_they_claim(make, receptive_field):
    torch.manual_seed(1)
    said = examine(make(), torch.randn(1, T, C, dtype=torch.float64))
    assert said == {"causal": True, "prefix_equal": True, "mixes": True, "receptive_field": receptive_field}


def test_reformer_s_moving_chunk_borders_are_caught():
    """A later token moves the borders of the sorted chunks, and so what earlier tokens see."""
    torch.manual_seed(1)
    said = examine(reformer(), torch.randn(1, 128, C, dtype=torch.float64))
    assert not said["causal"] or not said["prefix_equal"]


def test_attention_without_a_mask_is_caught():
    torch.manual_seed(1)
    said = examine(gpt2(causal=False), torch.randn(1, T, C, dtype=torch.float64))
    assert said["causal"] is False and said["prefix_equal"] is False


def test_a_module_that_mixes_nothing_is_caught():
    said = examine(lively(torch.nn.Linear(C, C).double()), torch.randn(1, T, C, dtype=torch.float64))
    assert said == {"causal": True, "prefix_equal": True, "mixes": False, "receptive_field": 1}


def failed(measures):
    return {one.check for one in measures if one.passed is False}


KNOWN = {  # what transformers' own models fail, as shipped
    "gpt2": set(), "llama": set(), "mistral": set(), "mamba2": set(), "minimax": set(),
    "minimax_linear_first": {"cached_equal", "prefill_equal"},
    "deepseek_v32": {"prefix_equal", "cached_equal", "prefill_equal"},
    "reformer": {"causal", "prefix_equal"},
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_transformers_models_fail_what_they_are_known_to_fail(name):
    """docs/certificate.md has all of them, at 2,111 tokens."""
    model = command._named(OTHERS, name)
    assert failed(examine_language_model(model, 130, 2, torch.float32, torch.device("cpu"))) == KNOWN[name]


def chunked(mix, chunk):
    return lambda x: torch.cat([mix(part) for part in x.split(chunk, dim=1)], dim=1)


def with_mean(part):
    return part + 0.01 * part.mean(1, keepdim=True)


def with_summary(part):
    """The first tokens of a block read the last one's projection, as where a block is summarised for itself."""
    return part + 0.01 * torch.tanh(part[:, -1:])


def circular(part):
    """A long filter by FFT without padding: the end wraps round to the beginning."""
    spectrum = torch.fft.rfft(part, dim=1)
    decay = torch.exp(-torch.linspace(0, 3, part.shape[1], dtype=part.dtype))[:, None]
    return part + 0.01 * torch.fft.irfft(spectrum * torch.fft.rfft(decay, dim=0), n=part.shape[1], dim=1)


@pytest.mark.parametrize("chunk", [64, 256, 1000])
@pytest.mark.parametrize("leak", [with_mean, with_summary, circular])
def test_public_ideas_that_leak_are_caught_whatever_the_chunk(leak, chunk):
    def model(x):
        past = torch.cumsum(x, 1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return past + chunked(leak, chunk)(x) if x.shape[1] >= chunk else past  # shorter rows are right

    def right(x):
        return torch.cumsum(x, 1) / torch.arange(1, x.shape[1] + 1)[:, None] + x

    for module, expected in ((model, {"causal", "prefix_equal"}), (right, set())):
        found = examine_module(module, 4, 2111, 2, torch.float32, torch.device("cpu"))
        assert failed(found) == expected


MINE = """
import torch
from torch import nn

class Past(nn.Module):  # the mean of the past
    leak = 0.0

    def forward(self, x):
        past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return past + self.leak * x.flip(1)

class Leaks(Past):
    leak = 0.01

class Model(nn.Module):
    def __init__(self, mixer=Past):
        super().__init__()
        self.embedding, self.mixer, self.head = nn.Embedding(11, 4), mixer(), nn.Linear(4, 11)

    def forward(self, ids):
        return self.head(self.mixer(self.embedding(ids)))

def leaking():
    return Model(Leaks)

number = 3
eight = nn.Linear(8, 8)

class Listed(Past):
    def forward(self, x):
        return [super().forward(x)]

class Flat(Past):
    def forward(self, x):
        return x.mean(1)

class OneToken(Model):
    def forward(self, ids):
        return super().forward(ids)[..., :1]

class Leaves(Past):
    def forward(self, x):
        raise SystemExit(5)

class Frozen(Past):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)

class Signs(Past):
    def forward(self, x):
        return (super().forward(x) * 100).long()

class Chunked(Model):
    def forward(self, ids):
        return super().forward(ids).unflatten(1, (-1, 64)).flatten(1, 2)

def bare():
    return Model().__call__
"""
NO_CACHE = "    new_cache = None\n"
NUMPY = """
    def forward(self, hidden_states, *given, **named):
        return super().forward(hidden_states, *given, **named)[0].detach().numpy(), None
"""
LEAVES = "import sys\n\nsys.exit(5)\n"
MORE = """
from lib.attention.sdpa import Attention as Sdpa

class Attention(Sdpa):
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTENTION_STUDY_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def run(capsys, *words):
    device = () if "--device" in words else ("--device", "cpu")
    status = command.main([str(word) for word in (*words, *device)])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "words", "passes"),
    [
        ("Past", ("--width", 4), True), ("Leaks", ("--width", 4), False), ("Model", (), True), ("leaking", (), False),
        ("Past", ("--width", 4, "--dtype", "bf16"), True),
    ],
)  # fmt: skip
def test_the_command_examines_a_module_and_a_language_model_of_a_file(name, words, passes, mine, capsys):
    status, out, _ = run(capsys, f"{mine}:{name}", "--length", 90, *words)
    assert status == (0 if passes else 1)
    (line,) = [line for line in out.splitlines() if line.startswith("causal ")]
    assert line.split()[1] == ("yes" if passes else "NO")
    assert out.splitlines()[-1].split(": ")[-1].startswith("passed" if passes else "FAILED")
    assert "mistakes, not cheats" in out


@pytest.mark.parametrize(("name", "width"), [("Frozen", ("--width", 4)), ("Signs", ("--width", 4))])
def test_an_output_without_gradients_is_a_dash_with_its_reason_and_values_still_tell(name, width, mine, capsys):
    status, out, _ = run(capsys, f"{mine}:{name}", "--length", 90, "--json", *width)
    said = json.loads(out)
    assert status == 0 and said["passed"]
    gradients = [one for one in said["measures"] if "gradient by a later token" in one["what"]]
    assert gradients and all(one["passed"] is None and "has no gradient" in one["says"] for one in gradients)
    assert any(one["check"] == "causal" and one["passed"] for one in said["measures"])


def test_a_language_model_of_whole_chunks_only_is_examined(mine, capsys):
    status, out, err = run(capsys, f"{mine}:Chunked", "--length", 128)
    assert status == 1 and not err and "prefix_equal" in out  # it takes no prefix: that is what it is told


def test_a_setting_that_a_variant_refuses_is_told_as_that():
    setting = Setting(layers=1, width=8, heads=2, positions=12, context=10, dropout=0.1)
    measures = variant.examined("flash", {}, setting, ("causal", "rows_independent"))
    refused = [one for one in measures if one.passed is False]
    assert {one.what for one in refused} == {"it refuses this setting"}
    assert {one.says for one in refused} == {"PyTorch's flash kernel on the CPU has no dropout; use dropout 0"}
    with pytest.raises(UsageError, match="context of at least 2 tokens"):
        Setting(context=1)


def test_the_command_gives_every_measurement_as_json(mine, capsys):
    status, out, _ = run(capsys, f"{mine}:leaking", "--length", 90, "--json")
    said = json.loads(out)
    assert status == 1 and said["passed"] is False and said["tested"]["length"] == 90
    assert max(one["largest"] for one in said["measures"] if one["check"] == "causal") > 1e-3


def test_the_command_examines_a_folder_that_transformers_saved(tmp_path, capsys):
    config = GPT2Config(vocab_size=31, n_embd=16, n_head=2, n_layer=1, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "saved")
    status, out, _ = run(capsys, tmp_path / "saved", "--json")
    said = json.loads(out)
    assert status == 0 and {"cached_equal", "prefill_equal"} <= {one["check"] for one in said["measures"]}
    assert {one["what"] for one in said["measures"] if "64 tokens" in one["what"]}, "no more than it has positions for"


def test_the_command_examines_a_variant_at_a_profile_s_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ATTENTION_STUDY_CACHE", str(tmp_path / "cache"))
    profile = tmp_path / "small.yaml"
    profile.write_text(
        textwrap.dedent("""
        layers: 1
        width: 16
        heads: 2
        positions: 80
        context: 60
        batch_size: 2
        precision: fp32
        inference_contexts: [8]
        study: {blocks: 2}
        """)
    )
    status, out, _ = run(capsys, "sdpa", "--profile", profile, "--json")
    said = json.loads(out)
    assert status == 0 and (said["tested"]["width"], said["tested"]["longest"]) == (16, 80)
    wrong = tmp_path / "wrong.py"
    text = attention.find("sdpa").read_text()
    assert "is_causal=T > 1 and mask is None" in text
    wrong.write_text(text.replace("is_causal=T > 1 and mask is None", "is_causal=False"))
    status, out, _ = run(capsys, wrong, "--profile", profile)
    assert status == 1 and "FAILED" in out


@pytest.fixture
def odd(mine, tmp_path):
    """What may stand for a WHAT or a profile and is none, by the word that stands for it in a test's words."""
    listed, saved = tmp_path / "listed", tmp_path / "saved"
    for folder, config in (
        (tmp_path / "empty", None),
        (listed, "[1, 2]"),
        (saved, '{"model_type": "gpt2", "n_embd": "x"}'),
    ):
        folder.mkdir()
        if config:
            (folder / "config.json").write_text(config)
    texts = {
        "NUMPY": MORE + NUMPY, "NOCACHE": MORE + NO_CACHE, "LEAVES": LEAVES,
        "LEAVESLATER": MORE + "    def __init__(self, *given):\n        raise SystemExit(5)\n",
        "LIST": "[1, 2]", "MANY": "layers: many", "LAYER": "layer: 2", "FP8": "precision: fp8", "NONE": "batch_size: 0",
        "FIVE": "inference_contexts: 5", "MINEALONE": "attention: gqa", "LATIN": "label: \xe9",
    }  # fmt: skip
    found = {"MINE": mine, "EMPTY": tmp_path / "empty", "LISTED": listed, "SAVED": saved}
    for name, text in texts.items():
        found[name] = tmp_path / f"{name.lower()}.{'yaml' if ':' in text and 'class' not in text else 'py'}"
        found[name].write_bytes(text.encode("latin-1"))
    return found


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("MINE:Past",), "say its --width C"), (("MINE:number",), "cannot be built without arguments"),
        (("MINE:Pats",), "mine.py has no name 'Pats'; did you mean 'Past'?"),
        (("MINE:zzzz",), "no name 'zzzz'; it has: Past"), (("MINE:",), "no name ''; it has: Past"),
        (("gqa", "--options", "{kv_heads: a}"), "kv_heads must divide heads: 'a'"),
        (("NUMPY",), "must return ((B, T, C), None), not a tuple of 2: ndarray, NoneType"),
        (("nowhere.py:Past",), "there is no file"),
        (("no_variant",), "no_variant"), (("EMPTY",), "holds no model"), (("",), "name a variant, FILE.py"),
        (("LISTED",), "holds no model that can be loaded"), (("SAVED",), "holds no model that can be loaded"),
        (("NOCACHE",), "has no `new_cache()`"), (("LEAVES",), "cannot be loaded: SystemExit: 5"),
        (("LEAVESLATER",), "SystemExit: 5"), (("LEAVES:Attention",), "SystemExit: 5"),
        (("MINE:Leaves", "--width", 4), "ends the program (SystemExit: 5)"),
        (("sdpa", "--options", "{x: 1}"), "sdpa has no option 'x'"), (("sdpa", "--options", "[1"), "cannot be read"),
        (("sdpa", "--options", "7"), "holds names and values"),
        (("sdpa", "--options", "{1: 2}"), "a name must be text"),
        (("sliding_window", "--options", "{window: x}"), "option window must be int, not 'x'"),
        (("sdpa", "--profile", "nowhere.yaml"), "there is no profile nowhere.yaml"),
        (("sdpa", "--profile", "LIST"), "must be lines of `name: value`"),
        (("sdpa", "--profile", "LATIN"), "cannot be read"), (("sdpa", "--profile", "MANY"), "layers must be int"),
        (("sdpa", "--profile", "LAYER"), "no parameter 'layer'; did you mean 'layers'?"),
        (("sdpa", "--profile", "FP8"), "precision must be one of"),
        (("sdpa", "--profile", "NONE"), "batch_size must be at least 1, not 0"),
        (("sdpa", "--profile", "FIVE"), "inference_contexts must be list, not 5"),
        (("sdpa", "--profile", "MINEALONE"), "attention belongs to a run, not to a profile"),
        (("sdpa", "--width", 8), "takes --options and --profile, not --width"),
        (("sdpa", "--length", 8), "not --length"), (("EMPTY", "--width", 8), "not --width"),
        (("MINE:Past", "--options", "{}", "--width", 4), "not --options"),
        (("MINE:Past", "--length", 2), "3 tokens at the least"),
        (("MINE:eight", "--width", 9), "takes no (B, T, 9), RuntimeError: mat1 and mat2"),
        (("MINE:eight", "--width", 0), "1 or more, not 0"), (("MINE:eight", "--width", -3), "1 or more, not -3"),
        (("MINE:Listed", "--width", 8), "the module gives a list for"),
        (("MINE:Flat", "--width", 8), "the module gives (3, 8) for"), (("MINE:OneToken",), "one logit for a token"),
        (("MINE:bare",), "it is no nn.Module"),
    ],
)  # fmt: skip
def test_what_cannot_be_examined_is_one_sentence_and_status_2(words, says, odd, capsys):
    head, *rest = [str(word).partition(":") for word in words]
    words = ["".join((str(odd.get(first, first)), *more)) for first, *more in (head, *rest)]
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "") and says in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("what", ["sdpa", "MINE:Past"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_one_sentence(what, mine, capsys):
    status, out, err = run(capsys, what.replace("MINE", str(mine)), "--device", "cuda")
    assert (status, out) == (2, "") and "PyTorch finds no CUDA device here" in err
