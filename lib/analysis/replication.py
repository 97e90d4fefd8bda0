"""What was published beside what it should have been: the tables and the figure of replication.ipynb."""

import inspect
from functools import cache
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import torch

from lib import attention, certificate, markup, model
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


def folded(name: str, known: dict, **ours_too):
    """`side_by_side` under the published module's name, which a click opens."""
    found = side_by_side(name, known, **ours_too).rename_axis("what is asked").reset_index()
    return markup.folded(f"{called(name)}: published and ours", found)


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
    names = style.titles(found)
    for axes, name in zip(all_axes.flat, attention.STUDY_ORDER, strict=True):
        for (said, label), line in zip(LABELS.items(), ("-", "--", ":"), strict=True):
            colour = style.BLUE if said == "ours" else style.ORANGE
            for points in found[found["label"] == label.format(name)]["series_validation"]:
                x, y = ([point[key] for point in points] for key in ("non_padding_tokens", "loss"))
                axes.plot(x, y, line, color=colour, marker="o", markersize=4, label=said)
        loss_figures.draw_tables(axes, found)
        axes.set_title(names.get(name, name), loc="left")
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


def losses_both_ways(path: Path) -> pd.DataFrame:
    """What `lib.study.leakage` found, a row per run: `name` of the variant, `is_published`, `teacher_forced_loss`,
    `autoregressive_loss` and their difference, `gap`, in nats; where a module was asked both with a mask and without,
    one row of each."""
    if not path.is_file():
        raise UsageError(
            f"there is no {path.name} beside the records; `python -m lib.study.leakage --help` says how to make it"
        )
    found = pd.read_csv(path)
    name = found["run"].str.removeprefix("published_").str.removesuffix("_unpadded")
    gap = found["autoregressive_loss"] - found["teacher_forced_loss"]
    return found.assign(name=name, is_published=found["run"].str.startswith("published_"), gap=gap)


def leaks(path: Path) -> pd.DataFrame:
    """The losses that `prefix_losses` found, and what is lost where the rest of the row is out of sight."""
    found = losses_both_ways(path)
    return pd.DataFrame(
        {
            "run": found["run"],
            "teacher-forced loss": found["teacher_forced_loss"].map("{:.2f}".format),
            "autoregressive loss": found["autoregressive_loss"].map("{:.2f}".format),
            "lost in generation": (found["gap"].round(2) + 0.0).map("{:.2f}".format),
        }
    )


FUTURE = {(True, True): "always", (True, False): "without padding", (False, False): "never"}
AT, CONTEXT = 300, 512  # the token that is another, of so many


def called(name: str) -> str:
    """What the published study calls its module for a variant."""
    return attention.load(published(name)).paper.split(", ")[1].split(" (")[0]


def modules(known: dict) -> pd.DataFrame:
    """What each published module does, a row each, from `moved_by_a_token` of one layer and from its certificate.

    `sees_future`: "never", "without padding" (a mask came with padding, and was the only one) or "always"; `seen_by`,
    how many of the 211 tokens behind a token see it, with the mask where there is one; `projects`, whether it has an
    output projection; `agrees`, whether two passes over one text do; `weights`, over those of GPT-2's own attention.
    `known`: the `certificates` of runs.
    """
    rows = []
    for name in attention.STUDY_ORDER:
        ways = [found for column, found in definitions(name).items() if column.startswith("published")]
        moved = [moved_by_a_token(path, layers=1, at=AT, context=CONTEXT, **options) for path, options in ways]
        path, options = ways[0]
        said = known.get((path, str(options))) or certificate.certify(path, options)
        rows.append({
            "name": name, "module": called(name), "sees_future": FUTURE[moved[0][0] > 0, moved[-1][0] > 0],
            "seen_by": moved[-1][1], "projects": said["gpt2_projection"], "agrees": _agrees(path),
            "weights": said["parameters_vs_baseline"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def _agrees(path: str) -> bool:
    """Whether two passes of a layer as initialised give the same, whatever the random state."""
    gpt2 = model.build_model(path, model.gpt2_config(1, 64, 8, CONTEXT, 64)).double().eval()
    ids, outputs = torch.arange(64)[None], []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            outputs.append(gpt2(ids, use_cache=False).logits)
    return torch.equal(*outputs)


def modules_table(found: pd.DataFrame) -> pd.DataFrame:
    """`modules` as a reader sees it."""
    behind = CONTEXT - 1 - AT
    return pd.DataFrame({
        "published module": found["module"],
        "sees the future": found["sees_future"],
        "a token is seen by": [f"{seen} of {behind} behind it" for seen in found["seen_by"]],
        "output projection": found["projects"].map({True: "yes", False: "none"}),
        "two passes agree": found["agrees"].map({True: "yes", False: "no"}),
        "weights / GPT-2's": found["weights"].map("{:.3f}".format),
    })  # fmt: skip


def finding(leaks: pd.DataFrame, found: pd.DataFrame) -> plt.Figure:
    """The finding in one picture: the losses of `losses_both_ways` in one pass and token by token, beside what each of
    `modules` sees. A row per published module; ours of the same name in grey."""
    style.use_style()
    size = (10, 0.36 * len(found) + 1.3)
    figure, (left, right) = plt.subplots(1, 2, figsize=size, width_ratios=(1, 1), sharey=True)
    for y, row in enumerate(found.itertuples()):
        own = leaks[leaks["name"] == row.name]
        if own["is_published"].sum() == 0:
            left.text(0.01, y, "not asked", va="center", style="italic", transform=left.get_yaxis_transform())
        for loss in own[~own["is_published"]].itertuples():
            left.plot(loss.autoregressive_loss, y, "|", color=style.INK, markersize=13, markeredgewidth=2)
        for loss in own[own["is_published"]].itertuples():
            _both_ways(left, loss, y)
        _cells(right, row, y)
    left.plot([], [], "o", color=style.ORANGE, markerfacecolor="none", label="in training's one pass")
    left.plot([], [], "o", color=style.ORANGE, label="token by token")
    left.plot([], [], "|", color=style.INK, markersize=11, markeredgewidth=2, label="ours, both ways")
    left.set_yticks(range(len(found)), found["module"])
    left.set_ylim(len(found) - 0.5, -0.5)
    low, high = left.get_xlim()
    left.set_xlim(low - 0.1 * (high - low), high + 0.1 * (high - low))  # room for the numbers
    left.set_xlabel("validation loss, nats per token")
    left.grid(axis="y", visible=False)
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=9, columnspacing=1.0)
    right.set_xlim(-0.5, 2.5)
    right.set_xticks(range(3), ["sees\nthe future", "seen by those\nbehind it", "output\nprojection"], fontsize=9)
    right.xaxis.tick_top()
    right.grid(visible=False)
    right.tick_params(length=0)
    for side in ("left", "bottom", "top", "right"):
        right.spines[side].set_visible(False)
    figure.tight_layout()
    said = [
        f"{called(loss.name)} {loss.teacher_forced_loss:.2f} in one pass, {loss.autoregressive_loss:.2f} token by token"
        for loss in leaks[leaks["is_published"]].itertuples()
    ]
    sees = [f"{row.module} {row.sees_future}" for row in found.itertuples()]
    return style.tell(
        figure, f"Losses of the published modules: {'; '.join(said)}. Sees the future: {', '.join(sees)}."
    )


def _both_ways(axes, loss, y: int) -> None:
    """A published module's two losses, joined; written where they differ."""
    ends = loss.teacher_forced_loss, loss.autoregressive_loss
    axes.plot(ends, [y, y], color=style.ORANGE, linewidth=2, alpha=0.5, zorder=1)
    axes.plot(ends[0], y, "o", color=style.ORANGE, markerfacecolor="none", markersize=8)
    axes.plot(ends[1], y, "o", color=style.ORANGE, markersize=8)
    if abs(loss.gap) > WRITTEN:
        for end, side, turn in zip(ends, ("right", "left"), (-8, 8), strict=True):
            words = {"xytext": (turn, 0), "textcoords": "offset points", "ha": side, "va": "center", "fontsize": 9}
            axes.annotate(f"{end:.2f}", (end, y), **words)


WRITTEN = 0.05  # nats; two losses that are nearer to each other are one


def _cells(axes, row, y: int) -> None:
    """What a module does, in words; what its name does not promise on colour."""
    behind = CONTEXT - 1 - AT
    cells = (
        (row.sees_future, row.sees_future != "never"),
        (f"{row.seen_by} of {behind}", row.seen_by < behind),
        ("yes" if row.projects else "none", not row.projects),
    )
    for x, (words, is_odd) in enumerate(cells):
        box = {"facecolor": style.ORANGE, "alpha": 0.28, "edgecolor": "none"} if is_odd else {"facecolor": "none"}
        axes.add_patch(plt.Rectangle((x - 0.48, y - 0.44), 0.96, 0.88, **box))
        axes.text(x, y, f"{words} !" if is_odd else words, ha="center", va="center", fontsize=9)


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
