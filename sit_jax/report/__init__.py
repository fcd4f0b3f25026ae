"""`sit report`: how runs went, as one page that needs nothing else."""
