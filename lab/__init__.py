"""Studies, figures, benchmarks and kill tests: uses the lesson, and nothing in the lesson uses it."""
