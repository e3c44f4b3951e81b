"""Statistics of linear inputs from real pipeline runs: models, no file formats."""
