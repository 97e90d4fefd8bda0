#!/usr/bin/env python3
"""Converts records of schema 1 to schema 2, in place: other names for the same things, every number as it was.

Give folders; records of runs, of cost by length and of benchmarks in and below them are converted, what is of the
newest schema already is left alone. A run's file gets the name that its parameters have now.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch

from lib import attention, parameters, paths, record
from lib.model import gpt2_config
from lib.paths import write_whole
from lib.record.benchmark import Benchmark
from lib.record.scaling import Scaling

NAMES = {  # a key of schema 1: of schema 2, wherever it stands
    "knobs": "options",
    "sitting": "study",
    "useful_tokens": "non_padding_tokens",
    "useful_tokens_per_s": "non_padding_tokens_per_s",
    "energy_per_useful_token_j": "energy_per_non_padding_token_j",
    "gpu_busy_share": "gpu_busy_fraction",
    "forward_flops_useful": "forward_flops_causal",
    "forward_flops_dense": "forward_flops_full",
    "useful_flops_per_s": "causal_flops_per_s",
    "least_time_s_per_step": "minimum_time_s_per_step",
    "kept": "layers_with_attention",
    "held_down_s": "throttled_s",
    "validation_rows": "validation_sequences",
    "train_rows": "train_sequences",
    "peak_bytes": "peak_activation_bytes",
    "peers": "reference_implementations",
}
OPTIONS = {
    "lsh": {"rounds": "n_hashes", "chunk": "chunk_length", "borders": "chunk_boundaries"},
    "mla": {"latent": "kv_lora_rank", "rope": "qk_rope_head_dim", "query_latent": "q_lora_rank"},
}
SAYS = (("held the clock down", "throttled the clock"), ("the idle card", "the idle GPU"))


def renamed(content):
    """The same content under the new names."""
    if isinstance(content, dict):
        return {NAMES.get(name, name): renamed(value) for name, value in content.items()}
    return [renamed(value) for value in content] if isinstance(content, list) else content


def convert(content: dict) -> dict:
    """A record of schema 1 as one of schema 2. Raises ValueError where a number would change."""
    found = renamed(content) | {"schema_version": record.SCHEMA_VERSION}
    if content.get("kind") == "peers":
        found["kind"] = "benchmark"
    else:
        run = found.get("parameters") or found | found["setting"] | {"positions": found["points"][-1]["context"]}
        of = OPTIONS.get(found["attention"], {})
        run["options"] = {of.get(name, name): value for name, value in run["options"].items()}
        size = (1, run["width"], run["heads"], run["positions"], 2)
        if not attention.find(found["attention"]).resolve().is_relative_to(paths.ROOT / "lib"):
            raise ValueError(
                "its attention is a file outside lib/, and no record runs one; convert it where it was made"
            )
        with torch.device("meta"):
            layer = attention.load(found["attention"])(gpt2_config(*size), 0, **run["options"])
        given = run["label"] if "parameters" in found or run["label"] != attention.stem(run["attention"]) else ""
        found["title"] = parameters.title(run | {"label": given}, [layer])
        found["options" if "kind" in found else "parameters"] = run["options"] if "kind" in found else run
    if "parameters" in found:
        found["study"]["session"] = found["study"].pop("study")
        for check in found["checks"]:
            check["check"] = check["check"].replace("host_bound", "launch_bound")
            for old, new in SAYS:
                check["says"] = check["says"].replace(old, new)
        found["flags"] = [flag.replace("host_bound", "launch_bound") for flag in found["flags"]]
        found |= {"name": parameters.run_name(found["parameters"]), "setting": parameters.setting(found["parameters"])}
    if numbers(found) != numbers(content | {"schema_version": record.SCHEMA_VERSION}):
        raise ValueError("a number would change")
    return found


def numbers(content) -> Counter:
    """Every number and how often it stands there."""
    if isinstance(content, dict | list):
        return sum(map(numbers, content.values() if isinstance(content, dict) else content), Counter())
    return Counter([repr(content)]) if isinstance(content, int | float) else Counter()


def convert_file(path: Path) -> Path | None:
    """Converts one file; returns its new path, or None where it is no record of schema 1."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("schema_version") != 1 or path.name.endswith(record.FAILED):
        return None
    if content["content_sha256"] != record.checksum(content):
        raise ValueError("it was changed after it was written: its checksum does not fit")
    found = convert(content)
    kind = {"scaling": Scaling, "benchmark": Benchmark}.get(found.get("kind"), record.Record)
    found = json.loads(kind.model_validate(found | {"content_sha256": ""}).model_dump_json())
    found["content_sha256"] = record.checksum(found)
    new = path.with_name(f"{found['name']}.json") if "name" in found else path
    write_whole(new, json.dumps(found, indent=1) + "\n")
    if new != path:
        path.unlink()
    return new


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    failed = 0
    for path in [path for folder in parser.parse_args(words).folders for path in sorted(folder.rglob("*.json"))]:
        try:
            new = convert_file(path)
        except (ValueError, KeyError, TypeError, OSError) as error:
            failed += 1
            print(f"LEFT AS IT WAS {path}: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            print(f"{path}: {'left alone' if new is None else f'converted to {new.name}'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
