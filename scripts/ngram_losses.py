"""Counts the n-gram tables (`lib.data.ngrams`) for records that were made before a run did so itself.

`python scripts/ngram_losses.py records/quick-cpu records/replication-cpu --write records/ngram_losses.csv`
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from lib import record
from lib.data import corpus, ngrams
from lib.errors import UsageError


def counted(found: list[record.Record]) -> pd.DataFrame:
    """A row per setting, seed and data fingerprint. Raises UsageError where the data are no longer what they were."""
    rows = {}
    for one in found:
        sha256 = one.data["token_sha256"]
        if (key := (one.setting, one.parameters["seed"], sha256)) in rows:
            continue
        p = SimpleNamespace(**one.parameters)
        data = corpus.load(p)
        if data.facts["token_sha256"] != sha256:
            raise UsageError(
                f"{one.name} was trained on other tokens than {p.dataset} gives today; its tables are lost"
            )
        trained = data.train.order(p.batch_size * p.accumulation * p.steps_per_epoch * p.epochs, p.seed)
        names = ("setting", "seed", "token_sha256")
        rows[key] = dict(zip(names, key, strict=True)) | ngrams.losses(data, trained, p.validation_sequences)
    return pd.DataFrame(sorted(rows.values(), key=lambda row: (row["setting"], row["seed"])))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders of records")
    parser.add_argument("--write", required=True, type=Path, metavar="FILE.csv")
    options = parser.parse_args(words)
    try:
        table = counted([one for folder in options.folders for one in record.load_all(folder)])
    except UsageError as error:
        print(f"ngram_losses: {error}", file=sys.stderr)
        return 2
    table.to_csv(options.write, index=False, float_format="%.6f")
    print(table.to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
