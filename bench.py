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


def svd_experts(ckpt: globe.Checkpoint, ratio: float) -> dict:
    """Plain truncated SVD of every gate and up matrix at `ratio`: {(family, layer, expert): W^}; the simplest peer."""
    D, out = ckpt.dims, {}
    rank = max(1, int(ratio * D.p * D.d / (D.p + D.d)))
    for f in ("gate", "up"):
        for layer in D.layers:
            U, S, V = torch.linalg.svd(torch.stack([ckpt.expert(f, layer, e).float() for e in range(D.experts)]), False)
            for e, W in enumerate(U[..., :rank] * S[:, None, :rank] @ V[:, :rank]):
                out[f, layer, e] = W
    return out


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


def bench_quality(preset: str, args: argparse.Namespace) -> list:
    """Perplexity change and error of GloBE and of a plain SVD at the same stored size."""
    ckpt, device, rows = checkpoint_of(preset, args), globe.pick_device(args.device), []
    tokenizer = globe.load_tokenizer(ckpt.dir)
    windows, calibration = quality_texts(tokenizer, args.windows)
    model = globe.load_dense(ckpt.dir, device, None)
    dense = {k: globe.nll(model, w)[0] for k, w in windows.items()}
    say(f"{preset}: dense perplexity " + ", ".join(f"{k} {math.exp(v):.2f}" for k, v in dense.items()))

    def add(variant: str, model, ratio: float, rel_frob: dict, seconds: float, **more) -> None:
        for text, w in windows.items():
            delta = globe.nll(model, w)[0] - dense[text]
            rows.append({"suite": "quality", "preset": preset, "test": f"{ckpt.dims.experts}x{ckpt.dims.p}", "variant": variant,
                         "text": text, "ratio": ratio, "value": delta, "unit": "nats", "delta_nats": delta,
                         "rel_frob": rel_frob, "seconds": round(seconds, 1), **more})
            say(f"  {variant:6s} ratio {ratio:.3f} {text:8s} delta {delta:+.4f} nats, error {rel_frob}")
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "calibration.txt"
        text.write_text(calibration, encoding="utf-8")
        for ratio in args.ratio:
            begin = time.perf_counter()
            weights = svd_experts(ckpt, ratio)
            put_experts(model, weights, ckpt.dims.p)
            add("svd", model, ratio, frobenius(ckpt, weights), time.perf_counter() - begin, scope="expert", support=None)
            config = ["--config", str(Path(globe.__file__).parent / "configs" / "smol.yaml")] if preset == "smol-moe" else []
            result = quiet(["fit", *config, "--out", f"{scratch}/{ratio}", f"model.path={ckpt.dir}", f"bank.ratio={ratio}",
                            "bank.r=null", f"calib.text={text}", *args.set])
            factors = globe.load_factors(result["factors"])
            model = None
            add("globe", globe.assemble(ckpt, factors, device), result["ratio"], result["rel_frob"], result["seconds"],
                scope=factors.config["bank"]["scope"], support=result["support"], metric=factors.config["fit"]["metric"])
            model = globe.load_dense(ckpt.dir, device, None)
    return rows


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
        cfg = globe.load_config(None, [*args.set, f"fit.method={method}", f"fit.steps={args.steps}"])
        experts = globe.Experts(lambda layer, e: ckpt.expert("gate", layer, e), keys, normalize="scale")
        begin = time.perf_counter()
        fitter = globe.Fitter(experts, cfg, globe.bank_shape(cfg, "gate", len(keys), 1, ckpt.dims))
        passes = 0
        while not fitter.done:
            passes += fitter.step()["passes"]
        seconds = time.perf_counter() - begin
        rows.append({"suite": "fit", "preset": preset, "test": f"{args.steps} steps", "variant": method, "value": round(seconds, 2),
                     "unit": "s", "ratio": None, "passes": passes, "rel_frob": math.sqrt(fitter.here.error)})
    begin = time.perf_counter()
    error = frobenius(ckpt, svd_experts(ckpt, cfg.bank.ratio))["gate"]
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
    parser.add_argument("--windows", type=int, default=12, help="quality: evaluation windows of 512 tokens per text")
    parser.add_argument("--tokens", type=int, default=64, help="decode: new tokens")
    parser.add_argument("--prefill", type=int, default=256, help="decode: prompt tokens of the prefill test")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="fit: steps of each method")
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
