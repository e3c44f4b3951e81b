"""Files: checkpoints read lazily, written while they are computed, laid out as runtimes want."""
