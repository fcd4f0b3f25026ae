"""Cost counting, planning, benchmarking, prediction and summaries of models."""
