"""Weights of other frameworks; only this package and `export` know their names and layouts."""
