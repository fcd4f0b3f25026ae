"""Export to other frameworks; only this package and `convert` know other frameworks."""
