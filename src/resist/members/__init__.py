"""Members of a run that come and go: who they are, how they agree, and the store at which they do."""
