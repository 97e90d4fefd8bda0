"""What was published beside what it should have been: the tables and the figure of replication.ipynb."""

import inspect
from functools import cache
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import torch

from lib import attention, certificate, model
from lib.analysis import compare, figures, loss_figures, ngrams, notes, published_flops, style
from lib.errors import UsageError
from lib.measure import flops
from lib.paths import ROOT
from lib.record import REASONS

CLAIMS = ROOT / "records" / "published_claims.csv"
LABELS = {  # in params/replication.yaml
    "ours": "{}",
    "published": "published_{}",
    "published, no padding": "published_{}_unpadded",
}
LOSS = "loss_epoch_20"
OURS = figures.PUBLISHED_BESIDE_OURS | {LOSS: ("Loss", "validation_loss")}  # a published figure's metric in our records
SAME_LOSS = 1e-3  # nats: rounding moves the loss of one function by less, another function by more
NOISE = 1e-9  # of the largest logit, in float64: far under what any weight on a token does


def published(name: str) -> str:
    """The path of the published definition of a variant."""
    return f"lib/published/{name}.py"


def moved_by_a_token(name: str, *, layers=2, width=64, context=512, at=300, **options) -> tuple[int, int]:
    """How many positions before and after position `at` get other logits when the token there is another.

    In float64, random numbers drawn alike both times. Layers as initialised, at any width: which positions see which
    is not a matter of size, but of layers.
    """
    config = model.gpt2_config(layers, width, 8, 1024, 64)
    gpt2 = model.build_model(name, config, **options).double().eval()
    ids = torch.arange(context)[None] % 64
    changed = ids.clone()
    changed[0, at] += 1
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = []
        for given in (ids, changed):
            torch.manual_seed(0)
            outputs.append(gpt2(given, use_cache=False).logits[0])
    moved = (outputs[0] - outputs[1]).abs().amax(-1) > NOISE * outputs[0].abs().max()  # (T,)
    return int(moved[:at].sum()), int(moved[at + 1 :].sum())


def definitions(name: str, **ours_too) -> dict[str, tuple[str, dict]]:
    """What stands side by side for a variant: column to (attention, options). `ours_too`: more columns of ours."""
    theirs = published(name)
    columns = {"published": (theirs, {})}
    if "masked" in inspect.signature(attention.load(theirs)).parameters:
        columns["published, padded batch"] = (theirs, {"masked": True})
    columns["ours"] = (name, {})
    return columns | {column: (name, options) for column, options in ours_too.items()}


def certificates(*several: pd.DataFrame) -> dict[tuple[str, str], dict]:
    """The certificates that runs carry, by attention and options."""
    runs = pd.concat(several)
    keys = zip(runs["attention"], (str(values["options"]) for values in runs["parameter_values"]), strict=True)
    return dict(zip(keys, runs["certificate"], strict=True))


def side_by_side(name: str, known: dict, **ours_too) -> pd.DataFrame:
    """The published definition of a variant and ours: certificate, what a changed token moves, parameters, FLOPs.

    `known`: the `certificates` of runs; a definition that is not among them is examined now. A check that none of the
    columns was asked, since their records are older than it, has no row.
    """
    columns = definitions(name, **ours_too)
    certificates = {
        column: known.get((path, str(options))) or certificate.certify(path, options)
        for column, (path, options) in columns.items()
    }
    checks = certificate.table(certificates)
    checks = checks[(checks != certificate.yes(None)).any(axis=1)]
    return pd.concat([checks, pd.DataFrame({c: _sizes(*f) for c, f in columns.items()})])


def _sizes(name, options) -> dict:
    earlier, later = moved_by_a_token(name, **options)
    count = published_flops.observed if name in attention.variants() else published_flops.derived
    gpt2 = model.meta_model(name, model.gpt2_config(*published_flops.GPT2), **options)
    size = sum(w.numel() * w.element_size() for w in gpt2.parameters())
    useful = sum(block.attn.core_flops(published_flops.CONTEXT) for block in gpt2.transformer.h)
    return {
        "another token at 300 moves, of 300 before it": str(earlier),
        "and of 211 after it": str(later),
        "parameters at GPT-2's size": f"{sum(w.numel() for w in gpt2.parameters()):,}",
        "MiB of weights": f"{size / 2**20:.0f}",
        "FLOPs as published, x10¹²": f"{count(name, **options) / 1e12:.3f}",
        "causal FLOPs of attention core, x10¹²": f"{published_flops.BATCH * useful / 1e12:.3f}",
    }


def flops_table() -> pd.DataFrame:
    """The published FLOPs and what their convention gives by arithmetic, seen in what runs, and for ours; x10¹²."""
    shown = pd.read_csv(figures.PUBLISHED).set_index("variant")["flops_e12"]
    rows = []
    for name in attention.STUDY_ORDER:
        ours = flops.analytic(model.meta_model(name, model.gpt2_config(*published_flops.GPT2)), published_flops.CONTEXT)
        rows.append(
            {
                "variant": name,
                "published": f"{shown[name]:.3g}",
                "re-derived": f"{published_flops.derived(published(name)) / 1e12:.3f}",
                "with the kernel's work": f"{published_flops.derived(published(name), counted=True) / 1e12:.3f}",
                "ours, counted so": f"{published_flops.observed(name) / 1e12:.3f}",
                "ours, causal": f"{published_flops.BATCH * ours['forward_flops_causal'] / 1e12:.3f}",
            }
        )
    return pd.DataFrame(rows)


def loss_curves(found: pd.DataFrame) -> plt.Figure:
    """Validation loss by non-padding tokens, a panel per variant: ours solid, the published definition dashed; the
    n-gram tables of the same training tokens as grey lines."""
    style.use_style()
    figure, all_axes = plt.subplots(2, 4, figsize=(12, 5.6), sharex=True, sharey=True)
    colour, marker = (choose(list(attention.STUDY_ORDER)) for choose in (style.colours, style.markers))
    called = style.titles(found)
    for axes, name in zip(all_axes.flat, attention.STUDY_ORDER, strict=True):
        for (said, label), line in zip(LABELS.items(), ("-", "--", ":"), strict=True):
            for points in found[found["label"] == label.format(name)]["series_validation"]:
                x, y = ([point[key] for point in points] for key in ("non_padding_tokens", "loss"))
                axes.plot(x, y, line, color=colour[name], marker=marker[name], markersize=4, label=said)
        loss_figures.draw_tables(axes, found)
        axes.set_title(called.get(name, name), loc="left")
        axes.legend(frameon=False, fontsize=7, loc="upper right")
        axes.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # shared; room for the legends
    figure.supxlabel("non-padding tokens seen", fontsize=11)
    figure.supylabel("validation loss, nats per token", fontsize=11)
    figure.tight_layout()
    notes.note(figure, found, {"validation loss": "validation_loss"}, [ngrams.sentence(found)])
    return figure


def final_losses(found: pd.DataFrame) -> pd.DataFrame:
    """Validation loss at the end, ours and as published, beside the n-gram tables of the same training tokens."""
    losses, tables = found.groupby("label")["validation_loss"].mean(), ngrams.tables(found)
    rows = [
        {"variant": name}
        | {c: _number(losses.get(label.format(name))) for c, label in LABELS.items()}
        | {f"{table} table": _number(tables.get(table)) for table in ngrams.TABLES}
        for name in attention.STUDY_ORDER
    ]
    return pd.DataFrame(rows)


def leaks(path: Path) -> pd.DataFrame:
    """The losses that `prefix_losses` found, and what is lost where the rest of the row is out of sight."""
    if not path.is_file():
        raise UsageError(
            f"there is no {path.name} beside the records; `python -m lib.study.leakage --help` says how to make it"
        )
    found = pd.read_csv(path)
    gap = found["autoregressive_loss"] - found["teacher_forced_loss"]
    return pd.DataFrame(
        {
            "run": found["run"],
            "teacher-forced loss": found["teacher_forced_loss"].map("{:.2f}".format),
            "autoregressive loss": found["autoregressive_loss"].map("{:.2f}".format),
            "lost in generation": (gap.round(2) + 0.0).map("{:.2f}".format),
        }
    )


def table_of_claims(costs: pd.DataFrame, losses: pd.DataFrame) -> pd.DataFrame:
    """Each published claim: whether the published figures say so, and whether our records do, and by how much.

    All numbers are ratios to sdpa, of the paper's own and of ours; ours are of certified variants alone. `costs` are
    the runs that show what a variant costs, `losses` those that show what it learns. Our records say yes or no of what
    is counted, and from five whole blocks up of what is measured; else there are numbers, and no verdict.
    """
    published = pd.read_csv(figures.PUBLISHED).set_index("variant")
    rows = []
    for claim in pd.read_csv(CLAIMS).itertuples():
        about = claim.variants.split()
        theirs = published[claim.figure] / published.loc[attention.REFERENCE, claim.figure]
        records = losses if claim.figure == LOSS else costs
        row = {
            "claim": claim.claim,
            "said by": claim.source,
            "published figures": f"{_yes(theirs, about, claim.direction)}: {_values(theirs, about)}",
            "our records": _ours(records, claim.figure, about, claim.direction),
            "what the published module does": "; ".join(f"{name}: {_sight(name)}" for name in about),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _yes(ratios: pd.Series, about: list[str], direction: str) -> str:
    """Whether numbers without noise bear a claim out; who shares a place with another does not hold it."""
    own, others = ratios[about], ratios.drop(about)
    if direction == "lowest":
        return certificate.yes(own.max() < others.min())
    return certificate.yes(own.min() > others.max() if direction == "highest" else (own > 1).all())


def _values(ratios: pd.Series, about: list[str]) -> str:
    """The ratios that a claim rests on."""
    values = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios[about].items())
    others = ratios.drop(about)
    return f"{values}; the others {others.min():.3f} to {others.max():.3f}"


def _ours(runs: pd.DataFrame, figure: str, about: list[str], direction: str) -> str:
    """The same from our records of certified variants, with the number of blocks; or why nothing can be said."""
    _, metric = OURS[figure]
    has_control = (runs["label"] == attention.CONTROL).any()
    noise = notes.noise_in_words(compare.noise(runs, metric), metric) if has_control else "none among these runs"
    runs = runs[runs["certified"] & runs["label"].isin(attention.STUDY_ORDER)]
    if runs[metric].isna().any():
        reasons = {REASONS[why[metric]] for why in runs["null_reasons"] if metric in why}
        return f"not measured yet: {', '.join(sorted(reasons))}"
    if figure == LOSS and (untested := [name for name in about if _same_function(runs, name)]):
        context = runs["parameter_values"].iloc[0]["context"]
        return f"not tested: at T = {context} ours of {', '.join(untested)} computes what sdpa does"
    found = compare.ratios(runs, metric).set_index("label")
    ratios, n = found["ratio"].astype(float), found["n"].min()
    if metric in compare.COUNTED:
        return f"{_yes(ratios, about, direction)}: {_values(ratios, about)} (counted)"
    above = ngrams.above_bigram(runs)
    if figure == LOSS and (above[[*about, attention.REFERENCE]] > 0).any():
        return f"no verdict, worse than a bigram table: {_values(ratios, about)} (n = {n}; A/A: {noise})"
    said = _verdict(runs, metric, found, about, direction)
    return f"{said}: {_values(ratios, about)} (n = {n}; A/A: {noise})"


def _verdict(runs: pd.DataFrame, metric: str, found: pd.DataFrame, about: list[str], direction: str) -> str:
    """Yes or no where the paired comparisons are sure of it, as in `compare.ranks`."""
    if found["n"].min() < compare.FEWEST_BLOCKS:
        return f"no verdict below {compare.FEWEST_BLOCKS} blocks"
    if direction == "above sdpa":
        mine, is_sure = found.loc[about, "ratio"].astype(float), (found.loc[about, "p"] < 0.05).all()
        return "inconclusive" if not is_sure else certificate.yes((mine > 1).all())
    ranks = compare.ranks(runs, metric)
    if not set(about) <= set(ranks):
        return "no verdict"
    first, last = zip(*(ranks[name] for name in about), strict=True)
    if direction == "highest":
        first, last = ([1 + len(ranks) - place for place in places] for places in (last, first))
    if max(last) <= len(about):
        return "yes"
    return "NO" if max(first) > len(about) else "inconclusive"


def _same_function(runs: pd.DataFrame, name: str) -> bool:
    """Whether a variant does the reference's work with its weights and loses what it loses: then it is no other."""
    mine, theirs = (runs[runs["label"] == label] for label in (name, attention.REFERENCE))
    alike = [set(mine[of]) == set(theirs[of]) for of in ("parameters", "forward_flops_causal")]
    losses = [group.set_index(["session", "block", "seed"])["validation_loss"] for group in (mine, theirs)]
    gaps = (losses[0] - losses[1]).dropna().abs()
    return all(alike) and len(gaps) > 0 and bool((gaps < SAME_LOSS).all())


@cache
def _sight(name: str) -> str:
    """What a token of the published definition sees, in a padded batch where that makes a difference."""
    *_, (theirs, options) = [found for column, found in definitions(name).items() if column.startswith("published")]
    earlier, later = moved_by_a_token(theirs, **options)
    if not later:
        return "sees no other token"
    return "sees the future" if earlier else "sees the past alone"


def _number(value) -> str:
    return "–" if value is None else f"{value:.2f}"
