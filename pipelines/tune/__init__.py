"""dittfast tune: a budget in, a preset with its measured proof out."""
