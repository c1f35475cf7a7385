"""The mathematics of diffusion over plain callables: schedules, denoisers, samplers."""
