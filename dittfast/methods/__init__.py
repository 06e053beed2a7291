"""Attention methods."""

METHODS = {}
