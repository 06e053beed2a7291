"""The dittfast command line."""
