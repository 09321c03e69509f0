"""Flax front ends: what turns a user's module into pure functions over plain trees."""
