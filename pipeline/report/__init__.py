"""What happened, for people: one static page and three planes of every study."""
