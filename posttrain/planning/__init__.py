"""What a command needs before it runs: memory by part and phase, disk, time, and what would make it fit."""
