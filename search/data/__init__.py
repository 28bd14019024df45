"""The user's network and data sets: built-in sources, factories in the user's own code, the shipped examples."""
