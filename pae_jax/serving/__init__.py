"""Finished tasks at work."""
