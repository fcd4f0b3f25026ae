"""Seeing what slimming does: token maps as numbers, as images and as figures."""
