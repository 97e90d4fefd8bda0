"""Records of schema 1 are converted to schema 2: other names, every number as it was."""

import importlib.util
import json

import pytest
from make import PARAMETERS, make_record

from lib import parameters, paths, record


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_records", paths.ROOT / "scripts" / "convert_records.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SIZES = {"layers": 1, "width": 32, "heads": 4, "positions": 64, "seed": 0, "label": "", "validation_rows": 7}
LSH = SIZES | {"attention": "lsh", "knobs": {"rounds": 2, "chunk": 8, "borders": "causal"}}


def older(script, **changes) -> dict:
    """A record as schema 1 wrote it."""
    back = {new: old for old, new in script.NAMES.items()}

    def renamed(content):
        if isinstance(content, dict):
            return {back.get(name, name): renamed(value) for name, value in content.items()}
        return [renamed(value) for value in content] if isinstance(content, list) else content

    content = renamed(json.loads(make_record("lsh").model_dump_json()))
    content["sitting"]["sitting"] = content["sitting"].pop("session")
    del content["title"]
    content |= {"schema_version": 1, "parameters": PARAMETERS | LSH} | changes
    return content | {"content_sha256": record.checksum(content)}


def test_an_older_record_keeps_every_number_under_the_newer_names(script, tmp_path):
    content = older(script)
    (tmp_path / "lsh-seed0-00000000.json").write_text(json.dumps(content))
    assert script.main([str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    found = record.load(path)
    assert found.parameters["options"] == {"n_hashes": 2, "chunk_length": 8, "chunk_boundaries": "causal"}
    assert found.parameters["validation_sequences"] == 7 and found.title == "LSH (Reformer)"
    assert found.name == parameters.run_name(found.parameters) and found.setting == parameters.setting(found.parameters)
    assert found.study.session == content["sitting"]["sitting"] and found.metrics == make_record("lsh").metrics
    written = json.loads(path.read_text())
    assert script.numbers(written) == script.numbers(content | {"schema_version": 2})
    before = path.read_bytes()
    assert script.main([str(tmp_path)]) == 0 and path.read_bytes() == before  # the newest are left alone


def test_a_changed_record_stays_as_it_was_and_is_named(script, tmp_path, capsys):
    path = tmp_path / "lsh-seed0-00000000.json"
    path.write_text(json.dumps(older(script) | {"label": "mine"}))
    before = path.read_bytes()
    assert script.main([str(tmp_path)]) == 1 and path.read_bytes() == before
    assert "its checksum does not fit" in capsys.readouterr().err


def test_an_older_record_that_names_a_file_of_code_runs_none_of_it(script, tmp_path):
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    content = older(script) | {"attention": str(tmp_path / "mine.py")}
    with pytest.raises(ValueError, match="no record runs one"):
        script.convert(content)
    assert not (tmp_path / "ran").exists()


def test_an_older_record_is_named_with_the_way_to_convert_it(script, tmp_path):
    (tmp_path / "lsh-seed0-00000000.json").write_text(json.dumps(older(script)))
    with pytest.warns(UserWarning, match=r"schema_version is 1, this code reads 2; `python scripts/convert_records.py"):
        assert record.load_all(tmp_path) == []
