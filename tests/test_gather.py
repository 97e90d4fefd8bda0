"""Records of many hands in one folder: doubled ones dropped, conflicts named, no GPU mixed with another."""

import pytest
from make import make_record, write_blocks

from lib import record
from lib.analysis import compare
from lib.errors import UsageError
from lib.study import gather

ONE = {"device": "cuda", "device_name": "a GPU", "gpu": {"uuid": "GPU-11111111-aaaa"}}
OTHER = {"device": "cuda", "device_name": "a GPU", "gpu": {"uuid": "GPU-22222222-aaaa"}}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.json")}


def test_records_of_two_cards_come_together_and_stay_apart_in_every_ratio(tmp_path):
    """The same runs, sessions and blocks on two devices, the second twice as slow: no ratio sees the other GPU."""
    write_blocks(tmp_path / "a", blocks=5, environment=ONE, time_s=20.0)
    write_blocks(tmp_path / "b", blocks=5, environment=OTHER, time_s=40.0)
    found = gather.gather(tmp_path / "all", [tmp_path / "a", tmp_path / "b"])
    assert len(found.copied) == 30 and not (found.doubled or found.conflicts or found.damaged)
    assert len(contents(tmp_path / "all")) == 30
    groups = compare.groups(record.read(tmp_path / "all"))
    assert [set(group.runs["gpu_uuid"]) for group in groups] == [{"GPU-11111111-aaaa"}, {"GPU-22222222-aaaa"}]
    for group in groups:
        assert len(compare.whole_blocks(group.runs)) == 15
        assert compare.ratios(group.runs, "time_s")["ratio"].eq(1).all()


def test_the_same_run_on_other_data_is_no_conflict_and_in_no_ratio_with_it(tmp_path):
    for folder, tokens, time_s in (("a", "a" * 64, 20.0), ("b", "b" * 64, 40.0)):
        write_blocks(tmp_path / folder, environment=ONE, time_s=time_s, data={"token_sha256": tokens})
    found = gather.gather(tmp_path / "all", [tmp_path / "a", tmp_path / "b"])
    assert len(found.copied) == 6 and not found.conflicts
    assert not gather.gather(tmp_path / "all", [tmp_path / "b", tmp_path / "a"]).copied
    groups = compare.groups(record.read(tmp_path / "all"))
    assert [set(group.runs["token_sha256"]) for group in groups] == [{"a" * 64}, {"b" * 64}]
    assert ["builtin data (tokens aaaaaaaa)" in group.title for group in groups] == [True, False]
    for group in groups:
        assert compare.ratios(group.runs, "time_s")["ratio"].eq(1).all()


def test_what_is_there_already_is_dropped_by_its_content(tmp_path):
    write_blocks(tmp_path / "a", environment=ONE)
    assert len(gather.gather(tmp_path / "all", [tmp_path / "a"]).copied) == 3
    before = contents(tmp_path / "all")
    again = gather.gather(tmp_path / "all", [tmp_path / "a", tmp_path / "all"])
    assert len(again.doubled) == 6 and not again.copied and contents(tmp_path / "all") == before


def test_a_run_that_was_made_twice_on_one_card_is_a_conflict_and_nothing_is_overwritten(tmp_path, capsys):
    for folder, time_s in (("a", 20.0), ("b", 21.0)):
        record.write(make_record(environment=ONE, time_s=time_s), tmp_path / folder)
    assert gather.main([str(tmp_path / name) for name in ("all", "a", "b")]) == 1
    said = capsys.readouterr()
    assert "1 records copied, 0 were there already" in said.out
    assert said.err.startswith(f"CONFLICT {tmp_path / 'b'}") and len(said.err.splitlines()) == 1
    assert record.read(tmp_path / "all")["time_s"].tolist() == [20.0]


def test_what_is_damaged_is_named_and_what_was_set_aside_or_failed_is_left_alone(tmp_path, capsys):
    good = record.write(make_record("sdpa"), tmp_path / "a")
    bad = record.write(make_record("gqa"), tmp_path / "a")
    bad.write_text(bad.read_text()[:100])
    record.write(make_record("mla"), tmp_path / "a" / "incomplete" / "then")
    (tmp_path / "a" / f"x.{record.FAILED}").write_text("{}")
    assert gather.main([str(tmp_path / "all"), str(tmp_path / "a")]) == 1
    assert capsys.readouterr().err.startswith(f"LEFT OUT {bad}: it is no whole JSON")
    assert [path.name for path in contents(tmp_path / "all")] == [good.name]


def test_a_source_that_is_not_there_is_one_sentence(tmp_path, capsys):
    assert gather.main([str(tmp_path / "all"), str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"python -m lib.study.gather: there is no folder {tmp_path / 'nowhere'}\n"
    with pytest.raises(UsageError):
        gather.gather(tmp_path / "all", [tmp_path / "nowhere"])


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    record.write(make_record(), tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file cannot be written: .+; name another folder"):
        gather.gather(tmp_path / "file", [tmp_path / "a"])
