"""What all tests share."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    """A directory that keeps compiled programs, so that each is compiled once, in this process and
    in those that get these variables.
    """
    directory = str(tmp_path_factory.mktemp("compiled"))
    settings = {
        "jax_compilation_cache_dir": directory,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def use(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    use(settings)
    yield {name.upper(): str(value) for name, value in settings.items()}
    use(before)
