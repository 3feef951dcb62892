"""The plan of a merge: what is read, computed and written, decided from headers alone."""
