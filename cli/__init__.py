"""The command line: parse, call one library function, print. Heavy libraries are imported inside functions only."""
