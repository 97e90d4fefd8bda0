"""The place to look it up: records as data to take away, and the static site made from them, the docs and notebooks."""

import lib.errors  # noqa: F401 it refuses to be part of another `lib`
