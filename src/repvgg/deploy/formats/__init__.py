"""One module for each file format: how a model is written to it, and how its files are run."""
