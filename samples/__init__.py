"""Sample models: the scripts that train them, and the trained weights that are installed."""
