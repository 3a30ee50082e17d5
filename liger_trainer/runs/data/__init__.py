"""From data in its common forms to the examples that a trainer takes."""
