"""Adapters that put dittfast methods into diffusers pipelines."""
