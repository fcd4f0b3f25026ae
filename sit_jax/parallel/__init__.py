"""Meshes, placement of arrays, and several processes."""
