"""What a run leaves in its work directory."""
