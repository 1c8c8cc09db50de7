"""Client updates: what one client does in a round."""
