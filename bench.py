"""Speed, memory and quality of GloBE against peers; the last line of stdout is one JSON document.

    python bench.py                                    decode on tiny: tokens/s and memory
    python bench.py compose sparsemax decode           the operators and one layer at Qwen1.5-MoE's shapes, and tiny
    python bench.py quality --preset tiny smol-moe --ratio 0.8 0.6
    python bench.py fit --preset tiny
    python bench.py all --json out.json

Peers run in the same process, turn by turn with ours; a figure is the median of the repeats. `ratio` is the speed-up
over the best peer (compose, sparsemax, decode), or stored / dense size (quality). In the operator suites `native` is ours,
`gbps` the bytes that must move over the time, and `share_of_bandwidth` that over what this machine copies or reads in the
same run.

decode: `pp512` is a prompt of 512 tokens, `tg128` the next 128 one at a time, of a held-out text; `load` seconds to a model.
`cache`: all experts held; warm, a quarter of them, filled from calibration text; cold, the same, empty at first. `peak_gib` is
the process's peak while that variant alone is loaded and run. qwen15 is Qwen1.5-MoE-A2.7B's shapes with random weights, and
routers that reproduce the popularity of experts measured on tiny; qwen15-layer is one layer of it with a small vocabulary.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import hashlib
import importlib.util
import io
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
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import globe
from globe import UserError, say

SUITES = ("compose", "sparsemax", "decode", "fit", "quality")
PRESETS = {"compose": (), "sparsemax": (), "decode": ("tiny", "qwen15-layer", "qwen15"), "fit": ("tiny", "smol-moe", "qwen15"), "quality": ("tiny", "smol-moe")}
CONFIGS = Path(globe.__file__).parent / "configs"
SMOL_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


# ---- presets -----------------------------------------------------------------------------------------
def smol_source() -> str:
    """$SMOL_DIR (a folder with SmolLM2's GGUF, or a Hugging Face checkpoint), else the hub id."""
    return os.environ.get("SMOL_DIR") or SMOL_HUB_ID


def load_dense(source: str):
    """(dense Llama, tokenizer) from a folder that holds a .gguf, a Hugging Face folder, or a hub id."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder, more = Path(source), {}
    ggufs = sorted(folder.rglob("*.gguf")) if folder.is_dir() and not (folder / "config.json").exists() else []
    if ggufs:
        for package in ("gguf", "accelerate"):
            if not importlib.util.find_spec(package):
                raise UserError(f"preset smol-moe: reading a GGUF needs {package}: pip install gguf accelerate")
        source, more = str(ggufs[0].parent), {"gguf_file": ggufs[0].name}
    elif not folder.is_dir():
        source = str(globe.resolve_model(source))
    tokenizer = AutoTokenizer.from_pretrained(source, **more)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **more).eval()
    if ggufs:  # the loader marks the model quantized, and then it cannot be saved
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
    return model, tokenizer


def build_smol_moe(source: str, out: Path, experts: int = 8) -> Path:
    """Write a stock Qwen2-MoE checkpoint that computes what the dense Llama `source` computes; its logits are compared.

    The FFN's hidden units are cut into `experts` equal slices, all of them active. The router is zero, so every
    softmax weight is 1/experts; down takes the factor `experts` (exact in floating point for a power of two).
    """
    from safetensors.torch import save_file
    from transformers import Qwen2MoeConfig
    dense, tokenizer = load_dense(source)
    c, tied, shared = dense.config, dense.config.tie_word_embeddings, 8
    if c.model_type != "llama" or c.intermediate_size % experts:
        raise UserError(f"{source}: expected a Llama whose FFN width divides by {experts}, found {c.model_type} of width "
                        f"{c.intermediate_size}")
    d, p, state = c.hidden_size, c.intermediate_size // experts, {}
    for name, w in dense.state_dict().items():
        prefix, _, rest = name.rpartition(".mlp.")
        if not prefix:  # attention, norms, embeddings: as they are; Qwen2 has biases, zero here
            if not (tied and name == "lm_head.weight"):
                state[name] = w
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                state[name.replace(".weight", ".bias")] = w.new_zeros(w.shape[0])
            continue
        proj = rest.split(".")[0]
        for e, part in enumerate((w * experts).split(p, 1) if proj == "down_proj" else w.split(p, 0)):
            state[f"{prefix}.mlp.experts.{e}.{proj}.weight"] = part
        state[f"{prefix}.mlp.shared_expert.{proj}.weight"] = w.new_zeros((d, shared) if proj == "down_proj" else (shared, d))
        state[f"{prefix}.mlp.gate.weight"] = w.new_zeros(experts, d)
        state[f"{prefix}.mlp.shared_expert_gate.weight"] = w.new_zeros(1, d)
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
            "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    config = Qwen2MoeConfig(**{k: getattr(c, k) for k in same if getattr(c, k, None) is not None}, moe_intermediate_size=p,
                            num_experts=experts, num_experts_per_tok=experts, shared_expert_intermediate_size=shared,
                            norm_topk_prob=False, architectures=["Qwen2MoeForCausalLM"], dtype=torch.float32)
    with globe.written(out) as tmp:
        tmp.mkdir()
        config.save_pretrained(tmp)
        dense.generation_config.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        save_file({k: v.contiguous() for k, v in state.items()}, tmp / "model.safetensors", metadata={"format": "pt"})
        ids = tokenizer("The Python language reference describes the syntax of assignment.", return_tensors="pt").input_ids
        with torch.no_grad():
            error = float((globe.load_dense(tmp, torch.device("cpu"), None)(ids).logits - dense(ids).logits).abs().max())
        if error > 1e-3:
            raise RuntimeError(f"smol-moe: logits expected to equal the dense model's, found an error of {error}")
        say(f"smol-moe ({experts} experts of {p}): largest logit difference to the dense model {error:.1e}")
    return out


def checkpoint_of(preset: str, args: argparse.Namespace) -> globe.Checkpoint:
    """The checkpoint of a preset, made on first use in the user's cache."""
    if preset == "tiny":
        return globe.open_model(globe.load_config(None, args.set), torch.device("cpu"))
    path = globe.user_cache() / f"smol-moe-{args.experts}"
    return globe.Checkpoint(path if (path / "config.json").is_file() else build_smol_moe(smol_source(), path, args.experts))


def config_of(preset: str) -> str:
    """The config file of a preset's fits; tiny's holds the defaults."""
    return str(CONFIGS / ("smol.yaml" if preset == "smol-moe" else "tiny.yaml"))


# ---- quality -----------------------------------------------------------------------------------------
def quality_texts(tokenizer, count: int = 12, files: list | tuple = ()) -> tuple:
    """({text name: windows (N, 512)}, calibration text): evaluation windows are never in the calibration text.

    topics: tokens i * 4096 + 512 .. i * 4096 + 1024 of pydoc_data.topics, i = 0..count-1; code: argparse.py and tarfile.py;
    license: CPython's LICENSE.txt; files: more texts, each named by its stem. Prints Python's version and the texts' hashes, since
    the figures depend on them. UserError: a file of a name that is taken, or whose text is calibrated on.
    """
    from pydoc_data.topics import topics
    root = Path(sysconfig.get_path("stdlib"))
    prose = "\n\n".join(topics[k] for k in sorted(topics))
    ids = torch.tensor(tokenizer(prose, add_special_tokens=False, verbose=False)["input_ids"])
    chunks = [(i * 4096 + 512, i * 4096 + 1024) for i in range(count) if i * 4096 + 1024 <= len(ids)]
    texts = {"code": "".join((root / f).read_text() for f in ("argparse.py", "tarfile.py"))}
    if (root / "LICENSE.txt").is_file():
        texts["license"] = (root / "LICENSE.txt").read_text()
    for f in files:
        if Path(f).stem in ("topics", *texts):
            raise UserError(f"--text {f}: expected a file of another name than the texts' {['topics', *texts]}")
        texts[Path(f).stem] = globe.read_text(f, "test")
    windows = {"topics": torch.stack([ids[a:b] for a, b in chunks])}
    windows |= {k: globe.token_windows(tokenizer, v, count * 512, 512) for k, v in texts.items()}
    sums = {k: hashlib.sha256(v.encode()).hexdigest()[:12] for k, v in (texts | {"topics": prose}).items()}
    say(f"texts: Python {sys.version.split()[0]}, sha256 {sums}")
    rest = [ids[b:a] for (_, b), (a, _) in zip([(0, 0), *chunks], [*chunks, (len(ids), 0)])]
    others = globe.builtin_text("train")[:len(prose)] + globe.builtin_text("calibration")[:len(prose)]
    calibration = "\n\n".join([tokenizer.decode(r) for r in rest] + [others])
    for f in files:
        parts = [tokenizer.decode(w[:64]) for w in windows[Path(f).stem]]
        if found := sum(part in calibration for part in parts):
            raise UserError(f"--text {f}: expected a text that is not calibrated on, found {found} of {len(parts)} windows in the calibration text")
    return windows, calibration


# Peers, written from their papers: each gives ({(family, layer, expert): W^ (p, d)}, stored numbers) of gate and up.
# L: {layer: (d, d)} is the Cholesky factor of the inputs' second moment, the same that GloBE's fit uses.
def layer_weights(ckpt: globe.Checkpoint, family: str, layer: int) -> torch.Tensor:  # -> (E, p, d)
    return torch.stack([ckpt.expert(family, layer, e).float() for e in range(ckpt.dims.experts)])


def low_rank(W: torch.Tensor, rank: int, L: torch.Tensor | None) -> torch.Tensor:
    """argmin over rank-`rank` matrices of ||(W - W^) L|| for W (E, p, d): truncated SVD of W L (SVD-LLM, eq. 4)."""
    U, S, V = torch.linalg.svd(W if L is None else W @ L, full_matrices=False)
    out = U[..., :rank] * S[:, None, :rank] @ V[:, :rank]
    return out if L is None else torch.linalg.solve_triangular(L, out, upper=False, left=False)


def peer_svd(ckpt: globe.Checkpoint, ratio: float, L: dict) -> tuple:
    """Truncated SVD of every matrix; with L whitened, as in SVD-LLM (Wang et al. 2024)."""
    D = ckpt.dims
    rank = max(1, int(ratio * D.p * D.d / (D.p + D.d)))
    out = {(f, l, e): W for l in D.layers for f in ("gate", "up")
           for e, W in enumerate(low_rank(layer_weights(ckpt, f, l), rank, L.get(l)))}
    return out, len(out) * rank * (D.p + D.d)


def peer_layer_pca(ckpt: globe.Checkpoint, ratio: float, L: dict) -> tuple:
    """One basis (r, d) per layer for all its gates and ups: the leading right singular directions of W L, stacked."""
    D, out = ckpt.dims, {}
    r = int(ratio * 2 * D.experts * D.p * D.d / (2 * D.experts * D.p + D.d))
    for l in D.layers:
        WL = torch.cat([layer_weights(ckpt, f, l) for f in ("gate", "up")]) @ L[l]
        Q = torch.linalg.eigh((WL.mT @ WL).sum(0).double())[1][:, -r:].float()
        W = torch.linalg.solve_triangular(L[l], WL @ Q @ Q.T, upper=False, left=False)
        out |= {(f, l, e): W[i * D.experts + e] for i, f in enumerate(("gate", "up")) for e in range(D.experts)}
    return out, len(D.layers) * r * (2 * D.experts * D.p + D.d)


def peer_d2(ckpt: globe.Checkpoint, ratio: float, L: dict) -> tuple:
    """The mean of a layer's experts plus a whitened low-rank delta for each (D2-MoE, Gu et al. 2025; plain mean)."""
    D, out = ckpt.dims, {}
    rank = int((ratio * D.experts - 1) * D.p * D.d / (D.experts * (D.p + D.d)))
    for l in D.layers:
        for f in ("gate", "up"):
            W = layer_weights(ckpt, f, l)
            delta = low_rank(W - W.mean(0), rank, L[l]) if rank > 0 else torch.zeros_like(W)
            out |= {(f, l, e): w for e, w in enumerate(W.mean(0) + delta)}
    return out, 2 * len(D.layers) * (D.p * D.d + max(0, rank) * D.experts * (D.p + D.d))


def peer_slbf(ckpt: globe.Checkpoint, ratio: float, steps: int, device: torch.device) -> tuple:
    """Low-rank bases shared by a layer's experts, data-free: W_i = sum_j alpha_ij U_j V_j, two bases per expert, from each
    expert's own SVD (so it starts at the plain SVD), then Adam on U, V and alpha; on a GPU for all layers and families at once."""
    D, E = ckpt.dims, ckpt.dims.experts
    m, keys = 2 * E, [(f, l) for l in D.layers for f in ("gate", "up")]
    k = int((ratio * E * D.p * D.d - E * m) / (m * (D.p + D.d)))
    W = torch.stack([layer_weights(ckpt, f, l) for f, l in keys])  # (G, E, p, d)
    scale = W.square().mean((1, 2, 3), keepdim=True).sqrt()
    U, S, V = torch.linalg.svd(W / scale, full_matrices=False)
    root = S[..., :2 * k].sqrt()
    U = (U[..., :2 * k] * root[..., None, :]).unflatten(-1, (2, k)).movedim(-2, 2).reshape(-1, m, D.p, k)
    x = [U, (root[..., None] * V[..., :2 * k, :]).reshape(-1, m, k, D.d), (torch.eye(E).repeat_interleave(2, 1) + 1e-3).repeat(len(keys), 1, 1), W / scale]
    at_once = 1 if device.type == "cpu" else len(keys)  # what one fit moves stays in a CPU's cache
    build = lambda U, V, a: (a @ (U @ V).flatten(2)).unflatten(2, (D.p, D.d))  # noqa: E731
    best = torch.cat([fit_adam([t.to(device) for t in part], build, steps).cpu() for part in zip(*(t.split(at_once) for t in x))]) * scale
    out = {(*key, e): w for key, each in zip(keys, best) for e, w in enumerate(each)}
    return out, len(keys) * m * (k * (D.p + D.d) + E)


def fit_adam(start: list, build, steps: int, lr: float = 2e-3) -> torch.Tensor:
    """build(*x) after Adam on ||W - build(*x)||^2 for start [*x, W (G, ...)]: G independent fits; each as it began where that is no worse."""
    *x, W = start
    x = [t.clone().requires_grad_() for t in x]
    opt, start = torch.optim.Adam(x, lr, fused=True), build(*x).detach()
    for step in tqdm(range(steps), desc="adam", leave=False):
        opt.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        opt.zero_grad()
        out = build(*x)
        out.backward((out.detach() - W) * (2 / W[0].numel()))  # of the sum of the fits' mean squares
        opt.step()
    end = build(*x).detach()
    better = (W - end).flatten(1).norm(dim=1) < (W - start).flatten(1).norm(dim=1)
    return torch.where(better.view(-1, *[1] * (W.ndim - 1)), end, start)


@torch.no_grad()
def pruned(ckpt: globe.Checkpoint, ratio: float, windows: torch.Tensor, device: torch.device) -> tuple:
    """(model without its least useful experts, equivalent ratio): REAP (Lasby et al. 2025) at the whole model's equal size.

    Saliency of an expert: mean over its tokens of router weight times the norm of its output. Dropping one expert saves
    its gate, up and down, so the size of gate+up that the others are held to allows fewer drops; rounded in its favour.
    """
    from transformers import AutoModelForCausalLM
    D, model, score, hooks = ckpt.dims, globe.load_dense(ckpt.dir, device, None), {}, []

    def hook(layer):
        def collect(module, args, kwargs):
            x, index, weight = (*args, *kwargs.values())[:3]
            total, count = score.setdefault(layer, (torch.zeros(D.experts), torch.zeros(D.experts)))
            for e in index.unique().tolist():
                token, slot = (index == e).nonzero(as_tuple=True)
                h = module._apply_gate(torch.nn.functional.linear(x[token], module.gate_up_proj[e]))
                out = torch.nn.functional.linear(h, module.down_proj[e]).norm(dim=-1)
                total[e] += float((weight[token, slot] * out).sum())
                count[e] += len(token)
        return collect
    for l, (_, _, m) in globe.experts_modules(model).items():
        hooks.append(m.register_forward_pre_hook(hook(l), with_kwargs=True))
    globe.nll(model, windows)
    for h in hooks:
        h.remove()
    keep_n = math.ceil(D.experts - (1 - ratio) * 2 * D.experts / 3)
    config = type(model.config)(**{**model.config.to_dict(), "num_experts": keep_n})
    small = AutoModelForCausalLM.from_config(config, dtype=ckpt.dtype).eval()
    state, like = model.state_dict(), small.state_dict()
    for name, t in state.items():
        if t.shape != like[name].shape:
            total, count = score[int(name.split("layers.")[1].split(".")[0])]
            keep = (total / count.clamp_min(1)).topk(keep_n).indices.sort().values
            state[name] = t[keep]
    small.load_state_dict(state)
    return small.to(device), 1 - (D.experts - keep_n) * 3 / (2 * D.experts)


@torch.no_grad()
def put_experts(model: torch.nn.Module, weights: dict, p: int) -> None:
    """Write dense weights {(family, layer, expert): (p, d)} into a stock model's fused gate_up_proj."""
    modules = globe.experts_modules(model)
    for (f, layer, e), W in weights.items():
        row = slice(0, p) if f == "gate" else slice(p, None)
        modules[layer][2].gate_up_proj[e, row] = W.to(modules[layer][2].gate_up_proj.dtype)


def frobenius(ckpt: globe.Checkpoint, weights: dict) -> dict:
    """Relative Frobenius error per family of reconstructed weights."""
    out = {}
    for f in ("gate", "up"):
        pairs = [(ckpt.expert(f, layer, e).float(), W) for (g, layer, e), W in weights.items() if g == f]
        out[f] = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs))
    return out


CLOSED_FORM = ("svd", "svd-llm", "layer-pca", "d2")
PEERS = (*CLOSED_FORM, "mobe", "slbf", "reap")


def bench_quality(preset: str, args: argparse.Namespace) -> list:
    """Perplexity change of GloBE and its peers at the same stored size, on the same calibration and evaluation text. With --json FILE
    every method's rows are in FILE.part once it is measured; --resume keeps what is in either, of the same texts and settings."""
    ckpt, device = checkpoint_of(preset, args), globe.pick_device(args.device)
    D, tokenizer = ckpt.dims, globe.load_tokenizer(ckpt.dir)
    windows, calibration = quality_texts(tokenizer, args.windows, args.text)
    settings = dataclasses.asdict(globe.load_config(config_of(preset), args.set))
    same = [ckpt.fingerprint(), {k: w.tolist() for k, w in windows.items()}, calibration, settings, args.steps, args.heal]
    run, before = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16], {}
    for file in (Path(args.json), Path(f"{args.json}.part")) if args.resume else ():
        if file.is_file():
            try:
                before |= {(r["asked"], r["variant"], r["text"]): r for r in json.loads(file.read_text(encoding="utf-8"))["rows"] if r.get("run") == run}
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(f"--resume: {file}: expected what bench.py wrote, found something else") from None
    rows = list(before.values())
    if args.resume:
        say(f"--resume: {len(rows) // len(windows)} methods and sizes were measured on these texts with these settings")
    model = globe.load_dense(ckpt.dir, device, None)

    def losses(model) -> dict:
        if device.type == "cpu":
            model.set_experts_implementation("eager")  # a sixth faster than grouped_mm on smol-moe
        return {k: globe.nll(model, w)[0] for k, w in windows.items()}
    dense = losses(model)
    say(f"{preset}: dense perplexity " + ", ".join(f"{k} {math.exp(v):.2f}" for k, v in dense.items()))

    def add(variant: str, model, ratio: float, rel_frob: dict, seconds: float, scope, support=None, **more) -> None:
        for text, loss in losses(model).items():
            delta = loss - dense[text]
            rows.append({"suite": "quality", "preset": preset, "test": f"{D.experts}x{D.p}", "variant": variant, "text": text,
                         "ratio": ratio, "value": delta, "unit": "nats", "delta_nats": delta, "rel_frob": rel_frob,
                         "seconds": round(seconds, 1), "scope": scope, "support": support, "asked": asked, "run": run, **more})
            say(f"  {variant:9s} ratio {ratio:.3f} {text:8s} delta {delta:+.4f} nats, error {rel_frob}, {seconds:.0f} s")

    def fitted(variant: str, *settings: str) -> None:
        nonlocal model
        model = None  # one model in memory at a time
        result = quiet(["fit", *settings, "--out", f"{scratch}/{variant}-{asked}", f"model.path={ckpt.dir}", f"bank.ratio={asked}", "bank.r=null",
                        "--device", str(device)])
        factors, seconds = globe.load_factors(result["factors"]), result["seconds"]

        def measure(name: str, factors: globe.Factors, errors: dict, seconds: float) -> None:
            add(name, globe.assemble(ckpt, factors, device), result["ratio"], errors, seconds,
                factors.config["bank"]["scope"], result["support"], metric=factors.config["fit"]["metric"])
        measure(variant, factors, result["rel_frob"], seconds)
        if args.heal and variant == "globe":
            healed = quiet(["heal", "--factors", result["factors"], "--out", f"{scratch}/healed-{asked}", f"calib.text={text}", "calib.sampled=0",
                            "--device", str(device), *(s for s in args.set if s.startswith("heal."))])
            factors = globe.load_factors(healed["factors"])
            errors = {f: e["all"] for f, e in globe.reconstruction(ckpt, factors).items()}
            measure("globe+heal", factors, errors, seconds + healed["seconds"])
        model = globe.load_dense(ckpt.dir, device, None)

    def factor_of_inputs() -> dict:
        """{layer: Cholesky factor of the inputs' second moment}; calibrates when first asked. The peers' ridge is the default: 0.1
        is worse for them (README)."""
        if not moments:
            moments.update(globe.calibrate(ckpt, cfg, device))
            globe.save_moments(Path(scratch) / "calibration.safetensors", moments, ckpt.fingerprint())
        return {l: globe.metric_factor(C, globe.FitConfig().ridge) for l, C in moments["inputs"].items()}
    peers, moments = [q for p in args.peers for q in {"closed": CLOSED_FORM, "all": PEERS, "none": ()}.get(p, (p,))], {}
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "calibration.txt"
        text.write_text(calibration, encoding="utf-8")
        cfg = globe.load_config(config_of(preset), [*args.set, f"calib.text={text}"])
        for asked, variant in ((ratio, v) for ratio in args.ratio for v in (*peers, "globe")):
            if (asked, variant, "topics") in before:
                continue
            L = factor_of_inputs() if variant in ("svd-llm", "layer-pca", "d2", "globe") else {}
            begin = time.perf_counter()  # the calibration is nobody's own
            if variant == "globe":
                fitted("globe", "--config", config_of(preset), *args.set, "calib.save=null", f"calib.load={scratch}/calibration.safetensors")
            elif variant == "mobe":  # its own form, r fitted to the size instead of r = p; data-free
                fitted("mobe", "--config", str(CONFIGS / "mobe.yaml"), f"fit.steps={args.steps or 3000}")
            elif variant == "reap":
                if preset == "tiny":  # smol-moe has no routing to prune by
                    small, size = pruned(ckpt, asked, globe.token_windows(tokenizer, calibration, cfg.calib.tokens, cfg.calib.length), device)
                    add("reap", small, size, {}, time.perf_counter() - begin, "expert")
            else:
                with globe.threads_for(D.p, D.d), globe.memory_kept():
                    weights, stored = {"svd": lambda: peer_svd(ckpt, asked, {}), "svd-llm": lambda: peer_svd(ckpt, asked, L),
                                       "layer-pca": lambda: peer_layer_pca(ckpt, asked, L), "d2": lambda: peer_d2(ckpt, asked, L),
                                       "slbf": lambda: peer_slbf(ckpt, asked, args.steps or 3000, device)}[variant]()
                seconds = time.perf_counter() - begin
                put_experts(model, weights, D.p)
                add(variant, model, stored / (2 * len(D.layers) * D.experts * D.p * D.d), frobenius(ckpt, weights), seconds,
                    {"layer-pca": "layer", "d2": "layer", "slbf": "layer"}.get(variant, "expert"))
            if args.json:
                globe.write_text(Path(f"{args.json}.part"), json.dumps({"rows": rows}))
    rows.sort(key=lambda r: -r["asked"])  # kept ones and new ones of a size together
    say(globe.text_table(("method", "ratio", "scope", *windows, "seconds"),
                         [(r["variant"], r["ratio"], r["scope"], *(q["delta_nats"] for q in group), r["seconds"])
                          for group in grouped(rows, len(windows)) for r in group[:1]]))
    if args.png:
        plot_quality(rows, Path(args.png))
    return rows


def grouped(rows: list, n: int) -> list:
    return [rows[i:i + n] for i in range(0, len(rows), n)]


def plot_quality(rows: list, path: Path) -> None:
    """delta_nats against size, a panel per text, a marker per method; readable in greyscale."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    texts, variants = list(dict.fromkeys(r["text"] for r in rows)), list(dict.fromkeys(r["variant"] for r in rows))
    fig, axes = plt.subplots(1, len(texts), figsize=(4.5 * len(texts), 4), sharey=True, squeeze=False)
    for ax, text in zip(axes[0], texts):
        for variant, marker, line in zip(variants, "osv^D*PX<", ("-", ":", "--", "-.", ":", "--", "-.", "-", "--")):
            mine = sorted((r["ratio"], r["delta_nats"]) for r in rows if (r["text"], r["variant"]) == (text, variant))
            ours = variant.startswith("globe")
            ax.plot(*zip(*mine), marker=marker, linestyle="-" if variant == "globe" else line, color="black" if ours else "0.5", label=variant)
        ax.set(title=text, xlabel="stored / dense size of gate and up", yscale="log")
        ax.locator_params(axis="x", nbins=4)
    axes[0][0].set_ylabel("increase of the loss (nats per token)")
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1))
    fig.tight_layout()
    with globe.written(path) as tmp:
        fig.savefig(tmp, dpi=120, format="png")
    plt.close(fig)


def quiet(argv: list) -> dict:
    """Run a globe command in this process; its JSON, with stdout kept for ours."""
    with contextlib.redirect_stdout(out := io.StringIO()):
        code = globe.main(argv)
    if code:
        raise UserError(f"globe {' '.join(argv)} ended with exit code {code}")
    return json.loads(out.getvalue().splitlines()[-1])


# ---- operators ---------------------------------------------------------------------------------------
D, P, M, S, E, TOP_K = 2048, 1408, 128, 12, 60, 4  # Qwen1.5-MoE-A2.7B; a bank of 128 bases, supports of 12


def bandwidth(device: torch.device) -> float:
    """Bytes/s that this machine moves, measured now: the better of torch's copy and of a read of 512 MiB."""
    a = torch.ones(2 ** 27, device=device)
    b, turns = torch.empty_like(a), range(5)
    copy = 2 * a.nbytes / min(timed(lambda: b.copy_(a), device) for _ in turns)
    return max(copy, a.nbytes / min(timed(a.amax, device) for _ in turns))


def race(suite: str, test: str, variants: dict, want, traffic: float, tol: float, args: argparse.Namespace, device: torch.device, **more) -> list:
    """Rows of one operator: each variant's result for input 0 is asserted against `want`, then all are timed turn by turn.

    variants: {name: function of the turn, a rotating index, so that no input is still in a cache}; "native" is ours, "twin"
    our torch form, the others are peers. traffic: bytes that must move. `value` is milliseconds, `ratio` the best peer's
    time over this variant's.
    """
    peers = [name for name in variants if name not in ("native", "twin")]
    for name, run in variants.items():
        with torch.set_grad_enabled(suite == "sparsemax"):
            got = run(0)
        error = max(float((g.detach().double() - w.detach().double()).abs().max()) for g, w in zip(got, want))
        if not error <= tol:
            raise RuntimeError(f"{suite} {test}: {name} is off by {error}, more than {tol}")
    seconds, slow, begun, warm, turn = {name: [] for name in variants}, set(), time.perf_counter(), 2, 0
    while turn < warm + 2 * args.repeats:
        if turn == 2:  # the first allocations of a process are dear: quick operators get a fifth of a second to settle
            warm = max(2, min(20, int(0.2 * turn / (time.perf_counter() - begun))))
            first = {name: min(s) for name, s in seconds.items()}
            slow = {name for name in peers if first[name] > 5 * min(first[n] for n in peers)}  # those are timed no more
        for name, run in variants.items():
            if name in slow:
                continue
            globe.synchronize(device)
            begin = time.perf_counter()
            with torch.set_grad_enabled(suite == "sparsemax"):
                run(turn)
            globe.synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
        turn += 1
    middle = {name: statistics.median(s[warm:] or s) for name, s in seconds.items()}
    best, top = min((middle[name] for name in peers), default=math.nan), bandwidth(device)
    rows = [{"suite": suite, "test": test, "variant": name, "value": round(1e3 * t, 4), "unit": "ms", "ratio": round(best / t, 2),
             "bytes": int(traffic), "gbps": round(traffic / t / 1e9, 2), "share_of_bandwidth": round(traffic / t / top, 3), **more}
            for name, t in middle.items()]
    say(globe.text_table(("test", "variant", "ms", "x best peer", "GB/s", "of bandwidth"),
                         [(test, r["variant"], r["value"], r["ratio"], r["gbps"], r["share_of_bandwidth"]) for r in rows]))
    return rows


def need_native(op: str, device: torch.device) -> None:
    if not globe._native(op, device.type):
        raise UserError(f"{op}: no native operator on {device} ({globe.kernels()})")


def bench_compose(preset: str, args: argparse.Namespace) -> list:
    """One pass over 60 experts, and one expert (a cache miss), against torch's best ways; silu."""
    device, dtype, rows, g = globe.pick_device(args.device), globe.as_dtype(args.dtype) or torch.bfloat16, [], torch.Generator().manual_seed(0)
    need_native("compose", device)
    for r in (768, 1408):
        bank = torch.empty(M, r, D, dtype=dtype, device=device)
        for b in bank:
            b.copy_(torch.randn(r, D, generator=g))
        idx = torch.stack([torch.randperm(M, generator=g)[:S] for _ in range(E)]).to(device)
        val = torch.rand(E, S, generator=g).to(device)
        weights = torch.zeros(E, M, device=device).scatter_(1, idx, val).to(dtype)
        picks, out = [(i, v) for i, v in zip(idx.tolist(), val.tolist())], torch.empty(E, r, D, dtype=dtype, device=device)

        def adds(turn: int, wide: torch.dtype):
            js, alphas = picks[turn % E]
            z = (bank[js[0]] * alphas[0]).to(wide)
            for j, a in zip(js[1:], alphas[1:]):
                z.add_(bank[j], alpha=a)
            return torch.nn.functional.silu(z, inplace=True).to(dtype)[None]

        def each(turn: int):
            for e in range(E):
                out[e] = adds(turn + e, dtype)[0]
            return out[:1]

        def widened(turn: int, rows: int = 32):  # the dense product in float32, where those of the dtype are slow; the bank in pieces
            for a in range(0, r, rows):
                z = torch.mm(weights.float(), bank[:, a:a + rows].reshape(M, -1).float())
                out[:, a:a + rows] = torch.nn.functional.silu(z, inplace=True).view(E, rows, D)
            return out[:1]
        want = torch.nn.functional.silu(torch.einsum("s,srd->rd", val[0], bank[idx[0]].float()))[None]
        size, item = r * D, bank.element_size()
        rows += race("compose", f"60 experts, r {r}", {
            "native": lambda turn: globe.compose(bank, idx, val, "silu", out=out),
            **({} if globe.slow_products(dtype, device.type) else {"dense product": lambda turn: torch.nn.functional.silu(
                torch.mm(weights, bank.view(M, -1), out=out.view(E, -1)), inplace=True).view(E, r, D)[:1]}),
            "dense product, float32": widened, "scaled adds of each": each,
        }, want, (len(idx.unique()) + E) * size * item, 0.2, args, device, dtype=str(dtype))
        rows += race("compose", f"1 expert, r {r}", {
            "native": lambda turn: globe.compose(bank, idx[turn % E:turn % E + 1], val[turn % E:turn % E + 1], "silu", out=out[:1]),
            "scaled adds": lambda turn: adds(turn, dtype), "scaled adds, float32": lambda turn: adds(turn, torch.float32),
            "dense product": lambda turn: torch.nn.functional.silu(weights[turn % E] @ bank.view(M, -1)).view(1, r, D),
        }, want, (S + 1) * size * item, 0.2, args, device, dtype=str(dtype))
    return rows


def bench_sparsemax(preset: str, args: argparse.Namespace) -> list:
    """sparsemax and entmax-1.5, forward and backward, against the `entmax` package and our torch form."""
    device, rows, g = globe.pick_device(args.device), [], torch.Generator().manual_seed(0)
    need_native("simplex", device)
    if not importlib.util.find_spec("entmax"):
        say("sparsemax: the peer is the package entmax, which is not installed: no ratio")
    for shape in ((1440, 128), (24, 60, 256)):
        x, grad = (torch.randn(shape, generator=g).to(device) for _ in range(2))
        for name in ("sparsemax", "entmax15"):
            def both(f, x=x):
                leaf = x.detach().requires_grad_()
                y = f(leaf, dim=-1)
                y.backward(grad)
                return y, leaf.grad

            def twin(leaf, dim):
                return globe._SimplexMap.apply(leaf, 2.0 if name == "sparsemax" else 1.5)
            variants = {"native": lambda turn: both(getattr(globe, name)), "twin": lambda turn: both(twin)}
            if importlib.util.find_spec("entmax"):
                import entmax
                variants["entmax"] = lambda turn: both(getattr(entmax, name))
            rows += race("sparsemax", f"{name} {tuple(shape)}", variants, both(twin, x.double()), 5 * x.nbytes, 1e-4, args, device)
    return rows


def bench_operator(args: argparse.Namespace) -> list:
    """One token through one Qwen1.5-MoE layer, all of it cached: experts_decode against transformers' experts."""
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts
    device, dtype, rows, g = globe.pick_device(args.device), globe.as_dtype(args.dtype) or torch.bfloat16, [], torch.Generator().manual_seed(0)
    need_native("experts_decode", device)
    config = Qwen2MoeConfig(hidden_size=D, moe_intermediate_size=P, num_experts=E, num_experts_per_tok=TOP_K)
    with torch.device("meta"):
        dense = Qwen2MoeExperts(config)
    dense = dense.to(dtype).to_empty(device=device)

    def new(*shape: int) -> torch.Tensor:
        t = torch.empty(shape, dtype=dtype, device=device)
        for part in t:
            part.copy_(torch.randn(shape[1:], generator=g) / shape[-1] ** 0.5)
        return t
    down, table, shift = new(E, D, P), torch.arange(E, device=device), [0.0] * 3
    dense.down_proj.data.copy_(down)
    for r in (768, 1408):
        A = [new(E, P, r) for _ in "gu"] if r < P else [None, None]
        held = [new(E, r, D) for _ in "gu"]
        for i, (a, w) in enumerate(zip(A, held)):  # the peers hold the same weights, multiplied out
            for e in range(E):
                dense.gate_up_proj.data[e, i * P:(i + 1) * P] = w[e] if a is None else a[e] @ w[e]
        x, turns = torch.randn(1, D, generator=g).to(device, dtype), 16
        index = [torch.randperm(E, generator=g)[None, :TOP_K].to(device) for _ in range(turns)]
        weights = torch.full((1, TOP_K), 0.25, device=device)
        want = torch.zeros(1, D, device=device)
        for e in index[0][0].tolist():
            gate, up = (w[e].float() @ x[0].float() if a is None else a[e].float() @ (w[e].float() @ x[0].float()) for a, w in zip(A, held))
            want += 0.25 * (down[e].float() @ (torch.nn.functional.silu(gate) * up))

        def stock(how: str):
            def run(turn: int):
                dense.config._experts_implementation = how
                return dense(x, index[turn % turns], weights.to(dtype))
            return run
        variants = {"native": lambda turn: torch.ops.globe.experts_decode(x, index[turn % turns], weights, table, table, held[0], A[0], held[1], A[1],
                                                                          down, None, [1, 1, 0], [1.0] * 3, shift, "silu")}
        variants |= {how: stock(how) for how in ("eager", "grouped_mm", "batched_mm")}
        traffic = TOP_K * (2 * (r * D + (P * r if r < P else 0)) + D * P) * down.element_size()
        rows += race("decode", f"one token, r {r}" if r < P else "one token, weights held", variants, want, traffic, 0.05, args, device,
                     preset="qwen15-layer", dtype=str(dtype))
    return rows


# ---- decode: whole models ----------------------------------------------------------------------------
DENSE = ("eager", "grouped_mm", "batched_mm")  # transformers' ways to run experts; the best of them is the peer
SHARE = 0.25                                   # of the experts that the caches of `warm` and `cold` hold


def tensor_gib(model: torch.nn.Module) -> float:
    """GiB that parameters, buffers and caches take."""
    size = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values())
    return size / 2 ** 30 + globe.cache_stats(model)["cache_mib"] / 1024


@torch.no_grad()
def timed(run, device: torch.device) -> float:
    globe.synchronize(device)
    begin = time.perf_counter()
    run()
    globe.synchronize(device)
    return time.perf_counter() - begin


@torch.no_grad()
def prefill(model, ids: torch.Tensor, device: torch.device) -> float:
    """Seconds from a prompt ids (1, n) to its first new token."""
    return timed(lambda: int(model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax()), device)


@torch.no_grad()
def decode(model, ids: torch.Tensor, prompt: int, device: torch.device) -> float:
    """Seconds for the tokens of a text after its first `prompt`, one at a time: the same for every model, and a real text."""
    past = model(ids[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values

    def run() -> None:
        for token in ids[:, prompt:].split(1, 1):
            int(model(token, past_key_values=past, use_cache=True).logits[0, -1].argmax())
    return timed(run, device)


def measure(make: dict, text: torch.Tensor, args: argparse.Namespace, device: torch.device, preset: str, load: dict) -> list:
    """Rows of pp, tg and load for {(variant, how): function that makes the model}: memory one by one, then speed turn by turn."""
    prompts = {f"pp{args.prefill}": lambda m: prefill(m, text[:, :args.prefill], device),
               f"tg{args.tokens}": lambda m: decode(m, text[:, :8 + args.tokens], 8, device)}
    peak, seconds, stats, models = {}, {}, {}, {}
    for k in make:
        gc.collect()
        globe.reset_peak(device)
        model = make[k]()
        for run in prompts.values():
            run(model)
        peak[k], model = globe.peak_gib(device), None
    models = {k: f() for k, f in make.items()}
    for test, run in prompts.items():
        for turn in range(args.repeats + 1):
            for k, m in models.items():  # turn by turn, so that a slow spell hits all
                for e in globe.globe_modules(m):
                    e.cache.count()
                    if k[1] == "cold":
                        e.cache.forget()
                seconds.setdefault((test, *k), []).append(run(m))
                stats[(test, *k)] = globe.cache_stats(m)
    rows = []
    for test in prompts:
        speed = {k: [int(test[2:]) / s for s in seconds[(test, *k)][1:]] for k in models}
        best = max(statistics.median(v) for (variant, _), v in speed.items() if variant == "dense")
        for (variant, how), values in speed.items():
            value, st = statistics.median(values), stats[(test, variant, how)]
            rows.append({"suite": "decode", "preset": preset, "test": test, "variant": variant, "implementation": how,
                         "cache": how if variant == "globe" else None, "value": round(value, 2), "unit": "tokens/s", "ratio": round(value / best, 3),
                         "spread": round(statistics.pstdev(values), 2), "ttft_ms": round(1e3 * int(test[2:]) / value, 2) if test[:2] == "pp" else None,
                         "peak_gib": round(peak[variant, how], 3), "weights_gib": round(tensor_gib(models[variant, how]), 5),
                         "cache_mib": round(st["cache_mib"], 3), "hit_rate": round(st["hit_rate"], 4) if variant == "globe" else None})
    took = {k: [] for k in load}
    for turn in range(args.repeats + 1):
        for k, f in load.items():
            took[k].append(timed(f, device))
    fastest = min((statistics.median(s[1:]) for k, s in took.items() if k == "dense"), default=math.nan)
    rows += [{"suite": "decode", "preset": preset, "test": "load", "variant": k, "implementation": None, "cache": None, "unit": "s",
              "value": round(statistics.median(s[1:]), 4), "ratio": round(fastest / statistics.median(s[1:]), 3),
              "spread": round(statistics.pstdev(s[1:]), 4), "peak_gib": None} for k, s in took.items()]
    show(rows)
    return rows


def show(rows: list) -> None:
    say(globe.text_table(("test", "variant", "how / cache", "value", "unit", "x best dense", "peak GiB", "tensors GiB", "cache MiB", "hit rate"),
                         [(r["test"], r["variant"], r["implementation"], r["value"], r["unit"], r["ratio"], r["peak_gib"], r.get("weights_gib"),
                           r.get("cache_mib"), r.get("hit_rate")) for r in rows]))


def sweep(make, text: torch.Tensor, experts: int, args: argparse.Namespace, device: torch.device, preset: str) -> list:
    """Rows of test "sweep": tokens/s and hit rate against the number of slots per layer; a plot with --png."""
    rows = []
    for slots in sorted({1, *(max(1, experts * i // 8) for i in range(1, 9))}):
        model = make(slots)
        for turn in range(3):
            for e in globe.globe_modules(model):
                e.cache.count()
            took = decode(model, text[:, :8 + args.tokens], 8, device)
        st = globe.cache_stats(model)
        rows.append({"suite": "decode", "preset": preset, "test": "sweep", "variant": "globe", "cache": "warm", "slots": slots, "unit": "tokens/s",
                     "value": round(args.tokens / took, 2), "ratio": None, "hit_rate": round(st["hit_rate"], 4),
                     "cache_mib": round(st["cache_mib"], 3), "weights_gib": round(tensor_gib(model), 5), "peak_gib": None})
    say(globe.text_table(("slots per layer", "cache MiB", "hit rate", "tokens/s"), [(r["slots"], r["cache_mib"], r["hit_rate"], r["value"]) for r in rows]))
    if args.png:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        fig, left = plt.subplots(figsize=(6, 4))
        right, x = left.twinx(), [r["cache_mib"] for r in rows]
        left.plot(x, [r["value"] for r in rows], "ko-", label="tokens/s")
        right.plot(x, [r["hit_rate"] for r in rows], "s--", color="0.5", label="hit rate")
        left.set(xlabel="MiB held by the caches", ylabel="tokens/s (circles)", title=f"{preset}: speed and hit rate against memory", ylim=(0, None))
        right.set(ylabel="hit rate (squares)", ylim=(0, 1.02))
        fig.tight_layout()
        with globe.written(Path(args.png)) as tmp:
            fig.savefig(tmp, dpi=120, format="png")
        plt.close(fig)
    return rows


def bench_decode(preset: str, args: argparse.Namespace) -> list:
    """Tokens/s of prompt (pp), decode (tg) and the seconds of loading: the dense model in each of its ways, and GloBE cold, warm, all."""
    if preset == "qwen15":
        return bench_24gib(args)
    device, dtype, source = globe.pick_device(args.device), globe.as_dtype(args.dtype) or torch.bfloat16, checkpoint_of("tiny", args)
    text = globe.token_windows(globe.load_tokenizer(source.dir), globe.builtin_text("heldout"), 2048, 2048)
    calibration = globe.token_windows(globe.load_tokenizer(source.dir), globe.builtin_text("calibration"), 512, 512)
    with tempfile.TemporaryDirectory() as scratch:
        scratch, rows = Path(scratch), []
        if preset == "tiny":
            factors = quiet(["fit", "--out", f"{scratch}/run", f"model.path={source.dir}", "fit.steps=10", *args.set])["factors"]
            quiet(["export", "--factors", factors, "--to", f"{scratch}/globe", "--no-check", "--dtype", str(dtype).removeprefix("torch.")])
            dense = globe.load_dense(source.dir, device, dtype)
            dense.save_pretrained(scratch / "dense")  # both in one dtype on one disk
        else:
            need_native("experts_decode", device)
            rows += bench_operator(args)
            write_qwen15(scratch / "dense", popularity(source, calibration), layers=1, vocab=4096)
            write_qwen15_globe(scratch / "dense", scratch / "globe", qwen15_config(args))
            text, calibration = (as_words("heldout", 2048, 4096), as_words("calibration", 512, 4096))
        text, experts = text.to(device), globe.dims_of(globe.read_json(scratch / "dense" / "config.json")).experts
        held = max(1, int(SHARE * experts))

        def dense_model(how: str):
            model = globe.load_dense(scratch / "dense", device, dtype)
            model.set_experts_implementation(how)
            return model

        def globe_model(**cache):
            model = globe.load(scratch / "globe", device, dtype, globe.CacheConfig(**cache))
            globe.warm(model, calibration)
            return model
        make = {("dense", how): lambda how=how: dense_model(how) for how in DENSE if preset == "tiny" or how != "batched_mm"}
        make |= {("globe", "all"): lambda: globe_model(mode="all"), ("globe", "warm"): lambda: globe_model(per_layer=held),
                 ("globe", "cold"): lambda: globe_model(per_layer=held), ("globe", "direct"): lambda: globe_model(mode="direct")}
        rows += measure(make, text, args, device, preset, {"dense": lambda: globe.load_dense(scratch / "dense", device, dtype),
                                                           "globe": lambda: globe.load(scratch / "globe", device, dtype)})
        if args.sweep:
            rows += sweep(lambda slots: globe_model(per_layer=slots), text, experts, args, device, preset)
    return rows


# ---- Qwen1.5-MoE's shapes, random weights --------------------------------------------------------------
BLOCK = 2 ** 24  # random numbers that all tensors are cut from


def popularity(ckpt: globe.Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    """(E,) the tiny model's shares of the routed tokens by rank, mean of its layers, stretched from its experts to Qwen's."""
    model, shares, hooks = globe.load_dense(ckpt.dir, torch.device("cpu"), None), [], []

    def note(module, args, kwargs) -> None:
        shares.append(torch.bincount((*args, *kwargs.values())[1].flatten(), minlength=ckpt.dims.experts).double().sort(descending=True).values)
    for _, _, m in globe.experts_modules(model).values():
        hooks.append(m.register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad():
        model(ids)
    curve = torch.nn.functional.interpolate((sum(shares) / sum(s.sum() for s in shares))[None, None], E, mode="linear")[0, 0]
    return curve / curve.sum()


def router_bias(shares: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """(E,) biases with which the top 4 of z + bias, router logits z (n, E) of a text, hit the experts with these shares."""
    bias = torch.zeros(len(shares))
    for step in range(300):
        hits = torch.bincount((z + bias).topk(TOP_K).indices.flatten(), minlength=len(shares)) + 1.0
        bias += 0.3 * 0.99 ** step * z.std() * (shares / (hits / hits.sum())).log().float()
    return bias


def as_words(split: str, n: int, vocab: int) -> torch.Tensor:
    """(1, n) ids of a real text's words, for a model with no tokenizer: each word has its number, so frequent ones recur."""
    words = re.findall(r"\w+|[^\w\s]", globe.builtin_text(split))[:n]
    return torch.tensor([[zlib.crc32(w.encode()) % vocab for w in words]])


class Shard:
    """A safetensors file written tensor by tensor; the header has room, so that the same bytes can be renamed later."""
    ROOM = 2 ** 16

    def __init__(self, path: Path, g: torch.Generator):
        self.path, self.f, self.table, self.at, self.g = path, open(path, "wb"), {}, 0, g
        self.f.seek(self.ROOM)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        raw = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
        self.f.write(raw.data)
        kind = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32", torch.int8: "I8"}[tensor.dtype]
        self.table[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [self.at, self.at + raw.size]}
        self.at += raw.size

    def noise(self, name: str, shape: tuple, block: torch.Tensor, scale: float) -> None:
        """bfloat16 numbers from the random block, which starts somewhere else for each tensor."""
        n = math.prod(shape)
        start = int(torch.randint(max(1, len(block) - n), (1,), generator=self.g))
        self.add(name, ((block[start:start + n] if n <= len(block) else block.repeat(-(-n // len(block)))[:n]) * scale).view(shape))

    def close(self) -> None:
        self.f.close()
        write_header(self.path, self.table)


def write_header(path: Path, table: dict) -> None:
    text = json.dumps({"__metadata__": {"format": "pt"}, **table}).encode()
    with open(path, "r+b") as f:
        f.write((Shard.ROOM - 8).to_bytes(8, "little") + text.ljust(Shard.ROOM - 8))


def write_index(to: Path) -> None:
    table = {}
    for path in sorted(to.glob("*.safetensors")):
        with open(path, "rb") as f:
            table |= {k: path.name for k in json.loads(f.read(int.from_bytes(f.read(8), "little"))) if k != "__metadata__"}
    (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def write_qwen15(to: Path, shares: torch.Tensor, layers: int = 24, vocab: int = 151936) -> None:
    """A Qwen1.5-MoE checkpoint of random bfloat16 weights, a shard per layer, whose router reproduces `shares`.

    Coordinate 0 of every embedding is large, so it stays nearly constant behind the norms, and the router's column 0 acts as
    a bias. A layer's experts lie on disk as the fused layout has them, so `rename(to, fused=True)` turns one into the other.
    """
    from transformers import Qwen2MoeConfig
    to.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    config = Qwen2MoeConfig(hidden_size=D, moe_intermediate_size=P, num_experts=E, num_experts_per_tok=TOP_K, num_hidden_layers=layers,
                            vocab_size=vocab, shared_expert_intermediate_size=4 * P, intermediate_size=5632, num_attention_heads=16,
                            num_key_value_heads=16, norm_topk_prob=False, architectures=["Qwen2MoeForCausalLM"], dtype=torch.bfloat16,
                            bos_token_id=None, eos_token_id=None)
    config.save_pretrained(to)
    block, offset = torch.randn(BLOCK, generator=g).bfloat16(), 10.0
    shard = Shard(to / "model-00.safetensors", g)
    embed = block.repeat(vocab * D // BLOCK + 1)[:vocab * D].view(vocab, D)
    embed[:, 0] = offset
    shard.add("model.embed_tokens.weight", embed)
    seen = embed[as_words("calibration", 2048, vocab)[0]].float()
    seen /= seen.square().mean(-1, keepdim=True).sqrt()  # what the routers see, but for what the layers add
    del embed
    shard.noise("lm_head.weight", (vocab, D), block, 0.02)
    shard.add("model.norm.weight", torch.ones(D, dtype=torch.bfloat16))
    shard.close()
    for l in range(layers):
        shard, base = Shard(to / f"model-{l + 1:02d}.safetensors", g), f"model.layers.{l}."
        for e in range(E):
            for n in ("gate", "up"):
                shard.noise(f"{base}mlp.experts.{e}.{n}_proj.weight", (P, D), block, 0.02)
        for e in range(E):
            shard.noise(f"{base}mlp.experts.{e}.down_proj.weight", (D, P), block, 0.02)
        for n, shape in (("gate", (4 * P, D)), ("up", (4 * P, D)), ("down", (D, 4 * P))):
            shard.noise(f"{base}mlp.shared_expert.{n}_proj.weight", shape, block, 0.01)
        for n in "qkvo":
            shard.noise(f"{base}self_attn.{n}_proj.weight", (D, D), block, 0.02)
            if n != "o":
                shard.add(f"{base}self_attn.{n}_proj.bias", torch.zeros(D, dtype=torch.bfloat16))
        router = 0.028 * torch.randn(E, D, generator=g)
        router[:, 0] = 0
        router[:, 0] = router_bias(shares[torch.randperm(E, generator=g)], seen @ router.T) / seen[0, 0]
        shard.add(f"{base}mlp.gate.weight", router.bfloat16())
        shard.noise(f"{base}mlp.shared_expert_gate.weight", (1, D), block, 0.01)
        for n in ("input_layernorm", "post_attention_layernorm"):
            shard.add(f"{base}{n}.weight", torch.ones(D, dtype=torch.bfloat16))
        shard.close()
    write_index(to)


def rename(directory: Path, fused: bool) -> None:
    """Give a checkpoint of write_qwen15 the fused layout's names, in place: only the headers change."""
    for path in sorted(directory.glob("*.safetensors"))[1:]:
        with open(path, "rb") as f:
            table = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        base = f"model.layers.{int(path.stem.split('-')[1]) - 1}.mlp.experts."
        spans = [[v["data_offsets"] for k, v in table.items() if k.startswith(base) and ("down" in k) == down] for down in (False, True)]
        if fused and len(spans[0]) == 2 * E:
            table = {k: v for k, v in table.items() if not k.startswith(base) and k != "__metadata__"}
            for n, shape, span in (("gate_up_proj", [E, 2 * P, D], spans[0]), ("down_proj", [E, D, P], spans[1])):
                table[base + n] = {"dtype": "BF16", "shape": shape, "data_offsets": [span[0][0], span[-1][1]]}
            write_header(path, table)
    write_index(directory)


def qwen15_config(args: argparse.Namespace) -> globe.Config:
    return globe.load_config(str(CONFIGS / "qwen15.yaml"), [o for o in args.set if o.startswith("cache.")])


def write_qwen15_globe(dense: Path, to: Path, cfg: globe.Config, consume: bool = False) -> None:
    """A globe export of the sizes in configs/qwen15.yaml beside such a checkpoint: random factors, everything else its own.

    consume: each of the checkpoint's layers is deleted when its own is written, where the disk has no room for both.
    """
    to.mkdir(parents=True)
    ckpt, g = globe.Checkpoint(dense), torch.Generator().manual_seed(1)
    layers = ckpt.dims.layers
    group = globe.Experts.groups_of([(l, 0) for l in layers], cfg.bank.scope)
    groups, families = len(set(group.values())), {}
    for f in globe.FAMILIES:
        owner = "gate" if cfg.bank.share and f == "up" else f
        m, r = globe.bank_shape(cfg, owner, len(layers) * E, groups, ckpt.dims)
        families[f] = {"m": m, "r": r, "s": min(cfg.sparsity.support, m), "groups": groups, "bank": owner,
                       "group": {str(l): g for l, g in group.items()}, "activation": cfg.bank.activation, "shift": 0.0, "scale": 1.0}
    meta = {"format_version": globe.FORMAT_VERSION, "globe_version": globe.__version__, "model_type": "qwen2_moe", "fingerprint": "random",
            "dims": dataclasses.asdict(ckpt.dims), "families": families,
            "experts": {str(l): list(range(E)) for l in layers}, "config": {"cache": dataclasses.asdict(cfg.cache)}}
    (to / "config.json").write_text(json.dumps(ckpt.config | {"quantization_config": {"quant_method": "globe"} | meta}))
    state, block = globe._skeleton(ckpt.config, torch.bfloat16, to, meta).state_dict(), torch.randn(BLOCK, generator=g).bfloat16()
    part = lambda name: re.search(r"layers\.(\d+)\.", name)[1] if ".layers." in name else "rest"  # noqa: E731
    for shard_of in dict.fromkeys(map(part, state)):
        shard = Shard(to / f"model-{shard_of}.safetensors", g)
        # the guard of one byte last, as safetensors orders them: what followed it would lie at odd addresses, and be slow to read
        for name in sorted((n for n in state if part(n) == shard_of), key=lambda n: n.endswith(".gate_up_proj")):
            shape = tuple(state[name].shape)
            if name.endswith(".gate_up_proj"):  # the dense one's name, if that is fused
                shard.add(name, torch.zeros(1, dtype=torch.int8))
            elif name in ckpt.shard_of:
                shard.add(name, ckpt.tensor(name))
            elif name.endswith("_idx"):
                shard.add(name, torch.stack([torch.randperm(families[name.split(".")[-1][:-4]]["m"], generator=g)[:shape[1]] for _ in range(E)]).int())
            elif name.endswith("_val"):
                shard.add(name, torch.full(shape, 1 / shape[1]))
            else:
                shard.noise(name, shape, block, 0.004 if name.endswith("_A") else 1.0)
        shard.close()
        if consume and shard_of != "rest":
            ckpt._open.clear()  # an open file keeps its room
            (dense / f"model-{int(shard_of) + 1:02d}.safetensors").unlink()


# ---- the 24-GiB case -----------------------------------------------------------------------------------
def mapped(directory: Path) -> torch.nn.Module:
    """The dense model over memory-mapped files in the fused layout: eager experts use the pages where they lie."""
    from safetensors.torch import load_file
    model = globe._skeleton(globe.read_json(directory / "config.json"), torch.bfloat16, directory)
    for path in sorted(directory.glob("*.safetensors")):
        for name, t in load_file(path).items():
            globe._assign(model, name, t)
    model.set_experts_implementation("eager")
    return globe._finish(model, directory, torch.device("cpu"))


def run_one(args: argparse.Namespace) -> list:
    """One contender of the 24-GiB case, in a process of its own: 8 tokens of prompt, then args.tokens more, after a run to warm up."""
    from transformers import AutoModelForCausalLM
    device, begin, where, cfg = torch.device("cpu"), time.perf_counter(), Path(args.dir), qwen15_config(args)
    text = as_words("heldout", 8 + 4 * args.tokens, 151936)
    if args.only == "globe":
        model = globe.load(where / "globe", cache=cfg.cache)
        globe.warm(model, as_words("calibration", 128, 151936))
    elif args.only == "mapped":
        model = mapped(where / "dense")
    else:
        more = {} if args.only == "plain" else {"device_map": "auto", "max_memory": {"cpu": f"{args.limit - 3:.0f}GiB"}, "offload_folder": str(where / "offload")}
        model = AutoModelForCausalLM.from_pretrained(where / "dense", dtype=torch.bfloat16, **more)
    load = time.perf_counter() - begin
    prompt = text[:, :8]
    first = prefill(model, prompt, device)
    for path in sorted((where / ("globe" if args.only == "globe" else "dense")).glob("*.safetensors")) if args.only in ("mapped", "globe") else ():
        with open(path, "rb", buffering=0) as f:  # what fits in memory shall be there
            while f.read(2 ** 24):
                pass
    speeds, turns = [], 1 if args.only == "offload" else 3
    for turn in range(turns):
        part = text[:, turn * args.tokens:][:, :8 + args.tokens]
        for m in globe.globe_modules(model):
            m.cache.count()
        speeds.append((part.shape[1] - 8) / decode(model, part, 8, device))
        say(f"  {args.only}: {speeds[-1]:.3f} tokens/s")
    st, timed_turns = globe.cache_stats(model), speeds[1:] or speeds
    value = statistics.median(timed_turns)
    return [{"suite": "decode", "preset": "qwen15", "test": f"tg{args.tokens}", "variant": "globe" if args.only == "globe" else "dense",
             "implementation": args.only, "cache": cfg.cache.mode if args.only == "globe" else None, "value": round(value, 4), "unit": "tokens/s",
             "spread": round(max(timed_turns) - min(timed_turns), 4), "peak_gib": round(globe.peak_gib(device), 2), "load_s": round(load, 2),
             "ttft_ms": round(1e3 * first, 1), "cache_mib": round(st["cache_mib"], 1),
             "hit_rate": round(st["hit_rate"], 4) if args.only == "globe" else None, "compose_share": round(st["compose_seconds"] * value / args.tokens, 3)}]


def watched(args: argparse.Namespace, only: str, tokens: int, seconds: float) -> list:
    """Rows of run_one in a process that is ended where its own memory passes --limit or its time is over; a row says so."""
    command = [sys.executable, __file__, "decode", "--preset", "qwen15", "--only", only, "--dir", args.dir, "--tokens", str(tokens),
               "--limit", str(args.limit), *(["--set", *args.set] if args.set else [])]
    begin, anon, why = time.perf_counter(), 0.0, None
    with tempfile.TemporaryFile("w+") as out:
        p = subprocess.Popen(command, stdout=out)
        while p.poll() is None:
            time.sleep(0.2)
            with contextlib.suppress(OSError, StopIteration):
                line = next(s for s in open(f"/proc/{p.pid}/status") if s.startswith("RssAnon"))
                anon = max(anon, int(line.split()[1]) / 2 ** 20)
            why = f"out of memory: {anon:.1f} GiB of its own after {time.perf_counter() - begin:.0f} s, and not loaded" if anon > args.limit \
                else f"no result in {seconds:.0f} s" if time.perf_counter() - begin > seconds \
                else "stopped, the disk is full" if shutil.disk_usage(args.dir).free < 2 ** 31 else None
            if why:
                p.kill()
                p.wait()
        out.seek(0)
        lines = out.read().splitlines()
    if p.returncode == 0:
        return [r | {"own_gib": round(anon, 2)} for r in json.loads(lines[-1])["rows"]]
    say(f"  {only}: {why or f'exit code {p.returncode}'}")
    return [{"suite": "decode", "preset": "qwen15", "test": f"tg{tokens}", "variant": "globe" if only == "globe" else "dense", "implementation": only, "cache": None, "value": None,
             "unit": "tokens/s", "ratio": None, "peak_gib": None, "own_gib": round(anon, 2), "why": why or f"exit code {p.returncode}"}]


def bench_24gib(args: argparse.Namespace) -> list:
    """Qwen1.5-MoE in bfloat16 (26.7 GiB) on a 24-GiB machine: the dense ways, and GloBE; 32 tokens after a prompt of 8."""
    where = Path(args.dir or globe.user_cache() / "qwen15")
    args.dir, tokens = str(where), min(args.tokens, 32)
    if args.only:
        if not (where / ("globe" if args.only == "globe" else "dense")).is_dir():
            raise UserError(f"--only {args.only}: expected files that --keep left in {where}, found none")
        args.tokens = tokens
        return run_one(args)
    need_native("experts_decode", torch.device("cpu"))
    where.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(where).free / 2 ** 30
    if free < 40 and not (where / "dense").is_dir():
        raise UserError(f"qwen15: expected 40 GiB free on the disk of {where}, found {free:.0f}; --dir names another place")
    try:
        if not (where / "dense").is_dir():
            begin, source = time.perf_counter(), checkpoint_of("tiny", args)
            calibration = globe.token_windows(globe.load_tokenizer(source.dir), globe.builtin_text("calibration"), 512, 512)
            with globe.written(where / "dense") as tmp:
                write_qwen15(tmp, popularity(source, calibration))
            say(f"  dense checkpoint: {globe.weight_bytes(where / 'dense') / 2 ** 30:.1f} GiB, written in {time.perf_counter() - begin:.0f} s")
        rows = watched(args, "plain", tokens, 300)
        rows += watched(args, "offload", 2, 300)
        shutil.rmtree(where / "offload", ignore_errors=True)
        rename(where / "dense", fused=True)
        rows += watched(args, "mapped", tokens, 400)
        if not (where / "globe").is_dir():
            with globe.written(where / "globe") as tmp:
                write_qwen15_globe(where / "dense", tmp, qwen15_config(args), consume=not args.keep)
            say(f"  globe export: {globe.weight_bytes(where / 'globe') / 2 ** 30:.1f} GiB")
        rows += watched(args, "globe", tokens, 400)
    finally:
        for made in () if args.keep else ("dense", "globe", "offload"):
            shutil.rmtree(where / made, ignore_errors=True)
    best = max((r["value"] for r in rows if r["variant"] == "dense" and r["value"]), default=math.nan)
    rows = [r | {"ratio": round(r["value"] / best, 3) if r["value"] else None} for r in rows]
    show(rows)
    return rows


# ---- fit ---------------------------------------------------------------------------------------------
def bench_fit(preset: str, args: argparse.Namespace) -> list:
    """tiny: seconds, passes and error of each method, of a plain SVD of the same size and of MoBE's setting until it is flat;
    and how long ours takes to the error that MoBE ends at, of the weights and (smol-moe too) of what they make of a text.
    qwen15: the growth of a pass with the number of experts, at true shapes."""
    if preset == "qwen15":
        return bench_scale(args)
    ckpt, rows = checkpoint_of(preset, args), []
    if preset == "smol-moe":
        return time_to_mobes_end(preset, ckpt, args)
    keys, steps = globe.select_experts(ckpt.dims, globe.ModelConfig()), args.steps or 60

    def fit(variant: str, cfg: globe.Config, target: float = 0.0) -> list:
        """Adds a row; returns [(seconds, error)] after each step."""
        with globe.threads_for(ckpt.dims.p, ckpt.dims.d):
            begin, passes, trace = time.perf_counter(), 0, []
            experts = globe.Experts(lambda layer, e: ckpt.expert("gate", layer, e), keys, cfg.bank.scope, globe.pick_device(args.device), "scale")
            fitter = globe.Fitter(experts, cfg, globe.bank_shape(cfg, "gate", len(keys), experts.groups, ckpt.dims))
            while not fitter.done and not (trace and trace[-1][1] <= target):
                passes += fitter.step()["passes"]
                trace.append((time.perf_counter() - begin, math.sqrt(fitter.here.error)))
        rows.append({"suite": "fit", "preset": preset, "test": f"{fitter.step_done} of {cfg.fit.steps} steps", "variant": variant, "unit": "s", "ratio": None,
                     "value": round(trace[-1][0], 2), "passes": passes, "rel_frob": trace[-1][1]})
        return trace

    def config(method: str, steps: int) -> globe.Config:
        return globe.load_config(None, [*args.set, f"fit.method={method}", f"fit.steps={steps}"])
    for method in ("varpro", "am", "adam"):
        fit(method, config(method, steps))
    begin, ratio = time.perf_counter(), config("varpro", steps).bank.ratio
    error = frobenius(ckpt, peer_svd(ckpt, ratio, {})[0])["gate"]
    rows.append({"suite": "fit", "preset": preset, "test": "closed form", "variant": "svd", "unit": "s", "ratio": None,
                 "value": round(time.perf_counter() - begin, 2), "passes": 1, "rel_frob": error})
    mobe = globe.load_config(str(CONFIGS / "mobe.yaml"), ["bank.r=null", f"bank.ratio={ratio}", f"fit.steps={args.mobe_steps}"])
    trace = fit("mobe", mobe)
    flat = next(e for _, e in trace if e <= 1.01 * trace[-1][1])  # the rest of its steps gains it a hundredth
    fit("varpro, to where mobe is flat", config("varpro", 5 * steps), flat)
    for row, goal in ((rows[0], rows[0]["rel_frob"]), (rows[-1], flat)):
        seconds = next((t for t, e in trace if e <= goal), None)
        if seconds and row["rel_frob"] <= goal:
            row.update(ratio=round(seconds / row["value"], 1), mobe_seconds=round(seconds, 2))
    say(globe.text_table(("method", "steps", "seconds", "passes", "relative error", "times faster than mobe"),
                         [(r["variant"], r["test"], r["value"], r["passes"], r["rel_frob"], r["ratio"]) for r in rows]))
    return rows + time_to_mobes_end(preset, ckpt, args)


def outputs_error(ckpt: globe.Checkpoint, factors: globe.Factors, moments: dict) -> float:
    """sqrt(sum ||(W - W^) X^T||^2 / ||W X^T||^2) over gate and up, X the layers' inputs on a text, each layer's scaled alike."""
    error = size = 0.0
    for name, f in factors.families.items():
        for l, experts in factors.experts.items():
            L = globe.metric_factor(moments["inputs"][l], 0.0)
            for i, e in enumerate(experts):
                W = ckpt.expert(name, l, e).float()
                error, size = error + float(((W - f.weight(l, i)) @ L).square().sum()), size + float((W @ L).square().sum())
    return math.sqrt(error / size)


def time_to_mobes_end(preset: str, ckpt: globe.Checkpoint, args: argparse.Namespace) -> list:
    """Seconds that MoBE's setting takes until it is flat, and that ours takes, its calibration included, to leave no more error in
    what gate and up make of a held-out text. One forward pass calibrates: no gradient, nothing sampled."""
    config, device = config_of(preset), globe.pick_device(args.device)
    ratio = globe.load_config(config, args.set).bank.ratio
    with tempfile.TemporaryDirectory() as scratch:
        held = Path(scratch) / "held.txt"
        held.write_text(globe.builtin_text("heldout"), encoding="utf-8")
        X = globe.calibrate(ckpt, globe.load_config(None, [f"calib.text={held}", "calib.tokens=16384", "calib.fisher=false"]), device)

        def fit(name: str, *settings: str) -> tuple:
            made = quiet(["fit", *settings, "--out", f"{scratch}/{name}", f"model.path={ckpt.dir}", "bank.r=null", f"bank.ratio={ratio}",
                          "--device", str(device)])
            return made["seconds"], outputs_error(ckpt, globe.load_factors(made["factors"]), X), globe.read_rows(Path(scratch) / name / "log.jsonl")
        whole, goal, log = fit("mobe", "--config", str(CONFIGS / "mobe.yaml"), f"fit.steps={args.mobe_steps}")
        flat = 0.0
        for family in ("gate", "up"):
            mine = [r for r in log if r["family"] == family]
            flat += next(r["seconds"] for r in mine if r["rel_frob"] <= 1.01 * mine[-1]["rel_frob"])
        rows = [{"variant": "mobe", "test": f"{args.mobe_steps} steps, flat at {flat:.0f} of {whole:.0f} s", "value": round(flat, 2), "error": goal, "ratio": None}]
        for steps in (1, 3, 6, 12, 25, 50, 100, 200):
            seconds, error, _ = fit(f"globe-{steps}", "--config", config, "calib.fisher=false", "calib.sampled=0", "calib.tokens=4096", "fit.refine=0",
                                    "fit.down=false", *args.set, f"fit.steps={steps}")
            if error <= goal:
                break
        rows.append({"variant": "globe", "test": f"{steps} steps", "value": round(seconds, 2), "error": error, "ratio": round(flat / seconds, 1) if error <= goal else None})
    say(globe.text_table(("method", "steps", "seconds", "error of the outputs, held-out text", "times faster than mobe"),
                         [(r["variant"], r["test"], r["value"], r["error"], r["ratio"]) for r in rows]))
    return [{"suite": "fit", "preset": preset, "unit": "s", **r} for r in rows]


def random_checkpoint(to: Path, layers: int, experts: int, p: int, d: int) -> Path:
    """A qwen2_moe checkpoint of one shard per layer whose up matrices are Gaussian in bfloat16; the other families are holes in
    the files. Beside it the moments of a calibration with a decaying spectrum."""
    to.mkdir(parents=True)
    g, shard_of, moments = torch.Generator().manual_seed(0), {}, {"inputs": {}, "weighted": {}, "hidden": {}, "gate": {}, "up": {}}
    decay = torch.logspace(0, -2, d, dtype=torch.float64)
    for l in range(layers):
        header, end, shard = {}, 0, f"model-{l:05d}.safetensors"
        for e in range(experts):
            for n, shape in (("gate_proj", [p, d]), ("up_proj", [p, d]), ("down_proj", [d, p])):
                name = f"model.layers.{l}.mlp.experts.{e}.{n}.weight"
                header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * p * d]}
                end, shard_of[name] = end + 2 * p * d, shard
        text = json.dumps(header).encode()
        with open(to / shard, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for e in range(experts):
                f.seek(8 + len(text) + (3 * e + 1) * 2 * p * d)
                f.write(globe.tensor_bytes((0.02 * torch.randn(p, d, generator=g)).bfloat16()))
            f.truncate(8 + len(text) + end)
        x = torch.randn(4 * d, d, generator=g, dtype=torch.float64) * decay
        moments["inputs"][l], moments["weighted"][l] = x.T @ x / len(x), x.T @ x
        moments["hidden"][l] = torch.eye(p, dtype=torch.float64)
        for family in ("gate", "up"):
            moments[family][l] = torch.rand(experts, p, generator=g, dtype=torch.float64) + 0.5
    (to / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    (to / "config.json").write_text(json.dumps({"model_type": "qwen2_moe", "hidden_size": d, "moe_intermediate_size": p, "num_experts": experts,
                                                "num_experts_per_tok": 4, "num_hidden_layers": layers, "vocab_size": 32}))
    globe.save_moments(to / "moments.st", moments, globe.Checkpoint(to).fingerprint())
    return to


def matmul_rate(size: int = 4096) -> float:
    """FLOP/s of torch's own float32 product of two square matrices: the best of three."""
    a, best = torch.randn(size, size), 0.0
    for _ in range(4):
        begin = time.perf_counter()
        a @ a
        best = max(best, 2 * size ** 3 / (time.perf_counter() - begin))
    return best


def bench_scale(args: argparse.Namespace) -> list:
    """A pass over one family at Qwen1.5-MoE's shapes, random weights in shards on disk: seconds and peak memory against the number
    of experts, a line through them, the rate against torch's own, and two processes against one. 24 layers follow from the line.
    A budget of half a GiB makes every size stream its experts from disk, as 24 layers do on a 24-GiB machine."""
    p, d, r, m, threads = *args.shape, args.bases, torch.get_num_threads()
    rows, here = [], Path(globe.__file__).parent
    torch.set_num_threads(threads)
    rate = matmul_rate()
    with globe.threads_for(p, d):
        rows.append({"suite": "fit", "preset": "qwen15", "test": "float32 product", "variant": "torch", "value": round(rate / 1e9, 1), "unit": "GFLOP/s", "ratio": None})
        rows.append(rows[0] | {"variant": "as the fit sets it", "value": round(matmul_rate() / 1e9, 1)})

    def run(n: int, ranks: int, folder: Path, each: int, steps: int) -> None:  # a step more is a pass more
        layers, count = max(1, n // 60), min(n, 60)
        model = folder / f"model-{n}"
        if not model.is_dir():
            random_checkpoint(model, layers, count, p, d)
        start = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else [])]
        out = folder / f"run-{n}-{ranks}-{each}"
        done = subprocess.run([*start, str(here / "globe.py"), "fit", "--out", str(out), f"model.path={model}", "model.families=up", f"bank.m={m}", f"bank.r={r}",
                               "bank.init=random", f"fit.steps={steps}", "fit.budget=0.5", "fit.batch=30", f"calib.load={model}/moments.st", "sparsity.support=12", *args.set],
                              env=os.environ | {"OMP_NUM_THREADS": str(each)}, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"fit of {n} experts: expected exit code 0, found {done.returncode}")
        result, log = json.loads(done.stdout.splitlines()[-1]), globe.read_rows(out / "log.jsonl")
        seconds = statistics.median(row["pass_seconds"] for row in log)
        work = globe.flops_per_pass(n, m, r, globe.Dims((0,), n, p, d, 4, 0), True)
        rows.append({"suite": "fit", "preset": "qwen15", "test": f"{n} experts", "variant": f"{ranks} x {each} threads", "value": round(seconds, 2), "unit": "s", "ratio": None,
                     "peak_gib": result["peak_rss_gib"], "gflops": round(work / seconds / 1e9, 1), "of_torch": round(work / seconds / rate, 3),
                     "step_seconds": round(log[-1]["seconds"] - log[-2]["seconds"], 2) if steps > 1 else None, "fit_seconds": result["seconds"], "steps": steps})
        say(json.dumps(rows[-1]))
        shutil.rmtree(out)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for n in args.counts:
            run(n, 1, Path(scratch), threads, args.steps or 2)
            if n != args.ranks_at:
                shutil.rmtree(Path(scratch) / f"model-{n}")
        line = np.array([(row["test"].split()[0], row["value"], row["peak_gib"]) for row in rows[2:]], float)
        if len(line) > 2:
            for k, (test, unit) in enumerate((("seconds a pass", "s"), ("peak memory", "GiB")), 1):
                slope, at0 = np.polyfit(line[:, 0], line[:, k], 1)
                left = line[:, k] - at0 - slope * line[:, 0]
                rows.append({"suite": "fit", "preset": "qwen15", "test": f"1440 experts, {test}", "variant": "extrapolated", "value": round(slope * 1440 + at0, 2), "unit": unit,
                             "ratio": None, "slope": slope, "intercept": at0, "r2": 1 - (left @ left) / max(((line[:, k] - line[:, k].mean()) ** 2).sum(), 1e-12)})
        if args.ranks_at:
            for ranks in (1, 2):
                run(args.ranks_at, ranks, Path(scratch), 1, 2)
            rows[-1]["ratio"] = round(rows[-2]["value"] / rows[-1]["value"], 2)
    say(globe.text_table(("test", "variant", "value", "unit", "peak GiB", "GFLOP/s", "of torch's", "ratio", "R^2"),
                         [(r["test"], r["variant"], r["value"], r["unit"], *(r.get(k, "") if r.get(k) is not None else "" for k in ("peak_gib", "gflops", "of_torch", "ratio", "r2"))) for r in rows]))
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)} or all; default: decode")
    parser.add_argument("--preset", nargs="+", help="tiny; qwen15-layer and qwen15 (decode only; the latter takes 40 GiB of disk); smol-moe (fit and quality; needs "
                        "SMOL_DIR or the hub). Default: tiny, and for decode, asked for by name, qwen15-layer too")
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.8, 0.6], help="quality: stored / dense sizes")
    parser.add_argument("--experts", type=int, default=8, help="smol-moe: slices per layer (8 of 192, or 4 of 384)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="section.key=value", help="config of the fits and of the tiny model")
    parser.add_argument("--peers", nargs="+", default=["closed"], choices=(*PEERS, "closed", "all", "none"),
                        help="quality: which peers; closed: those in closed form (default); mobe and slbf take hours on smol-moe")
    parser.add_argument("--heal", action="store_true", help="quality: heal globe's factors too (variant globe+heal)")
    parser.add_argument("--png", metavar="FILE", help="quality: plot of the loss against the size; decode --sweep: of speed and hit rate against memory")
    parser.add_argument("--resume", action="store_true", help="quality: keep the rows of --json FILE and of a run for it that was cut short; measure the others")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="quality: evaluate on these texts too, each a row named by the file's stem")
    parser.add_argument("--windows", type=int, default=12, help="quality: evaluation windows of 512 tokens per text")
    parser.add_argument("--tokens", type=int, default=128, help="decode: new tokens (qwen15: at most 32)")
    parser.add_argument("--prefill", type=int, default=512, help="decode: prompt tokens of the prefill test")
    parser.add_argument("--sweep", action="store_true", help="decode: also over cache sizes")
    parser.add_argument("--dir", help="qwen15: where its files go (40 GiB; with --keep 46); default: the user's cache")
    parser.add_argument("--keep", action="store_true", help="qwen15: leave them there, for the next run")
    parser.add_argument("--limit", type=float, default=21, metavar="GIB", help="qwen15: a process is ended when it holds more of its own")
    parser.add_argument("--only", choices=("plain", "offload", "mapped", "globe"), help="qwen15: this way alone, in this process, on files that --keep left")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help="fit: steps of each method (default 60); quality: of mobe and slbf (default 3000)")
    parser.add_argument("--mobe-steps", type=int, default=3000, help="fit: steps of MoBE's setting")
    parser.add_argument("--counts", nargs="*", type=int, default=[12, 60, 240, 360], help="fit qwen15: numbers of experts (60 a layer)")
    parser.add_argument("--ranks-at", type=int, default=240, help="fit qwen15: experts of the comparison of two processes with one; 0: none")
    parser.add_argument("--shape", nargs=3, type=int, default=[1408, 2048, 768], metavar=("P", "D", "R"), help="fit qwen15: sizes of W and r")
    parser.add_argument("--bases", type=int, default=128, help="fit qwen15: m")
    parser.add_argument("--scratch", metavar="DIR", help="fit qwen15: where checkpoints and states go (about 12 GB)")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--json", metavar="FILE")
    try:
        args = parser.parse_args(argv)
    except SystemExit as e:
        return int(e.code or 0)
    try:
        suites = SUITES if "all" in args.suites else args.suites or ["decode"]
        known = {p for s in PRESETS.values() for p in s}
        for what, given, good in (("suite", suites, SUITES), ("--preset", args.preset or [], known)):
            odd = [g for g in given if g not in good]
            if odd:
                raise UserError(f"{what}: expected {', '.join(sorted(good))}, found {odd[0]!r}")
        for name, most in {"experts": 10 ** 6, "windows": 10 ** 6, "tokens": 2000, "prefill": 2048, "repeats": 10 ** 6, "steps": 10 ** 9}.items():
            if (value := getattr(args, name)) is not None and not 1 <= value <= most:
                raise UserError(f"--{name}: expected 1 to {most}, found {value}")
        if not all(0 < x < 10 for x in args.ratio):
            raise UserError(f"--ratio: expected numbers above 0, as 0.8, found {args.ratio}")
        if args.resume and not args.json:
            raise UserError("--resume: expected --json FILE, whose rows are kept, found none")
        rows, device = [], globe.pick_device(args.device)
        for path in (Path(p) for p in (args.json, args.png) if p):  # now, not after an hour
            if path.is_dir() or not path.absolute().parent.is_dir():
                raise UserError(f"{path}: expected a file in a directory that is there")
        if args.png and not importlib.util.find_spec("matplotlib"):
            raise UserError("--png needs matplotlib, which is not installed")
        presets = args.preset or ["tiny", "qwen15-layer"][:1 + bool(args.suites)]
        for suite in suites:
            for preset in presets if PRESETS[suite] else [None]:
                if preset is None or preset in PRESETS[suite]:
                    say(f"\n{suite}, {preset}" if preset else f"\n{suite}")
                    rows += {"compose": bench_compose, "sparsemax": bench_sparsemax, "decode": bench_decode, "fit": bench_fit, "quality": bench_quality}[suite](preset, args)
                    gc.collect()
        out = json.dumps({"rows": rows, "device": str(device), "torch": torch.__version__, "threads": torch.get_num_threads()})
        if args.json:
            globe.write_text(Path(args.json), out)
            Path(f"{args.json}.part").unlink(missing_ok=True)
    except (UserError, OSError) as e:
        say(f"bench.py: {globe.one_line(e)}")
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
