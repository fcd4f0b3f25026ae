"""File input and output: runs, model folders, weights of other frameworks, exports."""
