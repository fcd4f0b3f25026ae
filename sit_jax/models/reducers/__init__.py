"""Token reducers: what takes N patch tokens and returns fewer, one file each. `base` has the protocol."""
