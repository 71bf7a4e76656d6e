"""llama.cpp's side of race_llama_cpp.py, in a process and an environment of its own.

Needs `llama-cpp-python`, `gguf` and numpy, not Hadal. Reads one JSON object a line from stdin, answers one a
line on stdout. Like `llama-bench`: only `llama_decode` and its synchronisation are timed, prompts are random
tokens in one batch with one output a sequence, and each next token is random too, so that no sampling counts.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import llama_cpp as lc
import numpy as np

FTYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # enum llama_ftype
# Published tensor names to GGUF's, within a layer.
NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    **{f"self_attn.{p}_proj.{kind}": f"attn_{p}.{kind}" for p in "qkv" for kind in ("weight", "bias")},
    **{f"mlp.{p}_proj.weight": f"ffn_{p}.weight" for p in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{p}_proj.weight": f"ffn_{p}_shexp.weight" for p in ("gate", "up", "down")},
}


# --- files ---


def safetensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder of FP32 safetensors files, mapped."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        data = np.memmap(file, np.uint8, "r", offset=8 + size)
        for name, entry in header.items():
            if name != "__metadata__":
                assert entry["dtype"] == "F32", f"{file}: {name} is {entry['dtype']}, FP32 is wanted"
                begin, end = entry["data_offsets"]
                found[name] = data[begin:end].view(np.float32).reshape(entry["shape"])
    return found


def write_gguf(folder: Path, target: Path) -> None:
    """A published FP32 folder (deepseek_v3 or qwen2) as a GGUF file of F32, without a tokenizer."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    arch = {"deepseek_v3": "deepseek2", "qwen2": "qwen2"}[config["model_type"]]
    partial = target.with_suffix(".partial")
    out = gguf.GGUFWriter(str(partial), arch)
    _write_settings(out, config, arch)
    tensors = safetensors(folder)
    for name, value in tensors.items():
        for renamed, array in _renamed(name, value, config, tensors):
            out.add_tensor(renamed, np.ascontiguousarray(array))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    os.replace(partial, target)


def _write_settings(out: Any, c: dict[str, Any], arch: str) -> None:
    import gguf

    rope = c.get("rope_parameters") or c
    out.add_tokenizer_model("no_vocab")
    out.add_vocab_size(c["vocab_size"])
    out.add_file_type(0)
    out.add_block_count(c["num_hidden_layers"])
    out.add_context_length(c["max_position_embeddings"])
    out.add_embedding_length(c["hidden_size"])
    out.add_feed_forward_length(c["intermediate_size"])
    out.add_head_count(c["num_attention_heads"])
    out.add_layer_norm_rms_eps(c["rms_norm_eps"])
    out.add_rope_freq_base(rope["rope_theta"])
    if arch == "qwen2":
        out.add_head_count_kv(c["num_key_value_heads"])
        return
    latent, rotated = c["kv_lora_rank"], c["qk_rope_head_dim"]
    out.add_head_count_kv(1)  # absorbed: one latent head
    out.add_q_lora_rank(c["q_lora_rank"])
    out.add_kv_lora_rank(latent)
    out.add_key_length(latent + rotated)
    out.add_value_length(latent)
    out.add_key_length_mla(c["qk_nope_head_dim"] + rotated)
    out.add_value_length_mla(c["v_head_dim"])
    out.add_rope_dimension_count(rotated)
    out.add_leading_dense_block_count(c["first_k_dense_replace"])
    out.add_expert_count(c["n_routed_experts"])
    out.add_expert_used_count(c["num_experts_per_tok"])
    out.add_expert_shared_count(c["n_shared_experts"])
    out.add_expert_feed_forward_length(c["moe_intermediate_size"])
    out.add_expert_weights_scale(c["routed_scaling_factor"])
    out.add_expert_weights_norm(c["norm_topk_prob"])
    out.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _renamed(
    name: str, value: np.ndarray, c: dict[str, Any], tensors: dict[str, np.ndarray]
) -> list[tuple[str, np.ndarray]]:
    """What a published tensor becomes: experts stacked at their first, W_UK and W_UV apart."""
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        tied = name.startswith("lm_head") and c.get("tie_word_embeddings")
        return [] if tied else [(top[name], value)]
    _, _, layer, rest = name.split(".", 3)
    block = f"blk.{layer}"
    if rest == "self_attn.kv_b_proj.weight":
        nope = c["qk_nope_head_dim"]
        heads = value.reshape(c["num_attention_heads"], nope + c["v_head_dim"], c["kv_lora_rank"])
        up_key = heads[:, :nope].transpose(0, 2, 1)
        return [(f"{block}.attn_k_b.weight", up_key), (f"{block}.attn_v_b.weight", heads[:, nope:])]
    if rest.startswith("mlp.experts."):
        _, _, number, which, _ = rest.split(".")
        if number != "0":
            return []
        names = (f"model.layers.{layer}.mlp.experts.{e}.{which}.weight" for e in range(c["n_routed_experts"]))
        return [
            (f"{block}.ffn_{which.removesuffix('_proj')}_exps.weight", np.stack([tensors[n] for n in names]))
        ]
    return [(f"{block}.{NAMES[rest]}", value)]


def quantise(source: Path, target: Path, kind: str) -> None:
    """What `llama-quantize` does, with its own choice of a type for each tensor."""
    params = lc.llama_model_quantize_default_params()
    params.ftype, params.nthread = FTYPES[kind], os.cpu_count() or 1
    partial = target.with_suffix(".partial")
    status = lc.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama_model_quantize of {source} to {kind} failed with status {status}")
    os.replace(partial, target)


# --- timing ---


class Runner:
    """A context on a model, for up to `sequences` sequences."""

    models: ClassVar[dict[str, Any]] = {}  # by path

    def __init__(self, path: str, *, threads: int, sequences: int, context: int, flash: bool) -> None:
        if path not in self.models:
            settings = lc.llama_model_default_params()
            settings.n_gpu_layers = 0
            self.models[path] = lc.llama_model_load_from_file(path.encode(), settings)
        model = self.models[path]
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        p = lc.llama_context_default_params()
        p.n_ctx = context * sequences
        p.n_batch, p.n_ubatch = 2048, 512  # llama-bench's
        p.n_seq_max = sequences
        p.n_threads = p.n_threads_batch = threads
        p.flash_attn_type = int(flash)
        p.no_perf = True
        self.context = lc.llama_init_from_model(model, p)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context for {path} (flash attention: {flash})")
        self.memory = lc.llama_get_memory(self.context)
        self.vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
        self.batch = lc.llama_batch_init(2048, 0, 1)
        self.draw = random.Random(0)

    def close(self) -> None:
        lc.llama_batch_free(self.batch)
        lc.llama_free(self.context)

    def _fill(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted) each."""
        b = self.batch
        b.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, 1, int(wanted)
            b.seq_id[i][0] = sequence

    def _decode(self) -> float:
        begin = time.perf_counter()
        status = lc.llama_decode(self.context, self.batch)
        lc.llama_synchronize(self.context)
        seconds = time.perf_counter() - begin
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        return seconds

    def time(self, sequences: int, prompt: int, new: int) -> dict[str, float]:
        """Seconds of the prompts together, and of new − 1 steps of one token a sequence."""
        lc.llama_memory_clear(self.memory, True)
        random_token = lambda: self.draw.randrange(10, self.vocab - 10)  # noqa: E731
        self._fill([(random_token(), p, s, p == prompt - 1) for s in range(sequences) for p in range(prompt)])
        prefill = self._decode()
        steps = []
        for step in range(new - 1):
            self._fill([(random_token(), prompt + step, s, True) for s in range(sequences)])
            steps.append(self._decode())
        return {"prefill_s": prefill, "decode_s": sum(steps), "fastest_step_s": min(steps)}

    def greedy(self, prompt: list[int], new: int) -> list[int]:
        """The likeliest continuation: to see that both sides compute the same model."""
        lc.llama_memory_clear(self.memory, True)
        self._fill([(t, p, 0, p == len(prompt) - 1) for p, t in enumerate(prompt)])
        tokens: list[int] = []
        while True:
            self._decode()
            logits = np.ctypeslib.as_array(lc.llama_get_logits_ith(self.context, -1), (self.vocab,))
            tokens.append(int(logits.argmax()))
            if len(tokens) == new:
                return tokens
            self._fill([(tokens[-1], len(prompt) + len(tokens) - 1, 0, True)])


def about() -> dict[str, str]:
    return {
        "llama-cpp-python": lc.__version__,
        "llama.cpp": lc.llama_print_system_info().decode(),
    }


def answer(job: dict[str, Any], runners: dict[str, Runner]) -> Any:
    """Carry out one job; see the keys in race_llama_cpp.py."""
    kind = job.pop("do")
    if kind == "about":
        return about()
    if kind == "write":
        return write_gguf(Path(job["folder"]), Path(job["target"]))
    if kind == "quantise":
        return quantise(Path(job["source"]), Path(job["target"]), job["kind"])
    if kind == "open":
        name = job.pop("name")
        runners[name] = Runner(**job)
        return None
    if kind == "close":
        for runner in runners.values():
            runner.close()
        for model in Runner.models.values():
            lc.llama_model_free(model)
        Runner.models.clear()
        return runners.clear()
    runner = runners[job.pop("name")]
    return runner.time(**job) if kind == "time" else runner.greedy(**job)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints must not mix with the answers
    quiet = lc.llama_log_callback(lambda level, text, data: None)
    if not os.environ.get("LLAMA_LOG"):
        lc.llama_log_set(quiet, None)
    lc.llama_backend_init()
    runners: dict[str, Runner] = {}
    for line in sys.stdin:
        try:
            reply = {"ok": answer(json.loads(line), runners)}
        except Exception as fault:
            reply = {"error": f"{type(fault).__name__}: {fault}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
