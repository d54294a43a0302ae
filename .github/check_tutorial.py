"""Runs the README's program, whose path is given, with the brelax_jax that is installed."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

text = Path(sys.argv[1]).read_text(encoding="utf-8")
[program] = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
names: dict[str, Any] = {}
exec(program, names)
for name, layer in names["params"]["params"].items():
    assert len(np.unique(layer["kernel"])) == 2, name
