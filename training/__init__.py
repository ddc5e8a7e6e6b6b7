"""Stage 4, training what was found: images and their streams, a step, several processes, checkpoints in an epoch."""
