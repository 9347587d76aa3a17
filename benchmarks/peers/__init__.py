"""Other people's programs, as the benchmarks call them."""
