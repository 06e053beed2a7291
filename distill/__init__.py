"""Teacher-student training of sparse attention."""
