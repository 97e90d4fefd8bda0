"""`python -m lib.study.gather INTO FROM [FROM ...]`: records of several machines and people in one folder.

Names of runs are the same on every device and on all data, so INTO has a folder for each device and data, and
`lib.record.read(INTO)` reads them all; `lib.compare` keeps them apart. Nothing is overwritten: what is there already is
left out, and what has the same device, data and name but other content is named, for a person to choose.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

from lib import paths, record
from lib.errors import UsageError


class Gathered(NamedTuple):
    """Files by what became of them: copied, there already by content, in conflict with what is there, no record."""

    copied: list[Path]
    doubled: list[Path]
    conflicts: list[Path]
    damaged: list[tuple[Path, str]]


def device_folder(one: record.Record) -> str:
    """The folder of the device and the data that a record is from: the device's name, of a GPU the begin of its UUID,
    and the begin of the tokens' fingerprint."""
    uuid = record.gpu_uuid(one.environment) or ""
    name = f"{one.environment['device_name']} {uuid.removeprefix('GPU-')[:8]}"
    tokens = one.data.get("token_sha256")
    name += f" tokens {tokens[:8]}" if tokens else ""
    return record.DEVICE_FOLDER + re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")


def _place(one: record.Record) -> tuple[str, str]:
    """Device and name: alike where a file system that knows no case would take them for one file."""
    return device_folder(one).casefold(), one.name.casefold()


def gather(into: Path, sources: list[Path]) -> Gathered:
    """Copies the records in and below `sources` to `into`. Raises UsageError where a source is no folder, or `into`
    cannot be written."""
    for source in sources:
        if not source.is_dir():
            raise UsageError(f"there is no folder {source}")
    there = {_place(one): one for one in record.load_all(into)}
    found = Gathered([], [], [], [])
    for path in [path for source in sources for path in sorted(source.rglob("*.json"))]:
        if path.name.endswith(record.FAILED) or record.INCOMPLETE in path.parts:
            continue
        try:
            one, text = record.load_with_text(path)
        except (ValueError, OSError) as error:
            found.damaged.append((path, record.printable(error)))
            continue
        known = there.setdefault(_place(one), one)
        if known is one:
            folder = into / device_folder(one)
            if not folder.resolve().is_relative_to(into.resolve()):
                raise UsageError(
                    f"{record.printable(folder)} is a link to elsewhere; remove it, or name another folder"
                )
            try:
                paths.write_whole(folder / f"{one.name}.json", text)
            except OSError as error:
                raise UsageError(f"{into} cannot be written: {error.strerror}; name another folder") from None
            found.copied.append(path)
        elif known.content_sha256 == one.content_sha256:
            found.doubled.append(path)
        else:
            found.conflicts.append(path)
    return found


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.study.gather", description=__doc__.split("\n\n")[0])
    parser.add_argument("into", type=Path, help="the folder to bring them together in; made where it is missing")
    parser.add_argument("sources", type=Path, nargs="+", metavar="FROM", help="a folder of records, or of such folders")
    options = parser.parse_args(words)
    try:
        found = gather(options.into, options.sources)
    except UsageError as error:
        print(f"python -m lib.study.gather: {error}", file=sys.stderr)
        return 2
    print(f"{len(found.copied)} records copied, {len(found.doubled)} were there already")
    for path in found.conflicts:
        of_same = "another record of the same run on the same device and data"
        print(f"CONFLICT {record.printable(path)}: {of_same} is there, and stays", file=sys.stderr)
    for path, reason in found.damaged:
        print(f"LEFT OUT {record.printable(path)}: {reason}", file=sys.stderr)
    return 1 if found.conflicts or found.damaged else 0


if __name__ == "__main__":
    sys.exit(main())
