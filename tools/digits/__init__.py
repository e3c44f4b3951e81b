"""Everything that makes the embedded demo model: data, training, planting, saving, judging."""
