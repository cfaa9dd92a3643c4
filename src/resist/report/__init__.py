"""Reports from run directories. Everything here reads their files and nothing else."""
