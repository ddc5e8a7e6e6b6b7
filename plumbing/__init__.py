"""What is below all scripts: command lines, run folders, checkpoints, signals, progress. Knows nothing of cells."""
