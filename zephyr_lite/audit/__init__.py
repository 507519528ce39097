"""What an adapter of any tool needs below it, and whether it was trained as it claims."""
