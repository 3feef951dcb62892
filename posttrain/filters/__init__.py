"""What is wrong with a row of synthetic data: one small function per reason (Gemma 2 report, section 4)."""
