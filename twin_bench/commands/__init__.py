"""The library's own commands, a module each: see `twin_bench.cli` for what such a module holds."""
