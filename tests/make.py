"""What several tests make: records, a tiny profile, a variant of one's own, a full disk."""

import contextlib
import json
import shutil
import time
from threading import Thread

import psutil

from lib import attention, parameters, record
from lib.certificate import Setting, variant
from lib.data import cache, conversations, corpus
from lib.study import plan

METRICS = {
    "time_s": 20.0, "time_per_epoch_s": 10.0, "non_padding_tokens_per_s": 5e3,
    "energy_j": 4e3, "energy_per_non_padding_token_j": 0.04, "mean_power_w": 200.0, "idle_power_w": 80.0,
    "net_energy_j": 2400.0, "gpu_utilization_percent": 90.0, "gpu_busy_fraction": 0.99, "mfu": 0.3,
    "cpu_energy_j": None, "cpu_time_s": 18.0, "cpu_cores_used": 0.9, "disk_bytes": 0.0,
    "peak_memory_bytes": 2e9, "peak_reserved_memory_bytes": 3e9, "peak_resident_bytes": None,
    "forward_flops_causal": 7e8, "forward_flops_full": 8e8, "forward_flops_counted": 8e8,
    "attention_core_share": 0.09, "causal_flops_per_s": 7e10, "train_loss": 5.1, "validation_loss": 5.0,
    "prefill_latency_s": 0.01, "decode_latency_s_per_token": 0.002, "cache_bytes": 1e6, "parameters": 1000,
    "checkpoint_bytes": 4000.0,
}  # fmt: skip
PARAMETERS = {
    "attention": "sdpa", "options": {}, "label": "", "seed": 0, "layers": 2, "width": 32, "heads": 2, "positions": 64,
    "context": 16, "steps_per_epoch": 2, "epochs": 2, "batch_size": 4, "accumulation": 1, "dataset": "builtin",
    "dataset_revision": "", "tokenizer": "builtin", "precision": "auto", "compile": False,
}  # fmt: skip
CERTIFICATE = {
    "causal": True, "prefix_equal": True, "mixes": True, "receptive_field": 9, "cached_equal": True,
    "gpt2_projection": True, "gpt2_initialisation": True, "reference_difference": 0.0,
    "reference_gradient_difference": 0.0, "parameters_vs_baseline": 1.0, "memory_growth": 1.0, "flops_growth": 2.0,
    "passed": True,
}  # fmt: skip


def places(labels, blocks) -> dict[tuple[str, int], int]:
    """Where each of a study's runs stands in its block: (label, block) to position, as `lib.study.plan` orders them."""
    others, found = [label for label in labels if label != attention.CONTROL], {}
    for block, order in enumerate(plan.orders(len(others), blocks)):
        names = [others[which] for which in order]
        if attention.CONTROL in labels:
            names.insert(block % len(labels), attention.CONTROL)
        found |= {(name, block): position for position, name in enumerate(names)}
    return found


def parameters_of(label, block=0, session="s1", setting="0" * 8, series=None) -> dict:
    """Parameters of a run that is called `label`. What is no variant of ours is a file, `mine.py`, with that label."""
    is_ours, is_control = label in attention.variants(), label == attention.CONTROL
    named = {"attention": label if is_ours else attention.REFERENCE if is_control else "mine.py"}
    values = PARAMETERS | named | {"label": "" if is_ours else label, "seed": block}
    if session not in ("s1", None):  # in one folder, where names are all that tells two sessions' runs apart
        values["options"] = {"session": session}
    if setting != "0" * 8:
        values["dataset_revision"] = setting
    if series:
        epochs = len(series["epoch_time_s"])
        values |= {"epochs": epochs, "steps_per_epoch": len(series["train_loss"]) // epochs}
    return values


def make_record(
    label="sdpa", block=0, session="s1", certified=True, setting="0" * 8, position=0, validation=None, **changes
) -> record.Record:
    """A record whose metrics are `METRICS` with `changes`; what is None has a reason.

    Name, label, attention and setting are those of its parameters: `run_parameters`, or those of a run called `label`,
    of which runs with another `setting` have other ones.
    """
    metrics = METRICS | {name: value for name, value in changes.items() if name in METRICS}
    others = {name: value for name, value in changes.items() if name not in METRICS}
    reasons = {"cpu_energy_j": "rapl_unavailable", "peak_resident_bytes": "gpu_run"}
    latency = {"prefill_latency_s": 0.01, "decode_latency_s_per_token": 0.002}
    latency |= {"cache_bytes": 10, "cache_bytes_analytic": 10, "prefill_energy_j": None}
    latency |= {"decode_energy_j_per_token": None, "energy_null_reason": "not_asked_for"}
    end = {"non_padding_tokens": 256, "loss": metrics["validation_loss"]}
    values = others.pop("run_parameters", None) or parameters_of(label, block, session, setting, others.get("series"))
    fields = {
        "name": parameters.run_name(values),
        "finished_at": record.now(),
        "label": parameters.display_name(values),
        "title": parameters.display_name(values),
        "attention": values["attention"],
        "attention_sha256": "0" * 64,
        "paper": "a paper",
        "setting": parameters.setting(values),
        "parameters": values,
        "study": {"session": session, "block": block, "position": position} if session else {},
        "environment": {"device": "cuda", "device_name": "a GPU", "gpu": {"uuid": "GPU-1"}},
        "data": {},
        "certificate": CERTIFICATE | {"causal": certified, "passed": certified},
        "kernels": {"forward": ["k"], "backward": ["k"]},
        "metrics": metrics,
        "series": {
            "train_loss": [6.0, 5.5, 5.2, 5.0], "non_padding_tokens": [64, 128, 192, 256],
            "validation": validation or [{"non_padding_tokens": 0, "loss": 6.0}, end], "epoch_time_s": [10.0, 10.0],
            "epoch_energy_j": [], "log": [{"step": 4, "time_s": 20.0, "energy_j": metrics["energy_j"]}],
            "power_time_s": [10.0], "power_w": [200.0],
            "inference": [{"context": context} | latency for context in (8, 16)], "phases": [], "slope": None,
        },
        "null_reasons": {name: reasons.get(name, "no_gpu") for name, value in metrics.items() if value is None},
        "gpu_states": [], "checks": [], "flags": [],
    }  # fmt: skip
    return record.Record.model_validate(fields | others)


def record_of(run, **changes) -> record.Record:
    """A record of a planned run, its series as long as the run would be."""
    values = run["values"]
    steps, epochs = values["steps_per_epoch"] * values["epochs"], values["epochs"]
    series = make_record().series.model_dump() | {"train_loss": [5.0] * steps, "epoch_time_s": [10.0] * epochs}
    series["non_padding_tokens"] = list(range(1, steps + 1))
    return make_record(block=run["block"], **{"run_parameters": values, "series": series} | changes)


def write_blocks(folder, labels=("baseline", "sdpa", "sdpa_again"), blocks=1, **changes):
    for (label, block), position in places(labels, blocks).items():
        record.write(make_record(label, block, position=position, **changes), folder)


def fails(path, options, check):
    """Whether a certificate's check fails for a variant's file, by the examinations that have a say in it."""
    found = variant.examined(str(path), options, Setting(), checks=(check,))
    return any(one.passed is False and one.check == check for one in found)


def learning(end=5.0, validations=8, tokens=256):
    """Validations that fall from 8 to `end`, of repeated bigrams too."""
    points = [(tokens * n // validations, end + (8 - end) * (1 - n / validations) ** 2) for n in range(validations + 1)]
    return [
        {"non_padding_tokens": seen, "loss": loss, "repeated_bigram_loss": loss - 1, "other_loss": loss + 0.5}
        for seen, loss in points
    ]


def fill(disk):
    """Leaves no byte free on a `small_disk`."""
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)


TINY = {
    "layers": 1, "width": 32, "heads": 2, "positions": 64, "context": 16, "batch_size": 2, "steps_per_epoch": 3,
    "epochs": 2, "validation_sequences": 4, "inference_contexts": [4, 16], "new_tokens": 4, "inference_repeats": 2,
}  # fmt: skip
NINTH = """
\"\"\"Each token sees itself and the one before: a ninth variant, written after reading sdpa.py.\"\"\"
import torch
from torch import nn
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D


class Attention(nn.Module):
    paper = "nobody, never"

    def __init__(self, config, layer_idx, weight=0.5):
        super().__init__()
        self.layer_idx, self.weight = layer_idx, weight
        self.c_attn, self.c_proj = Conv1D(config.n_embd, config.n_embd), Conv1D(config.n_embd, config.n_embd)

    def forward(self, hidden_states, past_key_values=None, padding_mask=None, **_):
        v, T = self.c_attn(hidden_states), hidden_states.shape[1]
        if past_key_values is not None:
            v = past_key_values.layers[self.layer_idx].update(v[:, None], v[:, None])[0][:, 0]
        if padding_mask is not None:  # (B, S)
            v = v * padding_mask[..., None]
        before = torch.cat([torch.zeros_like(v[:, :1]), v[:, :-1]], dim=1)
        return self.c_proj((v + self.weight * before)[:, -T:].contiguous()), None

    def new_cache(self):
        return DynamicLayer()

    def core_flops(self, context, dense=False):
        return 2 * self.c_attn.nf * context

    def cache_bytes(self, context, element_bytes):
        return 2 * self.c_attn.nf * context * element_bytes

    def reference(self, hidden_states):
        v = self.c_attn(hidden_states)
        rows = [v[:, t] + (self.weight * v[:, t - 1] if t else 0) for t in range(v.shape[1])]
        return self.c_proj(torch.stack(rows, dim=1))
"""


# A variant that, where STALL names a file, makes that file in its first training step and then waits to be killed.
STALLING = NINTH.replace("import torch\n", "import os, pathlib, time\nimport torch\n", 1).replace(
    "        v, T =",
    "        if self.training and hidden_states.shape[1] == 16 and hidden_states.dtype == torch.float32:\n"
    "            stall = os.environ.get('STALL')\n"
    "            if stall:\n"
    "                pathlib.Path(stall).touch()\n"
    "                time.sleep(600)\n"
    "        v, T =",
)


# A variant that asks for more memory than there is.
GREEDY = NINTH.replace(
    "        v, T =",
    "        if self.training and hidden_states.shape[1] == 16: torch.empty(1 << 50)\n        v, T =",
)


def tiny_profile(folder) -> str:
    """A profile with data and a tokenizer of its own in `folder`: making the builtin ones costs seconds a run."""
    corpus.builtin_tokenizer().save_pretrained(folder / "tokenizer")
    shutil.copy(cache.made_once({"tests": "talks"}, _talks) / "talks.jsonl", folder)
    files = {"dataset": str(folder / "talks.jsonl"), "tokenizer": str(folder / "tokenizer")}
    (folder / "tiny.yaml").write_text(json.dumps(TINY | files))
    return str(folder / "tiny.yaml")


def _talks(folder) -> None:
    """Some of the builtin conversations, which take seconds to read: all workers share them."""
    talks = [json.dumps({"messages": messages}) for messages in conversations.builtin()[:200]]
    (folder / "talks.jsonl").write_text("\n".join(talks))


def kernels() -> list[psutil.Process]:
    """The notebooks' kernels that this process has started and that still run."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "ipykernel_launcher" in child.cmdline()]


def when_it_stalls(reached, act) -> Thread:
    """Calls `act` from a thread of its own once the file `reached` is there, while the caller runs a study."""

    def watch():
        for _ in range(6000):
            if reached.exists():
                return act()
            time.sleep(0.1)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    return thread


def wait_for(condition, process, within_s=180):
    for _ in range(within_s * 10):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("it never came to that")


def timeless(found: record.Record) -> dict:
    """What must not depend on when, or how often interrupted, a run was made."""
    content = json.loads(found.model_dump_json())
    keep = ("attention", "attention_sha256", "name", "label", "setting", "parameters", "data", "certificate")
    series = {name: content["series"][name] for name in ("train_loss", "non_padding_tokens", "validation")}
    place = {name: content["study"][name] for name in ("profile", "block", "position")}
    metrics = {
        name: value
        for name, value in content["metrics"].items()
        if ("flops" in name and "per_s" not in name) or name in ("train_loss", "validation_loss", "parameters")
    }
    return {name: content[name] for name in keep} | series | place | metrics
