"""The networks, one small file per family."""
