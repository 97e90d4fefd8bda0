"""`python lib/data/parquet.py FILE`: a Parquet file's rows as lines of JSON, by a process of its own.

A damaged file can crash the native code that decodes it, and would take the study or the notebook along. Here it ends
this process alone, which `lib.data.files` turns into a sentence. Only the columns that hold conversations are written
out; of the others each row says which it fills.
"""

import json
import sys

import pyarrow.compute
import pyarrow.parquet

WRITTEN = ("messages", "conversations")  # of other columns only which rows fill them: they can be large
BATCH = 1000


def main(path: str) -> None:
    # An open file, because a name could be taken for an address.
    with open(path, "rb") as file:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=BATCH):
            columns = [
                column.to_pylist() if name in WRITTEN else [filled or None for filled in _filled(column)]
                for name, column in zip(batch.schema.names, batch.columns, strict=True)
            ]
            for row in zip(*columns, strict=True) if columns else [()] * len(batch):
                fields = dict(zip(batch.schema.names, row, strict=True))
                sys.stdout.write(json.dumps(fields, default=_no_json) + "\n")


def _filled(column) -> list[bool]:
    """Which values of a column hold something: neither null nor an empty text or list."""
    kind = column.type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        column = pyarrow.compute.binary_length(column)
    elif pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        column = pyarrow.compute.list_value_length(column)
    else:
        return column.is_valid().to_pylist()
    return [bool(length) for length in column.to_pylist()]


def _no_json(value) -> dict:
    """Bytes, dates and the like are no text, and must not become any."""
    return {"of type": type(value).__name__}


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except BrokenPipeError:  # the reader has seen enough
        sys.stderr.close()
    except (Exception, RecursionError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        sys.exit(said.encode("ascii", "backslashreplace").decode())
