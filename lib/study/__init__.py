"""Many runs: what is planned, in which order, one after the other or on a cluster, and what they will take."""

import lib.errors  # noqa: F401 it refuses to be part of another `lib`
