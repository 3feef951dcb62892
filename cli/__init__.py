"""The command line: parse, call one library function, print. Heavy libraries are imported only inside functions."""
