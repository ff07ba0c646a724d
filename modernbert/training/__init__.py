"""Training: data, optimisation and objectives."""
