"""The plan of a merge: everything that it reads, computes and writes, decided from headers alone."""
