"""Visualization of slimming: token maps as numbers, as images and as figures."""
