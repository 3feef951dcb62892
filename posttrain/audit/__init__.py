"""What is on the disk against what was recorded: verified, made again, explained, compared."""
