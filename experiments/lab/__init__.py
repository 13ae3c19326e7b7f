"""A small world in which it is known exactly what a model learnt, what it is asked to prefer, and what it forgot."""
