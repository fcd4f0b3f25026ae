"""Training: the step, the loop and what they need."""
