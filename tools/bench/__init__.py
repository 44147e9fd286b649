"""One command per table under benchmarks/."""
