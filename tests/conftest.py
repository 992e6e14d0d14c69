"""What every test runs under: 8 CPU devices, quick compilation, no silent broadcasting of ranks."""

import os
import sys
from pathlib import Path

# Compiling is most of what the tests cost, and nothing here runs long enough to repay optimised code.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
