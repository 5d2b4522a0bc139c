"""Studies, figures, benchmarks and kill tests: uses the lesson, and the lesson does not use it."""
