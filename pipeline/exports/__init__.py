"""Masks in the formats that other tools read, made from published labels."""
