"""What every test runs under: 8 CPU devices, quick compilation, no silent broadcasting of ranks."""

import os
import sys
from importlib.metadata import version
from pathlib import Path

# Compiling is most of what the tests cost, and nothing here runs long enough to repay optimised code.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
# XLA's older emitters compile the many small loops here in half the time. A process ends over a flag that its
# XLA does not know, and those of later versions and of libtpu may not.
QUICK = "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
ALL_KNOW = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS))
os.environ["XLA_FLAGS"] = f"{ALL_KNOW} {QUICK}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()  # reads the flags, once
os.environ["XLA_FLAGS"] = ALL_KNOW


def variant(item: pytest.Item) -> str:
    """Return the attention variant that a test of the whole table is about, "" for other tests."""
    if item.path.name not in ("test_laws.py", "test_scaling.py"):
        return ""
    return item.callspec.params.get("name", "") if hasattr(item, "callspec") else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of one variant together, on one worker: they share what is compiled."""
    for item in items:
        if variant(item):
            item.add_marker(pytest.mark.xdist_group(variant(item)))
    order = list(dict.fromkeys(variant(item) for item in items))
    items.sort(key=lambda item: order.index(variant(item)))


@pytest.fixture
def rng() -> np.random.Generator:
    """Return random numbers that are a test's own: the same whichever tests ran before it."""
    return np.random.default_rng(0)


_latest: list[tuple] = []


@pytest.fixture(autouse=True)
def forget_what_was_compiled(request: pytest.FixtureRequest) -> None:
    """Drop compiled programs between files and variants: a process cannot map any number of them."""
    here = (request.node.path, variant(request.node))
    if _latest != [here]:
        jax.clear_caches()
        _latest[:] = [here]


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Let the many trainings of a file share what XLA compiled: most of their time goes there."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for processes that are started here
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]
    compilation_cache.reset_cache()
