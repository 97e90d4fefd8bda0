"""The page of the table to look things up in: its HTML, its charts as Vega-Lite, and its rows as a script.

A page that opens from disk may fetch nothing, so the rows come as a script. Altair says what is drawn, vl-convert
brings Vega itself; `static/lookup.js` filters, sorts, and keeps the view in the address.
"""

import json

import altair as alt
import pandas as pd
import vl_convert

from lib import attention
from lib.attention import REFERENCE
from lib.site.lookup import COLUMNS

START = {  # what is shown first: what the answer above all rests on
    "kind": "training steps", "what": "Training step, time", "at": "8,192 tokens", "show": "ratio", "sort": "÷ SDPA",
    "order": "ascending",
}  # fmt: skip
FILTERS = {
    "kind": "measured by", "what": "what", "at": "at", "profile": "study", "device": "device",
}  # fmt: skip
DIGITS = 6  # of a number: more than any was measured to


def page(rows: pd.DataFrame) -> str:
    """The page as Markdown."""
    filters = "\n".join(
        f'<label>{said}<select id="lookup-{name}"></select></label>' for name, said in FILTERS.items()
    )  # fmt: skip
    return f"""---
html_theme.sidebar_secondary.remove: true
---

# Look it up

What the committed records hold of each variant and pattern, beside SDPA's in the same block, round or length where
there is one. A range or an interval stands in the tooltip, and behind each number its records. A click on a dot opens
the first of them; a cross, and a row in italics, are of a variant that failed its certificate. The address holds the
view, so a link to it shows the same. What each number means: [how to read the numbers](docs/numbers.md); all of it to
take away: [the data set](docs/dataset.md).

```{{raw}} html
<link rel="stylesheet" href="_static/lookup.css">
<noscript>A script filters this table. Without one: <a href="data/measurements.csv.gz">all as CSV</a>.</noscript>
<div class="lookup-filters" role="group" aria-label="Filters">
{filters}
<label>words<input id="lookup-text" type="search" placeholder="linear, window"></label>
<label>draw<select id="lookup-show"><option value="ratio">ratio to SDPA</option>
<option value="value">measured number</option></select></label>
<button id="lookup-all" type="button">show all</button>
<a id="lookup-link" href="#">link to this view</a>
</div>
<p id="lookup-said" role="status"></p>
<div id="lookup-chart"></div>
<p id="lookup-count" role="status"></p>
<div class="lookup-table" role="region" aria-label="Numbers" tabindex="0"><table>
<thead><tr id="lookup-head"></tr></thead><tbody id="lookup-body"></tbody></table></div>
<script src="_static/vega.js"></script>
<script src="_static/lookup-rows.js"></script>
<script src="_static/lookup.js"></script>
```
"""


def script(rows: pd.DataFrame) -> str:
    """The rows, the charts and what is shown first, as a script that sets `LOOKUP`."""
    start = START
    if not ((rows["kind"] == START["kind"]) & (rows["what"] == START["what"]) & (rows["at"] == 8192)).any():
        start = START | {"kind": "computed", "what": "Cache, GPT-2 small, bf16"}
    texts, short = {}, [[_short(value) for value in row] for row in rows.itertuples(index=False)]
    for place, column in enumerate(COLUMNS):  # a text stands there once, and its number in all rows that share it
        if any(isinstance(row[place], str | list) for row in short):
            known: dict[str, int] = {}
            for row in short:
                if row[place] is not None:
                    row[place] = known.setdefault(json.dumps(row[place]), len(known))
            texts[column] = [json.loads(text) for text in known]
    held = {
        "columns": COLUMNS, "rows": short, "texts": texts,
        "views": {"dots": dots().to_dict(), "lines": lines().to_dict()}, "start": start, "reference": REFERENCE,
        "pages": attention.variants(),
    }  # fmt: skip
    return f"window.LOOKUP = {json.dumps(held, ensure_ascii=True, allow_nan=False)};\n".replace("</", "<\\/")


def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, whose own names stay its own."""
    bundle = vl_convert.javascript_bundle(vl_version=alt.VEGALITE_VERSION.rpartition(".")[0])
    return f"(() => {{\n{bundle}\n}})();\n"


def _short(value):
    """A value as JSON has it, and no longer than it is sure."""
    if isinstance(value, str | bool | list):
        return value
    if pd.isna(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.{DIGITS}g}")


TOOLTIP = [
    alt.Tooltip(f"{name}:N", title=title)
    for name, title in {
        "variant": "variant", "measured": "measured", "beside": "÷ SDPA", "n": "n", "said": "verdict", "at_text": "at",
        "profile": "study", "setting": "setting", "device": "device", "certificate": "certificate",
    }.items()
]  # fmt: skip
SIZE = {"width": "container"}
SHAPE = alt.Shape(
    "certificate:N", legend=None,
    scale=alt.Scale(domain=["passed", "failed", "not of these records"], range=["circle", "cross", "circle"]),
)  # fmt: skip


def dots() -> alt.LayerChart:
    """A row per variant, the least first, with its interval or range."""
    base = alt.Chart(alt.NamedData("rows")).encode(
        y=alt.Y("variant:N", sort=alt.EncodingSortField("x", op="min"), title=None, axis=alt.Axis(labelLimit=260)),
        tooltip=TOOLTIP,
    )  # fmt: skip
    x = alt.X("x:Q", scale=alt.Scale(type="log", nice=False, padding=20), title=None)
    spans = base.mark_rule(strokeWidth=2, opacity=0.7, color="#4c78a8").encode(
        x=alt.X("low:Q", title=None), x2="high:Q"
    )
    points = base.mark_point(filled=True, size=80, color="#4c78a8", opacity=1).encode(x=x, shape=SHAPE, href="record:N")
    chart = alt.layer(spans.transform_filter("datum.low > 0"), points).properties(**SIZE, height=alt.Step(24))
    return chart.properties(autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))


def lines() -> alt.LayerChart:
    """Over length or difficulty: a line per variant, told apart by colour and dash."""
    base = alt.Chart(alt.NamedData("rows")).encode(
        x=alt.X("at:Q", scale=alt.Scale(type="log", base=2, nice=False, padding=20), title=None),
        color=alt.Color("variant:N", title=None), tooltip=TOOLTIP,
    )  # fmt: skip
    y = alt.Y("x:Q", scale=alt.Scale(type="log"), title=None)
    drawn = base.mark_line().encode(y=y, strokeDash=alt.StrokeDash("variant:N", legend=None), detail="setting:N")
    points = base.mark_point(filled=True, size=60, opacity=1).encode(y=y, href="record:N", shape=SHAPE)
    return alt.layer(drawn, points).properties(**SIZE, height=380)
