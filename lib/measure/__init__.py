"""What a run costs: energy, time, memory, FLOPs, kernels, inference; and whether the run can be believed."""

import lib.errors  # noqa: F401 it refuses to be part of another `lib`
