"""Seeing what slimming does: token maps as numbers, as pictures and as figures."""
