"""What is below all scripts: command lines, run folders, checkpoint files, signals, progress. Knows nothing of cells."""
