"""Floor 5: what a run cost and how it went: counts, tables, pictures, benchmarks, experiments."""
