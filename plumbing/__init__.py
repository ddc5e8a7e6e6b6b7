"""What is below all scripts: flags, run folders, checkpoint files, signals, progress. Knows nothing of cells."""
