"""Latent diffusion from scratch in pure PyTorch."""
