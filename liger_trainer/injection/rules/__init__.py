"""What to look for in a model, and what to put there. One file per rule; no model is named."""
