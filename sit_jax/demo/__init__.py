"""`sit demo`: a local page that shows what slimming does to an image."""
