"""The README for a package index: links lead to the repository, which the index does not have."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

REPOSITORY = "https://github.com/brelax-jax/brelax_jax"
RELATIVE = re.compile(r"(!?)(\[[^\]]*\])\((?!https?:)")


class Readme(MetadataHookInterface):
    """Hatchling calls it when it builds the package."""

    def update(self, metadata: dict) -> None:
        """Adds the README to the package's metadata."""
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = RELATIVE.sub(
            lambda link: f"{link[1]}{link[2]}({REPOSITORY}/{'raw' if link[1] else 'blob'}/main/",
            readme,
        )
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
