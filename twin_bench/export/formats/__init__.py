"""One export format a file, and nothing else."""
