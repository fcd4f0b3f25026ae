"""`sit demo`: a page on this machine that shows what slimming does to an image."""
