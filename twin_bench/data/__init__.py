"""The tasks: what a row is, how rows are read, and how answers are scored."""
