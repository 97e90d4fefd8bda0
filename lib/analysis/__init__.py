"""From records to ratios, verdicts, fits, tables and figures. Nothing here measures; nothing here needs a GPU."""

import lib.errors  # noqa: F401 it refuses to be part of another `lib`
