"""All measurements as one table to take away, Parquet and CSV: `python -m lib.site.data FOLDER` writes it, with a data
dictionary, a dataset card, Croissant metadata and checksums.

A row per measured number of every record below a folder; what could not be measured is a row too, null with its reason.
The same records give the same bytes: files are taken by their paths, and no clock is asked.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import math
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from lib.errors import UsageError
from lib.paths import ROOT
from lib.record import folders, names, scaling, steps
from lib.record.benchmark import AGAIN, Benchmark
from lib.record.files import gpu_uuid
from lib.record.probe import Probe
from lib.record.schema import Failure, Metrics, Record, Strict
from lib.site.dictionary import COLUMNS, METRICS, NULL_REASONS, PHASES, RUN, SLOPE, metrics, unit

PARQUET, CSV, DICTIONARY = "measurements.parquet", "measurements.csv.gz", "dictionary.csv"
CARD, CROISSANT, VERSION, SUMS = "README.md", "croissant.json", "VERSION", "SHA256SUMS"
FILES = (CARD, VERSION, CROISSANT, DICTIONARY, CSV, PARQUET)  # those of SUMS, which is the last to be written
ARROW = {
    "text": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_(),
    "moment": pa.timestamp("us", tz="UTC"),
}  # fmt: skip
SCHEMA_ORG = {
    "text": "sc:Text", "integer": "sc:Integer", "number": "sc:Float", "boolean": "sc:Boolean",
    "moment": ["sc:Date", "sc:DateTime"],  # the format wants one of its own types among several
}  # fmt: skip
SCHEMA = pa.schema([(name, ARROW[kind]) for name, (kind, _) in COLUMNS.items()])
TEXTS = [name for name, (kind, _) in COLUMNS.items() if kind == "text"]
AT_ONCE = 20_000  # rows in memory; also of a row group
FORMULA = tuple("=+-@＝＋－＠")  # with which a spreadsheet lets a formula begin
AUTOMATIC = {"cpu": "fp32", "cuda": "bf16"}  # lib.model.devices.resolve_precision, which imports PyTorch


class Written(NamedTuple):
    """What `write` wrote: the version, records and rows by kind, and the files that are not in, with the reason."""

    version: str
    records: Counter
    rows: Counter
    left_out: list[str]


# A record's rows


def rows(kind: str, found: Strict) -> Iterator[dict]:
    """The measured numbers of a record that `kinds.load` read: a row each, without the columns that are null."""
    shared = {"kind": kind, "provenance": getattr(found, "provenance", None), "finished_at": found.finished_at}
    shared |= {"content_sha256": getattr(found, "content_sha256", None)}
    if hasattr(found, "environment"):
        shared |= _machine(found.environment)
    for row in ROWS[kind](found):
        yield shared | row


def _machine(facts: dict) -> dict:
    return {
        "device": facts["device"], "device_name": facts["device_name"], "gpu_uuid": gpu_uuid(facts),
        "threads": facts.get("torch_threads"), "torch": (facts.get("packages") or {}).get("torch"),
        "commit": facts.get("commit"), "commit_modified": facts.get("commit_modified"),
    }  # fmt: skip


def _number(metric: str, value: float | None, reason: str | None, **others) -> dict:
    """One number, or the reason why there is none: exactly one of the two."""
    if value is None or math.isnan(value):
        return {"metric": metric, "value": None, "null_reason": reason or "not_said", **others}
    return {"metric": metric, "value": float(value), "null_reason": None, **others}


def _run(found: Record) -> Iterator[dict]:
    values = found.parameters
    precision = values["precision"]
    run = {
        "label": found.label, "title": found.title, "attention": found.attention, "options": _json(values["options"]),
        "attention_sha256": found.attention_sha256, "setting": found.setting, "seed": values["seed"],
        "learning_rate": values.get("learning_rate"), "dataset": values["dataset"],
        "architecture": values.get("architecture", names.LATER["architecture"]),
        "convolution": values.get("convolution", names.LATER["convolution"]) > 0,
        "steps": values["steps_per_epoch"] * values["epochs"],
        "precision": AUTOMATIC[found.environment["device"]] if precision == "auto" else precision,
        "certified": found.certificate.passed, "flags": " ".join(found.flags), "started_at": found.started_at,
        **{name: values[name] for name in ("context", "batch_size", "layers", "width", "heads", "compile")},
        **_place(found.study),
    }  # fmt: skip
    for metric in Metrics.model_fields:
        yield run | _number(metric, getattr(found.metrics, metric), found.null_reasons.get(metric), part="run")
    for point in found.series.inference:
        for metric in type(point).model_fields:
            if metric in METRICS["run"]:
                one = {"part": "inference", "context": point.context, "batch_size": 1}
                yield run | _number(metric, getattr(point, metric), point.energy_null_reason, **one)
    for phase in found.series.phases:
        for metric in PHASES:
            yield run | _number(metric, getattr(phase, metric), phase.energy_null_reason, part=phase.phase)
    if found.series.slope is not None:
        for metric in SLOPE:
            slope = found.series.slope
            yield run | _number(metric, getattr(slope, metric), slope.energy_null_reason, part="slope")


def _place(study) -> dict:
    return {name: getattr(study, name) for name in ("profile", "session", "block", "position")}


def _failure(found: Failure) -> Iterator[dict]:
    """Every number that the run would have had."""
    said = {"part": "run", "label": found.label, "title": found.label, "setting": found.setting, "says": found.says}
    for metric in RUN:
        yield said | _place(found.study) | _number(metric, None, found.reason)


def _probe(found: Probe) -> Iterator[dict]:
    setting = found.setting
    pattern = [mixer.attention for mixer in found.pattern]
    options = [mixer.options for mixer in found.pattern]
    is_one = len(set(pattern)) == 1 and all(one == options[0] for one in options)
    cell = {
        "part": "task", "label": found.label, "title": found.title, "setting": names.digest(setting.model_dump()),
        "attention": pattern[0] if is_one else ",".join(pattern), "options": _json(options[0] if is_one else options),
        "attention_sha256": ",".join(dict.fromkeys(mixer.attention_sha256 for mixer in found.pattern)),
        "seed": found.seed, "learning_rate": found.learning_rate, "started_at": found.started_at, "says": found.says,
        **{name: getattr(setting, name) for name in ("task", "batch_size", "layers", "width", "heads", "steps")},
        "convolution": setting.convolution,
    }  # fmt: skip
    for result in found.results:
        where = {"difficulty": result.difficulty, "context": result.context}
        for metric in ("accuracy", "scaled_accuracy", "state_bytes"):
            yield cell | _number(metric, getattr(result, metric), None, **where)
    outcome = None if found.outcome == "measured" else found.outcome
    if not found.results:
        for metric in ("accuracy", "scaled_accuracy", "state_bytes"):
            yield cell | _number(metric, None, outcome)
    yield cell | _number("time_s", found.time_s, outcome)
    yield cell | _number("parameters", found.parameters, None)


def _scaling(found: scaling.Scaling) -> Iterator[dict]:
    """A point's value is the median of each process's samples, as everything else starts from them."""
    setting = found.setting
    one = {
        "label": found.label, "title": found.title, "attention": found.attention, "options": _json(found.options),
        "attention_sha256": found.attention_sha256, "setting": names.digest(setting.model_dump()), "batch_size": 1,
        **{name: getattr(setting, name) for name in ("layers", "width", "heads")},
        "precision": AUTOMATIC[found.environment["device"]] if setting.precision == "auto" else setting.precision,
    }  # fmt: skip
    for point in found.points:
        at = one | {"part": point.part, "context": point.context, "says": point.says}
        for metric in scaling.METRICS[point.part]:
            processes = point.processes(metric)
            for block, value in enumerate(processes):
                session = point.sessions[block] if point.sessions else None
                yield at | _number(metric, value, None, block=block, session=session)
            if not processes:
                reason = point.null_reasons.get(metric) if point.outcome == "measured" else point.outcome
                yield at | _number(metric, None, reason)


TURNS = ("time_s_per_step", "energy_j_per_step", "mean_power_w", "peak_memory_bytes", "throttled_share")
TURNS = (*TURNS, "other_processes")


def _steps(found: steps.Steps) -> Iterator[dict]:
    setting = found.setting
    batch = {size.context: size.batch_size for size in setting.sizes}
    silent = "no_gpu" if found.environment["device"] == "cpu" else None
    shared = {"part": "step", "setting": names.digest(setting.model_dump())}
    shared |= {name: getattr(setting, name) for name in ("layers", "width", "heads", "compile", "precision")}
    who = {
        entry.label: shared
        | {
            "label": entry.label, "title": entry.title, "attention": entry.attention, "options": _json(entry.options),
            "attention_sha256": entry.attention_sha256, "certified": entry.certified,
        }
        for entry in found.entries
    }  # fmt: skip
    begun = [one.begun_at for one in found.rounds]
    for turn in steps.frame(found).itertuples():
        at = {"context": turn.context, "batch_size": turn.batch_size, "block": turn.round, "session": turn.session}
        at |= {"position": turn.position, "started_at": begun[turn.round]}
        for metric in TURNS:
            is_counted = metric in ("energy_j_per_step", "mean_power_w")
            reason = turn.energy_null_reason if is_counted else silent
            yield who[turn.label] | at | _number(metric, getattr(turn, metric), reason)
    for entry in found.entries:
        for context, says in sorted(found.failed.get(entry.label, {}).items()):
            at = {"context": context, "batch_size": batch.get(context), "says": says}
            for metric in TURNS:
                yield who[entry.label] | at | _number(metric, None, "out_of_memory")
        for context, share in sorted(found.busy.get(entry.label, {}).items()):
            at = {"context": context, "batch_size": batch.get(context)}
            yield who[entry.label] | at | _number("gpu_busy_fraction", share, silent or "empty_profile")
        yield who[entry.label] | _number("parameters", entry.parameters, None)


def _benchmark(found: Benchmark) -> Iterator[dict]:
    beside = {}
    for variant, others in found.reference_implementations.items():
        for other in others:
            beside.setdefault(other, []).append(variant)
    setting = {name: getattr(found, name) for name in ("what", "batch", "compiled", "architecture", "vocabulary")}
    shared = {
        "part": found.what, "setting": names.digest(setting | {"threads": found.threads}), "batch_size": found.batch,
        "compile": found.compiled, "threads": found.threads, "precision": AUTOMATIC[found.environment["device"]],
        "architecture": found.architecture if found.what == "step" else None,
    }  # fmt: skip
    for context in sorted({*found.times_ms, *found.out_of_memory}):
        taken, failed = found.times_ms.get(context, {}), found.out_of_memory.get(context, {})
        reasons = [("out_of_memory", failed), ("absent", found.absent)]
        for who in dict.fromkeys((*taken, *failed, *found.absent)):
            variant = who.removesuffix(AGAIN)
            at = shared | {"label": who, "title": who, "context": context}
            at |= {"attention": variant if variant in found.reference_implementations else None}
            at |= {"reference_of": ",".join(beside.get(who, []))}
            for block, value in enumerate(taken.get(who, [])):
                yield at | _number("time_ms", value, None, block=block)
            reason, says = next(((code, says[who]) for code, says in reasons if who in says), (None, None))
            if who not in taken:
                yield at | _number("time_ms", None, reason, says=says)


def _json(options) -> str:
    return json.dumps(options, sort_keys=True, ensure_ascii=False)


ROWS: dict[str, Callable[..., Iterator[dict]]] = {
    "run": _run, "failure": _failure, "probe": _probe, "scaling": _scaling, "steps": _steps, "benchmark": _benchmark,
}  # fmt: skip


# The files


class Table:
    """The table on its way into both files, some rows at a time, and what is counted of it meanwhile."""

    def __init__(self, folder: Path):
        # a fiftieth of its size, by no clock: what reads CSV here reads it compressed
        packed = gzip.GzipFile(folder / CSV, "wb", mtime=0)  # closed in __exit__
        self.csv = io.TextIOWrapper(packed, encoding="utf-8", newline="")
        self.lines = csv.writer(self.csv, lineterminator="\n")
        self.lines.writerow(COLUMNS)
        self.parquet = pq.ParquetWriter(folder / PARQUET, SCHEMA, compression="zstd")
        self.waiting: list[dict] = []
        self.records, self.rows, self.nulls = Counter(), Counter(), Counter()
        self.by_metric, self.reasons, self.devices = Counter(), Counter(), Counter()
        self.latest: datetime | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.parquet.close()
        self.csv.close()

    def add(self, path: str, kind: str, found: Strict) -> None:
        """All rows of a record that lies at `path` below the folder of records."""
        place = {"record": path, "folder": path.rpartition("/")[0] or "."}
        for number, row in enumerate(list(rows(kind, found))):  # all or, where it cannot be read, none
            row = {**place, "row": number, "unit": unit(row["metric"]), **row}
            self.waiting.append(row | {name: _text(row.get(name)) for name in TEXTS})
            self.rows[kind] += 1
            self.by_metric[kind, row["metric"]] += 1
            if row["null_reason"] is not None:
                self.nulls[kind] += 1
                self.reasons[kind, row["metric"], row["null_reason"]] += 1
            if len(self.waiting) == AT_ONCE:
                self.flush()
        self.records[kind] += 1
        self.latest = max(self.latest or found.finished_at, found.finished_at)
        if hasattr(found, "environment"):
            self.devices[kind, found.environment["device_name"]] += 1

    def flush(self) -> None:
        self.parquet.write_table(pa.Table.from_pylist(self.waiting, SCHEMA))
        self.lines.writerows([_written(row.get(name)) for name in COLUMNS] for row in self.waiting)
        self.waiting.clear()


def _text(value: str | None) -> str | None:
    """A text as both files have it: none that is empty, and none that a spreadsheet would take for a formula."""
    return (f"'{value}" if value.startswith(FORMULA) else value) if value else None


def _written(value) -> str:
    """A value as CSV: numbers in full, no quotes that pandas or DuckDB would not take away."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return value if isinstance(value, str) else repr(value)


def write(folder: Path, records: Path, warn: Callable[[str], None] = warnings.warn) -> Written:
    """Writes the table of all records below a folder, and what goes with it, into `folder`.

    A file that is no record, was changed, or is one of `records` a second time, and what is synthetic, is left out:
    `warn` hears of each in a line. Predictions are no measurements and are not in. Raises UsageError where there is no
    record, or where `folder` cannot be written or holds files of somebody else under these names.
    """
    folder, records = Path(folder), Path(records)
    _check_places(folder, records)
    cited = citation()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp") as made:
            written = _write(Path(made), records, warn, cited)
            for name in (*FILES, SUMS):
                os.chmod(Path(made) / name, 0o644)
                os.replace(Path(made) / name, folder / name)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}; make room or name another folder") from error
    return written


def _check_places(folder: Path, records: Path) -> None:
    inside, outside = folder.resolve(), records.resolve()
    if inside == outside or outside in inside.parents:
        raise UsageError(f"{folder} lies in the folder of records, where its files would be read again; name another")
    there = [name for name in (*FILES, SUMS) if (folder / name).exists()]
    if there and not _is_ours(folder):
        raise UsageError(f"{folder} holds another {there[0]} than this command wrote; remove it or name another folder")


def _is_ours(folder: Path) -> bool:
    """Whether an earlier call wrote the files there, and nobody has changed them since."""
    try:
        said = dict(line.split("  ")[::-1] for line in (folder / SUMS).read_text(encoding="utf-8").splitlines())
        return said == {name: _sha256(folder / name) for name in FILES}
    except (OSError, ValueError):
        return False


def _write(folder: Path, records: Path, warn, cited: dict) -> Written:
    left_out: list[str] = []
    others: list[str] = []
    with Table(folder) as table:
        intake = Intake(records, table)
        for one in folders.look([records], intake.take):
            found = [intake.below(wrong) for wrong in map(str, one.wrong)] + [said for said in one.kept if said]
            aside = [intake.below(f"{one.name}/{name}") for name in one.aside if not name.startswith(".")]
            found += [
                f"{name}: put there what it leads to, or name that as --records" for name in aside if _is_link(name)
            ]
            others += [name for name in aside if not _is_link(name)]
            for said in found:
                warn(f"left out: {said}")
            left_out += found
        if intake.failed:
            raise intake.failed
        table.flush()
    if not intake.seen:
        raise UsageError(f"there is no record of a measurement below {records}; `python -m lib.study` makes some")
    version = f"{cited['version']}+{intake.digest.hexdigest()[:12]}"
    _write_dictionary(folder / DICTIONARY, table)
    (folder / VERSION).write_text(f"{version}\n", encoding="utf-8")
    described = json.dumps(croissant(folder, version, table.latest, cited), indent=1, ensure_ascii=False)
    (folder / CROISSANT).write_text(f"{described}\n", encoding="utf-8")
    page = card(table, version, cited, left_out, others, intake.predictions)
    (folder / CARD).write_text(page, encoding="utf-8")
    sums = "".join(f"{_sha256(folder / name)}  {name}\n" for name in sorted(FILES))
    (folder / SUMS).write_text(sums, encoding="utf-8")
    return Written(version, table.records, table.rows, left_out)


def _is_link(name: str) -> bool:
    return name.endswith(" (a link)")  # as `folders.look` says it


class Intake:
    """What `folders.look` reads below a folder, on its way into the table; of no record more is kept than its rows."""

    def __init__(self, records: Path, table: Table):
        self.records, self.table = records, table
        self.seen: dict[str, str] = {}  # checksum to path
        self.digest, self.predictions = hashlib.sha256(), 0
        self.failed: OSError | None = None  # of the table's files, and no fault of a record

    def below(self, said: str) -> str:
        """A line that begins with a path, with the path below the folder of records: the same on every machine."""
        return said.removeprefix(f"{names.printable(self.records)}/")

    def take(self, path: Path, kind: str, found: Strict) -> str | None:
        """Puts a record into the table; says why not where it does not belong there."""
        where = _shown(path.relative_to(self.records).as_posix())
        sign = getattr(found, "content_sha256", "") or names.digest({where: found.model_dump_json()})
        if kind not in ROWS:
            self.predictions += 1
        elif getattr(found, "provenance", None) == "synthetic":
            return f"{where}: it is synthetic, nobody measured it"
        elif sign in self.seen:
            return f"{where}: it is the same record as {self.seen[sign]}; take one out"
        elif not self.failed:
            try:
                self.table.add(where, kind, found)
            except OSError as error:
                self.failed = error
            self.seen[sign] = where
            self.digest.update(f"{sign}  {where}\n".encode())
        return None


def _shown(path: str) -> str:
    """A path with what is not printable as its escape."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_dictionary(path: Path, table: Table) -> None:
    """Columns, metrics and reasons, each with its meaning; `type` of a column, `unit` and `better` of a metric, and how
    often each stands in the table."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["entry", "name", "kind", "type", "unit", "better", "meaning", "rows", "null_reasons"])
        for name, (kind, meaning) in COLUMNS.items():
            lines.writerow(["column", name, "", kind, "", "", meaning, sum(table.rows.values()), ""])
        for one in metrics():
            count, reasons = table.by_metric[one.kind, one.name], _reasons(table, one.kind, one.name)
            lines.writerow(
                ["metric", one.name, one.kind, "number", one.unit, one.better, one.meaning, count, " ".join(reasons)]
            )
        for code, words in NULL_REASONS.items():
            count = sum(count for (_, _, reason), count in table.reasons.items() if reason == code)
            lines.writerow(["null_reason", code, "", "", "", "", words, count, ""])


def _reasons(table: Table, kind: str, metric: str) -> list[str]:
    return sorted(reason for of_kind, of, reason in table.reasons if (of_kind, of) == (kind, metric))


def citation() -> dict:
    """What CITATION.cff says. Raises UsageError where this is no clone, which has it."""
    try:
        return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    except OSError:
        raise UsageError("CITATION.cff is not beside lib/: run this in a clone of the project") from None


def bibtex(version: str, latest: datetime, cited: dict) -> str:
    authors = " and ".join(f"{{{author['name']}}}" for author in cited["authors"])
    return (
        f"@misc{{attention_study, title = {{{cited['title']}: measurements}}, author = {{{authors}}}, "
        f"year = {{{latest.year}}}, version = {{{version}}}}}"
    )


# The context of Croissant 1.0: https://docs.mlcommons.org/croissant/docs/croissant-spec.html, appendix 1.
OF_CROISSANT = (
    "citeAs", "column", "extract", "field", "fileObject", "fileProperty", "fileSet", "format", "includes",
    "isLiveDataset", "jsonPath", "key", "parentField", "path", "recordSet", "references", "regex", "repeated",
    "replace", "separator", "source", "subField", "transform",
)  # fmt: skip
CONTEXT = {
    "@language": "en", "@vocab": "https://schema.org/", "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/", "dct": "http://purl.org/dc/terms/", "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"}, "examples": {"@id": "cr:examples", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"}, **{name: f"cr:{name}" for name in OF_CROISSANT},
}  # fmt: skip
MIME = {PARQUET: "application/x-parquet", CSV: "application/gzip", DICTIONARY: "text/csv"}
NAME = "attention-study-measurements"
ABOUT = (
    "What each kind of self-attention costs and can do: time, joules, memory, losses, recall, as measured; a row per "
    "number, and where a number is missing the reason"
)


def croissant(folder: Path, version: str, latest: datetime, cited: dict) -> dict:
    """The description of the files in `folder` in Croissant 1.0 (JSON-LD). The date is that of the latest record."""
    return {
        "@context": CONTEXT, "@type": "sc:Dataset", "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": NAME, "description": ABOUT, "version": version, "citeAs": bibtex(version, latest, cited),
        "license": f"https://spdx.org/licenses/{cited['license']}.html",
        "url": cited.get("repository-code") or cited.get("url") or "./",
        "creator": [{"@type": "sc:Organization", "name": author["name"]} for author in cited["authors"]],
        "datePublished": latest.date().isoformat(), "isLiveDataset": False,
        "keywords": ["self-attention", "transformers", "benchmark", "energy", "training cost"],
        "distribution": [
            {
                "@type": "cr:FileObject", "@id": name, "name": name, "contentUrl": name, "encodingFormat": mime,
                "contentSize": f"{(folder / name).stat().st_size} B", "sha256": _sha256(folder / name),
            }
            for name, mime in MIME.items()
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet", "@id": "measurements", "name": "measurements",
                "description": "A row per measured number.",
                "key": [{"@id": "measurements/record"}, {"@id": "measurements/row"}],
                "field": [
                    {
                        "@type": "cr:Field", "@id": f"measurements/{name}", "name": name, "description": meaning,
                        "dataType": SCHEMA_ORG[kind],
                        "source": {"fileObject": {"@id": PARQUET}, "extract": {"column": name}},
                    }
                    for name, (kind, meaning) in COLUMNS.items()
                ],
            }
        ],
    }  # fmt: skip


# The card


def card(table: Table, version: str, cited: dict, left_out: list[str], others: list[str], predictions: int) -> str:
    """The dataset card, as Hugging Face has them: YAML by which `datasets.load_dataset` finds the table, then words."""
    rows, records = sum(table.rows.values()), sum(table.records.values())
    head = {
        "pretty_name": cited["title"], "license": cited["license"].lower(), "language": ["en"], "version": version,
        "size_categories": [_size(rows)], "tags": ["self-attention", "benchmark", "energy", "tabular"],
        "configs": [
            {"config_name": "measurements", "default": True, "data_files": [{"split": "train", "path": PARQUET}]},
        ],
    }  # fmt: skip
    by_kind = [
        (kind, table.records[kind], table.rows[kind], table.nulls[kind], _devices(table, kind))
        for kind in ROWS
        if table.records[kind]
    ]
    columns = [(f"`{name}`", kind, meaning) for name, (kind, meaning) in COLUMNS.items()]
    measured = [
        (f"`{one.name}`", one.kind, one.unit, one.better or "–", one.meaning, table.by_metric[one.kind, one.name],
         " ".join(f"`{reason}`" for reason in _reasons(table, one.kind, one.name)) or "–")
        for one in metrics()
    ]  # fmt: skip
    reasons = [(f"`{code}`", words) for code, words in NULL_REASONS.items()]
    return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()}
---

# {cited["title"]} (measurements)

{ABOUT}.
Version {version}: {rows:,} rows from {records:,} records, the latest of {table.latest.date().isoformat()}.

{_table(("kind", "records", "rows", "of these null", "measured on, by records"), by_kind)}

- `{PARQUET}` is the table; `{CSV}` holds the same.
- `{DICTIONARY}` says what each column, metric and reason is, as below.
- `{CROISSANT}` describes the files for programs ([Croissant 1.0](http://mlcommons.org/croissant/1.0)).
- `sha256sum -c {SUMS}` checks the files. The part of `{VERSION}` behind `+` is a digest of the records' paths and
  checksums: it changes when they do. The same records give the same files.

```python
datasets.load_dataset("FOLDER", split="train")  # Hugging Face's name for a data set that is in one piece
pandas.read_parquet("FOLDER/{PARQUET}")
```

## How to read it

- **A row is one number as it was measured**, with its unit. Two may be compared where `kind`, `part`, `metric`,
  `setting`, `context`, `difficulty`, `device_name` and `gpu_uuid` agree. They were measured in turns, and may be
  paired, where `session` and `block` agree too; where no session is named, only inside one benchmark.
- **A missing number is a row** with `value` null and its `null_reason`, never 0 and never an estimate. What ran out of
  memory or time, and runs that failed, are rows with that reason.
- **`certified` false**: the variant is not what its name promises. Its numbers stand here, and no ranking counts them.
- **A flagged run** (`flags`) was disturbed, or its measurement window too short.
- **`prefill_latency_s`, `decode_latency_s_per_token` and `cache_bytes`** of a run stand twice: with `part` `run` at the
  run's own context, and with `inference` at each that was timed.
- **In a spreadsheet**, read the CSV's columns as text where the dictionary says so: digests such as `123e4567` look
  like numbers. A text that begins with `=`, `+`, `-` or `@` has an apostrophe before it, in both files, so that none
  is taken for a formula. An empty field is null; no text is empty.

## What it does not hold

- Series: losses by step, validations, power traces, epochs one by one, training curves of probes, the samples of a
  scaling process (a row is their median), the points of a slope. They stand in the records, which `record` names.
- Comparisons: ratios, intervals and verdicts are worked out from these numbers, by the project's notebooks.
- Anything that nobody measured: predictions ({predictions:,} lay among the records), synthetic records.
- {_listed("Files among the records that are no JSON", others)}
- {_listed("Files that were left out", left_out)}
- Other sizes, devices and data than the table names. Numbers of folders `by-NAME` are NAME's word.

## Columns

{_table(("column", "type", "meaning"), columns)}

## Metrics

`better`: the direction that is better; – where neither is. The last column has the reasons that stand in this version.

{_table(("metric", "kind", "unit", "better", "meaning", "rows", "null because of"), measured)}

## Reasons for missing numbers

{_table(("reason", "in words"), reasons)}

## How to cite

{cited["message"]} Name this version too: {version}. License: {cited["license"]}.

```bibtex
{bibtex(version, table.latest, cited)}
```
"""


def _size(rows: int) -> str:
    """Hugging Face's category of a number of rows."""
    bounds = {"n<1K": 10**3, "1K<n<10K": 10**4, "10K<n<100K": 10**5, "100K<n<1M": 10**6, "1M<n<10M": 10**7}
    return next((name for name, bound in bounds.items() if rows < bound), "n>10M" if rows >= 10**7 else "")


def _devices(table: Table, kind: str) -> str:
    counted = sorted((name, count) for (of, name), count in table.devices.items() if of == kind)
    return ", ".join(f"{_code(name)} {count:,}" for name, count in counted) or "–"


def _listed(what: str, files: Iterable[str], most: int = 50) -> str:
    files = list(files)
    more = f" and {len(files) - most:,} more" if len(files) > most else ""
    return f"{what}: {', '.join(map(_code, files[:most])) or 'none'}{more}."


def _code(text: str) -> str:
    """Somebody else's text in Markdown: as code, in which nothing lives."""
    return f"`{names.printable(text, 300).replace('`', chr(39))}`"


def _table(heads: tuple, lines: list[tuple]) -> str:
    def written(cell) -> str:
        return f"{cell:,}" if isinstance(cell, int) else str(cell).replace("|", "\\|")

    rows = [heads, ["---"] * len(heads), *(map(written, line) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(words: list[str] | None = None) -> int:
    """0: all is in. 1: written, but files were left out, each of them named. 2: nothing was written."""
    parser = argparse.ArgumentParser(prog="python -m lib.site.data", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the table and what goes with it are written")
    parser.add_argument("--records", type=Path, default=ROOT / "records", help="all records below this folder are read")
    options = parser.parse_args(words)
    try:
        done = write(options.folder, options.records, lambda said: print(said, file=sys.stderr))
    except UsageError as error:
        print(f"python -m lib.site.data: {error}", file=sys.stderr)
        return 2
    counted = ", ".join(f"{count:,} of kind {kind}" for kind, count in done.records.items())
    print(f"{options.folder}: version {done.version}, {sum(done.rows.values()):,} rows from records: {counted}")
    if done.left_out:
        print(f"{len(done.left_out)} files were left out, named above and on the card", file=sys.stderr)
    return int(bool(done.left_out))


if __name__ == "__main__":
    sys.exit(main())
