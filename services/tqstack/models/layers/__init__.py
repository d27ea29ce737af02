"""Layers that are faster than mlx-lm's on some machine, with the same numbers."""
