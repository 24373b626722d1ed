"""GloBE (Global-Basis Experts): shrink the routed experts of a Mixture-of-Experts language model.

Every expert's gate and up matrix (and, on request, its down matrix, transposed) is written as

    W_i  ~=  shift + scale * A_i . phi( sum_{j in S_i} alpha_ij B_j )

    W_i      (p, d)   one expert's matrix; p = moe_intermediate_size, d = hidden_size
    B_j      (r, d)   basis j of a bank of m; one bank serves all layers, or each group of layers has its own
    alpha_i  (m,)     the expert's sparse mixture over the bank; S_i is its support
    A_i      (p, r)   the expert's own adapter
    phi               identity, silu or tanh
    B~_i     (r, d)   phi(sum_j alpha_ij B_j), the composed basis: built once per expert, kept in an LRU cache

Words: a *family* is gate, up or down. *Factors* are banks, mixtures and adapters. An *export* is a directory
that transformers loads. A *run* is a directory of factors, their config, a log and the state to resume from.

One flow, no way back:
    checkpoint -> experts -> (calibrate) -> fit -> refine -> factors file -> patch | export -> eval, bench

    python globe.py fit                          the default job: a tiny MoE, from nothing to factors
    python globe.py eval                         reconstruction and perplexity, dense beside GloBE
    python globe.py export --format dense        the source checkpoint with its experts replaced, in place
    python globe.py --help                       everything else

An export carries sections 1 to 5 of this file, down to the marker. A section uses only what stands above it.
"""
from __future__ import annotations

import collections
import functools
import importlib.util
import itertools
import math
import os
import re
import threading
import time
import timeit
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages for large tensors
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING as MODELS, PreTrainedConfig
from transformers.quantizers import HfQuantizer, auto
from transformers.utils.quantization_config import QuantizationConfigMixin

__version__ = "0.2.0"
FORMAT_VERSION = 4  # of factors in packed codes; 1 of all others
FAMILIES = ("gate", "up", "down")
MARKER = "# ---- an export carries the file down to here ----"


# ======== 1. Errors; the cache's settings =============================================================
# For a terminal: no line breaks, control characters or megabytes from a stranger's file
def one_line(text: Any) -> str:
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return text if len(text) <= 1500 else f"{text[:1000]} ... {text[-400:]}"


class UserError(ValueError):
    """The user's input is wrong: one clear line on stderr, exit code 2."""

    def __init__(self, text: str):
        super().__init__(one_line(text))


# UserError(text) unless fine
def expect(fine: Any, text: str) -> None:
    if not fine:
        raise UserError(text)


# repr for an error line, cut: a value from a stranger's file can be megabytes
def short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of more than 4,300 digits
        text = "a huge number"
    return text if len(text) <= 200 else f"{text[:200]}..."


@dataclass
class CacheConfig:
    """How composed experts are held at run time."""
    mode: str = "lru"             # lru | all (each, composed once) | none | direct (bases act on the tokens)
    per_layer: int | None = None  # slots per layer; default: half of the experts
    budget: float | None = None   # MiB for all layers together, in place of per_layer
    dtype: str | None = None      # of what is held; default: the model's
    warmup_tokens: int = 256      # of calibration text, to fill the caches with


DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
DTYPES |= {"tf32": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def as_dtype(name: str | None) -> torch.dtype | None:
    """The torch.dtype of a name; None for None and "auto". UserError for another name."""
    if name in (None, "auto"):
        return None
    expect(name in DTYPES, f"--dtype: expected one of {', '.join(DTYPES)}, found {name!r}")
    return DTYPES[name]


# ======== 2. Operators: one entry point each; the torch twin is fallback and oracle of the native one =
KERNELS_VERSION = 7  # of the operators' schemas in csrc/; an older library is refused
BUILD = [lambda: (None, "an export has no csrc/")]  # (library, how it came), or none: section 7 compiles it


@functools.cache
def kernels() -> str:
    """Load the native operators at first use; says which are in use: "native avx512, ..." or "torch, ...".

    GLOBE_KERNELS: auto (the installed library; else csrc/, compiled into the user's cache; else torch, with a
    warning), jit (csrc/, compiled), off (torch). RuntimeError where a library does not load or a build fails.
    UserError for another value, or for jit with nothing to compile."""
    mode = os.environ.get("GLOBE_KERNELS", "auto")
    expect(mode in ("auto", "jit", "off"), f"GLOBE_KERNELS: expected auto, jit or off, found {mode!r}")
    if mode == "off":
        return "torch, GLOBE_KERNELS=off"
    how = "loaded by another copy of globe.py"
    if first := not hasattr(torch.ops.globe, "about"):
        wheel = importlib.util.find_spec("globe_ops") if mode == "auto" else None
        path, how = (wheel.origin, f"installed: {wheel.origin}") if wheel else BUILD[0]()
        if path is None:
            expect(mode == "auto", f"GLOBE_KERNELS=jit: {how}")
            warnings.warn(f"globe: torch's operators are used, which are slower: {how}", stacklevel=2)
            return f"torch, {how}"
        torch.ops.load_library(path)
    version, isa = torch.ops.globe.about().split()
    if int(version) < KERNELS_VERSION:  # later ones have the operators of this version and more
        raise RuntimeError(f"native operators: expected version {KERNELS_VERSION}, found {version} ({how}); "
                           "reinstall, or set GLOBE_KERNELS=jit or off")
    if first:
        register_kernels()
    return f"native {isa}, {how}"


# Tell autograd and torch.compile about the operators: shapes without data, and a backward
def register_kernels() -> None:
    like = torch.empty_like
    for name, fake in {
        "compose": lambda bank, idx, val, activation: bank.new_empty(idx.shape[0], *bank.shape[1:]),
        "compose_out": lambda bank, idx, val, activation, out, slot: None,
        "compose_backward": lambda grad, bank, idx, val, activation: (like(bank), like(val)),
        "simplex": lambda x, alpha: (like(x), x.new_empty(x.shape[:-1], dtype=torch.int64)),
        "simplex_backward": lambda grad, p, alpha: like(p),
        "experts_decode": lambda x, *rest: like(x),
        "experts_mixed": lambda x, *rest: like(x),
        "coded_experts": lambda x, *rest: like(x),
        "linear": lambda x, W, *rest: x.new_empty(x.shape[0], W.shape[0]),
        "coded_linear": lambda x, W, *rest: x.new_empty(x.shape[0], W.shape[0]),
        "unpack": lambda codes, width, levels, subsets: levels.new_empty(len(width), 8 * width.shape[1]),
    }.items():
        torch.library.register_fake(f"globe::{name}", fake)

    def keep_compose(ctx, inputs, output):
        ctx.activation = inputs[3]
        ctx.save_for_backward(*inputs[:3])

    def compose_backward(ctx, grad):
        bank, idx, val = ctx.saved_tensors
        dbank, dval = torch.ops.globe.compose_backward(grad.contiguous(), bank, idx, val, ctx.activation)
        return dbank, None, dval, None

    torch.library.register_autograd("globe::compose", compose_backward, setup_context=keep_compose)


# Whether the native form of an operator serves a kind of device; settled while torch.compile traces
@torch.compiler.assume_constant_result
@functools.cache
def native(op: str, device: str) -> bool:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return kernels().startswith("native") and has_kernel(f"globe::{op}", device.upper())


# Whether half types multiply slower than float32 on this device: measured, since torch does not tell
@functools.cache
def slow_products(dtype: torch.dtype, device: str = "cpu") -> bool:
    if device != "cpu" or dtype.itemsize != 2:
        return False
    seconds = []
    for kind in (dtype, torch.float32):
        a = torch.ones(192, 192, dtype=kind)
        seconds.append(min(timeit.repeat(lambda: torch.mm(a, a), number=1, repeat=4)))
    return seconds[0] > 2 * seconds[1]


# ---- compose -----------------------------------------------------------------------------------------
def phi(z: Tensor, activation: str) -> Tensor:
    if activation == "identity":
        return z
    return {"silu": F.silu, "tanh": torch.tanh}[activation](z)


def compose(bank: Tensor, idx: Tensor | Sequence, val: Tensor | Sequence, activation: str = "identity",
            out: Tensor | None = None, slot: Tensor | None = None) -> Tensor:
    """Composed bases B~_i = phi(sum_j val_ij bank[idx_ij]).

    bank (m, r, d), idx (E, s) integers in [0, m), val (E, s) -> (E, r, d) in the bank's dtype, summed in
    float32 or better. A padded entry has val 0; ragged supports are sequences of E one-dimensional tensors.
    Differentiable in bank and val, unless written into `out` (contiguous, of the result's shape and dtype) or
    into out[slot], out (S, r, d), slot (E,) int64. IndexError for an index outside the bank, ValueError for
    shapes that do not fit."""
    if not isinstance(idx, Tensor):
        idx = nn.utils.rnn.pad_sequence(list(idx), batch_first=True)
        val = nn.utils.rnn.pad_sequence(list(val), batch_first=True)
    if bank.ndim != 3 or idx.ndim != 2 or idx.shape != val.shape:
        raise ValueError(f"compose: expected bank (m, r, d), idx and val (E, s), found {tuple(bank.shape)}, "
                         f"{tuple(idx.shape)}, {tuple(val.shape)}")
    if out is not None:
        rows = idx.shape[0] if slot is None else len(out)
        want = (rows, *bank.shape[1:])
        if out.shape != want or out.dtype != bank.dtype or not out.is_contiguous():
            raise ValueError(f"compose: out: expected a contiguous {want} of {bank.dtype}, found "
                             f"{tuple(out.shape)} of {out.dtype}")

    # not while compiling, where data cannot be read, nor into slots, where the native operator checks
    if slot is None and idx.numel() and not torch.compiler.is_compiling():
        low, high = torch.stack(idx.aminmax()).tolist()
        if low < 0 or high >= len(bank):
            raise IndexError(f"compose: indices in [0, {len(bank)}) expected, found {low}..{high}")

    val = val.to(torch.promote_types(bank.dtype, torch.float32))
    idx = idx.long()
    if native("compose", bank.device.type):
        args = (bank.contiguous(), idx.contiguous(), val.contiguous(), activation)
        if out is None:
            return torch.ops.globe.compose(*args)
        torch.ops.globe.compose_out(*args, out, slot)
        return out
    y = compose_torch(bank, idx, val, activation)
    if out is None:
        return y
    return out.copy_(y) if slot is None else out.index_copy_(0, slot, y)


# The torch twin of globe::compose; val in float32 or better
def compose_torch(bank: Tensor, idx: Tensor, val: Tensor, activation: str) -> Tensor:
    (m, r, d), (E, s) = bank.shape, idx.shape
    if E * s >= m and E > 1:
        # many experts: one product over the dense mixture reads the bank once
        rows = torch.arange(E, device=idx.device)[:, None].expand(E, s)
        mixture = torch.zeros(E, m, dtype=val.dtype, device=bank.device)
        mixture = mixture.index_put((rows, idx), val, accumulate=True)
        z = (mixture @ bank.reshape(m, -1).to(val.dtype)).view(E, r, d)
    else:
        # a miss or two: of fewer bases than the bank has
        z = torch.einsum("es,esrd->erd", val, bank[idx].to(val.dtype))
    return phi(z, activation).to(bank.dtype)


# ---- packed codes ------------------------------------------------------------------------------------
CODE_BLOCK = 8    # columns of one width
WIDTHS = (0, 1, 2, 3, 4, 5, 6)
# Trellis-coded quantization (Marcellin and Fischer, IEEE Trans. Commun. 38, 1990), 256 states: these trellis
# bits of a column, so many rows above, add up to the lowest two bits of a level's number.
TAPS = ((1, 4, 5, 6, 7), (0, 2, 3, 6, 8))
# Levels of widths 1 to 6: a q + b q^3 of a Gaussian's quantiles q, in the middle of as many equal parts.
LEVELS = ((0.575, 0.38), (1.172, 0.019), (1.32, 0.002), (1.39, 0.047), (1.45, 0.045), (1.43, 0.06))


@functools.cache
def trellis_levels() -> Tensor:
    """(widths, 128) float32: 2^(width + 1) levels for numbers of mean square 1, infinities behind."""
    rows = [torch.zeros(128)]
    for k, (a, b) in enumerate(LEVELS, 1):
        q = torch.special.ndtri((torch.arange(2 ** (k + 1), dtype=torch.float64) + 0.5) / 2 ** (k + 1))
        levels = a * q + b * q ** 3
        unit = levels[-1] / 127  # whole numbers of it: native products take them in 8 bits
        rows.append(F.pad((levels / unit).round() * unit, (0, 128 - len(q)), value=math.inf))
    return torch.stack(rows).float()


# (512,) int64: the lowest two bits of a level's number, by the last nine trellis bits
@functools.cache
def trellis_subsets() -> Tensor:
    window = torch.arange(512)
    return sum((sum(window >> t for t in taps) & 1) << j for j, taps in enumerate(TAPS))


def unpack(codes: Tensor, width: Tensor) -> Tensor:
    """Values (rows, 8 B) float32 of a matrix' codes (bytes,) uint8.

    width (rows, B): bits of a number, no more in a later row. Block behind block has the first bits of all
    rows with any, then the second ones, and so on: of eight rows a byte for each column, the first row's bit
    lowest. First bits are the trellis'."""
    if native("unpack", codes.device.type):
        return torch.ops.globe.unpack(codes, width, trellis_levels(), trellis_subsets())
    row = torch.arange(len(width), device=codes.device)[:, None]
    counts = torch.stack([(width > i).sum(0) + 7 >> 3 for i in range(WIDTHS[-1])], 1)  # (B, bits)
    starts = counts.flatten().cumsum(0).view(counts.shape) - counts
    number = torch.zeros(*width.shape, CODE_BLOCK, dtype=torch.uint8, device=codes.device)
    for i in range(int(width.max())):
        place = torch.where(width > i, starts[:, i] + row // 8, 0)
        bits = (codes.view(-1, CODE_BLOCK)[place] >> (row % 8).byte()[..., None]) & (width > i)[..., None]
        if i:
            number += bits << i + 1
            continue
        above = F.pad(bits, (0, 0, 0, 0, 8, 0)).int()
        window = sum(above[8 - t:len(above) - t] << t for t in range(9))
        number += trellis_subsets().to(codes.device)[window].byte()
    return trellis_levels().to(codes.device).view(-1)[width.int()[..., None] * 128 + number].flatten(1)


# (E + 1,) where each expert's codes begin, in bytes, and where the last one's end; kind (E, p), width (K, B)
def code_places(kind: Tensor, width: Tensor) -> Tensor:
    octets = (F.one_hot(kind.long(), len(width)).sum(1) + 7) // 8  # of the rows of each class
    return F.pad((8 * octets * width.long().sum(1)).sum(1).cumsum(0), (1, 0))


def decode(t: dict, basis: Sequence, columns: int, experts: Sequence) -> Tensor:
    """W^ (n, rows, columns) float32 of those experts of a layer, from its packed codes t (code_shapes).

    codes: expert behind expert, from places on, rows in the order of their classes. kind: those, in eights;
    row: 128 + 8 log2 of its scale; width, column: bits and 256 log2 of a scale by class and block. basis: as
    decode_groups reads it; without one the columns are W's own, in their order."""
    places = t["places"].tolist()
    X = decode_groups(*(part.to(t["codes"].device) for part in basis)) if basis else None
    out = []
    for e in experts:
        kind = t["kind"][e].long()
        order = kind.argsort(stable=True)
        A = unpack(t["codes"][places[e]:places[e + 1]], t["width"][kind[order]])[order.argsort()]
        scale = t["column"][kind].float() / 256 + (t["row"][e, :, None].float() - 128) / 8
        A *= scale.exp2().repeat_interleave(CODE_BLOCK, 1)
        if basis:
            out.append(A[:, :len(X)] @ X)
        else:
            order = t["order"][e].long()
            out.append(A.new_zeros(len(A), columns).index_copy_(1, order, A[:, :len(order)]))
    return torch.stack(out)


# What is wrong with a layer's codes t, or None: nothing may be read beyond them
def code_problem(t: dict, columns: int) -> str | None:
    highest = t["width"].amax(1).tolist()
    if max(highest) > WIDTHS[-1] or (t["width"][1:] > t["width"][:-1]).any():
        return f"width: expected 0 to {WIDTHS[-1]} bits, no more in a later class, found {highest}"
    if (highest := int(t["kind"].max())) >= len(t["width"]):
        return f"kind: expected classes below {len(t['width'])}, found {highest}"
    rows = F.one_hot(t["kind"].long()).sum(1).cumsum(1)
    if ((rows % 8 > 0) & (rows < t["kind"].shape[1])).any():
        return "kind: expected rows of a class in eights"
    order = t.get("order", torch.zeros(1))
    if not 0 <= int(order.min()) <= int(order.max()) < columns:
        return f"order: expected columns in [0, {columns}), found {int(order.min())}..{int(order.max())}"
    places = code_places(t["kind"], t["width"])
    fine = torch.equal(places, t["places"]) and int(places[-1]) == len(t["codes"])
    found = f"codes: expected {int(places[-1])} bytes, each matrix' from its place on"
    return None if fine else f"{found}, found {len(t['codes'])}, places {short(t['places'].tolist())}"


def decode_groups(codes: Tensor, scale: Tensor) -> Tensor:
    """(..., columns) float32 of codes: int8, or uint8 with two of 4 bits, the even column's in the low one.

    scale (..., groups of 64 columns) int16: 256 log2 of a scale."""
    if codes.dtype == torch.uint8:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).to(torch.int8) - 8
    scales = (scale.float() / 256).exp2().repeat_interleave(64, -1)
    return codes.float() * scales[..., :codes.shape[-1]]


# ======== 3. What factors are: the JSON that describes them, and its check ============================
@dataclass(frozen=True)
class Dims:
    """Sizes of a model's experts, as its config.json gives them."""
    layers: tuple  # that have experts
    experts: int   # routed ones, per layer
    p: int         # moe_intermediate_size
    d: int         # hidden_size
    top_k: int
    shared: int    # slices of width p that make up the shared expert; 0 without one


def dims_from(meta: dict) -> Dims:
    return Dims(**{**meta["dims"], "layers": tuple(meta["dims"]["layers"])})


# Whether value is an int in [low, high); nothing is computed from one that is not
def whole(value: Any, low: int = 0, high: int = 2 ** 32) -> bool:
    return type(value) is int and low <= value < high


def check_meta(meta: dict, where: str) -> dict:
    """Refuse another format version or a description that does not hold together; returns meta.

    meta is what a reader needs to build modules before it has read a tensor: format_version, model_type,
    fingerprint, dims, experts {layer: [expert]}, families {family: {m, r, s (largest support), groups,
    group {layer: bank}, activation, shift, scale, bank (the owning family)}}; of a family in packed codes
    {code: trellis, columns, layers {layer: {of (its basis, or null), rows, bytes, classes}}}. UserError."""
    expect(isinstance(meta, dict), f"{where}: expected a description of factors, found {type(meta).__name__}")
    version = meta.get("format_version")
    expect(version in (1, FORMAT_VERSION),
           f"{where}: expected factors of format version 1 or {FORMAT_VERSION}, found {short(version)}")

    def need(fine: Any, what: str) -> None:
        expect(fine, f"{where}: its description is damaged: expected {what}")

    try:
        check_sizes(meta, dims_from(meta), need)
        check_experts(meta, dims_from(meta), need)
        need(set(meta.get("rest", {}).values()) <= {4, 8}, "rest: {name: 4 or 8 bits}")
        need(meta["families"], "a family or more")
        for name in meta["families"]:
            check_family(meta, name, need)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        damaged = UserError(f"{where}: its description is damaged ({type(e).__name__} {e})")
        raise e if isinstance(e, UserError) else damaged from None
    return meta


def check_sizes(meta: dict, D: Dims, need: Callable) -> None:
    for key in ("experts", "p", "d", "top_k", "shared"):
        need(whole(getattr(D, key), key in "pd"), f"dims.{key}: a whole number below 2^32, p and d above 0")
    need(all(whole(l) for l in D.layers), "dims.layers: whole numbers below 2^32")
    need(isinstance(meta.get("config", {}), dict), "config: an object")
    texts = (meta["model_type"], meta["fingerprint"])
    need(all(isinstance(text, str) for text in texts), "model_type and fingerprint: text")


def check_experts(meta: dict, D: Dims, need: Callable) -> None:
    need(meta["experts"], "experts of a layer or more")
    for key, experts in meta["experts"].items():
        need(str(int(key)) == key and int(key) in D.layers, f"experts: layers of dims, found {short(key)}")
        fine = experts and all(whole(e, 0, D.experts + D.shared) for e in experts)
        need(fine and len(set(experts)) == len(experts), f"experts.{key}: experts that dims has, each once")


def check_family(meta: dict, name: str, need: Callable) -> None:
    f = meta["families"][name]
    where = f"families.{name}"
    need(name in FAMILIES, f"families among {', '.join(FAMILIES)}, found {short(name)}")
    if "code" in f:
        return check_coded(meta, f, name, where, need)
    need(f["activation"] in ("identity", "silu", "tanh"), f"{where}.activation: identity, silu or tanh")
    for key in ("m", "r", "s", "groups"):
        need(whole(f[key], 1), f"{where}.{key}: a whole number above 0 and below 2^32")
    need(f["m"] * f["r"] * meta["dims"]["d"] < 2 ** 48, f"{where}: a bank below 2^48 numbers")
    need(f["groups"] <= len(meta["experts"]), f"{where}.groups: at most one a layer")
    need(set(f["group"]) == set(meta["experts"]), f"{where}.group: a bank for each layer of experts")
    need(all(whole(g, 0, f["groups"]) for g in f["group"].values()), f"{where}.group: banks below groups")
    for key in ("shift", "scale"):
        need(type(f[key]) is float and abs(f[key]) < 1e38, f"{where}.{key}: a finite number")

    # a bank that another family owns has that family's sizes
    owner = meta["families"][f["bank"]]
    for key in ("bank", "m", "r", "groups", "group"):
        need(owner[key] == f[key], f"{where}.{key}: as in the family that owns the bank")


def check_coded(meta: dict, f: dict, name: str, where: str, need: Callable) -> None:
    need((meta["format_version"], f["code"]) == (FORMAT_VERSION, "trellis"), f"{where}.code: trellis")
    need(set(f["layers"]) == set(meta["experts"]), f"{where}.layers: all layers of experts")
    need(f["columns"] == meta["dims"]["p" if name == "down" else "d"], f"{where}.columns: p of down, else d")
    for key, layer in f["layers"].items():
        at = f"{where}.layers.{key}"
        if layer["of"] is not None:
            owner, _, l = layer["of"].rpartition("_")
            need(l in (key, "all") and name != "down", f"{at}.of: FAMILY_{key} or FAMILY_all")
            need(meta["families"][owner]["layers"][key]["rows"] == layer["rows"], f"{at}.rows: as in {owner}")
        need(whole(layer["rows"], 1, f["columns"] + 1), f"{at}.rows: from 1 to columns")
        need(whole(layer["bytes"], 0, 2 ** 40), f"{at}.bytes: below 2^40")
        need(whole(layer["classes"], 1, 17), f"{at}.classes: from 1 to 16")


# ======== 4. Run time: cache, GlobeExperts, GlobeLinear, install ======================================
class ExpertCache:
    """Composed items in slots of memory that is taken once; the least recently used expert goes first."""

    def __init__(self, slots: int):
        self.slots = slots
        self.lock = threading.RLock()  # held while a step uses the slots: threads take turns
        self.clear()

    def __reduce__(self):  # a copy begins empty, for a lock cannot be copied
        return ExpertCache, (self.slots,)

    def clear(self) -> None:
        self.slabs = {}  # {family: (slots, rows, columns)}
        self.forget()
        self.count()

    def forget(self) -> None:
        self.slot_of = collections.OrderedDict()  # {expert: slot}, the least recently used first
        self.table = None  # slots and rows by expert, as tensors

    def count(self) -> None:
        self.hits = self.misses = 0
        self.seconds = 0.0  # spent composing

    # Have these experts in slots, the last most recently used; build(missing, their slots) fills
    def hold(self, experts: Sequence[int], build: Callable[[list, list], None]) -> None:
        missing = [e for e in experts if e not in self.slot_of]
        self.hits += len(experts) - len(missing)
        self.misses += len(missing)
        if missing:
            begin = time.perf_counter()
            self.table = None
            others = [e for e in self.slot_of if e not in experts]
            for e in others[:max(0, len(self.slot_of) + len(missing) - self.slots)]:
                del self.slot_of[e]
            free = sorted({*range(self.slots)} - {*self.slot_of.values()})
            build(missing, free[:len(missing)])  # one that fails leaves them free
            self.slot_of.update(zip(missing, free))
            self.seconds += time.perf_counter() - begin
        for e in experts:
            self.slot_of.move_to_end(e)


# A parameter without memory; loading puts a real one in its place
def on_meta(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


# {name: (shape, dtype)} of what decode_groups reads
def group_shapes(name: str, rows: int, columns: int, bits: int = 8) -> dict:
    codes = (rows, columns * bits // 8), torch.int8 if bits == 8 else torch.uint8
    return {name: codes, f"{name}_scale": ((rows, -(-columns // 64)), torch.int16)}


# The same of a coded layer's basis, by the name of the bank's buffer
def basis_shapes(layer: dict, d: int) -> dict:
    return group_shapes(layer["of"], layer["rows"], d) if layer["of"] else {}


# {name: (shape, dtype)} of the codes of n experts of p rows
def code_shapes(layer: dict, n: int, p: int) -> dict:
    table = layer["classes"], -(-layer["rows"] // CODE_BLOCK)
    shapes = {"codes": ((layer["bytes"],), torch.uint8), "kind": ((n, p), torch.uint8),
              "row": ((n, p), torch.uint8), "width": (table, torch.uint8), "column": (table, torch.int16),
              "places": ((n + 1,), torch.int64)}
    return shapes if layer["of"] else shapes | {"order": ((n, layer["rows"]), torch.int16)}


class GlobeBank(nn.Module):
    """The banks of a model: a parameter `{family}_{group}` (m, r, d) for each, of the family that owns it."""

    def __init__(self, meta: dict):
        super().__init__()
        d = meta["dims"]["d"]
        for name, f in meta["families"].items():
            for layer in f.get("layers", {}).values():  # a basis of 8 bits, which families may share
                for key, (shape, dtype) in basis_shapes(layer, d).items():
                    self.register_buffer(key, torch.empty(shape, dtype=dtype, device="meta"))
            groups = f["groups"] if f.get("bank") == name and not meta.get("composed") else 0
            for g in range(groups):
                setattr(self, f"{name}_{g}", on_meta(f["m"], f["r"], d))
        self.cache = CacheConfig()
        self.scratch = {}       # {device: slots that layers without any of their own use in turn}
        self.scratch_slots = 1

    def _apply(self, fn, recurse=True):
        self.scratch.clear()
        return super()._apply(fn, recurse)


NATIVE_ACTS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "ReLU": "relu"}
# measured crossing points: up to so many tokens
DECODE_TOKENS = 8      # experts_decode beats grouped products on an accelerator; on a CPU always
MIXED_TOKENS = 128     # experts_mixed beats products of what is composed
LINEAR_TOKENS = 8, 64  # the native product of a linear layer beats torch's, and where half products are slow
CHUNK_TOKENS = 2048    # go through a layer at once, which bounds what its intermediate results take
FLOPS_PER_NUMBER = 40  # that a CPU core computes while it reads one bfloat16 number


# Whether tokens x (t, n) meet codes as they lie
def reads_codes(x: Tensor, op: str) -> bool:
    return x.dtype != torch.float64 and not torch.is_grad_enabled() and native(op, x.device.type)


# Tokens and routing as native operators take them: weights in float32, else in x's dtype
def native_args(x: Tensor, index: Tensor, weights: Tensor) -> tuple:
    weights = weights if weights.dtype == torch.float32 else weights.to(x.dtype)
    return x.contiguous(), index.long().contiguous(), weights.contiguous()


class GlobeExperts(nn.Module):
    """Drop-in for a transformers experts module: same forward(hidden_states, top_k_index, top_k_weights).

    forward_cached   by composed bases or composed weights from the cache
    forward_bases    by the bases themselves, nothing composed (cache.mode=direct); forward_codes likewise
    forward_loop     one expert after the other: with gradients, or where some experts are dense
    """

    def __init__(self, meta: dict, layer: int, old: nn.Module, bank: GlobeBank, cache: CacheConfig):
        super().__init__()
        D = dims_from(meta)
        self.layer, self.num_experts, self.top_k = layer, D.experts, D.top_k
        self.intermediate_dim, self.hidden_dim = D.p, D.d
        # rows among the adapters, and among the dense weights, by expert
        self.fitted = {e: i for i, e in enumerate(meta["experts"][str(layer)])}
        self.dense_row = {e: i for i, e in enumerate(e for e in range(D.experts) if e not in self.fitted)}
        self.families = meta["families"]
        self.names = {}  # of coded families' tensors here and in the bank
        self.composed = bool(meta.get("composed"))
        self._bank = (bank,)  # a tuple hides it from nn.Module: the model owns the bank, once

        # A loader that knows nothing of GloBE would start from random experts with no more than a warning;
        # a tensor of the dense experts' name and another shape makes it stop.
        self.register_buffer("gate_up_proj", torch.zeros(1, dtype=next(old.parameters()).dtype))
        for f in FAMILIES:
            if f in self.families:
                self._declare(f)
            if rows := len(self.dense_row) if f in self.families else D.experts:
                setattr(self, f"{f}_proj", on_meta(rows, *self._shape(f)))

        self._borrow_gate(old)
        self.hold = dict.fromkeys(self.families, "basis")
        self.cache_dtype = as_dtype(cache.dtype)
        self.cache = ExpertCache(0)
        # what native operators are told besides tensors
        each = [self.families.get(f, {}) for f in FAMILIES]
        scales = [float(f.get("scale", 1)) for f in each]
        shifts = [float(f.get("shift", 0)) for f in each]
        self.constants = ([int(bool(f)) for f in each], scales, shifts, self.native_act)

    def _shape(self, f: str) -> tuple:
        p, d = self.intermediate_dim, self.hidden_dim
        return (d, p) if f == "down" else (p, d)

    def _declare(self, f: str) -> None:
        n, about = len(self.fitted), self.families[f]
        if "code" in about:
            layer = about["layers"][str(self.layer)]
            shapes = code_shapes(layer, n, self._shape(f)[0])
            self.names[f] = list(shapes), list(basis_shapes(layer, 1))
            for key, (shape, dtype) in shapes.items():
                self.register_buffer(f"{f}_{key}", torch.empty(shape, dtype=dtype, device="meta"))
            return
        setattr(self, f"{f}_A", on_meta(n, self.intermediate_dim, about["r"]))
        if self.composed:
            setattr(self, f"{f}_basis", on_meta(n, about["r"], self.hidden_dim))
        else:
            setattr(self, f"{f}_val", on_meta(n, about["s"], dtype=torch.float32))
            self.register_buffer(f"{f}_idx", torch.empty(n, about["s"], dtype=torch.int32, device="meta"))

    # The model's own gate and what it needs of the old module (act_fn, limits, config), no tensors
    def _borrow_gate(self, old: nn.Module) -> None:
        for key, value in (vars(old) | old._modules).items():
            if not key.startswith("_") and not hasattr(self, key) and not isinstance(value, Tensor):
                setattr(self, key, value)
        self._dense_class = type(old)
        plain = type(old)._apply_gate.__name__ == "_default_apply_gate"  # act(gate) * up
        self.native_act = NATIVE_ACTS.get(type(getattr(self, "act_fn", None)).__name__) if plain else None

    def _gate(self, z: Tensor) -> Tensor:
        return self._dense_class._apply_gate(self, z)

    def train(self, mode: bool = True):
        self.cache.clear()  # factors may have moved while training
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self.cache.clear()  # slots follow the module to its new device and dtype
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args):
        self.cache.clear()  # other factors come in
        super()._load_from_state_dict(*args)

    # -- what is held
    # {family: "basis" | "weight"}: weights where they are composed once and take fewer products
    def held(self, mode: str) -> dict:
        p, d = self.intermediate_dim, self.hidden_dim
        least = p * d if mode == "all" and not self.composed else math.inf
        whole = {f for f, about in self.families.items() if "code" in about or about["r"] * (p + d) >= least}
        return {f: "weight" if f in whole else "basis" for f in self.families}

    def item_bytes(self) -> int:
        itemsize = (self.cache_dtype or self._adapters().dtype).itemsize
        return sum(math.prod(self._held_shape(f)) for f in self.families) * itemsize

    def _held_shape(self, f: str) -> tuple:
        return self._shape(f) if self.hold[f] == "weight" else (self.families[f]["r"], self.hidden_dim)

    # Whose dtype and device the others have: an adapter, beside codes a dense matrix or the guard
    def _adapters(self) -> Tensor:
        return next(self.parameters(), self.gate_up_proj)

    def _bank_of(self, f: str) -> Tensor:
        about = self.families[f]
        return self._bank[0]._parameters[f"{about['bank']}_{about['group'][str(self.layer)]}"]

    # B~ (n, r, d) of rows; into out[slot] where those are given
    def _basis(self, f: str, rows: list, out: Tensor | None = None, slot: Tensor | None = None) -> Tensor:
        if self.composed:
            return getattr(self, f"{f}_basis")[rows]
        bank = self._bank_of(f)
        idx = getattr(self, f"{f}_idx")[rows]
        if bank.device != idx.device:  # layers spread over devices: fetch the bases in use, not the bank
            used, idx = idx.long().unique(return_inverse=True)
            bank = bank[used.to(bank.device)].to(idx.device)
        return compose(bank, idx, getattr(self, f"{f}_val")[rows], self.families[f]["activation"], out, slot)

    # What is held of one row: B~ (r, d), or W^ as the model has it
    def _value(self, f: str, row: int) -> Tensor:
        if "code" in self.families[f]:
            return decode(self._codes(f), self._code_basis(f), self._shape(f)[1], [row])[0]
        X = self._basis(f, [row])[0]
        if self.hold[f] == "basis":
            return X
        # in float32 or better on CPUs, of which most multiply 16-bit numbers a hundred times slower
        work = torch.promote_types(X.dtype, torch.float32) if X.is_cpu else X.dtype
        W = getattr(self, f"{f}_A")[row].to(work) @ X.to(work)
        W = self.families[f]["shift"] + self.families[f]["scale"] * W
        return W.T if f == "down" else W

    # A coded family's tensors in this layer, and its basis'
    def _codes(self, f: str) -> dict:
        return {key: self._buffers[f"{f}_{key}"] for key in self.names[f][0]}

    def _code_basis(self, f: str) -> list:
        return [self._bank[0]._buffers[key] for key in self.names[f][1]]

    # Compose experts into their slots: bases of a family in one call, straight into its slab
    def _fill(self, cache: ExpertCache, experts: list, slots: list) -> None:
        rows = [self.fitted[e] for e in experts]
        for f, slab in self._slabs(cache).items():
            if self.hold[f] == "basis" and slab.dtype == self._bank_of(f).dtype:
                self._basis(f, rows, slab, torch.tensor(slots, device=slab.device))
                continue
            for row, i in zip(rows, slots):
                slab[i] = self._value(f, row)

    # {family: what is held, by slot}, allocated at first use; a composed export has its bases stored
    def _slabs(self, cache: ExpertCache) -> dict:
        if self.composed:
            return {f: self._parameters[f"{f}_basis"] for f in self.families}
        if not cache.slabs:
            A = self._adapters()
            for f in self.families:
                shape = (cache.slots, *self._held_shape(f))
                with torch.inference_mode(False):  # they outlive it: later steps may want gradients
                    cache.slabs[f] = torch.empty(shape, dtype=self.cache_dtype or A.dtype, device=A.device)
        return cache.slabs

    # This layer's cache; without slots of its own, those that such layers use in turn
    def _slots(self) -> ExpertCache:
        if self.cache.slots:
            return self.cache
        bank = self._bank[0]
        return bank.scratch.setdefault(self._adapters().device, ExpertCache(bank.scratch_slots))

    # Every fitted expert is held, so that nothing will be composed or evicted again
    def full(self) -> bool:
        return self.composed or len(self.cache.slot_of) == len(self.fitted)

    # Experts' slots, and their rows among the adapters, (E,) each; -1 for none
    def _table(self, cache: ExpertCache) -> tuple:
        if cache.table is None:
            slot_of = self.fitted if self.composed else cache.slot_of
            slots = [slot_of.get(e, -1) for e in range(self.num_experts)]
            rows = [self.fitted.get(e, -1) for e in range(self.num_experts)]
            with torch.inference_mode(False):
                cache.table = tuple(torch.tensor([slots, rows], device=self._adapters().device))
        return cache.table

    def hold_only(self, cache: ExpertCache, experts: Sequence[int]) -> None:
        if cache is not self.cache:  # another layer's experts may lie in it, under the same numbers
            cache.forget()
        cache.hold(experts, functools.partial(self._fill, cache))

    # -- forward
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, d), top_k_index (T, k) int, top_k_weights (T, k) -> (T, d)."""
        args = (hidden_states, top_k_index, top_k_weights)
        if hidden_states.shape[0] > CHUNK_TOKENS and not torch.is_grad_enabled():
            return torch.cat([self.forward(*part) for part in zip(*(t.split(CHUNK_TOKENS) for t in args))])
        if self.composes_afresh(hidden_states):
            return self.forward_loop(*args, fresh=True)
        if self.codes_do(hidden_states):
            return self.forward_codes(*args, self._table(self.cache)[1])
        if self.full():
            if not torch.compiler.is_compiling():
                self.cache.hits += top_k_index.numel()
            return self.forward_cached(*args, self.cache)
        if read := self.bases_read(hidden_states, top_k_weights):
            return self.forward_bases(*args, read)
        cache = self._slots()
        with cache.lock:
            return self.forward_in_parts(*args, cache)

    # Whether items are composed for x alone: factors learn, or x still waits for a gradient
    def composes_afresh(self, x: Tensor) -> bool:
        grad = torch.is_grad_enabled()
        if grad and x.requires_grad and not self.full():
            return True
        if "parametrizations" in self._modules:  # peft's target_parameters, on factors or on dense matrices
            return any(not name.endswith("proj") for name in self.parametrizations)
        if not self.training and not grad:  # training: also in the no-grad pass of gradient checkpointing
            return False
        factors = itertools.chain(self.named_parameters(), self._bank[0].named_parameters())
        return any(p.requires_grad for name, p in factors if not name.endswith("proj"))

    # As many of the experts in use at a time as there are slots, composed in one call
    def forward_in_parts(self, x: Tensor, index: Tensor, weights: Tensor, cache: ExpertCache) -> Tensor:
        uses = collections.Counter(index.reshape(-1).tolist())
        mine = list(self.fitted)
        if self._bank[0].cache.mode != "all":  # the most used last, which the next step finds held
            mine = sorted((e for e in uses if e in self.fitted), key=uses.__getitem__)
        if len(mine) <= cache.slots:
            self.hold_only(cache, mine)
            return self.forward_cached(x, index, weights, cache)

        mine.sort(key=lambda e: e not in cache.slot_of)  # hits first: misses then evict none of them
        also = list(self.dense_row)  # these go with the first part
        out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for i in range(0, len(mine), cache.slots):
            part = mine[i:i + cache.slots]
            self.hold_only(cache, part)
            now = torch.isin(index, torch.tensor(part + also, device=index.device))
            out += self.forward_cached(x, index.where(now, self.num_experts), weights, cache)
            also = []
        return out.to(x.dtype)

    def forward_cached(self, x: Tensor, index: Tensor, weights: Tensor, cache: ExpertCache) -> Tensor:
        """The layer, with every expert of index in its slot."""
        operands = self._operands(cache)
        tensors = [*itertools.chain(*operands.values())]
        read = [t for t in tensors if t is not None]
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, *read))
        fits = all(t.dtype == x.dtype and t.is_contiguous() for t in read)
        if self.dense_row or learns or not fits:
            return self.forward_loop(x, index, weights)
        few = len(x) and (x.is_cpu or len(x) <= DECODE_TOKENS) and x.dtype != torch.float64
        if few and self.native_act and native("experts_decode", x.device.type):
            args = (*native_args(x, index, weights), *self._table(cache), *tensors, *self.constants)
            return torch.ops.globe.experts_decode.default(*args)
        if self._can_group(x, read):
            return self._grouped(x, index, weights, operands)
        return self.forward_loop(x, index, weights)

    # {family: (W (slots, p, d), of down (slots, d, p), None) or (bases (slots, r, d), adapters (E, p, r))}
    def _operands(self, cache: ExpertCache) -> dict:
        slabs, out = self._slabs(cache), {}
        for f in FAMILIES:
            adapter = self._parameters[f"{f}_A"] if self.hold.get(f) == "basis" else None
            out[f] = (slabs[f] if f in slabs else getattr(self, f"{f}_proj"), adapter)
        return out

    # grouped_mm wants rows of whole 16 bytes, and each expert in the slot of its own number
    def _can_group(self, x: Tensor, tensors: list) -> bool:
        ragged = any(n * t.itemsize % 16 for t in tensors for n in t.shape[1:])
        if ragged or not len(x) or x.device.type != "cpu" and x.dtype != torch.bfloat16:
            return False
        return self.composed or self.full() and all(e == i for e, i in self.cache.slot_of.items())

    # Grouped products over tokens sorted by expert; the host need not know the routing
    def _grouped(self, x: Tensor, index: Tensor, weights: Tensor, operands: dict) -> Tensor:
        E = self.num_experts
        flat, order = index.reshape(-1).sort(stable=True)
        token = order // index.shape[-1]
        counts = (flat == torch.arange(E, device=x.device)[:, None]).sum(1)
        ends = counts.cumsum(0, dtype=torch.int32)

        def project(f: str, x: Tensor) -> Tensor:
            M, A = operands[f]
            if A is None:
                return F.grouped_mm(x, M.mT, offs=ends)
            first, then = (A, M) if f == "down" else (M.mT, A.mT)
            return self._rescale(f, F.grouped_mm(F.grouped_mm(x, first, offs=ends), then, offs=ends), x)

        xs = x[token]
        h = self._gate(torch.cat([project("gate", xs), project("up", xs)], -1))
        y = project("down", h) * weights.reshape(-1)[order, None]
        y = torch.where((flat < E)[:, None], y, 0)  # expert E: of another rank
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        return out.index_add_(0, token, y.float()).to(x.dtype)

    # Shift and scale of W^ = shift + scale * A B~, on products y of inputs x with A B~
    def _rescale(self, f: str, y: Tensor, x: Tensor) -> Tensor:
        about = self.families[f]
        y = y * about["scale"]
        return y + about["shift"] * x.sum(-1, keepdim=True) if about["shift"] else y

    def forward_loop(self, x: Tensor, index: Tensor, weights: Tensor, fresh: bool = False) -> Tensor:
        """One expert after the other: differentiable, and for layers of which a part is dense."""
        weights = weights.reshape(-1)
        out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        flat, order = index.flatten().sort(stable=True)
        used, counts = flat.unique_consecutive(return_counts=True)
        for e, places in zip(used.tolist(), order.split(counts.tolist())):
            if e >= self.num_experts:  # of other ranks
                continue
            item = self.item(e, fresh)
            token = places // index.shape[-1]
            h = self._gate(torch.cat([self.project(f, x[token], e, item) for f in ("gate", "up")], -1))
            y = self.project("down", h, e, item) * weights[places, None]
            out = out.index_add(0, token, y.to(out.dtype))
        return out.to(x.dtype)

    # {family: what is held} of one expert, with gradients if fresh; called under the cache's lock
    def item(self, e: int, fresh: bool) -> dict:
        if e not in self.fitted:
            return {}
        if fresh:
            self.cache.misses += 1
            return {f: self._value(f, self.fitted[e]) for f in self.families}
        cache = self._slots()
        if not self.composed:
            self.hold_only(cache, [e])
        slot = self.fitted[e] if self.composed else cache.slot_of[e]
        return {f: slab[slot] for f, slab in self._slabs(cache).items()}

    # x (t, d) -> x W^T (t, p) for gate and up; h (t, p) -> h W_down^T (t, d) for down
    def project(self, f: str, x: Tensor, e: int, item: dict) -> Tensor:
        if f not in item:
            row = self.dense_row[e] if f in self.families else e
            return F.linear(x, getattr(self, f"{f}_proj")[row])
        M = item[f].to(x.dtype)
        if self.hold[f] == "weight":
            return F.linear(x, M)
        A = getattr(self, f"{f}_A")[self.fitted[e]]
        y = (x @ A) @ M if f == "down" else F.linear(F.linear(x, M), A)
        return self._rescale(f, y, x)

    # -- the codes or the bases themselves
    def codes_do(self, x: Tensor) -> bool:
        coded = all("code" in self.families.get(f, {}) for f in FAMILIES) and not self.dense_row
        held = self._bank[0].cache.mode == "all"  # what they decode to
        return coded and bool(self.native_act) and not held and reads_codes(x, "coded_experts")

    # x (T, d) meets codes, few tokens in 14 or 16 bits, many decoded pieces; row: of experts in the codes
    def forward_codes(self, x: Tensor, index: Tensor, weights: Tensor, row: Tensor) -> Tensor:
        families = [[*self._codes(f).values(), *self._code_basis(f)] for f in FAMILIES]
        args = *native_args(x, index, weights), row, *families, trellis_levels(), trellis_subsets()
        return torch.ops.globe.coded_experts.default(*args, self.native_act)

    def bases_read(self, x: Tensor, weights: Tensor) -> list | None:
        """What experts_mixed reads, where these tokens meet the bases themselves (cache.mode=direct).

        All bases in use act on each token; composed, only top_k do, but those are written and read first."""
        direct = self._bank[0].cache.mode == "direct" and not self.dense_row and self.native_act
        few = len(x) <= MIXED_TOKENS and x.dtype != torch.float64
        if not direct or not few or not native("experts_mixed", x.device.type):
            return None
        experts = min(len(self.fitted), len(x) * self.top_k)
        most = max(min(about["m"], experts * about["s"]) for about in self.families.values())
        if len(x) * (most - self.top_k) > 2 * FLOPS_PER_NUMBER * experts:
            return None
        read = []
        for f in FAMILIES:
            if f in self.families:
                A, val = self._parameters[f"{f}_A"], self._parameters[f"{f}_val"]
                read += [self._bank_of(f), A, self._buffers[f"{f}_idx"], val.float()]
            else:
                read += [getattr(self, f"{f}_proj"), None, None, None]
        tensors = [t for t in read if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, *tensors)):
            return None
        # layers spread over devices fetch the bases that are mixed, not the bank
        together = len({t.device for t in tensors}) == 1
        # all but the mixtures are products' factors
        fits = all(t.is_contiguous() and (t.ndim < 3 or t.dtype == x.dtype) for t in tensors)
        return read if together and fits else None

    def forward_bases(self, x: Tensor, index: Tensor, weights: Tensor, read: list) -> Tensor:
        """Nothing composed: A sum_j alpha_j (B_j x) of gate and up, sum_j B_j^T (alpha_j A^T h) of down."""
        args = (*native_args(x, index, weights), self._table(self.cache)[1], *read, *self.constants[1:])
        return torch.ops.globe.experts_mixed.default(*args)


class GlobeShared(nn.Module):
    """Drop-in for a shared expert's MLP whose slices are experts of the layer's GlobeExperts."""

    def __init__(self, experts: GlobeExperts, old: nn.Module, slices: int):
        super().__init__()
        self._experts, self.slices = (experts,), slices
        for f in FAMILIES:
            if f not in experts.families:
                setattr(self, f"{f}_proj", getattr(old, f"{f}_proj"))

    def forward(self, x: Tensor) -> Tensor:
        E = self._experts[0]
        flat = x.reshape(-1, x.shape[-1])
        if E.codes_do(flat):
            rows = torch.tensor([E.fitted[E.num_experts + i] for i in range(self.slices)])
            index = torch.arange(self.slices).expand(len(flat), -1)
            return E.forward_codes(flat, index, torch.ones(index.shape), rows).view(x.shape)
        dense = [f for f in ("gate", "up") if f not in E.families]
        dense = {f: getattr(self, f"{f}_proj")(flat).chunk(self.slices, -1) for f in dense}
        hidden, y = [], 0.0
        with E._slots().lock:
            for i in range(self.slices):  # one after the other: there may be a single slot
                e = E.num_experts + i
                item = E.item(e, E.composes_afresh(x))
                both = [dense[f][i] if f in dense else E.project(f, flat, e, item) for f in ("gate", "up")]
                hidden.append(E._gate(torch.cat(both, -1)))
                if "down" in E.families:
                    y = y + E.project("down", hidden.pop(), e, item)
        if hidden:
            y = self.down_proj(torch.cat(hidden, -1))
        return y.view(x.shape)


class GlobeCoded(nn.Module):
    """A linear layer or an embedding in codes of 8 or 4 bits, decoded where it is used."""

    def __init__(self, old: nn.Module, bits: int, tied: nn.Module | None = None):
        super().__init__()
        self.embeds = isinstance(old, nn.Embedding)
        self.bias = getattr(old, "bias", None)
        self._tied = (tied,)  # the embedding of a head without codes of its own; a tuple hides it
        self.register_buffer("like", torch.empty(0, dtype=old.weight.dtype, device="cpu"), persistent=False)
        for key, (shape, dtype) in {} if tied else group_shapes("weight", *old.weight.shape, bits).items():
            self.register_buffer(key, torch.empty(shape, dtype=dtype, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        codes = self._tied[0] or self
        if self.embeds:
            return decode_groups(codes.weight[x], codes.weight_scale[x]).to(self.like.dtype)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        if len(flat) and reads_codes(flat, "coded_linear"):
            y = torch.ops.globe.coded_linear(flat, codes.weight, codes.weight_scale, self.bias)
        else:
            rows = max(1, 2 ** 24 // x.shape[-1])  # 64 MiB at a time, for a vocabulary's sake
            parts = zip(codes.weight.split(rows), codes.weight_scale.split(rows))
            wide = flat.to(torch.promote_types(x.dtype, torch.float32)) if x.is_cpu else flat
            y = torch.cat([F.linear(wide, decode_groups(*part).to(wide)) for part in parts], -1).to(x.dtype)
            y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], y.shape[-1])


class GlobeLinear(nn.Linear):
    """A linear layer that is faster in half precision on a CPU: for few tokens, or without half products."""

    def forward(self, input: Tensor) -> Tensor:
        W = self.weight
        half = input.dtype == W.dtype and W.itemsize == 2 and input.is_cpu and W.is_cpu
        plain = type(W) is nn.Parameter and W.is_contiguous() and input.numel() * W.numel() > 0
        if not half or not plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(input)
        slow = slow_products(W.dtype)
        if input.numel() <= LINEAR_TOKENS[slow] * input.shape[-1] and native("linear", "cpu"):
            flat = input.reshape(-1, input.shape[-1]).contiguous()
            return torch.ops.globe.linear.default(flat, W, self.bias).view(*input.shape[:-1], W.shape[0])
        if not slow:
            return super().forward(input)
        rows = max(1, 2 ** 24 // self.in_features)  # 64 MiB at a time, for a vocabulary's sake
        y = torch.cat([F.linear(input.float(), part.float()) for part in W.split(rows)], -1)
        return (y if self.bias is None else y + self.bias.float()).to(input.dtype)


# ---- into a model ------------------------------------------------------------------------------------
def experts_modules(model: nn.Module) -> dict:
    """{layer: (parent module, attribute name, experts module)} of every MoE layer of a transformers model."""
    found = {}
    for name, module in model.named_modules():
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer and hasattr(module, "num_experts") and hasattr(module, "gate_up_proj"):
            parent, _, attr = name.rpartition(".")
            found[int(layer[1])] = (model.get_submodule(parent), attr, module)
    return found


# Grouped products want rows of whole 16 bytes: dense experts of others run one by one
def one_by_one(model: nn.Module) -> None:
    for _, _, module in experts_modules(model).values():
        W = getattr(module, "down_proj", None)
        if W is not None and any(n * W.itemsize % 16 for n in W.shape[1:]):
            model.set_experts_implementation("eager")


# The cache settings of the run that made the factors. UserError where they are none
def own_cache(meta: dict) -> CacheConfig:
    try:
        cache = CacheConfig(**(meta.get("config", {}).get("cache") or {}))
    except TypeError as e:
        raise UserError(f"cache settings of the factors: expected those of CacheConfig, found {e}") from None
    if cache.mode == "lfu":  # of an older version
        cache.mode = "lru"
    return cache


# UserError for settings that no cache can have, or none of these factors
def check_cache(cache: CacheConfig, families: dict, composed: bool) -> None:
    modes = ("lru", "all", "none", "direct")
    expect(cache.mode in modes, f"cache.mode: expected one of {', '.join(modes)}, found {short(cache.mode)}")
    found = {about.get("activation", "codes") for about in families.values()} - {"identity"}
    expect(cache.mode != "direct" or composed or not found,
           f"cache.mode=direct: expected 16-bit bases without an activation, found {', '.join(found)}")


# Empty GlobeCoded in place of linear layers and embeddings {name: bits}; returns what stood there
def install_rest(model: nn.Module, rest: dict) -> dict:
    old_modules = {}
    for name, module in list(model.named_modules()):
        # a head that shares its embedding's weight has no codes of its own
        tied = model.all_tied_weights_keys.get(f"{name}.weight", "").removesuffix(".weight")
        if name in rest or tied in rest:
            parent, _, attr = name.rpartition(".")
            fine = type(module) in (nn.Linear, GlobeLinear, nn.Embedding)
            expect(fine, f"model: {name}: expected a linear layer or an embedding")
            embedding = None if name in rest else model.get_submodule(tied)
            old_modules[name, attr] = (model.get_submodule(parent), module)
            setattr(model.get_submodule(parent), attr, GlobeCoded(module, rest.get(name), embedding))
            model.all_tied_weights_keys.pop(f"{name}.weight", None)
    missing = rest.keys() - {name for name, _ in old_modules}
    expect(not missing, f"model: expected layers {', '.join(sorted(missing)[:3])}, found none")
    return old_modules


def install(model: nn.Module, meta: dict, cache: CacheConfig | None = None) -> dict:
    """Put empty (meta-device) GlobeExperts, GlobeShared and the bank into a model.

    cache: default: that of the factors' run. Returns {(layer, attribute): (parent, old module)}. UserError
    where the model has other experts.
    """
    D = dims_from(meta)
    found = experts_modules(model)
    cache = cache or own_cache(meta)
    kinds = (meta["model_type"], model.config.model_type)
    expect(kinds[0] == kinds[1], f"model: expected {kinds[0]}, found {kinds[1]}")
    check_cache(cache, meta["families"], bool(meta.get("composed")))
    bank = GlobeBank(meta)
    old_modules = {}
    for layer in map(int, meta["experts"]):
        expect(layer in found, f"model: expected experts in layer {layer}, found none")
        parent, attr, old = found[layer]
        expect(not isinstance(old, GlobeExperts), "model: already patched; call unpatch first")
        sizes = (old.num_experts, old.intermediate_dim, old.hidden_dim)
        wanted = (D.experts, D.p, D.d)
        expect(sizes == wanted, f"model layer {layer}: expected experts, p, d = {wanted}, found {sizes}")
        new = GlobeExperts(meta, layer, old, bank, cache).train(model.training)
        old_modules[layer, attr] = (parent, old)
        setattr(parent, attr, new)
        if any(e >= D.experts for e in new.fitted):  # the shared expert too
            name = "shared_expert" if hasattr(parent, "shared_expert") else "shared_experts"
            old_modules[layer, name] = (parent, getattr(parent, name))
            setattr(parent, name, GlobeShared(new, getattr(parent, name), D.shared).train(model.training))
    old_modules |= install_rest(model, meta.get("rest", {}))
    for m in model.modules():
        if type(m) is nn.Linear:
            m.__class__ = GlobeLinear
    # first in the model, since device_map="auto" offloads what comes last
    model._modules = {"globe_bank": bank, **model._modules}
    set_cache(model, cache)
    return old_modules


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a real tensor in place of another (a meta one, at first), under the same name."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, key)
    expect(old.shape == tensor.shape, f"{name}: expected {tuple(old.shape)}, found {tuple(tensor.shape)}")
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[key] = tensor


def globe_modules(model: nn.Module) -> list:
    return [m for m in model.modules() if type(m).__name__ == "GlobeExperts"]  # of any copy of this file


# Slots for each layer. A budget counts in whole items, divided evenly; layers without one take turns
def slots_of(modules: list, cache: CacheConfig) -> list:
    experts = [len(m.fitted) for m in modules]
    if cache.mode == "all":
        return experts
    if cache.mode in ("none", "direct"):
        return [0] * len(modules)
    if not cache.budget:
        return [min(n, cache.per_layer or (n + 1) // 2) for n in experts]
    total = int(cache.budget * 2 ** 20 // modules[0].item_bytes())
    if total < len(modules):
        return [int(i < total - 1) for i in range(len(modules))]
    each, left = divmod(total, len(modules))
    return [min(n, each + (i < left)) for i, n in enumerate(experts)]


def set_cache(model: nn.Module, cache: CacheConfig) -> None:
    """Give every layer its slots and choose what they hold: composed bases, or cheaper weights."""
    modules = globe_modules(model)
    expect(modules, "model: expected GlobeExperts, found none (not patched, nor a globe export)")
    first = modules[0]
    check_cache(cache, first.families, first.composed)
    bank = first._bank[0]
    bank.cache, bank.scratch = cache, {}
    bank.scratch_slots = min(first.top_k, len(first.fitted)) if cache.mode in ("none", "direct") else 1
    for m in modules:
        m.hold = m.held(cache.mode)
    for m, slots in zip(modules, slots_of(modules, cache)):
        m.cache = ExpertCache(slots)


# ======== 5. Hugging Face: from_pretrained hooks, save_pretrained =====================================
AUTO_MAP = {"AutoConfig": "globe.GlobeAuto", "AutoModelForCausalLM": "globe.GlobeAuto"}


# auto_map without models: a tokenizer's or a processor's own code
def other_code(config: Any) -> dict:
    named = getattr(config, "auto_map", None) or {}
    return {k: v for k, v in named.items() if not k.startswith(("AutoConfig", "AutoModel"))}


def convert(model: nn.Module, meta: dict, cache: CacheConfig | None = None) -> dict:
    """install, and save_pretrained writes an export from here on; returns the old modules."""
    old_modules = install(model, meta, cache)
    model.save_pretrained = functools.partial(save_pretrained, model, meta)
    return old_modules


def loader_source() -> str:
    """This file down to the marker, byte for byte: what an export carries."""
    head, marker, rest = Path(__file__).read_bytes().decode().partition(f"\n{MARKER}\n")
    return head + marker


def save_pretrained(model: nn.Module, meta: dict, directory: str | Path, **kwargs) -> None:
    """save_pretrained (same kwargs) of a converted model: an export that from_pretrained reads."""
    model.config.quantization_config = {**meta, "quant_method": "globe"}
    model.config.auto_map = other_code(model.config) | AUTO_MAP
    model._weight_conversions = []  # tensors keep the names of the converted model
    push = kwargs.pop("push_to_hub", False)
    repo = kwargs.pop("repo_id", Path(directory).name)
    type(model).save_pretrained(model, directory, **kwargs)
    (Path(directory) / "globe.py").write_bytes(loader_source().encode())
    mode = (Path(directory) / "config.json").stat().st_mode  # by the umask; safetensors writes 0600
    for file in Path(directory).glob("*.safetensors"):
        file.chmod(mode)
    if push:
        known = {"token", "private", "commit_message"} & {*kwargs}
        model.push_to_hub(repo, **{key: kwargs[key] for key in known})


# UserError where tensors are missing: transformers would go on with random numbers
def refuse_missing(names: Sequence[str], where: Path | str) -> None:
    expect(not names, f"{where}: expected tensor {(*names, '')[0]}, found none (and {len(names) - 1} more)")


# Tensors that no file holds, but for a new head's, which transformers initialises and says
def missing_tensors(model: nn.Module, stored: set) -> list:
    prefix = f"{model.base_model_prefix}."  # of names where the model has a head, here or when it was stored
    held = {name.removeprefix(prefix) for name in stored}
    missing = [name for name in model.state_dict() if name.removeprefix(prefix) not in held]
    old = "" if model.base_model is model else (prefix, "globe_bank.", "lm_head.")
    return [name for name in missing if name.startswith(old)]


# UserError where a tensor-parallel plan has cut dense matrices: adapters and bases are not cut with them
def refuse_slices(model: nn.Module) -> None:
    for m in globe_modules(model):
        for f in FAMILIES:
            W = getattr(m, f"{f}_proj", None)
            W = W.to_local() if hasattr(W, "to_local") else W
            expect(W is None or (*W.shape[1:],) == m._shape(f), "tp_plan: GloBE's experts cannot be cut: "
                   "take device_map or a dense export")


# UserError where an expert mixes bases that its bank does not have, or codes do not hold together
def check_mixtures(model: nn.Module, where: Path | str) -> None:
    for module in globe_modules(model):
        for f, about in module.families.items():
            if "code" in about and not module._buffers[f"{f}_width"].is_meta:
                wrong = code_problem(module._codes(f), module._shape(f)[1])
                expect(not wrong, f"{where}: layer {module.layer} {f}: {wrong}")
            idx = getattr(module, f"{f}_idx", None)
            if idx is not None and not idx.is_meta:
                low, high = int(idx.min()), int(idx.max())
                expect(0 <= low <= high < about["m"], f"{where}: layer {module.layer} {f}_idx: expected "
                       f"indices in [0, {about['m']}), found {low}..{high}")


class GlobeAuto:
    """What auto_map names: importing this file registers the loader; all classes are the native ones."""

    @classmethod
    def from_pretrained(cls, path, *args, config=None, **kwargs):
        kwargs["trust_remote_code"] = False  # it let this file run; a custom_generate beside it would run too
        if config is not None:  # AutoModelForCausalLM asks, with the config that AutoConfig got before
            return MODELS[type(config)].from_pretrained(path, *args, config=config, **kwargs)
        kind = PreTrainedConfig.get_config_dict(path, **kwargs)[0]["model_type"]
        return CONFIG_MAPPING[kind].from_pretrained(path, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):  # a dense model of random weights
        return MODELS[type(config)]._from_config(config, **kwargs)

    # the native classes need no code beside them
    register_for_auto_class = classmethod(lambda cls, auto_class=None: None)


class GlobeQuantizationConfig(QuantizationConfigMixin):
    def __init__(self, **meta):
        vars(self).update(meta)


class GlobeQuantizer(HfQuantizer):
    is_trainable, is_qat_trainable, is_compileable = True, True, False

    def is_serializable(self) -> bool:
        return True

    # Called with what the user gave, and again with what "auto" came to
    def validate_environment(self, device_map=None, **_) -> None:
        places = device_map if isinstance(device_map, dict) else {}
        names = [name for name in places if name.startswith("globe_bank")] or {""} & {*places}
        bank = {str(places[name]) for name in names}
        far = "cpu" in bank and {*map(str, places.values())} - {"cpu", "disk"}
        expect("disk" not in bank and not far, "device_map: expected globe_bank, which every layer reads, in "
               f"memory, on an accelerator if there is one, found it on {', '.join(bank)}: name its place")

    # A map made for the dense model has no place for the bank
    def update_device_map(self, device_map):
        if not isinstance(device_map, dict) or any(n == "" or n.startswith("globe") for n in device_map):
            return device_map
        places = sorted(device_map.values(), key=lambda place: str(place) in ("cpu", "disk"))
        return {"globe_bank": "cpu" if places[0] == "disk" else places[0], **device_map}

    def update_weight_conversions(self, weight_conversions, model) -> list:
        return []  # tensors are stored under the names of the converted model

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **_) -> None:
        where = str(getattr(model.config, "name_or_path", None) or "config.json")
        convert(model, check_meta(self.quantization_config.to_dict(), where))
        stored = set(model.all_tied_weights_keys)
        for file in checkpoint_files or ():
            with safe_open(file, "pt") as f:
                stored.update(f.keys())
        if checkpoint_files:
            refuse_missing(missing_tensors(model, stored), where)

    def _process_model_after_weight_loading(self, model, **_):
        refuse_slices(model)
        check_mixtures(model, getattr(model.config, "name_or_path", None) or "model")
        model.is_quantized = False  # it may be cast, pickled and trained as any other
        one_by_one(model)
        for module in (model.globe_bank, *globe_modules(model)):
            module.requires_grad_(False)
        return model


def register_loader() -> None:
    """Teach from_pretrained to read quant_method "globe"; once, however many copies are imported."""
    if "globe" not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config("globe")(GlobeQuantizationConfig)
        auto.register_quantizer("globe")(GlobeQuantizer)


register_loader()  # imported, as a package or as remote code: from_pretrained knows GloBE from here on
# ---- an export carries the file down to here ----
import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import html
import json
import operator
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import types
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field
from datetime import timedelta
from typing import Iterable, Iterator

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.optim.adam import adam
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig


# ======== 6. Config: dataclasses; defaults < YAML < command line ======================================
# Never touches: tensors.
# A field's annotation is the check of its type, and its comment the manual.
@dataclass
class ModelConfig:
    path: str = "tiny"  # directory, hub id, or tiny: the default model, trained on first use
    revision: str | None = None
    force_download: bool = False
    families: str = "both"  # up | gate | both | all (gate, up and down)
    include_shared: bool = False  # the shared expert too, in slices of moe_intermediate_size
    single_layer: int | None = None  # fit this layer only
    max_experts: int | None = None  # per layer; the rest stay dense
    sample: str = "first_n"  # which experts those are: first_n | evenly_spaced
    normalize: str = "scale"  # none | scale (by the deviation) | zscore (subtract the mean too)


@dataclass
class BankConfig:
    m: int | dict = 32  # bases per bank, or {gate: 16, up: 24} (with bank.share: gate's)
    r: int | float | None = None  # rows of a basis; a float is a fraction of p
    ratio: float | None = 0.7  # where r is not given: the r for this stored / dense size
    # wanted size of the whole model, as 6GiB: bits, families and rest.bits follow; with bits=16 a ratio
    memory: str | None = None
    scope: str | int = "global"  # global | layer | N (groups of N neighbouring layers)
    share: bool = True  # gate and up draw from one bank (where both are compressed)
    activation: str = "identity"  # phi: identity | silu | tanh
    init: str = "auto"  # experts | svd | dictionary | random; auto: experts
    # stored bits per dense weight, everything counted: packed codes, and no r, ratio, m, scope or sparsity;
    # null or 16: 16-bit factors
    bits: float | None = None
    # of gate and up in codes: orthonormal (of each layer, in its metric), rotation (of all layers), identity;
    # auto: the one of the first two that loses less on the calibration text
    basis: str = "auto"


@dataclass
class SparsityConfig:
    # signed (free coefficients) | sparsemax | entmax | softmax; auto: signed under identity, else softmax
    map: str = "auto"
    alpha: float = 1.5  # of entmax: 1 (softmax), 1.5 or 2 (sparsemax)
    support: int = 8  # largest support at the end
    T0: float = 1.0  # first temperature
    eta: float = 0.9  # T is multiplied by this at every stage while supports are too large
    # fraction of the steps after which supports are cut to size and fixed; default: 0.15 signed, else 0.7
    freeze: float | None = None
    l1: float = 0.0  # on |alpha|; acts on signed mixtures (a simplex has constant L1)
    eps_prune: float = 1e-4  # mixture weights below this are dropped when supports are fixed


@dataclass
class AdamConfig:
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-12
    lr_A: float = 1.0  # learning rates of A and z relative to fit.lr, which is B's
    lr_z: float = 1.0
    weight_decay: float = 0.0
    safeguard: bool = True  # false: plain Adam, steps may raise the objective (the MoBE setting)


@dataclass
class HomotopyConfig:
    # phi_lam(z) = (1 - lam) z + lam phi(z)
    lam_start: float = 1.0
    lam_end: float = 1.0
    lam_steps: int = 0
    # method am: targets (1 - beta) X + beta argmin_T ||W - A T||
    beta_start: float = 0.5
    beta_end: float = 1.0
    beta_steps: int = 20
    every: int = 10  # schedules move once in so many steps


@dataclass
class FitConfig:
    method: str = "varpro"  # varpro (A eliminated) | am (alternating minimisation) | adam (joint)
    metric: str = "data"  # data (weighted by the layer's input covariance) | weights
    ridge: float = 0.03  # shrinkage of the covariance, relative to its mean diagonal
    steps: int = 175
    batch: int = 0  # experts per batch; 0: from the free memory
    lr: float = 0.05
    memory: int = 4  # varpro: pairs of bank-sized tensors that L-BFGS keeps
    adam: AdamConfig = field(default_factory=AdamConfig)
    homotopy: HomotopyConfig = field(default_factory=HomotopyConfig)
    lambda_A: float = 1e-6  # ridge on A, relative to the mean diagonal of its Gram matrix
    lambda_B: float = 0.0  # on ||B||^2, relative to the bank's size at the start
    lambda_T: float = 1e-4  # method am: ridge on the targets, relative likewise
    # after the fit, each layer by its own output
    refine: int = 6  # steps for its adapters of gate and up
    down: bool = True  # then its down projections are solved for (adapters where down was fitted)
    seed: int = 0
    save_every: int = 25
    budget: float | None = None  # GiB that the fit may plan on; default: what is free
    device: str = "auto"
    dtype: str = "float32"  # of products (tf32: on CUDA); sums and Cholesky: float32 or better


@dataclass
class CalibConfig:
    text: str = "builtin"  # text file, directory of them, or builtin (the standard library's)
    tokens: int = 131072
    length: int = 512
    batch: int = 4  # windows that a layer sees at a time
    # weigh errors by the gradient of the model's own predictions (four forward passes' work in all);
    # false: by what they move in the residual stream (one)
    fisher: bool = True
    # each row's mean input too (a quarter more time for the fit, half of the experts' numbers on disk)
    means: bool = True
    sampled: int = 0  # more tokens, sampled from the dense model, which must fit in memory
    dtype: str | None = None  # of the dense model, in heal too; default: the checkpoint's
    save: str | None = None  # file to write the moments to
    load: str | None = None  # ... and to take them from, in place of a calibration


@dataclass
class RestConfig:
    # of a number of attention, shared experts, embeddings and head: 16 | 8 | 4, in groups of 64; routers and
    # norms stay. null: 16, and with bank.memory what leaves the experts enough
    bits: int | None = None


@dataclass
class ExportConfig:
    dtype: str | None = None  # of globe and composed exports; dense ones keep the source's


@dataclass
class EvalConfig:
    text: str = "builtin"  # text file, hf:DATASET:CONFIG:SPLIT or builtin (held-out library files)
    tokens: int = 32768
    length: int = 512
    # tokens from one window to the next, the rest is context; default: windows spread over the text
    stride: int | None = None
    context: int | None = None  # longest input that lm-eval's tasks may use; default: the model's


@dataclass
class LogConfig:
    to: str = "none"  # none | trackio | wandb, beside log.jsonl
    project: str = "globe"
    entity: str | None = None  # the user or team that owns the project
    run_name: str | None = None
    tags: list | None = None


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    calib: CalibConfig = field(default_factory=CalibConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    rest: RestConfig = field(default_factory=RestConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    # train.py's sections, kept as they are
    heal: dict = field(default_factory=dict)
    tiny: dict = field(default_factory=dict)
    log: LogConfig = field(default_factory=LogConfig)


HALVES = (None, "float32", "bfloat16", "float16")
CHOICES = {
    "model.families": ("up", "gate", "both", "all"),
    "model.sample": ("first_n", "evenly_spaced"),
    "model.normalize": ("none", "scale", "zscore"),
    "bank.activation": ("identity", "silu", "tanh"),
    "bank.init": ("auto", "experts", "svd", "dictionary", "random"),
    "bank.basis": ("auto", "identity", "orthonormal", "rotation"),
    "rest.bits": (None, 4, 8, 16),
    "sparsity.map": ("auto", "sparsemax", "entmax", "softmax", "signed"),
    "sparsity.alpha": (1.0, 1.5, 2.0),
    "fit.method": ("varpro", "am", "adam"),
    "fit.metric": ("data", "weights"),
    "fit.dtype": ("float64", "float32", "tf32", "bfloat16", "float16"),
    "calib.dtype": HALVES,
    "cache.dtype": HALVES,
    "export.dtype": HALVES,
    "cache.mode": ("lru", "all", "none", "direct"),
    "log.to": ("none", "trackio", "wandb"),
}
# numbers above 0
POSITIVE = (
    "model.max_experts", "bank.m", "bank.r", "bank.ratio", "bank.bits", "sparsity.support", "sparsity.T0",
    "fit.steps", "fit.lr", "fit.save_every", "fit.memory", "fit.budget", "fit.homotopy.every", "calib.tokens",
    "calib.length", "calib.batch", "cache.per_layer", "cache.budget", "eval.tokens", "eval.length",
    "eval.stride", "eval.context")
# 0 or more
NON_NEGATIVE = (
    "model.single_layer", "sparsity.l1", "sparsity.eps_prune", "fit.batch", "fit.ridge", "fit.lambda_A",
    "fit.lambda_B", "fit.lambda_T", "fit.refine", "fit.seed", "fit.adam.weight_decay",
    "fit.homotopy.lam_steps", "fit.homotopy.beta_steps", "calib.sampled", "cache.warmup_tokens")
# from 0 to 1
FRACTIONS = (
    "sparsity.eta", "sparsity.freeze", "fit.adam.beta1", "fit.adam.beta2", "fit.homotopy.lam_start",
    "fit.homotopy.lam_end", "fit.homotopy.beta_start", "fit.homotopy.beta_end")


def check_ranges(cfg: Any, choices: dict, positive: tuple, non_negative: tuple, fractions: tuple) -> None:
    """UserError for a value outside its table; the tables name section.key, and ranges let None pass."""
    for path, allowed in choices.items():
        value = operator.attrgetter(path)(cfg)
        expect(value in allowed,
               f"{path}: expected one of {', '.join(map(str, allowed))}, found {short(value)}")

    # whole numbers become sizes and seeds, others float32
    most = {int: 2 ** 40, float: 1e38}

    def check(paths: tuple, fine: Callable, wanted: str) -> None:
        for path in paths:
            value = operator.attrgetter(path)(cfg)
            for v in value.values() if isinstance(value, dict) else [value]:
                good = v is None or type(v) in most and v <= most[type(v)] and fine(v)
                expect(good, f"{path}: expected {wanted}, found {short(v)}")

    check(positive, lambda v: v > 0, "a number above 0, at most 2^40 or 1e38")
    check(non_negative, lambda v: v >= 0, "0 or more, at most 2^40 or 1e38")
    check(fractions, lambda v: 0 <= v <= 1, "a number from 0 to 1")


# Whether the experts become packed codes
def in_codes(cfg: Config) -> bool:
    return cfg.bank.bits not in (None, 16) or bool(cfg.bank.memory) and cfg.bank.bits is None


# refuse values that no run could use
def check_config(cfg: Config) -> Config:
    m = cfg.bank.m
    fine = type(m) is not dict or m.keys() <= set(FAMILIES) and set(map(type, m.values())) == {int}
    expect(fine, f"bank.m: expected a whole number per family (gate, up, down), found {short(m)}")
    check_ranges(cfg, CHOICES, POSITIVE, NON_NEGATIVE, FRACTIONS)
    scope = cfg.bank.scope
    expect(re.fullmatch("global|layer|[1-9][0-9]{0,8}", str(scope)),
           f"bank.scope: expected global, layer or a number of layers, found {short(scope)}")
    expect(cfg.eval.length >= 2, f"eval.length: expected 2 or more, found {cfg.eval.length}")
    expect(cfg.bank.r or cfg.bank.ratio or cfg.bank.bits or cfg.bank.memory,
           "bank: expected r, ratio, bits or memory, found none")
    if in_codes(cfg):
        bits = cfg.bank.bits or 1
        expect(bits <= 8, f"bank.bits: expected at most 8, or 16 for no codes, found {bits}")
        expect(cfg.bank.activation == "identity",
               f"bank.bits: expected bank.activation identity, found {cfg.bank.activation}")
        expect(cfg.cache.mode != "direct", "bank.bits: expected cache.mode lru, all or none, found direct")
        expect(not (cfg.bank.bits and cfg.bank.memory), "bank.bits: expected no bank.memory as well")
    expect(cfg.cache.mode != "direct" or cfg.bank.activation == "identity",
           f"cache.mode=direct: expected bank.activation identity, found {cfg.bank.activation}")
    return cfg


def is_lfs_pointer(path: Path) -> bool:
    with open(path, "rb") as f:
        return f.read(40).startswith(b"version https://git-lfs")


@contextlib.contextmanager
def expecting(what: str, *kinds: type, file: Path | None = None) -> Iterator[None]:
    """UserError "what, found REASON" for errors of these kinds in the block; default: whatever goes wrong."""
    try:
        yield
    except UserError:
        raise
    except kinds or Exception as e:
        found = f"{type(e).__name__}: {' '.join(str(e).split())[:600]}"
        # a clone without git-lfs holds stand-ins
        if file and is_lfs_pointer(file):
            found = "a git-lfs pointer: run git lfs pull"
        raise UserError(f"{what}, found {found}") from None


# refuses aliases (a few lines of them unfold to gigabytes) and a key that comes twice
class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise yaml.YAMLError(f"anchors and aliases are not supported, found one in line {line}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"key {max(keys, key=keys.count)} twice in one mapping, line {line}")
        return super().construct_mapping(node, deep)


# plain data from YAML; UserError for anything else, however hostile
def read_yaml(text: str, where: str) -> Any:
    with expecting(f"{where}: expected YAML", yaml.YAMLError, ValueError, LookupError, TypeError,
                   AttributeError, OverflowError, RecursionError):
        return _PlainLoader(text).get_single_data()


# a value as its annotation ("int | float | None") wants it
def _coerce(value: Any, annotation: str, where: str) -> Any:
    kinds = annotation.split(" | ")

    # text is verbatim where nothing but text is wanted; elsewhere it is YAML
    if isinstance(value, str) and not set(kinds) <= {"str", "None"}:
        value = read_yaml(value, f"{where}={value}")
    if "None" in kinds and value in (None, "", "~", "null"):
        return None

    # what JSON cannot hold passes for none of the kinds: dates, NaN, thousands of digits
    kind = type(value).__name__
    if kind in kinds and kind != "float" and value != "":
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            json.dumps(value, allow_nan=False)
            return value

    # a whole number is a float too, and so is 1e-3, which PyYAML reads as text
    if "float" in kinds and kind in ("float", "int", "str"):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(float(value)):
                return float(value)
    raise UserError(f"{where}: expected {' or '.join(kinds)}, found {short(value)}")


# write a nested mapping into a dataclass tree; `where` is the section's path, with a dot behind it
def _merge(node: Any, update: Any, source: str, where: str = "", ignored: list | None = None) -> None:
    # the command line may give a section: bank={m: 3}
    if isinstance(update, str):
        update = read_yaml(update, f"{source}: {where[:-1]}={update}")
    section = where[:-1] or "top level"
    expect(isinstance(update, dict), f"{source}: {section}: expected a mapping, found {short(update)}")
    kinds = {f.name: f.type for f in dataclasses.fields(node)}
    for key, value in update.items():
        path = f"{where}{key}"
        # an older run's unknown keys are collected, all others are errors
        if key not in kinds and ignored is not None:
            ignored.append(path)
        elif key not in kinds:
            expect(path != "sweep", f"{source}: sweep: bench.py sweep fits a grid")
            near = difflib.get_close_matches(str(key), kinds, 1, 0)[0]
            raise UserError(f"{source}: unknown key {path}; did you mean {where}{near}?")
        elif dataclasses.is_dataclass(getattr(node, key)):
            _merge(getattr(node, key), value, source, f"{path}.", ignored)
        elif kinds[key] == "dict":  # a section of train.py
            getattr(node, key).update(_coerce(value, "dict", f"{source}: {path}"))
        else:
            setattr(node, key, _coerce(value, kinds[key], f"{source}: {path}"))


def load_config(path: str | None = None, overrides: Sequence[str] = (), base: Any = None,
                where: str = "the run's config.yaml", kind: type = Config) -> Any:
    """Fill the dataclass `kind`: defaults < base (an older run's, called `where`) < YAML file < overrides.

    Raises UserError for an unreadable file, an unknown key, a wrong type or a value out of range."""
    cfg = kind()

    # what nobody reads any more in an older run is ignored, with one line
    if base:
        ignored: list = []
        _merge(cfg, base, where, ignored=ignored)
        if cfg.cache.mode == "lfu":
            cfg.cache.mode = "lru"
            ignored.append("cache.mode=lfu")
        if ignored and os.environ.get("RANK", "0") == "0":
            print(one_line(f"{where}: ignored, no longer read: {', '.join(ignored)}"), file=sys.stderr)

    if path:
        with expecting(f"--config {path}: expected a text file", OSError, UnicodeDecodeError):
            text = Path(path).read_text(encoding="utf-8")
        _merge(cfg, read_yaml(text, f"--config {path}") or {}, path)

    for item in overrides:
        key, equals, value = item.partition("=")
        expect(equals, f"{item!r}: expected section.key=value")
        for name in reversed(key.split(".")):
            value = {name: value}
        _merge(cfg, value, "command line")
    # train.py has configs of its own, and checks them
    return check_config(cfg) if isinstance(cfg, Config) else cfg


# ======== 7. Files, devices, ranks ====================================================================
# ---- files ----
def flush(path: Path) -> None:
    # to the disk, not only into its cache
    with open(path, "rb") as f:
        os.fsync(f.fileno())


@contextlib.contextmanager
def written(path: Path, sync: bool = True) -> Iterator[Path]:
    """A temporary name, for a file or a directory, that becomes `path` where the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        yield tmp
        # libraries may write 0600: files get what the umask gave to their directory
        for file in filter(Path.is_file, tmp.rglob("*")):
            file.chmod(tmp.stat().st_mode & 0o666)
        for file in filter(Path.is_file, (tmp, *tmp.rglob("*")) if sync else ()):
            flush(file)
        os.replace(tmp, path)
    finally:
        if tmp.is_dir():
            shutil.rmtree(tmp)
        tmp.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with written(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def user_cache() -> Path:
    # where the default model and the built operators live
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GLOBE_CACHE") or Path(caches) / "globe")


SAFE_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}


def tensor_bytes(t: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, to read into or to write from without a copy."""
    return memoryview(t.flatten().view(torch.uint8).numpy())


def write_tensors(path: Path, shapes: dict, tensors: Mapping, metadata: dict | None = None,
                  sync: bool = True) -> None:
    """Write a safetensors file: {name: (dtype, shape)}, then tensors[name], computed one at a time."""
    # the header says where the bytes of each tensor lie behind it
    header: dict = {"__metadata__": metadata or {}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        start = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFE_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}

    # padded with spaces, so that the data begin at a multiple of 64 bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with written(path, sync) as tmp, open(tmp, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in shapes.items():
            # some are computed when they are asked for
            t = tensors[name]
            assert (t.dtype, tuple(t.shape)) == (dtype, tuple(shape)), name
            f.write(tensor_bytes(t.detach().cpu().contiguous()))


def read_tensors(path: Path) -> dict:
    """{name: tensor} of a safetensors file, in fresh memory."""
    # no memory map: MKL rounds otherwise where tensors are not aligned
    with safe_open(path, "pt") as f:
        return {name: f.get_tensor(name).clone() for name in f.keys()}


@dataclass(eq=False)
class Shelved:
    """A dict of CPU tensors, in memory or, after to(path), in a file that is read at every use."""
    tensors: dict
    path: Path | None = None

    def save(self, path: Path, sync: bool = True, about: dict | None = None) -> None:
        shapes = {name: (t.dtype, t.shape) for name, t in self.tensors.items()}
        write_tensors(path, shapes, self.tensors, about, sync)

    def to(self, path: Path) -> Shelved:
        self.save(path, sync=False)
        self.tensors = {}
        self.path = path
        return self

    def load(self) -> dict:
        return read_tensors(self.path) if self.path else self.tensors


@dataclass(eq=False)
class LazyDict(Mapping):
    """{key: tensor} from {key: function}: computed when it is asked for; the last one is kept."""
    make: dict
    last: dict = field(default_factory=dict)

    def __getitem__(self, key: Any) -> Tensor:
        # let go of the old one first: memory may not hold two
        if key not in self.last:
            self.last.clear()
            self.last[key] = self.make[key]()
        return self.last[key]

    def __iter__(self) -> Iterator:
        return iter(self.make)

    def __len__(self) -> int:
        return len(self.make)


def on_disk(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    n = math.prod(shape)
    with open(path, "wb") as f:
        f.truncate(n * dtype.itemsize)
        # so that a full disk is an error, no crash later; macOS has no such call
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(f.fileno(), 0, n * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=n, dtype=dtype).view(*shape)


def saved_state(path: Path) -> contextlib.AbstractContextManager:
    """UserError for whatever goes wrong while a state is read: it is damaged, or another run's."""
    return expecting(f"{path}: expected the saved state of this run (or a fresh start, by --overwrite)",
                     OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError,
                     RuntimeError)


# ValueError that names what a saved state belongs to and a run does not
def same_state(found: dict, wanted: dict) -> None:
    if wanted and "checkpoint" not in found:
        raise ValueError("one of an older version, which does not name its checkpoint")
    other = [key for key in wanted if found.get(key, wanted[key]) != wanted[key]]
    if other:
        differ = [f"{key} {short(found[key])}, not {short(wanted[key])}" for key in other]
        raise ValueError(f"one with {'; '.join(differ)}")


# ---- devices: little else knows CUDA and MPS by name ----
def pick_device(name: str | None = "auto") -> torch.device:
    """The device for "auto", "cpu", "cuda[:i]" or "mps"; UserError where there is no such."""
    # in order of preference; torchrun numbers a machine's ranks as CUDA its GPUs
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    found = [kind for kind in counts if counts[kind]]
    if name in (None, "auto"):
        name = found[0].replace("cuda", f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: expected auto, cpu, cuda, cuda:N or mps, found {name!r}") from None
    expect((device.index or 0) < counts.get(device.type, 0),
           f"--device {name}: not available (available: {', '.join(found)})")
    return device


def synchronize(device: torch.device) -> None:
    """Wait for what was queued on the device; needed around every timing."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes that a run may plan on."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    # Linux knows what it could take back from caches; elsewhere, half of all
    with contextlib.suppress(OSError):
        return 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def fit_budget(cfg: Config, device: torch.device) -> float:
    """Bytes that a rank may plan on: fit.budget, else its part of what is free."""
    if cfg.fit.budget:
        return cfg.fit.budget * 2 ** 30
    # the ranks of a machine share its memory, but each has a GPU of its own
    sharing = {"cpu": os.environ.get("LOCAL_WORLD_SIZE", 1)}
    return free_memory(device) / int(sharing.get(device.type, 1))


def peak_rss_gib() -> float:
    """GiB at most resident in this process."""
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # bytes on macOS, KiB on Linux
    return peak / 2 ** (30 if sys.platform == "darwin" else 20)


def reset_peak(device: torch.device) -> None:
    """Measure peak memory afresh from this moment, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: torch.device) -> float:
    """GiB at most resident since reset_peak, with what an accelerator held."""
    held = {"cuda": torch.cuda.max_memory_allocated, "mps": lambda _: torch.mps.driver_allocated_memory()}
    return peak_rss_gib() + held.get(device.type, lambda _: 0)(device) / 2 ** 30


def accumulator(device: torch.device) -> torch.dtype:
    # for sums; MPS has no float64
    return torch.float32 if device.type == "mps" else torch.float64


def with_gradients(dtype: torch.dtype) -> torch.dtype:
    # gradients in float16 would need a loss scale
    return torch.float32 if dtype == torch.float16 else dtype


@functools.cache
def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float32 with a line on stderr where the device's products of it are slow."""
    if slow_products(dtype, device.type):
        say(f"this CPU multiplies {dtype} slowly: computing in float32")
        dtype = torch.float32
    return dtype


@contextlib.contextmanager
def rounding(products: Any, to: str) -> Iterator[None]:
    """What a backend's float32 products may round their factors to: "bf16" or "tf32"."""
    before = products.fp32_precision
    products.fp32_precision = to
    try:
        yield
    finally:
        products.fp32_precision = before


@functools.cache
def onednn_keeps_float32() -> bool:
    """Whether oneDNN multiplies in float32 where it may in bfloat16: true without AMX."""
    if not torch.backends.mkldnn.is_available():
        return False
    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    with rounding(torch.backends.mkldnn.matmul, "bf16"):
        error = (a @ a - a.double() @ a.double()).norm()
    # numbers of size sqrt(512), 512^2 of them: float32 errs by 2e-7 of each, bfloat16 by 2e-3
    return bool(error < 1e-5 * 512 ** 1.5)


@contextlib.contextmanager
def threads_for(p: int, d: int, dtype: str = "float32") -> Iterator[None]:
    """Settings for products of (p, d) matrices; dtype as in fit.dtype."""
    with contextlib.ExitStack() as undo:
        undo.callback(torch.set_num_threads, torch.get_num_threads())
        if p * d <= 2 ** 14:
            # a second thread made fits on 96 x 96 2 to 10 times slower
            torch.set_num_threads(1)
        elif onednn_keeps_float32():
            # oneDNN's products are 2.7 times as fast as MKL's on an EPYC
            undo.enter_context(rounding(torch.backends.mkldnn.matmul, "bf16"))
        if dtype == "tf32":
            undo.enter_context(rounding(torch.backends.cuda.matmul, "tf32"))
        yield


def host_buffer(shape: tuple, device: torch.device) -> Tensor:
    # float32; CUDA copies from pinned memory beside the computing
    return torch.empty(shape, pin_memory=device.type == "cuda")


def side_stream(device: torch.device) -> Any:
    # for copies beside the computing
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def upload(t: Tensor, device: torch.device, stream: Any) -> tuple:
    """(t on the device, stream) for `arrived`; called from a reader's thread."""
    if stream is None:
        return t.to(device), None
    with torch.cuda.stream(stream):
        moved = t.to(device, non_blocking=True)
    # once the copy is complete, t may be filled again
    stream.synchronize()
    return moved, stream


def arrived(t: Tensor, stream: Any) -> Tensor:
    # the memory of t may not be reused before what is computed from it now is done
    if stream is not None:
        t.record_stream(torch.cuda.current_stream(t.device))
    return t


# ---- ranks: the processes that torchrun started for one job ----
class Lost(RuntimeError):
    """Another process of a distributed job is gone."""


def ranks() -> tuple:
    """(rank, number of ranks): (0, 1) but for processes that joined a job."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@contextlib.contextmanager
def joined_ranks(device: torch.device) -> Iterator[None]:
    """Join the job that torchrun started this process for, if it did."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    with expecting(f"WORLD_SIZE={world}: expected to be started by torchrun", ValueError, RuntimeError):
        torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
    try:
        yield
    finally:
        # an error where another process is gone
        with contextlib.suppress(RuntimeError):
            torch.distributed.destroy_process_group()


def first_rank_says(value: Any) -> Any:
    # the first rank's value, on every rank
    box = [value]
    if ranks()[1] > 1:
        torch.distributed.broadcast_object_list(box, 0)
    return box[0]


def all_sum(*tensors: Tensor) -> None:
    """Each tensor becomes its sum over the ranks, in place; Lost where one of them is gone."""
    rank, world = ranks()
    for t in tensors if world > 1 else ():
        try:
            # nccl sums on the GPU alone
            total = t.to("cuda") if torch.distributed.get_backend() == "nccl" else t
            torch.distributed.all_reduce(total)
            t.copy_(total)
        except RuntimeError as e:
            found = str(e).partition("\n")[0][:160]
            raise Lost(f"rank {rank} of {world}: another process is gone ({found})") from None


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; the same answer on all."""
    t = torch.tensor([float(flag)])
    all_sum(t)
    return bool(t)


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """The first rank runs the block, then the others: for what it writes and they read."""
    # any_rank is where ranks wait for one another
    if ranks()[0]:
        any_rank(False)
    yield
    if not ranks()[0]:
        any_rank(False)


# ---- words for people; the last line of stdout is for programs ----
def say(*text: Any) -> None:
    if not ranks()[0]:
        print(*text, file=sys.stderr, flush=True)


def bar(what: str) -> Callable:
    # a progress bar around an iterable
    return functools.partial(tqdm, desc=what, file=sys.stderr, leave=False, dynamic_ncols=True)


# ---- native operators ----
def build_kernels() -> tuple:
    """BUILD's answer: csrc/ compiled into the user's cache; RuntimeError with the compiler's words."""
    csrc = Path(__file__).resolve().parent / "csrc"
    if not csrc.is_dir():
        return None, "no csrc/ beside globe.py"
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler:
        return None, "no C++ compiler"
    home = Path(torch.__file__).parent
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    nvcc = shutil.which("nvcc", path=toolkit) or shutil.which("nvcc")
    kinds = [".h", ".cpp"]
    flags = ["-std=c++17", "-O3", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    libraries = ["-L", str(home / "lib"), "-ltorch", "-ltorch_cpu", "-lc10"]
    if torch.cuda.is_available() and nvcc:
        compiler = nvcc
        kinds.append(".cu")
        flags += ["-DUSE_CUDA", "-arch=native", "-Xcompiler"]
        libraries.append("-ltorch_cuda")

    # torch's stable ABI outlives updates of torch: sources and flags alone name the library
    flags.append("-fPIC")
    files = sorted(file for file in csrc.iterdir() if file.suffix in kinds)
    key = hashlib.sha256(repr((flags, os.uname().machine)).encode())
    for file in files:
        key.update(file.read_bytes())
    path = user_cache() / "kernels" / f"globe_ops-{key.hexdigest()[:16]}.so"
    if path.is_file():
        return path, f"built: {path}"

    # processes that start at once build it twice, each under its own temporary name
    sources = [str(file) for file in files if file.suffix != ".h"]
    say("compiling the native operators, once, which takes some minutes (GLOBE_KERNELS=off does without)")
    with written(path) as tmp:
        command = [compiler, *flags, "-I", str(home / "include"), *sources, *libraries, "-o", str(tmp)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            words = f"({' '.join(command)}):\n{done.stderr[-2000:]}\nGLOBE_KERNELS=off does without"
            raise RuntimeError(f"native operators: the build failed {words}")
    return path, f"built: {path}"


BUILD[0] = build_kernels


# ======== 8. Checkpoint: LAYOUTS, lazy reading ========================================================
# Never touches: fitting.
@dataclass(frozen=True)
class Layout:
    """Where a model type keeps its experts: tensor names, and the config.json keys of their sizes."""
    # one tensor per expert, where {n} is gate, up or down by these names
    expert: str = "model.layers.{l}.mlp.experts.{e}.{n}.weight"
    names: tuple = ("gate_proj", "up_proj", "down_proj")
    # or one tensor per layer, where {n} is gate_up_proj (E, 2p, d) or down_proj (E, d, p)
    fused: str = "model.layers.{l}.mlp.experts.{n}"
    experts_key: str = "num_experts"
    width_key: str = "moe_intermediate_size"
    # the shared expert's MLP; the key of its width, or of how many routed experts it is as wide as
    shared: str | None = None
    shared_width_key: str | None = None
    shared_count_key: str | None = None


DEEPSEEK = Layout(experts_key="n_routed_experts", shared_count_key="n_shared_experts",
                  shared="model.layers.{l}.mlp.shared_experts.{n}.weight")

# a model type, as config.json names it, is a row
LAYOUTS = {
    "qwen2_moe": Layout(shared="model.layers.{l}.mlp.shared_expert.{n}.weight",
                        shared_width_key="shared_expert_intermediate_size"),
    "qwen3_moe": Layout(),
    "mixtral": Layout(expert="model.layers.{l}.block_sparse_moe.experts.{e}.{n}.weight",
                      names=("w1", "w3", "w2"), experts_key="num_local_experts",
                      width_key="intermediate_size"),
    "olmoe": Layout(width_key="intermediate_size"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe", "dots1"), DEEPSEEK),
}
# what no row can describe
UNSUPPORTED = {
    "gpt_oss": "transposed and biased", "nemotron_h": "without a gate", "dbrx": "one flattened matrix",
    **dict.fromkeys(("aria", "aria_text", "llama4", "llama4_text"), "transposed"),
}


# endings of files that hold weights, or are pickles
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".h5", ".msgpack",
           ".onnx", ".npz", ".npy", ".ot")


def resolve_model(path: str, revision: str | None = None, force_download: bool = False) -> Path:
    """A local directory as it is; anything of the form ORG/NAME is fetched from the hub into its cache."""
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise UserError(f"model.path: expected a directory or a hub id (ORG/NAME), found {path!r}")
    from huggingface_hub import snapshot_download
    # everything but other forms of the weights
    others = [f"*{suffix}" for suffix in WEIGHTS if suffix != ".safetensors"] + ["*/*.safetensors"]
    # offline, no such repository, gated: the hub's own reason is the useful part
    with expecting(f"model.path: expected a directory or a model of the hub at {path!r}"):
        return Path(snapshot_download(path, revision=revision, force_download=force_download,
                                      ignore_patterns=others))


def read_json(path: Path) -> dict:
    """The object of a JSON file; UserError where there is none, or where a key stands in it twice."""
    def once(pairs: list) -> dict:
        counts = collections.Counter(key for key, _ in pairs)
        if len(counts) < len(pairs):
            raise ValueError(f"{counts.most_common(1)[0][0]} twice in one object")
        return dict(pairs)

    expect(path.is_file(), f"{path}: expected a JSON file, found none")
    with expecting(f"{path}: expected a JSON file", OSError, ValueError, RecursionError, file=path):
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    expect(isinstance(data, dict), f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def layout_of(config: dict, where: str = "config.json") -> Layout:
    """The LAYOUTS row of a config.json; UserError lists what is supported."""
    kind = str(config.get("model_type"))
    form = UNSUPPORTED.get(kind, "of unknown form")
    expect(kind in LAYOUTS, f"{where}: model_type {short(kind)} is not supported (its experts are {form}); "
                            f"supported: {', '.join(LAYOUTS)}")

    # factors are fitted to values, not to codes
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else short(quantized)
        raise UserError(f"{where}: the checkpoint is quantized ({method}): expected plain float weights")
    return LAYOUTS[kind]


def dims_of(config: dict, where: str = "config.json") -> Dims:
    """Sizes of a config.json, each checked before anything is allocated by it."""
    layout = layout_of(config, where)

    def size(key: str) -> int:
        value = config.get(key)
        expect(type(value) is int and 0 < value < 2 ** 20,
               f"{where}: {key}: expected a whole number above 0 and below 2^20, found {short(value)}")
        return value

    last = size("num_hidden_layers")
    # every decoder_sparse_step-th layer, but for mlp_only_layers and the first first_k_dense_replace; keys
    # that a model type does not have restrict nothing
    with expecting(f"{where}: expected numbers for which layers have experts", TypeError, ValueError):
        step = config.get("decoder_sparse_step") or 1
        dense = set(config.get("mlp_only_layers") or ())
        first = config.get("first_k_dense_replace") or 0
        expect(first >= 0, f"{where}: first_k_dense_replace: expected 0 or more, found {short(first)}")
        layers = tuple(l for l in range(first, last) if l not in dense and (l + 1) % step == 0)

    # transformers 5 may save the number of experts under a name of its own
    key = layout.experts_key if layout.experts_key in config else "num_local_experts"
    experts = size(key)
    expect(0 < len(layers) * experts < 2 ** 22, f"{where}: expected experts in some layers, at most 2^22 of "
           f"them, found {len(layers)} layers of {experts} ({key}, num_hidden_layers {last})")
    top_k = size("num_experts_per_tok")
    expect(top_k <= experts, f"{where}: num_experts_per_tok: at most {experts} ({key}), found {top_k}")

    # a shared expert counts as slices of the routed ones' width p; one that is no multiple of p stays dense
    p = size(layout.width_key)
    shared = 0
    if config.get(layout.shared_count_key):
        shared = size(layout.shared_count_key)
    elif config.get(layout.shared_width_key) and size(layout.shared_width_key) % p == 0:
        shared = size(layout.shared_width_key) // p
    return Dims(layers, experts, p, size("hidden_size"), top_k, shared)


# where one expert matrix lies on disk
class Slot(NamedTuple):
    tensor: str
    part: tuple  # its index in the tensor: (rows, columns), in a fused one (expert, rows, columns)


# whether a file lies in the directory, with links followed
def is_inside(path: Path, directory: Path) -> bool:
    home = directory.resolve()
    allowed = {home}
    # the hub's cache links snapshots/REVISION/NAME to blobs/HASH, beside snapshots
    if home.parent.name == "snapshots":
        allowed.add(home.parent.parent / "blobs")
    return not allowed.isdisjoint(path.resolve().parents)


def open_shard(path: Path):
    """A lazy handle of a safetensors file; UserError where it is none, or a link to another directory."""
    expect(path.is_file(), f"{path}: expected safetensors, found no file")
    expect(is_inside(path, path.parent),
           f"{path}: expected a file in this directory, found a link to {path.resolve()}, outside it")
    with expecting(f"{path}: expected safetensors", SafetensorError, OSError, file=path):
        return safe_open(path, "pt")


def finite(w: Tensor, name: str, where: Any) -> Tensor:
    """w; UserError with the count where it holds NaN or Inf."""
    # the sum first: it needs no copy, and NaN and Inf survive it
    if w.is_floating_point() and w.itemsize > 1 and not math.isfinite(w.sum(dtype=torch.float32)):
        bad = int((~torch.isfinite(w)).sum())
        expect(bad == 0, f"{name}: expected finite weights, found {bad} NaN or Inf in {where}")
    return w


# keys of config.json that no product depends on
BOOKKEEPING = {"transformers_version", "auto_map", "architectures", "dtype", "torch_dtype", "use_cache",
               "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id"}


class Checkpoint:
    """A Hugging Face checkpoint directory, read lazily: one expert at a time through safetensors slices.

    Every expert matrix comes out as (p, d): gate and up as they are, down transposed. Experts E, E+1, ...
    of a layer are the slices of its shared expert. UserError: what is missing, extra or misshapen."""

    def __init__(self, directory: Path | str):
        self.dir = Path(directory)
        path = self.dir / "config.json"
        self.config = read_json(path)
        self.layout = layout_of(self.config, str(path))
        self.dims = dims_of(self.config, str(path))
        self.apart: set = set()  # names that config.json ties and the files do not
        self.index: str | None = None  # the file that names the others, where there are several
        # open files by name, and the bytes of experts read since these were last closed
        self._handles: dict = {}
        self._bytes_read = 0
        self.shard_of = self._find_tensors()
        self.fused = self.layout.fused.format(l=self.dims.layers[0], n="gate_up_proj") in self.shard_of
        self._validate()

    # what a stranger's JSON names must be a file of this directory
    def _own(self, name: Any, where: Path) -> None:
        fine = isinstance(name, str) and os.path.basename(name) == name and "\0" not in name
        expect(fine, f"{where}: {short(name)}: expected a file name in this directory")

    # {tensor: file} of the files that from_pretrained reads, looked for in its order
    def _find_tensors(self) -> dict:
        single = "model.safetensors"
        index = f"{single}.index.json"
        if name := self.config.get("transformers_weights"):
            self._own(name, self.dir / "config.json")
            single, index = (index, name) if str(name).endswith(".index.json") else (name, index)
        if os.path.isfile(self.dir / single):
            table = dict.fromkeys(self._shard(single).keys(), single)
            self._compare(table, self.dir / index)
            return table
        if os.path.isfile(self.dir / index):
            self.index = index
            return self._read_index(self.dir / index)
        found = [f.name for f in sorted(self.dir.glob("*.safetensors"))]
        found += [f"{f.name}, a pickle, which is never loaded" for f in self.dir.glob("*.bin")]
        raise UserError(f"{self.dir}: expected {single} or {index}, found {', '.join(found[:5]) or 'none'}")

    # an index beside a whole file is older or newer: from_pretrained ignores it
    def _compare(self, table: dict, index: Path) -> None:
        with contextlib.suppress(UserError):
            other = self._read_index(index)
            same = other.keys() == table.keys()
            if not same or any(not self._equal(name, table[name], other[name]) for name in table):
                say(f"{self.dir}: {next(iter(table.values()))} is read, as from_pretrained does; "
                    f"{index.name} names files with other tensors")

    # whether two files hold the same tensor, by its shape and first rows
    def _equal(self, name: str, *shards: str) -> bool:
        a, b = (self._shard(shard).get_slice(name) for shard in shards)
        first = slice(0, 2)
        return a.get_shape() == b.get_shape() and (not a.get_shape() or torch.equal(a[first], b[first]))

    def _read_index(self, index: Path) -> dict:
        table = read_json(index).get("weight_map")
        expect(table and isinstance(table, dict), f"{index}: expected a weight_map, found {short(table)}")
        for shard in table.values():
            self._own(shard, index)

        # whole files are loaded, with what the index does not name
        stored = {}
        named = set()
        for shard in sorted(set(table.values())):
            # isfile is False also for a name that no file can have
            expect(os.path.isfile(self.dir / shard), f"{index}: {shard} is not in {self.dir}")
            for name in self._shard(shard).keys():
                named.add((name, shard))
                one = stored.setdefault(name, shard)
                expect(one == shard or self._equal(name, one, shard),
                       f"{self.dir}: {name} is in both {one} and {shard}, with other values")
        for name, shard in table.items():
            expect((name, shard) in named,
                   f"{self.dir / shard}: expected tensor {name} (by the index), found none")
        return stored

    def _shard(self, shard: str):
        # safetensors maps the file: nothing is read yet
        if shard not in self._handles:
            self._handles[shard] = open_shard(self.dir / shard)
        return self._handles[shard]

    def _slice(self, tensor: str):
        return self._shard(self.shard_of[tensor]).get_slice(tensor)

    def shape(self, tensor: str) -> list:
        return self._slice(tensor).get_shape()

    def slot(self, family: str, layer: int, expert: int) -> Slot:
        """Where W (family, layer, expert) lies; experts from E on are slices of the shared one."""
        p = self.dims.p
        start = 0
        position = FAMILIES.index(family)
        fused = self.fused and expert < self.dims.experts
        if expert >= self.dims.experts:
            tensor = self.layout.shared.format(l=layer, n=f"{family}_proj")
            start = (expert - self.dims.experts) * p
        elif fused:
            # gate's rows of gate_up_proj come first, then up's
            n, start = (("gate_up_proj", 0), ("gate_up_proj", p), ("down_proj", 0))[position]
            tensor = self.layout.fused.format(l=layer, n=n)
        else:
            tensor = self.layout.expert.format(l=layer, e=expert, n=self.layout.names[position])

        # p of the rows of gate and up, p of the columns of down; a fused tensor holds a layer's experts
        part = (slice(start, start + p), slice(None))
        if family == "down":
            part = part[::-1]
        if fused:
            part = (expert, *part)
        return Slot(tensor, part)

    # (tensor name, shape) of every expert tensor that config.json promises
    def expected_tensors(self) -> Iterator[tuple]:
        D = self.dims
        for layer, family in itertools.product(D.layers, FAMILIES):
            def shape(width: int) -> list:
                return [D.d, width] if family == "down" else [width, D.d]

            if self.fused:
                # gate_up_proj holds two matrices of an expert
                width = D.p * (1 + (family != "down"))
                yield self.slot(family, layer, 0).tensor, [D.experts, *shape(width)]
            for e in range(0 if self.fused else D.experts):
                yield self.slot(family, layer, e).tensor, shape(D.p)
            if D.shared:
                yield self.slot(family, layer, D.experts).tensor, shape(D.shared * D.p)

    # what is wrong with the expert tensors, one clause each
    def _problems(self) -> Iterator[str]:
        expected = set()
        for name, shape in self.expected_tensors():
            expected.add(name)
            if name not in self.shard_of:
                yield f"{name}: expected {tuple(shape)}, found none"
                continue
            shard = self.shard_of[name]
            found = self.shape(name)
            dtype = self._slice(name).get_dtype()
            if found != shape:
                yield f"{name}: expected {tuple(shape)}, found {tuple(found)} in {shard}"
            elif dtype not in ("F32", "F16", "BF16"):
                yield f"{name}: expected float32, float16 or bfloat16, found {dtype} in {shard}"

        # layers after the last (multi-token prediction) are not the model's
        for name, shard in self.shard_of.items():
            layer = re.search(r"\.layers\.(\d{1,9})\..*\.experts\.", name)
            if layer and int(layer[1]) < self.config["num_hidden_layers"] and name not in expected:
                yield f"{name}: not expected, found in {shard}"

    def _validate(self) -> None:
        last = self.config["num_hidden_layers"]
        found = len(self.shard_of)
        expect(last <= found,
               f"{self.dir}: expected tensors of {last} layers (num_hidden_layers), found {found} tensors")
        # a config.json may promise millions of tensors: five problems are enough
        bad = list(itertools.islice(self._problems(), 5))
        bad[4:] = ["and more"] * (len(bad) > 4)
        expect(not bad, f"{self.dir}: expert tensors do not fit config.json: {'; '.join(bad)}")

    # that the experts are stored in
    @property
    def dtype(self) -> torch.dtype:
        return self.expert("gate", self.dims.layers[0], 0).dtype

    def tensor(self, name: str) -> Tensor:
        shard = self.shard_of[name]
        return finite(self._shard(shard).get_tensor(name), name, shard)

    def expert(self, family: str, layer: int, expert: int) -> Tensor:
        """One matrix, (p, d), in the checkpoint's dtype."""
        slot = self.slot(family, layer, expert)
        w = self._slice(slot.tensor)[slot.part]
        finite(w, f"{slot.tensor} (expert {expert})", self.shard_of[slot.tensor])
        # what a memory map has touched counts as the process's memory until its file is closed
        self._bytes_read += w.nbytes
        if self._bytes_read > 2 ** 28:
            self._handles.clear()
            self._bytes_read = 0
        return w.T if family == "down" else w

    # token ids, as they are; UserError where the model has no embedding for one
    def known(self, ids: Tensor) -> Tensor:
        vocab = self.config.get("vocab_size") or math.inf
        found = f"{int(ids.max())}: another model's tokenizer?"
        expect(ids.max() < vocab, f"{self.dir}: expected token ids below vocab_size {vocab}, found {found}")
        return ids

    def num_parameters(self) -> int:
        return sum(math.prod(self.shape(name)) for name in self.shard_of)

    # bytes of the files that are read
    @property
    def bytes(self) -> int:
        return sum((self.dir / shard).stat().st_size for shard in set(self.shard_of.values()))

    # the name that a model's parameter has in the files, or None
    def stored_name(self, name: str) -> str | None:
        # Mixtral's checkpoints have another
        names = (name, name.replace(".mlp.", ".block_sparse_moe."))
        return next((n for n in names if n in self.shard_of), None)

    def fingerprint(self) -> str:
        """Sizes and two stored rows of every expert's matrices, hashed: tells fine-tuned twins apart."""
        D = self.dims
        sizes = [self.config["model_type"], D.layers, D.experts, D.p, D.d, D.shared]
        h = hashlib.sha256(json.dumps(sizes).encode())
        for layer, family, e in itertools.product(D.layers, FAMILIES, range(D.experts)):
            slot = self.slot(family, layer, e)
            *expert, rows, columns = slot.part
            start = rows.start or 0
            part = (*expert, slice(start, start + 2), columns)
            h.update(self._slice(slot.tensor)[part].float().contiguous().numpy().tobytes())
        return h.hexdigest()[:16]

    def old_fingerprint(self) -> str:
        """As version 0.2 made it: two rows of one expert a layer, and the number of experts per token."""
        sizes = [self.config["model_type"], dataclasses.astuple(self.dims)]
        h = hashlib.sha256(json.dumps(sizes).encode())
        for layer, family in itertools.product(self.dims.layers, FAMILIES):
            rows = self.expert(family, layer, 0)[:2].float().contiguous()
            h.update(rows.numpy().tobytes())
        return h.hexdigest()[:16]

    def state_of(self) -> str:
        """The fingerprint, two rows of every other tensor, the config: what a calibration depends on."""
        kept = {key: value for key, value in self.config.items() if key not in BOOKKEEPING}
        h = hashlib.sha256(json.dumps([self.fingerprint(), kept], sort_keys=True).encode())
        experts = {name for name, _ in self.expected_tensors()}
        for name in sorted(self.shard_of.keys() - experts):
            part = self._slice(name)
            rows = part[:2] if part.get_shape() else self.tensor(name)
            h.update(name.encode() + rows.float().contiguous().numpy().tobytes())
        return h.hexdigest()[:16]


# [(layer, expert)] to compress, in order
def select_experts(dims: Dims, cfg: ModelConfig) -> list:
    layers = dims.layers
    if cfg.single_layer is not None:
        span = f"{min(layers)}..{max(layers)}"
        expect(cfg.single_layer in layers,
               f"model.single_layer: expected a layer with experts ({span}), found {cfg.single_layer}")
        layers = (cfg.single_layer,)
    count = min(cfg.max_experts or dims.experts, dims.experts)
    chosen = list(range(count))
    if cfg.sample == "evenly_spaced":
        chosen = np.linspace(0, dims.experts - 1, count).round().astype(int).tolist()
    if cfg.include_shared:
        expect(dims.shared, "model.include_shared: expected a shared expert of a multiple of p, found none")
        chosen += range(dims.experts, dims.experts + dims.shared)
    return list(itertools.product(layers, chosen))


def families_of(cfg: ModelConfig) -> tuple:
    several = {"both": ("gate", "up"), "all": FAMILIES}
    return several.get(cfg.families, (cfg.families,))


def load_dense(directory: Path, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """The source model in stock transformers, in the checkpoint's dtype unless another is given."""
    # a damaged checkpoint fails in its own way in every model's code
    with expecting(f"{directory}: expected a model that loads"):
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True)
    refuse_missing(sorted(info["missing_keys"]), directory)
    one_by_one(model)
    return model.to(device).eval()


def load_tokenizer(directory: Path):
    """The checkpoint's tokenizer; none of its code is run. UserError where there is none."""
    # tokenizers raises bare Exception for a damaged tokenizer.json
    with expecting(f"{directory}: expected a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        # transformers makes up an empty one where files are missing
        if not tokenizer("text", add_special_tokens=False)["input_ids"]:
            raise ValueError("its vocabulary is empty")
    return tokenizer


def weight_bytes(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.glob("*.safetensors"))


# ======== 9. Calibration: text, the walk through layers, moments, metric ==============================
# Never touches: fitting.
# moments as large as the experts themselves
MEANS = ("gate_x", "up_x")
# quantile of the tokens' weights in a batch above which they are cut down to it
CLIP = 0.99
# of a layer's mean row weight, added to every row: an expert that calibration never met counts too
ROW_FLOOR = 0.01
# never trained or calibrated on: benchmarks use them as unseen domains
RESERVED = {"argparse.py", "tarfile.py", "LICENSE.txt"}
# tests and IDLE are absent from slim installs, encodings are tables, the rest differs by machine
SKIPPED_DIRS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "ensurepip",
                "dist-packages", "encodings", "pydoc_data", "lib-dynload", "__pycache__"}


# which split a file or topic belongs to: by its name alone, so that every Python version agrees
def _split_of(name: str) -> str:
    h = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    if name.startswith("help/") or h % 8 == 0:
        return "calibration"
    return "heldout" if h % 2 else "train"


# (name, text) of the standard library: documentation topics, module sources, IDLE's help
def _library_sources() -> Iterator[tuple]:
    # slim installs leave the topics out
    with contextlib.suppress(ModuleNotFoundError):
        from pydoc_data.topics import topics
        for key, text in topics.items():
            yield f"topics/{key}", text
    root = Path(sysconfig.get_path("stdlib"))
    for folder, below, files in os.walk(root):
        below[:] = set(below) - SKIPPED_DIRS
        for file in files:
            path = Path(folder, file)
            skipped = file in RESERVED or file.startswith("_sysconfigdata")
            if path.suffix == ".py" and not skipped:
                yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="ignore")
    for path in (*root.glob("*/*.html"), *root.glob("idlelib/*.txt")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        text = re.sub(r"<(style|script).*?</\1>|<[^>]+>", "", text, flags=re.S)
        yield f"help/{path.name}", html.unescape(text)


def builtin_text(split: str, piece: int = 4096) -> str:
    """English documentation and Python source from this Python's own library; no download.

    split: "train" | "heldout" | "calibration", disjoint by file and topic. Any prefix is a broad mixture.
    FileNotFoundError where Python was installed without its sources.
    """
    # in pieces, whose order is that of their names' hashes
    pieces = []
    for name, text in _library_sources():
        if _split_of(name) == split:
            for i in range(0, len(text), piece):
                order = hashlib.sha256(f"{name}:{i}".encode()).hexdigest()
                pieces.append((order, text[i:i + piece]))
    if not pieces:
        raise FileNotFoundError(f"no sources in {sysconfig.get_path('stdlib')}: give a text instead")
    return "\n".join(text for _, text in sorted(pieces))


# the column "text" of a hub data set, rows joined as the WikiText recipe joins them
def hub_text(name: str, config: str = "", split: str = "test") -> str:
    with expecting("text hf:...: expected the package datasets (pip install datasets)", ImportError):
        from datasets import load_dataset
    # offline, no such data set or column: the library's reason is the useful part
    with expecting(f"text hf:{name}:{config}:{split}: expected texts"):
        return "\n\n".join(load_dataset(name, config or None, split=split)["text"])


def read_text(spec: str, split: str) -> str:
    """The text of a file, of the text files below a directory, of a builtin split or the hub."""
    if spec == "builtin":
        return builtin_text(split)
    if spec.startswith("hf:"):
        return hub_text(*spec.split(":")[1:4])
    files = [Path(spec)]
    kinds = (".txt", ".md", ".py", ".rst")
    # a NUL in a name is a ValueError too
    with expecting(f"text {spec!r}: expected a UTF-8 file or a directory", OSError, ValueError):
        if files[0].is_dir():
            files = sorted(f for f in files[0].rglob("*") if f.suffix in kinds)
        text = "\n\n".join(f.read_text(encoding="utf-8") for f in files)
    expect(text.strip(), f"text {spec!r}: expected some text, found none")
    return text


def token_windows(tokenizer, text: str, tokens: int, length: int, stride: int | None = None) -> Tensor:
    """(N, length) token ids, N * length <= tokens: windows at even distances over the whole text.

    With stride: overlapping windows over the first `tokens` tokens. A short text gives one shorter
    window; UserError where it has fewer than two tokens.
    """
    # no known tokenizer makes tokens of more than 64 characters on average
    encoded = tokenizer(text[:tokens * 64], add_special_tokens=False, verbose=False)
    ids = torch.tensor(encoded["input_ids"])
    expect(len(ids) >= 2, f"text: expected at least 2 tokens, found {len(ids)}")
    length = min(length, len(ids))
    if stride:
        return ids[:max(tokens, length)].unfold(0, length, min(stride, length))
    # all windows that the text has, and evenly spread ones of them
    windows = ids[:len(ids) // length * length].view(-1, length)
    count = min(len(windows), max(1, tokens // length))
    return windows[torch.arange(count) * len(windows) // count]


# (n, 1): an index drawn from each row of probabilities q (n, V); torch.multinomial works on one core
def drawn(q: Tensor, generator: torch.Generator) -> Tensor:
    below = q.cumsum(-1)
    u = torch.rand(len(q), 1, device=q.device, generator=generator) * below[:, -1:]
    return torch.searchsorted(below, u).clamp_max(q.shape[1] - 1)


@torch.no_grad()
def sample_windows(model: nn.Module, count: int, length: int, seed: int = 0) -> Tensor:
    """(count, length) token ids that the model writes at temperature 1 behind one random token."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (count, 1), device=device, generator=generator)
    end = model.generation_config.eos_token_id
    past = None
    # not by generate(), whose torch.multinomial takes longer than a small model
    for _ in tqdm(range(length - 1), "sample", leave=False, delay=1):
        out = model(ids[:, -1:], past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits = out.logits[:, -1].float()
        # a window is one text
        if end is not None:
            logits[:, end] = -math.inf
        ids = torch.cat([ids, drawn(logits.softmax(-1), generator)], 1)
    return ids.cpu()


def calibration_windows(ckpt: Checkpoint, cfg: Config, device: torch.device, tokens: int) -> Tensor:
    """(N, length) ids: `tokens` of the calibration text, calib.sampled more by the dense model."""
    text = read_text(cfg.calib.text, "calibration")
    windows = ckpt.known(token_windows(load_tokenizer(ckpt.dir), text, tokens, cfg.calib.length))
    if not cfg.calib.sampled:
        return windows
    say(f"sampling {cfg.calib.sampled} tokens from the dense model")
    length = windows.shape[1]
    count = max(1, cfg.calib.sampled // length)
    dense = load_dense(ckpt.dir, device, compute_dtype(as_dtype(cfg.calib.dtype) or ckpt.dtype, device))
    # four texts to a window: four times the subjects, in less time: a step's attention reads less
    texts = sample_windows(dense, 4 * count, -(-length // 4), cfg.fit.seed).view(count, -1)
    return torch.cat([windows, texts[:, :length]])


def empty_model(config: dict, dtype: torch.dtype, where: Path) -> nn.Module:
    """The model of a config.json in `where`, its parameters on the meta device."""
    skipped = ("quantization_config", "auto_map", "transformers_weights")
    config = {k: v for k, v in config.items() if k not in skipped}

    # parameters alone: buffers (rotary frequencies) are in no file, they are computed
    def without_memory(module, name, param):
        return nn.Parameter(param.to("meta"), requires_grad=False)

    # a stranger's config.json fails in its own way in every model's code
    with (nn.modules.module.register_module_parameter_registration_hook(without_memory),
          expecting(f"{where / 'config.json'}: expected one that transformers takes")):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    return model.eval()


# a layer's dense experts; of GlobeExperts those that were not fitted
def fill_experts(module: nn.Module, layer: int, ckpt: Checkpoint, device: torch.device, dtype: torch.dtype):
    def stack(family: str) -> Tensor:
        experts = range(ckpt.dims.experts)
        if family in getattr(module, "families", ()):
            experts = module.dense_row
        W = torch.stack([ckpt.expert(family, layer, e) for e in experts]).to(device, dtype)
        return W.transpose(1, 2).contiguous() if family == "down" else W

    if not isinstance(module, GlobeExperts):
        assign(module, "gate_up_proj", torch.cat([stack("gate"), stack("up")], 1))
    for family in FAMILIES:
        if hasattr(module, f"{family}_proj"):
            assign(module, f"{family}_proj", stack(family))


# {name: the other's name} of parameters that are tied
def twins(model: nn.Module) -> dict:
    pairs = model.all_tied_weights_keys
    return pairs | {tied: target for target, tied in pairs.items()}


def fill(model: nn.Module, ckpt: Checkpoint, device: torch.device, dtype: torch.dtype, below: str = ""):
    """Put the checkpoint's tensors in place of those on the meta device in the submodule `below`.

    UserError where one stays empty: a product with it would be noise, not an error.
    """
    part = model.get_submodule(below)
    prefix = f"{below}.".lstrip(".")
    inside = set(part.modules())
    # experts, which lie on disk in several forms
    for layer, (_, _, module) in experts_modules(model).items():
        if module in inside:
            fill_experts(module, layer, ckpt, device, dtype)
    # everything else, by its name; of a tied pair, one in the file stands for both
    twin = twins(model)
    for name, old in list(part.state_dict(prefix=prefix).items()):
        stored = ckpt.stored_name(name) or ckpt.stored_name(twin.get(name, name))
        # codes come with the factors
        if stored and ".experts." not in name and old.is_floating_point():
            assign(model, name, ckpt.tensor(stored).to(device, dtype if old.is_meta else old.dtype))
    if below in ("", "lm_head"):
        tie(model, ckpt)
    empty = [name for name, t in part.state_dict(prefix=prefix).items() if t.is_meta]
    refuse_missing(empty, ckpt.dir)


# as from_pretrained ties: not a head that the file holds by itself, with other values
def tie(model: nn.Module, ckpt: Checkpoint) -> None:
    pairs = dict(model.all_tied_weights_keys)
    absent = {name for name in model.state_dict() if not ckpt.stored_name(name)}
    model.tie_weights(absent, recompute_mapping=False)
    for target in pairs.keys() - model.all_tied_weights_keys.keys() - ckpt.apart:
        ckpt.apart.add(target)
        say(f"{ckpt.dir}: config.json ties {target} to {pairs[target]}, but the files hold both, with other "
            "values: they are kept apart, as from_pretrained does")


def rest_matrices(model: nn.Module, ckpt: Checkpoint, cfg: ModelConfig) -> dict:
    """{module: (rows, columns)} of its linear layers and embeddings but routers and fitted experts."""
    found = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if not isinstance(module, (nn.Linear, nn.Embedding)) or re.search("(gate|router)$", last):
            continue
        # a head of the embedding's own weight; slices of the shared expert that the fit takes
        weight = f"{name}.weight"
        tied = weight in model.all_tied_weights_keys and weight not in ckpt.apart
        fitted = cfg.include_shared and last.removesuffix("_proj") in families_of(cfg)
        if not tied and not (fitted and ".shared_expert" in name):
            found[name] = tuple(module.weight.shape)
    return found


# of a module that may return more than its output
def output_of(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


@dataclass(eq=False)
class LayerWalk:
    """A dense model of which a span of decoder layers is in memory at a time.

    embed() gives the first layer's inputs; then fill(), run() or advance(), empty(); at last logits().
    """
    ckpt: Checkpoint
    device: torch.device
    dtype: torch.dtype
    batch: int

    def __post_init__(self):
        self.model = empty_model(self.ckpt.config, self.dtype, self.ckpt.dir)
        self.layers = self.model.model.layers

        # everything but the decoder layers
        names = [f"model.{name}" for name, _ in self.model.model.named_children() if name != "layers"]
        for name in (*names, "lm_head"):
            fill(self.model, self.ckpt, self.device, self.dtype, name)
        self.model._apply(lambda t: t if t.is_meta else t.to(self.device))

        # on a CPU a loop over few experts is faster than grouped_mm; its gradient costs their number squared
        if self.device.type == "cpu" and self.ckpt.dims.experts <= 16:
            self.model.set_experts_implementation("eager")
        one_by_one(self.model)

    @torch.no_grad()
    def embed(self, windows: Tensor, x: Tensor) -> None:
        """Fill x (N, T, d) with the first layer's inputs on windows (N, T)."""
        # and keep what else each layer is given (positions, mask): {layer: (args, kwargs)}
        self.calls = {}
        for l, layer in enumerate(self.layers):
            layer.forward = functools.partial(self._record, l)
        for part, rows in zip(windows.split(self.batch), x.split(self.batch)):
            self.entering = rows
            self.model.model(part.to(self.device), use_cache=False)
        for layer in self.layers:
            del layer.forward

    def _record(self, l: int, h: Tensor, *args, **kwargs) -> Tensor:
        if l == 0:
            self.entering.copy_(h)
        # of the first batch, which is a whole one
        self.calls.setdefault(l, (args, kwargs))
        return h

    def run(self, span: Sequence[int], x: Tensor, checkpoint: bool = False) -> Tensor:
        """x (b, T, d) through the layers of span, b at most the batch."""
        # a last batch may be smaller than the one that the arguments were kept from
        def cut(v):
            batched = isinstance(v, Tensor) and v.ndim and len(v) == self.batch
            return v[:len(x)] if batched else v

        x = x.to(self.device)
        for l in span:
            args, kwargs = self.calls[l]
            call = functools.partial(self.layers[l], **{k: cut(v) for k, v in kwargs.items()})
            if checkpoint:
                call = functools.partial(torch.utils.checkpoint.checkpoint, call, use_reentrant=False)
            x = output_of(call(x, *map(cut, args)))
        return x

    # every window of x (N, T, d) through the layers of span, in place
    @torch.no_grad()
    def advance(self, span: Sequence[int], x: Tensor) -> None:
        for part in tqdm(x.split(self.batch), f"layers {span[0]} to {span[-1]}", leave=False, delay=5):
            part.copy_(self.run(span, part))

    def logits(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(x)).float()

    def fill(self, span: Sequence[int]) -> None:
        for l in span:
            if any(w.is_meta for w in self.layers[l].parameters()):
                fill(self.model, self.ckpt, self.device, self.dtype, f"model.layers.{l}")

    def empty(self, span: Sequence[int]) -> None:
        for l in span:
            self.layers[l]._apply(lambda t: t.to("meta") if isinstance(t, nn.Parameter) else t)


# {kind: shape} of a layer's moments
def moment_shapes(D: Dims) -> dict:
    square = (D.d, D.d)
    rows = (D.experts, D.p)
    return {"inputs": square, "weighted": square, "hidden": (D.p, D.p), "gate": rows, "up": rows,
            "output": (D.d,), "gate_x": (*rows, D.d), "up_x": (*rows, D.d)}


def gate_slopes(module: nn.Module, z: Tensor) -> tuple:
    """h = act(g) u (t, p) of z = [g, u] (t, 2p) by the model's own gate, (dh/dg, dh/du), in float32."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        h = module._apply_gate(z)
        slopes, = torch.autograd.grad(h.sum(), z)
    return h.detach().float(), slopes.float().chunk(2, -1)


class Moments:
    """Sums over the calibration's tokens, {kind: {layer: Tensor}}: what the fit's metric is made of.

    inputs (d, d): x x^T of the experts' inputs. hidden (p, p): h h^T of their hidden activations.
    gate, up (E, p): s^2, s being what an error in that output of an expert moves; output (d,): in the block's
    own, which downs add up to.
    weighted (d, d): x x^T times the token's sum of s^2. gate_x, up_x (E, p, d), with means: s^2 x.

    fisher: s is the gradient of log q(v), v drawn from the model's distribution q of the next token; s^2 is
    the diagonal of the Fisher information (arXiv 1905.12558). Else s = w dh/dz ||down_j|| / |y|, w being the
    router's weight: the output's change beside the residual stream y, which later norms divide out.
    Tokens with massive activations (arXiv 2402.17762) would outweigh all others: they are cut (CLIP).
    """

    def __init__(self, walk: LayerWalk, fisher: bool, means: bool, scratch: Path | None):
        self.walk = walk
        self.fisher = fisher
        self.means = MEANS if means else ()
        self.places = experts_modules(walk.model)
        # float64 is where the model is; MPS has none
        self.home = walk.device if accumulator(walk.device) == torch.float64 else "cpu"
        self.sums = {}
        for (kind, shape), l in itertools.product(moment_shapes(walk.ckpt.dims).items(), self.places):
            if kind not in MEANS:
                total = torch.zeros(shape, dtype=torch.float64, device=self.home)
            elif not means:
                continue
            elif scratch is None:
                total = torch.zeros(shape)
            else:
                total = on_disk(scratch / f"{kind}.{l}", shape, torch.float32)
            self.sums.setdefault(kind, {})[l] = total
        # tokens that each expert saw, {layer: (E,)}
        self.tokens = {l: torch.zeros(walk.ckpt.dims.experts, dtype=torch.long) for l in self.places}

    # what enters the layer's experts and leaves their block is kept, in the pass that collects
    @contextlib.contextmanager
    def watch(self, layer: int, backward: bool) -> Iterator[None]:
        self.watching = layer in self.places and backward == self.fisher
        if not self.watching:
            yield
            return
        block, _, module = self.places[layer]

        def before_experts(_, args, kwargs):
            self.routed = (*args, *kwargs.values())[:3]

        def after_block(_, args, out):
            self.output = output_of(out)
            if backward:
                self.output.retain_grad()

        # one layer's means at a time are where the model is: all layers' may not fit in memory
        self.near = [self.sums[kind][layer].to(self.walk.device) for kind in self.means]
        with (module.register_forward_pre_hook(before_experts, with_kwargs=True),
              block.register_forward_hook(after_block)):
            yield
        for kind, near in zip(self.means, self.near):
            self.sums[kind][layer].copy_(near)
        self.near = []

    def collect(self, layer: int, y: Tensor) -> None:
        """Add a batch that ran through the watched layer; y (b, T, d): the layer's output."""
        if not self.watching:
            return
        module = self.places[layer][2]
        x, index, weight = (t.detach() for t in self.routed)
        x = x.reshape(-1, x.shape[-1])  # (n, d)

        # what a change of the block's output moves: its gradient (n, d), or 1 / |stream| (n,)
        if self.fisher:
            pull = self.output.grad.reshape(x.shape).float()
        else:
            pull = y.reshape(x.shape).float().square().mean(-1).clamp_min(1e-12).rsqrt()

        whole = pull.square() if self.fisher else pull.square()[:, None].expand(x.shape)
        self.sums["output"][layer] += whole.sum(0).to(self.home)

        # s^2 (t, p) of gate and up of every expert on its own tokens, and the tokens' sums
        squares = {}
        reach = x.new_zeros(len(x), dtype=torch.float32)
        hidden = x.new_zeros(module.intermediate_dim, module.intermediate_dim, dtype=torch.float32)
        self.tokens[layer] += torch.bincount(index.flatten().cpu(), minlength=module.num_experts)
        for e in index.unique().tolist():
            tokens, slot = (index == e).nonzero(as_tuple=True)
            h, slopes = gate_slopes(module, F.linear(x[tokens], module.gate_up_proj[e]))
            hidden += h.T @ h
            down = module.down_proj[e].float()  # (d, p)
            s = pull[tokens] @ down if self.fisher else pull[tokens, None] * down.norm(dim=0)
            s *= weight[tokens, slot].float()[:, None]
            gate = (s * slopes[0]).square()
            up = (s * slopes[1]).square()
            squares[e] = (tokens, gate, up)
            reach.index_add_(0, tokens, gate.sum(1) + up.sum(1))

        # tokens above the quantile are cut down to it
        keep = (reach.quantile(CLIP) / reach).nan_to_num(1).clamp_max(1)  # (n,)
        x = x.float()
        self.sums["hidden"][layer] += hidden.to(self.home)
        self.sums["inputs"][layer] += (x.T @ x).to(self.home)
        self.sums["weighted"][layer] += ((x * (keep * reach)[:, None]).T @ x).to(self.home)
        for e, (tokens, *parts) in squares.items():
            for kind, part in zip(("gate", "up"), parts):
                self.sums[kind][layer][e] += (keep[tokens] @ part).to(self.home)
            for near, part in zip(self.near, parts):
                near[e].addmm_(part.T, keep[tokens, None] * x[tokens])

    # the means over `count` tokens, on the CPU
    def over(self, count: int) -> dict:
        for kind, layers in self.sums.items():
            for l, total in layers.items():
                layers[l] = total.div_(count).cpu()
                self.check(layers[l], f"moments ({kind}) in layer {l}")
        return self.sums

    # one line on experts with too few tokens for their own p rows
    def say_coverage(self) -> None:
        D = self.walk.ckpt.dims
        count = 0
        where = ""
        for l, tokens in self.tokens.items():
            few = (tokens < D.p / 4).nonzero().flatten().tolist()
            count += len(few)
            where += f"; layer {l}: {few}" * bool(few)
        say(one_line(f"calibration: {count} of {len(self.tokens) * D.experts} experts saw fewer than p/4 = "
                     f"{D.p / 4:g} tokens{where}"))

    def check(self, t: Tensor, what: str) -> None:
        expect(torch.isfinite(t).all(), f"{self.walk.ckpt.dir}: calibration: expected finite {what}, found "
                                        f"NaN or Inf: do sums overflow in {self.walk.dtype}?")


def forward_layers(walk: LayerWalk, windows: Tensor, moments: Moments) -> Tensor:
    """(layers + 1, N, T, d): the hidden states before each layer and after the last."""
    L = len(walk.layers)
    # without gradients nobody comes back to them: all share the memory of one
    kept = 1 + L * moments.fisher
    states = torch.empty(kept, *windows.shape, walk.ckpt.dims.d, dtype=walk.dtype)
    states = states.expand(L + 1, -1, -1, -1)
    walk.embed(windows, states[0])
    for l in bar("calibrate, forward")(range(L)):
        walk.fill([l])
        with moments.watch(l, backward=False):
            for part, out in zip(states[l].split(walk.batch), states[l + 1].split(walk.batch)):
                y = walk.run([l], part)
                moments.collect(l, y)
                out.copy_(y)
        walk.empty([l])
        moments.check(states[l + 1], f"activations behind layer {l}")
    return states


def sample_labels(walk: LayerWalk, states: Tensor, moments: Moments, generator: torch.Generator) -> None:
    """The last states (N, T, d) become the gradient of log q(v) there, v drawn from the model's q."""
    for part in states.split(walk.batch):
        grads = []
        # logits of a batch can be gigabytes
        for some in part.flatten(0, 1).split(256):
            with torch.enable_grad():
                y = some.to(walk.device, copy=True).requires_grad_()
                z = walk.logits(y)  # (t, V)
            q = z.detach().softmax(-1)
            moments.check(q.amax(-1), "logits")
            v = drawn(q, generator)
            # d log q(v) / dz: one at v, less q
            z.backward(q.neg_().scatter_add_(1, v, torch.ones_like(v, dtype=q.dtype)))
            grads.append(y.grad)
        part.copy_(torch.cat(grads).view_as(part))


def backward_layers(walk: LayerWalk, states: Tensor, moments: Moments) -> None:
    """Take the gradient in states[-1] back through the layers, each run once more on its inputs."""
    for l in bar("calibrate, back")(range(len(walk.layers))[::-1]):
        walk.fill([l])
        with moments.watch(l, backward=True):
            for part, grad in zip(states[l].split(walk.batch), states[-1].split(walk.batch)):
                with torch.enable_grad():
                    x = part.to(walk.device, copy=True).requires_grad_()
                    y = walk.run([l], x)
                y.backward(grad.to(walk.device))
                moments.collect(l, y)
                # the gradient at the layer's output becomes that at its inputs
                grad.copy_(x.grad)
        walk.empty([l])


@torch.no_grad()
def activation_moments(walk: LayerWalk, windows: Tensor, at_once: int, fisher: bool = True, seed: int = 0,
                       means: bool = False, scratch: Path | None = None) -> dict:
    """The Moments of windows (N, length) of token ids, means over the tokens, float64 (MEANS: float32).

    One decoder layer is in memory at a time, with the states of `at_once` windows.
    """
    moments = Moments(walk, fisher, means, scratch)
    generator = torch.Generator(walk.device).manual_seed(seed)
    for chunk in windows.split(at_once):
        states = forward_layers(walk, chunk, moments)
        if fisher:
            sample_labels(walk, states[-1], moments, generator)
            backward_layers(walk, states, moments)
    moments.say_coverage()
    return moments.over(windows.numel())


def save_moments(path: Path, moments: dict, fingerprint: str, calib: CalibConfig | None = None) -> None:
    """Write {kind: {layer: Tensor}}, MEANS in bfloat16, with their checkpoint and what made them."""
    shapes = {}
    makers = {}
    for kind, layers in moments.items():
        for l, t in layers.items():
            dtype = torch.bfloat16 if kind in MEANS else t.dtype
            shapes[f"{kind}.{l}"] = (dtype, t.shape)
            # loaded ones are read when they are asked for
            makers[f"{kind}.{l}"] = lambda layers=layers, l=l, dtype=dtype: layers[l].to(dtype)
    about = {"globe_moments": fingerprint}
    if calib:
        about["globe_calib"] = json.dumps({key: getattr(calib, key) for key in MADE_BY})
    write_tensors(path, shapes, LazyDict(makers), about)


# settings of calib.* that moments depend on
MADE_BY = ("text", "tokens", "length", "batch", "fisher", "sampled", "dtype")


def settings_of_moments(calib: CalibConfig) -> None:
    """With calib.load: the settings that the loaded moments were made by, in place of those given."""
    text = "{}"
    # load_moments has the words
    with contextlib.suppress(SafetensorError, OSError), safe_open(calib.load, "pt") as f:
        text = (f.metadata() or {}).get("globe_calib", text)
    where = f"calib.load={calib.load}"
    with expecting(f"{where}: expected its settings", ValueError, AttributeError, RecursionError):
        made = {key: value for key, value in json.loads(text).items() if key in MADE_BY}
    before = dataclasses.asdict(calib)
    _merge(calib, made, where, "calib.")
    for key, value in before.items():
        if getattr(calib, key) != value:
            say(f"{where}: made with calib.{key}={getattr(calib, key)}, which holds")


def load_moments(path: Path, ckpt: Checkpoint, tag: str | None = None) -> dict:
    """What save_moments wrote with `tag`; default: the fingerprint, and then all kinds but MEANS.

    UserError: no such file, not one of ours, damaged or of another checkpoint.
    """
    where = f"calib.load: {path}"
    with expecting(f"{where}: expected saved moments", SafetensorError, OSError):
        file = safe_open(path, "pt")
    names = set(file.keys())
    found = (file.metadata() or {}).get("globe_moments")
    want = tag or ckpt.state_of()
    # older files name the experts alone
    fine = found == want or tag is None and found in (ckpt.fingerprint(), ckpt.old_fingerprint())
    expect(fine, f"{where}: expected moments of this checkpoint ({want}), found {found}")

    def read(name: str, shape: tuple) -> Tensor:
        expect(name in names, f"{where}: {name}: expected finite numbers {shape}, found none")
        C = file.get_tensor(name)
        fine = C.shape == shape and C.is_floating_point() and torch.isfinite(C).all()
        expect(fine, f"{where}: {name}: expected finite numbers {shape}, found {tuple(C.shape)}")
        return C

    out = {}
    kinds = {name.partition(".")[0] for name in names}
    for kind, shape in moment_shapes(ckpt.dims).items():
        # older files have no "output", which codes of down need
        if kind not in kinds and (tag or kind in MEANS or kind == "output"):
            continue
        # MEANS are read when they are asked for
        out[kind] = LazyDict({l: functools.partial(read, f"{kind}.{l}", shape) for l in ckpt.dims.layers})
        if kind not in MEANS:
            out[kind] = dict(out[kind])
    if "windows.0" in names:
        ids = file.get_tensor("windows.0")
        fine = ids.ndim == 2 and ids.dtype == torch.int64 and ids.numel() and int(ids.min()) >= 0
        expect(fine, f"{where}: expected token ids (N, T), found {ids.dtype} {tuple(ids.shape)}")
        out["windows"] = {0: ckpt.known(ids)}
    return out


# whether MEANS have room, and the directory for their files, None where memory holds them
def means_fit(D: Dims, scratch: Path | None) -> tuple:
    size = len(MEANS) * 4 * len(D.layers) * D.experts * D.p * D.d
    if scratch is None or size <= free_memory(torch.device("cpu")) / 4:
        return True, None
    # these files, and half as much in the one that is kept
    scratch.mkdir(parents=True, exist_ok=True)
    want = 1.6 * size / 2 ** 30
    free = shutil.disk_usage(scratch).free / 2 ** 30
    if want > free:
        say(f"calib.means: expected {want:.3g} GiB in {scratch}, found {free:.3g}: going without")
    return want <= free, scratch


def calibrate(ckpt: Checkpoint, cfg: Config, device: torch.device, scratch: Path | None = None) -> dict:
    """Moments of the dense model on the calibration text, or those of calib.load.

    Files under `scratch` hold MEANS where they would take more than a quarter of the free memory.
    """
    means = cfg.calib.means
    if cfg.calib.load:
        moments = load_moments(Path(cfg.calib.load), ckpt)
        return {kind: layers for kind, layers in moments.items() if means or kind not in MEANS}
    windows = calibration_windows(ckpt, cfg, device, cfg.calib.tokens)
    fisher = cfg.calib.fisher
    dtype = as_dtype(cfg.calib.dtype) or ckpt.dtype
    if fisher:
        dtype = with_gradients(dtype)
    walk = LayerWalk(ckpt, device, compute_dtype(dtype, device), min(cfg.calib.batch, len(windows)))

    # windows at once: a quarter of the free memory for their hidden states; whole batches, so that the
    # result is the same whatever is free
    states = windows[0].numel() * ckpt.dims.d * walk.dtype.itemsize
    if fisher:
        states *= len(walk.layers) + 1
    at_once = max(1, free_memory(torch.device("cpu")) // 4 // states // walk.batch) * walk.batch

    if means:
        means, scratch = means_fit(ckpt.dims, scratch)
    with threads_for(ckpt.dims.p, ckpt.dims.d):
        moments = activation_moments(walk, windows, at_once, fisher, cfg.fit.seed, means, scratch)

    # the refinement behind the fit works on the same text
    moments["windows"] = {0: windows}
    if cfg.calib.save:
        save_moments(Path(cfg.calib.save), moments, ckpt.state_of(), cfg.calib)
    return moments


def metric_factor(C: Tensor, ridge: float) -> Tensor:
    """L (d, d) float32 with L L^T = C + ridge * mean(diag C) * I, scaled to mean(diag L L^T) = 1."""
    C = C.double()
    eye = torch.eye(len(C), dtype=C.dtype)
    # nothing came in: all directions are alike
    if not C.any():
        return eye.float()
    # the ridge keeps directions that a narrow calibration text never visits from being given up
    C = C / C.diagonal().mean()
    return torch.linalg.cholesky((C + (ridge + 1e-9) * eye) / (1 + ridge)).float().contiguous()


def metric_of(moments: dict, family: str, keys: Sequence[tuple], ridge: float, device: torch.device) -> dict:
    """The metric of a family for FitData, keys being [(layer, expert)].

    right: {layer: L (d, d)}, each computed when asked for. left: {(layer, expert): S (p,)}; of down
    S (p, p), and no right. means: function (layer, expert) -> (p, d), None where moments have none.
    """
    if family == "down":
        S = {l: metric_factor(C, ridge).to(device) for l, C in moments["hidden"].items()}
        return {"right": {}, "left": {(l, e): S[l] for l, e in keys}, "means": None}
    level = {l: C.diagonal().mean() for l, C in moments["inputs"].items()}
    rows = {}
    left = {}
    for l, e in keys:
        M = moments[family][l]  # (E, p)
        # a shared expert sees every token: its row weighs as much as all routed experts' together
        rows[l, e] = M.mean(1).sum().expand(M.shape[1])
        if e < len(M):
            rows[l, e] = M[e] + ROW_FLOOR * M.mean()
    # L has mean square 1: the size of the inputs goes into the rows; what cannot matter weighs near nothing
    top = max(float((rows[key] * level[key[0]]).max()) for key in keys) or 1.0
    for key in keys:
        left[key] = (rows[key] * level[key[0]]).clamp_min(1e-12 * top).sqrt().float().to(device)

    # all tokens alike and tokens as they count, in equal parts: either alone does worse
    def right(l: int) -> Tensor:
        parts = [moments[kind][l] for kind in ("inputs", "weighted")]
        C = sum(part / part.diagonal().mean().clamp_min(1e-30) for part in parts)
        return metric_factor(C, ridge).to(device)

    # E[s^2 x] / E[s^2] of each row, for inputs of mean square 1; none of a shared expert
    def means(l: int, e: int) -> Tensor:
        X = moments[f"{family}_x"][l]  # (E, p, d)
        if e >= len(X):
            return torch.zeros(X.shape[1:])
        return X[e].float() / (rows[l, e] * level[l].sqrt()).clamp_min(1e-30).float()[:, None]

    layers = dict.fromkeys(l for l, _ in keys)
    return {"right": LazyDict({l: functools.partial(right, l) for l in layers}), "left": left,
            "means": means if f"{family}_x" in moments else None}


# ======== 10. Fit: data, start, objective, optimiser ==================================================
# Maths on tensors. Never touches: paths, printing, model classes.
#
# The fit minimises  sum_i || S_i^T (W_i - W^_i) L ||_F^2
#
#     L    (d, d)  Cholesky factor of the second moment of the layer's inputs on a calibration text
#     S_i  (p,)    how far an error in each row of the expert moves the model's own predictions
# ---- sparsemax and entmax ----------------------------------------------------------------------------
# tau (..., 1) with sum max(z - tau, 0) = 1 over the last dim, exact by sorting
def threshold_sparsemax(z: Tensor) -> Tensor:
    s = z.sort(-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    cum = s.cumsum(-1) - 1

    # the support is a prefix of the sorted row; False for -inf
    size = (k * s > cum).sum(-1, keepdim=True).clamp_min(1)
    return cum.gather(-1, size - 1) / size


# tau (..., 1) with sum max(z - tau, 0)^2 = 1 over the last dim, exact by sorting
def threshold_entmax15(z: Tensor) -> Tensor:
    s = z.sort(-1, descending=True).values
    finite = torch.isfinite(s)
    s0 = torch.where(finite, s, torch.zeros_like(s))  # keeps -inf out of the running moments
    k = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)

    # the root of a quadratic for every prefix; the right prefix is the longest that its own tau leaves whole
    mean = s0.cumsum(-1) / k
    variance = (s0 * s0).cumsum(-1) / k - mean * mean
    delta = (1 - k * variance) / k
    tau = mean - delta.clamp_min(0).sqrt()
    size = ((tau <= s) & finite & (delta >= 0)).sum(-1, keepdim=True).clamp_min(1)
    return tau.gather(-1, size - 1)


# The torch twin of globe::simplex: sparsemax (alpha 2) or 1.5-entmax over the last dim
def simplex_torch(x: Tensor, alpha: float) -> Tensor:
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    # both maps ignore a common shift; exact near the top
    z = z - z.amax(-1, keepdim=True)
    if alpha == 2:
        p = (z - threshold_sparsemax(z)).clamp_min(0)
    else:
        z = z / 2
        p = (z - threshold_entmax15(z)).clamp_min(0).square()
    return p.to(x.dtype)


class SimplexMap(torch.autograd.Function):
    """p and the size of its support; the Jacobian is diag(g) - g g^T / sum(g) with g = p^(2 - alpha)."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: float, by_kernel: bool) -> tuple:
        if by_kernel:
            with torch._C._AutoDispatchBelowAutograd():
                p, size = torch.ops.globe.simplex.default(x, alpha)
        else:
            p = simplex_torch(x, alpha)
            size = (p > 0).sum(-1)
        ctx.alpha = alpha
        ctx.by_kernel = by_kernel
        ctx.save_for_backward(p)
        ctx.mark_non_differentiable(size)
        ctx.set_materialize_grads(False)
        return p, size

    @staticmethod
    def backward(ctx, grad: Tensor | None, _) -> tuple:
        p, = ctx.saved_tensors
        if grad is None:
            return None, None, None
        if ctx.by_kernel:
            return torch.ops.globe.simplex_backward.default(grad.contiguous(), p, ctx.alpha), None, None
        g = (p > 0).to(p.dtype) if ctx.alpha == 2 else p.sqrt()
        return g * (grad - (g * grad).sum(-1, keepdim=True) / g.sum(-1, keepdim=True)), None, None


def simplex_map(x: Tensor, dim: int, alpha: float, return_support: bool):
    if not x.is_floating_point():
        raise TypeError(f"expected a floating-point tensor, found {x.dtype}")
    if x.shape[dim] == 0:
        raise ValueError(f"expected at least one entry in dim {dim}, found shape {tuple(x.shape)}")
    # the operators work on the last dim
    x = x.movedim(dim, -1).contiguous()
    by_kernel = native("simplex", x.device.type) and not torch.compiler.is_compiling()
    p, size = SimplexMap.apply(x, alpha, by_kernel)
    p = p.movedim(-1, dim)
    return (p, size) if return_support else p


def sparsemax(x: Tensor, dim: int = -1, return_support: bool = False):
    """Euclidean projection of x onto the simplex along `dim`, exact, differentiable.

    x: any shape, floating point (half types computed in float32); -inf masks an entry. Returns x's shape
    and dtype; with return_support also the number of positive entries (int64, x's shape without `dim`).
    TypeError for another dtype, ValueError for an empty dim. Martins and Astudillo 2016, Algorithm 1 and
    Proposition 2 (torch: sorting; native: Newton's method on the threshold's piecewise linear equation,
    which ends at its root).
    """
    return simplex_map(x, dim, 2.0, return_support)


def entmax15(x: Tensor, dim: int = -1, return_support: bool = False):
    """1.5-entmax of x along `dim`, exact, differentiable; sparser than softmax, smoother than sparsemax.

    Arguments, results and errors as sparsemax. Peters, Niculae and Martins 2019, Algorithm 2 (torch:
    sorting; native: Newton's method).
    """
    return simplex_map(x, dim, 1.5, return_support)


# ---- what a fit leaves -----------------------------------------------------------------------------
@dataclass
class FamilyFactors:
    """One family's factors. Per layer l, E_l experts in the order of Factors.experts[l]."""
    bank: list                # one (m, r, d) per group of layers
    A: Mapping                # {l: (E_l, p, r)}
    idx: dict                 # {l: (E_l, s) int32}, padded with 0
    val: dict                 # {l: (E_l, s) float32}, padded with 0
    group: dict               # {l: index of the layer's bank}
    activation: str
    shift: float = 0.0
    scale: float = 1.0
    owner: str | None = None  # the family whose bank this is, where it is another's

    def composed(self, layer: int, rows: slice | list = slice(None)) -> Tensor:
        """B~ (b, r, d) of the layer's experts (or those rows)."""
        bank = self.bank[self.group[layer]]
        return compose(bank, self.idx[layer][rows], self.val[layer][rows], self.activation)

    def weights(self, layer: int, rows: list, device: torch.device | str = "cpu") -> Tensor:
        """W^ (n, p, d) float32 of those experts of the layer."""
        A = self.A[layer][rows].to(device, torch.float32)
        return self.shift + self.scale * (A @ self.composed(layer, rows).to(A))

    def weight(self, layer: int, row: int) -> Tensor:
        """W^ (p, d) float32 of one expert."""
        return self.weights(layer, [row])[0]

    def shape(self) -> tuple:
        """(banks, m, r)"""
        return len(self.bank), *self.bank[0].shape[:2]

    def support(self) -> Tensor:
        """Support size of every expert."""
        return (torch.cat([*self.val.values()]) != 0).sum(-1)

    def meta(self, name: str) -> dict:
        m, r, _ = self.bank[0].shape
        return {"m": m, "r": r, "s": next(iter(self.val.values())).shape[1], "groups": len(self.bank),
                "group": {str(l): g for l, g in self.group.items()}, "activation": self.activation,
                "shift": self.shift, "scale": self.scale, "bank": self.owner or name}

    def numbers(self) -> int:
        """Everything stored: bank (by its owner), adapters, mixtures with their indices, shift and scale."""
        val = torch.cat([*self.val.values()])
        # of one adapter: all of them need not be in memory
        adapter = next(iter(self.A.values()))[0]
        bank = len(self.bank) * self.bank[0].numel() * (self.owner is None)
        return bank + len(val) * adapter.numel() + 2 * val.numel() + 2


@dataclass
class CodedFamily:
    """One family in packed codes: W^ = A X, with adapters A in codes and a basis X in 8 bits; without a basis
    A is W^ itself, with its columns in order."""
    name: str
    columns: int  # of W^: hidden_size, of down moe_intermediate_size
    of: dict      # {l: name of its basis, which layers and families may share; of the identity None}
    bases: dict   # {name: (basis (r, d) int8, scale int16)}
    layers: dict  # {l: {kind of tensor: tensor}}, as code_shapes names them
    activation: str = "identity"

    def weights(self, layer: int, rows: list, device: torch.device | str = "cpu") -> Tensor:
        """W^ (n, p, d) float32 of those experts of the layer."""
        basis = self.bases.get(self.of[layer], ())
        W = decode(self.layers[layer], basis, self.columns, rows).to(device)
        return W.mT if self.name == "down" else W

    def weight(self, layer: int, row: int) -> Tensor:
        """W^ (p, d) float32 of one expert."""
        return self.weights(layer, [row])[0]

    def shape(self) -> tuple:
        """(banks, m, r): bases, each of one; the rows of the largest."""
        return len(self.bases), 1, max((len(X) for X, _ in self.bases.values()), default=self.columns)

    def support(self) -> Tensor:
        """Bases of every expert: one."""
        return torch.ones(sum(len(layer["kind"]) for layer in self.layers.values()))

    def tensors(self) -> dict:
        """{name in the factors file: tensor}; a basis by the family that owns it."""
        out = {}
        for l, layer in self.layers.items():
            out |= {f"layers.{l}.{self.name}.{key}": t for key, t in layer.items()}
        for name, (basis, scale) in self.bases.items():
            if name.startswith(f"{self.name}_"):
                out |= {f"basis.{name}": basis, f"basis.{name}.scale": scale}
        return out

    def numbers(self) -> float:
        """Everything stored, in numbers of 16 bits."""
        return sum(t.nbytes for t in self.tensors().values()) / 2

    def meta(self, name: str) -> dict:
        layers = {}
        for l, layer in self.layers.items():
            of = self.of[l]
            rows = len(self.bases[of][0]) if of else layer["order"].shape[1]
            layers[str(l)] = {"of": of, "rows": rows, "bytes": len(layer["codes"]),
                              "classes": len(layer["width"])}
        return {"code": "trellis", "columns": self.columns, "layers": layers}


REST_BITS = {torch.int8: 8, torch.uint8: 4}  # of codes in groups


@dataclass
class Factors:
    """What a fit leaves: factors per family, which experts they stand for, and where they came from."""
    families: dict  # {family: FamilyFactors}
    experts: dict   # {layer: [expert, ...]}; from dims.experts on: slices of the shared expert
    dims: Dims
    model_type: str
    fingerprint: str
    config: dict = field(default_factory=dict)
    norms: dict = field(default_factory=dict)  # {parameter: (n,) float32} where heal trained them
    down: dict = field(default_factory=dict)   # {layer: (n, d, p)}, refined, of the experts of refined(layer)
    rest: dict = field(default_factory=dict)   # {module: as of code_groups}, layers outside the experts

    def refined(self, layer: int) -> list:
        """Experts whose dense down the refinement replaces: fitted ones, and the whole shared expert."""
        D = self.dims
        routed = [e for e in self.experts[layer] if e < D.experts and "down" not in self.families]
        shared = [] if self.rest else range(D.experts, D.experts + D.shared)
        return [*routed, *shared]

    def coded(self) -> bool:
        return any(isinstance(f, CodedFamily) for f in self.families.values())

    def sizes(self) -> tuple:
        """(numbers stored, numbers of the dense matrices that they stand for)."""
        dense = len(self.families) * sum(map(len, self.experts.values())) * self.dims.p * self.dims.d
        return sum(f.numbers() for f in self.families.values()), dense

    def ratio(self) -> float:
        """Stored / dense numbers of what is compressed."""
        return operator.truediv(*self.sizes())

    def model_ratio(self, total: int) -> float:
        """Stored / dense numbers of the whole model of `total` parameters."""
        stored, dense = self.sizes()
        for codes, scale in self.rest.values():
            stored += (codes.nbytes + scale.nbytes) / 2
            dense += codes.numel() * 8 // REST_BITS[codes.dtype]
        return (total - dense + stored) / total

    def meta(self) -> dict:
        """The JSON that describes the tensors: what is needed to build modules before any of them is read."""
        families = {name: f.meta(name) for name, f in self.families.items()}
        rest = {name: REST_BITS[codes.dtype] for name, (codes, _) in self.rest.items()}
        version = FORMAT_VERSION if self.coded() or rest else 1
        return {"format_version": version, "globe_version": __version__, "model_type": self.model_type,
                "fingerprint": self.fingerprint, "dims": dataclasses.asdict(self.dims), "families": families,
                "experts": {str(l): e for l, e in self.experts.items()}, "rest": rest, "config": self.config}


# ---- the data: experts' matrices in batches ----------------------------------------------------------
def batch_for(room: float, p: int, d: int) -> int:
    """Experts of one batch of a fit that may take `room` bytes: larger ones read the bank less often."""
    return max(1, min(64, int(room / 8 / (6 * 4 * p * d))))


def bank_groups(layers: Iterable, scope: str | int) -> dict:
    """{layer: index of its bank} for scope global, layer, or a number of neighbouring layers."""
    layers = sorted(set(layers))
    span = {"global": len(layers), "layer": 1}.get(scope) or int(scope)
    return {l: i // span for i, l in enumerate(layers)}


@dataclass
class Batch:
    """Some experts of one layer; V and U are kept, or computed anew in every pass."""
    ids: list  # their places in FitData.keys
    rows: Tensor  # the same, on the device
    layer: int
    group: int  # of the layer's bank
    place: int = 0  # of V in the file, in bytes
    energy: float = 0.0  # sum ||S^T W L||^2
    V: Tensor | None = None  # S^T W C (b, p, d)
    U: Tensor | None = None  # the mean input u of each row (b, p, d)
    at_means: Tensor | None = None  # each row of S^T W times its u (b, p)


@dataclass
class FitData:
    """The matrices that draw from one bank as the fit sees them: shifted, scaled, in the metric, in batches.

    In the metric W_i is S_i^T W_i L, and C = L L^T. Adapters take S up in closed form, and a layer's own
    bank takes up L with absorb=True (phi: identity). V = S^T W C is kept in memory if a quarter of the budget
    holds it, else in a nameless file in `scratch`, else (no metric, full disk) computed in every pass.
    """
    read: Callable  # (family, layer, expert) -> W (p, d)
    keys: list  # [(family, layer, expert)], family by family
    scope: str | int = "global"
    device: torch.device = torch.device("cpu")
    normalize: str = "none"
    batch: int = 0  # experts of a batch; 0: by the budget
    right: Mapping = field(default_factory=dict)  # {layer: L (d, d) lower triangular}
    left: dict = field(default_factory=dict)  # {key: S}, (p, p) lower triangular or a diagonal (p,)
    absorb: bool = False
    means: Callable | None = None  # key -> (p, d), u: row i has the metric C + u_i u_i^T
    budget: float | None = None  # bytes
    scratch: Path | None = None

    def __post_init__(self):
        self.p, self.d = self.read(*self.keys[0]).shape
        self.layers = torch.tensor([l for _, l, _ in self.keys])
        self.group_of_layer = bank_groups(self.layers.tolist(), self.scope)
        self.group = self.layers.clone().apply_(self.group_of_layer.get)
        self.groups = max(self.group_of_layer.values()) + 1
        self.absorbed = self.absorb and bool(self.right) and self.groups == len(self.group_of_layer)
        self.budget = self.budget or free_memory(self.device)
        self.batch = self.batch or batch_for(self.budget, self.p, self.d)
        self.plan = [*self._plan(*ranks())]
        self.shift, self.scale = self._moments()
        self.level = dict.fromkeys(self.group_of_layer, 1.0)
        self.energy = torch.zeros(len(self.keys), dtype=torch.float64)
        self.metrics = {}
        self.memory = {}  # of the passes
        largest = max((len(batch.ids) for batch in self.plan), default=0)
        self.buffers = [host_buffer((largest, self.p, self.d), self.device) for _ in range(2)]
        self.file = None
        self._first_pass()
        self._set_levels()

    def __len__(self) -> int:
        return len(self.keys)

    # this rank's batches: each within a layer, a layer's of even size
    def _plan(self, rank: int, world: int) -> Iterator[Batch]:
        for i, (l, group) in enumerate(self.group_of_layer.items()):
            # which rank has one more changes with the layer
            ids = (self.layers == l).nonzero().flatten()[(rank + i) % world::world]
            for part in ids.chunk(max(1, math.ceil(len(ids) / self.batch))):
                if len(part):
                    yield Batch(part.tolist(), part.to(self.device), l, group)

    # (mean or 0, standard deviation or 1) over all experts
    def _moments(self) -> tuple:
        if self.normalize == "none":
            return 0.0, 1.0
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in self.plan:
            for i in batch.ids:
                w = self.read(*self.keys[i]).double()
                sums += torch.stack([w.mean(), w.square().mean()])
        all_sum(sums)
        mean, square = (sums / len(self.keys)).tolist()
        if self.normalize == "scale":
            mean = 0.0
        return mean, math.sqrt(max(square - mean * mean, 0.0)) or 1.0

    # energies from the checkpoint; V goes where later passes find it
    def _first_pass(self) -> None:
        size = 4 * self.p * self.d * sum(len(batch.ids) for batch in self.plan)
        self.kept = size * (1 + bool(self.means)) < self.budget / 4
        spill = not self.kept and self.scratch and (self.right or self.left)
        file = None
        # nameless: gone with the process, however it ends
        if spill and 1.2 * size < shutil.disk_usage(self.scratch).free:
            file = tempfile.TemporaryFile(dir=self.scratch)
        for batch, W, V in self._from_checkpoint(self.plan):
            self.energy[batch.ids] = (V * W).sum((1, 2), dtype=accumulator(self.device)).cpu().double()
            if self.means:
                U = self._mean_inputs(batch)
                batch.at_means = (W * U).sum(-1)
                batch.U = U if self.kept else None
            if self.kept:
                batch.V = V.clone()
            elif file:
                batch.place = file.tell()
                file.write(tensor_bytes(V.cpu().contiguous()))
        all_sum(self.energy)
        self.file = file

    # unit energy per entry: over all layers where row weights make them comparable, else within each
    def _set_levels(self) -> None:
        if self.right or self.left:
            comparable = any(S.ndim == 1 for S in self.left.values())
            for l in self.level:
                mean = self.energy[(self.layers == l) | comparable].mean()
                self.level[l] = 1 / math.sqrt(float(mean) / self.p / self.d or 1.0)
            self.energy *= self.layers.double().apply_(self.level.get).square()
        # bring what the batches hold to these levels; outputs at mean inputs are energy too
        at_means = torch.zeros_like(self.energy)
        for batch in self.plan:
            batch.energy = float(self.energy[batch.ids].sum())
            if self.kept:
                batch.V *= self.level[batch.layer]
            if self.means:
                batch.at_means *= self.level[batch.layer]
                at_means[batch.ids] = batch.at_means.square().sum(-1).cpu().double()
        all_sum(at_means)
        self.energy += at_means

    def root(self, layer: int) -> Tensor | None:
        """L (d, d) of the layer; None without a metric and where the bank has absorbed it."""
        return self.right[layer] if self.right and not self.absorbed else None

    def metric(self, layer: int) -> Tensor | None:
        """C = L L^T (d, d) of the layer, or None as in root()."""
        if layer not in self.metrics:
            # large ones are read when asked for: one at a time
            if not isinstance(self.right, dict):
                self.metrics.clear()
            L = self.root(layer)
            self.metrics[layer] = None if L is None else L @ L.T
        return self.metrics[layer]

    # S^T (W - shift) / scale of an expert
    def _weighted(self, W: Tensor, i: int) -> Tensor:
        W = (W - self.shift) / self.scale
        S = self.left.get(self.keys[i])
        if S is None:
            return W
        return S[:, None] * W if S.ndim == 1 else S.T @ W

    def whitened(self, i: int) -> Tensor:
        """The i-th expert in the metric, S^T W L (p, d), on the CPU."""
        layer = self.keys[i][1]
        W = self._weighted(self.read(*self.keys[i]).float().to(self.device), i)
        if self.right:
            W = W @ self.right[layer]
        return (W * self.level[layer]).cpu()

    def from_metric(self, rows: Tensor, i: int) -> Tensor:
        """rows (., d) of the i-th expert in the metric, times L^-1, on the CPU."""
        L = self.root(self.keys[i][1])
        return rows if L is None else torch.linalg.solve_triangular(L.cpu(), rows, upper=False, left=False)

    def unweighted_adapter(self, i: int, A: Tensor) -> Tensor:
        """A (p, r) of the i-th expert's W from that in the metric."""
        A = A / self.level[self.keys[i][1]]
        S = self.left.get(self.keys[i])
        if S is None:
            return A
        return A / S[:, None] if S.ndim == 1 else torch.linalg.solve_triangular(S.T, A, upper=True)

    # what lies on disk of a batch, in one of two buffers
    def _fetch(self, batch: Batch, which: int, stream: Any) -> tuple:
        buffer = self.buffers[which][:len(batch.ids)]
        if self.file:
            # a buffered file reads until all is there
            self.file.seek(batch.place)
            self.file.readinto(tensor_bytes(buffer))
        else:
            for i, row in zip(batch.ids, buffer):
                row.copy_(self.read(*self.keys[i]))
        return upload(buffer, self.device, stream)

    # what lies on disk of each batch (b, p, d), valid until the next is asked for; a thread reads one ahead
    def _read_ahead(self, batches: list) -> Iterator[Tensor]:
        stream = side_stream(self.device)
        coming = collections.deque()
        with ThreadPoolExecutor(1) as reader:
            for k, batch in enumerate(batches):
                coming.append(reader.submit(self._fetch, batch, k % 2, stream))
                if k > 0:
                    yield arrived(*coming.popleft().result())
            for last in coming:
                yield arrived(*last.result())

    # (batch, W, V) before levels; <W, V> is the energy in the metric
    def _from_checkpoint(self, batches: list) -> Iterator[tuple]:
        for batch, W in zip(batches, self._read_ahead(batches)):
            for i, row in zip(batch.ids, W):
                row.copy_(self._weighted(row, i))
            if self.absorbed:
                W = W @ self.right[batch.layer]
            C = self.metric(batch.layer)
            yield batch, W, W if C is None else W @ C

    # U (b, p, d) of a batch; L^-1 u where the bank absorbs L
    def _mean_inputs(self, batch: Batch) -> Tensor:
        U = torch.stack([self.means(*self.keys[i]) for i in batch.ids]).float().to(self.device)
        if self.absorbed:
            U = torch.linalg.solve_triangular(self.right[batch.layer], U.mT, upper=False).mT
        return U

    def stream(self, layer: int | None = None) -> Iterator[Batch]:
        """This rank's batches (of one layer) with V and U on the device, valid until the next one."""
        batches = [batch for batch in self.plan if layer in (None, batch.layer)]
        if self.kept:
            yield from batches
            return
        parts = zip(batches, self._read_ahead(batches)) if self.file else self._from_checkpoint(batches)
        for batch, *_, V in parts:
            U = self._mean_inputs(batch) if self.means else None
            yield dataclasses.replace(batch, V=V.mul_(self.level[batch.layer]), U=U)


class Diverged(RuntimeError):
    """The objective is not finite; the last good state is kept."""


# ---- the small pure steps ----------------------------------------------------------------------------
def blend(z: Tensor, activation: str, lam: float) -> tuple:
    """phi_lam(z) = (1 - lam) z + lam phi(z) and its derivative (1 - lam) + lam phi'(z); None stands for 1."""
    if activation == "identity" or lam == 0:
        return z, None
    f = phi(z, activation)
    if activation == "silu":
        df = torch.ops.aten.silu_backward(torch.ones_like(z), z)
    else:
        df = 1 - f * f
    if lam == 1:
        return f, df
    return (1 - lam) * z + lam * f, (1 - lam) + lam * df


def mixture(z: Tensor, T: float, kind: str, mask: Tensor) -> Tensor:
    """alpha (n, m) of logits z, 0 outside `mask`. kind: sparsemax, entmax15, softmax or signed."""
    if kind == "signed":
        return z * mask
    x = (z / T).masked_fill(~mask, -math.inf)
    if kind == "softmax":
        return x.softmax(-1)
    return sparsemax(x) if kind == "sparsemax" else entmax15(x)


def mixture_vjp(alpha: Tensor, grad: Tensor, T: float, kind: str, mask: Tensor) -> Tensor:
    """Gradient in z of a loss whose gradient in alpha = mixture(z) is `grad`."""
    if kind == "signed":
        return grad * mask
    # every map's Jacobian is diag(v) - v v^T / sum(v), over T
    v = {"sparsemax": (alpha > 0).to(alpha.dtype), "entmax15": alpha.sqrt(), "softmax": alpha}[kind]
    return v * (grad - (v * grad).sum(-1, keepdim=True) / v.sum(-1, keepdim=True)) / T


@dataclass
class Workspace:
    """Products in `dtype`, in named memory: fresh tensors took a fifth of a pass. Valid until the next."""
    dtype: torch.dtype
    memory: dict = field(default_factory=dict)

    def room(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        key = name, like.dtype
        size = math.prod(shape)
        if key not in self.memory or self.memory[key].numel() < size:
            self.memory[key] = like.new_empty(size)
        return self.memory[key][:size].view(shape)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a @ b with factors rounded to `dtype` and summed in float32 or better."""
        out = self.room(name, (*a.shape[:-1], b.shape[-1]), a)
        if self.dtype in (torch.float16, torch.bfloat16):
            a, b = a.to(self.dtype), b.to(self.dtype)
            if a.device.type == "cuda" and a.ndim == b.ndim:
                return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
            a, b = a.float(), b.float()
        return torch.matmul(a, b, out=out)

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """sum(a * b) of (b, ., .), summed in double over the matrices; ()."""
        each = torch.mul(a, b, out=self.room("inner", a.shape, a)).sum((1, 2))
        return each.to(accumulator(a.device)).sum()


def spd_factor(K: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of K + ridge * mean(diag K) * I, batched; the ridge grows where K is too near singular.
    Diverged where K is not finite, or not positive under any ridge."""
    home = K.device
    if home.type == "mps":
        K = K.cpu()
    level = K.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(K.dtype).tiny * 1e6)
    ridge = torch.full_like(level, max(ridge, 1e-7))
    for _ in range(8):
        damped = K.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_((ridge * level)[..., None])
        # once more in double before the ridge grows; on CUDA, NaN passes as positive
        for dtype in (K.dtype, torch.float64):
            factor, info = torch.linalg.cholesky_ex(damped.to(dtype))
            failed = (info > 0) | ~factor.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
            if not failed.any():
                return factor.to(home, K.dtype)
        ridge = torch.where(failed, ridge * 10, ridge)
    raise Diverged("a Gram matrix is not finite or not positive: the step was too large")


def solve_right(N: Tensor, factor: Tensor, block: int = 128) -> Tensor:
    """N K^-1 for N (b, p, r), in place, from K's Cholesky factor F; blocks are 3 x as fast as LAPACK."""
    blocks = [slice(i, i + block) for i in range(0, N.shape[-1], block)]
    inverses = []
    for s in blocks:
        eye = torch.eye(N[..., s].shape[-1], dtype=N.dtype, device=N.device)
        inverses.append(torch.linalg.solve_triangular(factor[..., s, s], eye, upper=False))
    # Y F^T = N from the left, then A F = Y from the right
    for s, inverse in zip(blocks, inverses):
        if s.start > 0:
            N[..., s] -= N[..., :s.start] @ factor[..., s, :s.start].mT
        N[..., s] = N[..., s] @ inverse.mT
    for s, inverse in zip(reversed(blocks), reversed(inverses)):
        if s != blocks[-1]:
            N[..., s] -= N[..., s.stop:] @ factor[..., s.stop:, s]
        N[..., s] = N[..., s] @ inverse
    return N


def adapters(N: Tensor, K: Tensor, ridge: float, work: Workspace, XU: Tensor | None = None,
             at_means: Tensor | None = None) -> Tensor:
    """A-step: argmin_A ||(W - A X) L||^2 + ridge ||A||^2 (b, p, r) from N = W C X^T and K = X C X^T.
    XU (b, p, r), X u of each row, and at_means (b, p), t: plus the sum over rows of (t_i - A_i X u_i)^2."""
    factor = spd_factor(K, ridge)
    A = solve_right(work.room("A", N.shape, N).copy_(N), factor)
    if XU is None:
        return A
    # a row's matrix is K + (X u)(X u)^T: Sherman and Morrison's formula
    Q = solve_right(work.room("Q", XU.shape, XU).copy_(XU), factor)
    missed = (at_means - (A * XU).sum(-1)) / (1 + (Q * XU).sum(-1))
    return A.addcmul_(missed[..., None], Q)


def target_shift(P: Tensor, pull: Tensor, L: Tensor | None, beta: float, ridge: float) -> Tensor:
    """T - X for the blended target T = (1 - beta) X + beta argmin_T ||(W - A T) L||^2, from P = A^T A and
    pull = A^T (W - A X) L L^T."""
    D = beta * torch.cholesky_solve(pull, spd_factor(P, ridge))
    if L is None:
        return D
    return torch.cholesky_solve(D.mT, L.to(D.dtype).expand(len(D), -1, -1)).mT


def nnls(G: Tensor, c: Tensor, steps: int = 200) -> Tensor:
    """argmin_{a >= 0} a G a^T - 2 a c^T for G (m, m), c (n, m) -> (n, m): accelerated projected gradient."""
    # steps of 1 / the largest curvature, with Nesterov's momentum
    step = 1 / torch.linalg.eigvalsh(G)[-1].clamp_min(1e-30)
    a = y = torch.zeros_like(c)
    for k in range(steps):
        new = (y - step * (y @ G - c)).clamp_min(0)
        y = new + k / (k + 3) * (new - a)
        a = new
    return a


# ---- where the fit starts ----------------------------------------------------------------------------
def rotation(r: int, g: torch.Generator) -> Tensor:
    """A random orthogonal matrix: every start has a random gauge, since the adapters absorb it."""
    return torch.linalg.qr(torch.randn(r, r, generator=g))[0]


def unit(x: Tensor) -> Tensor:
    """x with entries of mean square 1."""
    return x / x.square().mean().sqrt().clamp_min(1e-30)


def leading_rows(data: FitData, ids: list, r: int, g: torch.Generator) -> Tensor:
    """(r, d): the leading right singular directions of these experts in the metric, times their singular
    values, back from the metric; where r > d, random rows fill up."""
    gram = torch.zeros(data.d, data.d)
    for i in ids:
        W = data.whitened(i)
        gram += W.T @ W
    # eigenvalues of the Gram matrix, in rising order, are squared singular values
    values, vectors = torch.linalg.eigh(gram.double())
    k = min(r, data.d)
    rows = (values[-k:].clamp_min(0).sqrt()[:, None] * vectors[:, -k:].T).float()
    if r > k:
        rows = torch.cat([rows, 0.1 * rows.std() * torch.randn(r - k, data.d, generator=g)])
    return data.from_metric(rows, ids[-1])


def aligned(X: Tensor, bases: Tensor) -> Tensor:
    """X (r, d) rotated on the left to be nearest to each of the bases (m, r, d) (Procrustes)."""
    out = torch.empty_like(bases)
    for basis, to in zip(bases, out):
        U, _, V = torch.linalg.svd(basis @ X.mT)
        to.copy_(U @ V @ X)
    return out


def init_bank(data: FitData, m: int, r: int, how: str, g: torch.Generator) -> tuple:
    """Bank (G, m, r, d) and mixture weights alpha (n, m) to start from.

    experts: a basis is the matrix of one of its experts. svd: the leading directions of all its experts.
    dictionary: that, refined by k-means. random: Gaussian.
    """
    # each basis is home to neighbours; with more bases than experts, some to none
    alpha = 0.25 * torch.randn(len(data), m, generator=g)
    homes = collections.defaultdict(list)
    for i, k in enumerate(data.group.tolist()):
        count = int((data.group == k).sum())
        j = int((data.group[:i] == k).sum()) * m // max(count, m)
        homes[k, j].append(i)
        alpha[i, j] += 1
    bank = torch.randn(data.groups, m, r, data.d, generator=g)
    if how == "random":
        alpha = torch.rand(len(data), m, generator=g)
    else:
        settled = torch.zeros(bank.shape[:2], dtype=torch.bool)
        for place, ids in homes.items():
            if how == "experts":
                W = data.from_metric(data.whitened(ids[0]), ids[0])
                rows = rotation(max(r, data.p), g)[:r, :data.p] @ W
            else:
                rows = rotation(r, g) @ leading_rows(data, ids, r, g)
            bank[place] = unit(rows)
            settled[place] = True
        # the others become random mixtures of those
        for k, j in (~settled).nonzero().tolist():
            some = bank[k, settled[k]]
            turn = rotation(r, g)
            weights = torch.randn(len(some), generator=g) / len(some) ** 0.5
            bank[k, j] = turn @ torch.einsum("f,frd->rd", weights, some)
    if how == "dictionary":
        alpha = kmeans(data, bank, g)
    # small, so that phi starts near linear
    return bank.mul_(0.3).to(data.device), alpha.to(data.device)


def kmeans(data: FitData, bank: Tensor, g: torch.Generator, rounds: int = 4) -> Tensor:
    """k-means, in place, over the experts' leading directions, aligned to each basis; alpha (n, m)."""
    own = [unit(leading_rows(data, [i], bank.shape[2], g)) for i in range(len(data))]
    for _ in range(rounds):
        # each expert joins the basis of its group that it fits best
        sums = torch.zeros_like(bank)
        counts = torch.zeros(*bank.shape[:2], 1, 1)
        for x, k in zip(own, data.group.tolist()):
            fits = aligned(x, bank[k])
            j = int((fits - bank[k]).square().sum((1, 2)).argmin())
            sums[k, j] += fits[j]
            counts[k, j] += 1
        # a basis becomes the mean of its experts
        bank.copy_(torch.where(counts > 0, sums / counts, bank))
    alpha = []
    for x, k in zip(own, data.group.tolist()):
        bases = bank[k].flatten(1)
        along = (aligned(x, bank[k]).flatten(1) * bases).sum(1)
        alpha.append(nnls(bases @ bases.T, along[None])[0])
    return torch.stack(alpha)


# ---- one pass over the experts -----------------------------------------------------------------------
class Schedule(NamedTuple):
    """What the homotopy has set: activation blend, target blend, temperature, whether supports are fixed."""
    lam: float
    beta: float
    T: float
    frozen: bool


@dataclass
class Pass:
    """The outcome of one pass: the objective's value, its gradients, and what the directions are made of."""
    value: float
    error: float  # sum ||W - A X||^2 / sum ||W||^2 in the metric
    grad: dict  # {"B": (G, m, r, d), "z": (n, m)[, "A": (n, p, r)]}
    # varpro: sum_i alpha_ij^2 A_i^T A_i (G, m, r, r)
    curvature: Tensor | None = None
    # am: sum_i alpha_ij (Z-target - Z)_i (G, m, r, d) and <(Z-target - Z)_i, B_j> (n, m)
    shift: Tensor | None = None
    pull: Tensor | None = None


def residual_error(R: Tensor, L: Tensor | None) -> float:
    """||(W - A X) L||^2 from R = (W - A X) L L^T."""
    if L is not None:
        R = torch.linalg.solve_triangular(L.to(R.dtype), R.mT, upper=False)
    return float(R.square().sum())


def fit_eliminated(batch: Batch, X: Tensor, data: FitData, ridge: float, work: Workspace) -> tuple:
    """(error, A^T R, A, A^T A) of a batch with its bases X (b, r, d) and its adapters in closed form.

    R = (W - A X) C (b, p, d); as with fixed adapters the error's gradient in X is -2 A^T R (variable
    projection: Golub and Pereyra 1973).
    """
    V = target = batch.V.to(X.dtype)
    C = data.metric(batch.layer)
    XC = X if C is None else work.product("XC", X.flatten(0, 1), C.to(X.dtype)).view_as(X)
    XU = None
    if batch.U is not None:
        XU = work.product("XU", batch.U.to(X.dtype), X.mT)

    # the adapters, from their normal equations
    N = work.product("N", V, X.mT)
    K = work.product("K", XC, X.mT)
    A = adapters(N, K, ridge, work, XU, batch.at_means)
    P = work.product("P", A.mT, A)

    # the error multiplied out, ||W||^2 - 2 <A, N> + <A^T A, K>, with one wait for the device
    along, fitted = torch.stack([work.inner(A, N), work.inner(P, K)]).tolist()
    error = batch.energy - 2 * along + fitted

    # what a row misses at its mean input pulls along that input
    at_means = 0.0
    if XU is not None:
        missed = batch.at_means - (A * XU).sum(-1)
        at_means = float(missed.square().sum())
        target = torch.addcmul(V, missed[..., None], batch.U.to(X.dtype), out=work.room("target", V.shape, V))

    # a small error is taken from the residual: differences of large numbers would drown it
    if error > 1e-4 * batch.energy:
        pull = work.product("pull", A.mT, target).sub_(work.product("PX", P, XC))
    else:
        AXC = work.product("AXC", A, XC)
        error = residual_error(V - AXC, data.root(batch.layer))
        pull = work.product("pull", A.mT, target - AXC)
    return error + at_means, pull, A, P


def fit_joint(batch: Batch, X: Tensor, data: FitData, A: Tensor, work: Workspace) -> tuple:
    """(error, A^T R, R X^T) of a batch with its bases X (b, r, d) and the adapters that are given."""
    V = batch.V.to(X.dtype)
    C = data.metric(batch.layer)
    AX = work.product("AX", A, X)
    AXC = AX if C is None else work.product("AXC", AX.flatten(0, 1), C.to(X.dtype)).view_as(V)
    R = torch.sub(V, AXC, out=work.room("R", V.shape, V))
    # ||R||^2, or in a metric multiplied out: ||W||^2 - <V + R, A X>
    if C is None:
        error = float(work.inner(R, R))
    else:
        error = batch.energy - float(work.inner(V, AX) + work.inner(R, AX))
        if error < 1e-4 * batch.energy:
            error = residual_error(R, data.root(batch.layer))
    # what a row misses at its mean input pulls along that input
    if batch.U is not None:
        missed = batch.at_means - (batch.U * AX).sum(-1)
        error += float(missed.square().sum())
        R.addcmul_(missed[..., None], batch.U.to(X.dtype))
    return error, work.product("pull", A.mT, R), work.product("N", R, X.mT)


def objective(x: dict, data: FitData, cfg: Config, kind: str, mask: Tensor, schedule: Schedule) -> Pass:
    """Objective and gradients at x = {"B": bank, "z": logits[, "A": adapters]} by one pass over the experts.

    value = sum ||W - A X||^2 / sum ||W||^2 + penalties, in the metric; without "A" adapters are eliminated.
    Gradients are written out: autograd took 15 to 65 % longer. Diverged, on every rank, where one diverges.
    """
    B, f = x["B"], cfg.fit
    alpha = mixture(x["z"], schedule.T, kind, mask)
    work = Workspace(as_dtype(f.dtype), data.memory)
    error = penalty = 0.0
    grad = {"B": torch.zeros_like(B), "alpha": torch.zeros_like(alpha)}
    more = {}
    if f.method == "varpro":
        more["curvature"] = B.new_zeros(*B.shape[:3], B.shape[2])
    elif f.method == "am":
        more = {"shift": torch.zeros_like(B), "pull": torch.zeros_like(alpha)}
    else:
        grad["A"] = torch.zeros_like(x["A"])
    try:
        for batch in data.stream():
            rows, g = batch.rows, batch.group
            a = alpha[rows]
            bases = B[g].flatten(1)  # (m, r d)

            # compose the batch's bases X (b, r, d)
            Z = torch.mm(a, bases, out=work.room("Z", (len(a), bases.shape[1]), B))
            X, slope = blend(Z.view(-1, *B.shape[2:]), cfg.bank.activation, schedule.lam)

            # fit them, and what the method's direction asks for
            if f.method == "adam":
                A = x["A"][rows]
                part, pull, pull_A = fit_joint(batch, X, data, A, work)
                grad["A"][rows] = 2 * f.lambda_A * A - 2 * pull_A
                penalty += f.lambda_A * float(A.square().sum())
            else:
                part, pull, A, P = fit_eliminated(batch, X, data, f.lambda_A, work)
            if f.method == "varpro":
                more["curvature"][g].flatten(1).addmm_((a * a).T, P.flatten(1))
            if f.method == "am":
                dZ = target_shift(P, pull, data.root(batch.layer), schedule.beta, f.lambda_T)
                if slope is not None:
                    dZ = dZ * slope / slope.square().mean()
                more["shift"][g].flatten(1).addmm_(a.T, dZ.flatten(1))
                more["pull"][rows] = dZ.flatten(1) @ bases.T
            error += part

            # the chain rule, through phi to bank and mixtures
            gZ = pull.mul_(-2)
            if slope is not None:
                gZ *= slope
            grad["B"][g].flatten(1).addmm_(a.T, gZ.flatten(1))
            grad["alpha"][rows] = gZ.flatten(1) @ bases.T
    except Diverged:
        # the other ranks must hear of it
        error = math.nan

    # sum over the ranks, relative to the experts' energy
    totals = torch.tensor([error, penalty], dtype=torch.float64)
    all_sum(totals, *grad.values(), *more.values())
    if totals[0].isnan():
        raise Diverged("a Gram matrix is not finite or not positive: the step was too large")
    energy = max(float(data.energy.sum()), 1e-30)
    error, penalty = (totals / energy).tolist()
    if f.method == "varpro":
        more["curvature"] /= energy
    for t in grad.values():
        t /= energy

    # penalties lambda_B mean B^2 and l1 mean_i |alpha_i|
    l1 = cfg.sparsity.l1
    ridge = f.lambda_B and f.lambda_B * float(B.square().mean())
    value = error + penalty + (ridge + l1 * float(alpha.abs().sum()) / len(alpha))
    grad["B"].add_(B, alpha=2 * f.lambda_B / B.numel())

    # back through the mixtures' map
    pull = grad.pop("alpha") + l1 * alpha.sign() / len(alpha)
    grad["z"] = mixture_vjp(alpha, pull, schedule.T, kind, mask)
    return Pass(value, error, grad, **more)


# ---- the loop ----------------------------------------------------------------------------------------
def ramp(start: float, end: float, steps: int, k: int) -> float:
    """From start to end in so many steps, then end."""
    return end if k >= steps else start + (end - start) * k / steps


def _dot(a: dict, b: dict) -> float:
    return sum(float(torch.dot(a[k].flatten(), b[k].flatten())) for k in a)


# a += t b, in place: a bank can be a gibibyte
def _add(a: dict, t: float, b: dict) -> None:
    for k in a:
        a[k].add_(b[k], alpha=t)


class Fitter:
    """Fits the experts of FitData: `while not fitter.done: row = fitter.step()`, then `fitter.factors()`.

    fit.method: varpro eliminates A in closed form in every pass and moves bank and logits by preconditioned
    L-BFGS; am alternates closed-form half-steps (A, targets, bank, mixtures); adam moves all three by AdamW
    (MoBE's setting, with fit.adam.safeguard=false). A step that would raise the objective is shortened, then
    refused. shelve(name, tensors) -> Shelved says where L-BFGS pairs and finished adapters rest.
    """

    def __init__(self, data: FitData, cfg: Config, shape: tuple, store: torch.dtype = torch.float32,
                 start: dict | None = None, shelve: Callable = lambda name, tensors: Shelved(tensors)):
        self.data = data
        self.cfg = cfg
        self.method = cfg.fit.method
        self.store = store
        self.shelve = shelve
        self.kind = cfg.sparsity.map
        if self.kind == "auto":
            self.kind = "signed" if cfg.bank.activation == "identity" else "softmax"
        elif self.kind == "entmax":
            self.kind = {1.0: "softmax", 1.5: "entmax15", 2.0: "sparsemax"}[cfg.sparsity.alpha]
        freeze = cfg.sparsity.freeze
        if freeze is None:
            freeze = 0.15 if self.kind == "signed" else 0.7
        self.freeze_at = freeze * cfg.fit.steps
        self.T = cfg.sparsity.T0
        self.scale = 1.0  # of the next step: falls where steps were refused
        self.step_done = 0
        self.frozen = False
        self.here: Pass | None = None
        self.at: Schedule | None = None
        self.pairs: dict = {}  # varpro: {step: Shelved {"s.B", "s.z", "y.B", "y.z"}}, oldest first
        self.kept: dict = {}   # adam: first.B, second.B, ...; am: velocity.B, velocity.z

        m, r = shape
        self.mask = torch.ones(len(data), m, dtype=torch.bool, device=data.device)
        if start is None:
            how = cfg.bank.init.replace("auto", "experts")
            bank, alpha = init_bank(data, m, r, how, torch.Generator().manual_seed(cfg.fit.seed))
            # logits that lean toward alpha, with every basis in reach of a sparse map's gradient
            if self.kind == "signed":
                z = alpha / alpha.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            else:
                z = 0.3 * self.T * alpha / alpha.amax(-1, keepdim=True).clamp_min(1e-12)
            start = {"B": bank, "z": z}
        wide = torch.float64 if cfg.fit.dtype == "float64" else torch.float32
        self.x = {k: v.to(data.device, wide, copy=True) for k, v in start.items()}
        if self.method == "adam" and "A" not in self.x:
            self.x["A"] = self._first_adapters()
        self.unit = {k: float(v.square().mean().sqrt()) or 1.0 for k, v in self.x.items()} | {"z": self.T}
        self.root = self._inverse_metric()

    # every adapter in closed form, (n, p, r), at the first schedule
    def _first_adapters(self) -> Tensor:
        data, B, alpha = self.data, self.x["B"], self.alpha()
        lam = self._schedule().lam
        A = B.new_zeros(len(data), data.p, B.shape[2])
        for batch in data.stream():
            Z = alpha[batch.rows] @ B[batch.group].flatten(1)
            X, _ = blend(Z.view(-1, *B.shape[2:]), self.cfg.bank.activation, lam)
            A[batch.rows] = fit_eliminated(batch, X, data, self.cfg.fit.lambda_A, Workspace(B.dtype))[2]
        all_sum(A)
        return A

    # (G, d, d) inverses of each bank's mean L L^T, which precondition it from the right
    def _inverse_metric(self) -> Tensor | None:
        data = self.data
        if self.method != "varpro" or not data.right or data.absorbed:
            return None
        C = torch.zeros(data.groups, data.d, data.d, device=data.device)
        layers = collections.Counter(data.group_of_layer.values())
        for l, g in data.group_of_layer.items():
            C[g] += data.metric(l) / layers[g]
        return torch.cholesky_inverse(spd_factor(C, 1e-6)).to(self.x["B"].dtype)

    @property
    def done(self) -> bool:
        return self.step_done >= self.cfg.fit.steps

    def alpha(self) -> Tensor:
        return mixture(self.x["z"], self.T, self.kind, self.mask)

    # -- schedules
    # homotopy, temperature and supports as of the coming step; they move once in homotopy.every steps
    def _schedule(self) -> Schedule:
        h = self.cfg.fit.homotopy
        k = self.step_done
        stage = k - k % h.every
        if not self.frozen and k >= self.freeze_at:
            self._freeze()
        elif not self.frozen and k == stage > 0 and self.kind != "signed":
            if self._median_support() > self.cfg.sparsity.support:
                self.T *= self.cfg.sparsity.eta
        lam = ramp(h.lam_start, 1.0, min(h.lam_steps, int(self.freeze_at)), stage)
        return Schedule(lam, ramp(h.beta_start, h.beta_end, h.beta_steps, stage), self.T, self.frozen)

    # cut supports to each expert's largest |alpha| above eps_prune (always the largest), and keep them
    def _freeze(self) -> None:
        a = self.alpha().abs()
        top = a.topk(min(self.cfg.sparsity.support, a.shape[1]), -1).indices
        keep = torch.zeros_like(self.mask).scatter_(1, top, True) & (a > self.cfg.sparsity.eps_prune)
        self.mask = self.mask & keep.scatter_(1, top[:, :1], True)
        self.frozen = True
        self.here = None

    def _median_support(self) -> float:
        return float((self.alpha() != 0).sum(-1).float().median())

    # -- directions: varpro
    # here.curvature becomes its damped inverse (a basis that nobody uses has 0), some bases at a time
    def _invert_curvature(self) -> None:
        M = self.here.curvature
        level = M.diagonal(dim1=-1, dim2=-2).mean()
        eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
        for part in M.flatten(0, 1).split(64):
            factor = spd_factor(part + 1e-3 * level * eye, 3e-2)
            # CUDA's own inverse goes matrix by matrix
            if M.device.type == "cuda":
                part.copy_(solve_right(eye.repeat(len(part), 1, 1), factor))
            else:
                part.copy_(torch.cholesky_inverse(factor))

    # q times an inverse Hessian: (sum alpha^2 A^T A)^-1 on the left of each basis's part, the mean metric's
    # inverse on its right, a constant for the logits
    def _precondition(self, q: dict) -> dict:
        out = torch.empty_like(q["B"])
        for g, inverse in enumerate(self.here.curvature):
            for rows, M, to in zip(q["B"][g].split(64), inverse.split(64), out[g].split(64)):
                if self.root is not None:
                    rows = rows @ self.root[g]
                torch.matmul(M, rows, out=to)
        z = q["z"] * 3 * len(self.data)
        if self.kind != "signed":
            z *= self.T ** 2
        return {"B": out.div_(2), "z": z}

    # (s, y) of a step: change of x, change of gradient
    def _pair(self, step: int) -> list:
        t = self.pairs[step].load()
        return [{k: t[f"{name}.{k}"].to(self.data.device) for k in self.x} for name in "sy"]

    # how much the preconditioner is off along the newest pair, in the bank and in the logits
    def _pair_scale(self, s: dict, y: dict) -> dict:
        Hy = self._precondition(y)
        along = {k: _dot({k: s[k]}, y) for k in s}
        size = {k: _dot({k: y[k]}, Hy) for k in s}
        both = sum(along.values()) / max(sum(size.values()), 1e-300)
        return {k: along[k] / size[k] if min(along[k], size[k]) > 0 else both for k in s}

    # two-loop recursion (Nocedal and Wright, Algorithm 7.4) around the preconditioner
    def _lbfgs(self) -> dict:
        q = {k: g.clone() for k, g in self.here.grad.items()}
        scale = dict.fromkeys(q, 1.0)
        steps = {}
        for k in reversed(self.pairs):
            s, y = self._pair(k)
            sy = _dot(s, y)
            if not steps:
                scale = self._pair_scale(s, y)
            steps[k] = _dot(s, q) / sy, sy
            _add(q, -steps[k][0], y)
            # before the next ones come from disk
            del s, y
        delta = self._precondition(q)
        del q
        for k, v in delta.items():
            v *= scale[k]
        for k, (along, sy) in reversed(steps.items()):
            s, y = self._pair(k)
            _add(delta, along - _dot(y, delta) / sy, s)
            del s, y

        # where curvature went wrong: steepest descent in the preconditioner
        if _dot(delta, self.here.grad) <= 0:
            self.pairs = {}
            delta = self._precondition(self.here.grad)
        # a step moves the bank by half of itself at most
        reach = float(delta["B"].norm() / self.x["B"].norm().clamp_min(1e-30))
        for v in delta.values():
            v *= -min(1.0, 0.5 / max(reach, 1e-30))
        return delta

    # keep s = x - self.x and y = new.grad - here.grad, in the memory of what they replace
    def _remember(self, x: dict, new: Pass) -> None:
        s, y = self.x, self.here.grad
        for k in s:
            torch.sub(x[k], s[k], out=s[k])
            torch.sub(new.grad[k], y[k], out=y[k])
        # only pairs of positive curvature
        if _dot(s, y) > 1e-10 * math.sqrt(_dot(s, s) * _dot(y, y)):
            pair = {f"s.{k}": v for k, v in s.items()} | {f"y.{k}": v for k, v in y.items()}
            step = self.step_done + 1
            self.pairs[step] = self.shelve(f"pair-{step:06d}", pair)
        while len(self.pairs) > self.cfg.fit.memory:
            del self.pairs[next(iter(self.pairs))]

    # -- directions: am
    # bank by least squares on the shifted targets, then mixtures on what is left of them; with momentum
    def _half_steps(self) -> dict:
        B, alpha = self.x["B"], self.alpha()
        delta = {"B": torch.empty_like(B), "z": torch.empty_like(alpha)}
        for g, flat in enumerate(B.flatten(2)):  # (m, r d)
            ids = (self.data.group == g).to(alpha.device)
            a = alpha[ids]
            factor = spd_factor(a.T @ a, 1e-3 + self.cfg.fit.lambda_B)
            dB = torch.cholesky_solve(self.here.shift[g].flatten(1), factor)
            delta["B"][g] = dB.view_as(B[g])
            # Gauss-Newton in the logits of ||sum_j dalpha_j B_j - dZ||^2 + l1 |alpha|, from the bank's Gram
            # matrix (m, m) and <dZ, B_j>; the map's Jacobian J is symmetric
            gram = flat @ flat.T
            left = self.here.pull[ids] - a @ (dB @ flat.T)
            eye = torch.eye(len(flat), dtype=a.dtype, device=a.device)
            mask = self.mask[ids]
            J = torch.stack([mixture_vjp(a, e.expand_as(a), self.T, self.kind, mask) for e in eye], -1)
            l1 = 0.5 * self.cfg.sparsity.l1 * gram.diagonal().mean()
            right = J @ (left - l1 * a.sign())[..., None]
            delta["z"][ids] = torch.cholesky_solve(right, spd_factor(J @ gram @ J, 1e-3))[..., 0]
        for k in delta:
            if f"velocity.{k}" in self.kept:
                delta[k] += 0.8 * self.kept[f"velocity.{k}"]
        return delta

    # -- directions: adam
    # one step of AdamW (Loshchilov and Hutter 2019), at rates relative to each parameter's size at the start
    def _adam(self) -> dict:
        f, a = self.cfg.fit, self.cfg.fit.adam
        fade = 0.5 * (1 + math.cos(math.pi * self.step_done / f.steps)) + 0.01
        rates = {"B": 1.0, "z": a.lr_z, "A": a.lr_A}
        delta = {}
        for k, g in self.here.grad.items():
            # running moments of the gradient
            first = self.kept.setdefault(f"first.{k}", torch.zeros_like(g))
            second = self.kept.setdefault(f"second.{k}", torch.zeros_like(g))
            rate = f.lr * fade * self.scale * rates[k]
            delta[k] = torch.zeros_like(g)
            count = torch.tensor(float(self.step_done), device=g.device)
            adam([delta[k]], [g], [first], [second], [], [count], fused=True, amsgrad=False, beta1=a.beta1,
                 beta2=a.beta2, lr=rate * self.unit[k], weight_decay=0.0, eps=a.eps, maximize=False)
            # the decay acts on the parameter itself, not by way of the moments
            if a.weight_decay:
                delta[k].sub_(self.x[k], alpha=rate * a.weight_decay)
        return delta

    # -- one step
    # None where x is so far off that the objective is not finite
    def _evaluate(self, x: dict) -> Pass | None:
        begin = time.perf_counter()
        new = None
        with contextlib.suppress(Diverged):
            new = objective(x, self.data, self.cfg, self.kind, self.mask, self.at)
        self.last_pass = time.perf_counter() - begin
        return new if new and math.isfinite(new.value) else None

    # go on from x, where the pass `new` was taken
    def _stand(self, x: dict, new: Pass) -> None:
        self.x = x
        self.here = new
        if self.method == "varpro":
            self._invert_curvature()

    # (length of the step along delta that was taken, or 0; passes)
    def _search(self, delta: dict) -> tuple:
        varpro = self.method == "varpro"
        free = self.method == "adam" and not self.cfg.fit.adam.safeguard
        slope = min(0.0, _dot(delta, self.here.grad))
        # with no curvature yet, as far as it went last time
        t = self.scale if varpro and not self.pairs else 1.0
        for tries in range(1, 7):
            x = {k: torch.add(v, delta[k], alpha=t) for k, v in self.x.items()}
            new = self._evaluate(x)
            if free and new is None:
                raise Diverged(f"step {self.step_done}: the objective is not finite; lower fit.lr")
            # varpro asks for Armijo's decrease, am and adam for none
            if new and (free or new.value <= self.here.value + 1e-4 * t * slope * varpro):
                if varpro:
                    self._remember(x, new)
                self._stand(x, new)
                return t, tries
            # to the minimum of the parabola through what is known
            rise = new.value - self.here.value - slope * t if new else 0.0
            t *= min(0.5, max(0.1, -slope * t / (2 * rise))) if rise > 0 else 0.25
            del x, new
        return 0.0, tries

    def step(self) -> dict:
        """One accepted (or refused) step; returns its log row."""
        # where the objective has moved: take it again at the same x
        schedule = self._schedule()
        if self.here is None or schedule != self.at:
            if self.method == "am":
                self.kept = {}
            self.pairs = {}
            # let go of the old gradients first
            self.here = None
            self.at = schedule
            new = self._evaluate(self.x)
            if new is None:
                raise Diverged(f"step {self.step_done}: the objective is not finite")
            self._stand(self.x, new)

        delta = {"varpro": self._lbfgs, "am": self._half_steps, "adam": self._adam}[self.method]()
        taken, tries = self._search(delta)
        if self.method == "am":
            self.kept = {f"velocity.{k}": v for k, v in delta.items()}
        # refused: what the direction was made of has misled
        if not taken:
            self.pairs = {}
        if not taken or self.method == "am" and taken < 1:
            self.kept = {}

        # how far the next step goes
        if self.method == "varpro":
            self.scale = min(1.0, max(1e-6, 2 * taken or self.scale * 1e-2))
        elif taken == 1:
            self.scale = min(1.0, self.scale * 1.1)
        else:
            self.scale = max(1e-4, self.scale * 0.5)
        self.step_done += 1

        a = self.alpha()
        entry = float(self.data.energy.sum()) / len(a) / self.data.p / self.data.d
        # as many bases as would weigh as much if all weighed alike
        part = a.abs() / a.abs().sum(-1, keepdim=True).clamp_min(1e-30)
        effective = float((1 / part.square().sum(-1)).median())
        return {"step": self.step_done, "loss": self.here.value, "mse": self.here.error * entry,
                "rel_frob": math.sqrt(self.here.error), "support": self._median_support(),
                "zeros": float((a == 0).float().mean()), "effective_support": effective,
                "lambda": self.at.lam, "beta": self.at.beta, "T": self.T, "step_size": taken,
                "passes": tries, "pass_seconds": round(self.last_pass, 3)}

    # -- state and outcome
    def state(self) -> dict:
        """Tensors from which load_state, with `pairs`, goes on to the same bits."""
        numbers = {"step": self.step_done, "T": self.T, "scale": self.scale, "frozen": self.frozen,
                   "batch": self.data.batch, "pairs": [*self.pairs]}
        numbers |= {f"unit.{k}": v for k, v in self.unit.items()}
        if self.at:
            numbers["at"] = self.at
        tensors = {f"x.{k}": v for k, v in self.x.items()} | self.kept | {"mask": self.mask}
        tensors |= {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}
        return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}

    def load_state(self, t: dict, pairs: dict) -> None:
        """Go on from state() and its pairs {step: Shelved}. Tensors must be aligned: MKL rounds otherwise."""
        device = self.data.device
        self.pairs = pairs
        self.mask = t["mask"].to(device)
        self.x = {k: t[f"x.{k}"].to(device) for k in self.x}
        self.unit = {k: float(t[f"unit.{k}"]) for k in self.x}
        kept = ("first.", "second.", "velocity.")
        self.kept = {k: v.to(device) for k, v in t.items() if k.startswith(kept)}
        self.step_done = int(t["step"])
        self.T = float(t["T"])
        self.scale = float(t["scale"])
        self.frozen = bool(t["frozen"])
        if "at" in t:
            self.at = Schedule(*t["at"].tolist())
            new = self._evaluate(self.x)
            if new:
                self._stand(self.x, new)

    @torch.no_grad()
    def factors(self) -> dict:
        """{family: FamilyFactors}: supports cut to size, the bank as it is stored, adapters solved for it."""
        if not self.frozen:
            self._freeze()
        # a pass's large parts are not needed any more
        if self.here:
            self.here = Pass(self.here.value, self.here.error, {})

        # mixtures as (n, s) indices in rising order, and values; padded with 0
        alpha, data = self.alpha(), self.data
        s = max(1, int((alpha != 0).sum(-1).max()))
        idx = alpha.abs().topk(s, -1).indices.sort(-1).values
        val = alpha.gather(1, idx).float().cpu()
        idx = idx.int().cpu().masked_fill(val == 0, 0)

        # the bank without what it has absorbed of the metric
        bank = self.x["B"]
        if data.absorbed:
            L = torch.stack([data.right[l] for l in data.group_of_layer]).to(bank.dtype)
            bank = torch.linalg.solve_triangular(L[:, None], bank, upper=False, left=False)
        bank = bank.to(self.store).cpu()
        out = {}
        for family in dict.fromkeys(key[0] for key in data.keys):
            out[family] = FamilyFactors(
                list(bank), LazyDict({}), {}, {}, dict(data.group_of_layer), self.cfg.bank.activation,
                data.shift, data.scale, owner=next(iter(out), None))
        for l in data.group_of_layer:
            ids = (data.layers == l).nonzero().flatten()
            A = self._layer_adapters(l, ids.tolist(), bank, idx, val)
            # keys go family by family, with the same experts in each
            for (family, f), rows, part in zip(out.items(), ids.chunk(len(out)), A.chunk(len(out))):
                f.idx[l] = idx[rows]
                f.val[l] = val[rows]
                kept = self.shelve(f"A-{family}-{l:06d}", {"A": part.to(self.store, copy=True)})
                f.A.make[l] = lambda kept=kept: kept.load()["A"]
        return out

    # A (., p, r) of the layer's experts `ids`, solved for the bases that the runtime composes
    def _layer_adapters(self, layer: int, ids: list, bank: Tensor, idx: Tensor, val: Tensor) -> Tensor:
        data = self.data
        A = torch.zeros(len(ids), data.p, bank.shape[2])
        for batch in data.stream(layer):
            X = compose(bank[batch.group].float(), idx[batch.ids], val[batch.ids], self.cfg.bank.activation)
            X = X.to(data.device).to(self.store).float()
            if data.absorbed:
                X = X @ data.right[layer]
            solved = fit_eliminated(batch, X, data, self.cfg.fit.lambda_A, Workspace(X.dtype))[2]
            for i, a in zip(batch.ids, solved):
                A[ids.index(i)] = data.unweighted_adapter(i, a)
        all_sum(A)
        return A


# ---- sizes and work ----------------------------------------------------------------------------------
def bank_shape(cfg: Config, family: str, n: int, groups: int, D: Dims) -> tuple:
    """(m, r) of a family: bank.r as given, or the largest r whose stored size is within bank.ratio."""
    m, r = cfg.bank.m, cfg.bank.r
    if isinstance(m, dict):
        expect(family in m, f"bank.m: expected a number for {family}, found {m}")
        m = m[family]
    # n adapters (p, r) and banks (m, r, d) beside the mixtures
    if r is None:
        mixtures = 2 * n * min(cfg.sparsity.support, m) + 2
        r = int((cfg.bank.ratio * n * D.p * D.d - mixtures) // (n * D.p + groups * m * D.d))
    elif isinstance(r, float):
        r = max(1, round(r * D.p))
    most_m = max(1024, 4 * n)
    most_r = 4 * max(D.p, D.d)
    expect(r >= 1, f"bank: {groups} x {m} bases leave no room for r >= 1 at ratio {cfg.bank.ratio}; "
                   "take fewer (bank.m)")
    expect(m <= most_m, f"bank.m: expected at most {most_m} bases for {n} experts, found {m}")
    expect(r <= most_r, f"bank.r: expected at most {most_r} (4 x the larger side of W), found {r}")
    return m, r


# bytes of bank.memory: 6GiB, 18GB, or a plain number
def wanted_bytes(cfg: Config) -> float:
    size = re.fullmatch(r"(\d+\.?\d*(?:e\d\d?)?) *(?:([KMGT])(i?)B)?", cfg.bank.memory)
    expect(size and cfg.bank.r is None, "bank.memory: expected a size like 18GiB, and no bank.r, "
                                        f"found {cfg.bank.memory!r} and {cfg.bank.r}")
    number, prefix, binary = size.groups()
    return float(number) * (1024 if binary else 1000) ** (" KMGT".index(prefix or " "))


# UserError of a bank.memory that cannot be reached
def refuse_memory(cfg: Config, least: float, most: float, why: str) -> None:
    raise UserError(f"bank.memory: expected a size between {least / 2 ** 30:.3g}GiB ({why}) and "
                    f"{most / 2 ** 30:.3g}GiB (the source), found {cfg.bank.memory}")


def fit_memory(cfg: Config, ckpt: Checkpoint) -> None:
    """bank.memory -> bank.ratio, and families: all where the families alone would go below half."""
    # numbers: wanted, of the whole model, of one family's experts
    wanted = wanted_bytes(cfg) / ckpt.dtype.itemsize
    total = ckpt.num_parameters()
    each = len(select_experts(ckpt.dims, cfg.model)) * ckpt.dims.p * ckpt.dims.d
    for families in (cfg.model.families, "all"):
        cfg.model.families = families
        n = len(families_of(cfg.model)) * each
        cfg.bank.ratio = (wanted - total + n) / n
        if cfg.bank.ratio >= 0.5:
            break
    if not 0.05 < cfg.bank.ratio < 1:
        least = (total - 0.95 * n) * ckpt.dtype.itemsize
        refuse_memory(cfg, least, total * ckpt.dtype.itemsize, "5 % of the experts left")


HEADER_BYTES = 115  # of a tensor's name and place in the file


class CodedSize(NamedTuple):
    """What a model takes whose experts, and what is around them, are in codes."""
    experts: int   # numbers of the coded families
    rest: int      # numbers of linear layers and embeddings outside
    others: int    # bytes of all else: dense families, routers, norms, names

    def bytes(self, bits: float, rest_bits: int, itemsize: int) -> float:
        each = itemsize if rest_bits == 16 else (rest_bits + 16 / 64) / 8
        return self.others + self.experts * bits / 8 + self.rest * each


def coded_size(cfg: Config, ckpt: Checkpoint) -> CodedSize:
    """CodedSize of model.families of the selected experts."""
    model = empty_model(ckpt.config, ckpt.dtype, ckpt.dir)
    families = families_of(cfg.model)
    experts = len(families) * len(select_experts(ckpt.dims, cfg.model)) * ckpt.dims.p * ckpt.dims.d
    matrices = rest_matrices(model, ckpt, cfg.model)
    rest = sum(map(math.prod, matrices.values()))
    tensors = len(model.state_dict()) + len(matrices)
    names = HEADER_BYTES * (tensors + 6 * len(families) * len(ckpt.dims.layers))
    others = (ckpt.num_parameters() - experts - rest) * ckpt.dtype.itemsize + names
    return CodedSize(experts, rest, others)


def code_memory(cfg: Config, ckpt: Checkpoint) -> tuple:
    """(bits, rest bits) of bank.memory; families: all, unless 4 bits are left for gate and up alone."""
    wanted = wanted_bytes(cfg)
    # in this order: what is left to the experts should not be less than that
    own = cfg.model.families
    for families, rest_bits, least in ((own, 16, 4), ("all", 16, 4), ("all", 8, 1), ("all", 4, 0)):
        cfg.model.families = families
        rest_bits = cfg.rest.bits or rest_bits
        size = coded_size(cfg, ckpt)
        bits = 8 * (wanted - size.bytes(0, rest_bits, ckpt.dtype.itemsize)) / size.experts
        if bits >= least:
            break
    if bits < 0.3 or wanted >= ckpt.bytes:
        least = size.bytes(0.3, rest_bits, ckpt.dtype.itemsize)
        refuse_memory(cfg, least, ckpt.bytes, "0.3 bits of a weight of the experts left")
    return min(bits, max(WIDTHS)), rest_bits


def flops_per_pass(n: int, m: int, r: int, D: Dims, right: bool, means: bool = False) -> float:
    """Operations of one pass of varpro over n experts; right: in a metric that the bank has not absorbed."""
    p, d = D.p, D.d
    # V X^T, A^T V; K, P X C; A^T A; its solve
    work = 4 * p * r * d + 4 * r * r * d + 4 * r * r * p + r ** 3 / 3
    # X C; X U and its solve
    work += 2 * r * d * d * right + (2 * p * r * d + 2 * r * r * p) * means
    # compose, and back; curvature
    return n * (work + 6 * m * r * d + 2 * m * r * r)


# ======== 11. Refine: each layer by its own output ====================================================
# Never touches: printing.
# What a change of adapters costs, where the tokens weigh 1.
ANCHOR = 0.1
# What a change of down projections costs, relative to the mean square of the hidden activations.
DOWN_RIDGE = 0.3
# Both grow where an expert sees few tokens: by this times its unknowns per row over its tokens.
FEW_TOKENS = 10
# Adapters use every n-th token where an expert sees more than this times hidden_size.
REFINE_TOKENS = 40
# Tokens of one product, to bound the memory of what lies between.
AT_ONCE = 2048


def shared_mlp(parent: nn.Module) -> nn.Module | None:
    # the shared expert beside a layer's routed ones
    return getattr(parent, "shared_expert", getattr(parent, "shared_experts", None))


@dataclass
class LayerCall:
    """A dense MoE layer at work: what its routed experts were given and what they returned."""
    parent: nn.Module  # holds the experts, the shared one and its gate
    module: nn.Module  # the routed experts
    x: Tensor          # (N, d)
    index: Tensor      # (N, k) experts that the router chose
    weight: Tensor     # (N, k) their weights
    y: Tensor          # (N, d)


@dataclass
class ExpertGroup:
    """Experts that see the same n tokens; they add h @ down.T to the output. P = p times their number."""
    experts: list           # from dims.experts on: slices of the shared expert
    tokens: Tensor | slice  # (n,) rows of the layer's inputs
    weight: Tensor          # (n, number of experts) from the router
    gate: Tensor            # (P, d)
    up: Tensor              # (P, d)
    down: Tensor            # (d, P)
    rows: Sequence = ()     # the experts' rows in the factors; none where they were not fitted
    h: Tensor = None        # (n, P) hidden activations times the router's weight
    slopes: dict = None     # {"gate": (n, P) slope of h in gate's output, "up": in up's}

    def activate(self, module: nn.Module, x: Tensor, slopes: bool) -> None:
        """Set h, and slopes where asked for, at the layer's inputs x (N, d)."""
        x = x[self.tokens]
        results = [x.new_empty(len(x), len(self.gate)) for _ in range(3 if slopes else 1)]
        for start in range(0, len(x), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            z = torch.cat([F.linear(x[part], self.gate), F.linear(x[part], self.up)], -1)  # (n, 2 P)
            h, both = gate_slopes(module, z) if slopes else (module._apply_gate(z).float(), ())

            # each expert's p columns times its weight
            weight = self.weight[part, :, None]
            for result, value in zip(results, (h, *both)):
                value = value.unflatten(1, (weight.shape[1], -1))
                result[part] = value.mul_(weight).flatten(1)
        self.h = results[0]
        self.slopes = dict(zip(("gate", "up"), results[1:]))

    def output(self) -> Tensor:
        return F.linear(self.h, self.down).float()  # (n, d)


def routed_group(call: LayerCall, experts: list) -> ExpertGroup:
    # which of a token's k places are these experts'; all see the same tokens as the first
    chosen = call.index[:, :, None] == torch.tensor(experts, device=call.x.device)  # (N, k, number)
    tokens = chosen[:, :, 0].any(1).nonzero()[:, 0]
    weight = (call.weight[:, :, None] * chosen).sum(1)[tokens].float()
    gate, up = call.module.gate_up_proj[experts].chunk(2, 1)  # (number, p, d) each
    down = call.module.down_proj[experts].transpose(0, 1).flatten(1)
    if len(tokens) == len(call.x):
        tokens = slice(None)
    return ExpertGroup(experts, tokens, weight, gate.flatten(0, 1), up.flatten(0, 1), down)


def shared_group(call: LayerCall, experts: list, D: Dims) -> ExpertGroup:
    # slices of the shared expert, which sees every token; its gate stands for the router's weight
    mlp = shared_mlp(call.parent)
    part = slice((experts[0] - D.experts) * D.p, (experts[-1] - D.experts + 1) * D.p)
    weight = torch.ones(len(call.x), 1, device=call.x.device)
    if hasattr(call.parent, "shared_expert_gate"):
        weight = call.parent.shared_expert_gate(call.x).float().sigmoid()
    return ExpertGroup(experts, slice(None), weight.expand(-1, len(experts)), mlp.gate_proj.weight[part],
                       mlp.up_proj.weight[part], mlp.down_proj.weight[:, part])


def grouped(factors: Factors, l: int, everywhere: bool, alone: bool) -> list:
    """[[expert, ...]]: all experts of layer l, those together that are solved for at once."""
    E = factors.dims.experts
    shared = [*range(E, E + factors.dims.shared)]
    # adapters or codes of down are solved for one expert after another
    if alone or "down" in factors.families:
        return [[e] for e in (*range(E), *shared)]
    # experts that all see every token are one group, and so are the shared expert's slices
    together = [e for e in factors.experts[l] if everywhere and e < E]
    alone = [[e] for e in range(E) if e not in together]
    return [*filter(None, (together, *alone, shared))]


def compress(group: ExpertGroup, factors: Factors, l: int) -> None:
    """Put the factors' weights in place of a group's dense ones."""
    for family, fam in factors.families.items():
        W = fam.weights(l, group.rows, group.down.device).flatten(0, 1).to(group.down.dtype)  # (P, d)
        setattr(group, family, W.T if family == "down" else W)


def expert_groups(call: LayerCall, factors: Factors, l: int, slopes: bool, alone: bool = False) -> tuple:
    """([ExpertGroup] to refine in layer l, at work with the factors' weights; residual (N, d) float32, dense
    minus compressed output with the shared expert's; the mean square of the dense output)."""
    E = factors.dims.experts
    fitted = factors.experts[l]
    groups = []
    dense = call.y.to(torch.float32, copy=True)
    residual = dense.clone()
    for experts in grouped(factors, l, call.index.shape[1] == E, alone):
        shared = experts[0] >= E
        group = shared_group(call, experts, factors.dims) if shared else routed_group(call, experts)
        group.rows = [fitted.index(e) for e in experts if e in fitted]
        # call.y holds the routed experts' output only
        if shared:
            group.activate(call.module, call.x, False)
            dense += group.output()
            residual += group.output()
        # routed experts that were not fitted cancel out
        if group.rows:
            compress(group, factors, l)
        if group.rows or not shared:
            group.activate(call.module, call.x, slopes and bool(group.rows))
        residual[group.tokens] -= group.output()
        # what follows works on activations, not on these weights
        group.gate = group.up = None
        if shared or group.rows:
            groups.append(group)
    return groups, residual, max(float(dense.square().mean()), 1e-30)


# ---- Adapters of gate and up ----
class AdapterJacobian:
    """J: what changes of a layer's adapters of gate and up move in its output, to first order.

    A change is q (F, E, p, r) for F families of E fitted experts; it stands for dW = (q / unit) U. So
    J^T J is the identity but for what rows do to each other, and few gradients are enough.
    """

    def __init__(self, groups: list, factors: Factors, l: int, x: Tensor):
        self.x = x  # (N, d)
        self.families = [f for f in ("gate", "up") if f in factors.families]
        fams = [factors.families[f] for f in self.families]
        sizes = (len(fams), len(factors.experts[l]))

        # U = L^-1 X (r, d): the composed basis, orthonormal for the inputs, U C U^T = I, C = x^T x / N;
        # with rows of zeros where a family has fewer than the other
        C = x.float().T @ x.float() / len(x)
        self.L = []
        self.U = x.new_zeros(*sizes, max(fam.bank[0].shape[1] for fam in fams), x.shape[1])
        for U, fam in zip(self.U, fams):
            X = fam.composed(l).to(x.device, torch.float32)  # (E, r, d)
            self.L.append(spd_factor(X @ C @ X.mT, 1e-4))
            U[:, :X.shape[1]] = torch.linalg.solve_triangular(self.L[-1], X, upper=False)

        # unit (F, E, p, 1): what a change of that row alone moves
        # anchor (F, E, 1, 1): the weight of q = 0
        self.unit = torch.zeros(*sizes, factors.dims.p, 1, device=x.device)
        self.anchor = torch.full((*sizes, 1, 1), ANCHOR, device=x.device)
        self.groups = [group for group in groups if group.rows and len(group.h)]
        for group in self.groups:
            for i, f in enumerate(self.families):
                reach = group.down.float().norm(dim=0) * group.slopes[f].float().norm(dim=0)  # (P,)
                self.unit[i, group.rows] = reach.view(len(group.rows), -1, 1)
                self.anchor[i, group.rows] += FEW_TOKENS * self.L[i].shape[-1] / len(group.h)

        # no division by zero; with the anchor in the unit all directions are equally stiff
        self.unit += 1e-3 * self.unit.mean((1, 2, 3), keepdim=True).clamp_min(1e-30)
        self.unit *= (1 + self.anchor).sqrt()
        self.anchor /= 1 + self.anchor

    def pieces(self) -> Iterator[tuple]:
        # (group, its tokens among x, their places in the group), AT_ONCE tokens at a time
        for group in self.groups:
            for start in range(0, len(group.h), AT_ONCE):
                places = slice(start, start + AT_ONCE)
                tokens = places if isinstance(group.tokens, slice) else group.tokens[places]
                yield group, tokens, places

    def jvp(self, q: Tensor) -> Tensor:
        """J q (N, d) float32: the change of the output."""
        dW = (q / self.unit).to(self.x.dtype) @ self.U  # (F, E, p, d)
        y = torch.zeros(self.x.shape, device=self.x.device)
        for group, tokens, places in self.pieces():
            x = self.x[tokens]  # (n, d)
            dh = 0              # (n, P)
            for f, W in zip(self.families, dW):
                dh = dh + group.slopes[f][places] * F.linear(x, W[group.rows].flatten(0, 1))
            y[tokens] += F.linear(dh, group.down)
        return y

    def vjp(self, y: Tensor) -> Tensor:
        """J^T y (F, E, p, r) of y (N, d): the steps of jvp transposed, in reverse."""
        G = torch.zeros(*self.unit.shape[:3], y.shape[1], device=y.device)  # of dW
        for group, tokens, places in self.pieces():
            x = self.x[tokens]
            pull = y[tokens].to(x.dtype) @ group.down  # (n, P)
            for f, g in zip(self.families, G):
                dW = (group.slopes[f][places] * pull).T @ x
                g[group.rows] += dW.view(len(group.rows), *g.shape[1:])
        return (G.to(self.x.dtype) @ self.U.mT).float() / self.unit


def conjugate_gradients(J: AdapterJacobian, residual: Tensor, steps: int) -> Tensor:
    """q that minimises ||J q - residual||^2 + sum(anchor q^2), after `steps` steps from 0 on the normal
    equations (Hestenes and Stiefel 1952)."""
    gradient = J.vjp(residual)  # downhill
    direction = gradient.clone()
    q = torch.zeros_like(gradient)
    size = float(gradient.flatten() @ gradient.flatten())
    done = 1e-12 * size  # nothing left to gain
    for left in reversed(range(steps)):
        if size <= done:
            break
        # the lowest point along the direction
        moved = J.jvp(direction)
        held = J.anchor * direction
        curvature = float(moved.square().sum()) + float(held.flatten() @ direction.flatten())
        q.add_(direction, alpha=size / curvature)
        if left == 0:
            break
        # the gradient at it, and a direction that undoes no earlier step
        gradient.sub_(J.vjp(moved).add_(held), alpha=size / curvature)
        before = size
        size = float(gradient.flatten() @ gradient.flatten())
        direction.mul_(size / before).add_(gradient)
    return q


def refine_adapters(groups: list, factors: Factors, l: int, x: Tensor, residual: Tensor, steps: int) -> dict:
    """{family: A (E, p, r)} of layer l's gates and ups after a Gauss-Newton step towards the residual (N, d).

    groups with their slopes; x (N, d) the layer's inputs.
    """
    J = AdapterJacobian(groups, factors, l, x)
    q = conjugate_gradients(J, residual, steps) / J.unit
    new = {}
    for f, L, part in zip(J.families, J.L, q):
        fam = factors.families[f]
        # scale dA X = part U, with X = L U
        part = part[..., :L.shape[-1]] / fam.scale
        dA = torch.linalg.solve_triangular(L, part, upper=False, left=False)
        new[f] = (fam.A[l].to(x.device, torch.float32) + dA).to(fam.A[l].dtype)
    return new


# ---- Down projections ----
def hidden_gram(group: ExpertGroup) -> Tensor:
    """h^T h (P, P) float32 of a group."""
    gram = torch.zeros(group.h.shape[1], group.h.shape[1], device=group.h.device)
    for part in group.h.split(4096):
        gram += part.T @ part  # sums in float32
    return gram


def ridge_factor(group: ExpertGroup) -> tuple:
    """(ridge, Cholesky factor (P, P) of h^T h + ridge I) of a group."""
    n, P = group.h.shape
    gram = hidden_gram(group)
    weight = DOWN_RIDGE + FEW_TOKENS * P / len(group.experts) / n
    ridge = weight * float(gram.diagonal().mean().clamp_min(1e-30))
    gram.diagonal().add_(ridge)
    return ridge, spd_factor(gram, 0)


def refine_down(groups: list, residual: Tensor, sweeps: int = 3, project: Callable | None = None,
                start: list | None = None) -> list:
    """Down projections [(d, P)] that make up for a layer's residual (He et al. 2017, arXiv:1707.06168).

    residual: (N, d) float32, dense minus compressed output; what is left of it stays in place.
    project(group, change (d, P)): the part of a change that the group can represent. start: [(d, P)] that
    the residual was taken with, where that is not the groups' own.
    Ridge regression in block Gauss-Seidel: a group fits what the others leave.
    """
    new = [down.float().clone() for down in start or (group.down for group in groups)]
    factors = {i: ridge_factor(group) for i, group in enumerate(groups) if len(group.h)}
    for _ in range(sweeps if len(groups) > 1 else 1):
        for i, (ridge, chol) in factors.items():
            group = groups[i]
            # towards the residual, and back towards where the group started
            drift = new[i] - group.down.float()  # (d, P)
            pull = (group.h.T @ residual[group.tokens].to(group.h.dtype)).float() - ridge * drift.T
            change = torch.cholesky_solve(pull, chol).T
            if project:
                change = project(group, change)
            # take what the change explains out of the residual
            new[i] += change
            residual[group.tokens] -= F.linear(group.h, change.to(group.h.dtype))
    return new


def refine_down_adapters(groups: list, factors: Factors, l: int, residual: Tensor) -> Tensor:
    """A (E, p, r) of layer l's downs, W^T = A X; residual as in refine_down."""
    fam = factors.families["down"]
    groups = [group for group in groups if group.rows]  # of one expert each
    X = fam.composed(l).to(residual.device, torch.float32)  # (E, r, d)
    L = spd_factor(X @ X.mT, 1e-6)

    # for given hidden activations the best A is the best W^T put orthogonally onto the rows of X
    def adapter(change: Tensor, row: int) -> Tensor:  # (d, p) -> (p, r)
        return torch.cholesky_solve(X[row] @ change, L[row]).mT

    def project(group: ExpertGroup, change: Tensor) -> Tensor:
        return (adapter(change, group.rows[0]) @ X[group.rows[0]]).mT

    A = fam.A[l].to(residual.device, torch.float32).clone()
    for group, down in zip(groups, refine_down(groups, residual, project=project)):
        row = group.rows[0]
        A[row] += adapter(down - group.down.float(), row) / fam.scale
    return A.to(fam.A[l].dtype)


# ---- All layers ----
def layer_call(walk: LayerWalk, l: int, x: Tensor) -> LayerCall:
    """Put x (N, T, d) through layer l, in place; what its routed experts did on the way."""
    parent, _, module = experts_modules(walk.model)[l]
    seen = []

    def record(_, args: tuple, kwargs: dict, y: Tensor) -> None:
        seen.append([t.flatten(0, -2) for t in (*(*args, *kwargs.values())[:3], y)])

    with module.register_forward_hook(record, with_kwargs=True):
        walk.advance([l], x)
    return LayerCall(parent, module, *map(torch.cat, zip(*seen)))


def layer_calls(walk: LayerWalk, windows: Tensor, layers: Iterable, progress: Callable) -> Iterator[tuple]:
    """(l, LayerCall) of those layers, one after the other, on windows (N, T) of token ids."""
    x = torch.empty(*windows.shape, walk.ckpt.dims.d, dtype=walk.dtype)
    walk.embed(windows, x)
    for l in progress(range(max(layers) + 1)):
        walk.fill([l])
        if l in layers:
            yield l, layer_call(walk, l, x)
        else:
            walk.advance([l], x)
        walk.empty([l])


def refine_layer(call: LayerCall, factors: Factors, l: int, fit: FitConfig, keep: Callable,
                 down: dict | None = None) -> dict:
    """Refine layer l in place; keep(name, tensor, dtype) puts what is new where it stays.

    down {l: (bits, weights)}: that downs are coded too, which puts the layer's codes in their place."""
    D = factors.dims
    families = factors.families
    # adapters in codes stay as they are
    adapt = fit.refine > 0 and not factors.coded() and not families.keys().isdisjoint(("gate", "up"))
    some = call
    if adapt:  # they need no more than some of the tokens
        step = max(1, call.index.numel() // (REFINE_TOKENS * D.d * D.experts))
        some = LayerCall(call.parent, call.module, call.x[::step], call.index[::step],
                         call.weight[::step], call.y[::step])
    groups, residual, size = expert_groups(some, factors, l, adapt, bool(down))
    before = float(residual.square().mean()) / size
    if adapt:
        old = {}
        for f, A in refine_adapters(groups, factors, l, some.x, residual, fit.refine).items():
            old[f] = families[f].A[l]
            families[f].A[l] = keep(f"{f}.{l}", A, A.dtype)
        del groups, residual  # room for the next
        groups, residual, size = expert_groups(call, factors, l, False)
        # back, where the step was too long
        if not float(residual.square().mean()) <= before * size:
            for f, A in old.items():
                families[f].A[l] = A
            del groups, residual
            groups, residual, size = expert_groups(call, factors, l, False)

    # down: its codes; its adapters where it was fitted; else the whole projections
    if down:
        down[l], dense = code_down(groups, residual, *down[l], fit.down)
        if dense and fit.down:
            parts = [W.unflatten(1, (-1, D.p)).transpose(0, 1) for W in dense]
            factors.down[l] = keep(f"down.{l}", torch.cat(parts))
    elif fit.down and "down" in families:
        A = refine_down_adapters(groups, factors, l, residual)
        families["down"].A[l] = keep(f"down.{l}", A, A.dtype)
    elif fit.down:
        parts = [down.unflatten(1, (-1, D.p)).transpose(0, 1) for down in refine_down(groups, residual)]
        factors.down[l] = keep(f"down.{l}", torch.cat(parts))  # (experts, d, p)
    after = float(residual.square().mean()) / size
    expect(math.isfinite(after),
           f"refinement: layer {l}: expected a finite error of the output, found {after}")
    return {"layer": l, "before": math.sqrt(before), "after": math.sqrt(after)}


# (windows that memory is enough for, the walk that puts them through the model)
def refine_walk(ckpt: Checkpoint, windows: Tensor, cfg: Config, device: torch.device) -> tuple:
    D = ckpt.dims
    dtype = with_gradients(as_dtype(cfg.calib.dtype) or ckpt.dtype)
    walk = LayerWalk(ckpt, device, compute_dtype(dtype, device), min(cfg.calib.batch, len(windows)))
    # tokens whose hidden activations and slopes, inputs and outputs fit into half of the free memory
    each = walk.dtype.itemsize * (3 * D.p * (D.top_k + D.shared) + 5 * D.d) + 16 * D.d
    free = min(free_memory(device), free_memory(torch.device("cpu")))
    most = max(1, int(free / 2 / each / windows.shape[1]))
    return windows[::math.ceil(len(windows) / most)], walk


# The fit counts each row of gate and up by itself; this counts how errors cancel or add up in a token's
# output. Inputs are the dense model's.
@torch.no_grad()
def refine(ckpt: Checkpoint, factors: Factors, windows: Tensor, cfg: Config, device: torch.device,
           scratch: Path | None = None, progress: Callable = lambda it: it, down: dict | None = None) -> list:
    """Refine, in place, each layer's adapters of gate and up, then its down projections, by its output.

    windows: (N, T) token ids. scratch: a directory for what is new, which may not fit in memory. down: as
    of refine_layer.
    Returns [{"layer", "before", "after"}], relative errors of the output; in front of them
    {"windows": n, "of": N} where memory was enough for n only. UserError where one is not finite.
    """
    def keep(name: str, t: Tensor, dtype: torch.dtype = ckpt.dtype) -> Tensor:
        return t.to("cpu", dtype) if scratch is None else on_disk(scratch / name, t.shape, dtype).copy_(t)

    some, walk = refine_walk(ckpt, windows, cfg, device)
    rows = []
    if len(some) < len(windows):
        rows.append({"windows": len(some), "of": len(windows)})

    for l, call in layer_calls(walk, some, factors.experts, progress):
        rows.append(refine_layer(call, factors, l, cfg.fit, keep, down))
    return rows


# ---- Packed codes: a basis per layer, bits by reverse water-filling, a trellis code ----
# Mean square error of a Gaussian of mean square 1 in each of WIDTHS, measured.
CODE_ERROR = (1.0, 0.2808, 0.0803, 0.0222, 0.00598, 0.00157, 0.00041)
# Rows of a layer fall into classes, each of half the weighted energy of the one before.
CLASSES = 16
# Damping of the metric of an expert's down.
CODE_RIDGE = 0.01
# Of the calibration text, by which bank.basis=auto chooses.
AUTO_WINDOWS = 16
# Rows by which a layer's axes are found, over hidden_size.
AXES_ROWS = 32
# Columns whose errors go into each other at once, and into all behind them by one product.
COLUMNS_AT_ONCE = 64


def trellis_encode(x: Tensor, width: Tensor, weight: Tensor) -> Tensor:
    """States (n, T) int16 of the levels nearest to the sequences x (n, T): Viterbi's algorithm.

    A state has the last nine trellis bits, the newest lowest, and above them the other bits of its own.
    width (n, T) uint8: bits of each; without any the trellis stays, and the state is 0.
    weight (n, T): of the squared errors."""
    told = x, width, weight, trellis_levels().to(x.device), trellis_subsets().to(x.device)
    # step by step an accelerator is slower than the CPU
    if native("trellis_encode", "cpu"):
        return torch.ops.globe.trellis_encode(*(t.cpu().contiguous() for t in told)).to(x.device)
    return trellis_torch(*told)


# The torch twin of globe::trellis_encode
def trellis_torch(x: Tensor, width: Tensor, weight: Tensor, levels: Tensor, subsets: Tensor) -> Tensor:
    cost = x.new_full((len(x), 256), math.inf)
    cost[:, 0] = 0
    before = torch.arange(512, device=x.device) >> 1
    steps = []
    for t in range(x.shape[1]):
        # of each subset of the levels the nearest
        levels_of = levels[width[:, t].long()].unflatten(1, (-1, 4))
        distance, nearest = (x[:, t, None, None] - levels_of).square().min(1)
        step = weight[:, t, None] * distance
        # two states lead to each: the trellis bit that leaves the window tells them apart
        least, lost = (cost[:, before] + step[:, subsets]).unflatten(1, (2, 256)).min(1)
        cost = torch.where(width[:, t, None] > 0, least, cost)
        steps.append((lost, nearest))
    # back from the cheapest end
    state = cost.argmin(-1, keepdim=True)
    states = []
    for t in reversed(range(x.shape[1])):
        lost, nearest = steps[t]
        window = lost.gather(1, state) << 8 | state
        more = nearest.gather(1, subsets[window])
        coded = width[:, t, None] > 0
        states.append(torch.where(coded, window | more << 9, 0).to(torch.int16))
        state = torch.where(coded, window >> 1, state)
    return torch.cat(states[::-1], 1)


# What states stand for, at widths of the same shape
def trellis_value(states: Tensor, width: Tensor) -> Tensor:
    states = states.long()
    number = trellis_subsets().to(states.device)[states & 511] | states >> 9 << 2
    return trellis_levels().to(states.device)[width.long(), number]


# What unpack undoes: bytes of the states (columns, rows) of a matrix, at widths (rows, B)
def packed(states: Tensor, width: np.ndarray) -> bytes:
    own = (states & 1 | states >> 9 << 1).to("cpu", torch.uint8).numpy()
    parts = []
    for b in range(width.shape[1]):
        block = own[b * CODE_BLOCK:(b + 1) * CODE_BLOCK]
        for i in range(width[0, b]):
            bits = block[:, :(width[:, b] > i).sum()] >> i & 1
            parts.append(np.packbits(bits, 1, "little").T.tobytes())
    return b"".join(parts)


# (n, p, columns) -> (n, p, B, CODE_BLOCK), the last block filled up with zeros
def blocks_of(y: Tensor) -> Tensor:
    return F.pad(y, (0, -y.shape[-1] % CODE_BLOCK)).unflatten(-1, (-1, CODE_BLOCK))


class Coordinates(NamedTuple):
    """A layer's n matrices as they are coded: W = y X, or y is W with its columns in order."""
    basis: str            # identity | orthonormal | rotation
    y: Tensor             # (n, p, c)
    weights: Tensor       # (n, p) of the squared errors of a row
    X: Tensor | None      # (c, d), of the identity none
    order: Tensor | None  # (n, c), of the identity
    U: Tensor | None      # (1 or n, c, c) upper factor of H^-1 = U^T U, H being errors' metric; None: H is I
    V: Tensor | None = None  # (n, c, p) U u of each row's own mean input u, which makes its metric H + u u^T


def feedback(H: Tensor) -> Tensor:
    """U (n, c, c) upper triangular with H^-1 = U^T U (Frantar et al. 2023, arXiv:2210.17323)."""
    # with the columns turned round, a lower factor of H is an upper one: no inverse of H itself is formed
    L = torch.linalg.cholesky(H.double().flip(-1, -2)).flip(-1, -2)  # H = L L^T, L upper
    eye = torch.eye(H.shape[-1], dtype=L.dtype, device=L.device)
    return torch.linalg.solve_triangular(L, eye.expand_as(L), upper=True).float()


def principal_axes(W: Tensor, weights: Tensor, L: Tensor) -> Tensor:
    """(d, d) axes of the rows of W L (n, p, d), weighted by weights (n, p), by rising energy."""
    # of so many rows every n-th tells as much
    some = slice(None, None, max(1, weights.numel() // (AXES_ROWS * len(L))))
    rows = W.flatten(0, 1)[some] @ L
    moment = (rows * weights.reshape(-1, 1)[some]).T @ rows
    return torch.linalg.eigh(moment.double())[1].float()


def orthonormal(W: Tensor, weights: Tensor, L: Tensor, Q: Tensor) -> Coordinates:
    """In a layer's own basis Q^T L^-1, with Q (d, d) orthogonal."""
    X = torch.linalg.solve_triangular(L, Q.T, upper=False, left=False)
    return Coordinates("orthonormal", W @ (L @ Q), weights, X, None, None)


def rotated(W: Tensor, weights: Tensor, L: Tensor, R: Tensor) -> Coordinates:
    """In the coordinates R (d, d) that all layers share; errors' metric is R^T L L^T R."""
    M = R.T @ L
    return Coordinates("rotation", W @ R, weights, R.T, None, feedback(M @ M.T)[None])


def in_order(W: Tensor, weights: Tensor, H: Tensor) -> Coordinates:
    """As W (n, p, c) is, columns by rising energy in the metric H (1 or n, c, c): cheap ones first."""
    # what each column alone adds to the error where it is left out
    energy = W.square().sum(1) * H.diagonal(dim1=1, dim2=2)
    order = energy.argsort(-1)  # (n, c)
    # the metric with its rows and columns in that order
    each = order[:, None].expand_as(W)
    H = H.expand(len(W), -1, -1)
    H = H.gather(1, order[:, :, None].expand_as(H)).gather(2, order[:, None].expand_as(H))
    return Coordinates("identity", W.gather(2, each), weights, None, order, feedback(H))


@dataclass
class Spectrum:
    """What bits are shared out by: mean squares by class of rows and block of columns."""
    kind: Tensor     # (n, p) class of each row
    count: Tensor    # (K,) rows of each class
    energy: Tensor   # (K, B) mean square
    weight: Tensor   # (K, B) the same, each row's and column's by what an error there costs
    block_bits: int  # beside the codes: of a block's rows of the basis, or its columns' places
    tables: int = 1  # families that each have a width and a scale by class and block


def spectrum(c: Coordinates, tables: int = 1) -> Spectrum:
    """The Spectrum of a layer's matrices; tables: families that they belong to."""
    squares = blocks_of(c.y.square())
    # what an error costs that the columns behind it make up for
    costs = squares
    if c.U is not None:
        costs = squares * blocks_of(c.U.diagonal(dim1=1, dim2=2) ** -2)[:, None].mean(-1, keepdim=True)
    squares = squares.mean(-1).flatten(0, 1)  # (n p, B)
    costs = costs.mean(-1).flatten(0, 1) * c.weights.reshape(-1, 1)

    # classes by what eight like rows weigh, in factors of two; the last one has all that is less
    total, order = costs.sum(-1).view(c.weights.shape).sort(-1, descending=True)
    total = total[:, ::8].repeat_interleave(8, 1)[:, :order.shape[1]]
    level = (total.max().clamp_min(1e-30) / total.clamp_min(1e-38)).log2()
    level = torch.empty_like(level).scatter_(1, order, level).flatten()
    found, kind = level.long().clamp_max(CLASSES - 1).unique(return_inverse=True)
    belongs = F.one_hot(kind, len(found)).float().T  # (K, n p)
    count = belongs.sum(1)
    share = belongs / count.clamp_min(1)[:, None]
    # the last rows, fewer than eight, take as many bits as eight
    n, p, d = c.y.shape
    count += (-p % 8) * F.one_hot(kind.view(n, p).amax(1), len(found)).sum(0)

    block_bits = {"orthonormal": CODE_BLOCK * (8 * d + 16 * math.ceil(d / 64)),
                  "identity": 16 * CODE_BLOCK * n, "rotation": 0}[c.basis]
    return Spectrum(kind.view(c.weights.shape), count, share @ squares, share @ costs, block_bits, tables)


# bits stored of a layer at widths (K, B): codes; blocks; each row's class and scale; by class and block a
# width and a scale
def stored_bits(s: Spectrum, width: Tensor) -> float:
    used = max(1, int((width > 0).any(0).sum()))
    codes = CODE_BLOCK * float((s.count[:, None] * width).sum())
    codes += 64 * (len(s.kind) + s.tables)  # and where each matrix' begin
    return codes + s.block_bits * used + 16 * s.kind.numel() + 24 * s.tables * len(s.count) * used


def share_bits(spectra: dict, bits: float) -> dict:
    """{key: widths (K, B)} of the least weighted error, where all that is stored is at most `bits` in number.

    Reverse water-filling over classes, columns and layers (Cover and Thomas, section 10.3): every block takes
    the width at which another bit would gain less than a price. UserError where not even zeros fit.
    """
    errors = torch.tensor(CODE_ERROR, dtype=torch.float64)
    widths = torch.tensor(WIDTHS)

    def at_price(price: float) -> tuple:
        chosen = {}
        for key, s in spectra.items():
            numbers = CODE_BLOCK * s.count.double()[:, None, None]
            cost = numbers * (s.weight.double()[..., None] * errors + price * widths)  # (K, B, widths)
            best, choice = cost.min(-1)
            # a block pays for its rows of the basis too
            gain = (cost[..., 0] - best).sum(0)
            choice[:, gain <= price * s.block_bits] = 0
            # no more in a later class
            choice = choice.cummin(0)[0]
            chosen[key] = widths[choice]
        return sum(stored_bits(s, chosen[key]) for key, s in spectra.items()), chosen

    least = at_price(2.0 ** 300)[0]
    expect(least <= bits, f"bank.bits: expected {least / bits:.3g} times as many at least, for scales alone")
    # the price by bisection of its logarithm
    low, high = -300.0, 300.0
    for _ in range(60):
        middle = (low + high) / 2
        if at_price(2.0 ** middle)[0] > bits:
            low = middle
        else:
            high = middle
    stored, chosen = at_price(2.0 ** high)
    # what is left goes to the layers for which it is enough
    for key, width in at_price(2.0 ** low)[1].items():
        more = stored_bits(spectra[key], width) - stored_bits(spectra[key], chosen[key])
        if stored + more <= bits:
            stored += more
            chosen[key] = width
    return chosen


# 256 log2 of scales, as they are stored, and what that stands for
def log_scale(scale: Tensor) -> tuple:
    # a scale that has been through this comes out as it was
    stored = (256 * scale.clamp_min(1e-30).log2() - 0.001).ceil().clamp(-2 ** 15, 2 ** 15 - 1).to(torch.int16)
    return stored, (stored.float() / 256).exp2()


# Scales of groups X (rows, 64) in steps -most to most, as stored, and what that stands for
def group_scale(X: Tensor, bits: int, most: int) -> tuple:
    largest = X.abs().amax(1)
    best = log_scale(largest / most)
    if bits == 4:
        # finer steps, beyond which the largest numbers are cut off, may err less
        least = torch.full_like(largest, math.inf)
        for part in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
            trial, scale = log_scale(largest * part / most)
            steps = (X / scale[:, None]).round().clamp(-most, most)
            error = (steps * scale[:, None] - X).square().sum(1)
            best = trial.where(error < least, best[0]), scale.where(error < least, best[1])
            least = least.minimum(error)
    return best


def code_groups(X: Tensor, bits: int = 8, U: Tensor | None = None) -> tuple:
    """(codes, scale) of X (rows, columns) in 8 bits, or 4 of an even number: decode_groups undoes it.

    U (columns, columns): of a metric, as of feedback; columns make up for errors of those before them."""
    X = X.float().clone()
    codes = torch.empty_like(X, dtype=torch.int8)
    stored = []
    most = 2 ** (bits - 1) - 1
    for start in range(0, X.shape[1], 64):
        group = X[:, start:start + 64]
        stop = start + group.shape[1]
        kept, scale = group_scale(group, bits, most)
        stored.append(kept)
        if U is None:
            codes[:, start:stop] = (group / scale[:, None]).round().clamp(-most, most)
            continue
        errors = torch.empty_like(group)
        for j in range(start, stop):
            steps = (X[:, j] / scale).round().clamp(-most, most)
            codes[:, j] = steps
            # at once within the group, then all columns behind
            error = (X[:, j] - steps * scale) / U[j, j]
            errors[:, j - start] = error
            X[:, j + 1:stop] -= error[:, None] * U[j, j + 1:stop]
        X[:, stop:] -= errors @ U[start:stop, stop:]
    if bits == 4:
        even, odd = (codes + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
        codes = even | odd << 4
    return codes, torch.stack(stored, 1)


def code(c: Coordinates, s: Spectrum, width: Tensor) -> tuple:
    """({kind of tensor: tensor}, [each matrix' codes], what is decoded (n, p, c)) at widths (K, B).

    Columns are coded one after the other, each with what those before it lost (GPTQ). Within one, rows share
    a path through the trellis, which weighs their errors, and so gives bits to rows that need them.

    Errors f = e U^-1 cost |f|^2 + (f V)^2. Where f V has come to `missed`, the columns that are left would
    best miss their own values by -missed V / (1 + |V|^2), of their V alone: each aims there."""
    of = s.kind.long()  # (n, p)
    narrow = width.to(torch.uint8)
    y = blocks_of(c.y).flatten(2).transpose(1, 2).contiguous()  # (n, columns, p)
    n, columns, p = y.shape
    order = of.argsort(dim=1, stable=True)
    place = order.argsort(1)

    # a row's scale: what is left of its own beside its class'
    squares = y.square().unflatten(1, (-1, CODE_BLOCK)).mean(2).transpose(1, 2)  # (n, p, B)
    own = width[of] > 0
    squares = (squares / s.energy[of].clamp_min(1e-30) * own).sum(-1) / own.sum(-1).clamp_min(1)
    row = (128 + 4 * squares.clamp_min(1e-30).log2()).round().clamp(0, 255).to(torch.uint8)
    row_scale = ((row.float() - 128) / 8).exp2()  # (n, p)

    column = torch.zeros_like(width, dtype=torch.int16)
    states = torch.zeros(n, columns, p, dtype=torch.int16, device=y.device)
    belongs = F.one_hot(of.flatten(), len(width)).float().T  # (K, n p)
    belongs /= belongs.sum(1, keepdim=True).clamp_min(1)
    V = c.V
    if V is None:
        V = torch.zeros_like(y)
    unit = torch.ones(1, columns, device=y.device)
    if c.U is not None:
        unit = c.U.diagonal(dim1=1, dim2=2)
    missed = torch.zeros(n, p, device=y.device)
    left = 1 + V.square().sum(1)  # (n, p)
    for start in range(0, c.y.shape[2], COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, c.y.shape[2])
        errors = torch.zeros(n, stop - start, p, device=y.device)
        for j in range(start, stop):
            # a class' scale in a block: by its energy at its turn and by the width
            if j % CODE_BLOCK == 0:
                b = j // CODE_BLOCK
                bits = narrow[:, b][of]
                block = y[:, j:j + CODE_BLOCK].square().mean(1) / row_scale.square()
                energy = belongs @ block.flatten()  # (K,)
                column[:, b], size = log_scale(energy.sqrt())
                scale = size[of] * row_scale
                weight = c.weights * scale.square()
                weight /= weight.amax(1, keepdim=True).clamp_min(1e-38)
            error = y[:, j].clone()
            aim = missed * V[:, j] / left * unit[:, j, None]
            behind = (left - V[:, j].square()).clamp_min(1)
            if bits.any():
                told = (y[:, j] - aim) / scale, bits, weight * left / behind
                states[:, j] = trellis_encode(*(t.gather(1, order) for t in told))
                error -= trellis_value(states[:, j].gather(1, place), bits) * scale
            y[:, j] -= error
            error /= unit[:, j, None]
            missed -= V[:, j] * error
            left = behind
            if c.U is None:
                continue
            # the columns behind make up for it: at once within these, then all others
            errors[:, j - start] = error
            y[:, j + 1:stop] -= c.U[:, j, j + 1:stop, None] * error[:, None]
        if c.U is not None:
            y[:, stop:c.y.shape[2]] -= c.U[:, start:stop, stop:].mT @ errors

    codes = [packed(states[i], narrow[of[i, order[i]]].cpu().numpy()) for i in range(n)]
    tensors = {"kind": s.kind.to(torch.uint8), "row": row, "width": narrow, "column": column}
    return tensors, codes, y[:, :c.y.shape[2]].transpose(1, 2)


# (c,) the columns that are stored: those of blocks with codes, at least one; all of a basis that layers share
def stored_columns(c: Coordinates, width: Tensor) -> Tensor:
    used = (width > 0).any(0)
    used[-1] |= not used.any()
    return (used | (c.basis == "rotation")).repeat_interleave(CODE_BLOCK)[:c.y.shape[2]]


# of code()'s results CodedFamily.layers[l] of one family, whose experts are that part
def coded_layer(c: Coordinates, tensors: dict, codes: list, part: slice) -> dict:
    columns = stored_columns(c, tensors["width"])
    blocks = columns[::CODE_BLOCK]
    layer = {"codes": torch.from_numpy(np.frombuffer(b"".join(codes[part]), np.uint8).copy())}
    for key in ("kind", "row"):
        layer[key] = tensors[key][part].cpu()
    for key in ("width", "column"):
        layer[key] = tensors[key][:, blocks].cpu()
    layer["places"] = code_places(layer["kind"], layer["width"])
    if c.basis == "identity":
        layer["order"] = c.order[part][:, columns].to("cpu", torch.int16)
    return layer


class CodeData:
    """The matrices of gate and up in the coordinates of a basis, for the codes.

    read(family, l, expert) -> W (p, d); metrics {family: as of metric_of}, or none: errors count alike."""

    def __init__(self, experts: dict, read: Callable, metrics: dict, device: torch.device, basis: str):
        self.experts = experts
        self.read = read
        self.left = {family: metric["left"] for family, metric in metrics.items()}
        self.right = next(iter(metrics.values()))["right"] if metrics else {}
        self.means = {family: metric["means"] for family, metric in metrics.items() if metric.get("means")}
        self.device = device
        self.basis = basis
        self.axes = {}  # {(job, l): (d, d)}, an eigendecomposition each
        if basis == "rotation":
            # eigenvectors of the mean moment of all layers' inputs
            C = sum(L.double() @ L.double().T for L in map(self.right.__getitem__, experts))
            self.R = torch.linalg.eigh(C)[1].float()

    def coordinates(self, job: tuple, l: int) -> Coordinates:
        """Of the experts of a job's families in layer l, family behind family."""
        W = []
        weights = []
        for family, e in itertools.product(job, self.experts[l]):
            W.append(self.read(family, l, e).to(self.device, torch.float32))
            S = self.left.get(family, {}).get((l, e), torch.ones(len(W[-1]), device=self.device))
            weights.append(S.square())
        W = torch.stack(W)
        weights = torch.stack(weights)
        L = self.right[l] if self.right else torch.eye(W.shape[2], device=W.device)
        if self.basis == "orthonormal":
            if (job, l) not in self.axes:
                self.axes[job, l] = principal_axes(W, weights, L)
            return orthonormal(W, weights, L, self.axes[job, l])
        if self.basis == "rotation":
            return rotated(W, weights, L, self.R)
        return in_order(W, weights, (L @ L.T)[None])

    def mean_inputs(self, job: tuple, l: int, c: Coordinates) -> Tensor | None:
        """Coordinates.V of what coordinates() gave."""
        if not self.means:
            return None
        n, p, columns = c.y.shape
        V = c.y.new_empty(n, columns, p)
        for i, (family, e) in enumerate(itertools.product(job, self.experts[l])):
            u = self.means[family](l, e).to(V).T  # (d, p)
            u = c.X @ u if c.order is None else u[c.order[i]]
            if c.U is not None:
                u = c.U[i % len(c.U)] @ u
            V[i] = u
        return V


def code_families(job: tuple, data: CodeData, widths: dict,
                  progress: Callable = lambda it: it) -> Iterator[dict]:
    """Code the families of a job, which share a basis, at widths {l: (K, B)}: a row per layer; the last has
    "families"."""
    bases = {}
    of = {}
    layers = {family: {} for family in job}
    for step, (l, experts) in enumerate(progress(data.experts.items()), 1):
        c = data.coordinates(job, l)
        c = c._replace(V=data.mean_inputs(job, l, c))
        tensors, codes, _ = code(c, spectrum(c), widths[l])
        n = len(experts)
        for i, family in enumerate(job):
            layers[family][l] = coded_layer(c, tensors, codes, slice(i * n, i * n + n))
        of[l] = None
        if c.X is not None:
            whose = {"orthonormal": l}.get(c.basis, "all")
            of[l] = f"{job[0]}_{whose}"
            bases[of[l]] = tuple(t.cpu() for t in code_groups(c.X[stored_columns(c, widths[l])]))
        bits = 8 * sum(map(len, codes)) / c.y.numel()
        yield {"step": step, "layer": l, "basis": c.basis, "bits": bits}
    d = c.y.shape[2]
    yield {"families": {family: CodedFamily(family, d, of, bases, layers[family]) for family in job}}


# ---- Down in codes: each expert's columns in the metric of its own hidden activations ----
# H (p, p) of an expert at work, damped and with more of its diagonal where few tokens came
def hidden_metric(group: ExpertGroup, tokens: int) -> Tensor:
    n, P = group.h.shape
    H = hidden_gram(group) / tokens
    # of few tokens only the diagonal can be told from chance
    few = P / (P + n)
    H = torch.lerp(H, H.diagonal().diag(), few)
    return H + (CODE_RIDGE * H.diagonal().mean() + 1e-20) * torch.eye(P, device=H.device)


def down_spectra(ckpt: Checkpoint, experts: dict, windows: Tensor, weights: dict, cfg: Config,
                 device: torch.device, progress: Callable = lambda it: it) -> dict:
    """{l: Spectrum} of the downs of experts {l: [expert]} at work; weights {l: (n, d)} of errors by row."""
    some, walk = refine_walk(ckpt, windows, cfg, device)
    found = {}
    for l, call in layer_calls(walk, some, experts, progress):
        W = []
        H = []
        for e in experts[l]:
            shared = e >= ckpt.dims.experts
            group = shared_group(call, [e], ckpt.dims) if shared else routed_group(call, [e])
            group.activate(call.module, call.x, False)
            H.append(hidden_metric(group, len(call.x)))
            W.append(group.down.float())
        found[l] = spectrum(in_order(torch.stack(W), weights[l], torch.stack(H)))
    return found


def code_down(groups: list, residual: Tensor, bits: float, weights: Tensor, solve: bool) -> tuple:
    """(CodedFamily.layers[l] of a layer's downs, [(d, P)] of the groups that stay dense).

    groups: ExpertGroup of one expert each, those with `rows` are coded; residual as in refine_down, what is
    left of it stays in place; bits: stored at most; weights (n, d) of errors by row."""
    tokens = len(residual)
    new = refine_down(groups, residual) if solve else [group.down.float().clone() for group in groups]
    coded = [i for i, group in enumerate(groups) if group.rows]
    H = torch.stack([hidden_metric(groups[i], tokens) for i in coded])
    c = in_order(torch.stack([new[i] for i in coded]), weights, H)
    s = spectrum(c)
    width = share_bits({0: s}, bits)[0]

    tensors, codes, y = code(c, s, width)
    coded_W = torch.empty_like(y).scatter_(2, c.order[:, None].expand_as(y), y)

    # what stays dense makes up for what the codes lose
    for i, W in zip(coded, coded_W):
        group = groups[i]
        residual[group.tokens] -= F.linear(group.h, (W - new[i]).to(group.h.dtype))
    left = [i for i in range(len(groups)) if i not in coded]
    dense = [new[i] for i in left]
    if solve and left:
        dense = refine_down([groups[i] for i in left], residual, 1, start=dense)
    return coded_layer(c, tensors, codes, slice(None)), dense


# ======== 12. Factors file; patch, assemble, exports, card ============================================
# Never touches: fitting.
# ---- the factors file --------------------------------------------------------------------------------
def save_factors(factors: Factors, path: Path) -> None:
    """Write factors.safetensors: whole or not at all, one tensor in memory at a time."""
    # what is in memory, and what is read when it is written
    tensors, shapes, lazy = {}, {}, {}
    for name, f in factors.families.items():
        if isinstance(f, CodedFamily):
            tensors |= f.tensors()
            continue
        if not f.owner:
            tensors |= {f"bank.{name}.{g}": B for g, B in enumerate(f.bank)}
        first = next(iter(f.A.values()))
        for l in f.A:
            tensors |= {f"layers.{l}.{name}.idx": f.idx[l], f"layers.{l}.{name}.val": f.val[l]}
            shapes[f"layers.{l}.{name}.A"] = (first.dtype, (len(f.val[l]), *first.shape[1:]))
            lazy[f"layers.{l}.{name}.A"] = functools.partial(f.A.__getitem__, l)
    # healed norms and refined downs stand in the source's place
    tensors |= {f"norm.{name}": t for name, t in factors.norms.items()}
    tensors |= {f"layers.{l}.down": t for l, t in factors.down.items()}
    for name, (codes, scale) in factors.rest.items():
        tensors |= {f"rest.{name}": codes, f"rest.{name}.scale": scale}
    shapes |= {name: (t.dtype, t.shape) for name, t in tensors.items()}
    about = {"globe": json.dumps(factors.meta(), sort_keys=True)}
    write_tensors(path, shapes, collections.ChainMap(tensors, LazyDict(lazy)), about)


# {name: shape} of what a factors file of this description holds, besides norms and refined downs
def tensor_shapes(meta: dict) -> dict:
    D = dims_from(meta)
    out = {}
    for name, f in meta["families"].items():
        for l, layer in f.get("layers", {}).items():
            rows = D.d if name == "down" else D.p
            for key, (shape, _) in code_shapes(layer, len(meta["experts"][l]), rows).items():
                out[f"layers.{l}.{name}.{key}"] = shape
            for key, (shape, _) in basis_shapes(layer, D.d).items():
                out[f"basis.{key}".replace("_scale", ".scale")] = shape
        if "code" in f:
            continue
        # a bank is stored once, under the family that owns it
        if f["bank"] == name:
            for g in range(f["groups"]):
                out[f"bank.{name}.{g}"] = (f["m"], f["r"], D.d)
        for l, experts in meta["experts"].items():
            out[f"layers.{l}.{name}.A"] = (len(experts), D.p, f["r"])
            out[f"layers.{l}.{name}.idx"] = (len(experts), f["s"])
            out[f"layers.{l}.{name}.val"] = (len(experts), f["s"])
    return out


def load_factors(path: Path | str) -> Factors:
    """Read and validate factors: `path` is a run directory or the file itself. Tensors are memory-mapped.

    UserError: no such file, not safetensors, another format version, a tensor missing, extra or of a wrong
    shape, an index outside the bank.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "factors.safetensors"
    meta, tensors = read_factors(path)
    take = functools.partial(take_tensor, path, tensors)
    taken = {name: take(name, shape) for name, shape in tensor_shapes(meta).items()}
    # in the order of a fit; JSON's keys are text, 10 before 2
    layers = sorted(map(int, meta["experts"]))
    families = {}
    for name in FAMILIES:
        if name in meta["families"]:
            make = coded_family_from if "code" in meta["families"][name] else family_from
            families[name] = make(meta["families"][name], name, layers, taken, path)
    experts = {l: meta["experts"][str(l)] for l in layers}
    factors = Factors(families, experts, dims_from(meta), meta["model_type"], meta["fingerprint"],
                      meta.get("config", {}))

    # what healing and refinement put in the source's place
    for name in sorted(n for n in tensors if n.startswith("norm.")):
        t = finite(tensors.pop(name), name, path)
        expect(t.ndim == 1 and t.dtype == torch.float32,
               f"{path}: {name}: expected float32 (n,), found {t.dtype} {tuple(t.shape)}")
        factors.norms[name.removeprefix("norm.")] = t
    for name, bits in meta.get("rest", {}).items():
        factors.rest[name] = take_rest(path, tensors, name, bits)
    for l in layers:
        if f"layers.{l}.down" in tensors and (factors.coded() or "down" not in families):
            wanted = (len(factors.refined(l)), factors.dims.d, factors.dims.p)
            factors.down[l] = finite(take(f"layers.{l}.down", wanted), f"layers.{l}.down", path)
    if tensors:
        raise UserError(f"{path}: {sorted(tensors)[0]}: not expected (and {len(tensors) - 1} more)")
    return factors


# (description, {name: tensor}) of a factors file, the description checked
def read_factors(path: Path) -> tuple:
    expect(path.is_file(), f"{path}: expected a factors file, found none (is the fit finished?)")
    # the header first, then the tensors, which stay on the disk until they are used
    kinds = (SafetensorError, OSError, ValueError, RecursionError)
    with expecting(f"{path}: expected a factors file", *kinds, file=path):
        with safe_open(path, "pt") as f:
            text = (f.metadata() or {}).get("globe")
        expect(text, f"{path}: expected a factors file, found safetensors without a globe description")
        meta = json.loads(text)
        tensors = load_file(path)
    return check_meta(meta, str(path)), tensors


# what the last part of a tensor's name says of its dtype; all others are floating point
INTEGERS = {"idx": torch.int32, "codes": torch.uint8, "kind": torch.uint8, "row": torch.uint8,
            "width": torch.uint8, "column": torch.int16, "places": torch.int64, "order": torch.int16,
            "scale": torch.int16}


# That tensor, taken out of `tensors`; UserError where it is missing or of another shape or kind
def take_tensor(path: Path, tensors: dict, name: str, shape: tuple) -> Tensor:
    t = tensors.pop(name, None)
    found = "none" if t is None else tuple(t.shape)
    expect(found == shape, f"{path}: {name}: expected {shape}, found {found}")
    kind = INTEGERS.get(name.rpartition(".")[2], torch.int8 if name.startswith("basis.") else None)
    if name.startswith("rest.") and not kind:
        kind = t.dtype  # take_rest has checked it
    if kind:
        expect(t.dtype == kind, f"{path}: {name}: expected {kind}, found {t.dtype}".replace("torch.", ""))
    else:
        fine = t.is_floating_point() and t.itemsize > 1
        expect(fine, f"{path}: {name}: expected float32, float16 or bfloat16, found {t.dtype}")
    return t


# (codes, scale) of a layer outside the experts, whatever its shape: it must fit the model's
def take_rest(path: Path, tensors: dict, name: str, bits: int) -> tuple:
    codes = tensors.get(f"rest.{name}", torch.empty(0))
    kind = {8: torch.int8, 4: torch.uint8}[bits]
    expect(codes.ndim == 2 and codes.dtype == kind, f"{path}: rest.{name}: expected {kind} (rows, bytes), "
           f"found {codes.dtype} {tuple(codes.shape)}".replace("torch.", ""))
    shapes = group_shapes(f"rest.{name}", len(codes), codes.shape[1] * 8 // bits, bits)
    return tuple(take_tensor(path, tensors, key.replace("_scale", ".scale"), shape)
                 for key, (shape, _) in shapes.items())


# One family's factors from its description f and the tensors of the file
def family_from(f: dict, name: str, layers: list, taken: dict, path: Path) -> FamilyFactors:
    A, idx, val = {}, {}, {}
    for l in layers:
        A[l] = taken[f"layers.{l}.{name}.A"]
        idx[l] = taken[f"layers.{l}.{name}.idx"]
        val[l] = finite(taken[f"layers.{l}.{name}.val"], f"layers.{l}.{name}.val", path)
        low, high = int(idx[l].min()), int(idx[l].max())
        expect(0 <= low and high < f["m"],
               f"{path}: layers.{l}.{name}.idx: expected indices in [0, {f['m']}), found {low}..{high}")
    # families that share a bank get the same tensors
    bank = [taken[f"bank.{f['bank']}.{g}"] for g in range(f["groups"])]
    group = {int(l): g for l, g in f["group"].items()}
    factors = FamilyFactors(bank, A, idx, val, group, f["activation"], f["shift"], f["scale"])
    if f["bank"] != name:
        factors.owner = f["bank"]
    return factors


# One family's packed codes from its description f and the tensors of the file
def coded_family_from(f: dict, name: str, layers: list, taken: dict, path: Path) -> CodedFamily:
    of, bases, codes = {}, {}, {}
    for l in layers:
        about = f["layers"][str(l)]
        of[l] = about["of"]
        if of[l]:
            bases[of[l]] = taken[f"basis.{of[l]}"], taken[f"basis.{of[l]}.scale"]
        codes[l] = {key: taken[f"layers.{l}.{name}.{key}"] for key in code_shapes(about, 1, 1)}
        wrong = code_problem(codes[l], f["columns"])
        expect(not wrong, f"{path}: layers.{l}.{name}: {wrong}")
    return CodedFamily(name, f["columns"], of, bases, codes)


def check_fingerprint(factors: Factors, ckpt: Checkpoint) -> None:
    want = factors.fingerprint
    found = ckpt.fingerprint()
    expect(want == found or want == ckpt.old_fingerprint(),
           f"{ckpt.dir}: expected the checkpoint that the factors were fitted to (fingerprint {want}), found "
           f"another ({found})")


# ---- into a model: convert, then put the tensors in place --------------------------------------------
# Banks, adapters and mixtures into a converted model; mixtures stay float32, for they are few
def assign_factors(model: nn.Module, factors: Factors, device: torch.device, dtype: torch.dtype) -> None:
    # {layer: name of its experts module}
    at = {module.layer: name for name, module in model.named_modules() if isinstance(module, GlobeExperts)}
    for name, (codes, scale) in factors.rest.items():
        assign(model, f"{name}.weight", codes.to(device))
        assign(model, f"{name}.weight_scale", scale.to(device))
    for name, f in factors.families.items():
        if isinstance(f, CodedFamily):
            for key, (basis, scale) in f.bases.items():
                assign(model, f"globe_bank.{key}", basis.to(device))
                assign(model, f"globe_bank.{key}_scale", scale.to(device))
            for l, layer in f.layers.items():
                for key, t in layer.items():
                    assign(model, f"{at[l]}.{name}_{key}", t.to(device))
            continue
        if not f.owner:
            for g, B in enumerate(f.bank):
                assign(model, f"globe_bank.{name}_{g}", B.to(device, dtype))
        for l in f.A:
            assign(model, f"{at[l]}.{name}_A", f.A[l].to(device, dtype))
            assign(model, f"{at[l]}.{name}_val", f.val[l].to(device))
            assign(model, f"{at[l]}.{name}_idx", f.idx[l].to(device))


def put_dense(model: nn.Module, factors: Factors, layers: Iterable | None = None, keep: bool = False) -> list:
    """Put healed norms and refined down projections in place, as tensors of their own.

    layers: of these alone, and no norms. Returns [(module, key, what stood in its place)] with keep, else [].
    """
    old = []

    def put(module: nn.Module, key: str, change: Callable[[Tensor], Tensor]) -> None:
        before = getattr(module, key).detach()
        if keep:
            old.append((module, key, before))
        assign(module, key, change(before))

    weights = dict(model.named_parameters())
    norms = factors.norms
    if layers is not None:
        norms = {}
    for name, t in norms.items():
        # a model without its head has shorter names
        if name not in weights:
            name = name.removeprefix("model.")
        expect(name in weights, f"factors: norm.{name}: the model has no such parameter")
        owner, _, key = name.rpartition(".")
        put(model.get_submodule(owner), key, t.to)

    places = experts_modules(model)
    for l in factors.down:
        if layers is not None and l not in layers:
            continue
        parent, _, module = places[l]
        routed = [e for e in factors.refined(l) if e < factors.dims.experts]
        down, shared = factors.down[l].split([len(routed), len(factors.down[l]) - len(routed)])
        if routed:
            rows = torch.tensor(routed, device=module.down_proj.device)
            put(module, "down_proj", lambda w: w.index_copy(0, rows, down.to(w)))
        # slices (n, d, p) side by side are the shared expert's (d, n p)
        if len(shared):
            put(shared_mlp(parent).down_proj, "weight", lambda w: torch.cat([*shared.to(w)], 1))
    return old


def patch(model: nn.Module, factors: Factors | str | Path, cache: CacheConfig | None = None,
          keep_dense: bool = True) -> nn.Module:
    """Swap the experts of every fitted MoE layer of a loaded transformers model for GlobeExperts, in place.

    factors: Factors, or a run directory. cache: default: the settings of the factors' run. keep_dense=False
    lets go of the dense experts (unpatch is then impossible). Returns the model. UserError where model and
    factors do not belong together.
    """
    if not isinstance(factors, Factors):
        factors = load_factors(factors)
    old = convert(model, factors.meta(), cache)
    for (_, attr), (parent, module) in old.items():
        new = getattr(parent, attr)
        if not isinstance(new, GlobeExperts):
            continue
        like = module.down_proj.detach()
        for f, W in zip(FAMILIES, (*module.gate_up_proj.detach().chunk(2, 1), like)):
            # experts or families that were not fitted
            if hasattr(new, f"{f}_proj"):
                if f in new.families:
                    W = W[list(new.dense_row)]
                assign(new, f"{f}_proj", W.contiguous())
    assign_factors(model, factors, like.device, like.dtype)
    replaced = put_dense(model, factors, keep=keep_dense)
    # what unpatch needs
    model._globe_dense = None
    if keep_dense:
        model._globe_dense = (old, replaced)
    return model


def unpatch(model: nn.Module):
    """Put the dense experts back that patch(keep_dense=True) replaced; returns the model."""
    kept = getattr(model, "_globe_dense", None)
    expect(kept, "model: nothing to unpatch (not patched, or patched with keep_dense=False)")
    # modules, tensors, linear layers
    experts, replaced = kept
    for (_, attr), (parent, module) in experts.items():
        setattr(parent, attr, module)
    for module, key, t in replaced:
        assign(module, key, t)
    for m in model.modules():
        if type(m) is GlobeLinear:
            m.__class__ = nn.Linear
    del model.globe_bank, model._globe_dense, model.save_pretrained

    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    # what our save_pretrained left
    vars(model).pop("_weight_conversions", None)
    for key in ("quantization_config", "auto_map"):
        vars(model.config).pop(key, None)
    return model


def assemble(ckpt: Checkpoint, factors: Factors, device: torch.device = torch.device("cpu"),
             dtype: torch.dtype | None = None, cache: CacheConfig | None = None) -> nn.Module:
    """The patched model, straight from the source checkpoint and the factors.

    No dense form of a fitted matrix is ever in memory. UserError for factors of another checkpoint.
    """
    check_fingerprint(factors, ckpt)
    dtype = dtype or ckpt.dtype
    model = empty_model(ckpt.config, dtype, ckpt.dir)
    convert(model, factors.meta(), cache)

    # factors, then everything else from the source, then what was refined
    assign_factors(model, factors, device, dtype)
    fill(model, ckpt, device, dtype)
    put_dense(model, factors)
    one_by_one(model)
    if (ckpt.dir / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(ckpt.dir)
    return model.to(device)


# The factors' description in the config.json of a globe or composed export; None in any other
def globe_meta(config: dict) -> dict | None:
    meta = config.get("quantization_config")
    return meta if isinstance(meta, dict) and meta.get("quant_method") == "globe" else None


def load(directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
         cache: CacheConfig | None = None) -> nn.Module:
    """Load a globe or composed export: from_pretrained, plus the cache's settings.

    dtype: of the parameters; default: as stored. cache: default: the settings of the factors' run.
    UserError where the directory is no such export or is damaged.
    """
    directory = Path(directory)
    check_export(directory)
    # a damaged export fails in its own way in every model's code
    with expecting(f"{directory}: expected an export that transformers loads"):
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True)
    # transformers goes on where tensors are missing, or left over; some were in the source, and are kept
    kept = globe_meta(read_json(directory / "config.json")).get("kept")
    extra = sorted(name for name in info["unexpected_keys"] if type(kept) is not list or name not in kept)
    expect(not extra, f"{directory}: {(extra or [''])[0]}: not expected (and {len(extra) - 1} more)")
    refuse_missing(sorted(info["missing_keys"]), directory)
    for name, t in model.state_dict().items():
        finite(t, name, directory)
    if cache:
        set_cache(model, cache)
    return model.to(device).eval()


# UserError where the files of an export are damaged, before transformers allocates by what they say
def check_export(directory: Path) -> None:
    where = directory / "config.json"
    config = read_json(where)
    meta = globe_meta(config)
    expect(meta, f"{directory}: expected a globe export (quantization_config.quant_method: globe), "
                 "found none")
    check_meta(meta, str(where))
    dims_of({k: v for k, v in config.items() if k != "quantization_config"}, str(where))
    # every tensor's dtype, from the headers alone
    count = 0
    for file in sorted(directory.glob("*.safetensors")):
        shard = open_shard(file)
        for name in shard.keys():
            count += 1
            kind = shard.get_slice(name).get_dtype()
            fine = kind in ("F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8")
            expect(fine, f"{file}: {name}: expected float32, float16 or bfloat16, found {kind}")
    layers = config["num_hidden_layers"]
    expect(layers <= count,
           f"{directory}: expected tensors of {layers} layers in *.safetensors, found {count} tensors")


def cache_stats(model: nn.Module) -> dict:
    """Hits, misses, hit rate, seconds spent composing, and MiB held, of all layers' caches."""
    # each layer's own slots, and those that layers without any use in turn
    modules = globe_modules(model)
    caches = [m.cache for m in modules]
    for bank in {m._bank[0] for m in modules}:
        caches += bank.scratch.values()
    hits = sum(c.hits for c in caches)
    misses = sum(c.misses for c in caches)
    mib = sum(slab.nbytes for c in caches for slab in c.slabs.values()) / 2 ** 20
    seconds = sum(c.seconds for c in caches)
    return {"hits": hits, "misses": misses, "hit_rate": hits / max(1, hits + misses), "cache_mib": mib,
            "compose_seconds": seconds}


@torch.no_grad()
def warm(model: nn.Module, ids: Tensor | None = None) -> None:
    """Fill the caches, and start their counts afresh.

    Mode all composes every expert; else each layer holds those that a text, ids (1, n), uses most.
    """
    modules = globe_modules(model)
    uses = {m: collections.Counter() for m in modules}

    def note(m: GlobeExperts, args: tuple, kwargs: dict) -> None:
        index = (*args, *kwargs.values())[1]
        uses[m].update(index.flatten().tolist())
        for e in m.fitted:
            # slices of the shared expert, which every token uses
            if e >= m.num_experts:
                uses[m][e] = index.numel()

    if ids is not None and modules[0]._bank[0].cache.mode == "lru":
        with contextlib.ExitStack() as hooks:
            for m in modules:
                hooks.enter_context(m.register_forward_pre_hook(note, with_kwargs=True))
            model.model(ids.to(next(model.parameters()).device))
    for m in modules:
        # the most used last, as the most recently used
        held = [e for e, _ in uses[m].most_common() if e in m.fitted][:m.cache.slots][::-1]
        if m.cache.slots == len(m.fitted):
            held = list(m.fitted)
        if held and m.cache.slots and not m.composed:
            m.cache.clear()
            m.hold_only(m.cache, held)
        m.cache.count()
    for scratch in modules[0]._bank[0].scratch.values():
        scratch.count()


# ---- exports -----------------------------------------------------------------------------------------
# All that a directory holds but weights, their indices, pickles, and what git and the hub keep for themselves
def copy_side_files(source: Path, to: Path) -> None:
    for f in sorted(source.rglob("*")):
        place = f.relative_to(source)
        weights = f.suffix in WEIGHTS or re.search(r"\.index(\.[\w-]+)?\.json$", f.name)
        if weights or not f.is_file() or {".git", ".cache"} & {*place.parts}:
            continue
        # a link to somewhere else would publish what lies there
        expect(is_inside(f, source),
               f"{f}: expected a file in {source}, found a link to {f.resolve()}, outside it")
        (to / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(f, to / place)


def export_globe(ckpt: Checkpoint, factors: Factors, to: Path, composed: bool = False,
                 dtype: torch.dtype | None = None) -> None:
    """Write the patched model as a directory: weights, config, tokenizer and this file down to the marker.

    composed=True stores A_i and the composed B~_i in place of bank and mixtures: larger, nothing to compose
    at load. UserError where there are no mixtures.
    """
    expect(not (composed and factors.coded()),
           "export: composed: packed codes have no mixtures to compose; take globe or dense")
    model = assemble(ckpt, factors, dtype=dtype)
    # tensors that the model has no place for stay, as layers of multi-token prediction
    taken = {name for name, _ in ckpt.expected_tensors()} | {*map(ckpt.stored_name, model.state_dict())}
    rest = {name: ckpt.tensor(name) for name in ckpt.shard_of if name not in taken}
    if rest:
        say(f"kept, though the model does not use them: {len(rest)} tensors, as {min(rest)}")
    meta = factors.meta() | {"kept": sorted(rest)} if rest else factors.meta()
    if composed:
        meta["composed"] = True
        compose_all(model)
    model.save_pretrained = functools.partial(save_pretrained, model, meta)
    copy_side_files(ckpt.dir, to)
    model.config.auto_map = other_code(types.SimpleNamespace(**ckpt.config))
    model.save_pretrained(to, max_shard_size="5GB", state_dict=model.state_dict() | rest)


@torch.no_grad()
def rest_metrics(walk: LayerWalk, windows: Tensor, names: Iterable, progress: Callable) -> Iterator[tuple]:
    """(module, H (columns, columns), the second moment of its inputs) of the dense model's linear layers
    `names`, in the order of the model, on windows (N, T)."""
    found = {}

    def note(name: str, module: nn.Module, args: tuple, y: Tensor) -> None:
        x = args[0].flatten(0, -2).float()
        found[name] = found.get(name, 0) + x.T @ x

    with contextlib.ExitStack() as hooks:
        for name, module in walk.model.named_modules():
            if name in names and isinstance(module, nn.Linear):
                hooks.enter_context(module.register_forward_hook(functools.partial(note, name)))
        x = torch.empty(*windows.shape, walk.ckpt.dims.d, dtype=walk.dtype)
        walk.embed(windows, x)
        for l in progress(range(len(walk.layers))):
            walk.fill([l])
            walk.advance([l], x)
            walk.empty([l])
            yield from found.items()
            found.clear()
        for part in x.split(walk.batch):
            walk.logits(part.to(walk.device))
        yield from found.items()


# a matrix outside the experts; of the shared expert's downs those that were refined
def rest_weight(ckpt: Checkpoint, factors: Factors, name: str, twin: dict) -> Tensor:
    layer = re.search(r"layers\.(\d+)\..*shared_experts?\.down_proj$", name)
    # one that is no row of slices was not refined
    if layer and ckpt.dims.shared and int(layer[1]) in factors.down:
        return torch.cat([*factors.down[int(layer[1])][-ckpt.dims.shared:]], 1)
    weight = f"{name}.weight"
    return ckpt.tensor(ckpt.stored_name(weight) or ckpt.stored_name(twin.get(weight, weight)))


def code_rest(ckpt: Checkpoint, factors: Factors, cfg: Config, bits: int, windows: Tensor | None,
              device: torch.device, progress: Callable) -> None:
    """factors.rest: linear layers and embeddings outside the experts in codes of 8 or 4 bits, refined downs
    of the shared expert among them; errors by the inputs on windows (N, T), if there are any."""
    model = empty_model(ckpt.config, ckpt.dtype, ckpt.dir)
    twin = twins(model)
    matrices = rest_matrices(model, ckpt, cfg.model)
    metrics = ()
    if windows is not None and bits < 8:
        some, walk = refine_walk(ckpt, windows, cfg, device)
        metrics = rest_metrics(walk, some, {*matrices, "lm_head"}, progress)

    rest = {}
    for name, H in itertools.chain(metrics, zip(matrices, itertools.repeat(None))):
        # embeddings that are the head too go by its inputs
        if name not in matrices:
            name = twin[f"{name}.weight"].removesuffix(".weight")
        if name in rest:
            continue
        W = rest_weight(ckpt, factors, name, twin).to(device)
        U = None
        if H is not None:
            U = feedback(H + (CODE_RIDGE * H.diagonal().mean() + 1e-20) * torch.eye(len(H), device=device))
        coded = code_groups(W, max(bits, 8 * (W.shape[1] % 2)), U)  # two codes are a byte
        rest[name] = tuple(t.cpu() for t in coded)

    # the shared expert's downs are in there
    for l, down in list(factors.down.items()):
        factors.down[l] = down[:len(down) - ckpt.dims.shared]
        if not len(factors.down[l]):
            del factors.down[l]
    factors.rest = dict(sorted(rest.items()))


# Those codes, decoded into a stock model's weights; of modules whose names begin so
def put_rest(model: nn.Module, factors: Factors, below: str) -> None:
    # {a weight's id: its modules}; a head may share the embedding's
    owners = collections.defaultdict(list)
    for module in model.modules():
        owners[id(getattr(module, "weight", None))].append(module)
    for name, codes in factors.rest.items():
        if name.startswith(below) and (below or not name.startswith("model.layers.")):
            # a tensor of its own: the old one may be the file's
            old = model.get_parameter(f"{name}.weight")
            new = nn.Parameter(decode_groups(*codes).to(old), requires_grad=old.requires_grad)
            for module in owners[id(old)]:
                module.weight = new


# Composed bases in place of the bank and the mixtures, in place
def compose_all(model: nn.Module) -> None:
    for m in globe_modules(model):
        # stored bases (n, r, d) in place of mixtures
        bases = {f: m._basis(f, list(range(len(m.fitted)))) for f in m.families}
        for f, basis in bases.items():
            del m._parameters[f"{f}_val"], m._buffers[f"{f}_idx"]
            m._parameters[f"{f}_basis"] = nn.Parameter(basis, requires_grad=False)
        m.composed = True
    model.globe_bank._parameters.clear()


def export_dense(ckpt: Checkpoint, factors: Factors, to: Path, progress: Callable = lambda it: it) -> None:
    """The source checkpoint rewritten in place: shards are copied, and only the experts' bytes replaced.

    Healed norms and refined down projections too. Names, order, dtypes and every other byte stay, so that
    whatever read the source reads this.
    """
    check_fingerprint(factors, ckpt)
    copy_side_files(ckpt.dir, to)
    # a plain checkpoint: no quantizer, no model code of its own
    config = {k: v for k, v in ckpt.config.items() if k not in ("quantization_config", "auto_map")}
    if code := other_code(types.SimpleNamespace(**ckpt.config)):
        config["auto_map"] = code
    if config != ckpt.config:
        write_text(to / "config.json", json.dumps(config, indent=2))
    # the shards as they are, with the index that names them
    for file in sorted({*ckpt.shard_of.values(), *filter(None, [ckpt.index])}):
        shutil.copyfile(ckpt.dir / file, to / file)
    headers = {shard: data_offsets(to / shard) for shard in set(ckpt.shard_of.values())}

    def overwrite(tensor: str, part: Any, W: Tensor) -> None:
        shard = ckpt.shard_of[tensor]
        # in bytes, which need no alignment
        shape = (*ckpt.shape(tensor), W.itemsize)
        raw = np.memmap(to / shard, np.uint8, "r+", offset=headers[shard][tensor], shape=shape)
        raw[part] = W.flatten().view(torch.uint8).numpy().reshape(*W.shape, -1)
        raw.flush()

    def put(family: str, l: int, e: int, W: Tensor) -> None:
        slot = ckpt.slot(family, l, e)
        overwrite(slot.tensor, slot.part, W.to(ckpt.expert(family, l, e).dtype))

    # fitted matrices, refined downs, healed norms
    rows = [(l, i, e) for l, experts in factors.experts.items() for i, e in enumerate(experts)]
    for l, i, e in progress(rows):
        for family, f in factors.families.items():
            W = f.weight(l, i)
            put(family, l, e, W.T if family == "down" else W)
    for l, down in factors.down.items():
        for e, W in zip(factors.refined(l), down):
            put("down", l, e, W)
    for name, t in factors.norms.items():
        expect(name in ckpt.shard_of, f"factors: norm.{name}: {ckpt.dir} has no such tensor")
        overwrite(name, ..., t.to(ckpt.tensor(name).dtype))
    twin = twins(empty_model(ckpt.config, ckpt.dtype, ckpt.dir))
    for name, codes in factors.rest.items():
        # where the file has both of a tied pair, both
        names = {f"{name}.weight"}
        if not ckpt.apart:
            names.add(twin.get(f"{name}.weight", f"{name}.weight"))
        stored = set(filter(None, map(ckpt.stored_name, names)))
        expect(stored, f"factors: rest.{name}: {ckpt.dir} has no such tensor")
        for place in stored:
            overwrite(place, ..., decode_groups(*codes).to(ckpt.tensor(place).dtype))


# {tensor: first byte} of a safetensors file
def data_offsets(path: Path) -> dict:
    # 8 bytes for the header's length, then the header, then the data
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    header.pop("__metadata__", None)
    return {name: 8 + size + about["data_offsets"][0] for name, about in header.items()}


# (1, 64) token ids of held-out text; where a checkpoint has no tokenizer that fits, random ones
def sample_ids(ckpt: Checkpoint) -> Tensor:
    try:
        return ckpt.known(token_windows(load_tokenizer(ckpt.dir), builtin_text("heldout"), 64, 64))
    except UserError:
        return torch.randint(ckpt.config["vocab_size"], (1, 64), generator=torch.Generator().manual_seed(0))


# The (p, d) view of an expert's matrix in the stock model's parameter that holds it, or in its gradient
def matrix_in(weight: Tensor, family: str, expert: int, D: Dims) -> Tensor:
    start = (expert - D.experts) * D.p  # of the shared expert's slices
    if expert < D.experts:
        weight = weight[expert]
        start = D.p if family == "up" else 0  # up lies below gate
    if family == "down":
        weight = weight.T
    return weight[start:start + D.p]


# The stock model's parameter that holds an expert's matrix
def parameter_of(place: tuple, family: str, expert: int, D: Dims) -> nn.Parameter:
    parent, _, experts = place
    if expert >= D.experts:
        return getattr(shared_mlp(parent), f"{family}_proj").weight
    return experts.down_proj if family == "down" else experts.gate_up_proj


@torch.no_grad()
def reference_logits(ckpt: Checkpoint, factors: Factors, ids: Tensor, device: torch.device) -> Iterator:
    """Logits (1, T, V) of each row of ids (N, T), of the source with W^ in the experts' places: the stock
    model's own layers in float32, one in memory at a time."""
    walk = LayerWalk(ckpt, device, torch.float32, 1)
    places = experts_modules(walk.model)
    x = torch.empty(*ids.shape, ckpt.dims.d)
    put_rest(walk.model, factors, "")
    walk.embed(ids, x)
    for l in range(len(walk.layers)):
        walk.fill([l])
        put_rest(walk.model, factors, f"model.layers.{l}.")
        rows = enumerate(factors.experts.get(l, ()))
        for (row, e), (family, f) in itertools.product(rows, factors.families.items()):
            weight = parameter_of(places[l], family, e, factors.dims)
            matrix_in(weight.data, family, e, factors.dims).copy_(f.weight(l, row))
        put_dense(walk.model, factors, [l])
        for name in [name for name in factors.norms if name.startswith(f"model.layers.{l}.")]:
            assign(walk.model, name, factors.norms[name].to(device))
        walk.advance([l], x)
        walk.empty([l])
    for states in x.split(1):
        yield walk.logits(states.to(device)).cpu()


# from_pretrained as in a program that never imported this file: an export's own globe.py, torch's operators
@contextlib.contextmanager
def as_a_stranger() -> Iterator[None]:
    tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    ours = [table.pop("globe") for table in tables]
    before = os.environ.get("GLOBE_KERNELS", "auto")
    os.environ["GLOBE_KERNELS"] = "off"
    modules = set(sys.modules)
    try:
        yield
    finally:
        os.environ["GLOBE_KERNELS"] = before
        # its code is not kept
        for name in set(sys.modules) - modules:
            if name.startswith("transformers_modules.") and name.endswith(".globe"):
                shutil.rmtree(Path(sys.modules.pop(name).__file__).parent)
        for table, kind in zip(tables, ours):
            table["globe"] = kind


@torch.no_grad()
def logit_error(ckpt: Checkpoint, factors: Factors, export: Path, device: torch.device) -> float:
    """Largest difference of logits on 64 tokens between the export, as a stranger's program loads it, and the
    source with W^ in the experts' places. UserError where they are not finite."""
    ids = sample_ids(ckpt).to(device)
    want = next(reference_logits(ckpt, factors, ids, device))
    expect(torch.isfinite(want).all(), f"{ckpt.dir}: expected finite logits, found NaN or Inf in float32")
    with as_a_stranger():
        model = AutoModelForCausalLM.from_pretrained(export, dtype="auto", trust_remote_code=True).to(device)
        if not globe_modules(model):  # such sizes stop a stranger at the source itself
            one_by_one(model)
        got = model(ids).logits.float().cpu()
        expect(torch.isfinite(got).all(), "export: expected finite logits, found NaN or Inf in "
               f"{model.dtype}: give export.dtype another type")
        # once more without the rounding of activations, where memory allows
        if 4 * model.num_parameters() < free_memory(device) / 2:
            got = model.float()(ids).logits.cpu()
    return float((got - want).abs().max())


# Upload an export to the hub, into a repository made on demand; UserError with the hub's own reason
def push(directory: Path, repo: str, private: bool) -> None:
    from huggingface_hub import HfApi
    # no token, no network, no such organisation: the hub's reason is the useful part
    with expecting(f"--push-to-hub {repo}: the export is in {directory}: expected the hub to take it"):
        HfApi().create_repo(repo, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=str(directory), commit_message=f"GloBE {__version__}")


# ---- the card ----------------------------------------------------------------------------------------
def text_table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A markdown table, aligned; floats with four significant digits."""
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.ljust(w) for cell, w in zip(cells, width))} |"

    table = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in (header, *rows)]
    width = [max(map(len, column)) for column in zip(*table)]
    rule = "|".join("-" * (w + 2) for w in width)
    return "\n".join([line(table[0]), f"|{rule}|", *map(line, table[1:])])


# ["section.key=value", ...] of a saved config that differ from the defaults
def settings_of(config: dict, default: dict, where: str = "") -> list:
    out = []
    for key, value in config.items():
        # a section, or a value
        if isinstance(value, dict) and isinstance(default.get(key), dict):
            out += settings_of(value, default[key], f"{where}{key}.")
        elif value != default.get(key):
            out.append(f"{where}{key}={json.dumps(value)}".replace('"', ""))
    return out


# The licence lines of a source's model card, which the export's repeats
def licence_of(card: Path) -> str:
    if not card.is_file():
        return ""
    front = re.match(r"---\n(.*?\n)---", card.read_text(encoding="utf-8"), re.S)
    return "".join(re.findall(r"^license\w*:.*\n", front[1], re.M)) if front else ""


CARD = """---
{licence}{base_line}
base_model_relation: quantized
library_name: transformers
pipeline_tag: text-generation
tags: [moe, globe, compressed]
---
# {base}, experts compressed by GloBE ({form})

{families} of the routed experts of `{base}` are {what}{refined}.
{stored:,} bytes of weights; the source has {dense:,}: {saved:.1%} of the file is saved.
Stored / dense numbers: {ratio:.4f} of the compressed matrices, {model_ratio:.4f} of the model.

{sizes}

## Evaluation

{evaluation}

## Load

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("THIS_REPOSITORY"{remote})
```

{note}

## How it was made

```sh
python globe.py fit {settings}
python globe.py export --format {form}
```

Licence: that of the base model{no_licence}. Fingerprint of the source checkpoint: `{fingerprint}`.
Made by globe.py {version}.
"""
MIXTURES = """`W = shift + scale * A phi(sum_j alpha_j B_j)`: an
adapter A per expert, and a sparse mixture over a bank of bases B that layers share"""
CODES = """`W = A X` in {bits:.3g} bits a weight: adapters A in a
trellis code, and a basis X of 8 bits, of each layer or of all; down in its own columns"""
DENSE_NOTE = "Tensor names, types and config are the source's: whatever reads the source reads this."
GLOBE_NOTE = """That runs `globe.py` beside this card: {lines} lines, sha256 `{sha256}`. With the package
globe-moe installed, `import globe` in place of `trust_remote_code=True` runs the package's code (and its
native operators, where they are built). Without either, loading stops with a size mismatch, on purpose."""


def model_card(ckpt: Checkpoint, factors: Factors, form: str, base: str, stored: int, evals: dict) -> str:
    """README.md of an export. base: the source's hub id or name; stored: bytes; evals: RUN/eval.json."""
    # what is stored, a row per family
    sizes = []
    for name, f in factors.families.items():
        support = float(f.support().float().median())
        sizes.append((name, *f.shape(), support, f.activation))

    # what was evaluated before the export, as rows of source beside export
    rows = []
    for text, e in evals.items():
        rows.append((f"{text}, {e['tokens']} tokens", "perplexity", e["ppl_dense"], e["ppl"]))
        for task, measures in e.get("tasks", {}).items():
            rows += [(task, name, *pair.values()) for name, pair in measures.items()]
    evaluation = "None was run before this export (`globe.py eval` first fills a table)."
    if rows:
        evaluation = text_table(("on", "measure", "source", "this"), rows)

    # the code that loading runs, so that a reader can compare it with the release
    loader = loader_source().encode()
    note = GLOBE_NOTE.format(lines=len(loader.splitlines()), sha256=hashlib.sha256(loader).hexdigest())
    remote = ", trust_remote_code=True"
    if form == "dense":
        note = DENSE_NOTE
        remote = ""

    refined = "; down is dense, refitted to them" * bool(factors.down)
    if factors.rest:
        bits = factors.meta()["rest"].values()
        refined += f"; attention, shared experts, embeddings and head are in {min(bits)} bits"

    # the settings that differ from the defaults make the fit again
    licence = licence_of(ckpt.dir / "README.md")
    settings = [f"model.path={base}", *settings_of(factors.config, dataclasses.asdict(Config()))]
    return CARD.format(
        base=base, form=form, note=note, remote=remote, licence=licence, evaluation=evaluation, stored=stored,
        base_line=f"base_model: {base}" if "/" in base else f"# base model: {base}",
        families=" and ".join(factors.families).capitalize(),
        what=CODES.format(bits=16 * factors.ratio()) if factors.coded() else MIXTURES,
        refined=refined,
        sizes=text_table(("family", "banks", "bases", "rows r", "median support", "phi"), sizes),
        dense=ckpt.bytes, saved=1 - stored / ckpt.bytes, ratio=factors.ratio(),
        model_ratio=factors.model_ratio(ckpt.num_parameters()), settings=" ".join(settings),
        no_licence="" if licence else "; its card names none", fingerprint=factors.fingerprint,
        version=__version__)


# ======== 13. Evaluation ==============================================================================
# Never touches: fitting.
@torch.no_grad()
def nll(model: nn.Module, windows: Tensor, batch: int = 4, progress: Callable = lambda it: it,
        stride: int | None = None) -> tuple:
    """(mean negative log-likelihood in nats per predicted token, number of those tokens).

    windows: (N, length) token ids. With stride they overlap, and of all but the first only the last
    `stride` tokens count (the WikiText recipe).
    """
    device = next(model.parameters()).device
    d = model.get_input_embeddings().weight.shape[1]
    total = 0.0
    count = 0
    with threads_for(d, d):
        for part in progress(windows.split(batch)):
            part = part.to(device)
            logits = model(part).logits  # (b, length, vocabulary)

            # one window at a time: a batch's logits in float32 can be gigabytes
            for ids, z in zip(part, logits):
                loss = F.cross_entropy(z[:-1].float(), ids[1:], reduction="none")
                # what the window before has scored is only context
                if stride and count:
                    loss = loss[-stride:]
                total += float(loss.sum())
                count += len(loss)
    return total / count, count


def reconstruction(ckpt: Checkpoint, factors: Factors) -> dict:
    """Relative Frobenius error of the factors: {family: {"all": x, layer: x, ...}}."""
    result = {}
    for family, fam in factors.families.items():
        error = collections.Counter()
        energy = collections.Counter()
        for l, experts in factors.experts.items():
            # one expert is in memory at a time
            for row, e in enumerate(experts):
                W = ckpt.expert(family, l, e).float()
                error[l] += float((W - fam.weight(l, row)).square().sum())
                energy[l] += float(W.square().sum())

        # the floor: weights that are all zero have no relative error
        result[family] = {"all": math.sqrt(error.total() / max(energy.total(), 1e-300))}
        for l in error:
            result[family][l] = math.sqrt(error[l] / max(energy[l], 1e-300))
    return result


def task_runner(tasks: Sequence[str], tokenizer, context: int | None = None) -> Callable:
    """run(model) -> {task: {metric: value}} by lm-eval; tasks: its names, or YAML files.

    UserError, before anything runs, where lm-eval is not installed or does not know a task.
    """
    if not tasks:
        return lambda model, progress=None: {}
    expect("builtin" not in tasks, "--tasks: for builtin run python bench.py report --tasks builtin")
    # optional, and slow to import
    with expecting(f"--tasks {' '.join(tasks)}: expected lm-eval (pip install lm-eval)", ImportError):
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

    # a YAML file says its task's name, and lm-eval finds it by its directory
    names = {}
    folders = []
    for task in tasks:
        path = Path(task)
        line = None
        if path.suffix in (".yaml", ".yml") and path.is_file():
            line = re.search(r"^task:\s*(\S+)", path.read_text(encoding="utf-8"), re.M)
            folders.append(str(path.resolve().parent))
        names[task] = line[1] if line else task
    known = TaskManager(include_path=folders or None)
    for task, name in names.items():
        expect(known.match_tasks([name]),
               f"--tasks: lm-eval knows no task {task!r} (`lm_eval ls tasks` lists its own)")

    def run(model: nn.Module, progress: Callable | None = None) -> dict:
        # lm-eval prints, and shows its own progress; our stdout ends with one line of JSON
        with contextlib.redirect_stdout(sys.stderr):
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=context)
            found = lm_eval.simple_evaluate(model=lm, tasks=[*names.values()], task_manager=known)
        result = {}
        for task, row in found["results"].items():
            # ",none" is the name of no filter; what is not a number describes the task
            numbers = {k.removesuffix(",none"): v for k, v in row.items() if isinstance(v, float)}
            result[task] = numbers
        return result
    return run


# ======== 14. Command line ============================================================================
# Never touches: algorithms.
@contextlib.contextmanager
def held_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C (or SIGTERM) sets instead of raising: no step is cut in half."""
    stop = threading.Event()
    with contextlib.ExitStack() as undo:
        # only the main thread gets signals
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, lambda *_: stop.set())
                undo.callback(signal.signal, number, before)
        yield stop


class Log:
    """A row per step into log.jsonl and, by log.to, into trackio or wandb; one rank writes for all."""

    def __init__(self, path: Path, cfg: Config, run_name: str):
        self.path = path
        self.sink = None
        to = cfg.log.to
        if to == "none" or ranks()[0]:
            return
        about = {"project": cfg.log.project, "name": cfg.log.run_name or run_name}
        if cfg.log.entity:
            about["entity"] = cfg.log.entity
        # nothing leaves the machine unless WANDB_MODE asks for it
        if to == "wandb":
            about |= {"mode": os.environ.get("WANDB_MODE", "offline"), "tags": cfg.log.tags}
        # not installed, or an argument it does not know: trackio has no entity
        with expecting(f"log.to={to}: expected the package (pip install {to})", ImportError, TypeError):
            self.sink = __import__(to)
            self.sink.init(config=dataclasses.asdict(cfg), **about)

    def row(self, row: dict) -> None:
        if ranks()[0]:
            return
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        # numbers as FAMILY/NAME
        if self.sink:
            numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
            self.sink.log({f"{row['family']}/{k}": v for k, v in numbers.items()})

    def close(self) -> None:
        if self.sink:
            self.sink.finish()


def read_rows(path: Path) -> list:
    """The rows of log.jsonl; what is none (a last line that was cut short) is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and type(row.get("step")) is int]


# ---- models and run directories ----------------------------------------------------------------------
def open_model(cfg: Config, device: torch.device) -> Checkpoint:
    """The checkpoint at model.path; "tiny" is trained by train.py, which returns at once later on."""
    model = cfg.model
    if model.path != "tiny":
        return Checkpoint(resolve_model(model.path, model.revision, model.force_download))
    program = Path(__file__).resolve().with_name("train.py")
    expect(program.is_file(), f"model.path=tiny: expected {program}, found none; give model.path=DIR")
    command = [sys.executable, str(program), "tiny", "--device", str(device)]
    for key, value in cfg.tiny.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        command.append(f"tiny.{key}={text}")

    # a process that joins no job of torchrun's; a signal that only this one got is passed on
    with held_interrupt() as stop:
        alone = os.environ | {"WORLD_SIZE": "1"}
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=alone)
        while child.poll() is None:
            if stop.wait(0.1):
                child.terminate()
                child.wait()
    code = child.returncode
    if code == 130 or stop.is_set():
        raise KeyboardInterrupt("the same command goes on with the training of the default model")
    expect(code != 2, "model.path=tiny: refused by train.py, for the reason above")
    if code:
        raise Lost(f"model.path=tiny: train.py ended with exit code {code}")
    return Checkpoint(json.loads(child.stdout.read().splitlines()[-1])["path"])


def new_run(cfg: Config) -> Path:
    """The first free runs/NAME-NNN, created at once, so that two fits never get the same one."""
    name = re.sub(r"[^\w.-]", "-", Path(cfg.model.path).name).strip(".-").lower() or "run"
    for i in itertools.count(1):
        path = Path("runs") / f"{name}-{i:03d}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path


def newest_run(finished: bool = True) -> Path:
    # the newest run below ./runs, by the time of its config
    configs = list(Path("runs").glob("*/config.yaml"))
    if finished:
        configs = [c for c in configs if c.with_name("factors.safetensors").is_file()]
    expect(configs, "expected a finished run below ./runs, found none: run `python globe.py fit` first, "
                    "or give --factors")
    return max(configs, key=lambda c: c.stat().st_mtime).parent


def run_config(run: Path | None, args: argparse.Namespace, **options: Any) -> Config:
    # a run's resolved config, or the defaults, then the command line's; options: those of load_config
    base = None
    path = run and run / "config.yaml"
    if path and path.is_file():
        base = read_yaml(path.read_text(encoding="utf-8", errors="replace"), str(path))
    return load_config(args.config, args.overrides, base, **options)


def fresh(path: Path, overwrite: bool, source: Path | None = None, clear: bool = False,
          run: Path = Path()) -> Path:
    """An output that the user named: must not exist (or --overwrite), lie in the source or hold the run."""
    place = path.resolve()
    if source:
        inside = place.is_relative_to(source.resolve())
        expect(not inside, f"{path}: expected a directory outside the source checkpoint {source}")
    # --overwrite would delete them
    for directory in (Path(), source or Path(), run):
        holds = directory.resolve().is_relative_to(place)
        expect(not holds, f"{path}: expected a directory that does not hold {directory.resolve()}")
    free = not path.exists() or path.is_dir() and not any(path.iterdir())
    expect(overwrite or free, f"{path}: exists; choose another name or add --overwrite")
    if clear and path.is_dir():
        shutil.rmtree(path)
    elif clear:
        path.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def discarded_on_error(out: Path) -> Iterator[None]:
    """Remove a run that failed before it saved any state, and directories created for it."""
    stays = out.is_dir() and any(out.iterdir())
    missing = [p for p in out.parents if not p.is_dir() or p == Path("runs")]
    try:
        yield
    except Exception:
        # what may be gone on with stays
        if not (ranks()[0] or stays or any(out.glob("state/*.safetensors"))):
            shutil.rmtree(out, ignore_errors=True)
            with contextlib.suppress(OSError):  # others use it
                for parent in missing:
                    parent.rmdir()
        raise


def open_run(args: argparse.Namespace, **options: Any) -> tuple:
    """(run, config, factors, source, device, dtype) of --factors, default: the newest run."""
    path = Path(args.factors) if args.factors else newest_run()
    run = path.parent if path.is_file() else path
    factors = load_factors(path)
    cfg = run_config(run, args, **options)
    # the source may have moved, but it must be the one that was fitted
    cfg.model.path = args.model or cfg.model.path
    device = pick_device(args.device)
    source = Path(cfg.model.path)
    gone = source.is_absolute() and not source.is_dir()
    expect(not gone, f"{run}: expected its source checkpoint at {source}, found none: give --model DIR")
    ckpt = open_model(cfg, device)
    check_fingerprint(factors, ckpt)
    dtype = as_dtype(args.dtype) or ckpt.dtype
    expect(dtype != torch.float64, "--dtype: expected float32, bfloat16 or float16, found float64")
    return run, cfg, factors, ckpt, device, dtype


# ---- fit: what it is going to do, and what that takes ------------------------------------------------
class FitPlan:
    """What a fit is going to do, the same on every rank; UserError where sizes do not fit together."""

    def __init__(self, cfg: Config, ckpt: Checkpoint, device: torch.device):
        # bank.memory becomes families with bits or a ratio; codes have a basis per layer
        self.bits = cfg.bank.bits if in_codes(cfg) else None
        self.rest_bits = cfg.rest.bits or 16
        if cfg.bank.memory and in_codes(cfg):
            self.bits, self.rest_bits = code_memory(cfg, ckpt)
        elif cfg.bank.memory:
            fit_memory(cfg, ckpt)
        if self.bits:
            cfg.bank.scope = "layer"
        self.cfg = cfg
        self.ckpt = ckpt
        self.device = device
        # [(layer, expert)] that are compressed in each family; a bank serves a group of layers
        self.keys = select_experts(ckpt.dims, cfg.model)
        self.experts = {}  # the same, {layer: [expert]}
        for l, e in self.keys:
            self.experts.setdefault(l, []).append(e)
        group = bank_groups([l for l, _ in self.keys], cfg.bank.scope)
        self.layers = len(group)
        self.groups = len(set(group.values()))
        # families of one job draw from one bank: gate and up, where both are compressed
        jobs = [(family,) for family in families_of(cfg.model)]
        if cfg.bank.share and len(jobs) > 1:
            jobs[:2] = [("gate", "up")]
        self.shapes = {}  # {job: (m, r)}
        for job in jobs:
            if self.bits:
                self.shapes[job] = (1, ckpt.dims.d)
                continue
            self.shapes[job] = bank_shape(cfg, job[0], len(job) * len(self.keys), self.groups, ckpt.dims)

    def sizes(self, job: tuple) -> dict:
        """A job's numbers, dense and stored; bytes of memory and disk at most; operations of a pass."""
        cfg = self.cfg
        D = self.ckpt.dims
        m, r = self.shapes[job]
        n = len(job) * len(self.keys)
        dense = n * D.p * D.d
        bank = self.groups * m * r * D.d
        # adapters, banks, mixtures with indices, shift and scale
        stored = n * D.p * r + bank + 2 * n * min(cfg.sparsity.support, m) + 2 * len(job)
        size = self.ckpt.dtype.itemsize
        data = cfg.fit.metric == "data"
        means = data and cfg.calib.means and "down" not in job

        # codes: a layer's matrices in and out of their basis; of down a metric for each expert
        if self.bits:
            stored = dense * self.bits / 16
            memory = 2 ** 29 + 32 * dense // self.layers + 12 * self.layers * D.d ** 2
            memory += 40 * n // self.layers * D.p ** 2 * ("down" in job)
            down = 2 * size * len(self.keys) * D.p * D.d * (data and cfg.fit.down)
            return {"dense": dense, "stored": stored, "memory": memory, "disk": 2 * stored + down,
                    "flops": 3 * 512 * dense, "spill": False}

        # in float32: banks, a batch of experts with what is computed of it; state, mean inputs, factors
        budget = fit_budget(cfg, self.device)
        batch = min(cfg.fit.batch or batch_for(budget, D.p, D.d), -(-n // self.layers))
        batch *= 8 * (1 + means) * D.p * (D.d + r) + 16 * r * (D.d + r)
        pairs = 8 * cfg.fit.memory * bank
        memory = 2 ** 29 + batch + 24 * bank + 8 * self.groups * m * r * r
        disk = 4 * bank + pairs + 6 * dense * means + size * stored

        # experts with their mean inputs, L-BFGS pairs with the metric: on disk where they are large
        spill = pairs > budget / 4
        pairs += 8 * self.layers * D.d ** 2 * data
        experts = 4 * dense * (1 + means)
        on_disk = pairs * spill + experts * (experts > budget / 4)
        memory += pairs + experts - on_disk
        disk += on_disk
        # the refinement goes from file to file; down without a family of its own stays dense
        if data and (cfg.fit.refine or cfg.fit.down):
            disk += 2 * size * stored
        if data and cfg.fit.down and "down" not in families_of(cfg.model):
            disk += 2 * size * (len(self.keys) + self.layers * D.shared) * D.p * D.d

        # the metric costs products unless the bank absorbs it
        absorbed = cfg.bank.activation == "identity" and self.groups == self.layers
        flops = flops_per_pass(n, m, r, D, data and not absorbed and "down" not in job, means)
        return {"dense": dense, "stored": stored, "memory": memory, "disk": disk, "flops": flops,
                "spill": spill}


def dry_run(plan: FitPlan) -> dict:
    """Sizes, memory, disk and operations of a fit, from the checkpoint's headers alone."""
    total = collections.Counter()
    for job in plan.shapes:
        sizes = plan.sizes(job)
        # jobs follow each other: the memory of the largest, the files of all
        sizes["memory"] = max(sizes["memory"] - total["memory"], 0)
        total.update(sizes)
    numbers = plan.ckpt.num_parameters()
    left = numbers - total["dense"] + total["stored"]
    size = plan.ckpt.dtype.itemsize
    stored = plan.ckpt.bytes - (numbers - left) * size
    if plan.bits or plan.rest_bits < 16:
        about = coded_size(plan.cfg, plan.ckpt)
        stored = about.bytes(16 * total["stored"] / total["dense"], plan.rest_bits, size)
        left -= about.rest * (1 - (plan.rest_bits + 16 / 64) / 16) * (plan.rest_bits < 16)
    result = {"bytes_dense": plan.ckpt.bytes, "bytes": round(stored),
              "memory_bytes": total["memory"], "disk_bytes": total["disk"],
              "flops_per_pass": total["flops"]}
    gib = [value / 2 ** 30 for value in result.values()]
    say("model {:.3g} -> {:.3g} GiB; memory of the fit about {:.3g} GiB, disk about {:.3g} GiB".format(*gib))
    say(f"{total['flops']:.3g} operations a pass" + f", {plan.cfg.fit.steps} steps" * (not plan.bits))
    return {"dry_run": True, "families": list(families_of(plan.cfg.model)),
            "r": {"+".join(job): r for job, (_, r) in plan.shapes.items()},
            "ratio": total["stored"] / total["dense"], "bits": 16 * total["stored"] / total["dense"],
            "rest_bits": plan.rest_bits, "model_ratio": left / numbers} | result


# ---- fit: the saved state ----------------------------------------------------------------------------
class SavedFit:
    """A fit's state below RUN/state, from which it goes on to the same bits."""

    # FAMILY.safetensors: Fitter.state(), with {setting: value} that it belongs to. FAMILY/: each L-BFGS pair,
    # written once, and with `spill` all that shelve() is given. Nothing that the state names goes before a
    # new one is in place: a process killed at any instant leaves one that is whole.
    def __init__(self, run: Path, family: str, spill: bool, about: dict | None = None, steps: int = 2 ** 40):
        rank = ranks()[0]
        self.path = run / "state" / f"{family}.safetensors"
        self.dir = run / "state" / family
        self.mine = self.dir / f"rank-{rank}" if rank else self.dir
        self.spill = spill
        self.about = about or {}
        self.steps = steps  # of the whole fit
        self.named = set()  # files that the saved state needs
        self.step = 0       # of the saved state
        self.batch = 0      # its experts at once: the same batches give the same bits

    def pair_file(self, step: int) -> Path:
        return self.dir / f"pair-{step:06d}.safetensors"

    def shelve(self, name: str, tensors: dict) -> Shelved:
        kept = Shelved(tensors)
        return kept.to(self.mine / f"{name}.safetensors") if self.spill else kept

    def check(self) -> None:
        # UserError where the saved state belongs to another checkpoint or other settings
        if not self.path.is_file():
            return
        with saved_state(self.path), safe_open(self.path, "pt") as f:
            found = json.loads((f.metadata() or {}).get("globe_state", "{}"))
            same_state(found, self.about)
            if (step := int(f.get_tensor("step"))) > self.steps:
                raise ValueError(f"one of step {step}, behind fit.steps {self.steps}")

    def load(self) -> tuple:
        # (state, {step: pair}), empty where nothing was saved
        pairs = {}
        if not self.path.is_file():
            return {}, pairs
        self.check()
        with saved_state(self.path):
            state = read_tensors(self.path)
            self.step = int(state["step"])
            self.batch = int(state["batch"])
            for step in state["pairs"].int().tolist():
                pair = Shelved({}, self.pair_file(step))
                self.named.add(pair.path)
                # read at each use, or now
                pairs[step] = pair if self.spill else Shelved(pair.load())
        return state, pairs

    def save(self, fitter: Fitter) -> None:
        if not ranks()[0]:
            # pairs first: the state that names them must never be without
            for step, pair in fitter.pairs.items():
                if pair.path:
                    flush(pair.path)
                elif self.pair_file(step) not in self.named:
                    pair.save(self.pair_file(step))
            Shelved(fitter.state()).save(self.path, about={"globe_state": json.dumps(self.about)})
        self.named = {self.pair_file(step) for step in fitter.pairs}
        self.step = fitter.step_done

    def tidy(self, pairs: dict | None = None) -> None:
        # remove files that neither the state nor the fitter's pairs need; without pairs, all but the state's
        used = self.named | {pair.path for pair in (pairs or {}).values()}
        for path in set(self.mine.glob("*.safetensors" if pairs is None else "pair-*")) - used:
            path.unlink()


# of a text file, None of other texts
def digest_of(text: str) -> str | None:
    return hashlib.sha256(Path(text).read_bytes()).hexdigest()[:16] if Path(text).is_file() else None


def kept_moments(ckpt: Checkpoint, cfg: Config, device: torch.device, run: Path, resume: bool) -> dict:
    """The calibration's moments, by way of a file that resumed fits and other ranks read."""
    path = run / "state" / "moments.st"
    settings = [dataclasses.asdict(cfg.calib), digest_of(cfg.calib.text)]
    settings = json.dumps(settings, sort_keys=True).encode()
    tag = f"{ckpt.state_of()} {hashlib.sha256(settings).hexdigest()[:16]} {cfg.model.families}"
    if not ranks()[0]:
        # where settings changed, calibrate again
        with contextlib.suppress(UserError):
            if resume and path.is_file():
                return load_moments(path, ckpt, tag)
        scratch = run / "state" / "means"
        moments = dict(calibrate(ckpt, cfg, device, scratch))
        if "down" not in families_of(cfg.model):
            moments.pop("hidden", None)
        save_moments(path, moments, tag)
        shutil.rmtree(scratch, ignore_errors=True)
    return load_moments(path, ckpt, tag)


# ---- fit: calibrate, fit each job, refine ------------------------------------------------------------
def fit_data(plan: FitPlan, job: tuple, moments: dict, saved: SavedFit) -> FitData:
    # a job's experts as the fit sees them, with their metric where there are moments
    cfg = plan.cfg
    left, right, means = {}, {}, {}
    for family in job if moments else ():
        part = metric_of(moments, family, plan.keys, cfg.fit.ridge, plan.device)
        left |= {(family, l, e): S for (l, e), S in part["left"].items()}
        # families that draw from one bank have the same inputs: one L (d, d) a layer
        right = part["right"]
        if part["means"]:
            means[family] = part["means"]

    # L is computed once, into a file where it is large
    if saved.spill:
        files = {l: saved.shelve(f"L-{l:06d}", {"L": L.cpu()}) for l, L in right.items()}
        right = LazyDict({l: lambda at=at: at.load()["L"].to(plan.device) for l, at in files.items()})
    else:
        right = dict(right)

    # experts that do not fit into memory get a file of their own in scratch
    scratch = saved.path.parent
    scratch.mkdir(parents=True, exist_ok=True)
    keys = [(family, *key) for family in job for key in plan.keys]
    mean_inputs = means and (lambda family, l, e: means[family](l, e))
    return FitData(plan.ckpt.expert, keys, cfg.bank.scope, plan.device, cfg.model.normalize,
                   cfg.fit.batch or saved.batch, right, left, cfg.bank.activation == "identity",
                   mean_inputs, fit_budget(cfg, plan.device), scratch)


def open_fitter(plan: FitPlan, job: tuple, moments: dict, saved: SavedFit) -> Fitter:
    # at its start, or where the saved state left it
    state, pairs = saved.load()
    saved.tidy()
    data = fit_data(plan, job, moments, saved)
    n = len(data)
    m, r = plan.shapes[job]
    if not state:
        return Fitter(data, plan.cfg, (m, r), plan.ckpt.dtype, shelve=saved.shelve)

    # shapes by the last part of a name: x.B, first.B, velocity.z; units are numbers
    shapes = {"B": (data.groups, m, r, data.d), "z": (n, m), "mask": (n, m), "A": (n, data.p, r)}
    with saved_state(saved.path):
        for name, t in state.items():
            kind, _, key = name.rpartition(".")
            fine = kind == "unit" or t.shape == shapes.get(key, t.shape)
            if not fine or not t.isfinite().all() or saved.step < 0:
                raise ValueError(f"{name} of {tuple(t.shape)}, NaN or Inf in it, or a step below 0")
        start = {name[2:]: t for name, t in state.items() if name.startswith("x.")}
        fitter = Fitter(data, plan.cfg, (m, r), plan.ckpt.dtype, start, saved.shelve)
        fitter.load_state(state, pairs)
    say(f"{'+'.join(job)}: resumed at step {saved.step}")
    return fitter


# settings that a saved state does not depend on: where things lie, how far to go, what comes after the fit
FREE = ("model.path", "model.revision", "model.force_download", "bank.memory", "fit.steps", "fit.batch",
        "fit.refine", "fit.down", "fit.save_every", "fit.budget", "fit.device", "calib.save")


def saved_fit(plan: FitPlan, job: tuple, out: Path) -> SavedFit:
    """The state of a job, with what it belongs to: the checkpoint, and the settings of its numbers."""
    about = {"checkpoint": plan.ckpt.state_of()}
    for section in ("model", "bank", "sparsity", "fit", "calib"):
        settings = dataclasses.asdict(getattr(plan.cfg, section))
        about |= {f"{section}.{key}": value for key, value in settings.items()}
    about = {key: value for key, value in about.items() if key not in FREE}
    about["calib.text, contents"] = digest_of(plan.cfg.calib.text)
    return SavedFit(out, "+".join(job), plan.sizes(job)["spill"], about, plan.cfg.fit.steps)


def fit_job(plan: FitPlan, job: tuple, moments: dict, log: Log, stop: threading.Event) -> dict:
    """Fit a job's families on one bank: {family: FamilyFactors}; `stop` saves and interrupts."""
    cfg = plan.cfg
    family = "+".join(job)
    begin = time.perf_counter()
    go_on = f"go on with: python globe.py fit --resume --out {log.path.parent}"
    saved = saved_fit(plan, job, log.path.parent)
    try:
        fitter = open_fitter(plan, job, moments, saved)
        # rows that came after the saved state are written again
        if not ranks()[0]:
            rows = read_rows(log.path)
            old = [row for row in rows if row.get("family") != family or row["step"] <= saved.step]
            write_text(log.path, "".join(json.dumps(row) + "\n" for row in old))
        with tqdm(total=cfg.fit.steps, initial=fitter.step_done, desc=family, file=sys.stderr,
                  dynamic_ncols=True, disable=ranks()[0] > 0) as line:
            while not fitter.done:
                row = {"family": family} | fitter.step()
                log.row(row | {"seconds": round(time.perf_counter() - begin, 3)})
                line.update(1)
                line.set_postfix_str(f"error {row['rel_frob']:.4f} support {row['support']:g}")
                # all ranks stop at the same step
                stopped = any_rank(stop.is_set())
                if stopped or fitter.done or fitter.step_done % cfg.fit.save_every == 0:
                    saved.save(fitter)
                saved.tidy(fitter.pairs)
                if stopped:
                    raise KeyboardInterrupt(f"state saved; {go_on}")
        return fitter.factors()
    except (OSError, Lost) as e:
        stands = f"{family}: the state of step {saved.step} stands; {go_on}"
        raise type(e)(f"{one_line(e)}; {stands if saved.step else 'nothing was saved yet'}") from None


def code_in(basis: str, plan: FitPlan, metrics: dict, down: dict, log: Log, stop: threading.Event) -> tuple:
    """({family: CodedFamily} of gate and up in a basis, {l: bits} for downs, of the spectra `down`);
    `stop` interrupts between layers."""
    jobs = [job for job in plan.shapes if "down" not in job]
    dense = sum(map(len, plan.shapes)) * len(plan.keys) * plan.ckpt.dims.p * plan.ckpt.dims.d
    data = CodeData(plan.experts, plan.ckpt.expert, metrics, plan.device, basis)
    spectra = {("down", l): s for l, s in down.items()}
    for job, l in bar("spectra")([*itertools.product(jobs, plan.experts)]):
        spectra[job, l] = spectrum(data.coordinates(job, l), len(job))
    # a rotation is stored once
    own = 8.25 * plan.ckpt.dims.d ** 2 * len(jobs) * (basis == "rotation")
    widths = share_bits(spectra, plan.bits * dense - own)
    families = {}
    for job in jobs:
        for row in code_families(job, data, {l: widths[job, l] for l in plan.experts}, bar("code")):
            if "families" in row:
                families |= row["families"]
                continue
            log.row({"family": "+".join(job)} | row)
            if stop.is_set():
                raise KeyboardInterrupt("the calibration is kept; go on with: python globe.py fit --resume "
                                        f"--out {log.path.parent}")
    return families, {l: stored_bits(s, widths["down", l]) for l, s in down.items()}


def code_run(plan: FitPlan, moments: dict, log: Log, stop: threading.Event) -> tuple:
    """({family: CodedFamily} of gate and up at bank.bits, {l: (bits, weights)} for downs in codes, or {}).

    bank.basis=auto is measured: a rotation's errors are smaller in the metric, yet a model may lose more."""
    expect(ranks()[1] == 1, "bank.bits: expected one process, found torchrun")
    cfg = plan.cfg
    windows = moments.get("windows", {0: None})[0]
    metrics = {}
    for family in families_of(cfg.model)[:2] if moments else ():
        metrics[family] = metric_of(moments, family, plan.keys, cfg.fit.ridge, plan.device)
    down = {}
    weights = {}
    if ("down",) in plan.shapes:
        expect(windows is not None and "output" in moments, "bank.bits, model.families=all: expected a "
               "calibration with its windows, found none (fit.metric=data, and no older calib.load)")
        for l, experts in plan.experts.items():
            weights[l] = moments["output"][l].float().expand(len(experts), -1).to(plan.device)
        down = down_spectra(plan.ckpt, plan.experts, windows, weights, cfg, plan.device, bar("downs"))

    # without inputs a rotation has nothing to go by
    bases = [cfg.bank.basis]
    if cfg.bank.basis == "auto":
        bases = ["orthonormal", "rotation"] if metrics and windows is not None else ["orthonormal"]
    expect(metrics or "rotation" not in bases, "bank.basis=rotation: expected fit.metric=data, found weights")
    losses = {}
    for basis in bases:
        found = code_in(basis, plan, metrics, down, log, stop)
        loss = 0.0
        if len(bases) > 1:
            some = windows[::math.ceil(len(windows) / AUTO_WINDOWS)]
            factors = Factors(found[0], plan.experts, plan.ckpt.dims, "", "")
            for ids, z in zip(some, reference_logits(plan.ckpt, factors, some, plan.device)):
                loss += float(F.cross_entropy(z[0, :-1], ids[1:])) / len(some)
            say(f"bank.basis={basis}: {loss:.4f} nats a token of the calibration text")
        losses[basis] = loss, found
    families, bits = min(losses.values(), key=lambda pair: pair[0])[1]
    return families, {l: (bits[l], weights[l]) for l in bits}


def fit_jobs(plan: FitPlan, moments: dict, log: Log) -> Factors:
    # one job after the other; Ctrl-C waits for the end of a step
    cfg = plan.cfg
    D = plan.ckpt.dims
    families = {}
    with held_interrupt() as stop, threads_for(D.p, D.d, cfg.fit.dtype):
        down = {}
        if plan.bits:
            families, down = code_run(plan, moments, log, stop)
        for job in () if plan.bits else plan.shapes:
            families |= fit_job(plan, job, moments, log, stop)
    log.close()

    # the settings that made them go with the factors; paths stay at home
    settings = dataclasses.asdict(cfg)
    for section in ("log", "tiny", "eval", "heal"):
        del settings[section]
    del settings["model"]["path"], settings["model"]["force_download"]
    settings["calib"] |= {"text": Path(cfg.calib.text).name, "load": None, "save": None}
    kind = plan.ckpt.config["model_type"]
    return Factors(families, plan.experts, D, kind, plan.ckpt.fingerprint(), settings), down


def refine_run(plan: FitPlan, factors: Factors, windows: Tensor, out: Path, down: dict) -> None:
    # in place, with new tensors in files; leaves RUN/refined.json; whatever ends it, the fit is safe
    scratch = out / "state" / "refined"
    try:
        with threads_for(factors.dims.p, factors.dims.d):
            rows = refine(plan.ckpt, factors, windows, plan.cfg, plan.device, scratch, bar("refine"), down)
    except (KeyboardInterrupt, OSError, Diverged, UserError) as e:
        why = one_line(e) or "refinement: cut short"
        raise type(e)(f"{why}; the fit is saved, go on with: python globe.py fit --resume --out {out} "
                      "(without a refinement: fit.refine=0 fit.down=false)") from None
    if "windows" in rows[0]:
        some = rows.pop(0)
        say(f"refinement: on {some['windows']} of {some['of']} windows, for want of memory")
    write_text(out / "refined.json", json.dumps(rows))
    # root mean square over layers
    before, after = (math.hypot(*(row[k] for row in rows)) / len(rows) ** 0.5 for k in ("before", "after"))
    say(f"refined: relative error of the layers' outputs {before:.4f} -> {after:.4f}")
    if down:
        factors.families["down"] = CodedFamily("down", factors.dims.p, dict.fromkeys(down), {}, down)


def fit_run(plan: FitPlan, out: Path, resume: bool) -> dict:
    """Calibrate, fit and refine in the run directory `out`; {} on all ranks but the first."""
    cfg = plan.cfg
    moments = {}
    # a state of another fit, or a tracker that is not installed, is refused before anything is written
    for job in plan.shapes:
        saved_fit(plan, job, out).check()
    log = Log(out / "log.jsonl", cfg, out.name)
    # the first rank writes what the others read, and removes a killed run's unfinished files
    with first_rank_first():
        if not ranks()[0]:
            for left in out.rglob(".*.tmp[0-9]*"):
                left.unlink()
            write_text(out / "config.yaml", yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False))
        if cfg.fit.metric == "data":
            moments = kept_moments(plan.ckpt, cfg, plan.device, out, resume)
    covered = sum(plan.sizes(job)["dense"] for job in plan.shapes) * plan.ckpt.dtype.itemsize
    say(f"the fit covers {covered / plan.ckpt.bytes:.0%} of the model's bytes")
    if not moments:
        say("no calibration (fit.metric=weights): every input direction counts the same")
    factors, down = fit_jobs(plan, moments, log)
    if ranks()[0]:
        return {}

    # the refinement works on a file, so that the fit's own factors leave the memory
    (out / "refined.json").unlink(missing_ok=True)
    scratch = out / "state" / "refined"
    wanted = moments and (cfg.fit.down or down or cfg.fit.refine and not factors.coded())
    if wanted and "windows" not in moments:
        say(f"{cfg.calib.load} was saved without the calibration's windows: no refinement")
    elif wanted:
        save_factors(factors, scratch / "factors.safetensors")
        factors = load_factors(scratch)
        refine_run(plan, factors, moments["windows"][0], out, down)
    if plan.rest_bits < 16:
        some = moments.get("windows", {0: None})[0]
        code_rest(plan.ckpt, factors, cfg, plan.rest_bits, some, plan.device, bar("rest"))
    save_factors(factors, out / "factors.safetensors")

    # what rested in files until now: adapters, the metric, other ranks' pairs
    factors = load_factors(out)
    for left in out.glob("state/*/[AL]-*.safetensors"):
        left.unlink()
    for left in (scratch, *out.glob("state/*/rank-*")):
        shutil.rmtree(left, ignore_errors=True)
    return fit_result(plan, factors, out / "factors.safetensors")


def fit_result(plan: FitPlan, factors: Factors, path: Path) -> dict:
    # sizes and errors of a finished run, as a table and as JSON
    rel_frob, support, rows = {}, {}, []
    for name, errors in reconstruction(plan.ckpt, factors).items():
        family = factors.families[name]
        rel_frob[name] = errors["all"]
        support[name] = float(family.support().float().median())
        rows.append((name, rel_frob[name], support[name], *family.shape()[1:]))
    say(text_table(("family", "relative Frobenius error", "median support", "m", "r"), rows))

    # bits: what is stored of the compressed matrices, over their numbers
    stored = 0
    for name, t in load_file(path).items():
        kind = name.rpartition(".")[2]
        factor = kind in ("A", "val", *INTEGERS) or name.startswith(("bank.", "basis."))
        if factor and not name.startswith("rest."):
            stored += 8 * t.nbytes
    model_ratio = factors.model_ratio(plan.ckpt.num_parameters())
    return {"factors": str(path.parent), "ratio": factors.ratio(), "model_ratio": model_ratio,
            "bits": stored / factors.sizes()[1], "bytes": path.stat().st_size, "rel_frob": rel_frob,
            "support": support, "steps": plan.cfg.fit.steps}


# Local files by absolute paths, so that the run can be used from elsewhere
def remember_paths(cfg: Config) -> None:
    for section, key in ((cfg.model, "path"), (cfg.calib, "text"), (cfg.calib, "load"), (cfg.eval, "text")):
        path = getattr(section, key)
        if path and path not in ("tiny", "builtin") and Path(path).exists():
            setattr(section, key, str(Path(path).resolve()))


def cmd_fit(args: argparse.Namespace) -> dict:
    begin = time.perf_counter()
    out = Path(args.out) if args.out else None
    if args.resume:
        out = out or newest_run(finished=False)
    # a resumed run has a config of its own
    cfg = run_config(out if args.resume else None, args)
    device = pick_device(args.device or cfg.fit.device)
    cfg.fit.dtype = str(as_dtype(args.dtype) or cfg.fit.dtype).removeprefix("torch.")
    if args.print_config:
        print(yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False), end="")
        return dataclasses.asdict(cfg)
    with joined_ranks(device):
        with first_rank_first():
            ckpt = open_model(cfg, device)
        remember_paths(cfg)
        if cfg.calib.load:
            settings_of_moments(cfg.calib)
            check_config(cfg)
        plan = FitPlan(cfg, ckpt, device)
        for job, (m, r) in plan.shapes.items():
            form = f"{plan.groups} x {m} bases of {r} x {ckpt.dims.d}"
            if plan.bits:
                form = f"{plan.bits:.3g} bits a weight in packed codes"
            say(f"{'+'.join(job)}: {len(plan.keys)} experts in {plan.layers} layers; {form}")
        if plan.rest_bits < 16:
            say(f"attention, shared experts, embeddings and head in {plan.rest_bits} bits")
        if args.dry_run:
            return dry_run(plan)
        if cfg.calib.save:
            fresh(Path(cfg.calib.save), args.overwrite or args.resume, ckpt.dir)
        # the first rank finds or clears the directory, and tells the others
        with first_rank_first():
            if not ranks()[0] and out is None:
                out = new_run(cfg)
            elif not ranks()[0] and not (args.resume and (out / "config.yaml").is_file()):
                fresh(out, args.overwrite, ckpt.dir, clear=True)
        out = first_rank_says(out)
        with discarded_on_error(out):
            result = fit_run(plan, out, args.resume)
    seconds = round(time.perf_counter() - begin, 1)
    # the other ranks have no result
    return result and result | {"seconds": seconds, "peak_rss_gib": round(peak_rss_gib(), 2)}


# ---- eval, export, info, generate --------------------------------------------------------------------
def read_evals(run: Path) -> dict:
    """{text: result} of RUN/eval.json, which feeds cards and plots; empty where no eval ran."""
    path = run / "eval.json"
    evals = read_json(path) if path.is_file() else {}
    for text, result in evals.items():
        with expecting(f"{path}: {text}: expected eval's figures", LookupError, TypeError, AttributeError,
                       ValueError):
            for key in ("ppl_dense", "ppl", "delta_nats", "tokens", "ratio", "model_ratio"):
                float(result[key])
            for measures in result.get("tasks", {}).values():
                dict(measures)
    return evals


# of factors: a hash of their description, with the settings that made them
def identity(factors: Factors) -> str:
    return hashlib.sha256(json.dumps(factors.meta(), sort_keys=True).encode()).hexdigest()[:16]


def cmd_eval(args: argparse.Namespace) -> dict:
    run, cfg, factors, ckpt, device, dtype = open_run(args)
    tokenizer = load_tokenizer(ckpt.dir)
    run_tasks = task_runner(args.tasks or (), tokenizer, cfg.eval.context)
    # windows (N, length) of the text
    where = args.text or cfg.eval.text
    text = read_text(where, "heldout")
    stride = cfg.eval.stride
    windows = ckpt.known(token_windows(tokenizer, text, cfg.eval.tokens, cfg.eval.length, stride))

    # relative error of the matrices, by family and layer
    errors = reconstruction(ckpt, factors)
    rows = [(family, *e.values()) for family, e in errors.items()]
    say(text_table(("family", "all layers", *map("layer {}".format, factors.experts)), rows))

    # one model after the other is in memory: nats per token, tokens, {task: {measure: value}}
    def measured(model: nn.Module, what: str) -> tuple:
        return *nll(model, windows, progress=bar(what), stride=stride), run_tasks(model)
    dense, tokens, dense_tasks = measured(load_dense(ckpt.dir, device, dtype), "dense")
    ours, _, tasks = measured(assemble(ckpt, factors, device, dtype, cfg.cache), "globe")

    for what, loss in (("the dense model", dense), ("GloBE", ours)):
        fine = math.isfinite(loss) and loss < 700  # whose exponential is finite too
        expect(fine, f"{what}: expected a finite loss, found {loss}: do activations overflow in {dtype}? "
                     "Give --dtype another type")
    model_ratio = factors.model_ratio(ckpt.num_parameters())
    result = {"ppl_dense": math.exp(dense), "ppl": math.exp(ours), "delta_nats": ours - dense,
              "tokens": tokens, "ratio": factors.ratio(), "model_ratio": model_ratio,
              "rel_frob": {family: e["all"] for family, e in errors.items()}}
    rows = [("perplexity", result["ppl_dense"], result["ppl"]), ("nats per token", dense, ours),
            ("experts' size", 1.0, result["ratio"]), ("model's size", 1.0, result["model_ratio"])]
    for task, measures in tasks.items():
        pairs = result.setdefault("tasks", {})[task] = {}
        for key, value in measures.items():
            pairs[key] = {"dense": dense_tasks[task][key], "globe": value}
            rows.append((f"{task} {key}", *pairs[key].values()))
    say(text_table(("measure", "dense", "GloBE"), rows))

    # kept for cards and plots, but in a run of somebody else's
    name = where if ":" in where else Path(where).name
    with contextlib.suppress(PermissionError):
        kept = result | {"of": identity(factors)}
        write_text(run / "eval.json", json.dumps(read_evals(run) | {name: kept}, indent=2))
    return result | {"factors": str(run)}


def cmd_export(args: argparse.Namespace) -> dict:
    run, cfg, factors, ckpt, device, _ = open_run(args)
    dtype = as_dtype(args.dtype or cfg.export.dtype) or ckpt.dtype
    to = Path(args.to) if args.to else run / "export"
    fresh(to, args.overwrite or not args.to, ckpt.dir, run=run)
    # of these factors, not of those that a resumed fit has replaced
    of = identity(factors)
    evals = {text: e for text, e in read_evals(run).items() if e.get("of", of) == of}

    # what the card calls the source: its hub id, else the directory's name
    base = ckpt.dir.name
    for name in (str(ckpt.config.get("_name_or_path")), cfg.model.path):
        hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
        if hub_id or name == "tiny":
            base = name

    # it takes its name when it was loaded afresh and its logits compared
    error = None
    with written(to) as tmp:
        tmp.mkdir()
        if args.format == "dense":
            export_dense(ckpt, factors, tmp, bar("export"))
        else:
            export_globe(ckpt, factors, tmp, args.format == "composed", dtype)
        if not args.no_check:
            error = logit_error(ckpt, factors, tmp, device)
        card = model_card(ckpt, factors, args.format, base, weight_bytes(tmp), evals)
        write_text(tmp / "README.md", card)
        shutil.rmtree(to, ignore_errors=True)
    if args.push_to_hub:
        push(to, args.push_to_hub, not args.public)
    return {"path": str(to), "format": args.format, "bytes": weight_bytes(to),
            "bytes_dense": ckpt.bytes, "max_logit_error": error}


def cmd_info(args: argparse.Namespace) -> dict:
    path = Path(args.directory)
    meta = None
    # factors, a run without any yet, an export, or a checkpoint
    if path.is_file() or (path / "factors.safetensors").is_file():
        factors = load_factors(path)
        meta = factors.meta()
        out = {"kind": "run", "ratio": factors.ratio()}
    elif (path / "config.yaml").is_file():
        rows = read_rows(path / "log.jsonl") or [{"step": 0}]
        out = {"kind": "unfinished run", "steps": rows[-1]["step"]}
    elif meta := globe_meta(read_json(path / "config.json")):
        check_meta(meta, str(path))
        out = {"kind": "composed export" if meta.get("composed") else "globe export"}
        out["bytes"] = weight_bytes(path)
    else:
        ckpt = Checkpoint(path)
        out = {"kind": "checkpoint", "model_type": ckpt.config["model_type"],
               "parameters": ckpt.num_parameters(), "dtype": str(ckpt.dtype),
               "bytes": ckpt.bytes, "fingerprint": ckpt.fingerprint()}
        out |= dataclasses.asdict(ckpt.dims)
    # the description that factors and exports carry
    if meta:
        out |= {k: meta.get(k) for k in ("model_type", "globe_version", "fingerprint")} | meta["dims"]
        for family, about in meta["families"].items():
            out[family] = ", ".join(f"{k} {v}" for k, v in about.items() if k not in ("group", "layers"))
        if rest := meta.get("rest"):
            out["rest"] = f"{len(rest)} layers in {min(rest.values())} bits"
    say(text_table(("", args.directory), [(key, one_line(value)) for key, value in out.items()]))
    return out


@torch.no_grad()
def cmd_generate(args: argparse.Namespace) -> dict:
    _, cfg, factors, ckpt, device, dtype = open_run(args)
    T = args.temperature
    expect(args.max_new_tokens > 0, f"--max-new-tokens: expected 1 or more, found {args.max_new_tokens}")
    expect(T == 0 or 0.01 <= T <= 100, f"--temperature: expected 0, or 0.01 to 100, found {T}")
    # surrogates are what Python makes of bytes that are not UTF-8
    broken = re.search("[\ud800-\udfff]", args.prompt)
    expect(not broken, "--prompt: expected UTF-8 text, found other bytes")
    tokenizer = load_tokenizer(ckpt.dir)
    # with what the tokenizer puts before a text, as the model's own pipeline does
    ids = tokenizer(args.prompt, return_tensors="pt")["input_ids"].to(device)
    expect(ids.shape[1], "--prompt: expected some text, found none")
    ckpt.known(ids)

    # calibration text shows the caches which experts are asked for
    first = None
    n = cfg.cache.warmup_tokens
    if n > 1:
        first = ckpt.known(token_windows(tokenizer, read_text(cfg.calib.text, "calibration"), n, n))
    model = assemble(ckpt, factors, device, dtype, cfg.cache)
    warm(model, first)

    # seconds are those of the new tokens and of the prompt's prefill
    begin = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.max_new_tokens,
                         num_beams=1, pad_token_id=tokenizer.pad_token_id or 0, do_sample=T > 0,
                         temperature=T or None)
    synchronize(device)
    seconds = time.perf_counter() - begin
    new = out[0, ids.shape[1]:]
    text = tokenizer.decode(new, skip_special_tokens=True)
    say(args.prompt + text)
    return {"text": text, "new_tokens": len(new), "tokens_per_second": round(len(new) / seconds, 2),
            **cache_stats(model)}


# ---- the command line --------------------------------------------------------------------------------
# name: (function, what it does, examples)
COMMANDS = {
    "fit": (cmd_fit, "compress the experts of a model into factors", """
  python globe.py fit    a tiny model, trained on first use
  python globe.py fit --config configs/qwen15.yaml --out runs/qwen
  python globe.py fit model.path=DIR bank.memory=6GiB --dry-run
  python globe.py fit --resume --out runs/qwen    go on where a stopped run was saved"""),
    "eval": (cmd_eval, "reconstruction and perplexity, dense beside GloBE", """
  python globe.py eval --factors runs/qwen --text book.txt eval.length=2048"""),
    "export": (cmd_export, "write a checkpoint", """
  python globe.py export --factors runs/qwen --to qwen-dense --format dense"""),
    "generate": (cmd_generate, "write text with the compressed model", """
  python globe.py generate --factors runs/tiny-001 --prompt "def main(" """),
    "info": (cmd_info, "what a directory is: checkpoint, run or export", """
  python globe.py info runs/tiny-001"""),
}
# commands that went elsewhere
MOVED = {"train": "moved to: python train.py tiny", "heal": "moved to: python train.py heal",
         "report": "moved to: python bench.py report", "sweep": "moved to: python bench.py sweep"}
ANY = " ".join(COMMANDS)
FITTED = "eval export generate"
FLAG = {"action": "store_true"}
DIRECTORY = {"metavar": "DIR"}
# (commands, option, what argparse is told of it, help)
OPTIONS = (
    ("info", "directory", DIRECTORY, "checkpoint, run (or its factors file) or export"),
    (ANY, "overrides", {"nargs": "*", "metavar": "section.key=value"}, "they win over --config"),
    (ANY, "--config", {"metavar": "YAML"}, "config file; see configs/"),
    (ANY, "--device", {}, "auto (default), cpu, cuda, cuda:N or mps"),
    (ANY, "--dtype", {}, "float32, bfloat16 or float16; default: the checkpoint's (fit: fit.dtype)"),
    ("fit", "--out", DIRECTORY, "run directory; default: a fresh runs/NAME-NNN"),
    ("fit", "--resume", FLAG, "go on from the saved state, if there is one"),
    ("fit", "--dry-run", FLAG, "show sizes, memory, disk and operations; write nothing"),
    ("fit", "--print-config", FLAG, "show the resolved config and stop"),
    ("fit export", "--overwrite", FLAG, "replace an output that exists"),
    (FITTED, "--factors", DIRECTORY, "run directory; default: the newest below ./runs"),
    (FITTED, "--model", {"metavar": "M"}, "source checkpoint, where it is not at model.path any more"),
    ("eval", "--text", {"metavar": "FILE"}, "for perplexity; default: built-in held-out files"),
    ("eval", "--tasks", {"nargs": "+", "metavar": "NAME"}, "tasks of lm-eval (names or YAML files)"),
    ("export", "--to", DIRECTORY, "default: RUN/export"),
    ("export", "--format", {"choices": ("globe", "dense", "composed"), "default": "globe"}, None),
    ("export", "--push-to-hub", {"metavar": "ORG/NAME"}, "upload it, into a private repository"),
    ("export", "--public", FLAG, "... into a public one"),
    ("export", "--no-check", FLAG, "do not load the export and compare its logits"),
    ("generate", "--prompt", {"required": True}, None),
    ("generate", "--max-new-tokens", {"type": int, "default": 64}, None),
    ("generate", "--temperature", {"type": float, "default": 0.0}, "0: greedy"),
)


def build_parser(program: str = "globe.py", description: str = "GloBE: shrink the experts of an MoE model.",
                 commands: dict = COMMANDS, options: Sequence = OPTIONS) -> argparse.ArgumentParser:
    """The parser of a program's commands and options, tables as COMMANDS and OPTIONS."""
    # examples keep their lines
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(program, description=description)
    parser.add_argument("--version", action="store_true", help="version, torch, operators in use")
    places = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (run, does, examples) in commands.items():
        command = places.add_parser(name, help=does, description=does, epilog=f"examples:{examples}", **raw)
        command.set_defaults(run=run)
        for names, option, settings, text in options:
            if name in names.split():
                command.add_argument(option, help=text, **settings)
    return parser


def parse(argv: Sequence[str] | None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Options and section.key=value in any order (argparse alone wants these before options)."""
    parser = parser or build_parser()
    args, rest = parser.parse_known_args(argv)
    # --tasks takes all that follows it
    if tasks := getattr(args, "tasks", None):
        rest += [t for t in tasks if "=" in t]
        args.tasks = [t for t in tasks if "=" not in t]
    # what argparse does not know must be key=value
    odd = [a for a in rest if a.startswith("-") or "=" not in a or not hasattr(args, "overrides")]
    if odd:
        parser.error(f"unrecognized arguments: {' '.join(odd)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def exit_code(name: str, run: Callable[[], dict]) -> int:
    """Run a command and print its JSON: 0 done, 1 a failure of ours, 2 wrong input, 130 stopped."""
    try:
        result = run()
    # also a full disk, or a file that went away
    except (UserError, OSError, SafetensorError) as e:
        say(f"{name}: {one_line(e)}")
        return 2
    except (Diverged, Lost) as e:
        say(f"{name}: {e}")
        return 1
    except KeyboardInterrupt as e:
        say(f"{name}: stopped; {e}")
        return 130
    # every rank but the first has no result; a figure that is none is no result either
    try:
        text = json.dumps(result, allow_nan=False)
    except ValueError:
        say(f"{name}: expected finite figures, found NaN or Inf in {one_line(result)}")
        return 1
    if result:
        print(text)
    return 0


def run_command(argv: Sequence[str] | None, moved: dict, parser: argparse.ArgumentParser) -> int:
    """Run what a command line asks for; returns the exit code. moved: {command: where it went}."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in moved:
        say(f"{parser.prog} {argv[0]}: {moved[argv[0]]}")
        return 2
    try:
        args = parse(argv, parser)
    except SystemExit as e:
        return int(e.code or 0)
    if args.version:
        print(json.dumps({"globe": __version__, "torch": torch.__version__, "operators": kernels()}))
        return 0
    if not args.command:
        parser.print_help(sys.stderr)
        return 2
    return exit_code(f"{parser.prog} {args.command}", lambda: args.run(args))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(argv, MOVED, build_parser())


if __name__ == "__main__":
    sys.exit(main())
