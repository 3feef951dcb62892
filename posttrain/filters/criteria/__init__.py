"""The criteria of the filters, one file per group: reasons to drop a row, by itself or compared to others."""
