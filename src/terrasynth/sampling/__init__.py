"""Integrators and what steers them; knows no model and no task."""
