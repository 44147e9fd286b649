"""The planner: what a build and its videos will cost, before anything is built and without a GPU."""
