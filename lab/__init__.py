"""Study, figures, measurements and benchmark: uses the lesson, and the lesson does not use it."""
