"""The pages of the site; that they build is up to `make docs`."""

import inspect
import re

import pytest

import brelax_jax as brx
from tests.helpers.snippets import ROOT

DOCUMENTED = re.findall(
    r"^\.\. auto(?:function|class):: brelax_jax\.([\w.]+)$",
    (ROOT / "docs/api.rst").read_text(encoding="utf-8"),
    re.M,
)


def public(module):
    """The names of the functions and classes of a module, those from within it."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__.startswith(module.__name__)
    }


@pytest.mark.parametrize("module", ["", "export", "formats"])
def test_every_public_name_is_on_the_api_page_once(module):
    names = public(getattr(brx, module)) - public(brx) if module else public(brx)
    found = [name.rpartition(".")[2] for name in DOCUMENTED if name.rpartition(".")[0] == module]
    assert sorted(found) == sorted(names)
