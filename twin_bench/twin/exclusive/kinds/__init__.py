"""The kinds of exclusive vectors, one a file. `twin_bench.twin.exclusive.registry` imports them all."""
