"""Find what can be swapped in a model, verify that it is equal, swap it, and restore it."""
