"""Functions with derivatives written by hand, each beside the plain function that it must equal."""
