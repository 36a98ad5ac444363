"""Tests, benchmarks and fuzzing keep compiled kernels where the service keeps them."""

from tss.compiler import use_cache

use_cache()
