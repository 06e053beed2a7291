"""The page of ``dittfast ui``."""
