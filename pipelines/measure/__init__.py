"""What a method does to a model: how close, how fast, at what density and cost."""
