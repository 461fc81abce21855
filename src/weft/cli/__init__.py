"""The command line: one file, one command; each parses, calls one library function and prints."""
