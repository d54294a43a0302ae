"""What the tests of the examples share."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory):
    """For many small runs that are alike, in this process and in those that it starts.

    A program is compiled once, and with few optimizations: here they take longer than they save.
    """
    directory = str(tmp_path_factory.mktemp("compiled"))
    settings = {
        "jax_compilation_cache_dir": directory,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}

    def use(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    use(settings)
    yield {name.upper(): str(value) for name, value in settings.items()}
    use(before)
