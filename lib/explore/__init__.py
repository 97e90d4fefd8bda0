"""What explore.ipynb shows."""

import lib.errors  # noqa: F401 it refuses to be part of another `lib`
