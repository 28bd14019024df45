"""More processes for a search, on this machine or on a Ray cluster."""
