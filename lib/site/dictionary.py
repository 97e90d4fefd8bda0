"""What each column and each metric of the table of measurements means: the one place where it is said.

Units follow from names, as everywhere in this project; which kind of record has which metric, from the records' schemas
(`tests/test_site_data.py` holds both against each other).
"""

import functools
import re
from typing import NamedTuple

from lib.record import probe, scaling, schema

# Of a column: its type, and what it says. Types are those of `ARROW` and `CROISSANT` in lib/site/data.py.
COLUMNS = {
    "record": ("text", "path of the record below the folder of records; with `row` the key of this table"),
    "row": ("integer", "number of the row among those of its record, from 0"),
    "kind": ("text", "kind of record: run, failure (of a run, which left no record), probe, scaling, steps, benchmark"),
    "part": (
        "text",
        "what was measured. Of a run: training (`run`), `inference` on one sequence, a phase of a training step in a "
        "loop of its own (`forward`, `forward_backward`, `step`; by difference `backward`, `optimizer`), `slope` of "
        "its cost by layers with attention. Else a `layer`, a `model`, a training `step`, a `task`",
    ),
    "label": ("text", "by which variants are told apart; `sdpa_again` and `NAME, again (A/A)` are A/A controls"),
    "title": ("text", "what figures and tables call it"),
    "attention": (
        "text",
        "variant, or file; of a pattern one a layer, joined by commas, repeated over the layers; null where the record "
        "does not say, and for another project's implementation",
    ),
    "options": (
        "text",
        "JSON: what the variant was given beside its defaults; of a pattern by variant, or a list with an entry a "
        "layer; null where the record does not say",
    ),
    "attention_sha256": ("text", "SHA-256 of the variant's file; of a probe's pattern each different one's, by commas"),
    "reference_of": ("text", "of another project's implementation: the variants that it stands beside, by commas"),
    "folder": ("text", "folder of the record, below the folder of records; `.` is that folder itself"),
    "profile": ("text", "profile in params/ of the study that a run is of"),
    "setting": (
        "text",
        "eight hex digits of what rows must share to be compared: all but variant, seed and, of a probe, rate",
    ),
    "session": ("text", "the call in which it was measured; compare inside of one"),
    "block": (
        "integer",
        "block of a run's study, round of steps and of a benchmark, process of a scaling point, from 0: what "
        "was measured in turns within a session; null where nothing was",
    ),
    "position": ("integer", "place in the order of the block, from 0"),
    "seed": ("integer", "seed of weights and data"),
    "learning_rate": ("number", "highest learning rate"),
    "dataset": ("text", "conversations that a run trained on; `builtin`: made by this project"),
    "task": ("text", "of a probe: the task that it was trained on and tested with"),
    "difficulty": ("integer", "of a probe: how hard the test was, in the task's own unit (pairs, tokens, steps)"),
    "context": ("integer", "tokens in a sequence"),
    "batch_size": ("integer", "sequences at once"),
    "layers": ("integer", "layers of the model; where a layer alone is measured, of the model that it is of"),
    "width": ("integer", "width of the model"),
    "heads": ("integer", "heads of each attention"),
    "architecture": ("text", "of the layers around the attention: gpt2 or llama"),
    "convolution": ("boolean", "whether a short convolution stands before each attention"),
    "steps": ("integer", "training steps, of a run in its measured windows, of a probe in all"),
    "precision": ("text", "fp32 or bf16"),
    "compile": ("boolean", "whether torch.compile was used"),
    "device": ("text", "cpu or cuda"),
    "device_name": ("text", "the CPU or GPU"),
    "gpu_uuid": ("text", "which GPU of that name; null on a CPU"),
    "threads": ("integer", "threads of PyTorch on the CPU"),
    "torch": ("text", "version of PyTorch"),
    "metric": ("text", "what `value` is: an entry `metric` of dictionary.csv, with the row's `kind`"),
    "unit": ("text", "unit of `value`; 1 is a share, a ratio, or another number without one"),
    "value": ("number", "the measured number; null where there is none, and then `null_reason` says why"),
    "null_reason": ("text", "why `value` is null: an entry `null_reason` of dictionary.csv; else null"),
    "says": ("text", "what the record says in words where something failed"),
    "certified": (
        "boolean",
        "whether the variant passed its certificate (causal, prefix-equal, equal to a reference) before it was "
        "measured; null where this kind of record does not say",
    ),
    "flags": ("text", "self-checks of a run that were flagged, joined by spaces; null: none, or a kind that has none"),
    "provenance": ("text", "`measured`; null where the record does not say. What is synthetic is not in this table"),
    "started_at": ("moment", "when the run, cell or round began (UTC); null where the record does not say"),
    "finished_at": ("moment", "when the record was finished (UTC)"),
    "commit": ("text", "commit of this project that measured it"),
    "commit_modified": ("boolean", "whether files of that commit had been changed"),
    "content_sha256": ("text", "the record's own checksum of its content; null for a failure's note, which has none"),
}  # fmt: skip

LOWER, HIGHER, NEITHER = "lower", "higher", ""  # which is better

INFERENCE = {
    "prefill_latency_s": (LOWER, "time to read a prompt of `context` tokens, one sequence"),
    "decode_latency_s_per_token": (LOWER, "time of each token that is generated behind `context` tokens, one sequence"),
    "cache_bytes": (
        LOWER,
        "KV cache, or state, of one sequence of `context` tokens, counted from its tensors",
    ),
}
RUN = {
    "time_s": (LOWER, "wall clock of the training steps, an idle device to an idle device; no warm-up, no validation"),
    "time_per_epoch_s": (LOWER, "`time_s` by epochs"),
    "non_padding_tokens_per_s": (HIGHER, "tokens that are no padding, by `time_s`"),
    "energy_j": (LOWER, "joules of the GPU's own counter over the same windows: gross, all that the board drew"),
    "energy_per_non_padding_token_j": (LOWER, "`energy_j` by tokens that are no padding"),
    "mean_power_w": (NEITHER, "`energy_j` by `time_s`"),
    "idle_power_w": (NEITHER, "what the GPU drew after the run with the model loaded and nothing to do"),
    "net_energy_j": (LOWER, "`energy_j` without idle power"),
    "gpu_utilization_percent": (NEITHER, "NVML's share of time in which some kernel ran: says nothing of how well"),
    "gpu_busy_fraction": (HIGHER, "share of a step's time that is covered by kernels; the rest waits for Python"),
    "cpu_energy_j": (LOWER, "joules of the CPU's energy counter (RAPL)"),
    "cpu_time_s": (LOWER, "CPU seconds of the process, over all cores"),
    "cpu_cores_used": (NEITHER, "`cpu_time_s` by `time_s`"),
    "disk_bytes": (LOWER, "read from and written to disks by the process"),
    "peak_memory_bytes": (LOWER, "the most that PyTorch had allocated on the GPU in the window"),
    "peak_reserved_memory_bytes": (LOWER, "the most that PyTorch had reserved on the GPU in the window"),
    "peak_resident_bytes": (LOWER, "without a GPU: the most memory that the process held in the window"),
    "forward_flops_causal": (LOWER, "of one sequence, forward: only scores that causality, a window or buckets leave"),
    "forward_flops_full": (LOWER, "of one sequence, forward: all T x T scores"),
    "forward_flops_counted": (LOWER, "of one sequence, forward: what PyTorch's counter says of the operators that ran"),
    "attention_core_share": (NEITHER, "share of the attention cores (QKᵀ and AV) in `forward_flops_causal`"),
    "causal_flops_per_s": (HIGHER, "causal FLOPs of whole sequences, forward and backward, by `time_s`"),
    "mfu": (HIGHER, "causal FLOPs of tokens that are no padding, forward and backward, over the device's dense peak"),
    "train_loss": (LOWER, "mean cross-entropy of the last epoch's training steps"),
    "validation_loss": (LOWER, "cross-entropy of the sequences kept aside, after the last step"),
    **INFERENCE,
    "parameters": (NEITHER, "weights of the model"),
    "checkpoint_bytes": (LOWER, "size of the saved model"),
}
POINTS = {  # of a run, by context
    **INFERENCE,
    "cache_bytes_analytic": (LOWER, "the same by the variant's formula"),
    "prefill_energy_j": (LOWER, "joules of the GPU for one prefill"),
    "decode_energy_j_per_token": (LOWER, "joules of the GPU for each generated token"),
}
PHASES = {  # of a run, where asked for
    "time_s_per_step": (LOWER, "median over rounds of this part of a training step"),
    "minimum_time_s_per_step": (LOWER, "the fastest round's"),
    "energy_j_per_step": (LOWER, "joules of the GPU for this part of a training step"),
}
SLOPE = {  # of a run, where asked for
    "time_s_per_core": (LOWER, "forward and backward of one attention core, by the number of layers with attention"),
    "time_s_per_core_low": (NEITHER, "lower end of the 95 % interval of `time_s_per_core`"),
    "time_s_per_core_high": (NEITHER, "upper end of the 95 % interval of `time_s_per_core`"),
    "time_r_squared": (NEITHER, "R² of that straight line"),
    "energy_j_per_core": (LOWER, "joules of the GPU for one attention core, in the same way"),
    "energy_j_per_core_low": (NEITHER, "lower end of the 95 % interval of `energy_j_per_core`"),
    "energy_j_per_core_high": (NEITHER, "upper end of the 95 % interval of `energy_j_per_core`"),
    "energy_r_squared": (NEITHER, "R² of that straight line"),
}
METRICS = {
    "run": {**RUN, **POINTS, **PHASES, **SLOPE},
    "failure": RUN,
    "probe": {
        "accuracy": (HIGHER, "share of the answers that were right"),
        "scaled_accuracy": (HIGHER, "`accuracy` scaled by chance: 0 is guessing, 1 is all right"),
        "state_bytes": (LOWER, "what the layers remember of one sequence, in fp32, by their own count"),
        "time_s": (LOWER, "wall clock of training and testing, on a CPU that others use too"),
        "parameters": (NEITHER, "weights of the model"),
    },
    "scaling": {
        "forward_backward_s": (LOWER, "median of a process: one layer, forward and backward, one sequence"),
        "peak_activation_bytes": (LOWER, "memory of that on top of weights and input"),
        "forward_backward_energy_j": (LOWER, "joules of the GPU for it"),
        "prefill_s": (LOWER, "median of a process: the model reads a prompt of `context` tokens, one sequence"),
        "decode_s_per_token": (LOWER, "median of a process: each token that is generated behind them"),
        "cache_bytes": INFERENCE["cache_bytes"],
        "prefill_energy_j": POINTS["prefill_energy_j"],
        "decode_energy_j_per_token": POINTS["decode_energy_j_per_token"],
    },
    "steps": {
        "time_s_per_step": (LOWER, "a window's wall clock by its training steps: forward, backward, clipping, AdamW"),
        "energy_j_per_step": (LOWER, "joules of the GPU's own counter over the window, by its steps"),
        "mean_power_w": (NEITHER, "joules of the window by its time"),
        "peak_memory_bytes": (LOWER, "what a process with this model alone would need: weights, moments, its peak"),
        "throttled_share": (LOWER, "share of the window's samples in which the GPU's clock was held down"),
        "other_processes": (LOWER, "other processes on the GPU, right after the window"),
        "gpu_busy_fraction": RUN["gpu_busy_fraction"],
        "parameters": (NEITHER, "weights of the model"),
    },
    "benchmark": {"time_ms": (LOWER, "one turn: a layer forward and backward, or a whole training step")},
}  # fmt: skip

OWN_REASONS = {
    "absent": "another project's implementation that is not installed or was not asked for",
    "not_said": "the record does not say why",
}
NULL_REASONS = schema.REASONS | schema.FAILURES | scaling.OUTCOMES | probe.OUTCOMES | OWN_REASONS
NULL_REASONS.pop("measured")

# What a name ends in, or begins with, the first that fits. A name without a unit stands in the last lines.
UNITS = {
    r"_flops_per_s$": "FLOP/s",
    r"_tokens_per_s$": "token/s",
    r"^energy_per_\w*token_j$|_j_per_token$": "J/token",
    r"_s_per_token$": "s/token",
    r"_s_per_step$": "s/step",
    r"_j_per_step$": "J/step",
    r"_s_per_core(_low|_high)?$": "s/core",
    r"_j_per_core(_low|_high)?$": "J/core",
    r"^time_per_epoch_s$": "s/epoch",
    r"_ms$": "ms",
    r"_s$": "s",
    r"_j$": "J",
    r"_w$": "W",
    r"_percent$": "%",
    r"_bytes(_analytic)?$": "byte",
    r"_flops_\w+$": "FLOP",
    r"_loss$": "nat/token",
    r"^parameters$": "parameter",
    r"_cores_used$": "core",
    r"_processes$": "process",
    r"(^|_)(mfu|accuracy|r_squared|share|fraction)$": "1",
}


class Metric(NamedTuple):
    kind: str
    name: str
    unit: str
    better: str
    meaning: str


@functools.cache
def unit(metric: str) -> str:
    """A metric's unit, from its name. Raises ValueError where the name has none that is known."""
    for pattern, found in UNITS.items():
        if re.search(pattern, metric):
            return found
    raise ValueError(f"the name of {metric!r} ends in no unit of lib/site/dictionary.py")


def metrics() -> list[Metric]:
    """Every metric of every kind of record."""
    return [
        Metric(kind, name, unit(name), better, meaning)
        for kind, named in METRICS.items()
        for name, (better, meaning) in named.items()
    ]
