"""Tables and texts as HTML: the one place where anything that is shown on a page becomes markup.

Whatever a cell, a heading or a sentence holds is shown as it is written: no tag of it lives, and no formula, since
JupyterLab sets what stands between dollar signs in HTML too, and a formula can link to a script.
"""

import html
from numbers import Number

import pandas as pd
from IPython.display import HTML

NO_FORMULAS = "tex2jax_ignore mathjax_ignore"  # the classes at which MathJax looks away


def table(frame: pd.DataFrame | str, align: str | None = None, **numbers) -> HTML:
    """A table as a notebook shows it: without the row numbers, and with the same HTML for the same content.

    A sentence that stands for a table is shown as it is. `numbers`: how they are written, as `Styler.format` has it.
    """
    if isinstance(frame, str):
        return lines([frame])
    content = pd.util.hash_pandas_object(frame.astype(str)).sum()
    shown = frame.map(_written).set_axis([str(name) for name in frame.columns], axis="columns")
    styled = (
        shown.style.hide().set_uuid(f"{content:x}").format(**numbers, escape="html").format_index(escape="html", axis=1)
    )
    if align:
        styled = styled.set_table_styles([{"selector": "th, td", "props": [("text-align", align)]}])
    return HTML(without_formulas(styled.to_html()))


def lines(sentences: list[str]) -> HTML:
    """Sentences as a notebook shows them, a paragraph each."""
    return HTML(without_formulas("".join(f"<p>{escaped(sentence)}</p>" for sentence in sentences)))


def _written(value):
    """Numbers stay numbers; all else is text before it is escaped: a list or a class has a text with tags in it too."""
    return value if value is None or isinstance(value, Number) else str(value)


def escaped(text) -> str:
    """A text for between two tags, or in an attribute's quotes."""
    return html.escape(str(text))


def without_formulas(markup: str) -> str:
    """Markup in which no text is set as a formula."""
    return f'<div class="{NO_FORMULAS}">{markup}</div>'
