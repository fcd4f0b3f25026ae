"""Training: the train step, the training loop, checkpoints and metrics."""
