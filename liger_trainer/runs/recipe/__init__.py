"""A recipe: YAML and overrides, the methods that it may name, and how it is printed."""
