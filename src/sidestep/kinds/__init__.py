"""Kinds of task: labels, heads, encoding, scores and predictions."""
