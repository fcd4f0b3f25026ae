"""Weights of other frameworks: the only place, with `export`, that knows their names and layouts."""
