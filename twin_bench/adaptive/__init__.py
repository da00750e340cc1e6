"""Methods that adapt to what they are given: a row, a token, or the unlabelled test inputs."""
