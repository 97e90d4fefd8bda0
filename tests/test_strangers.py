"""What strangers send: records, profiles, models, tokenizers, caches. Data does nothing but be read or be refused."""

import copy
import io
import json
import math
import os
import re
import subprocess
import warnings
import zipfile
from functools import cache as cache_once
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make import NINTH, PARAMETERS, TINY, learning, make_record, places
from test_corpus import load as load_talks
from transformers import GPT2Config

from lib import attention, markup, parameters, paths, record
from lib.analysis import (
    answer,
    answer_figure,
    benchmarks,
    capability,
    compare,
    conclusions,
    crossovers,
    figures,
    growth,
    growth_figures,
    growth_tables,
    predictions,
    style,
    tables,
)
from lib.analysis import steps as step_tables
from lib.analysis.evidence import Evidence
from lib.data import cache, corpus
from lib.errors import UsageError
from lib.explore import records as explore
from lib.explore import widgets
from lib.measure import assemble
from lib.model import GPT2, build_model, gpt2_config
from lib.record import names, probe
from lib.record import scaling as stored
from lib.record import steps as steps_record
from lib.record.benchmark import Benchmark
from lib.study import cluster, forecast, gather, plan, scaling, steps

IMAGE = "<img src=x onerror=alert(1)>"
FORMULA = r"$\frac{$"


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def signed(content: dict) -> str:
    """Any content as a stranger would send it: with the checksum that fits."""
    return json.dumps(content | {"content_sha256": record.checksum(content)})


def content_of(one=None) -> dict:
    return json.loads((one or make_record()).model_dump_json())


def put(content: dict, path: tuple, value) -> dict:
    changed = copy.deepcopy(content)
    inside = changed
    for name in path[:-1]:
        inside = inside[name]
    inside[path[-1]] = value
    return changed


def refused(text: str, folder: Path, name: str | None = None) -> str:
    """Why a file is no record, in one line; what is good beside it is read all the same."""
    folder.mkdir(exist_ok=True)
    good = record.write(make_record("gqa"), folder)
    (folder / (name or f"{make_record().name}.json")).write_text(text)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [one.name for one in record.load_all(folder)] == [good.stem]
    (said,) = [str(one.message) for one in said]
    assert "\n" not in said and len(said) < 1000 and said.isprintable()
    return said


ODD = [
    (("environment",), {}), (("environment",), []), (("environment", "gpu"), "mine"), (("environment", "gpu"), 3),
    (("environment", "device"), "tpu"), (("environment", "device_name"), None), (("environment", "packages"), "all"),
    (("parameters",), {}), (("parameters", "heads"), 0), (("parameters", "heads"), "2"), (("parameters", "seed"), -1),
    (("parameters", "layers"), 10**6), (("parameters", "width"), 2.5), (("parameters", "options"), []),
    (("parameters", "options"), {"a": {"b": {}}}), (("parameters", "epochs"), True), (("parameters", "dataset"), None),
    (("data",), None), (("data", "padding_share"), 7.0), (("data", "token_sha256"), "x"),
    (("series", "train_loss"), [1.0]), (("series", "train_loss"), []), (("series", "epoch_time_s"), [1.0, 0.0]),
    (("series", "non_padding_tokens"), [3, 2, 1, 0]), (("series", "power_w"), []), (("series", "inference"), [{}] * 99),
    (("metrics", "time_s"), 1e308), (("metrics", "time_s"), -1.0), (("metrics", "parameters"), 10**30),
    (("metrics", "energy_j"), "1"), (("metrics", "energy_j"), True), (("metrics", "mfu"), []),
    (("finished_at",), "2026-11-01T00:00:00"), (("finished_at",), "9999-12-31T23:59:59Z"), (("finished_at",), 0),
    (("started_at",), "0001-01-01T00:00:00Z"), (("study", "session"), ""), (("study", "block"), -1),
    (("study", "block"), 10**12), (("name",), "another"), (("name",), "../../escaped"), (("setting",), "1" * 8),
    (("label",), "gqa"), (("attention",), "/etc/passwd"), (("attention_sha256",), "short"), (("title",), ""),
    (("title",), "x" * 20_000), (("title",), FORMULA), (("title",), "\x1b[2Jgone"), (("title",), "a\nFAILED b"),
    (("title",), "_hidden"), (("paper",), "x" * 20_000), (("paper",), "\u202egnp"), (("kernels",), {"forward": 3}),
    (("schema_version",), 1), (("schema_version",), "2"), (("certificate", "passed"), "yes"), (("checks",), [{}]),
    (("null_reasons",), {}), (("flags",), ["mine"]), (("unknown",), 1), (("warm_up",), {"steps": -1}),
    (("gpu_summary",), {"samples": 1}), (("idle",), []),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), ODD, ids=str)
def test_an_odd_record_with_a_valid_checksum_is_named_and_left_out(path, value, tmp_path):
    said = refused(signed(put(content_of(), path, value)), tmp_path / "records")
    assert "is left out" in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (signed(content_of()).replace('"time_s": 20.0', '"time_s": ' + "1" * 400, 1), "beyond what is"),
        (signed(content_of()).replace('"time_s": 20.0', '"time_s": ' + "1" * 5000, 1), ""),
        (signed(content_of()).replace('"time_s": 20.0', '"time_s": 1e999', 1), "beyond what is measured"),
        (signed(content_of()).replace('"time_s": 20.0', '"time_s": NaN', 1), "NaN is no number"),
        (signed(content_of()).replace('"label": ', '"label": "gqa", "label": ', 1), "names 'label' twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"schema_version": 2, "a": ' + "[" * 20 + "]" * 20 + "}", "nested too deeply"),
        ("[1, 2]", "JSON of another kind"),
        ('{"schema_version": 2, "a": "\\ud800"}', ""),
        ('{"schema_version": 2, "a": [' + "0," * 10**6 + "0]}", "more than 1,000,000 entries"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_that_is_no_record_is_one_sentence(text, says, tmp_path):
    assert says in refused(text, tmp_path / "records")


def test_a_record_of_ten_million_points_is_too_large(tmp_path):
    """And is not even read: a file of its size has a bound."""
    folder = tmp_path / "records"
    said = refused('{"schema_version": 2, "a": [' + "0.123456," * 10**7 + "0]}", folder)
    assert "larger than 67,108,864 bytes" in said


def fifo(path):
    os.mkfifo(path)


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(10 * 10**9)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (fifo, "no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
        (lambda path: path.symlink_to("/dev/stdin"), ""),
        (lambda path: path.symlink_to(path), ""),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (sparse, "larger than"),
        (lambda path: path.mkdir(), "no regular file"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "UTF-8"),
        (lambda path: path.write_bytes(b""), "no whole JSON"),
    ],
    ids=["fifo", "zero", "stdin", "loop", "nowhere", "10 GB", "folder", "bytes", "empty"],
)
@pytest.mark.parametrize("reader", ["runs", "failures", "lengths", "profile", "predictions"])
def test_what_is_no_file_of_a_reader_is_one_sentence(reader, make, says, tmp_path):
    """Also a profile and what failed: every reader has the same door."""
    endings = {"runs": "odd.json", "failures": f"odd.{record.FAILED}", "profile": "odd.yaml"}
    make(tmp_path / endings.get(reader, "odd.json"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if reader == "runs":
            assert record.load_all(tmp_path) == []
        elif reader == "failures":
            assert len(record.failures(tmp_path)) == 0
        elif reader == "predictions":
            assert stored_predictions(tmp_path) == []
        elif reader == "lengths":
            with pytest.raises(UsageError, match="there is no record"):
                stored.load_all(tmp_path)
        else:
            if make.__name__ == "<lambda>" and says == "no whole JSON":
                return  # an empty profile is the quick one
            with pytest.raises(UsageError) as error:
                plan.read_profile(str(tmp_path / "odd.yaml"))
            said = str(error.value)
    said = said if reader == "profile" else str(warned[0].message)
    assert "\n" not in said and (reader == "profile" or says in said)


def stored_predictions(folder):
    from lib.record import prediction

    return prediction.load_all(folder)


# Labels.
LABELS = [
    FORMULA, "x" * 20_000, "a\x1b[31mb", "a\nb", "a\u202eb", "a\u200bb", " a", "_a", "sdp\u0430", "\u0455dpa",
    "SDPA", "sdpa\u2009", "fl\u0430sh", "s d p a", "sdpa_again\u00a0", "\U0001d42c\U0001d41d\U0001d429\U0001d41a",
    "l\u0456near", "1inear", "g\u0521a", "\uff33\uff24\uff30\uff21",
]  # fmt: skip


@pytest.mark.parametrize("label", LABELS, ids=lambda label: ascii(label)[:30])
def test_a_label_that_cannot_be_shown_or_passes_for_another_is_refused(label, tmp_path):
    """In a record, in what is typed here, and in a study of cost by length."""
    values = PARAMETERS | {"attention": "mine.py", "label": label}
    changes = {"parameters": values, "attention": "mine.py", "label": label, "name": names.run_name(values)}
    changes |= {"setting": names.setting(values)}
    with_it = signed(content_of() | changes)
    refused(with_it, tmp_path / "records", f"{changes['name'][:200]}.json")
    (tmp_path / "mine.py").write_text(NINTH)
    known = plan.known_parameters()
    typed = {name: line.default for name, line in known.items()} | TINY
    with pytest.raises(UsageError) as error:
        parameters.check_types(typed | {"label": label}, known)
        parameters.check_values(typed | {"attention": str(tmp_path / "mine.py"), "label": label})
    assert str(error.value).isprintable() and len(str(error.value)) < 500
    defaults = {name: line.default for name, line in plan.known_parameters("scaling.ipynb").items()}
    variants = [{"attention": str(tmp_path / "mine.py"), "label": label}]
    with pytest.raises(UsageError) as error:
        scaling.checked(defaults | {"variants": variants})
    assert str(error.value).isprintable() and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "label", ["../../escaped/x", "/tmp/escaped", "..", "a/b", "~root", "con", "C:x", "-rf", "`id`"]
)
def test_a_label_leads_no_file_out_of_its_folder(label, tmp_path):
    inside = tmp_path / "a" / "b" / "out"
    (tmp_path / "mine.py").write_text(NINTH)
    found = scaling_record(label=label, attention="mine.py")
    written = stored.write(found, inside)
    assert written.parent == inside and re.fullmatch(r"([A-Za-z0-9_.]+-[0-9a-f]{8}|con|\.\.)\.json", written.name)
    assert stored.load(written).label == label
    one = make_record(label) if label != ".." else make_record("x..")
    assert record.write(one, inside).parent == inside
    assert all(path.is_relative_to(inside) for path in tmp_path.rglob("*.json"))


def scaling_record(**changes) -> stored.Scaling:
    path = paths.ROOT / "records" / "scaling-cpu" / "sdpa.json"
    return stored.load(path).model_copy(update=changes)


def test_files_that_one_folder_cannot_tell_apart_are_one_run(tmp_path):
    """Two names that differ by case alone would overwrite each other on a disk that knows none."""
    for label in ("mine", "MINE"):
        record.write(make_record(label, session=label), tmp_path / label)
    one, other = (json.loads(next((tmp_path / label).glob("*.json")).read_text()) for label in ("mine", "MINE"))
    assert one["name"].lower() != other["name"].lower()  # the parameters' hash tells them apart
    found = gather.gather(tmp_path / "out", [tmp_path / "mine", tmp_path / "MINE"])
    assert len(found.copied) == 2
    written = [path.name.casefold() for path in (tmp_path / "out").rglob("*.json")]
    assert len(set(written)) == len(written)


def test_gather_copies_only_what_it_checked_and_never_through_a_link(tmp_path):
    bad = put(content_of(), ("parameters", "heads"), 0)
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / f"{make_record().name}.json").write_text(signed(bad))
    good = record.write(make_record("gqa"), tmp_path / "sent")
    found = gather.gather(tmp_path / "out", [tmp_path / "sent"])
    assert found.copied == [good] and len(found.damaged) == 1
    assert [path.name for path in (tmp_path / "out").rglob("*.json")] == [good.name]
    device = next((tmp_path / "out").iterdir())
    (device / good.name).unlink()
    device.rmdir()
    device.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UsageError, match="link to elsewhere"):
        gather.gather(tmp_path / "out", [tmp_path / "sent"])
    assert not any((tmp_path / "elsewhere").iterdir())


def test_what_a_stranger_wrote_forges_no_line_in_the_terminal(tmp_path, capsys):
    folder = tmp_path / "sent"
    folder.mkdir()
    (folder / "a\nCONFLICT b\x1b[2J.json").write_text("{}")
    (folder / f"x.{record.FAILED}").write_text(json.dumps({"says": "a\nb"}))
    assert gather.main([str(tmp_path / "out"), str(folder)]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "\x1b" not in said.err + said.out


# What a page shows.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    [IMAGE, FORMULA, "</td>", "&lt;"]
)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), TEXTS)
def test_a_table_shows_what_it_holds_as_text(rows, heading):
    frame = pd.DataFrame({heading: [one for one, _ in rows], f"{heading} 2": [[other] for _, other in rows]})
    shown = markup.table(frame).data
    assert IMAGE not in shown and "mathjax_ignore" in shown
    live = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: live.add(tag)
    parser.feed(shown)
    assert live == {"div", "style", "table", "thead", "tbody", "tr", "th", "td"}


def test_pages_sentences_and_errors_are_text():
    page = widgets.page([IMAGE, widgets.Folded(IMAGE, pd.DataFrame({IMAGE: [IMAGE]}))])
    for shown in (page, widgets.said(ValueError(IMAGE)), markup.table(IMAGE).data, style.save(IMAGE, Path(), "x").data):
        assert "<img" not in shown and "&lt;img" in shown and "mathjax_ignore" in shown


def test_every_table_and_sentence_of_ours_goes_through_one_door():
    """No other place of lib, and no notebook, makes HTML or Markdown of what it shows."""
    door = {"lib/markup.py"}
    other = re.compile(r"\.style\.(?!use|save)|to_html|\bMarkdown\(|\bHTML\(|_repr_html_")
    widgets_of_ours = re.compile(r"widgets\.HTML\((\"[a-z]*\")?\)")
    for path in sorted((paths.ROOT / "lib").rglob("*.py")):
        if path.relative_to(paths.ROOT).as_posix() not in door:
            source = widgets_of_ours.sub("", path.read_text())
            assert not other.search(source), path
    for path in sorted((paths.ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                assert not other.search(cell.source), (path.name, cell.source)


# Models and tokenizers.
TRAP = "import pathlib\npathlib.Path({mark!r}).touch()\n" + NINTH


@pytest.fixture
def trapped(tmp_path):
    """A folder with a model in it and in `ckpt` whose configs name the folder's own file; and what that would leave."""
    mark = tmp_path / "ran"
    (tmp_path / "plain.py").write_text(NINTH)
    model = build_model(str(tmp_path / "plain.py"), gpt2_config(1, 16, 2, 16, 30))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.py").write_text(TRAP.format(mark=str(mark)))
    build_model("sdpa", gpt2_config(1, 16, 2, 16, 30)).save_pretrained(tmp_path / "folder")
    model.config.attention = str(tmp_path / "folder" / "mine.py")
    model.save_pretrained(tmp_path / "folder" / "ckpt")
    return tmp_path / "folder", mark


def test_a_model_s_folder_never_chooses_what_runs(trapped):
    folder, mark = trapped
    inner = GPT2Config.from_pretrained(folder / "ckpt")
    tries = {
        "subfolder": lambda: GPT2.from_pretrained(folder, subfolder="ckpt"),
        "the folder itself": lambda: GPT2.from_pretrained(folder / "ckpt"),
        "a config": lambda: GPT2.from_pretrained(folder, config=inner),
        "a config's folder": lambda: GPT2.from_pretrained(folder, config=str(folder / "ckpt")),
        "both": lambda: GPT2.from_pretrained(folder, config=inner, subfolder="ckpt"),
        "revision": lambda: GPT2.from_pretrained(folder, subfolder="ckpt", revision="other"),
    }
    for name, load in tries.items():
        with pytest.raises(ValueError, match="pass attention="):
            load()
        assert not mark.exists(), name
    assert GPT2.from_pretrained(folder).config.attention == "sdpa"
    named = str(folder / "ckpt" / ".." / "mine.py")
    assert GPT2.from_pretrained(folder, subfolder="ckpt", attention=named) and mark.exists()  # the caller said so


def test_a_tokenizer_with_code_of_its_own_is_refused_and_nobody_is_asked(tmp_path, monkeypatch):
    mark, folder = tmp_path / "ran", tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "mine.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Mine: pass\n")
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "mine.Mine"}, "model_type": "mine"}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked"))
    with pytest.raises(UsageError, match="code of its own") as error:
        corpus.load_tokenizer(str(folder))
    assert "\n" not in str(error.value) and not mark.exists()


# One text, from a run's start to its record.
@pytest.mark.parametrize("moment", ["before the model", "before the record"])
def test_a_file_that_is_edited_while_it_runs_changes_nothing_of_its_run(moment, tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(NINTH)
    known = plan.known_parameters()
    values = {name: line.default for name, line in known.items()} | TINY
    values |= {"attention": str(file), "label": "mine", "device": "cpu", "inference_contexts": []}
    parameters.check_values(values)
    sha256 = attention.source_sha256(str(file))

    def edit():
        file.write_text(NINTH.replace("nobody, never", "somebody, always").replace("self.weight *", "0 *"))

    if moment == "before the model":
        edit()
    layer = build_model(str(file), gpt2_config(1, 32, 2, 64, 30))
    edit()
    assert attention.source_sha256(str(file)) == sha256
    assert attention.load(str(file)).paper == "nobody, never"
    assert layer.config.attention == str(file)
    hidden = torch.randn(1, 4, 32)
    attended = layer.transformer.h[0].attn(hidden)[0]
    assert torch.allclose(attended, layer.transformer.h[0].attn.reference(hidden), atol=1e-5)
    parameters.check_values(values)  # the next run is of the new text
    assert attention.source_sha256(str(file)) != sha256 and attention.load(str(file)).paper == "somebody, always"


def test_every_variant_s_text_is_read_once(monkeypatch):
    """The eight too: what is hashed is what was loaded, whatever their files hold later."""
    for name in attention.variants():
        attention.pin(name)
        sha256 = attention.source_sha256(name)
        with monkeypatch.context() as edited:
            edited.setattr(Path, "read_bytes", lambda path: b"raise SystemExit")
            assert attention.source_sha256(name) == sha256 and attention.load(name).paper


def test_the_commit_of_a_record_is_that_of_its_start(monkeypatch):
    from test_training import make_trainer

    from lib.measure import environment

    trainer = make_trainer()
    begun = dict(trainer.commit)
    assert {"commit", "commit_modified"} <= set(begun)
    monkeypatch.setattr(environment, "describe", lambda device: {"device": "cpu", "commit": "later", "cpu": "x"})
    assert trainer.commit == begun
    source = (paths.ROOT / "lib" / "measure" / "assemble.py").read_text()
    assert "environment.describe(device) | trainer.commit" in source


def test_a_study_of_cost_by_length_measures_one_text(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(NINTH)
    defaults = {name: line.default for name, line in plan.known_parameters("scaling.ipynb").items()}
    small = {"width": 32, "contexts": [16], "device": "cpu", "variants": [str(file)], "rounds": 1}
    (entry,) = scaling._entries(scaling.checked(defaults | small))
    file.write_text(NINTH + "\n")
    with pytest.raises(UsageError, match="was changed since the study began"):
        scaling._sample(scaling_record().setting, entry, "layer", 16)


# The token cache.
def plant(damage, folder: Path) -> None:
    (cached,) = [path.parent for path in folder.glob("*/facts.json")]
    facts = json.loads((cached / "facts.json").read_text())
    tokens, lengths = cached / "train.tokens", cached / "train.lengths.npy"
    if damage == "other tokens":
        content = bytearray(tokens.read_bytes())
        content[0] ^= 1
        tokens.write_bytes(content)
    elif damage == "beyond the vocabulary":
        tokens.write_bytes(b"\xff" * tokens.stat().st_size)
        facts["sha256"]["train.tokens"] = corpus._sha256(tokens)
    elif damage == "unknown dtype":
        facts["dtype"] = "V999999999"
    elif damage == "objects":
        np.save(lengths, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        facts["sha256"]["train.lengths.npy"] = corpus._sha256(lengths)
    elif damage == "negative lengths":
        sizes = np.load(lengths)
        np.save(lengths, np.array([-1, sizes.sum() + 1]))
        facts["sha256"]["train.lengths.npy"] = corpus._sha256(lengths)
    elif damage == "a zip bomb":
        with zipfile.ZipFile(lengths, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("arr_0.npy", b"\0" * 10**7)
        facts["sha256"]["train.lengths.npy"] = corpus._sha256(lengths)
    elif damage == "a claimed size":
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (10**13,)})
        lengths.write_bytes(header.getvalue())
        facts["sha256"]["train.lengths.npy"] = corpus._sha256(lengths)
    elif damage == "no digests":
        facts["sha256"] = [1]
    elif damage == "no facts":
        facts = [1]
    elif damage == "counts":
        facts["counts"] = {"conversations": "many"}
    elif damage == "a link":
        tokens.unlink()
        tokens.symlink_to("/dev/zero")
    elif damage == "an older cache":
        del facts["sha256"]
    (cached / "facts.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "damage",
    [
        "other tokens", "beyond the vocabulary", "unknown dtype", "objects", "negative lengths", "no facts", "counts",
        "a link", "an older cache", "a zip bomb", "a claimed size", "no digests",
    ],
)  # fmt: skip
def test_a_planted_cache_of_tokens_is_made_anew(damage, tmp_path, monkeypatch):
    rows = [{"messages": [{"role": "user", "content": f"word {n} and more"}]} for n in range(60)]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus.builtin_tokenizer().save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setenv("ATTENTION_STUDY_CACHE", str(tmp_path / "cache"))
    read = partial(load_talks, str(tmp_path / "talks.jsonl"), tokenizer=str(tmp_path / "tokenizer"))
    first = read()
    tokens = np.array(first.train.tokens)  # a copy: what is cached is read where it lies
    plant(damage, tmp_path / "cache")
    again = read()
    assert again.facts == first.facts
    assert np.array_equal(again.train.tokens, tokens)


@pytest.mark.parametrize(
    "planted", ["FIFO", "/dev/zero", "10 GB", "[" * 10**5, "[1]", '{"revision": "\\ud800"', "\xff"]
)
def test_a_planted_answer_of_the_hub_is_none(planted, tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path))
    cache.remember({"hub": "a"}, {"revision": "b"})
    assert cache.remembered({"hub": "a"}) == {"revision": "b"}
    (path,) = tmp_path.iterdir()
    path.unlink()
    if planted == "FIFO":
        fifo(path)
    elif planted == "10 GB":
        sparse(path)
    elif planted == "/dev/zero":
        path.symlink_to(planted)
    else:
        path.write_bytes(planted.encode("latin-1"))
    assert cache.remembered({"hub": "a"}) is None


# Profiles.
BOMB = "a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
PROFILES = [
    (BOMB, "write out what *a0 stands for"), ("study: {blocks: 100000000}", "at most 1000"), ("1: 2", "must be text"),
    ("width: " + "9" * 5000, ""), ("width: 64\nwidth: 128", "named twice"), ("learning_rate: .nan", "finite"),
    ("learning_rate: .inf", "finite"), ("? [a, b]\n: 1", "must be text"), ("a: " + "[" * 5000, "nested too deeply"),
    ("!!python/object/apply:os.system [id]", ""), ("width: !!binary aGk=", ""), ("# " + "x" * 10**6, "larger than"),
    ("width: 2026-01-01", "must be int"), ("<<: {width: 64}", ""), ("- a", "must be lines"), ("a: b: c", ""),
    ("study: {variants: [" + "sdpa, " * 200 + "sdpa]}", "at most 100 variants"), ("label: a", ""), ("\x00", ""),
    ("width: 0x" + "f" * 5000, ""), ("width: 1_000:99:99", ""), ("study: {blocks: .nan}", "must be int"),
    ("study: 7", ""), ("dataset: \"\\e[2Jx\"", "printed"), ("epochs: 1e9", "must be int"), ("epochs: 1000000000", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), PROFILES, ids=lambda text: ascii(text)[:25])
def test_a_profile_that_is_no_plan_is_one_sentence(text, says, tmp_path):
    """Of a study of runs, of training steps in rounds: one reader of YAML."""
    (tmp_path / "odd.yaml").write_text(text)
    for read in (lambda path: plan.chosen(path, ["sdpa"] if "variants" not in text else None, None), steps.read_plan):
        with pytest.raises(UsageError) as error:
            read(str(tmp_path / "odd.yaml"))
        said = str(error.value)
        assert said.isprintable() and len(said) < 1000
        assert read is steps.read_plan or says in said


@given(st.text(max_size=200) | st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_any_text_is_a_profile_or_one_sentence(tmp_path, content):
    path = tmp_path / "any.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        plan.read_profile(str(path))
    except UsageError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize(
    "value", ["4 8", "4; touch pwned", "$(touch pwned)", "`touch pwned`", "4' touch pwned '", "\n"]
)
def test_a_variable_of_the_workflow_reaches_no_shell(value, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    command = f'{cluster.threads_as_given()}; printf %s "$OMP_NUM_THREADS"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == value and not any(tmp_path.iterdir())


def test_readers_learn_what_is_code_what_is_data_and_what_the_checksum_does():
    page, readme = (" ".join((paths.ROOT / name).read_text().split()) for name in ("docs/security.md", "README.md"))
    for said in ("ATTENTION_STUDY_CACHE", "checksum", "variant file", "notebook", "profile", "pull request"):
        assert said in page
    assert "docs/security.md" in readme and "private" in readme and "against accidents" in readme


# A fuzz of records through every reader, table and figure.
LEAST, MOST = 1e-9, 1e9


def leaves(content, path=()):
    """Every place in a record's content, parts before what is in them."""
    if path:
        yield path
    if isinstance(content, dict | list):
        for name in content if isinstance(content, dict) else range(len(content)):
            yield from leaves(content[name], (*path, name))


def base(label: str, block: int) -> dict:
    one = make_record(
        label, block, position=places(("gqa", "sdpa", "sdpa_again"), 5)[label, block], validation=learning()
    )
    return content_of(one)


BASES = {(label, block): base(label, block) for label in ("gqa", "sdpa", "sdpa_again") for block in range(5)}
PLACES = [path for path in leaves(BASES["sdpa", 0]) if path[0] != "content_sha256"]
TEXT = st.text(max_size=40) | st.sampled_from([IMAGE, FORMULA, "x" * 20_000, "x" * 79, "%s{}%(a)s", "nan", "\x00", "0"])
NUMBER = (
    st.sampled_from(
        [0, -1, 1, 2**53, 10**400, 1e-100, 1e100, 1e-300, LEAST, MOST, -1e99, 0.0, -0.0, math.nan, math.inf]
    )
    | st.integers(-10, 10**6)
    | st.floats(LEAST, MOST)
)
ANY = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(TEXT, parts, max_size=3),
    max_leaves=5,
)


def like(value):
    """More of what a place may hold, so that some of it passes the schema."""
    if isinstance(value, bool):
        return st.booleans() | ANY
    if isinstance(value, int | float):
        return NUMBER
    if isinstance(value, str):
        return TEXT | ANY
    if isinstance(value, list):
        same = st.just(value[:1] * 3) | st.just(value * 40) | st.just([])
        return same | st.lists(NUMBER, max_size=5) | ANY
    return ANY


@st.composite
def sent(draw):
    """Some records of a study, a few of them changed in a few places, with valid checksums."""
    found = {}
    for key in draw(st.lists(st.sampled_from(list(BASES)), min_size=1, max_size=15, unique=True)):
        content = BASES[key]
        for _ in range(draw(st.sampled_from([0, 0, 1, 1, 3]))):
            path = draw(st.sampled_from(PLACES))
            try:
                old = content
                for name in path:
                    old = old[name]
                content = put(content, path, draw(like(old)))
            except (KeyError, IndexError, TypeError):  # its part was taken away
                continue
        found[key] = content
    return found, draw(st.sampled_from(figures.FIGURES)), draw(st.sampled_from(list(tables.RANKED)))


def read_everywhere(folder: Path, draw, by: str) -> int:
    """Puts what lies in a folder through every reader; returns how many records passed. Raises what they raise."""
    gather.gather(folder / "out", [folder / "sent"])
    forecast.lines(plan.runs_of(TINY, ["sdpa"], 1, check=False), record.load_all(folder / "sent"))
    found = record.read(folder / "sent")
    for group in compare.groups(found) if len(found) else []:
        runs = group.runs
        compare.about_blocks(runs)
        shown = [tables.ranking(runs, by), tables.noise(runs), tables.without_flagged(runs, by)]
        shown += [tables.unmeasured(runs), tables.certificates(runs), predictions.why_none(runs, [])]
        shown += [tables.main(runs, by), conclusions.of_runs(group).shown().data]
        shown += [group.title, draw(runs)]
        for figure in (part for part in shown if isinstance(part, plt.Figure)):
            figure.savefig(io.BytesIO(), format="png", dpi=20, bbox_inches="tight")
        widgets.page(shown)
        one = record.load(folder / "sent" / f"{runs['name'].iloc[0]}.json")
        widgets.page(explore.facts(one))
        assemble.self_check(one)
    if len(found):
        explore.records(str(folder))
    return len(found)


@given(sent())
@settings(
    suppress_health_check=list(HealthCheck),
    deadline=None,
    max_examples=int(os.environ.get("STRANGERS", "5")),
    derandomize="STRANGERS" not in os.environ,
)
def test_whatever_is_sent_gives_a_table_or_a_sentence(tmp_path_factory, case):
    contents, draw, by = case
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "sent").mkdir()
    for (label, block), content in contents.items():
        (folder / "sent" / f"{BASES[label, block]['name']}.json").write_text(signed(content))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            read_everywhere(folder, draw, by)
        except UsageError as error:
            assert "\n" not in str(error)
        finally:
            plt.close("all")
    assert all(str(one.message).isprintable() for one in said if "left out" in str(one.message))
    assert {path.parts[len(folder.parts)] for path in folder.rglob("*") if path.is_file()} <= {"sent", "out"}


def test_the_fuzz_s_records_pass_where_nothing_was_changed(tmp_path):
    """And reach every figure: else the fuzz would say nothing."""
    (tmp_path / "sent").mkdir()
    for content in BASES.values():
        (tmp_path / "sent" / f"{content['name']}.json").write_text(signed(content))
    assert read_everywhere(tmp_path, figures.loss_curves, "time_per_epoch_s") == len(BASES)


# The same of the records of other kinds: cost by length, steps in turns, references, probes, predictions.
def committed(folder: str, *names_of_files: str) -> dict:
    return {name: json.loads((paths.ROOT / folder / name).read_text()) for name in names_of_files}


def shortened(content: dict) -> dict:
    """A committed record with fewer points, so that a figure is quick."""
    content = copy.deepcopy(content)
    if content["kind"] == "scaling":
        content["points"] = [point for point in content["points"] if point["context"] in (512, 2048, 8192)]
    elif content["kind"] == "steps":
        content["rounds"] = content["rounds"][:3]
    return content


CELLS = sorted(path.name for path in (paths.ROOT / "records/capability-cpu").glob("recall-*seed0*.json"))
OTHERS = {
    "scaling": committed("records/scaling-cpu", "sdpa.json", "baseline.json", "linear.json"),
    "steps": committed("records/steps-gpu", "steps.json"),
    "benchmark": committed("records/scaling-cpu/reference_implementations", "layer.json", "step.json"),
    "probe": committed("records/capability-cpu", *CELLS),
    "prediction": committed(
        "predictions", *(path.name for path in sorted((paths.ROOT / "predictions").glob("*.json")))
    ),
}
OTHERS = {kind: {name: shortened(one) for name, one in contents.items()} for kind, contents in OTHERS.items()}


@cache_once
def cells_of_ours() -> pd.DataFrame:
    return probe.frame(probe.load_all(paths.ROOT / "records/capability-cpu"))


@cache_once
def runs_of_ours() -> pd.DataFrame:
    runs = pd.concat([group.runs for group in compare.groups(record.read(paths.ROOT / "records/quick-cpu"))])
    return runs.assign(started_at=runs["started_at"].fillna(runs["finished_at"].max()))


def of_lengths(folder: Path):
    found = stored.load_all(folder)
    points = stored.frame(found)
    costs, references = growth.cost_metrics(points), ["sdpa", "baseline"]
    by = [costs[name] for name in ("training", "prefill", "decode")]
    yield stored.title(found)
    yield lambda: growth_figures.ratio_figure(points, by, references[0])
    yield lambda: growth_figures.growth_figure(points, "peak_activation_bytes", 1024)
    yield lambda: growth_figures.cache_and_decode_figure(points, references[0])
    yield lambda: growth_figures.decision_map_figure(points, references[0])
    yield lambda: conclusions.of_lengths(points, by, references[0], stored.title(found)).shown().data
    yield lambda: growth_tables.points_table(points)
    yield lambda: growth_tables.unmeasured(points)
    yield lambda: growth_tables.exponents_table(points, 1024)
    yield lambda: growth_tables.growth_table(points, references[0], 1024)
    yield lambda: growth_tables.fits_table(points, costs["training"])
    yield lambda: growth_tables.crossovers_table(points, by, references)
    yield lambda: growth_tables.map_table(points, crossovers.decision_map(points, costs["prefill"], costs["decode"]))


def of_steps(folder: Path):
    (path,) = folder.glob("*.json")
    found = steps_record.load(path)
    yield lambda: step_tables.about(found)
    yield lambda: step_tables.table(found)
    known = Evidence(found, cells_of_ours())
    yield lambda: answer.markdown(known)
    yield lambda: answer_figure.picture(known)


def of_references(folder: Path):
    for path in folder.glob("*.json"):
        found = record.read_checked(Benchmark, path)
        for said in (benchmarks.title, benchmarks.table, benchmarks.times, benchmarks.missing, benchmarks.exponents):
            yield partial(said, found)


def of_probes(folder: Path):
    cells = probe.frame(probe.load_all(folder))
    for said in (
        conclusions.of_capability, capability.remarks, capability.recall_figure, capability.convolution_table,
        capability.tasks_table, capability.difficulty_table, capability.rates_table, capability.published_table,
        capability.recall_table,
    ):  # fmt: skip
        yield partial(said, cells)
    known = Evidence(steps_record.Steps.model_validate_json(json.dumps(OTHERS["steps"]["steps.json"])), cells)
    yield lambda: answer.markdown(known)
    yield lambda: answer_figure.picture(known)


def of_predictions(folder: Path):
    found = stored_predictions(folder)
    for one in found:
        mine = runs_of_ours().assign(setting=one.setting, device_name=one.device_name)
        yield lambda mine=mine: predictions.table(predictions.residuals(mine, found))
        yield lambda mine=mine: predictions.why_none(mine, found)


READERS = {
    "scaling": of_lengths, "steps": of_steps, "benchmark": of_references, "probe": of_probes,
    "prediction": of_predictions,
}  # fmt: skip


def show_all(kind: str, folder: Path) -> int:
    """Every table and figure of a folder's records, each on its own: one that says why it cannot be stops no other."""
    shown = 0
    for part in READERS[kind](folder):
        try:
            made = part() if callable(part) else part
        except UsageError as error:
            assert "\n" not in str(error) and str(error).isprintable()
            continue
        if isinstance(made, plt.Figure):
            made.savefig(io.BytesIO(), format="png", dpi=20, bbox_inches="tight")
            plt.close(made)
        widgets.page([made if isinstance(made, plt.Figure | pd.DataFrame | str) else str(made)])
        shown += 1
    return shown


NAMED = ["sdpa", "sdpa_again", "mine", "x" * 79, IMAGE, "nan", "recall", "out_of_memory", "no_gpu", "cuda", "bf16"]


def alike(value):
    """Something of the same type, so that most of it passes the schema; now and then anything."""
    if isinstance(value, bool):
        same = st.booleans()
    elif isinstance(value, int):
        same = st.integers(0, 9) | st.sampled_from([10**3, 2**17, 2**53]) | st.just(value + 1)
    elif isinstance(value, float):
        same = st.floats(LEAST, MOST) | st.sampled_from([1e-30, 1e30, 1e-100, 1e100, 0.0, 1.0]) | st.just(value * 1e3)
    elif isinstance(value, str):
        same = st.sampled_from(NAMED)
    elif isinstance(value, list):
        same = st.sampled_from([value[:1], value[1:], value * 2, [], value[::-1]])
    elif isinstance(value, dict):
        same = st.sampled_from([{}, dict(list(value.items())[:1]), dict(list(value.items())[1:])])
    else:
        same = st.none() | NUMBER | TEXT
    return st.one_of(*[same] * 6, like(value))


@st.composite
def sent_of(draw, kind: str):
    """Records of one kind, some changed in a few places, as a stranger would sign them."""
    bases, found = OTHERS[kind], {}
    for name in draw(st.lists(st.sampled_from(list(bases)), min_size=1, max_size=4, unique=True)):
        content = bases[name]
        for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
            path, inside = (), content
            # From the whole down, so that a part counts as much as any of its thousand numbers.
            while inside and isinstance(inside, dict | list) and (not path or draw(st.integers(0, 4))):
                options = [one for one in inside if one != "content_sha256"] if isinstance(inside, dict) else None
                path += (draw(st.sampled_from(options)) if options else draw(st.integers(0, len(inside) - 1)),)
                inside = inside[path[-1]]
            content = put(content, path, draw(alike(inside)))
        found[name] = content
    return found


@pytest.mark.parametrize("kind", OTHERS)
def test_whatever_is_sent_of_other_kinds_gives_a_table_or_a_sentence(kind, tmp_path_factory):
    @given(sent_of(kind))
    @settings(
        suppress_health_check=list(HealthCheck),
        deadline=None,
        max_examples=int(os.environ.get("STRANGERS", "3")),
        derandomize="STRANGERS" not in os.environ,
    )
    def each(contents):
        folder = tmp_path_factory.mktemp(kind)
        for name, content in contents.items():
            (folder / name).write_text(signed(content))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                show_all(kind, folder)
            except UsageError as error:
                assert "\n" not in str(error) and str(error).isprintable()
            finally:
                plt.close("all")
        assert all(str(one.message).isprintable() for one in said if "left out" in str(one.message))
        assert {path.name for path in folder.rglob("*")} == set(contents)

    each()


@pytest.mark.parametrize(("kind", "shown"), {"scaling": 13, "steps": 4, "benchmark": 10, "probe": 11}.items())
def test_the_records_of_other_kinds_pass_where_nothing_was_changed(kind, shown, tmp_path):
    for name, content in OTHERS[kind].items():
        (tmp_path / name).write_text(signed(content))
    assert show_all(kind, tmp_path) == shown


def test_a_steps_record_that_names_a_file_runs_none_of_it(tmp_path):
    """Nor does it end in a traceback where its sizes are none of a model."""
    mark = tmp_path / "it ran"
    (tmp_path / "mine.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n" + NINTH)
    content = json.loads(json.dumps(OTHERS["steps"]["steps.json"]).replace('"gqa"', '"mine"'))
    at = next(index for index, entry in enumerate(content["entries"]) if entry["label"] == "mine")
    named = put(content, ("entries", at, "attention"), str(tmp_path / "mine.py"))
    found = Evidence(steps_record.Steps.model_validate_json(json.dumps(named)), None)
    assert math.isnan(found.cache["mine"]) and answer.markdown(found) and answer_figure.picture(found)
    assert not mark.exists()
    impossible = steps_record.Steps.model_validate_json(json.dumps(put(named, ("setting", "heads"), 7)))
    with pytest.raises(UsageError, match="heads must divide width") as error:
        Evidence(impossible, None)
    assert "\n" not in str(error.value)


def test_records_of_cost_by_length_without_a_point_are_one_sentence(tmp_path):
    stored.write(scaling_record(points=[]), tmp_path)
    with pytest.raises(UsageError, match="hold no point yet"):
        stored.load_all(tmp_path)
