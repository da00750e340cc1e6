"""Methods that adapt to their input: to a row, to a token, or to the unlabelled test inputs."""
