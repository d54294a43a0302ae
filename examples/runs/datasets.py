"""Data sets of TFDS: prepared once, before any run, and read without TensorFlow."""

import logging
import os
import textwrap
from typing import Any

PREPARE = """\
{name} is not prepared in {place} (TFDS_DATA_DIR sets another place).
To download and prepare it, once, in a clone of brelax_jax:
    pip install ".[prepare]"
    python -c "import tensorflow_datasets as tfds; \
tfds.builder('{name}', file_format='array_record').download_and_prepare()"
The extra brings TensorFlow, which TFDS needs for this step only."""

BY_HAND = """
Part of it has to be downloaded by hand before that; manual_dir is {manual}:
{instructions}"""


def tfds() -> Any:
    """The library, which takes seconds to import, without the advice that it would log."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    import tensorflow_datasets

    return tensorflow_datasets


def builder_of(name: str) -> Any:
    """TFDS's builder of a data set, prepared or not."""
    return tfds().builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))


def check_prepared(name: str, builder: Any, hint: str = "") -> None:
    """Checks that a data set can be read by random access.

    Args:
      name: the data set, as the user gave it.
      builder: its builder.
      hint: what else the message says, a line of its own.

    Raises:
      FileNotFoundError: if it has to be prepared first; the message says how.
    """
    remedy = by_hand(builder) + hint
    if not builder.is_prepared():
        raise FileNotFoundError(PREPARE.format(name=name, place=builder.data_path) + remedy)
    if (form := builder.info.file_format.value) not in ("array_record", "parquet"):
        raise FileNotFoundError(
            f"{builder.data_path} is of the format {form}, which needs TensorFlow to be read. "
            "Remove it, or set TFDS_DATA_DIR to another place.\n"
            + PREPARE.format(name=name, place="the format array_record")
            + remedy
        )


def by_hand(builder: Any) -> str:
    """What has to be downloaded by hand; nothing for most data sets."""
    if not (instructions := builder.MANUAL_DOWNLOAD_INSTRUCTIONS):
        return ""
    manual = os.path.join(builder.data_dir_root, "downloads", "manual")
    instructions = textwrap.indent(textwrap.dedent(instructions), "    ")
    return BY_HAND.format(manual=manual, instructions=instructions).rstrip()
