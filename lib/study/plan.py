"""What a study runs: profiles, variants and blocks, in a balanced order, all checked before anything runs."""

import json
from pathlib import Path

import yaml

from lib import attention, parameters, paths, record
from lib.errors import UsageError

NOTEBOOKS = paths.ROOT / "notebooks"
MOST_BYTES = 1 << 16  # of a profile: more would take seconds to read
MOST_BLOCKS, MOST_VARIANTS = 1000, 100
CONTROL_RUN = {"attention": attention.REFERENCE, "label": attention.CONTROL}
STUDY_KEYS = {"variants": list, "blocks": int, "own_metrics": dict}


class _Plain(yaml.SafeLoader):
    """YAML's mappings, lists, texts and numbers, each written out where it stands; nothing named twice or by a number.

    A reference to what stands elsewhere would let ten lines mean a billion values.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(None, None, f"write out what *{event.anchor} stands for", event.start_mark)
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node):
        try:
            return super().construct_yaml_int(node)
        except ValueError:
            raise yaml.MarkedYAMLError(None, None, "this is no number that can be read", node.start_mark) from None

    def construct_mapping(self, node, deep=False):
        if not isinstance(node, yaml.MappingNode):
            raise yaml.MarkedYAMLError(None, None, "this must be lines of `name: value`", node.start_mark)
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(None, None, "a name must be text", key.start_mark)
            if key.value in seen:
                named = record.printable(key.value, 60)
                raise yaml.MarkedYAMLError(None, None, f"{named} is named twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Plain.add_constructor("tag:yaml.org,2002:int", _Plain.construct_yaml_int)


def read_yaml(path: Path):
    """What a YAML file holds. Raises ValueError, in one line, where it is not plain; OSError as `open` does."""
    return plain_yaml(paths.read_bounded(path, MOST_BYTES))


def plain_yaml(text: str):
    """What a text of YAML holds. Raises ValueError, in one line, where it is not plain."""
    try:
        return yaml.load(text, _Plain)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{error.problem} (line {error.problem_mark.line + 1})") from None
    except yaml.YAMLError as error:
        raise ValueError(error) from None


def notebook_path(name: str) -> Path:
    """Where a notebook is. Raises UsageError where the code is installed without them."""
    path = NOTEBOOKS / name
    if not path.is_file():
        raise UsageError(
            f"{name} is not there: a study runs from a clone of the project, which has the notebooks; what `pip "
            "install` has put elsewhere is for Python alone (docs/python.md)"
        )
    return path


def known_parameters(notebook: str = "train.ipynb") -> dict[str, parameters.Declared]:
    """The parameters that a notebook declares, with their defaults."""
    # As JSON: nbformat's second would be paid by every command and by every job of a workflow.
    cells = json.loads(notebook_path(notebook).read_text(encoding="utf-8"))["cells"]
    (source,) = [cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    return parameters.declared("".join(source))


def read_profile(path: str | None, notebook: str = "train.ipynb") -> tuple[dict, dict]:
    """A profile's overrides of the notebook's defaults, and its `study` part. Raises UsageError with the way out."""
    if path is None:
        return {}, {}
    notebook_path(notebook)
    try:
        profile = read_yaml(Path(path)) or {}
    except FileNotFoundError:
        there = ", ".join(f"params/{file.name}" for file in sorted((paths.ROOT / "params").glob("*.yaml")))
        raise UsageError(f"there is no profile {path}; there are: {there}, or none for the quick one") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"the profile {path} cannot be read as YAML: {record.printable(error)}") from None
    if not isinstance(profile, dict):
        raise UsageError(f"the profile {path} must be lines of `name: value`")
    about_study = profile.pop("study", {})
    if not isinstance(about_study, dict):
        raise UsageError(f"`study` in {path} must hold {' and '.join(STUDY_KEYS)}")
    parameters.check_names(about_study, STUDY_KEYS)
    for name, value in about_study.items():
        if type(value) is not STUDY_KEYS[name]:
            shown = record.printable(repr(value), 100)
            raise UsageError(f"{name} in {path} must be {STUDY_KEYS[name].__name__}, not {shown}")
    record.own_metrics(about_study.get("own_metrics", {}))
    known = known_parameters(notebook)
    parameters.check_names(profile, known)
    for name in ("attention", "options", "label", "seed"):
        if name in profile:
            raise UsageError(f"{name} belongs to a run, not to a profile; list it under study: variants in {path}")
    return parameters.check_types(profile, known), about_study


ENTRY = {  # of `variants` in a plan that is none of train.ipynb's runs
    "attention": parameters.Declared("str", ""), "options": parameters.Declared("dict", {}),
    "label": parameters.Declared("str", ""),
}  # fmt: skip


def entry(given: str | dict) -> dict:
    """`attention`, `options` and `label` of a variant, which is a name or a mapping of these. Raises UsageError."""
    given = given if isinstance(given, dict) else {"attention": given}
    parameters.check_names(given, ENTRY)
    if "attention" not in given:
        raise UsageError("each of variants needs its attention, a name or a .py file")
    given = parameters.check_types({name: line.default for name, line in ENTRY.items()} | given, ENTRY)
    parameters.check_options(given["options"])
    return given | {"options": dict(given["options"])}  # none of them is another's


def runs_of(
    overrides: dict, variants: list, blocks: int, check: bool = True, only: set[int] | None = None
) -> list[dict]:
    """The parameters of every run, in order, all checked. A variant is a name, a path, or a mapping of parameters.

    Without `check` their values are not looked at, which takes seconds, and of the blocks there may be `only` some: for
    a process of a study that has begun.
    """
    known = known_parameters()
    if len(variants) > MOST_VARIANTS:
        raise UsageError(f"a study has at most {MOST_VARIANTS} variants, not {len(variants)}")
    entries = [entry if isinstance(entry, dict) else {"attention": str(entry)} for entry in variants]
    runs, known_sizes = [], {}
    nulls = [index for index, entry in enumerate(entries) if entry.get("label") == attention.CONTROL]
    others = [index for index in range(len(entries)) if index not in nulls]
    for block, square in enumerate(orders(len(others), blocks)):
        if only is not None and block not in only:
            continue
        order = [others[which] for which in square]
        for null in nulls:  # it wanders through all places, and leaves the balance of the others as it is
            order.insert(block % len(entries), null)
        for position, which in enumerate(order):
            given = overrides | entries[which] | {"seed": block}
            parameters.check_names(given, known)
            values = parameters.check_types({name: line.default for name, line in known.items()} | given, known)
            values = parameters.portable(_matched(values, known_sizes))
            if values["save_model"]:  # each run's in a folder of its own
                values["save_model"] += f"/{parameters.run_name(values)}"
            given = {name: values[name] for name in given}
            runs.append({"values": values, "given": given, "block": block, "position": position})
    for run in runs[: len(entries)] if check else ():
        parameters.check_values(run["values"])
    names = [parameters.display_name(run["values"]) for run in runs[: len(entries)]]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UsageError(f"two variants are called {doubled[0]!r}; give one of them another label")
    return runs


def _matched(values: dict, found: dict) -> dict:
    """As `parameters.matched`, looked up in `found` where only seed and label differ."""
    key = repr({name: value for name, value in values.items() if name not in ("seed", "label")})
    if key not in found:
        found[key] = parameters.matched(values)["options"]
    return values | {"options": found[key]}


def chosen(
    path: str | None,
    variants: list | None = None,
    blocks: int | None = None,
    check: bool = True,
    only: set[int] | None = None,
) -> tuple[list[dict], str]:
    """The plan of a profile's file, other variants or blocks than its own where given, and the profile's name. `check`
    and `only`: see `runs_of`."""
    overrides, about_study = read_profile(path)
    variants = variants or about_study.get("variants") or [*attention.STUDY_ORDER, CONTROL_RUN]
    blocks = blocks if blocks is not None else about_study.get("blocks", 1)
    if type(blocks) is not int or not 1 <= blocks <= MOST_BLOCKS:
        bound = f"at most {MOST_BLOCKS}" if type(blocks) is int and blocks > MOST_BLOCKS else "at least 1"
        raise UsageError(f"blocks must be a whole number, {bound}, not {record.printable(repr(blocks), 40)}")
    name = record.printable(Path(path).stem, 100) if path else "quick"
    return runs_of(overrides, variants, blocks, check, only), name


def own_metrics(path: str | None) -> dict:
    """The metrics of one's own that a profile asks its summary for (`lib.record.own`)."""
    return read_profile(path)[1].get("own_metrics", {})


FEWEST_BLOCKS = 5  # below that the analysis gives points only


def balanced_after(variants: int) -> int:
    """In how many blocks the order of so many variants is balanced: a whole Williams square, and its multiples.

    The A/A control is not counted: it wanders through all places, and leaves the balance of the others as it is.
    """
    return variants * (1 + variants % 2)


def about_order(runs: list[dict]) -> str:
    """What a plan's blocks let one say, before anything runs: points or intervals, and whether the order is balanced;
    where it is not, the next number of blocks that balances it and gives intervals."""
    held: dict[int, set[str]] = {}
    for run in runs:
        held.setdefault(run["block"], set()).add(parameters.display_name(run["values"]))
    groups: dict[frozenset, set[int]] = {}  # blocks that hold the same variants: others may have come later
    for block, labels in sorted(held.items()):
        groups.setdefault(frozenset(labels - {attention.CONTROL}), set()).add(block)
    return "\n".join(_about(len(blocks), len(labels)) for labels, blocks in groups.items())


def _about(blocks: int, variants: int) -> str:
    square = balanced_after(variants)
    planned = f"{blocks} block{'s' if blocks > 1 else ''} planned"
    order = f"the order of {variants} variants is {'not ' if blocks % square else ''}balanced"
    enough = -(-max(blocks, FEWEST_BLOCKS) // square) * square
    order += f" (it is after {square} blocks, and their multiples: --blocks {enough})" if blocks % square else ""
    if blocks < FEWEST_BLOCKS:
        more = "" if blocks % square else f"; --blocks {enough} gives them, balanced"
        return (
            f"{planned}: points only, intervals, verdicts and ranks come from {FEWEST_BLOCKS} blocks up{more}; {order}"
        )
    rest = "; the effect of each place is then estimated from these blocks alone" if blocks % square else ""
    return f"{planned}: {order}{rest}"


def orders(variants: int, blocks: int) -> list[list[int]]:
    """Orders of `variants` runs for each block, from a Williams square (Williams 1949): over a whole square every
    variant stands in every position, and follows every other, equally often."""
    zigzag = [0]
    for step in range(1, variants):
        zigzag.append((zigzag[-1] + (step if step % 2 else -step)) % variants)
    square = [[(place + shift) % variants for place in zigzag] for shift in range(variants)]
    if variants % 2:
        square += [row[::-1] for row in square]
    return [square[block % len(square)] for block in range(blocks)]
