"""The widgets of explore.ipynb: a picker of a variant and its options, and a screen that shows what its controls say.

A screen's picture is in its HTML, which also stands in the saved notebook, where no widget lives.
"""

import ast
import asyncio
import contextlib
import inspect
import re
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import ipywidgets as widgets
import pandas as pd
import traitlets
from matplotlib.figure import Figure

from lib import attention, markup, parameters
from lib.analysis import style
from lib.errors import UsageError
from lib.model import gpt2_config
from lib.model.devices import without_weights

ERROR_COLOUR = "#d1495b"  # readable on white and on black
WIDE = widgets.Layout(width="420px")
LABELLED = {"description_width": "initial"}


@dataclass(frozen=True)
class Choice:
    """A variant by name or path, and those of its options that are not at their defaults."""

    attention: str
    options: dict = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """The variant's, without options: what colours go by."""
        return parameters.display_name({"attention": self.attention, "label": ""})

    @property
    def label(self) -> str:
        """As figures call it: its title, which says the options that matter; else the options behind it."""
        return _title(self.attention, repr(self.options), tuple(self.options.items()))


def fitting(choice: Choice, size: dict) -> None:
    """Raises UsageError where a model of this size refuses the variant's options."""
    parameters.check_attention(SimpleNamespace(attention=choice.attention, options=choice.options, **size))


@lru_cache(maxsize=256)
def _title(name: str, _told_apart: str, options: tuple) -> str:
    own = _titled(name) or parameters.display_name({"attention": name, "label": ""})
    if not options:
        return own
    turned = {_titled(name, heads, **dict(options)) for heads in (4, 12)}
    if len(turned) == 1 and None not in turned and own not in turned:
        return turned.pop()
    said = ", ".join(f"{option}={value}" for option, value in options)
    return f"{re.sub(r' [0-9:]+$', '', own)} ({said})"  # a title that depends on the number of heads too


def _titled(name: str, heads: int = 4, **options) -> str | None:
    """What a layer with these options calls itself; None where it refuses them."""
    try:
        with without_weights():
            made = attention.load(name)
            layers = len(attention.parts(name))
            config = gpt2_config(layers, 16 * heads, heads, 8, 8)
            return attention.title([made(config, layer, **options) for layer in range(layers)], name)
    except Exception:  # of a file of one's own too; what is wrong with it is said where it is used
        return None


class Folded(NamedTuple):
    """A table under its title, which a click opens."""

    title: str
    table: pd.DataFrame
    is_open: bool = False


class Marked(NamedTuple):
    """A table of which some rows stand back, or out."""

    table: pd.DataFrame
    quiet: list[int]
    bold: list[int]


class Picker(widgets.VBox):
    """Picks a variant, a file of one's own or a pattern, and the options that constructors name. `choice`: the pick."""

    choice = traitlets.Instance(Choice)

    def __init__(self, name: str, **options):
        titles = [(Choice(known).label, known) for known in attention.variants()]
        self.variant = widgets.Dropdown(options=titles, value=name, description="variant")
        self.path = widgets.Text(
            description="or a file",
            placeholder="path of a .py file with your own; or a pattern, such as linear,sdpa",
            continuous_update=False,
            layout=WIDE,
        )
        self.options = widgets.HBox(layout={"flex_flow": "row wrap"})
        self.message = widgets.HTML()
        super().__init__([widgets.HBox([self.variant, self.path]), self.options, self.message])
        self._ask_for_options()
        for option in self.options.children:
            if option.description in options:
                option.value = options[option.description]
        self._pick()
        self.variant.observe(lambda _: self._other_variant(), "value")
        self.path.observe(lambda _: self._other_file(), "value")

    @property
    def name(self) -> str:
        return self.path.value.strip() or self.variant.value

    def _other_variant(self):
        self.path.value = ""
        self._other_file()

    def _other_file(self):
        self._ask_for_options()
        self._pick()

    def _ask_for_options(self):
        defaults = {}
        with contextlib.suppress(ValueError):  # said by `_pick`, which loads it too
            defaults = attention.defaults(attention.load(self.name))
        self.options.children = [_option(name, default) for name, default in defaults.items()]
        for option in self.options.children:
            option.observe(lambda _: self._pick(), "value")

    def _pick(self):
        try:
            defaults = attention.defaults(attention.load(self.name))
            turned = {
                option.description: _value(option, defaults[option.description]) for option in self.options.children
            }
            self.message.value = ""
        except (UsageError, ValueError) as error:
            self.message.value = said(error)
            return
        self.choice = Choice(self.name, {name: value for name, value in turned.items() if value != defaults[name]})


def _option(name: str, default):
    """A widget for an option, by the type of its default; None, which leaves it to the variant, is empty text."""
    if isinstance(default, bool):
        return widgets.Checkbox(value=default, description=name)
    if isinstance(default, int | float):
        kind = widgets.IntText if isinstance(default, int) else widgets.FloatText
        return kind(value=default, description=name, continuous_update=False, layout={"width": "180px"})
    text = "" if default is None or default is inspect.Parameter.empty else str(default)
    return widgets.Text(
        value=text, description=name, placeholder="its own choice", continuous_update=False, layout={"width": "240px"}
    )


def _value(option, default):
    if not isinstance(option, widgets.Text) or isinstance(default, str):
        return option.value
    if not option.value.strip():
        return default
    try:
        return ast.literal_eval(option.value.strip())
    except (SyntaxError, ValueError):
        return option.value


class Screen(widgets.VBox):
    """Controls, and below them the page that `show(**their values)` gives: figures, tables and sentences, in a list.

    `picks`: the picker itself stands above; one is enough for a page, elsewhere a line says what is picked.

    Without a `button` the page follows the controls and `follow` (a Picker: `show` gets its `choice`). With one, `show`
    yields functions that give a page: pressing works through them, and shows each, until it is pressed again. The page
    says `at_first` until then, and after every change; without `at_first` the work is also done once at the start.
    """

    def __init__(
        self, title: str, show, controls: dict, follow: Picker | None = None, button="", at_first="", picks=True
    ):
        self.title, self.show, self.controls, self.follow, self.at_first = title, show, controls, follow, at_first
        self.page = widgets.HTML()
        self.page.add_class("jp-RenderedHTMLCommon")  # Lab's own colours for tables, in both themes
        self.button = widgets.Button(description=button, button_style="primary") if button else None
        self.says, self.working, self.stopping = button, False, False
        row = widgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"})
        self.picked = widgets.HTML()
        above = [] if follow is None else [follow] if picks else [self.picked]
        parts = [*above, row, *([self.button] if button else []), self.page]
        super().__init__(parts)
        for control in controls.values():
            control.style = LABELLED
            control.observe(lambda _: self.changed(), "value")
        if follow is not None:
            follow.observe(lambda _: self.changed(), "choice")
        if button:
            self.button.on_click(lambda _: self.pressed())
        self.draw()

    def values(self) -> dict:
        found = {name: control.value for name, control in self.controls.items()}
        return found | ({"choice": self.follow.choice} if self.follow is not None else {})

    def say_what_is_picked(self):
        if self.follow is not None:
            self.picked.value = f"<b>{markup.escaped(self.follow.choice.label)}</b>, as picked above"

    def changed(self):
        """Draws anew what follows the controls; what must be asked for by the button asks to be."""
        self.say_what_is_picked()
        if self.button is None:
            self.draw()
        elif not self.working:
            self.page.value = page([self.at_first or f"Press “{self.says}”."])

    def draw(self):
        """Draws the page now; where it takes work, the last of its pages."""
        self.say_what_is_picked()
        if self.at_first:
            self.page.value = page([self.at_first])
            return
        try:
            parts = self.show(**self.values())
            if self.button is not None:
                parts = list(parts)[-1]()
            self.page.value = page(parts)
        except Exception as error:  # of a variant of one's own too: the page says it in one line
            self.page.value = said(error)

    def pressed(self):
        """Begins the work, or ends it."""
        if self.working:
            self.stopping = True
        else:
            self.task = asyncio.ensure_future(self.work())  # kept: the loop alone would not keep it alive

    async def work(self):
        """Shows page after page; between two of them the kernel listens, so that the button can end it."""
        self.button.description, self.button.button_style = "Stop", "warning"
        self.working, self.stopping, pages = True, False, None
        try:
            pages = self.show(**self.values())
            for draw in pages:
                self.page.value = page(draw())
                await asyncio.sleep(0.01)
                if self.stopping:
                    break
        except Exception as error:
            self.page.value = said(error)
        finally:
            if pages is not None:
                pages.close()
            self.button.description, self.button.button_style, self.working = self.says, "primary", False

    def _repr_mimebundle_(self, **_):
        shown = super()._repr_mimebundle_()
        return shown | {"text/html": self.page.value, "text/plain": self.title}


def page(parts: list) -> str:
    """Figures, tables (`Folded` ones too) and sentences as HTML."""
    return markup.without_formulas("".join(_html(part) for part in parts))


def _html(part) -> str:
    if isinstance(part, Figure):
        return style.picture(part).data
    if isinstance(part, Folded):
        return markup.folded(part.title, part.table, part.is_open).data
    if isinstance(part, Marked):
        return markup.table(part.table, quiet=part.quiet, bold=part.bold).data
    if isinstance(part, pd.DataFrame):
        return markup.table(part).data
    return f"<p>{markup.escaped(part)}</p>"


def said(error: Exception) -> str:
    """An error as a page says it: what a user can put right in its own sentence, all else with its kind before."""
    first = (str(error).strip().splitlines() or ["no message"])[0]
    sentence = first if isinstance(error, UsageError | ValueError) else f"{type(error).__name__}: {first}"
    said = f'<p role="alert" style="color: {ERROR_COLOUR}">{markup.escaped(sentence)}</p>'
    return markup.without_formulas(said)
