"""Latent diffusion from scratch in pure PyTorch."""

__version__ = "0.1.0"  # pyproject.toml reads it from here
