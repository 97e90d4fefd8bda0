"""`python lib/data/parquet.py FILE`: a Parquet file's rows as lines of JSON, by a process of its own.

A damaged file can crash the native code that decodes it, and would take the study or the notebook along. Here it ends
this process alone, which `lib.data.files` turns into a sentence. Only the columns that hold conversations are written
out; of the others each row says which it fills. A file of a few kB can unpack to any size: what this process may hold
at once has a bound.
"""

import contextlib
import json
import os
import sys

import pyarrow.compute
import pyarrow.parquet

WRITTEN = ("messages", "conversations")  # of other columns only which rows fill them: they can be large
BATCH = 100  # rows unpacked at once
READ_BYTES = 1 << 20  # read at once of a column: its row group is never held whole
MOST_BYTES = 2 << 30  # of memory, for a batch unpacked, as Python's values and as JSON
TOO_LARGE = 3  # the exit status where a file needs more: `lib.data.files` knows it


def main(path: str) -> None:
    _bound_memory()
    # An open file, because a name could be taken for an address.
    with open(path, "rb") as file:
        table = pyarrow.parquet.ParquetFile(file, buffer_size=READ_BYTES)
        for batch in table.iter_batches(batch_size=BATCH, use_threads=False):
            columns = [
                column.to_pylist() if name in WRITTEN else [filled or None for filled in _filled(column)]
                for name, column in zip(batch.schema.names, batch.columns, strict=True)
            ]
            for row in zip(*columns, strict=True) if columns else [()] * len(batch):
                fields = dict(zip(batch.schema.names, row, strict=True))
                sys.stdout.write(json.dumps(fields, default=_no_json) + "\n")


def _bound_memory() -> None:
    """Lets an allocation beyond `MOST_BYTES` fail, where the system can (Linux)."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        most = MOST_BYTES if hard == resource.RLIM_INFINITY else min(MOST_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


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
        sys.stdout.flush()
        os._exit(0)  # all is said, and of a sound file the process has been seen to abort on its way out
    except BrokenPipeError:  # the reader has seen enough
        sys.stderr.close()
    except MemoryError:  # also Arrow's own
        sys.stderr.write(f"{BATCH} of its rows unpack to more than {MOST_BYTES >> 30} GB of memory")
        sys.exit(TOO_LARGE)
    except (Exception, RecursionError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        sys.exit(said.encode("ascii", "backslashreplace").decode())
