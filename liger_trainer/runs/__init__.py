"""Running a recipe: from YAML to data, model, training and the report of the run."""
