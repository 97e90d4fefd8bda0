"""Tables and texts as HTML: the one place where anything that is shown on a page becomes markup.

Whatever a cell, a heading or a sentence holds is shown as it is written: no tag of it lives, and no formula, since
JupyterLab sets what stands between dollar signs in HTML too, and a formula can link to a script.
"""

import base64
import html
import re
from numbers import Number

import pandas as pd
from IPython.display import HTML

NUMBER = re.compile(r"[-+−×÷T^]*\d[\d.,e^-]*%?( [KMG]iB)?( \[.*\])?$|–$|nan$|None$")
CARD = "border-left: 4px solid #0f7ac0; padding: 2px 0 2px 14px"
NO_FORMULAS = "tex2jax_ignore mathjax_ignore"  # the classes at which MathJax looks away


def table(frame: pd.DataFrame | str, align: str | None = None, quiet=(), bold=(), **numbers) -> HTML:
    """A table as a notebook shows it: without the row numbers, and with the same HTML for the same content.

    Words stand at the left and numbers at the right of their column, or all at the side that `align` names. A sentence
    that stands for a table is shown as it is. `quiet`, `bold`: places of rows that stand back, or out. `numbers`: how
    they are written, as `Styler.format` has it.
    """
    if isinstance(frame, str):
        return lines([frame])
    content = pd.util.hash_pandas_object(frame.astype(str)).sum()
    shown = frame.map(_written).set_axis([str(name) for name in frame.columns], axis="columns")
    styled = (
        shown.style.hide().set_uuid(f"{content:x}").format(**numbers, escape="html").format_index(escape="html", axis=1)
    )
    places = [("th, td", align)] if align else [(f".col{i}", _side(frame.iloc[:, i])) for i in range(frame.shape[1])]
    styles = [{"selector": of, "props": [("text-align", side)]} for of, side in places]
    styles += [{"selector": f"td.row{row}", "props": [("opacity", "0.7")]} for row in quiet]
    styles += [{"selector": f"td.row{row}", "props": [("font-weight", "bold")]} for row in bold]
    styled = styled.set_table_styles(styles)
    return HTML(without_formulas(styled.to_html()))


def _side(column: pd.Series) -> str:
    """Of a column's cells: right where each is a number, with a sign, a unit or a spread behind it, or a dash."""
    return "right" if column.map(lambda cell: NUMBER.match(str(cell)) is not None).all() else "left"


def lines(sentences: list[str]) -> HTML:
    """Sentences as a notebook shows them, a paragraph each."""
    return HTML(without_formulas("".join(f"<p>{escaped(sentence)}</p>" for sentence in sentences)))


def image(png: bytes, alternative: str) -> HTML:
    """A picture as a notebook shows it, with the text that stands for it."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    shown = f'<p><img alt="{escaped(alternative)}" src="{source}" style="max-width: 100%"></p>'
    return HTML(without_formulas(shown))


def conclusion(answer: list[str], rest: list[str]) -> HTML:
    """What a page begins and ends with: the answer in bold, and what stands behind it."""
    said = [f"<p><b>{escaped(sentence)}</b></p>" for sentence in answer]
    said += [f"<p>{escaped(sentence)}</p>" for sentence in rest if sentence]
    return HTML(without_formulas(f'<div style="{CARD}">{"".join(said)}</div>'))


def folded(title: str, frame: pd.DataFrame | str, is_open: bool = False, **numbers) -> HTML:
    """A table under its title, which a click opens."""
    shown = table(frame, align="left", **numbers).data
    opened = " open" if is_open else ""
    return HTML(without_formulas(f"<details{opened}><summary>{escaped(title)}</summary>{shown}</details>"))


def _written(value):
    """Numbers stay numbers; all else is text before it is escaped: a list or a class has a text with tags in it too."""
    return value if value is None or isinstance(value, Number) else str(value)


def escaped(text) -> str:
    """A text for between two tags, or in an attribute's quotes."""
    return html.escape(str(text))


def without_formulas(markup: str) -> str:
    """Markup in which no text is set as a formula."""
    return f'<div class="{NO_FORMULAS}">{markup}</div>'
