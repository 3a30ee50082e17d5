"""Find what can be swapped in a model, prove it equal, swap it, and put it back."""
