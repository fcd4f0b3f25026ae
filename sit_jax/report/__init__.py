"""`sit report`: reports runs in one self-contained HTML page."""
