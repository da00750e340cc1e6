"""The kinds of routers, one file each: see `twin_bench.twin.routers.registry`."""
