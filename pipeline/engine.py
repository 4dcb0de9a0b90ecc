"""Where blocks run: what an engine promises, and the one that runs them in this process."""
