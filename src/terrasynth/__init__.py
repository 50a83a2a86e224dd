"""TerraSynth: would synthetic training data help your remote-sensing task? It makes it and measures the answer."""

from __future__ import annotations

__version__ = "0.1.0"
