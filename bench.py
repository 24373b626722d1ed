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
"""
from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib.util
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import globe
from globe import UserError, say

SUITES = ("compose", "sparsemax", "decode", "fit", "quality")
PRESETS = {"compose": (), "sparsemax": (), "decode": ("tiny", "qwen15-layer"), "fit": ("tiny", "qwen15"), "quality": ("tiny", "smol-moe")}
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


# ---- quality -----------------------------------------------------------------------------------------
def quality_texts(tokenizer, count: int = 12) -> tuple:
    """({text name: windows (N, 512)}, calibration text): evaluation windows are never in the calibration text.

    topics: tokens i * 4096 + 512 .. i * 4096 + 1024 of pydoc_data.topics, i = 0..count-1; code: argparse.py and tarfile.py;
    license: CPython's LICENSE.txt. Prints Python's version and the texts' hashes, since the figures depend on them.
    """
    from pydoc_data.topics import topics
    root = Path(sysconfig.get_path("stdlib"))
    prose = "\n\n".join(topics[k] for k in sorted(topics))
    ids = torch.tensor(tokenizer(prose, add_special_tokens=False, verbose=False)["input_ids"])
    chunks = [(i * 4096 + 512, i * 4096 + 1024) for i in range(count) if i * 4096 + 1024 <= len(ids)]
    texts = {"code": "".join((root / f).read_text() for f in ("argparse.py", "tarfile.py"))}
    if (root / "LICENSE.txt").is_file():
        texts["license"] = (root / "LICENSE.txt").read_text()
    windows = {"topics": torch.stack([ids[a:b] for a, b in chunks])}
    windows |= {k: globe.token_windows(tokenizer, v, count * 512, 512) for k, v in texts.items()}
    sums = {k: hashlib.sha256(v.encode()).hexdigest()[:12] for k, v in (texts | {"topics": prose}).items()}
    say(f"texts: Python {sys.version.split()[0]}, sha256 {sums}")
    rest = [ids[b:a] for (_, b), (a, _) in zip([(0, 0), *chunks], [*chunks, (len(ids), 0)])]
    others = globe.builtin_text("train")[:len(prose)] + globe.builtin_text("calibration")[:len(prose)]
    return windows, "\n\n".join([tokenizer.decode(r) for r in rest] + [others])


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


def peer_slbf(ckpt: globe.Checkpoint, ratio: float, steps: int) -> tuple:
    """Low-rank bases shared by a layer's experts, data-free: W_i = sum_j alpha_ij U_j V_j, two bases per expert, from each
    expert's own SVD (so it starts at the plain SVD), then Adam on U, V and alpha."""
    D, out, E = ckpt.dims, {}, ckpt.dims.experts
    m = 2 * E
    k = int((ratio * E * D.p * D.d - E * m) / (m * (D.p + D.d)))
    for l in D.layers:
        for f in ("gate", "up"):
            W = layer_weights(ckpt, f, l)
            scale = W.square().mean().sqrt()
            U, S, V = torch.linalg.svd(W / scale, full_matrices=False)
            root = S[:, : 2 * k].sqrt()
            U = (U[..., :2 * k] * root[:, None]).reshape(E, D.p, 2, k).transpose(1, 2).reshape(m, D.p, k)
            x = [U.contiguous(), (root[..., None] * V[:, :2 * k]).reshape(m, k, D.d).contiguous(),
                 torch.eye(E).repeat_interleave(2, 1) + 1e-3]
            best = fit_adam(x, lambda U, V, a: (a @ (U @ V).flatten(1)).view_as(W), W / scale, steps)
            out |= {(f, l, e): scale * w for e, w in enumerate(best)}
    return out, 2 * len(D.layers) * m * (k * (D.p + D.d) + E)


def fit_adam(x: list, build, W: torch.Tensor, steps: int, lr: float = 2e-3) -> torch.Tensor:
    """build(*x) after Adam on ||W - build(*x)||^2, or as it began where that is no worse."""
    x = [t.clone().requires_grad_() for t in x]
    opt, start = torch.optim.Adam(x, lr), build(*x).detach()
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        opt.zero_grad()
        (W - build(*x)).square().mean().backward()
        opt.step()
    end = build(*x).detach()
    return end if (W - end).norm() < (W - start).norm() else start


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
    """Perplexity change of GloBE and its peers at the same stored size, on the same calibration and evaluation text."""
    ckpt, device, rows = checkpoint_of(preset, args), globe.pick_device(args.device), []
    D, tokenizer = ckpt.dims, globe.load_tokenizer(ckpt.dir)
    windows, calibration = quality_texts(tokenizer, args.windows)
    model = globe.load_dense(ckpt.dir, device, None)
    dense = {k: globe.nll(model, w)[0] for k, w in windows.items()}
    say(f"{preset}: dense perplexity " + ", ".join(f"{k} {math.exp(v):.2f}" for k, v in dense.items()))

    def add(variant: str, model, ratio: float, rel_frob: dict, seconds: float, scope, support=None, **more) -> None:
        for text, w in windows.items():
            delta = globe.nll(model, w)[0] - dense[text]
            rows.append({"suite": "quality", "preset": preset, "test": f"{D.experts}x{D.p}", "variant": variant, "text": text,
                         "ratio": ratio, "value": delta, "unit": "nats", "delta_nats": delta, "rel_frob": rel_frob,
                         "seconds": round(seconds, 1), "scope": scope, "support": support, **more})
            say(f"  {variant:9s} ratio {ratio:.3f} {text:8s} delta {delta:+.4f} nats, error {rel_frob}, {seconds:.0f} s")

    def fitted(variant: str, ratio: float, *settings: str) -> None:
        nonlocal model
        model = None  # one model in memory at a time
        result = quiet(["fit", *settings, "--out", f"{scratch}/{variant}-{ratio}", f"model.path={ckpt.dir}", f"bank.ratio={ratio}",
                        "bank.r=null", f"calib.load={scratch}/calibration.safetensors"])
        factors, seconds = globe.load_factors(result["factors"]), result["seconds"]

        def measure(name: str, factors: globe.Factors, errors: dict, seconds: float) -> None:
            add(name, globe.assemble(ckpt, factors, device), result["ratio"], errors, seconds,
                factors.config["bank"]["scope"], result["support"], metric=factors.config["fit"]["metric"])
        measure(variant, factors, result["rel_frob"], seconds)
        if args.heal and variant == "globe":
            healed = quiet(["heal", "--factors", result["factors"], "--out", f"{scratch}/healed-{ratio}", f"calib.text={text}",
                            *(s for s in args.set if s.startswith("heal."))])
            factors = globe.load_factors(healed["factors"])
            errors = {f: e["all"] for f, e in globe.reconstruction(ckpt, factors).items()}
            measure("globe+heal", factors, errors, seconds + healed["seconds"])
        model = globe.load_dense(ckpt.dir, device, None)
    configs = Path(globe.__file__).parent / "configs"
    peers = [q for p in args.peers for q in {"closed": CLOSED_FORM, "all": PEERS, "none": ()}.get(p, (p,))]
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "calibration.txt"
        text.write_text(calibration, encoding="utf-8")
        cfg = globe.load_config(str(configs / "smol.yaml") if preset == "smol-moe" else None, [*args.set, f"calib.text={text}"])
        moments = globe.calibrate(ckpt, cfg, device)
        globe.save_moments(Path(scratch) / "calibration.safetensors", moments, ckpt.fingerprint())
        L = {l: globe.metric_factor(C, cfg.fit.ridge) for l, C in moments["inputs"].items()}
        for ratio in args.ratio:
            for peer in peers:
                begin = time.perf_counter()
                if peer == "mobe":  # its own form, r fitted to the size instead of r = p
                    fitted("mobe", ratio, "--config", str(configs / "mobe.yaml"), f"fit.steps={args.steps or 3000}")
                elif peer == "reap":
                    if preset == "tiny":  # smol-moe has no routing to prune by
                        small, size = pruned(ckpt, ratio, globe.token_windows(tokenizer, calibration, cfg.calib.tokens, cfg.calib.length), device)
                        add("reap", small, size, {}, time.perf_counter() - begin, "expert")
                else:
                    weights, stored = {"svd": lambda: peer_svd(ckpt, ratio, {}), "svd-llm": lambda: peer_svd(ckpt, ratio, L),
                                       "layer-pca": lambda: peer_layer_pca(ckpt, ratio, L), "d2": lambda: peer_d2(ckpt, ratio, L),
                                       "slbf": lambda: peer_slbf(ckpt, ratio, args.steps or 3000)}[peer]()
                    seconds = time.perf_counter() - begin
                    put_experts(model, weights, D.p)
                    add(peer, model, stored / (2 * len(D.layers) * D.experts * D.p * D.d), frobenius(ckpt, weights), seconds,
                        {"layer-pca": "layer", "d2": "layer", "slbf": "layer"}.get(peer, "expert"))
            fitted("globe", ratio, *(["--config", str(configs / "smol.yaml")] if preset == "smol-moe" else []), *args.set)
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
    axes[0][0].set_ylabel("increase of the loss (nats per token)")
    axes[0][0].legend(fontsize=8)
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
    for name, run in variants.items():
        with torch.set_grad_enabled(suite == "sparsemax"):
            got = run(0)
        error = max(float((g.detach().double() - w.detach().double()).abs().max()) for g, w in zip(got, want))
        if not error <= tol:
            raise RuntimeError(f"{suite} {test}: {name} is off by {error}, more than {tol}")
    seconds = {name: [] for name in variants}
    for turn in range(2 * args.repeats + 2):
        for name, run in variants.items():
            globe.synchronize(device)
            begin = time.perf_counter()
            with torch.set_grad_enabled(suite == "sparsemax"):
                run(turn)
            globe.synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
    middle = {name: statistics.median(s[2:]) for name, s in seconds.items()}
    best, top = min((v for k, v in middle.items() if k not in ("native", "twin")), default=math.nan), bandwidth(device)
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
        want = torch.nn.functional.silu(torch.einsum("s,srd->rd", val[0], bank[idx[0]].float()))[None]
        size, item = r * D, bank.element_size()
        rows += race("compose", f"60 experts, r {r}", {
            "native": lambda turn: globe.compose(bank, idx, val, "silu", out=out),
            "dense product": lambda turn: torch.nn.functional.silu(torch.mm(weights, bank.view(M, -1), out=out.view(E, -1)), inplace=True).view(E, r, D)[:1],
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


def bench_layer(args: argparse.Namespace) -> list:
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


# ---- decode ------------------------------------------------------------------------------------------
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
def bench_decode(preset: str, args: argparse.Namespace) -> list:
    """Tokens/s of prefill and greedy decode: the dense model (each experts implementation), and GloBE's cache modes.

    Preset qwen15-layer: the operator alone, on one layer of true size.
    """
    if preset == "qwen15-layer":
        return bench_layer(args)
    ckpt, device, models = checkpoint_of(preset, args), globe.pick_device(args.device), {}
    dtype = globe.as_dtype(args.dtype) or ckpt.dtype
    with tempfile.TemporaryDirectory() as scratch:
        factors = globe.load_factors(quiet(["fit", "--out", f"{scratch}/run", f"model.path={ckpt.dir}", "fit.steps=10", *args.set])["factors"])
        text = globe.token_windows(globe.load_tokenizer(ckpt.dir), globe.builtin_text("heldout"), 512, 512)  # real text: real hits
        for how in ("eager", "grouped_mm", "batched_mm"):
            models["dense", how] = globe.load_dense(ckpt.dir, device, dtype)
            models["dense", how].set_experts_implementation(how)
        for mode in ("all", "lru", "none"):
            models["globe", mode] = globe.assemble(ckpt, factors, device, dtype, globe.CacheConfig(mode=mode))
            globe.warm(models["globe", mode], text[:, :256])
        tests = {f"pp{args.prefill}": lambda m: m(text[:, :args.prefill].to(device)),
                 f"tg{args.tokens}": lambda m: m.generate(text[:, :8].to(device), max_new_tokens=args.tokens, do_sample=False,
                                                          min_new_tokens=args.tokens, pad_token_id=0)}
        rows = []
        for test, run in tests.items():
            seconds = {k: [] for k in models}
            for turn in range(args.repeats + 1):
                for k, m in models.items():  # turn by turn, so that a slow spell hits all
                    seconds[k].append(timed(lambda: run(m), device))
            speed = {k: int(test[2:]) / statistics.median(s[1:]) for k, s in seconds.items()}
            best = max(v for (variant, _), v in speed.items() if variant == "dense")
            for (variant, how), value in speed.items():
                m = models[variant, how]
                rows.append({"suite": "decode", "preset": preset, "test": test, "variant": variant, "implementation": how,
                             "cache": how if variant == "globe" else None, "value": round(value, 2), "unit": "tokens/s",
                             "ratio": round(value / best, 3), "weights_gib": round(tensor_gib(m), 5),
                             "peak_gib": round(globe.peak_rss_gib(), 2), "hit_rate": globe.cache_stats(m)["hit_rate"]})
    say(globe.text_table(("test", "variant", "how / cache", "tokens/s", "x best dense", "tensors GiB"),
                         [(r["test"], r["variant"], r["implementation"], r["value"], r["ratio"], r["weights_gib"]) for r in rows]))
    return rows


# ---- fit ---------------------------------------------------------------------------------------------
def bench_fit(preset: str, args: argparse.Namespace) -> list:
    """tiny: seconds, passes and error of each method, of a plain SVD of the same size, and of MoBE's setting, run until it is as
    good as ours. qwen15: the growth of a pass with the number of experts, at true shapes."""
    if preset == "qwen15":
        return bench_scale(args)
    ckpt, rows = checkpoint_of(preset, args), []
    keys, steps = globe.select_experts(ckpt.dims, globe.ModelConfig()), args.steps or 60

    def fit(variant: str, cfg: globe.Config, most: int, target: float = 0.0) -> None:
        with globe.threads_for(ckpt.dims.p, ckpt.dims.d):
            begin, passes = time.perf_counter(), 0
            experts = globe.Experts(lambda layer, e: ckpt.expert("gate", layer, e), keys, cfg.bank.scope, normalize="scale")
            fitter = globe.Fitter(experts, cfg, globe.bank_shape(cfg, "gate", len(keys), experts.groups, ckpt.dims))
            while not fitter.done and not (fitter.here and fitter.here.error <= target):
                passes += fitter.step()["passes"]
        rows.append({"suite": "fit", "preset": preset, "test": f"{fitter.step_done} of {most} steps", "variant": variant, "unit": "s", "ratio": None,
                     "value": round(time.perf_counter() - begin, 2), "passes": passes, "rel_frob": math.sqrt(fitter.here.error)})
    for method in ("varpro", "am", "adam"):
        cfg = globe.load_config(None, [*args.set, f"fit.method={method}", f"fit.steps={steps}"])
        fit(method, cfg, steps)
    begin = time.perf_counter()
    error = frobenius(ckpt, peer_svd(ckpt, cfg.bank.ratio, {})[0])["gate"]
    rows.append({"suite": "fit", "preset": preset, "test": "closed form", "variant": "svd", "unit": "s", "ratio": None,
                 "value": round(time.perf_counter() - begin, 2), "passes": 1, "rel_frob": error})
    mobe = globe.load_config(str(Path(globe.__file__).parent / "configs/mobe.yaml"),
                             ["bank.r=null", f"bank.ratio={cfg.bank.ratio}", f"fit.steps={args.mobe_steps}"])
    fit("mobe, until as good as varpro", mobe, args.mobe_steps, rows[0]["rel_frob"] ** 2)
    rows[-1]["ratio"] = round(rows[-1]["value"] / rows[0]["value"], 1) if rows[-1]["rel_frob"] <= rows[0]["rel_frob"] else None
    say(globe.text_table(("method", "steps", "seconds", "passes", "relative error"),
                         [(r["variant"], r["test"], r["value"], r["passes"], r["rel_frob"]) for r in rows]))
    return rows


def random_checkpoint(to: Path, layers: int, experts: int, p: int, d: int) -> Path:
    """A qwen2_moe checkpoint of one shard per layer whose up matrices are Gaussian in bfloat16; the other families are holes in
    the files. Beside it the moments of a calibration with a decaying spectrum."""
    to.mkdir(parents=True)
    g, shard_of, moments = torch.Generator().manual_seed(0), {}, {"inputs": {}, "gate": {}, "up": {}}
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
        moments["inputs"][l] = x.T @ x / len(x)
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
                               "bank.init=random", f"fit.steps={steps}", "fit.budget=0.5", "fit.batch=20", f"calib.load={model}/moments.st", "sparsity.support=12", *args.set],
                              env=os.environ | {"OMP_NUM_THREADS": str(each)}, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"fit of {n} experts: expected exit code 0, found {done.returncode}")
        result, log = json.loads(done.stdout.splitlines()[-1]), globe.read_rows(out / "log.jsonl")
        seconds = statistics.median(row["pass_seconds"] for row in log)
        work = globe.flops_per_pass(globe.load_config(), n, m, r, globe.Dims((0,), n, p, d, 4, 0), True)
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
                run(args.ranks_at, ranks, Path(scratch), 1, 1)
            rows[-1]["ratio"] = round(rows[-2]["value"] / rows[-1]["value"], 2)
    say(globe.text_table(("test", "variant", "value", "unit", "peak GiB", "GFLOP/s", "of torch's", "ratio", "R^2"),
                         [(r["test"], r["variant"], r["value"], r["unit"], *(r.get(k, "") if r.get(k) is not None else "" for k in ("peak_gib", "gflops", "of_torch", "ratio", "r2"))) for r in rows]))
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)} or all; default: decode")
    parser.add_argument("--preset", nargs="+", help="tiny; qwen15-layer (decode only); smol-moe (quality only; needs "
                        "SMOL_DIR or the hub). Default: tiny, and for decode, asked for by name, qwen15-layer too")
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.8, 0.6], help="quality: stored / dense sizes")
    parser.add_argument("--experts", type=int, default=8, help="smol-moe: slices per layer (8 of 192, or 4 of 384)")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="config of the fits and of the tiny model")
    parser.add_argument("--peers", nargs="+", default=["closed"], choices=(*PEERS, "closed", "all", "none"),
                        help="quality: which peers; closed: those in closed form (default); mobe and slbf take hours on smol-moe")
    parser.add_argument("--heal", action="store_true", help="quality: heal globe's factors too (variant globe+heal)")
    parser.add_argument("--png", metavar="FILE", help="quality: plot of the loss against the size")
    parser.add_argument("--windows", type=int, default=12, help="quality: evaluation windows of 512 tokens per text")
    parser.add_argument("--tokens", type=int, default=64, help="decode: new tokens")
    parser.add_argument("--prefill", type=int, default=256, help="decode: prompt tokens of the prefill test")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help="fit: steps of each method (default 60); quality: of mobe and slbf (default 3000)")
    parser.add_argument("--mobe-steps", type=int, default=3000, help="fit: most steps of MoBE's setting on its way to our error")
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
        for name in ("experts", "windows", "tokens", "prefill", "repeats", "steps"):
            if (value := getattr(args, name)) is not None and value < 1:
                raise UserError(f"--{name}: expected 1 or more, found {value}")
        if not all(0 < x < 10 for x in args.ratio):
            raise UserError(f"--ratio: expected numbers above 0, as 0.8, found {args.ratio}")
        rows, device = [], globe.pick_device(args.device)
        for path in (Path(p) for p in (args.json, args.png) if p):  # now, not after an hour
            if path.is_dir() or not path.absolute().parent.is_dir():
                raise UserError(f"{path}: expected a file in a directory that is there")
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
    except (UserError, OSError) as e:
        say(f"bench.py: {globe.one_line(e)}")
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
