"""WHAT predicts: networks, cards, loaders."""
