"""The NAS dataset: sample genotypes, train a supernet on them, score them, store the records."""
