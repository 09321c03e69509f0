"""Harsher than a user's run: broadcasting between ranks raises, and so does every warning (see pyproject.toml)."""

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
