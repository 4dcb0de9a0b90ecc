"""WHERE blocks run: the Ray engine and its sessions."""
