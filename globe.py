"""GloBE (Global-Basis Experts): shrink the routed experts of a Mixture-of-Experts language model.

Every expert's gate and up matrix (and, on request, its down matrix, transposed) is written as

    W_i  ~=  shift + scale * A_i . phi( sum_{j in S_i} alpha_ij B_j )

    W_i      (p, d)   one expert's matrix; p = moe_intermediate_size, d = hidden_size
    B_j      (r, d)   basis j of a bank of m; a family (gate, up, down) has one bank for all layers,
                      or one per group of layers (bank.scope)
    alpha_i  (m,)     sparse mixture: sparsemax / entmax of logits z_i / T; support S_i
    A_i      (p, r)   the expert's own adapter
    phi               identity, silu or tanh
    B~_i     (r, d)   phi(sum_j alpha_ij B_j), the composed basis: built once per expert at run time, kept in
                      an LRU cache
    L_l      (d, d)   Cholesky factor of layer l's input second moment, half of it weighted by how much a token counts;
                      S_i: weights of an expert's rows by how far they move the model's predictions; the fit minimises
                      sum_i || S_i^T (W_i - W^_i) L_l ||_F^2  (fit.metric: data), or with S = L = I (weights)

One flow, no way back:
    checkpoint -> experts -> (calibrate) -> fit -> factors file -> patch | export -> eval, bench

    python globe.py fit                          the default job: a tiny MoE, from nothing to factors
    python globe.py eval                         reconstruction and perplexity, dense beside GloBE
    python globe.py export --format dense        the source checkpoint with its experts replaced, in place
    python globe.py --help                       everything else
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import hashlib
import html
import importlib.util
import itertools
import json
import math
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy as np
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages for large tensors, whose page faults are dear
import torch
import torch.nn.functional as F
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.adam import adam
from tqdm import tqdm

__version__ = "0.1.0"
FORMAT_VERSION = 1
FAMILIES = ("gate", "up", "down")


def one_line(text: Any) -> str:
    """For a terminal: a stranger's file puts no line breaks and no control characters there, nor megabytes."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return text if len(text) <= 1500 else f"{text[:1000]} ... {text[-400:]}"


class UserError(Exception):
    """The user's input is wrong: one clear line on stderr, exit code 2."""

    def __init__(self, text: str):
        super().__init__(one_line(text))


def expect(fine: Any, text: str) -> None:
    """UserError(text) unless fine."""
    if not fine:
        raise UserError(text)


# ======================================================================================================
# 1. Config: dataclasses; defaults < YAML < command line
# ======================================================================================================
@dataclass
class ModelConfig:
    path: str = "tiny"                  # directory, hub id, or "tiny": the default model, trained once
    revision: str | None = None
    force_download: bool = False
    families: str = "both"              # up | gate | both | all (gate, up and down)
    include_shared: bool = False        # the shared expert too, in slices of moe_intermediate_size
    single_layer: int | None = None     # fit this layer only
    max_experts: int | None = None      # at most so many experts per layer; the rest stay dense
    sample: str = "first_n"             # first_n | evenly_spaced: which ones
    normalize: str = "scale"            # none | scale (divide by the deviation) | zscore (also take off the mean)


@dataclass
class BankConfig:
    m: int | dict = 32                  # bases per bank; one number, or {gate: 16, up: 24} (bank.share: gate's)
    r: int | float | None = None        # rows of a basis; a float is a fraction of p
    ratio: float | None = 0.7           # where r is not given: the r for this stored / dense size
    memory: str | None = None           # wanted size of the whole model, as 18GiB: families and ratio follow
    scope: str | int = "global"         # global | layer | N (groups of N neighbouring layers)
    share: bool = True                  # gate and up draw from one bank of m bases (where both are compressed)
    activation: str = "identity"        # phi: identity | silu | tanh
    init: str = "auto"                  # experts | svd | dictionary | random | auto (short trials of experts and random)


@dataclass
class SparsityConfig:
    map: str = "auto"                   # signed (free coefficients on the support) | sparsemax | entmax | softmax; auto:
                                        # signed under phi = identity, else softmax (planted silu: error 0.08 against 0.15)
    alpha: float = 1.5                  # of entmax: 1 (softmax), 1.5 or 2 (sparsemax)
    support: int = 8                    # largest support at the end
    T0: float = 1.0                     # first temperature
    eta: float = 0.9                    # T is multiplied by this at every stage while supports are too large
    freeze: float | None = None         # fraction of the steps after which supports are cut to size and fixed; default:
                                        # 0.15 for signed (on real weights even a random support is as good), else 0.7
    l1: float = 0.0                     # on |alpha|; acts on signed mixtures (a simplex has constant L1)
    eps_prune: float = 1e-4             # mixture weights below this are dropped when supports are fixed


@dataclass
class AdamConfig:
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-12
    lr_A: float = 1.0                   # learning rates of A and z relative to fit.lr, which is B's
    lr_z: float = 1.0
    safeguard: bool = True              # false: plain Adam, steps may raise the loss (the MoBE setting)


@dataclass
class HomotopyConfig:
    lam_start: float = 1.0              # phi_lam(z) = (1 - lam) z + lam phi(z)
    lam_end: float = 1.0
    lam_steps: int = 0
    beta_start: float = 0.5             # method am: targets (1 - beta) X + beta argmin_T ||W - A T||
    beta_end: float = 1.0
    beta_steps: int = 20
    every: int = 10                     # schedules move once in so many steps


@dataclass
class FitConfig:
    method: str = "varpro"              # varpro (A eliminated) | am (alternating minimisation) | adam (joint)
    metric: str = "data"                # data (weighted by the layer's input covariance) | weights
    ridge: float = 0.03                 # shrinkage of the covariance, relative to its mean diagonal
    steps: int = 150
    batch: int = 0                      # experts per batch; 0: from the memory at hand
    lr: float = 0.05
    memory: int = 4                     # varpro: pairs of bank-sized tensors that L-BFGS keeps
    adam: AdamConfig = field(default_factory=AdamConfig)
    homotopy: HomotopyConfig = field(default_factory=HomotopyConfig)
    lambda_A: float = 1e-6              # ridge on A, relative to the mean diagonal of its Gram matrix
    lambda_B: float = 0.0               # on ||B||^2, relative to the bank's size at the start
    lambda_T: float = 1e-4              # method am: ridge on the targets, relative likewise
    spectral: float = 0.0               # on the squared spectral norms of A and B
    tol: float = 0.0                    # stop where ten steps gain less than this, relatively
    refine: int = 6                     # behind the fit, on the calibration's tokens: steps for each layer's adapters by its own output;
    down: bool = True                   # ... and its down projections solved for once more (adapters where down was fitted, else dense)
    seed: int = 0
    save_every: int = 25
    budget: float | None = None         # GiB that the fit may plan on; default: what is free
    device: str = "auto"
    dtype: str = "float32"              # of the products (tf32: on CUDA); sums and Cholesky are float32 or better


@dataclass
class CalibConfig:
    text: str = "builtin"               # text file, directory of them, or builtin (the standard library's)
    tokens: int = 131072
    length: int = 512
    batch: int = 4                      # windows that a layer sees at a time
    fisher: bool = True                 # weigh errors by the gradient of the model's own predictions (a backward pass, in all
                                        # four forward passes' work); false: by what they move in the residual stream (one)
    means: bool = True                  # each row's mean input too: its error counts most where its neuron acts (the fit takes
                                        # a quarter more time; the moments' file, half of the experts' numbers more)
    sampled: int = 0                    # more tokens, sampled from the dense model itself (it must fit in memory): they
                                        # bring in domains that the text lacks
    dtype: str | None = None            # that the dense model works in, in heal too; default: the checkpoint's
    shrink: str | None = None           # auto: in place of fit.ridge, the one with which either half of the windows serves the other best
    save: str | None = None             # file to write the moments to
    load: str | None = None             # ... and to take them from, in place of a calibration


@dataclass
class CacheConfig:
    mode: str = "lru"                   # lru | lfu (keeps the most used, not the most recent) | all (every expert composed
                                        # once and held) | none | direct (nothing is composed: the bases act on the tokens
                                        # and their results are mixed; for banks of a few bases, activation identity)
    per_layer: int | None = None        # slots per layer; default: half of the experts
    budget: float | None = None         # MiB for all layers together, in place of per_layer, shared out by what each asks for
    dtype: str | None = None            # of what is held; default: the model's
    warmup_tokens: int = 256            # of calibration text, to fill the caches and share out the budget


@dataclass
class ExportConfig:
    dtype: str | None = None            # of globe and composed exports; dense ones keep the source's


@dataclass
class LogConfig:
    to: str = "none"                    # none | trackio | wandb, beside log.jsonl
    project: str = "globe"
    run_name: str | None = None
    tags: list | None = None


@dataclass
class EvalConfig:
    text: str = "builtin"               # text file, hf:DATASET:CONFIG:SPLIT or builtin (held-out library files)
    tokens: int = 32768
    length: int = 512                   # window
    stride: int | None = None           # tokens from one window to the next, the rest is context; default: length, and
                                        # windows spread over the text
    context: int | None = None          # longest input that lm-eval's tasks may use; default: the model's


@dataclass
class TrainConfig:
    """A small Qwen2-MoE: a dense model first, then upcycled and trained on. Sizes in numbers, lengths in tokens."""
    hidden_size: int = 96                         # d
    layers: int = 4
    heads: int = 3
    kv_heads: int = 3
    experts: int = 16
    top_k: int = 4
    moe_intermediate_size: int = 96               # p
    shared_expert_intermediate_size: int = 96     # the dense FFN is top_k * p + this wide
    upcycle_noise: float = 0.6                    # standard deviation of the noise on copies, relative to the weights'
    dense_steps: int = 150
    moe_steps: int = 450
    batch: int = 8
    seq_len: int = 256
    lr: float = 5e-3
    warmup: int = 40
    weight_decay: float = 0.1
    clip: float = 1.0
    aux_coef: float = 0.01                        # of the load-balancing loss
    grad_checkpoint: bool = False
    dense_from: str | None = None                 # a dense Qwen2 or Llama directory: upcycle it, no dense phase
    text: str | None = None                       # a utf-8 file; None: the standard library's own text
    autocast: str = "auto"                        # auto | bf16 | fp16 | off; auto: bf16 on a GPU that has it, else off
    save_every: int = 200                         # steps between resumable states; 0: only when stopped
    seed: int = 0


@dataclass
class HealConfig:
    """Recovery after the fit. Text and windows are calib.text, calib.length and calib.batch."""
    stack: int | str = "auto"           # decoder layers trained together; auto: all where the memory allows, else one
    steps: int = 400                    # at most, per stack
    batch: int = 2                      # windows per step
    lr: float = 5e-4                    # size of a step relative to the tensor's own, at its peak
    warmup: int = 20
    tokens: int = 262144
    held_out: float = 0.05              # fraction of the windows that is never trained on, and decides
    check_every: int = 25               # steps between two looks at the held-out windows
    mean: float = 0.05                  # weight of a step in the running mean of the parameters, which is what is kept; 1: the last
    patience: int = 4                   # looks in a row without a gain after which a stack is done
    logits_weight: float | None = None  # of KL(dense || healed) of the logits, against the error of the stack's output;
                                        # default: 1 where the stack is the whole model, else 0
    bank: str = "auto"                  # train | freeze | auto: train the banks all of whose layers are in the stack
    norms: bool = True                  # train the weights of the layers' norms too; they take the source's place, one for one
    save_every: int = 50
    grad_checkpoint: bool = False       # compute a layer's activations again on the way back, in less memory


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    calib: CalibConfig = field(default_factory=CalibConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    heal: HealConfig = field(default_factory=HealConfig)
    sweep: dict = field(default_factory=dict)   # {section.key: [values]}: fit once for each combination
    log: LogConfig = field(default_factory=LogConfig)


CHOICES = {
    "model.families": ("up", "gate", "both", "all"), "model.sample": ("first_n", "evenly_spaced"),
    "model.normalize": ("none", "scale", "zscore"), "bank.activation": ("identity", "silu", "tanh"),
    "bank.init": ("auto", "experts", "svd", "dictionary", "random"), "sparsity.map": ("auto", "sparsemax", "entmax", "softmax", "signed"),
    "sparsity.alpha": (1.0, 1.5, 2.0), "fit.method": ("varpro", "am", "adam"), "fit.metric": ("data", "weights"),
    "cache.mode": ("lru", "lfu", "all", "none", "direct"), "log.to": ("none", "trackio", "wandb"),
    "heal.bank": ("auto", "train", "freeze"), "calib.shrink": (None, "auto"),
    "fit.dtype": ("float64", "float32", "tf32", "bfloat16", "float16"),
    **dict.fromkeys(("calib.dtype", "cache.dtype", "export.dtype"), (None, "float32", "bfloat16", "float16")),
}
POSITIVE = ("bank.m", "bank.r", "bank.ratio", "model.max_experts", "sparsity.support", "sparsity.T0", "fit.steps",
            "fit.lr", "fit.save_every", "fit.memory", "fit.budget", "fit.homotopy.every", "calib.tokens", "calib.length", "calib.batch",
            "heal.steps", "heal.batch", "heal.lr", "heal.tokens", "heal.check_every", "heal.patience", "heal.save_every",
            "cache.per_layer", "cache.budget", "eval.tokens", "eval.length", "eval.stride", "eval.context",
            *(f"train.{k}" for k in ("hidden_size", "layers", "heads", "kv_heads", "experts", "top_k", "moe_intermediate_size", "batch",
                                     "seq_len", "lr", "clip")))
NON_NEGATIVE = ("fit.refine", "model.single_layer", "sparsity.l1", "sparsity.eps_prune", "fit.batch", "fit.ridge", "fit.lambda_A",
                "fit.lambda_B", "fit.lambda_T", "fit.spectral", "fit.tol", "fit.seed", "cache.warmup_tokens",
                "fit.homotopy.lam_steps", "fit.homotopy.beta_steps", "calib.sampled", "heal.warmup",
                *(f"train.{k}" for k in ("shared_expert_intermediate_size", "upcycle_noise", "dense_steps", "moe_steps", "warmup",
                                         "weight_decay", "aux_coef", "save_every", "seed")))
FRACTIONS = ("sparsity.eta", "sparsity.freeze", "fit.adam.beta1", "fit.adam.beta2", "fit.homotopy.lam_start",
             "fit.homotopy.lam_end", "fit.homotopy.beta_start", "fit.homotopy.beta_end", "heal.held_out", "heal.logits_weight", "heal.mean")


def _coerce(value: Any, kind: str, where: str) -> Any:
    """Bring a YAML or command-line value to the annotated kind ("int | float | None"), or raise UserError."""
    kinds, number = kind.split(" | "), isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None and "None" in kinds or type(value) is not float and type(value).__name__ in kinds:
        return value
    if (number or isinstance(value, str)) and "float" in kinds:
        with contextlib.suppress(ValueError, OverflowError):  # PyYAML reads 1e-3 as text
            if math.isfinite(float(value)):
                return float(value)
    elif number and kinds == ["str"]:
        return str(value)
    raise UserError(f"{where}: expected {' or '.join(kinds)}, found {short(value)}")


def short(value: Any) -> str:
    """repr for an error line, cut: a value from a stranger's file can be megabytes."""
    try:
        text = repr(value)
    except ValueError:  # an int of more than 4,300 digits
        text = "a huge number"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _merge(node: Any, update: Any, where: str, source: str) -> None:
    """Write a nested mapping into a dataclass tree; an unknown key names the nearest known one."""
    expect(isinstance(update, dict), f"{source}: {where or 'top level'}: expected a mapping, found {short(update)}")
    names = {f.name: f for f in dataclasses.fields(node)}
    for key, value in update.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1, 0)
            raise UserError(f"{source}: unknown key {path}; did you mean {f'{where}.' if where else ''}{near[0]}?")
        if dataclasses.is_dataclass(getattr(node, key)):
            _merge(getattr(node, key), value, path, source)
        else:
            setattr(node, key, _coerce(value, names[key].type, f"{source}: {path}"))


def check_config(cfg: Config) -> Config:
    """Refuse values that no run could use; returns cfg."""
    for path, allowed in CHOICES.items():
        value = operator.attrgetter(path)(cfg)
        expect(value in allowed, f"{path}: expected one of {', '.join(map(str, allowed))}, found {value!r}")
    most = lambda v: 2 ** 40 if isinstance(v, int) else 1e38
    for paths, good, text in ((POSITIVE, lambda v: 0 < v <= most(v), "a number above 0, at most 2^40 or 1e38"),
                              (NON_NEGATIVE, lambda v: 0 <= v <= most(v), "0 or more, at most 2^40 or 1e38"),
                              (FRACTIONS, lambda v: 0 <= v <= 1, "a number from 0 to 1")):
        for path in paths:
            value = operator.attrgetter(path)(cfg)
            for v in value.values() if isinstance(value, dict) else [value]:
                expect(v is None or isinstance(v, (int, float)) and good(v), f"{path}: expected {text}, found {short(v)}")
    if isinstance(cfg.bank.m, dict) and (not cfg.bank.m or not set(cfg.bank.m) <= set(FAMILIES) or
                                         any(type(v) is not int for v in cfg.bank.m.values())):
        raise UserError(f"bank.m: expected a whole number per family (gate, up, down), found {short(cfg.bank.m)}")
    for key, values in cfg.sweep.items():
        if not isinstance(key, str) or not isinstance(values, list) or not values:
            raise UserError(f"sweep: {short(key)}: expected section.key: [values], a list with something in it, found {short(values)}")
    if not (cfg.bank.scope in ("global", "layer") or re.fullmatch("[0-9]{1,9}", str(cfg.bank.scope)) and int(cfg.bank.scope) > 0):
        raise UserError(f"bank.scope: expected global, layer or a number of layers, found {cfg.bank.scope!r}")
    t = cfg.train
    expect(cfg.eval.length >= 2, f"eval.length: expected 2 or more, found {cfg.eval.length}")
    expect(t.hidden_size % (2 * t.heads) == 0, f"train.hidden_size: expected a multiple of 2 x heads = {2 * t.heads}, found {t.hidden_size}")
    expect(t.heads % t.kv_heads == 0, f"train.heads: expected a multiple of kv_heads = {t.kv_heads}, found {t.heads}")
    expect(t.top_k <= t.experts, f"train.top_k: expected at most train.experts = {t.experts}, found {t.top_k}")
    expect(t.seq_len >= 2, f"train.seq_len: expected 2 or more, found {t.seq_len}")
    if cfg.heal.stack != "auto" and not (isinstance(cfg.heal.stack, int) and cfg.heal.stack > 0):
        raise UserError(f"heal.stack: expected auto or a number of layers, found {cfg.heal.stack!r}")
    expect(cfg.bank.r is not None or cfg.bank.ratio is not None, "bank: expected r or ratio, found neither")
    if cfg.cache.mode == "direct":
        expect(cfg.bank.activation == "identity", f"cache.mode=direct: expected bank.activation identity, found {cfg.bank.activation}")
    return cfg


class _Plain(yaml.SafeLoader):
    """SafeLoader that refuses aliases (a few lines of them unfold to gigabytes) and a key that comes twice."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"anchors and aliases are not supported, found one in line {self.peek_event().start_mark.line + 1}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise yaml.YAMLError(f"key {max(keys, key=keys.count)} twice in one mapping, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def read_yaml(text: str, where: str) -> Any:
    """Plain data from YAML; UserError for anything else, however hostile."""
    try:
        return _Plain(text).get_single_data()
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(e).split())[:300]}") from None


def load_config(path: str | None = None, overrides: Sequence[str] = (), base: dict | None = None, where: str = "the run's config.yaml") -> Config:
    """Resolve a config: defaults < base (a run's own) < YAML file < section.key=value overrides.

    Raises UserError for an unreadable file, an unknown key (the nearest known one is named) or a wrong type."""
    cfg = Config()
    if base:
        _merge(cfg, base, "", where)
    if path:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--config {path}: {getattr(e, 'strerror', None) or 'not a text file'}") from None
        _merge(cfg, read_yaml(text, f"--config {path}") or {}, "", path)
    for item in overrides:
        key, eq, text = item.partition("=")
        expect(eq, f"{item!r}: expected section.key=value")
        update = read_yaml(text, short(item))
        for part in reversed(key.split(".")):
            update = {part: update}
        _merge(cfg, update, "", "command line")
    return check_config(cfg)


# ---- files: a write finished or never happened -------------------------------------------------------
def flush(path: Path) -> None:
    """Bring a file to the disk."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())


@contextlib.contextmanager
def written(path: Path, sync: bool = True) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it onto `path` when the block ends well, else remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        yield tmp
        if tmp.is_file() and sync:
            flush(tmp)
        os.replace(tmp, path)
    finally:
        shutil.rmtree(tmp) if tmp.is_dir() else tmp.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with written(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def tensor_bytes(t: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, to read into or to write from without a copy."""
    return memoryview(t.flatten().view(torch.uint8).numpy()) if t.numel() else memoryview(b"")


def read_into(f, t: Tensor) -> Tensor:
    """Fill the CPU tensor t from an open file; OSError where it ends too soon."""
    view = tensor_bytes(t)
    while len(view):
        n = f.readinto(view[:2 ** 30])
        if not n:
            raise OSError(f"{f.name}: {len(view)} bytes short")
        view = view[n:]
    return t


SAFE_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32",
               torch.int64: "I64", torch.bool: "BOOL", torch.uint8: "U8"}


def write_tensors(path: Path, shapes: dict, tensors: Mapping, metadata: dict | None = None, sync: bool = True) -> None:
    """Write a safetensors file one tensor at a time: {name: (dtype, shape)} first, then tensors[name], which may be made
    only when it is asked for. sync: on the disk, not only in its cache, before this returns."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, shape) in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFE_DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with written(path, sync) as tmp, open(tmp, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in shapes.items():
            t = tensors[name]
            assert (t.dtype, tuple(t.shape)) == (dtype, tuple(shape)), name
            f.write(tensor_bytes(t.detach().cpu().contiguous()))


def read_tensors(path: Path, make: Callable = lambda name, shape, dtype: torch.empty(shape, dtype=dtype)) -> dict:
    """{name: tensor} of a safetensors file of ours, in aligned memory from `make`: what a memory map has touched would count
    as the process's, and MKL rounds otherwise where tensors are not aligned."""
    kinds = {v: k for k, v in SAFE_DTYPES.items()}
    with open(path, "rb", buffering=0) as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        header.pop("__metadata__", None)
        return {name: read_into(f, make(name, h["shape"], kinds[h["dtype"]])) for name, h in header.items()}


class Shelved:
    """A dict of CPU tensors, in memory or, after to(path), in a file that is read at every use."""

    def __init__(self, tensors: dict):
        self.tensors, self.path = tensors, None

    def save(self, path: Path, sync: bool = True) -> None:
        write_tensors(path, {k: (v.dtype, v.shape) for k, v in self.tensors.items()}, self.tensors, sync=sync)

    def to(self, path: Path) -> Shelved:
        self.save(path, sync=False)
        self.tensors, self.path = None, path
        return self

    def load(self, *make: Callable) -> dict:
        return self.tensors if self.path is None else read_tensors(self.path, *make)


class LazyDict(Mapping):
    """{key: tensor} where each is made when it is asked for; the last one is kept."""

    def __init__(self, make: dict):
        self.make, self.last = make, (None, None)

    def __getitem__(self, key: Any) -> Tensor:
        if self.last[0] != key or self.last[1] is None:
            self.last = (None, None)  # two of them need never be in memory
            self.last = key, self.make[key]()
        return self.last[1]

    def __iter__(self) -> Iterator:
        return iter(self.make)

    def __len__(self) -> int:
        return len(self.make)


@contextlib.contextmanager
def saved_state(path: Path) -> Iterator[None]:
    """UserError for whatever goes wrong while a saved state is read: the file is damaged, or another run's."""
    try:
        yield
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as e:
        raise UserError(f"{path}: expected the saved state of this run, found {type(e).__name__}: {e}; start again with --overwrite") from None


def user_cache() -> Path:
    """Where the default model lives: $GLOBE_CACHE, else the user's cache directory."""
    return Path(os.environ.get("GLOBE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "globe")


# Devices: the only place that knows CUDA and MPS by name ----------------------------------------------
def pick_device(name: str | None = "auto") -> torch.device:
    """A torch.device for "auto", "cpu", "cuda[:i]" or "mps"; UserError where that one is not there."""
    if name in (None, "auto"):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if has_cuda() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: expected auto, cpu, cuda, cuda:N or mps, found {name!r}") from None
    there = {"cpu": True, "cuda": has_cuda(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type) or device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: not available here (available: {', '.join(k for k, v in there.items() if v)})")
    return device


def has_cuda() -> bool:
    return torch.cuda.is_available()


def synchronize(device: torch.device) -> None:
    """Wait for what was queued on `device`; needed around every timing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@functools.cache
def onednn_keeps_float32() -> bool:
    """Whether oneDNN multiplies float32 matrices as float32 where it would be allowed bfloat16: true without AMX."""
    if getattr(torch.backends.mkldnn, "matmul", None) is None or not torch.backends.mkldnn.is_available():
        return False
    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    before, torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision, "bf16"
    try:
        return all(float((x @ y - (x.double() @ y.double())).norm()) < 1e-5 * 512 ** 1.5
                   for x, y in ((a, a), (a.T, a), (a, a.T), (a.expand(2, -1, -1), a.T.expand(2, -1, -1))))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@contextlib.contextmanager
def threads_for(p: int, d: int, dtype: str = "float32") -> Iterator[None]:
    """Settings for work on (p, d) matrices. Small ones: one CPU thread (on 96 x 96 a second one made a fit 2 to 10 times
    slower). Large ones: float32 products by oneDNN, which reach 375 GFLOP/s on two cores of an EPYC where MKL's reach 139."""
    threads, small = torch.get_num_threads(), p * d <= 2 ** 14
    settings = [(torch.backends.mkldnn.matmul, "bf16")] if not small and onednn_keeps_float32() else []
    settings += [(torch.backends.cuda.matmul, "tf32")] if dtype == "tf32" else []
    with contextlib.ExitStack() as undo:
        undo.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1 if small else threads)
        for backend, value in settings:
            undo.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = value
        yield


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """glibc keeps freed memory for the next tensor meanwhile. Else it goes back to the system and comes again, page fault by
    page fault: a third of a training step's time where activations take gigabytes."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", lambda option, value: None)  # musl has none
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: 32 MiB is the most it takes
    try:
        mallopt(trim, -1), mallopt(mmap, 2 ** 25)
        yield
    finally:
        mallopt(trim, 2 ** 26)  # where glibc's own adjustment ends; the start values would stay, and slow down what follows
        getattr(libc, "malloc_trim", lambda pad: None)(0)


def fit_budget(cfg: Config, device: torch.device) -> float:
    """Bytes that a rank may plan on."""
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    return cfg.fit.budget * 2 ** 30 if cfg.fit.budget else free_memory(device) / shared


def host_buffer(shape: tuple, device: torch.device) -> Tensor:
    """A float32 buffer on the CPU that is quick to copy to `device`."""
    return torch.empty(shape, pin_memory=device.type == "cuda")


def upload(t: Tensor, device: torch.device, stream: Any) -> tuple:
    """(t on the device, what to wait for): on CUDA a copy on its own stream, beside the computing; t may be used again after
    the wait of the next copy but one."""
    if device.type != "cuda":
        return t.to(device), None
    with torch.cuda.stream(stream):
        moved, done = t.to(device, non_blocking=True), torch.cuda.Event()
        done.record(stream)
        done.synchronize()  # in the reader's thread: the buffer is free from here on
    return moved, done


def arrived(t: Tensor, done: Any) -> Tensor:
    """t, once the current stream may use it."""
    if done is not None:
        torch.cuda.current_stream(t.device).wait_event(done)
        t.record_stream(torch.cuda.current_stream(t.device))
    return t


def side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class Lost(RuntimeError):
    """Another process of a distributed fit is gone."""


def ranks() -> tuple:
    """(rank, number of ranks): (0, 1) but for processes that joined a job."""
    on = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if on else (0, 1)


@contextlib.contextmanager
def joined_ranks(device: torch.device) -> Iterator[None]:
    """Join the job that torchrun started this process for; nothing to join without it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    except (ValueError, RuntimeError) as e:
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: expected to be started by torchrun, found {' '.join(str(e).split())[:200]}") from None
    try:
        if device.type == "cpu":
            SHARED.extend(shared_slots())
        yield
    finally:
        SHARED.clear()
        with contextlib.suppress(RuntimeError):
            torch.distributed.destroy_process_group()


SHARED: list = []  # two sets of (ranks, n) float32 slots in memory that all ranks see; empty where they are on several hosts


def shared_slots(size: int = 2 ** 21) -> list:
    """What SHARED holds: a file in /dev/shm that loses its name once all have it. Ranks sum four times as fast through it as
    over gloo's sockets; every rank reads what all wrote, so many ranks are better off with gloo's ring."""
    shm, path, there = Path("/dev/shm"), None, None
    rank, world = ranks()
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"] and world <= 8 and shm.is_dir():
        try:
            if not rank:
                with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=shm, prefix="globe-", delete=False) as f:
                    path = f.name
                    os.posix_fallocate(f.fileno(), 0, 8 * size * world)  # containers may have little of it
                    there = path
            there = first_rank_says(there)
            if there:
                slots = torch.from_file(there, shared=True, size=2 * size * world).view(2, world, size)
                any_rank(False)  # all have opened it
                return [*slots]
        finally:
            if path:
                os.unlink(path)
    return []


def first_rank_says(value: Any) -> Any:
    """The first rank's value, on every rank."""
    box = [value]
    if ranks()[1] > 1:
        torch.distributed.broadcast_object_list(box, 0)
    return box[0]


def all_sum(*tensors: Tensor) -> None:
    """Each tensor becomes its sum over the ranks, in place. Raises Lost where one of them is gone."""
    if ranks()[1] == 1:
        return
    for t in tensors:
        try:
            if SHARED and t.numel() > 2 ** 14 and t.dtype == torch.float32 and t.is_contiguous():
                flag = torch.zeros(1)
                for part in t.view(-1).split(SHARED[0].shape[1]):
                    slots = SHARED[0][:, :len(part)]
                    slots[ranks()[0]].copy_(part)
                    torch.distributed.all_reduce(flag)  # all have written
                    torch.sum(slots, 0, out=part)
                    SHARED.reverse()  # who is ahead must not write where others still read
                continue
            there = t.to("cuda") if torch.distributed.get_backend() == "nccl" else t  # nccl knows no CPU
            torch.distributed.all_reduce(there)
            t.copy_(there) if there is not t else None
        except RuntimeError as e:
            raise Lost(f"rank {ranks()[0]} of {ranks()[1]}: another process is gone ({(str(e).splitlines() or ['?'])[0][:160]})") from None


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; the same answer on all."""
    t = torch.tensor([float(flag)])
    all_sum(t)
    return bool(t)


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """The first rank runs the block, then the others: for what it writes and they read."""
    if ranks()[0]:
        any_rank(False)
    yield
    if not ranks()[0]:
        any_rank(False)


def free_memory(device: torch.device) -> int:
    """Bytes that a run may plan on."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    with contextlib.suppress(OSError):
        for line in open("/proc/meminfo"):
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def peak_rss_gib() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (30 if sys.platform == "darwin" else 20)


def reset_peak(device: torch.device) -> None:
    """Measure peak memory afresh from here on, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: torch.device) -> float:
    """GiB at most resident since reset_peak, with what an accelerator held."""
    there = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else torch.mps.driver_allocated_memory() if device.type == "mps" else 0
    return peak_rss_gib() + there / 2 ** 30


def accumulator(device: torch.device) -> torch.dtype:
    """float64 for sums; MPS has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def as_dtype(name: str | None) -> torch.dtype | None:
    if name in (None, "auto"):
        return None
    table = {"float64": torch.float64, "float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
             "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    expect(name in table, f"--dtype: expected one of {', '.join(table)}, found {name!r}")
    return table[name]


def with_gradients(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute gradients in: float32 for float16, which would need a loss scale."""
    return torch.float32 if dtype == torch.float16 else dtype


@functools.cache
def slow_products(dtype: torch.dtype, device: str = "cpu") -> bool:
    """Whether matrices of a half type meet slower than float32 ones: on CPUs without instructions for them, where torch's
    products take 3 to 100 times as long (bfloat16 on AVX-512 without BF16: 3 to 4). Measured, since torch does not tell."""
    if device != "cpu" or dtype.itemsize != 2:
        return False

    def seconds(dtype: torch.dtype) -> float:
        a, times = torch.ones(192, 192, dtype=dtype), []
        for _ in range(4):
            begin = time.perf_counter()
            torch.mm(a, a)
            times.append(time.perf_counter() - begin)
        return min(times)
    return seconds(dtype) > 2 * seconds(torch.float32)


@functools.cache
def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float32 where the device's products of it are slow; that is said once."""
    if slow_products(dtype, device.type):
        say(f"this CPU multiplies {dtype} slowly: computing in float32")
        return torch.float32
    return dtype


def train_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of training: "auto" is bfloat16 on a GPU that has it, else none; "off" is none."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return None if name in ("off", "float32", "fp32") else as_dtype(name)


# ======================================================================================================
# 2. Operators: one entry point each; the torch form is the fallback and the oracle of the native one in csrc/
# ======================================================================================================
KERNELS_VERSION = 3  # of the schemas in csrc/; an older library is refused


@functools.cache
def kernels() -> str:
    """Load the native operators at first use; says which are in use: "native avx512, ..." or "torch, ...".

    GLOBE_KERNELS: auto (installed with the package; else built from csrc/ into the user's cache, where there is a
    compiler; else torch, with a warning), jit (built from csrc/), off. RuntimeError where a library that is there does
    not load or a build fails: it is not passed over in silence. UserError for another value, or jit and nothing to build."""
    mode, csrc, ops = os.environ.get("GLOBE_KERNELS", "auto"), Path(__file__).resolve().parent / "csrc", torch.ops.globe
    if mode not in ("auto", "jit", "off"):
        raise UserError(f"GLOBE_KERNELS: expected auto, jit or off, found {mode!r}")
    if mode == "off":
        return "torch, GLOBE_KERNELS=off"
    how, first = "loaded by another copy of globe.py", not hasattr(ops, "about")
    if first:
        wheel = importlib.util.find_spec("globe_ops") if mode == "auto" else None
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        missing = "no csrc/ beside globe.py" if not csrc.is_dir() else None if compiler else "no C++ compiler"
        if not wheel and missing:
            if mode == "jit":
                raise UserError(f"GLOBE_KERNELS=jit: {missing}")
            warnings.warn(f"globe: torch's operators are used, which are slower: {missing}", stacklevel=2)
            return f"torch, {missing}"
        path = Path(wheel.origin) if wheel else build_kernels(csrc, compiler)
        torch.ops.load_library(path)
        how = f"{'installed' if wheel else 'built'}: {path}"
    version, isa = ops.about().split()
    if int(version) < KERNELS_VERSION:  # later ones have the operators of this and more
        raise RuntimeError(f"native operators: expected version {KERNELS_VERSION}, found {version} ({how}); "
                           "reinstall, or set GLOBE_KERNELS=jit or off")
    if first:
        _register_kernels()
    return f"native {isa}, {how}"


def build_kernels(csrc: Path, compiler: str) -> Path:
    """Compile csrc/ into the user's cache, unless it is there; returns the library. RuntimeError with the compiler's words.
    torch's stable ABI: the library outlives updates of torch, so its name is a hash of sources and flags alone. Processes
    that start at once build the same file twice, each under its own name until it is whole."""
    home = Path(torch.__file__).parent
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    nvcc = (shutil.which("nvcc", path=toolkit) or shutil.which("nvcc")) if has_cuda() else None
    flags = ["-std=c++17", "-O3", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += ["-Xcompiler", "-fPIC", "-DUSE_CUDA", "-arch=native"] if nvcc else ["-fPIC"]
    files = sorted(p for p in csrc.iterdir() if p.suffix in (".h", ".cpp") + (".cu",) * bool(nvcc))
    key = hashlib.sha256(b"".join([*(p.read_bytes() for p in files), repr((flags, os.uname().machine)).encode()])).hexdigest()[:16]
    path = user_cache() / "kernels" / f"globe_ops-{key}.so"
    if not path.is_file():
        libraries = ["-L", str(home / "lib"), "-ltorch", "-ltorch_cpu", "-lc10", *["-ltorch_cuda"] * bool(nvcc)]
        with written(path) as tmp:
            command = [nvcc or compiler, *flags, "-I", str(home / "include"), *(str(p) for p in files if p.suffix != ".h"), *libraries]
            done = subprocess.run([*command, "-o", str(tmp)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"native operators: the build failed ({' '.join(command)}):\n{done.stderr[-2000:]}\n"
                                   "GLOBE_KERNELS=off does without")
    return path


def _register_kernels() -> None:
    """Tell autograd and torch.compile about the operators: shapes without data, and backwards."""
    ops, like = torch.ops.globe, torch.empty_like
    for name, fake in {
        "compose": lambda bank, idx, val, activation: bank.new_empty(idx.shape[0], *bank.shape[1:]),
        "compose_out": lambda bank, idx, val, activation, out, slot: None,
        "compose_backward": lambda grad, bank, idx, val, activation: (like(bank), like(val)),
        "simplex": lambda x, alpha: (like(x), x.new_empty(x.shape[:-1], dtype=torch.int64)),
        "simplex_backward": lambda grad, p, alpha: like(p),
        "experts_decode": lambda x, *rest: like(x),
        "experts_mixed": lambda x, *rest: like(x),
        "linear": lambda x, W, bias: x.new_empty(x.shape[0], W.shape[0]),
    }.items():
        torch.library.register_fake(f"globe::{name}", fake)

    def keep_compose(ctx, inputs, output):
        ctx.activation = inputs[3]
        ctx.save_for_backward(*inputs[:3])

    def compose_backward(ctx, grad):
        bank, idx, val = ctx.saved_tensors
        dbank, dval = ops.compose_backward(grad.contiguous(), bank, idx, val, ctx.activation)
        return dbank, None, dval, None

    def keep_simplex(ctx, inputs, output):
        ctx.alpha = inputs[1]
        ctx.save_for_backward(output[0])

    def simplex_backward(ctx, grad, _):
        p, = ctx.saved_tensors
        return ops.simplex_backward(grad.contiguous(), p, ctx.alpha), None
    torch.library.register_autograd("globe::compose", compose_backward, setup_context=keep_compose)
    torch.library.register_autograd("globe::simplex", simplex_backward, setup_context=keep_simplex)


@torch.compiler.assume_constant_result
def _native(op: str, device: str) -> bool:
    """Whether the native form of an operator serves a kind of device; under torch.compile, settled while tracing."""
    return _has_kernel(op, device)


@functools.cache
def _has_kernel(op: str, device: str) -> bool:
    return kernels().startswith("native") and torch._C._dispatch_has_kernel_for_dispatch_key(f"globe::{op}", device.upper())


def _threshold_sparsemax(z: Tensor) -> Tensor:
    """tau (..., 1) with sum max(z - tau, 0) = 1 over the last dim, exact by sorting."""
    s = z.sort(-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    cum = s.cumsum(-1) - 1
    inside = k * s > cum  # a prefix of the sorted row; False for -inf
    size = inside.sum(-1, keepdim=True).clamp_min(1)
    return cum.gather(-1, size - 1) / size


def _threshold_entmax15(z: Tensor) -> Tensor:
    """tau (..., 1) with sum max(z - tau, 0)^2 = 1 over the last dim, exact by sorting."""
    s = z.sort(-1, descending=True).values
    finite = torch.isfinite(s)
    s0 = torch.where(finite, s, torch.zeros_like(s))  # keeps -inf out of the running moments
    k = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    mean, square = s0.cumsum(-1) / k, (s0 * s0).cumsum(-1) / k
    delta = (1 - k * (square - mean * mean)) / k
    tau = mean - delta.clamp_min(0).sqrt()
    size = ((tau <= s) & finite & (delta >= 0)).sum(-1, keepdim=True).clamp_min(1)
    return tau.gather(-1, size - 1)


class _SimplexMap(torch.autograd.Function):
    """sparsemax (alpha 2) or entmax-1.5 over the last dim; the Jacobian is diag(g) - g g^T / sum(g), g = p^(2 - alpha)."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: float) -> Tensor:
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        z = z - z.amax(-1, keepdim=True)  # both maps ignore a common shift; exact near the top
        if alpha == 2:
            p = (z - _threshold_sparsemax(z)).clamp_min(0)
        else:
            z = z / 2
            p = (z - _threshold_entmax15(z)).clamp_min(0).square()
        p = p.to(x.dtype)
        ctx.alpha = alpha
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, grad: Tensor):
        p, = ctx.saved_tensors
        g = (p > 0).to(p.dtype) if ctx.alpha == 2 else p.sqrt()
        return g * (grad - (g * grad).sum(-1, keepdim=True) / g.sum(-1, keepdim=True)), None


class _NativeSimplex(torch.autograd.Function):
    """torch.ops.globe.simplex with its backward, by a shorter way than the registered one, which torch.compile takes."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: float) -> tuple:
        with torch._C._AutoDispatchBelowAutograd():
            p, size = torch.ops.globe.simplex.default(x, alpha)
        ctx.alpha = alpha
        ctx.save_for_backward(p)
        ctx.mark_non_differentiable(size)
        ctx.set_materialize_grads(False)
        return p, size

    @staticmethod
    def backward(ctx, grad: Tensor | None, _):
        p, = ctx.saved_tensors
        return None if grad is None else torch.ops.globe.simplex_backward.default(grad.contiguous(), p, ctx.alpha), None


def _simplex_map(x: Tensor, dim: int, alpha: float, return_support: bool):
    if not x.is_floating_point():
        raise TypeError(f"expected a floating-point tensor, found {x.dtype}")
    if x.shape[dim] == 0:
        raise ValueError(f"expected at least one entry in dim {dim}, found shape {tuple(x.shape)}")
    x = x.movedim(dim, -1)
    if _native("simplex", x.device.type):
        run = torch.ops.globe.simplex if torch.compiler.is_compiling() else _NativeSimplex.apply
        p, size = run(x.contiguous(), alpha)
    else:
        p = _SimplexMap.apply(x, alpha)
        size = (p > 0).sum(-1) if return_support else None
    return (p.movedim(-1, dim), size) if return_support else p.movedim(-1, dim)


def sparsemax(x: Tensor, dim: int = -1, return_support: bool = False):
    """Euclidean projection of x onto the simplex along `dim`, exact, differentiable.

    x: any shape, floating point (half types computed in float32); -inf masks an entry. Returns x's shape and dtype; with
    return_support also the number of positive entries (int64, x's shape without `dim`). TypeError for another dtype,
    ValueError for an empty dim. Martins and Astudillo 2016, Algorithm 1 and Proposition 2 (torch: sorting; native:
    Newton's method on the threshold's piecewise linear equation, which ends at its root)."""
    return _simplex_map(x, dim, 2.0, return_support)


def entmax15(x: Tensor, dim: int = -1, return_support: bool = False):
    """1.5-entmax of x along `dim`, exact, differentiable; sparser than softmax, smoother than sparsemax.

    x: any shape, floating point (half types computed in float32); -inf masks an entry. Returns x's shape and dtype; with
    return_support also the number of positive entries (int64, x's shape without `dim`). TypeError for another dtype,
    ValueError for an empty dim. Peters, Niculae and Martins 2019, Algorithm 2 (torch: sorting; native: Newton's method)."""
    return _simplex_map(x, dim, 1.5, return_support)


def phi(z: Tensor, activation: str) -> Tensor:
    return {"identity": lambda t: t, "silu": F.silu, "tanh": torch.tanh}[activation](z)


def compose(bank: Tensor, idx: Tensor | Sequence[Tensor], val: Tensor | Sequence[Tensor], activation: str = "identity",
            out: Tensor | None = None, slot: Tensor | None = None) -> Tensor:
    """Composed bases B~_i = phi(sum_j val_ij bank[idx_ij]).

    bank (m, r, d), idx (E, s) integers in [0, m), val (E, s) -> (E, r, d) in the bank's dtype, summed in float32 or
    better. A padded entry has val 0; ragged supports are sequences of E one-dimensional tensors. Differentiable in
    bank and val, unless written into `out` (contiguous, of the result's shape and dtype), or into out[slot], `out` (S, r, d)
    and slot (E,) int64. Raises IndexError for an index outside the bank, ValueError for shapes that do not fit."""
    if not isinstance(idx, Tensor):
        idx = nn.utils.rnn.pad_sequence(list(idx), batch_first=True)
        val = nn.utils.rnn.pad_sequence(list(val), batch_first=True)
    if bank.ndim != 3 or idx.ndim != 2 or idx.shape != val.shape:
        raise ValueError(f"compose: expected bank (m, r, d), idx and val (E, s), found {tuple(bank.shape)}, "
                         f"{tuple(idx.shape)}, {tuple(val.shape)}")
    m, r, d = bank.shape
    want = (idx.shape[0] if slot is None or out is None else len(out), r, d)
    if out is not None and (out.shape != want or out.dtype != bank.dtype or not out.is_contiguous()):
        raise ValueError(f"compose: out: expected a contiguous {want} of {bank.dtype}, found {tuple(out.shape)} of {out.dtype}")
    # while compiling, data cannot be looked at, and into slots it need not be: the native operator checks when it runs
    if slot is None and not torch.compiler.is_compiling() and idx.numel():
        low, high = torch.stack(idx.aminmax()).tolist()
        if low < 0 or high >= m:
            raise IndexError(f"compose: indices in [0, {m}) expected, found {low}..{high}")
    wide = torch.promote_types(bank.dtype, torch.float32)
    E, s = idx.shape
    if _native("compose", bank.device.type):
        args = bank.contiguous(), idx.long().contiguous(), val.to(wide).contiguous(), activation
        return torch.ops.globe.compose(*args) if out is None else torch.ops.globe.compose_out(*args, out, slot) or out
    if E * s >= m and E > 1:  # many experts: one product over the dense mixture reads the bank once
        w = torch.zeros(E, m, dtype=wide, device=bank.device).index_put(
            (torch.arange(E, device=idx.device)[:, None].expand(E, s), idx.long()), val.to(wide), accumulate=True)
        z = (w @ bank.reshape(m, -1).to(wide)).view(E, r, d)
    else:  # a miss or two: scaled adds of the s bases, no gathered copy; widened first, as a number does not widen a half tensor
        z = [sum((a[k] * bank[j[k]].to(wide) for k in range(s)), bank.new_zeros(r, d, dtype=wide)) for j, a in zip(idx.long(), val.to(wide))]
        z = torch.stack(z) if z else bank.new_zeros(0, r, d, dtype=wide)
    y = phi(z, activation).to(bank.dtype)
    return y if out is None else out.copy_(y) if slot is None else out.index_copy_(0, slot, y)


# ======================================================================================================
# 3. Checkpoint: LAYOUTS, reading experts from safetensors, streaming
# ======================================================================================================
@dataclass(frozen=True)
class Layout:
    """Where a model type keeps its experts: tensor names on disk, and the config.json keys of their sizes."""
    names: tuple = ("gate_proj", "up_proj", "down_proj")        # of gate, up, down, one tensor per expert
    expert: str = "model.layers.{l}.mlp.experts.{e}.{n}.weight"
    fused: str = "model.layers.{l}.mlp.experts.{n}"             # n: gate_up_proj (E, 2p, d), down_proj (E, d, p)
    shared: str | None = None                                   # "....{n}.weight" of the shared expert's MLP
    num_experts: str = "num_experts"
    width: str = "moe_intermediate_size"
    shared_width: Callable[[dict], int] = lambda c: 0
    layers: Callable[[dict], list] = lambda c: list(range(c["num_hidden_layers"]))


def _qwen_layers(c: dict) -> list:
    only, step = set(c.get("mlp_only_layers") or ()), c.get("decoder_sparse_step") or 1
    return [l for l in range(c["num_hidden_layers"]) if l not in only and (l + 1) % step == 0]


def _deepseek_layers(c: dict) -> list:
    first = c.get("first_k_dense_replace") or 0
    if first < 0:
        raise ValueError(f"first_k_dense_replace {first}")
    return list(range(first, c["num_hidden_layers"]))


_QWEN3 = Layout(layers=_qwen_layers)
_DEEPSEEK = Layout(num_experts="n_routed_experts", layers=_deepseek_layers,
                   shared="model.layers.{l}.mlp.shared_experts.{n}.weight",
                   shared_width=lambda c: (c.get("n_shared_experts") or 0) * c["moe_intermediate_size"])
LAYOUTS = {
    "qwen2_moe": dataclasses.replace(_QWEN3, shared="model.layers.{l}.mlp.shared_expert.{n}.weight",
                                     shared_width=lambda c: c.get("shared_expert_intermediate_size") or 0),
    "qwen3_moe": _QWEN3,
    "mixtral": Layout(names=("w1", "w3", "w2"), expert="model.layers.{l}.block_sparse_moe.experts.{e}.{n}.weight",
                      num_experts="num_local_experts", width="intermediate_size"),
    "olmoe": Layout(width="intermediate_size"),
    "deepseek_v2": _DEEPSEEK, "deepseek_v3": _DEEPSEEK, "glm4_moe": _DEEPSEEK, "dots1": _DEEPSEEK,
}
UNSUPPORTED = {"gpt_oss": "its experts are transposed and biased", "aria": "its experts are transposed",
               "aria_text": "its experts are transposed", "nemotron_h": "its experts have no gate",
               "llama4": "its experts are transposed", "llama4_text": "its experts are transposed",
               "dbrx": "its experts are one flattened matrix"}


@dataclass(frozen=True)
class Dims:
    """Sizes read from config.json: layers with experts, routed experts per layer, p, d, top-k, shared slices."""
    layers: tuple
    experts: int
    p: int
    d: int
    top_k: int
    shared: int  # slices of width p that make up the shared expert; 0 where there is none


def resolve_model(path: str, revision: str | None = None, force_download: bool = False) -> Path:
    """A local directory as it is; anything of the form ORG/NAME is fetched from the hub into its cache."""
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise UserError(f"model.path: expected a directory or a hub id (ORG/NAME), found {path!r}")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(path, revision=revision, force_download=force_download, allow_patterns=[
            "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md"]))
    except Exception as e:  # offline, no such repository, gated: the hub's own reason is the useful part
        raise UserError(f"model.path: no directory {path!r} here, and the hub did not give it: "
                        f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}") from None


def found_in(path: Path, reason: Any) -> Any:
    """What to say of a file that is not what it should be: a git-lfs pointer in its place, else the reason."""
    with open(path, "rb") as f:
        return "a git-lfs pointer: run git lfs pull" if f.read(40).startswith(b"version https://git-lfs") else reason


def read_json(path: Path) -> dict:
    def once(pairs: list) -> dict:
        if len(table := dict(pairs)) < len(pairs):
            keys = [k for k, _ in pairs]
            raise UserError(f"{path}: {max(keys, key=keys.count)}: found twice in one JSON object")
        return table
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as e:
        reason = found_in(path, f"{type(e).__name__}: {e}") if path.is_file() else "none"
        raise UserError(f"{path}: expected a JSON file, found {reason}") from None
    expect(isinstance(data, dict), f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def layout_of(config: dict, where: str = "config.json") -> Layout:
    """The LAYOUTS row of a config.json; UserError lists what is supported."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        kind = kind if isinstance(kind, str) else short(kind)
        why = f" ({UNSUPPORTED[kind]})" if kind in UNSUPPORTED else ""
        raise UserError(f"{where}: model_type {kind!r} is not supported{why}; supported: {', '.join(sorted(LAYOUTS))}")
    if config.get("quantization_config"):
        given = config["quantization_config"]
        method = given.get("quant_method", "?") if isinstance(given, dict) else short(given)
        raise UserError(f"{where}: the checkpoint is quantized ({method}): expected plain float weights, since factors "
                        "are fitted to values, not to codes")
    return LAYOUTS[kind]


def dims_of(config: dict, where: str = "config.json") -> Dims:
    layout = layout_of(config, where)

    def size(key: str) -> int:
        value = config.get(key)
        expect(type(value) is int and 0 < value < 2 ** 20, f"{where}: {key}: expected a whole number above 0 and below 2^20, found {short(value)}")
        return value
    size("num_hidden_layers")
    count = layout.num_experts if layout.num_experts in config else "num_local_experts"  # transformers 5 re-saves it so
    p, experts, top_k = size(layout.width), size(count), size("num_experts_per_tok")
    expect(top_k <= experts, f"{where}: num_experts_per_tok: expected at most {count}, {experts}, found {top_k}")
    try:
        shared = layout.shared_width(config)
        shared = 0 if shared % p else shared // p  # one that is no multiple of p cannot be sliced: it stays dense
        layers = tuple(layout.layers(config))
    except (TypeError, ValueError, ArithmeticError) as e:
        raise UserError(f"{where}: expected numbers for which layers have experts and for the size of shared experts, found {e}") from None
    if not layers or type(shared) is not int or not 0 <= shared < 2 ** 20 or not len(layers) * experts < 2 ** 22:
        raise UserError(f"{where}: expected experts in some layers, at most 2^22 of them, and 0 or more shared, found {len(layers) or 'none'} layers "
                        f"of {experts} ({count}, num_hidden_layers {config['num_hidden_layers']}), {short(shared)} shared")
    return Dims(layers, experts, p, size("hidden_size"), top_k, shared)


@dataclass(frozen=True)
class Slot:
    """Where one expert matrix lies on disk: tensor and the part of it (fused or shared tensors)."""
    tensor: str
    part: tuple                             # index of that part: (expert, rows, columns) of a fused tensor, else (rows, columns)
    transposed: bool                        # down: on disk (d, p), used as (p, d)


def open_shard(path: Path):
    """A lazy handle of a safetensors file; UserError where it is none, or a link that leads out of its directory."""
    home = path.parent.resolve()
    expect(path.is_file(), f"{path}: expected safetensors, found no file")
    # the hub's cache links snapshots/REVISION/NAME to blobs/HASH, beside snapshots
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not {home, blobs} & set((real := path.resolve()).parents):
        raise UserError(f"{path}: expected a file in this directory, found a link to {real}, outside it; copy the file here")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: expected safetensors, found {found_in(path, e)}") from None


def finite(w: Tensor, name: str, where: Any) -> Tensor:
    """w; UserError with the count where it holds NaN or Inf. The sum comes first: it needs no copy."""
    if w.is_floating_point() and w.itemsize > 1 and not math.isfinite(w.sum(dtype=torch.float32)) and (bad := int((~torch.isfinite(w)).sum())):
        raise UserError(f"{name}: expected finite weights, found {bad} NaN or Inf in {where}")
    return w


class Checkpoint:
    """A Hugging Face checkpoint directory, read lazily: one expert at a time through safetensors slices.

    Every expert matrix comes out as (p, d): gate and up as they are, down transposed. Experts E, E+1, ... of a layer
    are the slices of its shared expert. Raises UserError with the first few missing, extra or misshapen tensors."""

    def __init__(self, directory: Path | str):
        self.dir = Path(directory)
        self.config = read_json(self.dir / "config.json")
        self.layout = layout_of(self.config, str(self.dir / "config.json"))
        self.dims = dims_of(self.config, str(self.dir / "config.json"))
        self._open, self._read = {}, 0  # bytes of experts read since the shards were last closed
        self.shard_of = self._index()  # tensor name -> shard file name
        self.fused = self.layout.fused.format(l=self.dims.layers[0], n="gate_up_proj") in self.shard_of
        self._validate()

    def _index(self) -> dict:
        index = self.dir / "model.safetensors.index.json"
        if index.is_file():
            table = read_json(index).get("weight_map")
            expect(isinstance(table, dict) and table, f"{index}: expected a weight_map, found {type(table).__name__}")
            for shard in dict.fromkeys(s if isinstance(s, str) else short(s) for s in table.values()):
                if os.path.basename(shard) != shard or "\0" in shard or shard not in table.values():
                    raise UserError(f"{index}: shard {shard!r}: expected a file name in this directory")
                if not os.path.isfile(self.dir / shard):  # False also for a name that no file can have
                    raise UserError(f"{index}: names shard {shard}, which is not in {self.dir}")
            for name, shard in table.items():
                if name not in self._shard(shard)[1]:
                    raise UserError(f"{self.dir / shard}: expected tensor {name} (by the index), found none")
            return table
        files = sorted(f.name for f in self.dir.glob("*.safetensors"))
        if not files:
            pickles = [f.name for f in self.dir.glob("*.bin")]
            raise UserError(f"{self.dir}: expected *.safetensors, found none"
                            + (f" ({pickles[0]} is a pickle, which is never loaded)" if pickles else ""))
        table = {}
        for shard in files:
            for name in self._shard(shard)[1]:
                if name in table:
                    raise UserError(f"{self.dir}: tensor {name} is in both {table[name]} and {shard}")
                table[name] = shard
        return table

    def _shard(self, name: str):
        """(lazy safetensors handle, set of its names); opened once."""
        if name not in self._open or self._open[name][0] is None:
            f = open_shard(self.dir / name)
            self._open[name] = f, set(f.keys())
        return self._open[name]

    def shape(self, tensor: str) -> list:
        return self._shard(self.shard_of[tensor])[0].get_slice(tensor).get_shape()

    def slot(self, family: str, layer: int, expert: int) -> Slot:
        """Where W (family, layer, expert) lies; experts from dims.experts on are shared slices."""
        D, i, down, every = self.dims, FAMILIES.index(family), family == "down", slice(None)
        if expert >= D.experts:  # a slice of the shared MLP: rows of gate and up, columns of down
            cut = slice((expert - D.experts) * D.p, (expert - D.experts + 1) * D.p)
            return Slot(self.layout.shared.format(l=layer, n=f"{family}_proj"), (every, cut) if down else (cut, every), down)
        if self.fused:
            rows = every if down else slice(i * D.p, (i + 1) * D.p)
            return Slot(self.layout.fused.format(l=layer, n="down_proj" if down else "gate_up_proj"), (expert, rows, every), down)
        return Slot(self.layout.expert.format(l=layer, e=expert, n=self.layout.names[i]), (every, every), down)

    def expected_tensors(self) -> Iterator[tuple]:
        """(tensor name, shape) of every expert tensor that config.json promises."""
        D = self.dims
        for l in D.layers:
            for f in FAMILIES:
                if self.fused:
                    yield self.slot(f, l, 0).tensor, [D.experts, D.d, D.p] if f == "down" else [D.experts, 2 * D.p, D.d]
                else:
                    yield from ((self.slot(f, l, e).tensor, [D.d, D.p] if f == "down" else [D.p, D.d]) for e in range(D.experts))
                if D.shared:
                    wide = D.shared * D.p
                    yield self.slot(f, l, D.experts).tensor, [D.d, wide] if f == "down" else [wide, D.d]

    def _validate(self) -> None:
        expected, bad = set(), []
        for name, shape in self.expected_tensors():
            expected.add(name)
            if len(bad) >= 100:  # a config.json may promise millions
                break
            if name not in self.shard_of:
                bad.append(f"{name}: expected {tuple(shape)}, found none")
            elif self.shape(name) != shape:
                bad.append(f"{name}: expected {tuple(shape)}, found {tuple(self.shape(name))} in {self.shard_of[name]}")
            elif (kind := self._shard(self.shard_of[name])[0].get_slice(name).get_dtype()) not in ("F32", "F16", "BF16"):
                bad.append(f"{name}: expected float32, float16 or bfloat16, found {kind} in {self.shard_of[name]}")
        last = self.config["num_hidden_layers"]  # layers after it (multi-token prediction) are not the model's
        expect(last <= len(self.shard_of), f"{self.dir}: expected tensors of {last} layers (num_hidden_layers), found {len(self.shard_of)} tensors")
        for name in self.shard_of:
            layer = re.search(r"\.layers\.(\d+)\..*\.experts\.", name)
            if layer and len(bad) < 100 and int(layer[1]) < last and name not in expected:
                bad.append(f"{name}: not expected, found in {self.shard_of[name]}")
        if bad:
            more = f" (and {len(bad) - 4} more)" if len(bad) > 4 else ""
            raise UserError(f"{self.dir}: expert tensors do not fit config.json: {'; '.join(bad[:4])}{more}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the experts are stored in."""
        return self.expert("gate", self.dims.layers[0], 0).dtype

    def tensor(self, name: str) -> Tensor:
        return finite(self._shard(self.shard_of[name])[0].get_tensor(name), name, self.shard_of[name])

    def expert(self, family: str, layer: int, expert: int) -> Tensor:
        """One matrix, (p, d), in the checkpoint's dtype."""
        s = self.slot(family, layer, expert)
        w = self._shard(self.shard_of[s.tensor])[0].get_slice(s.tensor)[s.part]
        finite(w, f"{s.tensor} expert {expert}" if len(s.part) == 3 else s.tensor, self.shard_of[s.tensor])
        self._read += w.nbytes
        if self._read > 2 ** 28:  # what a memory map has touched counts as ours until the file is closed
            self._open, self._read = {shard: (None, names) for shard, (_, names) in self._open.items()}, 0
        return w.T if s.transposed else w

    def known(self, ids: Tensor) -> Tensor:
        """Token ids, as they are; UserError where the model has no embedding for one."""
        if int(ids.max()) >= (vocab := self.config.get("vocab_size") or math.inf):
            raise UserError(f"{self.dir}: expected token ids below vocab_size {vocab}, found {int(ids.max())}: is the tokenizer another model's?")
        return ids

    def num_parameters(self) -> int:
        return sum(math.prod(self.shape(n)) for n in self.shard_of)

    def fingerprint(self) -> str:
        """Names, shapes and the first bytes of one expert matrix per layer and family: tells fine-tuned twins apart."""
        h = hashlib.sha256(json.dumps([self.config["model_type"], dataclasses.astuple(self.dims)]).encode())
        for l in self.dims.layers:
            for f in FAMILIES:
                h.update(self.expert(f, l, 0)[:2].float().contiguous().numpy().tobytes())
        return h.hexdigest()[:16]


def select_experts(dims: Dims, cfg: ModelConfig) -> list:
    """[(layer, expert)] to compress, in order, by single_layer, max_experts, sample and include_shared."""
    expect(cfg.single_layer in (None, *dims.layers),
           f"model.single_layer: expected a layer with experts ({min(dims.layers)}..{max(dims.layers)}), found {cfg.single_layer}")
    layers = dims.layers if cfg.single_layer is None else (cfg.single_layer,)
    count = min(cfg.max_experts or dims.experts, dims.experts)
    chosen = range(count) if cfg.sample == "first_n" else np.linspace(0, dims.experts - 1, count).round().astype(int)
    expect(not cfg.include_shared or dims.shared, "model.include_shared: this model has no shared expert of a multiple of moe_intermediate_size")
    shared = range(dims.experts, dims.experts + dims.shared) if cfg.include_shared else ()
    return [(l, int(e)) for l in layers for e in (*chosen, *shared)]


def families_of(cfg: ModelConfig) -> tuple:
    return {"both": ("gate", "up"), "all": FAMILIES}.get(cfg.families) or (cfg.families,)


def batch_for(room: float, p: int, d: int) -> int:
    """Experts of one batch of a fit that may take `room` bytes. Each batch reads the whole bank four times: the larger, the faster."""
    return max(1, min(64, int(room / 8 / (6 * 4 * p * d))))


class Experts:
    """The matrices of one family as the fit sees them: (n, p, d), shifted, scaled and in the metric, in batches.

    keys: [(layer, expert)]; group: (n,) index of each one's bank. In the metric W_i becomes S_i^T W_i L: right {layer: L}
    weighs the input side, left {(layer, expert): S} the output side, S (p, p) lower triangular or (p,), a diagonal. The
    adapter takes S up in closed form. So does the bank L, where every bank belongs to one layer and phi is the identity
    (absorb=True): the fit then works on B_j L. means(layer, expert) -> (p, d): a row's error counts at its own mean input
    mu_i too: row i has the metric C + mu_i mu_i^T, the second moment of the inputs on which neuron i acts, to rank one.

    A pass needs V_i = S_i^T W_i C with C = L L^T (W_i alone without a metric, S_i^T W_i L where the bank absorbs L), the
    energies ||S_i^T W_i L||^2, U, the rows mu_i (L^-1 mu_i where the bank absorbs L), and t, S_i^T W_i at mu_i. V and U are
    kept in memory where they take less than a quarter of it; else V is written once to a nameless file in `scratch` and U
    read again; without a metric, or where the disk is too small, V is made from the checkpoint in every pass. Under torchrun
    each rank holds its share of every layer. budget: bytes to plan on.
    """

    def __init__(self, read: Callable[[int, int], Tensor], keys: Sequence[tuple], scope: str | int = "global",
                 device: torch.device = torch.device("cpu"), normalize: str = "none", batch: int = 0, right: Mapping | None = None,
                 left: dict | None = None, absorb: bool = False, means: Callable[[int, int], Tensor] | None = None,
                 budget: float | None = None, scratch: Path | None = None):
        self.read, self.keys, self.device = read, list(keys), device
        group = self.groups_of(self.keys, scope)
        self.group = torch.tensor([group[l] for l, _ in self.keys])
        self.group_of_layer, self.groups = group, max(group.values()) + 1
        self.p, self.d = read(*self.keys[0]).shape
        self.right, self.left = right or {}, left or {}
        self.absorbed = absorb and self.groups == len(group) and bool(self.right)
        self.means, self.kept_means, self.at_means = means, None, []
        room, self.metrics = budget or free_memory(device), {}
        self.batch = batch or batch_for(room, self.p, self.d)
        self.plan = self._plan(*ranks())
        self.shift, self.scale = self._moments(normalize)
        self.level, self.energy = dict.fromkeys(group, 1.0), torch.zeros(len(self.keys), dtype=torch.float64)
        self.kept, self.file, self.buffers = None, None, {}
        self._prepare(room, scratch)

    @staticmethod
    def groups_of(keys: Sequence[tuple], scope: str | int) -> dict:
        """{layer: index of its bank} for scope global, layer, or a number of neighbouring layers."""
        layers = sorted({l for l, _ in keys})
        span = {"global": len(layers), "layer": 1}.get(scope) or int(scope)
        return {l: i // span for i, l in enumerate(layers)}

    def __len__(self) -> int:
        return len(self.keys)

    def _plan(self, rank: int, world: int) -> list:
        """[(ids (b,), layer)] of this rank's batches: a batch stays within a layer, a layer's batches are of even size."""
        layer, out = torch.tensor([l for l, _ in self.keys]), []
        for i, l in enumerate(self.group_of_layer):
            ids = (layer == l).nonzero().flatten()[(rank + i) % world::world]  # who has one more changes with the layer
            out += [(part, l) for part in ids.chunk(-(-len(ids) // self.batch))] if len(ids) else []
        return out

    def _moments(self, normalize: str) -> tuple:
        """(mean or 0, standard deviation or 1) over the family, by one streaming pass; refuses NaN and Inf."""
        sums = torch.zeros(3, dtype=torch.float64)
        for i in (i for ids, _ in self.plan for i in ids.tolist()):
            w = self.read(*self.keys[i]).double()
            bad = int((~torch.isfinite(w)).sum())
            if bad:
                raise UserError("layer {} expert {}: expected finite weights, found {} NaN or Inf".format(*self.keys[i], bad))
            sums += torch.stack([w.sum(), w.square().sum(), torch.tensor(float(w.numel()))])
        all_sum(sums)
        total, square, n = sums.tolist()
        mean = total / n if normalize == "zscore" else 0.0
        std = math.sqrt(max(square / n - mean * mean, 0.0))
        return (mean, std or 1.0) if normalize != "none" else (0.0, 1.0)

    def _prepare(self, room: float, scratch: Path | None) -> None:
        """Energies and levels by one pass from the checkpoint, which also puts V where later passes find it."""
        size = 4 * self.p * self.d * sum(len(ids) for ids, _ in self.plan)
        kept = [] if size * (1 + bool(self.means)) < room / 4 else None
        kept_means, file = [] if kept is not None and self.means else None, None
        if kept is None and (self.right or self.left) and scratch and 1.2 * size < shutil.disk_usage(scratch).free:
            file = tempfile.TemporaryFile(dir=scratch, buffering=0)  # nameless: gone with the process, however it ends
        for (ids, l), (W, V) in zip(self.plan, self._ahead()):
            self.energy[ids] = (V * W).sum((1, 2), dtype=accumulator(self.device)).double().cpu()
            if self.means:
                U = self._mean_rows(ids, l)
                self.at_means.append((W * U).sum(-1))
                if kept_means is not None:
                    kept_means.append(U)
            if kept is not None:
                kept.append(V.clone())
            elif file:
                view = tensor_bytes(V.cpu().contiguous())
                while len(view):
                    view = view[file.write(view[:2 ** 30]):]
        all_sum(self.energy)
        if self.right or self.left:  # unit energy per entry: over all layers where row weights make them comparable, else in each
            rows, layer = any(S.ndim == 1 for S in self.left.values()), torch.tensor([l for l, _ in self.keys])
            for l in self.level:
                mean = float(self.energy[layer >= 0 if rows else layer == l].mean()) / self.p / self.d
                self.level[l] = 1 / math.sqrt(mean or 1.0)
            self.energy *= torch.tensor([self.level[l] ** 2 for l, _ in self.keys], dtype=torch.float64)
        self.places = [(ids.to(self.device), float(self.energy[ids].sum())) for ids, _ in self.plan]
        self.at_means, self.kept_means = [t * self.level[l] for t, (_, l) in zip(self.at_means, self.plan)], kept_means
        more = torch.zeros_like(self.energy)
        for t, (ids, _) in zip(self.at_means, self.plan):
            more[ids] = t.square().sum(-1).cpu().double()
        all_sum(more)
        self.energy += more
        self.kept = [V.mul_(self.level[l]) for V, (_, l) in zip(kept, self.plan)] if kept is not None else None
        self.file = file

    def metric(self, layer: int) -> Tensor | None:
        """C = L L^T of the layer; None without a metric and where the bank has absorbed it."""
        if not self.right or self.absorbed:
            return None
        if layer not in self.metrics:
            if not isinstance(self.right, dict):  # many and large: one at a time
                self.metrics.clear()
            L = self.right[layer]
            self.metrics[layer] = L @ L.T
        return self.metrics[layer]

    def _weighted(self, W: Tensor, i: int) -> Tensor:
        """S^T (W - shift) / scale of expert i."""
        W, S = (W - self.shift) / self.scale, self.left.get(self.keys[i])
        return W if S is None else S[:, None] * W if S.ndim == 1 else S.T @ W

    def whitened(self, i: int) -> Tensor:
        """One expert in the metric, S^T W L (p, d), from the checkpoint."""
        W, l = self._weighted(self.read(*self.keys[i]).float().to(self.device), i), self.keys[i][0]
        return (W @ self.right[l] if self.right else W) * self.level[l]

    def _fetch(self, k: int, stream: Any) -> tuple:
        """What lies on disk of batch k, in one of two buffers; runs beside the computing."""
        ids = self.plan[k][0]
        if k % 2 not in self.buffers:
            self.buffers[k % 2] = host_buffer((max(len(ids) for ids, _ in self.plan), self.p, self.d), self.device)
        buffer = self.buffers[k % 2][:len(ids)]
        if self.file:
            self.file.seek(4 * self.p * self.d * sum(len(ids) for ids, _ in self.plan[:k]))
            read_into(self.file, buffer)
        else:
            for i, row in zip(ids.tolist(), buffer):
                row.copy_(self.read(*self.keys[i]))
        return upload(buffer, self.device, stream)

    def _ahead(self) -> Iterator[tuple]:
        """(S^T W or None, V) of every batch, each valid until the next is asked for; reads one batch ahead."""
        stream = side_stream(self.device)
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._fetch, 0, stream) if self.plan else None
            for k, (ids, l) in enumerate(self.plan):
                W = arrived(*coming.result())
                if k + 1 < len(self.plan):
                    coming = reader.submit(self._fetch, k + 1, stream)
                if self.file:
                    yield None, W.mul_(self.level[l])
                    continue
                for i, row in zip(ids.tolist(), W):
                    row.copy_(self._weighted(row, i))
                side = self.right[l] if self.absorbed else self.metric(l)
                V = W if side is None else W @ side
                yield V if self.absorbed else W, V if self.level[l] == 1 else V.mul_(self.level[l])

    def _mean_rows(self, ids: Tensor, l: int) -> Tensor:
        """U (b, p, d) of a batch, on the device."""
        U = torch.stack([self.means(*self.keys[i]) for i in ids.tolist()]).float().to(self.device)
        return torch.linalg.solve_triangular(self.right[l], U.mT, upper=False).mT if self.absorbed else U

    def stream(self) -> Iterator[tuple]:
        """(ids (b,), group, layer, V (b, p, d), sum ||V||^2 in the metric, (U (b, p, d), t (b, p)) or None) batch by batch, on
        the device; V and U are valid until the next ones are asked for."""
        parts = self.kept if self.kept is not None else (V for _, V in self._ahead())
        for k, ((_, l), (ids, norm), V) in enumerate(zip(self.plan, self.places, parts)):
            U = None if not self.means else self.kept_means[k] if self.kept_means else self._mean_rows(self.plan[k][0], l)
            yield ids, self.group_of_layer[l], l, V, norm, None if U is None else (U, self.at_means[k])

    def bank(self, B: Tensor) -> Tensor:
        """The bank (G, m, r, d) as it is stored: what it has absorbed of the metric is taken out again."""
        if not self.absorbed:
            return B
        L = torch.stack([self.right[l] for l in self.group_of_layer]).to(B.dtype)
        return torch.linalg.solve_triangular(L[:, None], B, upper=False, left=False)

    def adapters(self, ids: Tensor, A: Tensor) -> Tensor:
        """A in the metric -> A of W itself."""
        out = []
        for i, a in zip(ids.tolist(), A):
            S, a = self.left.get(self.keys[i]), a / self.level[self.keys[i][0]]
            if S is not None:
                a = a / S[:, None] if S.ndim == 1 else torch.linalg.solve_triangular(S.T, a, upper=True)
            out.append(a)
        return torch.stack(out)


# ======================================================================================================
# 4. Calibration: text, tokens, input statistics per layer
# ======================================================================================================
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)  # to choose from
MEANS = ("gate_x", "up_x")  # moments of the size of the experts themselves
CLIP = 0.99  # quantile of the tokens' weights in a batch above which they are cut down to it
ANCHOR = 0.1      # refinement of adapters: weight of staying at the fit's solution, beside the tokens'
DOWN_RIDGE = 0.3  # refinement of down: relative to the mean square of the hidden activations
FEW_TOKENS = 10   # both hold on by as much more where an expert sees few: times its unknowns in a row over its tokens
REFINE_TOKENS = 40  # adapters are refined on every n-th token where an expert has more than this times hidden_size
ROW_FLOOR = 0.01  # of a layer's mean row weight, added to every row: an expert that calibration never met still counts
# Never trained or calibrated on: benchmarks use them as unseen domains.
RESERVED = {"argparse.py", "tarfile.py", "LICENSE.txt"}
# Tests and IDLE are absent from slim installs; encodings are tables; the rest is installed, built or platform dependent.
SKIPPED_DIRS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "ensurepip",
                "encodings", "pydoc_data", "lib-dynload", "__pycache__"}


def _split_of(name: str) -> str:
    """Which split a file or topic belongs to; its name alone decides, so every Python version agrees."""
    h = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    return "heldout" if h % 2 else "calibration" if h % 8 == 0 else "train"


def _library_sources() -> Iterator[tuple]:
    """(name, text) of the standard library's documentation topics and module sources."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:  # slim installs leave the documentation out
        topics = {}
    for key, text in topics.items():
        yield f"topics/{key}", text
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if name.name in RESERVED or name.name.startswith("_sysconfigdata") or SKIPPED_DIRS & set(name.parts):
            continue
        yield name.as_posix(), path.read_text(encoding="utf-8", errors="ignore")


def _library_help() -> Iterator[tuple]:
    """(name, text) of the HTML help and the news files that some installs carry, tags taken out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted([*root.glob("*/*.html"), *root.glob("idlelib/*.txt")]):
        text = re.sub(r"<(style|script).*?</\1>|<[^>]+>", "", path.read_text(encoding="utf-8", errors="ignore"), flags=re.S)
        yield path.name, html.unescape(text)


def builtin_text(split: str, piece: int = 4096) -> str:
    """English documentation and Python source from this Python's own library; no download.

    split: "train" | "heldout" | "calibration", disjoint by file (and by topic of the documentation). Pieces of about
    `piece` characters come in a fixed mixed order, so that any prefix is a broad mixture. Raises ValueError for
    another split, FileNotFoundError where Python was installed without its sources.
    """
    if split not in ("train", "heldout", "calibration"):
        raise ValueError(f"unknown split {split!r}; known: train, heldout, calibration")
    pieces = []
    more = _library_help() if split == "calibration" else ()
    for name, text in (*_library_sources(), *((f"help/{name}", text) for name, text in more)):
        if name.startswith("help/") or _split_of(name) == split:
            pieces += [(hashlib.sha256(f"{name}:{i}".encode()).hexdigest(), text[i:i + piece])
                       for i in range(0, len(text), piece)]
    if not pieces:
        raise FileNotFoundError(f"no library sources under {sysconfig.get_path('stdlib')}; give a text file instead")
    return "\n".join(text for _, text in sorted(pieces))


def read_text(spec: str, split: str) -> str:
    """The text of a file, of every .txt/.md/.py/.rst file below a directory, or of a builtin split."""
    if spec == "builtin":
        return builtin_text(split)
    if spec.startswith("hf:"):
        return hub_text(*spec.split(":")[1:4])
    path = Path(spec)
    files = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md", ".py", ".rst")) if path.is_dir() else [path]
    try:
        text = "\n\n".join(f.read_text(encoding="utf-8") for f in files)
    except (OSError, ValueError) as e:  # a NUL in a name is a ValueError
        raise UserError(f"text {spec!r}: expected a UTF-8 text file, a directory of them or builtin, found "
                        f"{getattr(e, 'strerror', None) or 'bytes that are not UTF-8'}") from None
    if not text.strip():
        raise UserError(f"text {spec!r}: expected some text, found none")
    return text


def hub_text(name: str, config: str = "", split: str = "test") -> str:
    """The column "text" of a hub data set, rows joined as the WikiText recipe joins them."""
    try:
        from datasets import load_dataset
        return "\n\n".join(load_dataset(name, config or None, split=split)["text"])
    except ImportError:
        raise UserError("text hf:...: data sets of the hub need the package datasets: pip install datasets") from None
    except Exception as e:  # offline, no such data set or column: the library's reason is the useful part
        raise UserError(f"text hf:{name}:{config}:{split}: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}") from None


def token_windows(tokenizer, text: str, tokens: int, length: int, stride: int | None = None) -> Tensor:
    """(N, length) token ids, N * length <= tokens: windows at even distances over the whole text, in order.

    With stride: overlapping windows over the first `tokens` tokens. A text shorter than `length` gives one shorter
    window; UserError where it has fewer than two tokens.
    """
    text = text[: tokens * 64]  # no tokenizer here makes a token of more bytes than that on average
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < 2:
        raise UserError(f"text: expected at least 2 tokens, found {len(ids)}")
    length = min(length, len(ids))
    if stride:
        return ids[:max(tokens, length)].unfold(0, length, min(stride, length))
    have, want = len(ids) // length, max(1, tokens // length)
    starts = [i * have // min(want, have) * length for i in range(min(want, have))]
    return torch.stack([ids[s:s + length] for s in starts])


@torch.no_grad()
def sample_windows(model: nn.Module, count: int, length: int, seed: int = 0) -> Tensor:
    """(count, length) token ids that the model itself writes at temperature 1, each after one random token."""
    device, end = next(model.parameters()).device, model.generation_config.eos_token_id
    generator = torch.Generator(device).manual_seed(seed)
    ids, past = torch.randint(model.config.vocab_size, (count, 1), device=device, generator=generator), None
    with memory_kept():  # transformers' generate() draws with torch.multinomial, which takes longer than the model here
        for _ in tqdm(range(length - 1), desc="sample", file=sys.stderr, leave=False, delay=1):
            out = model(ids[:, -1:], past_key_values=past, use_cache=True)
            logits, past = out.logits[:, -1].float(), out.past_key_values
            if end is not None:
                logits[:, end] = -math.inf  # a window is one text
            ids = torch.cat([ids, drawn(logits.softmax(-1), generator)], 1)
    return ids.cpu()


def moment_shapes(D: Dims) -> dict:
    """{kind: shape} of a layer's moments (activation_moments), and of its ridge, where that was chosen (chosen_ridge)."""
    return {"inputs": (D.d, D.d), "weighted": (D.d, D.d), "hidden": (D.p, D.p), "gate": (D.experts, D.p), "up": (D.experts, D.p), "ridge": (),
            **dict.fromkeys(MEANS, (D.experts, D.p, D.d))}


@torch.no_grad()
def activation_moments(walk: Walk, windows: Tensor, at_once: int, fisher: bool = True, seed: int = 0, tick: Callable[[], Any] = lambda: None,
                       means: bool = False, scratch: Path | None = None) -> dict:
    """What the fit's metric needs of the dense model at work on windows (N, length) of token ids, {kind: {layer: Tensor}} in
    float64 on the CPU. Kinds, as means over the tokens:

    inputs (d, d): x x^T of the experts' inputs; hidden (p, p): h h^T of the routed experts' hidden activations; gate and up
    (E, p): s^2, s being what an error in that output of an expert moves; weighted (d, d): x x^T times the token's sum of s^2.
    With means also gate_x and up_x (E, p, d), float32, in files under `scratch` where that is given: s^2 x.
    fisher: s is the gradient of log q(v), v drawn from the model's own distribution q of the next token. Its square is the
    diagonal of the Fisher information, and half of that the divergence (Kunstner et al. 2019, arXiv:1905.12558). Without:
    s = w dh/dz ||down_j|| / |y|, w being the router's weight: the change of the layer's output relative to the residual
    stream y behind it, which later norms divide out. Either way a few tokens with massive activations (Sun et al. 2024,
    arXiv:2402.17762) would outweigh all others: none has a larger sum here than the quantile CLIP of its batch.

    One decoder layer is in memory at a time, with the hidden states of `at_once` windows: forward through all layers and,
    for the gradients, back, each layer run again. tick() after each layer.
    """
    sums: dict = {kind: {} for kind in ("inputs", "weighted", "hidden", "gate", "up")}
    kinds = MEANS if means else ()
    sums |= {kind: {} for kind in kinds}
    places, count, L, seen = experts_modules(walk.model), 0, len(walk.layers), {}
    generator = torch.Generator(walk.device).manual_seed(seed)

    def add(kind: str, layer: int, value: Tensor) -> None:
        wide = value.double() if accumulator(value.device) == torch.float64 else value.cpu().double()
        sums[kind][layer] = sums[kind].get(layer, 0) + wide

    def collect(layer: int, module: nn.Module, y: Tensor) -> None:
        x, index, weight = (t.detach() for t in seen["experts"])
        x = x.reshape(-1, x.shape[-1])
        wide = x.float()
        there = seen["block"].grad.reshape(x.shape).float() if fisher else y.reshape(x.shape).float().square().mean(-1).clamp_min(1e-12).rsqrt()
        add("inputs", layer, wide.T @ wide)
        squares, reach, hidden = {}, torch.zeros(len(x), device=x.device), 0
        for e in index.unique().tolist():
            if e >= module.num_experts:
                continue  # expert parallelism marks tokens of other ranks so
            token, slot = (index == e).nonzero(as_tuple=True)
            h, slopes = gate_slopes(module, F.linear(x[token], module.gate_up_proj[e]))
            hidden = hidden + h.T @ h
            down = module.down_proj[e].float()
            s = there[token] @ down if fisher else there[token, None] * down.norm(dim=0)
            s *= weight[token, slot].float()[:, None]
            squares[e] = token, [(s * slope).square() for slope in slopes]
            reach.index_add_(0, token, sum(t.sum(1) for t in squares[e][1]))
        add("hidden", layer, hidden)
        share = (reach.quantile(CLIP) / reach).nan_to_num(1).clamp_max(1)
        add("weighted", layer, (wide * (share * reach)[:, None]).T @ wide)
        for i, kind in enumerate(("gate", "up")):
            rows = torch.zeros(module.num_experts, module.intermediate_dim, device=x.device)
            for e, (token, parts) in squares.items():
                rows[e] = share[token] @ parts[i]
                if means:
                    seen[MEANS[i]][e].addmm_(parts[i].T, share[token, None] * wide[token])
            add(kind, layer, rows)

    def keep(module, args, out):
        seen["block"] = out if isinstance(out, Tensor) else out[0]
        if fisher:
            seen["block"].retain_grad()

    def visit(l: int, x: Tensor, to: Tensor, back: bool) -> None:
        """Layer l on x (n, length, d): its output into `to`; or back, the gradient at its output, in `to`, becomes that at x."""
        walk.fill([l])
        block, _, module = places.get(l, (None,) * 3)
        with contextlib.ExitStack() as hooks:
            if collects := block and fisher == back:
                shape = (module.num_experts, module.intermediate_dim, walk.ckpt.dims.d)
                for kind in kinds:  # a layer's at a time are where the model is; all layers' may not fit in memory
                    if l not in sums[kind]:
                        sums[kind][l] = torch.zeros(shape) if scratch is None else on_disk(scratch / f"{kind}.{l}", shape, torch.float32)
                    seen[kind] = sums[kind][l].to(walk.device)
                hooks.enter_context(module.register_forward_pre_hook(
                    lambda _, args, kwargs: seen.update(experts=(*args, *kwargs.values())[:3]), with_kwargs=True))
                hooks.enter_context(block.register_forward_hook(keep))
            for part, there in zip(x.split(walk.batch), to.split(walk.batch)):
                with torch.set_grad_enabled(back):
                    h = part.to(walk.device, copy=True).requires_grad_(back)
                    y = walk.run([l], h)
                    if back:
                        y.backward(there.to(walk.device))
                if collects:
                    collect(l, module, y)
                there.copy_(h.grad if back else y)
            for kind in kinds if collects else ():
                sums[kind][l].copy_(seen.pop(kind))
        walk.empty([l])
        tick()

    for chunk in windows.split(at_once):
        count += chunk.numel()
        x = torch.empty(L + 1 if fisher else 1, *chunk.shape, walk.ckpt.dims.d, dtype=walk.dtype)
        walk.embed(chunk, x[0])
        for l in range(L):
            here = x[(l + 1) * fisher]
            visit(l, x[l * fisher], here, False)
            expect(torch.isfinite(here).all(), f"{walk.ckpt.dir}: expected finite activations in calibration, found NaN or Inf behind "
                                               f"layer {l}: do sums overflow in {walk.dtype}?")
        for part in x[L].split(walk.batch) if fisher else ():
            grads = []
            for token in part.flatten(0, 1).split(256):  # logits of a batch can be gigabytes
                with torch.enable_grad():
                    y = token.to(walk.device, copy=True).requires_grad_()
                    z = walk.logits(y)
                q = z.detach().softmax(-1)
                expect(torch.isfinite(q.amax(-1)).all(), f"{walk.ckpt.dir}: expected finite logits in calibration, found NaN or Inf: do sums overflow in {walk.dtype}?")
                v = drawn(q, generator)
                z.backward(q.neg_().scatter_add_(1, v, torch.ones_like(v, dtype=q.dtype)))  # of log q(v)
                grads.append(y.grad)
            part.copy_(torch.cat(grads).view_as(part))
        for l in reversed(range(L)) if fisher else ():
            visit(l, x[l], x[L], True)
    return {kind: {l: v.div_(count).cpu() for l, v in sorted(layers.items())} for kind, layers in sums.items()}


def drawn(q: Tensor, generator: torch.Generator) -> Tensor:
    """(n, 1): an index drawn from each row of probabilities q (n, V). torch.multinomial works on one core."""
    below = q.cumsum(-1)
    u = torch.rand(len(q), 1, device=q.device, generator=generator) * below[:, -1:]
    return torch.searchsorted(below, u).clamp_max(q.shape[1] - 1)


def gate_slopes(module: nn.Module, z: Tensor) -> tuple:
    """h = act(g) u (t, p) of z = [g, u] (t, 2p) by the model's own gate, and its slopes dh/dg, dh/du, all float32."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        h = module._apply_gate(z)
        slopes, = torch.autograd.grad(h.sum(), z)
    return h.detach().float(), slopes.float().chunk(2, -1)


def save_moments(path: Path, moments: dict, fingerprint: str) -> None:
    """Write {kind: {layer: Tensor}} with the fingerprint of the checkpoint that they belong to, as safetensors; MEANS in bfloat16."""
    made = {f"{kind}.{l}": lambda kind=kind, l=l: moments[kind][l].to(torch.bfloat16 if kind in MEANS else moments[kind][l].dtype)
            for kind, layers in moments.items() for l in layers}
    tensors = LazyDict(made)
    write_tensors(path, {name: (tensors[name].dtype, tensors[name].shape) for name in made}, tensors, {"globe_moments": fingerprint})


def load_moments(path: Path, ckpt: Checkpoint, tag: str | None = None) -> dict:
    """What save_moments wrote with `tag`, default: the checkpoint's fingerprint, with which every kind but ridge, MEANS and the
    windows must be there. MEANS are read when they are asked for. UserError: no such file, not one of ours, damaged, or of another checkpoint."""
    try:
        file = safe_open(path, "pt")
        found = (file.metadata() or {}).get("globe_moments")
        tensors = LazyDict({name: functools.partial(file.get_tensor, name) for name in file.keys()})
    except (SafetensorError, OSError) as e:
        raise UserError(f"calib.load: {path}: expected saved moments, found {e}") from None
    if found != (tag or ckpt.fingerprint()):
        raise UserError(f"calib.load: {path}: expected moments of the checkpoint with fingerprint {tag or ckpt.fingerprint()}, found {found}")
    D, out = ckpt.dims, {}
    for kind, shape in moment_shapes(D).items():
        if (tag or kind == "ridge" or kind in MEANS) and not any(name.startswith(f"{kind}.") for name in tensors):
            continue
        out[kind] = {}
        for l in D.layers:
            C = tensors.get(f"{kind}.{l}")
            if C is None or C.shape != shape or not C.is_floating_point() or not torch.isfinite(C).all():
                raise UserError(f"calib.load: {path}: {kind}.{l}: expected finite numbers {shape}, found {'none' if C is None else tuple(C.shape)}")
            out[kind][l] = C
        if kind in MEANS:
            out[kind] = LazyDict({l: functools.partial(tensors.__getitem__, f"{kind}.{l}") for l in D.layers})
    if "windows.0" in tensors:
        ids = tensors["windows.0"]
        if ids.ndim != 2 or ids.dtype != torch.int64 or not ids.numel() or int(ids.min()) < 0:
            raise UserError(f"calib.load: {path}: windows.0: expected token ids (N, length), found {ids.dtype} {tuple(ids.shape)}")
        out["windows"] = {0: ckpt.known(ids)}
    return out


def experts_modules(model: nn.Module) -> dict:
    """{layer: (parent module, attribute name, experts module)} of every MoE layer of a transformers model."""
    found = {}
    for name, module in model.named_modules():
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer and hasattr(module, "num_experts") and (hasattr(module, "gate_up_proj") or isinstance(module, GlobeExperts)):
            parent, _, attr = name.rpartition(".")
            found[int(layer[1])] = (model.get_submodule(parent), attr, module)
    return found


def metric_factor(C: Tensor, ridge: float) -> Tensor:
    """L (d, d) float32 with L L^T = C + ridge * mean(diag C) * I, scaled so that mean(diag L L^T) = 1.

    The shrinkage keeps directions that a narrow calibration text never visits from being given up.
    """
    C = C.double() / C.diagonal().mean()
    eye = torch.eye(len(C), dtype=C.dtype)
    return torch.linalg.cholesky((C + (ridge + 1e-9) * eye) / (1 + ridge)).float().contiguous()


def inputs_moment(moments: dict, l: int) -> Tensor:
    """(d, d): all tokens alike and the tokens as they count, in equal parts: either alone did worse (README)."""
    return sum(moments[kind][l] / moments[kind][l].diagonal().mean().clamp_min(1e-30) for kind in ("inputs", "weighted"))


@torch.no_grad()
def chosen_ridge(ckpt: Checkpoint, halves: Sequence[dict], ratio: float, layers: int = 8) -> float:
    """The one of RIDGES whose metric, made from one half of the calibration windows, leaves the least error in the metric of the
    other half, both ways, when a layer's gate and up are cut in closed form to the rank that has `ratio` of their size.
    halves: two activation_moments, which differ as domains do where the text comes in their order, or half of it is sampled."""
    D, errors = ckpt.dims, dict.fromkeys(RIDGES, 0.0)
    rank = min(D.d - 1, round(ratio * 2 * D.experts * D.p * D.d / (2 * D.experts * D.p + D.d)))
    for l in D.layers[::-(-len(D.layers) // layers)]:
        G = torch.zeros(D.d, D.d)
        for family in ("gate", "up"):
            for e, rows in enumerate(sum(m[family][l] for m in halves).float()):
                W = ckpt.expert(family, l, e).float()  # (p, d)
                G.addmm_(W.T, rows[:, None] * W)
        for here, there in (halves, halves[::-1]):
            C = inputs_moment(there, l).float()
            for ridge in RIDGES:
                L = metric_factor(inputs_moment(here, l), ridge)
                V = torch.linalg.eigh(L.T @ G @ L)[1][:, -rank:]
                lost = torch.eye(D.d) - L @ V @ torch.linalg.solve_triangular(L.T, V, upper=True).T
                errors[ridge] += float((G @ lost @ C).mul(lost).sum() / (G * C).sum())
    return min(errors, key=errors.__getitem__)


def metric_of(moments: dict, family: str, keys: Sequence[tuple], ridge: float, device: torch.device) -> dict:
    """{"right": {layer: L}, made when asked for, "left": {(layer, expert): S}, "means": function or None} of a family, for
    Experts. A row of a shared expert, which sees every token, weighs as much as all routed experts' rows together."""
    if family == "down":
        S = {l: metric_factor(C, ridge).to(device) for l, C in moments["hidden"].items()}
        return {"right": {}, "left": {(l, e): S[l] for l, e in keys}, "means": None}
    layers = dict.fromkeys(l for l, _ in keys)
    left, rows, level = {}, {}, {l: moments["inputs"][l].diagonal().mean() for l in layers}
    for l, e in keys:
        M = moments[family][l]
        rows[l, e] = M[e] + ROW_FLOOR * M.mean() if e < len(M) else M.mean(1).sum().expand(M.shape[1])
        left[l, e] = (rows[l, e] * level[l]).sqrt().float().to(device)

    def means(l: int, e: int) -> Tensor:
        """E[s^2 x] / E[s^2] of each row (p, d), where the layer's inputs have mean square 1; none of a shared expert."""
        X = moments[f"{family}_x"][l]
        return X[e].float() / (rows[l, e] * level[l].sqrt()).float()[:, None] if e < len(X) else torch.zeros(X.shape[1:])

    def right(l: int) -> Tensor:
        return metric_factor(inputs_moment(moments, l), float(moments.get("ridge", {}).get(l, ridge))).to(device)
    return {"right": LazyDict({l: functools.partial(right, l) for l in layers}), "left": left, "means": means if f"{family}_x" in moments else None}


# ======================================================================================================
# 5. Init and fit: maths on tensors; no paths, no printing, no model classes
# ======================================================================================================
class Diverged(RuntimeError):
    """The objective is not finite; the last good state is kept."""


# ---- the small pure steps ----------------------------------------------------------------------------
def blend(z: Tensor, activation: str, lam: float) -> tuple:
    """phi_lam(z) = (1 - lam) z + lam phi(z) and its derivative (1 - lam) + lam phi'(z), elementwise; None stands for 1."""
    if activation == "identity" or lam == 0:
        return z, None
    if activation == "silu":
        f, df = F.silu(z), torch.ops.aten.silu_backward(torch.ones_like(z), z)
    else:
        f = torch.tanh(z)
        df = 1 - f * f
    return (f, df) if lam == 1 else ((1 - lam) * z + lam * f, (1 - lam) + lam * df)


def mixture(z: Tensor, T: float, kind: str, mask: Tensor) -> Tensor:
    """alpha (n, m) of logits z (n, m); entries outside `mask` are 0. kind: sparsemax, entmax15, softmax or signed."""
    if kind == "signed":
        return z * mask
    x = (z / T).masked_fill(~mask, -math.inf)
    return {"sparsemax": sparsemax, "entmax15": entmax15, "softmax": lambda t: t.softmax(-1)}[kind](x)


def mixture_vjp(alpha: Tensor, grad: Tensor, T: float, kind: str, mask: Tensor) -> Tensor:
    """Gradient in z of a loss whose gradient in alpha = mixture(z) is `grad`."""
    if kind == "signed":
        return grad * mask
    v = {"sparsemax": (alpha > 0).to(alpha.dtype), "entmax15": alpha.sqrt(), "softmax": alpha}[kind]
    return v * (grad - (v * grad).sum(-1, keepdim=True) / v.sum(-1, keepdim=True)) / T


class Buffers(dict):
    """Named tensors that a pass uses again and again: a fresh large one costs a page fault per 4 KiB, a fifth of the time."""

    def __call__(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        size = math.prod(shape)
        if name not in self or self[name].numel() < size:
            self[name] = like.new_empty(size)
        return self[name][:size].view(shape)


def product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a @ b with factors rounded to `dtype` and summed in float32 or better."""
    if dtype in (torch.float16, torch.bfloat16):
        if a.device.type == "cuda" and a.ndim == b.ndim:
            return (torch.mm if a.ndim == 2 else torch.bmm)(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
        a, b = a.to(dtype).float(), b.to(dtype).float()
    return torch.matmul(a, b, out=out)


def spd_factor(K: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of K + ridge * mean(diag K) * I, batched; the ridge grows tenfold where K is too near singular."""
    where, level = K.device, K.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(K.dtype).tiny * 1e6)
    ridge = torch.full_like(level, max(ridge, 1e-7))
    for _ in range(8):
        C = K.clone()
        C.diagonal(dim1=-2, dim2=-1).add_((ridge * level)[..., None])
        factor, info = torch.linalg.cholesky_ex(C.cpu() if where.type == "mps" else C)
        info = info.where(factor.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite(), 1)  # on CUDA, NaN passes as positive
        if info.any() and C.dtype != torch.float64 and bool(torch.isfinite(C).all()):  # once more, in double
            wide, info = torch.linalg.cholesky_ex(C.cpu().double() if where.type == "mps" else C.double())
            factor = wide.to(C.dtype)
        if not info.any():
            return factor.to(where)
        ridge = torch.where(info.to(where) > 0, ridge * 10, ridge)
    raise Diverged("a Gram matrix is not finite or not positive: the step was too large")


def solve_right(N: Tensor, factor: Tensor, block: int = 128) -> Tensor:
    """N K^-1 for N (b, p, r), in place, from the Cholesky factor of K (b, r, r): block substitution, nearly all of it
    products (LAPACK's own solve ran at a third of their rate)."""
    r = N.shape[-1]
    parts = [slice(i, min(i + block, r)) for i in range(0, r, block)]
    eye = torch.eye(min(block, r), dtype=N.dtype, device=N.device)
    inverse = [torch.linalg.solve_triangular(factor[..., s, s], eye[:s.stop - s.start, :s.stop - s.start], upper=False) for s in parts]
    for s, inv in zip(parts, inverse):  # Y F^T = N
        Y = N[..., s] - N[..., :s.start] @ factor[..., s, :s.start].mT if s.start else N[..., s]
        N[..., s] = Y @ inv.mT
    for s, inv in reversed([*zip(parts, inverse)]):  # A F = Y
        Y = N[..., s] - N[..., s.stop:] @ factor[..., s.stop:, s] if s.stop < r else N[..., s]
        N[..., s] = Y @ inv
    return N


def inner(a: Tensor, b: Tensor, buffers: Buffers) -> Tensor:
    """sum(a * b) of (b, ., .), summed in double over the matrices; ()."""
    return torch.mul(a, b, out=buffers("inner", a.shape, a)).sum((1, 2)).to(accumulator(a.device)).sum()


def normal_equations(V: Tensor, X: Tensor, C: Tensor | None, dtype: torch.dtype, buffers: Buffers) -> tuple:
    """N = V X^T (b, p, r), K = X C X^T (b, r, r) and X C: with V = W C, A = N K^-1 minimises ||(W - A X) L||^2, C = L L^T."""
    b, r, d = X.shape
    XC = X if C is None else product(X.view(-1, d), C.to(X.dtype), dtype, buffers("XC", (b * r, d), X)).view(b, r, d)
    return (product(V, X.mT, dtype, buffers("N", (b, V.shape[1], r), X)), product(XC, X.mT, dtype, buffers("K", (b, r, r), X)), XC)


def adapters(V: Tensor, X: Tensor, ridge: float, dtype: torch.dtype = torch.float32, C: Tensor | None = None, means: tuple | None = None) -> Tensor:
    """A-step: argmin_A ||(W - A X) L||^2 + ridge ||A||^2 for V = W C (b, p, d), X (b, r, d) -> (b, p, r), ridge relative.

    means: (U (b, p, d), t (b, p)) add the sum over rows i of (t_i - A_i X u_i)^2, by Sherman and Morrison's formula (Experts).
    """
    XC = X if C is None else X @ C.to(X.dtype)
    factor = spd_factor(product(XC, X.mT, dtype), ridge)
    A = torch.cholesky_solve(product(V, X.mT, dtype).mT, factor).mT
    if means is None:
        return A
    XU = product(means[0].to(X.dtype), X.mT, dtype)
    Q = torch.cholesky_solve(XU.mT, factor).mT
    return A + ((means[1] - (A * XU).sum(-1)) / (1 + (Q * XU).sum(-1)))[..., None] * Q


def target_shift(P: Tensor, G: Tensor, L: Tensor | None, beta: float, ridge: float) -> Tensor:
    """T - X for the blended target T = (1 - beta) X + beta argmin_T ||(W - A T) L||^2, from P = A^T A and
    G = A^T (W - A X) L L^T."""
    D = beta * torch.cholesky_solve(G, spd_factor(P, ridge))
    return D if L is None else torch.cholesky_solve(D.mT, L.to(D.dtype).expand(len(D), -1, -1)).mT


def nnls(G: Tensor, c: Tensor, steps: int = 200) -> Tensor:
    """argmin_{a >= 0} a G a^T - 2 a c^T for G (m, m), c (n, m) -> (n, m): accelerated projected gradient."""
    step = 1 / torch.linalg.eigvalsh(G)[-1].clamp_min(1e-30)
    a = y = torch.zeros_like(c)
    for k in range(steps):
        new = (y - step * (y @ G - c)).clamp_min(0)
        y = new + k / (k + 3) * (new - a)
        a = new
    return a


# ---- initialisation ----------------------------------------------------------------------------------
def rotation(r: int, g: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(r, r, generator=g))[0]


def top_rows(gram: Tensor, r: int, L: Tensor | None, g: torch.Generator) -> Tensor:
    """(r, d): the r leading right singular directions of matrices with the summed Gram (d, d), times their singular
    values, back from the metric; where r > d, random rows fill up."""
    values, vectors = torch.linalg.eigh(gram.double().cpu())
    k = min(r, gram.shape[0])
    rows = (values[-k:].clamp_min(0).sqrt()[:, None] * vectors[:, -k:].T).float()
    if r > k:
        rows = torch.cat([rows, 0.1 * rows.std() * torch.randn(r - k, rows.shape[1], generator=g)])
    return rows if L is None else torch.linalg.solve_triangular(L.cpu(), rows, upper=False, left=False)


def align(X: Tensor, to: Tensor) -> Tensor:
    """X (r, d) rotated on the left to be nearest to `to` (Procrustes): the gauge that A absorbs."""
    U, _, V = torch.linalg.svd(to @ X.mT)
    return U @ V @ X


def deal(experts: Experts, m: int) -> Tensor:
    """(n,) the basis that each expert starts from: neighbours share one; with more bases than experts, one each."""
    home = torch.zeros(len(experts), dtype=torch.long)
    for k in range(experts.groups):
        ids = (experts.group == k).nonzero().flatten()
        home[ids] = torch.arange(len(ids)) * m // len(ids) if len(ids) >= m else torch.arange(len(ids))
    return home


def init_bank(experts: Experts, m: int, r: int, how: str, g: torch.Generator) -> tuple:
    """Bank (G, m, r, d) and mixture weights alpha (n, m) to start from.

    experts: a basis is one of its experts' matrix in a random gauge. svd: the leading directions of all its experts,
    stacked. dictionary: that, refined by k-means over the experts' own leading directions; alpha by non-negative least
    squares. random: Gaussian. Every gauge is random, since the adapter absorbs it.
    """
    n, d, home = len(experts), experts.d, deal(experts, m)
    alpha = 0.25 * torch.randn(n, m, generator=g)
    alpha[torch.arange(n), home] += 1
    bank = torch.randn(experts.groups, m, r, d, generator=g)
    if how == "random":
        alpha = torch.rand(n, m, generator=g)
    else:
        filled = torch.zeros(experts.groups, m, dtype=torch.bool)
        grams, own = torch.zeros(experts.groups, m, d, d) if how != "experts" else None, []
        metric_of: dict = {}
        for i, (l, _) in enumerate(experts.keys):
            k, j, metric = int(experts.group[i]), int(home[i]), bool(experts.right) and not experts.absorbed
            if how == "experts" and filled[k, j]:
                continue
            W, L = experts.whitened(i).cpu(), experts.right[l] if metric else None
            if how == "experts":
                W = W if L is None else torch.linalg.solve_triangular(L.cpu(), W, upper=False, left=False)
                bank[k, j] = rotation(max(r, experts.p), g)[:r, :experts.p] @ W
            else:
                grams[k, j] += W.T @ W
                own += [top_rows(W.T @ W, r, L, g)] if how == "dictionary" else []
            filled[k, j], metric_of[k, j] = True, l if metric else None
        for k, j in metric_of if how != "experts" else ():
            L = None if metric_of[k, j] is None else experts.right[metric_of[k, j]]
            bank[k, j] = rotation(r, g) @ top_rows(grams[k, j], r, L, g)
        for b in bank.flatten(0, 1):
            b /= b.square().mean().sqrt().clamp_min(1e-30)
        for k, j in (~filled).nonzero().tolist():  # more bases than experts: random mixtures of those that have one
            have = bank[k, filled[k]]
            bank[k, j] = rotation(r, g) @ torch.einsum("f,frd->rd", torch.randn(len(have), generator=g) / len(have) ** 0.5, have)
        if how == "dictionary":
            bank, alpha = kmeans(experts, bank, own)
    return bank.mul_(0.3).to(experts.device), alpha.to(experts.device)  # small, so that phi starts near linear


def kmeans(experts: Experts, bank: Tensor, own: list, rounds: int = 4) -> tuple:
    """k-means of the experts' leading directions `own`, each rotated to the basis it is compared with; then NNLS."""
    own, alpha = [x / x.square().mean().sqrt().clamp_min(1e-30) for x in own], torch.zeros(len(own), bank.shape[1])
    for _ in range(rounds):
        sums, counts = torch.zeros_like(bank), torch.zeros(bank.shape[:2])
        for i, x in enumerate(own):
            k = int(experts.group[i])
            fits = torch.stack([align(x, b) for b in bank[k]])
            j = int((fits - bank[k]).square().sum((1, 2)).argmin())
            sums[k, j] += fits[j]
            counts[k, j] += 1
        used = counts > 0
        bank[used] = sums[used] / counts[used][:, None, None]
    for k in range(len(bank)):
        ids = (experts.group == k).nonzero().flatten()
        c = torch.stack([torch.stack([(align(own[i], b) * b).sum() for b in bank[k]]) for i in ids.tolist()])
        alpha[ids] = nnls(bank[k].flatten(1) @ bank[k].flatten(1).T, c)
    return bank, alpha


def logits_of(alpha: Tensor, T: float, kind: str) -> Tensor:
    """Logits whose mixture leans toward alpha with every basis still in reach (a sparse map gives the others no gradient)."""
    if kind == "signed":
        return alpha / alpha.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return 0.3 * T * alpha / alpha.amax(-1, keepdim=True).clamp_min(1e-12)


# ---- one pass over the experts -----------------------------------------------------------------------
@dataclass(frozen=True)
class Schedule:
    """What the homotopy has set: activation blend, target blend, temperature, whether supports are fixed."""
    lam: float
    beta: float
    T: float
    frozen: bool


@dataclass
class Pass:
    """The outcome of one pass: objective, squared error and energy, and the pull on every parameter."""
    value: float
    error: float                        # sum ||W - A X||^2 / sum ||W||^2 in the metric
    energy: float                       # sum ||W||^2
    grad: dict                          # {"B": (G, m, r, d), "z": (n, m)[, "A": (n, p, r)]}: gradients of value
    curvature: Tensor | None = None     # (G, m, r, r): sum_i alpha_ij^2 A_i^T A_i, the preconditioner of B
    shift: Tensor | None = None         # method am: sum_i alpha_ij (Z-target - Z)_i (G, m, r, d)
    pull: Tensor | None = None          # method am: <(Z-target - Z)_i, B_j> (n, m)


def evaluate(x: dict, experts: Experts, cfg: Config, kind: str, mask: Tensor, s: Schedule, gB: Tensor | None = None) -> Pass:
    """Objective and gradients at x = {"B": bank, "z": logits[, "A": adapters]} by one pass over the experts.

    With no "A" in x, every adapter is eliminated in closed form (variable projection: Golub and Pereyra 1973); by the
    envelope theorem the gradient in X is then that of fixed A. gB: memory for the bank's gradient. value = sum ||W - A X||^2 / sum ||W||^2 + penalties.
    """
    B, f = x["B"], cfg.fit
    G, m, r, d = B.shape
    dtype, wide = as_dtype(f.dtype), B.dtype
    alpha = mixture(x["z"], s.T, kind, mask)
    gB = torch.zeros_like(B) if gB is None else gB.zero_()
    ga, gA = torch.zeros_like(alpha), torch.zeros_like(x["A"]) if "A" in x else None
    am, pre = f.method == "am", f.method == "varpro"
    M = B.new_zeros(G, m, r, r) if pre else None
    shift, pull = (torch.zeros_like(B), torch.zeros_like(alpha)) if am else (None, None)
    error, penalty, buffers = 0.0, 0.0, experts.buffers.setdefault("pass", Buffers())
    try:
        for ids, g, layer, V, norm, means in experts.stream():
            V, a, flat, C = V.to(wide), alpha[ids], B[g].view(m, -1), experts.metric(layer)
            X, dX = blend(torch.mm(a, flat, out=buffers("X", (len(ids), r * d), B)).view(-1, r, d), cfg.bank.activation, s.lam)
            if gA is not None and C is None and not means:  # joint descent on the weights: three products from the residual alone
                A = x["A"][ids]
                R = torch.sub(V, product(A, X, dtype, buffers("AX", V.shape, V)), out=buffers("R", V.shape, V))
                part, pull_A = float(inner(R, R, buffers)), product(R, X.mT, dtype, buffers("N", A.shape, A))
                gX = product(A.mT, R, dtype, buffers("gX", X.shape, X))
            else:
                N, K, XC = normal_equations(V, X, C, dtype, buffers)
                factor = None if "A" in x else spd_factor(K, f.lambda_A)
                A = x["A"][ids] if "A" in x else solve_right(buffers("A", N.shape, N).copy_(N), factor)
                if means:  # left: what each row lacks at its mean input
                    U = means[0].to(wide)
                    XU = product(U, X.mT, dtype, buffers("XU", N.shape, N))
                    left = means[1] - (A * XU).sum(-1)
                    if factor is not None:
                        Q = solve_right(buffers("Q", N.shape, N).copy_(XU), factor)
                        left /= 1 + (Q * XU).sum(-1)
                        A.addcmul_(left[..., None], Q)
                P = product(A.mT, A, dtype, buffers("P", K.shape, K))
                fitted, along = torch.stack([inner(P, K, buffers), inner(A, N, buffers)]).tolist()  # one wait for the device
                part = norm + fitted - 2 * along
                T = torch.addcmul(V, left[..., None], U, out=buffers("T", V.shape, V)) if means else V
                if part > 1e-4 * norm:
                    gX = product(A.mT, T, dtype, buffers("gX", X.shape, X))
                    gX -= product(P, XC, dtype, buffers("PX", X.shape, X))  # A^T (W - A X) C
                else:  # differences of large numbers would drown it
                    R = V - product(A, XC, dtype)
                    gX = product(A.mT, torch.addcmul(R, left[..., None], U) if means else R, dtype, buffers("gX", X.shape, X))
                    part = float((R if C is None else torch.linalg.solve_triangular(experts.right[layer].to(wide), R.mT, upper=False)).square().sum())
                if gA is not None:
                    pull_A = N - product(A, K, dtype)
                    if means:
                        pull_A.addcmul_(left[..., None], XU)
            error += part + float(left.square().sum()) if means else part
            if am:
                dZ = target_shift(P, gX, None if C is None else experts.right[layer], s.beta, f.lambda_T)
                dZ = (dZ if dX is None else dZ * dX / dX.square().mean()).flatten(1)
                shift[g] += (a.T @ dZ).view(m, r, d)
                pull[ids] = dZ @ flat.T
            gX *= -2
            if f.spectral:
                more, gXs, gAs = spectral_penalty(A, X, V, C, "A" in x, f, dtype, means)
                penalty, gX = penalty + more, gX + gXs
            gZ = (gX if dX is None else gX.mul_(dX)).flatten(1)
            gB[g].view(m, -1).addmm_(a.T, gZ)
            ga[ids] = gZ @ flat.T
            if gA is not None:
                gA[ids] = -2 * pull_A + 2 * f.lambda_A * A + (gAs if f.spectral else 0)
                penalty += f.lambda_A * float(A.square().sum())
            if pre:
                M[g].view(m, -1).addmm_((a * a).T, P.flatten(1))
    except Diverged:
        error = math.nan  # the other ranks must hear of it
    sums = torch.tensor([error, penalty], dtype=torch.float64)
    all_sum(sums, *(t for t in (gB, ga, gA, M, shift, pull) if t is not None))
    (error, penalty), energy = sums.tolist(), float(experts.energy.sum())
    if math.isnan(error):
        raise Diverged("a Gram matrix is not finite or not positive: the step was too large")
    energy = max(energy, 1e-30)
    value = (error + penalty) / energy
    grad = {"B": gB.div_(energy), "z": mixture_vjp(alpha, ga / energy + f_l1(alpha, cfg), s.T, kind, mask)}
    value += cfg.sparsity.l1 * float(alpha.abs().sum()) / len(alpha)
    if f.lambda_B or f.spectral:
        value, grad["B"] = bank_penalty(B, f, value, grad["B"])
    if gA is not None:
        grad["A"] = gA / energy
    if not math.isfinite(value):
        value = math.inf
    return Pass(value, error / energy, energy, grad, M.div_(energy) if pre else None, shift, pull)


def f_l1(alpha: Tensor, cfg: Config) -> Tensor | float:
    return cfg.sparsity.l1 * alpha.sign() / len(alpha) if cfg.sparsity.l1 else 0.0


def spectral_norms(M: Tensor) -> Tensor:
    """Largest singular value of each matrix in (..., a, b), differentiable: the Gram's largest eigenvalue."""
    K = M @ M.mT if M.shape[-2] <= M.shape[-1] else M.mT @ M
    K = K.cpu() if K.device.type == "mps" else K  # no eigenvalues there
    return torch.linalg.eigvalsh(K)[..., -1].clamp_min(1e-30).sqrt().to(M.device)


def spectral_penalty(A: Tensor, X: Tensor, V: Tensor, C: Tensor | None, free_A: bool, f: FitConfig, dtype: torch.dtype,
                     means: tuple | None) -> tuple:
    """fit.spectral * sum sigma_max(A_i)^2 and its gradients in X and A; through the A-step where A is eliminated."""
    with torch.enable_grad():
        A, X = A.detach().clone().requires_grad_(), X.detach().clone().requires_grad_()
        B = A if free_A else adapters(V, X, f.lambda_A, dtype, C, means)
        value = f.spectral * spectral_norms(B).square().sum()
        if free_A:
            return float(value.detach()), torch.zeros_like(X), torch.autograd.grad(value, A)[0]
        return float(value.detach()), torch.autograd.grad(value, X)[0], None


def bank_penalty(B: Tensor, f: FitConfig, value: float, grad: Tensor) -> tuple:
    """Adds lambda_B mean B^2 + spectral * mean sigma_max(B_j)^2 / r to value and gradient."""
    with torch.enable_grad():
        B = B.detach().requires_grad_()
        more = f.lambda_B * B.square().mean()
        if f.spectral:
            more = more + f.spectral * spectral_norms(B).square().mean() / B.shape[-2] / B.shape[-1]
        return value + float(more.detach()), grad + torch.autograd.grad(more, B)[0]


# ---- the loop ----------------------------------------------------------------------------------------
def ramp(start: float, end: float, steps: int, k: int) -> float:
    return end if k >= steps else start + (end - start) * k / steps


def _dot(a: dict, b: dict) -> float:
    return sum(float(torch.dot(a[k].flatten(), b[k].flatten())) for k in a)


def _axpy(a: dict, t: float, b: dict) -> dict:
    return {k: torch.add(a[k], b[k], alpha=t) for k in a}


def _add(a: dict, t: float, b: dict) -> None:
    """a += t b, in place: a bank can be a gibibyte."""
    for k in a:
        a[k].add_(b[k], alpha=t)


class Fitter:
    """Fits one family: `while not fitter.done: row = fitter.step()`, then `fitter.factors()`.

    Methods (fit.method): varpro eliminates A in closed form in every pass and moves bank and logits by preconditioned
    L-BFGS; am alternates closed-form half-steps (A, targets, bank, mixtures); adam moves A, bank and logits together
    by Adam (MoBE's setting, with fit.adam.safeguard=false). An accepted step never raises the objective of its
    schedule; one that would is shortened, then refused. state() and load_state() make a run resumable to the bit on
    a CPU. Raises Diverged where even the starting point is not finite. shelve(name, tensors) says where large things rest
    that are needed now and then (L-BFGS pairs, finished adapters); default: in memory.
    """

    def __init__(self, experts: Experts, cfg: Config, shape: tuple, store: torch.dtype = torch.float32,
                 start: dict | None = None, shelve: Callable[[str, dict], Shelved] = lambda name, tensors: Shelved(tensors)):
        self.experts, self.cfg, self.store, self.shelve = experts, cfg, store, shelve
        (m, r), n, sp = shape, len(experts), cfg.sparsity
        self.kind = {"entmax": {1.0: "softmax", 1.5: "entmax15", 2.0: "sparsemax"}[sp.alpha],
                     "auto": "signed" if cfg.bank.activation == "identity" else "softmax"}.get(sp.map, sp.map)
        self.wide = torch.float64 if cfg.fit.dtype == "float64" else torch.float32
        self.mask = torch.ones(n, m, dtype=torch.bool, device=experts.device)
        self.T, self.step_done, self.scale, self.frozen = sp.T0, 0, 1.0, False
        share = sp.freeze if sp.freeze is not None else 0.15 if self.kind == "signed" else 0.7
        self.freeze_at = share * cfg.fit.steps
        self.curvature = None
        self.pairs: dict = {}  # {step: Shelved {"s.B", "s.z", "y.B", "y.z"}}, oldest first
        self.moments, self.velocity, self.pool = {}, {}, []
        self.here: Pass | None = None
        self.at: Schedule | None = None
        self.recent: list = []
        start = start or self._start(m, r)
        self.x = {k: v.to(experts.device, self.wide, copy=True) for k, v in start.items()}
        if cfg.fit.method == "adam" and "A" not in self.x:
            self.x["A"] = self._solve(lam=ramp(cfg.fit.homotopy.lam_start, 1, cfg.fit.homotopy.lam_steps, 0))
        self.unit = {k: float(v.square().mean().sqrt()) or 1.0 for k, v in self.x.items()} | {"z": self.T}
        self.root = self._mean_metric()

    def _start(self, m: int, r: int, trial: int = 24) -> dict:
        """Bank and logits by bank.init; "auto" keeps the better of two short trials."""
        if self.cfg.bank.init == "auto":
            change = lambda how: dataclasses.replace(self.cfg, bank=dataclasses.replace(self.cfg.bank, init=how))
            trials = [Fitter(self.experts, change(how), (m, r)) for how in ("experts", "random")]
            for fitter in trials:
                while fitter.step_done < min(trial, max(1, self.cfg.fit.steps // 6)):
                    fitter.step()
            return min(trials, key=lambda t: t.here.error).x
        bank, alpha = init_bank(self.experts, m, r, self.cfg.bank.init, torch.Generator().manual_seed(self.cfg.fit.seed))
        return {"B": bank, "z": logits_of(alpha, self.T, self.kind)}

    def _take(self) -> Tensor:
        """Memory for a tensor like the bank, used before where there is some: fresh gibibytes cost seconds of page faults."""
        return self.pool.pop() if self.pool else torch.empty_like(self.x["B"])

    def _give(self, *banks: Tensor) -> None:
        self.pool = [*self.pool, *banks][:3]

    @property
    def done(self) -> bool:
        return self.step_done >= self.cfg.fit.steps

    def _mean_metric(self) -> Tensor | None:
        """(G, d, d) inverses of each group's mean L L^T: precondition the bank from the right."""
        E = self.experts
        if E.absorbed or not E.right or self.cfg.fit.method != "varpro":
            return None
        C = torch.zeros(E.groups, E.d, E.d, device=E.device)
        for l, g in E.group_of_layer.items():
            C[g] += E.metric(l) / sum(k == g for k in E.group_of_layer.values())
        return torch.cholesky_inverse(spd_factor(C, 1e-6)).to(self.wide)

    def alpha(self) -> Tensor:
        return mixture(self.x["z"], self.T, self.kind, self.mask)

    def _solve(self, lam: float = 1.0) -> Tensor:
        """Every adapter in closed form, (n, p, r): the A-step alone."""
        E, B, alpha = self.experts, self.x["B"], self.alpha()
        out = B.new_zeros(len(E), E.p, B.shape[2])
        for ids, g, l, V, _, means in E.stream():
            X = blend((alpha[ids] @ B[g].flatten(1)).view(len(ids), *B.shape[2:]), self.cfg.bank.activation, lam)[0]
            out[ids] = adapters(V.to(self.wide), X, self.cfg.fit.lambda_A, C=E.metric(l), means=means)
        all_sum(out)
        return out

    # -- schedules
    def _schedule(self) -> Schedule:
        """Homotopy, temperature and supports as of the coming step; they move once in homotopy.every steps."""
        sp, h, k = self.cfg.sparsity, self.cfg.fit.homotopy, self.step_done
        stage = k - k % h.every
        if not self.frozen and k >= self.freeze_at:
            self._freeze()
        elif not self.frozen and k == stage and k and self.kind != "signed" and self._median() > sp.support:
            self.T *= sp.eta
        lam = ramp(h.lam_start, 1.0, min(h.lam_steps, int(self.freeze_at)), stage)
        return Schedule(lam, ramp(h.beta_start, h.beta_end, h.beta_steps, stage), self.T, self.frozen)

    def _largest(self, s: int) -> Tensor:
        """Mask of each expert's s largest |alpha| above eps_prune (and always the largest)."""
        a = self.alpha().abs()
        top = a.topk(min(s, a.shape[1]), -1).indices
        keep = torch.zeros_like(self.mask).scatter_(1, top, True) & (a > self.cfg.sparsity.eps_prune)
        return keep.scatter_(1, top[:, :1], True)

    def _freeze(self) -> None:
        """Cut supports to size and keep them from here on."""
        self.mask, self.frozen, self.here = self.mask & self._largest(self.cfg.sparsity.support), True, None

    def _median(self) -> float:
        return float((self.alpha() != 0).sum(-1).float().median())

    # -- directions
    def _direction(self) -> dict:
        return {"varpro": self._lbfgs, "am": self._half_steps, "adam": self._adam}[self.cfg.fit.method]()

    def _curvature(self) -> Tensor:
        """(G, m, r, r): inverses of sum alpha^2 A^T A, damped (a basis that nobody uses has 0); some bases at a time."""
        M = self.here.curvature
        level, r = M.diagonal(dim1=-1, dim2=-2).mean(-1).mean(), M.shape[-1]
        eye = torch.eye(r, dtype=M.dtype, device=M.device)
        out = torch.empty_like(M) if self.curvature is None else self.curvature
        for part, to in zip(M.view(-1, r, r).split(64), out.view(-1, r, r).split(64)):  # a product is faster than a solve
            factor = spd_factor(part + 1e-3 * level * eye, 3e-2)  # CUDA's own inverse goes matrix by matrix
            to.copy_(solve_right(eye.repeat(len(part), 1, 1), factor) if M.device.type == "cuda" else torch.cholesky_inverse(factor))
        return out

    def _precondition(self, q: dict) -> dict:
        """An estimate of the inverse Hessian times q: (sum alpha^2 A^T A)^-1 on the left of each basis's part, the mean
        metric's inverse on its right, a constant for the logits."""
        out = self._take()
        for g in range(len(out)):
            for rows, M, to in zip(q["B"][g].split(64), self.curvature[g].split(64), out[g].split(64)):
                torch.matmul(M, rows if self.root is None else rows @ self.root[g], out=to)
        return {"B": out.div_(2), "z": q["z"] * (3 * len(self.experts) * (self.T ** 2 if self.kind != "signed" else 1))}

    @contextlib.contextmanager
    def _pair(self, step: int) -> Iterator[tuple]:
        """(s, y) of a step while the block lasts."""
        reuse = self.experts.device.type == "cpu" and self.pairs[step].path is not None
        t = self.pairs[step].load(lambda name, shape, dtype: self._take() if reuse and name.endswith(".B") else torch.empty(shape, dtype=dtype))
        yield tuple({k: t[f"{n}.{k}"].to(self.experts.device) for k in self.x} for n in "sy")
        if reuse:
            self._give(t["s.B"], t["y.B"])

    def _lbfgs(self) -> dict:
        """Two-loop recursion (Nocedal and Wright, Algorithm 7.4) around the preconditioner."""
        self.curvature = self._curvature()
        q, steps, gamma = {"B": self._take().copy_(self.here.grad["B"]), "z": self.here.grad["z"].clone()}, {}, dict.fromkeys(self.x, 1.0)
        for k in reversed(self.pairs):
            with self._pair(k) as (s, y):
                sy = _dot(s, y)
                if not steps:  # the newest pair: how much the preconditioner is off along it, in the bank and in the logits
                    Hy = self._precondition(y)
                    parts = {n: (_dot({n: s[n]}, y), _dot({n: y[n]}, Hy)) for n in gamma}
                    both = sy / max(sum(b for _, b in parts.values()), 1e-300)
                    gamma = {n: a / b if a > 0 < b else both for n, (a, b) in parts.items()}
                    self._give(Hy["B"])
                steps[k] = _dot(s, q) / sy, sy
                _add(q, -steps[k][0], y)
        delta = self._precondition(q)
        self._give(q["B"])
        for n, v in delta.items():
            v.mul_(gamma[n])
        for k in self.pairs:
            with self._pair(k) as (s, y):
                along, sy = steps[k]
                _add(delta, along - _dot(y, delta) / sy, s)
        if _dot(delta, self.here.grad) <= 0:  # curvature went wrong: steepest descent in the preconditioner
            self.pairs = {}
            self._give(delta["B"])
            delta = self._precondition(self.here.grad)
        reach = float(delta["B"].norm() / self.x["B"].norm().clamp_min(1e-30))
        return {k: v.mul_(-min(1.0, 0.5 / max(reach, 1e-30))) for k, v in delta.items()}

    def _half_steps(self) -> dict:
        """am: bank by least squares on the shifted targets, then mixtures on what is left of them; with momentum."""
        B, alpha, p = self.x["B"], self.alpha(), self.here
        flat, dB, dz = B.flatten(2), torch.empty_like(B), torch.empty_like(alpha)
        for g in range(B.shape[0]):
            ids = (self.experts.group == g).nonzero().flatten().to(alpha.device)
            a = alpha[ids]
            dB[g] = torch.cholesky_solve(p.shift[g].flatten(1), spd_factor(a.T @ a, 1e-3 + self.cfg.fit.lambda_B)).view_as(dB[g])
            left = p.pull[ids] - a @ (dB[g].flatten(1) @ flat[g].T)
            dz[ids] = self._mixture_step(a, flat[g] @ flat[g].T, left, self.mask[ids])
        delta = {"B": dB, "z": dz}
        if "B" in self.velocity:
            delta = _axpy(delta, 0.8, self.velocity)
        return delta

    def _mixture_step(self, a: Tensor, gram: Tensor, pull: Tensor, mask: Tensor) -> Tensor:
        """alpha-step: the Gauss-Newton step in the logits of ||sum_j dalpha_j B_j - dZ||^2 + l1 |alpha|, (n, m), from the
        bank's Gram matrix (m, m) and pull = <dZ, B_j>; the map's Jacobian J is symmetric."""
        m = a.shape[1]
        J = torch.stack([mixture_vjp(a, e.expand_as(a), self.T, self.kind, mask) for e in torch.eye(m, dtype=a.dtype, device=a.device)], -1)
        level = gram.diagonal().mean()
        right = J @ (pull - 0.5 * self.cfg.sparsity.l1 * level * a.sign())[..., None]
        return torch.cholesky_solve(right, spd_factor(J @ gram @ J, 1e-3))[..., 0]

    def _adam(self) -> dict:
        """One Adam step of all parameters, at rates relative to their own size at the start."""
        a, f = self.cfg.fit.adam, self.cfg.fit
        fade = 0.5 * (1 + math.cos(math.pi * self.step_done / f.steps)) + 0.01
        rate, delta = {"B": 1.0, "z": a.lr_z, "A": a.lr_A}, {}
        for key, g in self.here.grad.items():
            m, v = self.moments.get(key) or self.moments.setdefault(key, (torch.zeros_like(g), torch.zeros_like(g)))
            delta[key] = (self._take() if key == "B" else torch.empty_like(g)).zero_()
            count = torch.tensor(float(self.step_done), device=g.device)
            adam([delta[key]], [g], [m], [v], [], [count], fused=True, amsgrad=False, beta1=a.beta1, beta2=a.beta2, weight_decay=0.0,
                 lr=f.lr * fade * rate[key] * self.unit[key] * self.scale, eps=a.eps, maximize=False)
        return delta

    # -- one step
    def _evaluate(self, x: dict, s: Schedule) -> Pass | None:
        """None where x is so far off that a Gram matrix is not finite."""
        begin = time.perf_counter()
        try:
            return evaluate(x, self.experts, self.cfg, self.kind, self.mask, s, self._take())
        except Diverged:
            return None
        finally:
            self.last_pass = time.perf_counter() - begin

    def step(self) -> dict:
        """One accepted (or refused) step; returns its log row."""
        s, tries, taken = self._schedule(), 0, 0.0
        if self.here is None or s != self.at:  # the objective has moved: take it again where we stand
            self.pairs, self.velocity, self.here = {}, {}, None
            self.here, self.at = self._evaluate(self.x, s), s
            if self.here is None or not math.isfinite(self.here.value):
                raise Diverged(f"step {self.step_done}: the objective is not finite")
        varpro = self.cfg.fit.method == "varpro"
        delta = self._direction()
        t = self.scale if varpro and not self.pairs else 1.0  # with no curvature yet, as far as it went last time
        slope = min(0.0, _dot(delta, self.here.grad))
        free = self.cfg.fit.method == "adam" and not self.cfg.fit.adam.safeguard
        for tries in range(1, 7):
            x = {k: torch.add(v, delta[k], alpha=t, out=self._take() if k == "B" else None) for k, v in self.x.items()}
            new = self._evaluate(x, s)
            if free and (new is None or not math.isfinite(new.value)):
                raise Diverged(f"step {self.step_done}: the objective is not finite; lower fit.lr")
            if free or new is not None and new.value <= self.here.value + 1e-4 * t * slope * varpro:
                self.velocity = delta if self.cfg.fit.method == "am" and t == 1 else {}
                if not self.velocity:
                    self._give(delta["B"])
                if varpro:
                    self._remember(x, new)
                self.x, self.here, taken = x, new, t
                break
            self._give(x["B"], *([new.grad["B"]] if new else []))
            rise = new.value - self.here.value - slope * t if new is not None else math.inf
            t *= min(0.5, max(0.1, -slope * t / (2 * rise))) if math.isfinite(rise) and rise > 0 else 0.25
        else:
            self.pairs, self.moments, self.velocity = {}, {}, {}
        if varpro:
            self.scale = min(1.0, max(1e-6, 2 * taken if taken else self.scale * 1e-2))
        else:
            self.scale = min(1.0, self.scale * 1.1) if taken == 1 else max(1e-4, self.scale * 0.5)
        self.step_done += 1
        self._stop_early()
        return self._row(taken, tries)

    def _remember(self, x: dict, new: Pass) -> None:
        """Keep s = x - self.x and y = new.grad - here.grad, made in the memory of what they replace."""
        s = {k: torch.sub(x[k], v, out=v) for k, v in self.x.items()}
        y = {k: torch.sub(new.grad[k], v, out=v) for k, v in self.here.grad.items()}
        if _dot(s, y) > 1e-10 * math.sqrt(_dot(s, s) * _dot(y, y)):
            pair = {f"{n}.{k}": v for n, part in zip("sy", (s, y)) for k, v in part.items()}
            self.pairs[self.step_done + 1] = kept = self.shelve(f"pair-{self.step_done + 1:06d}", pair)
            self.pairs = {k: self.pairs[k] for k in [*self.pairs][-self.cfg.fit.memory:]}
            if kept.path is None:
                return
        self._give(s["B"], y["B"])

    def _stop_early(self) -> None:
        self.recent = [*self.recent, self.here.value][-11:]
        if self.cfg.fit.tol and self.frozen and len(self.recent) == 11 and \
                self.recent[0] - self.recent[-1] < self.cfg.fit.tol * self.recent[0]:
            self.step_done = max(self.step_done, self.cfg.fit.steps)

    def _row(self, taken: float, passes: int) -> dict:
        a = self.alpha()
        share = a.abs() / a.abs().sum(-1, keepdim=True).clamp_min(1e-30)
        return {"step": self.step_done, "loss": self.here.value, "mse": self.here.error * self.here.energy / a.shape[0] /
                self.experts.p / self.experts.d, "rel_frob": math.sqrt(self.here.error), "support": self._median(),
                "effective_support": float((1 / share.square().sum(-1)).median()), "zeros": float((a == 0).float().mean()),
                "lambda": self.at.lam, "beta": self.at.beta, "T": self.T, "step_size": taken, "passes": passes, "pass_seconds": round(self.last_pass, 3)}

    # -- state and outcome
    def state(self) -> dict:
        """Tensors from which load_state, with `pairs`, goes on to the same bits."""
        out = {f"x.{k}": v for k, v in self.x.items()} | {"mask": self.mask}
        out |= {f"velocity.{k}": v for k, v in self.velocity.items()}
        out |= {f"moment.{n}.{k}": v for k, pair in self.moments.items() for n, v in zip("mv", pair)}
        numbers = {"step": self.step_done, "T": self.T, "scale": self.scale, "frozen": float(self.frozen), "batch": self.experts.batch,
                   "recent": self.recent, "pairs": [*self.pairs], **{f"unit.{k}": v for k, v in self.unit.items()}}
        out |= {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}
        if self.at:
            out["at"] = torch.tensor([self.at.lam, self.at.beta, self.at.T, self.at.frozen], dtype=torch.float64)
        return {k: v.detach().cpu().contiguous() for k, v in out.items()}

    def load_state(self, t: dict, pairs: dict) -> None:
        """Go on from state() and its pairs {step: Shelved}; tensors must be aligned in memory, since MKL rounds otherwise."""
        dev = self.experts.device
        self.velocity = {k[9:]: v.to(dev) for k, v in t.items() if k.startswith("velocity.")}
        self.x = {k[2:]: v.to(dev) for k, v in t.items() if k.startswith("x.")}
        self.mask, self.pairs = t["mask"].to(dev), pairs
        self.moments = {k: (t[f"moment.m.{k}"].to(dev), t[f"moment.v.{k}"].to(dev)) for k in self.x if f"moment.m.{k}" in t}
        self.step_done, self.T, self.scale = int(t["step"]), float(t["T"]), float(t["scale"])
        self.frozen, self.recent = bool(t["frozen"]), t["recent"].tolist()
        self.unit = {k: float(t[f"unit.{k}"]) for k in self.x}
        if "at" in t:
            lam, beta, T, frozen = t["at"].tolist()
            self.at, self.here = Schedule(lam, beta, T, bool(frozen)), None
            self.here = self._evaluate(self.x, self.at)

    @torch.no_grad()
    def factors(self) -> FamilyFactors:
        """Supports cut to size, bank rounded to its stored dtype, adapters solved for what is stored."""
        if not self.frozen:
            self._freeze()
        E, alpha = self.experts, self.alpha()
        if self.here:  # its large parts are not needed any more
            self.here.grad, self.here.curvature = {}, None
        s = int((alpha != 0).sum(-1).max())
        order = alpha.abs().topk(s, -1).indices.sort(-1).values
        val = alpha.gather(1, order).float()
        idx = order.int().masked_fill(val == 0, 0).cpu()
        val = val.cpu()
        bank = E.bank(self.x["B"]).to(self.store).cpu()
        rows, A = {l: [i for i, k in enumerate(E.keys) if k[0] == l] for l in E.group_of_layer}, {}
        mine = itertools.groupby(E.stream(), key=lambda batch: batch[2])
        for l, ids in rows.items():
            A_l, place = torch.zeros(len(ids), E.p, bank.shape[2]), {i: j for j, i in enumerate(ids)}
            for at, g, _, V, _, means in next(mine)[1] if any(k == l for _, k in E.plan) else ():
                part = at.cpu()
                X = compose(bank[g].float(), idx[part], val[part], self.cfg.bank.activation).to(E.device)
                X, L = X.to(self.store).float(), E.right[l] if E.absorbed else None  # what the runtime composes
                a = adapters(V, X if L is None else X @ L, self.cfg.fit.lambda_A, C=E.metric(l), means=means)
                A_l[[place[i] for i in part.tolist()]] = E.adapters(part, a).cpu()
            all_sum(A_l)
            A[l] = self.shelve(f"A-{l:06d}", {"A": A_l.to(self.store)})
        return FamilyFactors(list(bank), LazyDict({l: lambda at=at: at.load()["A"] for l, at in A.items()}),
                             {l: idx[i] for l, i in rows.items()}, {l: val[i] for l, i in rows.items()},
                             dict(E.group_of_layer), self.cfg.bank.activation, E.shift, E.scale)


# ======================================================================================================
# 6. Factors file: save, load, validate
# ======================================================================================================
@dataclass
class FamilyFactors:
    """One family's factors. Per layer l, E_l experts in the order of Factors.experts[l]."""
    bank: list                          # one (m, r, d) per group of layers
    A: dict                             # {l: (E_l, p, r)}
    idx: dict                           # {l: (E_l, s) int32}, padded with 0
    val: dict                           # {l: (E_l, s) float32}, padded with 0
    group: dict                         # {l: index of the layer's bank}
    activation: str
    shift: float = 0.0
    scale: float = 1.0
    owner: str | None = None            # the family whose bank this is, where it is another's

    def composed(self, layer: int, rows: slice | list = slice(None)) -> Tensor:
        """B~ (b, r, d) of the layer's experts (or those rows)."""
        return compose(self.bank[self.group[layer]], self.idx[layer][rows], self.val[layer][rows], self.activation)

    def weight(self, layer: int, row: int) -> Tensor:
        """W^ (p, d) float32 of one expert."""
        X = self.composed(layer, [row])[0].float()
        return self.shift + self.scale * (self.A[layer][row].float() @ X)

    def support(self) -> Tensor:
        """Support size of every expert."""
        return torch.cat([(v != 0).sum(-1) for v in self.val.values()])

    def numbers(self) -> int:
        """Everything stored: bank (with its owner), adapters, mixtures with their indices, shift and scale."""
        parts = [*(() if self.owner else self.bank), *self.idx.values(), *self.val.values()]
        each = next(iter(self.A.values()))[0].numel()  # all adapters need not be in memory
        return sum(t.numel() for t in parts) + each * sum(map(len, self.val.values())) + 2

    def split(self, names: Sequence[str]) -> dict:
        """{family: factors} of several families that were fitted as one: a layer's rows are the first's, then the next's."""
        def part(rows: Mapping, i: int) -> LazyDict:
            return LazyDict({l: lambda l=l: rows[l].chunk(len(names))[i].contiguous() for l in rows})
        return {name: dataclasses.replace(self, A=part(self.A, i), idx=dict(part(self.idx, i)), val=dict(part(self.val, i)),
                                          owner=names[0] if i else None) for i, name in enumerate(names)}


@dataclass
class Factors:
    """What a fit leaves: factors per family, which experts they stand for, and where they came from."""
    families: dict                      # {family: FamilyFactors}
    experts: dict                       # {layer: [expert, ...]}; from dims.experts on: slices of the shared expert
    dims: Dims
    model_type: str
    fingerprint: str
    config: dict = field(default_factory=dict)
    norms: dict = field(default_factory=dict)  # {parameter: (n,) float32} in place of the source's, where heal trained them
    down: dict = field(default_factory=dict)   # {layer: (n, d, p)} in place of the source's, of the experts that refined(layer) names

    def refined(self, layer: int) -> list:
        """Experts whose down projection the refinement replaces: the fitted ones, and the whole shared expert."""
        D = self.dims
        return [e for e in self.experts[layer] if e < D.experts] + [*range(D.experts, D.experts + D.shared)]

    def ratio(self) -> float:
        """Stored / dense numbers of what is compressed."""
        n = sum(map(len, self.experts.values()))
        return sum(f.numbers() for f in self.families.values()) / (len(self.families) * n * self.dims.p * self.dims.d)

    def model_ratio(self, total: int) -> float:
        """Stored / dense numbers of the whole model of `total` parameters."""
        n = sum(map(len, self.experts.values()))
        dense = len(self.families) * n * self.dims.p * self.dims.d
        return (total - dense + sum(f.numbers() for f in self.families.values())) / total

    def meta(self) -> dict:
        """The JSON that describes the tensors: what a reader needs to build modules before it has read any."""
        fam = {name: {"m": f.bank[0].shape[0], "r": f.bank[0].shape[1], "s": next(iter(f.val.values())).shape[1], "groups": len(f.bank),
                      "group": {str(l): g for l, g in f.group.items()}, "activation": f.activation,
                      "shift": f.shift, "scale": f.scale, "bank": f.owner or name} for name, f in self.families.items()}
        return {"format_version": FORMAT_VERSION, "globe_version": __version__, "model_type": self.model_type,
                "fingerprint": self.fingerprint, "dims": dataclasses.asdict(self.dims), "families": fam,
                "experts": {str(l): e for l, e in self.experts.items()}, "config": self.config}


def save_factors(factors: Factors, path: Path) -> None:
    """Write factors.safetensors: whole or not at all, one tensor in memory at a time."""
    shapes, make = {}, {}
    for name, f in factors.families.items():
        small = {} if f.owner else {f"bank.{name}.{g}": b for g, b in enumerate(f.bank)}
        first = next(iter(f.A.values()))
        for l in f.A:
            small |= {f"layers.{l}.{name}.idx": f.idx[l], f"layers.{l}.{name}.val": f.val[l]}
            shapes[f"layers.{l}.{name}.A"] = first.dtype, (len(f.val[l]), *first.shape[1:])
            make[f"layers.{l}.{name}.A"] = lambda f=f, l=l: f.A[l]
        shapes |= {k: (t.dtype, t.shape) for k, t in small.items()}
        make |= {k: lambda t=t: t for k, t in small.items()}
    dense = {f"norm.{name}": t for name, t in factors.norms.items()} | {f"layers.{l}.down": t for l, t in factors.down.items()}
    shapes, make = shapes | {k: (t.dtype, t.shape) for k, t in dense.items()}, make | {k: lambda t=t: t for k, t in dense.items()}
    write_tensors(path, shapes, LazyDict(make), {"globe": json.dumps(factors.meta(), sort_keys=True)})


def _meta_dims(meta: dict) -> Dims:
    return Dims(**{**meta["dims"], "layers": tuple(meta["dims"]["layers"])})


def check_meta(meta: dict, where: str) -> dict:
    """Refuse another format version or a description that does not hold together; returns meta."""
    version = meta.get("format_version") if isinstance(meta, dict) else FORMAT_VERSION
    expect(version == FORMAT_VERSION, f"{where}: expected factors of format version {FORMAT_VERSION}, found {version!r}")
    try:
        D, layers = _meta_dims(meta), [int(l) for l in meta["experts"]]
        fine = [str(l) for l in layers] == list(meta["experts"])  # "01" would be layer 1 too
        if not all(type(v) is int and 0 <= v < 2 ** 32 for v in (*D.layers, *dataclasses.astuple(D)[1:])):
            raise ValueError("a size that is none")  # nothing may be computed from it: a list times an int can fill the memory
        fine &= D.p * D.d > 0
        fine &= bool(layers) and set(layers) <= set(D.layers) and len(set(layers)) == len(layers)
        fine &= isinstance(meta.get("config", {}), dict) and all(isinstance(meta[k], str) for k in ("model_type", "fingerprint"))
        fine &= bool(meta["families"]) and all(type(e) is int and 0 <= e < D.experts + D.shared for es in meta["experts"].values() for e in es)
        fine &= all(es and len(set(es)) == len(es) for es in meta["experts"].values())
        for name, f in meta["families"].items():
            fine &= name in FAMILIES and f["activation"] in CHOICES["bank.activation"]
            owner = meta["families"][f["bank"]]
            fine &= owner["bank"] == f["bank"] and all(owner[k] == f[k] for k in ("m", "r", "groups", "group"))
            fine &= all(type(f[k]) is int and f[k] > 0 for k in ("m", "r", "s", "groups")) and f["m"] * f["r"] * D.d < 2 ** 48
            fine &= f["groups"] <= len(layers) and f["s"] < 2 ** 32 and set(f["group"]) == set(meta["experts"])
            fine &= all(type(g) is int and 0 <= g < f["groups"] for g in f["group"].values())
            fine &= all(type(f[k]) is float and abs(f[k]) < 1e38 for k in ("shift", "scale"))
        if not fine:
            raise ValueError("a value out of range")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise UserError(f"{where}: its description is damaged ({type(e).__name__} {e})") from None
    return meta


def load_factors(path: Path | str) -> Factors:
    """Read and validate factors: `path` is a run directory or the file itself. Tensors are memory-mapped.

    UserError: no such file, not safetensors, another format version, a tensor missing, extra or of a wrong shape, an
    index outside the bank."""
    path = Path(path)
    path = path / "factors.safetensors" if path.is_dir() else path
    expect(path.is_file(), f"{path}: expected a factors file, found none (is the fit finished?)")
    try:
        with safe_open(path, "pt") as f:
            meta = (f.metadata() or {}).get("globe")
        tensors = load_file(path)
        meta = json.loads(meta) if meta else None
    except (SafetensorError, OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: expected a factors file, found {found_in(path, e)}") from None
    expect(meta is not None, f"{path}: expected a factors file, found safetensors without a globe description")
    check_meta(meta, str(path))
    meta["experts"] = dict(sorted(meta["experts"].items(), key=lambda item: int(item[0])))  # JSON's keys are text: 10 before 2
    dims, families = _meta_dims(meta), {}
    for name, f in ((f, meta["families"][f]) for f in FAMILIES if f in meta["families"]):  # in the order of a fit
        def take(key: str, shape: tuple) -> Tensor:
            if key not in tensors or tensors[key].shape != shape:
                found = tuple(tensors[key].shape) if key in tensors else "none"
                raise UserError(f"{path}: {key}: expected {shape}, found {found}")
            whole, dtype = key.endswith(".idx"), tensors[key].dtype
            if dtype != torch.int32 if whole else not dtype.is_floating_point or dtype.itemsize < 2:
                raise UserError(f"{path}: {key}: expected {'int32' if whole else 'float32, float16 or bfloat16'}, found {dtype}")
            return tensors.pop(key)
        A, idx, val = {}, {}, {}
        for l, experts in ((int(l), e) for l, e in meta["experts"].items()):
            A[l] = take(f"layers.{l}.{name}.A", (len(experts), dims.p, f["r"]))
            idx[l] = take(f"layers.{l}.{name}.idx", (len(experts), f["s"]))
            val[l] = take(f"layers.{l}.{name}.val", (len(experts), f["s"]))
            low, high = int(idx[l].min()), int(idx[l].max())
            expect(0 <= low and high < f["m"], f"{path}: layers.{l}.{name}.idx: expected indices in [0, {f['m']}), found {low}..{high}")
            expect(torch.isfinite(val[l]).all(), f"{path}: layers.{l}.{name}.val: expected finite numbers, found NaN or Inf")
        bank = [take(f"bank.{name}.{g}", (f["m"], f["r"], dims.d)) for g in range(f["groups"])] if f["bank"] == name else []
        families[name] = FamilyFactors(bank, A, idx, val, {int(l): g for l, g in f["group"].items()}, f["activation"],
                                       f["shift"], f["scale"], None if f["bank"] == name else f["bank"])
    for f in families.values():
        f.bank = families[f.owner].bank if f.owner else f.bank
    norms = {name.removeprefix("norm."): finite(tensors.pop(name), name, path) for name in sorted(tensors) if name.startswith("norm.")}
    for name, t in norms.items():
        expect(t.ndim == 1 and t.dtype == torch.float32, f"{path}: norm.{name}: expected float32 (n,), found {t.dtype} {tuple(t.shape)}")
    factors = Factors(families, {int(l): e for l, e in meta["experts"].items()}, dims, meta["model_type"],
                      meta["fingerprint"], meta.get("config", {}), norms)
    for l in factors.experts if "down" not in families else ():
        if (t := tensors.pop(f"layers.{l}.down", None)) is not None:
            want = len(factors.refined(l)), dims.d, dims.p
            expect(t.shape == want and t.is_floating_point(), f"{path}: layers.{l}.down: expected floating-point numbers {want}, found {t.dtype} {tuple(t.shape)}")
            factors.down[l] = finite(t, f"layers.{l}.down", path)
    if tensors:
        raise UserError(f"{path}: {sorted(tensors)[0]}: not expected (and {len(tensors) - 1} more)")
    return factors


def check_fingerprint(factors: Factors, ckpt: Checkpoint) -> None:
    want, found = factors.fingerprint, ckpt.fingerprint()
    expect(found == want, f"{ckpt.dir}: expected the checkpoint that the factors were fitted to (fingerprint {want}), found another ({found})")


# ======================================================================================================
# 7. Runtime: composed-basis cache, GlobeExperts, patch
# ======================================================================================================
class ExpertCache:
    """Cache of composed items: expert -> a slot in preallocated slabs, one slab per family.
    What goes first is the least recently used, or, by_uses, the least used. Memory is taken once, at the first use, and stays
    at slots times one item. `lock` is held while a step uses the slots, so that threads which generate at once take turns."""

    def __init__(self, slots: int, by_uses: bool = False):
        self.slots, self.by_uses, self.lock = slots, by_uses, threading.RLock()
        self.clear()

    def __reduce__(self):  # a copy begins empty: what was held can be composed again, and a lock cannot be copied
        return ExpertCache, (self.slots, self.by_uses)

    def clear(self) -> None:
        """As new: no memory taken, nothing counted."""
        self.slabs, self.uses = {}, collections.Counter()  # family: (slots, rows, columns); steps that used an expert, held or not
        self.forget()
        self.count()

    def forget(self) -> None:
        self.slot_of, self.free = collections.OrderedDict(), list(range(self.slots))[::-1]  # least recently used first
        self.table = None  # slots and rows by expert, as tensors

    def count(self) -> None:
        """Start the statistics afresh: lookups that found their expert, those that did not, seconds spent composing."""
        self.hits, self.misses, self.seconds = 0, 0, 0.0

    def hold(self, keys: Sequence[int], build: Callable[[list, list], None]) -> None:
        """Have these experts, at most `slots` of them, in slots: build(missing experts, their slots) fills all at once.
        The last of them counts as the most recently used, whichever were there."""
        missing = [k for k in keys if k not in self.slot_of]
        self.uses.update(keys)
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        for k in keys:
            if k in self.slot_of:
                self.slot_of.move_to_end(k)  # a missing one then evicts none of these
        if missing:
            begin, self.table = time.perf_counter(), None
            slots = [self.free.pop() if self.free else self._evict(keys) for _ in missing]
            self.free += slots[::-1]  # a build that fails leaves them free
            build(missing, slots)
            del self.free[-len(slots):]
            self.slot_of.update(zip(missing, slots))
            for k in keys:
                self.slot_of.move_to_end(k)
            self.seconds += time.perf_counter() - begin

    def _evict(self, keys: Sequence[int]) -> int:
        """The slot of the first to go, which is none of keys."""
        if self.by_uses:
            return self.slot_of.pop(min((k for k in self.slot_of if k not in keys), key=self.uses.__getitem__))
        return self.slot_of.popitem(last=False)[1]

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.slabs.values())


def on_meta(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


class GlobeBank(nn.Module):
    """The banks of a model: one parameter `{family}_{group}` (m, r, d) each, of the family that owns it; for every layer."""

    def __init__(self, meta: dict):
        super().__init__()
        for name, f in ({} if meta.get("composed") else meta["families"]).items():
            for g in range(f["groups"] if f["bank"] == name else 0):
                setattr(self, f"{name}_{g}", on_meta(f["m"], f["r"], meta["dims"]["d"]))
        self.cache, self.scratch, self.scratch_slots = CacheConfig(), {}, 1  # device: slots of layers that have none of their own

    def _apply(self, fn, recurse=True):
        self.scratch.clear()
        return super()._apply(fn, recurse)


NATIVE_ACTS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "ReLU": "relu"}  # of experts_decode
DECODE_TOKENS = 8   # up to so many, experts_decode beats grouped products on an accelerator; on a CPU it serves any number
MLP_TOKENS = 64     # up to so many, it beats torch on one dense expert, which packs weights (34 tokens 1.2 times, 512 0.6 times)
MIXED_TOKENS = 128  # up to so many, experts_mixed beats large products
LINEAR_TOKENS = 8   # the same of a linear layer
CHUNK_TOKENS = 2048  # of a prefill; bounds what its intermediate results take
FLOPS_PER_NUMBER = 40  # that a CPU core computes while it reads one bfloat16 number: weighs a product against a read


class GlobeExperts(nn.Module):
    """Drop-in for a transformers experts module: same forward(hidden_states, top_k_index, top_k_weights).

    Families with factors run through composed bases or composed weights from the cache, or (cache.mode=direct) through the
    bases themselves; every other matrix is dense.
    Tensors are created on the meta device; patch and load put real ones in their place."""

    def __init__(self, meta: dict, layer: int, old: nn.Module, bank: GlobeBank, cache: CacheConfig):
        super().__init__()
        D = _meta_dims(meta)
        self.layer, self.num_experts, self.intermediate_dim, self.hidden_dim, self.top_k = layer, D.experts, D.p, D.d, D.top_k
        self.fitted = {e: i for i, e in enumerate(meta["experts"][str(layer)])}
        self.dense_row = {e: i for i, e in enumerate(e for e in range(D.experts) if e not in self.fitted)}
        self.families, self.composed = meta["families"], bool(meta.get("composed"))
        self._bank = (bank,)  # a tuple hides it from nn.Module: the model owns the bank, once
        # A loader that knows nothing of GloBE would start from random experts with no more than a warning; a tensor of
        # the dense experts' name and another shape makes it stop.
        self.register_buffer("gate_up_proj", torch.zeros(1, dtype=torch.int8))
        n = len(self.fitted)
        for f in FAMILIES:
            if f in self.families:
                r, s = self.families[f]["r"], self.families[f]["s"]
                setattr(self, f"{f}_A", on_meta(n, D.p, r))
                if self.composed:
                    setattr(self, f"{f}_basis", on_meta(n, r, D.d))
                else:
                    setattr(self, f"{f}_val", on_meta(n, s, dtype=torch.float32))
                    self.register_buffer(f"{f}_idx", torch.empty(n, s, dtype=torch.int32, device="meta"))
            rows = len(self.dense_row) if f in self.families else D.experts
            if rows:
                setattr(self, f"{f}_proj", on_meta(rows, *((D.d, D.p) if f == "down" else (D.p, D.d))))
        for key, value in vars(old).items():  # what the model's own gate needs (act_fn, limits, config), not its tensors
            if not key.startswith("_") and not hasattr(self, key) and not isinstance(value, Tensor):
                setattr(self, key, value)
        if "act_fn" in old._modules:
            self.act_fn = old.act_fn
        self._gate = types.MethodType(type(old)._apply_gate, self)
        plain = type(old)._apply_gate.__name__ == "_default_apply_gate"  # act(gate) * up
        self.native_act = NATIVE_ACTS.get(type(getattr(self, "act_fn", None)).__name__) if plain else None
        self.hold, self.cache_dtype, self.cache = dict.fromkeys(self.families, "basis"), as_dtype(cache.dtype), ExpertCache(0)
        self.constants = ([int(f in self.families) for f in FAMILIES], [float(self.families.get(f, {}).get("scale", 1)) for f in FAMILIES],
                          [float(self.families.get(f, {}).get("shift", 0)) for f in FAMILIES], self.native_act)  # of experts_decode

    def held(self, weights: bool) -> dict:
        """{family: "basis" | "weight"}: what is held, if composed weights are where they take fewer products to use."""
        p, d = self.intermediate_dim, self.hidden_dim
        return {f: "weight" if weights and F_["r"] * (p + d) >= p * d and not self.composed else "basis" for f, F_ in self.families.items()}

    def costs(self, hold: dict) -> tuple:
        """(bytes of an item, numbers that move in one use, in one miss)."""
        p, d, item, use, miss = self.intermediate_dim, self.hidden_dim, 0, 0, 0
        for f, F_ in self.families.items():
            r, weight = F_["r"], hold[f] == "weight"
            item += (p if weight else r) * d
            use += p * d if weight else r * (p + d)
            miss += F_["s"] * r * d + (2 * p * r * d // FLOPS_PER_NUMBER if weight else 0)
        A = self._parameters[f"{next(iter(self.families))}_A"]
        return item * (self.cache_dtype or A.dtype).itemsize, use, miss

    def train(self, mode: bool = True):
        self.cache.clear()  # factors may have moved while training
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self.cache.clear()  # slots follow the module to its new device and dtype
        return super()._apply(fn, recurse)

    def _basis(self, f: str, rows: Sequence[int], out: Tensor | None = None, slot: Tensor | None = None) -> Tensor:
        """B~ (n, r, d) of rows; into out[slot] where those are given."""
        if self.composed:
            return getattr(self, f"{f}_basis")[rows]
        F_ = self.families[f]
        bank, idx = self._bank_of(f), getattr(self, f"{f}_idx")[rows]
        if bank.device != idx.device:  # layers spread over devices: fetch the bases that these experts mix, not the bank
            used, idx = idx.long().unique(return_inverse=True)
            bank = bank[used.to(bank.device)].to(idx.device)
        return compose(bank, idx, getattr(self, f"{f}_val")[rows], F_["activation"], out, slot)

    def _bank_of(self, f: str) -> Tensor:
        F_ = self.families[f]
        return self._bank[0]._parameters[f"{F_['bank']}_{F_['group'][str(self.layer)]}"]

    def _value(self, f: str, row: int) -> Tensor:
        """What is held of one row: B~ (r, d), or W^ as the model has it, (p, d) and of down (d, p)."""
        X = self._basis(f, [row])[0]
        if self.hold[f] == "basis":
            return X
        W = self.families[f]["shift"] + self.families[f]["scale"] * (getattr(self, f"{f}_A")[row] @ X)
        return W.T if f == "down" else W

    def _fill(self, cache: ExpertCache, experts: list, slots: list) -> None:
        """Compose experts into their slots: bases of a family in one call, straight into its slab."""
        rows = [self.fitted[e] for e in experts]
        for f, slab in self._slabs(cache).items():
            if self.hold[f] == "basis" and slab.dtype == self._bank_of(f).dtype:
                self._basis(f, rows, slab, torch.tensor(slots, device=slab.device))
            else:
                for row, i in zip(rows, slots):
                    slab[i] = self._value(f, row)

    def _slabs(self, cache: ExpertCache) -> dict:
        """{family: what is held, by slot}, allocated at first use; the stored bases of a composed export serve as they are."""
        if self.composed:
            return {f: self._parameters[f"{f}_basis"] for f in self.families}
        if not cache.slabs:
            p, d = self.intermediate_dim, self.hidden_dim
            for f, F_ in self.families.items():
                A, shape = self._parameters[f"{f}_A"], (F_["r"], d) if self.hold[f] == "basis" else (d, p) if f == "down" else (p, d)
                cache.slabs[f] = torch.empty(cache.slots, *shape, dtype=self.cache_dtype or A.dtype, device=A.device)
        return cache.slabs

    def _slots(self) -> ExpertCache:
        """This layer's cache; where it has no slots, those that such layers share."""
        if self.cache.slots:
            return self.cache
        device, bank = self._parameters[f"{next(iter(self.families))}_A"].device, self._bank[0]
        return bank.scratch.setdefault(device, ExpertCache(bank.scratch_slots))

    def full(self) -> bool:
        """Every fitted expert is held, so that nothing will be composed or evicted again."""
        return self.composed or len(self.cache.slot_of) == len(self.fitted)

    def _table(self, cache: ExpertCache) -> tuple:
        """Experts' slots, and their rows among the adapters, (E,) each."""
        if cache.table is None:
            device = self._parameters[f"{next(iter(self.families))}_A"].device
            cache.table = tuple(torch.tensor([of.get(e, -1) for e in range(self.num_experts)], device=device)
                                for of in (self.fitted if self.composed else cache.slot_of, self.fitted))
        return cache.table

    def fresh(self, x: Tensor) -> bool:
        """Whether items are composed for x alone: factors learn, or a gradient goes back to x after slots were refilled."""
        grad = torch.is_grad_enabled()
        learns = (self.training or grad) and any(  # training: also in the no-grad pass of gradient checkpointing
            p.requires_grad for m in (self, *self._bank) for n, p in m.named_parameters() if n[-4:] != "proj")
        return learns or grad and x.requires_grad and not self.full()

    def item(self, e: int, fresh: bool) -> dict:
        """{family: what is held} of one expert; with gradients where its factors learn. Call it under the cache's lock."""
        if e not in self.fitted:
            return {}
        if fresh:
            self.cache.misses += 1
            return {f: self._value(f, self.fitted[e]) for f in self.families}
        cache = self._slots()
        if not self.composed:
            self.hold_only(cache, [e])
        return {f: slab[self.fitted[e] if self.composed else cache.slot_of[e]] for f, slab in self._slabs(cache).items()}

    def hold_only(self, cache: ExpertCache, experts: Sequence[int]) -> None:
        if cache is not self.cache:  # another layer's experts may lie there, under the same numbers
            cache.forget()
        cache.hold(experts, functools.partial(self._fill, cache))

    def project(self, f: str, x: Tensor, e: int, item: dict) -> Tensor:
        """x (t, d) -> x W^T (t, p) for gate and up; h (t, p) -> h W_down^T (t, d) for down."""
        if f not in item:
            return F.linear(x, getattr(self, f"{f}_proj")[self.dense_row[e] if f in self.families else e])
        M = item[f].to(x.dtype)
        if self.hold[f] == "weight":
            return F.linear(x, M)
        A, F_ = getattr(self, f"{f}_A")[self.fitted[e]], self.families[f]
        y = (x @ A) @ M if f == "down" else F.linear(F.linear(x, M), A)
        y = y * F_["scale"]
        return y + F_["shift"] * x.sum(-1, keepdim=True) if F_["shift"] else y

    def _run(self, x: Tensor, index: Tensor, weights: Tensor, cache: ExpertCache) -> Tensor:
        """The layer, with every expert of index in its slot: natively, by grouped products, or expert by expert."""
        slabs, P, cpu = {} if self.dense_row else self._slabs(cache), self._parameters, x.device.type == "cpu"
        families = [] if self.dense_row else [  # (held or dense weights, adapters or None) of gate, up and down
            (slabs[f], P[f"{f}_A"] if self.hold[f] == "basis" else None) if f in slabs else (P[f"{f}_proj"], None) for f in FAMILIES]
        if (families and not x.requires_grad and not weights.requires_grad
                and all(t is None or t.dtype == x.dtype and t.is_contiguous() for pair in families for t in pair)):
            if (self.native_act and (cpu or len(x) <= DECODE_TOKENS) and len(x) and x.dtype != torch.float64
                    and _native("experts_decode", x.device.type)):
                weights = weights if weights.dtype == torch.float32 else weights.to(x.dtype)
                return torch.ops.globe.experts_decode.default(
                    x.contiguous(), index.long().contiguous(), weights.contiguous(), *self._table(cache), *(t for pair in families for t in pair),
                    *self.constants)
            aligned = all(n * t.itemsize % 16 == 0 for pair in families for t in pair if t is not None for n in t.shape[1:])
            in_order = self.composed or self.full() and all(e == i for e, i in cache.slot_of.items())  # in the slot of its own number
            if in_order and len(x) and aligned and (cpu or x.dtype == torch.bfloat16):
                return self._grouped(x, index, weights, families)
        return self._by_expert(x, index, weights)

    def _grouped(self, x: Tensor, index: Tensor, weights: Tensor, families: list) -> Tensor:
        """Grouped products over tokens sorted by expert; the host need not know the routing. Experts lie in order."""
        E, (flat, order) = self.num_experts, index.reshape(-1).sort(stable=True)
        token = order // index.shape[-1]
        counts = torch.zeros(E + 1, dtype=torch.int32, device=x.device).scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        ends, xs = counts.cumsum(0, dtype=torch.int32)[:E], x[token]

        def project(f: str, x: Tensor) -> Tensor:
            (M, A), F_ = families[FAMILIES.index(f)], self.families.get(f, {})
            if A is None:
                return F.grouped_mm(x, M.mT, offs=ends)
            first, then = (A, M) if f == "down" else (M.mT, A.mT)
            y = F.grouped_mm(F.grouped_mm(x, first, offs=ends), then, offs=ends) * F_["scale"]
            return y + F_["shift"] * x.sum(-1, keepdim=True) if F_["shift"] else y
        y = project("down", self._gate(torch.cat([project("gate", xs), project("up", xs)], -1)))
        y = torch.where((flat < E)[:, None], y * weights.reshape(-1)[order, None], 0)  # expert E: of another rank
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add_(0, token, y.float()).to(x.dtype)

    def directly(self, tokens: int) -> bool:
        """Whether so many tokens meet the bases themselves (cache.mode=direct). There all the bases that the layer mixes act on
        each token; composed, top_k do, but each expert's is written and read first."""
        if self._bank[0].cache.mode != "direct" or self.dense_row:
            return False
        if any(self._bank_of(f).device != self._parameters[f"{f}_A"].device for f in self.families):
            return False  # layers spread over devices: fetch the bases that are mixed, not the bank
        experts = min(len(self.fitted), tokens * self.top_k)
        return all(tokens * (min(F_["m"], experts * F_["s"]) - self.top_k) <= 2 * FLOPS_PER_NUMBER * experts for F_ in self.families.values())

    def _mixed(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The layer with nothing composed: A (sum_j alpha_j (B_j x)) for gate and up, sum_j B_j^T (alpha_j (A^T h)) for down."""
        P, row = self._parameters, self._table(self.cache)[1]
        mixture = {f: (self._bank_of(f), P[f"{f}_A"], self._buffers[f"{f}_idx"], P[f"{f}_val"]) for f in self.families}
        args = [t for f in FAMILIES for t in ((*mixture[f][:3], mixture[f][3].float()) if f in mixture else (P[f"{f}_proj"], None, None, None))]
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weights, *args))
        if (self.native_act and not learns and len(x) <= MIXED_TOKENS and all(t is None or t.is_contiguous() for t in args)
                and all(t is None or t.dtype == x.dtype for i in (0, 4, 8) for t in args[i:i + 2]) and x.dtype != torch.float64 and _native("experts_mixed", x.device.type)):
            weights = weights if weights.dtype == torch.float32 else weights.to(x.dtype)
            return torch.ops.globe.experts_mixed.default(x.contiguous(), index.long().contiguous(), weights.contiguous(), row, *args, *self.constants[1:])
        return self._mixed_torch(x, index, weights, mixture)

    def _mixed_torch(self, x: Tensor, index: Tensor, weights: Tensor, mixture: dict) -> Tensor:
        """The twin of experts_mixed; for many tokens its large products are the faster ones."""
        (T, k), wide, mine = index.shape, torch.promote_types(x.dtype, torch.float32), index < self.num_experts  # others: of another rank
        flat, order = index.flatten().sort(stable=True)
        order = order[:int(mine.sum())]
        experts, counts = (t.tolist() for t in flat[:len(order)].unique_consecutive(return_counts=True))
        if not experts:
            return torch.zeros_like(x)
        row, w, seen = self._table(self.cache)[1][index.where(mine, 0)], (weights * mine).to(wide), {}  # what a bank makes of x

        def shares(f: str) -> Tensor:  # of the bases in each token's experts, (T, k, m)
            bank, _, idx, val = mixture[f]
            return x.new_zeros(T, k, len(bank), dtype=wide).scatter_add_(2, idx[row].long(), val[row].to(wide))

        def each(y: Tensor, f: str) -> Tensor:  # y (T * k, .) times A, or the dense weight, of the expert that each row is for
            M = mixture[f][1] if f in mixture else self._parameters[f"{f}_proj"]
            M = M if f == "down" and f in mixture else M.mT
            out = y.new_zeros(T * k, M.shape[-1])
            parts = [part @ M[self.fitted[e] if f in mixture else e] for part, e in zip(y[order].split(counts), experts)]
            out[order] = torch.cat(parts).to(out.dtype)  # autocast
            return out

        def project(f: str) -> Tensor:
            if f not in mixture:
                return each(x.repeat_interleave(k, 0), f)
            bank, F_ = mixture[f][0], self.families[f]
            if bank not in seen:
                seen[bank] = F.linear(x, bank.flatten(0, 1)).view(T, *bank.shape[:2]).to(wide)
            y = each((shares(f) @ seen[bank]).to(x.dtype).flatten(0, 1), f) * F_["scale"]
            return y + F_["shift"] * x.sum(-1, keepdim=True).repeat_interleave(k, 0) if F_["shift"] else y
        h = self._gate(torch.cat([project("gate"), project("up")], -1))
        u = each(h, "down").view(T, k, -1).to(wide) * w[..., None]
        if "down" not in mixture:
            return u.sum(1).to(x.dtype)
        bank, F_ = mixture["down"][0], self.families["down"]
        back = F_["scale"] * (shares("down").mT @ u)  # what each base gets of each token, (T, m, r)
        out = (back.to(x.dtype).flatten(1) @ bank.flatten(0, 1)).to(wide)
        return (out + F_["shift"] * (h.view(T, k, -1).sum(-1) * w).sum(1, keepdim=True)).to(x.dtype)

    def _by_expert(self, x: Tensor, index: Tensor, weights: Tensor, fresh: bool = False) -> Tensor:
        """One expert after the other: differentiable, and for layers of which a part is dense."""
        k, weights = index.shape[-1], weights.reshape(-1)
        flat, order = index.reshape(-1).sort(stable=True)
        experts, counts = flat.unique_consecutive(return_counts=True)
        out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for e, where in zip(experts.tolist(), order.split(counts.tolist())):
            if e < self.num_experts:  # expert parallelism marks tokens of other ranks by a number beyond
                item, token = self.item(e, fresh), where // k
                h = self._gate(torch.cat([self.project(f, x[token], e, item) for f in ("gate", "up")], -1))
                y = self.project("down", h, e, item)
                out = out.index_add(0, token, (y * weights[where, None]).to(out.dtype))
        return out.to(x.dtype)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, d), top_k_index (T, k) int, top_k_weights (T, k) -> (T, d)."""
        args = hidden_states, top_k_index, top_k_weights
        if len(hidden_states) > CHUNK_TOKENS and not torch.is_grad_enabled():
            return torch.cat([self.forward(*part) for part in zip(*(t.split(CHUNK_TOKENS) for t in args))])
        if self.fresh(hidden_states):
            return self._by_expert(*args, fresh=True)
        if self.full():
            if not torch.compiler.is_compiling():
                self.cache.hits += top_k_index.numel()
            return self._run(*args, self.cache)
        if self.directly(len(hidden_states)):
            return self._mixed(*args)
        cache = self._slots()
        with cache.lock:
            return self._in_parts(*args, cache)

    def _in_parts(self, x: Tensor, index: Tensor, weights: Tensor, cache: ExpertCache) -> Tensor:
        """As many of the needed experts at a time as there are slots, composing what is missing of them in one call."""
        uses = collections.Counter(index.reshape(-1).tolist())
        uses = {e: n for e, n in uses.items() if e < self.num_experts}
        if self._bank[0].cache.mode == "all":
            uses = dict.fromkeys(self.fitted, 0)
        mine = sorted((e for e in uses if e in self.fitted), key=uses.get)  # the most used last, which the next step finds held
        if len(mine) <= cache.slots:
            self.hold_only(cache, mine)
            return self._run(x, index, weights, cache)
        mine.sort(key=lambda e: e not in cache.slot_of)  # hits first: a miss then evicts none that is still to come
        parts = [mine[i:i + cache.slots] for i in range(0, len(mine), cache.slots)]
        out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        parts[0] += [e for e in uses if e not in self.fitted]
        for part in parts:
            self.hold_only(cache, [e for e in part if e in self.fitted])
            now = torch.isin(index, torch.tensor(part, device=index.device))
            out += self._run(x, index.where(now, self.num_experts), weights, cache)
        return out.to(x.dtype)


class GlobeShared(nn.Module):
    """Drop-in for a shared expert's MLP whose slices are experts of the layer's GlobeExperts."""

    def __init__(self, experts: GlobeExperts, old: nn.Module, slices: int):
        super().__init__()
        self._experts, self.slices = (experts,), slices
        for f in FAMILIES:
            if f not in experts.families:
                setattr(self, f"{f}_proj", getattr(old, f"{f}_proj"))

    def forward(self, x: Tensor) -> Tensor:
        shape, x, E, h, y = x.shape, x.reshape(-1, x.shape[-1]), self._experts[0], [], 0.0
        dense = {f: getattr(self, f"{f}_proj")(x).chunk(self.slices, -1) for f in ("gate", "up") if f not in E.families}
        with E._slots().lock:
            for i in range(self.slices):  # one after the other: there may be a single slot
                e = E.num_experts + i
                item = E.item(e, E.fresh(x))
                h.append(E._gate(torch.cat([dense[f][i] if f in dense else E.project(f, x, e, item) for f in ("gate", "up")], -1)))
                y = y + E.project("down", h.pop(), e, item) if "down" in E.families else y
        return (y if "down" in E.families else self.down_proj(torch.cat(h, -1))).view(shape)


@functools.lru_cache(maxsize=64)
def all_to_first(tokens: int) -> tuple:
    """Routing of every token to expert 0 with weight 1: indices and weights (T, 1)."""
    return torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)


def native_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """Forward of a dense shared expert: as a single expert of the native operator where that serves, since on a CPU it reads
    weights of half precision faster than torch's products do (30 against 17 GB/s)."""
    parts, act = [mlp._modules[f"{f}_proj"] for f in FAMILIES], NATIVE_ACTS.get(type(mlp.act_fn).__name__)
    if (torch.compiler.is_compiling() or torch.is_grad_enabled() or x.itemsize != 2 or not act or x.device.type != "cpu"
            or not 0 < x.numel() // x.shape[-1] <= MLP_TOKENS or not _native("experts_decode", "cpu")
            or any(type(m) not in (nn.Linear, GlobeLinear) or m.bias is not None or m.weight.dtype != x.dtype for m in parts)):
        return type(mlp).forward(mlp, x)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    (first, ones), (gate, up, down) = all_to_first(len(flat)), (m.weight[None] for m in parts)
    return torch.ops.globe.experts_decode.default(flat, first, ones, first[0], first[0], gate, None, up, None, down, None,
                                                  [0, 0, 0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], act).view(x.shape)


class GlobeLinear(nn.Linear):
    """What install makes of the linear layers outside the experts: a few tokens on a CPU meet the native product, which reads
    half precision faster; many go by float32 where products of half precision are slow; everything else is nn.Linear's."""

    def forward(self, input: Tensor) -> Tensor:
        W = self.weight
        if (torch.compiler.is_compiling() or torch.is_grad_enabled() or input.itemsize != 2 or input.dtype != W.dtype or input.device.type != "cpu"
                or W.device.type != "cpu" or type(W) is not nn.Parameter or not W.is_contiguous() or not input.numel() or not W.numel()):
            return super().forward(input)
        if input.numel() > LINEAR_TOKENS * input.shape[-1] or not _native("linear", "cpu"):
            if not slow_products(W.dtype):
                return super().forward(input)
            x, rows = input.float(), max(1, 2 ** 24 // W.shape[1])  # 64 MiB of weights at a time: a vocabulary's would take gigabytes
            biases = itertools.repeat(None) if self.bias is None else self.bias.float().split(rows)
            return torch.cat([F.linear(x, w.float(), b).to(W.dtype) for w, b in zip(W.split(rows), biases)], -1)
        return torch.ops.globe.linear.default(input.reshape(-1, input.shape[-1]).contiguous(), W, self.bias).view(*input.shape[:-1], len(W))


def own_cache(meta: dict) -> CacheConfig:
    """The cache settings of the run that made the factors. UserError where they are none."""
    own = meta.get("config", {}).get("cache")
    return load_config(base={"cache": own}, where="the cache settings of the factors").cache if own else CacheConfig()


def check_direct(cache: CacheConfig, families: dict, composed: bool) -> None:
    """UserError where bases with an activation shall act directly."""
    for f, F_ in families.items() if cache.mode == "direct" and not composed else ():
        expect(F_["activation"] == "identity", f"cache.mode=direct: expected bases without an activation, found {F_['activation']} in {f}")


def install(model: nn.Module, meta: dict, cache: CacheConfig | None = None) -> dict:
    """Put empty (meta-device) GlobeExperts, GlobeShared and the bank into a model; returns the old modules by name.
    cache: default: as the factors were made with. UserError where the model's experts are not those that the factors describe."""
    D, found, cache = _meta_dims(meta), experts_modules(model), cache or own_cache(meta)
    expect(model.config.model_type == meta["model_type"], f"model: expected {meta['model_type']}, found {model.config.model_type}")
    check_direct(cache, meta["families"], bool(meta.get("composed")))
    bank, old_modules = GlobeBank(meta), {}
    for layer in map(int, meta["experts"]):
        expect(layer in found, f"model: expected experts in layer {layer}, found none")
        parent, attr, old = found[layer]
        sizes = old.num_experts, old.intermediate_dim, old.hidden_dim
        expect(not isinstance(old, GlobeExperts), "model: already patched; call unpatch first")
        expect(sizes == (D.experts, D.p, D.d), f"model layer {layer}: expected experts, p, d = {(D.experts, D.p, D.d)}, found {sizes}")
        new = GlobeExperts(meta, layer, old, bank, cache).train(model.training)
        setattr(parent, attr, new)
        old_modules[(layer, attr)] = (parent, old)
        if any(e >= D.experts for e in new.fitted):
            name = next(n for n in ("shared_expert", "shared_experts") if hasattr(parent, n))
            old_modules[(layer, name)] = (parent, getattr(parent, name))
            setattr(parent, name, GlobeShared(new, getattr(parent, name), D.shared).train(model.training))
            continue
        for mlp in (m for n, m in parent.named_children() if n in ("shared_expert", "shared_experts")):
            if all(hasattr(mlp, f"{f}_proj") for f in FAMILIES) and hasattr(mlp, "act_fn"):
                mlp.forward = functools.partial(native_mlp, mlp)
    for m in model.modules():
        if type(m) is nn.Linear:
            m.__class__ = GlobeLinear
    model._modules = {"globe_bank": bank, **model._modules}  # first: device_map="auto" offloads what comes last
    model.save_pretrained = functools.partial(save_pretrained, model, meta)
    set_cache(model, cache)
    return old_modules


def factor_tensors(factors: Factors) -> Iterator[tuple]:
    """(name in a patched model, tensor) of everything that the factors hold."""
    for name, f in factors.families.items():
        yield from ((f"globe_bank.{name}_{g}", b) for g, b in enumerate(f.bank) if not f.owner)
        for l in f.A:
            yield from ((f"layers.{l}.{{experts}}.{name}_{kind}", getattr(f, kind)[l]) for kind in ("A", "val", "idx"))


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a real tensor in place of a meta one, under the same name."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, key)
    expect(old.shape == tensor.shape, f"{name}: expected {tuple(old.shape)}, found {tuple(tensor.shape)}")
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[key] = tensor


def _assign_factors(model: nn.Module, factors: Factors, device: torch.device, dtype: torch.dtype) -> None:
    at = {m.layer: name for name, m in model.named_modules() if isinstance(m, GlobeExperts)}
    for name, t in factor_tensors(factors):
        name = re.sub(r"^layers\.(\d+)\.\{experts\}", lambda g: at[int(g[1])], name)
        keep = name.endswith(("_val", "_idx"))  # mixtures stay float32: they are few
        _assign(model, name, t.to(device=device, dtype=t.dtype if keep else dtype))


def shared_mlp(parent: nn.Module) -> nn.Module | None:
    """The shared expert beside a layer's routed ones."""
    return getattr(parent, "shared_expert", getattr(parent, "shared_experts", None))


def put_dense(model: nn.Module, factors: Factors, layers: Iterable[int] | None = None, keep: bool = False) -> list:
    """Put healed norms and refined down projections in place, as tensors of their own; returns [(module, key, what was there)]
    with keep, else []. layers: of these alone, and no norms."""
    old = []

    def put(module: nn.Module, key: str, change: Callable[[Tensor], Tensor]) -> None:
        was = getattr(module, key).detach()
        if keep:
            old.append((module, key, was))
        _assign(module, key, change(was))
    weights = dict(model.named_parameters())
    for name, t in factors.norms.items() if layers is None else ():
        name = name if name in weights else name.removeprefix("model.")  # of a model without its head
        expect(name in weights, f"factors: norm.{name}: the model has no such parameter")
        put(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], lambda w, t=t: t.to(w))
    places, E = experts_modules(model), factors.dims.experts
    for l in factors.down if layers is None else [l for l in layers if l in factors.down]:
        (parent, _, module), t = places[l], factors.down[l]
        routed = [e for e in factors.refined(l) if e < E]
        if routed:
            put(module, "down_proj", lambda w: w.index_copy(0, torch.tensor(routed, device=w.device), t[:len(routed)].to(w)))
        if len(t) > len(routed):
            put(shared_mlp(parent).down_proj, "weight", lambda w: torch.cat([*t[len(routed):].to(w)], 1))
    return old


def patch(model: nn.Module, factors: Factors | str | Path, cache: CacheConfig | None = None, keep_dense: bool = True):
    """Swap the experts of every fitted MoE layer of a loaded transformers model for GlobeExperts, in place.

    factors: Factors, or a run directory. cache: default: the settings of the factors' run. keep_dense=False lets go of the
    dense experts (unpatch is then impossible). Returns the model. UserError where model and factors do not belong together."""
    factors = factors if isinstance(factors, Factors) else load_factors(factors)
    old = install(model, factors.meta(), cache)
    for (layer, attr), (parent, module) in old.items():
        new = getattr(parent, attr)
        if isinstance(new, GlobeExperts):
            device, dtype = module.down_proj.device, module.down_proj.dtype
            gate, up = module.gate_up_proj.detach().chunk(2, 1)
            rows = list(new.dense_row)
            for f, w in zip(FAMILIES, (gate, up, module.down_proj.detach())):
                if hasattr(new, f"{f}_proj"):
                    _assign(new, f"{f}_proj", (w[rows] if f in new.families else w).contiguous())
    _assign_factors(model, factors, device, dtype)
    replaced = put_dense(model, factors, keep=keep_dense)
    model._globe_dense = (old, replaced) if keep_dense else None
    return model


def unpatch(model: nn.Module):
    """Put the dense experts back that patch(keep_dense=True) replaced; returns the model."""
    expect(getattr(model, "_globe_dense", None), "model: nothing to unpatch (not patched, or patched with keep_dense=False)")
    experts, replaced = model._globe_dense
    for (_, attr), (parent, module) in experts.items():
        setattr(parent, attr, module)
    for module, key, t in replaced:
        _assign(module, key, t)
    del model.globe_bank, model._globe_dense, model.save_pretrained
    for m in model.modules():
        if getattr(vars(m).get("forward"), "func", None) is native_mlp:
            del m.forward
        if type(m) is GlobeLinear:
            m.__class__ = nn.Linear
    for owner, key in ((model, "_weight_conversions"), (model.config, "quantization_config"), (model.config, "auto_map")):
        vars(owner).pop(key, None)  # save_pretrained left them
    return model


def globe_modules(model: nn.Module) -> list:
    return [m for m in model.modules() if type(m).__name__ == "GlobeExperts"]  # of this or another copy of globe.py


def cache_stats(model: nn.Module) -> dict:
    """Hits, misses, hit rate, seconds spent composing, and MiB held, of all layers' caches."""
    modules = globe_modules(model)
    caches = [m.cache for m in modules] + [c for bank in {m._bank[0] for m in modules} for c in bank.scratch.values()]
    hits, misses = sum(c.hits for c in caches), sum(c.misses for c in caches)
    return {"hits": hits, "misses": misses, "hit_rate": hits / max(1, hits + misses), "cache_mib": sum(c.bytes() for c in caches) / 2 ** 20,
            "compose_seconds": sum(c.seconds for c in caches)}


def lru_hits(steps: Sequence[Sequence[int]], slots: int) -> list:
    """[hits of an LRU cache of S slots, S = 0..slots] over steps that use several items each (Mattson et al. 1970)."""
    stack, at = [], [0] * (slots + 1)  # most recently used first: a cache of S slots holds the first S
    for step in steps:
        for e in step:
            if e in stack and stack.index(e) < slots:
                at[stack.index(e) + 1] += 1
        stack = list(dict.fromkeys([*reversed(step), *stack]))
    return list(itertools.accumulate(at))


def top_hits(steps: Sequence[Sequence[int]], slots: int) -> list:
    """The same of a cache that holds the S most used items all along."""
    uses = collections.Counter(itertools.chain(*steps))
    return [sum(n for _, n in uses.most_common(S)) for S in range(slots + 1)]


def share_slots(total: int, curves: Sequence[list]) -> list:
    """Slots for each layer, at least one: each further slot goes where it brings the most hits by the curves of lru_hits."""
    slots = [1] * len(curves)

    def gain(l: int) -> float:  # of the best run of slots from here on: a curve may be flat before it rises
        h, s = curves[l], slots[l]
        return max(((h[n] - h[s]) / (n - s) for n in range(s + 1, len(h))), default=-1.0)
    for _ in range(total - len(slots)):
        best = max(range(len(slots)), key=lambda l: (gain(l), -slots[l]))
        if gain(best) < 0:
            break  # every layer holds all
        slots[best] += 1
    return slots


def set_cache(model: nn.Module, cache: CacheConfig, demand: dict | None = None) -> None:
    """Give every layer its slots, and choose what they hold: composed bases, or composed weights where that is cheaper.

    demand: {layer: steps of experts}, as measured on a text; without it a budget is divided evenly. The budget counts in
    whole items; where it holds fewer than one for each layer, layers without a slot share one."""
    modules = globe_modules(model)
    expect(modules, "model: expected GlobeExperts, found none (not patched, nor a globe export)")
    bank, plans = modules[0]._bank[0], []
    check_direct(cache, modules[0].families, modules[0].composed)
    hits_of = top_hits if cache.mode == "lfu" else lru_hits
    curves = [hits_of(demand[m.layer], len(m.fitted)) for m in modules] if demand else [[0] * (len(m.fitted) + 1) for m in modules]
    for weights in (False,) if cache.mode == "direct" else (False, True):
        item, use, miss = modules[0].costs(modules[0].held(weights))
        total = int((cache.budget or 0) * 2 ** 20 // item)
        if cache.mode in ("lru", "lfu") and cache.budget:
            each, left = divmod(total, len(modules))
            slots = ([int(i < total - 1) for i in range(len(modules))] if total < len(modules) else share_slots(total, curves) if demand
                     else [min(len(m.fitted), each + (i < left)) for i, m in enumerate(modules)])
        else:
            slots = [{"none": 0, "direct": 0, "all": len(m.fitted)}.get(cache.mode, min(len(m.fitted), cache.per_layer or (len(m.fitted) + 1) // 2))
                     for m in modules]
        uses = sum(len(step) for steps in demand.values() for step in steps) if demand else 2
        misses = 0 if cache.mode == "all" else uses - sum(c[s] for c, s in zip(curves, slots)) if demand else 1
        plans.append((uses * use + misses * miss, weights, slots))
    _, weights, slots = min(plans)
    bank.cache, bank.scratch = cache, {}
    bank.scratch_slots = min(modules[0].top_k, len(modules[0].fitted)) if cache.mode in ("none", "direct") else 1
    for m, n in zip(modules, slots):
        m.hold, m.cache = m.held(weights), ExpertCache(n, cache.mode == "lfu")


@torch.no_grad()
def demand_of(model: nn.Module, ids: Tensor) -> dict:
    """{layer: [experts that each token of ids (1, n) asks for]}, the shared ones too."""
    steps = {}

    def note(m, args, kwargs) -> None:
        always = [e for e in m.fitted if e >= m.num_experts]
        steps[m.layer] = [[e for e in row if e in m.fitted] + always for row in (*args, *kwargs.values())[1].tolist()]
    with contextlib.ExitStack() as hooks:
        for m in globe_modules(model):
            hooks.enter_context(m.register_forward_pre_hook(note, with_kwargs=True))
        model.model(ids.to(next(model.parameters()).device))
    return steps


@torch.no_grad()
def warm(model: nn.Module, ids: Tensor | None = None) -> None:
    """Fill the caches: mode all composes every expert; else a text, ids (1, n), shows which layers and experts are asked for.

    A budget is divided between the layers by that, and each holds its most used experts. Counts start afresh."""
    modules = globe_modules(model)
    cache = modules[0]._bank[0].cache
    demand = demand_of(model, ids) if ids is not None and cache.mode in ("lru", "lfu") else {}
    if demand and cache.budget:
        set_cache(model, cache, demand)
    for m in modules:
        uses = collections.Counter(e for step in demand.get(m.layer, ()) for e in step)
        if m.cache.slots and not m.composed and (uses or m.cache.slots == len(m.fitted)):
            order = list(m.fitted) if m.cache.slots == len(m.fitted) else [e for e, _ in uses.most_common(m.cache.slots)][::-1]
            m.cache.clear()
            m.hold_only(m.cache, order)
            m.cache.uses.update(uses)
        m.cache.count()
    for scratch in modules[0]._bank[0].scratch.values():
        scratch.count()


# ======================================================================================================
# 8. Hugging Face: assemble, load, export
# ======================================================================================================
def _skeleton(config: dict, dtype: torch.dtype, where: Path, meta: dict | None = None, cache: CacheConfig | None = None) -> nn.Module:
    """The transformers model of the config.json in `where`, with GlobeExperts in place where meta says; parameters on the
    meta device. UserError where transformers cannot make a model of it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    config = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    register = nn.Module.register_parameter

    def without_memory(module, name, param):  # buffers (rotary frequencies) are real
        register(module, name, param)
        if param is not None:
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)
    nn.Module.register_parameter = without_memory
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    except Exception as e:  # a stranger's config.json fails in its own way in every model's code
        raise UserError(f"{where / 'config.json'}: expected a model's config, found one that transformers refuses: {type(e).__name__}: {e}") from None
    finally:
        nn.Module.register_parameter = register
    if meta:
        install(model, meta, cache)
    return model.eval()


def refuse_missing(names: Sequence[str], where: Path | str) -> None:
    """UserError where tensors are missing: transformers would go on with random numbers."""
    if names:
        raise UserError(f"{where}: expected tensor {names[0]}, found none (and {len(names) - 1} more)")


def _finish(model: nn.Module, directory: Path, device: torch.device) -> nn.Module:
    """Tie what the config ties, refuse what is still empty, move the buffers, read generation_config.json."""
    model.tie_weights()
    refuse_missing([n for n, t in model.state_dict().items() if t.is_meta], directory)
    if (directory / "generation_config.json").is_file():
        from transformers import GenerationConfig
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.to(device)


def fill(model: nn.Module, ckpt: Checkpoint, device: torch.device, dtype: torch.dtype, below: str = "") -> None:
    """Put the source checkpoint's tensors in place of what is still on the meta device below the submodule `below`.
    UserError where one stays empty: a product with it would be noise, not an error."""
    part, prefix = model.get_submodule(below), f"{below}." if below else ""

    def stack(f: str, layer: int, experts: Sequence[int]) -> Tensor:
        W = torch.stack([ckpt.expert(f, layer, e) for e in experts]).to(device, dtype)
        return W.transpose(1, 2).contiguous() if f == "down" else W
    every, inside = range(ckpt.dims.experts), set(part.modules())
    for layer, (_, _, module) in experts_modules(model).items():
        if module not in inside:
            continue
        if not isinstance(module, GlobeExperts):  # dense, or a layer that was not fitted
            _assign(module, "gate_up_proj", torch.cat([stack(f, layer, every) for f in ("gate", "up")], 1))
            _assign(module, "down_proj", stack("down", layer, every))
            continue
        for f in FAMILIES:
            if hasattr(module, f"{f}_proj"):
                _assign(module, f"{f}_proj", stack(f, layer, list(module.dense_row) if f in module.families else every))
    for name, old in list(part.state_dict(prefix=prefix).items()):
        source = next((n for n in (name, name.replace(".mlp.", ".block_sparse_moe.")) if n in ckpt.shard_of), None)
        if source and ".experts." not in name:
            _assign(model, name, ckpt.tensor(source).to(device, dtype if old.is_meta else old.dtype))
    if below in ("", "lm_head"):
        model.tie_weights()
    refuse_missing([n for n, t in part.state_dict(prefix=prefix).items() if t.is_meta], ckpt.dir)


def assemble(ckpt: Checkpoint, factors: Factors, device: torch.device = torch.device("cpu"),
             dtype: torch.dtype | None = None, cache: CacheConfig | None = None) -> nn.Module:
    """The patched model, straight from the source checkpoint and the factors: no dense form of a fitted matrix is
    ever in memory. UserError where the factors were fitted to another checkpoint."""
    check_fingerprint(factors, ckpt)
    dtype = dtype or ckpt.dtype
    model = _skeleton(ckpt.config, dtype, ckpt.dir, factors.meta(), cache)
    _assign_factors(model, factors, device, dtype)
    fill(model, ckpt, device, dtype)
    put_dense(model, factors)
    return _finish(model, ckpt.dir, device)


def hollow(ckpt: Checkpoint, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The dense model with its decoder layers still on the meta device."""
    model = _skeleton(ckpt.config, dtype, ckpt.dir)
    for name in [f"model.{n}" for n, _ in model.model.named_children() if n != "layers"] + ["lm_head"]:
        fill(model, ckpt, device, dtype, name)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(device) if buffer is not None else None
    return model


def globe_meta(config: dict) -> dict | None:
    """The factors' description in the config.json of a globe or composed export; None in any other."""
    meta = config.get("quantization_config")
    return meta if isinstance(meta, dict) and meta.get("quant_method") == "globe" else None


def load(directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
         cache: CacheConfig | None = None) -> nn.Module:
    """Load a globe or composed export: a transformers model with GlobeExperts, no dense experts ever in memory.

    dtype: of the parameters; default: as stored. cache: default: the settings of the factors' run. UserError where the
    directory is no such export or is damaged."""
    directory = Path(directory)
    config = read_json(directory / "config.json")
    meta = globe_meta(config)
    expect(meta is not None, f"{directory}: expected a globe export (quantization_config.quant_method: globe), found none")
    check_meta(meta, str(directory / "config.json"))
    dims_of({k: v for k, v in config.items() if k != "quantization_config"}, str(directory / "config.json"))
    table = {name: (file, f) for file in sorted(directory.glob("*.safetensors")) for f in [open_shard(file)] for name in f.keys()}
    if config["num_hidden_layers"] > len(table):
        raise UserError(f"{directory}: expected tensors of {config['num_hidden_layers']} layers in *.safetensors, found {len(table)} tensors")
    dtype = dtype or as_dtype(str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    model = _skeleton(config, dtype, directory, meta, cache)
    device, state = torch.device(device), model.state_dict()
    for name, (file, f) in table.items():
        expect(name in state, f"{file}: {name}: not expected")
        t = finite(f.get_tensor(name), name, file)
        expect(not t.is_floating_point() or t.itemsize >= 2, f"{file}: {name}: expected float32, float16 or bfloat16, found {t.dtype}")
        keep = name.endswith(("_val", "_idx")) or not state[name].is_meta
        _assign(model, name, t.to(device, state[name].dtype if keep else dtype))
    check_mixtures(model, directory)
    return _finish(model, directory, device)


def check_mixtures(model: nn.Module, where: Path | str) -> None:
    """UserError where an expert mixes bases that its bank does not have."""
    for module in globe_modules(model):
        for f in () if module.composed else module.families:
            idx, m = getattr(module, f"{f}_idx"), module.families[f]["m"]
            if not idx.is_meta and not 0 <= int(idx.min()) <= int(idx.max()) < m:
                raise UserError(f"{where}: layer {module.layer} {f}_idx: expected indices in [0, {m}), found {int(idx.min())}..{int(idx.max())}")


AUTO_MAP = {"AutoConfig": "globe.GlobeAuto", "AutoModelForCausalLM": "globe.GlobeAuto"}


class GlobeAuto:
    """What auto_map names: importing this file registers the loader; config and model are the native classes."""

    @classmethod
    def from_pretrained(cls, path, *args, config=None, **kwargs):
        from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
        kwargs["trust_remote_code"] = False  # it let this file run; a custom_generate beside it would run too
        if config is not None:  # AutoModelForCausalLM asks, with the config that AutoConfig got here before
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(path, *args, config=config, **kwargs)
        kind = PreTrainedConfig.get_config_dict(path, **kwargs)[0]["model_type"]
        return CONFIG_MAPPING[kind].from_pretrained(path, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class=None) -> None:
        """Nothing to do: the native classes need no code beside them."""


def register_loader() -> None:
    """Teach from_pretrained to read quant_method "globe"; once, however many copies of this file are imported."""
    from transformers.quantizers import auto, base
    from transformers.utils.quantization_config import QuantizationConfigMixin
    if "globe" in auto.AUTO_QUANTIZER_MAPPING:
        return

    @auto.register_quantization_config("globe")
    class GlobeQuantizationConfig(QuantizationConfigMixin):
        def __init__(self, **meta):
            vars(self).update(meta)

    @auto.register_quantizer("globe")
    class GlobeQuantizer(base.HfQuantizer):
        is_trainable, is_qat_trainable, is_compileable = True, True, False

        def is_serializable(self) -> bool:
            return True

        def validate_environment(self, device_map=None, **_) -> None:
            places = device_map if isinstance(device_map, dict) else {}
            bank = {str(v) for k, v in places.items() if k.startswith("globe_bank")}
            if "disk" in bank or "cpu" in bank and set(map(str, places.values())) - {"cpu", "disk"}:
                raise UserError(f"device_map: expected globe_bank on an accelerator, found {', '.join(bank)}: every layer reads it")

        def update_weight_conversions(self, weight_conversions, model) -> list:
            return []  # tensors are stored under the names of the patched model

        def _process_model_before_weight_loading(self, model, checkpoint_files=None, **_) -> None:
            meta = self.quantization_config.to_dict()
            where = str(getattr(model.config, "name_or_path", None) or "config.json")
            install(model, check_meta(meta, where))
            stored = set(model.all_tied_weights_keys)
            for file in checkpoint_files or ():
                with safe_open(file, "pt") as f:
                    stored.update(f.keys())
            refuse_missing([n for n in model.state_dict() if n not in stored] if checkpoint_files else [], where)

        def _process_model_after_weight_loading(self, model, **_):
            check_mixtures(model, getattr(model.config, "name_or_path", None) or "model")
            for module in (model.globe_bank, *globe_modules(model)):
                module.requires_grad_(False)
            return model


def save_pretrained(model: nn.Module, meta: dict, directory: str | Path, **kwargs) -> None:
    """save_pretrained (same kwargs) of a patched or loaded model: an export that from_pretrained reads, with globe.py."""
    model.config.quantization_config = {**meta, "quant_method": "globe"}
    model.config.auto_map, model._weight_conversions = dict(AUTO_MAP), []
    push, repo = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", Path(directory).name)
    type(model).save_pretrained(model, directory, **kwargs)
    shutil.copyfile(__file__, Path(directory) / "globe.py")
    if push:
        model.push_to_hub(repo, **{k: v for k, v in kwargs.items() if k in ("token", "private", "commit_message")})


def load_dense(directory: Path, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """The source model in stock transformers, in the checkpoint's dtype unless another is given."""
    from transformers import AutoModelForCausalLM
    try:
        model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True)
    except Exception as e:  # a damaged checkpoint fails in its own way in every model's code
        raise UserError(f"{directory}: expected a model that transformers loads, found {type(e).__name__}: {e}") from None
    refuse_missing(sorted(info["missing_keys"]), directory)
    return model.to(device).eval()


def load_tokenizer(directory: Path):
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)  # never asks, never runs a checkpoint's code
        if not tokenizer("text", add_special_tokens=False)["input_ids"]:  # transformers makes up an empty one where files are missing
            raise ValueError("its vocabulary is empty")
        return tokenizer
    except Exception as e:  # tokenizers raises bare Exception for a damaged tokenizer.json
        raise UserError(f"{directory}: expected a tokenizer, found none ({type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]})") from None


def copy_side_files(source: Path, to: Path) -> None:
    """Everything small that makes a checkpoint complete (config, tokenizer, licence), no weights, no pickles."""
    for f in sorted(source.iterdir()):
        if f.is_file() and f.suffix in (".json", ".txt", ".model", ".jinja", ".md", "") and not f.name.startswith(".") \
                and not f.name.endswith(".index.json") and f.stat().st_size < 2 ** 28:
            shutil.copyfile(f, to / f.name)


def export_globe(ckpt: Checkpoint, factors: Factors, to: Path, composed: bool = False,
                 dtype: torch.dtype | None = None) -> None:
    """Write the patched model as a directory: shards, config, tokenizer and a copy of this file.

    composed=True stores A_i and the composed B~_i in place of bank and mixtures: larger, nothing to compose at load."""
    from huggingface_hub import save_torch_state_dict
    dtype = dtype or ckpt.dtype
    model = assemble(ckpt, factors, dtype=dtype)
    meta, state = factors.meta() | ({"composed": True} if composed else {}), model.state_dict()
    if composed:
        state = {k: v for k, v in state.items() if not k.startswith("globe_bank.") and not k.endswith(("_val", "_idx"))}
        for name, m in model.named_modules():
            if isinstance(m, GlobeExperts):
                for f in m.families:
                    state[f"{name}.{f}_basis"] = m._basis(f, list(range(len(m.fitted))))
    if getattr(model.config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    config = ckpt.config | {"quantization_config": {"quant_method": "globe"} | meta, "auto_map": AUTO_MAP,
                            "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    copy_side_files(ckpt.dir, to)
    save_torch_state_dict({k: v.contiguous() for k, v in state.items()}, str(to))
    shutil.copyfile(__file__, to / "globe.py")
    write_text(to / "config.json", json.dumps(config, indent=2))


def export_dense(ckpt: Checkpoint, factors: Factors, to: Path, progress: Callable = lambda it: it) -> None:
    """The source checkpoint rewritten in place: the shards' bytes are copied and only the experts' are replaced.

    Healed norms and refined down projections too. Names, order, dtypes and every other byte stay, so that whatever read the source reads this."""
    check_fingerprint(factors, ckpt)
    copy_side_files(ckpt.dir, to)
    config = {k: v for k, v in ckpt.config.items() if k not in ("quantization_config", "auto_map")}
    if config != ckpt.config:
        write_text(to / "config.json", json.dumps(config, indent=2))
    if (ckpt.dir / "model.safetensors.index.json").is_file():
        shutil.copyfile(ckpt.dir / "model.safetensors.index.json", to / "model.safetensors.index.json")
    headers = {}
    for shard in sorted(set(ckpt.shard_of.values())):
        shutil.copyfile(ckpt.dir / shard, to / shard)
        with open(to / shard, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            headers[shard] = 8 + size, json.loads(f.read(size))

    def overwrite(tensor: str, part: Any, W: Tensor) -> None:
        shard = ckpt.shard_of[tensor]
        start, header = headers[shard]
        raw = np.memmap(to / shard, np.uint8, "r+", offset=start + header[tensor]["data_offsets"][0],
                        shape=(*ckpt.shape(tensor), W.itemsize))  # bytes: no alignment needed
        raw[part] = W.contiguous().view(torch.uint8).numpy().reshape(*W.shape, -1)
        raw.flush()

    for layer, row, e in progress([(l, i, e) for l, es in factors.experts.items() for i, e in enumerate(es)]):
        for name, fam in factors.families.items():
            slot = ckpt.slot(name, layer, e)
            W = fam.weight(layer, row).to(ckpt.expert(name, layer, e).dtype)
            overwrite(slot.tensor, slot.part, W.T if slot.transposed else W)
    for l, down in factors.down.items():
        for e, W in zip(factors.refined(l), down):
            slot = ckpt.slot("down", l, e)
            overwrite(slot.tensor, slot.part, W.to(ckpt.expert("down", l, e).dtype))
    for name, t in factors.norms.items():
        expect(name in ckpt.shard_of, f"factors: norm.{name}: {ckpt.dir} has no such tensor")
        overwrite(name, ..., t.to(ckpt.tensor(name).dtype))


def weight_bytes(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.glob("*.safetensors"))


def sample_ids(ckpt: Checkpoint) -> Tensor:
    """(1, 64) token ids of held-out text; where a checkpoint has no tokenizer that fits, random ones (to compare logits only)."""
    try:
        return ckpt.known(token_windows(load_tokenizer(ckpt.dir), builtin_text("heldout"), 64, 64))
    except UserError:
        return torch.randint(ckpt.config["vocab_size"], (1, 64), generator=torch.Generator().manual_seed(0))


# ======================================================================================================
# 9. Evaluation and report: reconstruction figures, perplexity, plots
# ======================================================================================================
@torch.no_grad()
def nll(model: nn.Module, windows: Tensor, batch: int = 4, progress: Callable = lambda it: it, stride: int | None = None) -> tuple:
    """(mean negative log-likelihood in nats per predicted token, number of them) over windows (N, length).
    With stride, windows overlap: of all but the first only the last `stride` tokens count (the WikiText recipe)."""
    device = next(model.parameters()).device
    total, count, d = 0.0, 0, model.get_input_embeddings().weight.shape[1]
    with threads_for(d, d):
        for part in progress(windows.split(batch)):
            part = part.to(device)
            loss = torch.stack([F.cross_entropy(z[:-1].float(), ids[1:], reduction="none")  # no copy of a batch's logits
                                for z, ids in zip(model(part).logits, part)])
            scored = torch.ones_like(loss, dtype=torch.bool)
            scored[0 if count else 1:, :-(stride or loss.shape[1])] = False
            total, count = total + float(loss[scored].sum()), count + int(scored.sum())
    return total / count, count


def builtin_choices(n: int = 100) -> list:
    """[(context, four continuations, index of the right one)] from held-out documentation of the standard library.
    A paragraph is cut after about 120 characters; the wrong continuations are other paragraphs'. Chance is 1/4."""
    cuts = {}
    for name, text in _library_sources():
        if _split_of(name) == "heldout":
            for part in [text] if name.startswith("topics/") else re.findall(r'"""(.*?)"""', text, re.S):
                for paragraph in map(str.split, part.split("\n\n")):
                    cut = re.fullmatch(r"([A-Z].{120}\S*)( .{40}\S*).*", " ".join(paragraph))
                    if cut:
                        cuts[hashlib.sha256(cut[0].encode()).hexdigest()] = cut[1], cut[2]
    cuts = [cuts[key] for key in sorted(cuts)][:n]
    tails = [tail for _, tail in cuts] * 2
    return [(context, [tails[i + (j - i) % 4] for j in range(4)], i % 4) for i, (context, _) in enumerate(cuts)]


@torch.no_grad()
def choice_accuracy(model: nn.Module, tokenizer, items: list, progress: Callable = lambda it: it) -> float:
    """Fraction of builtin_choices where the right continuation has the highest log-likelihood per character."""
    right, device = 0, next(model.parameters()).device
    for context, tails, answer in progress(items):
        rows = [tokenizer(context + tail, add_special_tokens=False)["input_ids"] for tail in tails]
        start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows], device=device)  # padded after the end
        logp = model(ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        scores = [float(logp[i, start - 1:len(row) - 1].sum()) / len(tails[i]) for i, row in enumerate(rows)]
        right += max(range(4), key=scores.__getitem__) == answer
    return right / len(items)


def task_runner(tasks: Sequence[str], tokenizer, context: int | None = None) -> Callable:
    """run(model, progress) -> {task: {metric: value}}: "builtin" by choice_accuracy, names and YAML files by lm-eval.
    UserError, before anything is run, where lm-eval is needed and not installed, or does not know a task."""
    names = [t for t in tasks if t != "builtin"]
    if names:
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise UserError(f"--tasks {' '.join(names)}: lm-eval is not installed: pip install lm-eval (builtin needs nothing)") from None
        files = {t: Path(t) for t in names if t.endswith((".yaml", ".yml"))}
        known = TaskManager(include_path=[str(f.resolve().parent) for f in files.values()] or None)
        for i, t in enumerate(names):
            named = re.search(r"^task:\s*(\S+)", files[t].read_text(encoding="utf-8"), re.M) if t in files and files[t].is_file() else None
            names[i] = named[1] if named else t
            expect(known.match_tasks([names[i]]), f"--tasks: lm-eval knows no task {t!r} (`lm_eval ls tasks` lists its own)")

    def run(model: nn.Module, progress: Callable = lambda it: it) -> dict:
        out = {"builtin": {"acc": choice_accuracy(model, tokenizer, builtin_choices(), progress)}} if "builtin" in tasks else {}
        if names:
            with contextlib.redirect_stdout(sys.stderr):
                lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=context)
                got = lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=known)["results"]
            out |= {t: {k.removesuffix(",none"): v for k, v in row.items() if isinstance(v, float)} for t, row in got.items()}
        return out
    return run


def reconstruction(ckpt: Checkpoint, factors: Factors) -> dict:
    """Relative Frobenius error of the factors: {family: {"all": x, layer: x, ...}}; reads one expert at a time."""
    out = {}
    for name, f in factors.families.items():
        err, ref = collections.Counter(), collections.Counter()
        for l, experts in factors.experts.items():
            for i, e in enumerate(experts):
                W = ckpt.expert(name, l, e).float()
                err[l] += float((W - f.weight(l, i)).square().sum())
                ref[l] += float(W.square().sum())
        out[name] = {"all": math.sqrt(err.total() / max(ref.total(), 1e-300))}
        out[name] |= {l: math.sqrt(err[l] / max(ref[l], 1e-300)) for l in err}
    return out


def spectra(factors: Factors) -> dict:
    """Per family: mean effective rank (exp of the entropy of the squared singular values) and largest singular value of
    adapters and composed bases, {family: {"A_rank": x, "A_norm": x, "basis_rank": x, "basis_norm": x}}."""
    out = {}
    for name, f in factors.families.items():
        out[name] = {}
        for key, of in (("A", f.A.__getitem__), ("basis", f.composed)):
            s = torch.cat([torch.linalg.svdvals(of(l).float()) for l in f.A])
            share = s.square() / s.square().sum(-1, keepdim=True).clamp_min(1e-30)
            entropy = -(share * share.clamp_min(1e-30).log()).sum(-1)
            out[name] |= {f"{key}_rank": float(entropy.exp().mean()), f"{key}_norm": float(s[:, 0].max())}
    return out


@torch.no_grad()
def routing(model: nn.Module, ids: Tensor) -> tuple:
    """({layer: shares of the tokens per expert, largest first}, {layer: cache hit rate}), decoding ids (1, n) one by one."""
    counts, past = {m.layer: torch.zeros(m.num_experts) for m in globe_modules(model)}, None

    def count(m, args, kwargs) -> None:
        counts[m.layer] += torch.bincount((*args, *kwargs.values())[1].flatten().cpu(), minlength=m.num_experts)
    with contextlib.ExitStack() as hooks:
        for m in globe_modules(model):
            hooks.enter_context(m.register_forward_pre_hook(count, with_kwargs=True))
        for token in ids.to(next(model.parameters()).device).split(1, 1):
            past = model(token, past_key_values=past, use_cache=True).past_key_values
    return ({l: (c / c.sum()).sort(descending=True).values for l, c in counts.items()},
            {m.layer: m.cache.hits / max(1, m.cache.hits + m.cache.misses) for m in globe_modules(model)})


def plot_report(run: Path, rows: list, errors: dict, factors: Factors, shares: dict, hits: dict, runs: dict) -> list:
    """PNG plots of a run: convergence, error by layer, supports and popularity, routing, quality against size of several
    runs ({run name: eval.json}); returns their paths."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("report: plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    styles, paths, look = dict(zip(FAMILIES, ("-", "--", ":"))), [], {"color": "black", "marker": "o", "ms": 3}  # told apart in greyscale
    rows = [r for r in rows if all(type(r.get(k)) in (int, float) for k in ("rel_frob", "support", "T"))]  # a healed run's have none

    def save(fig, name):
        fig.tight_layout()
        with written(run / name) as tmp:
            fig.savefig(tmp, dpi=120, format="png")
        plt.close(fig)
        paths.append(run / name)
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for ax, key, title, unit in zip(axes, ("rel_frob", "support", "T"), ("Relative error in the fit's metric", "Median support", "Temperature T"),
                                    ("relative error", "bases", "T")):
        for f, style in zip(dict.fromkeys(r.get("family") for r in rows), ("-", "--", ":")):
            ax.plot(*zip(*((r["step"], r[key]) for r in rows if r.get("family") == f)), style, color="black", label=f)
        ax.set(title=title, xlabel="step", ylabel=unit)
        ax.legend()
    axes[0].set_yscale("log")
    save(fig, "convergence.png")
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for f, fam in factors.families.items():
        axes[0].plot(list(fam.A), [errors[f][l] for l in fam.A], styles[f], label=f, **look)
        axes[1].plot(torch.bincount(fam.support()), styles[f], label=f, **look)
        used = sum(torch.bincount(fam.idx[l][fam.val[l] != 0].long() + fam.group[l] * len(fam.bank[0]),
                                  minlength=len(fam.bank) * len(fam.bank[0])) for l in fam.idx)
        axes[2].plot(used.sort(descending=True).values, styles[f], color="black", label=f)
    for ax, t, x, y in zip(axes, ("Relative Frobenius error by layer", "Support sizes", "Popularity of bases"),
                           ("layer", "bases in an expert's mixture", "basis, by rank"),
                           ("||W - W^|| / ||W||", "experts", "experts that use it")):
        ax.set(title=t, xlabel=x, ylabel=y, ylim=(0, None))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    save(fig, "factors.png")
    fig, axes = plt.subplots(1, 3 if runs else 2, figsize=(13 if runs else 9, 3.6))
    for i, (l, share) in enumerate(shares.items()):
        axes[0].plot(range(1, len(share) + 1), share, color=str(0.7 * i / len(shares)), label=f"layer {l}" if i in (0, len(shares) - 1) else None)
    axes[1].plot(list(hits), list(hits.values()), **look)
    axes[0].set(title="Popularity of experts (decoding)", xlabel="expert, by rank", ylabel="share of routed tokens", ylim=(0, None))
    axes[1].set(title="Hit rate of the cache (decoding)", xlabel="layer", ylabel="hits / look-ups", ylim=(0, 1))
    axes[0].legend()
    for ax in axes[:2]:
        ax.xaxis.get_major_locator().set_params(integer=True)
    for text, mark in zip(dict.fromkeys(t for e in runs.values() for t in e), "osv^Dx+*"):
        points = sorted((e[text]["model_ratio"], e[text]["delta_nats"]) for e in runs.values() if text in e)
        axes[2].plot(*zip(*points), mark, color="black", fillstyle="none", label=text)
        axes[2].set(title="Quality against size", xlabel="size of the model, stored / dense", ylabel="nats lost per token")
        axes[2].legend()
    save(fig, "routing.png")
    return paths


def text_table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A markdown table, aligned; floats with four significant digits."""
    cells = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in [header, *rows]]
    width = [max(len(r[i]) for r in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, width)) + " |" for r in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])


def settings_of(config: dict, default: dict, where: str = "") -> list:
    """["section.key=value", ...] of a saved config that differ from the defaults."""
    out = []
    for key, value in config.items():
        if isinstance(value, dict) and isinstance(default.get(key), dict):
            out += settings_of(value, default[key], f"{where}{key}.")
        elif value != default.get(key):
            out.append(f"{where}{key}={json.dumps(value)}".replace('"', ""))
    return out


def model_card(ckpt: Checkpoint, factors: Factors, form: str, base: str, stored: int, evals: dict) -> str:
    """README.md of an export. base: hub id or name of the source; stored: bytes of weights; evals: RUN/eval.json."""
    source = ckpt.dir / "README.md"
    front = re.match(r"---\n(.*?)\n---", source.read_text(encoding="utf-8"), re.S) if source.is_file() else None
    licence = "".join(re.findall(r"^license\w*:.*\n", front[1] + "\n", re.M)) if front else ""
    remote = "" if form == "dense" else ", trust_remote_code=True"
    note = ("Tensor names, types and config are the source's: whatever reads the source reads this." if form == "dense" else
            "With the package globe-moe installed, `import globe` in place of `trust_remote_code=True` runs the package's code (and its\n"
            "native operators, where they are built). Without either, loading stops with a size mismatch, on purpose.")
    sizes = text_table(("family", "banks", "bases", "rows r", "median support", "phi"), [
        (f, len(x.bank), *x.bank[0].shape[:2], float(x.support().float().median()), x.activation) for f, x in factors.families.items()])
    rows = [(f"{text}, {e['tokens']} tokens", "perplexity", e["ppl_dense"], e["ppl"]) for text, e in evals.items()]
    rows += [(t, k, *v.values()) for e in evals.values() for t, row in e.get("tasks", {}).items() for k, v in row.items()]
    return f"""---
{licence}{f"base_model: {base}" if "/" in base else f"# base model: {base}"}
base_model_relation: quantized
library_name: transformers
pipeline_tag: text-generation
tags: [moe, globe, compressed]
---
# {base}, experts compressed by GloBE ({form})

{' and '.join(factors.families).capitalize()} of the routed experts of `{base}` are `W = shift + scale * A phi(sum_j alpha_j B_j)`: an adapter A
per expert, and a sparse mixture over a bank of bases B that layers share{"; down is dense, refitted to them" if factors.down else ""}. {stored:,} bytes of weights; the source has
{weight_bytes(ckpt.dir):,}. Stored / dense numbers: {factors.ratio():.4f} of the compressed matrices, {factors.model_ratio(ckpt.num_parameters()):.4f} of the model.

{sizes}

## Evaluation

{text_table(("on", "measure", "source", "this"), rows) if rows else "None was run before this export (`globe.py eval` first fills a table)."}

## Load

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("THIS_REPOSITORY"{remote})
```

{note}

## How it was made

```sh
{" ".join(["python globe.py fit", f"model.path={base}", *settings_of(factors.config, dataclasses.asdict(Config()))])}
python globe.py export --format {form}
```

Licence: that of the base model{"" if licence else "; its card names none"}. Fingerprint of the source checkpoint: `{factors.fingerprint}`.
Made by globe.py {__version__}, sha256 `{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}`.
"""


# ======================================================================================================
# 10. Training: the default model, and recovery after the fit
# ======================================================================================================
def byte_tokenizer():
    """A tokenizer whose ids 0..255 are the bytes of the UTF-8 text; 256 ends a text, 257 pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in bytes_to_unicode().items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>",
                                   clean_up_tokenization_spaces=False)


def dense_start(cfg: TrainConfig):
    """(tokenizer, dense model): cfg.dense_from, or a new Qwen2 whose FFN is as wide as the routed and shared slices."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
    if cfg.dense_from:
        path = resolve_model(cfg.dense_from)
        kind = read_json(path / "config.json").get("model_type")
        expect(kind in ("qwen2", "llama"), f"train.dense_from {cfg.dense_from}: expected model_type qwen2 or llama, found {kind!r}")
        return load_tokenizer(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    tokenizer = byte_tokenizer()
    return tokenizer, Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=cfg.hidden_size, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, tie_word_embeddings=True,
        intermediate_size=cfg.top_k * cfg.moe_intermediate_size + cfg.shared_expert_intermediate_size,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


@torch.no_grad()
def upcycle(dense: nn.Module, cfg: TrainConfig, g: torch.Generator) -> nn.Module:
    """A Qwen2MoeForCausalLM that starts near the dense model's loss, made the way Qwen1.5-MoE was.

    The first top_k * p neurons of each FFN are cut into top_k slices, copied to all experts and perturbed; the rest
    become the shared expert. Router rows are drawn once per set of copies, so that at first a token's top-k is one
    whole set, that is, the dense FFN ("virtual groups", He et al. 2024, arXiv:2410.07524)."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
    old, routed = dense.config, cfg.top_k * cfg.moe_intermediate_size
    p = old.intermediate_size * cfg.moe_intermediate_size // (routed + cfg.shared_expert_intermediate_size)
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
            "bos_token_id", "eos_token_id", "pad_token_id")
    moe = Qwen2MoeForCausalLM(Qwen2MoeConfig(
        **{k: getattr(old, k) for k in kept if getattr(old, k, None) is not None}, moe_intermediate_size=p,
        intermediate_size=old.intermediate_size, shared_expert_intermediate_size=old.intermediate_size - cfg.top_k * p,
        num_experts=cfg.experts, num_experts_per_tok=cfg.top_k, norm_topk_prob=False, router_aux_loss_coef=cfg.aux_coef))
    missing, _ = moe.load_state_dict({k: v for k, v in dense.state_dict().items() if ".mlp." not in k}, strict=False)
    for name in missing:
        if name.endswith("_proj.bias"):  # Llama has none
            moe.get_parameter(name).zero_()
    for layer, source in zip(moe.model.layers, dense.model.layers):
        _upcycle_ffn(layer.mlp, source.mlp, layer.post_attention_layernorm.weight, cfg, g)
    return moe


def _upcycle_ffn(block: nn.Module, ffn: nn.Module, norm: Tensor, cfg: TrainConfig, g: torch.Generator) -> None:
    """Fill one MoE block from one dense FFN; norm (d,) is the scale of the block's inputs."""
    E, k, p = cfg.experts, cfg.top_k, block.experts.intermediate_dim
    gate, up, down = (w.detach().float().cpu() for w in (ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight.T))
    d = gate.shape[1]

    def experts(w: Tensor) -> Tensor:  # (I, d) -> (E, p, d)
        return w[:k * p].view(k, p, d)[torch.arange(E) % k] + cfg.upcycle_noise * w.std() * torch.randn(E, p, d, generator=g)
    # logits of about unit variance: decided, yet open to learning; rows of one set differ a little, to part company
    rows = torch.randn(-(-E // k), d, generator=g)[torch.arange(E) // k] + 0.1 * torch.randn(E, d, generator=g)
    x = norm.detach().float().cpu() * torch.randn(2048, d, generator=g)
    router = rows / (x @ rows.T).std()
    mean_weight = (x @ router.T).softmax(-1).topk(k, dim=-1).values.mean()
    block.gate.weight.copy_(router)
    block.experts.gate_up_proj.copy_(torch.cat([experts(gate), experts(up)], 1))
    # top-k weights sum to less than k, and the shared expert's gate starts at sigmoid(0) = 1/2: both undone in down
    block.experts.down_proj.copy_(experts(down).transpose(1, 2) / mean_weight)
    block.shared_expert.gate_proj.weight.copy_(gate[k * p:])
    block.shared_expert.up_proj.weight.copy_(up[k * p:])
    block.shared_expert.down_proj.weight.copy_(2 * down[k * p:].T)
    block.shared_expert_gate.weight.zero_()


@torch.no_grad()
def largest_cosine(moe: nn.Module) -> float:
    """The largest |cosine| between two experts' flattened gate, up or down matrices of one layer."""
    worst = 0.0
    for _, _, experts in experts_modules(moe).values():
        for w in (*experts.gate_up_proj.chunk(2, 1), experts.down_proj):
            w = F.normalize(w.flatten(1).float(), dim=1)
            worst = max(worst, float((w @ w.T).fill_diagonal_(0).abs().max()))
    return worst


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:  # (..., p, d) -> (..., p, d)
    """Each matrix with its singular values moved near 1: Newton-Schulz, coefficients of Keller Jordan's Muon (2024)."""
    if g.shape[-2] > g.shape[-1]:
        return orthogonalize(g.mT, steps).mT
    x = g / (torch.linalg.matrix_norm(g, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon(torch.optim.AdamW):
    """AdamW, except that matrices (groups with `parts` > 0) move by orthogonalised momentum.
    Adam's updates of a short run have low rank, and so do its experts: cutting them to ratio 0.7 by SVD cost 0.009 nats
    a byte, against 0.15 after Muon, and Muon's model is better by 0.14 bits. A test model must not be that easy.
    The factor 0.2 * sqrt(max(p, d)) gives both rules the same step size (Liu et al. 2025, arXiv:2502.16982)."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for w in group["params"] if group["parts"] else ():
                momentum = self.state[w].setdefault("exp_avg", torch.zeros_like(w)).lerp_(w.grad, 0.05)
                update = w.grad.lerp(momentum, 0.95).unflatten(-2, (group["parts"], -1))  # gate, up share a tensor
                update = orthogonalize(update).mul_(0.2 * max(update.shape[-2:]) ** 0.5).flatten(-3, -2)
                w.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                w.grad = None  # nothing left for AdamW to do
        return super().step(closure)


def training_phase(cfg: TrainConfig, moe: bool, dense: nn.Module, device: torch.device) -> tuple:
    """(model, optimizer) at the start of the dense phase, or of the MoE phase that upcycles `dense`.
    Muon for attention and FFN matrices, AdamW for embeddings and routers, no decay for norms and biases."""
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global generator
        torch.manual_seed(cfg.seed)
        model = upcycle(dense.cpu(), cfg, torch.Generator().manual_seed(cfg.seed + 1)) if moe else dense
    if moe and device.type == "cpu":  # measured: a step takes 0.47 s so, and 0.57 with grouped_mm
        model.set_experts_implementation("eager")
    if cfg.grad_checkpoint:
        model.gradient_checkpointing_enable()
    model.to(device).train()
    groups = {2: [], 1: [], 0: [], None: []}  # by parts of a matrix: gate and up share a tensor; None: vectors
    for name, w in model.named_parameters():
        groups[2 if "gate_up_proj" in name else None if w.ndim < 2 else int("_proj" in name)].append(w)
    return model, Muon([{"params": params, "parts": parts or 0, "weight_decay": 0.0 if parts is None else cfg.weight_decay}
                        for parts, params in groups.items() if params], lr=cfg.lr, betas=(0.9, 0.95))


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler, x: Tensor, context, cfg: TrainConfig) -> float:
    """One update on x (batch, seq_len); returns the loss in nats per token, load balancing included."""
    routed = {"output_router_logits": True} if model.config.model_type == "qwen2_moe" else {}
    with context:
        loss = model(input_ids=x, labels=x, use_cache=False, **routed).loss
    if not torch.isfinite(loss):
        raise Diverged(f"the training loss is {float(loss)}; lower train.lr (now {cfg.lr})")
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
    scaler.step(optimizer)
    scaler.update()
    return float(loss.detach())


def save_training(path: Path, kind: str, params: Mapping, optimizer: Muon, about: dict, **more: Tensor) -> None:
    """Parameters as KIND/NAME, the optimizer's moments and `more` in one file, whole or absent; batches depend on (seed, step) alone."""
    tensors = {f"{kind}/{name}": w.detach() for name, w in params.items()} | more
    tensors |= {f"{k}/{name}": v for name, w in params.items() for k, v in optimizer.state.get(w, {}).items()}
    with written(path) as tmp:
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp, metadata={k: json.dumps(v) for k, v in about.items()})


@torch.no_grad()
def load_training(path: Path, kind: str, params: Mapping, optimizer: Muon) -> dict:
    """Put back what save_training wrote; returns all its tensors."""
    tensors = load_file(path)
    for name, w in params.items():
        w.copy_(tensors[f"{kind}/{name}"])
        moments = {k: tensors[f"{k}/{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if k == "exp_avg" or f"{k}/{name}" in tensors}
        if any(v.ndim and v.shape != w.shape for v in moments.values()):
            raise ValueError(f"moments of {name} that are not {tuple(w.shape)}")
        optimizer.state[w] = {k: v if k == "step" else v.to(w.device) for k, v in moments.items()}
    return tensors


def train(cfg: TrainConfig, to: Path, device: torch.device, resume: bool = False,
          progress: Callable[[dict], None] = lambda row: None) -> dict:
    """Train the small MoE into directory `to`; returns bits_per_byte (held out), seconds, steps, largest_cosine.

    progress gets a row per step. Ctrl-C finishes the step, saves to/state and is raised again; resume goes on from
    there. The checkpoint is stock Hugging Face. Same seed, same result on a CPU."""
    begin, state, done, seconds = time.perf_counter(), to / "state" / "train.safetensors", 0, 0.0
    if resume and (to / "train.json").is_file():
        return read_json(to / "train.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        tokenizer, model = dense_start(cfg)
    text = builtin_text("train") if cfg.text is None else read_text(cfg.text, "train")
    cut = len(text) * 19 // 20  # of a user's text, the last twentieth is held out
    text, heldout = (text, builtin_text("heldout")) if cfg.text is None else (text[:cut], text[cut:])
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    expect(len(ids) >= cfg.seq_len, f"train.text: expected at least train.seq_len = {cfg.seq_len} tokens, found {len(ids)}")
    first_moe = 0 if cfg.dense_from else cfg.dense_steps
    total, about = first_moe + cfg.moe_steps, {}
    if resume and state.is_file():
        with saved_state(state), safe_open(state, "pt") as f:
            about = json.loads(f.metadata()["globe"])
            expect(about["config"] == dataclasses.asdict(cfg), f"{to}: its state was saved with another train config; use another --to or --overwrite")
            done, seconds = int(about["step"]), float(about["seconds"])
    model, optimizer = training_phase(cfg, done > first_moe or first_moe == 0, model, device)
    dtype = train_dtype(cfg.autocast, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    if about:
        with saved_state(state):
            load_training(state, "model", dict(model.named_parameters()), optimizer)
            scaler.load_state_dict(about["scaler"])
    with held_interrupt() as stop, threads_for(cfg.moe_intermediate_size, cfg.hidden_size):
        for step in range(done, total):
            if step == first_moe > 0:
                model, optimizer = training_phase(cfg, True, model, device)
            for group in optimizer.param_groups:  # one cosine over both phases; each warms up with its fresh moments
                warm_up = min(1.0, (step - (first_moe if step >= first_moe else 0) + 1) / max(1, cfg.warmup))
                group["lr"] = cfg.lr * warm_up * (0.1 + 0.45 * (1 + math.cos(math.pi * step / total)))
            g = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
            start = torch.randint(len(ids) - cfg.seq_len + 1, (cfg.batch, 1), generator=g)
            x = ids[start + torch.arange(cfg.seq_len)].to(device)
            context = torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
            loss = training_step(model, optimizer, scaler, x, context, cfg)
            progress({"step": step + 1, "steps": total, "phase": "dense" if step < first_moe else "moe", "loss": loss})
            if stop.is_set() or cfg.save_every and (step + 1) % cfg.save_every == 0:
                about = {"step": step + 1, "seconds": seconds + time.perf_counter() - begin, "scaler": scaler.state_dict(), "config": dataclasses.asdict(cfg)}
                save_training(state, "model", dict(model.named_parameters()), optimizer, {"globe": about})
            if stop.is_set():
                raise KeyboardInterrupt(f"state saved at step {step + 1}; go on with --resume")
    windows = token_windows(tokenizer, heldout, 256 * cfg.seq_len, cfg.seq_len)
    loss, _ = nll(model.eval(), windows, 16)
    per_token = len(tokenizer.decode(windows.flatten()).encode()) / windows.numel()
    result = {"bits_per_byte": loss / math.log(2) / per_token, "seconds": round(seconds + time.perf_counter() - begin, 1),
              "steps": total, "largest_cosine": largest_cosine(model), "parameters": model.num_parameters()}
    model.set_experts_implementation("grouped_mm")
    part = to / ".saving"
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    write_text(part / "train.json", json.dumps(result))
    for f in sorted(part.iterdir(), key=lambda f: (f.name == "train.json", f.name == "config.json")):
        os.replace(f, to / f.name)  # config.json near the end: what looks whole is whole
    part.rmdir()
    shutil.rmtree(to / "state", ignore_errors=True)
    return result


class Student:
    """The factors of the layers `span` as trainable float32 tensors, over the stock model's matrices that they stand for; with
    norms=True the weights of the layers' norms too.
    write() puts W^ (p, d) of every fitted expert in the dense one's place; backward() turns the gradients that the model
    left there into those of A, of the mixtures on their fixed supports and, where they train, of the banks. The model
    itself stays the stock one, so that every architecture and experts implementation serves."""

    def __init__(self, model: nn.Module, factors: Factors, span: range, bank: str, device: torch.device, norms: bool = False):
        self.model, self.factors, self.span, self.device, self.frozen, self.refined = model, factors, span, device, {}, False
        self.at = {l: v for l, v in experts_modules(model).items() if l in span and l in factors.experts}
        start = {}
        for name, f in factors.families.items():
            for l in self.at:
                start |= {f"layers.{l}.{name}.A": f.A[l], f"layers.{l}.{name}.val": f.val[l]}
            for g in sorted({f.group[l] for l in self.at}) if bank != "freeze" and not f.owner else ():
                outside = [l for l in f.group if f.group[l] == g and l not in span]
                if outside and bank == "train":
                    raise UserError(f"heal.bank: train needs all layers of a bank in one stack, found layers {span[0]}..{span[-1]} "
                                    f"without layer {outside[0]}; raise heal.stack, or take heal.bank=auto or freeze")
                if not outside:
                    start[f"bank.{name}.{g}"] = f.bank[g]
        self.norms = {name: (w, w.detach()) for name, w in model.named_parameters()
                      if (place := re.fullmatch(r"model\.layers\.(\d+)\..*norm\.weight", name)) and int(place[1]) in self.at}
        for name, (w, dense) in self.norms.items():
            w.data = dense.clone()  # it may be the checkpoint's own memory
            if norms:
                start[f"norm.{name}"] = factors.norms.get(name, dense)
                w.requires_grad_()
        self.params = {k: nn.Parameter(t.to(device, torch.float32, copy=True)) for k, t in start.items()}
        for matrix, _ in self._places():
            matrix.requires_grad_()

    def _places(self, layer: int | None = None, family: str | None = None) -> Iterator[tuple]:
        """(parameter of the model, function that cuts an expert's (p, d) out of it), fitted expert by fitted expert."""
        p, E = self.factors.dims.p, self.factors.dims.experts
        for l, name in itertools.product(self.at if layer is None else [layer], [family] if family else self.factors.families):
            parent, _, module = self.at[l]
            mlp = shared_mlp(parent)
            for e in self.factors.experts[l]:
                i, rows = "gate up down".split().index(name), slice((e - E) * p, (e - E + 1) * p)
                if e >= E:  # a slice of the shared expert
                    yield getattr(mlp, f"{name}_proj").weight, lambda w, i=i, rows=rows: w[:, rows].T if i == 2 else w[rows]
                else:
                    yield (module.gate_up_proj, module.gate_up_proj, module.down_proj)[i], lambda w, i=i, e=e: w[e].T if i == 2 else w[e].chunk(2)[i]

    def weights(self, l: int, name: str, params: Mapping | None = None) -> Tensor:
        """W^ (E_l, p, d) float32, differentiable; of `params` in place of the student's own."""
        params = params or self.params
        f = self.factors.families[name]
        key = f"bank.{f.owner or name}.{f.group[l]}"
        if key not in self.params and key not in self.frozen:
            self.frozen[key] = f.bank[f.group[l]].to(self.device, torch.float32)
        bank = params[key] if key in params else self.frozen[key]
        X = compose(bank, f.idx[l].to(self.device), params[f"layers.{l}.{name}.val"], f.activation)
        return f.shift + f.scale * (params[f"layers.{l}.{name}.A"] @ X)

    @torch.no_grad()
    def write(self, params: Mapping | None = None) -> None:
        if not self.refined:
            put_dense(self.model, self.factors, self.at)
            self.refined = True
        for l, name in itertools.product(self.at, self.factors.families):
            for W, (matrix, cut) in zip(self.weights(l, name, params), self._places(l, name)):
                cut(matrix.data).copy_(W)
        for name, (w, dense) in self.norms.items():
            w.data.copy_((params or self.params).get(f"norm.{name}", self.factors.norms.get(name, dense)))

    def backward(self) -> None:
        for l, name in itertools.product(self.at, self.factors.families):
            self.weights(l, name).backward(torch.stack([cut(matrix.grad).float() for matrix, cut in self._places(l, name)]))
        for matrix, _ in self._places():
            matrix.grad = None
        for name, (w, _) in self.norms.items():
            if f"norm.{name}" in self.params:
                self.params[f"norm.{name}"].grad, w.grad = w.grad.float(), None

    def optimizer(self, lr: float) -> Muon:
        """Muon for adapters and banks, AdamW for mixtures and norms; a step moves a tensor by lr times its own root mean square."""
        groups = []
        for name, w in self.params.items():
            rate, matrix = lr * (float(w.detach().square().mean().sqrt()) or 1.0), w.ndim > 1 and not name.endswith("val")
            groups.append({"params": [w], "parts": int(matrix), "weight_decay": 0.0, "peak": rate / 0.2 if matrix else rate})
        return Muon(groups, betas=(0.9, 0.95))

    def store(self, tensors: dict) -> None:
        """Put trained tensors into the factors, in their stored dtypes, and go on from what these then hold."""
        for name, f in self.factors.families.items():
            places = [(f"layers.{l}.{name}.{kind}", getattr(f, kind), l) for l in self.at for kind in ("A", "val")]
            for key, where, i in (*places, *((f"bank.{name}.{g}", f.bank, g) for g in range(0 if f.owner else len(f.bank)))):
                if key in tensors:
                    where[i] = tensors[key].to(where[i].dtype).cpu()
                if key in self.params:
                    self.params[key].data.copy_(where[i])
        for name, (_, dense) in self.norms.items():
            if (key := f"norm.{name}") in tensors:
                self.factors.norms[name] = tensors[key].cpu()
            if key in self.params:
                self.params[key].data.copy_(self.factors.norms.get(name, dense))


class Walk:
    """A dense model of which a stack of decoder layers is in memory at a time, and the hidden states that it works on."""

    def __init__(self, ckpt: Checkpoint, device: torch.device, dtype: torch.dtype, batch: int):
        self.ckpt, self.device, self.dtype, self.batch, self.calls = ckpt, device, dtype, batch, []
        self.model = hollow(ckpt, device, dtype)
        if device.type == "cpu" and ckpt.dims.experts <= 16:  # measured: 3.0 s against grouped_mm's 4.9 for 1,024 tokens there and
            self.model.set_experts_implementation("eager")    # back; but its gradient costs the square of the experts' number
        self.layers = self.model.model.layers

    @torch.no_grad()
    def embed(self, windows: Tensor, x: Tensor) -> None:
        """Fill x (N, T, d) with the first layer's inputs; keeps what the trunk hands to each layer besides (positions, mask)."""
        forwards, self.calls = [layer.forward for layer in self.layers], [None] * len(self.layers)
        for i, part in enumerate(windows.split(self.batch)):
            for l, layer in enumerate(self.layers):
                def record(h, *args, l=l, i=i, **kwargs):
                    if l == 0:
                        x[i * self.batch:i * self.batch + len(h)] = h.to(x.device)
                    self.calls[l] = self.calls[l] or (args, kwargs)  # of a whole batch: the first
                    return h
                layer.forward = record
            self.model.model(part.to(self.device), use_cache=False)
        for layer, forward in zip(self.layers, forwards):
            layer.forward = forward

    def run(self, span: Sequence[int], x: Tensor, checkpoint: bool = False) -> Tensor:
        """x (b, T, d) through the layers of span, b at most the batch."""
        def cut(v):
            return v[:len(x)] if isinstance(v, Tensor) and v.ndim and len(v) == self.batch else v
        x = x.to(self.device)
        for l in span:
            args, kwargs = self.calls[l]
            call = functools.partial(self.layers[l], **{k: cut(v) for k, v in kwargs.items()})
            rest = tuple(map(cut, args))
            y = torch.utils.checkpoint.checkpoint(call, x, *rest, use_reentrant=False) if checkpoint else call(x, *rest)
            x = y if isinstance(y, Tensor) else y[0]
        return x

    @torch.no_grad()
    def advance(self, span: Sequence[int], x: Tensor) -> None:
        """Every window of x (N, T, d) through the layers of span, in place."""
        for part in tqdm(x.split(self.batch), desc=f"layers {span[0]} to {span[-1]}", file=sys.stderr, leave=False, delay=5, disable=ranks()[0] > 0):
            part.copy_(self.run(span, part))

    def logits(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(x)).float()

    def fill(self, span: Sequence[int]) -> None:
        for l in span:
            if any(w.is_meta for w in self.layers[l].parameters()):
                fill(self.model, self.ckpt, self.device, self.dtype, f"model.layers.{l}")

    def empty(self, span: Sequence[int]) -> None:
        for module in (m for l in span for m in self.layers[l].modules()):
            for key, w in module._parameters.items():
                module._parameters[key] = w if w is None else nn.Parameter(w.to("meta"), requires_grad=False)


@dataclass
class Share:
    """What experts that see the same n tokens (one routed expert, or all that are always active) give to their layer's output:
    h @ down.T, with h and its slopes dh/dgate, dh/dup (n, P) times the router's weights; P = p times their number."""
    experts: list
    tokens: Any                         # (n,) rows of the layer's inputs, or all of them as a slice
    weight: Tensor                      # (n, number of experts)
    gate_up: list                       # of (P, d), compressed where the experts are
    down: Tensor                        # (d, P)
    h: Tensor = None
    slopes: Sequence = ()

    def at_work(self, module: nn.Module, x: Tensor, slopes: bool) -> Tensor:
        x = x[self.tokens]
        made = [x.new_empty(len(x), self.down.shape[1]) for _ in range(1 + 2 * slopes)]
        for i in range(0, len(x), 1024):
            z, weight = torch.cat([F.linear(x[i:i + 1024], w) for w in self.gate_up], -1), self.weight[i:i + 1024, :, None]
            h, both = gate_slopes(module, z) if slopes else (module._apply_gate(z).float(), ())
            for to, t in zip(made, (h, *both)):
                to[i:i + 1024] = t.unflatten(1, (weight.shape[1], -1)).mul_(weight).flatten(1)
        self.h, *self.slopes = made
        return self.h


def shares_of(parent: nn.Module, module: nn.Module, factors: Factors, l: int, slopes: bool, x: Tensor, index: Tensor, weight: Tensor,
              y: Tensor) -> tuple:
    """([Share] of the experts that factors.refined(l) names, gate and up compressed where they were fitted; (N, d) float32: what
    the layer's output lacks with these; the mean square of what all of them give when dense) of inputs x (N, d), of which the
    routed experts make y (N, d)."""
    E, shares, dense = factors.dims.experts, [], y.to(torch.float32, copy=True)
    lacks, refined, seen = dense.clone(), factors.refined(l), {e: (index == e).nonzero(as_tuple=True) for e in range(E)}
    always = all(len(tokens) == len(x) for tokens, _ in seen.values())
    together = [e for e in refined if e < E and always]
    groups = [together, *([e] for e in range(E) if e not in together), [e for e in refined if e >= E]]
    if "down" in factors.families:  # whose adapters are solved for one expert after the other
        groups = [[e] for group in groups for e in group]
    for experts in filter(None, groups):
        if experts[0] < E:
            tokens = slice(None) if always else seen[experts[0]][0]
            w = torch.stack([weight[seen[e]] for e in experts], 1).float()
            gate_up = [torch.cat([module.gate_up_proj[e].chunk(2)[i] for e in experts]) for i in (0, 1)]
            down = torch.cat([module.down_proj[e] for e in experts], 1)
        else:
            mlp, gate, tokens = shared_mlp(parent), getattr(parent, "shared_expert_gate", None), slice(None)
            w = torch.ones(len(x), len(experts), device=x.device) if gate is None else gate(x).float().sigmoid().expand(-1, len(experts))
            part = slice((experts[0] - E) * factors.dims.p, (experts[-1] + 1 - E) * factors.dims.p)
            gate_up, down = [mlp.gate_proj.weight[part], mlp.up_proj.weight[part]], mlp.down_proj.weight[:, part]
        share = Share(experts, tokens, w, gate_up, down)
        if experts[0] >= E:
            given = F.linear(share.at_work(module, x, False), down).float()
            dense += given
            lacks += given
        if fitted := [factors.experts[l].index(e) for e in experts if e in factors.experts[l]]:
            for f, fam in factors.families.items():
                W = fam.A[l][fitted].to(x.device, torch.float32) @ fam.composed(l, fitted).to(x.device, torch.float32)
                W = (fam.shift + fam.scale * W).flatten(0, 1).to(x.dtype)
                if f == "down":
                    share.down = W.T
                else:
                    share.gate_up[f == "up"] = W
        if fitted or share.h is None:
            share.at_work(module, x, slopes and bool(fitted))
        lacks[tokens] -= F.linear(share.h, share.down).float()
        if experts[0] in refined:
            shares.append(share)
    return shares, lacks, max(float(dense.square().mean()), 1e-30)


def refine_adapters(shares: list, factors: Factors, l: int, x: Tensor, lacks: Tensor, steps: int, at_once: int = 2048) -> dict:
    """{family: A (E_l, p, r)} of a layer's gates and ups after a Gauss-Newton step that makes up for what its output `lacks` (N, d):
    `steps` conjugate gradients on ||J q - lacks||^2 + anchor ||q||^2. q is in units of what each row's change alone would move
    in the output: J^T J is the identity where rows do not interact, and the anchor holds to the fit's solution."""
    shares = [(s, [factors.experts[l].index(e) for e in s.experts]) for s in shares if set(s.experts) <= {*factors.experts[l]} and len(s.h)]
    C = x.float().T @ x.float() / len(x)
    families, L, U, unit, anchor = [f for f in ("gate", "up") if f in factors.families], {}, {}, {}, {}
    for f in families:
        X = factors.families[f].composed(l).to(x.device, torch.float32)  # (E_l, r, d)
        L[f] = spd_factor(X @ C @ X.mT, 1e-4)
        U[f] = torch.linalg.solve_triangular(L[f], X, upper=False).to(x.dtype)
        unit[f], anchor[f] = torch.zeros(len(X), factors.dims.p, 1, device=x.device), torch.full((len(X), 1, 1), ANCHOR, device=x.device)
        for s, rows in shares:
            anchor[f][rows] += FEW_TOKENS * X.shape[1] / len(s.h)
            unit[f][rows] = (s.down.float().norm(dim=0) * s.slopes[f == "up"].float().norm(dim=0)).view(len(rows), -1, 1)
        unit[f] = (unit[f] + 1e-3 * unit[f].mean().clamp_min(1e-30)) * (1 + anchor[f]).sqrt()  # all as stiff: few gradients do
        anchor[f] /= 1 + anchor[f]

    def pieces(start: int) -> list:
        """[(share, its rows in factors, its tokens within start .. start + at_once, their places in the share)]"""
        out = []
        for s, rows in shares:
            if isinstance(s.tokens, slice):
                out.append((s, rows, s.tokens, slice(start, start + at_once)))
                continue
            low, high = torch.searchsorted(s.tokens, torch.tensor([start, start + at_once], device=x.device)).tolist()
            out += [(s, rows, s.tokens[low:high] - start, slice(low, high))] if high > low else []
        return out

    def back(y: Callable[[int, list, Tensor], Tensor]) -> dict:
        """J^T y for y (n, d) of the tokens x (n, d) from start on, made at_once tokens at a time."""
        G = {f: torch.zeros(*unit[f].shape[:2], x.shape[1], device=x.device) for f in families}
        for start, part in zip(range(0, len(x), at_once), x.split(at_once)):
            here = pieces(start)
            pull = y(start, here, part).to(x.dtype)
            for s, rows, tokens, at in here:
                h = pull[tokens] @ s.down
                for f in families:
                    G[f][rows] += ((s.slopes[f == "up"][at] * h).T @ part[tokens]).view(len(rows), -1, x.shape[1])
        return {f: (G[f].to(x.dtype) @ U[f].mT).float() / unit[f] for f in families}

    def normal(q: dict, last: bool) -> tuple:
        """J^T J q (but the last, which nothing asks for), and |J q|^2"""
        W, size = {f: (q[f] / unit[f]).to(x.dtype) @ U[f] for f in families}, 0.0

        def moved(start: int, here: list, part: Tensor) -> Tensor:
            nonlocal size
            y = torch.zeros(part.shape, device=x.device)
            for s, rows, tokens, at in here:
                h = sum(s.slopes[f == "up"][at] * F.linear(part[tokens], W[f][rows].flatten(0, 1)) for f in families)
                y[tokens] += F.linear(h, s.down)
            size += float(y.square().sum())
            return y
        if last:
            for start, part in zip(range(0, len(x), at_once), x.split(at_once)):
                moved(start, pieces(start), part)
        return {} if last else back(moved), size
    g = back(lambda start, here, part: lacks[start:start + at_once])
    q, step, size = {f: torch.zeros_like(t) for f, t in g.items()}, {f: t.clone() for f, t in g.items()}, _dot(g, g)
    done = 1e-12 * size  # nothing left to gain
    for left in reversed(range(steps)):
        if size <= done:
            break
        curved, length = normal(step, not left)
        held = {f: anchor[f] * step[f] for f in families}
        t = size / (length + _dot(held, step))
        _add(q, t, step)
        if not left:
            break
        _add(g, -t, curved)
        _add(g, -t, held)
        size, old = _dot(g, g), size
        step = {f: g[f].add(step[f], alpha=size / old) for f in families}
    for f in families:
        fam = factors.families[f]
        q[f] = torch.linalg.solve_triangular(L[f], q[f] / unit[f], upper=False, left=False) / fam.scale
        q[f] = (fam.A[l].to(x.device, torch.float32) + q[f]).to(fam.A[l].dtype)
    return q


def refine_down(shares: list, lacks: Tensor, p: int, sweeps: int = 3, onto: Callable[[Share, Tensor], Tensor] = lambda share, change: change) -> Tensor:
    """Down projections (n, d, p) of the shares' experts that give what the output `lacks` (N, d), which becomes what it then still
    lacks: least squares with a ridge towards what they are, a share after the other on what the others leave (block Gauss-Seidel). Taken each
    alone, experts mend a fifth as much: what one lacks shows in the hidden activations of all. onto(share, change (d, P)): the
    part of a change that its experts can make, an orthogonal projection of its columns."""
    down, factor = [s.down.float().clone() for s in shares], {}
    for i in [i for _ in range(sweeps if len(shares) > 1 else 1) for i, s in enumerate(shares) if len(s.h)]:
        s = shares[i]
        if i not in factor:
            K = torch.zeros(s.h.shape[1], s.h.shape[1], device=lacks.device)
            for part in s.h.split(4096):  # sums in float32
                K += part.T @ part
            ridge = float((DOWN_RIDGE + FEW_TOKENS * p / len(s.h)) * K.diagonal().mean().clamp_min(1e-30))
            factor[i] = ridge, spd_factor(K + ridge * torch.eye(len(K), device=K.device), 0)
        ridge, L = factor[i]
        pull = (s.h.T @ lacks[s.tokens].to(s.h.dtype)).float() - ridge * (down[i] - s.down.float()).T
        change = onto(s, torch.cholesky_solve(pull, L).T)
        down[i] += change
        lacks[s.tokens] -= F.linear(s.h, change.to(s.h.dtype))
    return torch.cat([part for d in down for part in d.split(p, 1)]).view(-1, len(down[0]), p)


def refine_down_adapters(shares: list, factors: Factors, l: int, lacks: Tensor) -> Tensor:
    """A (E_l, p, r) of a layer's downs, W^T = A X, in place of whole projections; lacks as in refine_down. The best A for given
    hidden activations is the best W^T put orthogonally onto the rows of X, for the metric is on the other side."""
    fam, p, shares = factors.families["down"], factors.dims.p, [s for s in shares if s.experts[0] in factors.experts[l]]
    X, rows = fam.composed(l).to(lacks.device, torch.float32), [factors.experts[l].index(s.experts[0]) for s in shares]
    L = spd_factor(X @ X.mT, 1e-6)

    def within(change: Tensor, rows: list | int) -> Tensor:  # (..., d, p) -> (..., p, r)
        return torch.cholesky_solve(X[rows] @ change, L[rows]).mT
    new = refine_down(shares, lacks, p, onto=lambda s, change: (within(change, i := factors.experts[l].index(s.experts[0])) @ X[i]).mT)
    A = fam.A[l].to(lacks.device, torch.float32).clone()
    A[rows] += within(new - torch.stack([s.down.float() for s in shares]), rows) / fam.scale
    return A.to(fam.A[l].dtype)


@torch.no_grad()
def refine(ckpt: Checkpoint, factors: Factors, windows: Tensor, cfg: Config, device: torch.device, scratch: Path | None = None) -> list:
    """Behind the fit, in place: each layer's adapters of gate and up, and its down projections, by what its experts give together on
    windows (N, T) of token ids. The fit counts each row of gate and up by itself; here errors that cancel or add up in a token's
    output count as they do. Inputs are the dense model's, a layer at a time is in memory, and no gradient leaves a layer.
    Down, where it was not fitted, stays dense and of its size (least squares behind what was cut: He et al. 2017,
    arXiv:1707.06168, for channels).
    Returns a row {"layer", "before", "after"} per layer: relative error of the output. What is new lies in files below
    `scratch` where that is given: all layers' may not fit in memory."""
    def kept(name: str, t: Tensor) -> Tensor:
        return t.cpu() if scratch is None else on_disk(scratch / name, t.shape, t.dtype).copy_(t)
    rows, last, dtype = [], max(factors.experts), with_gradients(as_dtype(cfg.calib.dtype) or ckpt.dtype)
    walk = Walk(ckpt, device, compute_dtype(dtype, device), min(cfg.calib.batch, len(windows)))
    places, D, whole = experts_modules(walk.model), ckpt.dims, len(windows)
    # what a layer's tokens take: hidden activations and slopes of their experts and the shared one, inputs, outputs
    each = walk.dtype.itemsize * (3 * D.p * (D.top_k + D.shared) + 5 * D.d) + 16 * D.d
    most = max(1, int(min(free_memory(device), free_memory(torch.device("cpu"))) / 2 / each / windows.shape[1]))
    windows = windows[::-(-whole // most)]
    if len(windows) < whole:
        say(f"refinement: on {len(windows)} of the calibration's {whole} windows, for want of memory")
    x = torch.empty(*windows.shape, D.d, dtype=walk.dtype)
    walk.embed(windows, x)
    for l in tqdm(range(last + 1), desc="refine", file=sys.stderr, leave=False):
        walk.fill([l])
        seen, (parent, _, module) = [], places.get(l, (None,) * 3)
        with contextlib.ExitStack() as hooks:
            if l in factors.experts:
                hooks.enter_context(module.register_forward_hook(
                    lambda _, args, kwargs, y: seen.append((*(*args, *kwargs.values())[:3], y)), with_kwargs=True))
            for part in x.split(walk.batch):
                part.copy_(walk.run([l], part))
        if seen:
            inputs = [torch.cat([t.reshape(-1, t.shape[-1]) for t in kind]) for kind in zip(*seen)]
            every = max(1, inputs[1].numel() // (REFINE_TOKENS * D.d * D.experts))
            some = [t[::every] for t in inputs] if cfg.fit.refine else inputs
            shares, lacks, size = shares_of(parent, module, factors, l, cfg.fit.refine > 0, *some)
            before = float(lacks.square().mean()) / size
            if cfg.fit.refine:
                old = {f: factors.families[f].A[l] for f in ("gate", "up") if f in factors.families}
                for change in (refine_adapters(shares, factors, l, some[0], lacks, cfg.fit.refine), old):
                    for f, A in change.items():
                        factors.families[f].A[l] = kept(f"{f}.{l}", A)
                    del shares, lacks
                    shares, lacks, size = shares_of(parent, module, factors, l, False, *inputs)
                    if float(lacks.square().mean()) <= before * size:
                        break  # else back: the step was too long
            if cfg.fit.down and "down" in factors.families:
                factors.families["down"].A[l] = kept(f"down.{l}", refine_down_adapters(shares, factors, l, lacks))
            elif cfg.fit.down:
                factors.down[l] = kept(f"down.{l}", refine_down(shares, lacks, D.p).to(ckpt.dtype))
            after = float(lacks.square().mean()) / size
            expect(math.isfinite(after), f"refinement: layer {l}: expected a finite error of the output, found {after}")
            rows.append({"layer": l, "before": math.sqrt(before), "after": math.sqrt(after)})
        walk.empty([l])
    return rows


def on_disk(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = math.prod(shape) * dtype.itemsize
    with open(path, "wb") as f:
        if hasattr(os, "posix_fallocate"):  # a full disk says so here, not in the middle; macOS has no such call
            os.posix_fallocate(f.fileno(), 0, size)
        f.truncate(size)
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(*shape)


class Divergence(torch.autograd.Function):
    """Mean over tokens of KL(dense || healed) in nats, of hidden states y and t (N, d) behind the last layer; differentiable
    in y. 128 tokens at a time, gradient included: the logits of a whole batch, four times over, would be gigabytes."""

    @staticmethod
    def forward(ctx, y: Tensor, t: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
        total, grads = torch.zeros((), device=y.device), []
        for part, want in zip(y.detach().split(128), t.split(128)):
            want, part = logits(want).log_softmax(-1), part.requires_grad_()
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                z = logits(part)
            got = z.detach().log_softmax(-1)
            q = want.exp()
            total += torch.linalg.vecdot(q, want.sub_(got)).sum()
            if z.requires_grad:
                z.backward(got.exp_().sub_(q).div_(len(y)))
                grads.append(part.grad)
        ctx.save_for_backward(torch.cat(grads) if grads else None)
        return total / len(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return grad * ctx.saved_tensors[0], None, None


def heal_stack(student: Student, loss: Callable[[Tensor], Tensor], windows: int, held: int, cfg: Config, state: Path,
               progress: Callable[[dict], None], stop: Callable[[], bool]) -> tuple:
    """Train one stack; returns (its best tensors, {} where none beat the start; loss on the held-out windows before, after).
    loss(ids): mean loss of the windows ids, of which 0..held-1 are held out; it must be small enough for one backward pass.
    The state is saved every heal.save_every steps and when stop() asks; a state that is there is resumed. Processes of one
    job share the windows of each step."""
    (rank, world), size = ranks(), min(cfg.heal.batch, windows - held)
    expect(size >= world, f"heal.batch: expected a window or more for each of {world} processes, found {size}")
    H, optimizer, step, bad, rate, first, lowest = cfg.heal, student.optimizer(cfg.heal.lr), 0, 0, 1.0, None, math.inf
    micro, now = cfg.calib.batch, {k: w.data for k, w in student.params.items()}
    best, mean = ({k: w.clone() for k, w in now.items()} for _ in range(2))

    def held_out() -> float:
        """The loss with the running mean of the parameters in place, which is what a stack ends with: the steps are noisy."""
        student.write(mean)
        with torch.no_grad():
            mine = torch.arange(held)[rank::world]  # with few of them, some ranks have none
            total = torch.tensor([sum(float(loss(part)) * len(part) for part in mine.split(micro) if len(part))], dtype=torch.float64)
        all_sum(total)
        return float(total) / held
    if state.is_file():
        with saved_state(state), safe_open(state, "pt") as f:
            step, bad, rate, first, lowest = json.loads(f.metadata()["heal"])
            tensors = load_training(state, "now", student.params, optimizer)
        best, mean = ({k: tensors[f"{kind}/{k}"].to(w.device) for k, w in now.items()} for kind in ("best", "mean"))
    if first is None:
        first = lowest = held_out()
    while step < H.steps and bad < H.patience:
        g = torch.Generator().manual_seed(cfg.fit.seed * 1_000_003 + student.span[0] * 10_007 + step)
        ids = held + torch.randperm(windows - held, generator=g)[rank:size:world]
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate * min(1.0, (step + 1) / max(1, H.warmup)) * (0.55 + 0.45 * math.cos(math.pi * step / H.steps))
        student.write()
        total = torch.zeros(1, dtype=torch.float64)
        for part in ids.split(micro):
            value = loss(part) * (len(part) / size)
            value.backward()
            total += float(value.detach())
        student.backward()
        all_sum(total, *(w.grad for w in student.params.values()))
        total = float(total)
        if math.isfinite(total):
            optimizer.step()
        optimizer.zero_grad()
        step += 1
        for k, w in now.items():
            mean[k].lerp_(w, max(H.mean, 1 / (step + 1)))
        row = {"family": "heal", "layer": student.span[0], "step": step, "loss": total}
        if step % H.check_every == 0 or step == H.steps or not math.isfinite(total):
            row["held_out"] = value = held_out()
            if value < lowest:
                bad, lowest, best = 0, value, {k: w.clone() for k, w in mean.items()}
            else:  # back to the best, and on in smaller steps: which a model bears differs by ten times from one to the next
                bad, rate = bad + 1, rate / 2
                for k, w in student.params.items():
                    now[k].copy_(best[k])
                    mean[k].copy_(best[k])
                    for moment in optimizer.state[w].values():
                        moment.zero_()
        progress(row)
        stopped = stop()
        if not rank and (stopped or step % H.save_every == 0):
            save_training(state, "now", student.params, optimizer, {"heal": [step, bad, rate, first, lowest]},
                          **{f"{kind}/{k}": w for kind, kept in (("best", best), ("mean", mean)) for k, w in kept.items()})
        if stopped:
            raise KeyboardInterrupt(f"state saved at step {step} of the stack at layer {student.span[0]}")
    return best if lowest < first else {}, first, lowest


def stack_size(cfg: Config, ckpt: Checkpoint, device: torch.device, dtype: torch.dtype) -> int:
    """Decoder layers that heal trains together. auto: all, where memory holds the weights with their gradients and, in float32,
    the factors with gradients, momentum, running mean and the best so far; else one."""
    L = ckpt.config["num_hidden_layers"]
    if cfg.heal.stack != "auto":
        return min(L, cfg.heal.stack)
    return L if first_rank_says((2 * dtype.itemsize + 20) * ckpt.num_parameters() < fit_budget(cfg, device)) else 1


def heal(ckpt: Checkpoint, factors: Factors, windows: Tensor, cfg: Config, state: Path, device: torch.device, dtype: torch.dtype,
         progress: Callable[[dict], None] = lambda row: None, stop: Callable[[], bool] = lambda: False) -> list:
    """Layer-wise recovery: train `factors` (in place) stack by stack against the dense model on windows (N, T) of token ids.

    The model is walked once, in order, with one stack of cfg.heal.stack decoder layers in memory; hidden states of the
    dense and of the healed model are kept in files below `state`. Each stack sees the healed model's own inputs and is
    trained to give the dense model's outputs, so that it also mends what the stacks before it left over (block
    reconstruction: Li et al. 2021, arXiv:2102.05426; the logits' term: Hinton et al. 2015, arXiv:1503.02531). A stack
    keeps its old factors where the held-out windows gained nothing. Returns a row {"layers", "before", "after"} per stack.
    Finished stacks are saved below `state` and are not trained again; KeyboardInterrupt after stop(), with the state saved."""
    H, L, rows = cfg.heal, ckpt.config["num_hidden_layers"], []
    size = stack_size(cfg, ckpt, device, dtype)
    weight = float(size == L) if H.logits_weight is None else H.logits_weight
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(cfg.fit.seed))
    windows, held = windows[order], max(1, round(H.held_out * len(windows)))
    expect(len(windows) >= 2, f"heal: expected text for 2 windows of calib.length = {cfg.calib.length} tokens or more, found 1")
    walk = Walk(ckpt, device, dtype, min(cfg.calib.batch, len(windows)))
    shape = (*windows.shape, ckpt.dims.d)
    x, dense = (on_disk(state / f"{name}-{ranks()[0]}.bin", shape, dtype) for name in ("healed", "dense"))
    walk.embed(windows, x)
    dense.copy_(x)
    if weight:  # the logits need the dense model's last hidden states, and the way to them
        final = on_disk(state / f"final-{ranks()[0]}.bin", shape, dtype)
        walk.fill(range(L))
        walk.advance(range(L), final.copy_(x))
    for i in range(0, L, size):
        span = range(i, min(i + size, L))
        walk.fill(span)
        student = Student(walk.model, factors, span, H.bank, device, H.norms)
        if weight < 1:
            walk.advance(span, dense)
        if student.params:
            done = state / f"stack-{i:03d}.safetensors"
            if not first_rank_says(done.is_file()):
                def loss(ids: Tensor) -> Tensor:
                    """(1 - weight) * mean over tokens of |y - t|^2 / |t|^2 + weight * KL(dense || healed) in nats per token.
                    Per token, since a few tokens of a sequence are hundreds of times longer than the others."""
                    y, loss = walk.run(span, x[ids], H.grad_checkpoint), torch.zeros((), device=device)
                    if weight < 1:
                        t = dense[ids].to(device).float()
                        loss = (1 - weight) * ((y.float() - t).square().sum(-1) / t.square().sum(-1)).mean()
                    if weight:
                        y = walk.run(range(span[-1] + 1, L), y, H.grad_checkpoint)
                        loss = loss + weight * Divergence.apply(y.flatten(0, 1), final[ids].to(device).flatten(0, 1), walk.logits)
                    return loss
                best, before, after = heal_stack(student, loss, len(windows), held, cfg, state / "step.safetensors", progress, stop)
                with first_rank_first():
                    if not ranks()[0]:
                        with written(done) as tmp:
                            save_file(best, tmp, metadata={"heal": json.dumps([before, after])})
                        (state / "step.safetensors").unlink(missing_ok=True)
            with saved_state(done), safe_open(done, "pt") as f:
                before, after = map(float, json.loads(f.metadata()["heal"]))
                student.store(load_file(done))
            student.write()
            rows.append({"layers": [span[0], span[-1]], "before": before, "after": after})
        if span[-1] + 1 < L:
            walk.advance(span, x)
        walk.empty(span if not weight else ())
    return rows


@contextlib.contextmanager
def held_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C (or SIGTERM) sets instead of raising, so that a step is never cut in half."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield stop
        return
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


# ======================================================================================================
# 11. Command line
# ======================================================================================================
def say(*text: Any) -> None:
    """For people: stderr, by the first rank. The last line of stdout is for programs."""
    if not ranks()[0]:
        print(*text, file=sys.stderr, flush=True)


def bar(what: str) -> Callable:
    """A progress bar around an iterable, on stderr."""
    return lambda it: tqdm(it, desc=what, file=sys.stderr, leave=False, dynamic_ncols=True)


class Log:
    """A row per step into log.jsonl and, by log.to, into trackio or wandb (offline unless WANDB_MODE says otherwise)."""

    def __init__(self, path: Path, cfg: Config, run_name: str):
        self.path, self.sink, to = path, None, cfg.log.to
        if to == "none" or ranks()[0]:
            return
        try:
            self.sink = __import__(to)
        except ImportError:
            raise UserError(f"log.to: {to} is not installed: pip install {to}") from None
        more = {"mode": os.environ.get("WANDB_MODE", "offline"), "tags": cfg.log.tags} if to == "wandb" else {}
        self.sink.init(project=cfg.log.project, name=cfg.log.run_name or run_name, config=dataclasses.asdict(cfg), **more)

    def row(self, row: dict) -> None:
        if ranks()[0]:
            return
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        if self.sink:
            self.sink.log({f"{row['family']}/{k}": v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"})

    def close(self) -> None:
        if self.sink:
            self.sink.finish()


def read_rows(path: Path) -> list:
    """The rows of log.jsonl; what is none (a last line that was cut short) is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and type(row.get("step")) is int]


def open_model(cfg: Config, device: torch.device) -> Checkpoint:
    """The checkpoint that model.path names; "tiny" is trained on first use and kept in the user's cache."""
    if cfg.model.path != "tiny":
        return Checkpoint(resolve_model(cfg.model.path, cfg.model.revision, cfg.model.force_download))
    key = hashlib.sha256(json.dumps(dataclasses.asdict(cfg.train), sort_keys=True).encode()).hexdigest()[:8]
    to = user_cache() / f"tiny-{key}"
    if not (to / "config.json").is_file():
        say(f"the default model is trained once, in about 4 minutes, into {to}")
        run_train(cfg, to, device, resume=True)
    return Checkpoint(to)


def run_train(cfg: Config, to: Path, device: torch.device, resume: bool) -> dict:
    with tqdm(desc="train", file=sys.stderr, dynamic_ncols=True, leave=False, delay=1) as line:
        def progress(row: dict) -> None:
            line.total = row["steps"]
            line.n = row["step"]
            line.set_postfix_str(f"{row['phase']} loss {row['loss']:.3f}")
        return train(cfg.train, to, device, resume, progress)


def read_evals(run: Path) -> dict:
    """{text: result} of RUN/eval.json, which feeds cards and plots; empty where there is none."""
    evals = read_json(run / "eval.json") if (run / "eval.json").is_file() else {}
    for text, e in evals.items():
        try:
            figures = [e[k] for k in ("ppl_dense", "ppl", "delta_nats", "tokens", "ratio", "model_ratio")]
            figures += [x for row in e.get("tasks", {}).values() for pair in row.values() for x in pair.values()]
        except (KeyError, TypeError, AttributeError):
            figures = [None]
        expect(all(type(x) in (int, float) for x in figures), f"{run / 'eval.json'}: {text}: expected the figures that eval writes, found {short(e)}")
    return evals


def new_run(cfg: Config) -> Path:
    """The first free runs/NAME-NNN; made at once, so that two fits never share it."""
    name = re.sub(r"[^\w.-]", "-", Path(cfg.model.path).name).strip(".-").lower() or "run"
    for i in range(1, 10000):
        with contextlib.suppress(FileExistsError):
            path = Path("runs") / f"{name}-{i:03d}"
            path.mkdir(parents=True)
            return path
    raise UserError("runs: expected a free number below 10000, found none; use --out")


def newest_run(finished: bool = True) -> Path:
    """The newest run below ./runs, by the time of its config."""
    configs = [c for c in Path("runs").glob("*/config.yaml") if not finished or c.with_name("factors.safetensors").is_file()]
    expect(configs, "expected a finished run below ./runs, found none: run `python globe.py fit` first, or give --factors")
    return max(configs, key=lambda c: c.stat().st_mtime).parent


def run_config(run: Path, args: argparse.Namespace) -> Config:
    """A run's resolved config, then the command line's."""
    path = run / "config.yaml"
    return load_config(getattr(args, "config", None), args.overrides,
                       read_yaml(path.read_text(encoding="utf-8", errors="replace"), str(path)) if path.is_file() else None)


def fresh(path: Path, overwrite: bool, source: Path | None = None, clear: bool = False) -> Path:
    """A directory that the user named: must not exist (or --overwrite), nor lie in the source checkpoint. clear: remove it."""
    place = path.resolve()
    if source and (place == source.resolve() or source.resolve() in place.parents):
        raise UserError(f"{path}: expected a directory outside the source checkpoint {source}")
    for kept in (*([source] if source else ()), Path()):  # --overwrite would delete it
        expect(place not in (kept.resolve(), *kept.resolve().parents), f"{path}: expected a directory that does not hold {kept.resolve()}")
    expect(overwrite or not path.exists() or path.is_dir() and not any(path.iterdir()), f"{path}: exists; choose another name or add --overwrite")
    if clear:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return path


class SavedFit:
    """A fit's state below RUN/state: FAMILY.safetensors, and in FAMILY/ each L-BFGS pair in a file of its own, written once.
    With `spill`, what shelve() is given goes to files there at once. Nothing that the saved state names is removed before a
    new state is in place, so that a process killed at any instant leaves one that is whole."""

    def __init__(self, run: Path, family: str, spill: bool):
        self.path, self.dir, self.spill, self.named = run / "state" / f"{family}.safetensors", run / "state" / family, spill, set()
        self.mine = self.dir / f"rank-{ranks()[0]}" if ranks()[0] else self.dir

    def shelve(self, name: str, tensors: dict) -> Shelved:
        return Shelved(tensors).to(self.mine / f"{name}.safetensors") if self.spill else Shelved(tensors)

    def load(self) -> tuple | None:
        """(state, {step: pair}), or None where nothing was saved."""
        if not self.path.is_file():
            return None
        with saved_state(self.path):
            state, pairs = read_tensors(self.path), {}
            for step in map(int, state["pairs"].tolist()):
                pairs[step] = Shelved({})
                pairs[step].path = self.dir / f"pair-{step:06d}.safetensors"
                self.named.add(pairs[step].path)
                if not self.spill or not pairs[step].path.is_file():
                    pairs[step] = Shelved(pairs[step].load())
        return state, pairs

    def save(self, fitter: Fitter) -> None:
        if not ranks()[0]:
            for step, pair in fitter.pairs.items():
                path = self.dir / f"pair-{step:06d}.safetensors"
                if path not in self.named:
                    pair.save(path) if pair.path is None else flush(pair.path)
            state = fitter.state()
            write_tensors(self.path, {k: (v.dtype, v.shape) for k, v in state.items()}, state)
        self.named = {self.dir / f"pair-{step:06d}.safetensors" for step in fitter.pairs}
        self.tidy(fitter)

    def tidy(self, fitter: Fitter | None) -> None:
        """Remove the files that neither the saved state nor the fitter needs; without a fitter, all that is not state."""
        used = {pair.path for pair in fitter.pairs.values()} if fitter else set()
        for path in self.mine.glob("*.safetensors"):
            if path not in self.named and path not in used and (fitter is None or path.name.startswith("pair-")):
                path.unlink()


def fit_experts(names: tuple, ckpt: Checkpoint, keys: list, cfg: Config, moments: dict, device: torch.device, saved: SavedFit,
                batch: int) -> Experts:
    """The families `names` as one set of experts: expert e of the i-th family is expert e + i * width of the fit."""
    width, sides = ckpt.dims.experts + ckpt.dims.shared, {}
    if moments:
        parts = [metric_of(moments, f, keys, cfg.fit.ridge, device) for f in names]
        right = dict(parts[0]["right"]) if not saved.spill else LazyDict(
            {l: lambda at=saved.shelve(f"L-{l:06d}", {"L": L.cpu()}): at.load()["L"].to(device) for l, L in parts[0]["right"].items()})
        sides = {"right": right, "left": {(l, e + i * width): S for i, part in enumerate(parts) for (l, e), S in part["left"].items()}}
        if all(part["means"] for part in parts):
            sides["means"] = lambda l, e: parts[e // width]["means"](l, e % width)
    saved.path.parent.mkdir(parents=True, exist_ok=True)
    return Experts(lambda l, e: ckpt.expert(names[e // width], l, e % width), [(l, e + i * width) for i in range(len(names)) for l, e in keys],
                   cfg.bank.scope, device, cfg.model.normalize, batch, **sides, absorb=cfg.bank.activation == "identity",
                   budget=fit_budget(cfg, device), scratch=saved.path.parent)


def check_state(t: dict, shape: tuple, experts: Experts) -> None:
    """ValueError where a saved state is not one of a fit of these experts with (m, r) = shape."""
    sizes = {"B": (experts.groups, *shape, experts.d), "z": (len(experts), shape[0]), "A": (len(experts), experts.p, shape[1])}
    for name, v in t.items():
        kind, _, k = name.rpartition(".")
        want = (len(experts), shape[0]) if name == "mask" else sizes[k] if kind and kind != "unit" else v.shape
        if v.shape != want or v.is_floating_point() and not torch.isfinite(v).all():
            raise ValueError(f"{name} of {tuple(v.shape)}, not {tuple(want)}, or NaN or Inf in it")
    if int(t["step"]) < 0:
        raise ValueError("a step below 0")


def fit_family(names: tuple, shape: tuple, ckpt: Checkpoint, keys: list, cfg: Config, moments: dict, device: torch.device, run: Path,
               log: Log, stop: Callable[[], bool]) -> dict | None:
    """Fit the families `names` on one bank, with progress, log rows and saved state; {family: factors}, None if stopped."""
    family, groups = "+".join(names), len(set(Experts.groups_of(keys, cfg.bank.scope).values()))
    pairs = 8.0 * cfg.fit.memory * groups * math.prod(shape) * ckpt.dims.d
    saved = SavedFit(run, family, pairs > fit_budget(cfg, device) / 4)
    before, done = saved.load(), 0
    saved.tidy(None)
    try:
        experts = fit_experts(names, ckpt, keys, cfg, moments, device, saved, cfg.fit.batch or (int(before[0]["batch"]) if before else 0))
        if before:
            with saved_state(saved.path):
                check_state(before[0], shape, experts)
        start = {k[2:]: v for k, v in before[0].items() if k.startswith("x.")} if before else None
        fitter = Fitter(experts, cfg, shape, ckpt.dtype, start, saved.shelve)
        if before:
            with saved_state(saved.path):
                fitter.load_state(*before)
            done = fitter.step_done
            say(f"{family}: resumed at step {done}")
        if not ranks()[0]:  # a resumed run writes again the rows that came after its saved state
            rows = [r for r in read_rows(run / "log.jsonl") if r.get("family") != family or r["step"] <= done]
            write_text(run / "log.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
        begin = time.perf_counter()
        with tqdm(total=cfg.fit.steps, initial=done, desc=family, file=sys.stderr, dynamic_ncols=True, disable=ranks()[0] > 0) as line:
            while not fitter.done:
                row = {"family": family} | fitter.step()
                log.row(row | {"seconds": round(time.perf_counter() - begin, 3)})
                line.update(1)
                line.set_postfix_str(f"error {row['rel_frob']:.4f} support {row['support']:g} T {row['T']:.3g}")
                stopped = any_rank(stop())
                if fitter.step_done % cfg.fit.save_every == 0 or fitter.done or stopped:
                    saved.save(fitter)
                    done = fitter.step_done
                saved.tidy(fitter)
                if stopped:
                    return None
        return fitter.factors().split(names)
    except (OSError, Lost) as e:
        stands = f"the state of step {done} stands" if done else "nothing was saved yet"
        raise type(e)(f"{' '.join(str(e).split())}; {family}: {stands}; go on with: python globe.py fit --resume --out {run}") from None


def bank_shape(cfg: Config, family: str, n: int, groups: int, D: Dims) -> tuple:
    """(m, r) of a family: bank.r as given, or the largest r whose stored size is at most bank.ratio of the dense."""
    m = cfg.bank.m if isinstance(cfg.bank.m, int) else cfg.bank.m.get(family)
    expect(m is not None, f"bank.m: expected a number for {family}, found {cfg.bank.m}")
    if cfg.bank.r is not None:
        r = cfg.bank.r if isinstance(cfg.bank.r, int) else max(1, round(cfg.bank.r * D.p))
    else:
        mixtures = 2 * n * min(cfg.sparsity.support, m) + 2
        r = int((cfg.bank.ratio * n * D.p * D.d - mixtures) // (n * D.p + groups * m * D.d))
    expect(r >= 1, f"bank: {groups} x {m} bases leave no room for r >= 1 at ratio {cfg.bank.ratio}; take fewer (bank.m)")
    expect(m <= (most := max(1024, 4 * n)), f"bank.m: expected at most {most} bases for {n} experts, found {m}")
    expect(r <= 4 * max(D.p, D.d), f"bank.r: expected at most {4 * max(D.p, D.d)} (4 x the larger side of W), found {r}")
    return m, r


def fit_memory(cfg: Config, ckpt: Checkpoint) -> None:
    """bank.memory -> bank.ratio, and down too (families: all) where the families alone would go below 0.5 of their size."""
    if not cfg.bank.memory:
        return
    size = re.fullmatch(r"(\d+\.?\d*) *([KMGT])(i?)B", cfg.bank.memory)
    expect(size and cfg.bank.r is None, f"bank.memory: expected a size like 18GiB, and no bank.r, found {cfg.bank.memory!r} and {cfg.bank.r}")
    wanted = float(size[1]) * (1024 if size[3] else 1000) ** ("KMGT".index(size[2]) + 1) / ckpt.dtype.itemsize
    family, total = len(select_experts(ckpt.dims, cfg.model)) * ckpt.dims.p * ckpt.dims.d, ckpt.num_parameters()
    for families in dict.fromkeys((cfg.model.families, "all")):
        n = len(families_of(dataclasses.replace(cfg.model, families=families))) * family
        cfg.model.families, cfg.bank.ratio = families, (wanted - total + n) / n
        if cfg.bank.ratio >= 0.5:
            break
    if not 0.05 < cfg.bank.ratio < 1:
        least, most = ((total - x * n) * ckpt.dtype.itemsize / 2 ** 30 for x in (0.95, 0))
        raise UserError(f"bank.memory: expected a size between {least:.3g}GiB (5 % of the experts left) and {most:.3g}GiB (the source), "
                        f"found {cfg.bank.memory}")


def calibration_windows(ckpt: Checkpoint, cfg: Config, device: torch.device, tokens: int) -> Tensor:
    """(N, length) ids of `tokens` tokens of the calibration text, and of calib.sampled more that the dense model writes."""
    windows = ckpt.known(token_windows(load_tokenizer(ckpt.dir), read_text(cfg.calib.text, "calibration"), tokens, cfg.calib.length))
    if cfg.calib.sampled:
        say(f"sampling {cfg.calib.sampled} tokens from the dense model")
        length = windows.shape[1]
        n, dense = max(1, cfg.calib.sampled // length), load_dense(ckpt.dir, device, compute_dtype(as_dtype(cfg.calib.dtype) or ckpt.dtype, device))
        # four texts to a window: four times the subjects, in less time, as a step's attention reads less
        texts = sample_windows(dense, 4 * n, -(-length // 4), cfg.fit.seed).view(n, -1)
        windows = torch.cat([windows, texts[:, :length]])
    return windows


def calibrate(ckpt: Checkpoint, cfg: Config, device: torch.device, scratch: Path | None = None) -> dict:
    """Moments of the dense model's activations on the calibration text, layer by layer; from calib.load where given. Files
    under `scratch` hold the largest where they would take more than a quarter of the free memory."""
    if cfg.calib.load:
        moments = load_moments(Path(cfg.calib.load), ckpt)
        expect("ridge" in moments or not cfg.calib.shrink, f"calib.load: {cfg.calib.load}: expected moments saved with calib.shrink={cfg.calib.shrink}, found no ridge")
        drop = {*(() if cfg.calib.shrink else ("ridge",)), *(() if cfg.calib.means else MEANS)}
        return {kind: layers for kind, layers in moments.items() if kind not in drop}
    windows = calibration_windows(ckpt, cfg, device, cfg.calib.tokens)
    expect(len(windows) >= 2 or not cfg.calib.shrink, f"calib.shrink: expected text for 2 windows of calib.length = {cfg.calib.length} tokens or more, found 1")
    halves = windows.tensor_split(2 if cfg.calib.shrink else 1)
    fisher, dtype = cfg.calib.fisher, as_dtype(cfg.calib.dtype) or ckpt.dtype
    dtype = compute_dtype(with_gradients(dtype) if fisher else dtype, device)
    walk = Walk(ckpt, device, dtype, min(cfg.calib.batch, len(windows)))
    layers = len(walk.layers)
    states = windows[0].numel() * ckpt.dims.d * dtype.itemsize * (layers * fisher + 1)
    at_once = max(1, free_memory(torch.device("cpu")) // 4 // states // walk.batch) * walk.batch  # whole batches: the same result whatever is free
    means, size = cfg.calib.means, 8 * len(halves) * len(ckpt.dims.layers) * ckpt.dims.experts * ckpt.dims.p * ckpt.dims.d
    scratch = scratch if means and size > free_memory(torch.device("cpu")) / 4 else None
    if scratch:
        scratch.mkdir(parents=True, exist_ok=True)
        if 1.6 * size > (free := shutil.disk_usage(scratch).free):  # and half of it again in the file that is kept
            say(f"calib.means: expected {1.6 * size / 2 ** 30:.3g} GiB of disk in {scratch}, found {free / 2 ** 30:.3g}: going without")
            means, scratch = False, None
    with (threads_for(ckpt.dims.p, ckpt.dims.d), memory_kept(),
          tqdm(total=sum(-(-len(half) // at_once) for half in halves) * (1 + fisher) * layers, desc="calibrate", file=sys.stderr, leave=False) as line):
        found = [activation_moments(walk, half, at_once, fisher, cfg.fit.seed + i, line.update, means, scratch and scratch / str(i))
                 for i, half in enumerate(halves)]
    for kind, l, C in ((kind, l, C) for m in found for kind, parts in m.items() for l, C in parts.items()):
        expect(torch.isfinite(C).all(), f"{ckpt.dir}: expected finite moments in calibration, found NaN or Inf in layer {l} "
                                        f"({kind}): do sums overflow in {dtype}?")
    ridge = chosen_ridge(ckpt, found, cfg.bank.ratio or 0.6) if cfg.calib.shrink else None
    moments = found[0]
    for other in found[1:]:
        for kind, parts in moments.items():
            for l, C in parts.items():
                C.lerp_(other[kind][l], len(halves[1]) / len(windows))
    if cfg.calib.shrink:
        say(f"shrinkage of the covariances: {ridge} of their mean diagonal (calib.shrink)")
        moments["ridge"] = {l: torch.tensor(ridge, dtype=torch.float64) for l in moments["inputs"]}
    moments["windows"] = {0: windows}  # what the refinement behind the fit works on
    if cfg.calib.save:
        save_moments(Path(cfg.calib.save), moments, ckpt.fingerprint())
    return moments


def kept_moments(ckpt: Checkpoint, cfg: Config, device: torch.device, run: Path, resume: bool) -> dict:
    """The calibration's moments, by way of a file in the run's state: a resumed fit, and every rank, takes them from there."""
    path, calib = run / "state" / "moments.st", json.dumps(dataclasses.asdict(cfg.calib), sort_keys=True)
    tag = f"{ckpt.fingerprint()} {hashlib.sha256(calib.encode()).hexdigest()[:16]} {cfg.model.families}"
    if not ranks()[0]:
        with contextlib.suppress(UserError):  # of other settings
            if resume and path.is_file():
                return load_moments(path, ckpt, tag)
        scratch = run / "state" / "means"
        moments = calibrate(ckpt, cfg, device, scratch)
        save_moments(path, {k: v for k, v in moments.items() if k != "hidden" or "down" in families_of(cfg.model)}, tag)
        shutil.rmtree(scratch, ignore_errors=True)
    return load_moments(path, ckpt, tag)


PASS_RATE = 0.6  # of the machine's product rate, which a whole pass reaches (bench.py fit --preset qwen15)


def flops_per_pass(n: int, m: int, r: int, D: Dims, right: bool, means: bool = False) -> float:
    """Floating-point operations of one pass of varpro over n experts; right: with a metric that the bank has not absorbed;
    means: with the rows' mean inputs."""
    p, d = D.p, D.d
    products = 4 * p * r * d + 4 * r * r * d + 2 * r * r * p + 2 * r * d * d * right  # V X^T, A^T V; K, P X C; A^T A; X C
    products += (2 * p * r * d + 2 * r * r * p) * means
    return n * (products + r ** 3 / 3 + 2 * r * r * p + 6 * m * r * d + 2 * m * r * r)  # ... solve; compose and back


def fit_needs(cfg: Config, n: int, layers: int, m: int, r: int, groups: int, D: Dims, budget: float, numbers: int, size: int,
              means: bool = False) -> tuple:
    """(bytes of memory, bytes on disk) of the fit of one job of n experts that stores `numbers` of `size` bytes."""
    bank, data = 4 * groups * m * r * D.d, cfg.fit.metric == "data"
    pairs, experts, metrics = 2 * cfg.fit.memory * bank, 4 * n * D.p * D.d * (1 + means), 8 * layers * D.d ** 2 * data
    spill, stream = pairs > budget / 4, experts > budget / 4
    batch = cfg.fit.batch or batch_for(budget, D.p, D.d)
    batch = min(batch, -(-n // layers))
    at_once = 4 * batch * ((2 + 2 * means) * D.p * D.d + 4 * r * D.d + (2 + 2 * means) * D.p * r + 4 * r * r)
    memory = 6 * bank + 8 * groups * m * r * r + at_once + (not spill) * (pairs + metrics) + (not stream) * experts
    return memory, bank + pairs + stream * data * 4 * n * D.p * D.d + 6 * n * D.p * D.d * means + spill * (metrics // 2 + numbers * size) + numbers * size


def plan_fit(cfg: Config, ckpt: Checkpoint, keys: list, jobs: list, shapes: dict, groups: int, device: torch.device) -> dict:
    """What a fit will do and need, from the headers alone, and its time from five seconds of matrix products."""
    D, layers = ckpt.dims, len({l for l, _ in keys})
    right = cfg.fit.metric == "data" and not (cfg.bank.activation == "identity" and groups == layers)
    size, total, rows, work, held, disk = ckpt.dtype.itemsize, ckpt.num_parameters(), [], 0.0, 0, 0
    stored = dense = 0
    for job, (name, (m, r)) in zip(jobs, shapes.items()):
        n = len(job) * len(keys)
        numbers = n * D.p * r + groups * m * r * D.d + 2 * n * min(cfg.sparsity.support, m) + 2 * len(job)
        means = cfg.fit.metric == "data" and cfg.calib.means and "down" not in job
        memory, files = fit_needs(cfg, n, layers, m, r, groups, D, fit_budget(cfg, device), numbers, size, means)
        work, held, disk = work + flops_per_pass(n, m, r, D, right and "down" not in job, means), max(held, memory + 2 ** 29), disk + files
        stored, dense = stored + numbers, dense + n * D.p * D.d
        rows.append((name, n, m, r, numbers / (n * D.p * D.d)))
    if cfg.fit.metric == "data" and (cfg.fit.refine or cfg.fit.down):  # the refinement: what it starts from, what it makes, and the end
        down = (cfg.fit.down and "down" not in families_of(cfg.model)) * (len(keys) + layers * D.shared) * D.p * D.d
        disk += size * (stored + sum(n * D.p * r for name, n, _, r, _ in rows if cfg.fit.refine or "down" in name) + 2 * down)
    a, b, done = torch.randn(8, D.p, D.d, device=device), torch.randn(8, D.d, D.p, device=device), 0
    with threads_for(D.p, D.d, cfg.fit.dtype):
        begin = time.perf_counter()
        while time.perf_counter() - begin < 5:
            a @ b
            synchronize(device)
            done += 1
        rate = done * 16 * D.p * D.p * D.d / (time.perf_counter() - begin)
    seconds = work * (cfg.fit.steps + 2) / (PASS_RATE * rate)  # a pass to prepare, a pass for the last adapters
    after = (total - dense + stored) * size
    say(text_table(("families", "experts", "m", "r", "ratio"), rows))
    say(f"model {total * size / 2 ** 30:.3g} -> {after / 2 ** 30:.3g} GiB; memory of the fit about {held / 2 ** 30:.3g} GiB, disk about "
        f"{disk / 2 ** 30:.3g} GiB; {work:.3g} operations a pass at {PASS_RATE * rate / 1e9:.3g} GFLOP/s, "
        f"{cfg.fit.steps} steps in about {seconds / 60:.3g} minutes, calibration and refinement not counted")
    return {"dry_run": True, "families": list(families_of(cfg.model)), "r": {row[0]: row[3] for row in rows}, "ratio": stored / dense,
            "model_ratio": (total - dense + stored) / total, "bytes_dense": total * size, "bytes": after, "memory_bytes": int(held),
            "disk_bytes": int(disk), "flops_per_pass": work, "flops_per_second": PASS_RATE * rate, "seconds": round(seconds, 1)}


def cmd_fit(args: argparse.Namespace) -> dict:
    begin = time.perf_counter()
    out = Path(args.out) if args.out else newest_run(finished=False) if args.resume else None
    cfg = run_config(out, args) if args.resume and out.exists() else load_config(args.config, args.overrides)
    device = pick_device(args.device or cfg.fit.device)
    cfg.fit.dtype = str(as_dtype(args.dtype) or cfg.fit.dtype).removeprefix("torch.")
    if args.print_config:
        print(yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False), end="")
        return dataclasses.asdict(cfg)
    with joined_ranks(device):
        return fit_joined(args, cfg, out, device, begin)


def fit_joined(args: argparse.Namespace, cfg: Config, out: Path | None, device: torch.device, begin: float) -> dict:
    """What every rank does of `fit`."""
    with first_rank_first():
        ckpt = open_model(cfg, device)
    fit_memory(cfg, ckpt)
    D, families, keys = ckpt.dims, families_of(cfg.model), select_experts(ckpt.dims, cfg.model)
    groups = len(set(Experts.groups_of(keys, cfg.bank.scope).values()))
    jobs = [(f,) for f in families]  # each a tuple of families that are fitted as one
    if cfg.bank.share and len(families) > 1:  # gate and up on one bank
        jobs[:2] = [("gate", "up")]
    shapes = {"+".join(job): bank_shape(cfg, job[0], len(job) * len(keys), groups, D) for job in jobs}
    if args.dry_run:
        return plan_fit(cfg, ckpt, keys, jobs, shapes, groups, device)
    if cfg.calib.save:
        fresh(Path(cfg.calib.save), args.overwrite or args.resume, ckpt.dir)
    if out is None:
        out = first_rank_says(new_run(cfg) if not ranks()[0] else None)
    elif not first_rank_says(args.resume and (out / "config.yaml").is_file()):
        with first_rank_first():
            if not ranks()[0]:
                fresh(out, args.overwrite, ckpt.dir, clear=True)
    say(f"{ckpt.config['model_type']}: {len(keys)} experts of {D.p} x {D.d} in {len(set(l for l, _ in keys))} layers; families {', '.join(families)}")
    for f, (m, r) in shapes.items():
        say(f"  {f}: {groups} bank{'s' * (groups > 1)} of {m} bases of {r} x {D.d}, support at most {cfg.sparsity.support}")
    with discarded_on_error(out):
        return fit_run(args, cfg, ckpt, jobs, shapes, keys, out, device, begin)


@contextlib.contextmanager
def discarded_on_error(out: Path) -> Iterator[None]:
    """Remove a run that failed before it had saved any state, and the directories made for it."""
    before = [p for p in (out, *out.parents) if p.is_dir() and (p != out or any(p.iterdir()))]
    try:
        yield
    except (UserError, OSError, SafetensorError):
        if not ranks()[0] and out not in before and not list(out.glob("state/*.safetensors")):
            shutil.rmtree(out, ignore_errors=True)
            for parent in out.parents:
                with contextlib.suppress(OSError):
                    parent.rmdir() if parent not in before or parent == Path("runs") else None
        raise


def fit_run(args: argparse.Namespace, cfg: Config, ckpt: Checkpoint, jobs: list, shapes: dict, keys: list, out: Path, device: torch.device,
            begin: float) -> dict:
    """The fit itself, in the run directory `out`."""
    D, moments, fitted = ckpt.dims, {}, {}
    with first_rank_first():
        if not ranks()[0]:
            for left in out.rglob(".*.tmp[0-9]*"):  # a killed run's unfinished files
                left.unlink()
            write_text(out / "config.yaml", yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False))
        if cfg.fit.metric == "data":
            moments = kept_moments(ckpt, cfg, device, out, args.resume)
    if not moments:
        say("no calibration (fit.metric=weights): every input direction counts the same")
    log = Log(out / "log.jsonl", cfg, out.name)
    with held_interrupt() as stop, threads_for(D.p, D.d, cfg.fit.dtype):
        for job, shape in zip(jobs, shapes.values()):
            factors = fit_family(job, shape, ckpt, keys, cfg, moments, device, out, log, stop.is_set)
            if factors is None:
                raise KeyboardInterrupt(f"state saved; go on with: python globe.py fit --resume --out {out}")
            fitted |= factors
    log.close()
    if ranks()[0]:
        return {}
    kept = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("log", "train", "eval", "heal")}
    kept["calib"]["text"] = Path(cfg.calib.text).name
    kept["model"] = {k: v for k, v in kept["model"].items() if k not in ("path", "force_download")}
    factors = Factors(fitted, {l: [e for k, e in keys if k == l] for l in dict.fromkeys(l for l, _ in keys)}, D,
                      ckpt.config["model_type"], ckpt.fingerprint(), kept)
    asked, scratch, source = moments and (cfg.fit.refine or cfg.fit.down), out / "state" / "refined", cfg.calib.load or out / "state" / "moments.st"
    (out / "refined.json").unlink(missing_ok=True)
    if asked and "windows" not in moments:
        say(f"{source} was saved without the calibration's windows: no refinement (fit.refine, fit.down)")
    elif asked:
        scratch.mkdir(parents=True, exist_ok=True)
        save_factors(factors, scratch / "factors.safetensors")  # the run is not finished yet
        del fitted
        factors = load_factors(scratch)
        try:
            with threads_for(D.p, D.d), memory_kept():
                lost = refine(ckpt, factors, moments["windows"][0], cfg, device, scratch)
        except (KeyboardInterrupt, OSError, Diverged, UserError) as e:
            raise type(e)(f"{one_line(e) or 'refinement: cut short'}; the fit is saved, go on with: python globe.py fit --resume --out {out} "
                          "(without a refinement: fit.refine=0 fit.down=false)") from None
        write_text(out / "refined.json", json.dumps(lost))
        before, after = (math.sqrt(sum(row[k] ** 2 for row in lost) / len(lost)) for k in ("before", "after"))
        say(f"refined: relative error of the layers' outputs {before:.4f} -> {after:.4f}")
    save_factors(factors, out / "factors.safetensors")
    if scratch.exists():
        factors = load_factors(out)
        shutil.rmtree(scratch)
    rel_frob = {f: e["all"] for f, e in reconstruction(ckpt, factors).items()}
    support = {f: float(fam.support().float().median()) for f, fam in factors.families.items()}
    say(text_table(("family", "relative Frobenius error", "median support", "m", "r"),
                   [(f, rel_frob[f], support[f], *fam.bank[0].shape[:2]) for f, fam in factors.families.items()]))
    result = {"factors": str(out), "ratio": factors.ratio(), "model_ratio": factors.model_ratio(ckpt.num_parameters()), "rel_frob": rel_frob,
              "support": support, "steps": cfg.fit.steps, "seconds": round(time.perf_counter() - begin, 1), "peak_rss_gib": round(peak_rss_gib(), 2)}
    for left in (*out.glob("state/*/[AL]-*.safetensors"), *out.glob("state/*/rank-*")):  # adapters may lie there until here
        left.unlink() if left.is_file() else shutil.rmtree(left)
    return result


def cmd_sweep(args: argparse.Namespace) -> dict:
    """fit; over a grid where an override holds several values (bank.m=64,128) or the YAML file says sweep: {key: [values]}.
    One run per combination below --out, one table at the end; a combination that is finished is not fitted again."""
    several = re.compile(r"(?!model\.path|calib\.|eval\.|train\.|log\.)([\w.]+)=([^\[{'\",]*,[^\[{'\"]*)")
    plain = [o for o in args.overrides if not several.fullmatch(o)]
    grid = load_config(args.config, plain).sweep | {m[1]: m[2].split(",") for o in args.overrides if (m := several.fullmatch(o))}
    if not grid or args.print_config or args.dry_run:
        return cmd_fit(args)
    expect(int(os.environ.get("WORLD_SIZE", 1)) <= 1, "a grid: expected one process, found torchrun; fit one combination at a time there")
    base, rows = Path(args.out) if args.out else new_run(Config(model=ModelConfig(path="sweep"))), []
    if args.overwrite:
        source = Path(load_config(args.config, plain).model.path)
        fresh(base, True, source if source.is_dir() else None, clear=True)
    combinations = [(values, [*plain, *(f"{k}={v}" for k, v in zip(grid, values))]) for values in itertools.product(*grid.values())]
    for _, settings in combinations:
        load_config(args.config, settings)  # an unknown key or a wrong value stops the sweep before its first fit
    for values, settings in combinations:
        out = base / "-".join(f"{k.rpartition('.')[2]}={v}" for k, v in zip(grid, values))
        if not (out / "fit.json").is_file():
            say(f"{len(rows) + 1} of {len(combinations)}: {out}")
            result = cmd_fit(argparse.Namespace(**vars(args) | {"out": str(out), "overrides": settings, "resume": True}))
            write_text(out / "fit.json", json.dumps({"settings": settings, **result}))
        rows.append(dict(zip(grid, values)) | read_json(out / "fit.json"))
        if rows[-1].pop("settings", None) != settings or not {"ratio", "model_ratio", "seconds", "rel_frob"} <= set(rows[-1]):
            raise UserError(f"{out}: fitted with other settings; choose another --out or add --overwrite")
    columns = [*grid, "ratio", "model_ratio", "seconds"]
    say(text_table([*columns, *(f"error {f}" for f in rows[0]["rel_frob"])],
                   [(*(r[c] for c in columns), *r["rel_frob"].values()) for r in rows]))
    return {"sweep": str(base), "rows": rows}


def open_run(args: argparse.Namespace) -> tuple:
    """(run directory, its config, its factors, its source checkpoint, device, dtype); the newest run without --factors."""
    path = Path(args.factors) if args.factors else newest_run()
    run, factors = path.parent if path.is_file() else path, load_factors(path)
    cfg = run_config(run, args)
    if getattr(args, "model", None):
        cfg.model.path = args.model
    device = pick_device(args.device)
    ckpt = open_model(cfg, device)
    check_fingerprint(factors, ckpt)
    expect(args.dtype != "float64", "--dtype: expected float32, bfloat16 or float16, found float64")
    return run, cfg, factors, ckpt, device, as_dtype(args.dtype) or ckpt.dtype


def cmd_eval(args: argparse.Namespace) -> dict:
    run, cfg, factors, ckpt, device, dtype = open_run(args)
    tokenizer = load_tokenizer(ckpt.dir)
    where, stride, run_tasks = args.text or cfg.eval.text, cfg.eval.stride, task_runner(args.tasks or (), tokenizer, cfg.eval.context)
    windows = ckpt.known(token_windows(tokenizer, read_text(where, "heldout"), cfg.eval.tokens, cfg.eval.length, stride))
    errors = reconstruction(ckpt, factors)
    layers = list(factors.experts)
    say(text_table(("family", "all layers", *(f"layer {l}" for l in layers)),
                   [(f, e["all"], *(e[l] for l in layers)) for f, e in errors.items()]))

    def measure(model: nn.Module, what: str) -> tuple:
        return *nll(model, windows, progress=bar(what), stride=stride), run_tasks(model, bar(what))
    dense, tokens, dense_tasks = measure(load_dense(ckpt.dir, device, dtype), "dense")
    ours, _, tasks = measure(assemble(ckpt, factors, device, dtype, cfg.cache), "globe")
    ratio, model_ratio = factors.ratio(), factors.model_ratio(ckpt.num_parameters())
    say(text_table(("model", "perplexity", "nats per token", "experts' size", "model size"),
                   [("dense", math.exp(dense), dense, 1.0, 1.0), ("GloBE", math.exp(ours), ours, ratio, model_ratio)]))
    result = {"ppl_dense": math.exp(dense), "ppl": math.exp(ours), "delta_nats": ours - dense, "tokens": tokens,
              "ratio": ratio, "model_ratio": model_ratio, "rel_frob": {f: e["all"] for f, e in errors.items()}}
    if args.tasks:
        result["tasks"] = {t: {k: {"dense": dense_tasks[t][k], "globe": v} for k, v in row.items()} for t, row in tasks.items()}
        say(text_table(("task", "dense", "GloBE"), [(f"{t} {k}", *v.values()) for t, row in result["tasks"].items() for k, v in row.items()]))
    kept = read_evals(run)
    with contextlib.suppress(PermissionError):  # a run of somebody else's: nothing is kept for the card
        write_text(run / "eval.json", json.dumps(kept | {where if ":" in where else Path(where).name: result}, indent=2))
    return result | {"factors": str(run)}


def cmd_export(args: argparse.Namespace) -> dict:
    run, cfg, factors, ckpt, device, _ = open_run(args)
    dtype = as_dtype(args.dtype or cfg.export.dtype) or ckpt.dtype
    to = fresh(Path(args.to) if args.to else run / "export", args.overwrite or not args.to, ckpt.dir)
    expect(not args.to or to.resolve() not in (run.resolve(), *run.resolve().parents), f"{to}: expected a directory that does not hold the run {run}")
    evals = read_evals(run)
    with written(to) as tmp:
        tmp.mkdir()
        if args.format == "dense":
            export_dense(ckpt, factors, tmp, bar("export"))
        else:
            export_globe(ckpt, factors, tmp, args.format == "composed", dtype)
        error = None if args.no_check else logit_error(ckpt, factors, tmp, args.format, device, dtype)
        base = next((n for n in (cfg.model.path, ckpt.config.get("_name_or_path") or "") if n == "tiny" or not Path(n).exists() and
                     re.fullmatch(r"[\w.-]+/[\w.-]+", n)), ckpt.dir.name)
        write_text(tmp / "README.md", model_card(ckpt, factors, args.format, base, weight_bytes(tmp), evals))
        shutil.rmtree(to, ignore_errors=True)
    if args.push_to_hub:
        push(to, args.push_to_hub, not args.public)
    return {"path": str(to), "format": args.format, "bytes": weight_bytes(to), "bytes_dense": weight_bytes(ckpt.dir),
            "max_logit_error": error}


def push(directory: Path, repo: str, private: bool) -> None:
    """Upload an export to the hub, into a repository made on demand; UserError with the hub's own reason."""
    from huggingface_hub import HfApi
    try:
        HfApi().create_repo(repo, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=str(directory), commit_message=f"GloBE {__version__}")
    except Exception as e:  # no token, no network, no such organisation: the hub's reason is the useful part
        raise UserError(f"--push-to-hub {repo}: the export is in {directory}, but the hub did not take it: {type(e).__name__}: "
                        f"{(str(e).splitlines() or [''])[0]}") from None


@torch.no_grad()
def logit_error(ckpt: Checkpoint, factors: Factors, export: Path, kind: str, device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference of logits between the export, loaded afresh, and the patched model, on 64 tokens."""
    ids = sample_ids(ckpt).to(device)
    dtype = ckpt.dtype if kind == "dense" else dtype
    want = assemble(ckpt, factors, device, dtype)(ids).logits.float()
    model = load_dense(export, device, dtype) if kind == "dense" else load(export, device, dtype)
    return float((model(ids).logits.float() - want).abs().max())


def cmd_report(args: argparse.Namespace) -> dict:
    run, cfg, factors, ckpt, device, dtype = open_run(args)
    errors, rows = reconstruction(ckpt, factors), read_rows(run / "log.jsonl")
    shares, hits = routing(assemble(ckpt, factors, device, dtype, cfg.cache), sample_ids(ckpt))
    sizes = {d: read_evals(Path(d)) or read_json(Path(d) / "eval.json") for d in (str(run), *args.runs)} if args.runs else {}
    paths = plot_report(run, rows, errors, factors, shares, hits, sizes)
    routes = text_table(("layer", "share of the top quarter", "experts not used", "hit rate"), [
        (l, float(x[:-(-len(x) // 4)].sum()), int((x == 0).sum()), hits[l]) for l, x in shares.items()])
    if sizes:
        routes += "\n\n## Quality against size\n\n" + text_table(("run", "text", "ratio", "model size", "perplexity", "nats lost"), [
            (Path(d).name, t, e["ratio"], e["model_ratio"], e["ppl"], e["delta_nats"]) for d, es in sizes.items() for t, e in es.items()])
    layers = list(factors.experts)
    by_layer = text_table(("layer", *errors), [(l, *(e[l] for e in errors.values())) for l in ("all", *layers)])
    ranks = text_table(("family", "effective rank of A", "norm of A", "effective rank of B~", "norm of B~"),
                       [(f, *s.values()) for f, s in spectra(factors).items()])
    text = (f"# {run.name}\n\nratio {factors.ratio():.4f} of the compressed families, "
            f"{factors.model_ratio(ckpt.num_parameters()):.4f} of the model\n\n## Relative Frobenius error\n\n{by_layer}\n\n"
            f"## Spectra\n\n{ranks}\n\n## Routing and cache, 64 tokens decoded\n\n{routes}\n\n" + "".join(f"![{p.stem}]({p.name})\n" for p in paths))
    write_text(run / "report.md", text)
    say(text)
    return {"report": str(run / "report.md"), "plots": [str(p) for p in paths]}


def cmd_info(args: argparse.Namespace) -> dict:
    """What a directory is (checkpoint, run or export) and how large."""
    path, meta = Path(args.directory), {}
    if (path / "factors.safetensors").is_file() or path.is_file():
        factors = load_factors(path)
        out, meta = {"kind": "run", "ratio": factors.ratio()}, factors.meta()
    elif (path / "config.yaml").is_file():
        out = {"kind": "unfinished run", "steps": (read_rows(path / "log.jsonl") or [{}])[-1].get("step", 0)}
    elif (quantized := globe_meta(read_json(path / "config.json"))):
        meta = check_meta(quantized, str(path))
        out = {"kind": "composed export" if meta.get("composed") else "globe export", "bytes": weight_bytes(path)}
    else:
        ckpt = Checkpoint(path)
        out = {"kind": "checkpoint", "model_type": ckpt.config["model_type"], "parameters": ckpt.num_parameters(), "dtype": str(ckpt.dtype),
               "bytes": weight_bytes(path), **dataclasses.asdict(ckpt.dims), "fingerprint": ckpt.fingerprint()}
    if meta:
        out |= {k: meta.get(k) for k in ("model_type", "globe_version", "fingerprint")} | meta["dims"]
        out |= {f: ", ".join(f"{k} {v}" for k, v in F_.items() if k != "group") for f, F_ in meta["families"].items()}
    say(text_table(("", args.directory), [(k, one_line(v) if isinstance(v, str) else v) for k, v in out.items()]))
    return out


def cmd_heal(args: argparse.Namespace) -> dict:
    with joined_ranks(pick_device(args.device)):
        return heal_joined(args)


def heal_joined(args: argparse.Namespace) -> dict:
    """What every rank does of `heal`."""
    begin, out = time.perf_counter(), Path(args.out)
    resumed = first_rank_says(args.resume and (out / "config.yaml").is_file())
    with first_rank_first():  # which trains the tiny model where it is not there
        run, cfg, factors, ckpt, device, _ = open_run(args)
    if resumed:
        cfg = run_config(out, args)
    if out.resolve() in (run.resolve(), *run.resolve().parents):
        raise UserError(f"--out {out}: expected another directory than --factors, and none that holds it")
    dtype = compute_dtype(with_gradients(as_dtype(args.dtype or cfg.calib.dtype) or ckpt.dtype), device)
    with first_rank_first():
        if not ranks()[0]:
            for left in (out / "state").glob("*.bin") if resumed else ():  # of ranks that may be no more
                left.unlink()
            if not resumed:
                fresh(out, args.overwrite, ckpt.dir, clear=True)
    cfg.heal.stack = stack_size(cfg, ckpt, device, dtype)  # kept in config.yaml: a resumed run may find other memory
    with discarded_on_error(out):
        windows = calibration_windows(ckpt, cfg, device, cfg.heal.tokens)
        if not ranks()[0]:
            write_text(out / "config.yaml", yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False))
        log = Log(out / "log.jsonl", cfg, out.name)
        L = ckpt.config["num_hidden_layers"]
        with (held_interrupt() as stop, threads_for(ckpt.dims.p, ckpt.dims.d), memory_kept(),
              tqdm(desc="heal", file=sys.stderr, dynamic_ncols=True, leave=False, delay=1, disable=ranks()[0] > 0) as line):
            def progress(row: dict) -> None:
                log.row(row | {"seconds": round(time.perf_counter() - begin, 1)})
                line.update(1)
                line.set_postfix_str(f"layer {row['layer']} of {L}, step {row['step']}, loss {row['loss']:.4f}")
            try:
                rows = heal(ckpt, factors, windows, cfg, out / "state", device, dtype, progress, lambda: any_rank(stop.is_set()))
            except (KeyboardInterrupt, Lost) as e:
                raise type(e)(f"{e}; go on with: python globe.py heal --resume --factors {run} --out {out}") from None
        log.close()
        for file in (out / "state").glob(f"*-{ranks()[0]}.bin"):
            file.unlink()
    if ranks()[0]:
        return {}
    save_factors(factors, out / "factors.safetensors")
    say(text_table(("layers", "held-out loss before", "after"), [(f"{a}..{b}", r["before"], r["after"]) for r in rows for a, b in [r["layers"]]]))
    return {"factors": str(out), "ratio": factors.ratio(), "model_ratio": factors.model_ratio(ckpt.num_parameters()), "stacks": rows,
            "healed": sum(r["after"] < r["before"] for r in rows), "seconds": round(time.perf_counter() - begin, 1),
            "peak_rss_gib": round(peak_rss_gib(), 2)}


def cmd_train(args: argparse.Namespace) -> dict:
    cfg = load_config(args.config, args.overrides)
    if args.print_config:
        print(yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False), end="")
        return dataclasses.asdict(cfg)
    if args.dtype:
        cfg.train.autocast = args.dtype
    to, source = Path(args.to), Path(cfg.train.dense_from or "")
    if not (args.resume and any((to / name).is_file() for name in ("state/train.safetensors", "train.json"))):
        fresh(to, args.overwrite, source if cfg.train.dense_from and source.is_dir() else None, clear=True)
    with discarded_on_error(to):
        return {"path": str(to)} | run_train(cfg, to, pick_device(args.device), args.resume)


@torch.no_grad()
def cmd_generate(args: argparse.Namespace) -> dict:
    run, cfg, factors, ckpt, device, dtype = open_run(args)
    if not args.max_new_tokens > 0 or args.temperature and not 0.01 <= args.temperature <= 100:
        raise UserError(f"expected --max-new-tokens above 0 and --temperature 0 or from 0.01 to 100, found {args.max_new_tokens} and {args.temperature}")
    if any("\ud800" <= c < "\ue000" for c in args.prompt):  # what Python makes of bytes that are not UTF-8
        raise UserError("--prompt: expected UTF-8 text, found other bytes")
    tokenizer, n = load_tokenizer(ckpt.dir), cfg.cache.warmup_tokens
    ids = tokenizer(args.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(device)
    expect(ids.shape[1], "--prompt: expected some text, found none")
    first = ckpt.known(token_windows(tokenizer, read_text(cfg.calib.text, "calibration"), n, n)) if n > 1 else None
    ckpt.known(ids)
    model = assemble(ckpt, factors, device, dtype, cfg.cache)
    warm(model, first)
    begin = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.max_new_tokens, num_beams=1,
                         do_sample=args.temperature > 0, **({"temperature": args.temperature} if args.temperature > 0 else {}),
                         pad_token_id=tokenizer.pad_token_id or 0)
    synchronize(device)
    seconds, new = time.perf_counter() - begin, out.shape[1] - ids.shape[1]
    text = tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)
    say(args.prompt + text)
    return {"text": text, "new_tokens": new, "tokens_per_second": round(new / seconds, 2)} | cache_stats(model)


COMMANDS = {
    "fit": (cmd_sweep, "compress the experts of a model into factors", """\
examples:
  python globe.py fit                                       a tiny model, trained on first use
  python globe.py fit --config configs/qwen15.yaml --out runs/qwen
  python globe.py fit model.path=DIR bank.ratio=0.6 fit.steps=200
  python globe.py fit model.path=DIR bank.memory=18GiB --dry-run
  python globe.py fit bank.m=8,16 sparsity.support=4,8      every combination, one table; --out DIR goes on where it stopped
  python globe.py fit --resume --out runs/qwen              go on where a stopped run was saved"""),
    "eval": (cmd_eval, "reconstruction and perplexity, dense beside GloBE", """\
examples:
  python globe.py eval                                      the newest run, built-in held-out text
  python globe.py eval --factors runs/qwen --text book.txt eval.tokens=100000 eval.length=2048 eval.stride=512
  python globe.py eval --tasks builtin                      and a zero-shot task that needs no download"""),
    "export": (cmd_export, "write a checkpoint", """\
examples:
  python globe.py export                                    the newest run, into RUN/export, format globe
  python globe.py export --factors runs/qwen --to qwen-dense --format dense
  python globe.py export --factors runs/qwen --push-to-hub me/qwen-globe"""),
    "report": (cmd_report, "tables and PNG plots of a run", "example:\n  python globe.py report --factors runs/tiny-001"),
    "info": (cmd_info, "what a directory is: checkpoint, run or export", "example:\n  python globe.py info runs/tiny-001"),
    "train": (cmd_train, "train a small Qwen2-MoE, from scratch or upcycled from a dense model", """\
examples:
  python globe.py train --to models/tiny
  python globe.py train --to models/up train.dense_from=DIR train.moe_steps=500"""),
    "heal": (cmd_heal, "recover quality after the fit: train the factors against the dense model, stack by stack", """\
examples:
  python globe.py heal --factors runs/tiny-001 --out runs/tiny-001-healed
  python globe.py heal --factors runs/qwen --out runs/qwen-healed heal.stack=1 heal.steps=100      one layer in memory at a time
  python globe.py heal --resume --factors runs/qwen --out runs/qwen-healed                         go on where it stopped"""),
    "generate": (cmd_generate, "write text with the compressed model", """\
example:
  python globe.py generate --factors runs/tiny-001 --prompt "def main(" """),
}


ANY, FITTED = tuple(COMMANDS), ("eval", "export", "report", "heal", "generate")
OPTIONS = (  # (commands, option, what argparse is told of it)
    (("info",), "directory", dict(metavar="DIR", help="checkpoint, run (or its factors file) or export")),
    (ANY, "overrides", dict(nargs="*", metavar="section.key=value", help="config values; they win over --config")),
    (ANY, "--config", dict(metavar="YAML", help="config file; see configs/")),
    (ANY, "--device", dict(help="auto (default), cpu, cuda, cuda:N or mps")),
    (ANY, "--dtype", dict(help="float32, bfloat16 or float16; default: the checkpoint's (fit: fit.dtype; heal: calib.dtype)")),
    (("fit", "train", "heal"), "--resume", dict(action="store_true", help="go on from the saved state; starts afresh where there is none")),
    (("fit", "train"), "--print-config", dict(action="store_true", help="show the resolved config and stop")),
    (("fit", "train", "heal", "export"), "--overwrite", dict(action="store_true", help="replace an output that exists")),
    (FITTED, "--factors", dict(metavar="DIR", help="run directory; default: the newest below ./runs")),
    (FITTED, "--model", dict(metavar="M", help="source checkpoint, where it is no longer at the run's model.path")),
    (("fit",), "--out", dict(metavar="DIR", help="run directory; default: a fresh runs/NAME-NNN")),
    (("fit",), "--dry-run", dict(action="store_true", help="say what would be done, its sizes, memory and time; write nothing")),
    (("eval",), "--text", dict(metavar="FILE", help="text to measure perplexity on; default: built-in held-out files")),
    (("eval",), "--tasks", dict(nargs="+", metavar="NAME", help="builtin, or tasks of lm-eval (names, or YAML files)")),
    (("heal",), "--out", dict(metavar="DIR", required=True, help="the healed run's directory")),
    (("export",), "--to", dict(metavar="DIR", help="where to; default: RUN/export")),
    (("export",), "--format", dict(choices=("globe", "dense", "composed"), default="globe")),
    (("export",), "--push-to-hub", dict(metavar="ORG/NAME", help="upload it too, into a private repository")),
    (("export",), "--public", dict(action="store_true", help="... into a public one")),
    (("export",), "--no-check", dict(action="store_true", help="do not load the export and compare its logits")),
    (("train",), "--to", dict(metavar="DIR", required=True, help="where the checkpoint goes")),
    (("report",), "--runs", dict(nargs="+", default=(), metavar="DIR", help="other evaluated runs, to plot quality against size")),
    (("generate",), "--prompt", dict(required=True)),
    (("generate",), "--max-new-tokens", dict(type=int, default=64)),
    (("generate",), "--temperature", dict(type=float, default=0.0, help="0: greedy")),
)


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="globe.py", description="GloBE: shrink the experts of a Mixture-of-Experts model.", formatter_class=raw,
                                     epilog="example:\n  python globe.py fit && python globe.py eval && python globe.py export")
    parser.add_argument("--version", action="store_true", help="version, torch, and which operators are in use")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (run, text, examples) in COMMANDS.items():
        p = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=examples, formatter_class=raw)
        p.set_defaults(run=run)
        for names, option, about in OPTIONS:
            if name in names:
                p.add_argument(option, **about)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options and section.key=value overrides in any order (argparse alone refuses overrides after an option)."""
    args, rest = build_parser().parse_known_args(argv)
    odd = [a for a in rest if a.startswith("-") or "=" not in a or not hasattr(args, "overrides")]
    if odd:
        build_parser().error(f"unrecognized arguments: {' '.join(odd)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    if getattr(args, "tasks", None):  # --tasks takes all that follows it
        args.overrides += [t for t in args.tasks if "=" in t]
        args.tasks = [t for t in args.tasks if "=" not in t]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 wrong input, 130 stopped with the state saved."""
    try:
        args = parse(argv)
    except SystemExit as e:
        return int(e.code or 0)
    if args.version:
        print(json.dumps({"globe": __version__, "torch": torch.__version__, "operators": kernels()}))
        return 0
    if not args.command:
        build_parser().print_help(sys.stderr)
        return 2
    try:
        result = args.run(args)
    except (UserError, OSError, SafetensorError) as e:  # also a full disk, a place that cannot be written, a file that went away
        say(f"globe.py {args.command}: {one_line(e)}")
        return 2
    except (Diverged, Lost) as e:
        say(f"globe.py {args.command}: {f'diverged: {e}; the last good state is kept' if isinstance(e, Diverged) else e}")
        return 1
    except KeyboardInterrupt as e:
        say(f"globe.py {args.command}: stopped; {e}")
        return 130
    if result:  # every rank but the first has none
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
register_loader()  # imported, as a package or as remote code: from_pretrained knows GloBE from here on
