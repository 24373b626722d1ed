"""Speed, memory and quality of GloBE against peers; the last line of stdout is one JSON document.

    python bench.py                                    decode on tiny: tokens/s and memory
    python bench.py quality --preset tiny smol-moe --ratio 0.8 0.6
    python bench.py fit --preset tiny
    python bench.py all --json out.json

Peers run in the same process, turn by turn with ours; a figure is the median of the repeats. `ratio` is the speed-up
over the best peer (decode, fit), or stored / dense size (quality).
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
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch

import globe
from globe import UserError, say

SUITES = ("decode", "fit", "quality")
PRESETS = {"decode": ("tiny",), "fit": ("tiny",), "quality": ("tiny", "smol-moe")}
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
    return windows, "\n\n".join([tokenizer.decode(r) for r in rest] + [globe.builtin_text("train")[:len(prose)]])


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
        factors = globe.load_factors(result["factors"])
        add(variant, globe.assemble(ckpt, factors, device), result["ratio"], result["rel_frob"], result["seconds"],
            factors.config["bank"]["scope"], result["support"], metric=factors.config["fit"]["metric"])
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
        for variant, marker, line in zip(variants, "osv^D*PX", ("-", ":", "--", "-.", ":", "--", "-.", "-")):
            mine = sorted((r["ratio"], r["delta_nats"]) for r in rows if (r["text"], r["variant"]) == (text, variant))
            ours = variant == "globe"
            ax.plot(*zip(*mine), marker=marker, linestyle="-" if ours else line, color="black" if ours else "0.5", label=variant)
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
    """Tokens/s of prefill and greedy decode: the dense model (each experts implementation), and GloBE's cache modes."""
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
    """Seconds, passes and error of each method, and of a plain SVD of the same size, on the preset's gate matrices."""
    ckpt, rows = checkpoint_of(preset, args), []
    keys = globe.select_experts(ckpt.dims, globe.ModelConfig())
    for method in ("varpro", "am", "adam"):
        cfg = globe.load_config(None, [*args.set, f"fit.method={method}", f"fit.steps={args.steps or 60}"])
        experts = globe.Experts(lambda layer, e: ckpt.expert("gate", layer, e), keys, normalize="scale")
        begin = time.perf_counter()
        fitter = globe.Fitter(experts, cfg, globe.bank_shape(cfg, "gate", len(keys), 1, ckpt.dims))
        passes = 0
        while not fitter.done:
            passes += fitter.step()["passes"]
        seconds = time.perf_counter() - begin
        rows.append({"suite": "fit", "preset": preset, "test": f"{args.steps or 60} steps", "variant": method, "value": round(seconds, 2),
                     "unit": "s", "ratio": None, "passes": passes, "rel_frob": math.sqrt(fitter.here.error)})
    begin = time.perf_counter()
    error = frobenius(ckpt, peer_svd(ckpt, cfg.bank.ratio, {})[0])["gate"]
    rows.append({"suite": "fit", "preset": preset, "test": "closed form", "variant": "svd", "unit": "s", "ratio": None,
                 "value": round(time.perf_counter() - begin, 2), "passes": 1, "rel_frob": error})
    say(globe.text_table(("method", "seconds", "passes", "relative error"),
                         [(r["variant"], r["value"], r["passes"], r["rel_frob"]) for r in rows]))
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)} or all; default: decode")
    parser.add_argument("--preset", nargs="+", default=["tiny"], help="tiny, smol-moe (quality only; needs SMOL_DIR or the hub)")
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.8, 0.6], help="quality: stored / dense sizes")
    parser.add_argument("--experts", type=int, default=8, help="smol-moe: slices per layer (8 of 192, or 4 of 384)")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="config of the fits and of the tiny model")
    parser.add_argument("--peers", nargs="+", default=["closed"], choices=(*PEERS, "closed", "all", "none"),
                        help="quality: which peers; closed: those in closed form (default); mobe and slbf take hours on smol-moe")
    parser.add_argument("--png", metavar="FILE", help="quality: plot of the loss against the size")
    parser.add_argument("--windows", type=int, default=12, help="quality: evaluation windows of 512 tokens per text")
    parser.add_argument("--tokens", type=int, default=64, help="decode: new tokens")
    parser.add_argument("--prefill", type=int, default=256, help="decode: prompt tokens of the prefill test")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help="fit: steps of each method (default 60); quality: of mobe and slbf (default 3000)")
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
        for what, given, good in (("suite", suites, SUITES), ("--preset", args.preset, known)):
            odd = [g for g in given if g not in good]
            if odd:
                raise UserError(f"{what}: expected {', '.join(sorted(good))}, found {odd[0]!r}")
        rows = []
        for suite in suites:
            for preset in args.preset:
                if preset in PRESETS[suite]:
                    say(f"\n{suite}, {preset}")
                    rows += {"decode": bench_decode, "fit": bench_fit, "quality": bench_quality}[suite](preset, args)
                    gc.collect()
        device = globe.pick_device(args.device)
    except UserError as e:
        say(f"bench.py: {e}")
        return 2
    out = json.dumps({"rows": rows, "device": str(device), "torch": torch.__version__, "threads": torch.get_num_threads()})
    if args.json:
        globe.write_text(Path(args.json), out)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
