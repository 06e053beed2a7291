"""Running a pipeline: what to call it with, one run, dense and sparse runs beside each other."""
