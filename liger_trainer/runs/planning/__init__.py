"""Whether a recipe fits on N GPUs, and what a step costs, by formula."""
