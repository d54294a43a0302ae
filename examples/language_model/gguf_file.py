"""A network of the Llama architecture as a GGUF file, which llama.cpp runs."""

from pathlib import Path
from typing import Any

import numpy as np

import brelax_jax as brx
from examples.language_model.config import Settings
from examples.language_model.llama import BASE, EPSILON, WIDER
from examples.language_model.text import Text
from examples.runs.sets import GGUF

FLOAT = "f32"
BLOCKS = {"q1_0": 128, "q2_0": 64, "tq1_0": 256, "tq2_0": 256, "nvfp4": 64} | dict.fromkeys(
    ("q4_0", "q5_0", "q8_0", "mxfp4"), 32
)
LAYERS = {  # of a block: what llama.cpp calls them
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "out": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def formats(settings: Settings) -> dict[str, str]:
    """The sets that are formats of GGUF, by their words."""
    kinds = {word: word.partition("@")[0] for word in settings.sets}
    return {word: kind for word, kind in kinds.items() if kind in GGUF}


def write(path: Path, network: Any, settings: Settings, text: Text, word: str, kind: str) -> Path:
    """Writes a network with packed kernels, and returns the file's path.

    Args:
      path: of the file; its name gets the set's and the format's.
      network: as `brx.load(…, packed=True)` gives it.
      settings: its settings.
      text: whose characters it knows.
      word: its set.
      kind: a format of GGUF for the kernels, or `FLOAT`.
    """
    path = path.with_name(f"{path.stem}-{word}{'-f32' if kind == FLOAT else ''}.gguf")
    path.parent.mkdir(parents=True, exist_ok=True)
    rarest = int(np.bincount(text.train, minlength=len(text.characters)).argmin())
    tokens = [*range(len(text.characters)), rarest]  # the last one is the end, as unlikely
    tensors: dict[str, Any] = {
        "token_embd.weight": np.asarray(network["characters"]["embedding"])[tokens],
        "output_norm.weight": network["norm"]["scale"],
        "output.weight": np.asarray(network["head"]["kernel"]).T[tokens],
    }
    for i in range(settings.layers):
        block = network[f"block_{i}"]
        tensors[f"blk.{i}.attn_norm.weight"] = block["attention_norm"]["scale"]
        tensors[f"blk.{i}.ffn_norm.weight"] = block["dense_norm"]["scale"]
        for layer, name in LAYERS.items():
            kernel = block[layer]["kernel"].unpack()
            stored = kernel.dequantize().T if kind == FLOAT else (kernel, kind)
            tensors[f"blk.{i}.{name}.weight"] = stored
    brx.export.write_gguf(path, "llama", metadata(settings, text.characters), tensors)
    return path


def metadata(settings: Settings, characters: str) -> dict[str, Any]:
    """What llama.cpp has to know of the network and of its alphabet."""
    end = len(characters)
    return {
        "general.name": "Characters of Shakespeare",
        "llama.context_length": settings.context + 1,  # with the character that is predicted
        "llama.embedding_length": settings.width,
        "llama.block_count": settings.layers,
        "llama.feed_forward_length": WIDER * settings.width,
        "llama.attention.head_count": settings.heads,
        "llama.attention.layer_norm_rms_epsilon": EPSILON,
        "llama.rope.freq_base": BASE,
        "llama.rope.dimension_count": settings.width // settings.heads,
        "llama.vocab_size": end + 1,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*map(token, characters), "<eos>"],
        "tokenizer.ggml.token_type": [*[1] * end, 3],  # normal ones, and one for control
        "tokenizer.ggml.merges": ["<eos> <eos>"],  # none, but llama.cpp wants one
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
    }


def token(character: str) -> str:
    """A character of ASCII as GPT-2's tokenizer writes it: white space by letters beyond ASCII."""
    return chr(256 + ord(character)) if ord(character) <= ord(" ") else character
