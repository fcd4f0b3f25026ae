"""Data: sources, transforms, and the Grain pipelines made of them."""
