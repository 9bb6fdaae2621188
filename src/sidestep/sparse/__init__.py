"""Sparse diffs of tensors: what changes which entries, how it is learned, how it is written. Knows no model."""
