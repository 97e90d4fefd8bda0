"""What an installation without extras lacks: whoever needs it hears in one sentence what to install.

`pip install .` brings a model, its certificate and its data; pyproject.toml has the rest in extras. No room lists what
it imports: `Finder` hears of what Python finds nowhere, and sees who wanted it. Where all is there it is never asked.
"""

import sys
from types import FrameType

EXTRAS = {  # what rooms import of each, by the name that it is imported by
    "statistics": ("IPython", "matplotlib", "pandas", "pydantic", "pydantic_core", "scipy", "seaborn", "statsmodels"),
    "energy": ("psutil", "pynvml", "zeus"),
    "site": ("altair", "myst_nb", "PIL", "sphinx", "vl_convert"),
    "study": ("datasets", "nbclient", "nbformat", "papermill", "pyarrow", "yaml"),
    "notebooks": ("ipywidgets", "traitlets"),
}
ROOMS = {
    "explore": "notebooks",
    "site": "site",
    "progress": "study",
    "study": "study",
    "training": "study",
}  # they need several
BROUGHT_BY = {module: extra for extra, modules in EXTRAS.items() for module in modules}


class MissingExtra(ModuleNotFoundError):
    """One sentence with the way out, which notebooks show without a traceback."""

    def _render_traceback_(self):
        return [f"{type(self).__name__}: {self}"]


class Finder:
    """The last that Python asks for a module: where a room of lib/ wants one that an extra brings, raises MissingExtra,
    or ends a command with its sentence. Whoever else asks, such as transformers for what it can do without, hears what
    they would have heard."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> None:
        frame = sys._getframe(1)
        while frame and frame.f_globals.get("__name__") in ("importlib._bootstrap", "_frozen_importlib"):
            frame = frame.f_back
        if name not in BROUGHT_BY or frame is None or not _room(frame):
            return
        outermost = [one for one in _outwards(frame) if _room(one)][-1]
        room = _room(outermost)
        extra = ROOMS.get(room.split(".")[1], BROUGHT_BY[name])
        said = f"{room} needs {name}, which is not installed: pip install 'attention-study[{extra}]'"
        if outermost.f_globals.get("__name__") == "__main__":
            sys.exit(said)
        raise MissingExtra(said, name=name)


def _outwards(frame: FrameType | None):
    while frame:
        yield frame
        frame = frame.f_back


def _room(frame: FrameType) -> str | None:
    """The module of lib/ whose code this is, also where it runs as a command."""
    spec = frame.f_globals.get("__spec__")
    name = getattr(spec, "name", None) or ""
    return name.removesuffix(".__main__") if name.startswith("lib.") else None
