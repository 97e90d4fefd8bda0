"""What models are trained on: conversations, and rows of tokens made of them."""

import lib.errors  # noqa: F401 it refuses to be part of another `lib`
