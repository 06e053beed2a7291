"""Measuring: speed, fidelity and pictures of both. Nothing that runs in a pipeline is here."""
