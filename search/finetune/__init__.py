"""Training of chosen plans end to end, each beside its control."""
