"""Networks in llama.cpp: they are written as GGUF files, and run by the package `xllamacpp`."""

import importlib
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import brelax_jax as brx
from examples.language_model import gguf_file
from examples.language_model.config import Settings
from examples.language_model.seeds import Seed
from examples.language_model.text import Codes, windows
from examples.language_model.trainer import Trainer
from examples.runs.report import table

COMPARED = 500  # characters of the validation split that llama.cpp predicts


def check(settings: Settings) -> None:
    """Raises an error before training if the network could not be written after it."""
    importlib.import_module("gguf")
    if not gguf_file.formats(settings):
        raise ValueError(f"--export-gguf needs a format of GGUF in --sets, got {settings.sets}.")
    for word, kind in gguf_file.formats(settings).items():
        if settings.width % gguf_file.BLOCKS[kind]:
            raise ValueError(
                f"--export-gguf of {word} needs a --width in blocks of {gguf_file.BLOCKS[kind]}, "
                f"got {settings.width}."
            )


def exported(trainer: Trainer, kept: Seed, path: Path) -> str:
    """Writes the BinaryRelax network of each format of GGUF, in that and as floats, and says what
    each file comes to in llama.cpp.
    """
    context, text = trainer.settings.context, trainer.text
    part = text.validation[: COMPARED + 1]
    runs = importlib.util.find_spec("xllamacpp") is not None
    lines: list[dict[str, str]] = []
    for word, own in gguf_file.formats(trainer.settings).items():
        network = kept.network(f"BinaryRelax, {word}", packed=True)
        ours = trainer.bits_per_character(brx.dequantize(network), part)
        for kind in (gguf_file.FLOAT, own):
            file = gguf_file.write(path, network, trainer.settings, text, word, kind)
            line = {"file": str(file), "size (KiB)": f"{file.stat().st_size / 1024:.0f}"}
            line["in JAX"] = f"{ours:.4f}"
            if runs:
                running = LlamaCpp(file, len(text.characters), context)
                line["in llama.cpp"] = f"{running.bits_per_character(part, context):.4f}"
            lines.append(line)
    note = "" if runs else " For llama.cpp's: pip install xllamacpp."
    return (
        f"\nBits per character of BinaryRelax on the first {len(part)} characters of the "
        f"validation split.{note}\n\n{table(lines)}"
    )


class LlamaCpp:
    """A network in llama.cpp, on one thread, with caches in float32.

    Raises:
      ModuleNotFoundError: if `xllamacpp` is missing.
    """

    def __init__(self, path: Path, characters: int, context: int) -> None:
        xllamacpp = importlib.import_module("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = context + 1, 1
        params.warmup, params.verbosity = False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._characters = characters
        self._server = xllamacpp.Server(params)

    def log_probabilities(self, codes: Sequence[int] | Codes) -> NDArray[np.float64]:
        """log p of each character, to come after these."""
        answer = self._complete(codes, n_predict=1, n_probs=self._characters + 1)
        logs = np.full(self._characters + 1, -np.inf)
        for each in answer["logprobs"]["content"][0]["top_logprobs"]:
            logs[each["id"]] = each["logprob"]
        logs = logs[:-1]  # without the end
        return logs - np.log(np.exp(logs).sum())

    def bits_per_character(self, codes: Codes, context: int) -> float:
        """Mean of −log₂ p of each character but the first, as `Trainer.bits_per_character`."""
        nats = 0.0
        for [piece], [counts] in windows(codes, context, batch=1):
            for place in np.flatnonzero(counts):
                logs = self.log_probabilities(piece[: place + 1])
                nats -= float(logs[piece[place + 1]])
        return nats / (len(codes) - 1) / math.log(2)

    def likeliest(self, codes: Sequence[int] | Codes, length: int) -> str:
        """How the network goes on, by the likeliest character each time."""
        return self._complete(codes, n_predict=length)["text"]

    def _complete(self, codes: Sequence[int] | Codes, **options: int) -> Any:
        request = {"prompt": [int(code) for code in codes], "temperature": 0.0, "ignore_eos": True}
        answer = self._server.handle_completions({**request, "cache_prompt": False, **options})
        if "choices" not in answer:
            raise ValueError(f"llama.cpp answers {answer}.")
        return answer["choices"][0]
