"""Pure tensor mathematics and its types: no files, no model names."""
