"""Each kind of record is told apart and read as what it is; what is none is refused in one line."""

import json
from collections import Counter

import pytest

from lib.errors import UsageError
from lib.paths import ROOT
from lib.record import kinds

COMMITTED = sorted([*ROOT.glob("records/**/*.json"), *ROOT.glob("predictions/*.json")])


def test_every_committed_file_is_of_a_known_kind():
    found = Counter(kinds.load(path)[0] for path in COMMITTED)
    assert set(found) == {"run", "probe", "scaling", "steps", "benchmark", "prediction"}
    assert found["prediction"] == len(list(ROOT.glob("predictions/*.json")))


@pytest.mark.parametrize(
    "content, why",
    [
        ({}, "it is JSON of another kind"),
        ([], "it is JSON of another kind"),
        ({"kind": "survey"}, "its kind is 'survey', this code knows run, failure, probe"),
        ({"kind": ["run"]}, "its kind is \"['run']\", this code knows"),
        ({"schema_version": 1}, "its schema_version is 1, this code reads 2"),
        ({"kind": "steps", "schema_version": 7}, "is no Steps record"),
    ],
)
def test_what_is_no_record_is_refused_in_one_line(tmp_path, content, why):
    (tmp_path / "found.json").write_text(json.dumps(content))
    with pytest.raises(UsageError) as refused:
        kinds.load(tmp_path / "found.json")
    assert "found.json" in str(refused.value) and why in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("path", {path.parent: path for path in COMMITTED}.values(), ids=lambda path: path.stem)
def test_a_changed_record_of_any_kind_is_refused(tmp_path, path):
    content = json.loads(path.read_text())
    content["content_sha256"] = "0" * 64
    (tmp_path / path.name).write_text(json.dumps(content))
    with pytest.raises(UsageError, match="checksum"):
        kinds.load(tmp_path / path.name)
