"""The pages that the site adds to the docs and notebooks, as Markdown made from the variants' files and the records."""

import ast
import inspect
import re
from pathlib import Path

import pandas as pd

from lib import attention
from lib.attention import REFERENCE
from lib.site import lookup

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$^])")
ORDER = {kind: place for place, kind in enumerate(("training steps", "training runs", "cost by length"))}
NOT_MEASURED = (
    "No committed record holds it yet. It can be measured with `python -m lib.study --variants sdpa {name}` "
    "and added as [contributing](../docs/contribute.md) says."
)


def escaped(text: str) -> str:
    """A text of whatever origin as Markdown that says the same."""
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def _prose(text: str) -> str:
    """As `escaped`, of a docstring: what stands in backticks there stays code."""
    parts = " ".join(text.split()).split("`")
    if len(parts) % 2 == 0:
        return escaped(text)
    return "".join(f"`{part}`" if place % 2 else escaped(f"|{part}|")[2:-2] for place, part in enumerate(parts))


def variant(name: str, rows: pd.DataFrame, certificates: pd.DataFrame) -> str:
    """The page of one variant: what it is, what it costs and can do, whether it is what it says, and its file."""
    file = attention.find(name)
    made = attention.load(name)
    title = called(name, rows)
    mine = rows[rows["label"] == name]
    first, *rest = _docstring(file).split("\n\n")
    parts = [
        f"# {escaped(title)}",
        f"`{name}` · {escaped(getattr(made, 'paper', 'its file names no paper'))}",
        _prose(first),
        *map(_prose, rest),
        "## What it costs",
        _costs(mine[mine["kind"].isin(ORDER)], name),
        "## What it can do",
        _abilities(mine[mine["kind"] == "small tasks"], name),
        "## By its formulas",
        _formulas(mine[mine["kind"] == "computed"]),
        "## Is it what it says?",
        _certified(name, certificates[certificates["label"] == name]),
        "## Options",
        _options(made, name),
        "## What is not known",
        _unknown(mine, name),
        "## Its file",
        f"All that is particular to it, with its own slow reference: `lib/attention/{name}.py`.",
        f"```{{literalinclude}} ../lib/attention/{name}.py\n:language: python\n```",
    ]
    return "\n\n".join(parts) + "\n"


def called(name: str, rows: pd.DataFrame) -> str:
    """The title of a variant as it is by default."""
    return rows.loc[(rows["label"] == attention.label(name)) & (rows["kind"] == "computed"), "variant"].iloc[0]


def _said(row) -> str:
    """What is to be known of a number: its verdict, that its variant failed, what disturbed it."""
    verdict = row.verdict if row.certified is not False else "fails its certificate"
    return escaped("; ".join(said for said in (verdict, row.note) if isinstance(said, str))) or "–"


def _docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "Its file says nothing of it."


def table(found: pd.DataFrame | list[dict]) -> str:
    """A table in Markdown, its cells escaped where they are no Markdown already."""
    found = pd.DataFrame(found).astype(object).fillna("–")
    lines = ["| " + " | ".join(found.columns) + " |", "| " + " | ".join("---" for _ in found.columns) + " |"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in found.itertuples(index=False)])


def number(value: float, unit: str) -> str:
    """A number with the digits that it deserves, and its unit."""
    if pd.isna(value):
        return "–"
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return digits if unit in ("share",) else f"{digits} {unit}"


def ratio(row) -> str:
    """Beside SDPA, with the interval where there is one."""
    if row.ratio is None or pd.isna(row.ratio):
        return "the reference" if row.label == REFERENCE else "–"
    interval = "" if pd.isna(row.ratio_low) else f" [{row.ratio_low:.3f}, {row.ratio_high:.3f}]"
    return f"{row.ratio:.3f}{interval}".replace("[", "\\[")


def _costs(mine: pd.DataFrame, name: str) -> str:
    measured = mine[mine["value"].notna()]
    if measured.empty:
        return NOT_MEASURED.format(name=name) if mine.empty else "Nothing of it was measured; why stands below."
    measured = measured.assign(place=measured["kind"].map(ORDER)).sort_values(
        ["place", "profile", "setting", "what", "at"], kind="stable"
    )
    said = []
    keys = ["place", "profile", "setting", "device", "variant"]
    for (_, profile, setting, device, title), part in measured.groupby(keys, sort=False, dropna=False):
        shown = [
            {
                "what": f"{escaped(row.what)}, at {row.at:,.0f} {row.at_unit}",
                "measured": number(row.value, row.unit), "÷ SDPA": ratio(row), "n": row.n,
                "verdict": _said(row),
            }
            for row in part.itertuples()
        ]  # fmt: skip
        where = setting if f"on {device}" in setting else f"{setting}, on {device}"
        said += [f"**{escaped(profile)}**, as {escaped(title)}: {escaped(where)}", table(shown)]
    return "\n\n".join(said)


def _abilities(mine: pd.DataFrame, name: str) -> str:
    if mine.empty:
        return (
            "No committed record holds a small task of it yet. `python -m lib.study.probes PLAN --write FOLDER` makes "
            "some ([what each can do](../docs/capability.md))."
        )
    rows = [
        {
            "as": escaped(row.variant), "task": escaped(row.what), "difficulty": f"{row.at:,.0f} {row.at_unit}",
            "median of its seeds": f"{row.value:.2f}", "their range": f"{row.low:.2f} to {row.high:.2f}", "n": row.n,
            "records, device": escaped(f"{row.profile}, {row.device}"), "to be known": _said(row),
        }
        for row in mine[mine["value"].notna()].itertuples()
    ]  # fmt: skip
    about = (
        "0 is guessing, 1 is right, at the best of its learning rates, in small nets: **as** says which sizes of it "
        "were tried, which may differ from those above."
    )
    return f"{about}\n\n{table(rows)}" if rows else "Nothing of it was measured; why stands below."


def _formulas(mine: pd.DataFrame) -> str:
    mine = mine[mine["value"].notna()]
    if mine.empty:
        return "GPT-2 small cannot have it; why stands below."
    rows = [
        {"what": escaped(row.what), "tokens": f"{row.at:,.0f}", "counted": number(row.value, row.unit),
         "÷ SDPA": ratio(row)}
        for row in mine.itertuples()
    ]  # fmt: skip
    return "GPT-2 small (12 layers of 768, 12 heads), one sequence; counted, not run.\n\n" + table(rows)


def _certified(name: str, mine: pd.DataFrame) -> str:
    said = (
        f"`python -m lib.certificate {name}` examines it in a model: causal, equal to its reference, the same with and "
        "without a cache, padding, packing, gradients, FLOPs ([how](../docs/certificate.md)). A record holds what was "
        "found before it was timed:"
    )
    if mine.empty:
        return f"{said.removesuffix('A record holds what was found before it was timed:')}No committed record has one."
    today = attention.source_sha256(name)
    rows = [
        {
            "records": escaped(row.profile), "n": row.n, "certificate": "passed" if row.passed else "**failed**",
            "its file then": "as below" if row.sha256 == today else "an earlier one",
        }
        for row in mine.itertuples()
    ]  # fmt: skip
    return f"{said}\n\n{table(rows)}"


def _options(made: type, name: str) -> str:
    found = attention.defaults(made)
    if not found:
        return "None."
    given = {option: default for option, default in found.items() if default is not inspect.Parameter.empty}
    rows = [{"option": f"`{option}`", "default": f"`{default!r}`"} for option, default in given.items()]
    return f"{table(rows)}\n\nWhat they mean: [what is compared](../docs/variants.md), and its file."


def _unknown(mine: pd.DataFrame, name: str) -> str:
    found = mine[mine["why"].notna()]
    if found.empty:
        return (
            "No committed record of it lacks a number."
            if len(mine[mine["kind"] != "computed"])
            else "All that only a run can tell."
        )
    said = {}
    for row in found.itertuples():
        said.setdefault((row.profile, row.why), []).append(row.what)
    return "\n".join(
        f"- {escaped(profile)}: {escaped(', '.join(dict.fromkeys(whats)))}: {escaped(why)}."
        for (profile, why), whats in said.items()
    )


def certificates(records: Path, held: dict[Path, list[lookup.Held]]) -> pd.DataFrame:
    """A row per label, folder and fingerprint of the variant's file: `n` records, and whether all `passed`; of what is
    `lookup.held` in the folder `records`."""
    found = [
        (label, folder.relative_to(records).as_posix(), sha256, passed)
        for folder, kept in held.items()
        for one in kept
        for label, sha256, passed in one.certified
    ]
    columns = ["label", "profile", "sha256", "passed"]
    table = pd.DataFrame(found, columns=columns).groupby(columns[:3], sort=True, as_index=False)
    return table.agg(n=("passed", "size"), passed=("passed", "all"))


def variants(rows: pd.DataFrame) -> str:
    """The list of all variants: what each is in a line, and what it keeps of a long sequence."""
    measured = rows[rows["kind"].isin((*ORDER, "small tasks")) & rows["value"].notna()]
    lines = []
    counted = rows[(rows["kind"] == "computed") & (rows["at"] == lookup.CONTEXTS[-1])].set_index(["label", "what"])
    for name in attention.variants():
        first = _docstring(attention.find(name)).split("\n\n")[0]
        seen = sorted(set(measured.loc[measured["label"] == name, "profile"]))
        cache = counted.loc[(name, lookup.COMPUTED["cache"][0])]
        share = 1.0 if name == REFERENCE else cache["ratio"]
        held = f"{cache['value']:,.1f} MiB ({100 * share:.1f} %)" if cache["value"] >= 0 else "–"
        lines.append({
            "variant": f"[{escaped(called(name, rows))}]({name}.md)", "what it does": _prose(first),
            "cache at 32,768 tokens": held,
            "measured in": escaped(", ".join(seen)) if seen else "no record yet",
        })  # fmt: skip
    about = (
        "Each variant is one file; its page says what it is, what it costs and can do, and whether it is what it says. "
        "Caches: of GPT-2 small in bf16, by its formula, and in percent of SDPA's."
    )
    names = "\n".join(attention.variants())
    return f"# Variants\n\n{about}\n\n{table(lines)}\n\n```{{toctree}}\n:hidden:\n\n{names}\n```\n"


def folder(path: Path, name: str) -> str:
    """A page that lists the files of a folder, for links that name it."""
    files = sorted(one.relative_to(path).as_posix() for one in path.rglob("*") if one.is_file())
    lines = [f"- [{escaped(one)}]({one})" for one in files]
    return f"---\norphan: true\n---\n\n# `{name}/`\n\n" + "\n".join(lines) + "\n"
