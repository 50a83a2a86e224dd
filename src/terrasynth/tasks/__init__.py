"""Downstream tasks: what the synthetic data is for, and what measures it."""
