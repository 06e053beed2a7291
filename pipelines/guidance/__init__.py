"""Guidance by weakened heads: in plain pipelines, and as a guider of modular ones."""
