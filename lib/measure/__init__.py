"""What a run costs: energy, time, memory, FLOPs, kernels, inference; and whether the run can be believed."""
