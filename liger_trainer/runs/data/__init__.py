"""From data as people have it to examples that a trainer takes."""
