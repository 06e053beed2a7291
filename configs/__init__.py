"""Shipped YAML presets."""
