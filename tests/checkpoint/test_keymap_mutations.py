"""A key map that is copied, edited or reordered fails: one rule dropped, doubled, swapped or of another piece is told."""
