"""Token reducers, which map N patch tokens to fewer, one file each; `base` has the protocol."""
