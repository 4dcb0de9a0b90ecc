"""What masks measure: structures from block sums, overlap with a reference, tables."""
