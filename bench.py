"""Speed, memory, quality of GloBE beside its peers; reports; grids of fits. Last line of stdout: JSON.

    python bench.py                                    decode on tiny: tokens/s and memory
    python bench.py compose sparsemax decode           operators, a layer of Qwen1.5-MoE's shapes, tiny
    python bench.py quality --preset tiny smol-moe --ratio 0.8 0.6 --json rows.json --png rows.png
    python bench.py quality --preset mid --bits 2.1 1.6 --bytes 6.57e6 --peers low-bit --json rows.json
    python bench.py report --factors runs/tiny-001 --tasks builtin
    python bench.py sweep --config configs/tiny.yaml --out runs/grid bank.m=8,16 fit.steps=50,99

Suites (several in one command, or all) and commands:
    compose     composed bases at Qwen1.5-MoE's shapes, against torch's best ways
    sparsemax   sparsemax and entmax-1.5, forward and backward, against the package entmax
    decode      tokens/s and memory: dense in each of transformers' ways, GloBE, codes of --bits, llama.cpp
    fit         seconds, passes, error of the fit's methods on tiny, beside MoBE's setting
    quality     nats lost per token at one size, in 16 bits, in codes or of the whole file, beside the peers
    report      tables and a plot of a run: errors, effective ranks, bases, quality, a zero-shot task
    sweep       a fit per combination of a grid, one table; started again, it goes on

A speed is the median of several turns; peers run in the same process, turn by turn with ours.
"""
from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from argparse import Namespace
from functools import cached_property, partial
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import globe
from globe import Checkpoint, UserError, expect, say

HERE = Path(globe.__file__).resolve().parent
CONFIGS = HERE / "configs"
CPU = torch.device("cpu")
PAIR = ("gate", "up")  # the families that every peer compresses
CACHED = globe.CacheConfig(mode="all")


# ---- 1. Helpers: rows, tables, timing ------------------------------------------------------------
# one figure, numbers to six digits; `ratio`: times as fast as the best peer, None where none ran;
# of quality: stored / dense numbers of gate and up
def new_row(suite: str, preset: str, test: str, variant: str, value: float | None, unit: str, **more) -> dict:
    row = {"suite": suite, "preset": preset, "test": test, "variant": variant, "value": value, "unit": unit,
           "ratio": None, **more}
    for key, figure in row.items():
        if isinstance(figure, float):
            row[key] = float(f"{figure:.6g}")
    return row


# print these keys of rows as a table; what a row does not have stays empty
def show(rows: list, *keys: str) -> None:
    cells = []
    for row in rows:
        found = map(row.get, keys)
        cells.append(["" if value is None else value for value in found])
    say(globe.text_table(keys, cells))


# value / reference; None where either is missing
def times(value: float | None, reference: float | None) -> float | None:
    return round(value / reference, 3) if value and reference else None


# the rows that have these values
def where(rows: list, **wanted) -> list:
    return [row for row in rows if wanted.items() <= row.items()]


# the result of a command of globe.py, run in this process; its errors come through as they are
def run_globe(*argv: object) -> dict:
    args = globe.parse(list(map(str, argv)))
    return args.run(args)


# seconds of run(), with what it queued on the device
def timed(run: Callable, device: torch.device) -> float:
    globe.synchronize(device)
    begin = time.perf_counter()
    run()
    globe.synchronize(device)
    return time.perf_counter() - begin


# bytes/s that this machine moves, measured now: the better of torch's copy and of a read of 512 MiB
def bandwidth(device: torch.device) -> float:
    a = torch.ones(2 ** 27, device=device)
    b = torch.empty_like(a)
    copying = min(timed(partial(b.copy_, a), device) for _ in range(5))
    reading = min(timed(a.amax, device) for _ in range(5))
    return max(2 * a.nbytes / copying, a.nbytes / reading)


# UserError where our operator is not built for the device
def need_native(op: str, device: torch.device) -> None:
    expect(globe.native(op, device.type), f"{op}: no native operator on {device} ({globe.kernels()})")


# while the block runs, note(experts module, x (n, d), index (n, top_k), weights (n, top_k)) at every forward
@contextlib.contextmanager
def watching(modules: list, note: Callable):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        note(module, *args, *kwargs.values())
    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


# {layer: experts module} of a transformers model
def dense_experts(model: nn.Module) -> dict:
    return {l: module for l, (_, _, module) in globe.experts_modules(model).items()}


# ---- 2. Models: SmolLM2 as a mixture of experts, and what a preset stands for --------------------
# (dense Llama, tokenizer) from a folder that holds a .gguf, a Hugging Face folder, or a hub id
def load_llama(source: str) -> tuple:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    more = {}
    ggufs = sorted(Path(source).rglob("*.gguf"))
    if ggufs and not (Path(source) / "config.json").exists():
        for package in ("gguf", "accelerate"):
            found = importlib.util.find_spec(package)
            expect(found, f"smol-moe: reading a GGUF needs {package}: pip install {package}")
        source = ggufs[0].parent
        more["gguf_file"] = ggufs[0].name
    elif not Path(source).is_dir():
        source = globe.resolve_model(source)
    tokenizer = AutoTokenizer.from_pretrained(source, **more)
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **more).eval(), tokenizer


SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
        "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


@torch.no_grad()
def sliced(dense: nn.Module, slices: int) -> nn.Module:
    """The Qwen2-MoE that computes what a dense Llama computes.

    The FFN's hidden units are cut into equal slices, all of them active. The router is zero, so every softmax
    weight is 1/slices; down takes the factor `slices` (exact in floating point for a power of two).
    """
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
    c = dense.config
    known = {key: getattr(c, key) for key in SAME if getattr(c, key, None) is not None}
    moe = Qwen2MoeForCausalLM(Qwen2MoeConfig(
        **known, moe_intermediate_size=c.intermediate_size // slices, num_experts=slices,
        num_experts_per_tok=slices, shared_expert_intermediate_size=8, norm_topk_prob=False)).float()

    # what both have; biases, routers and the shared experts stay zero
    state = dense.state_dict()
    for name, t in moe.state_dict().items():
        t.copy_(state.get(name, torch.zeros(())))

    # rows of gate and up, columns of down
    for layer, module in dense_experts(moe).items():
        mlp = dense.model.layers[layer].mlp
        gate = mlp.gate_proj.weight.unflatten(0, (slices, -1))  # (E, p, d)
        up = mlp.up_proj.weight.unflatten(0, (slices, -1))
        down = mlp.down_proj.weight.unflatten(1, (slices, -1))  # (d, E, p)
        module.gate_up_proj.copy_(torch.cat([gate, up], 1))
        module.down_proj.copy_(slices * down.transpose(0, 1))
    return moe


# write a stock Qwen2-MoE checkpoint that computes what the Llama `source` does; its logits are compared
def build_smol_moe(source: str, out: Path, slices: int) -> None:
    dense, tokenizer = load_llama(source)
    kind = dense.config.model_type
    width = dense.config.intermediate_size
    fine = kind == "llama" and width % slices == 0
    expect(fine, f"{source}: expected a Llama whose width {slices} divides, found {kind} of {width}")
    with globe.written(out) as tmp:
        # generation's defaults, tokenizer, weights
        for part in (dense.generation_config, tokenizer, sliced(dense, slices)):
            part.save_pretrained(tmp)

        # both models on one sentence
        ids = tokenizer("The reference describes the syntax of assignment.", return_tensors="pt").input_ids
        with torch.no_grad():
            error = float((globe.load_dense(tmp, CPU, None)(ids).logits - dense(ids).logits).abs().max())
        if error > 1e-3:
            raise RuntimeError(f"smol-moe: expected the dense model's logits, found a difference of {error}")


# the checkpoint of a preset, built on first use in the user's cache
def checkpoint_of(preset: str, args: Namespace) -> Checkpoint:
    if preset == "mid" and os.environ.get("MID_DIR"):
        return Checkpoint(os.environ["MID_DIR"])
    if preset in ("tiny", "mid"):
        return globe.open_model(globe.load_config(str(CONFIGS / f"{preset}.yaml"), args.set), CPU)
    path = globe.user_cache() / f"smol-moe-{args.experts}"
    if not (path / "config.json").is_file():
        source = os.environ.get("SMOL_DIR") or "HuggingFaceTB/SmolLM2-135M-Instruct"
        build_smol_moe(source, path, args.experts)
    return Checkpoint(path)


# ---- 3. Peers, written from their papers ---------------------------------------------------------
# Each gives (W^ (2, E, p, d), numbers stored) for one layer's gates and ups W (2, E, p, d) at a stored size.
# L: (d, d), Cholesky factor of the inputs' second moment, as in the fit; None: no data.


# argmin of ||(W - W^) L|| at that rank, W (.., p, d): truncated SVD of W L (SVD-LLM, eq. 4)
def low_rank(W: Tensor, rank: int, L: Tensor | None) -> Tensor:
    U, S, V = torch.linalg.svd(W if L is None else W @ L, full_matrices=False)
    out = U[..., :rank] * S[..., None, :rank] @ V[..., :rank, :]
    return out if L is None else torch.linalg.solve_triangular(L, out, upper=False, left=False)


# Truncated SVD of every matrix; with L whitened, as in SVD-LLM (Wang et al. 2024)
def peer_svd(W: Tensor, ratio: float, L: Tensor | None, args: Namespace) -> tuple:
    _, E, p, d = W.shape
    rank = max(1, int(ratio * p * d / (p + d)))
    return low_rank(W, rank, L), 2 * E * rank * (p + d)


# One basis (r, d) for gates and ups: leading right singular directions of W L, stacked
def peer_layer_pca(W: Tensor, ratio: float, L: Tensor, args: Namespace) -> tuple:
    _, E, p, d = W.shape
    r = int(ratio * 2 * E * p * d / (2 * E * p + d))

    # eigenvectors of the summed Gram matrix (d, d), the largest last
    WL = W @ L
    gram = (WL.mT @ WL).flatten(0, 1).sum(0)
    Q = torch.linalg.eigh(gram.double())[1][:, -r:].float()

    # project, and take L off again
    return torch.linalg.solve_triangular(L, WL @ Q @ Q.T, upper=False, left=False), r * (2 * E * p + d)


# The mean expert plus a whitened low-rank delta for each (D2-MoE, Gu et al. 2025; plain mean)
def peer_d2(W: Tensor, ratio: float, L: Tensor, args: Namespace) -> tuple:
    _, E, p, d = W.shape
    rank = max(0, int((ratio * E - 1) * p * d / (E * (p + d))))
    mean = W.mean(1, keepdim=True)
    return mean + low_rank(W - mean, rank, L), 2 * (p * d + rank * E * (p + d))


def peer_slbf(W: Tensor, ratio: float, L: None, args: Namespace) -> tuple:
    """Low-rank bases shared by a layer's experts, data-free: W_i = sum_j alpha_ij U_j V_j, two per expert.

    They start from each expert's own SVD (so at the plain SVD); then Adam on U, V and alpha.
    """
    _, E, p, d = W.shape
    m = 2 * E
    k = int((ratio * E * p * d - E * m) / (m * (p + d)))  # rank of a basis
    out = []
    for dense in W.to(args.device):  # gates, then ups
        scale = dense.square().mean().sqrt()

        # the first k and the next k singular directions of an expert are its two bases
        U, S, V = torch.linalg.svd(dense / scale, full_matrices=False)
        root = S[:, :2 * k].sqrt()
        U = (U[..., :2 * k] * root[:, None]).unflatten(-1, (2, k)).movedim(-2, 1).reshape(m, p, k)
        V = (root[..., None] * V[:, :2 * k]).reshape(m, k, d)
        alpha = torch.eye(E, device=U.device).repeat_interleave(2, 1) + 1e-3  # (E, m)
        out.append(scale * adam_bases([U, V, alpha], dense / scale, args.steps or 3000))
    return torch.stack(out).cpu(), 2 * m * (k * (p + d) + E)


# sum_j alpha_ij U_j V_j (E, p, d) after Adam from start = U, V, alpha; the start's where that is better
def adam_bases(start: list, W: Tensor, steps: int, lr: float = 2e-3) -> Tensor:
    x = [t.clone().requires_grad_() for t in start]

    def build() -> Tensor:
        U, V, alpha = x
        return (alpha @ (U @ V).flatten(1)).view(W.shape)
    first = build().detach()
    opt = torch.optim.Adam(x, lr, fused=True)
    for step in globe.bar("adam")(range(steps)):
        opt.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        opt.zero_grad()

        # the gradient of the mean square, from the residual itself
        out = build()
        out.backward((out.detach() - W) * (2 / W.numel()))
        opt.step()
    return min(first, build().detach(), key=lambda out: float((W - out).norm()))


# {layer: (E,)} mean over an expert's tokens of router weight times norm of its output (REAP, eq. 9)
def saliency(model: nn.Module, windows: Tensor) -> dict:
    experts = dense_experts(model)
    sums = {}  # norms, tokens
    for module in experts.values():
        sums[module] = torch.zeros(2, module.num_experts)

    def collect(module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> None:
        call = globe.LayerCall(None, module, x, index, weight, None)
        for e in range(module.num_experts):
            group = globe.routed_group(call, [e])
            group.activate(module, x, slopes=False)
            sums[module][0, e] += float(group.output().norm(dim=-1).sum())
            sums[module][1, e] += len(group.h)
    with watching(list(sums), collect):
        globe.nll(model, windows)
    return {l: sums[module][0] / sums[module][1].clamp_min(1) for l, module in experts.items()}


@torch.no_grad()
def prune(model: nn.Module, ratio: float, windows: Tensor) -> float:
    """Take a model's least useful experts out (REAP, Lasby et al. 2025); the equivalent ratio of gate and up.

    Dropping one expert saves its gate, up and down, so the size of gate+up that the others are held to allows
    fewer drops; rounded in its favour.
    """
    score = saliency(model, windows)
    for l, (parent, _, module) in globe.experts_modules(model).items():
        n = len(score[l])
        module.num_experts = math.ceil(n - (1 - ratio) * 2 * n / 3)
        rows = score[l].topk(module.num_experts).indices.sort().values.to(model.device)
        for holder, name in ((module, "gate_up_proj"), (module, "down_proj"), (parent.gate, "weight")):
            setattr(holder, name, nn.Parameter(getattr(holder, name)[rows]))
    return 1 - (n - module.num_experts) * 3 / (2 * n)


# ---- plain quantization: asymmetric codes of whole bits, a 16-bit scale per row or per group of columns
def rounded(W: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((W / scale + zero).round().clamp(0, 2 ** bits - 1) - zero) * scale


# scales and zeros (.., 1) of W (.., g): of the ranges, shrunk step by step, the one that rounds it best
def best_grid(W: Tensor, bits: int) -> tuple:
    low = W.amin(-1, keepdim=True).clamp_max(0)
    high = W.amax(-1, keepdim=True).clamp_min(0)
    tried = []
    for part in torch.linspace(1, 0.4, 13).tolist():
        scale = (part * (high - low) / (2 ** bits - 1)).clamp_min(1e-8).half().float()
        zero = (-part * low / scale).round().clamp(0, 2 ** bits - 1)
        error = (rounded(W, scale, zero, bits) - W).square().sum(-1, keepdim=True)
        tried.append(torch.stack([error, scale, zero]))
    tried = torch.stack(tried)  # (13, 3, .., 1)
    best = tried[:, :1].argmin(0, keepdim=True).expand_as(tried[:1])
    return tuple(tried.gather(0, best)[0, 1:])


def gptq(W: Tensor, H: Tensor | None, bits: int, group: int) -> tuple:
    """(W (E, p, d) rounded column by column, those behind each make up for its error; its bytes).

    H (1 or E, d, d): the inputs' second moments; columns by falling diagonal, grids fixed at the start.
    None: plain rounding. Frantar et al. 2023.
    """
    stored = W.numel() * (bits + (16 + bits) / group) / 8
    shape = W.shape
    if H is not None:
        W = W.reshape(len(H), -1, shape[2])  # in one metric all experts' rows are one matrix
    b, p, d = W.shape
    # a grid per row and group, spread to its columns
    parts = F.pad(W, (0, -d % group)).unflatten(2, (-1, group))
    scale, zero = (t.expand_as(parts).flatten(2)[..., :d] for t in best_grid(parts, bits))
    if H is None:
        return rounded(W, scale, zero, bits), stored

    # columns in the order of each Hessian's diagonal
    order = H.diagonal(dim1=1, dim2=2).argsort(1, descending=True)  # (b, d)
    along = order[:, None].expand_as(W)
    left, scale, zero = (t.gather(2, along) for t in (W, scale, zero))
    H = H.gather(1, order[:, :, None].expand_as(H)).gather(2, order[:, None].expand_as(H))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H.double()))
    inverse = torch.linalg.cholesky(inverse, upper=True).float()
    out = torch.empty_like(W)
    for start in range(0, d, 64):
        block = slice(start, min(start + 64, d))
        errors = torch.zeros(b, p, block.stop - start)
        for i in range(start, block.stop):
            out[..., i] = rounded(left[..., i], scale[..., i], zero[..., i], bits)
            error = (left[..., i] - out[..., i]) / inverse[:, i, i, None]
            left[..., i + 1:block.stop] -= error[..., None] * inverse[:, i, None, i + 1:block.stop]
            errors[..., i - start] = error
        left[..., block.stop:] -= errors @ inverse[:, block, block.stop:]
    return torch.empty_like(W).scatter_(2, along, out).view(shape), stored


# name: (whether errors are fed back in the metric of the inputs, columns of a group)
ROW = 2 ** 20
LOW_BIT = {"rtn": (False, ROW), "gptq-row": (True, ROW), "gptq-g64": (True, 64), "gptq-g32": (True, 32)}


# (whole bits, columns of a group) of hqq nearest to these stored bits; None: none within a tenth
def hqq_size(asked: float, d: int) -> tuple | None:
    sizes = {}
    # a 16-bit scale and a 16-bit zero for a group; ten codes of three bits take 32
    for bits, group in itertools.product((1, 2, 3.2, 4, 8), (16, 32, 64, 128, 256)):
        if d % group == 0:
            sizes[bits + 32 / group] = int(bits), group
    nearest = min(sizes, key=lambda stored: abs(stored - asked))
    return sizes[nearest] if abs(nearest - asked) <= 0.1 * asked else None


# Half-quadratic quantization (Badri & Shaji 2023) by its package: (W^ (E, p, d), its bytes)
def hqq(W: Tensor, bits: int, group: int, axis: int) -> tuple:
    from hqq.core.quantize import Quantizer
    made = Quantizer.quantize(W.flatten(0, 1), bits, group_size=group, axis=axis, device="cpu")
    codes, meta = Quantizer.cpu(*made)  # scales and zeros in 16 bits
    stored = codes.nbytes + meta["scale"].nbytes + meta["zero"].nbytes
    return Quantizer.dequantize(codes, meta).float().view_as(W), stored


# ---- llama.cpp's quants
# its converter, that knows no home-made tokenizer and wants one merge: of a pair that no text holds
CONVERTER = """
import sys
from convert_hf_to_gguf import main
from conversion.base import TextModel

def with_a_merge(model):
    plain(model)
    model.gguf_writer.add_token_merges(["\u0100 \u0100"])
plain = TextModel._set_vocab_gpt2
TextModel._set_vocab_gpt2 = with_a_merge
TextModel.get_vocab_base_pre = lambda model, tokenizer: "gpt-2"
del sys.argv[0]
main()
"""


@dataclasses.dataclass
class LlamaCpp:
    """A checkpoint in llama.cpp's types, by the programs of LLAMA_CPP, as tensors again."""
    ckpt: Checkpoint
    windows: Tensor  # (N, T) ids of the fit's calibration
    folder: Path     # for its files

    # what one of its programs printed, at its end; UserError with the last line that it said
    def run(self, name: str, *argv: object, by: tuple = ()) -> str:
        program = Path(os.environ["LLAMA_CPP"]).resolve() / name
        expect(program.is_file(), f"LLAMA_CPP: expected a built llama.cpp with {program}, found none")
        done = subprocess.run([*by, program, *map(str, argv)], cwd=program.parent, capture_output=True,
                              text=True, errors="replace")
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        expect(done.returncode == 0, f"LLAMA_CPP: {name}: exit code {done.returncode}: {said}")
        return done.stdout

    # the GGUF of a directory's model and tokenizer, in 16 bits
    def converted(self, directory: Path) -> Path:
        source = self.folder / "source.gguf"
        self.run("convert_hf_to_gguf.py", directory, "--outfile", source, "--outtype", "bf16",
                 by=(sys.executable, "-c", CONVERTER))
        return source

    # (the model in 16 bits, with a head of its own, which its qwen2moe wants; the importance matrix)
    @cached_property
    def source(self) -> tuple:
        tokenizer = globe.load_tokenizer(self.ckpt.dir)
        for part in (untied(globe.load_dense(self.ckpt.dir, CPU, None)), tokenizer):
            part.save_pretrained(self.folder / "untied")
        source = self.converted(self.folder / "untied")
        text = self.folder / "windows.txt"
        globe.write_text(text, "".join(map(tokenizer.decode, self.windows)))
        importance = self.folder / "importance.gguf"
        self.run("build/bin/llama-imatrix", "-m", source, "-f", text, "-o", importance,
                 "-c", self.windows.shape[1], "-t", torch.get_num_threads(), "--no-ppl")
        return source, importance

    # ({name in llama.cpp: (float32 tensor, its bytes)}, bytes of the file) of a mix of llama.cpp's, as IQ1_S,
    # or of types for gate and up, down, and the rest
    def tensors(self, mix: str) -> tuple:
        import gguf
        source, importance = self.source
        *experts, rest = mix.split(":")
        types = []
        for family, kind in zip(globe.FAMILIES, experts[:1] + experts):
            types += ["--tensor-type", f"ffn_{family}_exps={kind.lower()}"]
        out = self.folder / f"{mix.replace(':', '-')}.gguf"
        if not out.is_file():
            self.run("build/bin/llama-quantize", "--imatrix", importance, *types, source, out, rest,
                     torch.get_num_threads())
        found = {}
        for t in gguf.GGUFReader(out).tensors:
            values = gguf.dequantize(t.data, t.tensor_type)
            found[t.name] = torch.tensor(values), int(t.n_bytes)
        return found, out.stat().st_size


# the model, with a head of its own where that is its embeddings
def untied(model: nn.Module) -> nn.Module:
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


# put tensors of llama.cpp's names into a dense model of ours: its experts, or all
@torch.no_grad()
def put_gguf(model: nn.Module, tensors: dict, whole: bool) -> None:
    import gguf
    for l, module in dense_experts(model).items():
        gate, up, down = (tensors[f"blk.{l}.ffn_{family}_exps.weight"][0] for family in globe.FAMILIES)
        module.gate_up_proj.copy_(torch.cat([gate, up], 1))
        module.down_proj.copy_(down)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2MOE, model.config.num_hidden_layers)
    for name, p in untied(model).named_parameters():
        if whole and ".experts." not in name:
            p.copy_(tensors[names.get_name(name, (".weight", ".bias"))][0].view_as(p))


# name: (function, whether it is given L, what shares a basis)
MATRIX_PEERS = {
    "svd": (peer_svd, False, "expert"),
    "svd-llm": (peer_svd, True, "expert"),
    "layer-pca": (peer_layer_pca, True, "layer"),
    "d2": (peer_d2, True, "layer"),
    "slbf": (peer_slbf, False, "layer"),
}
# mixes of llama.cpp's; with experts in fewer bits than the rest
MIXES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ1_S:IQ2_XXS:Q4_K", "IQ1_S:IQ2_XXS:Q8_0",
         "IQ2_XXS:IQ2_XXS:Q8_0", "IQ2_S:IQ2_S:Q8_0", "Q2_K:Q2_K:Q8_0", "IQ3_XXS:IQ3_XXS:Q8_0")
CODES = (*LOW_BIT, "hqq", *map("gguf:{}".format, MIXES))
GROUPS = {"none": (), "closed": ("svd", "svd-llm", "layer-pca", "d2"), "all": (*MATRIX_PEERS, "mobe", "reap"),
          "low-bit": (*CODES, *map("{}+refit".format, CODES))}


# put what a peer makes of gate and up into a dense model; (ratio, {family: relative error})
def put_peer(model: nn.Module, name: str, asked: float, factors: dict, args: Namespace) -> tuple:
    peer, calibrated, _ = MATRIX_PEERS[name]
    sums = torch.zeros(3, 2, dtype=torch.float64)  # per family: squares of errors and weights, numbers
    stored = 0
    for l, module in dense_experts(model).items():
        weight = module.gate_up_proj.data  # (E, 2 p, d)
        W = torch.stack(weight.float().cpu().chunk(2, 1))  # (2, E, p, d)
        new, numbers = peer(W, asked, factors[l] if calibrated else None, args)
        weight.copy_(new.transpose(0, 1).flatten(1, 2))
        stored += numbers
        sums += torch.stack([(new - W).square().sum((1, 2, 3)), W.square().sum((1, 2, 3)),
                             torch.full((2,), W[0].numel())])
    errors = (sums[0] / sums[1]).sqrt().tolist()
    return stored / float(sums[2].sum()), dict(zip(PAIR, errors))


# ---- 4. quality: nats lost per token at one stored size ------------------------------------------
def quality_texts(tokenizer, count: int, files: list = ()) -> tuple:
    """({text name: windows (N, 512)}, calibration text): the rest of topics, and other texts.

    The documentation repeats itself, so parts of its windows recur in the calibration text; code has none.
    topics: tokens i * 4096 + 512 .. i * 4096 + 1024 of pydoc_data.topics, i = 0..count-1; files: more texts,
    each named by its stem. UserError: a name that is taken, a text that is calibrated on.
    """
    # of every 4096 tokens of the documentation, 512 are evaluated on and the others calibrated on
    from pydoc_data.topics import topics
    prose = "\n\n".join(topics[key] for key in sorted(topics))
    ids = torch.tensor(tokenizer(prose, add_special_tokens=False, verbose=False)["input_ids"])
    evaluated = []
    calibrated = []
    end = 0
    for begin in range(512, min(count * 4096, len(ids) - 511), 4096):
        calibrated.append(tokenizer.decode(ids[end:begin]))
        end = begin + 512
        evaluated.append(ids[begin:end])
    calibrated.append(tokenizer.decode(ids[end:]))
    windows = {"topics": torch.stack(evaluated)}

    # texts of which nothing is calibrated on
    root = Path(os.__file__).parent
    for name, parts in {"code": ("argparse.py", "tarfile.py"), "license": ("LICENSE.txt",)}.items():
        if (root / parts[0]).is_file():
            text = "".join((root / part).read_text() for part in parts)
            windows[name] = globe.token_windows(tokenizer, text, count * 512, 512)

    # calibrated on: beside the documentation, as much of the library's other texts, twice
    others = globe.builtin_text("train")[:len(prose)] + globe.builtin_text("calibration")[:len(prose)]
    calibration = "\n\n".join([*calibrated, others])
    for file in files:
        name = Path(file).stem
        expect(name not in windows, f"--text {file}: expected another name than {', '.join(windows)}")
        windows[name] = globe.token_windows(tokenizer, globe.read_text(file, "test"), count * 512, 512)
        seen = sum(tokenizer.decode(ids) in calibration for ids in windows[name][:, :64])
        expect(not seen, f"--text {file}: expected a text that is not calibrated on, found {seen} windows")
    return windows, calibration


class Quality:
    """The quality benchmark of one model: its texts, the dense model's loss on them, and the rows so far."""

    def __init__(self, preset: str, args: Namespace, scratch: Path):
        self.preset = preset
        self.args = args
        self.scratch = scratch
        self.ckpt = checkpoint_of(preset, args)
        self.config = str(CONFIGS / f"{preset.partition('-')[0]}.yaml")  # smol-moe's is smol
        self.tokenizer = globe.load_tokenizer(self.ckpt.dir)
        count = args.windows or (12 if preset == "smol-moe" else 64)
        self.windows, self.calibration = quality_texts(self.tokenizer, count, args.text)
        self.cfg = globe.load_config(self.config, args.set)

        # a hash of all that a figure depends on
        same = [self.ckpt.fingerprint(), {name: w.tolist() for name, w in self.windows.items()},
                self.calibration, dataclasses.asdict(self.cfg), args.steps, args.heal]
        self.settings = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16]
        self.rows = self.resumed() if args.resume else {}  # {(asked, variant, coded, text): row}
        self.cfg.calib.text = str(scratch / "calibration.txt")
        Path(self.cfg.calib.text).write_text(self.calibration, encoding="utf-8")
        # in float32 where this device multiplies the checkpoint's type slowly
        self.dtype = globe.compute_dtype(self.ckpt.dtype, args.device)

        self.predicted = {}  # {(text, window): what the dense model, the first, predicts}
        self.dense = self.scores(self.load())
        for text, scores in self.dense.items():
            say(f"{preset}: dense perplexity of {text} {math.exp(scores[:, 0].mean()):.2f}")

    # the rows of --json FILE and FILE.part with these settings; rows of older versions name none
    def resumed(self) -> dict:
        kept = {}
        for file in (self.args.json, f"{self.args.json}.part"):
            try:
                rows = globe.read_json(Path(file))["rows"] if Path(file).is_file() else ()
                for row in where(rows, suite="quality", preset=self.preset):
                    if row.get("settings", self.settings) == self.settings and row["text"] in self.windows:
                        key = row["asked"], row["variant"], row.get("coded", "gate+up"), row["text"]
                        kept[key] = row | {"bits": 16 * row["ratio"]}
            except (TypeError, KeyError, AttributeError):
                raise UserError(f"--resume: {file}: expected what bench.py wrote, found other text") from None
        say(f"--resume: {len(kept)} figures were measured on these texts with these settings")
        return kept

    def load(self) -> nn.Module:
        return globe.load_dense(self.ckpt.dir, self.args.device, self.dtype)

    # {text: (N, 2), of each window in nats per token: the loss, and the KL from the dense model}
    @torch.no_grad()
    def scores(self, model: nn.Module) -> dict:
        if self.args.device.type == "cpu":
            model.set_experts_implementation("eager")  # a sixth faster than grouped_mm on smol-moe
        found = {}
        for text, windows in self.windows.items():
            scores = []
            for i, ids in enumerate(windows):
                logits = model(ids[None].to(self.args.device)).logits[0, :-1]
                logp = logits.float().log_softmax(-1).cpu()  # (T - 1, vocabulary)
                dense = self.predicted.setdefault((text, i), logp.half())
                kl = F.kl_div(logp, dense.float(), reduction="batchmean", log_target=True)
                scores.append(torch.stack([F.nll_loss(logp, ids[1:]), kl]))
            found[text] = torch.stack(scores)
        return found

    # a row per text: what is lost against the dense model; size: bytes of the file, where known
    def add(self, asked: float | None, variant: str, coded: str, scores: dict, ratio: float, seconds: float,
            size: int | None = None, **more) -> None:
        D = self.ckpt.dims
        if size is None:
            numbers = (3 if coded == "experts" else 2) * len(D.layers) * D.experts * D.p * D.d
            dense = self.ckpt.dtype.itemsize
            each = 2 if re.match("rtn|gptq|hqq|gguf", variant) else dense  # the ratio of codes is to 16 bits
            size = round(self.ckpt.bytes - numbers * (dense - ratio * each))
        for text, found in scores.items():
            # paired over the windows
            each = found[:, 0] - self.dense[text][:, 0]
            delta = float(each.mean())
            se = float(each.std()) / len(each) ** 0.5 if len(each) > 1 else None
            self.rows[asked, variant, coded, text] = new_row(
                "quality", self.preset, f"{D.experts}x{D.p}", variant, delta, "nats", text=text,
                delta_nats=delta, se=se, kl=float(found[:, 1].mean()), seconds=seconds, ratio=ratio,
                bits=16 * ratio, bytes=size, saved=1 - size / self.ckpt.bytes, coded=coded, asked=asked,
                settings=self.settings, **more)
            say(f"  {variant:9s} {16 * ratio:.3f} bits {text:8s} delta {delta:+.4f} nats, {seconds:.0f} s")

    # ({layer: Cholesky factor of the inputs' second moment}, windows); a ridge of 0.1 is worse for the peers
    @cached_property
    def calibrated(self) -> tuple:
        moments = globe.calibrate(self.ckpt, self.cfg, self.args.device)
        globe.save_moments(self.scratch / "moments.safetensors", moments, self.ckpt.fingerprint())
        ridge = globe.FitConfig().ridge
        factors = {l: globe.metric_factor(C, ridge) for l, C in moments["inputs"].items()}
        return factors, moments["windows"][0]

    # {layer: (1 or E, d, d)} second moments: of the layer's inputs, and of each expert's own
    @cached_property
    def hessians(self) -> dict:
        D = self.ckpt.dims
        factors, windows = self.calibrated
        layer = {l: (L @ L.T)[None] for l, L in factors.items()}
        # experts that see all tokens have the layer's
        if D.top_k == D.experts:
            return {"layer": layer}
        # as if d of the layer's tokens had come to each: few of its own say little
        model = self.load()
        modules = dense_experts(model)
        sums = {module: D.d * layer[l].repeat(D.experts, 1, 1) for l, module in modules.items()}

        def note(module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> None:
            x = (x / x.square().mean().sqrt()).float().cpu()
            for e in range(D.experts):
                mine = x[(index == e).any(1)]
                sums[module][e] += mine.T @ mine
        with watching(list(sums), note):
            globe.nll(model, windows)
        for H in sums.values():
            size = H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
            H += globe.FitConfig().ridge * size * torch.eye(D.d)
        return {"layer": layer, "expert": {l: sums[module] for l, module in modules.items()}}

    @cached_property
    def llama(self) -> LlamaCpp:
        return LlamaCpp(self.ckpt, self.calibrated[1], self.scratch)

    # one method at one size; of several ways that it may be done in, the one that loses least
    def measure(self, asked: float | None, variant: str, coded: str) -> None:
        assert self.calibrated  # writes the moments; their time is nobody's own
        if variant in ("globe", "globe+heal"):
            self.fitted(asked, variant, coded, "--config", self.config, *self.args.set, "calib.save=null",
                        f"calib.load={self.scratch}/moments.safetensors")
        elif variant == "mobe":  # its own form, r fitted to the size instead of r = p; data-free
            self.fitted(asked, variant, coded, "--config", CONFIGS / "mobe.yaml",
                        f"fit.steps={self.args.steps or 3000}")
        else:
            tried = []
            begin = time.perf_counter()
            for model, ratio, about in self.models(asked, variant, coded):
                about |= {"seconds": time.perf_counter() - begin, "ratio": ratio}
                tried.append((self.scores(model), {"scope": "expert"} | about))
                begin = time.perf_counter()
            if tried:
                scores, about = min(tried, key=lambda way: float(way[0]["topics"][:, 0].mean()))
                self.add(asked, variant, coded, scores, **about)

    # (model, stored / dense size, more of its rows) of each way that a peer may do it in, if it can
    def models(self, asked: float | None, variant: str, coded: str) -> Iterator[tuple]:
        D = self.ckpt.dims
        factors, windows = self.calibrated
        name, _, refit = variant.partition("+")
        if name in MATRIX_PEERS:
            model = self.load()
            ratio, errors = put_peer(model, name, asked, factors, self.args)
            yield model, ratio, {"rel_frob": errors, "scope": MATRIX_PEERS[name][2]}
        elif name == "reap":
            model = self.load()
            if self.preset == "tiny":  # smol-moe has no routing to prune by
                yield model, prune(model, asked, windows), {}
        elif coded == "gate+up":
            for new, ratio, about in self.codes(name, asked):
                factors = self.exact(new)
                if refit:  # our own refinement of down
                    self.cfg.fit.refine = 0
                    globe.refine(self.ckpt, factors, windows, self.cfg, self.args.device)
                yield globe.assemble(self.ckpt, factors, self.args.device, self.dtype, CACHED), ratio, about
        else:  # all experts, or the whole file, in types of llama.cpp's
            model = self.load()
            tensors, size = self.llama.tensors(name.removeprefix("gguf:"))
            put_gguf(model, tensors, coded == "file")
            if coded == "file":
                yield model, size / (2 * self.ckpt.num_parameters()), {"size": size}
                return
            stored = sum(size for name, (_, size) in tensors.items() if "_exps." in name)
            yield model, stored / (2 * 3 * len(D.layers) * D.experts * D.p * D.d), {}

    # ({family: {l: (E, p, d)}}, stored / dense size, more of its rows) of each way of a code
    def codes(self, name: str, asked: float | None) -> Iterator[tuple]:
        D = self.ckpt.dims

        def dense(family: str, l: int) -> Tensor:
            return torch.stack([self.ckpt.expert(family, l, e).float() for e in range(D.experts)])

        # make(family, l) gives matrices and their bytes
        def pair(make: Callable, about: dict) -> tuple:
            new = {family: {} for family in PAIR}
            stored = 0
            for family, l in itertools.product(PAIR, D.layers):
                new[family][l], size = make(family, l)
                stored += size
            return new, stored / (2 * 2 * len(D.layers) * D.experts * D.p * D.d), about
        if name.startswith("gguf:"):
            tensors, _ = self.llama.tensors(name.removeprefix("gguf:"))
            yield pair(lambda family, l: tensors[f"blk.{l}.ffn_{family}_exps.weight"], {})
        elif name == "hqq":
            size = hqq_size(16 * asked, D.d)
            for axis in (0, 1) if size else ():
                yield pair(lambda family, l, axis=axis: hqq(dense(family, l), *size, axis),
                           {"group": size[1], "axis": axis})
        else:
            feedback, group = LOW_BIT[name]
            group = min(group, D.d)
            # the most bits that fit, scales and zeros too
            fits = [bits for bits in range(2, 9) if bits + (16 + bits) / group <= 16 * asked]
            metrics = self.hessians if feedback else {"none": {}}
            for which, H in metrics.items() if fits else ():
                yield pair(lambda family, l, H=H: gptq(dense(family, l), H.get(l), fits[-1], group),
                           {"hessian": which})

    # factors that stand for these matrices {family: {l: (E, p, d)}} exactly: one basis, the identity
    def exact(self, new: dict) -> globe.Factors:
        D = self.ckpt.dims
        idx = {l: torch.zeros(D.experts, 1, dtype=torch.int32) for l in D.layers}
        val = {l: torch.ones(D.experts, 1) for l in D.layers}
        bank = [torch.eye(D.d)[None]]
        group = dict.fromkeys(D.layers, 0)
        families = {f: globe.FamilyFactors(bank, A, idx, val, group, "identity") for f, A in new.items()}
        experts = {l: list(range(D.experts)) for l in D.layers}
        return globe.Factors(families, experts, D, self.ckpt.config["model_type"], self.ckpt.fingerprint())

    # GloBE, or MoBE by GloBE's fit; globe+heal: rows of both
    def fitted(self, asked: float, variant: str, coded: str, *settings: object) -> None:
        device = ("--device", self.args.device)
        size = (f"bank.ratio={asked}", "bank.r=null")
        if coded == "file":
            size = (f"bank.memory={asked}", "model.families=all")
        elif 16 * asked in self.args.bits:
            size = (f"bank.bits={16 * asked}",)
        fit = run_globe("fit", *settings, "--out", self.scratch / f"{variant}-{asked}", *device,
                        f"model.path={self.ckpt.dir}", *size)
        self.add_run(asked, variant.removesuffix("+heal"), coded, fit, fit["factors"], fit["seconds"])
        if variant == "globe+heal":
            # in a process of its own; the JSON is the last line of stdout
            command = [sys.executable, HERE / "train.py", "heal", "--factors", fit["factors"], *device,
                       "--out", self.scratch / f"heal-{asked}", f"calib.text={self.cfg.calib.text}",
                       "calib.sampled=0", *filter(re.compile(r"heal\.").match, self.args.set)]
            done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
            expect(done.returncode == 0, f"train.py heal: expected exit code 0, found {done.returncode}")
            healed = json.loads(done.stdout.splitlines()[-1])
            seconds = fit["seconds"] + healed["seconds"]
            self.add_run(asked, variant, coded, fit, healed["factors"], seconds)

    # factors that come from this fit; the file is what an export writes
    def add_run(self, asked: float, variant: str, coded: str, fit: dict, path: str, seconds: float) -> None:
        factors = globe.load_factors(path)
        errors = {family: e["all"] for family, e in globe.reconstruction(self.ckpt, factors).items()}
        scores = self.scores(globe.assemble(self.ckpt, factors, self.args.device, self.dtype, CACHED))
        size = run_globe("export", "--factors", path, "--to", self.scratch / "export", "--overwrite",
                         "--no-check")["bytes"]
        ratio = factors.ratio()
        if coded == "file":
            ratio = size / (2 * self.ckpt.num_parameters())
        self.add(asked, variant, coded, scores, ratio, seconds, size, rel_frob=errors, support=fit["support"],
                 scope=factors.config["bank"]["scope"], metric=factors.config["fit"]["metric"])

    # {peer: what it wants and does not find}
    def missing(self) -> dict:
        D = self.ckpt.dims
        wants = {}
        if not importlib.util.find_spec("hqq"):
            wants["hqq"] = "the package is not installed: pip install hqq"
        if not os.environ.get("LLAMA_CPP"):
            wants["gguf"] = "LLAMA_CPP names no built source tree of llama.cpp"
        elif not importlib.util.find_spec("gguf"):
            wants["gguf"] = "the package is not installed: pip install gguf"
        elif D.d % 256 or D.p % 256:
            wants["gguf"] = f"experts of {D.p} x {D.d} do not fit its blocks of 256"
        return wants

    # [(asked, variant, coded)]: 16-bit peers by ratio, codes by bits; llama.cpp's have sizes of their own
    def plan(self) -> list:
        args = self.args
        ours = {2: "gate+up", 3: "experts"}[len(globe.families_of(self.cfg.model))]
        variants = list(itertools.chain.from_iterable(GROUPS.get(name, (name,)) for name in args.peers))
        for peer, why in self.missing().items():
            some = [variant for variant in variants if not re.match(peer, variant)]
            if len(some) < len(variants):
                say(f"{self.preset}: no rows of {peer}: {why}")
            variants = some
        coded = [bits / 16 for bits in args.bits]
        todo = []
        for variant in variants:
            plain = "+refit" not in variant  # the refit leaves down in 16 bits
            if variant.startswith("gguf:"):
                # a mix has the gates and ups of its first type
                if args.bits and (plain if ours == "experts" else variant.count(":") == 1):
                    todo.append((None, variant, ours))
                if args.bytes and plain:
                    todo.append((None, variant, "file"))
            elif variant in GROUPS["low-bit"]:
                todo += itertools.product(coded, [variant], ["gate+up"])
            else:
                todo += itertools.product(args.ratio, [variant], ["gate+up"])
        name = "globe" + "+heal" * args.heal  # a row of each
        todo += itertools.product([*args.ratio, *coded], [name], [ours])
        return [*todo, *itertools.product(args.bytes, [name], ["file"])]


# Nats lost by GloBE and its peers at the same stored sizes, calibration and texts
def bench_quality(preset: str, args: Namespace) -> list:
    with tempfile.TemporaryDirectory() as scratch:
        job = Quality(preset, args, Path(scratch))
        todo = [key for key in job.plan() if not all((*key, text) in job.rows for text in job.windows)]
        with globe.threads_for(job.ckpt.dims.p, job.ckpt.dims.d):
            for key in todo:
                job.measure(*key)
                if args.json:  # what is measured so far
                    part = json.dumps({"rows": list(job.rows.values())})
                    globe.write_text(Path(f"{args.json}.part"), part)

    # one line per method and size, a column per text; se and kl are the first one's
    rows = sorted(job.rows.values(), key=lambda row: (row["coded"], -row["bits"]))
    lines = {}
    for row in rows:
        line = lines.setdefault((row["asked"], row["variant"], row["coded"]), dict(row))
        line[row["text"]] = row["delta_nats"]
    keys = ("coded", "variant", "bits", "bytes", "saved", *job.windows, "se", "kl", "seconds")
    show(list(lines.values()), *keys)
    if args.png:
        several = len(args.preset or ()) > 1
        path = args.png.with_stem(f"{args.png.stem}-{preset}") if several else args.png
        plot_quality(where(rows, text="topics"), path)
    return rows


# a variant's name in the legend: llama.cpp's own mixes are one peer, mixes of the user's another
def peer_of(variant: str) -> str:
    mix, refit, _ = variant.partition("+refit")
    name, *kinds = mix.split(":")
    return name + " mixes" * (len(kinds) > 1) + refit


# delta_nats against bits and bytes as PNG, a row of panels per kind of `coded`; hollow: with our refit
def plot_quality(rows: list, path: Path) -> None:
    from matplotlib.figure import Figure
    kinds = list(dict.fromkeys(row["coded"] for row in rows))
    peers = sorted({peer_of(row["variant"]) for row in rows}, key=lambda peer: (peer[:5] != "globe", peer))
    looks = {"globe": {"fmt": "ko-", "zorder": 3}, "globe+heal": {"fmt": "k*--", "zorder": 3}}
    for peer in peers:
        n = len(looks) // 2 - 1
        base = peer.removesuffix("+refit")
        if base not in looks:
            looks[base] = {"fmt": "sv^<>DPX*"[n % 9], "color": f"C{n}", "alpha": 0.8}
            looks[f"{base}+refit"] = looks[base] | {"markerfacecolor": "white"}
    fig = Figure(figsize=(13, 4.6 * len(kinds)), layout="constrained")
    grid = fig.subplots(len(kinds), 2, squeeze=False, sharey="row")
    for (left, right), kind in zip(grid, kinds):
        left.set(xlabel="stored bits per dense weight coded", ylabel="nats lost per token")
        right.set(xlabel="bytes of the whole file, MB")
        for ax, key, unit in ((left, "bits", 1), (right, "bytes", 1e6)):
            for peer in peers:
                mine = [row for row in where(rows, coded=kind) if peer_of(row["variant"]) == peer]
                ax.errorbar([row[key] / unit for row in mine], [row["delta_nats"] for row in mine],
                            [row["se"] or 0.0 for row in mine], label=peer, capsize=2, lw=1, **looks[peer])

                # a mix of llama.cpp's is known by its types: above its own ones, below the others
                side = -1 if "mixes" in peer else 1
                for row in mine if "refit" not in peer else ():
                    types = row["variant"].partition(":")[2]
                    ax.annotate(types, (row[key] / unit, row["delta_nats"]), (3, 7 * side), fontsize=7,
                                rotation=65 * side, textcoords="offset points", rotation_mode="anchor",
                                va="center")
            # below the smallest standard error linear, so that 0 has a place
            ax.set_yscale("symlog", linthresh=0.002)
            ax.set(title=f"{rows[0]['preset']}, {rows[0]['text']}, coded: {kind}")
            ax.margins(0.15)
            ax.grid(alpha=0.3)
    fig.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper")
    with globe.written(path) as tmp:
        fig.savefig(tmp, dpi=120, format="png")


# ---- 5. Operators at Qwen1.5-MoE-A2.7B's shapes: compose, sparsemax, one token of decode ---------
D, P, M, S, E, TOP_K = 2048, 1408, 128, 12, 60, 4  # d, p; a bank of 128 bases, supports of 12; experts, top-k
DENSE = ("eager", "grouped_mm", "batched_mm")      # transformers' ways to run experts; the best is the peer


def race(suite: str, test: str, variants: dict, want: tuple | Tensor, traffic: float, args: Namespace,
         tolerance: float = 0.2, gradients: bool = False, **more) -> list:
    """Rows of one operator: each variant's result for turn 0 is checked against `want`, then all are timed.

    variants: {name: function of the turn, an index, so that no input is still in a cache}; "native" is ours,
    "twin" our torch form, the others are peers. traffic: bytes that must move. `value` is milliseconds.
    """
    seconds = {name: [] for name in variants}
    with torch.set_grad_enabled(gradients):
        # right first, then fast
        for name, run in variants.items():
            for got, wanted in zip(run(0), want):
                error = float((got.detach().double() - wanted.detach().double()).abs().max())
                if not error <= tolerance:
                    raise RuntimeError(f"{suite} {test}: {name} is off by {error}, more than {tolerance}")

        # turn by turn, so that a slow spell hits all; the first third is not counted
        for turn, (name, run) in itertools.product(range(3 * args.repeats), variants.items()):
            seconds[name].append(timed(partial(run, turn), args.device))
    middle = {name: statistics.median(s[args.repeats:]) for name, s in seconds.items()}

    # beside the best peer's, and what the machine can move
    peers = middle.keys() - {"native", "twin"}
    best = min(map(middle.get, peers), default=None)
    top = bandwidth(args.device)
    rows = []
    for name, s in middle.items():
        rows.append(new_row(suite, None, test, name, 1e3 * s, "ms", ratio=times(best, s), bytes=int(traffic),
                            gbps=traffic / s / 1e9, share_of_bandwidth=traffic / s / top, **more))
    show(rows, "test", "variant", "value", "unit", "ratio", "gbps", "share_of_bandwidth")
    return rows


# One pass over 60 experts, and one expert (a cache miss), against torch's best ways; silu
def bench_compose(preset: None, args: Namespace, r: int = 768) -> list:
    need_native("compose", args.device)
    g = torch.Generator().manual_seed(0)
    bank = torch.empty(M, r, D, dtype=args.dtype, device=args.device)
    for b in bank:
        b.copy_(torch.randn(r, D, generator=g))
    idx = torch.stack([torch.randperm(M, generator=g)[:S] for _ in range(E)]).to(args.device)  # (E, s)
    val = torch.rand(E, S, generator=g).to(args.device)  # (E, s)
    mixtures = torch.zeros(E, M, device=args.device).scatter_(1, idx, val)
    picks = list(zip(idx.tolist(), val.tolist()))
    out = torch.empty(E, r, D, dtype=bank.dtype, device=args.device)

    # dense mixtures as one product: in float32, in pieces, where products of the dtype are slow
    slow = globe.slow_products(bank.dtype, args.device.type)
    step, wide = (32, torch.float32) if slow else (r, bank.dtype)

    def product(part: slice) -> None:
        for a in range(0, r, step):
            z = torch.mm(mixtures[part].to(wide), bank[:, a:a + step].reshape(M, -1).to(wide))
            target = out[part, a:a + step]
            torch.ops.aten.silu.out(z.to(out.dtype).view(target.shape), out=target)

    def adds(part: slice) -> None:
        for target, (bases, alphas) in zip(out[part], picks[part]):
            z = bank[bases[0]] * alphas[0]
            for j, alpha in zip(bases[1:], alphas[1:]):
                z.add_(bank[j], alpha=alpha)
            torch.ops.aten.silu.out(z, out=target)

    def native(part: slice) -> None:
        globe.compose(bank, idx[part], val[part], "silu", out=out[part])

    # n experts from the turn's place on
    def result(way: Callable, n: int, turn: int) -> Tensor:
        start = turn % (E - n + 1)
        way(slice(start, start + n))
        return out[:1]
    want = F.silu(torch.einsum("s,srd->rd", val[0], bank[idx[0]].float()))[None]
    rows = []
    for n, test, bases in ((E, "60 experts", len(idx.unique())), (1, "1 expert", S)):
        variants = {"native": partial(result, native, n), "dense product": partial(result, product, n),
                    "scaled adds": partial(result, adds, n)}
        # what must move: each used base once and each result once
        traffic = (bases + n) * out[0].nbytes
        rows += race("compose", f"{test}, r {r}", variants, want, traffic, args, dtype=str(bank.dtype))
    return rows


# sparsemax and entmax-1.5, forward and backward, against the `entmax` package and our torch form
def bench_sparsemax(preset: None, args: Namespace) -> list:
    need_native("simplex", args.device)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1440, 128, generator=g).to(args.device)
    grad = torch.randn(1440, 128, generator=g).to(args.device)
    peer = importlib.util.find_spec("entmax") and importlib.import_module("entmax")
    if not peer:
        say("sparsemax: the peer is the package entmax, which is not installed: no ratio")

    # result and gradient of f over the last dim
    def both(f: Callable, x: Tensor, turn: int = 0) -> tuple:
        leaf = x.detach().requires_grad_()
        y = f(leaf)
        y.backward(grad)
        return y, leaf.grad
    rows = []
    for name, alpha in (("sparsemax", 2.0), ("entmax15", 1.5)):
        maps = {"native": getattr(globe, name),
                "twin": lambda leaf, alpha=alpha: globe.SimplexMap.apply(leaf, alpha, False)[0]}
        if peer:
            maps["entmax"] = partial(getattr(peer, name), dim=-1)
        variants = {variant: partial(both, f, x) for variant, f in maps.items()}
        want = both(maps["twin"], x.double())
        rows += race("sparsemax", f"{name} {tuple(x.shape)}", variants, want, 5 * x.nbytes, args, 1e-4, True)
    return rows


# One token through one Qwen1.5-MoE layer, all cached: experts_decode against transformers' experts
@torch.no_grad()
def bench_one_token(args: Namespace, r: int = 768) -> list:
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts
    need_native("experts_decode", args.device)
    g = torch.Generator().manual_seed(0)

    # Gaussian numbers that keep a vector's length
    def new(*shape: int) -> Tensor:
        parts = [torch.randn(shape[1:], generator=g) / shape[-1] ** 0.5 for _ in range(shape[0])]
        return torch.stack(parts).to(args.device, args.dtype)
    with torch.device("meta"):
        dense = Qwen2MoeExperts(Qwen2MoeConfig(hidden_size=D, moe_intermediate_size=P, num_experts=E))
    dense = dense.to(args.dtype).to_empty(device=args.device)
    dense.down_proj.copy_(new(E, D, P))
    A = [new(E, P, r), new(E, P, r)]  # of gate and up
    X = [new(E, r, D), new(E, r, D)]

    # the peers hold the same weights, multiplied out (in float32: half types' products can take minutes)
    for e, i in itertools.product(range(E), range(2)):
        dense.gate_up_proj[e, i * P:(i + 1) * P] = A[i][e].float() @ X[i][e].float()
    x = torch.randn(1, D, generator=g).to(args.device, args.dtype)
    index = [torch.randperm(E, generator=g)[None, :TOP_K].to(args.device) for _ in range(3 * args.repeats)]
    weights = torch.full((1, TOP_K), 0.25, device=args.device)

    # ours: every expert in its slot, down dense
    table = torch.arange(E, device=args.device)
    operands = (X[0], A[0], X[1], A[1], dense.down_proj, None)

    def native(turn: int) -> Tensor:
        return torch.ops.globe.experts_decode(x, index[turn], weights, table, table, *operands,
                                              [1, 1, 0], [1.0] * 3, [0.0] * 3, "silu")

    def stock(how: str, turn: int) -> Tensor:
        dense.config._experts_implementation = how
        return dense(x, index[turn], weights.to(x.dtype))
    variants = {"native": native} | {how: partial(stock, how) for how in DENSE}
    traffic = TOP_K * (2 * r * D + 2 * P * r + D * P) * x.element_size()
    rows = race("decode", f"one token, r {r}", variants, stock("eager", 0), traffic, args, 0.05,
                dtype=str(args.dtype))
    return [row | {"preset": "qwen15-layer"} for row in rows]


# ---- 6. decode: whole models ---------------------------------------------------------------------
HELD = 0.25    # of the experts that the caches of `warm` and `cold` hold
DECODE_KEYS = ("test", "variant", "implementation", "value", "unit", "ratio", "gbps", "share_of_bandwidth",
               "peak_gib", "weights_gib", "cache_mib", "hit_rate", "resident_over_file")


# seconds from a prompt ids (1, n) to its first new token
@torch.no_grad()
def prefill(model: nn.Module, ids: Tensor, device: torch.device) -> float:
    return timed(lambda: int(model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax()), device)


# seconds for a text's tokens after its first 8, one at a time: real text, the same for every model
@torch.no_grad()
def decode(model: nn.Module, ids: Tensor, device: torch.device) -> float:
    past = model(ids[:, :8], use_cache=True, logits_to_keep=1).past_key_values

    def run() -> None:
        for token in ids[:, 8:].split(1, 1):
            int(model(token, past_key_values=past, use_cache=True).logits[0, -1].argmax())
    return timed(run, device)


# count hits and misses afresh; forget: with empty caches
def start_counts(model: nn.Module, forget: bool = False) -> None:
    for module in globe.globe_modules(model):
        module.cache.count()
        if forget:
            module.cache.forget()


# what the caches hold, how often an expert was found in them, and GiB of all tensors
def cache_figures(model: nn.Module) -> dict:
    stats = globe.cache_stats(model)
    tensors = {t.data_ptr(): t.nbytes for t in itertools.chain(model.parameters(), model.buffers())}
    gib = sum(tensors.values()) / 2 ** 30 + stats["cache_mib"] / 1024
    hit_rate = stats["hit_rate"] if globe.globe_modules(model) else None
    return {"cache_mib": stats["cache_mib"], "hit_rate": hit_rate, "weights_gib": gib}


# seconds that the experts and the shared expert of the first layer take for tokens (1, n), `at_once` together
@torch.no_grad()
def run_experts(model: nn.Module, ids: Tensor, at_once: int, device: torch.device) -> float:
    layer = model.model.layers[0]
    x = layer.post_attention_layernorm(model.model.embed_tokens(ids))

    def run() -> None:
        for part in x.split(at_once, 1):
            layer.mlp(part)
    return timed(run, device)


# bytes that one token reads of a model or a part of it: of experts those that it goes to, of embeddings none
def bytes_read(model: nn.Module) -> float:
    total = 0.0
    for part in model.modules():
        held = sum(t.nbytes for t in (*part.parameters(False), *part.buffers(False)))
        if isinstance(part, globe.GlobeExperts):
            total += globe_experts_read(part, held)
        elif hasattr(part, "gate_up_proj"):
            total += held * part.config.num_experts_per_tok / part.num_experts
        elif isinstance(part, globe.GlobeCoded) and part._tied[0]:
            total += part._tied[0].weight.nbytes + part._tied[0].weight_scale.nbytes
        elif not isinstance(part, (nn.Embedding, globe.GlobeBank)) and not getattr(part, "embeds", False):
            total += held
    return total


# the same of a layer's GlobeExperts, which hold so many bytes; the shared expert's slices are always read
def globe_experts_read(part: nn.Module, held: int) -> float:
    slices = sum(e >= part.num_experts for e in part.fitted)
    total = held * (part.top_k + slices) / (part.num_experts + slices)
    if part.cache.slots and "code" not in next(iter(part.families.values())):
        total += (part.top_k + slices) * part.item_bytes()
    bases = {}
    for f, about in part.families.items():
        if "code" in about:
            bases |= {t.data_ptr(): t.nbytes for t in part._code_basis(f)}
        elif not part.cache.slots:
            bank = part._bank_of(f)
            bases[bank.data_ptr()] = bank.nbytes * min(1, part.top_k * about["s"] / about["m"])
    return total + sum(bases.values())


# Rows of pp and tg, and of a layer's experts alone, for {(variant, how): function that makes a model}: memory
# one by one, then speed
def speed_rows(make: dict, text: Tensor, args: Namespace, preset: str) -> list:
    prompt, line, steps = text[:, :args.prefill], text[:, :8 + args.tokens], min(64, args.prefill)
    runs = {  # test: (tokens, seconds of a model)
        f"pp{args.prefill}": (args.prefill, lambda model: prefill(model, prompt, args.device)),
        f"tg{args.tokens}": (args.tokens, lambda model: decode(model, line, args.device)),
        f"experts pp{args.prefill}": (
            args.prefill, lambda model: run_experts(model, prompt, args.prefill, args.device)),
        "experts tg": (steps, lambda model: run_experts(model, prompt[:, :steps], 1, args.device))}

    # a model alone in memory, run once
    peak = {}
    for key, load in make.items():
        gc.collect()
        globe.reset_peak(args.device)
        model = load()
        for _, run in runs.values():
            run(model)
        peak[key] = globe.peak_gib(args.device)
        model = None

    # turn by turn; the first one is not counted
    models = {key: load() for key, load in make.items()}
    top = bandwidth(args.device)
    rows = []
    for test, (tokens, run) in runs.items():
        speeds = {key: [] for key in models}
        for _, (key, model) in itertools.product(range(1 + args.repeats), models.items()):
            start_counts(model, forget=key[1] == "cold")
            speeds[key].append(tokens / run(model))
        mine = []
        for (variant, how), model in models.items():
            counted = speeds[variant, how][1:]
            row = new_row(
                "decode", preset, test, variant, statistics.median(counted), "tokens/s", implementation=how,
                cache=how if variant == "globe" else None, spread=statistics.pstdev(counted),
                peak_gib=peak[variant, how], **cache_figures(model))
            if "tg" in test:
                if "experts" in test:
                    model = model.model.layers[0].mlp
                row |= moved(bytes_read(model), row, top)
            mine.append(row)
        rows += beside_best(mine)
    return rows


# what a row's tokens/s move, of so many bytes a token, and its share of what the machine moves
def moved(read: float, row: dict, top: float) -> dict:
    rate = read * row["value"]
    return {"bytes_per_token": int(read), "gbps": rate / 1e9, "share_of_bandwidth": rate / top}


# seconds to load an export, and what this process then holds of it, over the bytes of its file
def load_figures(folder: Path) -> dict:
    before = own_memory(os.getpid(), "VmRSS")
    begin = time.perf_counter()
    model = globe.load(folder)
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        model(torch.ones(1, 1, dtype=torch.long))
    held = own_memory(os.getpid(), "VmRSS") - before
    return {"value": seconds, "resident_over_file": held / (globe.weight_bytes(folder) / 2 ** 30)}


# Rows of llama-bench on the model of a directory in llama.cpp's types, its layers so many times
def llama_rows(directory: Path, layers: int, scratch: Path, args: Namespace, preset: str) -> list:
    import gguf
    llama = LlamaCpp(None, None, scratch)
    source = llama.converted(directory)
    threads = torch.get_num_threads()
    top = bandwidth(args.device)
    rows = []
    for kind in ("Q8_0", "Q4_K_M", "Q3_K_M", "Q2_K"):
        one, out = scratch / f"one-{kind}.gguf", scratch / f"{kind}.gguf"
        llama.run("build/bin/llama-quantize", source, one, kind, threads)
        repeat_layer(one, out, layers)
        read = 0
        for t in gguf.GGUFReader(out).tensors:
            part = TOP_K / E if "_exps" in t.name else "token_embd" not in t.name
            read += int(t.n_bytes) * part
        said = llama.run("build/bin/llama-bench", "-m", out, "-t", threads, "-n", args.tokens, "-o", "json",
                         "-r", args.repeats, "-p", args.prefill * (layers > 1))  # a last layer: of one token
        for found in json.loads(said):
            test = f"tg{args.tokens}" if found["n_gen"] else f"pp{args.prefill}"
            row = new_row("decode", preset, test, "llama.cpp", found["avg_ts"], "tokens/s",
                          implementation=kind, spread=found["stddev_ts"],
                          weights_gib=found["model_size"] / 2 ** 30)
            if found["n_gen"]:
                row |= moved(read, row, top)
            rows.append(row)
        out.unlink()
    return rows


# a GGUF of one layer, with that layer so many times
def repeat_layer(one: Path, to: Path, layers: int) -> None:
    import gguf
    reader = gguf.GGUFReader(one)
    writer = gguf.GGUFWriter(to, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value = field.contents()
            if name.endswith(".block_count"):
                value = layers
            writer.add_key_value(name, value, *field.types[:2])
    for t in reader.tensors:
        for l in range(layers if t.name.startswith("blk.0.") else 1):
            writer.add_tensor(t.name.replace("blk.0.", f"blk.{l}."), t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# the rows with their ratio to the best of the dense ways
def beside_best(rows: list) -> list:
    best = max((row["value"] or 0.0 for row in where(rows, variant="dense")), default=None)
    for row in rows:
        row["ratio"] = times(row["value"], best)
    return rows


# Tokens/s of prompt (pp) and decode (tg): dense in each of its ways, and GloBE. `cache` holds all experts; a
# quarter (warm: those of a calibration text, cold: none at first); or direct: nothing is composed. In packed
# codes: bits-X
def bench_decode(preset: str, args: Namespace) -> list:
    if preset == "qwen15":
        return bench_24gib(args)
    rows = bench_one_token(args) if preset == "qwen15-layer" else []
    with tempfile.TemporaryDirectory(dir=globe.user_cache()) as folder:
        folder = Path(folder)
        text, calibration = decode_models(preset, folder, args)
        make = {}
        if preset != "qwen15-24":  # of which neither fits beside others
            make = sixteen_bit_models(preset, folder, calibration, args)
        for bits in args.bits:
            # experts that are not decoded take no slots
            load = partial(globe.load, folder / f"bits-{bits:g}", args.device, args.dtype)
            make[f"bits-{bits:g}", "codes"] = load
        models = speed_rows(make, text, args, preset)
        for bits in args.bits:
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                figures = pool.submit(load_figures, folder / f"bits-{bits:g}").result()
            models.append(new_row("decode", preset, "load", f"bits-{bits:g}", unit="s", **figures))
        if args.bits and preset in LAYERS and os.environ.get("LLAMA_CPP"):
            models += llama_rows(folder / "dense", LAYERS[preset], folder, args, preset)
    show(models, *DECODE_KEYS)
    return rows + models


# {(variant, how): function that makes a model} of the dense one and of 16-bit factors
def sixteen_bit_models(preset: str, folder: Path, calibration: Tensor, args: Namespace) -> dict:
    experts = globe.dims_of(globe.read_json(folder / "dense" / "config.json")).experts

    def dense(how: str) -> nn.Module:
        model = globe.load_dense(folder / "dense", args.device, args.dtype)
        model.set_experts_implementation(how)
        return model

    def warmed(**cache) -> nn.Module:
        model = globe.load(folder / "globe", args.device, args.dtype, globe.CacheConfig(**cache))
        globe.warm(model, calibration)
        return model
    # batched_mm copies the weights of a token's experts
    ways = DENSE[:2] if preset == "qwen15-layer" else DENSE
    make = {("dense", how): partial(dense, how) for how in ways}
    quarter = {"per_layer": max(1, int(HELD * experts))}
    caches = {"all": {"mode": "all"}, "warm": quarter, "cold": quarter, "direct": {"mode": "direct"}}
    if args.sweep:
        for i in range(9):
            slots = max(1, experts * i // 8)
            caches[f"{slots} slots"] = {"per_layer": slots}
    for how, cache in caches.items():
        make["globe", how] = partial(warmed, **cache)
    return make


# write to/dense, to/globe and to/bits-X, in one dtype; the text to measure on and the one that fills caches,
# (1, n). qwen15-24 has one dense layer, for llama.cpp, and no globe
def decode_models(preset: str, to: Path, args: Namespace) -> tuple:
    source = checkpoint_of("mid" if preset == "mid" else "tiny", args)
    if preset in LAYERS:
        fractions = popularity(source)
        write_qwen15(to / "dense", "published", fractions, 1, 4096)
        globe.load_tokenizer(source.dir).save_pretrained(to / "dense")
        if preset == "qwen15-layer":
            write_qwen15(to / "globe", "globe", fractions, 1, 4096, globe.load_config(QWEN15, args.set))
        for bits in args.bits:
            write_qwen15(to / f"bits-{bits:g}", "codes", fractions, LAYERS[preset], 4096, bits=bits)
        return as_words("heldout", 2048, 4096).to(args.device), as_words("calibration", 512, 4096)
    settings = {"globe": ["fit.steps=10"]}
    for bits in args.bits:
        settings[f"bits-{bits:g}"] = [f"bank.bits={bits}", "model.families=all", "rest.bits=8"]
    for name, own in settings.items():
        fit = run_globe("fit", "--out", to / f"run-{name}", f"model.path={source.dir}", *own, *args.set)
        run_globe("export", "--factors", fit["factors"], "--to", to / name, "--no-check",
                  "--dtype", str(args.dtype).removeprefix("torch."))
    globe.load_dense(source.dir, args.device, args.dtype).save_pretrained(to / "dense")
    return tiny_words(source, "heldout", 2048).to(args.device), tiny_words(source, "calibration", 512)


# (1, n) ids of a built-in text
def tiny_words(ckpt: Checkpoint, split: str, n: int) -> Tensor:
    return globe.token_windows(globe.load_tokenizer(ckpt.dir), globe.builtin_text(split), n, n)


# ---- 7. Qwen1.5-MoE's shapes with random weights -------------------------------------------------
BLOCK = 2 ** 24  # random numbers that all tensors are cut from
VOCAB = 151936
LAYERS = {"qwen15-layer": 1, "qwen15-24": 24}
QWEN15 = str(CONFIGS / "qwen15_16bit.yaml")
SCALES = {"shared_expert": 0.01, "globe_bank": 1.0, "_A": 0.004, "": 0.02}  # by what is in a tensor's name


# (E,) fractions of the routed tokens by rank: tiny's, its layers' mean, stretched from its experts to Qwen's
def popularity(ckpt: Checkpoint) -> Tensor:
    model = globe.load_dense(ckpt.dir, CPU, None)
    counts = torch.zeros(ckpt.dims.experts, dtype=torch.float64)

    def note(module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> None:
        chosen = torch.bincount(index.flatten(), minlength=len(counts))
        counts.add_(chosen.double().sort(descending=True).values)
    with torch.no_grad(), watching(list(dense_experts(model).values()), note):
        model(tiny_words(ckpt, "calibration", 512))
    curve = F.interpolate((counts / counts.sum())[None, None], E, mode="linear")[0, 0]
    return curve / curve.sum()


# (E,) biases with which the top 4 of z + bias, logits z (n, E), hit the experts in these fractions
def router_bias(fractions: Tensor, z: Tensor) -> Tensor:
    bias = torch.zeros(len(fractions))
    for step in range(300):
        hits = torch.bincount((z + bias).topk(TOP_K).indices.flatten(), minlength=len(fractions)) + 1.0
        bias += 0.3 * 0.99 ** step * z.std() * (fractions / (hits / hits.sum())).log().float()
    return bias


# (1, n) ids of a real text's words, for a model with no tokenizer: a word's hash, so that frequent ones recur
def as_words(split: str, n: int, vocab: int) -> Tensor:
    words = re.findall(r"\w+|[^\w\s]", globe.builtin_text(split))[:n]
    return torch.tensor([[zlib.crc32(word.encode()) % vocab for word in words]])


class RandomWeights:
    """Random tensors by name, the same in every layout; a text's tokens hit the experts in `fractions`.

    Coordinate 0 of every embedding is large, so it stays nearly constant behind the norms, and the router's
    column 0 acts as a bias.
    """

    def __init__(self, vocab: int, fractions: Tensor):
        self.fractions = fractions
        self.block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.embed = self.block.repeat(vocab * D // BLOCK + 1)[:vocab * D].view(vocab, D)
        self.embed[:, 0] = 10.0

        # what the routers see, but for what the layers add
        self.seen = self.embed[as_words("calibration", 2048, vocab)[0]].float()  # (n, d)
        self.seen /= self.seen.square().mean(-1, keepdim=True).sqrt()

    def make(self, name: str, shape: tuple) -> Tensor:
        matrices = matrices_of(name, shape)
        if name not in matrices:
            return torch.stack(list(itertools.starmap(self.make, matrices.items()))).view(shape)
        if name.endswith("_idx"):
            return torch.arange(shape[1], dtype=torch.int32).repeat(shape[0], 1)
        if name.endswith("_val"):
            return torch.full(shape, 1 / shape[1])
        if shape == (1,):  # the guard of a globe export
            return torch.zeros(1, dtype=torch.bfloat16)
        if "embed_tokens" in name:
            return self.embed
        if name.endswith("mlp.gate.weight"):
            return self.router(name)
        if name.endswith(".bias") or "norm" in name:
            return torch.full(shape, float("norm" in name), dtype=torch.bfloat16)

        # numbers from the block, from a place of the tensor's own
        n = math.prod(shape)
        block = self.block[zlib.crc32(name.encode()) % max(1, BLOCK - n):]
        if n > BLOCK:
            block = self.block.repeat(-(-n // BLOCK))
        scale = next(scale for word, scale in SCALES.items() if word in name)
        return (block[:n] * scale).view(shape)

    # (E, d) of the layer with this name
    def router(self, name: str) -> Tensor:
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        weight = 0.028 * torch.randn(E, D, generator=g)
        weight[:, 0] = 0
        wanted = self.fractions[torch.randperm(E, generator=g)]
        weight[:, 0] = router_bias(wanted, self.seen @ weight.T) / self.seen[0, 0]
        return weight.bfloat16()


# {name: shape} of the published matrices that a tensor of the fused layout holds, in its order
def matrices_of(name: str, shape: tuple) -> dict:
    base, _, leaf = name.rpartition(".")
    if len(shape) == 3 and leaf == "gate_up_proj":
        return {f"{base}.{e}.{f}_proj.weight": (P, D) for e, f in itertools.product(range(E), PAIR)}
    if leaf == "down_proj":
        return {f"{base}.{e}.down_proj.weight": (D, P) for e in range(E)}
    return {name: shape}


def write_qwen15(to: Path, layout: str, fractions: Tensor, layers: int = 24, vocab: int = VOCAB,
                 cfg: globe.Config | None = None, bits: float = 4) -> None:
    """A Qwen1.5-MoE checkpoint of random bfloat16 weights, a tensor in memory at a time.

    layout: published (a matrix per expert), fused (transformers' own at run time), globe (an export of
    cfg's sizes, all families of all experts compressed) or codes (all experts' and the shared one's in `bits`
    a weight, the rest in 8).
    """
    from transformers import Qwen2MoeConfig
    Qwen2MoeConfig(
        hidden_size=D, moe_intermediate_size=P, num_experts=E, num_experts_per_tok=TOP_K, vocab_size=vocab,
        num_hidden_layers=layers, shared_expert_intermediate_size=4 * P, intermediate_size=5632,
        num_attention_heads=16, num_key_value_heads=16, norm_topk_prob=False, dtype=torch.bfloat16,
        architectures=["Qwen2MoeForCausalLM"], bos_token_id=None, eos_token_id=None).save_pretrained(to)
    config = globe.read_json(to / "config.json")
    model = globe.empty_model(config, torch.bfloat16, to)
    random = RandomWeights(vocab, fractions)
    ready = {}  # {name: function that makes its tensor}
    if layout in ("globe", "codes"):
        if layout == "globe":
            meta = random_meta(cfg, globe.dims_of(config))
        else:
            meta, ready = random_codes(bits, globe.dims_of(config), model, random)
        globe.install(model, meta)
        described = config | {"quantization_config": {"quant_method": "globe"} | meta}
        globe.write_text(to / "config.json", json.dumps(described))

    # the guards of one number last: what followed one would lie at odd addresses
    shapes = {}
    make = {}
    for name, t in sorted(model.state_dict().items(), key=lambda item: item[1].numel() == 1):
        kept = name in ready or t.dtype == torch.int32 or name.endswith("_val")
        whole = {name: tuple(t.shape)}
        parts = matrices_of(name, tuple(t.shape)) if layout == "published" else whole
        for part, shape in parts.items():
            shapes[part] = t.dtype if kept else torch.bfloat16, shape
            make[part] = ready.get(part) or partial(random.make, part, shape)
    globe.write_tensors(to / "model.safetensors", shapes, globe.LazyDict(make), {"format": "pt"}, sync=False)


# what describes factors of the sizes that cfg asks for
def random_meta(cfg: globe.Config, dims: globe.Dims) -> dict:
    group = globe.bank_groups(dims.layers, cfg.bank.scope)
    groups = len(set(group.values()))
    families = {}
    for family in globe.FAMILIES:
        owner = "gate" if cfg.bank.share and family == "up" else family
        m, r = globe.bank_shape(cfg, owner, len(dims.layers) * dims.experts, groups, dims)
        bank = groups * [torch.empty(m, r, dims.d, device="meta")]
        val = {0: torch.empty(dims.experts, min(cfg.sparsity.support, m))}
        families[family] = globe.FamilyFactors(bank, {}, {}, val, group, cfg.bank.activation, owner=owner)
    experts = dict.fromkeys(dims.layers, list(range(dims.experts)))
    own = {"cache": dataclasses.asdict(cfg.cache)}
    return globe.Factors(families, experts, dims, "qwen2_moe", "random", own).meta()


# (what describes them, {name in an export: function that makes its tensor}) of random codes; all layers have
# the same experts. Columns' energies fall by a power law, those of classes of rows by halves; bits follow
def random_codes(bits: float, dims: globe.Dims, model: nn.Module, random: RandomWeights) -> tuple:
    g = torch.Generator().manual_seed(0)
    experts = dims.experts + dims.shared
    families, ready = {}, {}
    X = ()
    for family in globe.FAMILIES:
        p, d = dims.p, dims.d
        if family == "down":
            p, d = d, p
        kind = torch.arange(p // 8).mul(48).div(p, rounding_mode="floor").repeat_interleave(8)
        kind = torch.stack([kind[torch.randperm(p, generator=g)] for _ in range(experts)]).to(torch.uint8)
        energy = 0.5 ** torch.arange(6)[:, None] * torch.arange(1, d // 8 + 1) ** -0.7
        # a basis where it pays, as in fits
        in_basis = bits < 2 and family != "down"
        block_bits = 8 * (8 * d + d // 4) if in_basis else 128 * experts
        s = globe.Spectrum(kind, kind.flatten().bincount(minlength=6).float(), energy, energy, block_bits)
        width = globe.share_bits({0: s}, bits * experts * p * d)[0].to(torch.uint8)
        width = width[:, (width > 0).any(0)]
        rows = 8 * width.shape[1]
        places = globe.code_places(kind, width)
        t = {"codes": torch.randint(256, (int(places[-1]),), generator=g, dtype=torch.uint8), "kind": kind,
             "row": torch.full_like(kind, 128), "width": width, "places": places,
             "column": torch.full(width.shape, round(256 * math.log2(0.02)), dtype=torch.int16)}
        of = dict.fromkeys(dims.layers)
        if not in_basis:
            t["order"] = torch.stack([torch.randperm(d, generator=g)[:rows] for _ in range(experts)]).short()
        elif not X:
            X = globe.code_groups(torch.randn(rows, d, generator=g) / d ** 0.5)
        if in_basis:
            of = {l: f"gate_{l}" for l in dims.layers}
        bases = {name: X for name in filter(None, of.values())}
        families[family] = globe.CodedFamily(family, d, of, bases, dict.fromkeys(dims.layers, t))
        for l, (key, part) in itertools.product(dims.layers, t.items()):
            ready[f"model.layers.{l}.mlp.experts.{family}_{key}"] = lambda part=part: part
        for name, (key, part) in itertools.product(bases, zip(("", "_scale"), X)):
            ready[f"globe_bank.{name}{key}"] = lambda part=part: part

    # attention, embeddings and head in 8 bits
    rest = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Embedding) and ".mlp." not in name:
            rest[name] = torch.empty(1, dtype=torch.int8), torch.empty(1)
            weight = partial(random.make, f"{name}.weight", tuple(module.weight.shape))
            for i, key in enumerate(("weight", "weight_scale")):
                ready[f"{name}.{key}"] = lambda weight=weight, i=i: globe.code_groups(weight())[i]
    listed = {l: list(range(experts)) for l in dims.layers}
    return globe.Factors(families, listed, dims, "qwen2_moe", "random", rest=rest).meta(), ready


# ---- 8. decode --preset qwen15: 26.7 GiB of weights on a 24-GiB machine --------------------------
LIMIT = 21  # GiB that a process may hold of its own before it is ended
LIMIT_S = 400
WAYS = {"published": ("plain", "offload"), "fused": ("mapped",), "globe": ("globe",)}  # by files' layout


# globe, or transformers' from_pretrained: plain; offload, with what does not fit on the disk; mapped, fused
# files, which it maps into memory: eager experts use the pages where they lie
def load_contender(folder: Path, how: str, cache: globe.CacheConfig | None = None) -> nn.Module:
    from transformers import AutoModelForCausalLM
    if how == "codes":
        return globe.load(folder)
    if how == "globe":
        model = globe.load(folder, cache=cache)
        globe.warm(model, as_words("calibration", 128, VOCAB))
        return model
    more = {}
    if how == "offload":
        memory = {"cpu": f"{LIMIT - 3}GiB"}
        more = {"device_map": "auto", "max_memory": memory, "offload_folder": str(folder / "offload")}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **more)
    if how == "mapped":
        model.set_experts_implementation("eager")
    return model


# one way, in a process of its own: a prompt of 8 tokens, then `tokens` more in each turn; sends its figures
def run_one(folder: Path, how: str, tokens: int, cache: globe.CacheConfig, sender: object) -> None:
    text = as_words("heldout", 8 + 4 * tokens, VOCAB)
    begin = time.perf_counter()
    model = load_contender(folder, how, cache)
    load = time.perf_counter() - begin
    prefill(model, text[:, :8], CPU)
    if how in ("mapped", "globe", "codes"):
        # what fits in memory shall be in the page cache
        shutil.copyfile(folder / "model.safetensors", os.devnull)

    # another part of the text in each turn; the first one is not counted
    speeds = []
    for turn in range(1 if how == "offload" else 3):
        start_counts(model)
        speeds.append(tokens / decode(model, text[:, turn * tokens:][:, :8 + tokens], CPU))
    counted = speeds[1:] or speeds
    sender.send({"value": statistics.median(counted), "spread": max(counted) - min(counted), "load_s": load,
                 "peak_gib": globe.peak_gib(CPU), **cache_figures(model)})


# GiB that a process holds of its own, file pages not counted (VmRSS: with them); 0 where nobody says it
def own_memory(pid: int, key: str = "RssAnon") -> float:
    status = Path(f"/proc/{pid}/status")
    found = re.search(rf"{key}:\s*(\d+)", status.read_text() if status.is_file() else "")
    return int(found[1]) / 2 ** 20 if found else 0.0


# the row of run_one in a process that is ended where its own memory or its time passes the limit
def watched(folder: Path, how: str, tokens: int, cache: globe.CacheConfig, variant: str) -> dict:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=run_one, args=(folder, how, tokens, cache, sender), daemon=True)
    begin = time.perf_counter()
    child.start()
    own = 0.0
    why = None
    while child.is_alive() and not why:
        # look five times a second at what it holds
        child.join(0.2)
        own = max(own, own_memory(child.pid))
        seconds = time.perf_counter() - begin
        if own > LIMIT:
            why = f"out of memory: {own:.1f} GiB of its own after {seconds:.0f} s, and not loaded"
        elif seconds > LIMIT_S:
            why = f"no result in {LIMIT_S} s"
    child.kill()
    child.join()
    if receiver.poll():
        figures = receiver.recv()
    else:
        figures = {"value": None, "why": why or f"exit code {child.exitcode}"}
        say(f"  {how}: {figures['why']}")
    return new_row("decode", "qwen15", f"tg{tokens}", variant, unit="tokens/s", implementation=how,
                   cache=cache.mode if how == "globe" else None, own_gib=own, **figures)


# Qwen1.5-MoE on a 24-GiB machine, in bfloat16: dense in three ways, and GloBE; and in codes; behind 8 tokens
def bench_24gib(args: Namespace) -> list:
    need_native("experts_decode", CPU)
    fractions = popularity(checkpoint_of("tiny", args))
    model = globe.user_cache() / "qwen15"
    shutil.rmtree(model, ignore_errors=True)  # of a run that was killed
    free = shutil.disk_usage(model.parent).free / 2 ** 30
    expect(free >= 46, f"qwen15: expected 46 GiB free in GLOBE_CACHE, {model.parent}, found {free:.0f}")
    cfg = globe.load_config(QWEN15, args.set)
    rows = []
    for layout, ways in (WAYS | dict.fromkeys(args.bits, ("codes",))).items():
        coded = layout in args.bits
        try:  # one layout at a time: the disk need not hold two
            with globe.written(model) as tmp:
                write_qwen15(tmp, "codes" if coded else layout, fractions, cfg=cfg, bits=layout)
            for how, n in itertools.product(ways, (32, 512) if coded else (min(args.tokens, 32),)):
                say(f"  {how}, {globe.weight_bytes(model) / 2 ** 30:.1f} GiB on disk")
                variant = {"globe": "globe", "codes": f"bits-{layout}".removesuffix(".0")}.get(how, "dense")
                rows.append(watched(model, how, 2 if how == "offload" else n, cfg.cache, variant))
        finally:
            shutil.rmtree(model, ignore_errors=True)
    show(beside_best(rows), *DECODE_KEYS)
    return rows


# ---- 9. fit: seconds, passes and error -----------------------------------------------------------
# ([(seconds, relative error) after each step], passes) of a fit of all gates, which ends at the target
def trace_fit(ckpt: Checkpoint, cfg: globe.Config, args: Namespace, target: float) -> tuple:
    D = ckpt.dims
    keys = [("gate", l, e) for l, e in itertools.product(D.layers, range(D.experts))]
    trace = []
    passes = 0
    with globe.threads_for(D.p, D.d):
        begin = time.perf_counter()
        data = globe.FitData(ckpt.expert, keys, cfg.bank.scope, args.device, "scale")
        fitter = globe.Fitter(data, cfg, globe.bank_shape(cfg, "gate", len(keys), data.groups, D))
        while not fitter.done and not (trace and trace[-1][1] <= target):
            step = fitter.step()
            passes += step["passes"]
            trace.append((time.perf_counter() - begin, step["rel_frob"]))
    return trace, passes


# Each method, MoBE's setting until it is flat, and ours until it is there
def bench_fit(preset: str, args: Namespace) -> list:
    ckpt = checkpoint_of(preset, args)
    steps = args.steps or 60
    rows = []

    def fit(variant: str, cfg: globe.Config, target: float = 0.0) -> list:
        trace, passes = trace_fit(ckpt, cfg, args, target)
        seconds, error = trace[-1]
        test = f"{len(trace)} of {cfg.fit.steps} steps"
        rows.append(new_row("fit", preset, test, variant, seconds, "s", passes=passes, rel_frob=error))
        return trace

    def ours(method: str, steps: int) -> globe.Config:
        return globe.load_config(None, [*args.set, f"fit.method={method}", f"fit.steps={steps}"])
    for method in ("varpro", "am", "adam"):
        fit(method, ours(method, steps))

    # MoBE's setting is flat where the rest of its steps gains it a hundredth
    ratio = ours("varpro", steps).bank.ratio
    mobe = ["bank.r=null", f"bank.ratio={ratio}", f"fit.steps={50 * steps}"]
    trace = fit("mobe", globe.load_config(str(CONFIGS / "mobe.yaml"), mobe))
    seconds, flat = next(step for step in trace if step[1] <= 1.01 * trace[-1][1])

    # how much sooner ours is at that error
    fit("varpro, to where mobe is flat", ours("varpro", 5 * steps), flat)
    if rows[-1]["rel_frob"] <= flat:
        rows[-1] |= {"ratio": times(seconds, rows[-1]["value"]), "mobe_seconds": seconds}
    show(rows, "variant", "test", "value", "unit", "passes", "rel_frob", "ratio")
    return rows


# ---- 10. report: tables of a run -----------------------------------------------------------------
def builtin_choices(n: int = 100) -> list:
    """[(context, four continuations, index of the right one)] from held-out documentation of the library.

    A paragraph is cut after about 120 characters; the wrong continuations are other paragraphs'. Chance: 1/4.
    """
    cuts = {}
    for name, text in globe._library_sources():
        if globe._split_of(name) != "heldout":
            continue
        if not name.startswith("topics/"):
            text = "\n\n".join(re.findall(r'"""(.*?)"""', text, re.S))
        for paragraph in text.split("\n\n"):
            cut = re.fullmatch(r"([A-Z].{120}\S*)( .{40}\S*).*", " ".join(paragraph.split()))
            if cut:
                cuts[hashlib.sha256(cut[0].encode()).digest()] = cut[1], cut[2]

    # the first n by their hash; the right continuation takes each place in turn
    chosen = [cuts[key] for key in sorted(cuts)][:n]
    tails = [tail for _, tail in chosen] * 2
    items = []
    for i, (context, _) in enumerate(chosen):
        items.append((context, [tails[i + (j - i) % 4] for j in range(4)], i % 4))
    return items


# Fraction of builtin_choices whose right continuation has the highest log-likelihood per character
@torch.no_grad()
def choice_accuracy(model: nn.Module, tokenizer, items: list) -> float:
    def tokens(text: str) -> list:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    right = 0
    for context, tails, answer in globe.bar("builtin")(items):
        # the four continuations as one batch, padded after the end
        start = len(tokens(context))
        rows = [torch.tensor(tokens(context + tail)) for tail in tails]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(next(model.parameters()).device)  # (4, n)
        logp = model(ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        scores = []
        for row, tail, scored in zip(rows, tails, logp):
            scores.append(float(scored[start - 1:len(row) - 1].sum()) / len(tail))
        right += scores.index(max(scores)) == answer
    return right / len(items)


# how many experts use each basis, of all banks
def basis_uses(f: globe.FamilyFactors) -> Tensor:
    m = len(f.bank[0])
    used = torch.cat([f.group[l] * m + idx[f.val[l] != 0] for l, idx in f.idx.items()])
    return torch.bincount(used, minlength=len(f.bank) * m)


# a row per family: mean effective rank (exp of the entropy of singular values' energies), use of its bases
def spectra(factors: globe.Factors) -> list:
    rows = []
    for name, f in factors.families.items():
        row = {"family": name}
        coded = isinstance(f, globe.CodedFamily)  # whose matrices are looked at as a whole
        parts = {"W^": lambda l, f=f: f.weights(l, range(len(f.layers[l]["kind"])))} if coded else {
            "A": f.A.__getitem__, "B~": f.composed}
        for key, matrices in parts.items():
            # singular values, and their energies as fractions of each matrix's
            s = torch.cat([torch.linalg.svdvals(matrices(l).float()) for l in factors.experts])
            fraction = s.square() / s.square().sum(-1, keepdim=True).clamp_min(1e-30)
            entropy = -(fraction * fraction.clamp_min(1e-30).log()).sum(-1)
            row[f"effective rank of {key}"] = float(entropy.exp().mean())

        rows.append(row)
        if coded:
            continue
        uses = basis_uses(f)
        row |= {"bases": len(uses), "not used": int((uses == 0).sum()),
                "experts a basis": float(uses.double().mean()), "at most": int(uses.max())}
    return rows


# error and support by step, error by layer, experts by basis; a line style per family
def plot_run(log: list, factors: globe.Factors, errors: dict, path: Path) -> None:
    from matplotlib.figure import Figure
    fig = Figure(figsize=(17, 3.8), layout="tight")
    axes = fig.subplots(1, 4)
    for (family, f), line in zip(factors.families.items(), ("-", "--", ":")):
        look = {"linestyle": line, "color": "black", "label": family}
        mine = [row for row in log if family in row.get("family", "") and "support" in row]  # not heal's
        for ax, key in zip(axes, ("rel_frob", "support")):
            ax.plot([row["step"] for row in mine], [row[key] for row in mine], **look)
        axes[2].plot(list(factors.experts), [errors[family][l] for l in factors.experts], marker="o", **look)
        if not isinstance(f, globe.CodedFamily):
            axes[3].plot(basis_uses(f).sort(descending=True).values, **look)
    axes[0].set(title="relative error in the fit's metric", xlabel="step", yscale="log")
    axes[1].set(title="median support", xlabel="step")
    axes[2].set(title="relative Frobenius error", xlabel="layer", ylim=(0, None))
    axes[3].set(title="experts that use a basis", xlabel="basis, by rank", ylim=(0, None))
    axes[2].legend()
    with globe.written(path) as tmp:
        fig.savefig(tmp, dpi=120, format="png")


# Write RUN/report.md and its plot; the result names them
def report(args: Namespace) -> dict:
    run, cfg, factors, ckpt, device, dtype = globe.open_run(args)
    errors = globe.reconstruction(ckpt, factors)
    by_layer = []
    for l in ("all", *factors.experts):
        by_layer.append({"layer": l} | {family: error[l] for family, error in errors.items()})

    # what eval left in the run, and the built-in task
    evals = []
    for text, figures in globe.read_evals(run).items():
        evals.append({"text": text} | {key: figures[key] for key in ("ppl_dense", "ppl", "delta_nats")})
    tasks = []
    if args.tasks:
        asked = globe.load_tokenizer(ckpt.dir), builtin_choices()
        dense = choice_accuracy(globe.load_dense(ckpt.dir, device, dtype), *asked)
        ours = choice_accuracy(globe.assemble(ckpt, factors, device, dtype, cfg.cache), *asked)
        tasks.append({"task": "builtin", "metric": "acc", "dense": dense, "globe": ours})

    whole = factors.model_ratio(ckpt.num_parameters())
    text = f"# {run.name}\n\nratio {factors.ratio():.4f} of the compressed families, {whole:.4f} of all: "
    text += f"{1 - whole:.1%} of the file is saved\n\n"
    tables = {"Relative Frobenius error": by_layer, "Effective ranks, and use of bases": spectra(factors),
              "Quality": evals, "Zero-shot tasks": tasks}
    for title, rows in tables.items():
        if rows:
            table = globe.text_table(list(rows[0]), [list(row.values()) for row in rows])
            text += f"## {title}\n\n{table}\n\n"
    plots = []
    if importlib.util.find_spec("matplotlib"):
        plots.append(str(run / "factors.png"))
        plot_run(globe.read_rows(run / "log.jsonl"), factors, errors, Path(plots[0]))
        text += "![factors](factors.png)\n"
    globe.write_text(run / "report.md", text)
    say(text)
    return {"report": str(run / "report.md"), "plots": plots, "tasks": tasks}


# ---- 11. sweep: one fit per combination ----------------------------------------------------------
SEVERAL = r"(?!model\.path|calib\.|eval\.|tiny\.|log\.)([\w.]+)=([^\[{'\",]*,[^\[{'\"]*)"  # bank.m=8,16


# (config file or None, {key: [text]}, other settings): of the command line, or of the YAML's section sweep
def grid_of(args: Namespace, scratch: Path) -> tuple:
    grid = {}
    path = args.config
    if path:
        settings = globe.read_yaml(Path(path).read_text(encoding="utf-8"), path) or {}
        asked = settings.pop("sweep", {}) if isinstance(settings, dict) else {}
        expect(isinstance(asked, dict), f"{path}: sweep: expected a mapping, found {globe.short(asked)}")
        for key, values in asked.items():
            fine = isinstance(values, list) and values
            expect(fine, f"{path}: sweep: {key}: expected a list of values, found {globe.short(values)}")
            grid[key] = [value if isinstance(value, str) else json.dumps(value) for value in values]
        path = scratch / "config.yaml"
        globe.write_text(path, yaml.safe_dump(settings, sort_keys=False))
    plain = []
    for setting in args.overrides:
        several = re.fullmatch(SEVERAL, setting)
        if several:
            grid[several[1]] = several[2].split(",")
        else:
            plain.append(setting)
    expect(grid, "sweep: expected several values, as bank.m=8,16, or a section sweep in --config, found none")
    return path, grid, plain


# Fit every combination of a grid once, in this process; a finished one is not fitted again
def sweep(args: Namespace) -> dict:
    expect(int(os.environ.get("WORLD_SIZE", 1)) == 1, "sweep: expected one process, found torchrun")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        config, grid, plain = grid_of(args, Path(scratch))
        # a wrong key or value stops the sweep before its first fit
        combinations = []
        for values in itertools.product(*grid.values()):
            settings = plain + list(map("=".join, zip(grid, values)))
            whole = json.dumps(dataclasses.asdict(globe.load_config(config, settings)))
            combinations.append((values, settings, hashlib.sha256(whole.encode()).hexdigest()))
        given = {"--config": config, "--device": args.device, "--dtype": args.dtype}
        options = [f"{option}={value}" for option, value in given.items() if value]

        # a run per combination; fit.json is written when it is finished
        base = Path(args.out or globe.new_run(globe.Config(model=globe.ModelConfig(path="sweep"))))
        for values, settings, resolved in combinations:
            short = [key.rpartition(".")[2] for key in grid]
            out = base / "-".join(map("=".join, zip(short, values)))
            if not (out / "fit.json").is_file():
                say(f"{len(rows) + 1} of {len(combinations)}: {out}")
                result = run_globe("fit", "--resume", "--out", out, *options, *settings)
                globe.write_text(out / "fit.json", json.dumps({"settings": resolved} | result))
            rows.append(dict(zip(grid, values)) | globe.read_json(out / "fit.json"))
            # those of older versions name the command line's settings alone
            fine = rows[-1].pop("settings", None) in (resolved, settings) and "rel_frob" in rows[-1]
            expect(fine, f"{out}: fitted with other settings; choose another --out")
    lines = [row | row["rel_frob"] for row in rows]
    show(lines, *grid, "ratio", "model_ratio", "seconds", *rows[0]["rel_frob"])
    return {"sweep": str(base), "rows": rows}


# ---- 12. Command line ----------------------------------------------------------------------------
SUITES = {"compose": bench_compose, "sparsemax": bench_sparsemax, "decode": bench_decode, "fit": bench_fit,
          "quality": bench_quality}
COMMANDS = {"report": report, "sweep": sweep}
PRESETS = {"compose": (None,), "sparsemax": (None,), "decode": ("tiny", "mid", *LAYERS, "qwen15"),
           "fit": ("tiny",), "quality": ("tiny", "mid", "smol-moe")}


# what argparse is told of a value: how it is read, and what is expected of it
def checked(read: Callable, fine: Callable, expected: str) -> dict:
    def convert(text: str) -> object:
        value = read(text)
        if not fine(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text}")
        return value
    return {"type": convert}


ALL = " ".join(SUITES)
MANY = {"nargs": "+"}
ON = {"action": "store_true"}
COUNT = checked(int, lambda n: 1 <= n <= 10 ** 6, "1 to 1000000")
TOKENS = checked(int, lambda n: 1 <= n <= 2000, "1 to 2000")
FILE = checked(Path, lambda path: path.absolute().parent.is_dir() and not path.is_dir(),
               "a file in a directory that exists")
SIZES = MANY | checked(float, lambda ratio: 0 < ratio < 10, "numbers above 0, as 0.8")
BITS = MANY | checked(float, lambda bits: 0 < bits <= 8, "numbers above 0, at most 8, as 2.2")
SET = {"nargs": "+", "action": "extend", "metavar": "section.key=value"}
BYTES = MANY | checked(lambda text: int(float(text)), lambda size: size > 0, "bytes, as 5.13e6")
PEERS = (*GROUPS["all"], *LOW_BIT, "hqq", *GROUPS)
MIX = r"gguf:\w+(:\w+:\w+)?(\+refit)?"  # llama.cpp's types
PEER = checked(str, lambda name: name in (*PEERS, *GROUPS["low-bit"]) or re.fullmatch(MIX, name),
               f"{', '.join(PEERS)} or gguf:TYPE")

OPTIONS = (  # (who knows it, option, default, what argparse is told of it, help)
    ("decode fit quality", "--preset", None, MANY,
     "tiny: the default model; mid: 32 experts of 256 x 256 a layer, of MID_DIR or trained once, in an hour; "
     "smol-moe (quality): SmolLM2-135M, of SMOL_DIR or the hub, in slices; qwen15 (decode, 46 GiB of disk): "
     "Qwen1.5-MoE's shapes, random weights; qwen15-layer: one layer of it; qwen15-24: 24, in codes. "
     "Default: tiny; decode by name: qwen15-layer too"),
    ("decode fit quality", "--set", [], SET, "config of the fits and of the tiny model"),
    ("fit quality", "--steps", None, COUNT, "fit: of each method (60; mobe 50 times as many); "
     "quality: of mobe and slbf (3000)"),
    ("quality", "--ratio", [], SIZES, "stored / dense sizes, in 16 bits; 0.8 0.6 where no size is given"),
    ("decode quality", "--bits", [], BITS, "stored bits per dense weight, in packed codes"),
    ("quality", "--bytes", [], BYTES, "sizes of the whole file, all experts and the rest coded"),
    ("quality", "--peers", ["closed"], MANY | PEER, "closed: those in closed form (default); low-bit: rtn, "
     "gptq, hqq, llama.cpp's of LLAMA_CPP, beside --bits and (its files) --bytes; gguf:TYPE or "
     "gguf:GATE_AND_UP:DOWN:REST of it alone; mobe and slbf take hours on smol-moe"),
    ("quality", "--heal", False, ON, "heal globe's factors too (variant globe+heal)"),
    ("quality", "--resume", False, ON, "keep the rows of --json FILE, also of a run that was cut short"),
    ("quality", "--experts", 8, COUNT, "smol-moe: equal slices of a layer's FFN, which act as its experts"),
    ("quality", "--text", [], MANY, "evaluate on these files too, each named by its stem"),
    ("quality", "--windows", None, COUNT, "of 512 tokens, per text; default: 64, of smol-moe 12"),
    ("quality", "--png", None, FILE, "file for a plot: loss against size"),
    ("compose sparsemax decode", "--repeats", 5, COUNT, "times that a model is timed; operators: twice"),
    ("decode", "--prefill", 512, TOKENS, "tokens of the prompt"),
    ("decode", "--tokens", 128, TOKENS, "new tokens (qwen15: at most 32)"),
    ("decode", "--sweep", False, ON, "also with caches of 1 expert a layer to all"),
    (ALL, "--json", None, FILE, "file for the rows"),
    ("report", "--factors", None, {}, "run directory; default: the newest below ./runs"),
    ("report", "--model", None, {}, "source checkpoint, where it is no longer at the run's model.path"),
    ("report", "--tasks", [], MANY | {"choices": ("builtin",)}, "zero-shot task"),
    ("report sweep", "--config", None, {}, "YAML file; for sweep it may hold a section sweep"),
    ("sweep", "--out", None, {}, "directory of the runs; default: a fresh runs/sweep-NNN"),
    (f"{ALL} report sweep", "--device", None, {}, "auto (default), cpu, cuda, cuda:N or mps"),
    (f"{ALL} report sweep", "--dtype", None, {}, "float32, bfloat16 or float16"),
)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)


def parse(argv: list | None) -> Namespace:
    """The suites or a command, its settings and options; UserError for an option that none of them knows."""
    parser = Parser("bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="SUITE", help=f"{ALL} all report sweep; default: decode")
    for names, option, default, about, text in OPTIONS:
        about = about | {"default": default, "help": f"[{names.replace(ALL, 'all suites')}] {text}"}
        parser.add_argument(option, **about)
    args = parser.parse_intermixed_args(argv)

    # one command with its settings, or suites
    args.asked = args.words or ["decode"]
    if args.asked[0] in COMMANDS:
        args.overrides = args.words[1:]
        args.asked = args.words[:1]
        for word in args.overrides:
            expect("=" in word, f"{args.asked[0]}: expected section.key=value, found {word!r}")
    else:
        for word in args.asked:
            expect(word in (*SUITES, "all"), f"suite: expected {', '.join(SUITES)} or all, found {word!r}")
    if "all" in args.asked:
        args.asked = list(SUITES)

    # an option must be known to one of what was asked for
    for names, option, default, _, _ in OPTIONS:
        fine = getattr(args, option[2:]) == default or not set(args.asked).isdisjoint(names.split())
        expect(fine, f"{option}: expected an option of {', '.join(args.asked)}, found one of {names}")
    return args


# The rows of all suites that were asked for, and the machine
def run_suites(args: Namespace) -> dict:
    good = set(itertools.chain.from_iterable(map(PRESETS.get, args.asked))) - {None}
    for preset in args.preset or ():
        expect(preset in good, f"--preset: expected one of {', '.join(sorted(good))}, found {preset!r}")
    if not args.ratio + args.bits + args.bytes:
        args.ratio = [0.8, 0.6]
    expect(args.json or not args.resume, "--resume: expected --json FILE, whose rows are kept, found none")
    plots = not args.png or importlib.util.find_spec("matplotlib")
    expect(plots, "--png: plots need matplotlib: pip install matplotlib")
    args.device = globe.pick_device(args.device)
    args.dtype = globe.as_dtype(args.dtype) or torch.bfloat16
    wanted = args.preset or ["tiny", "qwen15-layer"][:1 + bool(args.words)]
    rows = []
    for suite in args.asked:
        for preset in PRESETS[suite]:
            if preset is None or preset in wanted:
                say(f"\n{suite} {preset or ''}")
                rows += SUITES[suite](preset, args)
                gc.collect()
    result = {"rows": rows, "device": str(args.device), "torch": torch.__version__,
              "threads": torch.get_num_threads()}
    if args.json:
        globe.write_text(args.json, json.dumps(result))
        Path(f"{args.json}.part").unlink(missing_ok=True)
    return result


def main(argv: list | None = None) -> int:
    """Run the suites or the command; exit code 0 done, 2 wrong input, 1 a failure of ours, 130 stopped."""
    def run() -> dict:
        args = parse(argv)
        return COMMANDS.get(args.asked[0], run_suites)(args)
    return globe.exit_code("bench.py", run)


if __name__ == "__main__":
    sys.exit(main())
