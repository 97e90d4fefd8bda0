"""Made-up records for tests of what reads records."""

import contextlib
import hashlib

from lib import record

METRICS = {
    "time_s": 20.0, "time_per_epoch_s": 10.0, "useful_tokens_per_s": 5e3,
    "energy_j": 4e3, "energy_per_useful_token_j": 0.04, "mean_power_w": 200.0, "idle_power_w": 80.0,
    "net_energy_j": 2400.0, "gpu_utilization_percent": 90.0, "gpu_busy_share": 0.99, "mfu": 0.3,
    "cpu_energy_j": None, "cpu_time_s": 18.0, "cpu_cores_used": 0.9, "disk_bytes": 0.0,
    "peak_memory_bytes": 2e9, "peak_reserved_memory_bytes": 3e9, "peak_resident_bytes": None,
    "forward_flops_useful": 7e8, "forward_flops_dense": 8e8, "forward_flops_counted": 8e8,
    "attention_core_share": 0.09, "useful_flops_per_s": 7e10, "train_loss": 5.1, "validation_loss": 5.0,
    "prefill_latency_s": 0.01, "decode_latency_s_per_token": 0.002, "cache_bytes": 1e6, "parameters": 1000,
    "checkpoint_bytes": 4000.0,
}  # fmt: skip
PARAMETERS = {
    "layers": 2, "width": 32, "context": 16, "steps_per_epoch": 2, "epochs": 2, "batch_size": 4, "accumulation": 1,
    "dataset": "builtin",
}  # fmt: skip
CERTIFICATE = {
    "causal": True, "prefix_equal": True, "mixes": True, "receptive_field": 9, "cached_equal": True,
    "gpt2_projection": True, "gpt2_initialisation": True, "reference_difference": 0.0,
    "reference_gradient_difference": 0.0, "parameters_vs_baseline": 1.0, "memory_growth": 1.0, "flops_growth": 2.0,
    "passed": True,
}  # fmt: skip


def make_record(label="sdpa", block=0, sitting="s1", certified=True, setting="0" * 8, **changes) -> record.Record:
    """A record whose metrics are `METRICS` with `changes`; what is None has a reason."""
    metrics = METRICS | {name: value for name, value in changes.items() if name in METRICS}
    others = {name: value for name, value in changes.items() if name not in METRICS}
    reasons = {"cpu_energy_j": "rapl_unavailable", "peak_resident_bytes": "gpu_run"}
    latency = {"prefill_latency_s": 0.01, "decode_latency_s_per_token": 0.002}
    latency |= {"cache_bytes": 10, "cache_bytes_analytic": 10, "prefill_energy_j": None}
    latency |= {"decode_energy_j_per_token": None, "energy_null_reason": "not_asked_for"}
    end = {"useful_tokens": 256, "loss": metrics["validation_loss"]}
    digest = hashlib.sha256(f"{label}{block}{sitting}{setting}".encode()).hexdigest()
    fields = {
        "name": f"{label}-seed{block}-{digest[:8]}",
        "finished_at": record.now(),
        "label": label,
        "attention": label,
        "attention_sha256": "0" * 64,
        "paper": "a paper",
        "setting": setting,
        "parameters": PARAMETERS | {"seed": block},
        "sitting": {"sitting": sitting, "block": block, "position": 0} if sitting else {},
        "environment": {"device": "cuda", "device_name": "a GPU", "gpu": {"uuid": "GPU-1"}},
        "data": {},
        "certificate": CERTIFICATE | {"causal": certified, "passed": certified},
        "kernels": {"forward": ["k"], "backward": ["k"]},
        "metrics": metrics,
        "series": {
            "train_loss": [6.0, 5.5, 5.2, 5.0], "useful_tokens": [64, 128, 192, 256],
            "validation": [{"useful_tokens": 0, "loss": 6.0}, end], "epoch_time_s": [10.0, 10.0],
            "epoch_energy_j": [], "log": [{"step": 4, "time_s": 20.0, "energy_j": metrics["energy_j"]}],
            "power_time_s": [10.0], "power_w": [200.0],
            "inference": [{"context": context} | latency for context in (8, 16)], "phases": [], "slope": None,
        },
        "null_reasons": {name: reasons.get(name, "no_gpu") for name, value in metrics.items() if value is None},
        "gpu_states": [], "checks": [], "flags": [],
    }  # fmt: skip
    return record.Record.model_validate(fields | others)


def write_blocks(folder, labels=("baseline", "sdpa", "sdpa_again"), blocks=1, **changes):
    for block in range(blocks):
        for label in labels:
            record.write(make_record(label, block, **changes), folder)


def fill(disk):
    """Leaves no byte free on a `small_disk`."""
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)
