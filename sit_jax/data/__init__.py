"""Data sets, transforms and Grain input pipelines."""
