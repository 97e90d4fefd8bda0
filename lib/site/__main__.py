"""`python -m lib.site`: makes the site of the docs, notebooks and records; `make site` calls it."""

import argparse
import sys
from pathlib import Path

from lib.errors import UsageError
from lib.paths import ROOT


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.site", description="the static site, to be opened from disk")
    parser.add_argument("--to", type=Path, default=ROOT / "site", metavar="FOLDER", help="where it goes: site/")
    parser.add_argument("--records", type=Path, default=None, metavar="FOLDER", help="of other records than records/")
    given = parser.parse_args(words)
    try:
        from lib.site.build import build

        print(build(given.to.resolve(), records=given.records))
    except OSError as error:
        said = f"{given.to} cannot be made: {error.strerror or type(error).__name__}; name another folder, with --to"
        print(f"python -m lib.site: {said}", file=sys.stderr)
        return 2
    except UsageError as error:
        print(f"python -m lib.site: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
