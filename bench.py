"""Speed, memory and quality of GloBE beside its peers; reports; grids of fits. Last line of stdout: JSON.

    python bench.py                                    decode on tiny: tokens/s and memory
    python bench.py compose sparsemax decode           operators, a layer of Qwen1.5-MoE's shapes, tiny
    python bench.py quality --preset tiny smol-moe --ratio 0.8 0.6 --json rows.json --png rows.png
    python bench.py report --factors runs/tiny-001 --tasks builtin
    python bench.py sweep --config configs/tiny.yaml --out runs/grid bank.m=8,16 fit.steps=50,99

Suites (several in one command, or all) and commands:
    compose     composed bases at Qwen1.5-MoE's shapes, against torch's best ways
    sparsemax   sparsemax and entmax-1.5, forward and backward, against the package entmax
    decode      tokens/s, seconds to load, memory of models: dense in each of transformers' ways, GloBE
    fit         seconds, passes, error of the fit's methods on tiny, beside MoBE's setting
    quality     nats lost per token at one stored size, beside the peers, with the same calibration
    report      tables and plots of a run: errors, spectra, routing, quality by size, zero-shot tasks
    sweep       a fit per combination of a grid, one table; the same command goes on where it stopped

Glossary:
    preset      tiny: the default model; smol-moe: SmolLM2-135M in --experts N slices that act as experts;
                qwen15: Qwen1.5-MoE-A2.7B's shapes, random weights, tiny's popularity of experts; qwen15-layer
    variant     what is measured: a peer, or globe; `native` is our operator, `twin` its torch form
    ratio       speed: times as fast as the best peer; quality: stored / dense numbers of gate and up
    bits        stored bits per dense weight of gate and up
    cache       of composed bases: all experts held; warm: a quarter of them, filled from calibration
                text; cold: the same, empty at first; direct: nothing is composed
    ppN, tgN    a prompt of N tokens; N more tokens of a held-out text, one at a time
    peak_gib    the process's peak while that variant alone is loaded and run
    gbps        bytes that must move over the time; share_of_bandwidth: that over what can move

Peers run in the same process, turn by turn with ours; a figure is the median of the repeats.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import zlib
from argparse import Namespace
from functools import cached_property, partial
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

import globe
from globe import Checkpoint, UserError, expect, say

HERE = Path(globe.__file__).resolve().parent
CONFIGS = HERE / "configs"
SMOL_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
CPU = torch.device("cpu")
PAIR = ("gate", "up")  # the families that every peer compresses


# ---- 1. Helpers: rows, tables, plots, timing -----------------------------------------------------
# one figure of a benchmark, numbers to six digits; `ratio` is None where nothing is compared
def new_row(suite: str, preset: str, test: str, variant: str, value: float | None, unit: str, **more) -> dict:
    row = {"suite": suite, "preset": preset, "test": test, "variant": variant, "value": value, "unit": unit}
    row["ratio"] = None
    for key, value in (row | more).items():
        row[key] = float(f"{value:.6g}") if isinstance(value, float) else value
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


# one key of many rows
def column(rows: list, key: str) -> list:
    return [row[key] for row in rows]


# the rows that have these values
def where(rows: list, **wanted) -> list:
    return [row for row in rows if wanted.items() <= row.items()]


# in hex, of UTF-8
def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# the result of a command of globe.py, run in this process; its errors come through as they are
def run_globe(*argv: object) -> dict:
    args = globe.parse(list(map(str, argv)))
    return args.run(args)


# matplotlib.pyplot that draws into files
def pyplot():
    expect(importlib.util.find_spec("matplotlib"), "plots need matplotlib: pip install matplotlib")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


# (figure, its panels): n of them beside each other
def panels(n: int, width: float = 4.3, **more) -> tuple:
    fig, axes = pyplot().subplots(1, n, figsize=(width * n, 3.8), squeeze=False, **more)
    return fig, axes[0]


# write a figure as PNG, whole or not at all
def save_plot(fig, path: Path | str) -> Path:
    fig.tight_layout()
    with globe.written(Path(path)) as tmp:
        fig.savefig(tmp, dpi=120, format="png")
    pyplot().close(fig)
    return Path(path)


# seconds of run(), with what it queued on the device
@torch.no_grad()
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
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **more).eval()
    if more:  # transformers marks the model quantized, and then it cannot be saved
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
    return model, tokenizer


NOTHING = 8  # width of the shared expert of smol-moe, which adds nothing
SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
        "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def sliced_state(dense: nn.Module, slices: int) -> dict:
    """The tensors of the Qwen2-MoE that computes what a dense Llama computes.

    The FFN's hidden units are cut into equal slices, all of them active. The router is zero, so every softmax
    weight is 1/slices; down takes the factor `slices` (exact in floating point for a power of two).
    """
    c = dense.config
    state = {}
    for name, w in dense.state_dict().items():
        prefix, _, rest = name.rpartition(".mlp.")
        if prefix:
            # rows of gate and up, columns of down; shared experts and routers are zero
            proj = rest.split(".")[0]
            parts = w.chunk(slices)
            nothing = w.new_zeros(NOTHING, c.hidden_size)
            if proj == "down_proj":
                parts = (w * slices).chunk(slices, 1)
                nothing = nothing.T
            for e, part in enumerate(parts):
                state[f"{prefix}.mlp.experts.{e}.{proj}.weight"] = part
            state[f"{prefix}.mlp.shared_expert.{proj}.weight"] = nothing
            state[f"{prefix}.mlp.gate.weight"] = w.new_zeros(slices, c.hidden_size)
            state[f"{prefix}.mlp.shared_expert_gate.weight"] = w.new_zeros(1, c.hidden_size)
        elif name != "lm_head.weight" or not c.tie_word_embeddings:
            state[name] = w
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):  # Qwen2 has biases, zero here
            state[name.replace(".weight", ".bias")] = w.new_zeros(w.shape[0])
    return state


# write a stock Qwen2-MoE checkpoint that computes what the Llama `source` does; its logits are compared
def build_smol_moe(source: str, out: Path, slices: int = 8) -> None:
    from transformers import Qwen2MoeConfig
    dense, tokenizer = load_llama(source)
    c = dense.config
    width = c.intermediate_size
    fine = c.model_type == "llama" and width % slices == 0
    expect(fine, f"{source}: expected a Llama whose width {slices} divides, found {c.model_type} of {width}")
    known = {key: getattr(c, key) for key in SAME if getattr(c, key, None) is not None}
    config = Qwen2MoeConfig(
        **known, moe_intermediate_size=width // slices, num_experts=slices, num_experts_per_tok=slices,
        shared_expert_intermediate_size=NOTHING, norm_topk_prob=False, architectures=["Qwen2MoeForCausalLM"],
        dtype=torch.float32)
    state = sliced_state(dense, slices)
    shapes = {name: (t.dtype, t.shape) for name, t in state.items()}
    with globe.written(out) as tmp:
        # config, generation's defaults, tokenizer, weights
        tmp.mkdir()
        for part in (config, dense.generation_config, tokenizer):
            part.save_pretrained(tmp)
        globe.write_tensors(tmp / "model.safetensors", shapes, state, {"format": "pt"})

        # both models on one sentence
        ids = tokenizer("The reference describes the syntax of assignment.", return_tensors="pt").input_ids
        with torch.no_grad():
            error = float((globe.load_dense(tmp, CPU, None)(ids).logits - dense(ids).logits).abs().max())
        if error > 1e-3:
            raise RuntimeError(f"smol-moe: expected the dense model's logits, found a difference of {error}")


# the checkpoint of a preset, built on first use in the user's cache
def checkpoint_of(preset: str, args: Namespace) -> Checkpoint:
    if preset == "tiny":
        return globe.open_model(globe.load_config(None, args.set), CPU)
    path = globe.user_cache() / f"smol-moe-{args.experts}"
    if not (path / "config.json").is_file():
        build_smol_moe(os.environ.get("SMOL_DIR") or SMOL_HUB_ID, path, args.experts)
    return Checkpoint(path)


# the config file of a preset's fits; tiny's holds the defaults
def config_of(preset: str) -> str:
    return str(CONFIGS / {"smol-moe": "smol.yaml"}.get(preset, "tiny.yaml"))


# ---- 3. Peers, written from their papers ---------------------------------------------------------
# Each gives ({(family, layer, expert): W^ (p, d)}, stored numbers) of gate and up at a stored size.
# L: {layer: (d, d)}, Cholesky factor of the inputs' second moment, as in the fit; {}: no data.


# (E, p, d) float32
def layer_weights(ckpt: Checkpoint, family: str, layer: int) -> Tensor:
    return torch.stack([ckpt.expert(family, layer, e).float() for e in range(ckpt.dims.experts)])


# (E, p, d) -> {(family, layer, expert): (p, d)}
def by_expert(family: str, layer: int, W: Tensor) -> dict:
    return {(family, layer, e): w for e, w in enumerate(W)}


# argmin of ||(W - W^) L|| at that rank, W (E, p, d): truncated SVD of W L (SVD-LLM, eq. 4)
def low_rank(W: Tensor, rank: int, L: Tensor | None) -> Tensor:
    U, S, V = torch.linalg.svd(W if L is None else W @ L, full_matrices=False)
    out = U[..., :rank] * S[:, None, :rank] @ V[:, :rank]
    return out if L is None else torch.linalg.solve_triangular(L, out, upper=False, left=False)


# Truncated SVD of every matrix; with L whitened, as in SVD-LLM (Wang et al. 2024)
def peer_svd(ckpt: Checkpoint, ratio: float, L: dict, args: Namespace) -> tuple:
    D = ckpt.dims
    rank = max(1, int(ratio * D.p * D.d / (D.p + D.d)))
    out = {}
    for l, f in itertools.product(D.layers, PAIR):
        out |= by_expert(f, l, low_rank(layer_weights(ckpt, f, l), rank, L.get(l)))
    return out, len(out) * rank * (D.p + D.d)


# One basis (r, d) per layer for its gates and ups: leading right singular directions of W L, stacked
def peer_layer_pca(ckpt: Checkpoint, ratio: float, L: dict, args: Namespace) -> tuple:
    D = ckpt.dims
    rows = 2 * D.experts * D.p  # of a layer's gates and ups
    r = int(ratio * rows * D.d / (rows + D.d))
    out = {}
    for l in D.layers:
        # eigenvectors of the summed Gram matrix (d, d), the largest last
        WL = torch.cat([layer_weights(ckpt, f, l) for f in PAIR]) @ L[l]
        Q = torch.linalg.eigh((WL.mT @ WL).sum(0).double())[1][:, -r:].float()

        # project, and take L off again
        W = torch.linalg.solve_triangular(L[l], WL @ Q @ Q.T, upper=False, left=False)
        for f, part in zip(PAIR, W.split(D.experts)):
            out |= by_expert(f, l, part)
    return out, len(D.layers) * r * (rows + D.d)


# A layer's mean expert plus a whitened low-rank delta for each (D2-MoE, Gu et al. 2025; plain mean)
def peer_d2(ckpt: Checkpoint, ratio: float, L: dict, args: Namespace) -> tuple:
    D = ckpt.dims
    rank = max(0, int((ratio * D.experts - 1) * D.p * D.d / (D.experts * (D.p + D.d))))
    out = {}
    for l, f in itertools.product(D.layers, PAIR):
        W = layer_weights(ckpt, f, l)
        mean = W.mean(0)
        delta = low_rank(W - mean, rank, L[l]) if rank else torch.zeros_like(W)
        out |= by_expert(f, l, mean + delta)
    return out, 2 * len(D.layers) * (D.p * D.d + rank * D.experts * (D.p + D.d))


def peer_slbf(ckpt: Checkpoint, ratio: float, L: dict, args: Namespace) -> tuple:
    """Low-rank bases shared by a layer's experts, data-free: W_i = sum_j alpha_ij U_j V_j, two per expert.

    They start from each expert's own SVD (so at the plain SVD); then Adam on U, V and alpha.
    """
    D = ckpt.dims
    m = 2 * D.experts
    k = int((ratio * D.experts * D.p * D.d - D.experts * m) / (m * (D.p + D.d)))  # rank of a basis
    out = {}
    for l, f in itertools.product(D.layers, PAIR):
        W = layer_weights(ckpt, f, l)  # (E, p, d)
        scale = W.square().mean().sqrt()

        # the first k and the next k singular directions of an expert are its two bases
        U, S, V = torch.linalg.svd(W / scale, full_matrices=False)
        root = S[:, :2 * k].sqrt()
        U = (U[..., :2 * k] * root[:, None]).unflatten(-1, (2, k)).movedim(-2, 1).reshape(m, D.p, k)
        V = (root[..., None] * V[:, :2 * k]).reshape(m, k, D.d)
        alpha = torch.eye(D.experts).repeat_interleave(2, 1) + 1e-3  # (E, m)
        start = [t.to(args.device) for t in (U, V, alpha)]
        best = adam_bases(start, (W / scale).to(args.device), args.steps or 3000)
        out |= by_expert(f, l, best.cpu() * scale)
    return out, 2 * len(D.layers) * m * (k * (D.p + D.d) + D.experts)


# sum_j alpha_ij U_j V_j (E, p, d) after Adam from start = U, V, alpha; the start's where that is better
def adam_bases(start: list, W: Tensor, steps: int, lr: float = 2e-3) -> Tensor:
    x = [t.clone().requires_grad_() for t in start]

    def build() -> Tensor:
        U, V, alpha = x
        return (alpha @ (U @ V).flatten(1)).view(W.shape)
    first = build().detach()
    opt = torch.optim.Adam(x, lr, fused=True)
    for step in tqdm(range(steps), desc="adam", leave=False):
        opt.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        opt.zero_grad()

        # the gradient of the mean square, from the residual itself
        out = build()
        out.backward((out.detach() - W) * (2 / W.numel()))
        opt.step()
    return min(first, build().detach(), key=lambda out: float((W - out).norm()))


# {layer: (E,)} mean over an expert's tokens of router weight times norm of its output (REAP, eq. 9)
@torch.no_grad()
def saliency(model: nn.Module, windows: Tensor) -> dict:
    experts = dense_experts(model)
    total = {}
    count = {}
    for module in experts.values():
        total[module] = torch.zeros(module.num_experts)
        count[module] = torch.zeros(module.num_experts)

    def collect(module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> None:
        for e in index.unique().tolist():
            token, slot = (index == e).nonzero(as_tuple=True)
            h = module._apply_gate(F.linear(x[token], module.gate_up_proj[e]))
            out = F.linear(h, module.down_proj[e]).norm(dim=-1)
            total[module][e] += float((weight[token, slot] * out).sum())
            count[module][e] += len(token)
    with watching(list(total), collect):
        globe.nll(model, windows)
    return {l: total[module] / count[module].clamp_min(1) for l, module in experts.items()}


@torch.no_grad()
def pruned(ckpt: Checkpoint, ratio: float, windows: Tensor, device: torch.device) -> tuple:
    """(model without its least useful experts, equivalent ratio): REAP (Lasby et al. 2025), at equal size.

    Dropping one expert saves its gate, up and down, so the size of gate+up that the others are held to allows
    fewer drops; rounded in its favour.
    """
    from transformers import AutoModelForCausalLM
    model = globe.load_dense(ckpt.dir, device, None)
    score = saliency(model, windows)
    n = ckpt.dims.experts
    kept = math.ceil(n - (1 - ratio) * 2 * n / 3)
    config = type(model.config)(**{**model.config.to_dict(), "num_experts": kept})
    small = AutoModelForCausalLM.from_config(config, dtype=ckpt.dtype).eval()

    # experts and router rows of the kept experts, everything else as it is
    state = model.state_dict()
    for name, like in small.state_dict().items():
        if state[name].shape != like.shape:
            layer = int(name.split("layers.")[1].split(".")[0])
            rows = score[layer].topk(kept).indices.sort().values
            state[name] = state[name][rows.to(device)]
    small.load_state_dict(state)
    return small.to(device), 1 - (n - kept) * 3 / (2 * n)


# name: (function, whether it is given L, what shares a basis)
MATRIX_PEERS = {
    "svd": (peer_svd, False, "expert"),
    "svd-llm": (peer_svd, True, "expert"),
    "layer-pca": (peer_layer_pca, True, "layer"),
    "d2": (peer_d2, True, "layer"),
    "slbf": (peer_slbf, False, "layer"),
}
CLOSED_FORM = ("svd", "svd-llm", "layer-pca", "d2")
PEERS = (*CLOSED_FORM, "mobe", "slbf", "reap")


# write dense weights {(family, layer, expert): (p, d)} into a stock model's fused gate_up_proj
@torch.no_grad()
def put_experts(model: nn.Module, weights: dict, p: int) -> None:
    modules = dense_experts(model)
    rows = {"gate": slice(0, p), "up": slice(p, None)}
    for (family, layer, e), W in weights.items():
        modules[layer].gate_up_proj[e, rows[family]] = W.to(modules[layer].gate_up_proj.dtype)


# relative Frobenius error per family of weights {(family, layer, expert): (p, d)}
def frobenius(ckpt: Checkpoint, weights: dict) -> dict:
    error = dict.fromkeys(PAIR, 0.0)
    size = dict.fromkeys(PAIR, 0.0)
    for (family, layer, e), W in weights.items():
        dense = ckpt.expert(family, layer, e).float()
        error[family] += float((dense - W).square().sum())
        size[family] += float(dense.square().sum())
    return {family: math.sqrt(error[family] / size[family]) for family in PAIR}


# ---- 4. quality: nats lost per token at one stored size ------------------------------------------
def quality_texts(tokenizer, count: int, files: list = ()) -> tuple:
    """({text name: windows (N, 512)}, calibration text): the rest of topics, and other texts.

    The documentation repeats itself, so parts of its windows recur in the calibration text; code has none.
    topics: tokens i * 4096 + 512 .. i * 4096 + 1024 of pydoc_data.topics, i = 0..count-1; code: argparse.py
    and tarfile.py; license: CPython's LICENSE.txt; files: more texts, each named by its stem. Prints the
    texts' hashes, since figures depend on them. UserError: a taken name, a text that is calibrated on.
    """
    # the texts that are evaluated on whole
    from pydoc_data.topics import topics
    root = Path(sysconfig.get_path("stdlib"))
    texts = {"code": (root / "argparse.py").read_text() + (root / "tarfile.py").read_text()}
    if (root / "LICENSE.txt").is_file():
        texts["license"] = (root / "LICENSE.txt").read_text()
    for file in files:
        name = Path(file).stem
        taken = ["topics", *texts]
        expect(name not in taken, f"--text {file}: expected a file of another name than the texts' {taken}")
        texts[name] = globe.read_text(file, "test")

    # of every 4096 tokens of the documentation, 512 are evaluated on and the others calibrated on
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

    # beside them as much of the library's other texts, twice
    others = globe.builtin_text("train")[:len(prose)] + globe.builtin_text("calibration")[:len(prose)]
    calibration = "\n\n".join([*calibrated, others])
    windows = {"topics": torch.stack(evaluated)}
    sums = {"topics": sha256(prose)[:12]}
    for name, text in texts.items():
        windows[name] = globe.token_windows(tokenizer, text, count * 512, 512)
        sums[name] = sha256(text)[:12]
    say(f"texts: Python {sys.version.split()[0]}, sha256 {sums}")

    # a given text may be one of the library's own
    for file in files:
        starts = map(tokenizer.decode, windows[Path(file).stem][:, :64])
        seen = sum(part in calibration for part in starts)
        expect(not seen, f"--text {file}: expected a text that is not calibrated on, found {seen} windows")
    return windows, calibration


class Quality:
    """The quality benchmark of one model: its texts, the dense model's loss on them, and the rows so far."""

    def __init__(self, preset: str, args: Namespace, scratch: Path):
        self.preset = preset
        self.args = args
        self.scratch = scratch
        self.ckpt = checkpoint_of(preset, args)
        self.tokenizer = globe.load_tokenizer(self.ckpt.dir)
        self.windows, self.calibration = quality_texts(self.tokenizer, args.windows, args.text)
        self.cfg = globe.load_config(config_of(preset), args.set)

        # a hash of all that a figure depends on
        same = [self.ckpt.fingerprint(), {name: w.tolist() for name, w in self.windows.items()},
                self.calibration, dataclasses.asdict(self.cfg), args.steps, args.heal]
        self.settings = sha256(json.dumps(same))[:16]
        self.rows = self.resumed() if args.resume else []
        self.cfg.calib.text = str(scratch / "calibration.txt")
        Path(self.cfg.calib.text).write_text(self.calibration, encoding="utf-8")
        self.dense = self.losses(self.load())
        for text, loss in self.dense.items():
            say(f"{preset}: dense perplexity of {text} {math.exp(loss):.2f}")

    def load(self) -> nn.Module:
        return globe.load_dense(self.ckpt.dir, self.args.device, None)

    # the rows of --json FILE and FILE.part with these settings; rows of older versions name none
    def resumed(self) -> list:
        found = {}
        for file in (Path(self.args.json), Path(f"{self.args.json}.part")):
            try:
                rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else ()
                for row in where(rows, suite="quality", preset=self.preset):
                    if row.get("settings", self.settings) == self.settings and row["text"] in self.windows:
                        texts = found.setdefault((row["asked"], row["variant"]), {})
                        texts[row["text"]] = row | {"bits": 16 * row["ratio"]}
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(f"--resume: {file}: expected what bench.py wrote, found other text") from None
        kept = []
        for texts in found.values():
            if len(texts) == len(self.windows):
                kept += texts.values()
        say(f"--resume: {len(kept)} figures were measured on these texts with these settings")
        return kept

    # {text: nats per token}
    def losses(self, model: nn.Module) -> dict:
        if self.args.device.type == "cpu":
            model.set_experts_implementation("eager")  # a sixth faster than grouped_mm on smol-moe
        return {text: globe.nll(model, w)[0] for text, w in self.windows.items()}

    # a row per text: what the model loses against the dense one
    def add(self, asked: float, variant: str, model: nn.Module, ratio: float, seconds: float, **more) -> None:
        test = f"{self.ckpt.dims.experts}x{self.ckpt.dims.p}"
        for text, loss in self.losses(model).items():
            delta = loss - self.dense[text]
            self.rows.append(new_row(
                "quality", self.preset, test, variant, delta, "nats", text=text, delta_nats=delta,
                seconds=round(seconds, 1), ratio=ratio, bits=16 * ratio, asked=asked, settings=self.settings,
                **({"rel_frob": {}, "scope": "expert", "support": None} | more)))
            say(f"  {variant:9s} ratio {ratio:.3f} {text:8s} delta {delta:+.4f} nats, {seconds:.0f} s")

    # {layer: Cholesky factor of the inputs' second moment}; a ridge of 0.1 is worse for the peers
    @cached_property
    def inputs_factor(self) -> dict:
        moments = globe.calibrate(self.ckpt, self.cfg, self.args.device)
        globe.save_moments(self.scratch / "moments.safetensors", moments, self.ckpt.fingerprint())
        ridge = globe.FitConfig().ridge
        return {l: globe.metric_factor(C, ridge) for l, C in moments["inputs"].items()}

    # one method at one size
    def measure(self, asked: float, variant: str) -> None:
        if variant in MATRIX_PEERS:
            self.matrices(asked, variant)
        elif variant == "globe":
            assert self.inputs_factor  # writes the moments
            self.fitted(asked, variant, "--config", config_of(self.preset), *self.args.set, "calib.save=null",
                        f"calib.load={self.scratch}/moments.safetensors")
        elif variant == "mobe":  # its own form, r fitted to the size instead of r = p; data-free
            steps = self.args.steps or 3000
            self.fitted(asked, variant, "--config", CONFIGS / "mobe.yaml", f"fit.steps={steps}")
        elif self.preset == "tiny":  # reap; smol-moe has no routing to prune by
            begin = time.perf_counter()
            calib = self.cfg.calib
            windows = globe.token_windows(self.tokenizer, self.calibration, calib.tokens, calib.length)
            small, ratio = pruned(self.ckpt, asked, windows, self.args.device)
            self.add(asked, variant, small, ratio, time.perf_counter() - begin)

    # a peer that gives a matrix in place of each; the calibration's time is nobody's own
    def matrices(self, asked: float, variant: str) -> None:
        D = self.ckpt.dims
        run, calibrated, scope = MATRIX_PEERS[variant]
        L = self.inputs_factor if calibrated else {}
        begin = time.perf_counter()
        with globe.threads_for(D.p, D.d):
            weights, stored = run(self.ckpt, asked, L, self.args)
        seconds = time.perf_counter() - begin
        model = self.load()
        put_experts(model, weights, D.p)
        ratio = stored / (2 * len(D.layers) * D.experts * D.p * D.d)
        self.add(asked, variant, model, ratio, seconds, rel_frob=frobenius(self.ckpt, weights), scope=scope)

    # GloBE, or MoBE by GloBE's fit; with --heal healed too
    def fitted(self, asked: float, variant: str, *settings: object) -> None:
        device = ("--device", self.args.device)
        fit = run_globe("fit", *settings, "--out", self.scratch / f"{variant}-{asked}", *device,
                        f"model.path={self.ckpt.dir}", f"bank.ratio={asked}", "bank.r=null")
        self.add_run(asked, variant, fit, fit)
        if self.args.heal and variant == "globe":
            # in a process of its own; the JSON is the last line of stdout
            own = filter(re.compile(r"heal\.").match, self.args.set)
            command = [sys.executable, HERE / "train.py", "heal", "--factors", fit["factors"], *device, *own,
                       "--out", self.scratch / f"heal-{asked}", "calib.sampled=0",
                       f"calib.text={self.cfg.calib.text}"]
            done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
            expect(done.returncode == 0, f"train.py heal: expected exit code 0, found {done.returncode}")
            healed = json.loads(done.stdout.splitlines()[-1])
            self.add_run(asked, "globe+heal", fit, healed | {"seconds": fit["seconds"] + healed["seconds"]})

    # the factors of `run`, which come from this fit
    def add_run(self, asked: float, variant: str, fit: dict, run: dict) -> None:
        factors = globe.load_factors(run["factors"])
        errors = {family: e["all"] for family, e in globe.reconstruction(self.ckpt, factors).items()}
        model = globe.assemble(self.ckpt, factors, self.args.device)
        self.add(asked, variant, model, fit["ratio"], run["seconds"], rel_frob=errors, support=fit["support"],
                 scope=factors.config["bank"]["scope"], metric=factors.config["fit"]["metric"])


def bench_quality(preset: str, args: Namespace) -> list:
    """Nats lost by GloBE and its peers at the same stored sizes, calibration and texts.

    With --json FILE, a method's rows are in FILE.part once it is measured; --resume keeps both's rows.
    """
    groups = {"closed": CLOSED_FORM, "all": PEERS, "none": ()}
    variants = []
    for name in args.peers:  # a peer, or a group of them
        variants += groups.get(name, (name,))
    with tempfile.TemporaryDirectory() as scratch:
        job = Quality(preset, args, Path(scratch))
        for asked, variant in itertools.product(args.ratio, [*variants, "globe"]):
            if not where(job.rows, asked=asked, variant=variant):
                job.measure(asked, variant)
                if args.json:
                    globe.write_text(Path(f"{args.json}.part"), json.dumps({"rows": job.rows}))

    # one line per method and size, a column per text
    lines = {}
    rows = sorted(job.rows, key=lambda row: -row["asked"])
    for row in rows:
        line = lines.setdefault((row["asked"], row["variant"]), dict(row))
        line[row["text"]] = row["delta_nats"]
    show(list(lines.values()), "variant", "ratio", "bits", "scope", *job.windows, "seconds")
    if args.png:
        plot_quality(rows, list(job.windows), args.png)
    return rows


# delta_nats against size, a panel per text, a marker per method; readable in greyscale
def plot_quality(rows: list, texts: list, path: str) -> None:
    fig, axes = panels(len(texts), sharey=True)
    for ax, text in zip(axes, texts):
        for i, variant in enumerate(dict.fromkeys(column(rows, "variant"))):
            mine = sorted(where(rows, text=text, variant=variant), key=lambda row: row["ratio"])
            look = {"color": "0.5", "linestyle": (":", "--", "-.")[i % 3], "marker": "osv^D*PX<"[i % 9]}
            if variant.startswith("globe"):
                look |= {"color": "black", "linestyle": "-"}
            ax.plot(column(mine, "ratio"), column(mine, "delta_nats"), label=variant, **look)
        ax.set(title=text, xlabel="stored / dense size of gate and up", yscale="log")
        ax.locator_params(axis="x", nbins=4)
    axes[0].set_ylabel("increase of the loss (nats per token)")
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1))
    save_plot(fig, path)


# ---- 5. Operators at Qwen1.5-MoE-A2.7B's shapes: compose, sparsemax, one token of decode ---------
D, P, M, S, E, TOP_K = 2048, 1408, 128, 12, 60, 4  # d, p; a bank of 128 bases, supports of 12; experts, top-k
DENSE = ("eager", "grouped_mm", "batched_mm")      # transformers' ways to run experts; the best is the peer


def race(suite: str, test: str, variants: dict, want: tuple | Tensor, traffic: float, args: Namespace,
         tolerance: float = 0.2, gradients: bool = False, **more) -> list:
    """Rows of one operator: each variant's result for turn 0 is checked against `want`, then all are timed.

    variants: {name: function of the turn, an index, so that no input is still in a cache}; "native" is ours,
    "twin" our torch form, the others are peers. traffic: bytes that must move. `value` is milliseconds.
    """
    def run(name: str, turn: int) -> tuple | Tensor:
        with torch.set_grad_enabled(gradients):
            return variants[name](turn)

    # right first, then fast
    for name in variants:
        for got, wanted in zip(run(name, 0), want):
            error = float((got.detach().double() - wanted.detach().double()).abs().max())
            if not error <= tolerance:
                raise RuntimeError(f"{suite} {test}: {name} is off by {error}, more than {tolerance}")

    # turn by turn, so that a slow spell hits all
    seconds = {name: [] for name in variants}

    def race_for(turns: range, names: list) -> None:
        for turn, name in itertools.product(turns, names):
            seconds[name].append(timed(partial(run, name, turn), args.device))
    begin = time.perf_counter()
    race_for(range(2), list(variants))

    # the first allocations of a process are dear: quick operators get a fifth of a second to settle
    warm = max(2, min(20, int(0.4 / (time.perf_counter() - begin))))

    # peers that take five times as long as the best one are timed no more
    peers = [name for name in variants if name not in ("native", "twin")]
    first = {name: min(seconds[name]) for name in peers}
    limit = 5 * min(first.values(), default=0.0)
    race_for(range(2, warm + 2 * args.repeats), [name for name in variants if first.get(name, 0.0) <= limit])

    # medians beside the best peer's and what the machine can move
    middle = {name: statistics.median(s[warm:] or s) for name, s in seconds.items()}
    best = min(map(middle.get, peers), default=None)
    top = bandwidth(args.device)
    rows = []
    for name, s in middle.items():
        rows.append(new_row(suite, None, test, name, 1e3 * s, "ms", ratio=times(best, s), bytes=int(traffic),
                            gbps=traffic / s / 1e9, share_of_bandwidth=traffic / s / top, **more))
    show(rows, "test", "variant", "value", "unit", "ratio", "gbps", "share_of_bandwidth")
    return rows


# One pass over 60 experts, and one expert (a cache miss), against torch's best ways; silu
def bench_compose(preset: None, args: Namespace) -> list:
    need_native("compose", args.device)
    g = torch.Generator().manual_seed(0)
    return compose_rows(768, g, args) + compose_rows(1408, g, args)


# both tests at one r: a bank (m, r, d) and supports of 12 of its bases per expert
def compose_rows(r: int, g: torch.Generator, args: Namespace) -> list:
    bank = torch.empty(M, r, D, dtype=args.dtype, device=args.device)
    for b in bank:
        b.copy_(torch.randn(r, D, generator=g))
    idx = torch.stack([torch.randperm(M, generator=g)[:S] for _ in range(E)]).to(args.device)  # (E, s)
    val = torch.rand(E, S, generator=g).to(args.device)  # (E, s)
    weights = torch.zeros(E, M, device=args.device).scatter_(1, idx, val).to(bank.dtype)
    flat = bank.view(M, -1)
    picks = list(zip(idx.tolist(), val.tolist()))
    out = torch.empty(E, r, D, dtype=bank.dtype, device=args.device)

    # scaled adds of one expert's bases
    def adds(turn: int, wide: torch.dtype = bank.dtype) -> Tensor:
        bases, alphas = picks[turn % E]
        z = (bank[bases[0]] * alphas[0]).to(wide)
        for j, alpha in zip(bases[1:], alphas[1:]):
            z.add_(bank[j], alpha=alpha)
        return F.silu(z, inplace=True).to(bank.dtype)[None]

    def each(turn: int) -> Tensor:
        for e in range(E):
            out[e] = adds(turn + e)[0]
        return out[:1]

    def dense(turn: int) -> Tensor:
        torch.mm(weights, flat, out=out.view(E, -1))
        return F.silu(out, inplace=True)[:1]

    # the dense product in float32, where those of the dtype are slow; the bank in pieces
    def widened(turn: int, rows: int = 32) -> Tensor:
        for a in range(0, r, rows):
            z = torch.mm(weights.float(), bank[:, a:a + rows].reshape(M, -1).float())
            out[:, a:a + rows] = F.silu(z, inplace=True).view(E, rows, D)
        return out[:1]

    def native(turn: int) -> Tensor:
        e = turn % E
        return globe.compose(bank, idx[e:e + 1], val[e:e + 1], "silu", out=out[:1])
    every = {"native": lambda turn: globe.compose(bank, idx, val, "silu", out=out)}
    if not globe.slow_products(bank.dtype, args.device.type):
        every["dense product"] = dense
    every |= {"dense product, float32": widened, "scaled adds of each": each}
    one = {"native": native, "scaled adds": adds, "scaled adds, float32": partial(adds, wide=torch.float32),
           "dense product": lambda turn: F.silu(weights[turn % E] @ flat).view(1, r, D)}

    # what must move: each used base once and each result once
    want = F.silu(torch.einsum("s,srd->rd", val[0], bank[idx[0]].float()))[None]
    item = r * D * bank.element_size()
    dtype = str(bank.dtype)
    bases = len(idx.unique())
    rows = race("compose", f"60 experts, r {r}", every, want, (bases + E) * item, args, dtype=dtype)
    return rows + race("compose", f"1 expert, r {r}", one, want, (S + 1) * item, args, dtype=dtype)


# sparsemax and entmax-1.5, forward and backward, against the `entmax` package and our torch form
def bench_sparsemax(preset: None, args: Namespace) -> list:
    need_native("simplex", args.device)
    g = torch.Generator().manual_seed(0)
    peer = importlib.util.find_spec("entmax") and importlib.import_module("entmax")
    if not peer:
        say("sparsemax: the peer is the package entmax, which is not installed: no ratio")
    rows = []
    for shape, (name, alpha) in itertools.product(((1440, 128), (24, 60, 256)),
                                                  (("sparsemax", 2.0), ("entmax15", 1.5))):
        x = torch.randn(shape, generator=g).to(args.device)
        grad = torch.randn(shape, generator=g).to(args.device)

        # result and gradient of f over the last dim
        def both(f: Callable, x: Tensor, turn: int = 0, grad: Tensor = grad) -> tuple:
            leaf = x.detach().requires_grad_()
            y = f(leaf)
            y.backward(grad)
            return y, leaf.grad

        def twin(leaf: Tensor, alpha: float = alpha) -> Tensor:
            return globe.SimplexMap.apply(leaf, alpha, False)[0]
        variants = {"native": partial(both, getattr(globe, name), x), "twin": partial(both, twin, x)}
        if peer:
            variants["entmax"] = partial(both, partial(getattr(peer, name), dim=-1), x)
        want = both(twin, x.double())
        rows += race("sparsemax", f"{name} {shape}", variants, want, 5 * x.nbytes, args, 1e-4, True)
    return rows


# One token through one Qwen1.5-MoE layer, all cached: experts_decode against transformers' experts
def bench_one_token(args: Namespace) -> list:
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts
    need_native("experts_decode", args.device)
    g = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        dense = Qwen2MoeExperts(Qwen2MoeConfig(hidden_size=D, moe_intermediate_size=P, num_experts=E))
    dense = dense.to(args.dtype).to_empty(device=args.device).requires_grad_(False)

    # Gaussian numbers that keep a vector's length
    def new(*shape: int) -> Tensor:
        t = torch.empty(shape, dtype=args.dtype, device=args.device)
        for part in t:
            part.copy_(torch.randn(shape[1:], generator=g) / shape[-1] ** 0.5)
        return t
    dense.down_proj.copy_(new(E, D, P))
    rows = one_token_rows(dense, [new(E, P, 768), new(E, P, 768)], [new(E, 768, D), new(E, 768, D)], g, args)
    return rows + one_token_rows(dense, [None, None], [new(E, P, D), new(E, P, D)], g, args)


# A: adapters (E, p, r) of gate and up, or two None where `held` (E, r, d) are whole matrices
def one_token_rows(dense: nn.Module, A: list, held: list, g: torch.Generator, args: Namespace) -> list:
    r = held[0].shape[1]
    down = dense.down_proj.data  # (E, d, p)

    # the peers hold the same weights, multiplied out
    for e, i in itertools.product(range(E), range(2)):
        W = held[i][e] if A[i] is None else A[i][e] @ held[i][e]
        dense.gate_up_proj[e, i * P:(i + 1) * P] = W
    turns = 16
    x = torch.randn(1, D, generator=g).to(args.device, args.dtype)
    index = [torch.randperm(E, generator=g)[None, :TOP_K].to(args.device) for _ in range(turns)]
    weights = torch.full((1, TOP_K), 0.25, device=args.device)

    # what turn 0 gives in float32
    want = torch.zeros(1, D, device=args.device)
    for e in index[0][0].tolist():
        gate, up = (dense.gate_up_proj[e].float() @ x[0].float()).split(P)
        want += 0.25 * (down[e].float() @ (F.silu(gate) * up))

    # ours: every expert in its slot, down dense
    table = torch.arange(E, device=args.device)
    held_by_family = (held[0], A[0], held[1], A[1], down, None)
    constants = ([1, 1, 0], [1.0] * 3, [0.0] * 3, "silu")

    def native(turn: int) -> Tensor:
        at = index[turn % turns]
        return torch.ops.globe.experts_decode(x, at, weights, table, table, *held_by_family, *constants)

    def stock(how: str, turn: int) -> Tensor:
        dense.config._experts_implementation = how
        return dense(x, index[turn % turns], weights.to(x.dtype))
    variants = {"native": native} | {how: partial(stock, how) for how in DENSE}
    numbers = 2 * r * D + D * P  # that a token reads of an expert
    test = "one token, weights held"
    if A[0] is not None:
        numbers += 2 * P * r
        test = f"one token, r {r}"
    rows = race("decode", test, variants, want, TOP_K * numbers * down.element_size(), args, 0.05)
    return [row | {"preset": "qwen15-layer", "dtype": str(args.dtype)} for row in rows]


# ---- 6. decode: whole models ---------------------------------------------------------------------
HELD = 0.25  # of the experts that the caches of `warm` and `cold` hold
DECODE_KEYS = ("test", "variant", "implementation", "value", "unit", "ratio", "peak_gib", "weights_gib",
               "cache_mib", "hit_rate")


# seconds from a prompt ids (1, n) to its first new token
def prefill(model: nn.Module, ids: Tensor, device: torch.device) -> float:
    return timed(lambda: int(model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax()), device)


# seconds for a text's tokens after its first 8, one at a time: a real text, the same for every model
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


# {key: seconds of run(thing, key) in each turn} for {key: thing}, turn by turn; the first is not counted
def in_turns(things: dict, run: Callable, args: Namespace) -> dict:
    seconds = {key: [] for key in things}
    for _ in range(args.repeats + 1):
        for key, thing in things.items():
            seconds[key].append(run(thing, key))
    return {key: took[1:] for key, took in seconds.items()}


# Rows of pp and tg for {(variant, how): function that makes a model}: memory one by one, then speed
def speed_rows(make: dict, text: Tensor, args: Namespace, preset: str) -> list:
    runs = {f"pp{args.prefill}": lambda model: prefill(model, text[:, :args.prefill], args.device),
            f"tg{args.tokens}": lambda model: decode(model, text[:, :8 + args.tokens], args.device)}

    # a model alone in memory, run once
    peak = {}
    for key, load in make.items():
        gc.collect()
        globe.reset_peak(args.device)
        model = load()
        for run in runs.values():
            run(model)
        peak[key] = globe.peak_gib(args.device)
        model = None
    models = {key: load() for key, load in make.items()}

    def afresh(model: nn.Module, key: tuple) -> float:
        start_counts(model, forget=key[1] == "cold")
        return runs[test](model)
    rows = []
    for test in runs:
        mine = []
        tokens = int(test[2:])
        for (variant, how), took in in_turns(models, afresh, args).items():
            speeds = [tokens / s for s in took]
            value = statistics.median(speeds)
            mine.append(new_row("decode", preset, test, variant, value, "tokens/s", implementation=how,
                                spread=statistics.pstdev(speeds), peak_gib=peak[variant, how],
                                **cache_figures(models[variant, how])))
            mine[-1]["cache"] = how if variant == "globe" else None
            if test[:2] == "pp":
                mine[-1]["ttft_ms"] = 1e3 * tokens / value
        rows += beside_best(mine)
    return rows


# the rows with their ratio to the best of the dense ways
def beside_best(rows: list) -> list:
    best = max(filter(None, column(where(rows, variant="dense"), "value")), default=None)
    for row in rows:
        row["ratio"] = times(row["value"], best)
    return rows


# seconds to a model that can run, for {variant: function that makes it}
def load_rows(load: dict, args: Namespace, preset: str) -> list:
    rows = []
    for variant, took in in_turns(load, lambda make, _: timed(make, args.device), args).items():
        rows.append(new_row("decode", preset, "load", variant, statistics.median(took), "s", cache=None,
                            implementation=None, spread=statistics.pstdev(took), peak_gib=None))
        rows[-1]["ratio"] = times(rows[0]["value"], rows[-1]["value"])
    return rows


# rows of test "sweep": tokens/s and hit rate against the number of slots per layer; a plot with --png
def sweep_rows(warmed: Callable, text: Tensor, experts: int, args: Namespace, preset: str) -> list:
    rows = []
    for slots in sorted({1, *(max(1, experts * i // 8) for i in range(1, 9))}):
        # the third time a text is decoded, the cache holds what it holds
        model = warmed(per_layer=slots)
        for _ in range(3):
            start_counts(model)
            took = decode(model, text[:, :8 + args.tokens], args.device)
        rows.append(new_row("decode", preset, "sweep", "globe", args.tokens / took, "tokens/s", cache="warm",
                            slots=slots, peak_gib=None, **cache_figures(model)))
    show(rows, "slots", "cache_mib", "hit_rate", "value", "unit")
    if args.png:
        fig, axes = panels(2)
        for ax, key, title in zip(axes, ("value", "hit_rate"), (f"{preset}: tokens/s", "hit rate")):
            ax.plot(column(rows, "cache_mib"), column(rows, key), "ko-")
            ax.set(title=title, xlabel="MiB held by the caches", ylim=(0, None))
        save_plot(fig, args.png)
    return rows


# Tokens/s of prompt (pp) and decode (tg), seconds of loading: dense in each of its ways, and GloBE
def bench_decode(preset: str, args: Namespace) -> list:
    if preset == "qwen15":
        return bench_24gib(args)
    rows = bench_one_token(args) if preset == "qwen15-layer" else []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "dense"
        text, calibration = decode_models(preset, Path(folder), args)
        experts = globe.dims_of(globe.read_json(source / "config.json")).experts

        def dense(how: str | None = None) -> nn.Module:
            model = globe.load_dense(source, args.device, args.dtype)
            if how:
                model.set_experts_implementation(how)
            return model

        def warmed(**cache) -> nn.Module:
            model = globe.load(f"{folder}/globe", args.device, args.dtype, globe.CacheConfig(**cache))
            globe.warm(model, calibration)
            return model
        ways = DENSE if preset == "tiny" else DENSE[:2]  # batched_mm copies the weights of a token's experts
        quarter = max(1, int(HELD * experts))
        make = {("dense", how): partial(dense, how) for how in ways}
        make["globe", "all"] = partial(warmed, mode="all")
        make["globe", "warm"] = partial(warmed, per_layer=quarter)
        make["globe", "cold"] = partial(warmed, per_layer=quarter)
        make["globe", "direct"] = partial(warmed, mode="direct")
        models = speed_rows(make, text, args, preset)
        ours = partial(globe.load, f"{folder}/globe", args.device, args.dtype)
        models += load_rows({"dense": dense, "globe": ours}, args, preset)
        show(models, *DECODE_KEYS)
        swept = sweep_rows(warmed, text, experts, args, preset) if args.sweep else []
    return rows + models + swept


# write to/dense and to/globe, in one dtype; the text to measure on and the one that fills caches, (1, n)
def decode_models(preset: str, to: Path, args: Namespace) -> tuple:
    source = checkpoint_of("tiny", args)
    if preset == "qwen15-layer":
        fractions = popularity(source)
        write_qwen15(to / "dense", "published", fractions, 1, 4096)
        write_qwen15(to / "globe", "globe", fractions, 1, 4096, qwen15_config(args))
        return as_words("heldout", 2048, 4096).to(args.device), as_words("calibration", 512, 4096)
    fit = run_globe("fit", "--out", to / "run", f"model.path={source.dir}", "fit.steps=10", *args.set)
    run_globe("export", "--factors", fit["factors"], "--to", to / "globe", "--no-check",
              "--dtype", str(args.dtype).removeprefix("torch."))
    globe.load_dense(source.dir, args.device, args.dtype).save_pretrained(to / "dense")
    return tiny_words(source, "heldout", 2048).to(args.device), tiny_words(source, "calibration", 512)


# (1, n) ids of a built-in text
def tiny_words(ckpt: Checkpoint, split: str, n: int) -> Tensor:
    return globe.token_windows(globe.load_tokenizer(ckpt.dir), globe.builtin_text(split), n, n)


# ---- 7. Qwen1.5-MoE's shapes with random weights -------------------------------------------------
BLOCK = 2 ** 24  # random numbers that all tensors are cut from
VOCAB = 151936
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
        if name.endswith("_idx"):
            return torch.arange(shape[1], dtype=torch.int32).repeat(shape[0], 1)
        if name.endswith("_val"):
            return torch.full(shape, 1 / shape[1])
        if shape == (1,):  # the guard of a globe export
            return torch.zeros(1, dtype=torch.int8)
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
                 cfg: globe.Config | None = None) -> None:
    """A Qwen1.5-MoE checkpoint of random bfloat16 weights, a tensor in memory at a time.

    layout: published (a matrix per expert), fused (transformers' own at run time) or globe (an export of
    cfg's sizes, all families of all experts compressed).
    """
    from transformers import Qwen2MoeConfig
    Qwen2MoeConfig(
        hidden_size=D, moe_intermediate_size=P, num_experts=E, num_experts_per_tok=TOP_K, vocab_size=vocab,
        num_hidden_layers=layers, shared_expert_intermediate_size=4 * P, intermediate_size=5632,
        num_attention_heads=16, num_key_value_heads=16, norm_topk_prob=False, dtype=torch.bfloat16,
        architectures=["Qwen2MoeForCausalLM"], bos_token_id=None, eos_token_id=None).save_pretrained(to)
    config = globe.read_json(to / "config.json")
    model = globe.empty_model(config, torch.bfloat16, to)
    if layout == "globe":
        meta = random_meta(cfg, globe.dims_of(config))
        globe.install(model, meta)
        described = config | {"quantization_config": {"quant_method": "globe"} | meta}
        globe.write_text(to / "config.json", json.dumps(described))

    # the guards of one byte last: what followed one would lie at odd addresses
    random = RandomWeights(vocab, fractions)
    shapes = {}
    makers = {}
    for name, t in sorted(model.state_dict().items(), key=lambda item: item[1].dtype == torch.int8):
        held = matrices_of(name, tuple(t.shape))
        kept = t.dtype in (torch.int8, torch.int32) or name.endswith("_val")
        if layout == "published" or list(held) == [name]:
            for part, shape in held.items():
                shapes[part] = t.dtype if kept else torch.bfloat16, shape
                makers[part] = partial(random.make, part, shape)
        else:
            shapes[name] = torch.bfloat16, tuple(t.shape)
            makers[name] = partial(stacked, random, held, t.shape)
    tensors = globe.LazyDict(makers)
    globe.write_tensors(to / "model.safetensors", shapes, tensors, {"format": "pt"}, sync=False)


# the fused tensor of this shape
def stacked(random: RandomWeights, matrices: dict, shape: tuple) -> Tensor:
    return torch.stack([random.make(*item) for item in matrices.items()]).view(shape)


# configs/qwen15.yaml with the cache's settings of --set
def qwen15_config(args: Namespace) -> globe.Config:
    own = filter(re.compile(r"cache\.").match, args.set)
    return globe.load_config(str(CONFIGS / "qwen15.yaml"), list(own))


# what Factors.meta() says of factors of the sizes that cfg asks for
def random_meta(cfg: globe.Config, dims: globe.Dims) -> dict:
    group = globe.bank_groups(dims.layers, cfg.bank.scope)
    groups = len(set(group.values()))
    families = {}
    for family in globe.FAMILIES:
        owner = "gate" if cfg.bank.share and family == "up" else family
        m, r = globe.bank_shape(cfg, owner, len(dims.layers) * dims.experts, groups, dims)
        families[family] = {
            "m": m, "r": r, "s": min(cfg.sparsity.support, m), "groups": groups, "bank": owner, "shift": 0.0,
            "scale": 1.0, "group": {str(l): g for l, g in group.items()}, "activation": cfg.bank.activation}
    experts = {str(l): list(range(dims.experts)) for l in dims.layers}
    return globe.Factors({}, {}, dims, "qwen2_moe", "random").meta() | {
        "families": families, "experts": experts, "config": {"cache": dataclasses.asdict(cfg.cache)}}


# ---- 8. decode --preset qwen15: 26.7 GiB of weights on a 24-GiB machine --------------------------
LIMIT = 21  # GiB that a process may hold of its own before it is ended


# the dense model over memory-mapped files in the fused layout: eager experts use the pages where they lie
def mapped(directory: Path) -> nn.Module:
    model = globe.empty_model(globe.read_json(directory / "config.json"), torch.bfloat16, directory)
    for path in directory.glob("*.safetensors"):
        for name, t in load_file(path).items():
            globe.assign(model, name, t)
    model.set_experts_implementation("eager")
    return globe.finish_model(model, directory, CPU)


# globe, mapped, plain (from_pretrained), or offload (from_pretrained with what does not fit on the disk)
def load_contender(home: Path, args: Namespace) -> nn.Module:
    from transformers import AutoModelForCausalLM
    if args.only == "globe":
        model = globe.load(home / "globe", cache=qwen15_config(args).cache)
        globe.warm(model, as_words("calibration", 128, VOCAB))
        return model
    if args.only == "mapped":
        return mapped(home / "dense")
    more = {}
    if args.only == "offload":
        memory = {"cpu": f"{LIMIT - 3}GiB"}
        more = {"device_map": "auto", "max_memory": memory, "offload_folder": str(home / "offload")}
    return AutoModelForCausalLM.from_pretrained(home / "dense", dtype=torch.bfloat16, **more)


# the row of one way to run the model; value is None where it did not finish
def contender_row(only: str, tokens: int, value: float | None, **more) -> dict:
    variant = "globe" if only == "globe" else "dense"
    return new_row("decode", "qwen15", f"tg{tokens}", variant, value, "tokens/s", implementation=only, **more)


# one contender, in a process of its own: 8 tokens of prompt, then args.tokens more, after a run to warm up
def run_one(home: Path, args: Namespace) -> list:
    text = as_words("heldout", 8 + 4 * args.tokens, VOCAB)
    begin = time.perf_counter()
    model = load_contender(home, args)
    load = time.perf_counter() - begin
    first = prefill(model, text[:, :8], CPU)
    if args.only in ("mapped", "globe"):
        # what fits in memory shall be in the page cache
        for path in (home / args.only.replace("mapped", "dense")).glob("*.safetensors"):
            with open(path, "rb", buffering=0) as f:
                while f.read(2 ** 24):
                    pass

    # another part of the text in each turn
    speeds = []
    for turn in range(1 if args.only == "offload" else 3):
        part = text[:, turn * args.tokens:][:, :8 + args.tokens]
        start_counts(model)
        speeds.append((part.shape[1] - 8) / decode(model, part, CPU))
    counted = speeds[1:] or speeds
    value = statistics.median(counted)
    composing = globe.cache_stats(model)["compose_seconds"] * value / args.tokens
    return [contender_row(args.only, args.tokens, value, spread=max(counted) - min(counted), load_s=load,
                          peak_gib=globe.peak_gib(CPU), ttft_ms=1e3 * first, compose_share=composing,
                          cache=qwen15_config(args).cache.mode if args.only == "globe" else None,
                          **cache_figures(model))]


# GiB that a process holds of its own, file pages not counted; 0 where the system does not say
def own_memory(pid: int) -> float:
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"RssAnon:\s*(\d+)", status.read_text() if status.is_file() else "")
    return int(found[1]) / 2 ** 20 if found else 0.0


# the row of run_one in a process that is ended where its own memory or its time passes the limit
def watched(home: Path, only: str, args: Namespace, tokens: int, limit_s: float) -> dict:
    command = [sys.executable, __file__, "decode", "--preset", "qwen15", "--only", only,
               "--tokens", str(tokens)]
    if args.set:
        command += ["--set", *args.set]
    begin = time.perf_counter()
    own = 0.0
    why = None
    with tempfile.TemporaryFile("w+") as out:
        # look five times a second at what it holds
        process = subprocess.Popen(command, stdout=out)
        while process.poll() is None and not why:
            time.sleep(0.2)
            own = max(own, own_memory(process.pid))
            seconds = time.perf_counter() - begin
            if own > LIMIT:
                why = f"out of memory: {own:.1f} GiB of its own after {seconds:.0f} s, and not loaded"
            elif seconds > limit_s:
                why = f"no result in {limit_s:.0f} s"
            elif shutil.disk_usage(home).free < 2 ** 31:
                why = "stopped, the disk is full"
        if why:
            process.kill()
        if process.wait() == 0:
            out.seek(0)
            return json.loads(out.read().splitlines()[-1])["rows"][0] | {"own_gib": round(own, 2)}
    why = why or f"exit code {process.returncode}"
    say(f"  {only}: {why}")
    return contender_row(only, tokens, None, cache=None, peak_gib=None, own_gib=own, why=why)


# Qwen1.5-MoE in bfloat16 on a 24-GiB machine: dense in three ways, and GloBE; 32 tokens behind 8
def bench_24gib(args: Namespace) -> list:
    home = globe.user_cache() / "qwen15"
    dense = home / "dense"
    tokens = min(args.tokens, 32)
    if args.only:
        args.tokens = tokens
        needed = home / "globe" if args.only == "globe" else dense
        expect(needed.is_dir(), f"--only {args.only}: expected files that --keep left in {home}, found none")
        return run_one(home, args)
    need_native("experts_decode", CPU)
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free / 2 ** 30
    fine = free >= 46 or dense.is_dir()
    expect(fine, f"qwen15: expected 46 GiB free below {home} (GLOBE_CACHE names another), found {free:.0f}")
    fractions = popularity(checkpoint_of("tiny", args))

    def write(layout: str, to: Path) -> None:
        with globe.written(to) as tmp:
            write_qwen15(tmp, layout, fractions, cfg=qwen15_config(args))
        say(f"  {layout}: {globe.weight_bytes(to) / 2 ** 30:.1f} GiB")
    try:
        # published, and then fused in its place: the disk need not hold both
        if not dense.is_dir():
            write("published", dense)
        rows = [watched(home, "plain", args, tokens, 300), watched(home, "offload", args, 2, 300)]
        shutil.rmtree(home / "offload", ignore_errors=True)
        if not Checkpoint(dense).fused:
            shutil.rmtree(dense)
            write("fused", dense)
        rows.append(watched(home, "mapped", args, tokens, 400))
        if not (home / "globe").is_dir():
            write("globe", home / "globe")
        rows.append(watched(home, "globe", args, tokens, 400))
    finally:
        if not args.keep:
            shutil.rmtree(home)
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


# Each method, a plain SVD of its size, MoBE's setting until it is flat, and ours until it is there
def bench_fit(preset: str, args: Namespace) -> list:
    ckpt = checkpoint_of(preset, args)
    rows = []

    def config(method: str, steps: int) -> globe.Config:
        return globe.load_config(None, [*args.set, f"fit.method={method}", f"fit.steps={steps}"])

    def fit(variant: str, cfg: globe.Config, target: float = 0.0) -> list:
        trace, passes = trace_fit(ckpt, cfg, args, target)
        seconds, error = trace[-1]
        test = f"{len(trace)} of {cfg.fit.steps} steps"
        rows.append(new_row("fit", preset, test, variant, seconds, "s", passes=passes, rel_frob=error))
        return trace
    steps = args.steps or 60
    for method in ("varpro", "am", "adam"):
        fit(method, config(method, steps))
    begin = time.perf_counter()
    ratio = config("varpro", steps).bank.ratio
    error = frobenius(ckpt, peer_svd(ckpt, ratio, {}, args)[0])["gate"]
    seconds = time.perf_counter() - begin
    rows.append(new_row("fit", preset, "closed form", "svd", seconds, "s", passes=1, rel_frob=error))

    # MoBE's setting is flat where the rest of its steps gains it a hundredth
    mobe = ["bank.r=null", f"bank.ratio={ratio}", f"fit.steps={args.mobe_steps}"]
    trace = fit("mobe", globe.load_config(str(CONFIGS / "mobe.yaml"), mobe))
    flat = next(error for _, error in trace if error <= 1.01 * trace[-1][1])
    fit("varpro, to where mobe is flat", config("varpro", 5 * steps), flat)

    # how much sooner ours is at an error that both reach
    for row, goal in ((rows[0], rows[0]["rel_frob"]), (rows[-1], flat)):
        late = next((seconds for seconds, error in trace if error <= goal), None)
        if late and row["rel_frob"] <= goal:
            row |= {"ratio": times(late, row["value"]), "mobe_seconds": late}
    show(rows, "variant", "test", "value", "unit", "passes", "rel_frob", "ratio")
    return rows


# ---- 10. report: tables and plots of a run -------------------------------------------------------
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
                cuts[sha256(cut[0])] = cut[1], cut[2]

    # the first n by their hash; the right continuation takes each place in turn
    chosen = [cuts[key] for key in sorted(cuts)][:n]
    tails = [tail for _, tail in chosen] * 2
    items = []
    for i, (context, _) in enumerate(chosen):
        items.append((context, [tails[i + (j - i) % 4] for j in range(4)], i % 4))
    return items


# Fraction of builtin_choices whose right continuation has the highest log-likelihood per character
@torch.no_grad()
def choice_accuracy(model: nn.Module, tokenizer, items: list, progress: Callable = lambda it: it) -> float:
    def tokens(text: str) -> list:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    right = 0
    for context, tails, answer in progress(items):
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


# a row per task and metric, a column per model of {name: function that loads it}; "builtin" is ours
def zero_shot(names: list, models: dict, tokenizer, context: int | None) -> list:
    run = globe.task_runner([name for name in names if name != "builtin"], tokenizer, context)
    rows = {}
    for what, load in models.items():
        model = load()
        results = run(model, globe.bar(what))
        if "builtin" in names:
            accuracy = choice_accuracy(model, tokenizer, builtin_choices(), globe.bar(what))
            results["builtin"] = {"acc": accuracy}
        for task, metrics in results.items():
            for metric, value in metrics.items():
                rows.setdefault((task, metric), {"task": task, "metric": metric})[what] = value
        model = None
    return list(rows.values())


# a row per family: mean effective rank (exp of the entropy of singular values' energies), largest norm
def spectra(factors: globe.Factors) -> list:
    rows = []
    for name, f in factors.families.items():
        row = {"family": name}
        for key, matrices in (("A", f.A.__getitem__), ("B~", f.composed)):
            # singular values, and their energies as fractions of each matrix's
            s = torch.cat([torch.linalg.svdvals(matrices(l).float()) for l in f.A])  # (n, min(p, r))
            fraction = s.square() / s.square().sum(-1, keepdim=True).clamp_min(1e-30)
            entropy = -(fraction * fraction.clamp_min(1e-30).log()).sum(-1)
            row[f"effective rank of {key}"] = float(entropy.exp().mean())
            row[f"norm of {key}"] = float(s[:, 0].max())
        rows.append(row)
    return rows


# how many experts use a basis, for all banks, largest first
def basis_uses(f: globe.FamilyFactors) -> Tensor:
    m = len(f.bank[0])
    uses = torch.zeros(len(f.bank) * m, dtype=torch.long)
    for l, idx in f.idx.items():
        used = idx[f.val[l] != 0].long() + f.group[l] * m
        uses += torch.bincount(used, minlength=len(uses))
    return uses.sort(descending=True).values


# {layer: (tokens' fractions per expert, largest first; cache hit rate)}, ids (1, n) decoded one by one
@torch.no_grad()
def routing(model: nn.Module, ids: Tensor) -> dict:
    modules = globe.globe_modules(model)
    counts = {module.layer: torch.zeros(module.num_experts) for module in modules}

    def count(module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> None:
        counts[module.layer] += torch.bincount(index.flatten().cpu(), minlength=module.num_experts)
    past = None
    with watching(modules, count):
        for token in ids.to(next(model.parameters()).device).split(1, 1):
            past = model(token, past_key_values=past, use_cache=True).past_key_values
    out = {}
    for module in modules:
        fractions = counts[module.layer] / counts[module.layer].sum()
        hit_rate = module.cache.hits / max(1, module.cache.hits + module.cache.misses)
        out[module.layer] = fractions.sort(descending=True).values, hit_rate
    return out


# error and support by step, error by layer, popularity of bases; a line style per family
def plot_run(log: list, factors: globe.Factors, errors: dict, path: Path) -> Path:
    fig, axes = panels(4)
    for (family, f), line in zip(factors.families.items(), ("-", "--", ":")):
        look = {"linestyle": line, "color": "black", "label": family}
        mine = [row for row in log if family in row.get("family", "") and "support" in row]  # not heal's
        for ax, key in zip(axes, ("rel_frob", "support")):
            ax.plot(column(mine, "step"), column(mine, key), **look)
        axes[2].plot(list(f.A), [errors[family][l] for l in f.A], marker="o", **look)
        axes[3].plot(basis_uses(f), **look)
    axes[0].set(title="relative error in the fit's metric", xlabel="step", yscale="log")
    axes[1].set(title="median support", xlabel="step")
    axes[2].set(title="relative Frobenius error", xlabel="layer", ylim=(0, None))
    axes[3].set(title="experts that use a basis", xlabel="basis, by rank", ylim=(0, None))
    axes[2].legend()
    return save_plot(fig, path)


# popularity of experts, hit rates, and the loss against the size of several runs
def plot_routing(routes: dict, sizes: list, path: Path) -> Path:
    fig, axes = panels(3)
    for i, (fractions, _) in enumerate(routes.values()):
        axes[0].plot(range(1, len(fractions) + 1), fractions, color=str(0.7 * i / len(routes)))
    axes[1].plot(list(routes), [hit_rate for _, hit_rate in routes.values()], "ko-")
    for text, mark in zip(dict.fromkeys(column(sizes, "text")), "osv^Dx+*"):
        mine = where(sizes, text=text)
        axes[2].plot(column(mine, "model_ratio"), column(mine, "delta_nats"), mark, color="black", label=text)
        axes[2].legend()
    axes[0].set(title="fraction of tokens (first layer black)", xlabel="expert, by rank", ylim=(0, None))
    axes[1].set(title="hit rate of the cache", xlabel="layer", ylim=(0, 1))
    axes[2].set(title="nats lost per token", xlabel="size of the model, stored / dense")
    return save_plot(fig, path)


# Write RUN/report.md and its plots; the result names them
def report(args: Namespace) -> dict:
    run, cfg, factors, ckpt, device, dtype = globe.open_run(args)

    # what eval left in this run and in others
    sizes = []
    for directory in (run, *map(Path, args.runs)) if args.runs else ():
        for text, e in (globe.read_evals(directory) or globe.read_json(directory / "eval.json")).items():
            figures = {key: e[key] for key in ("ratio", "model_ratio", "ppl", "delta_nats")}
            sizes.append({"run": directory.name, "text": text} | figures)
    models = {"dense": partial(globe.load_dense, ckpt.dir, device, dtype),
              "globe": partial(globe.assemble, ckpt, factors, device, dtype, cfg.cache)}
    tasks = []
    if args.tasks:
        tasks = zero_shot(args.tasks, models, globe.load_tokenizer(ckpt.dir), cfg.eval.context)
    errors = globe.reconstruction(ckpt, factors)
    routes = routing(models["globe"](), globe.sample_ids(ckpt))
    plots = [plot_run(globe.read_rows(run / "log.jsonl"), factors, errors, run / "factors.png"),
             plot_routing(routes, sizes, run / "routing.png")]

    # tables, in the order of the report
    by_layer = []
    for l in ("all", *factors.experts):
        by_layer.append({"layer": l} | {family: error[l] for family, error in errors.items()})
    used = []
    for l, (fractions, hit_rate) in routes.items():
        quarter = float(fractions[:-(-len(fractions) // 4)].sum())
        unused = int((fractions == 0).sum())
        used.append({"layer": l, "top quarter's tokens": quarter, "not used": unused, "hit rate": hit_rate})
    whole = factors.model_ratio(ckpt.num_parameters())
    text = f"# {run.name}\n\nratio {factors.ratio():.4f} of the compressed families, {whole:.4f} of all\n\n"
    for title, rows in (
            ("Relative Frobenius error", by_layer), ("Spectra", spectra(factors)),
            ("Quality against size", sizes), ("Routing and cache, 64 tokens decoded", used),
            ("Zero-shot tasks", tasks)):
        if rows:
            table = globe.text_table(list(rows[0]), [list(row.values()) for row in rows])
            text += f"## {title}\n\n{table}\n\n"
    for path in plots:
        text += f"![{path.stem}]({path.name})\n"
    globe.write_text(run / "report.md", text)
    say(text)
    return {"report": str(run / "report.md"), "plots": list(map(str, plots)), "tasks": tasks}


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
            globe.load_config(config, settings)
            combinations.append((values, settings))
        options = []
        for option, value in (("--config", config), ("--device", args.device), ("--dtype", args.dtype)):
            options += [option, value] if value else []

        # a run per combination; fit.json is written when it is finished
        fresh = globe.Config(model=globe.ModelConfig(path="sweep"))
        base = Path(args.out) if args.out else globe.new_run(fresh)
        for values, settings in combinations:
            short = [key.rpartition(".")[2] for key in grid]
            out = base / "-".join(map("=".join, zip(short, values)))
            if not (out / "fit.json").is_file():
                say(f"{len(rows) + 1} of {len(combinations)}: {out}")
                result = run_globe("fit", "--resume", "--out", out, *options, *settings)
                globe.write_text(out / "fit.json", json.dumps({"settings": settings} | result))
            rows.append(dict(zip(grid, values)) | globe.read_json(out / "fit.json"))
            fine = rows[-1].pop("settings", None) == settings and "rel_frob" in rows[-1]
            expect(fine, f"{out}: fitted with other settings; choose another --out")
    columns = (*grid, "ratio", "model_ratio", "seconds", *rows[0]["rel_frob"])
    show([row | row["rel_frob"] for row in rows], *columns)
    return {"sweep": str(base), "rows": rows}


# ---- 12. Command line ----------------------------------------------------------------------------
SUITES = {"compose": bench_compose, "sparsemax": bench_sparsemax, "decode": bench_decode, "fit": bench_fit,
          "quality": bench_quality}
COMMANDS = {"report": report, "sweep": sweep}
PRESETS = {"compose": (None,), "sparsemax": (None,), "decode": ("tiny", "qwen15-layer", "qwen15"),
           "fit": ("tiny",), "quality": ("tiny", "smol-moe")}


# what argparse is told of a value: how it is read, and what is expected of it
def checked(read: Callable, fine: Callable, expected: str) -> dict:
    def convert(text: str) -> object:
        value = read(text)
        if not fine(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text}")
        return value
    return {"type": convert}


# whole numbers
def up_to(most: int) -> dict:
    return checked(int, lambda n: 1 <= n <= most, f"1 to {most}")


# whether its directory exists and it is none itself
def can_be_written(file: str) -> bool:
    return Path(file).absolute().parent.is_dir() and not Path(file).is_dir()


ALL = " ".join(SUITES)
MANY = {"nargs": "+"}
ON = {"action": "store_true"}
COUNT = up_to(10 ** 6)
FILE = checked(str, can_be_written, "a file in a directory that exists")
SIZES = MANY | checked(float, lambda ratio: 0 < ratio < 10, "numbers above 0, as 0.8")
SET = {"nargs": "+", "action": "extend", "metavar": "section.key=value"}
ONE_OF = {"choices": (*PEERS, "closed", "all", "none")}

OPTIONS = (  # (who knows it, option, default, what argparse is told of it, help)
    ("decode fit quality", "--preset", None, MANY, "tiny; qwen15-layer, qwen15 (decode; 46 GiB of disk); "
     "smol-moe (quality; SMOL_DIR or the hub). Default: tiny; decode by name: qwen15-layer too"),
    ("decode fit quality", "--set", [], SET, "config of the fits and of the tiny model"),
    ("fit quality", "--steps", None, COUNT, "fit: of each method (60); quality: of mobe and slbf (3000)"),
    ("quality", "--ratio", [0.8, 0.6], SIZES, "stored / dense sizes"),
    ("quality", "--peers", ["closed"], MANY | ONE_OF, "closed: those in closed form (default); "
     "mobe and slbf take hours on smol-moe"),
    ("quality", "--experts", 8, COUNT, "smol-moe: equal slices of a layer's FFN, which act as its experts"),
    ("quality", "--heal", False, ON, "heal globe's factors too (variant globe+heal)"),
    ("quality", "--resume", False, ON, "keep the rows of --json FILE, also of a run that was cut short"),
    ("quality", "--text", [], MANY, "evaluate on these files too, each named by its stem"),
    ("quality", "--windows", 12, COUNT, "evaluation windows of 512 tokens per text"),
    ("decode quality", "--png", None, FILE, "file: loss against size; --sweep: speed against memory"),
    ("compose sparsemax decode", "--repeats", 5, COUNT, "how often each variant is timed"),
    ("decode", "--tokens", 128, up_to(2000), "new tokens (qwen15: at most 32)"),
    ("decode", "--prefill", 512, up_to(2048), "prompt tokens of the prefill test"),
    ("decode", "--sweep", False, ON, "also over cache sizes"),
    ("decode", "--keep", False, ON, "qwen15: leave its files in the user's cache, for the next run"),
    ("decode", "--only", None, {"choices": ("plain", "offload", "mapped", "globe")},
     "qwen15: this way alone, on files that --keep left"),
    ("fit", "--mobe-steps", 3000, COUNT, "steps of MoBE's setting"),
    (ALL, "--json", None, FILE, "file for the rows"),
    ("report", "--factors", None, {}, "run directory; default: the newest below ./runs"),
    ("report", "--model", None, {}, "source checkpoint, where it is no longer at the run's model.path"),
    ("report", "--runs", [], MANY, "other evaluated runs, to plot quality against size"),
    ("report", "--tasks", [], MANY, "zero-shot: builtin, or tasks of lm-eval"),
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
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="bench.py", description=__doc__, formatter_class=raw)
    parser.add_argument("words", nargs="*", metavar="SUITE", help=f"{ALL} all report sweep; default: decode")
    for names, option, _, about, text in OPTIONS:
        who = names.replace(ALL, "all suites")
        parser.add_argument(option, default=argparse.SUPPRESS, help=f"[{who}] {text}", **about)
    args, rest = parser.parse_known_args(argv)
    words = args.words + rest
    for option in ("runs", "tasks"):  # these take all that follows them, settings too
        given = getattr(args, option, [])
        words += filter(re.compile(".*=").match, given)
        given[:] = itertools.filterfalse(re.compile(".*=").match, given)

    # one command, or suites
    args.named = bool(words)
    args.asked = list(SUITES) if "all" in words else words or ["decode"]
    if args.asked[0] in COMMANDS:
        args.overrides = words[1:]
        args.asked = words[:1]
        for word in args.overrides:
            expect("=" in word, f"{words[0]}: expected section.key=value, found {word!r}")
    for word in args.asked:
        fine = word in SUITES or word in COMMANDS
        expect(fine, f"suite: expected {', '.join(SUITES)} or all, found {word!r}")

    # an option must be known to one of what was asked for; what was not given has its default
    for names, option, default, _, _ in OPTIONS:
        key = option[2:].replace("-", "_")
        fine = not hasattr(args, key) or not set(args.asked).isdisjoint(names.split())
        expect(fine, f"{option}: expected an option of {', '.join(args.asked)}, found one of {names}")
        setattr(args, key, getattr(args, key, default))
    return args


# The rows of all suites that were asked for, and the machine
def run_suites(args: Namespace) -> dict:
    good = set(itertools.chain.from_iterable(map(PRESETS.get, args.asked))) - {None}
    for preset in args.preset or ():
        expect(preset in good, f"--preset: expected one of {', '.join(sorted(good))}, found {preset!r}")
    expect(args.json or not args.resume, "--resume: expected --json FILE, whose rows are kept, found none")
    if args.png:
        pyplot()
    args.device = globe.pick_device(args.device)
    args.dtype = globe.as_dtype(args.dtype) or torch.bfloat16
    wanted = args.preset or ["tiny", "qwen15-layer"][:1 + args.named]
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
        globe.write_text(Path(args.json), json.dumps(result))
        Path(f"{args.json}.part").unlink(missing_ok=True)
    return result


# what was asked for, and its result
def run(argv: list | None) -> dict:
    args = parse(argv)
    return COMMANDS.get(args.asked[0], run_suites)(args)


def main(argv: list | None = None) -> int:
    """Run the suites or the command; exit code 0 done, 2 wrong input, 1 a failure of ours, 130 stopped."""
    return globe.exit_code("bench.py", partial(run, argv))


if __name__ == "__main__":
    sys.exit(main())
