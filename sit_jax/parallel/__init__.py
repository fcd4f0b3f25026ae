"""Device meshes, sharding, and multi-process execution."""
