"""Real and synthetic data sets that need no download."""
