"""A training run: settings, recipes, checks, stages, checkpoints and results."""
