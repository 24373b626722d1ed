"""train.py: the networks that GloBE trains itself. It imports globe.py, which never imports it.

    p, d            moe_intermediate_size, hidden_size; an expert's matrix is W (p, d)
    E, k            experts of a layer, and how many of them a token gets (top-k)
    upcycling       a MoE model's experts begin as copies of a dense model's FFN (arXiv:2212.05055)
    virtual group   k experts that together are one copy of the FFN (arXiv:2410.07524)
    Muon            momentum whose singular values are moved near 1 (Jordan et al. 2024)
    stack           neighbouring decoder layers that heal trains together
    student         a stack's factors (adapters A, mixtures alpha, bases B) and norms, trainable
    W^              shift + scale * A . phi(sum_j alpha_j B_j), which takes an expert's place

Loss of tiny: cross-entropy in nats per token + aux_coef * load-balancing loss.
Loss of heal: (1 - w) * mean over tokens of |y - t|^2 / |t|^2 + w * KL(dense || healed) of the logits; y is
the healed stack's output on the healed model's own inputs, t the dense model's hidden state (block
reconstruction, arXiv:2102.05426; distillation, arXiv:1503.02531). torchrun's processes divide the windows.
Routed depth and the trainer of the Qwen2.5 family (command train) have their letters in section 7.
"""
from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import hashlib
import json
import math
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import globe
from globe import Checkpoint, Factors, LayerWalk, expect, ranks, say


# ---- 1. Config: sections tiny and heal beside those of globe.py ----------------------------------
@dataclass
class TinyConfig:
    """A small Qwen2-MoE: dense first, then upcycled and trained on. Lengths are in tokens."""
    hidden_size: int = 96                      # d
    layers: int = 4
    heads: int = 3
    kv_heads: int = 3
    experts: int = 16                          # E
    top_k: int = 4                             # k
    moe_intermediate_size: int = 96            # p
    shared_expert_intermediate_size: int = 96
    upcycle_noise: float = 0.6                 # of copies, relative to the weights' deviation
    dense_steps: int = 150
    moe_steps: int = 450
    batch: int = 8
    seq_len: int = 256
    lr: float = 5e-3
    warmup: int = 40
    weight_decay: float = 0.1
    clip: float = 1.0
    aux_coef: float = 0.01                     # of the load-balancing loss
    grad_checkpoint: bool = False
    dense_from: str | None = None              # a dense Qwen2 or Llama: upcycle it, no dense phase
    text: str | None = None                    # a utf-8 file; default: the standard library
    autocast: str = "auto"                     # auto | bf16 | fp16 | off; auto: bf16 on a GPU
    save_every: int = 200                      # steps between saved states; 0: only when stopped
    seed: int = 0

    def ffn_width(self) -> int:  # of the dense FFN that a token's experts are cut from
        return self.top_k * self.moe_intermediate_size + self.shared_expert_intermediate_size


@dataclass
class HealConfig:
    """Recovery after the fit. Text and windows are calib.text, calib.length and calib.batch."""
    stack: int | str = "auto"           # layers trained together; auto: all that fit, or one
    steps: int = 400                    # at most, per stack
    batch: int = 2                      # windows per step
    lr: float = 5e-4                    # size of a step relative to the tensor's own, at its peak
    warmup: int = 20
    tokens: int = 262144
    held_out: float = 0.05              # fraction of the windows that decides, never trained on
    check_every: int = 25               # steps between two looks at the held-out windows
    mean: float = 0.05                  # weight of a step in the running mean, which is kept
    patience: int = 4                   # looks in a row without a gain after which a stack is done
    logits_weight: float | None = None  # w; default: 1 where the stack is the model, else 0
    bank: str = "auto"                  # train | freeze | auto: where the stack has all its layers
    norms: bool = True                  # train the weights of the layers' norms too
    down: bool = True                   # and the refined down projections that the factors hold
    save_every: int = 50
    grad_checkpoint: bool = False       # activations computed again on the way back


@dataclass
class TrainConfig(globe.Config):
    tiny: TinyConfig = field(default_factory=TinyConfig)
    heal: HealConfig = field(default_factory=HealConfig)


CHOICES = {
    "heal.bank": ("auto", "train", "freeze"),
    "tiny.autocast": ("auto", "off", "bf16", "bfloat16", "fp16", "float16", "fp32", "float32"),
}
POSITIVE = ("tiny.hidden_size", "tiny.layers", "tiny.heads", "tiny.kv_heads", "tiny.experts", "tiny.top_k",
            "tiny.moe_intermediate_size", "tiny.batch", "tiny.lr", "tiny.clip", "heal.steps", "heal.batch",
            "heal.lr", "heal.tokens", "heal.check_every", "heal.patience", "heal.save_every")
NON_NEGATIVE = ("tiny.shared_expert_intermediate_size", "tiny.upcycle_noise", "tiny.dense_steps",
                "tiny.moe_steps", "tiny.warmup", "tiny.weight_decay", "tiny.aux_coef", "tiny.save_every",
                "tiny.seed", "heal.warmup")
FRACTIONS = ("heal.held_out", "heal.logits_weight", "heal.mean")


# cfg; UserError for values that no training could use
def checked(cfg: TrainConfig) -> TrainConfig:
    globe.check_ranges(cfg, CHOICES, POSITIVE, NON_NEGATIVE, FRACTIONS)
    t = cfg.tiny
    stack = cfg.heal.stack
    pairs = 2 * t.heads  # rotary embeddings turn pairs of numbers
    for fine, key, wanted, found in (
        (t.hidden_size % pairs == 0, "tiny.hidden_size", f"a multiple of 2 x heads = {pairs}", t.hidden_size),
        (t.heads % t.kv_heads == 0, "tiny.heads", f"a multiple of kv_heads = {t.kv_heads}", t.heads),
        (t.top_k <= t.experts, "tiny.top_k", f"at most tiny.experts = {t.experts}", t.top_k),
        (t.seq_len >= 2, "tiny.seq_len", "2 or more", t.seq_len),
        (stack == "auto" or type(stack) is int and stack > 0, "heal.stack", "auto or 1 and more", stack),
    ):
        expect(fine, f"{key}: expected {wanted}, found {found!r}")
    return cfg


# ---- 2. The dense start, and the MoE model upcycled from it --------------------------------------
@functools.cache
def byte_tokenizer():
    """A tokenizer whose ids 0..255 are the bytes of the UTF-8 text; 256 ends a text, 257 pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    ids = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>",
                                   pad_token="<|pad|>", clean_up_tokenization_spaces=False)


# (tokenizer, dense model): of cfg.dense_from, or new, the FFN as wide as a token's experts
def dense_start(cfg: TinyConfig) -> tuple:
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
    if cfg.dense_from:
        path = globe.resolve_model(cfg.dense_from)
        kind = globe.read_json(path / "config.json").get("model_type")
        expect(kind in ("qwen2", "llama"), f"tiny.dense_from {cfg.dense_from}: "
               f"expected model_type qwen2 or llama, found {kind!r}")
        tokenizer = globe.load_tokenizer(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
        return tokenizer, model
    tokenizer = byte_tokenizer()
    return tokenizer, Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=cfg.hidden_size, num_hidden_layers=cfg.layers,
        intermediate_size=cfg.ffn_width(), num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads,
        tie_word_embeddings=True, max_position_embeddings=4096, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


# of the dense model's config, what the MoE model takes over
KEPT = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
        "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "intermediate_size")


@torch.no_grad()
def upcycle(dense: nn.Module, cfg: TinyConfig, g: torch.Generator) -> nn.Module:
    """A Qwen2MoeForCausalLM that starts near the dense model's loss, built as Qwen1.5-MoE was."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
    old = dense.config
    kept = {key: getattr(old, key) for key in KEPT if getattr(old, key, None) is not None}
    # the config's proportions, at the width that the dense FFN has
    p = old.intermediate_size * cfg.moe_intermediate_size // cfg.ffn_width()
    moe = Qwen2MoeForCausalLM(Qwen2MoeConfig(
        **kept, moe_intermediate_size=p, num_experts=cfg.experts, num_experts_per_tok=cfg.top_k,
        shared_expert_intermediate_size=old.intermediate_size - cfg.top_k * p, norm_topk_prob=False,
        router_aux_loss_coef=cfg.aux_coef))
    # everything but the FFNs is the dense model's own; Llama has no biases, which begin as zeros
    weights = {name: w for name, w in dense.state_dict().items() if ".mlp." not in name}
    moe.load_state_dict(weights, strict=False)
    for layer, source in zip(moe.model.layers, dense.model.layers):
        fill_block(layer.mlp, source.mlp, layer.post_attention_layernorm.weight, cfg, g)
    return moe


# fill one MoE block from one dense FFN of width I; norm (d,) is the scale of the block's inputs
def fill_block(block: nn.Module, ffn: nn.Module, norm: Tensor, cfg: TinyConfig, g: torch.Generator):
    E, k, p = cfg.experts, cfg.top_k, block.experts.intermediate_dim
    gate, up, down = ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight.T  # (I, d) each
    d = gate.shape[1]
    # the router has one row per virtual group: at first a token's top-k is one whole group, the dense FFN;
    # rows of a group differ a little, so that its experts can part company
    groups = torch.randn(-(-E // k), d, generator=g)
    rows = groups[torch.arange(E) // k] + 0.1 * torch.randn(E, d, generator=g)
    # logits of about unit variance: decided, yet open to learning
    x = norm * torch.randn(2048, d, generator=g)
    router = rows / (x @ rows.T).std()
    mean_weight = (x @ router.T).softmax(-1).topk(k, dim=-1).values.mean()
    block.gate.weight.copy_(router)

    # the first k * p neurons are cut into k slices, which the experts copy in turns, with noise
    def experts(w: Tensor) -> Tensor:  # (I, d) -> (E, p, d)
        slices = w[:k * p].reshape(k, p, d)[torch.arange(E) % k]
        return slices + cfg.upcycle_noise * w.std() * torch.randn(E, p, d, generator=g)
    block.experts.gate_up_proj.copy_(torch.cat([experts(gate), experts(up)], 1))
    # a token's k weights sum to less than k, and the shared expert's gate starts at sigmoid(0) = 1/2:
    # both are undone in down
    block.experts.down_proj.copy_(experts(down).transpose(1, 2) / mean_weight)
    # the other neurons are the shared expert
    block.shared_expert.gate_proj.weight.copy_(gate[k * p:])
    block.shared_expert.up_proj.weight.copy_(up[k * p:])
    block.shared_expert.down_proj.weight.copy_(2 * down[k * p:].T)
    block.shared_expert_gate.weight.zero_()


# ---- 3. The optimiser, and what both trainers do alike -------------------------------------------
def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:  # (..., p, d) -> (..., p, d)
    """Each matrix with its singular values moved near 1: Newton-Schulz with Muon's coefficients."""
    if g.shape[-2] > g.shape[-1]:
        return orthogonalize(g.mT, steps).mT
    x = g / (torch.linalg.matrix_norm(g, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon(torch.optim.AdamW):
    """AdamW, but matrices (`parts` of them one below the other in a tensor) move by orthogonalised momentum.

    After a short run Adam's experts have a low rank: a plain SVD cuts them at no loss, too easy a test."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for w in group["params"] if group["parts"] else ():
                # Nesterov's momentum
                momentum = self.state[w].setdefault("exp_avg", torch.zeros_like(w)).lerp_(w.grad, 0.05)
                update = w.grad.lerp(momentum, 0.95).unflatten(-2, (group["parts"], -1))
                # the factor gives Muon and AdamW the same step size (Liu et al. 2025, arXiv:2502.16982)
                size = 0.2 * max(update.shape[-2:]) ** 0.5
                update = orthogonalize(update).mul_(size).flatten(-3, -2)
                # decoupled weight decay, then the step; nothing is left for AdamW to do
                w.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                w.grad = None
        return super().step(closure)


class Trainer:
    """Steps with a state on disk, from which they go on to the same bits.

    A subclass has its file `state`, `steps`, start(), which sets `kept` {kind: {name: tensor}} with the
    parameters as kind now and their optimizer, one_step() -> row, and in NUMBERS what else is saved."""
    step = 0
    settings = None  # which a state must share
    fruitless = 0    # looks in a row without a gain: enough of them are the end
    patience = 1
    place = ""       # for the message

    @torch.no_grad()
    def resume(self) -> bool:
        """Start, or go on from the saved state; whether there is one."""
        if not self.state.is_file():
            self.start()
            return False
        with globe.saved_state(self.state):
            with safe_open(self.state, "pt") as f:
                about = json.loads(f.metadata()["globe"])
            expect(about["settings"] == self.settings, "one of other settings")
            for name in self.NUMBERS:
                setattr(self, name, about[name])
            self.start()
            # kinds that are not kept are the optimiser's moments
            for path, t in globe.read_tensors(self.state).items():
                kind, _, name = path.partition("/")
                w = self.kept["now"][name]
                if kind in self.kept:
                    self.kept[kind][name].copy_(t)
                else:  # steps are counted on the CPU
                    self.optimizer.state[w][kind] = t if kind == "step" else t.to(w.device)
        return True

    def save(self) -> None:
        tensors = {}
        for name, w in self.kept["now"].items():
            now = {kind: named[name] for kind, named in self.kept.items()} | self.optimizer.state[w]
            tensors |= {f"{kind}/{name}": t for kind, t in now.items()}
        about = {name: getattr(self, name) for name in ("settings", *self.NUMBERS)}
        shapes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        globe.write_tensors(self.state, shapes, tensors, {"globe": json.dumps(about)})

    # learning rates: a linear warm-up, and a cosine over all steps down to a tenth of the peak
    def schedule(self, since: int, warmup: int, rate: float = 1.0) -> None:
        warm_up = min(1.0, (since + 1) / max(1, warmup))
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * self.step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate * warm_up * cosine

    def run(self, save_every: int, stop: Callable[[], bool]) -> Iterator[dict]:
        """A row per step; after stop() the state is saved and KeyboardInterrupt raised."""
        while self.step < self.steps and self.fruitless < self.patience:
            yield self.one_step()
            stopped = stop()
            if ranks()[0] == 0 and (stopped or save_every and self.step % save_every == 0):
                self.save()
            if stopped:
                raise KeyboardInterrupt(f"state saved at step {self.step}{self.place}")


# ---- 4. tiny: the default model ------------------------------------------------------------------
class TinyTrainer(Trainer):
    """Trains the default model: a dense phase, then the MoE phase that upcycles it.

    Directory `to` gets the state, at the end a stock checkpoint."""
    NUMBERS = ("step", "seconds", "scaling")
    place = "; go on with --resume"
    seconds = 0.0
    scaling = None  # the loss scale's state

    def __init__(self, cfg: TinyConfig, to: Path, device: torch.device):
        self.cfg = cfg
        self.to = to
        self.device = device
        self.state = to / "state" / "train.safetensors"
        self.settings = dataclasses.asdict(cfg)
        self.first_moe = 0 if cfg.dense_from else cfg.dense_steps
        self.steps = self.first_moe + cfg.moe_steps
        # transformers draws weights from the global generator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.tokenizer, self.model = dense_start(cfg)
        # of a user's text the last twentieth is held out
        text = globe.read_text(cfg.text or "builtin", "train")
        cut = len(text) * 19 // 20 if cfg.text else len(text)
        self.heldout = text[cut:] or globe.builtin_text("heldout")
        ids = self.tokenizer(text[:cut], add_special_tokens=False, verbose=False)["input_ids"]
        self.ids = torch.tensor(ids)
        expect(len(ids) >= cfg.seq_len,
               f"tiny.text: expected at least tiny.seq_len = {cfg.seq_len} tokens, found {len(ids)}")
        # on a GPU that has bfloat16, auto is that; float16 needs a loss scale
        name = {"auto": "float32", "off": "float32"}.get(cfg.autocast, cfg.autocast)
        if cfg.autocast == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported():
            name = "bf16"
        self.dtype = globe.as_dtype(name)
        self.resume()

    # model and optimiser at the start of the step's phase
    @torch.enable_grad()
    def start(self) -> None:
        cfg = self.cfg
        self.phase = "moe" if self.step >= self.first_moe else "dense"
        if self.phase == "moe":
            self.model = upcycle(self.model.cpu(), cfg, torch.Generator().manual_seed(cfg.seed + 1))
            if self.device.type == "cpu":
                # faster for matrices this small
                self.model.set_experts_implementation("eager")
            globe.one_by_one(self.model)
        if cfg.grad_checkpoint:
            self.model.gradient_checkpointing_enable()
        self.model.to(self.device).train()
        # Muon for attention and FFN matrices, AdamW for embeddings and routers, no decay for vectors
        self.kept = {"now": dict(self.model.named_parameters())}
        groups = []
        for name, w in self.kept["now"].items():
            decay = cfg.weight_decay * (w.ndim > 1)
            parts = int(w.ndim > 1 and "_proj" in name) + int("gate_up_proj" in name)
            groups.append({"params": [w], "parts": parts, "weight_decay": decay, "peak": cfg.lr})
        self.optimizer = Muon(groups, betas=(0.9, 0.95))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if self.scaling:
            self.scaler.load_state_dict(self.scaling)

    # train one step; its row, with the loss in nats per token, load balancing included
    def one_step(self) -> dict:
        begin = time.perf_counter()
        cfg = self.cfg
        # one cosine over both phases; each warms up with its fresh moments
        self.schedule(self.step - self.first_moe * (self.phase == "moe"), cfg.warmup)
        # (batch, seq_len) token ids from places of the text that depend on (seed, step) alone
        g = torch.Generator().manual_seed(cfg.seed * 1_000_003 + self.step)
        start = torch.randint(len(self.ids) - cfg.seq_len + 1, (cfg.batch, 1), generator=g)
        x = self.ids[start + torch.arange(cfg.seq_len)].to(self.device)
        # the load-balancing loss is computed of the router's logits
        routed = {"output_router_logits": True} if self.phase == "moe" else {}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(input_ids=x, labels=x, use_cache=False, **routed).loss
        if not torch.isfinite(loss):
            raise globe.Diverged(f"the training loss is {float(loss)}; lower tiny.lr (now {self.cfg.lr})")
        self.optimizer.zero_grad()
        # float16 gradients are scaled against underflow, and scaled back before they are clipped
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scaling = self.scaler.state_dict()
        row = {"step": self.step + 1, "phase": self.phase, "loss": float(loss.detach())}
        self.step += 1
        if self.step == self.first_moe:
            self.start()
        self.seconds += time.perf_counter() - begin
        return row

    # measure the model on held-out text, write its checkpoint; returns what train.json holds
    def finish(self) -> dict:
        length = self.cfg.seq_len
        windows = globe.token_windows(self.tokenizer, self.heldout, 256 * length, length)
        loss, _ = globe.nll(self.model.eval(), windows, 16)
        size = len(self.tokenizer.decode(windows.flatten()).encode())
        bits = loss / math.log(2) * windows.numel() / size
        result = {"bits_per_byte": bits, "steps": self.steps, "seconds": round(self.seconds, 1)}
        self.model.set_experts_implementation("grouped_mm")
        save_model(self.model, self.tokenizer, self.to)
        globe.write_text(self.to / "train.json", json.dumps(result))
        shutil.rmtree(self.to / "state", ignore_errors=True)
        return result


# ---- 5. heal: a stack's factors as trainable tensors over the stock model ------------------------
# the tensor that a factors' value stands for: itself, or of (codes, scale) a basis
def plain(value: Tensor | tuple) -> Tensor:
    return globe.decode_groups(*value) if isinstance(value, tuple) else value


# what stands for a trained tensor w in the factors, in the form of the value before
def stored(w: Tensor, before: Tensor | tuple) -> Tensor | tuple:
    if isinstance(before, tuple):
        return globe.code_groups(w)
    if not before.is_floating_point():
        w = w.round()
    return w.to(before.dtype, copy=True)


class Student:
    """The factors of the layers `span` as trainable float32 tensors, over the stock model's matrices.

    write() puts W^ of every fitted expert in the dense one's place; backward() turns the gradients in these
    places into those of the student's tensors. The model is the stock one: every architecture serves.
    Packed codes stay; their scales by class and block are trained, in 256 log2, and their bases. Each weight
    in codes takes 4 bytes for its value, unpacked once, and 12 more in one family of one layer at a time."""

    def __init__(self, model: nn.Module, factors: Factors, span: range, device, cfg: HealConfig):
        modules = globe.experts_modules(model)
        self.model = model
        self.factors = factors
        self.span = span
        self.layers = [l for l in modules if l in span and l in factors.experts]
        # down projections as they were refined
        globe.put_dense(model, factors, self.layers)
        for l in span:
            globe.put_rest(model, factors, f"model.layers.{l}.")
        # {(layer, family): [(the model's parameter, expert)]}, the dense experts' places
        self.places = {}
        # {name: (container in the factors, key in that, what it holds)} of what is trained; other banks
        self.slots = {}
        self.frozen = {}
        self.values = {}
        for l, family in [(l, family) for l in self.layers for family in globe.FAMILIES]:
            experts = []
            if family in factors.families:
                self.add_family(l, family, cfg.bank, device)
                experts += factors.experts[l]
            # those that were refined stand dense
            if family == "down" and cfg.down and l in factors.down:
                self.slots[f"layers.{l}.down"] = (factors.down, l, factors.down[l])
                experts += factors.refined(l)
            for e in experts:
                weight = globe.parameter_of(modules[l], family, e, factors.dims)
                self.places.setdefault((l, family), []).append((weight.requires_grad_(), e))
        # {name: the model's parameter}; norms that were never trained begin as the dense model's
        self.norms = {}
        for name, w in model.named_parameters():
            found = re.fullmatch(r"model\.layers\.(\d+)\..*norm\.weight", name)
            if found and int(found[1]) in self.layers:
                value = factors.norms.get(name, w.detach().float())
                w.data = value.to(w.device, w.dtype)
                if cfg.norms:
                    self.norms[f"norm.{name}"] = w.requires_grad_()
                    self.slots[f"norm.{name}"] = (factors.norms, name, value)
        self.params = {}
        for key, (_, _, value) in self.slots.items():
            self.params[key] = nn.Parameter(plain(value).to(device, torch.float32, copy=True))

    # layer l of a fitted family
    def add_family(self, l: int, family: str, mode: str, device: torch.device) -> None:
        f = self.factors.families[family]
        if isinstance(f, globe.CodedFamily):
            self.add_codes(l, f, mode, device)
            return
        owner = f.owner or family
        layers = [other for other, group in f.group.items() if group == f.group[l]]
        self.add_bank(f"bank.{owner}.{f.group[l]}", f.bank, f.group[l], layers, mode, device)
        self.slots[f"layers.{l}.{family}.A"] = (f.A, l, f.A[l])
        self.slots[f"layers.{l}.{family}.val"] = (f.val, l, f.val[l])

    # container[at], a bank or basis of those layers: trained where all of them are in the stack
    def add_bank(self, key: str, container, at, layers: list, mode: str, device: torch.device) -> None:
        inside = all(l in self.span for l in layers)
        expect(inside or mode != "train", "heal.bank: train needs all layers of a bank in one stack, found "
               f"{self.span[0]}..{self.span[-1]} of more; raise heal.stack, or take auto or freeze")
        if inside and mode != "freeze":
            self.slots[key] = (container, at, container[at])
        else:
            self.frozen[key] = plain(container[at]).to(device, torch.float32)

    # the same of a family in codes
    def add_codes(self, l: int, f: globe.CodedFamily, mode: str, device: torch.device) -> None:
        of = f.of[l]
        if of:
            # of a file each family has its own dict
            f.bases = self.factors.families[of.rpartition("_")[0]].bases
            layers = [other for other, name in f.of.items() if name == of]
            self.add_bank(f"basis.{of}", f.bases, of, layers, mode, device)
        t = f.layers[l]
        self.slots[f"layers.{l}.{f.name}.column"] = (t, "column", t["column"])
        # codes without scales, all columns in their order, are the values
        experts, p = t["kind"].shape
        columns = globe.CODE_BLOCK * t["width"].shape[1]
        bare = t | {"row": torch.full_like(t["row"], 128), "column": torch.zeros_like(t["column"]),
                    "order": torch.arange(columns).expand(experts, columns)}
        values = globe.decode(bare, (), columns, range(experts)).unflatten(2, (-1, globe.CODE_BLOCK))
        row = (t["row"].float() - 128) / 8
        self.values[l, f.name] = values.to(device), t["kind"].long().to(device), row.to(device)

    # W^ (E_l, p, d) float32 of a layer's experts in codes, differentiable in params
    def decoded(self, l: int, f: globe.CodedFamily, params: dict) -> Tensor:
        values, kind, row = self.values[l, f.name]
        scale = params[f"layers.{l}.{f.name}.column"][kind] / 256 + row[:, :, None]  # (E_l, p, B)
        A = (values * scale.exp2()[..., None]).flatten(2)
        if f.of[l]:
            X = (self.frozen | params)[f"basis.{f.of[l]}"]
            return A[:, :, :len(X)] @ X
        order = f.layers[l]["order"].long().to(A.device)
        places = order[:, None].expand(-1, A.shape[1], -1)
        W = A.new_zeros(*A.shape[:2], f.columns).scatter(2, places, A[:, :, :order.shape[1]])
        return W.mT if f.name == "down" else W

    # W^ (E_l, p, d) float32 of a layer's places of a family, differentiable in params
    def weights(self, l: int, family: str, params: dict) -> Tensor:
        dense = params.get(f"layers.{l}.{family}")  # (n, d, p) of downs alone
        if family not in self.factors.families:
            return dense.mT
        f = self.factors.families[family]
        if isinstance(f, globe.CodedFamily):
            W = self.decoded(l, f, params)
            return W if dense is None else torch.cat([W, dense.mT])
        bank = (self.frozen | params)[f"bank.{f.owner or family}.{f.group[l]}"]
        mixtures = params[f"layers.{l}.{family}.val"]
        X = globe.compose(bank, f.idx[l].to(bank.device), mixtures, f.activation)  # (E_l, r, d)
        return f.shift + f.scale * (params[f"layers.{l}.{family}.A"] @ X)

    # put the matrices and norms of params into the model
    @torch.no_grad()
    def write(self, params: dict) -> None:
        for (l, family), places in self.places.items():
            for W, (weight, e) in zip(self.weights(l, family, params), places):
                globe.matrix_in(weight.data, family, e, self.factors.dims).copy_(W)
        for key, w in self.norms.items():
            w.data = params[key].to(w.dtype, copy=True)

    # gradients of the model's matrices and norms become those of the student's tensors
    def backward(self) -> None:
        for (l, family), places in self.places.items():
            grads = [globe.matrix_in(weight.grad, family, e, self.factors.dims) for weight, e in places]
            self.weights(l, family, self.params).backward(torch.stack(grads).float())
        for key, w in self.norms.items():
            self.params[key].grad = w.grad.float()
        self.model.zero_grad()

    # trained tensors as the factors will hold them
    def rounded(self, tensors: dict) -> dict:
        out = {}
        for key, (_, _, value) in self.slots.items():
            out[key] = plain(stored(tensors[key].cpu(), value)).to(self.params[key])
        return out

    # put trained tensors into the factors, in their dtypes, and into the model what these then hold
    def store(self, tensors: dict) -> None:
        for key, (container, at, value) in self.slots.items():
            if key in tensors:
                value = container[at] = stored(tensors[key].cpu(), value)
            self.params[key].data.copy_(plain(value))
        self.write(self.params)


# ---- 6. heal: the loss, the training of one stack, and the way through the model -----------------
def divergence(y: Tensor, t: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over tokens of KL(dense || healed) in nats, of the last hidden states t and y (N, d)."""
    def part(y: Tensor, t: Tensor) -> Tensor:
        log_p = logits(y).log_softmax(-1)
        return F.kl_div(log_p, logits(t).log_softmax(-1), log_target=True, reduction="sum")
    # 128 tokens at a time, computed again on the way back: a batch's logits, four times over, are gigabytes
    total = torch.zeros((), device=y.device)
    for pair in zip(y.split(128), t.split(128)):
        total = total + checkpoint(part, *pair, use_reentrant=False)
    return total / len(y)


@dataclass
class StackTrainer(Trainer):
    """Training of one stack. Processes of one job divide the windows of each step."""
    cfg: TrainConfig
    state: Path
    student: Student
    walk: LayerWalk
    # hidden states (N, T, d): of the healed model before the stack, of the dense one behind it, and (where w,
    # the logits' weight, is above 0) behind the last layer; windows 0..held-1 are held out
    x: Tensor
    dense: Tensor
    final: Tensor | None
    weight: float
    held: int
    NUMBERS = ("step", "fruitless", "rate", "first", "lowest")
    rate = 1.0

    def __post_init__(self):
        self.rank, self.world = ranks()
        heal = self.cfg.heal
        self.batch = min(heal.batch, len(self.x) - self.held)
        expect(self.batch >= self.world, "heal.batch: expected a window or more for each of "
               f"{self.world} processes, found {self.batch}")
        self.steps = heal.steps
        self.patience = heal.patience
        self.layer = self.student.span[0]
        self.place = f" of the stack at layer {self.layer}"
        self.params = self.student.params
        if not self.resume():
            self.first = self.lowest = self.held_out()
            expect(math.isfinite(self.first), f"heal: layer {self.layer}: expected a finite loss, found "
                   f"{self.first}: do activations overflow? Give calib.dtype another type")

    def start(self) -> None:
        # Muon for adapters and bases, AdamW for the rest; a step is lr times the tensor's own size
        groups = []
        for key, w in self.params.items():
            kind = key.rpartition(".")[2]
            parts = int(w.ndim > 1 and kind not in ("val", "column"))
            peak = self.cfg.heal.lr * (float(w.detach().square().mean().sqrt()) or 1.0)
            # a scale's logarithm moves by its relative step
            if kind == "column":
                peak = self.cfg.heal.lr * 256 / math.log(2)
            # Muon multiplies a step by 0.2
            peak /= 0.2 if parts else 1
            groups.append({"params": [w], "parts": parts, "weight_decay": 0.0, "peak": peak})
        self.optimizer = Muon(groups, betas=(0.9, 0.95))
        # steps are noisy: what a stack ends with is a running mean of them, the best that a look found
        self.mean = {key: w.detach().clone() for key, w in self.params.items()}
        self.best = {key: t.clone() for key, t in self.mean.items()}
        self.kept = {"now": self.params, "mean": self.mean, "best": self.best}

    # mean loss over the windows ids, differentiable in the stock model's matrices
    def loss(self, ids: Tensor) -> Tensor:
        again = self.cfg.heal.grad_checkpoint
        y = self.walk.run(self.student.span, self.x[ids], again)
        loss = torch.zeros((), device=y.device)
        if self.weight < 1:
            # relative error token by token: a few tokens are hundreds of times longer than the others
            t = self.dense[ids].to(y.device).float()
            error = (y.float() - t).square().sum(-1) / t.square().sum(-1)
            loss = (1 - self.weight) * error.mean()
        if self.weight:
            # behind the stack the model is the dense one
            behind = range(self.student.span[-1] + 1, len(self.walk.layers))
            y = self.walk.run(behind, y, again).flatten(0, 1)
            t = self.final[ids].to(y.device).flatten(0, 1)
            loss = loss + self.weight * divergence(y, t, self.walk.logits)
        return loss

    # mean loss on the held-out windows with the running mean in place, as it will be stored
    @torch.no_grad()
    def held_out(self) -> float:
        self.student.write(self.student.rounded(self.mean))
        total = torch.zeros(1, dtype=torch.float64)
        for part in torch.arange(self.held)[self.rank::self.world].split(self.cfg.calib.batch):
            # with few windows, some ranks have none
            if len(part):
                total += float(self.loss(part)) * len(part)
        globe.all_sum(total)
        return float(total) / self.held

    # the held-out loss. The best tensors are kept, and gone back to after a look without a gain
    def look(self) -> float:
        value = self.held_out()
        if value < self.lowest:
            self.lowest = value
            self.fruitless = 0
            for key, best in self.best.items():
                best.copy_(self.mean[key])
            return value
        # on in smaller steps: which step size a model bears differs tenfold from one to the next
        self.fruitless += 1
        self.rate /= 2
        for key, w in self.params.items():
            w.data.copy_(self.best[key])
            self.mean[key].copy_(w.data)
        self.optimizer.state.clear()
        return value

    # train one step, in passes of calib.batch windows, and look where that is due; returns the row
    def one_step(self) -> dict:
        heal = self.cfg.heal
        self.schedule(self.step, heal.warmup, self.rate)
        g = torch.Generator().manual_seed(self.cfg.fit.seed * 1_000_003 + self.layer * 10_007 + self.step)
        order = torch.randperm(len(self.x) - self.held, generator=g)
        mine = self.held + order[self.rank:self.batch:self.world]
        # gradients of the stock model's matrices, then of the student's tensors
        self.student.write(self.params)
        total = torch.zeros(1, dtype=torch.float64)
        for part in mine.split(self.cfg.calib.batch):
            value = self.loss(part) * (len(part) / self.batch)
            value.backward()
            total += float(value.detach())
        self.student.backward()
        globe.all_sum(total, *[w.grad for w in self.params.values()])
        # a loss that is not finite moves nothing
        if torch.isfinite(total):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        # early steps weigh more, so that the mean soon forgets the start
        for key, w in self.params.items():
            self.mean[key].lerp_(w.data, max(heal.mean, 1 / (self.step + 1)))
        row = {"family": "heal", "layer": self.layer, "step": self.step, "loss": float(total)}
        due = self.step % heal.check_every == 0 or self.step == self.steps
        if due or not torch.isfinite(total):
            row["held_out"] = self.look()
        return row


def stack_size(cfg: TrainConfig, ckpt: Checkpoint, device: torch.device, dtype: torch.dtype) -> int:
    """Decoder layers that heal trains together; auto: all where the memory allows, else one."""
    layers = ckpt.config["num_hidden_layers"]
    if cfg.heal.stack != "auto":
        return min(layers, cfg.heal.stack)
    # weights and gradients; in float32 the factors, their gradients, momentum, running mean and the best
    needed = (2 * dtype.itemsize + 20) * ckpt.num_parameters()
    return layers if globe.first_rank_says(needed < globe.fit_budget(cfg, device)) else 1


def heal(ckpt: Checkpoint, factors: Factors, windows: Tensor, cfg: TrainConfig, state: Path,
         device: torch.device, dtype: torch.dtype, rows: list, stop: Callable[[], bool]) -> Iterator[dict]:
    """Train `factors` (in place) stack by stack against the dense model on windows (N, T) of token ids.

    The model is walked once, with one stack in memory; hidden states and finished stacks are in `state`.
    A stack sees the healed model's own inputs, and so mends what those before it left over; it keeps its old
    factors where the held-out windows gained nothing. Yields a row per step, appends one to `rows` per stack:
    {"layers", "before", "after"}. KeyboardInterrupt after stop(), with the state saved."""
    layers = ckpt.config["num_hidden_layers"]
    size = stack_size(cfg, ckpt, device, dtype)
    weight = cfg.heal.logits_weight
    if weight is None:
        weight = float(size == layers)
    # windows in a random order, of which the first are held out
    expect(len(windows) >= 2, "heal: expected text for 2 windows of calib.length = "
           f"{cfg.calib.length} tokens or more, found 1")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(cfg.fit.seed))
    held = max(1, round(cfg.heal.held_out * len(windows)))

    # hidden states, at first the embeddings; the logits' term needs the dense model's last ones
    def states(name: str) -> Tensor:
        return globe.on_disk(state / f"{name}-{ranks()[0]}.bin", (*windows.shape, ckpt.dims.d), dtype)
    walk = LayerWalk(ckpt, device, dtype, min(cfg.calib.batch, len(windows)))
    x = states("healed")
    walk.embed(windows[order], x)
    dense = states("dense").copy_(x)
    final = None
    if weight:
        final = states("final").copy_(x)
        walk.fill(range(layers))
        walk.advance(range(layers), final)
    # embeddings and head in codes: the student's own inputs; the head is then the teacher's too
    if factors.rest:
        globe.put_rest(walk.model, factors, "")
        walk.embed(windows[order], x)

    for i in range(0, layers, size):
        span = range(i, min(i + size, layers))
        walk.fill(span)
        if weight < 1:
            # before the student's matrices take the dense ones' places
            walk.advance(span, dense)
        student = Student(walk.model, factors, span, device, cfg.heal)
        done = state / f"stack-{i:03d}.safetensors"
        # train the stack, unless a stopped run has finished it
        if student.layers and not globe.first_rank_says(done.is_file()):
            now = state / "step.safetensors"
            trainer = StackTrainer(cfg, now, student, walk, x, dense, final, weight, held)
            yield from trainer.run(cfg.heal.save_every, stop)
            with globe.first_rank_first():
                if ranks()[0] == 0:
                    losses = torch.tensor([trainer.first, trainer.lowest], dtype=torch.float64)
                    globe.Shelved(trainer.best | {"losses": losses}).save(done)
                    now.unlink(missing_ok=True)
        # its best goes from the file into the factors, and the healed model's states go on through it
        if student.layers:
            with globe.saved_state(done):
                best = load_file(done)
                before, after = best.pop("losses").tolist()
                rows.append({"layers": [i, span[-1]], "before": before, "after": after})
                student.store(best if after < before else {})
        if span[-1] + 1 < layers:
            walk.advance(span, x)
        # the next stack needs their memory
        walk.empty(span)
        student = trainer = None


# ---- 7. Routed depth -----------------------------------------------------------------------------
CARRIED = ("# ---- a routed model's directory carries the lines from here ----", "# ---- to here ----")
# ---- a routed model's directory carries the lines from here ----
# Routed depth: decoder layers of the Qwen2 family that run on some of their tokens; the others pass by.
#     B, T, d   sequences, tokens of each, hidden_size;  k = capacity * T tokens are run on
#     u, u'     the residual that a block adds to its input, and its prediction by a small network
#     mod       every second block, by a linear router (Mixture-of-Depths, arXiv:2404.02258)
#     sdt       pairs: a whole block whose surprise routes the next one (Subjective Depth, arXiv:2511.21408)
#     stt       every second block, by the surprise of its own residual (Subjective Timescale, the same)
# Training runs on a sequence's top-k, inference on what a causal router decides token by token. Such tokens
# attend to each other only, at their own rotary positions.
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2DecoderLayer, Qwen2ForCausalLM


class RoutedConfig(Qwen2Config):
    """A Qwen2Config with `route`, a mapping: variant, and the keys of train.py's RouteConfig."""
    model_type = "globe_routed"


class ExecutedTokens(DynamicLayer):
    """Keys and values of the tokens that a routed layer ran on; kept: last (B, 1, d), its last input; valid
    (B, n), which of the keys are a sequence's own: those of a batch run on unequal numbers of tokens."""
    is_croppable = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.kept = {}

    def crop(self, *args):
        raise ValueError("routed depth: its cache only grows (no beams, no assisted generation)")

    reset = reorder_cache = batch_select_indices = batch_repeat_interleave = crop


def executed_tokens(kwargs: dict, layer: int) -> ExecutedTokens:
    """A layer's part of a DynamicCache, put in place on first use; a fresh one where there is no cache."""
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    if cache is None:
        return ExecutedTokens()
    # a cache that was made without a config grows as it is used
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    place = cache.layers[layer]
    if type(place) is DynamicLayer and place.get_seq_length() == 0:
        place = cache.layers[layer] = ExecutedTokens()
    if type(place) is not ExecutedTokens:
        raise ValueError(f"routed depth: expected an empty dynamic cache, found {type(place).__name__}")
    return place


def real_tokens(mask: Tensor | None, x: Tensor) -> Tensor:
    """(B, T) bool, which tokens x (B, T, d) are no padding, by the mask that decoder layers get."""
    if mask is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    # flash attention gets (B, n), the others (B, 1, T, n): a token that is one may attend to itself
    own = mask[:, -x.shape[1]:] if mask.ndim == 2 else mask[:, 0].diagonal(mask.shape[-1] - x.shape[1], 1, 2)
    return own == 0 if own.is_floating_point() else own.bool()


def take(t: Tensor, index: Tensor) -> Tensor:
    """Rows index (B, k) of t (B or 1, T, n) -> (B, k, n)."""
    return t.expand(len(index), -1, -1).gather(1, index[..., None].expand(-1, -1, t.shape[-1]))


def shifted(x: Tensor, last: Tensor | None = None) -> Tensor:
    """Every token's predecessor, (B, T, d); before the first comes last (B, 1, d), or zeros."""
    return torch.cat([torch.zeros_like(x[:, :1]) if last is None else last, x[:, :-1]], 1)


def moving_average(static: Tensor, window: int) -> Tensor:
    """Mean of D_st (B, T) over each token and those before it, `window` in all."""
    sums = window * F.avg_pool1d(F.pad(static, (window - 1, 0))[:, None], window, 1)[:, 0]
    return sums / torch.arange(1, static.shape[1] + 1, device=static.device).clamp_max(window)


def change_error(u: Tensor, predicted: Tensor) -> Tensor:
    """D_ch (..., d) -> (...): |u - u'|^2 / d; where log s^2 follows u', 2 KL(N(u, 1) || N(u', s^2)) / d."""
    if predicted.shape == u.shape:
        return (u - predicted).square().mean(-1)
    mean, log_variance = predicted.chunk(2, -1)
    return (log_variance + (1 + (u - mean).square()) * (-log_variance).exp() - 1).mean(-1)


class Surprise(nn.Module):
    """The gate G of arXiv:2511.21408, of how a block changed a token.

    D_st = |u|^2 / d, the error of "no change";  D_ch = |u - u'|^2 / d, that of the predicted change
    CE = D_st - (D_ch - log o), expected change;  CU = D_st - m * moving average of D_st, unexpected change
    G = S_CE + S_CU - S_CE S_CU with S = sigmoid(beta .), the union; with route.gate = ce, S_CE alone."""

    def __init__(self, route: dict):
        super().__init__()
        self.route = route
        self.log_o = nn.Parameter(torch.zeros(()), requires_grad=route["learn"])
        self.m = nn.Parameter(torch.zeros(()), requires_grad=route["learn"] and route["gate"] == "union")

    def forward(self, static: Tensor, change: Tensor, average: Tensor, beta: float) -> tuple:
        """D_st, D_ch and the average of D_st, (B, T) each -> (score to rank by, G, S_CE, S_CU)."""
        expected = beta * (static - (change - self.log_o))
        unexpected = beta * (static - self.m * average.detach())
        s_ce = expected.sigmoid()
        s_cu = unexpected.sigmoid()
        if self.route["gate"] == "ce":
            return expected, s_ce, s_ce, s_cu
        # -log(1 - G) also ranks tokens whose G is 1 in float32
        score = F.softplus(expected) + F.softplus(unexpected)
        return score, s_ce + s_cu - s_ce * s_cu, s_ce, s_cu


class Predictor(nn.Module):
    """A small SwiGLU network, (B, T, d) -> u' (B, T, d), and log s^2 behind it where route.change = kl."""

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        width = max(8, round(config.route["width"] * d))
        self.gate = nn.Linear(d, width, bias=False)
        self.up = nn.Linear(d, width, bias=False)
        self.down = nn.Linear(width, 2 * d if config.route["change"] == "kl" else d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:])
        return self.down(F.silu(self.gate(x)) * self.up(x))


class RoutedLayer(Qwen2DecoderLayer):
    """A decoder layer that runs on some tokens, in training and where by_topk is set the top-k of a sequence.

    Variants judge(): scores, weights of updates, (B, T) each. `losses` and `stats`, {name: scalar}, are of
    the last pass in training, `chosen` (B, T) of the last one at inference."""
    by_topk = False

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.layer = layer_idx
        self.route = config.route
        # both change in the course of training
        self.beta = self.route["beta"]
        self.capacity = self.route["capacity"]
        self.losses = {}
        self.stats = {}
        d = config.hidden_size
        self.causal_router = nn.Sequential(nn.Linear(2 * d, d // 4), nn.SiLU(), nn.Linear(d // 4, 1))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        if attention_mask is None and x.shape[:2] == (1, 1) and not (self.training or self.route["random"]):
            return self.run_one(x, kwargs)
        real = real_tokens(attention_mask, x)
        if not (self.training or self.by_topk):
            return self.run_causal(x, real, kwargs)
        if attention_mask is not None and not real.all():
            raise ValueError("routed depth: expected training sequences without padding")
        # the top-k are known at the sequence's end: no cache, by its new and its old name
        kwargs = {k: v for k, v in kwargs.items() if k not in ("cache", "past_key_values")}
        score, weight = self.judge(x, attention_mask, kwargs)
        k = max(1, round(self.route["capacity"] * x.shape[1]))
        ranking = torch.rand_like(score) if self.route["random"] else score
        order = ranking.argsort(dim=1, descending=True)
        if self.training and not self.route["random"]:
            self.learn(x.detach(), score, torch.zeros_like(score).scatter(1, order[:, :k], 1.0))
        # at first training runs on more of them
        n = max(k, round(self.capacity * x.shape[1])) if self.training else k
        index = order[:, :n].sort(dim=1).values
        return self.execute(x, index, weight.gather(1, index), kwargs)

    def foresee(self, x: Tensor, before: Tensor) -> Tensor:
        # logits (B, T) of being in the top-k, from a token's hidden state and its predecessor's
        both = torch.cat([x, before], -1)
        return self.causal_router(F.layer_norm(both, both.shape[-1:])).squeeze(-1)

    def learn(self, x: Tensor, score: Tensor, chosen: Tensor) -> None:
        """The causal router imitates the top-k, chosen (B, T), and changes nothing of what it sees."""
        logits = self.foresee(x, shifted(x))
        self.losses["causal"] = F.binary_cross_entropy_with_logits(logits, chosen)
        runs = (logits.detach().sigmoid() > self.route["threshold"]).float()
        self.stats |= {"executed": runs.mean(), "accuracy": (runs == chosen).float().mean()}

    def run_one(self, x: Tensor, kwargs: dict) -> Tensor:
        """run_causal for one token of one sequence, as generation goes, in few operations."""
        state = executed_tokens(kwargs, self.layer)
        before = state.kept["last"] if state.kept else torch.zeros_like(x)
        chance = self.foresee(x, before).sigmoid()
        state.kept["last"] = x
        if chance.item() <= self.route["threshold"]:
            return x
        return x.lerp(super().forward(x, **kwargs), self.weigh(x, chance)[..., None])

    def run_causal(self, x: Tensor, real: Tensor, kwargs: dict) -> Tensor:
        state = executed_tokens(kwargs, self.layer)
        inputs = x * real[..., None]
        chance = self.foresee(inputs, shifted(inputs, state.kept.get("last"))).sigmoid()
        state.kept["last"] = inputs[:, -1:]
        if self.route["random"]:
            # noise in [0, 1) by position and layer alone: the same with a cache and without
            noise = ((kwargs["position_ids"] * 12.9898 + self.layer * 78.233).sin() * 43758.5453).remainder(1)
            chance = (noise < self.route["capacity"]).float().expand(x.shape[:2])
        self.chosen = (chance > self.route["threshold"]) & real
        most = int(self.chosen.sum(1).max())
        if most == 0:
            return x
        # a sequence's chosen tokens in their order, then others, up to the most that a sequence has
        index = self.chosen.logical_not().byte().argsort(dim=1, stable=True)[:, :most]
        valid = self.chosen.gather(1, index)
        weight = self.weigh(x, chance).gather(1, index) * valid
        return self.execute(x, index, weight, kwargs, state, valid if len(x) > 1 else None)

    def weigh(self, x: Tensor, chance: Tensor) -> Tensor:
        # what updates are multiplied by at inference, (B, T)
        return chance

    def execute(self, x: Tensor, index: Tensor, weight: Tensor, kwargs: dict,
                state: ExecutedTokens | None = None, valid: Tensor | None = None) -> Tensor:
        """x (B, T, d), with weight (B, k) times the block's residual added to its tokens index (B, k)."""
        inside = take(x, index)
        more = dict(kwargs, position_ids=None, attention_mask=self.key_mask(inside, state, valid))
        more["position_embeddings"] = tuple(take(t, index) for t in kwargs["position_embeddings"])
        update = (super().forward(inside, **more) - inside) * weight[..., None]
        return x.scatter_add(1, index[..., None].expand_as(update), update.to(x.dtype))

    def key_mask(self, x: Tensor, state: ExecutedTokens | None, valid: Tensor | None) -> Tensor | None:
        """The mask with which tokens x (B, k, d) attend to those executed before them, and to each other."""
        k = x.shape[1]
        n = k + (state.get_seq_length() if state else 0)
        if valid is not None:
            valid = torch.cat([state.kept.get("valid", valid[:, :0]), valid], 1)
            state.kept["valid"] = valid
        way = self.self_attn.config._attn_implementation
        # flash attention, and scaled_dot_product_attention without padding, mask the future themselves
        if "flash" in way or way == "sdpa" and valid is None and k in (1, n):
            return valid
        least = torch.finfo(x.dtype).min
        mask = x.new_full((1, k, n), least).triu(n - k + 1)
        return (mask if valid is None else mask.masked_fill(~valid[:, None], least))[:, None]


class MoDLayer(RoutedLayer):
    """By a linear router r: x + r(x) u for the top-k, x for the others (equation 1 of arXiv:2404.02258)."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.router = nn.Linear(config.hidden_size, 1, bias=False)
        self.causal_router = nn.Linear(2 * config.hidden_size, 1)

    def judge(self, x: Tensor, *_) -> tuple:
        r = self.router(F.layer_norm(x, x.shape[-1:])).squeeze(-1)
        return r, r

    def learn(self, x: Tensor, score: Tensor, chosen: Tensor) -> None:
        super().learn(x, score, chosen)
        # the router's sign comes to say who is in the top-k, and its size stays small
        self.losses["mod"] = F.binary_cross_entropy_with_logits(score, chosen)
        self.losses["z"] = score.square().mean()

    def weigh(self, x: Tensor, chance: Tensor) -> Tensor:
        return self.judge(x)[0]


class SurpriseLayer(RoutedLayer):
    """By the surprise of residuals, which a predictor foresees from earlier states."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.predictor = Predictor(config)
        self.surprise = Surprise(self.route)

    def gate(self, u: Tensor, before: Tensor) -> tuple:
        """Residuals u and the states that they are foreseen from, (B, T, d) each -> (score, G)."""
        predicted = self.predictor(before.detach())
        change = change_error(u, predicted)
        static = u.square().mean(-1)
        average = moving_average(static, self.route["window"])
        score, G, s_ce, s_cu = self.surprise(static, change, average, self.beta)
        if self.training:
            self.losses["prior"] = change_error(u.detach(), predicted).mean()
            for name, t in {"gate": G, "s_ce": s_ce, "s_cu": s_cu}.items():
                self.stats[name] = t.detach().mean()
        return score, G


class DynamicDepthLayer(SurpriseLayer):
    """The Dynamic layer of sdt, by the residual of the Decision layer before it, a whole block."""

    def __init__(self, config, layer_idx: int, decision: Qwen2DecoderLayer):
        super().__init__(config, layer_idx)
        decision.register_forward_pre_hook(self.remember)

    def remember(self, decision: nn.Module, inputs: tuple) -> None:
        self.seen = inputs[0]

    def judge(self, x: Tensor, *_) -> tuple:
        return self.gate((x - self.seen).float(), self.seen)


class TransitionLayer(SurpriseLayer):
    """stt: by the block's own residual, foreseen from the previous token's state behind the block. For these,
    training runs the block on all tokens, without gradients, and then on the k for the result."""

    def judge(self, x: Tensor, mask: Tensor | None, kwargs: dict) -> tuple:
        with torch.no_grad():
            after = Qwen2DecoderLayer.forward(self, x, attention_mask=mask, **kwargs)
        return self.gate((after - x.detach()).float(), shifted(after))


class RoutedForCausalLM(Qwen2ForCausalLM):
    """Qwen2ForCausalLM with routed layers; an odd last layer stays plain. In training the loss holds the
    auxiliary ones, by the weights in config.route; `losses` has each by itself."""
    config_class = RoutedConfig
    # whether a layer runs is decided token by token
    _can_compile_fullgraph = False

    def __init__(self, config):
        super().__init__(config)
        layers = self.model.layers
        for i in range(1, len(layers), 2):
            if config.route["variant"] == "sdt":
                layers[i] = DynamicDepthLayer(config, i, layers[i - 1])
            else:
                layers[i] = {"mod": MoDLayer, "stt": TransitionLayer}[config.route["variant"]](config, i)
            # a random choice needs none
            layers[i].causal_router.requires_grad_(not config.route["random"])
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Surprise):
            # transformers keeps torch's initialisers off values that it has loaded
            nn.init.constant_(module.log_o, math.log(module.route["o"]))
            nn.init.constant_(module.m, module.route["m"])

    def forward(self, *args, labels=None, **kwargs):
        out = super().forward(*args, labels=labels, **kwargs)
        if labels is None or not self.training:
            return out
        self.losses = {"lm": out.loss}
        routed = self.model.layers[1::2]
        for name in routed[0].losses:
            self.losses[name] = torch.stack([layer.losses[name] for layer in routed]).mean()
            out.loss = out.loss + self.config.route[f"{name}_weight"] * self.losses[name]
        return out


# so that AutoTokenizer and pipelines know it too; copies of this file are alike, and may all register
AutoConfig.register(RoutedConfig.model_type, RoutedConfig, exist_ok=True)
AutoModelForCausalLM.register(RoutedConfig, RoutedForCausalLM, exist_ok=True)
# ---- to here ----


# ---- 8. train: settings, models, data ------------------------------------------------------------
LM_FILE = Path(__file__).resolve().parent / "configs" / "train.yaml"
OLD_NAMES = {"dtf": "sdt", "tdtf": "stt"}
LM_CHOICES = {
    "model.variant": ("standard", "mod", "sdt", "stt"),
    "model.attention": ("sdpa", "eager", "flash_attention_2"),
    "train.optimizer": ("muon", "adamw"),
    "route.gate": ("union", "ce"),
    "route.change": ("mse", "kl"),
    "log.to": ("none", "trackio", "wandb"),
}
LM_POSITIVE = ("data.length", "data.eval_tokens", "train.steps", "train.batch", "train.accumulate",
               "train.lr", "train.clip", "route.width", "route.window", "route.o", "lora.alpha")
LM_FRACTIONS = ("data.held_out", "route.capacity", "route.threshold", "route.anneal",
                "lora.dropout")


def config_class(file: Path) -> type:
    """A dataclass with a YAML file's sections, whose keys, types and defaults are the file's; and log."""
    sections = [("log", globe.LogConfig, field(default_factory=globe.LogConfig))]
    for name, keys in globe.read_yaml(file.read_text(encoding="utf-8"), str(file)).items():
        fields = []
        for key, value in keys.items():
            kind = "str | None" if value is None else type(value).__name__
            fields.append((key, kind, field(default_factory=functools.partial(copy.copy, value))))
        section = dataclasses.make_dataclass(name, fields)
        sections.append((name, section, field(default_factory=section)))
    return dataclasses.make_dataclass("LMConfig", sections)


def lm_config(path: str | None, overrides: Sequence[str]):
    """configs/train.yaml < the file at path < overrides; UserError where no training could use them."""
    cfg = globe.load_config(path, overrides, kind=config_class(LM_FILE))
    cfg.model.variant = OLD_NAMES.get(cfg.model.variant, cfg.model.variant)
    numbers = [f"{name}.{key}" for name, section in dataclasses.asdict(cfg).items()
               for key, value in section.items() if type(value) in (int, float)]
    globe.check_ranges(cfg, LM_CHOICES, LM_POSITIVE, numbers, LM_FRACTIONS)
    model = cfg.model
    expect(model.path or model.size in model.sizes,
           f"model.size: expected one of {', '.join(model.sizes)}, found {model.size!r}")
    weights = [w for w in cfg.data.mix.values() if type(w) not in (int, float) or w <= 0]
    expect(not weights, f"data.mix: expected weights above 0, found {weights}")
    return cfg


# (class, config) of a model with cfg's variant and a Qwen2 or Llama model's config.json
def routed(cfg, base: dict, standard: type) -> tuple:
    if cfg.model.variant == "standard":
        return standard, None
    expect(not base.get("use_sliding_window"), "model.path: expected no sliding windows with routed depth")
    about = ("model_type", "architectures", "auto_map")
    kept = {key: value for key, value in base.items() if key not in about}
    route = {"variant": cfg.model.variant} | dataclasses.asdict(cfg.route)
    return RoutedForCausalLM, RoutedConfig(**kept | {"route": route})


def language_model(cfg) -> tuple:
    """(tokenizer, model) in float32: a new model that reads bytes, or one of the Qwen2 or Llama family.

    A routed model takes over all weights of a standard one; Llama has no biases, which begin as zeros."""
    way = {"attn_implementation": cfg.model.attention, "dtype": torch.float32}
    if not cfg.model.path:
        tokenizer = byte_tokenizer()
        size = dict(cfg.model.sizes[cfg.model.size])
        size["num_hidden_layers"] = cfg.model.layers or size.get("num_hidden_layers")
        with globe.expecting(f"model.size={cfg.model.size}: expected keys of Qwen2Config and their values"):
            base = Qwen2Config(**size, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
                               pad_token_id=tokenizer.pad_token_id)
            kind, config = routed(cfg, base.to_dict(), Qwen2ForCausalLM)
            return tokenizer, kind._from_config(config or base, **way)
    path = globe.resolve_model(cfg.model.path, cfg.model.revision)
    base = globe.read_json(path / "config.json")
    found = base.get("model_type")
    ours = found == RoutedConfig.model_type and cfg.model.variant != "standard"
    expect((ours or found in ("qwen2", "llama")) and not base.get("attention_bias"),
           f"model.path {cfg.model.path}: expected model_type qwen2 or llama, found {found!r}")
    kind, config = routed(cfg, base, AutoModelForCausalLM)
    with globe.expecting(f"{path}: expected a model that loads"):
        model, info = kind.from_pretrained(path, config=config, output_loading_info=True, **way)
    # what a standard model does not have begins afresh
    new = re.compile("router|predictor|surprise|_proj.bias")
    globe.refuse_missing([name for name in sorted(info["missing_keys"]) if not new.search(name)], path)
    return globe.load_tokenizer(path), model


@functools.lru_cache(1)
def read_sources(mix: tuple, length: int, held_out: float, eval_tokens: int, tokenizer) -> tuple:
    """(token ids (N,) of each source, held-out windows (n, length) of all); mix: (source, weight) of each.

    Of a source its end is held out, of builtin other files; windows are shared out by weight."""
    ids = []
    windows = []
    for source, weight in mix:
        text = globe.read_text(source, "train")
        cut = len(text) if source == "builtin" else int(len(text) * (1 - held_out))
        ids.append(torch.tensor(tokenizer(text[:cut], add_special_tokens=False, verbose=False)["input_ids"]))
        held = text[cut:] or globe.builtin_text("heldout")
        tokens = int(eval_tokens * weight / sum(weight for _, weight in mix))
        windows.append(globe.token_windows(tokenizer, held, tokens, length))
        least = min(len(ids[-1]), windows[-1].shape[1])
        expect(least == length, f"data.mix: {source}: expected data.length = {length} tokens or more, "
               f"to train on and held out, found {least}")
    return ids, torch.cat(windows)


# (count, length) token ids, of sources drawn by their weights, from random places, by the seed alone
def draw(sources: list, mix: tuple, count: int, length: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    weights = torch.tensor([float(weight) for _, weight in mix])
    rows = []
    for i in torch.multinomial(weights, count, replacement=True, generator=g).tolist():
        start = int(torch.randint(len(sources[i]) - length + 1, (), generator=g))
        rows.append(sources[i][start:start + length])
    return torch.stack(rows)


# ---- 9. train: the loop, what is measured, what is saved -----------------------------------------
def precision(device: torch.device, dtype: str | None) -> str:
    # what accelerate computes in: the dtype that was asked for, else what the device is quick at
    if dtype or device.type != "cuda":
        names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        return names.get(globe.as_dtype(dtype), "no")
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def routed_layers(model: nn.Module) -> list:
    return [m for m in model.modules() if isinstance(m, RoutedLayer)]


def evaluate(model: nn.Module, windows: Tensor, batch: int, topk: bool = False) -> tuple:
    """(nats per token, share of tokens that routed layers ran on) on windows (N, T) of token ids, routed by
    the causal router or by the top-k of each window."""
    layers = routed_layers(model.eval())
    shares = [] if layers and not topk else [1.0]

    def watched(parts):
        for part in parts:
            yield part
            shares.extend(float(layer.chosen.float().mean()) for layer in layers if not topk)
    for layer in layers:
        layer.by_topk = topk
    loss, _ = globe.nll(model, windows, batch, watched)
    for layer in layers:
        layer.by_topk = False
    return loss, sum(shares) / len(shares)


# LoRA on the matrices of attention and FFN; what routes is trained whole
def with_lora(model: nn.Module, cfg) -> nn.Module:
    with globe.expecting("lora.r: expected the package peft (pip install peft)", ImportError):
        import peft
    own = {name for layer in routed_layers(model) for name, _ in layer.named_children()}
    whole = sorted(own & {"causal_router", "router", "predictor", "surprise"})
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    return peft.get_peft_model(model, peft.LoraConfig(
        r=cfg.r, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=targets,
        modules_to_save=whole or None, task_type="CAUSAL_LM"))


class LMTrainer(Trainer):
    """Trains a causal language model; processes of one job divide the sequences of each step.

    Directory `to` gets the state and log.jsonl, at the end a checkpoint that transformers loads."""
    NUMBERS = ("step", "seconds", "scaling")
    place = "; go on with --resume"
    seconds = 0.0
    scaling = None  # the loss scale's state, in float16

    def __init__(self, cfg, to: Path, device: torch.device, dtype: str | None = None):
        with globe.expecting("train: expected the package accelerate (pip install accelerate)", ImportError):
            from accelerate import Accelerator
            from accelerate.state import AcceleratorState
        # an earlier training in this process may have had another device, dtype or number of processes
        AcceleratorState._reset_state(reset_partial_state=True)
        self.cfg = cfg
        self.to = to
        self.state = to / "state" / "train.safetensors"
        self.steps = cfg.train.steps
        self.rank, self.world = ranks()
        # what a resumed run shares: all but where its rows go, and how often it saves
        self.settings = {name: section for name, section in dataclasses.asdict(cfg).items() if name != "log"}
        del self.settings["train"]["save_every"]
        passes = self.world * cfg.train.accumulate
        expect(cfg.train.batch % passes == 0, f"train.batch: expected a multiple of {passes}, processes "
               f"times train.accumulate, found {cfg.train.batch}")
        # transformers draws weights from the global generator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.train.seed)
            self.tokenizer, self.model = language_model(cfg)
            self.model = with_lora(self.model, cfg.lora) if cfg.lora.r else self.model
        self.mix = tuple(cfg.data.mix.items()) or (("builtin", 1.0),)
        data = cfg.data
        self.sources, self.windows = read_sources(self.mix, data.length, data.held_out, data.eval_tokens,
                                                  self.tokenizer)
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision(device, dtype),
                                       gradient_accumulation_steps=cfg.train.accumulate)
        self.resume()

    @torch.enable_grad()
    def start(self) -> None:
        cfg = self.cfg.train
        if self.cfg.model.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.to(self.accelerator.device)
        self.kept = {"now": {name: w for name, w in self.model.named_parameters() if w.requires_grad}}
        groups = []
        for name, w in self.kept["now"].items():
            # Muon for attention and FFN matrices, AdamW for the rest, no decay for vectors
            muon = cfg.optimizer == "muon" and name.endswith("_proj.weight")
            decay = cfg.weight_decay * (w.ndim > 1)
            groups.append({"params": [w], "parts": int(muon), "weight_decay": decay, "peak": cfg.lr})
        self.optimizer = Muon(groups, betas=(0.9, 0.95))
        self.net, self.stepper = self.accelerator.prepare(self.model, self.optimizer)
        if self.scaling:
            self.accelerator.scaler.load_state_dict(self.scaling)

    def one_step(self) -> dict:
        """Train one step; its row: losses (in nats; loss_prior a squared error), learning rate, tokens/s."""
        begin = time.perf_counter()
        cfg = self.cfg.train
        route = self.cfg.route
        layers = routed_layers(self.model)
        self.schedule(self.step, cfg.warmup)
        # beta rises along a cosine: the gate, at first nearly the same for all tokens, hardens
        risen = 0.5 * (1 - math.cos(math.pi * self.step / self.steps))
        # and routed layers begin on all tokens
        more = max(0.0, 1 - self.step / max(1.0, route.anneal * self.steps)) * (1 - route.capacity)
        for layer in layers:
            layer.beta = route.beta_start + (route.beta - route.beta_start) * risen
            layer.capacity = route.capacity + more
        # data, dropout and random choices depend on (seed, step) alone: a resumed run repeats them
        seed = cfg.seed * 1_000_003 + self.step
        torch.manual_seed(seed * 1009 + self.rank)
        x = draw(self.sources, self.mix, cfg.batch, self.cfg.data.length, seed)[self.rank::self.world]
        self.net.train()
        total = collections.Counter()
        for part in x.to(self.accelerator.device).chunk(cfg.accumulate):
            # gradients add up, and processes exchange them in the last pass, where the optimiser steps
            with self.accelerator.accumulate(self.net):
                loss = self.net(input_ids=part, labels=part, use_cache=False).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.kept["now"].values(), cfg.clip)
                self.stepper.step()
                self.stepper.zero_grad()
            parts = getattr(self.model, "losses", None) or {"lm": loss}
            total.update({name: float(value.detach()) for name, value in parts.items()})
        # means over passes and processes
        sums = torch.tensor([*total.values()], dtype=torch.float64)
        globe.all_sum(sums)
        losses = dict(zip(total, (sums / (cfg.accumulate * self.world)).tolist()))
        lm = losses.pop("lm")
        # nor is it a number; its exponential would be none
        if not lm < 700:
            raise globe.Diverged(f"the training loss is {lm}; lower train.lr (now {cfg.lr})")
        self.scaling = self.accelerator.scaler and self.accelerator.scaler.state_dict()
        self.step += 1
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        row = {"family": "train", "step": self.step, "loss_train": lm, "ppl_train": math.exp(lm)}
        row |= {f"loss_{name}": value for name, value in losses.items()}
        row |= {"lr": self.optimizer.param_groups[0]["lr"], "grad_norm": float(norm),
                "tokens_s": cfg.batch * self.cfg.data.length / seconds}
        for layer in layers:
            row |= {f"layer_{layer.layer}_{name}": float(value) for name, value in layer.stats.items()}
        every = cfg.eval_every
        if self.rank == 0 and (self.step == self.steps or every and self.step % every == 0):
            row |= self.look()
        return row

    # loss and perplexity on held-out text, by the causal router and by top-k
    def look(self) -> dict:
        loss, share = evaluate(self.model, self.windows, self.cfg.train.batch)
        topk, _ = evaluate(self.model, self.windows, self.cfg.train.batch, topk=True)
        return {"loss_val": loss, "ppl_val": math.exp(loss), "ppl_val_topk": math.exp(topk),
                "executed": share}

    # the model as a directory that transformers loads; returns what train.json holds
    def finish(self, tasks: Callable) -> dict:
        model = self.accelerator.unwrap_model(self.net, keep_fp32_wrapper=False)
        if self.cfg.lora.r:
            model = model.merge_and_unload()
        self.model = model
        result = self.look() | {"steps": self.steps, "seconds": round(self.seconds, 1),
                                "parameters": model.num_parameters(), "tasks": tasks(model)}
        save_model(model, self.tokenizer, self.to)
        globe.write_text(self.to / "train.json", json.dumps(result))
        shutil.rmtree(self.to / "state", ignore_errors=True)
        return result


# the lines of this file that a routed model's directory carries, byte for byte
def carried() -> str:
    source = Path(__file__).read_bytes().decode()
    begin, end = (source.index(f"\n{line}\n") + 1 for line in CARRIED)
    return source[begin:end] + CARRIED[1] + "\n"


# write model and tokenizer into `to`, and beside a routed model the code that loads it
def save_model(model: nn.Module, tokenizer, to: Path) -> None:
    part = to / ".saving"
    shutil.rmtree(part, ignore_errors=True)
    with globe.written(part) as tmp:
        tmp.mkdir()
        if routed_layers(model):
            names = {"AutoConfig": "RoutedConfig", "AutoModelForCausalLM": "RoutedForCausalLM"}
            model.config.auto_map = {auto: f"routed.{name}" for auto, name in names.items()}
            (tmp / "routed.py").write_bytes(carried().encode())
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
    for file in part.iterdir():
        file.replace(to / file.name)
    part.rmdir()


def train_model(cfg, to: Path, device: torch.device, args: argparse.Namespace, resume: bool) -> dict:
    """Train into directory `to`, or go on there; what its train.json holds, on the first rank."""
    finished = to / "train.json"
    rows = to / "log.jsonl"
    begun = globe.first_rank_says(resume and (finished.is_file() or rows.is_file()))
    if begun and finished.is_file():
        return globe.read_json(finished)
    with globe.first_rank_first():
        if not (begun or ranks()[0]):
            globe.fresh(to, args.overwrite, Path(cfg.model.path) if cfg.model.path else None, clear=True)
            to.mkdir(parents=True, exist_ok=True)
    with globe.discarded_on_error(to):
        trainer = LMTrainer(cfg, to, device, args.dtype)
        tasks = globe.task_runner(args.tasks or (), trainer.tokenizer)
        shape = trainer.model.config
        # rows of steps that come again, after a kill, are dropped
        if ranks()[0] == 0:
            kept = [row for row in globe.read_rows(rows) if row["step"] <= trainer.step]
            globe.write_text(rows, "".join(f"{json.dumps(row)}\n" for row in kept))
        log = globe.Log(rows, cfg, to.name)
        # Ctrl-C waits for a step's end
        with globe.held_interrupt() as stop, globe.threads_for(shape.intermediate_size, shape.hidden_size):
            steps = trainer.run(cfg.train.save_every, lambda: globe.any_rank(stop.is_set()))
            line = tqdm(steps, to.name, trainer.steps, leave=False, delay=1, initial=trainer.step,
                        disable=ranks()[0] > 0)
            for row in line:
                line.set_postfix_str(f"loss {row['loss_train']:.3f}", False)
                log.row(row)
        log.close()
        return {} if ranks()[0] else trainer.finish(tasks)


# ---- 10. train --compare: the variants beside standard models ------------------------------------
ROWS = ("standard", "standard-fewer", "mod", "mod-random", "sdt", "sdt-random", "stt", "stt-random")


def compared(cfg) -> dict:
    """{(row, seed): its settings}: two seeds of every variant, one of its twin with random routes, and of
    standard models of full depth, and of as many layers as a routed model runs on a token."""
    layers = cfg.model.layers or cfg.model.sizes[cfg.model.size]["num_hidden_layers"]
    jobs = {}
    for row in ROWS:
        variant, _, kind = row.partition("-")
        for seed in range(cfg.train.seed, cfg.train.seed + 2 - (kind == "random")):
            job = copy.deepcopy(cfg)
            job.model.variant = variant
            job.route.random = kind == "random"
            job.train.seed = seed
            if kind == "fewer":
                job.model.layers = layers - round(layers // 2 * (1 - cfg.route.capacity))
            jobs[row, seed] = job
    return jobs


# (1, T) token ids -> (1, T + count), greedy, with the cache
@torch.no_grad()
def generated(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    more = {}
    new = ids
    for _ in range(count):
        out = model(new, use_cache=True, **more)
        # its name in earlier versions of transformers is another
        name = "cache" if "cache" in out else "past_key_values"
        more = {name: out[name]}
        new = out.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], 1)
    return ids


# the same without a cache: every token from a pass over all before it
@torch.no_grad()
def recomputed(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    for _ in range(count):
        logits = model(ids, use_cache=False).logits[:, -1:]
        ids = torch.cat([ids, logits.argmax(-1)], 1)
    return ids


# operations in products per token of ids (1, T), at inference and, on the mean, in training
def flops(model: nn.Module, ids: Tensor, anneal: float) -> tuple:
    from torch.utils.flop_counter import FlopCounterMode
    counts = []
    for layer in routed_layers(model):
        layer.capacity += (1 - layer.capacity) * anneal / 2
    # it knows nothing of fused attention on a CPU
    model.set_attn_implementation("eager")
    for training in (False, True):
        with FlopCounterMode(display=False) as counter:
            loss = model.train(training)(ids, labels=ids, use_cache=False).loss
            if training:
                loss.backward()
        counts.append(counter.get_total_flops() / ids.numel())
    model.zero_grad()
    model.eval().set_attn_implementation("sdpa")
    return counts


def compare(cfg, to: Path, device: torch.device, args: argparse.Namespace) -> dict:
    """Train what is not finished below `to`, then measure; a row for each of ROWS, means over its seeds."""
    results = {row: [] for row in ROWS}
    for (row, seed), job in compared(cfg).items():
        results[row].append(train_model(job, to / f"{row}-{seed}", device, args, resume=True))
    ids = globe.token_windows(byte_tokenizer(), globe.builtin_text("heldout"), 256, 256).to(device)
    prompt = ids[:, :32]
    models = {}
    rows = {}
    for row, found in results.items():
        kind = Qwen2ForCausalLM if row.startswith("standard") else RoutedForCausalLM
        models[row] = model = kind.from_pretrained(to / f"{row}-{cfg.train.seed}").to(device).eval()
        ppl, topk, share = (sum(result[key] for result in found) / len(found)
                            for key in ("ppl_val", "ppl_val_topk", "executed"))
        same = torch.equal(generated(model, prompt, 64), recomputed(model, prompt, 64))
        inference, training = flops(model, ids, cfg.route.anneal)
        rows[row] = {"variant": row, "ppl": ppl, "ppl_topk": topk, "executed": share,
                     "flops_per_token": inference, "flops_train": training, "same_tokens": same}
    # in turns, so that a busy machine is as busy for all; the median of each
    seconds = {row: [] for row in ROWS}
    for row in ROWS * 7:
        begin = time.perf_counter()
        generated(models[row], prompt, 64)
        globe.synchronize(device)
        seconds[row].append(time.perf_counter() - begin)
    for row, times in seconds.items():
        rows[row]["tokens_s"] = 64 / sorted(times)[len(times) // 2]
    say(globe.text_table(list(rows["mod"]), [list(row.values()) for row in rows.values()]))
    return {"rows": list(rows.values())}


# ---- 11. Command line ----------------------------------------------------------------------------
def cmd_tiny(args: argparse.Namespace) -> dict:
    """Train the default model; without --to once, into the user's cache."""
    cfg = globe.load_config(args.config, args.overrides, kind=TrainConfig)
    cfg.tiny.autocast = args.dtype or cfg.tiny.autocast
    settings = dataclasses.asdict(checked(cfg))
    if args.print_config:
        print(yaml.safe_dump(settings, sort_keys=False), end="")
        return settings
    device = globe.pick_device(args.device)
    key = hashlib.sha256(json.dumps(settings["tiny"], sort_keys=True).encode()).hexdigest()
    to = Path(args.to or globe.user_cache() / f"tiny-{key[:8]}")
    # in the cache, or where --resume asks for it, an earlier run is gone on with
    finished = to / "train.json"
    begun = finished.is_file() or (to / "state" / "train.safetensors").is_file()
    if not (args.resume and begun) and (args.to or args.overwrite):
        source = Path(cfg.tiny.dense_from) if cfg.tiny.dense_from else None
        globe.fresh(to, args.overwrite, source, clear=True)
    if finished.is_file():
        return {"path": str(to)} | globe.read_json(finished)
    if not args.to:
        say(f"trained once, into {to}: the default model in about 4 minutes, configs/mid.yaml's in an hour")
    threads = globe.threads_for(cfg.tiny.moe_intermediate_size, cfg.tiny.hidden_size)
    with globe.discarded_on_error(to):
        trainer = TinyTrainer(cfg.tiny, to, device)
        # Ctrl-C waits for a step's end
        with globe.held_interrupt() as stop, threads:
            steps = trainer.run(cfg.tiny.save_every, stop.is_set)
            line = tqdm(steps, "tiny", trainer.steps, leave=False, delay=1, initial=trainer.step)
            for row in line:
                line.set_postfix_str(f"{row['phase']} loss {row['loss']:.3f}", False)
        return {"path": str(to)} | trainer.finish()


# (run, config, factors, checkpoint, device, dtype) of a heal into the directory `out`
def open_heal(args: argparse.Namespace, out: Path) -> tuple:
    first = ranks()[0] == 0
    resumed = globe.first_rank_says(args.resume and (out / "config.yaml").is_file())
    with globe.first_rank_first():  # which trains the default model where it is missing
        run, _, factors, ckpt, device, _ = globe.open_run(args)
    expect(out.resolve() not in (run.resolve(), *run.resolve().parents),
           f"--out {out}: expected another directory than --factors, and none that holds it")
    cfg = checked(globe.run_config(out if resumed else run, args, kind=TrainConfig))
    dtype = globe.with_gradients(globe.as_dtype(args.dtype or cfg.calib.dtype) or ckpt.dtype)
    dtype = globe.compute_dtype(dtype, device)
    # a resumed run may find other memory
    cfg.heal.stack = stack_size(cfg, ckpt, device, dtype)
    with globe.first_rank_first():
        if first and not resumed:
            globe.fresh(out, args.overwrite, ckpt.dir, clear=True)
    return run, cfg, factors, ckpt, device, dtype


# refuse the state of another heal: of another checkpoint, other factors, or other settings of its numbers
def check_state(state: Path, cfg: TrainConfig, ckpt: Checkpoint, factors: Factors) -> None:
    h = hashlib.sha256()
    for f in factors.families.values():
        if isinstance(f, globe.CodedFamily):
            for t in f.tensors().values():
                h.update(t.numpy().tobytes())
            continue
        for l, val in f.val.items():
            h.update(val.numpy().tobytes() + f.A[l][0].float().numpy().tobytes())
    about = {"checkpoint": ckpt.state_of(), "factors": h.hexdigest()[:16], "seed": cfg.fit.seed}
    for key, value in dataclasses.asdict(cfg.heal).items():
        if key not in ("save_every", "grad_checkpoint"):
            about[f"heal.{key}"] = value
    for key in ("text", "length", "batch", "sampled", "dtype"):
        about[f"calib.{key}"] = getattr(cfg.calib, key)
    path = state / "about.json"
    if any(state.glob("*.safetensors")):
        with globe.saved_state(path):
            globe.same_state(globe.read_json(path) if path.is_file() else {}, about)
    globe.write_text(path, json.dumps(about))


def cmd_heal(args: argparse.Namespace) -> dict:
    """Train a run's factors into a run of their own; of all ranks the first has the result."""
    begin = time.perf_counter()
    out = Path(args.out)
    with globe.joined_ranks(globe.pick_device(args.device)):
        first = ranks()[0] == 0
        run, cfg, factors, ckpt, device, dtype = open_heal(args, out)
        threads = globe.threads_for(ckpt.dims.p, ckpt.dims.d)
        rows = []
        # Ctrl-C waits for a step's end
        with globe.discarded_on_error(out), globe.held_interrupt() as stop, threads:
            if first:
                check_state(out / "state", cfg, ckpt, factors)
                config = yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False)
                globe.write_text(out / "config.yaml", config)
            windows = globe.calibration_windows(ckpt, cfg, device, cfg.heal.tokens)
            log = globe.Log(out / "log.jsonl", cfg, out.name)
            steps = heal(ckpt, factors, windows, cfg, out / "state", device, dtype, rows,
                         lambda: globe.any_rank(stop.is_set()))
            line = tqdm(steps, "heal", leave=False, delay=1, disable=not first)
            try:
                for row in line:
                    line.set_postfix_str(f"layer {row['layer']}, loss {row['loss']:.4f}", False)
                    log.row(row | {"seconds": round(time.perf_counter() - begin, 1)})
            except (KeyboardInterrupt, globe.Lost) as e:
                command = f"python train.py heal --resume --factors {run} --out {out}"
                raise type(e)(f"{e}; go on with: {command}") from None
            log.close()
        # every rank is done with its hidden states
        globe.any_rank(False)
        if not first:
            return {}
    for file in out.glob("state/*.bin"):
        file.unlink()
    globe.save_factors(factors, out / "factors.safetensors")
    table = [("{}..{}".format(*row["layers"]), row["before"], row["after"]) for row in rows]
    say(globe.text_table(("layers", "held-out loss before", "after"), table))
    return {"factors": str(out), "ratio": factors.ratio(), "stacks": rows,
            "healed": sum(row["after"] < row["before"] for row in rows),
            "seconds": round(time.perf_counter() - begin, 1), "peak_rss_gib": round(globe.peak_rss_gib(), 2)}


def cmd_train(args: argparse.Namespace) -> dict:
    cfg = lm_config(args.config, args.overrides)
    settings = dataclasses.asdict(cfg)
    if args.print_config:
        print(yaml.safe_dump(settings, sort_keys=False), end="")
        return settings
    device = globe.pick_device(args.device)
    if args.compare:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        result = compare(cfg, Path(args.to or globe.user_cache() / f"compare-{key[:8]}"), device, args)
        if args.json:
            globe.write_text(Path(args.json), json.dumps(result))
        return result
    expect(args.to, "--to: expected a directory, found none")
    with globe.joined_ranks(device):
        result = train_model(cfg, Path(args.to), device, args, args.resume)
    if result and args.push_to_hub:
        globe.push(Path(args.to), args.push_to_hub, private=True)
    return result and {"path": args.to} | result


# name: (function, what it does, examples)
COMMANDS = {
    "tiny": (cmd_tiny, "train the default model, a small Qwen2-MoE, from nothing or from a dense model", """
  python train.py tiny    once, into the user's cache
  python train.py tiny --to models/up tiny.dense_from=DIR tiny.moe_steps=500
  python train.py tiny --to models/up --resume    go on where it stopped"""),
    "heal": (cmd_heal, "recover quality after the fit: train the factors against the dense model", """
  python train.py heal --factors runs/qwen --out runs/healed heal.stack=1 heal.steps=100
  python train.py heal --resume --factors runs/qwen --out runs/healed"""),
    "train": (cmd_train, "train a language model of the Qwen2.5 family, of fixed or of routed depth", """
  python train.py train --to models/mod model.variant=mod
  python train.py train --to models/up model.path=Qwen/Qwen2.5-0.5B model.variant=sdt lora.r=16
  python train.py train --compare --json table.json    all variants beside a standard model"""),
}
# not in this version
PLANNED = {"stack": f"not in this version; its commands are {', '.join(COMMANDS)}"}
# commands by option: globe.py's options, and those of its own
ANY = " ".join(COMMANDS)
SHARED = {"overrides": ANY, "--config": ANY, "--device": ANY, "--resume": ANY, "--overwrite": ANY,
          "--print-config": "tiny train", "--factors": "heal", "--model": "heal", "--tasks": "train",
          "--push-to-hub": "train"}
OPTIONS = [(SHARED.get(option, ""), option, *about) for _, option, *about in globe.OPTIONS]
OPTIONS += [
    (ANY, "--dtype", {}, "float32, bfloat16 or float16; default: tiny.autocast, calib.dtype, the device's"),
    ("tiny train", "--to", globe.DIRECTORY, "where to; default of tiny and of --compare: the user's cache"),
    ("train", "--compare", globe.FLAG, "train all variants and standard models; one table"),
    ("train", "--json", {"metavar": "FILE"}, "the table of --compare"),
    ("heal", "--out", globe.DIRECTORY | {"required": True}, "the healed run's directory"),
]


def build_parser() -> argparse.ArgumentParser:
    return globe.build_parser("train.py", "The networks that GloBE trains itself.", COMMANDS, OPTIONS)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return globe.run_command(argv, PLANNED, build_parser())


if __name__ == "__main__":
    sys.exit(main())
