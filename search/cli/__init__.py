"""The command line: one function for each command, tables and messages for the terminal."""
