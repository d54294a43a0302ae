"""A network of the Llama architecture as a GGUF file, which llama.cpp runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import brelax_jax as brx
from examples.language_model.config import Settings
from examples.language_model.llama import BASE, EPSILON, WIDER
from examples.language_model.text import Text

FLOAT = "f32"
LAYERS = {  # of a block: what llama.cpp calls them
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "out": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def formats(settings: Settings) -> tuple[str, ...]:
    """Float, ternary (the smallest format whose blocks divide the rows), and 4 bits."""
    return FLOAT, "q2_0" if settings.width % 256 else "tq2_0", "q4_0"


def deployed(params: Any) -> Any:
    """The params with a `Quantized` in place of each ternary kernel, one scale for each output.

    Scales become the nearest float16 values, which is what the formats hold.
    """

    def coded(kernel: Any) -> brx.Quantized:
        scale = jnp.abs(kernel).max(axis=0, keepdims=True).astype("float16").astype("float32")
        return brx.Quantized(jnp.sign(kernel).astype("int8"), scale, (0.0, 1.0), jnp.float32)

    return map_kernels(coded, params)


def multiplied_out(network: Any) -> Any:
    """The params of what `deployed` gives."""
    return map_kernels(brx.Quantized.dequantize, network)


def map_kernels(function: Callable[[Any], Any], params: Any) -> Any:
    """`params` with function(kernel) in place of each kernel of a block."""
    mapped = {name: dict(part) for name, part in params.items()}
    for name in mapped:
        if name.startswith("block_"):
            mapped[name] |= {k: {"kernel": function(mapped[name][k]["kernel"])} for k in LAYERS}
    return mapped


def write(path: Path, network: Any, settings: Settings, text: Text, kind: str) -> Path:
    """Writes what `deployed` gives, and returns the file's path, which names the format."""
    path = path.with_name(f"{path.stem}-{kind}.gguf")
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
            kernel = block[layer]["kernel"]
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
