"""Files: runs, model folders, weights of other programs, exports."""
