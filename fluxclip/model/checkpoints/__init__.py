"""Weights that others have published, one file per format: `from_...` makes a model of them."""
