"""A user's Flax model as pure functions of plain trees, at any width."""
