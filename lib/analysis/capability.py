"""What variants can do, from the records of `lib.study.probes`: the tables, figures and sentences of capability.ipynb.

Everything is of each variant's best rate for a task (`at_best`), with the median over its seeds and their range. A task
that SDPA does not solve, though it must, says nothing about others and is left out of every table.
"""

import json
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from lib import paths
from lib.analysis.style import BESIDE, INK, KIB, looks, tell, use_style
from lib.analysis.words import joined
from lib.attention import REFERENCE, STUDY_ORDER
from lib.data.tasks import TASKS
from lib.record import probe

MUST = {"recall": 0.99, "induction": 0.95, "lookup_key_behind": 0.95, "lookup_key_before": 0.95}  # SDPA, scaled
MUST_OF_TWO = {"recall_rewritten": 0.95}  # two layers of SDPA: one cannot tell which writing came last
SEEDS_WANTED = 3
CELLS, LONGER, TEXT = "records/capability-cpu", "records/capability-steps-cpu", "records/small-cpu"  # committed
SOLVED = 0.95  # scaled accuracy that counts as right
SMALLER = 0.98  # a share of SDPA's memory that is worth a word
SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # ticks


def in_one_setting(cells: pd.DataFrame) -> pd.DataFrame:
    """Of each task, with and without the convolution, the rows of the setting that most cells have: others are another
    question. The number of layers is a pattern's own and no part of it."""
    if cells.empty:
        return cells
    settings = {text: json.loads(text) | {"layers": None} for text in cells["setting"].unique()}
    asked = cells["setting"].map({text: json.dumps(one, sort_keys=True) for text, one in settings.items()})
    most = asked.groupby([cells["task"], cells["convolution"]]).transform(lambda own: own.value_counts().index[0])
    return cells[asked == most]


def trained_for(cells: pd.DataFrame) -> pd.Series:
    """The steps of training of each row."""
    return cells["setting"].map({text: json.loads(text)["steps"] for text in cells["setting"].unique()})


def folder_beside(folder: str, records: str, committed: str) -> str:
    """Of what is shown beside the cells of the folder `records`: `folder`, or for "beside" the `committed` one where
    `records` are the committed cells, else none: numbers of two authors are not mixed unasked."""
    if folder != "beside":
        return folder
    return committed if records == CELLS else ""


def beside(folder: str, records: str, cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of more training that are shown beside the `cells` of the folder `records` (`folder_beside`); these
    themselves where there are none."""
    folder = folder_beside(folder, records, LONGER)
    return probe.frame(probe.load_all(paths.from_root(folder))) if folder else cells


def of_most_steps(cells: pd.DataFrame) -> pd.DataFrame:
    """Of each task, the rows of the most steps of training that three seeds of somebody had at one rate, so that a lone
    longer cell puts nobody's results aside; of the most of all where nobody has three seeds."""
    steps = trained_for(cells).rename("steps")
    usable = cells["accuracy"].notna()
    seeds = cells[usable].groupby(["task", steps[usable], "label", "rate"])["seed"].nunique()
    enough = seeds[seeds >= SEEDS_WANTED].reset_index().groupby("task")["steps"].max()
    most = cells["task"].map(enough).fillna(steps.groupby(cells["task"]).transform("max"))
    return cells[steps == most]


def at_best(cells: pd.DataFrame) -> pd.DataFrame:
    """The rows at each variant's best rate for a task (`probe.best_rate`)."""
    usable = in_one_setting(cells).dropna(subset=["accuracy", "scaled"]).reset_index(drop=True)
    if usable.empty:
        return usable
    who = usable.groupby(["label", "title", "task", "convolution", "setting"], sort=False).ngroup().rename("who")
    found: dict[int, dict] = {}
    columns = (usable[name] for name in ("difficulty", "rate", "seed", "scaled"))
    for one, difficulty, rate, seed, scaled in zip(who, *columns, strict=True):
        found.setdefault(one, {}).setdefault(difficulty, {}).setdefault(rate, {})[seed] = scaled
    kept = usable[usable["rate"] == who.map({one: probe.best_rate(own) for one, own in found.items()})]
    return kept.loc[who[kept.index].sort_values(kind="stable").index].reset_index(drop=True)


def summary(cells: pd.DataFrame) -> pd.DataFrame:
    """A row per variant, task, convolution and difficulty: `rate`, `n` seeds, `median`, `low` and `high` (scaled
    accuracy), `solved`: how many seeds reach `SOLVED`, `state_bytes`; `hardest` says whether this is the task's hardest
    difficulty."""
    keys = ["label", "title", "task", "convolution", "difficulty"]
    best = at_best(cells)
    best = best.assign(right=best["scaled"] >= SOLVED)
    found = best.groupby(keys, sort=False, as_index=False).agg(
        rate=("rate", "first"), n=("seed", "nunique"), median=("scaled", "median"), low=("scaled", "min"),
        high=("scaled", "max"), solved=("right", "sum"), state_bytes=("state_bytes", "first"),
    )  # fmt: skip
    found["hardest"] = found["difficulty"] == found.groupby(["task", "convolution"])["difficulty"].transform("max")
    return found


def labels(cells: pd.DataFrame) -> list[str]:
    """The paper's variants in their order, then others and patterns by name."""
    place = {name: index for index, name in enumerate(STUDY_ORDER)}
    return sorted(cells["label"].unique(), key=lambda label: (place.get(label, len(place)), label))


def shown_tasks(cells: pd.DataFrame) -> list[str]:
    """The tasks, in the order of `lib.data.tasks`, of which SDPA shows that they can be learnt here."""
    return [name for name in TASKS if name in set(cells["task"]) and why_not_shown(cells, name) is None]


def why_not_shown(cells: pd.DataFrame, task: str) -> str | None:
    own = summary(cells)
    own = own[(own["task"] == task) & (own["convolution"] == TASKS[task].net.convolution)]
    found = own[own["hardest"]].set_index("label")["median"]
    for label, must in ((REFERENCE, MUST.get(task)), (f"{REFERENCE}+{REFERENCE}", MUST_OF_TWO.get(task))):
        if must is None:
            continue
        if label not in found.index:
            return f"{TASKS[task].title} is not shown: {label} was not tried, which has to solve it"
        reached = found[label] if task in MUST_OF_TWO else _easiest(own, task, label)
        if np.isnan(reached):
            return f"{TASKS[task].title} is not shown: {label} was not tested at what it has to solve"
        if reached < must:
            return f"{TASKS[task].title} is not shown: {label} reaches {reached:z.2f} where it must reach {must:z.2f}"
    return None


def _easiest(found: pd.DataFrame, task: str, label: str) -> float:
    """Of a task's `summary` the median where training and test agree in length; for recall that is its hardest
    difficulty too."""
    own = found.loc[(found["label"] == label) & (found["difficulty"] <= max(TASKS[task].trained_on)), "median"]
    return float(own.iloc[-1]) if len(own) else np.nan


def _rows(cells: pd.DataFrame, task: str, convolution: bool | None = None) -> pd.DataFrame:
    """Of one task at its hardest difficulty, a row per label."""
    found = summary(cells)
    found = found[(found["task"] == task) & found["hardest"]]
    if convolution is None:
        convolution = TASKS[task].net.convolution
    return found[found["convolution"] == convolution].set_index("label")


def _cell(row) -> str:
    if row is None:
        return "–"
    spread = "" if row["n"] == 1 else f" [{row['low']:z.2f}, {row['high']:z.2f}]"
    return f"{row['median']:z.2f}{spread} (n = {row['n']})"


def _of(rows: pd.DataFrame, label: str):
    return rows.loc[label] if label in rows.index else None


def tasks_table(cells: pd.DataFrame, longer: pd.DataFrame | None = None) -> pd.DataFrame:
    """Variants x tasks at the hardest difficulty; of recall also what `longer`, cells of more training, say."""
    later = _later(longer)
    title = dict(zip(cells["label"], cells["title"], strict=True))
    columns = {task: _rows(cells, task) for task in shown_tasks(cells)}
    table = []
    for label in labels(cells):
        row = {"variant": title[label]}
        for task, rows in columns.items():
            hardest = max(TASKS[task].tested_on)
            own = _of(rows, label)
            more = "" if own is None or task != "recall" else later(label)
            more += "" if own is None or own["title"] == title[label] else f", as {own['title']}"
            row[f"{TASKS[task].title}, {hardest} {TASKS[task].unit}"] = _cell(own) + more
        table.append(row)
    return pd.DataFrame(table)


def difficulty_table(cells: pd.DataFrame) -> pd.DataFrame:
    """A row per task and variant, a column per step of difficulty, medians."""
    found, table = summary(cells), []
    for task in shown_tasks(cells):
        for label in labels(cells):
            net = TASKS[task].net
            own = found[(found["task"] == task) & (found["label"] == label) & (found["convolution"] == net.convolution)]
            if own.empty:
                continue
            said = [f"{row.difficulty:.0f}: {row.median:z.2f}" for row in own.sort_values("difficulty").itertuples()]
            table.append(
                {
                    "task": TASKS[task].title,
                    "variant": own["title"].iloc[0],
                    "scaled accuracy by difficulty": ", ".join(said),
                }
            )
    return pd.DataFrame(table)


def rates_table(cells: pd.DataFrame, longer: pd.DataFrame | None = None) -> pd.DataFrame:
    """Median scaled accuracy at the hardest difficulty for every rate, a row per task and variant; of recall also in
    `longer`, cells of more training."""
    table, tried = [], [(task, TASKS[task].title, cells) for task in shown_tasks(cells)]
    steps, more = (0, None) if longer is None else _longest_recall(longer)
    if steps and "recall" in shown_tasks(cells):
        tried.append(("recall", f"{TASKS['recall'].title}, {steps:,} steps", more))
    rates = sorted({rate for *_, own in tried for rate in own["rate"]})
    for task, said, own in sorted(tried, key=lambda one: list(TASKS).index(one[0])):
        own = in_one_setting(own)
        own = own[(own["task"] == task) & (own["difficulty"] == max(TASKS[task].tested_on))]
        own = own[own["convolution"] == TASKS[task].net.convolution]
        medians = own.groupby(["label", "rate"])["scaled"].agg(["median", "count"])
        title = dict(zip(own["label"], own["title"], strict=True))
        for label in labels(own):
            row = {"task": said, "variant": title[label]}
            for rate in rates:
                value = medians.loc[(label, rate)] if (label, rate) in medians.index else None
                row[f"rate {rate:g}"] = "–" if value is None else f"{value['median']:z.2f} (n = {value['count']:.0f})"
            table.append(row)
    return pd.DataFrame(table)


def convolution_table(cells: pd.DataFrame) -> pd.DataFrame | str:
    """Recall with and without the convolution before the mixer; a sentence where nobody was tried both ways."""
    title = dict(zip(cells["label"], cells["title"], strict=True))
    columns = {"with the convolution": True, "without": False}
    rows = {column: _rows(cells, "recall", with_it) for column, with_it in columns.items()}
    tried = [label for label in labels(cells) if all(label in found.index for found in rows.values())]
    if not tried:
        return "Recall with and without the convolution: not tried in these records."
    return pd.DataFrame(
        [
            {"variant": title[label]} | {column: _cell(_of(found, label)) for column, found in rows.items()}
            for label in tried
        ],
        columns=["variant", *columns],
    )


def _of_recall(cells: pd.DataFrame) -> pd.DataFrame:
    return cells[(cells["task"] == "recall") & (cells["convolution"] == TASKS["recall"].net.convolution)]


def layers(cells: pd.DataFrame) -> pd.Series:
    """The layers of each label's net in recall: one for a variant alone, of a pattern one for each of its mixers."""
    settings = _of_recall(cells).groupby("label")["setting"].first()
    return settings.map(lambda text: json.loads(text)["layers"]).astype(int)  # also of none


def state_shares(cells: pd.DataFrame) -> pd.Series:
    """By label, what its mixers keep in recall, as a share of what SDPA keeps in a net of as many layers."""
    own = _of_recall(cells)
    hardest = own[own["difficulty"] == max(TASKS["recall"].tested_on)]
    of_a_layer = hardest.groupby("label")["state_bytes"].first() / layers(cells)
    return of_a_layer / of_a_layer.get(REFERENCE, np.nan)


def recall_table(cells: pd.DataFrame, longer: pd.DataFrame | None = None) -> pd.DataFrame | str:
    """What each recalls and keeps for it, the smallest share of SDPA's memory first, and what it recalls after the most
    steps of training that some were given, where they were. A sentence where recall was not tried."""
    net, title = TASKS["recall"].net, "Recall and what is kept for it"
    cells = _of_recall(cells if longer is None else pd.concat([cells, longer]))
    cells = cells.drop_duplicates(["label", "setting", "rate", "seed", "difficulty"])
    if cells["accuracy"].isna().all():
        return f"{title}: not tried in these records."
    usual, most = cells[trained_for(cells) == net.steps], of_most_steps(cells)
    columns = {net.steps: usual, trained_for(most).max(): most}
    rows = {f"{steps:,} steps": _rows(own, "recall") for steps, own in columns.items() if len(own)}
    anybody = pd.concat(rows.values()).groupby(level=0).first()
    in_layers, share = layers(cells), state_shares(cells)[anybody.index]
    return pd.DataFrame([
        {
            "variant": anybody.loc[label, "title"], "layers": in_layers[label],
            "of SDPA's memory": "–" if np.isnan(share[label]) else f"{share[label]:.0%}",
            "kept, KiB": f"{anybody.loc[label, 'state_bytes'] / KIB:.3g}",
        }
        | {column: _cell(_of(own, label)) for column, own in rows.items()}
        for label in share.sort_values(kind="stable").index
    ])  # fmt: skip


# Zoology's figure 2 and the later curves of its repository, read off by state size (numbers kept), ±0.02: accuracy in
# MQAR with a convolution, two layers (shared by the team from the published figures).
PUBLISHED = pd.DataFrame(
    [
        ("attention", 524_288, 1.00), ("sliding window", 9_000, 0.08), ("sliding window", 17_000, 0.14),
        ("sliding window", 33_000, 0.31), ("sliding window", 66_000, 0.51), ("sliding window", 131_000, 0.66),
        ("Based (linear)", 9_000, 0.67), ("Based (linear)", 33_000, 0.84), ("Based (linear)", 66_000, 0.86),
    ],
    columns=["mixer", "numbers kept", "accuracy"],
)  # fmt: skip


def published_table(cells: pd.DataFrame) -> pd.DataFrame:
    """Published accuracies in MQAR beside ours by what is kept, each in numbers; the settings differ."""
    title = dict(zip(cells["label"], cells["title"], strict=True))
    rows = [
        {"mixer": one.mixer, "numbers kept": one[2], "accuracy": f"{one.accuracy:z.2f}", "from": "published, zoology"}
        for one in PUBLISHED.itertuples()
    ]
    ours = _rows(cells, "recall")
    rows += [
        {
            "mixer": title[label], "numbers kept": int(ours.loc[label, "state_bytes"] / 4),
            "accuracy": f"{ours.loc[label, 'median']:z.2f}", "from": "here, 32 pairs in 128 tokens",
        }
        for label in labels(cells) if label in ours.index
    ]  # fmt: skip
    table = pd.DataFrame(rows).sort_values(["from", "numbers kept"], kind="stable")
    table["numbers kept"] = table["numbers kept"].map("{:,}".format)
    return table.reset_index(drop=True)


ORDERED = {"sdpa": "attention", "linear": "Based (linear)", "sliding_window": "sliding window"}  # ours: zoology's


def published_order(cells: pd.DataFrame) -> list[str]:
    """Whether the three mixers that zoology's figure has too stand in its order here, and what forbids to say more."""
    ours = _rows(cells, "recall")
    tried = [label for label in ORDERED if label in ours.index]
    if len(tried) < 2 or "recall" not in shown_tasks(cells):
        return ["Too few of the mixers of zoology's figure were tried here to compare the order."]
    best = {label: PUBLISHED.loc[PUBLISHED["mixer"] == ORDERED[label], "accuracy"].max() for label in tried}
    theirs = sorted(tried, key=best.get, reverse=True)
    said = joined([f"{ours.loc[label, 'title']} {ours.loc[label, 'median']:z.2f}" for label in theirs])
    turned = [(a, b) for a, b in pairwise(theirs) if ours.loc[a, "low"] <= ours.loc[b, "high"]]
    order = "attention first, linear attention next, a window last"
    if not turned:
        first = f"The order of zoology's figure ({order}) is found again, seed by seed: {said}."
    else:
        names = joined([f"{ours.loc[a, 'title']} and {ours.loc[b, 'title']}" for a, b in turned])
        first = f"The order of zoology's figure ({order}) is not found again of every seed: {said}; {names} overlap."
    return [
        first,
        "More cannot be compared: there a mixer's state was varied from 9,000 to 524,288 numbers, two layers were "
        "trained, and linear attention was Based's Taylor map, where ours is elu + 1; the window there lies within "
        "reach of some of the pairs. State by state only these of ours and theirs stand side by side, in the table.",
    ]


def recall_figure(cells: pd.DataFrame, longer: pd.DataFrame | None = None):
    """Scaled accuracy in recall against what the mixers keep, as a share of SDPA's memory in as many layers: seeds as
    points, the median as a line, and hollow, at the end of a dotted line, the same after more steps of training, of
    which `longer` are the cells. Who keeps about as much stands side by side. Without SDPA the bytes themselves; what
    computes its function is its own point."""
    use_style()
    rows, best, share = _rows(cells, "recall"), at_best(cells), state_shares(cells)
    rows = rows.drop(index=one_function(cells), errors="ignore")
    is_share = share.notna().any()
    kept = share if is_share else rows["state_bytes"] / KIB
    best = best[
        (best["task"] == "recall") & best["convolution"] & (best["difficulty"] == max(TASKS["recall"].tested_on))
    ]
    names = [label for label in labels(cells) if label in rows.index]
    drawn_at = _side_by_side(kept[rows["median"].sort_values(kind="stable").index])
    figure, axes = plt.subplots(figsize=(8.4, max(4.4, 1 + 0.24 * len(names))))  # as high as its legend
    look, (steps, later) = looks(names), _of_more_steps(longer)
    for label in names:
        row, own, x = rows.loc[label], best[best["label"] == label], drawn_at[label]
        line = [x * APART**-0.45, x * APART**0.45]
        style = look[label] | {"linestyle": ""}
        axes.plot([x] * len(own), own["scaled"], alpha=0.55, markersize=6, label=row["title"], **style)
        axes.plot(line, [row["median"]] * 2, color=look[label]["color"], linewidth=2.5)
        if (more := _of(later, label)) is not None:
            color, hollow = look[label]["color"], {"markersize": 7, "markerfacecolor": "none"}
            axes.plot([x, x], [row["median"], more["median"]], ":", color=color, linewidth=1.2, zorder=1)
            axes.plot([x] * len(more["seeds"]), more["seeds"], **style | hollow)
            axes.plot(line, [more["median"]] * 2, color=color, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel(
        ("share of SDPA's memory in as many layers" if is_share else "KiB that the mixers keep, fp32")
        + ", of one sequence of 128 tokens; alike: side by side"
    )
    axes.set_ylabel("scaled accuracy (0: guessing)")
    after = f" after {trained_for(best).iloc[0]:,} steps of training" if len(best) else ""
    after += f" (hollow: {steps:,})" if len(later) else ""
    axes.set_title(f"Recall of 32 pairs{after}, against what is kept", loc="left")
    if is_share:
        axes.set_xticks([one for one in SHARES if one >= 0.9 * kept[names].min()])
        axes.minorticks_off()
    axes.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: _kept(value, is_share, "")))
    axes.legend(**BESIDE)
    also = _later(longer)
    said = [
        f"{row['title']} {row['median']:z.2f}{also(label)} with {_kept(kept[label], is_share)}"
        for label, row in rows.iterrows()
    ]
    return tell(figure, f"Recall of 32 pairs, median scaled accuracy and what is kept: {', '.join(said)}.")


ALIKE, APART = 1.2, 1.05  # up to which factor two keep about as much; the step from one to the next that do


def _side_by_side(kept: pd.Series) -> pd.Series:
    """Where each is drawn on a logarithmic axis: those that keep about as much beside each other, by what they keep and
    then in the order given. None is drawn further from its group's middle than members of a group may be apart."""
    logs, groups = np.log(kept.sort_values(kind="stable")), []
    for label, value in logs.items():
        if not groups or value - logs[groups[-1][0]] > np.log(ALIKE):
            groups.append([])
        groups[-1].append(label)
    found = {}
    for group in groups:
        step = min(np.log(APART), np.log(ALIKE) / len(group))
        middle = logs[group].mean()
        found |= {label: middle + step * (place - (len(group) - 1) / 2) for place, label in enumerate(group)}
    return np.exp(pd.Series(found, dtype=float))


def _kept(value: float, is_share: bool, unit: str = " KiB") -> str:
    return f"{100 * value:.3g}%" if is_share else f"{value:.3g}{unit}"


def learning_figure(shown: pd.DataFrame):
    """Loss by step and accuracy in words, of what `lib.study.probes.learning` trained just now."""
    use_style()
    figure, axes = plt.subplots(figsize=(7, 3.2))
    names = list(dict.fromkeys(shown["label"]))
    look = looks(names)
    for label in names:
        own = shown[shown["label"] == label]
        smooth = own["loss"].ewm(span=15).mean()
        said = f"{own['title'].iloc[0]}: accuracy {own['accuracy'].iloc[-1]:.0%}"
        axes.plot(own["step"], smooth, **look[label] | {"marker": ""}, linewidth=1.8, label=said)
    task = TASKS[shown["task"].iloc[0]]
    axes.axhline(-np.log(shown["chance"].iloc[0]), color=INK, linewidth=1, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{task.title}, learnt just now (dotted: guessing)", loc="left")
    axes.set_xlabel("steps")
    axes.set_ylabel("loss, nats")
    axes.legend(loc="lower left")
    plt.close(figure)  # or a notebook shows it twice
    return figure


def _easiest_of(cells: pd.DataFrame, task: str):
    """How much better a label does where least is asked: in words, or empty."""
    found = summary(cells)
    found = found[(found["task"] == task) & (found["convolution"] == TASKS[task].net.convolution)]

    def said(label: str, row) -> str:
        first = found[found["label"] == label].sort_values("difficulty").iloc[0]
        if first["median"] - row["median"] < 0.05 or first["median"] < 0.05:
            return ""
        return f" ({first['median']:z.2f} of {first['difficulty']:.0f} {TASKS[task].unit})"

    return said


def remarks(cells: pd.DataFrame) -> list[str]:
    """A sentence for each task that is not shown, each cell that failed, and what each failure means."""
    title = dict(zip(cells["label"], cells["title"], strict=True))
    own = cells[cells["made_of"] != ""].drop_duplicates(["title", "made_of"])
    said = [f"{row.title} is {row.made_of}." for row in own.itertuples()]
    said += [why for task in TASKS if task in set(cells["task"]) for why in [why_not_shown(cells, task)] if why]
    other = cells.drop(in_one_setting(cells).index).drop_duplicates(["label", "task", "rate", "seed", "setting"])
    if len(other):
        said.append(f"Left out, of another setting than most of their task: n = {len(other)}.")
    lost = cells[cells["outcome"] != "measured"].drop_duplicates(["label", "task", "rate", "seed"])
    for row in lost.itertuples():
        said.append(
            f"{row.title}, {row.task}, rate {row.rate:g}, seed {row.seed}: no result ({row.outcome}: {row.says})"
        )
    same = [title[label] for label in one_function(cells)]
    if same:
        verb = "computes" if len(same) == 1 else "compute"
        said.append(f"{joined(same)} {verb} SDPA's function: the same numbers in every cell that both have.")
    for task in shown_tasks(cells):
        rows = _rows(cells, task)
        said += [gives_in(cells, task), *best_at_the_edge(cells, task)]
        untried = [title[label] for label in labels(cells) if label not in rows.index]
        if untried:
            said.append(f"{TASKS[task].title}: {joined(untried)} {'was' if len(untried) == 1 else 'were'} not tried.")
    few = at_best(cells).groupby(["label", "task", "convolution"])["seed"].nunique()
    if (few < SEEDS_WANTED).any():
        said.append(f"{(few < SEEDS_WANTED).sum()} of {len(few)} entries rest on fewer than {SEEDS_WANTED} seeds.")
    return said


def one_function(cells: pd.DataFrame) -> list[str]:
    """Labels of what has SDPA's number in each cell that both have, one of them neither right nor guessed.

    It is SDPA's function computed in another way, and no result of its own."""
    keys = ["task", "convolution", "setting", "rate", "seed", "difficulty"]
    wide = cells.dropna(subset=["accuracy"]).pivot_table(index=keys, columns="label", values="scaled")
    found = []
    for label in set(wide) - {REFERENCE} if REFERENCE in wide else ():
        both = wide[[REFERENCE, label]].dropna()
        if both[REFERENCE].between(0.1, 0.999).any() and np.isclose(both[REFERENCE], both[label]).all():
            found.append(label)
    return [label for label in labels(cells) if label in found]


def _with_reference(cells: pd.DataFrame) -> str:
    """SDPA, and what computes its function in another way."""
    title = dict(zip(cells["label"], cells["title"], strict=True))
    same = [title[label] for label in one_function(cells)]
    return f"{title[REFERENCE]} (and {joined(same)}, the same function)" if same else title[REFERENCE]


def gives_in(cells: pd.DataFrame, task: str) -> str:
    """Who is right up to which difficulty, every seed of it, who not even at the easiest, and of how many rates."""
    found, unit, same = summary(cells), TASKS[task].unit, one_function(cells)
    found = found[(found["task"] == task) & (found["convolution"] == TASKS[task].net.convolution)]
    hardest, by_reach, never = found["difficulty"].max(), {}, []
    for label in (label for label in labels(found) if label not in same):
        own = found[found["label"] == label].sort_values("difficulty")
        right = own[(own["low"] >= SOLVED).cummin()]
        if right.empty:
            first, last = own.iloc[0], own.iloc[-1]
            far = f", {last['median']:z.2f} at {last['difficulty']:,.0f}" if len(own) > 1 else ""
            near = f"{first['median']:z.2f} {_spread(first)}".strip()
            never.append(f"{first['title']} ({near} at {first['difficulty']:,.0f}{far})")
        else:
            by_reach.setdefault(right["difficulty"].iloc[-1], []).append(own["title"].iloc[0])
    parts = [
        f"{reach:,.0f} {unit}{', the hardest' if reach == hardest else ''}: {joined(by_reach[reach])}"
        for reach in sorted(by_reach, reverse=True)
    ]
    parts += [f"nowhere: {joined(never)}"] if never else []
    tried = in_one_setting(cells)
    tried = tried[(tried["task"] == task) & (tried["convolution"] == TASKS[task].net.convolution)]
    counts = tried.groupby("label")["rate"].nunique()
    rates = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    return (
        f"{TASKS[task].title}, up to where every seed has {SOLVED} or more: {'; '.join(parts)}. Each at the best of "
        f"{rates} rate{'' if counts.max() == 1 else 's'}: what was not learnt then is not shown to be beyond a variant."
    )


def best_at_the_edge(cells: pd.DataFrame, task: str) -> list[str]:
    """Whose best rate is the lowest or the highest that was tried: in a sentence, or none."""
    tried, same, edges = in_one_setting(cells), one_function(cells), {}
    tried = tried[(tried["task"] == task) & (tried["convolution"] == TASKS[task].net.convolution)]
    rows = _rows(cells, task)
    for label in (label for label in labels(cells) if label in rows.index):
        row, rates = rows.loc[label], tried.loc[tried["label"] == label, "rate"]
        for which, edge in (("highest", rates.max()), ("lowest", rates.min())):
            if rates.nunique() > 1 and row["rate"] == edge and label not in same:
                edges.setdefault((which, edge), []).append(row["title"])
    said = [f"the {which} tried, {edge:g}, of {joined(names)}" for (which, edge), names in sorted(edges.items())]
    if not said:
        return []
    return [f"{TASKS[task].title}: the best rate is {' and '.join(said)}; beyond it may lie a better one."]


def rate_matters(cells: pd.DataFrame) -> str:
    """How far the rate alone moves recall: that of who needs it most of those that every seed solves, and of SDPA, by
    difficulty, at its worst rate. docs/capability.md shows it."""
    rows, hardest = _rows(cells, "recall"), max(TASKS["recall"].tested_on)
    own = in_one_setting(cells)
    own = own[(own["task"] == "recall") & (own["convolution"] == TASKS["recall"].net.convolution)]
    by = own.groupby(["label", "rate", "difficulty"])["scaled"].agg(["median", "count"])
    last = by.xs(hardest, level="difficulty")
    low = last["median"].groupby("label").min()
    label = low[[one for one in rows.index[rows["low"] >= SOLVED] if one in low]].idxmin()
    best = rows.loc[label, "rate"]
    rest = [
        f"{row['median']:z.2f} at {rate:g} (n = {row['count']:.0f})"
        for rate, row in last.loc[label].iterrows() if rate != best
    ]  # fmt: skip
    worst = last.loc[REFERENCE, "median"].idxmin()
    mine = by.loc[(REFERENCE, worst)]
    return (
        f"In recall of {hardest} pairs {rows.loc[label, 'title']} has {rows.loc[label, 'median']:z.2f} at rate "
        f"{best:g} (n = {rows.loc[label, 'n']}), and {joined(rest)}; {rows.loc[REFERENCE, 'title']} at its worst rate, "
        f"{worst:g}, has {joined([f'{value:z.2f}' for value in mine['median']])} of "
        f"{joined([f'{pairs:.0f}' for pairs in mine.index])} pairs (n = {mine['count'].min():.0f})."
    )


def _spread(row) -> str:
    return "" if row["n"] == 1 else f"[{row['low']:z.2f}, {row['high']:z.2f}]"


def _later(longer: pd.DataFrame | None):
    """By label in words, what at least three seeds recall after more steps of training; empty of who had none."""
    steps, rows = _of_more_steps(longer)

    def said(label):
        row = _of(rows, label)
        known = "" if row is None else f"{row['median']:z.2f} {_spread(row)}".rstrip()
        return known and f", after {steps:,} steps {known} (n = {row['n']})"

    return said


def _longest_recall(longer: pd.DataFrame) -> tuple[int, pd.DataFrame]:
    """The most steps of training in recall beyond the task's own, and their cells; 0 where there are none."""
    most = of_most_steps(_of_recall(longer))
    steps = 0 if most.empty else trained_for(most).max()
    return (steps if steps > TASKS["recall"].net.steps else 0), most


def _of_more_steps(longer: pd.DataFrame | None) -> tuple[int, pd.DataFrame]:
    """The most steps of training in recall beyond the task's own, and a row per label of which three seeds had them;
    `seeds` are their scaled accuracies."""
    steps, most = (0, None) if longer is None else _longest_recall(longer)
    if not steps:
        return 0, pd.DataFrame()
    rows, best = _rows(most, "recall"), at_best(most)
    seeds = best[best["difficulty"] == best["difficulty"].max()].groupby("label")["scaled"].agg(list)
    return steps, rows[rows["n"] >= SEEDS_WANTED].join(seeds.rename("seeds"))


def _other_tasks(cells: pd.DataFrame) -> list[str]:
    """Of the tasks beside recall, who solves the hardest from every one of three seeds or more: a sentence; none where
    none is shown."""
    same, said = one_function(cells), []
    for name in shown_tasks(cells):
        if name == "recall":
            continue
        task, own = TASKS[name], summary(cells)
        own = own[(own["task"] == name) & (own["convolution"] == task.net.convolution) & ~own["label"].isin(list(same))]
        able = own[(own["low"] >= SOLVED) & (own["n"] >= SEEDS_WANTED)]
        hardest, furthest = max(task.tested_on), able["difficulty"].max()
        solve = joined(list(able.loc[able["difficulty"] == furthest, "title"]) or ["nobody"])
        if len(able) and furthest < hardest:
            solve = f"nobody, and of {furthest:,.0f} {solve}"
        said.append(f"{task.title} ({hardest:,} {task.unit}): {solve}")
    start = f"Who solves the hardest of each other task from every one of {SEEDS_WANTED} seeds or more"
    return [f"{start}: {'; '.join(said)}."] if said else []


def beside_recall(cells: pd.DataFrame) -> pd.DataFrame:
    """Of the other tasks whose hardest SDPA solves from every one of three seeds or more: a row per task and label,
    with `task`, `label`, `title`, `n`, `median`, `low` and `high`."""
    found = []
    for name in shown_tasks(cells):
        rows = _rows(cells, name)
        sdpa = rows[(rows.index == REFERENCE) & (rows["low"] >= SOLVED) & (rows["n"] >= SEEDS_WANTED)]
        if name != "recall" and len(sdpa):
            found.append(rows.reset_index().assign(task=TASKS[name].title))
    columns = ["task", "label", "title", "n", "median", "low", "high"]
    return pd.concat(found, ignore_index=True)[columns] if found else pd.DataFrame(columns=columns)


def asked_table(cells: pd.DataFrame) -> pd.DataFrame:
    """The tasks of these records: what each asks, how hard it is made, what net learns it, and where it is from."""
    return pd.DataFrame([
        {
            "task": task.title, "asks to": task.asks,
            "trained on": f"{' to '.join(f'{of:,}' for of in sorted({*task.trained_on[:1], *task.trained_on[-1:]}))} "
            f"{task.unit}",
            "tested on": f"up to {max(task.tested_on):,}", "layers": task.net.layers,
            "steps": f"{task.net.steps:,}", "from": task.paper,
        }
        for name, task in TASKS.items() if name in set(cells["task"])
    ])  # fmt: skip


def conclusion(cells: pd.DataFrame, longer: pd.DataFrame | None = None) -> list[str]:
    """Who recalls from every seed and at what memory, who from some, who does not, and how sure that is. Of the last,
    what it recalls in `longer`, cells of more training, where three seeds had it."""
    rows = _rows(cells, "recall")
    if "recall" not in shown_tasks(cells) or rows.empty:
        return ["Recall cannot be judged from these records: SDPA does not solve it in them."]
    n, share = int(rows["n"].min()), state_shares(cells)
    rows = rows.drop(index=[label for label in one_function(cells) if label in rows.index])
    rows.loc[REFERENCE, "title"] = _with_reference(cells)
    solves = rows[rows["low"] >= SOLVED]
    solves = solves.loc[share[solves.index].sort_values(kind="stable").index]
    unsure = rows[(rows["median"] >= SOLVED) & (rows["low"] < SOLVED)]
    judged = rows["median"].copy()  # by the longest training that three seeds had
    judged.update(_of_more_steps(longer)[1].get("median", judged.iloc[:0]))
    fails = rows[(rows["median"] < SOLVED) & (judged < 0.5)].sort_values("median")
    between = rows[(rows["median"] < SOLVED) & (judged >= 0.5)]
    said = []
    if len(solves):
        less = [f"{row['title']} with {share[label]:.0%}" for label, row in solves.iterrows() if share[label] < SMALLER]
        said.append(
            f"Of 32 pairs in 128 tokens {joined(list(solves['title']))} recall{'s' * (len(solves) == 1)} all, from "
            f"every seed (scaled accuracy {SOLVED} or more)"
            + (f"; {joined(less)} of SDPA's memory in as many layers." if less else ".")
        )
    else:
        said.append("Of 32 pairs in 128 tokens nobody recalls all from every seed.")
    if len(unsure):
        which = [
            f"{row.title} from {row.solved} of {row.n} (median {row.median:z.2f}, {row.low:z.2f} at worst)"
            for row in unsure.itertuples()
        ]
        said.append(f"Not from every seed: {joined(which)}.")
    easiest, later = _easiest_of(cells, "recall"), _later(longer)
    half = "by the longest training"
    for what, part in ((f"Half or more, {half}", between), (f"Less than half, {half}", fails)):
        if len(part):
            which = [
                f"{row['title']} {row['median']:z.2f} {_spread(row)}".strip() + easiest(label, row) + later(label)
                for label, row in part.iterrows()
            ]
            said.append(f"{what}, at the best rate tried: {joined(which)}.")
    few = _of_more_steps(longer)[1]
    if not few.empty:
        shorter = [
            row["title"] for part in (between, fails) for label, row in part.iterrows() if label not in few.index
        ]
        said += [f"Not trained for longer, so not shown to be unable: {joined(shorter)}."] if shorter else []
    said += _other_tasks(cells)
    steps = trained_for(in_one_setting(cells[cells["task"] == "recall"])).iloc[0]
    said.append(
        f"Medians over {n} seed{'s' if n > 1 else ''} or more at the best of the rates tried, {steps:,} steps of "
        f"training{' where no more are said' * (not few.empty)}, one small net on a CPU."
    )
    return said
