"""What run directories tell: everything here reads their files and nothing else."""
