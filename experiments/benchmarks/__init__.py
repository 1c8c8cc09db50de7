"""Parts of the speed benchmarks, and what they compare this library with."""
