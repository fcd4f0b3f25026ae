"""What a model costs, how fast it is, and where its tokens look."""
