"""Files of rows: which ones a data path names, how each format is read, how rows are written."""
