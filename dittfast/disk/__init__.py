"""Files: read or refused in one sentence, recorded with checksums, written by one process."""
