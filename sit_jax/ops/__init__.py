"""Functions with custom derivatives, each with an equivalent plain function as a reference."""
