"""Speed, beside peers."""
