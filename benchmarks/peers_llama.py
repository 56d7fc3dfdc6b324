"""llama.cpp on a random Llama-3.2-1B: the process that `benchmarks.peers` measures, in a Python of its own.

It needs numpy, gguf and llama-cpp-python, and nothing of this project. The BF16 file is written here, without a
vocabulary; llama.cpp itself quantises it to the other types, as its users do.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

# meta-llama/Llama-3.2-1B, config.json.
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD, MLP, VOCAB = 16, 2048, 32, 8, 64, 8192, 128256
TOY_LAYERS, TOY_VOCAB = 2, 1024
BLOCK = 256  # rows drawn; they are repeated to fill a matrix
BATCH = 512  # tokens of the prompt run at once
WARM_UP = 3
FILE_TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def main() -> None:
    """Measure as the JSON object in the first argument says, and print the result as the last line."""
    task = json.loads(sys.argv[1])
    llama_cpp.llama_backend_init()
    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    toy = task["toy"]
    stem = f"{'toy' if toy else task['model']}"
    source = Path(task["store"]) / f"{stem}-bf16.gguf"
    path = source.with_name(f"{stem}-{task['weights']}.gguf")
    if not source.exists():
        _whole(source, lambda partial: write(partial, toy))
    if not path.exists():
        _whole(path, lambda partial: quantise(source, partial, task["weights"], task["threads"]))
    prompt, steps = measure(path, task["context"], task["tokens"], task["threads"], TOY_VOCAB if toy else VOCAB)
    result = {"prompt_seconds": prompt, "step_seconds": statistics.median(steps), "best_step_seconds": min(steps)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result | {"weight_bytes": path.stat().st_size, "peak_rss": peak}))


def _whole(path: Path, make: Any) -> None:
    """Write a file under another name first, so that an interrupted one is not taken for whole."""
    partial = path.with_suffix(".partial")
    make(partial)
    os.replace(partial, path)


def write(path: Path, toy: bool) -> None:
    """Write a random model in BF16."""
    writer = gguf.GGUFWriter(path, "llama")
    layers = TOY_LAYERS if toy else LAYERS
    writer.add_block_count(layers)
    writer.add_context_length(131072)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(TOY_VOCAB if toy else VOCAB)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    for name, rows, columns in shapes(layers, TOY_VOCAB if toy else VOCAB):
        if rows == 0:
            writer.add_tensor(name, np.ones(columns, dtype=np.float32))
        else:
            writer.add_tensor(name, matrix(rows, columns), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shapes(layers: int, vocab: int) -> Iterator[tuple[str, int, int]]:
    """Yield every tensor's name, rows and columns; no rows mean a vector. The head is tied to the embedding."""
    yield "token_embd.weight", vocab, WIDTH
    yield "output_norm.weight", 0, WIDTH
    for i in range(layers):
        yield f"blk.{i}.attn_norm.weight", 0, WIDTH
        yield f"blk.{i}.attn_q.weight", HEADS * HEAD, WIDTH
        yield f"blk.{i}.attn_k.weight", KV_HEADS * HEAD, WIDTH
        yield f"blk.{i}.attn_v.weight", KV_HEADS * HEAD, WIDTH
        yield f"blk.{i}.attn_output.weight", WIDTH, HEADS * HEAD
        yield f"blk.{i}.ffn_norm.weight", 0, WIDTH
        yield f"blk.{i}.ffn_gate.weight", MLP, WIDTH
        yield f"blk.{i}.ffn_up.weight", MLP, WIDTH
        yield f"blk.{i}.ffn_down.weight", WIDTH, MLP


def matrix(rows: int, columns: int) -> Any:
    """Return a random matrix in BF16, (rows, 2 · columns) bytes."""
    drawn = np.random.default_rng(0).standard_normal((BLOCK, columns), dtype=np.float32) * np.float32(0.02)
    return np.tile(gguf.quants.quantize(drawn, gguf.GGMLQuantizationType.BF16), (rows // BLOCK, 1))


def quantise(source: Path, target: Path, kind: str, threads: int) -> None:
    """Let llama.cpp quantise a file."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = FILE_TYPES[kind], threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
        sys.exit(f"llama.cpp cannot quantise {source.name} to {kind}")


def measure(path: Path, context: int, tokens: int, threads: int, vocab: int) -> tuple[float, list[float]]:
    """Return the seconds that a prompt takes and those of each token after it."""
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot load {path.name}")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = context + tokens + WARM_UP, BATCH, BATCH
    options.n_threads = options.n_threads_batch = threads
    state = llama_cpp.llama_init_from_model(model, options)
    prompt = np.random.default_rng(0).integers(3, vocab, context).tolist()
    run(state, prompt)  # what the first call prepares does not count
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(state), True)
    prompt_seconds, token = run(state, prompt)
    steps = []
    for _ in range(WARM_UP + tokens):
        seconds, token = run(state, [token])
        steps.append(seconds)
    return prompt_seconds, steps[WARM_UP:]


def run(state: Any, tokens: list[int]) -> tuple[float, int]:
    """Run tokens in batches; return the seconds, and the likeliest next token."""
    begun = time.perf_counter()
    for start in range(0, len(tokens), BATCH):
        part = tokens[start : start + BATCH]
        held = (llama_cpp.llama_token * len(part))(*part)
        if llama_cpp.llama_decode(state, llama_cpp.llama_batch_get_one(held, len(part))):
            sys.exit("llama.cpp cannot run the tokens")
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(state)))
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(state, -1), shape=(vocab,))
    return time.perf_counter() - begun, int(logits.argmax())


if __name__ == "__main__":
    main()
