"""Models for other programs: the only place, with `convert`, that knows other frameworks."""
