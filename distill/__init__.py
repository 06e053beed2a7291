"""Teacher-student training of sparse and linear attention."""
