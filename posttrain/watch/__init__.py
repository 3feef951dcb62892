"""`gemma2 watch`: where a pipeline or a run is, read from the files that it writes, as a view and as alerts."""
