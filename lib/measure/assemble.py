"""One run's measurements put together: the table of what an attention costs, and the record."""

import copy
import statistics
import tempfile
from pathlib import Path

import pandas as pd

from lib import attention, parameters, record
from lib.data import ngrams
from lib.errors import one_sentence_when_out_of_memory
from lib.measure import energy, environment, flops, kernels, sampler, selfcheck
from lib.measure.saved import save_model
from lib.model import meta_model

__all__ = ["costs", "inference_table", "make_record", "measured", "save_model", "self_check"]


ALIKE = 0.01  # relative; what is no further apart is matched


def costs(model, p) -> pd.DataFrame:
    """What the model's attention costs on paper, a row per quantity for one sequence of `context`, beside GPT-2's own,
    or Llama's in its layers; both compute what SDPA does. The last row says in what the two are matched."""
    config = copy.deepcopy(model.config)
    config.n_inner = None  # its own MLP, whatever `match` makes of the run's
    baseline = meta_model("baseline", config)
    name, own = parameters.display_name(vars(p)), "Llama's own" if config.architecture == "llama" else "GPT-2's own"
    mine, its = (_on_paper(subject, p.context) for subject in (model, baseline))
    ratios = {what: mine[what] / its[what] for what in mine}
    table = pd.DataFrame(
        {
            name: {what: form(mine[what]) for what, form in ON_PAPER.items()},
            own: {what: form(its[what]) for what, form in ON_PAPER.items()},
            "ratio": {what: f"{ratio:.3f}" for what, ratio in ratios.items()},
        }
    )
    alike = [short for short, what in MATCHABLE.items() if abs(ratios[what] - 1) <= ALIKE]
    table.loc["matched, within 1 %"] = [", ".join(alike) or "nothing", "", ""]
    return table


MATCHABLE = {"parameters": "parameters", "cache": "cache in bf16, KiB", "FLOPs": "forward GFLOPs, causal"}
ON_PAPER = {
    "parameters": "{:,}".format,
    "of these in attention": "{:,}".format,
    "forward GFLOPs, causal": "{:,.3f}".format,
    "forward GFLOPs, full T x T": "{:,.3f}".format,
    "share of attention core": "{:.1%}".format,
    "cache in bf16, KiB": "{:,.0f}".format,
}


def _on_paper(subject, context: int) -> dict[str, float]:
    counted, blocks = flops.analytic(subject, context), subject.transformer.h
    return {
        "parameters": sum(weight.numel() for weight in subject.parameters()),
        "of these in attention": sum(weight.numel() for block in blocks for weight in block.attn.parameters()),
        "forward GFLOPs, causal": counted["forward_flops_causal"] / 1e9,
        "forward GFLOPs, full T x T": counted["forward_flops_full"] / 1e9,
        "share of attention core": counted["attention_core_share"],
        "cache in bf16, KiB": sum(block.attn.cache_bytes(context, 2) for block in blocks) / 1024,
    }


@one_sentence_when_out_of_memory()
def make_record(p, trainer, certificate: dict, latencies: list[dict], parts: dict) -> record.Record:
    """The record of a finished run: `latencies` by `inference.measured`, `parts` by `phases.measured`.

    Raises ValueError where something that must be there is not.
    """
    values = vars(p)
    model, device = trainer.model, trainer.device
    metrics, reasons = trainer.meter.metrics()
    seen = trainer.non_padding_tokens.cumsum().tolist()
    losses = trainer.losses.cpu().double().tolist()
    on_paper = flops.analytic(model, p.context)
    step_flops = 3 * on_paper["forward_flops_causal"] * p.batch_size * p.accumulation  # backward costs two forwards
    window_s, energy_j = metrics["time_s"], metrics["energy_j"]
    causal_flops_per_s = step_flops * trainer.steps / window_s
    surroundings = environment.describe(device) | trainer.commit
    trained = trainer.corpus.train.lengths[trainer.rows[: trainer.steps]]
    model_flops_per_s = 3 * flops.non_padding(model, trained) / window_s
    mfu = flops.mfu(model_flops_per_s, surroundings["device_name"], trainer.precision)
    at_context = next((row for row in latencies if row["context"] == p.context), None)

    def at_training_context(name):
        return None if at_context is None else at_context[name]

    metrics |= {
        "time_per_epoch_s": window_s / p.epochs,
        "non_padding_tokens_per_s": seen[-1] / window_s,
        "energy_per_non_padding_token_j": None if energy_j is None else energy_j / seen[-1],
        "gpu_busy_fraction": trainer.busy.joules,
        **on_paper,
        "forward_flops_counted": flops.counted(model, p.context, trainer.autocast),
        "causal_flops_per_s": causal_flops_per_s,
        "mfu": mfu.joules,
        "train_loss": statistics.fmean(losses[-p.steps_per_epoch :]),
        "validation_loss": trainer.validation[-1]["loss"],
        "prefill_latency_s": at_training_context("prefill_latency_s"),
        "decode_latency_s_per_token": at_training_context("decode_latency_s_per_token"),
        "cache_bytes": at_training_context("cache_bytes"),
        "parameters": sum(w.numel() for w in model.parameters()),
        "checkpoint_bytes": checkpoint_bytes(model),
    }
    if energy_j is None:
        reasons["energy_per_non_padding_token_j"] = reasons["energy_j"]
    for name, reading in (("gpu_busy_fraction", trainer.busy), ("mfu", mfu)):
        if reading.joules is None:
            reasons[name] = reading.reason
    if at_context is None:
        why = "context_not_timed" if latencies else "not_asked_for"
        reasons |= dict.fromkeys(("prefill_latency_s", "decode_latency_s_per_token", "cache_bytes"), why)
    padding_share = 1 - seen[-1] / (trainer.steps * trainer.rows_per_step * p.context)
    power_time_s, power_w = trainer.meter.power()
    tables = ngrams.losses(trainer.corpus, trainer.rows[: trainer.steps], p.validation_sequences)
    meter = trainer.meter
    checks = selfcheck.checks(meter, metrics, reasons, padding_share, trainer.warmed)
    ran = kernels.names(model, p.context, trainer.autocast, compiled=p.compile)
    return record.Record(
        name=parameters.run_name(values),
        provenance=energy.provenance(),
        started_at=trainer.started_at,
        finished_at=record.now(),
        label=parameters.display_name(values),
        title=parameters.title(values, [block.attn for block in model.transformer.h]),
        attention=p.attention,
        attention_sha256=attention.source_sha256(p.attention),
        paper=attention.load(p.attention).paper,
        setting=parameters.setting(values),
        parameters=values,
        study=record.study_position(),
        environment=surroundings,
        data=trainer.corpus.facts | tables,
        certificate=record.Certificate(**certificate),
        kernels=ran,
        kernels_null_reason="empty_profile" if None in ran.values() else None,
        metrics=record.Metrics(**metrics),
        series=record.Series(
            train_loss=losses,
            non_padding_tokens=seen,
            validation=trainer.validation,
            epoch_time_s=meter.windows_s,
            epoch_energy_j=[] if energy_j is None else meter.gpu_counter.windows_j,
            epoch_edges_j=[] if energy_j is None else meter.gpu_counter.edges_j,
            gpu=meter.gpu_series(),
            log=meter.log(),
            power_time_s=power_time_s,
            power_w=power_w,
            inference=latencies,
            **parts,
        ),
        null_reasons=reasons,
        gpu_states=meter.states,
        gpu_summary=sampler.summary([one for _, one in meter.inside]),
        warm_up=trainer.warmed,
        idle=meter.idle,
        checks=checks,
        flags=[check.check for check in checks if check.verdict == "flagged"],
    )


SHOWN = (
    "time_s", "non_padding_tokens_per_s", "energy_j", "mean_power_w", "peak_memory_bytes", "peak_resident_bytes",
    "cpu_time_s", "cpu_cores_used", "causal_flops_per_s", "train_loss", "validation_loss",
)  # fmt: skip


def measured(result: record.Record) -> pd.DataFrame:
    """The record's main numbers as a reader sees them, or why one is missing."""
    rows = {name: getattr(result.metrics, name) for name in SHOWN}
    texts = {
        name: f"not measured: {record.REASONS[result.null_reasons[name]]}" if value is None else f"{value:,.4g}"
        for name, value in rows.items()
    }
    return pd.DataFrame({"measured": texts})


def inference_table(latencies: list[dict]) -> pd.DataFrame:
    """What `inference.measured` found, as a reader sees it."""
    rows = []
    for row in latencies:
        joules = {"prefill, J": row["prefill_energy_j"], "J per new token": row["decode_energy_j_per_token"]}
        rows.append(
            {
                "context": f"{row['context']:,}",
                "prefill, ms": f"{row['prefill_latency_s'] * 1e3:.2f}",
                "ms per new token": f"{row['decode_latency_s_per_token'] * 1e3:.2f}",
                "cache, KiB": f"{row['cache_bytes'] / 1024:,.1f}",
                "cache by formula, KiB": f"{row['cache_bytes_analytic'] / 1024:,.1f}",
                **{name: "–" if value is None else f"{value:.3f}" for name, value in joules.items()},
                "without joules, because": record.REASONS.get(row["energy_null_reason"], ""),
            }
        )
    return pd.DataFrame(rows)


def self_check(result: record.Record) -> pd.DataFrame:
    """The record's checks as a reader sees them."""
    return pd.DataFrame([{"check": c.check, "verdict": c.verdict, "says": c.says} for c in result.checks])


def in_words(result: record.Record) -> tuple[list[str], list[str]]:
    """What a run says in the end: its self-check in a sentence or two, and what stands behind it.

    The first list is what a reader must know: whether anything is flagged, and what.
    """
    by = {verdict: [c for c in result.checks if c.verdict == verdict] for verdict in ("green", "flagged", "null")}
    flagged, asked = by["flagged"], len(by["green"]) + len(by["flagged"])
    green = "nothing could be asked" if not asked else "green" if asked == 1 else f"all {asked} checks green"
    said = f"{len(flagged)} of {asked} checks flagged; use this run with care" if flagged else green
    answer = [f"Self-check: {said}.", *(f"{c.check}: {c.says}." for c in flagged)]
    reasons: dict[str, list[str]] = {}
    for check in by["null"]:
        reasons.setdefault(check.says, []).append(check.check)
    rest = [f"Not to be asked here ({reason}): {', '.join(names)}." for reason, names in reasons.items()]
    m = result.metrics
    joules = result.null_reasons.get("energy_j")
    energy = f"joules not measured ({record.REASONS[joules]})" if m.energy_j is None else f"{m.energy_j:,.4g} J"
    loss = "no loss" if m.validation_loss is None else f"a validation loss of {m.validation_loss:.3f} nats"
    machine = result.environment["device_name"]
    rest.append(
        f"{result.title} on {machine}: {m.time_s:,.4g} s for {len(result.series.train_loss):,} steps, {energy}, {loss}."
    )
    rest.append("One run is n = 1: it says what this run took, not which attention takes less. make study runs all.")
    return answer, rest


def checkpoint_bytes(model) -> int:
    """Bytes on disk of the model as `save_pretrained` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
