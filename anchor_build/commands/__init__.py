"""One module per command; each parses, calls the engine and prints."""
