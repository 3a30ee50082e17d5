"""What to look for in a model, and its replacement. One file per rule; no model is named."""
