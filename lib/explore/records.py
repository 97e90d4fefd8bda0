"""What explore.ipynb shows of the committed records: any figure of any variants, and the record behind a number."""

import warnings
from functools import partial

import ipywidgets as widgets
import pandas as pd

from lib import paths, record
from lib.analysis import compare, figures, growth, growth_figures, growth_tables, style, tables
from lib.errors import UsageError
from lib.explore.widgets import Folded, Screen
from lib.measure import assemble
from lib.record import scaling

FOLDERS = ("*", "by-*/*")  # the project's, and those of who contributed
OF_OTHER_KINDS = ("scaling-", "steps-", "capability-")  # points by length (`lengths`), steps in turns, probes


def records(folder: str = "records") -> Screen:
    """The records of a folder's folders: a figure or a ranking of those variants that are picked, and one in full."""
    found, root = {}, paths.from_root(folder)
    depths = (*FOLDERS, *(f"{depth}/{record.DEVICE_FOLDER}*" for depth in FOLDERS))
    there = {path for depth in depths for path in root.glob(depth)}
    for path in sorted(there, key=lambda path: (path.relative_to(root).as_posix().startswith("by-"), path)):
        if path.name.startswith(OF_OTHER_KINDS) or not any(path.glob("*.json")):
            continue
        runs = record.read(path)
        for group in compare.groups(runs) if len(runs) else []:  # notes of failed runs alone are no records
            found[f"{path.relative_to(root)}: {group.runs['device_name'].iloc[0]}, {group.title.split(', on ')[0]}"] = (
                path,
                group,
            )
    if not found:
        raise UsageError(f"there is no record in {folder}/; `make study` writes some")
    controls = {
        "group": widgets.Dropdown(options=list(found), description="records", layout={"width": "90%"}),
        "figure": widgets.Dropdown(
            options=[(draw.__name__.replace("_", " "), draw) for draw in figures.FIGURES],
            value=figures.loss_against_cost,
            description="figure",
        ),
        "by": widgets.Dropdown(
            options=[(unit, metric) for metric, (unit, _, _) in tables.RANKED.items()], description="rank by"
        ),
        "variants": widgets.SelectMultiple(description="variants", rows=9),
        "run": widgets.Dropdown(description="record"),
    }

    _offer(controls["variants"], controls["group"], lambda group: _titled(found[group][1].runs, style.labels))
    _offer(controls["run"], controls["group"], lambda group: sorted(found[group][1].runs["name"]))
    return Screen("published records", partial(records_page, found), controls)


def records_page(found: dict, group: str, figure, by: str, variants: tuple, run: str) -> list:
    path, runs = found[group][0], found[group][1].runs
    runs = runs[runs["label"].isin(variants)].reset_index(drop=True)
    if runs.empty:
        raise UsageError("pick at least one variant")
    return [figure(runs), tables.main(runs, by), f"The record {run}:", *facts(record.load(path / f"{run}.json"))]


LENGTH_FIGURES = {
    "decision map": growth_figures.decision_map_figure,
    "forward and backward, over SDPA's": partial(growth_figures.ratio_figure, metrics=["forward_backward_s"]),
    "forward and backward, ms": partial(growth_figures.growth_figure, metric="forward_backward_s", start=1024),
    "peak memory": partial(growth_figures.growth_figure, metric="peak_activation_bytes", start=1024),
    "prefill, decoding and cache": growth_figures.cache_and_decode_figure,
}


def lengths(folder: str = "records") -> Screen:
    """The records of cost against context length, one figure of those variants that are picked, and its points."""
    found, root = {}, paths.from_root(folder)
    for path in sorted(path for depth in ("", "by-*/") for path in root.glob(f"{depth}scaling-*")):
        try:
            of = scaling.load_all(path)
        except UsageError as error:
            warnings.warn(f"{record.printable(path.name)} is left out: {record.printable(error)}", stacklevel=2)
        else:
            found[f"{path.relative_to(root)}: {scaling.title(of)}"] = scaling.frame(of)
    if not found:
        raise UsageError(f"there is no scaling-... in {folder}/; `python -m lib.study.scaling --write` makes some")
    controls = {
        "group": widgets.Dropdown(options=list(found), description="records", layout={"width": "90%"}),
        "figure": widgets.Dropdown(options=list(LENGTH_FIGURES.items()), description="figure"),
        "variants": widgets.SelectMultiple(description="variants", rows=8),
    }
    _offer(controls["variants"], controls["group"], lambda group: _titled(found[group], growth.labels))
    return Screen("cost by context length, measured", partial(lengths_page, found), controls)


def lengths_page(found: dict, group: str, figure, variants: tuple) -> list:
    points = found[group][found[group]["label"].isin(variants)]
    if points.empty:
        raise UsageError("pick at least one variant")
    return [figure(points), Folded("the points", growth_tables.points_table(points))]


def _titled(found: pd.DataFrame, labels) -> list[tuple[str, str]]:
    """Variants to pick, by their titles."""
    titles = style.titles(found)
    return [(titles[label], label) for label in labels(found)]


def _offer(control, by, values) -> None:
    """Fills a control whenever `by` changes, and now: before the screen is made, so that it draws what is offered."""

    def fill(_=None):
        control.options = values(by.value)
        if isinstance(control, widgets.SelectMultiple):
            control.value = tuple(label for _, label in control.options)
        else:
            control.value = control.options[0]

    by.observe(fill, "value")
    fill()


def facts(one: record.Record) -> list[Folded]:
    """All that a record says but its series, a table for each of its parts; a missing number with its reason."""
    content = one.model_dump(mode="json", exclude={"series", "null_reasons", "checks", "schema_version"})
    parts = {"metrics": content.pop("metrics")}  # first, since it is what a reader came for
    parts |= {name: content.pop(name) for name in [name for name, part in content.items() if isinstance(part, dict)]}
    tables = {name: pd.DataFrame(_rows(values, one.null_reasons)) for name, values in parts.items()}
    tables["self-check"] = assemble.self_check(one)
    tables["who and when"] = pd.DataFrame(_rows(content, {}))
    return [Folded(name, table, is_open=name == "metrics") for name, table in tables.items()]


def _rows(values: dict, null_reasons: dict):
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from ({**row, "fact": f"{name}: {row['fact']}"} for row in _rows(value, {}))
        else:
            yield {"fact": name, "value": _readable(value, null_reasons.get(name))}


def _readable(value, reason: str | None) -> str:
    if reason is not None:
        return f"not measured: {record.REASONS[reason]}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value in (None, "", {}) else {True: "yes", False: "no"}.get(value, str(value))
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1e4 else f"{value:,.4g}"
