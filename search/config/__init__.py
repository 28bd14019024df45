"""The YAML config: its schema, and one clear message for each fault in it."""
