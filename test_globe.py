"""Tests of globe.py. Each name is a claim; `pytest -m "not slow"` leaves out what takes longest. No network is used."""
import ast
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needed the network would fail, not hang

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import globe
from globe import Checkpoint, Experts, Factors, FamilyFactors, Fitter, ModelConfig, UserError, load_config

with warnings.catch_warnings():  # one file, no conftest: the marks cannot be registered
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    slow, cuda = pytest.mark.slow, pytest.mark.cuda

torch.set_num_threads(1)  # matrices here are small; on a busy machine a second thread costs more than it gives
HERE = Path(globe.__file__).resolve().parent
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
ACTIVATIONS = ("identity", "silu", "tanh")
METHODS = ("varpro", "am", "adam")
KERNELS = globe.user_cache() / "kernels"
KERNELS.mkdir(parents=True, exist_ok=True)


@pytest.fixture(params=[pytest.param(d, marks=cuda if d == "cuda" else ()) for d in DEVICES])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def own_world(tmp_path, monkeypatch):
    """Every test stands in its own empty directory, with its own cache of default models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLOBE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(KERNELS)  # built once, not once a test


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


# ======================================================================================================
# Operators
# ======================================================================================================
MAPS = {"sparsemax": globe.sparsemax, "entmax15": globe.entmax15}


def by_bisection(x: torch.Tensor, name: str) -> torch.Tensor:
    """Both maps over the last dim, in float64, from their definition: p = max(z - tau, 0)^e with sum p = 1."""
    z, e = (x.double().cpu(), 1) if name == "sparsemax" else (x.double().cpu() / 2, 2)
    high = z.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(80):
        tau = (low + high) / 2
        over = (z - tau).clamp_min(0).pow(e).sum(-1, keepdim=True) > 1
        low, high = torch.where(over, tau, low), torch.where(over, high, tau)
    return (z - low).clamp_min(0).pow(e)


def test_a_simplex_map_is_its_definition_solved_by_bisection(device):
    for name in MAPS:
        for scale in (0.01, 1.0, 30.0):
            x = (scale * torch.randn(5, 7, 33, generator=gen())).to(device, wide(device))
            tol = 1e-12 if x.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(MAPS[name](x).cpu().double(), by_bisection(x, name), atol=tol, rtol=0)
            for dim in (0, 1, -2):
                want = by_bisection(x.movedim(dim, -1), name).movedim(-1, dim)
                torch.testing.assert_close(MAPS[name](x, dim).cpu().double(), want, atol=tol, rtol=0)


def test_ties_masks_and_shifts_leave_a_simplex_map_exact(device):
    for name in MAPS:
        ties = torch.tensor([[1.0, 1, 1, 0.9], [2, 2, -5, 2], [0, 0, 0, 0]], device=device)
        p = MAPS[name](ties)
        torch.testing.assert_close(p.cpu().double(), by_bisection(ties, name), atol=1e-6, rtol=0)
        assert torch.equal(p[0, 0], p[0, 1]) and torch.equal(p[1, 0], p[1, 3]) and p[1, 2] == 0
        masked = torch.randn(6, 9, generator=gen()).to(device)
        masked[:, ::2] = -math.inf
        masked[0, 1:] = -math.inf
        masked[0, 0] = 3.0
        q = MAPS[name](masked)
        assert torch.equal(q == 0, (q == 0) | masked.isinf()) and q[0, 0] == 1
        torch.testing.assert_close(q[1:, 1::2].cpu().double(), by_bisection(masked[1:, 1::2], name), atol=1e-6, rtol=0)
        x = torch.randn(4, 12, generator=gen(1)).to(device)
        torch.testing.assert_close(MAPS[name](x + 1000), MAPS[name](x), atol=2e-4, rtol=0)


def test_rows_of_4096_and_half_types_sum_to_one(device):
    for name in MAPS:
        for scale in (1e-3, 1.0, 10.0):  # the smallest has the whole row in its support
            x = (scale * torch.randn(3, 4096, generator=gen())).to(device)
            p = MAPS[name](x)
            torch.testing.assert_close(p.sum(-1).cpu(), torch.ones(3), atol=1e-4, rtol=0)
            torch.testing.assert_close(p.cpu().double(), by_bisection(x, name), atol=2e-6, rtol=1e-2)
        for dtype, tol in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
            x = torch.randn(8, 50, generator=gen(1)).to(device, dtype)
            p = MAPS[name](x)
            assert p.dtype is dtype
            torch.testing.assert_close(p.cpu().double(), by_bisection(x, name), atol=tol, rtol=0)


def test_the_gradient_of_a_simplex_map_passes_gradcheck():
    for name in MAPS:
        x = torch.randn(4, 9, generator=gen(2), dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(MAPS[name], (x,), eps=1e-7)
        assert torch.autograd.gradcheck(lambda t: MAPS[name](t, 0), (x,), eps=1e-7)


def test_sparsemax_is_sparser_than_entmax_and_entmax_than_softmax(device):
    x = torch.randn(200, 64, generator=gen()).to(device)
    sizes = [(f(x) > 0).sum(-1).float().mean() for f in (globe.sparsemax, globe.entmax15, lambda t: t.softmax(-1))]
    assert sizes[0] < sizes[1] < sizes[2] == 64
    one_hot = torch.zeros(3, 10, device=device)
    one_hot[:, 4] = 5.0  # a lead above 1 (sparsemax) or 2 (entmax-1.5) takes all
    assert torch.equal(globe.sparsemax(one_hot), one_hot / 5) and torch.equal(globe.entmax15(one_hot), one_hot / 5)


def test_compose_is_the_einsum_of_its_equation_padded_or_ragged(device):
    for activation in ACTIVATIONS:
        act = {"identity": lambda t: t, "silu": F.silu, "tanh": torch.tanh}[activation]
        for m, E, s in ((6, 1, 2), (50, 3, 4), (6, 9, 4), (3, 5, 3)):  # few rows of a large bank, and many of a small one
            bank = torch.randn(m, 5, 7, generator=gen(m)).to(device)
            idx = torch.stack([torch.randperm(m, generator=gen(i))[:s] for i in range(E)])
            val = torch.rand(E, s, generator=gen(3))
            sizes = torch.arange(E) % s + 1
            dense = torch.zeros(E, m)
            for i in range(E):
                idx[i, sizes[i]:], val[i, sizes[i]:] = 0, 0.0
                dense[i, idx[i, :sizes[i]]] = val[i, :sizes[i]]
            want = act(torch.einsum("em,mrd->erd", dense.to(device), bank))
            for index in (idx, idx.int()):
                torch.testing.assert_close(globe.compose(bank, index.to(device), val.to(device), activation), want, atol=1e-5, rtol=1e-5)
            ragged = [[t[i, :sizes[i]].to(device) for i in range(E)] for t in (idx, val)]
            torch.testing.assert_close(globe.compose(bank, *ragged, activation), want, atol=1e-5, rtol=1e-5)
            half = globe.compose(bank.bfloat16(), idx.to(device), val.to(device), activation)
            assert half.dtype is torch.bfloat16
            torch.testing.assert_close(half.float(), want, atol=0.03, rtol=0.03)


def test_compose_is_differentiable_in_bank_and_values():
    for activation in ACTIVATIONS:
        for m, E, s in ((4, 3, 3), (20, 2, 2)):
            bank = torch.randn(m, 2, 3, generator=gen(), dtype=torch.float64, requires_grad=True)
            val = torch.rand(E, s, generator=gen(1), dtype=torch.float64, requires_grad=True)
            idx = torch.randint(m, (E, s), generator=gen(2))
            assert torch.autograd.gradcheck(lambda b, v: globe.compose(b, idx, v, activation), (bank, val))


def test_operators_refuse_indices_shapes_and_types_that_do_not_fit(device):
    for f in MAPS.values():
        with pytest.raises(TypeError):
            f(torch.arange(3))
        with pytest.raises(ValueError):
            f(torch.zeros(2, 0))
    bank, val = torch.randn(4, 2, 3, device=device), torch.ones(1, 2, device=device)
    for bad in ([[0, 4]], [[-1, 0]]):
        with pytest.raises(IndexError, match=r"\[0, 4\)"):
            globe.compose(bank, torch.tensor(bad, device=device), val)
    for b, v in ((bank[0], val), (bank, val[:, :1])):
        with pytest.raises(ValueError, match="expected bank"):
            globe.compose(b, torch.tensor([[0, 1]], device=device), v)
    none = torch.zeros(0, 2, device=device)
    assert globe.compose(bank, none.int(), none).shape == (0, 2, 3)


# ======================================================================================================
# The small steps of the fit
# ======================================================================================================
def test_the_blended_jacobian_is_the_slope_of_the_blend():
    for activation in ACTIVATIONS:
        z, h = torch.linspace(-6, 6, 201, dtype=torch.float64), 1e-6
        for lam in (0.0, 0.3, 1.0):
            f, df = globe.blend(z, activation, lam)
            torch.testing.assert_close(f, (1 - lam) * z + lam * globe.phi(z, activation), atol=1e-12, rtol=0)
            slope = (globe.blend(z + h, activation, lam)[0] - globe.blend(z - h, activation, lam)[0]) / (2 * h)
            torch.testing.assert_close(torch.ones_like(z) if df is None else df, slope, atol=1e-8, rtol=1e-7)


def test_the_mixtures_pull_on_its_logits_is_autograds():
    for kind in ("sparsemax", "entmax15", "softmax", "signed"):
        z = torch.randn(12, 9, generator=gen(), dtype=torch.float64, requires_grad=True)
        mask = torch.rand(12, 9, generator=gen(1)) < 0.7
        mask[:, 0] = True
        up = torch.randn(12, 9, generator=gen(2), dtype=torch.float64)
        for T in (0.3, 1.0, 4.0):
            alpha = globe.mixture(z, T, kind, mask)
            assert not alpha[~mask].any()
            want, = torch.autograd.grad((alpha * up).sum(), z)
            torch.testing.assert_close(globe.mixture_vjp(alpha.detach(), up, T, kind, mask), want, atol=1e-10, rtol=1e-8)


def spd_root(d: int, seed: int) -> torch.Tensor:
    """A lower factor of a well-conditioned second moment, float32."""
    x = torch.randn(3 * d, d, generator=gen(seed))
    return torch.linalg.cholesky(x.T @ x / (3 * d))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradients_of_the_objective_are_its_finite_differences(activation):
    n, m, r, p, d = 6, 4, 3, 5, 7
    W = torch.randn(n, p, d, generator=gen())
    for metric in ("weights", "data", "down"):
        size = p if metric == "down" else d
        L, keys = {l: spd_root(size, l) for l in range(2)}, [(l, e) for l in range(2) for e in range(3)]
        sides = {"weights": {}, "data": {"right": L, "left": {k: 0.5 + torch.rand(p, generator=gen(k[1])) for k in keys},
                                             "means": lambda l, e: 2 * torch.randn(p, d, generator=gen(20 + 3 * l + e))},
                 "down": {"left": {k: L[k[0]] for k in keys}}}[metric] if metric != "weights" else {}
        experts = Experts(lambda l, e: W[3 * l + e], keys, "global", normalize="scale", **sides)
        assert (next(experts.stream())[5] is not None) == (metric == "data")
        for method, sort in (("varpro", "entmax15"), ("am", "signed"), ("adam", "entmax15"), ("adam", "signed")):
            cfg = load_config(None, [f"bank.activation={activation}", f"fit.method={method}", "fit.dtype=float64", "sparsity.l1=0.01",
                                     "fit.lambda_B=0.1", "fit.spectral=0.02", f"fit.lambda_A={1e-3 if method == 'adam' else 1e-7}"])
            x = {"B": torch.randn(1, m, r, d, generator=gen(1)).double(), "z": torch.randn(n, m, generator=gen(2)).double()}
            if method == "adam":
                x["A"] = torch.randn(n, p, r, generator=gen(3)).double()
            mask = torch.ones(n, m, dtype=torch.bool)
            mask[0, 1] = mask[4, 2] = False
            s = globe.Schedule(0.7, 1.0, 0.8, True)
            at = globe.evaluate(x, experts, cfg, sort, mask, s)
            assert set(at.grad) == set(x)
            for key in x:
                for k in range(3):
                    v, h = torch.randn(x[key].shape, generator=gen(10 + k)).double(), 1e-5
                    ends = [globe.evaluate(x | {key: x[key] + t * v}, experts, cfg, sort, mask, s).value for t in (h, -h)]
                    assert (at.grad[key] * v).sum().item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=2e-4, abs=2e-6), \
                        (metric, method, sort, key)


def test_the_A_step_is_the_ridge_minimiser():
    W, X = torch.randn(4, 6, 9, generator=gen()).double(), torch.randn(4, 5, 9, generator=gen(1)).double()
    for ridge in (0.3, 1e-4):
        A = globe.adapters(W, X, ridge, torch.float64).requires_grad_()
        level = (X @ X.mT).diagonal(dim1=-2, dim2=-1).mean(-1)
        loss = (W - A @ X).square().sum() + (ridge * level * A.square().sum((-1, -2))).sum()
        assert torch.autograd.grad(loss, A)[0].abs().max() < 1e-9 * loss.item()


def test_targets_blend_the_composed_basis_with_the_best_one_for_A():
    A, X, W = (torch.randn(3, *s, generator=gen(i)).double() for i, s in enumerate(((8, 4), (4, 6), (8, 6))))
    best, L = torch.linalg.pinv(A) @ W, spd_root(6, 5).double()
    for beta in (0.0, 0.4, 1.0):
        want = (1 - beta) * X + beta * best
        torch.testing.assert_close(X + globe.target_shift(A.mT @ A, A.mT @ (W - A @ X), None, beta, 1e-9), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(X + globe.target_shift(A.mT @ A, A.mT @ (W - A @ X) @ L @ L.mT, L, beta, 1e-9), want, atol=1e-5, rtol=1e-5)


def test_nnls_finds_the_best_of_all_supports():
    B = torch.randn(5, 12, generator=gen()).double()
    G, c = B @ B.T, torch.randn(20, 12, generator=gen(1)).double() @ B.T
    got = globe.nnls(G, c, 500)
    assert (got >= 0).all()
    for row, a in zip(c, got):
        best = 0.0
        for on in itertools.chain.from_iterable(itertools.combinations(range(5), k) for k in range(1, 6)):
            on = list(on)
            x = torch.linalg.solve(G[on][:, on], row[on])
            if (x >= 0).all():
                best = min(best, float(-x @ row[on]))
        assert float(a @ G @ a - 2 * a @ row) == pytest.approx(best, abs=1e-6)


def test_a_singular_gram_matrix_is_survived_and_one_of_nan_is_not(device):
    X = torch.randn(2, 4, 9, generator=gen()).to(device)
    X[:, 1] = X[:, 0]
    X[1, 2:] = 0
    truth = torch.randn(2, 6, 4, generator=gen(1)).to(device)
    A = globe.adapters(truth @ X, X, 0.0)
    assert torch.isfinite(A).all()
    assert (truth @ X - A @ X).norm() < 1e-3 * (truth @ X).norm()
    assert torch.isfinite(globe.spd_factor(torch.zeros(3, 3, device=device), 0.0)).all()
    with pytest.raises(globe.Diverged):
        globe.spd_factor(torch.full((3, 3), math.nan, device=device), 0.1)


# ======================================================================================================
# The fit on planted factors
# ======================================================================================================
N, P, D, R, M, S = 32, 24, 40, 12, 8, 3  # experts, p, d, r, bases, support of the planted family
KEYS = [(l, e) for l in range(4) for e in range(8)]


def planted(activation: str, seed: int = 100) -> tuple:
    """Bank (M, R, D), mixtures (N, M) with supports of S, adapters and the weights (N, P, D) that they make.

    The seed is far from fit.seed: equal ones would give a random init the planted bank itself.
    """
    g = gen(seed)
    B, alpha = torch.randn(M, R, D, generator=g), torch.zeros(N, M)
    for i in range(N):
        j = torch.randperm(M, generator=g)[:S]
        alpha[i, j] = torch.rand(S, generator=g) + 0.5
    alpha /= alpha.sum(1, keepdim=True)
    A = torch.randn(N, P, R, generator=g)
    return B, alpha, A, A @ globe.phi((alpha @ B.flatten(1)).view(N, R, D), activation)


def fit_family(W: torch.Tensor, shape: tuple, device="cpu", start=None, **settings) -> tuple:
    """(FamilyFactors, log rows) of W (N, P, D) as 4 layers of 8 experts. Settings: section__key=value."""
    cfg = load_config(None, [f"{k.replace('__', '.')}={v}" for k, v in settings.items()])
    experts = Experts(lambda l, e: W[8 * l + e], KEYS, cfg.bank.scope, torch.device(device), cfg.model.normalize)
    fitter, rows = Fitter(experts, cfg, shape, start=start), []
    while not fitter.done:
        rows.append(fitter.step())
    return fitter.factors(), rows


def relative_error(f: FamilyFactors, W: torch.Tensor) -> float:
    return float((torch.stack([f.weight(l, e) for l, e in KEYS]) - W).norm() / W.norm())


def supports(f: FamilyFactors) -> torch.Tensor:
    """(N, M) which basis is in which expert's mixture."""
    idx, val = (torch.cat([t[l] for l in range(4)]) for t in (f.idx, f.val))
    return torch.zeros(N, M).scatter_add_(1, idx.long(), val) != 0


@slow
@pytest.mark.parametrize("method, steps", (("varpro", 300), ("am", 600), ("adam", 1500)))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_from_five_percent_off_the_planted_factors_come_back(activation, method, steps, device):
    B, alpha, _, W = planted(activation)
    g = gen(1)
    z = 2 * alpha.sqrt() * (1 + 0.05 * torch.randn(N, M, generator=g))  # entmax-1.5: p = (z / 2 - tau)^2, here tau = 0
    z = torch.where(alpha > 0, z, -0.02)  # the bases left out stand near the edge of the support
    start = {"B": (B + 0.05 * B.std() * torch.randn(B.shape, generator=g))[None], "z": z}
    f, _ = fit_family(W, (M, R), device, start, bank__activation=activation, fit__method=method, fit__steps=steps, bank__m=M,
                      bank__r=R, sparsity__support=S, sparsity__map="entmax", sparsity__freeze=0.7)
    assert relative_error(f, W) < 1e-3
    assert torch.equal(supports(f), alpha > 0)


@slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_cold_start_with_twice_the_bases_beats_half_the_error_of_svd(activation, device):
    *_, W = planted(activation)
    f, _ = fit_family(W, (2 * M, R), device, bank__activation=activation, fit__steps=600, bank__m=2 * M, bank__r=R,
                      bank__init="random", sparsity__map="softmax", sparsity__freeze=0.7)
    s = torch.linalg.svdvals(W)
    rank = f.numbers() / N / (P + D)  # of a per-expert SVD of the same size; a part of a rank is credited to it
    k = int(rank)
    svd = float(((s[:, k:].square().sum() - (rank - k) * s[:, k].square().sum()) / s.square().sum()).sqrt())
    error = relative_error(f, W)
    assert error <= 0.10 and error < svd / 2


# ======================================================================================================
# The fit: what holds for every method
# ======================================================================================================
SMALL = dict(bank__m=5, bank__r=4, sparsity__support=2, fit__homotopy__every=3, sparsity__T0=2.0, sparsity__eta=0.5,
             fit__homotopy__lam_start=0.0, fit__homotopy__lam_steps=6, sparsity__freeze=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_an_accepted_step_never_raises_the_loss_of_its_schedule(method, device):
    W = planted("silu")[-1]
    for sort, lr in (("entmax", 0.05), ("signed", 1.0), ("softmax", 0.05)):
        cfg = load_config(None, [f"{k.replace('__', '.')}={v}" for k, v in SMALL.items()] +
                          [f"fit.method={method}", "fit.steps=24", f"sparsity.map={sort}", f"fit.lr={lr}"])
        experts = Experts(lambda l, e: W[8 * l + e], KEYS, "layer", device)
        fitter, before, held = Fitter(experts, cfg, (5, 4)), None, 0
        while not fitter.done:
            row = fitter.step()
            schedule = (row["lambda"], row["beta"], row["T"], fitter.frozen, int(fitter.mask.sum()))
            if before and before[0] == schedule:
                assert row["loss"] <= before[1]
                held += row["loss"] < before[1]
            before = (schedule, row["loss"])
        assert held >= 8  # and it moves


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_factors_and_resuming_changes_no_bit(method, tmp_path):
    W = planted("silu")[-1]
    cfg = load_config(None, [f"{k.replace('__', '.')}={v}" for k, v in SMALL.items()] + [f"fit.method={method}", "fit.steps=14"])

    def fresh(seed: int = 0) -> Fitter:
        cfg.fit.seed = seed
        return Fitter(Experts(lambda l, e: W[8 * l + e], KEYS, 2), cfg, (5, 4))

    def finish(fitter: Fitter) -> list:
        while not fitter.done:
            fitter.step()
        f = fitter.factors()
        return [*f.bank, *f.A.values(), *f.idx.values(), *f.val.values()]
    whole = finish(fresh())
    assert all(map(torch.equal, whole, finish(fresh())))
    assert not torch.equal(whole[0], finish(fresh(1))[0])
    for stop in (1, 5, 9, 13):  # within a stage, on its edge, after supports were fixed
        first = fresh()
        for _ in range(stop):
            first.step()
        saved = globe.SavedFit(tmp_path, f"{method}-{stop}", spill=stop == 5)
        saved.save(first)
        again = fresh(7)
        again.load_state(*globe.SavedFit(tmp_path, f"{method}-{stop}", spill=stop == 9).load())
        assert again.step_done == stop
        assert all(map(torch.equal, whole, finish(again))), stop


def test_a_step_that_is_not_finite_raises_diverged_and_keeps_the_last_good_state():
    W = planted("silu")[-1]
    cfg = load_config(None, ["fit.method=adam", "fit.adam.safeguard=false", "fit.lr=1e30", "fit.steps=20", "bank.init=experts"])
    fitter = Fitter(Experts(lambda l, e: W[8 * l + e], KEYS), cfg, (5, 4))
    with pytest.raises(globe.Diverged, match="not finite.*fit.lr"):
        while not fitter.done:
            fitter.step()
    assert all(torch.isfinite(v).all() for v in fitter.state().values())
    assert torch.isfinite(fitter.factors().weight(0, 0)).all()


def test_supports_are_cut_to_size_under_every_map():
    for method in METHODS:
        W = planted("silu")[-1]
        for sort in ("entmax", "sparsemax", "softmax", "signed"):
            f, rows = fit_family(W, (5, 4), fit__method=method, fit__steps=8, sparsity__map=sort, **SMALL)
            assert 1 <= f.support().min() and f.support().max() <= 2
            assert rows[-1]["support"] <= 2 and rows[-1]["zeros"] >= 0.6
            total = torch.cat([v.sum(-1) for v in f.val.values()])
            if sort != "signed":  # still mixtures after the cut
                torch.testing.assert_close(total, torch.ones(N), atol=1e-5, rtol=0)


def test_a_fit_moves_every_part_of_its_schedule():
    rows = fit_family(planted("silu")[-1], (5, 4), fit__steps=24, fit__homotopy__beta_steps=12, sparsity__map="entmax", **SMALL)[1]
    assert [rows[0]["lambda"], rows[-1]["lambda"]] == [0.0, 1.0] and 0 < rows[4]["lambda"] < 1
    assert [rows[0]["beta"], rows[-1]["beta"]] == [0.5, 1.0]
    assert rows[0]["T"] == 2.0 and rows[-1]["T"] < 2.0
    assert {"step", "loss", "mse", "rel_frob", "support", "effective_support", "zeros"} <= set(rows[0])
    assert [r["step"] for r in rows] == list(range(1, 25))


def test_bank_scope_says_how_many_banks_there_are():
    W = planted("silu")[-1]
    for scope, groups in (("global", [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (3, [0, 0, 0, 1]), ("layer", [0, 1, 2, 3])):
        f, _ = fit_family(W, (3, 4), fit__steps=2, bank__m=3, bank__scope=scope)
        assert len(f.bank) == max(groups) + 1 and [f.group[l] for l in range(4)] == groups
        assert all(b.shape == (3, 4, D) for b in f.bank)


def test_every_init_starts_the_fit_within_reach():
    for init in ("svd", "dictionary", "random"):
        W = planted("silu")[-1]
        for m in (5, 40):  # fewer bases than experts, and more
            f, rows = fit_family(W, (m, 4), bank__init=init, bank__m=m, bank__r=4, fit__steps=3, bank__scope=2)
            assert rows[0]["rel_frob"] < 1 and rows[-1]["rel_frob"] < rows[0]["rel_frob"] + 1e-9
            assert torch.isfinite(f.bank[0]).all() and (torch.stack([v.amax() for v in f.val.values()]) > 0).all()


def test_normalisation_is_undone_on_the_way_out():
    """With r = d any matrix is representable, so what comes out must be what went in."""
    W = 3.0 + 0.02 * torch.randn(N, 6, 10, generator=gen())
    for how in ("none", "scale", "zscore"):
        f, _ = fit_family(W, (4, 10), fit__steps=2, bank__m=4, model__normalize=how, fit__lambda_A=1e-7)
        assert (f.shift != 0) == (how == "zscore") and (f.scale != 1) == (how != "none")
        back = torch.stack([f.weight(l, e) for l, e in KEYS])
        assert (back - W).norm() < 2e-3 * W.norm(), how
    square, rows = {k: spd_root(6, k[0]) for k in KEYS}, {k: torch.rand(6, generator=gen(k[1])) + 0.3 for k in KEYS}
    right = {l: spd_root(10, l) for l in range(4)}
    for scope, sides in (("global", {"left": square}), ("global", {"left": rows, "right": right}),
                         ("layer", {"left": rows, "right": right, "absorb": True})):
        experts = Experts(lambda l, e: W[8 * l + e], KEYS, scope, normalize="zscore", **sides)
        f = Fitter(experts, load_config(None, ["fit.steps=1", "bank.m=4", "fit.lambda_A=1e-7"]), (4, 10)).factors()
        assert (torch.stack([f.weight(l, e) for l, e in KEYS]) - W).norm() < 2e-3 * W.norm(), scope


@pytest.mark.parametrize("means", (False, True))
def test_a_bank_that_absorbs_the_metric_gives_the_same_fit(means):
    W, right = torch.randn(N, 6, 10, generator=gen()), {l: spd_root(10, l) for l in range(4)}
    cfg, errors = load_config(None, ["fit.steps=60", "bank.m=3", "sparsity.support=3", "bank.init=experts"]), []
    U = 3 * torch.randn(N, 6, 10, generator=gen(1)) if means else torch.zeros(N, 6, 10)
    for absorb in (False, True):
        experts = Experts(lambda l, e: W[8 * l + e], KEYS, "layer", right=right, absorb=absorb, means=(lambda l, e: U[8 * l + e]) if means else None)
        assert experts.absorbed == absorb
        fitter = Fitter(experts, cfg, (3, 4))
        while not fitter.done:
            fitter.step()
        f = fitter.factors()
        lost = torch.stack([(f.weight(l, e) - W[8 * l + e]) * experts.level[l] for l, e in KEYS])
        R, at_means = lost @ torch.stack([right[l] for l, _ in KEYS]), (lost * U).sum(-1)
        errors.append(float(R.square().sum() + at_means.square().sum()) / float(experts.energy.sum()))
        assert errors[-1] == pytest.approx(fitter.here.error, rel=1e-3)
    assert errors[1] == pytest.approx(errors[0], rel=0.1)  # other coordinates, so perhaps another local minimum


def test_a_fit_in_the_metric_is_better_in_it_than_a_fit_of_the_weights():
    W = planted("silu")[-1]
    scale = torch.logspace(-1.5, 1, D)  # inputs that differ much in size
    metric = {l: globe.metric_factor(torch.diag(scale.square()).double(), 1e-3) for l in range(4)}
    cfg, errors = load_config(None, ["bank.m=5", "bank.r=4", "fit.steps=40"]), []
    for m in (metric, {}):
        fitter = Fitter(Experts(lambda l, e: W[8 * l + e], KEYS, right=m), cfg, (5, 4))
        while not fitter.done:
            fitter.step()
        f = fitter.factors()
        R = torch.stack([f.weight(l, e) for l, e in KEYS]) - W
        errors.append(float((R @ metric[0]).norm() / (W @ metric[0]).norm()))
    assert errors[0] < 0.8 * errors[1]


def test_bank_ratio_picks_the_largest_r_that_fits():
    dims = globe.Dims(tuple(range(4)), 8, 24, 40, 2, 0)
    for ratio in (0.4, 0.7):
        cfg = load_config(None, [f"bank.ratio={ratio}", "bank.m=4", "sparsity.support=2"])
        m, r = globe.bank_shape(cfg, "up", 32, 1, dims)

        def stored(r: int) -> float:
            return (32 * 24 * r + 4 * r * 40 + 2 * 32 * 2 + 2) / (32 * 24 * 40)
        assert m == 4 and stored(r) <= ratio < stored(r + 1)
    assert globe.bank_shape(load_config(None, ["bank.r=0.5", "bank.m={up: 3, gate: 2}"]), "gate", 32, 1, dims) == (2, 12)
    with pytest.raises(UserError, match="bank.m"):
        globe.bank_shape(load_config(None, ["bank.m=1000"]), "up", 32, 4, dims)


# ======================================================================================================
# Checkpoints
# ======================================================================================================
BASE = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, initializer_range=0.2)
DEEPSEEK = dict(moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=2, first_k_dense_replace=1,
                intermediate_size=48, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, topk_group=1,
                num_key_value_heads=4)
ARCHITECTURES = {
    "qwen2_moe": dict(moe_intermediate_size=16, shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
                      intermediate_size=48),
    "qwen3_moe": dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, intermediate_size=48, head_dim=8),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=16),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2, intermediate_size=16),
    "deepseek_v2": DEEPSEEK | dict(q_lora_rank=None, n_group=1),
    "deepseek_v3": DEEPSEEK | dict(q_lora_rank=8, n_group=2),
}
QWEN = dict(vocab_size=151936)
TRUE_CONFIGS = {  # from the config.json of each model on the hub
    "Qwen1.5-MoE-A2.7B": ("qwen2_moe", QWEN | dict(
        hidden_size=2048, intermediate_size=5632, moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=16, num_experts=60, num_experts_per_tok=4), (24, 60, 1408, 2048, 4, 4)),
    "Qwen2-57B-A14B": ("qwen2_moe", QWEN | dict(
        hidden_size=3584, intermediate_size=18944, moe_intermediate_size=2560, shared_expert_intermediate_size=20480, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, num_experts=64, num_experts_per_tok=8), (28, 64, 2560, 3584, 8, 8)),
    "Qwen3-30B-A3B": ("qwen3_moe", QWEN | dict(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True), (48, 128, 768, 2048, 8, 0)),
    "Mixtral-8x7B": ("mixtral", dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        num_local_experts=8, num_experts_per_tok=2), (32, 8, 14336, 4096, 2, 0)),
    "OLMoE-1B-7B-0924": ("olmoe", dict(
        vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16,
        num_experts=64, num_experts_per_tok=8), (16, 64, 1024, 2048, 8, 0)),
    "DeepSeek-V2-Lite": ("deepseek_v2", dict(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
        first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128),
        (26, 64, 1408, 2048, 6, 2)),
    "DeepSeek-V3": ("deepseek_v3", dict(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
        num_attention_heads=128, num_key_value_heads=128, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, n_group=8,
        topk_group=4, first_k_dense_replace=3, kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128), (58, 256, 2048, 7168, 8, 1)),
}


@pytest.mark.parametrize("name", TRUE_CONFIGS)
def test_the_layout_accounts_for_every_expert_tensor_of(name):
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion
    kind, sizes, (layers, *rest) = TRUE_CONFIGS[name]
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    on_disk = {n: list(t.shape) for n, t in revert_weight_conversion(model, model.state_dict()).items()
               if re.search(r"\.(experts|shared_experts?)\.", n)}
    ckpt = Checkpoint.__new__(Checkpoint)  # no files: the layout and the sizes alone
    ckpt.config = sizes | {"model_type": kind}
    ckpt.layout, ckpt.dims, ckpt.fused = globe.layout_of(ckpt.config), globe.dims_of(ckpt.config), False
    assert (len(ckpt.dims.layers), *dataclasses.astuple(ckpt.dims)[1:]) == (layers, *rest)
    assert dict(ckpt.expected_tensors()) == on_disk
    assert globe.dims_of(json.loads(config.to_json_string(use_diff=False))) == ckpt.dims  # as transformers saves it again


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict:
    """{model type: directory} of every architecture with random weights, made on demand."""
    from transformers import AutoConfig, AutoModelForCausalLM

    class Made(dict):
        def __missing__(self, key: str) -> Path:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(key, **{**BASE, **ARCHITECTURES[key]}))
            self[key] = tmp_path_factory.mktemp("model") / key
            model.save_pretrained(self[key])
            return self[key]
    return Made()


def stock(directory: Path) -> torch.nn.Module:
    return globe.load_dense(Path(directory), torch.device("cpu"), None)


def same_experts(a: Checkpoint, b: Checkpoint) -> bool:
    ids = [(f, l, e) for f in globe.FAMILIES for l in a.dims.layers for e in range(a.dims.experts + a.dims.shared)]
    return a.dims == b.dims and all(torch.equal(a.expert(*i), b.expert(*i)) for i in ids)


def test_single_sharded_and_fused_checkpoints_read_the_same(checkpoints, tmp_path):
    for kind in ("qwen2_moe", "mixtral", "deepseek_v3"):
        place = tmp_path / kind
        model, single = stock(checkpoints[kind]), Checkpoint(checkpoints[kind])
        model.save_pretrained(place / "sharded", max_shard_size="20KB")
        fused = place / "fused"
        shutil.copytree(checkpoints[kind], fused)
        save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, fused / "model.safetensors")
        assert (place / "sharded/model.safetensors.index.json").is_file() and Checkpoint(fused).fused
        assert same_experts(single, Checkpoint(place / "sharded")) and same_experts(single, Checkpoint(fused))
        assert single.fingerprint() == Checkpoint(fused).fingerprint() == Checkpoint(place / "sharded").fingerprint()
        experts = globe.experts_modules(model)[1][2]
        for e in range(4):
            gate, up = experts.gate_up_proj[e].chunk(2)
            for family, want in (("gate", gate), ("up", up), ("down", experts.down_proj[e].T)):
                assert torch.equal(single.expert(family, 1, e), want)


def refused(*argv, capsys, code: int = 2) -> str:
    """The one line that a wrong input gets."""
    capsys.readouterr()
    assert globe.main([str(a) for a in argv]) == code
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    return err


def test_missing_misshapen_and_extra_expert_tensors_are_named_in_one_line(checkpoints, tmp_path, capsys):
    source = load_file(checkpoints["qwen3_moe"] / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    extra = name.replace("experts.2", "experts.4")
    for bad, words in (({k: v for k, v in source.items() if k != name}, (name, "(16, 32)", "none")),
                       (source | {name: torch.zeros(16, 31)}, (name, "(16, 32)", "(16, 31)", "model.safetensors")),
                       (source | {extra: torch.zeros(16, 32)}, (extra, "not expected", "model.safetensors"))):
        (tmp_path / "bad").mkdir(exist_ok=True)
        shutil.copy(checkpoints["qwen3_moe"] / "config.json", tmp_path / "bad")
        save_file(bad, tmp_path / "bad/model.safetensors")
        line = refused("fit", f"model.path={tmp_path / 'bad'}", capsys=capsys)
        assert all(w in line for w in words), line
    stock(checkpoints["qwen3_moe"]).save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    shard = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())["weight_map"][name]
    save_file({k: v for k, v in load_file(tmp_path / "cut" / shard).items() if k != name}, tmp_path / "cut" / shard)
    line = refused("fit", f"model.path={tmp_path / 'cut'}", capsys=capsys)
    assert name in line and shard in line
    (tmp_path / "cut" / shard).unlink()
    assert shard in refused("fit", f"model.path={tmp_path / 'cut'}", capsys=capsys)
    assert not Path("runs").exists()


def test_unsupported_and_quantized_models_are_refused_by_name(tmp_path, capsys):
    for kind in ("gpt_oss", "llama", "dbrx", "nonsense"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        line = refused("fit", f"model.path={tmp_path}", capsys=capsys)
        assert kind in line and all(name in line for name in globe.LAYOUTS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_moe", "quantization_config": {"quant_method": "fp8"}}))
    assert "quantized (fp8)" in refused("fit", f"model.path={tmp_path}", capsys=capsys)
    (tmp_path / "config.json").write_text("[]")
    assert "config.json" in refused("fit", f"model.path={tmp_path}", capsys=capsys)


def test_a_wrong_path_and_a_directory_of_pickles_are_refused(checkpoints, tmp_path, capsys):
    assert "no/such/place" in refused("fit", "model.path=no/such/place", capsys=capsys)
    assert "config.json" in refused("fit", f"model.path={tmp_path}", capsys=capsys)
    shutil.copy(checkpoints["olmoe"] / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    line = refused("fit", f"model.path={tmp_path}", capsys=capsys)
    assert "pytorch_model.bin" in line and "pickle" in line
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refused("fit", f"model.path={tmp_path}", capsys=capsys)


def test_single_layer_max_experts_and_include_shared_choose_experts():
    dims = globe.Dims((1, 2), 8, 24, 40, 2, 2)

    def chosen(**k) -> list:
        return globe.select_experts(dims, ModelConfig(**k))
    assert chosen() == [(l, e) for l in (1, 2) for e in range(8)]
    assert chosen(single_layer=2, max_experts=3) == [(2, 0), (2, 1), (2, 2)]
    assert chosen(single_layer=1, max_experts=3, sample="evenly_spaced") == [(1, 0), (1, 4), (1, 7)]
    assert chosen(single_layer=1, max_experts=1, include_shared=True) == [(1, 0), (1, 8), (1, 9)]
    assert len(chosen(max_experts=99)) == 16
    for bad in (dict(single_layer=0), dict(single_layer=3)):
        with pytest.raises(UserError, match="single_layer"):
            chosen(**bad)
    with pytest.raises(UserError, match="include_shared"):
        globe.select_experts(dataclasses.replace(dims, shared=0), ModelConfig(include_shared=True))


# ======================================================================================================
# Exactness: factors that represent the weights exactly change nothing
# ======================================================================================================
def exact_factors(ckpt: Checkpoint, families: str = "both", rank: int | None = None, **select) -> Factors:
    """One basis per expert, one-hot mixtures, A = I; with `rank`, A and basis from the SVD of weights of that rank."""
    keys = globe.select_experts(ckpt.dims, ModelConfig(**select))
    layers = list(dict.fromkeys(l for l, _ in keys))
    rows = {l: [i for i, k in enumerate(keys) if k[0] == l] for l in layers}
    out = {}
    for f in globe.families_of(ModelConfig(families=families)):
        W = torch.stack([ckpt.expert(f, *k).float() for k in keys])
        A, bank = torch.eye(W.shape[1]).expand(len(W), -1, -1), W
        if rank:
            U, s, V = torch.linalg.svd(W.double())
            A, bank = (U[..., :rank] * s[:, None, :rank]).float(), V[:, :rank].float()
        out[f] = FamilyFactors([bank], {l: A[i].clone() for l, i in rows.items()},
                               {l: torch.tensor(i)[:, None].int() for l, i in rows.items()},
                               {l: torch.ones(len(i), 1) for l, i in rows.items()}, {l: 0 for l in layers}, "identity")
    return Factors(out, {l: [e for k, e in keys if k == l] for l in layers}, ckpt.dims, ckpt.config["model_type"], ckpt.fingerprint())


IDS = torch.arange(64)[torch.randperm(64, generator=gen(5))].view(2, 32)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS.to(next(model.parameters()).device)).logits.float().cpu()


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_patched_and_assembled_models_with_exact_factors_equal_the_dense(kind, checkpoints, device):
    for families in ("both", "all"):
        ckpt, model = Checkpoint(checkpoints[kind]), stock(checkpoints[kind]).to(device)
        want, factors = logits(model), exact_factors(ckpt, families)
        assert want.std() > 0.1  # logits that say something
        globe.patch(model, factors, globe.CacheConfig(mode="all"))
        patched = logits(model)
        assert gap(patched, want) < 1e-4 and len(globe.globe_modules(model)) == len(ckpt.dims.layers)
        assembled = globe.assemble(ckpt, factors, device)
        assert gap(logits(assembled), patched) < 1e-5
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "globe_bank" in name:
                    p.mul_(0.5)
        model.train().eval()  # lets go of what the cache holds
        assert gap(logits(model), want) > 1e-2  # the factors are what runs
        globe.unpatch(model)
        assert torch.equal(logits(model), want) and not globe.globe_modules(model)
        with pytest.raises(UserError, match="unpatch"):
            globe.unpatch(model)


def test_a_shared_expert_in_slices_equals_the_dense(checkpoints):
    for kind in ("qwen2_moe", "deepseek_v2"):
        ckpt, model = Checkpoint(checkpoints[kind]), stock(checkpoints[kind])
        want = logits(model)
        for families in ("up", "all"):
            factors = exact_factors(ckpt, families, include_shared=True)
            globe.patch(model, factors)
            assert gap(logits(model), want) < 1e-4 and gap(logits(globe.assemble(ckpt, factors)), want) < 1e-4
            assert any(isinstance(m, globe.GlobeShared) for m in model.modules())
            globe.unpatch(model)
        assert torch.equal(logits(model), want)


def test_experts_and_layers_that_were_not_fitted_stay_dense(checkpoints, tmp_path):
    ckpt, model = Checkpoint(checkpoints["qwen3_moe"]), stock(checkpoints["qwen3_moe"])
    want = logits(model)
    for select in (dict(single_layer=1), dict(max_experts=2, sample="evenly_spaced"), dict(single_layer=0, max_experts=3)):
        factors = exact_factors(ckpt, "gate", **select)
        assert gap(logits(globe.patch(model, factors)), want) < 1e-4
        globe.unpatch(model)
        globe.export_globe(ckpt, factors, fresh_dir(tmp_path / "out"))
        assert gap(logits(globe.assemble(ckpt, factors)), want) < 1e-4 and gap(logits(globe.load(tmp_path / "out")), want) < 1e-4


def fresh_dir(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def test_weights_or_bases_are_held_whichever_is_smaller(checkpoints, tmp_path):
    low = tmp_path / "low"
    shutil.copytree(checkpoints["qwen2_moe"], low)
    tensors = load_file(low / "model.safetensors")
    for name, w in tensors.items():
        if ".mlp.experts." in name:
            U, s, V = torch.linalg.svd(w, full_matrices=False)
            tensors[name] = (U[:, :4] * s[:4]) @ V[:4]
    save_file(tensors, low / "model.safetensors", metadata={"format": "pt"})
    want = logits(stock(low))
    for rank, hold in ((4, "basis"), (None, "weight")):
        model = globe.patch(stock(low), exact_factors(Checkpoint(low), "all", rank))
        assert {h for m in globe.globe_modules(model) for h in m.hold.values()} == {hold}
        assert gap(logits(model), want) < 1e-4


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_dense_export_is_the_source_with_only_its_experts_replaced(kind, checkpoints, tmp_path):
    sharded = tmp_path / "source"
    stock(checkpoints[kind]).save_pretrained(sharded, max_shard_size="20KB")
    want = logits(stock(checkpoints[kind]))
    for source in (checkpoints[kind], sharded):
        ckpt, to = Checkpoint(source), fresh_dir(tmp_path / "dense")
        globe.export_dense(ckpt, exact_factors(ckpt, "all"), to)
        assert gap(logits(stock(to)), want) < 1e-4
        assert (to / "config.json").read_bytes() == (source / "config.json").read_bytes()
        half = exact_factors(ckpt, "all")
        for f in half.families.values():
            f.scale = 0.5
        globe.export_dense(ckpt, half, fresh_dir(to))
        assert [f.name for f in sorted(to.glob("*.safetensors*"))] == [f.name for f in sorted(source.glob("*.safetensors*"))]
        for shard in source.glob("*.safetensors"):
            a, b = load_file(shard), load_file(to / shard.name)
            assert list(a) == list(b) and shard.stat().st_size == (to / shard.name).stat().st_size
            for name in a:
                expert = ".experts." in name
                torch.testing.assert_close(b[name], a[name] / 2 if expert else a[name], rtol=1e-5 * expert, atol=1e-6 * expert)


def test_globe_and_composed_exports_load_with_the_same_logits(checkpoints, tmp_path):
    for kind in ("qwen2_moe", "mixtral", "deepseek_v3"):
        ckpt, want = Checkpoint(checkpoints[kind]), logits(stock(checkpoints[kind]))
        factors = exact_factors(ckpt, "all")
        for composed in (False, True):
            to = fresh_dir(tmp_path / "export")
            globe.export_globe(ckpt, factors, to, composed)
            assert gap(logits(globe.load(to)), want) < 1e-4
            tensors = {n: t for f in to.glob("*.safetensors") for n, t in load_file(f).items()}
            names = [n for n, t in tensors.items() if not n.endswith("gate_up_proj") or t.numel() > 1]  # one number: the guard
            assert any("globe_bank" in n for n in names) != composed and any(n.endswith("_basis") for n in names) == composed
            assert not any("experts.0.gate_proj" in n or "gate_up_proj" in n for n in names)  # no dense form of what was fitted
            assert (to / "globe.py").read_bytes() == Path(globe.__file__).read_bytes()
        globe.export_globe(ckpt, factors, fresh_dir(to), dtype=torch.bfloat16)
        model = globe.load(to)
        assert next(model.parameters()).dtype is torch.bfloat16 and gap(logits(model), want) < 0.3 * want.std() + 0.3
        with pytest.raises(UserError, match="globe export"):
            globe.load(checkpoints[kind])


def test_patch_refuses_a_model_that_the_factors_do_not_fit(checkpoints):
    factors = exact_factors(Checkpoint(checkpoints["qwen3_moe"]))
    with pytest.raises(UserError, match="expected qwen3_moe, found olmoe"):
        globe.patch(stock(checkpoints["olmoe"]), factors)
    model = globe.patch(stock(checkpoints["qwen3_moe"]), factors)
    with pytest.raises(UserError, match="already patched"):
        globe.patch(model, factors)
    with pytest.raises(UserError, match="fingerprint"):
        globe.assemble(Checkpoint(checkpoints["qwen2_moe"]), factors)


# ======================================================================================================
# Cache
# ======================================================================================================
def random_factors(ckpt: Checkpoint, families: str = "both", m: int = 5, r: int = 6, s: int = 2) -> Factors:
    D = ckpt.dims

    def family(seed: int) -> FamilyFactors:
        g = gen(seed)
        return FamilyFactors([torch.randn(m, r, D.d, generator=g)], {l: torch.randn(D.experts, D.p, r, generator=g) for l in D.layers},
                             {l: torch.stack([torch.randperm(m, generator=g)[:s] for _ in range(D.experts)]).int() for l in D.layers},
                             {l: torch.rand(D.experts, s, generator=g) for l in D.layers}, {l: 0 for l in D.layers}, "silu", 0.1, 0.3)
    return Factors({f: family(i) for i, f in enumerate(globe.families_of(ModelConfig(families=families)))},
                   {l: list(range(D.experts)) for l in D.layers}, D, ckpt.config["model_type"], ckpt.fingerprint())


def test_every_cache_mode_and_size_gives_the_same_output(checkpoints, device):
    for families in ("both", "all"):
        ckpt = Checkpoint(checkpoints["qwen2_moe"])
        factors, outs = random_factors(ckpt, families), []
        for cache in (dict(mode="none"), dict(mode="all"), dict(per_layer=1), dict(per_layer=3), dict(mode="lfu", per_layer=3), dict(per_layer=99), dict(budget=1e-6)):
            model = globe.patch(stock(checkpoints["qwen2_moe"]).to(device), factors, globe.CacheConfig(**cache))
            outs += [logits(model), logits(model)]
            assert all(len(m.cache.slot_of) <= m.cache.slots for m in globe.globe_modules(model))
        for out in outs[1:]:
            torch.testing.assert_close(out, outs[0], atol=2e-6, rtol=2e-6)


def test_bases_held_or_weights_held_compute_what_the_dense_export_holds(checkpoints, tmp_path):
    for kind, r in (("qwen2_moe", 6), ("qwen2_moe", 16), ("deepseek_v2", 6)):  # 6 holds bases, 16 holds weights
        ckpt = Checkpoint(checkpoints[kind])
        factors = random_factors(ckpt, "all", r=r)
        globe.export_dense(ckpt, factors, fresh_dir(tmp_path / "dense"))
        want, model = logits(stock(tmp_path / "dense")), globe.patch(stock(ckpt.dir), factors)
        assert gap(logits(stock(ckpt.dir)), want) > 0.1  # shift, scale and mixtures all count
        torch.testing.assert_close(logits(model), want, atol=2e-3, rtol=2e-3)


def test_the_cache_lets_go_of_the_least_recently_used_or_the_least_used():
    """Against a brute-force model, under random steps that use several experts each; one build in ten fails."""
    for slots, by_uses in itertools.product((1, 3, 8), (False, True)):
        cache, order, hits, slab, g = globe.ExpertCache(slots, by_uses), [], 0, torch.full((slots,), -1.0), gen(slots)
        lookups, uses = 0, [0] * 10

        def build(keys: list, at: list) -> None:
            assert keys == missing and len(set(at)) == len(at) and not set(at) & {cache.slot_of[k] for k in step if k in cache.slot_of}
            if fails:
                raise OSError("no")
            slab[at] = torch.tensor(keys).float()
        for _ in range(400):
            step = torch.randperm(10, generator=g)[:1 + int(torch.randint(slots, (1,), generator=g))].tolist()
            fails = int(torch.randint(10, (1,), generator=g)) == 0
            missing = [k for k in step if k not in order]
            hits, lookups = hits + len(step) - len(missing), lookups + len(step)
            there, others = [k for k in step if k in order], [k for k in order if k not in step]
            for k in step:
                uses[k] += 1
            go = max(0, len(others) + len(step) - slots) if missing else 0
            gone = sorted(others, key=lambda k: uses[k])[:go] if by_uses else others[:go]
            others = [k for k in others if k not in gone]
            with pytest.raises(OSError) if fails and missing else contextlib.nullcontext():
                cache.hold(step, build)
            order = others + (there if fails or not missing else step)
            assert list(cache.slot_of) == order and cache.hits == hits and cache.hits + cache.misses == lookups
            assert all(slab[i] == k for k, i in cache.slot_of.items())  # what a slot holds is what the table says
            assert sorted([*cache.slot_of.values(), *cache.free]) == list(range(slots))
        assert hits > 0
        assert copy.deepcopy(cache).slots == slots and not copy.deepcopy(cache).slot_of


def test_hits_of_every_size_by_one_pass_are_those_of_the_cache():
    steps = [torch.randperm(9, generator=gen(i))[:3].tolist() for i in range(200)]
    curve = globe.lru_hits(steps, 9)
    for slots in range(3, 10):
        cache = globe.ExpertCache(slots)
        for step in steps:
            cache.hold(step, lambda keys, at: None)
        assert cache.hits == curve[slots]
    assert curve[0] == 0 and globe.share_slots(8, [[0, 5, 6, 6, 6, 6, 6], [0, 0, 0, 0, 9, 10, 10]]) == [3, 5]


def test_the_cache_keeps_to_its_budget_and_warming_fills_it(checkpoints):
    ckpt = Checkpoint(checkpoints["qwen2_moe"])
    factors = random_factors(ckpt)
    item = 2 * 6 * 32 * 4  # two families of (6, 32) float32
    for items in (1, 4, 6):
        model = globe.patch(stock(ckpt.dir), factors, globe.CacheConfig(budget=(items * item + 8) / 2 ** 20))
        logits(model)
        stats = globe.cache_stats(model)
        assert stats["cache_mib"] * 2 ** 20 <= items * item + 8 and stats["cache_mib"] * 2 ** 20 == items * item
    model = globe.patch(stock(ckpt.dir), factors, globe.CacheConfig(mode="all"))
    globe.warm(model, None)
    assert all(len(m.cache.slot_of) == 4 for m in globe.globe_modules(model)) and globe.cache_stats(model)["misses"] == 0
    logits(model)
    assert globe.cache_stats(model)["hit_rate"] == 1
    lru = globe.patch(stock(ckpt.dir), factors, globe.CacheConfig(per_layer=2))
    globe.warm(lru, IDS[:1])
    assert globe.cache_stats(lru) == globe.cache_stats(lru) | {"hits": 0, "misses": 0} and globe.cache_stats(lru)["cache_mib"] > 0
    assert all(len(m.cache.slot_of) == 2 for m in globe.globe_modules(lru))


def test_a_budget_is_what_the_process_grows_by_and_is_never_exceeded():
    """Measured from outside: resident memory of a process that decodes and prefills with slots for 2, 24 and 96 MiB."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("no /proc here to read the resident size from")
    code = """
import sys, types, torch, globe, test_globe as t
torch.set_num_threads(1)
own = lambda: next(int(s.split()[1]) for s in open("/proc/self/status") if s.startswith("RssAnon")) / 1024
sizes = dict(vocab_size=64, hidden_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, num_experts=32,
             num_experts_per_tok=2, moe_intermediate_size=256, intermediate_size=64, head_dim=8, model_type="qwen3_moe")
empty = types.SimpleNamespace(dims=globe.dims_of(sizes), config=sizes, fingerprint=lambda: "none")
factors = t.random_factors(empty, "both", m=4, r=128)  # an item: 2 x 128 x 512 float32, 0.5 MiB; 128 items in all
budget = float(sys.argv[1])
model = globe._skeleton(sizes, torch.float32, globe.Path(), factors.meta(), globe.CacheConfig(budget=budget))
globe._assign_factors(model, factors, torch.device("cpu"), torch.float32)
for name, p in model.state_dict().items():
    if p.is_meta:
        globe._assign(model, name, torch.randn(p.shape) / 16)
ids = torch.randint(64, (1, 300), generator=t.gen())
with torch.no_grad():
    small = globe.globe_modules(model)
    globe.set_cache(model, globe.CacheConfig(budget=1))
    model(ids), model(ids[:, :1])  # what everything else takes
    for c in small: c.cache.clear()
    small[0]._bank[0].scratch.clear()
    before = own()
    globe.set_cache(model, globe.CacheConfig(budget=budget))
    for turn in range(2):
        model(ids)
        globe.warm(model, ids[:, :50])
        past = None
        for token in ids[:, :50].split(1, 1):
            past = model(token, past_key_values=past, use_cache=True).past_key_values
        assert globe.cache_stats(model)["cache_mib"] <= budget
        print(own() - before, globe.cache_stats(model)["cache_mib"])
"""
    for budget in (2, 24, 96):
        # a large tensor lies in pages of its own and gives them back: what the allocator keeps of freed memory is not measured
        done = in_process(code.replace("sys.argv[1]", repr(str(budget))), MALLOC_MMAP_THRESHOLD_="65536", THP_MEM_ALLOC_ENABLE="0")
        assert done.returncode == 0, done.stderr[-2000:]
        for line in done.stdout.splitlines():
            grown, held = map(float, line.split())
            assert grown < budget + 4 and budget / 2 < held <= budget, done.stdout  # 4 MiB: activations and the allocator


def test_a_budget_goes_to_the_layers_that_ask_for_more(checkpoints):
    ckpt = Checkpoint(checkpoints["qwen2_moe"])
    item = 2 * 6 * 32 * 4
    model = globe.patch(stock(ckpt.dir), random_factors(ckpt), globe.CacheConfig(budget=5 * item / 2 ** 20))
    one, many = [[0, 1]] * 50, torch.stack([torch.randperm(4, generator=gen(i))[:2] for i in range(50)]).tolist()
    globe.set_cache(model, globe.CacheConfig(budget=5 * item / 2 ** 20), {0: many, 1: one})
    assert [m.cache.slots for m in globe.globe_modules(model)] == [3, 2]
    globe.set_cache(model, globe.CacheConfig(budget=6 * item / 2 ** 20), {0: one, 1: many})
    assert [m.cache.slots for m in globe.globe_modules(model)] == [2, 4]
    with pytest.raises(UserError, match="expected GlobeExperts"):
        globe.set_cache(stock(ckpt.dir), globe.CacheConfig())


def test_weights_are_held_where_that_is_cheaper(checkpoints):
    ckpt = Checkpoint(checkpoints["qwen2_moe"])  # p 16, d 32: weights take fewer products from r 11 on
    for r, mode, hold in ((6, "all", "basis"), (12, "all", "weight"), (12, "lru", "basis"), (12, "none", "basis")):
        model = globe.patch(stock(ckpt.dir), random_factors(ckpt, "all", r=r), globe.CacheConfig(mode=mode))
        assert {h for m in globe.globe_modules(model) for h in m.hold.values()} == {hold}


def test_two_threads_generating_at_once_give_the_right_text(checkpoints):
    ckpt = Checkpoint(checkpoints["qwen2_moe"])
    for cache in (dict(per_layer=2), dict(mode="none"), dict(mode="all"), dict(mode="direct")):
        factors = random_factors(ckpt, "all")
        for f in factors.families.values():
            f.activation = "identity" if cache.get("mode") == "direct" else "silu"
        model = globe.patch(stock(ckpt.dir), factors, globe.CacheConfig(**cache))

        def text(seed: int) -> list:
            ids = torch.randint(ckpt.config["vocab_size"], (1, 5), generator=gen(seed))
            return model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=0)[0].tolist()
        want = [text(seed) for seed in range(4)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert list(pool.map(text, range(4))) == want


def test_a_gradient_passes_through_a_cache_that_is_refilled(checkpoints):
    ckpt = Checkpoint(checkpoints["qwen2_moe"])
    grads = []
    for cache in (dict(mode="all"), dict(per_layer=1), dict(mode="none")):
        m = globe.globe_modules(globe.patch(stock(ckpt.dir), random_factors(ckpt), globe.CacheConfig(**cache)))[0]
        x, index = torch.randn(6, 32, generator=gen()).requires_grad_(), torch.stack([torch.randperm(4, generator=gen(i))[:2] for i in range(6)])
        y = m(x, index, torch.full((6, 2), 0.5))
        with torch.no_grad():
            m(x.flip(0), index, torch.full((6, 2), 0.5))
        grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    for g in grads[1:]:
        torch.testing.assert_close(g, grads[0], atol=1e-4, rtol=1e-4)


def test_shared_experts_and_linear_layers_run_natively_and_unpatching_gives_them_back(checkpoints):
    for kind in ("qwen2_moe", "deepseek_v3"):
        ckpt, model = Checkpoint(checkpoints[kind]), stock(checkpoints[kind])
        globe.patch(model, random_factors(ckpt))
        mlps = [m for m in model.modules() if "forward" in vars(m)]
        assert len(mlps) == len(ckpt.dims.layers) and type(model.lm_head) is globe.GlobeLinear
        for dtype, tol in ((torch.float32, 0), (torch.bfloat16, 1e-2)):
            for module in (mlps[0], model.lm_head):
                m, x = module.to(dtype), torch.randn(2, 3, 32, generator=gen()).to(dtype)
                with torch.no_grad():
                    plain = F.linear(x, m.weight) if module is model.lm_head else type(m).forward(m, x)
                    torch.testing.assert_close(m(x), plain, atol=tol, rtol=tol)
                x.requires_grad_()
                assert torch.autograd.grad(m(x).sum(), x)[0].isfinite().all()
        globe.unpatch(model)
        assert not any("forward" in vars(m) or type(m) is globe.GlobeLinear for m in model.modules())
    layer = globe.GlobeLinear(8, 4, bias=True).bfloat16()
    x = torch.randn(3, 8).bfloat16()
    want = F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(layer(input=x), want, atol=2e-2, rtol=2e-2)
            layer.weight = torch.nn.Parameter(layer.weight.T.contiguous().T)  # and where it is not contiguous
        assert layer(x[:0]).shape == (0, 4)


@pytest.mark.parametrize("slow", [False, True])
def test_linear_layers_and_calibration_where_products_of_half_precision_are_slow(slow, checkpoints, monkeypatch, capfd):
    assert not globe.slow_products(torch.float32) and not globe.slow_products(torch.bfloat16, "cuda")
    monkeypatch.setattr(globe, "slow_products", lambda dtype, device="cpu": slow and dtype.itemsize == 2)
    globe.compute_dtype.cache_clear()
    try:
        assert globe.compute_dtype(torch.bfloat16, torch.device("cpu")) == (torch.float32 if slow else torch.bfloat16)
        assert globe.compute_dtype(torch.float32, torch.device("cpu")) == torch.float32
        assert ("computing in float32" in capfd.readouterr().err) == slow
    finally:
        globe.compute_dtype.cache_clear()
    wide = []
    monkeypatch.setattr(globe.F, "linear", lambda x, W, b=None, plain=F.linear: (wide.append(x.dtype == torch.float32), plain(x, W, b))[1])
    for bias in (False, True):
        layer = globe.GlobeLinear(8192, 4100, bias=bias).bfloat16()  # more weights than are widened at once
        x = torch.randn(3, 7, 8192, generator=gen()).bfloat16()
        with torch.no_grad():
            got, want = layer(x), torch.nn.Linear.forward(layer.float(), x.float())
        assert got.dtype == torch.bfloat16 and float((got - want).abs().max()) < 2e-2
    assert all(wide) == slow


def test_64_greedy_tokens_equal_the_dense_exports(run, tmp_path):
    """Token by token, float32, of the trained and fitted model of these tests, for each way to hold the experts."""
    factors, ckpt = globe.load_factors(run), Checkpoint(globe.run_config(run, types.SimpleNamespace(overrides=[], config=None)).model.path)
    globe.export_dense(ckpt, factors, fresh_dir(tmp_path / "dense"))
    cpu, ids = torch.device("cpu"), torch.tensor([list(b"def main(")])
    text = lambda model: model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)[0].tolist()  # noqa: E731
    want = text(globe.load_dense(tmp_path / "dense", cpu, torch.float32))
    assert len(want) == ids.shape[1] + 64
    for cache in (dict(mode="all"), dict(per_layer=1), dict(per_layer=3), dict(mode="none"), dict(mode="direct"), dict(budget=0.05)):
        model = globe.patch(globe.load_dense(ckpt.dir, cpu, torch.float32), factors, globe.CacheConfig(**cache))
        globe.warm(model, ids)
        assert text(model) == want, cache


def test_a_model_that_holds_every_expert_compiles_whole(checkpoints):
    ckpt = Checkpoint(checkpoints["qwen2_moe"])
    model = globe.patch(stock(ckpt.dir), random_factors(ckpt), globe.CacheConfig(mode="all"))
    globe.warm(model)
    layer = globe.globe_modules(model)[0]
    x, index, weights = torch.randn(6, 32, generator=gen()), torch.randint(4, (6, 2), generator=gen()), torch.rand(6, 2, generator=gen())
    with torch.no_grad():
        got = torch.compile(layer, fullgraph=True, backend="eager")(x, index, weights)
        torch.testing.assert_close(got, layer(x, index, weights))


def test_the_fit_benchmarks_checkpoint_and_its_moments_can_be_fitted(capsys):
    import bench
    bench.random_checkpoint(Path("model"), 2, 6, 8, 16)
    got = answer("fit", "--out", "run", "model.path=model", "model.families=up", "calib.load=model/moments.st", *QUICK, capsys=capsys)
    assert 0 < got["rel_frob"]["up"] < 1


def test_the_benchmarks_checkpoints_are_one_model_in_three_layouts_with_the_wanted_popularity(monkeypatch):
    """Qwen1.5-MoE's layout at small sizes: tensors per expert, fused by new headers over the same bytes, and a globe export."""
    import bench
    for name, value in {"D": 64, "P": 32, "E": 12, "BLOCK": 2 ** 20}.items():
        monkeypatch.setattr(bench, name, value)
    shares = torch.linspace(3, 1, 12).double() / 24
    bench.write_qwen15(Path("dense"), shares, layers=2, vocab=300)
    cfg = load_config(str(HERE / "configs" / "qwen15.yaml"), ["bank.m=5", "bank.r=24", "sparsity.support=3"])
    bench.write_qwen15_globe(Path("dense"), Path("globe"), cfg)
    cpu, ids = torch.device("cpu"), bench.as_words("heldout", 2000, 300)
    dense, model = globe.load_dense(Path("dense"), cpu, None), globe.load("globe")
    assert all(p.data_ptr() % 16 == 0 for p in model.parameters())  # an odd address would slow GloBE down, and nothing else
    first = globe.demand_of(model, ids)[0]  # the deeper one also sees what the first, with weights this small, has added
    counts = torch.bincount(torch.tensor(first).flatten(), minlength=12).double()
    assert (counts / counts.sum()).sort(descending=True).values.sub(shares).abs().max() < 0.04
    with torch.no_grad():
        want, ours = dense(ids[:, :20]).logits, model(ids[:, :20]).logits
        assert ours.isfinite().all() and gap(ours, want) > 0
        del dense
        bench.rename(Path("dense"), fused=True)
        assert Checkpoint("dense").fused and gap(bench.mapped(Path("dense"))(ids[:, :20]).logits, want) < 0.1
        bench.write_qwen15_globe(Path("dense"), Path("again"), cfg, consume=True)
        assert torch.equal(globe.load("again")(ids[:, :20]).logits, ours) and len(list(Path("dense").glob("*.safetensors"))) == 1


def test_the_decode_benchmark_refuses_what_it_cannot_do(capsys):
    import bench
    for argv, words in ((["--tokens", "0"], "1 to 2000"), (["--prefill", "4000"], "1 to 2048"), (["--preset", "huge"], "found 'huge'"),
                        (["--preset", "qwen15", "--only", "mapped", "--dir", "nowhere"], "none")):
        assert bench.main(["decode", *argv]) == 2
        assert words in capsys.readouterr().err


# ======================================================================================================
# Factors file
# ======================================================================================================
def test_a_factors_file_round_trips(checkpoints, tmp_path):
    ckpt = Checkpoint(checkpoints["deepseek_v3"])
    factors = random_factors(ckpt, "all")
    globe.save_factors(factors, tmp_path / "run/factors.safetensors")
    for path in (tmp_path / "run", tmp_path / "run/factors.safetensors"):
        back = globe.load_factors(path)
        assert back.meta() == factors.meta() and back.ratio() == factors.ratio() and back.dims == factors.dims
        for name, f in factors.families.items():
            b = back.families[name]
            assert torch.equal(torch.stack(b.bank), torch.stack(f.bank)) and torch.equal(b.weight(1, 3), f.weight(1, 3))
            assert all(torch.equal(getattr(b, k)[1], getattr(f, k)[1]) for k in ("A", "idx", "val"))
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["factors.safetensors"]  # nothing temporary is left


def test_a_damaged_factors_file_is_refused_with_a_reason(checkpoints, tmp_path, capsys):
    for damage in ("version", "missing", "extra", "shape", "index", "truncated", "other file", "no file"):
        factors = random_factors(Checkpoint(checkpoints["olmoe"]))
        path, name = tmp_path / "factors.safetensors", "layers.1.up.idx"
        globe.save_factors(factors, path)
        with safe_open(path, "pt") as f:
            meta = json.loads(f.metadata()["globe"])
        tensors, reason = load_file(path), name
        if damage == "version":
            meta["format_version"], reason = 99, "version 1, found 99"
        elif damage == "missing":
            del tensors[name]
        elif damage == "extra":
            tensors["layers.1.up.more"], reason = torch.zeros(1), "layers.1.up.more"
        elif damage == "shape":
            tensors[name] = tensors[name][:, :1].clone()
        elif damage == "index":
            tensors[name][0, 0] = 5
        save_file(tensors, path, metadata={"globe": json.dumps(meta)})
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
            reason = "factors.safetensors"
        elif damage == "other file":
            save_file(tensors, path)
            reason = "globe description"
        elif damage == "no file":
            path.unlink()
            reason = "found none"
        with pytest.raises(UserError, match=re.escape(reason)):
            globe.load_factors(tmp_path)
        assert "factors.safetensors" in refused("eval", "--factors", tmp_path, capsys=capsys)


# ======================================================================================================
# Config
# ======================================================================================================
def test_the_command_line_wins_over_yaml_over_defaults_and_text_becomes_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("fit: {lr: 1e-3, steps: 7}\nbank:\n  m: {gate: 3, up: 4}\n")
    cfg = load_config(str(tmp_path / "c.yaml"), ["fit.steps=9", "fit.adam.safeguard=false"])
    assert (cfg.fit.lr, cfg.fit.steps, cfg.bank.m) == (1e-3, 9, {"gate": 3, "up": 4})
    assert cfg.fit.adam.safeguard is False and cfg.fit.seed == globe.Config().fit.seed


WRONG = (
    ("bank.rnak=4", ("bank.rnak", "bank.r")), ("fit.adam.bata1=0.5", ("fit.adam.bata1", "fit.adam.beta1")), ("bnak.m=4", ("bnak", "bank")),
    ("fit.steps=1.5", ("fit.steps", "int", "1.5")), ("fit.lr=fast", ("fit.lr", "float", "fast")), ("fit.lr=.nan", ("fit.lr",)),
    ("fit.method=sgd", ("fit.method", "varpro", "am", "adam", "sgd")), ("fit.steps=0", ("fit.steps", "above 0")),
    ("sparsity.eta=2", ("sparsity.eta", "0 to 1")), ("bank.scope=most", ("bank.scope", "global", "layer")),
    ("model.include_shared=3", ("model.include_shared", "bool")), ("bank=4", ("bank", "mapping")), ("fit.steps", ("section.key=value",)),
    ("bank.m={left: 3}", ("bank.m", "left")))


def test_a_wrong_config_value_is_named_with_what_was_expected(capsys):
    for override, words in WRONG:
        line = refused("fit", override, capsys=capsys)
        assert all(w in line for w in words), line
    cfg = load_config(None, ["fit.lr=1e-3", "fit.tol=1E-6", "bank.r=0.5", "sparsity.T0=2", "bank.scope=2", "model.path=15"])
    assert (cfg.fit.lr, cfg.fit.tol, cfg.bank.r, cfg.sparsity.T0, cfg.model.path) == (1e-3, 1e-6, 0.5, 2.0, "15")
    assert type(cfg.sparsity.T0) is float and Experts.groups_of([(0, 0), (1, 0), (2, 0)], cfg.bank.scope) == {0: 0, 1: 0, 2: 1}


def test_print_config_round_trips(tmp_path, capsys):
    overrides = ["bank.r=7", "fit.lr=1e-4", "model.path=some/where", "log.tags=[a, b]", "fit.homotopy.lam_steps=3"]
    for command in (["fit"], ["train", "--to", "x"]):
        assert globe.main([*command, "--print-config", *overrides]) == 0
        lines = capsys.readouterr().out.splitlines()
        (tmp_path / "c.yaml").write_text("\n".join(lines[:-1]))
        want = load_config(None, overrides)
        assert load_config(str(tmp_path / "c.yaml")) == want and json.loads(lines[-1]) == dataclasses.asdict(want)
    assert not Path("runs").exists() and not Path("x").exists()


def test_every_file_in_configs_resolves_and_tiny_is_the_defaults():
    files = sorted((HERE / "configs").glob("*.yaml"))
    assert {"tiny", "qwen15", "qwen15_updown", "mobe", "smol"} <= {f.stem for f in files}
    for f in files:
        load_config(str(f))
    assert load_config(str(HERE / "configs/tiny.yaml")) == globe.Config()


# ======================================================================================================
# Commands
# ======================================================================================================
QUICK = ["bank.m=3", "bank.r=6", "calib.tokens=2048", "sparsity.support=2", "fit.steps=6", "fit.homotopy.every=2", "fit.save_every=100"]
SPEED = ["eval.tokens=256", "eval.length=64", "cache.warmup_tokens=32"]
TRAIN = [f"train.{k}" for k in (
    "hidden_size=32", "layers=2", "heads=2", "kv_heads=2", "experts=4", "top_k=2", "moe_intermediate_size=16", "seq_len=32", "batch=2",
    "shared_expert_intermediate_size=16", "dense_steps=4", "moe_steps=4", "warmup=2")]


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(globe.builtin_text("calibration")[:60000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A Qwen2-MoE with random weights and the byte tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    path, tokenizer = tmp_path_factory.mktemp("model") / "small", globe.byte_tokenizer()
    config = AutoConfig.for_model("qwen2_moe", **{**BASE, **ARCHITECTURES["qwen2_moe"], "vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def run(small, tmp_path_factory) -> Path:
    """A finished fit of `small`, with its checkpoint's place in its config."""
    out = tmp_path_factory.mktemp("runs") / "fit"
    assert globe.main(["fit", "--out", str(out), f"model.path={small}", *QUICK, *SPEED]) == 0
    return out


def answer(*argv, capsys) -> dict:
    """The JSON document in the last line of stdout of a command that ends well."""
    capsys.readouterr()
    assert globe.main([str(a) for a in argv]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_fit_numbers_its_runs_and_says_what_it_made(small, capsys):
    for i, families in enumerate(("up", "gate", "both", "all"), 1):
        more = ["fit.refine=0"] if families == "all" else []  # gate and up that suit a coarse down move away from their own weights
        got = answer("fit", f"model.path={small}", f"model.families={families}", *QUICK, *more, capsys=capsys)
        assert Path(got["factors"]) == Path(f"runs/small-{i:03d}")
        assert {"factors", "ratio", "model_ratio", "rel_frob", "support", "steps", "seconds", "peak_rss_gib"} <= set(got)
        assert tuple(got["rel_frob"]) == tuple(got["support"]) == globe.families_of(ModelConfig(families=families))
        assert 0 < got["ratio"] < got["model_ratio"] < 1 and all(0 < x < 1 for x in got["rel_frob"].values()) and got["steps"] == 6
        rows = [json.loads(line) for line in Path(got["factors"], "log.jsonl").read_text().splitlines()]
        assert len(rows) == 6 * (1 if families == "both" else 2 if families == "all" else len(got["rel_frob"])) and all("seconds" in r for r in rows)
        assert load_config(f"{got['factors']}/config.yaml").bank.m == 3
    assert [f.name for f in Path(got["factors"]).iterdir() if "tmp" in f.name] == []


def test_the_default_model_is_trained_once_and_fitted(words, capsys, monkeypatch):
    settings = [*TRAIN, f"train.text={words}", *QUICK]
    assert Path(answer("fit", *settings, capsys=capsys)["factors"]) == Path("runs/tiny-001")
    monkeypatch.setattr(globe, "train", None)  # a second training would fail
    assert Path(answer("fit", *settings, capsys=capsys)["factors"]) == Path("runs/tiny-002")
    assert list(Path("cache").glob("tiny-*/config.json"))


def test_eval_sets_perplexity_beside_the_dense_ones(run, words, capsys):
    got = answer("eval", "--factors", run, "--text", words, capsys=capsys)
    assert {"ppl_dense", "ppl", "delta_nats", "tokens", "ratio", "model_ratio"} <= set(got)
    assert got["delta_nats"] == pytest.approx(math.log(got["ppl"]) - math.log(got["ppl_dense"]), abs=1e-9)
    assert got["tokens"] == 4 * 63
    Path("runs").mkdir()
    shutil.copytree(run, "runs/old-001")
    shutil.copytree(run, "runs/new-001")
    (Path("runs/old-001/config.yaml")).touch()  # the newest by time, not by name
    newest = answer("eval", "--text", words, capsys=capsys)
    assert Path(newest.pop("factors")) == Path("runs/old-001") and newest == {k: v for k, v in got.items() if k != "factors"}


@pytest.mark.parametrize("form", ("globe", "dense", "composed"))
def test_export_writes_what_it_says_and_checks_its_logits(form, run, small, tmp_path, capsys):
    got = answer("export", "--factors", run, "--to", "out", "--format", form, capsys=capsys)
    assert Path(got["path"]) == Path("out") and got["format"] == form and got["max_logit_error"] < 1e-4
    assert got["bytes"] == sum(f.stat().st_size for f in Path("out").glob("*.safetensors"))
    assert got["bytes_dense"] == (small / "model.safetensors").stat().st_size
    config = json.loads(Path("out/config.json").read_text())
    assert ("quantization_config" in config) == (form != "dense") and Path("out/tokenizer.json").is_file()
    assert str(tmp_path) not in json.dumps(config) and str(small) not in json.dumps(config)
    assert "exists" in refused("export", "--factors", run, "--to", "out", "--format", form, capsys=capsys)
    answer("export", "--factors", run, "--to", "out", "--format", form, "--overwrite", "--no-check", capsys=capsys)
    for inside in (small, small / "x"):
        assert "outside" in refused("export", "--factors", run, "--to", inside, "--overwrite", capsys=capsys)
    assert same_experts(Checkpoint(small), Checkpoint(small)) and (small / "config.json").is_file()


def test_report_writes_tables_and_plots(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    shutil.copytree(run, "r")
    got = answer("report", "--factors", "r", capsys=capsys)
    assert all(Path(p).read_bytes().startswith(b"\x89PNG") for p in got["plots"]) and len(got["plots"]) >= 2
    text = Path(got["report"]).read_text()
    assert "gate" in text and "layer" in text and all(Path(p).name in text for p in got["plots"])


def test_generate_writes_text_with_its_speed(run, words, capsys):
    got = answer("generate", "--factors", run, "--prompt", "def f(", "--max-new-tokens", 5, f"calib.text={words}", capsys=capsys)
    assert isinstance(got["text"], str) and 1 <= got["new_tokens"] <= 5 and got["tokens_per_second"] > 0
    assert got["hits"] + got["misses"] > 0
    assert "--prompt" in refused("generate", "--factors", run, "--prompt", "", f"calib.text={words}", capsys=capsys)


def test_a_fit_in_the_data_metric_leaves_no_path_in_its_factors(small, words, capsys):
    got = answer("fit", f"model.path={small}", *QUICK, "model.families=all", "fit.metric=data", f"calib.text={words}", "calib.tokens=512",
                 "calib.length=64", "fit.refine=0", "fit.down=false", "--out", "r", capsys=capsys)
    assert all(0 < x < 1 for x in got["rel_frob"].values())  # of the fit: the refinement behind it minimises another error
    with safe_open("r/factors.safetensors", "pt") as f:
        text = json.dumps(f.metadata())
    assert str(words) not in text and str(small) not in text and str(Path.home()) + "/" not in text


def test_an_output_that_exists_is_kept_unless_overwriting(run, small, capsys):
    for name in ("fit", "train"):
        Path(name).mkdir()
        Path(name, "mine.txt").write_text("kept")
    assert "exists" in refused("fit", "--out", "fit", f"model.path={small}", *QUICK, capsys=capsys)
    assert "exists" in refused("train", "--to", "train", *TRAIN, capsys=capsys)
    assert Path("fit/mine.txt").read_text() == Path("train/mine.txt").read_text() == "kept"
    answer("fit", "--out", "fit", "--overwrite", f"model.path={small}", *QUICK, capsys=capsys)
    assert Path("fit/factors.safetensors").is_file() and not Path("fit/mine.txt").exists()
    assert "outside" in refused("fit", "--out", small, "--overwrite", f"model.path={small}", capsys=capsys)


def test_factors_of_another_checkpoint_are_refused(run, checkpoints, capsys):
    assert "fingerprint" in refused("eval", "--factors", run, "--model", checkpoints["qwen2_moe"], capsys=capsys)
    assert "fit" in refused("eval", capsys=capsys)  # and with no run at all the way out is named


def test_a_dry_run_says_what_a_fit_then_does_and_writes_nothing(small, capsys, monkeypatch):
    for more in ([], ["model.families=all", "bank.scope=layer"]):
        settings = [f"model.path={small}", *QUICK, *more]
        clock = iter(range(0, 10 ** 6, 2))
        with monkeypatch.context() as m:
            m.setattr(globe.time, "perf_counter", lambda: next(clock))
            plan = answer("fit", "--dry-run", *settings, capsys=capsys)
        assert not list(Path(".").glob("runs/*"))
        got = answer("fit", "--out", "whole", "--overwrite", *settings, capsys=capsys)
        assert plan["ratio"] == pytest.approx(got["ratio"]) and plan["model_ratio"] == pytest.approx(got["model_ratio"])
        assert plan["families"] == list(got["rel_frob"]) and plan["seconds"] > 0 and plan["flops_per_pass"] > 0


def test_layers_come_back_in_order():
    layers = range(12)
    f = FamilyFactors([torch.ones(1, 1, 3)], {l: torch.ones(1, 2, 1) for l in layers}, {l: torch.zeros(1, 1, dtype=torch.int32) for l in layers},
                      {l: torch.ones(1, 1) for l in layers}, {l: 0 for l in layers}, "identity")
    globe.save_factors(Factors({"up": f}, {l: [0] for l in layers}, globe.Dims(tuple(layers), 1, 2, 3, 1, 0), "qwen2_moe", "x"), Path("f.safetensors"))
    back = globe.load_factors("f.safetensors")
    assert list(back.experts) == list(back.families["up"].A) == list(layers)


def test_gate_and_up_share_a_bank_that_is_stored_once(small, capsys):
    got = {share: answer("fit", "--out", share, f"model.path={small}", "model.families=all", *QUICK, f"bank.share={share}", capsys=capsys)
           for share in ("true", "false")}
    names = {share: set(load_file(f"{share}/factors.safetensors")) for share in got}
    assert names["false"] - names["true"] == {"bank.up.0"}
    factors = {share: globe.load_factors(share) for share in got}
    stored = {share: sum(t.numel() for t in load_file(f"{share}/factors.safetensors").values()) for share in got}
    for share, f in factors.items():
        dense = 3 * sum(map(len, f.experts.values())) * f.dims.p * f.dims.d
        assert got[share]["ratio"] == pytest.approx((stored[share] + 6) / dense)
    up, gate = factors["true"].families["up"], factors["true"].families["gate"]
    assert up.bank[0] is gate.bank[0] and not torch.equal(up.A[0], gate.A[0])
    damaged = load_file("true/factors.safetensors")
    with safe_open("true/factors.safetensors", "pt") as f:
        meta = json.loads(f.metadata()["globe"])
    for owner in ("up", "none"):
        meta["families"]["up"]["bank"] = owner
        Path(owner).mkdir()
        save_file(damaged, f"{owner}/factors.safetensors", {"globe": json.dumps(meta)})
        with pytest.raises(UserError):
            globe.load_factors(owner)


@pytest.mark.parametrize("method", METHODS)
def test_ctrl_c_saves_the_fit_and_resuming_changes_no_bit(method, small, capsys, monkeypatch):
    settings = [f"model.path={small}", *QUICK, f"fit.method={method}", "bank.share=false"]
    answer("fit", "--out", "whole", *settings, capsys=capsys)
    row, calls = globe.Log.row, []

    def interrupted(self, data):
        calls.append(data)
        row(self, data)
        if len(calls) in (2, 9):  # in the first family, then in the second
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(globe.Log, "row", interrupted)
    assert globe.main(["fit", "--out", "cut", *settings]) == 130
    assert not Path("cut/factors.safetensors").exists() and "--resume" in capsys.readouterr().err
    with open("cut/log.jsonl", "a") as f:  # rows after the saved state, as a killed run leaves them
        f.write(json.dumps(calls[-1] | {"step": 99}) + '\n{"family": "ga')
    assert globe.main(["fit", "--resume", "--out", "cut"]) == 130
    answer("fit", "--resume", "--out", "cut", capsys=capsys)
    assert len(calls) == 12
    assert Path("cut/factors.safetensors").read_bytes() == Path("whole/factors.safetensors").read_bytes()
    steps = [[(r["family"], r["step"], r["loss"]) for r in globe.read_rows(Path(p, "log.jsonl"))] for p in ("cut", "whole")]
    assert steps[0] == steps[1]


def test_a_diverged_fit_ends_with_a_message_and_its_state(small, capsys):
    """Exit 1: a failure of ours, with one clear line and no traceback."""
    code = globe.main(["fit", "--out", "r", f"model.path={small}", *QUICK, "fit.method=adam", "fit.adam.safeguard=false", "fit.lr=1e30"])
    err = capsys.readouterr().err
    assert code == 1 and "not finite" in err and "fit.lr" in err and "Traceback" not in err
    assert not Path("r/factors.safetensors").exists()


def test_training_resumes_to_the_same_bits(words, capsys, monkeypatch):
    settings = [*TRAIN, f"train.text={words}"]
    got = answer("train", "--to", "whole", *settings, "train.save_every=0", capsys=capsys)
    assert got["steps"] == 8 and {"path", "bits_per_byte", "largest_cosine"} <= set(got) and 0 < got["largest_cosine"] < 0.95
    real, calls = globe.training_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) in (2, 6):  # in the dense phase, then in the upcycled one
            signal.raise_signal(signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(globe, "training_step", interrupted)
    for code in (130, 130, 0):
        assert globe.main(["train", "--to", "cut", "--resume", *settings]) == code
    assert len(calls) == 8 and not Path("cut/state").exists()
    assert Path("cut/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_training_starts_from_a_dense_model(words, tmp_path, capsys):
    for kind in ("llama", "qwen2"):
        from transformers import AutoConfig, AutoModelForCausalLM
        tokenizer = globe.byte_tokenizer()
        config = AutoConfig.for_model(kind, **{**BASE, "vocab_size": len(tokenizer)}, intermediate_size=48, num_experts=None)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        answer("train", "--to", "moe", "--overwrite", *TRAIN, f"train.dense_from={tmp_path / kind}", "train.moe_steps=2",
               f"train.text={words}", capsys=capsys)
        ckpt = Checkpoint("moe")
        assert dataclasses.astuple(ckpt.dims) == ((0, 1), 4, 16, 32, 2, 1)
        source, made = (stock(p).get_input_embeddings().weight for p in (tmp_path / kind, "moe"))
        assert F.cosine_similarity(source.flatten(), made.flatten(), 0) > 0.9  # it went on from there
        assert "llama" in refused("train", "--to", "x", f"train.dense_from={tmp_path / 'moe'}", capsys=capsys)


@slow
def test_an_upcycled_model_starts_near_the_dense_loss(words):
    cfg = load_config(None, [*TRAIN, "train.batch=16", "train.seq_len=64", "train.hidden_size=64", "train.moe_intermediate_size=32",
                             "train.shared_expert_intermediate_size=32", "train.experts=8", "train.upcycle_noise=0.0"]).train
    torch.manual_seed(0)
    tokenizer, dense = globe.dense_start(cfg)
    ids = torch.tensor(tokenizer(words.read_text(encoding="utf-8"))["input_ids"])
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-2)
    for step in range(120):
        x = ids[torch.randint(len(ids) - 64, (16, 1), generator=gen(step)) + torch.arange(64)]
        loss = dense(input_ids=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    windows = ids[:64 * 64].view(64, 64)
    start, _ = globe.nll(dense.eval(), windows)
    torch.manual_seed(1)
    untrained, _ = globe.nll(globe.dense_start(cfg)[1], windows)
    made, _ = globe.nll(globe.upcycle(dense, cfg, gen()).eval(), windows)
    noisy, _ = globe.nll(globe.upcycle(dense, dataclasses.replace(cfg, upcycle_noise=0.5), gen()).eval(), windows)
    assert start < untrained - 2  # there is something to lose
    assert abs(made - start) < 0.1 * (untrained - start) and abs(noisy - start) < 0.5 * (untrained - start)


def test_help_of_every_command_shows_examples_that_parse(capsys):
    for command in globe.COMMANDS:
        assert globe.main([command, "--help"]) == 0
        text = capsys.readouterr().out
        lines = [line.strip() for line in text.split("example")[1].splitlines() if "python globe.py" in line]
        assert lines
        for line in lines:
            args = globe.build_parser().parse_args(shlex.split(re.split(r"\s{3,}", line)[0])[2:])
            assert args.command == command and load_config(None, [re.sub(",.*", "", o) for o in args.overrides])  # the first of a sweep


def test_no_command_a_wrong_command_and_a_wrong_device_exit_2(small, capsys):
    assert globe.main([]) == 2 and "fit" in capsys.readouterr().err
    assert globe.main(["fix"]) == 2 and "fit" in capsys.readouterr().err
    assert "tpu" in refused("fit", "--device", "tpu", f"model.path={small}", capsys=capsys)
    assert "cuda:99" in refused("fit", "--device", "cuda:99", f"model.path={small}", capsys=capsys)
    assert "int7" in refused("fit", "--dtype", "int7", f"model.path={small}", capsys=capsys)
    assert globe.main(["--version"]) == 0 and json.loads(capsys.readouterr().out)["globe"] == globe.__version__


def test_a_half_type_runs_from_fit_to_eval(small, words, capsys):
    for dtype in ("bfloat16", "float16"):
        fit = answer("fit", "--dtype", dtype, "--out", dtype, f"model.path={small}", *QUICK, *SPEED, capsys=capsys)
        full = answer("fit", "--out", f"{dtype}-full", f"model.path={small}", *QUICK, *SPEED, capsys=capsys)
        for f, x in full["rel_frob"].items():
            assert fit["rel_frob"][f] == pytest.approx(x, abs=0.03)
        a, b = (answer("eval", "--factors", dtype, "--dtype", t, "--text", words, capsys=capsys) for t in (dtype, "float32"))
        assert a["ppl"] == pytest.approx(b["ppl"], rel=0.05)


# ======================================================================================================
# Recovery after the fit
# ======================================================================================================
def healed(ckpt: Checkpoint, factors: Factors, state: Path, *settings: str, stop=lambda: False, tokens: int = 8 * 32) -> tuple:
    """(rows, log rows) of a heal on random tokens, in float32."""
    cfg, log = load_config(None, ["heal.check_every=5", "heal.save_every=5", *settings]), []
    ids = torch.randint(64, (tokens // 32, 32), generator=gen(3))
    return globe.heal(ckpt, factors, ids, cfg, state, torch.device("cpu"), torch.float32, log.append, stop), log


def tensors_of(factors: Factors) -> dict:
    return {name: t.clone() for name, t in globe.factor_tensors(factors)}


@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral", "deepseek_v2", "qwen3_moe"])
def test_healing_lowers_the_held_out_error_and_the_distance_of_the_logits(kind, checkpoints, tmp_path):
    ckpt = Checkpoint(checkpoints[kind])
    want, factors = logits(stock(checkpoints[kind])), random_factors(ckpt, "all")
    before = gap(logits(globe.assemble(ckpt, factors)), want)
    for stack in (1, 2):
        rows, _ = healed(ckpt, factors, tmp_path / str(stack), f"heal.stack={stack}", "heal.steps=60", "heal.lr=0.05")
        assert [r["layers"] for r in rows] == ([[l, l] for l in ckpt.dims.layers] if stack == 1 else [[0, 1]])
        assert all(r["after"] < r["before"] for r in rows)
    assert gap(logits(globe.assemble(ckpt, factors)), want) < before


def test_one_stack_overfits_a_small_batch(checkpoints, tmp_path):
    ckpt = Checkpoint(checkpoints["qwen2_moe"])
    factors = random_factors(ckpt, "all", m=8, r=16)
    _, log = healed(ckpt, factors, tmp_path, "heal.steps=400", "heal.lr=0.03", "heal.stack=1", "heal.batch=1", "heal.patience=99", tokens=2 * 32)
    losses = [r["loss"] for r in log]
    assert min(losses[-20:]) < 0.05 * losses[0]


def test_what_healing_does_not_train_stays_bit_identical(checkpoints, tmp_path):
    ckpt = Checkpoint(checkpoints["qwen2_moe"])
    for bank, norms, changes in (("freeze", "false", {"A", "val"}), ("train", "false", {"A", "val", "bank"}), ("freeze", "true", {"A", "val", "norms"})):
        factors = random_factors(ckpt)
        old = tensors_of(factors)
        healed(ckpt, factors, tmp_path / f"{bank}-{norms}", "heal.stack=2", "heal.steps=10", "heal.lr=0.01", f"heal.bank={bank}", f"heal.norms={norms}")
        moved = {"bank" if "bank" in name else name.rpartition("_")[2] for name, t in tensors_of(factors).items() if not torch.equal(t, old[name])}
        assert moved | ({"norms"} if factors.norms else set()) == changes
    with pytest.raises(UserError, match="heal.bank: train needs all layers"):
        healed(ckpt, random_factors(ckpt), tmp_path / "x", "heal.stack=1", "heal.bank=train")


def refined(ckpt: Checkpoint, factors: Factors, *settings: str, tokens: int = 32 * 32) -> list:
    """rows of a refinement on random tokens"""
    ids = torch.randint(64, (tokens // 32, 32), generator=gen(4))
    return globe.refine(ckpt, factors, ids, load_config(None, list(settings)), torch.device("cpu"))


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_refinement_lowers_every_layers_error_and_goes_wherever_the_factors_go(kind, checkpoints, tmp_path):
    ckpt, want = Checkpoint(checkpoints[kind]), logits(stock(checkpoints[kind]))
    factors = random_factors(ckpt)
    start, old, size = gap(logits(globe.assemble(ckpt, factors)), want), tensors_of(factors), factors.ratio()
    rows = refined(ckpt, factors, "fit.down=false")
    assert [r["layer"] for r in rows] == list(ckpt.dims.layers) and all(r["after"] < 0.9 * r["before"] for r in rows)
    assert {name.rpartition("_")[2] for name, t in tensors_of(factors).items() if not torch.equal(t, old[name])} == {"A"} and not factors.down
    assert all(b["after"] < 0.95 * a["after"] for a, b in zip(rows, refined(ckpt, factors, "fit.refine=0")))
    assert all(len(t) == ckpt.dims.experts + ckpt.dims.shared for t in factors.down.values()) and factors.ratio() == size
    globe.save_factors(factors, tmp_path / "factors.safetensors")
    again, mine = globe.load_factors(tmp_path), logits(globe.assemble(ckpt, factors))
    assert gap(mine, want) < 0.9 * start
    dense = stock(checkpoints[kind])
    assert gap(logits(globe.patch(dense, again)), mine) < 1e-4
    assert torch.equal(logits(globe.unpatch(dense)), want)
    for form, write, read in (("dense", globe.export_dense, stock), ("globe", globe.export_globe, globe.load)):
        write(ckpt, again, fresh_dir(tmp_path / form))
        assert gap(logits(read(tmp_path / form)), mine) < 1e-4
    before = [healed(ckpt, copy.deepcopy(f), tmp_path / f"heal{i}", "heal.stack=1", "heal.steps=1")[0][0]["before"]
              for i, f in enumerate((again, dataclasses.replace(again, down={})))]
    assert before[0] < before[1]  # heal begins with down as it was refined
    layer = ckpt.dims.layers[-1]
    for bad in (factors.down[layer][:1], factors.down[layer].int(), torch.full_like(factors.down[layer], math.nan)):
        globe.save_factors(dataclasses.replace(factors, down={layer: bad}), tmp_path / "factors.safetensors")
        with pytest.raises(UserError, match=f"layers.{layer}.down"):
            globe.load_factors(tmp_path)


def test_some_layers_and_experts_and_the_shared_one_are_refined_alone(checkpoints):
    ckpt, D = Checkpoint(checkpoints["qwen2_moe"]), Checkpoint(checkpoints["qwen2_moe"]).dims
    every = random_factors(ckpt)
    for experts in ([1, 3], [0, 2, D.experts, D.experts + 1]):  # the shared expert is D.experts and + 1
        pick = lambda t: {1: t[1][[e % D.experts for e in experts]]}  # noqa: E731
        families = {f: dataclasses.replace(fam, A=pick(fam.A), idx=pick(fam.idx), val=pick(fam.val), group={1: 0}) for f, fam in every.families.items()}
        factors, dense = dataclasses.replace(every, families=families, experts={1: experts}, down={}), stock(ckpt.dir)
        row, = refined(ckpt, factors)
        assert row["layer"] == 1 and row["after"] < 0.8 * row["before"] and factors.refined(1) == [e for e in experts if e < D.experts] + [D.experts, D.experts + 1]
        model = globe.assemble(ckpt, factors)
        module, other = globe.experts_modules(model)[1][2], globe.experts_modules(dense)[1][2]
        assert [e for e in range(D.experts) if torch.equal(module.down_proj[e], other.down_proj[e])] == [e for e in range(D.experts) if e not in experts]
        assert torch.equal(globe.experts_modules(model)[0][2].down_proj, globe.experts_modules(dense)[0][2].down_proj)
        mine = logits(model)
        assert gap(logits(globe.patch(dense, factors)), mine) < 1e-4
        assert torch.equal(logits(globe.unpatch(dense)), logits(stock(ckpt.dir)))


def one_layer(ckpt: Checkpoint, factors: Factors, always: bool) -> tuple:
    """(parent, experts module, inputs, router's choice, its weights, outputs) of layer 1 of a stock model on random inputs, in float32."""
    parent, _, module = globe.experts_modules(stock(ckpt.dir))[1]
    x, k = torch.randn(500, ckpt.dims.d, generator=gen(8)), ckpt.dims.experts if always else 2
    weight, index = torch.randn(500, ckpt.dims.experts, generator=gen(9)).softmax(-1).topk(k)
    return parent, module, x, index, weight, module(x, index, weight)


@pytest.mark.parametrize("always", [True, False])
@torch.no_grad()
def test_refined_adapters_and_down_are_the_least_squares_solutions(always, checkpoints, monkeypatch):
    """The output is linear in up's adapters, and in down: against a dense solver, features written out token by token."""
    ckpt, l, D = Checkpoint(checkpoints["qwen2_moe"]), 1, Checkpoint(checkpoints["qwen2_moe"]).dims
    factors = random_factors(ckpt, "up", r=3)
    parent, module, x, index, weight, y = one_layer(ckpt, factors, always)
    X, up = factors.families["up"].composed(l), [factors.families["up"].weight(l, e) for e in range(D.experts)]
    gates, downs = [ckpt.expert("gate", l, e) for e in range(D.experts)], [ckpt.expert("down", l, e) for e in range(D.experts)]

    def outputs(ups) -> torch.Tensor:  # (N, d), and the hidden activations (N, E, p), times the router's weights
        h = torch.zeros(len(x), D.experts, D.p)
        for t in range(len(x)):
            for e, w in zip(index[t].tolist(), weight[t].tolist()):
                h[t, e] = w * torch.nn.functional.silu(gates[e] @ x[t]) * (ups[e] @ x[t])
        return h.flatten(1) @ torch.cat(downs), h
    want = outputs([ckpt.expert("up", l, e) for e in range(D.experts)])[0]
    shares, lacks, _ = globe.shares_of(parent, module, factors, l, True, x, index, weight, y)
    now, h = outputs(up)
    torch.testing.assert_close(lacks, want - now, atol=1e-5, rtol=1e-4)
    assert [s.experts for s in shares] == ([[0, 1, 2, 3], [4, 5]] if always else [[0], [1], [2], [3], [4, 5]])
    # down: ridge regression, every expert's own ridge; the shared expert has a part in it
    shared = parent.shared_expert_gate(x).sigmoid() * torch.nn.functional.silu(parent.shared_expert.gate_proj(x)) * parent.shared_expert.up_proj(x)
    H = torch.cat([h.flatten(1), shared], 1).double()
    groups = [range(64), range(64, 96)] if always else [range(16 * e, 16 * e + 16) for e in range(4)] + [range(64, 96)]
    ridge = torch.cat([(globe.DOWN_RIDGE + globe.FEW_TOKENS * D.p / len(s.h)) * H[:, g].square().sum(0).mean().expand(len(g)) for s, g in zip(shares, groups)])
    solved = torch.linalg.solve(H.T @ H + torch.diag(ridge), H.T @ (want - now).double())
    expected = torch.cat([*downs, parent.shared_expert.down_proj.weight.T]).double() + solved
    got = globe.refine_down(shares, left := lacks.clone(), D.p, sweeps=200)
    torch.testing.assert_close(got.transpose(1, 2).flatten(0, 1).double(), expected, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(left.double(), (want - now).double() - H @ solved, atol=1e-4, rtol=1e-3)
    # adapters of up, with no anchor
    monkeypatch.setattr(globe, "ANCHOR", 0.0)
    monkeypatch.setattr(globe, "FEW_TOKENS", 0.0)
    columns = []
    for e, row, j in itertools.product(range(D.experts), range(D.p), range(3)):
        slope = torch.stack([weight[t][index[t] == e].sum() * torch.nn.functional.silu(gates[e][row] @ x[t]) for t in range(len(x))])
        columns.append(((slope * (x @ X[e, j]))[:, None] * downs[e][row]).flatten())
    J, y = torch.stack(columns, 1).double(), (want - now).double().flatten()[:, None]
    best = (y - J @ torch.linalg.lstsq(J, y).solution).norm()
    factors.families["up"].A |= {l: globe.refine_adapters(shares, factors, l, x, lacks, 400, at_once=96)["up"]}
    left = (want - outputs([factors.families["up"].weight(l, e) for e in range(D.experts)])[0]).norm()
    assert float(left) == pytest.approx(float(best), rel=2e-3) and float(best) < 0.95 * float((want - now).norm())


@pytest.mark.parametrize("always", [True, False])
@torch.no_grad()
def test_refined_adapters_of_down_are_the_least_squares_solution(always, checkpoints, monkeypatch):
    """Against a dense solver with one feature per expert, row and basis row; expert 3 and the shared one are not fitted."""
    ckpt, l = Checkpoint(checkpoints["qwen2_moe"]), 1
    D, factors, fitted = ckpt.dims, random_factors(ckpt, "all", r=3), [0, 1, 2]
    for f, fam in factors.families.items():
        factors.families[f] = dataclasses.replace(fam, A={l: fam.A[l][fitted]}, idx={l: fam.idx[l][fitted]}, val={l: fam.val[l][fitted]})
    factors.experts = {l: fitted}
    parent, module, x, index, weight, y = one_layer(ckpt, factors, always)
    monkeypatch.setattr(globe, "DOWN_RIDGE", 0.0)
    monkeypatch.setattr(globe, "FEW_TOKENS", 0.0)
    shares, lacks, size = globe.shares_of(parent, module, factors, l, False, x, index, weight, y)
    assert [s.experts for s in shares] == [[0], [1], [2], [4], [5]]
    W = [factors.families["down"].weight(l, e) for e in fitted]
    want = torch.zeros_like(y)
    for t in range(len(x)):
        for e, w in zip(index[t].tolist(), weight[t].tolist()):
            now = [factors.families[f].weight(l, e) if e in fitted else ckpt.expert(f, l, e) for f in ("gate", "up", "down")]
            want[t] += w * (torch.nn.functional.silu(now[0] @ x[t]) * (now[1] @ x[t])) @ now[2]
    torch.testing.assert_close(lacks, y - want, atol=1e-5, rtol=1e-4)
    assert size == pytest.approx(float((y + parent.shared_expert_gate(x).sigmoid() * parent.shared_expert(x)).square().mean()), rel=1e-5)
    H, X = torch.zeros(len(x), 3, D.p), factors.families["down"].composed(l)
    for s in shares[:3]:
        H[s.tokens, s.experts[0]] = s.h
    J = torch.einsum("nep,erd->ndepr", H, X).flatten(0, 1).flatten(1).double()
    best = (lacks.double().flatten()[:, None] - J @ torch.linalg.lstsq(J, lacks.double().flatten()[:, None]).solution).norm()
    old, left = factors.families["down"].A[l].clone(), lacks.clone()
    real = globe.refine_down
    monkeypatch.setattr(globe, "refine_down", lambda *args, **more: real(*args, sweeps=400, **more))
    factors.families["down"].A[l] = globe.refine_down_adapters(shares, factors, l, left)
    change = torch.stack([factors.families["down"].weight(l, e) for e in fitted]) - torch.stack(W)
    torch.testing.assert_close(left, lacks - torch.einsum("nep,epd->nd", H, change), atol=1e-4, rtol=1e-3)
    assert float(left.norm()) == pytest.approx(float(best), rel=1e-3) and float(best) < 0.95 * float(lacks.norm())
    assert all(not torch.equal(a, b) for a, b in zip(old, factors.families["down"].A[l]))


@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral"])
def test_three_families_are_refined_by_their_adapters_alone(kind, checkpoints, tmp_path):
    ckpt, want = Checkpoint(checkpoints[kind]), logits(stock(checkpoints[kind]))
    factors = random_factors(ckpt, "all")
    start, old, size = gap(logits(globe.assemble(ckpt, factors)), want), tensors_of(factors), factors.ratio()
    rows = refined(ckpt, factors)
    assert [r["layer"] for r in rows] == list(ckpt.dims.layers) and all(r["after"] < 0.9 * r["before"] for r in rows)
    moved = {name for name, t in tensors_of(factors).items() if not torch.equal(t, old[name])}
    assert len(moved) == 3 * len(ckpt.dims.layers) and all(name.endswith("_A") for name in moved)
    assert not factors.down and factors.ratio() == size and gap(logits(globe.assemble(ckpt, factors)), want) < 0.95 * start


@torch.no_grad()
def test_experts_that_see_no_token_or_few_keep_to_the_fit(checkpoints, monkeypatch):
    """Router of layer 1: expert 0 for every token, expert 1 for three of them, 2 and 3 for none."""
    ckpt, real, moved = Checkpoint(checkpoints["qwen2_moe"]), globe.shares_of, {}

    def routed(parent, module, factors, l, slopes, x, index, weight, y):
        index = torch.zeros(len(x), 1, dtype=index.dtype)
        index[:3] = 1
        return real(parent, module, factors, l, slopes, x, index, weight[:, :1], module(x, index, weight[:, :1]))
    monkeypatch.setattr(globe, "shares_of", routed)
    for few in (10, 0):
        monkeypatch.setattr(globe, "FEW_TOKENS", few)
        factors, dense = random_factors(ckpt), stock(ckpt.dir).model.layers[1].mlp.experts.down_proj
        old = factors.families["gate"].A[1].clone()
        rows = refined(ckpt, factors)
        assert all(r["after"] < r["before"] for r in rows)
        moved[few] = [float((a - b).norm()) for a, b in zip(factors.families["gate"].A[1], old)]
        assert moved[few][0] > 0 and moved[few][2:] == [0, 0]
        assert [torch.equal(factors.down[1][e], dense[e]) for e in range(4)] == [False, False, True, True]
    assert moved[10][1] < 0.3 * moved[0][1] and moved[10][0] > 0.8 * moved[0][0]


def test_a_refinement_that_wants_memory_takes_fewer_windows_and_says_so(checkpoints, monkeypatch, capsys):
    ckpt = Checkpoint(checkpoints["qwen2_moe"])
    monkeypatch.setattr(globe, "free_memory", lambda device: 10 ** 6)
    assert all(r["after"] < r["before"] for r in refined(ckpt, random_factors(ckpt)))
    assert re.search(r"refinement: on \d+ of the calibration's 32 windows", capsys.readouterr().err)


def test_a_refinement_that_went_too_far_is_taken_back(checkpoints, monkeypatch):
    ckpt, real = Checkpoint(checkpoints["qwen2_moe"]), globe.refine_adapters
    factors = random_factors(ckpt)
    old = tensors_of(factors)
    monkeypatch.setattr(globe, "refine_adapters", lambda *args: {f: -9 * A for f, A in real(*args).items()})
    rows = refined(ckpt, factors, "fit.down=false")
    assert all(r["after"] == pytest.approx(r["before"], rel=1e-5) for r in rows)
    assert all(torch.equal(t, old[name]) for name, t in tensors_of(factors).items())


def test_a_float16_checkpoint_is_refined_in_float32(checkpoints, tmp_path):
    model = stock(checkpoints["qwen2_moe"])
    for block, _, module in globe.experts_modules(model).values():
        module.down_proj.data /= 50
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data *= 50
    model.half().save_pretrained(tmp_path)
    ckpt = Checkpoint(tmp_path)
    factors = random_factors(ckpt)
    rows = refined(ckpt, factors, tokens=256 * 32)
    assert ckpt.dtype == torch.float16 and all(r["after"] < 0.9 * r["before"] for r in rows)
    assert all(bool(t.isfinite().all()) for t in tensors_of(factors).values() if t.is_floating_point())


def test_the_calibrations_windows_are_kept_for_the_refinement(small, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ["--config", "none", f"model.path={small}", f"calib.text={words}", *QUICK][2:]
    first = answer("fit", "--out", "a", *settings, "calib.sampled=512", "calib.save=m.st", capsys=capsys)
    assert 0.1 < first["ratio"] < 1 and len(json.loads(Path("a/refined.json").read_text())) == len(Checkpoint(small).dims.layers)
    monkeypatch.setattr(globe, "calibration_windows", None)  # they need not be made again
    answer("fit", "--out", "b", *settings, "calib.load=m.st", capsys=capsys)
    assert Path("a/factors.safetensors").read_bytes()[-4096:] == Path("b/factors.safetensors").read_bytes()[-4096:]
    plain = answer("fit", "--out", "c", *settings, "calib.load=m.st", "fit.refine=0", "fit.down=false", capsys=capsys)
    assert plain["ratio"] == first["ratio"] and not globe.load_factors("c").down and not Path("c/refined.json").exists()
    tensors = load_file("m.st")
    ids = tensors.pop("windows.0")
    tag = {"globe_moments": Checkpoint(small).fingerprint()}
    save_file(tensors, "old.st", metadata=tag)
    globe.main(["fit", "--out", "d", *settings, "calib.load=old.st"])
    assert "without the calibration's windows" in capsys.readouterr().err and not globe.load_factors("d").down
    with monkeypatch.context() as m:  # cut short in the refinement: the run is not finished, and goes on from there
        m.setattr(globe, "refine_down", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert globe.main(["fit", "--out", "g", *settings, "calib.load=m.st"]) == 130
        assert not Path("g/factors.safetensors").exists() and "fit --resume --out g" in capsys.readouterr().err
    answer("fit", "--resume", "--out", "g", capsys=capsys)
    assert Path("g/factors.safetensors").read_bytes()[-4096:] == Path("b/factors.safetensors").read_bytes()[-4096:]
    assert not Path("g/state/refined").exists() and Path("g/refined.json").exists()
    answer("fit", "--resume", "--out", "g", "fit.refine=0", "fit.down=false", capsys=capsys)
    assert not Path("g/refined.json").exists() and not globe.load_factors("g").down
    for bad in (ids.float(), ids[0], -ids - 1, ids + 10 ** 6):
        save_file(tensors | {"windows.0": bad.contiguous()}, "bad.st", metadata=tag)
        assert globe.main(["fit", "--out", "e", *settings, "calib.load=bad.st"]) == 2 and not Path("e").exists()
        assert "token ids" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_healed_norms_go_wherever_the_factors_go(kind, checkpoints, tmp_path):
    ckpt = Checkpoint(checkpoints[kind])
    factors = random_factors(ckpt)
    for step in (1, 2):  # the second heal goes on from the first's
        healed(ckpt, factors, tmp_path / f"heal{step}", "heal.stack=1", "heal.steps=10", "heal.lr=0.01")
        assert len(factors.norms) == len(ckpt.dims.layers) * (4 if kind == "qwen3_moe" else 2)
        assert not [name for name, t in factors.norms.items() if torch.equal(t, ckpt.tensor(name).float())]
    globe.save_factors(factors, tmp_path / "factors.safetensors")
    again = globe.load_factors(tmp_path)
    assert again.norms.keys() == factors.norms.keys() and again.ratio() == factors.ratio()
    want = logits(globe.assemble(ckpt, factors))
    dense = stock(checkpoints[kind])
    before = logits(dense)
    assert gap(logits(globe.patch(dense, again)), want) < 1e-4 and gap(before, want) > 1e-3
    assert torch.equal(logits(globe.unpatch(dense)), before)
    (tmp_path / "dense").mkdir()
    globe.export_dense(ckpt, again, tmp_path / "dense")
    assert gap(logits(stock(tmp_path / "dense")), want) < 1e-4
    (tmp_path / "globe").mkdir()
    globe.export_globe(ckpt, again, tmp_path / "globe")
    assert gap(logits(globe.load(tmp_path / "globe")), want) < 1e-4
    healed(ckpt, again, tmp_path / "off", "heal.stack=1", "heal.steps=5", "heal.lr=0.01", "heal.norms=false")
    assert all(torch.equal(t, factors.norms[name]) for name, t in again.norms.items())
    again.norms["model.layers.0.nothing_norm.weight"] = torch.ones(4)
    with pytest.raises(UserError, match="no such parameter"):
        globe.assemble(ckpt, again)
    for bad in (torch.ones(4, 4), torch.ones(4, dtype=torch.int32), torch.full((4,), float("nan"))):
        globe.save_factors(dataclasses.replace(factors, norms={"x": bad}), tmp_path / "factors.safetensors")
        with pytest.raises(UserError, match="norm.x"):
            globe.load_factors(tmp_path)


def test_a_stack_that_would_get_worse_keeps_its_factors(checkpoints, tmp_path):
    ckpt = Checkpoint(checkpoints["qwen2_moe"])
    for lr in (3.0, 1e30):  # wild, and beyond float32
        factors = exact_factors(ckpt, rank=15)
        old = tensors_of(factors)
        rows, log = healed(ckpt, factors, tmp_path / str(lr), "heal.stack=1", "heal.steps=10", f"heal.lr={lr}")
        assert log and all(r["after"] == r["before"] for r in rows)
        assert all(torch.equal(t, old[name]) for name, t in tensors_of(factors).items())


def test_a_stopped_heal_goes_on_to_the_same_bits(checkpoints, tmp_path):
    ckpt = Checkpoint(checkpoints["qwen2_moe"])
    settings = ("heal.stack=1", "heal.steps=20", "heal.lr=0.02")
    whole, parts = random_factors(ckpt), random_factors(ckpt)
    healed(ckpt, whole, tmp_path / "whole", *settings)
    for stop_after in (7, 11, 9, 3):  # 7 + 1 + 11 + 1 = 20: the first stack's last step
        calls = itertools.count()
        with pytest.raises(KeyboardInterrupt, match="state saved at step"):
            healed(ckpt, random_factors(ckpt), tmp_path / "parts", *settings, stop=lambda: next(calls) >= stop_after)
    healed(ckpt, parts, tmp_path / "parts", *settings)
    for name, t in tensors_of(parts).items():
        assert torch.equal(t, tensors_of(whole)[name]), name
    assert (tmp_path / "parts" / "stack-000.safetensors").is_file() and not (tmp_path / "parts" / "step.safetensors").exists()


def test_the_logits_term_reaches_through_the_dense_rest_of_the_model(checkpoints, tmp_path):
    ckpt = Checkpoint(checkpoints["qwen2_moe"])
    factors = random_factors(ckpt)
    rows, _ = healed(ckpt, factors, tmp_path, "heal.stack=1", "heal.logits_weight=0.5", "heal.steps=40", "heal.lr=0.03", "heal.grad_checkpoint=true")
    assert len(rows) == 2 and all(r["after"] < r["before"] for r in rows)


def test_the_divergence_of_logits_and_its_gradient_are_torchs():
    head = torch.nn.Linear(8, 50).requires_grad_(False)
    y, t = (torch.randn(300, 8, generator=gen(n)).requires_grad_() for n in (1, 2))  # more tokens than are worked on at a time
    want = F.kl_div(head(y).log_softmax(-1), head(t).log_softmax(-1), log_target=True, reduction="batchmean")
    got = globe.Divergence.apply(y, t, head)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(3 * got, y), torch.autograd.grad(3 * want, y))


def test_calibration_and_heal_work_in_the_dtype_that_the_config_names(small, run, monkeypatch, capsys):
    seen, walk = [], globe.Walk
    monkeypatch.setattr(globe, "Walk", lambda ckpt, device, dtype, batch: seen.append(dtype) or walk(ckpt, device, dtype, batch))
    monkeypatch.setattr(globe, "compute_dtype", lambda dtype, device: dtype)  # whatever this CPU is quick at
    ckpt = Checkpoint(small)
    for name, fisher, want in ((None, True, torch.float32), ("bfloat16", True, torch.bfloat16), ("float16", False, torch.float16), ("float16", True, torch.float32)):
        cfg = globe.load_config(None, ["calib.tokens=256", "calib.length=64", f"calib.fisher={fisher}", f"calib.dtype={name or 'null'}"])
        moments = globe.calibrate(ckpt, cfg, torch.device("cpu"))
        assert seen.pop() == want and moments["inputs"][0].dtype == torch.float64
    answer("heal", "--factors", run, "--out", "healed", "heal.steps=2", "heal.tokens=512", "calib.length=64", "calib.dtype=bfloat16", capsys=capsys)
    assert seen == [torch.bfloat16]


def test_heal_from_the_command_line(run, small, capsys, tmp_path):
    settings = ["heal.steps=12", "heal.check_every=4", "heal.tokens=512", "calib.length=64", "heal.lr=0.005"]
    got = answer("heal", "--factors", run, "--out", "healed", *settings, capsys=capsys)
    assert got["factors"] == "healed" and len(got["stacks"]) == 1 and got["ratio"] == pytest.approx(globe.load_factors(run).ratio())
    assert {"config.yaml", "factors.safetensors", "log.jsonl", "state"} == {p.name for p in Path("healed").iterdir()}
    assert not list(Path("healed/state").glob("*.bin")) and len(globe.read_rows(Path("healed/log.jsonl"))) == 12
    assert answer("eval", "--factors", "healed", *SPEED, capsys=capsys)["ratio"] == got["ratio"]
    source = (run / "factors.safetensors").read_bytes()
    assert "exists" in refused("heal", "--factors", run, "--out", "healed", capsys=capsys)
    assert "another directory" in refused("heal", "--factors", run, "--out", run, "--overwrite", capsys=capsys)
    assert "heal.stack" in refused("heal", "--factors", run, "--out", "x", "heal.stack=0", capsys=capsys)
    assert "2 windows" in refused("heal", "--factors", run, "--out", "x", "heal.tokens=64", "calib.length=64", capsys=capsys)
    assert not Path("x").exists() and (run / "factors.safetensors").read_bytes() == source


# ======================================================================================================
# Text and tokens
# ======================================================================================================
def test_the_splits_of_the_built_in_text_share_no_file_and_leave_out_the_reserved(monkeypatch):
    real = {s: globe.builtin_text(s) for s in ("train", "heldout", "calibration")}
    assert all(len(t) > 300_000 for t in real.values()) and real["train"] == globe.builtin_text("train")
    monkeypatch.setattr(globe, "_library_sources", lambda: ((f"f{i}.py", f"<{i}>" * 9) for i in range(400)))
    files = {s: set(re.findall(r"<\d+>", globe.builtin_text(s))) for s in real}
    assert all(len(f) > 20 for f in files.values()) and len(set.union(*files.values())) == sum(map(len, files.values())) == 400
    with pytest.raises(ValueError, match="train, heldout, calibration"):
        globe.builtin_text("test")
    monkeypatch.undo()
    names = {Path(name).name for name, _ in globe._library_sources()}
    assert "ast.py" in names and not names & {"argparse.py", "tarfile.py", "LICENSE.txt"}


def test_byte_tokens_are_the_bytes_of_the_text_and_come_back(tmp_path):
    from transformers import AutoTokenizer
    globe.byte_tokenizer().save_pretrained(tmp_path / "t")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    for text in ("def f(x):\n\treturn x  # two  spaces", "na\u00efve \u2014 \u6771\u4eac \U0001f642", "\x00\x7f\r\n",
                 " leading", "".join(map(chr, range(1, 400)))):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == list(text.encode("utf-8")) and tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (256, 257, 258)


def slow_moments(model, windows: torch.Tensor, batch: int, share: float, fisher: bool) -> dict:
    """The moments by autograd through the whole model: experts written out token by token, with a leaf added to their outputs."""
    out = {kind: {} for kind in ("inputs", "weighted", "hidden", "gate", "up", "gate_x", "up_x")}
    generator, leaf, seen, seen_weight, stream = torch.Generator().manual_seed(0), {}, {}, {}, {}
    for l, (_, _, m) in globe.experts_modules(model).items():
        def forward(x, index, weight, l=l, m=m):
            z = torch.einsum("tkpd,td->tkp", m.gate_up_proj[index], x)
            leaf[l] = torch.zeros_like(z).requires_grad_()
            h = m._apply_gate(z + leaf[l])
            seen[l], seen_weight[l] = (x.detach(), index, h.detach()), weight.detach().to(h.dtype)
            return torch.einsum("tkdp,tkp,tk->td", m.down_proj[index], h, weight.to(h.dtype))
        m.forward = forward
        model.model.layers[l].register_forward_hook(lambda _, args, out, l=l: stream.update({l: (out if isinstance(out, torch.Tensor) else out[0]).detach()}))
    for part in windows.split(batch):
        log_q = model(part).logits.float().log_softmax(-1).flatten(0, 1)
        v = globe.drawn(log_q.detach().exp(), generator)
        log_q.gather(1, v).sum().backward()
        for l, (x, index, h) in seen.items():
            m = globe.experts_modules(model)[l][2]
            squares, E = leaf[l].grad.square(), m.num_experts
            if not fisher:  # |d(expert's output)/dz|^2 / |y|^2: a leaf's column moves one hidden activation alone
                z = torch.einsum("tkpd,td->tkp", m.gate_up_proj[index], x).requires_grad_()
                slope, = torch.autograd.grad(m._apply_gate(z).sum(), z)
                reach = m.down_proj[index].square().sum(2).repeat(1, 1, 2) * seen_weight[l][..., None] ** 2
                squares = slope.square() * reach / stream[l].flatten(0, 1).square().mean(-1)[:, None, None]
            size = squares.sum((1, 2))
            squares = squares * (size.quantile(share) / size).clamp_max(1)[:, None, None]
            out["weighted"][l] = out["weighted"].get(l, 0) + (x.T * squares.sum((1, 2)) @ x).double() / windows.numel()
            for kind, part_of in zip(("gate", "up"), squares.chunk(2, -1)):
                rows = torch.zeros(E, h.shape[-1]).index_add_(0, index.flatten(), part_of.flatten(0, 1)).double()
                out[kind][l] = out[kind].get(l, 0) + rows / windows.numel()
                means = torch.zeros(*rows.shape, x.shape[1]).index_add_(0, index.flatten(), torch.einsum("tkp,td->tkpd", part_of, x).flatten(0, 1))
                out[f"{kind}_x"][l] = out[f"{kind}_x"].get(l, 0) + means / windows.numel()
            h = h.flatten(0, 1).double()
            out["inputs"][l] = out["inputs"].get(l, 0) + x.double().T @ x.double() / windows.numel()
            out["hidden"][l] = out["hidden"].get(l, 0) + h.T @ h / windows.numel()
    return out


@pytest.mark.parametrize("share, at_once, fisher", ((1.0, 2, True), (0.5, 4, True), (0.5, 4, False)))
@pytest.mark.parametrize("arch", ("qwen2_moe", "mixtral", "deepseek_v3"))
def test_the_moments_are_those_of_the_whole_model_of_which_one_layer_is_in_memory(arch, share, at_once, fisher, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(globe, "CLIP", share)
    windows, held = torch.cat([IDS, IDS.flip(0), IDS.roll(1, 1)]), []
    want = slow_moments(stock(checkpoints[arch]).requires_grad_(False), windows, 2, share, fisher)
    walk = globe.Walk(Checkpoint(checkpoints[arch]), torch.device("cpu"), torch.float32, 2)
    got = globe.activation_moments(walk, windows, at_once, fisher, tick=lambda: held.append(sum(not w.is_meta for w in walk.layers.parameters())),
                                   means=True, scratch=tmp_path if at_once == 2 else None)
    assert held == [0] * len(walk.layers) * (1 + fisher) * -(-len(windows) // at_once)
    for kind in want:
        assert want[kind].keys() == got[kind].keys() and len(want[kind])
        for l in want[kind]:
            assert want[kind][l].abs().max() > 0
            torch.testing.assert_close(got[kind][l], want[kind][l], atol=1e-7, rtol=2e-4)


def test_labels_are_drawn_from_the_models_distribution():
    q = torch.tensor([0.5, 0.0, 0.3, 0.2])
    v = globe.drawn(q.expand(100_000, 4), gen())
    torch.testing.assert_close(torch.bincount(v.flatten(), minlength=4) / len(v), q, atol=0.01, rtol=0)


def test_a_sampled_window_holds_four_texts(run):
    cfg = globe.run_config(run, types.SimpleNamespace(overrides=["calib.sampled=70", "calib.length=33", "calib.text=builtin"], config=None))
    ckpt, cpu = Checkpoint(cfg.model.path), torch.device("cpu")
    got = globe.calibration_windows(ckpt, cfg, cpu, 99)
    want = globe.sample_windows(globe.load_dense(ckpt.dir, cpu, None), 8, 9, cfg.fit.seed)
    assert got.shape == (5, 33) and torch.equal(got[3:], want.view(2, 36)[:, :33])


@torch.no_grad()
def test_windows_are_sampled_from_the_model_and_never_end_early(checkpoints):
    model = stock(checkpoints["qwen2_moe"])
    got = globe.sample_windows(model, 3, 9, seed=1)
    assert got.shape == (3, 9) and torch.equal(got, globe.sample_windows(model, 3, 9, seed=1)) and not torch.equal(got, globe.sample_windows(model, 3, 9, seed=2))
    model.lm_head.weight.mul_(1e4)  # so sure of itself that to sample is to be greedy
    model.generation_config.eos_token_id = None
    got = globe.sample_windows(model, 3, 9)
    greedy = lambda: torch.equal(got[:, 1:], model(got).logits[:, :-1].argmax(-1))  # noqa: E731
    assert greedy()
    model.generation_config.eos_token_id = [int(got[0, 4])]
    got = globe.sample_windows(model, 3, 9)
    assert not greedy() and int(model.generation_config.eos_token_id[0]) not in got[:, 1:]


def test_the_metric_is_the_second_moment_and_a_ridge():
    X = torch.randn(50, 32, generator=gen()).double()
    C = X.T @ X
    L = globe.metric_factor(C, 0.1).double()
    C /= C.diagonal().mean()
    torch.testing.assert_close(L @ L.T, (C + 0.1 * torch.eye(32)) / 1.1, atol=1e-5, rtol=1e-4)


def test_the_ridge_is_larger_where_the_halves_of_the_text_differ(small):
    ckpt = Checkpoint(small)
    D = ckpt.dims
    scale = torch.logspace(0, -3, D.d, dtype=torch.float64)

    def half(order) -> dict:
        C = dict.fromkeys(D.layers, torch.diag(scale[order]))
        rows = dict.fromkeys(D.layers, torch.ones(D.experts, D.p, dtype=torch.float64))
        return {"inputs": C, "weighted": C, "gate": rows, "up": rows}
    same, other = half(torch.arange(D.d)), half(torch.arange(D.d).flip(0))
    assert globe.chosen_ridge(ckpt, (same, same), 0.5) == globe.RIDGES[0]
    assert globe.chosen_ridge(ckpt, (same, other), 0.5) == globe.RIDGES[-1]


def test_a_chosen_ridge_is_kept_with_the_moments_and_used(small, tmp_path, capsys):
    ckpt, settings = Checkpoint(small), ["calib.tokens=512", "calib.length=64"]
    cfg = globe.load_config(None, [*settings, "calib.shrink=auto", f"calib.save={tmp_path / 'm.st'}"])
    moments = globe.calibrate(ckpt, cfg, torch.device("cpu"))
    ridge = float(moments["ridge"][0])
    assert ridge in globe.RIDGES and f"{ridge} of" in capsys.readouterr().err
    back = globe.load_moments(tmp_path / "m.st", ckpt)
    keys = [(0, 0)]
    got, want = (globe.metric_of(m, "gate", keys, x, torch.device("cpu"))["right"][0] for m, x in ((back, 7.0), ({**back, "ridge": {}}, ridge)))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    plain = globe.calibrate(ckpt, globe.load_config(None, [*settings, f"calib.save={tmp_path / 'plain.st'}"]), torch.device("cpu"))
    loaded = lambda name, *more: globe.calibrate(ckpt, globe.load_config(None, [f"calib.load={tmp_path / name}", *more]), torch.device("cpu"))  # noqa: E731
    assert "ridge" not in plain and "ridge" not in loaded("m.st")  # where fit.ridge is asked for, it counts
    assert loaded("m.st", "calib.shrink=auto")["ridge"][1] == ridge
    with pytest.raises(UserError, match="found no ridge"):
        loaded("plain.st", "calib.shrink=auto")
    torch.testing.assert_close(moments["inputs"][1], plain["inputs"][1], rtol=1e-5, atol=1e-8)


def test_the_largest_moments_rest_on_disk_or_are_left_out(small, words, tmp_path, monkeypatch, capsys):
    ckpt, cpu = Checkpoint(small), torch.device("cpu")
    cfg = globe.load_config(None, ["calib.tokens=512", "calib.length=64", f"calib.text={words}"])
    plain = globe.calibrate(ckpt, cfg, cpu)
    monkeypatch.setattr(globe, "free_memory", lambda device: 10_000)
    there = globe.calibrate(ckpt, cfg, cpu, tmp_path / "means")
    assert len([*(tmp_path / "means").rglob("gate_x.*")]) == len(ckpt.dims.layers)
    for kind, parts in plain.items():
        for l, C in parts.items():
            assert torch.equal(C, there[kind][l]), (kind, l)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert plain.keys() - globe.calibrate(ckpt, cfg, cpu, tmp_path / "means").keys() == set(globe.MEANS)
    assert "calib.means: expected" in capsys.readouterr().err
    globe.save_moments(tmp_path / "m.st", plain, ckpt.fingerprint())
    off = globe.load_config(None, [f"calib.load={tmp_path / 'm.st'}", "calib.means=false"])
    assert plain.keys() - globe.calibrate(ckpt, off, cpu).keys() == set(globe.MEANS)


# ======================================================================================================
# Native operators: each against its torch twin
# ======================================================================================================
CSRC = HERE / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
native = pytest.mark.skipif(not COMPILER or not CSRC.is_dir() or os.environ.get("GLOBE_KERNELS") == "off",
                            reason="no C++ compiler, no csrc/, or GLOBE_KERNELS=off")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CLOSE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture
def twin(monkeypatch):
    """Call a public operator on torch's form."""
    def call(f, *args, **kwargs):
        with monkeypatch.context() as m:
            m.setattr(globe, "_native", lambda op, device: False)
            return f(*args, **kwargs)
    return call


def in_process(code: str, **env) -> subprocess.CompletedProcess:
    env = {k: v for k, v in (os.environ | {"PYTHONPATH": str(HERE)} | env).items() if v is not None}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


@native
def test_the_native_operators_are_in_use_and_named():
    assert globe.kernels().startswith("native ") and all(globe._native("compose", d) for d in DEVICES if d != "mps")


@native
def test_native_compose_is_its_twin_for_a_hundred_random_shapes(twin, device):
    g = gen(7)
    draw = lambda *options: options[int(torch.randint(len(options), (1,), generator=g))]  # noqa: E731
    for n in range(100):
        m, r, d, E, s = draw(1, 3, 20, 130), draw(1, 5, 16), draw(1, 7, 64, 129, 300), draw(0, 1, 2, 9, 40), draw(0, 1, 4, 12)
        dtype, act = DTYPES[n % 4], draw(*ACTIVATIONS)
        bank = torch.randn(m, r, d, generator=g).to(dtype)
        idx, val = torch.randint(m, (E, s), generator=g), torch.randn(E, s, generator=g) * (torch.rand(E, s, generator=g) > 0.3)
        if n % 5 == 0:  # strided arguments
            bank, idx, val = bank.transpose(1, 2), idx.T.contiguous().T, val.T.contiguous().T
        bank, idx, val = (t.to(device) for t in (bank, idx, val))
        got, want = globe.compose(bank, idx, val, act), twin(globe.compose, bank, idx, val, act)
        torch.testing.assert_close(got, want, atol=CLOSE[dtype], rtol=CLOSE[dtype], msg=lambda t: f"{(m, r, d, E, s, dtype, act)}: {t}")
        slots = torch.full((E + 2, *bank.shape[1:]), 9.0, dtype=dtype, device=device)
        assert globe.compose(bank, idx, val, act, out=slots[1:E + 1]).data_ptr() == slots[1:].data_ptr() or not E
        assert torch.equal(slots[1:E + 1], got) and (slots[0] == 9).all() and (slots[-1] == 9).all()


@native
def test_native_compose_around_the_caches_is_its_twin(twin, device):
    bank = torch.randn(20, 70, 1024, generator=gen()).bfloat16().to(device)  # 150 results of 70 x 1024: larger than the caches
    idx, val = torch.randint(20, (150, 5), generator=gen(1)).to(device), torch.rand(150, 5, generator=gen(2)).to(device)
    torch.testing.assert_close(globe.compose(bank, idx, val, "silu"), twin(globe.compose, bank, idx, val, "silu"), atol=2e-2, rtol=2e-2)


@native
def test_native_simplex_maps_are_their_twins_for_a_hundred_random_shapes(twin, device):
    g = gen(8)
    for n in range(100):
        shape = [int(torch.randint(1, 9, (1,), generator=g)) for _ in range(n % 3)] + [(1, 2, 15, 16, 17, 33, 128, 257, 4096)[n % 9]]
        dtype, dim = DTYPES[n % 4], n % len(shape)
        x = (torch.randn(shape, generator=g) * (0.01, 1, 20)[n % 3]).to(dtype)
        if n % 2:
            x = x.masked_fill(torch.rand(shape, generator=g) < 0.3, -math.inf)
        if n % 7 == 0:
            x = x.round()  # ties
        if n % 5 == 0:
            x = x.expand(3, *shape)[:, ..., ::1]
        x = x.to(device)
        for f in MAPS.values():
            (p, size), want = f(x, dim, return_support=True), twin(f, x, dim)
            assert p.dtype is dtype and torch.equal(size, (p > 0).sum(dim))
            torch.testing.assert_close(p, want, atol=max(CLOSE[dtype], 1e-6), rtol=CLOSE[dtype], equal_nan=True)
    for f in MAPS.values():
        for row in ([-math.inf, -math.inf], [math.nan, 1.0], [math.inf, 1.0]):
            assert f(torch.tensor(row, device=device)).isnan().all() and twin(f, torch.tensor(row, device=device)).isnan().any()
        assert f(torch.zeros(0, 5, device=device)).shape == (0, 5)


@native
def test_native_gradients_are_their_twins(twin, device):
    for dtype in DTYPES:
        for activation in ACTIVATIONS:
            leaves = torch.randn(30, 6, 50, generator=gen()).to(dtype), torch.randn(9, 5, generator=gen(1))
            idx, grad = torch.randint(30, (9, 5), generator=gen(2)).to(device), torch.randn(9, 6, 50, generator=gen(3)).to(device, dtype)

            def pull(compose):
                bank, val = (t.clone().to(device).requires_grad_() for t in leaves)
                compose(bank, idx, val, activation).backward(grad)
                return bank.grad, val.grad
            for got, want in zip(pull(globe.compose), pull(lambda *a: twin(globe.compose, *a))):
                assert got.dtype is want.dtype
                tol = max(CLOSE[dtype], 1e-5) * 10  # twins of half types round their sums
                torch.testing.assert_close(got, want, atol=tol * float(want.abs().max()), rtol=tol)
        for f in MAPS.values():
            x, grad = torch.randn(7, 130, generator=gen(4)).to(device, dtype), torch.randn(7, 130, generator=gen(5)).to(device, dtype)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            f(a).backward(grad)
            twin(f, b).backward(grad)
            torch.testing.assert_close(a.grad, b.grad, atol=CLOSE[dtype] * 3, rtol=CLOSE[dtype] * 3)


@native
def test_native_gradients_of_empty_supports_and_banks_are_zero():
    for m, r, d, E, s in ((4, 3, 5, 2, 0), (4, 3, 5, 0, 3), (4, 0, 5, 2, 3), (4, 3, 5, 0, 0)):  # found by the sanitizers: null pointers
        bank, val = torch.randn(m, r, d).requires_grad_(), torch.rand(E, s).requires_grad_()
        y = globe.compose(bank, torch.zeros(E, s, dtype=torch.int64), val)
        y.sum().backward()
        assert y.shape == (E, r, d) and bank.grad.shape == (m, r, d) and val.grad.shape == (E, s)
        assert not bank.grad.any() and not val.grad.any()


@native
def test_opcheck_passes_for_every_native_operator():
    ops, check = torch.ops.globe, torch.library.opcheck
    assert globe._native("compose", "cpu")
    bank, idx = torch.randn(6, 5, 7, generator=gen()), torch.randint(6, (4, 3), generator=gen(1))
    val, x = torch.rand(4, 3, generator=gen(2)), torch.randn(4, 9, generator=gen(3))
    check(ops.compose.default, (bank.requires_grad_(), idx, val.requires_grad_(), "silu"))
    bank, val = bank.detach(), val.detach()
    check(ops.compose_out.default, (bank, idx, val, "tanh", torch.empty(4, 5, 7), None))
    check(ops.compose_backward.default, (torch.randn(4, 5, 7), bank, idx, val, "silu"))
    check(ops.simplex.default, (x.requires_grad_(), 1.5))
    check(ops.simplex_backward.default, (torch.randn(4, 9), x.detach().softmax(-1), 2.0))
    check(ops.experts_decode.default, decode_case(torch.float32, "basis", "dense")[0])
    check(ops.experts_mixed.default, mixed_case(torch.float32, ("gate", "up", "down"))[0])
    check(ops.linear.default, (torch.randn(3, 7), torch.randn(5, 7), torch.randn(5)))


@native
def test_native_operators_compile_without_a_graph_break():
    bank, idx = torch.randn(6, 4, 5, generator=gen(), requires_grad=True), torch.randint(6, (4, 3), generator=gen(1))
    val = torch.rand(4, 3, generator=gen(2), requires_grad=True)

    def f(bank, val):
        return (globe.compose(bank, idx, globe.sparsemax(val), "silu").square().sum() + globe.entmax15(val, 0).square().sum())
    want = torch.autograd.grad(f(bank, val), (bank, val))
    got = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(bank, val), (bank, val))
    torch.testing.assert_close(got, want)


@native
def test_native_operators_refuse_what_they_cannot_read():
    ops = torch.ops.globe
    assert globe._native("compose", "cpu")
    bank, idx, val = torch.randn(4, 2, 3), torch.tensor([[0, 1]]), torch.ones(1, 2)
    for bad, match in (((bank, idx + 3, val), r"index in \[0, 4\)"), ((bank, idx - 1, val), "found -1"), ((bank[0], idx, val), "expected shape"),
                       ((bank, idx.int(), val), "dtype"), ((bank.transpose(1, 2), idx, val), "contiguous"), ((bank, idx, val[:, :1]), "shape")):
        with pytest.raises(RuntimeError, match=match):
            ops.compose(*bad, "silu")
    with pytest.raises(RuntimeError, match="activation"):
        ops.compose(bank, idx, val, "gelu_tanh")
    for out in (torch.empty(2, 2, 3), torch.empty(1, 2, 3, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="out"):
            ops.compose_out(bank, idx, val, "silu", out, None)
        with pytest.raises(ValueError, match="out"):
            globe.compose(bank, idx, val, "silu", out=out)
    args, _ = decode_case(torch.float32, "basis", "dense")
    for place, value, match in ((1, args[1] + 90, "expert in"), (3, args[3] + 90, "slot in"), (4, args[4] - 90, "adapter in"),
                                (0, args[0].bfloat16(), "dtype|shape"), (5, args[5][:, :, 1:], "shape"),
                                (6, args[6][:0], "adapters"), (8, args[8][:0], "adapters")):  # an empty one read beyond the basis (ASan)
        with pytest.raises(RuntimeError, match=match):
            ops.experts_decode(*args[:place], value, *args[place + 1:])


def decode_case(dtype: torch.dtype, hold: str, down: str, T: int = 3, act: str = "silu") -> tuple:
    """Arguments of experts_decode on small odd shapes, and the result by its equation in float64."""
    g, E, k, d, p, r = gen(3), 5, 2, 37, 19, 11
    new = lambda *shape: (torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(dtype)  # noqa: E731
    x, weights, perm = new(T, d) * d ** 0.5, torch.rand(T, k, generator=g), torch.randperm(E, generator=g)
    index = torch.stack([torch.randperm(E, generator=g)[:k] for _ in range(T)])
    basis = hold == "basis"
    W = {f: new(E, r if basis else p, d) for f in ("gate", "up")}
    A = {f: new(E, p, r) if basis else None for f in ("gate", "up")}
    D = new(E, r, d) if down == "basis" else new(E, d, p)
    A["down"] = new(E, p, r) if down == "basis" else None
    scale, shift = [1.5, 0.5, 2.0], [0.01, -0.02, 0.03]
    row = torch.arange(E).flip(0)
    args = (x, index, weights, perm, row, W["gate"], A["gate"], W["up"], A["up"], D, A["down"], [1, 1, int(down != "dense")], scale, shift, act)
    f64, out = (lambda t: t.double()), torch.zeros(T, d, dtype=torch.float64)
    phi = {"silu": F.silu, "relu": F.relu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}[act]
    for t in range(T):
        for e, w in zip(index[t].tolist(), weights[t].double()):
            def first(i, f):
                y = f64(W[f][perm[e]]) @ f64(x[t])
                return scale[i] * (f64(A[f][row[e]]) @ y) + shift[i] * f64(x[t]).sum() if basis else y
            h = phi(first(0, "gate")) * first(1, "up")
            if down == "dense":
                y = f64(D[e]) @ h
            elif down == "basis":
                y = scale[2] * ((h @ f64(A["down"][row[e]])) @ f64(D[perm[e]])) + shift[2] * h.sum()
            else:
                y = f64(D[perm[e]]) @ h
            out[t] += w * y
    return args, out


@native
def test_experts_decode_is_its_equation_for_every_way_to_hold_the_weights(device):
    assert globe._native("experts_decode", device.type)
    for dtype, tol in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        for hold, down, T, act in itertools.product(("basis", "weight"), ("dense", "basis", "weight"), (1, 2, 7, 40), ("silu", "gelu_tanh", "relu")):
            args, want = decode_case(dtype, hold, down, T, act)
            args = [t.to(device) if isinstance(t, torch.Tensor) else t for t in args]
            torch.testing.assert_close(torch.ops.globe.experts_decode(*args).cpu().double(), want, atol=tol, rtol=tol)
            args[1][0, 0] = 5  # E: another rank's expert is left out
            assert torch.ops.globe.experts_decode(*args).isfinite().all()


def mixed_case(dtype: torch.dtype, families: tuple, T: int = 3, share: bool = False) -> tuple:
    """Arguments of experts_mixed on small odd shapes, and the result of experts_decode's equation on composed bases in float64."""
    g, E, k, d, p, r, m, s = gen(4), 5, 2, 37, 19, 11, 6, 3
    new = lambda *shape: (torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(dtype)  # noqa: E731
    x, weights, row = new(T, d) * d ** 0.5, torch.rand(T, k, generator=g), torch.randperm(E, generator=g)
    index = torch.stack([torch.randperm(E, generator=g)[:k] for _ in range(T)])
    scale, shift, parts, W = [1.5, 0.5, 2.0], [0.01, -0.02, 0.03], [], {}
    for i, f in enumerate(("gate", "up", "down")):
        if f not in families:
            W[f] = new(E, d, p) if f == "down" else new(E, p, d)
            parts += [W[f], None, None, None]
            continue
        bank, A, val = parts[0] if share and f == "up" else new(m, r, d), new(E, p, r), torch.randn(E, s, generator=g)
        idx = torch.stack([torch.randperm(m, generator=g)[:s] for _ in range(E)]).int()
        val[0, 1] = 0  # a support of fewer
        parts += [bank, A, idx, val]
        W[f] = (shift[i] + scale[i] * (A.double() @ globe.compose(bank.double(), idx.long(), val.double())))[row]
        W[f] = W[f].mT if f == "down" else W[f]
    out, W = torch.zeros(T, d, dtype=torch.float64), {f: w.double() for f, w in W.items()}
    for t in range(T):
        for e, w in zip(index[t].tolist(), weights[t].double()):
            out[t] += w * (W["down"][e] @ (F.silu(W["gate"][e] @ x[t].double()) * (W["up"][e] @ x[t].double())))
    return (x, index, weights, row, *parts, scale, shift, "silu"), out


@native
def test_experts_mixed_is_its_equation_for_every_set_of_families():
    for dtype, tol in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 8e-3)):
        for families, T in itertools.product((("gate", "up", "down"), ("gate", "up"), ("down",), ("up",), ()), (1, 2, 7, 40)):
            args, want = mixed_case(dtype, families, T, share=len(families) == 2)
            torch.testing.assert_close(torch.ops.globe.experts_mixed(*args).double(), want, atol=tol, rtol=tol)
            args[1][0, 0] = 5  # another rank's expert is left out
            assert torch.ops.globe.experts_mixed(*args).isfinite().all()
    args, _ = mixed_case(torch.float32, ("gate", "up", "down"))
    for place, value, match in ((1, args[1] + 90, "expert in"), (3, args[3] + 90, "adapter in"), (6, args[6] + 6, "idx in"), (6, None, "together"),
                                (7, args[7][:, :0], "val"),
                                (7, args[7][:, :1], "val"), (5, None, "together|expected shape"), (6, args[6].long(), "dtype")):
        with pytest.raises(RuntimeError, match=match):
            torch.ops.globe.experts_mixed(*args[:place], value, *args[place + 1:])


@native
def test_native_linear_is_torchs():
    for dtype, tol in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        for T, n, rows, bias in itertools.product((1, 3, 9), (5, 64, 515), (1, 7, 33), (False, True)):
            x, W, b = (torch.randn(shape, generator=gen(i)).to(dtype) for i, shape in enumerate(((T, n), (rows, n), (rows,))))
            W, b = W / n ** 0.5, b if bias else None
            want = F.linear(x.double(), W.double(), b.double() if bias else None)
            torch.testing.assert_close(torch.ops.globe.linear(x, W, b).double(), want, atol=tol, rtol=tol)
    for bad, match in (((x, W[:, 1:], b), "shape"), ((x, W, b[1:]), "bias"), ((x.double(), W.double(), None), "float64"), ((x, W.T.contiguous().T, b), "contiguous")):
        with pytest.raises(RuntimeError, match=match):
            torch.ops.globe.linear(*bad)


def test_bases_that_act_directly_give_what_composing_gives(checkpoints, twin, device):
    for kind, families in (("qwen2_moe", "both"), ("qwen2_moe", "all"), ("mixtral", "all"), ("deepseek_v2", "all")):
        ckpt = Checkpoint(checkpoints[kind])
        factors = random_factors(ckpt, families, m=3)  # few bases, as direct has them for any number of tokens
        for f in factors.families.values():
            f.activation = "identity"
        want, m = (globe.patch(stock(ckpt.dir).to(device), factors, globe.CacheConfig(mode=mode)) for mode in ("none", "direct"))
        torch.testing.assert_close(logits(m), logits(want), atol=2e-5, rtol=2e-5)
        m, want = globe.globe_modules(m)[0], globe.globe_modules(want)[0]
        x, weights = torch.randn(40, m.hidden_dim, generator=gen()).to(device), torch.rand(40, 2, generator=gen(1)).to(device)
        index = torch.stack([torch.randperm(4, generator=gen(i))[:2] for i in range(40)]).to(device)
        index[3, 1] = m.num_experts  # of another rank
        with torch.no_grad():
            for n in (1, 2, 40):
                args = x[:n], index[:n], weights[:n]
                assert m.directly(n) and not want.directly(n)
                torch.testing.assert_close(m(*args), want(*args), atol=2e-5, rtol=2e-5)
                torch.testing.assert_close(twin(m, *args), want(*args), atol=2e-5, rtol=2e-5)
        assert not m.cache.slabs and not m._bank[0].scratch or ckpt.dims.shared  # nothing was composed
        assert m.to(torch.bfloat16)._bank[0].to(torch.bfloat16) is not None
        with torch.no_grad():
            assert m(x.bfloat16(), index, weights).dtype is torch.bfloat16


def test_a_model_keeps_the_cache_settings_of_its_run(checkpoints, tmp_path):
    ckpt = Checkpoint(checkpoints["qwen2_moe"])
    factors = random_factors(ckpt)
    for f in factors.families.values():
        f.activation = "identity"
    for own, mode in (({"mode": "direct"}, "direct"), ({"per_layer": 1}, "lru"), (None, "lru")):
        factors.config = {"cache": own} if own else {}
        globe.export_globe(ckpt, factors, fresh_dir(tmp_path / "export"))
        for model in (globe.patch(stock(ckpt.dir), factors), globe.load(tmp_path / "export"), stock(tmp_path / "export")):
            m = globe.globe_modules(model)[0]
            assert m._bank[0].cache.mode == mode and m.cache.slots == {"direct": 0}.get(mode, 1 if own else 2)
        assert globe.globe_modules(globe.load(tmp_path / "export", cache=globe.CacheConfig(mode="all")))[0]._bank[0].cache.mode == "all"
    factors.config = {"cache": {"mode": "everything"}}
    with pytest.raises(UserError, match="cache.mode: expected .*direct.*found 'everything'"):
        globe.patch(stock(ckpt.dir), factors)


def test_direct_composes_where_many_tokens_meet_many_bases_and_refuses_activations(checkpoints, twin):
    ckpt = Checkpoint(checkpoints["qwen2_moe"])
    factors = random_factors(ckpt, m=8)
    with pytest.raises(UserError, match="cache.mode=direct: expected bases without an activation, found silu in gate"):
        globe.patch(model := stock(ckpt.dir), factors, globe.CacheConfig(mode="direct"))
    assert not globe.globe_modules(model)  # and nothing was swapped
    with pytest.raises(UserError, match="cache.mode=direct: expected bank.activation identity, found silu"):
        load_config(None, ["cache.mode=direct", "bank.activation=silu"])
    for f in factors.families.values():
        f.activation = "identity"
    want, model = (globe.patch(stock(ckpt.dir), factors, globe.CacheConfig(mode=mode)) for mode in ("none", "direct"))
    m = globe.globe_modules(model)[0]
    assert m.directly(1) and not m.directly(60)
    torch.testing.assert_close(logits(model), logits(want), atol=2e-5, rtol=2e-5)
    x, index, weights = torch.randn(60, m.hidden_dim, generator=gen()), torch.tensor([[0, 1]] * 60), torch.ones(60, 2)
    with torch.no_grad():
        torch.testing.assert_close(m(x, index, weights), globe.globe_modules(want)[0](x, index, weights), atol=2e-5, rtol=2e-5)
    m(x.requires_grad_(), index, weights).sum().backward()  # with a gradient, experts are composed
    for p in model.parameters():
        p.requires_grad_(False)
    weights = weights[:5].clone().requires_grad_()  # what a router learns by
    m(x.detach()[:5], index[:5], weights).sum().backward()
    assert weights.grad.abs().min() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = twin(m, x[:5], index[:5], weights)
        other = m(x[:5], index[:5], weights)
        assert float((y - other).float().norm() / other.float().norm()) < 0.03  # each rounds to bfloat16 in places of its own
    assert x.grad.isfinite().all() and x.grad.any()


@native
def test_the_native_path_and_the_grouped_one_equal_expert_by_expert(checkpoints, twin):
    for kind, families in (("qwen2_moe", "both"), ("mixtral", "both"), ("qwen2_moe", "all")):
        ckpt = Checkpoint(checkpoints[kind])
        for mode, r in (("all", 6), ("all", 24), ("lru", 6), ("none", 6)):  # r 24: weights are held
            model = globe.patch(stock(ckpt.dir), random_factors(ckpt, families, r=r), globe.CacheConfig(mode=mode, per_layer=3))
            m, T = globe.globe_modules(model)[0], 50
            assert set(m.hold.values()) == {"weight" if (mode, r) == ("all", 24) else "basis"}
            x = torch.randn(T, m.hidden_dim, generator=gen())
            index, weights = torch.stack([torch.randperm(4, generator=gen(i))[:2] for i in range(T)]), torch.rand(T, 2, generator=gen(1))
            index[3, 1] = 4  # of another rank
            with torch.no_grad():
                for n in (1, 2, T):
                    args = x[:n], index[:n], weights[:n]
                    want = m(*args)
                    assert globe._native("experts_decode", "cpu") and want.isfinite().all()
                    torch.testing.assert_close(twin(m, *args), want, atol=1e-5, rtol=1e-5)  # grouped in mode all, else by expert
                    with torch.enable_grad():
                        torch.testing.assert_close(m(x[:n].clone().requires_grad_(), *args[1:]).detach(), want, atol=1e-5, rtol=1e-5)
                m.bfloat16(), model.globe_bank.bfloat16()
                assert m(x.bfloat16(), index, weights).dtype is torch.bfloat16


@native
@pytest.mark.parametrize("isa", ("avx512", "avx2", "plain"))
def test_lesser_instruction_sets_give_the_same_results(isa):
    order, best = ("plain", "avx2", "avx512", "avx512_bf16"), globe.kernels().split()[1].rstrip(",")  # best: this CPU's
    code = ("import torch, globe, test_globe as t\n"
            "assert globe.kernels().split()[1].rstrip(',') == %r, globe.kernels()\n"
            "cpu = torch.device('cpu')\n"
            "def off(f, *a, **k):\n"
            "    keep, globe._native = globe._native, lambda *_: False\n"
            "    try: return f(*a, **k)\n"
            "    finally: globe._native = keep\n"
            "t.test_native_compose_is_its_twin_for_a_hundred_random_shapes(off, cpu)\n"
            "t.test_native_simplex_maps_are_their_twins_for_a_hundred_random_shapes(off, cpu)\n"
            "t.test_native_gradients_are_their_twins(off, cpu)\n"
            "t.test_experts_decode_is_its_equation_for_every_way_to_hold_the_weights(cpu)\n"
            "t.test_experts_mixed_is_its_equation_for_every_set_of_families()\n"
            "t.test_native_linear_is_torchs()\n" % min(isa, best, key=order.index))
    done = in_process(code, GLOBE_ISA=isa)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_native_operators_everything_runs_on_torch(tmp_path):
    code = "import torch, globe; print(globe.kernels()); print(float(globe.sparsemax(torch.zeros(4)).sum()), globe.compose(torch.ones(3, 2, 2), torch.zeros(1, 1).long(), torch.ones(1, 1)).shape)"
    done = in_process(code, GLOBE_KERNELS="off")
    assert done.returncode == 0 and done.stdout.startswith("torch, GLOBE_KERNELS=off\n1.0"), done.stderr
    (tmp_path / "alone").mkdir()
    shutil.copy(HERE / "globe.py", tmp_path / "alone" / "globe.py")  # as an export carries it: no csrc/ beside it
    done = in_process(code, PYTHONPATH=str(tmp_path / "alone"), GLOBE_KERNELS=None)
    assert done.returncode == 0 and ("torch, no csrc/" in done.stdout and done.stderr.count("torch's operators are used") == 1
                                     or "installed" in done.stdout), done.stderr
    done = in_process("import globe; globe.kernels()", PYTHONPATH=str(tmp_path / "alone"), GLOBE_KERNELS="jit")
    assert done.returncode and "GLOBE_KERNELS=jit: no csrc/" in done.stderr
    done = in_process("import globe; globe.kernels()", GLOBE_KERNELS="fast")
    assert done.returncode and "expected auto, jit or off, found 'fast'" in done.stderr


@native
def test_a_broken_extension_is_an_error_that_is_seen(tmp_path):
    shutil.copytree(HERE / "csrc", tmp_path / "alone" / "csrc")
    shutil.copy(HERE / "globe.py", tmp_path / "alone" / "globe.py")
    (tmp_path / "alone" / "csrc" / "globe_ops.cpp").write_text("this is no C++\n")
    run = "import torch, globe; globe.sparsemax(torch.zeros(3))"
    done = in_process(run, PYTHONPATH=str(tmp_path / "alone"), GLOBE_KERNELS="jit")
    assert done.returncode and "the build failed" in done.stderr and "GLOBE_KERNELS=off" in done.stderr
    assert not list((tmp_path / "cache" / "kernels").glob(".*tmp*"))
    (tmp_path / "alone" / "globe_ops.abi3.so").write_bytes(b"not a library")
    done = in_process(run, PYTHONPATH=str(tmp_path / "alone"), GLOBE_KERNELS="auto")
    assert done.returncode and "globe_ops.abi3.so" in done.stderr


@slow
@native
def test_processes_that_build_at_once_both_end_with_the_library(tmp_path):
    code = "import globe; print(globe.kernels())"
    env = os.environ | {"PYTHONPATH": str(HERE), "GLOBE_CACHE": str(tmp_path / "fresh"), "GLOBE_KERNELS": "jit"}
    both = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert all("native" in p.communicate()[0] and p.returncode == 0 for p in both)
    assert len(list((tmp_path / "fresh" / "kernels").iterdir())) == 1


@slow
@native
def test_a_wheel_built_with_one_torch_loads_under_another(tmp_path):
    other = os.environ.get("GLOBE_OTHER_PYTHON")  # an interpreter whose torch is another release, from 2.10 on
    if not other:
        pytest.skip("GLOBE_OTHER_PYTHON names no interpreter with another torch")
    shutil.copytree(HERE, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "runs", "build"))
    for command in ((sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", "wheels", "./source"),
                    (other, "-m", "pip", "install", "--no-deps", "--target", "site", "--no-index", "--find-links", "wheels", "globe-moe")):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    code = ("import torch, globe; print(torch.__version__); x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)\n"
            "assert 'installed' in globe.kernels() and torch.autograd.gradcheck(globe.entmax15, (x,)), globe.kernels()")
    done = subprocess.run([other, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")})
    assert done.returncode == 0 and done.stdout.strip() != torch.__version__, done.stdout + done.stderr


def test_cuda_sources_compile(tmp_path):
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("no nvcc")
    command = [nvcc, "-std=c++17", "-c", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-arch=sm_80",
               "-I", str(Path(torch.__file__).parent / "include"), str(CSRC / "globe_ops.cu"), "-o", str(tmp_path / "globe_ops.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# ======================================================================================================
# The ecosystem: from_pretrained, pipelines, the hub
# ======================================================================================================
KINDS = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3")
LOADING = f"""
import json, os, sys, torch
from transformers import AutoModelForCausalLM
IDS = torch.tensor({IDS.tolist()})
"""


def python(code: str, *argv, path: Path | None = None, timeout: int = 120) -> subprocess.CompletedProcess:
    """A process of its own, offline, that finds this globe.py only where `path` is given."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(path)} if path else {}
    env["HF_MODULES_CACHE"] = str(Path.cwd() / "modules")
    return subprocess.run([sys.executable, "-c", LOADING + code, *map(str, argv)], env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="session")
def exports(checkpoints, tmp_path_factory) -> dict:
    """{model type: globe export}: random factors of gate and up, m 5, r 6; "composed": the composed one of qwen2_moe."""
    root, out = tmp_path_factory.mktemp("exports"), {}
    for kind in (*KINDS, "composed"):
        ckpt = Checkpoint(checkpoints["qwen2_moe" if kind == "composed" else kind])
        out[kind] = root / f"my.{kind}"
        out[kind].mkdir()
        globe.export_globe(ckpt, random_factors(ckpt), out[kind], kind == "composed")
    return out


@pytest.mark.parametrize("how", ("remote code", "package"))
def test_from_pretrained_gives_the_native_class_with_compressed_experts(how, exports, tmp_path):
    code = """
if sys.argv[1] == "package":
    import globe
from transformers import AutoConfig
from transformers.quantizers.auto import AutoQuantizationConfig
config = AutoConfig.from_pretrained(sys.argv[2], trust_remote_code=sys.argv[1] != "package")
assert AutoQuantizationConfig.from_dict(config.quantization_config).quant_method == "globe"  # as lm-eval does, before it has a model
out = {}
for path in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=sys.argv[1] != "package")
    half = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=sys.argv[1] != "package", dtype=torch.bfloat16)
    experts = [m for m in model.modules() if type(m).__name__ == "GlobeExperts"]
    dtypes = {k.rpartition("_")[2]: str(v.dtype) for k, v in half.state_dict().items() if "experts" in k or "globe_bank" in k}
    kinds = {k.rpartition(".")[2] for k in model.state_dict()}
    out[path] = [type(model).__module__, len(experts), model(IDS).logits.tolist(), half(IDS).logits.tolist(), dtypes,
                 any(p.requires_grad for m in experts for p in m.parameters()), type(experts[0]).__module__,
                 any(n.endswith("experts.gate_up_proj") and p.numel() > 1 for n, p in model.named_parameters())]
print(json.dumps(out))
"""
    got = python(code, how, *exports.values(), path=HERE if how == "package" else None)
    assert got.returncode == 0, got.stderr[-3000:]
    for kind, path in exports.items():
        where, layers, full, half, dtypes, trains, module, dense = json.loads(got.stdout)[str(path)]
        want = logits(globe.load(path))
        assert where.startswith("transformers.models.") and not trains and not dense
        assert layers == len(globe.dims_of({**read(path), "quantization_config": None}).layers)
        assert gap(torch.tensor(full), want) < 1e-5, kind
        other = logits(globe.load(path, dtype=torch.bfloat16))  # may run on other operators, so a token may go to another expert
        assert (torch.tensor(half) - other).abs().median() < 0.05, kind
        assert dtypes["A"] == "torch.bfloat16" and dtypes.get("val", "torch.float32") == "torch.float32"
        assert module == "globe" if how == "package" else module.startswith("transformers_modules.")


def read(path: Path) -> dict:
    return json.loads((path / "config.json").read_text(encoding="utf-8"))


def test_without_remote_code_and_package_loading_fails_and_never_starts_from_random_experts(exports):
    code = """
for path in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(path)
    except (RuntimeError, ValueError) as e:
        print(type(e).__name__)
"""
    got = python(code, *exports.values())
    assert got.returncode == 0 and len(got.stdout.split()) == len(exports), got.stderr[-3000:]
    assert "gate_up_proj" in got.stderr  # the report names the tensor that does not fit


def test_two_copies_of_the_file_register_once_and_know_each_others_models(exports):
    code = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
other = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
import globe
again = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model(IDS), again(IDS)
copies = [name for name in sys.modules if name.split(".")[-1] == "globe"]
assert len(copies) == 3, copies
print(json.dumps([globe.cache_stats(m)["misses"] > 0 for m in (model, again)]))
"""
    got = python(code, exports["qwen2_moe"], exports["mixtral"], path=HERE)
    assert got.returncode == 0 and json.loads(got.stdout) == [True, True], got.stderr[-3000:]


def test_saving_again_keeps_keys_values_and_globe_py(exports, checkpoints):
    from transformers import AutoModelForCausalLM
    for kind in ("qwen2_moe", "mixtral", "deepseek_v3", "composed"):
        first, ckpt = exports[kind], Checkpoint(checkpoints["qwen2_moe" if kind == "composed" else kind])
        models = [AutoModelForCausalLM.from_pretrained(first), globe.load(first)]
        models += [globe.patch(stock(ckpt.dir), random_factors(ckpt))] if kind != "composed" else []
        for i, model in enumerate(models):
            model.save_pretrained(f"again-{kind}-{i}", max_shard_size="20KB")
            again = Path(f"again-{kind}-{i}")
            a, b = ({n: t for f in sorted(d.glob("*.safetensors")) for n, t in load_file(f).items()} for d in (first, again))
            assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
            assert len(list(again.glob("*.safetensors"))) > 1
            assert (again / "globe.py").read_bytes() == Path(globe.__file__).read_bytes()
            assert {k: read(again)[k] for k in ("quantization_config", "auto_map")} == {k: read(first)[k] for k in ("quantization_config", "auto_map")}
            assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(again)), logits(globe.load(first)))


def test_a_tensor_that_is_missing_from_an_export_stops_the_load(exports, tmp_path):
    from transformers import AutoModelForCausalLM
    for gone in ("globe_bank.up_0", "model.layers.1.mlp.experts.gate_A", "model.norm.weight"):
        broken = fresh_dir(tmp_path / "broken")
        shutil.copytree(exports["qwen2_moe"], broken, dirs_exist_ok=True)
        tensors = load_file(broken / "model.safetensors")
        del tensors[gone]
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"expected tensor {gone}, found none"):
            AutoModelForCausalLM.from_pretrained(broken)


def test_a_device_map_spreads_layers_but_keeps_the_bank_at_hand(exports, tmp_path):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    from transformers import AutoModelForCausalLM
    want = logits(globe.load(exports["qwen3_moe"]))
    auto = AutoModelForCausalLM.from_pretrained(exports["qwen3_moe"], device_map="auto")
    assert gap(logits(auto.cpu()), want) < 1e-4
    places = {"globe_bank": "cpu", "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(exports["qwen3_moe"], device_map=places, offload_folder=tmp_path / "disk")
    assert spread.model.layers[1].mlp.experts.gate_A.is_meta and gap(logits(spread), want) < 1e-5
    with pytest.raises(UserError, match="globe_bank"):
        AutoModelForCausalLM.from_pretrained(exports["qwen3_moe"], device_map=places | {"globe_bank": "disk"}, offload_folder=tmp_path / "disk")


def test_a_loaded_export_generates_in_a_pipeline_and_nothing_is_compiled(run, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    assert globe.main(["export", "--factors", str(run), "--to", "out", "--no-check"]) == 0
    monkeypatch.setattr(torch, "compile", lambda *a, **k: pytest.fail("generate tried to compile"))
    model = AutoModelForCausalLM.from_pretrained("out")
    ids = AutoTokenizer.from_pretrained("out")("def main(", return_tensors="pt")
    got = model.generate(**ids, max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert torch.equal(got, globe.load("out").generate(**ids, max_new_tokens=8, do_sample=False)) and not model.hf_quantizer.is_compileable
    text = pipeline("text-generation", model="out", trust_remote_code=True)("def main(", max_new_tokens=8, do_sample=False)
    assert text[0]["generated_text"].startswith("def main(")


def test_the_hub_gets_a_private_repository_unless_told_otherwise(run, monkeypatch, capsys):
    import huggingface_hub
    calls = []

    class Hub:
        def create_repo(self, repo, private, exist_ok):
            calls.append((repo, private))

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(os.listdir(folder_path))))
    with monkeypatch.context() as mocked:
        mocked.setattr(huggingface_hub, "HfApi", Hub)
        for extra, private in (([], True), (["--public", "--overwrite"], False)):
            calls.clear()
            answer("export", "--factors", run, "--to", "out", "--no-check", "--push-to-hub", "me/moe", *extra, capsys=capsys)
            assert calls[0] == ("me/moe", private) and {"README.md", "globe.py", "model.safetensors", "tokenizer.json"} <= set(calls[1][1])
    said = refused("export", "--factors", run, "--to", "out", "--no-check", "--overwrite", "--push-to-hub", "me/moe", capsys=capsys)
    assert "me/moe" in said and "the export is in out" in said


def test_the_model_card_states_source_sizes_figures_licence_and_command(run, small, words, tmp_path, capsys):
    source, run = shutil.copytree(small, tmp_path / "source"), shutil.copytree(run, tmp_path / "r")
    (source / "README.md").write_text("---\nlanguage: en\nlicense: other\nlicense_name: tongyi\n---\n# Big\nlicense: no\n")
    globe.write_text(source / "config.json", json.dumps(read(source) | {"_name_or_path": "org/big-moe"}))
    (run / "eval.json").unlink(missing_ok=True)  # other tests evaluated the run that this is a copy of
    ckpt = Checkpoint(source)
    factors = dataclasses.replace(globe.load_factors(run), fingerprint=ckpt.fingerprint())
    globe.save_factors(factors, run / "factors.safetensors")
    for form in ("globe", "dense"):
        answer("export", "--factors", run, "--model", source, "--to", form, "--format", form, "--no-check", capsys=capsys)
        card = Path(form, "README.md").read_text()
        assert "None was run" in card and "license: other\nlicense_name: tongyi\nbase_model: org/big-moe" in card.split("---")[1]
        assert card.count("license: ") == 1 and str(tmp_path) not in card and ("trust_remote_code" in card) == (form == "globe")
    got = answer("eval", "--factors", run, "--model", source, "--text", words, "--tasks", "builtin", *SPEED, capsys=capsys)
    answer("export", "--factors", run, "--model", source, "--to", "globe", "--overwrite", "--no-check", capsys=capsys)
    card = Path("globe/README.md").read_text()
    assert f"{got['ppl']:.4g}" in card and "| builtin, " not in card and "words.txt, 252 tokens" in card and "| builtin " in card
    assert f"{factors.ratio():.4f}" in card and hashlib.sha256(Path("globe/globe.py").read_bytes()).hexdigest() in card
    line = re.search(r"^python globe.py (fit .*)$", card, re.M)[1]
    cfg = load_config(None, globe.parse(shlex.split(line)).overrides)
    assert cfg.model.path == "org/big-moe" and (cfg.bank.m, cfg.bank.r, cfg.fit.steps) == (3, 6, 6)


def test_perplexity_with_a_stride_is_the_recipe_token_by_token(small, words):
    tokenizer, model = globe.load_tokenizer(small), stock(small)
    ids = globe.token_windows(tokenizer, words.read_text(), 100, 100)[0]
    windows = globe.token_windows(tokenizer, words.read_text(), 100, 32, 8)
    assert windows.shape == (9, 32) and torch.equal(windows[1], ids[8:40])
    total, n = globe.nll(model, windows, 4, stride=8)
    with torch.no_grad():
        logp = [model(ids[None, max(0, -(-(t - 31) // 8) * 8):t]).logits[0, -1].log_softmax(-1)[ids[t]] for t in range(1, 96)]
    assert n == 95 and total == pytest.approx(-float(torch.stack(logp).mean()), rel=1e-4)


def test_a_hub_data_set_is_read_by_name_configuration_and_split(monkeypatch):
    def load_dataset(name, config, split):
        if name == "gone":
            raise FileNotFoundError("no such data set\nand a long story")
        return {"text": [name, str(config), split]}
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert globe.read_text("hf:org/wiki:raw-v1:validation", "heldout") == "org/wiki\n\nraw-v1\n\nvalidation"
    assert globe.read_text("hf:org/wiki", "heldout") == "org/wiki\n\nNone\n\ntest"
    with pytest.raises(UserError, match="hf:gone::test: FileNotFoundError: no such data set$"):
        globe.read_text("hf:gone", "heldout")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        globe.read_text("hf:org/wiki", "heldout")


def test_the_builtin_task_has_right_answers_that_differ_and_a_model_that_knows_them_scores_one(small):
    items = globe.builtin_choices(40)
    assert len(items) == 40 and len({c for c, _, _ in items}) == 40 and {a for _, _, a in items} == {0, 1, 2, 3}
    assert all(len(set(tails)) == 4 for _, tails, _ in items)
    tokenizer, answers = globe.load_tokenizer(small), {c + t[a] for c, t, a in items}

    class Oracle(torch.nn.Linear):  # sure of the next byte where the text so far begins a right answer
        def forward(self, ids):
            out = torch.zeros(*ids.shape, len(tokenizer))
            for i, row in enumerate(ids.tolist()):
                right = tokenizer.decode(row).rstrip("\0") in answers
                out[i, range(len(row) - 1), row[1:]] = 5.0 if right else 1.0
            return types.SimpleNamespace(logits=out)
    assert globe.choice_accuracy(Oracle(1, 1), tokenizer, items) == 1.0
    assert globe.choice_accuracy(stock(small), tokenizer, items) < 0.6  # random weights


def local_task(words: Path) -> Path:
    """A perplexity task of lm-eval on a local file: 4 kB of ASCII, so that a byte is a token."""
    text = words.read_text(encoding="utf-8").encode("ascii", "ignore").decode()[:4096]
    Path("doc.txt").write_text(text)
    Path("doc.json").write_text(json.dumps([{"text": text}]))
    Path("tasks").mkdir(exist_ok=True)
    Path("tasks/ppl.yaml").write_text(
        f"task: local_ppl\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {Path('doc.json').resolve()}\n"
        "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: byte_perplexity\n")
    return Path("tasks/ppl.yaml")


def exported(run: Path) -> Path:
    assert globe.main(["export", "--factors", str(run), "--to", "out", "--no-check", "--overwrite"]) == 0
    return Path("out")


def rolling(model: torch.nn.Module, text: Path) -> float:
    """lm-eval's byte perplexity: windows of 64 bytes, each preceded by one token of context (eos before the first)."""
    ids = torch.tensor([256, *text.read_bytes()])
    return math.exp(globe.nll(model, ids.unfold(0, 65, 64))[0])


@slow
def test_lm_eval_inside_eval_agrees_with_its_perplexity(run, words, monkeypatch, capsys):
    task = local_task(words)
    with monkeypatch.context() as absent:
        absent.setitem(sys.modules, "lm_eval", None)
        assert "pip install lm-eval" in refused("eval", "--factors", run, "--text", "doc.txt", *SPEED, "--tasks", task, capsys=capsys)
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    got = answer("eval", "--factors", run, "--text", "doc.txt", "--tasks", task, "eval.tokens=4096", "eval.length=64", "eval.context=64", capsys=capsys)
    ppl = got["tasks"]["local_ppl"]["byte_perplexity"]
    assert ppl["globe"] == pytest.approx(rolling(globe.load(exported(run)), Path("doc.txt")), rel=1e-3)
    for a, b in ((ppl["globe"], got["ppl"]), (ppl["dense"], got["ppl_dense"])):
        assert a == pytest.approx(b, rel=0.05)  # random weights and short windows; 1 % on the tiny model
    assert "nosuchtask" in refused("eval", "--factors", run, "--text", "doc.txt", *SPEED, "--tasks", "nosuchtask", capsys=capsys)


@slow
def test_lm_evals_own_command_reads_a_globe_export(run, words):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    local_task(words)
    want = rolling(globe.load(exported(run)), Path("doc.txt"))
    argv = ("lm_eval run --model hf --model_args pretrained=out,trust_remote_code=True,max_length=64 --tasks local_ppl "
            "--include_path tasks --device cpu --batch_size 4 --output_path res").split()
    code = f"sys.argv = {argv}\nfrom lm_eval.__main__ import cli_evaluate\ncli_evaluate()"
    got = python(code, timeout=180)
    assert got.returncode == 0, got.stderr[-3000:]
    row = json.loads(next(Path("res").rglob("*.json")).read_text())["results"]["local_ppl"]
    assert row["byte_perplexity,none"] == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("checkpointing", (False, True), ids=("plain", "checkpointing"))
def test_lora_with_trainable_factors_lowers_the_loss_in_the_trainer(checkpointing, exports, capsys):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(exports["qwen2_moe"])
    with torch.no_grad():
        model(IDS)  # something stale in the caches
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    factors = {n: p for n, p in tuned.named_parameters() if n.endswith(("_A", "_val")) or "globe_bank" in n}
    for p in factors.values():
        p.requires_grad_(True)
    if checkpointing:
        tuned.enable_input_require_grads()
    before = {n: p.detach().clone() for n, p in tuned.named_parameters() if p.requires_grad}
    data = [{"input_ids": row, "labels": row} for row in IDS] * 4
    args = TrainingArguments("trained", max_steps=3, per_device_train_batch_size=2, learning_rate=5e-3, logging_steps=1, report_to="none",
                             gradient_checkpointing=checkpointing, use_cpu=True, save_strategy="no", lr_scheduler_type="constant")
    trainer = Trainer(tuned, args, train_dataset=data)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    moved = {n for n, p in tuned.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert set(factors) <= moved and any("lora_B" in n for n in moved)
    for kind in ("attention", "experts"):  # what was trained is saved: LoRA by peft, factors by save_pretrained
        assert any(("lora" in n) == (kind == "attention") for n in moved)
    tuned.merge_and_unload().save_pretrained("tuned")
    again = AutoModelForCausalLM.from_pretrained("tuned")
    assert gap(logits(again), logits(model.eval())) < 1e-4


def test_factors_train_without_peft_and_a_trained_value_is_never_stale(exports):
    from transformers import AutoModelForCausalLM
    results = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(exports["qwen3_moe"])
        logits(model)
        for m in (model.globe_bank, *globe.globe_modules(model)):
            for n, p in m.named_parameters():
                p.requires_grad_(not n.endswith("proj"))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.enable_input_require_grads()
        optimizer = torch.optim.SGD([p for m in (model.globe_bank, *globe.globe_modules(model)) for p in m.parameters() if p.requires_grad], 0.05)
        losses = []
        for _ in range(3):
            loss = model(IDS, labels=IDS, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[2] < losses[1] < losses[0]
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_a_dense_export_has_the_names_that_vllms_loader_maps(checkpoints, tmp_path):
    """FusedMoE.make_expert_params_mapping looks for `experts.{e}.{name}.`, name by model, for every expert."""
    names = {"qwen2_moe": "gate_proj up_proj down_proj", "mixtral": "w1 w3 w2"}
    for kind in KINDS:
        ckpt, to = Checkpoint(checkpoints[kind]), fresh_dir(tmp_path / "dense")
        globe.export_dense(ckpt, random_factors(ckpt, "all"), to)
        stored = set(load_file(to / "model.safetensors"))
        for l in ckpt.dims.layers:
            block = "block_sparse_moe" if kind == "mixtral" else "mlp"
            for n in names.get(kind, names["qwen2_moe"]).split():
                assert {f"model.layers.{l}.{block}.experts.{e}.{n}.weight" for e in range(ckpt.dims.experts)} <= stored
        assert not any(re.search(r"\.experts\.(gate_up|down)_proj|globe_bank|_A$", n) for n in stored)
        assert not {"quantization_config", "auto_map"} & set(read(to))


def test_info_says_what_a_directory_is_and_how_large(run, small, exports, capsys):
    made, source = answer("info", run, capsys=capsys), answer("info", small, capsys=capsys)
    assert (made["kind"], made["r"] if "r" in made else "r 6" in made["gate"]) == ("run", True) and 0 < made["ratio"] < 2
    assert (source["kind"], source["experts"], source["p"], source["d"]) == ("checkpoint", 4, 16, 32)
    assert source["parameters"] == sum(t.numel() for t in load_file(small / "model.safetensors").values())
    assert made["fingerprint"] == source["fingerprint"]
    for kind, want in (("qwen2_moe", "globe export"), ("composed", "composed export")):
        got = answer("info", exports[kind], capsys=capsys)
        assert got["kind"] == want and got["bytes"] == globe.weight_bytes(exports[kind]) and "m 5" in got["up"]
    Path("half").mkdir()
    shutil.copy(run / "config.yaml", "half")
    assert answer("info", "half", capsys=capsys)["kind"] == "unfinished run"
    assert "config.json" in refused("info", "nowhere", capsys=capsys)


def test_a_wanted_size_of_the_model_chooses_families_and_r(small, capsys):
    dense = globe.weight_bytes(small)
    for share, families in ((0.95, {"gate", "up"}), (0.82, {"gate", "up", "down"})):
        got = answer("fit", "--out", f"m{share}", f"model.path={small}", f"bank.memory={share * dense / 1000:.1f}KB", "bank.m=2", "fit.steps=1",
                     "sparsity.support=2", "fit.metric=weights", capsys=capsys)
        assert set(got["rel_frob"]) == families
        numbers = sum(t.numel() for t in load_file(small / "model.safetensors").values())
        assert 0.9 * share * dense < got["model_ratio"] * numbers * 4 <= share * dense
    for bad, said in (("1KB", "between"), ("18GiB", "between"), ("lots", "18GiB")):
        assert said in refused("fit", f"model.path={small}", f"bank.memory={bad}", capsys=capsys)


def test_a_sweep_fits_every_combination_once_and_ends_in_one_table(small, capsys, monkeypatch):
    quick = [f"model.path={small}", *QUICK[1:2], "fit.steps=2", "fit.metric=weights"]
    got = answer("fit", "--out", "s", *quick, "bank.m=2,3", "sparsity.support=1,2", capsys=capsys)
    assert [(r["bank.m"], r["sparsity.support"]) for r in got["rows"]] == [("2", "1"), ("2", "2"), ("3", "1"), ("3", "2")]
    assert sorted(p.name for p in Path("s").iterdir()) == [f"m={m}-support={s}" for m in (2, 3) for s in (1, 2)]
    shutil.rmtree("s/m=3-support=2")
    fits = []
    monkeypatch.setattr(globe, "cmd_fit", lambda args, real=globe.cmd_fit: fits.append(args.out) or real(args))
    Path("grid.yaml").write_text("sweep: {bank.m: [2, 3], sparsity.support: [1, 2]}\n")
    again = answer("fit", "--out", "s", *quick, "bank.m=2,3", "sparsity.support=1,2", capsys=capsys)
    assert fits == ["s/m=3-support=2"] and [r["rel_frob"] for r in again["rows"]] == [r["rel_frob"] for r in got["rows"]]
    assert "other settings" in refused("fit", "--out", "s", *quick[:-2], "fit.steps=3", "fit.metric=weights", "bank.m=2,3", "sparsity.support=1,2", capsys=capsys)
    assert "bank.mm" in refused("fit", "--out", "t", *quick, "bank.mm=2,3", capsys=capsys) and not Path("t").exists()
    from_yaml = answer("fit", "--out", "y", "--config", "grid.yaml", *quick, capsys=capsys)
    assert [r["rel_frob"] for r in from_yaml["rows"]] == [r["rel_frob"] for r in got["rows"]]


def test_the_report_shows_routing_cache_and_quality_against_size(run, words, capsys):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        shutil.copytree(run, name)
        answer("eval", "--factors", name, "--text", words, *SPEED, capsys=capsys)
    got = answer("report", "--factors", "a", "--runs", "b", capsys=capsys)
    text = Path(got["report"]).read_text()
    assert "Routing and cache" in text and "Quality against size" in text and "words.txt" in text and "| b " in text
    assert Path("a/routing.png").read_bytes().startswith(b"\x89PNG")
    model, ids = globe.load(exported(run)), torch.arange(40)[None]
    shares, hits = globe.routing(model, ids)
    assert all(float(x.sum()) == pytest.approx(1) and (x[1:] <= x[:-1]).all() for x in shares.values()) and set(hits) == set(shares)
    assert sum(m.cache.hits + m.cache.misses for m in globe.globe_modules(model)) == 40 * 2 * len(hits)


@slow
def test_loading_peaks_far_below_the_dense_size(tmp_path):
    """400 MB of dense experts, 50 MB of factors: the load may take the factors twice (the file's pages and the copy)."""
    sizes = dict(vocab_size=258, hidden_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, num_experts=16,
                 num_experts_per_tok=2, moe_intermediate_size=1024, intermediate_size=64, head_dim=8)
    dense = 4 * 16 * 3 * 512 * 1024 * 4
    D = globe.dims_of(sizes | {"model_type": "qwen3_moe"})
    empty = types.SimpleNamespace(dims=D, config={"model_type": "qwen3_moe"}, fingerprint=lambda: "none")
    factors = random_factors(empty, "all", m=4, r=64)
    model = globe._skeleton(sizes | {"model_type": "qwen3_moe"}, torch.float32, Path(), factors.meta())
    globe._assign_factors(model, factors, torch.device("cpu"), torch.float32)
    for name, t in list(model.state_dict().items()):
        if t.is_meta:
            globe._assign(model, name, torch.zeros(t.shape))
    model.save_pretrained("big")
    stored = globe.weight_bytes(Path("big"))
    code = """
import resource, globe
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
from transformers import Qwen3MoeForCausalLM
before = peak()
model = AutoModelForCausalLM.from_pretrained("big")
print(json.dumps([before, peak(), len(globe.globe_modules(model))]))
"""
    got = python(code, path=HERE)
    assert got.returncode == 0, got.stderr[-3000:]
    before, after, modules = json.loads(got.stdout)
    assert modules == 4 and stored < 0.2 * dense and after - before < 2.2 * stored + 2 ** 25 < 0.5 * dense
    if Path("/proc/self/status").is_file():  # in the stored dtype, load() takes the file's pages as they are
        code = """
import globe, torch
own = lambda: next(int(s.split()[1]) * 1024 for s in open("/proc/self/status") if s.startswith("RssAnon"))
from transformers import Qwen3MoeForCausalLM
before = own()
model = globe.load("big")
print(own() - before)
"""
        got = in_process(code)
        assert got.returncode == 0 and int(got.stdout) < 0.2 * stored, (got.stdout, stored, got.stderr[-2000:])


# ======================================================================================================
# Hard to break: one row a claim; every wrong input gets one clear line, exit code 2, and nothing is written or changed
# ======================================================================================================
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 99)}]\n" for a, b in zip("abcdefg", "bcdefgh")) + "bank: {m: *h}\n"


def snapshot(root: Path) -> dict:
    """{path: hash} of every file, and None of every directory, below root; the shared cache of kernels apart."""
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else None
            for p in sorted(root.rglob("*")) if "cache" not in p.relative_to(root).parts}


def test_factors_without_the_config_of_their_fit_are_read(run):
    shutil.copytree(run, "r")  # found by atheris: KeyError
    edit_meta(lambda m: m.pop("config") and None)(Path("r/factors.safetensors"))
    assert globe.load_factors("r").config == {}


def refused_whole(*argv, capsys, late: bool = False) -> str:
    """The one line of a refusal (late: after lines that say how far it came) that leaves every file below here as it was."""
    before = snapshot(Path())
    capsys.readouterr()
    assert globe.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    lines = err.replace("\r", "\n").strip().splitlines()
    assert lines[-1].isprintable(), lines[-1]  # nothing that a stranger's file could do to a terminal
    assert out == "" and "Traceback" not in err and lines[-1].startswith(f"globe.py {argv[0]}: ") and (late or len(lines) == 1), err
    assert len(lines[-1]) < 2000 and snapshot(Path()) == before
    return lines[-1]


def edit_config(**changes):
    def damage(src: Path) -> None:
        config = json.loads((src / "config.json").read_text()) | changes
        (src / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return damage


def write(name: str, content: bytes | str):
    return lambda src: (src / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(keep: float):
    """Keep so many bytes of the weights; a fraction of them where below 1; from the end where negative."""
    def damage(src: Path) -> None:
        raw = (src / "model.safetensors").read_bytes()
        write("model.safetensors", raw[:int(keep * len(raw)) if 0 < keep < 1 else int(keep)])(src)
    return damage


def edit_header(change):
    """Rewrite the safetensors header by change(dict), or put bytes in its place."""
    def damage(src: Path) -> None:
        raw = (src / "model.safetensors").read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = change if isinstance(change, bytes) else None
        if header is None:
            table = json.loads(raw[8:end])
            change(table)
            header = json.dumps(table).encode()
        write("model.safetensors", len(header).to_bytes(8, "little") + header + raw[end:])(src)
    return damage


def edit_tensors(change):
    def damage(src: Path) -> None:
        tensors = {k: v.clone() for k, v in load_file(src / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, src / "model.safetensors")
    return damage


def put(name: str, value: float, count: int):
    return edit_tensors(lambda t: t[name].view(-1)[:count].fill_(value))


def index(change=None, **more):
    """Split the weights in two shards with an index, whose weight_map change(dict) then edits."""
    def damage(src: Path) -> None:
        tensors = load_file(src / "model.safetensors")
        table = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(sorted(tensors))}
        for shard in set(table.values()):
            save_file({n: tensors[n].clone() for n in table if table[n] == shard}, src / shard)
        (src / "model.safetensors").unlink()
        if change:
            change(table)
        (src / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table} | more))
    return damage


def link_out(src: Path) -> None:
    shutil.move(src / "model.safetensors", src.parent / "elsewhere.safetensors")
    (src / "model.safetensors").symlink_to("../elsewhere.safetensors")


def twice(src: Path) -> None:
    save_file({EXPERT: load_file(src / "model.safetensors")[EXPERT].clone()}, src / "more.safetensors")


def repeated(src: Path) -> None:
    text = (src / "config.json").read_text()
    (src / "config.json").write_text(text.replace("{", '{"num_experts": 5,', 1))


def overlap(t: dict) -> None:
    t[EXPERT]["data_offsets"] = t[EXPERT.replace("up", "gate")]["data_offsets"]


def quantized(**q):
    return edit_config(quantization_config=q), (q.get("quant_method", "quantized"), "quantized", "plain float weights")


def dropped(*names: str):
    return lambda src: [(src / n).unlink() for n in names]


FIT = ("model.path=src", "bank.m=3", "bank.r=6", "sparsity.support=2", "fit.steps=2", "fit.metric=weights")
WEIGHTS = "model.safetensors"
CHECKPOINT_ROWS = {  # name: (damage to the copy `src` of a good checkpoint, words of the line)
    "weights empty": (write(WEIGHTS, b""), (WEIGHTS, "safetensors")),
    "weights cut after 7 bytes": (cut(7), (WEIGHTS,)),
    "weights cut after 8 bytes": (cut(8), (WEIGHTS,)),
    "weights cut in the header": (cut(200), (WEIGHTS,)),
    "weights cut in the middle": (cut(0.5), (WEIGHTS,)),
    "weights cut by one byte": (cut(-1), (WEIGHTS,)),
    "weights with bytes too many": (lambda src: write(WEIGHTS, (src / WEIGHTS).read_bytes() + b"more")(src), (WEIGHTS,)),
    "header length 2^64 - 1": (write(WEIGHTS, b"\xff" * 8 + b"{}"), (WEIGHTS,)),
    "header length 2^40": (write(WEIGHTS, (2 ** 40).to_bytes(8, "little") + b"{}" * 50), (WEIGHTS,)),
    "header not JSON": (edit_header(b"not json"), (WEIGHTS,)),
    "header a JSON list": (edit_header(b"[1, 2]"), (WEIGHTS,)),
    "header nested 100,000 deep": (edit_header(b"[" * 100000), (WEIGHTS,)),
    "header not UTF-8": (edit_header(b'{"\xff\xfe": 1}'), (WEIGHTS,)),
    "offsets overlap": (edit_header(overlap), (WEIGHTS,)),
    "offsets past the end": (edit_header(lambda t: t[EXPERT].update(data_offsets=[0, 2 ** 50])), (WEIGHTS,)),
    "offsets negative": (edit_header(lambda t: t[EXPERT].update(data_offsets=[-8, 0])), (WEIGHTS,)),
    "shape of 2^60 numbers": (edit_header(lambda t: t[EXPERT].update(shape=[2 ** 30, 2 ** 30])), (WEIGHTS,)),
    "an expert of int8": (edit_tensors(lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)})), (EXPERT, "float32", "I8", WEIGHTS)),
    "an expert of int32": (edit_tensors(lambda t: t.update({EXPERT: t[EXPERT].int()})), (EXPERT, "float32", "I32")),
    "an expert of float8": (edit_tensors(lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)})), (EXPERT, "F8_E4M3")),
    "7 NaN in an expert": (put(EXPERT, math.nan, 7), (EXPERT, "finite", "7", WEIGHTS)),
    "1 Inf in an expert": (put(EXPERT, math.inf, 1), (EXPERT, "finite", "1 ", WEIGHTS)),
    "a missing expert": (edit_tensors(lambda t: t.pop(EXPERT)), (EXPERT, "(16, 32)", "none")),
    "an expert of zero rows": (edit_tensors(lambda t: t.update({EXPERT: torch.zeros(0, 32)})), (EXPERT, "(16, 32)", "(0, 32)")),
    "an expert that is flat": (edit_tensors(lambda t: t.update({EXPERT: torch.zeros(512)})), (EXPERT, "(16, 32)", "(512,)")),
    "an expert twice": (twice, (EXPERT, "both", "more.safetensors")),
    "index names a missing shard": (index(lambda t: t.update({EXPERT: "model-9.safetensors"})), ("index.json", "model-9.safetensors")),
    "index names the wrong shard": (index(lambda t: t.update({EXPERT: {"model-0.safetensors": "model-1.safetensors"}.get(
        t[EXPERT], "model-0.safetensors")})), (EXPERT, "by the index")),
    "index names ../x": (index(lambda t: t.update({EXPERT: "../elsewhere.safetensors"})), ("../elsewhere", "directory")),
    "index names ..": (index(lambda t: t.update({EXPERT: ".."})), ("..", "index.json")),
    "index names an absolute path": (index(lambda t: t.update({EXPERT: "/etc/passwd"})), ("/etc/passwd", "directory")),
    "index names a NUL byte": (index(lambda t: t.update({EXPERT: "a\0b"})), ("index.json", "file name")),
    "index names a number": (index(lambda t: t.update({EXPERT: 5})), ("index.json", "5")),
    "index names a list": (index(lambda t: t.update({EXPERT: ["a"]})), ("index.json", "'a'")),
    "index names config.json": (index(lambda t: t.update({EXPERT: "config.json"})), ("config.json", "safetensors")),
    "index without weight_map": (index(None, weight_map=None), ("index.json", "weight_map")),
    "index with an empty weight_map": (index(None, weight_map={}), ("index.json", "weight_map")),
    "index not JSON": (write("model.safetensors.index.json", "{"), ("index.json", "JSON")),
    "a shard linked to outside": (link_out, (WEIGHTS, "elsewhere.safetensors", "outside")),
    "a shard that links to nothing": (lambda src: (src / "x.safetensors").symlink_to("nowhere"), ("x.safetensors",)),
    "a shard that is a directory": (lambda src: (src / "x.safetensors").mkdir(), ("x.safetensors",)),
    "an LFS pointer": (write(WEIGHTS, LFS), (WEIGHTS, "git lfs pull")),
    "an LFS pointer for config.json": (write("config.json", LFS), ("config.json", "git lfs pull")),
    "an LFS pointer for the index": (write("model.safetensors.index.json", LFS), ("index.json", "git lfs pull")),
    "pickles alone": (lambda src: (src / WEIGHTS).rename(src / "pytorch_model.bin"), ("pytorch_model.bin", "pickle")),
    "no weights": (dropped(WEIGHTS), ("*.safetensors", "none")),
    "no config.json": (dropped("config.json"), ("config.json", "none")),
    "config.json empty": (write("config.json", ""), ("config.json", "JSON")),
    "config.json binary": (write("config.json", bytes(range(128, 256))), ("config.json", "JSON")),
    "config.json nested 100,000 deep": (write("config.json", "[" * 100000), ("config.json", "JSON")),
    "config.json with a number of 10,000 digits": (write("config.json", '{"a": ' + "9" * 10000 + "}"), ("config.json", "JSON")),
    "config.json a list": (write("config.json", "[1]"), ("config.json", "object", "list")),
    "config.json says num_experts twice": (repeated, ("config.json", "num_experts", "twice")),
    "model_type a list": (edit_config(model_type=["qwen2_moe"]), ("config.json", "model_type", "qwen2_moe")),
    "model_type missing": (edit_config(model_type=...), ("config.json", "model_type", "None")),
    "config of more experts": (edit_config(num_experts=5), ("experts.4.", "(16, 32)", "none")),
    "config of fewer experts": (edit_config(num_experts=3), ("experts.3.", "not expected")),
    "config of another width": (edit_config(moe_intermediate_size=8), ("(8, 32)", "(16, 32)")),
    "config of another hidden size": (edit_config(hidden_size=64), ("(16, 64)", "(16, 32)")),
    "config of 10^9 experts": (edit_config(num_experts=10 ** 9), ("config.json", "num_experts", "1000000000")),
    "config of 10^12 layers": (edit_config(num_hidden_layers=10 ** 12), ("config.json", "num_hidden_layers", "1000000000000")),
    "config of 0 layers": (edit_config(num_hidden_layers=0), ("config.json", "num_hidden_layers", "0")),
    "config of -1 experts": (edit_config(num_experts=-1), ("config.json", "num_experts", "-1")),
    "config of true experts": (edit_config(num_experts=True), ("config.json", "num_experts", "True")),
    "config of no layer with experts": (edit_config(mlp_only_layers=[0, 1]), ("config.json", "experts", "none")),
    "mlp_only_layers a number": (edit_config(mlp_only_layers=7), ("config.json", "layers")),
    "decoder_sparse_step text": (edit_config(decoder_sparse_step="x"), ("config.json", "layers")),
    "shared size text": (edit_config(shared_expert_intermediate_size="wide"), ("config.json", "shared")),
    "config of a million experts": (edit_config(num_experts=10 ** 6), ("experts.4.", "none", "more")),  # found by atheris: 15 s, 0.9 GiB
    "config of a million dense layers": (edit_config(num_hidden_layers=10 ** 6, mlp_only_layers=list(range(2, 10 ** 6))), ("num_hidden_layers", "1000000")),
    "a tensor's name that clears the screen": (edit_header(lambda t: t.update({"model.layers.1.experts.\x1b[2J\nx": t[EXPERT]})), ("safetensors",)),
    "index names a shard of 600 letters": (index(lambda t: t.update({EXPERT: "é" * 600})), ("index.json", "not in")),  # found by atheris: OSError
    "first_k_dense_replace of -10^30": (edit_config(model_type="deepseek_v3", n_routed_experts=4, first_k_dense_replace=-10 ** 30),
                                        ("config.json", "first_k_dense_replace")),  # found by atheris: OverflowError
    "half a shared expert": (edit_config(model_type="deepseek_v3", n_routed_experts=4, n_shared_experts=1.0), ("config.json", "shared")),
    "top-k missing": (edit_config(num_experts_per_tok=...), ("config.json", "num_experts_per_tok", "None")),
    "top-k above the experts": (edit_config(num_experts_per_tok=9), ("config.json", "num_experts_per_tok", "9", "4")),
    "quantized by gptq": quantized(quant_method="gptq", bits=4),
    "quantized by awq": quantized(quant_method="awq", bits=4),
    "quantized by fp8": quantized(quant_method="fp8"),
    "quantized by bitsandbytes": quantized(quant_method="bitsandbytes", load_in_4bit=True),
    "quantized by a list": (edit_config(quantization_config=["x"]), ("config.json", "quantized")),
    "packed tensors without a word in config.json": (edit_tensors(lambda t: t.update(
        {EXPERT.replace("weight", "qweight"): t.pop(EXPERT).int()})), (EXPERT, "none")),
}


@pytest.mark.parametrize("row", CHECKPOINT_ROWS)
def test_a_checkpoint_is_refused_whole_for(row, small, capsys):
    damage, said = CHECKPOINT_ROWS[row]
    shutil.copytree(small, "src")
    damage(Path("src"))
    line = refused_whole("fit", "--out", "out", *FIT, capsys=capsys, late=row.endswith("in an expert"))
    assert all(w in line for w in said), line


def test_the_undamaged_checkpoint_of_these_rows_is_fitted(small, capsys):
    shutil.copytree(small, "src")
    index()(Path("src"))
    answer("fit", "--out", "out", *FIT, capsys=capsys)  # else the rows above could be refused for another reason
    assert Path("out/factors.safetensors").is_file()


def test_the_hubs_own_links_into_its_blobs_are_followed(small, capsys):
    snap, blobs = Path("hub/snapshots/abc"), Path("hub/blobs")
    shutil.copytree(small, snap)
    blobs.mkdir()
    for f in list(snap.iterdir()):
        shutil.move(f, blobs / f"{f.name}-hash")
        f.symlink_to(Path("../../blobs") / f"{f.name}-hash")
    answer("fit", "--out", "out", f"model.path={snap}", *FIT[1:], capsys=capsys)


YAML_ROWS = {  # name: (text of the file, words of the line)
    "tabs": ("bank:\n\tm: 3\n", ("c.yaml", "YAML", r"'\t'", "line 2")), "not closed": ("bank: {m: 3", ("c.yaml", "YAML")),
    "an anchor bomb": (BOMB, ("c.yaml", "anchor")), "nested 100,000 deep": ("[" * 100000, ("c.yaml", "YAML")),
    "a date that is none": ("model: {path: 2024-99-99}", ("c.yaml", "YAML")), "a Python object": (
        "bank: !!python/object/apply:os.system ['true']", ("c.yaml", "YAML")), "a broken tag": ("fit: {steps: !!int x}", ("c.yaml", "YAML")),
    "a key of a mapping": ("? {a: b}\n: 3\n", ("c.yaml", "YAML")), "a list": ("- 1\n", ("c.yaml", "mapping")), "a word": ("hello", ("c.yaml", "mapping")),
    "a number as key": ("5: 3", ("c.yaml", "unknown key 5")), "an unknown key": ("bank: {rnak: 3}", ("bank.rnak", "did you mean bank.r")),
    "an unknown section": ("bnak: {m: 3}", ("bnak", "did you mean bank")), "two documents": ("a: 1\n---\nb: 2\n", ("c.yaml", "YAML")),
    "not UTF-8": (b"bank: {m: \xff}", ("c.yaml", "not a text file")), "a NUL byte": (b"bank: {m: \0}", ("c.yaml", "YAML")),
    "a key twice": ("bank: {m: 3}\nbank: {r: 4}\n", ("c.yaml", "bank", "twice")),
    "a value of 9,000 letters": (f"fit: {{metric: {'9x' * 4500}}}", ("fit.metric", "data, weights")), "a sweep of numbers": ("sweep: {bank.m: 3}", ("sweep", "list")), "a sweep of nothing": ("sweep: {bank.m: []}", ("sweep", "list")),
    "a sweep of an unknown key": ("sweep: {bank.mm: [1, 2]}", ("bank.mm",)),
}


@pytest.mark.parametrize("row", YAML_ROWS)
def test_a_config_file_is_refused_for(row, small, capsys):
    text, said = YAML_ROWS[row]
    Path("c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused_whole("fit", "--out", "out", "--config", "c.yaml", f"model.path={small}", capsys=capsys)
    assert all(w in line for w in said), line


VALUE_ROWS = {  # override: words of the line
    "bank.m=-3": ("bank.m", "above 0", "-3"), "bank.m=1000000000": ("bank.m", "at most", "1000000000"), "bank.m={gate: -1}": ("bank.m", "above 0"),
    "bank.m={gate: 1.5}": ("bank.m", "whole number"), "bank.m={}": ("bank.m", "gate"), "bank.m={3: 3}": ("bank.m", "gate"),
    "bank.m={gate: true}": ("bank.m", "whole number"), "bank.m=[3]": ("bank.m", "int"), "bank.m=true": ("bank.m", "int"),
    "bank.r=1000000": ("bank.r", "at most", "1000000"), "bank.r=0": ("bank.r", "above 0"), "bank.r=1e9": ("bank.r", "at most"),
    "bank.ratio=-1": ("bank.ratio", "above 0"), "bank.memory=9kg": ("bank.memory", "18GiB"), "bank.scope=0": ("bank.scope", "0"),
    "bank.scope=²": ("bank.scope", "²"), "bank.scope=-2": ("bank.scope", "-2"), "fit.steps=-1": ("fit.steps", "above 0"), "fit.steps=1e3": ("fit.steps", "int"),
    "fit.seed=-1": ("fit.seed", "0 or more"), "fit.seed=99999999999999999999999": ("fit.seed", "at most"), "fit.lr=" + "9" * 400: ("fit.lr", "float"),
    "fit.lr=.inf": ("fit.lr", "float"), "fit.dtype=int8": ("fit.dtype", "int8"), "fit.device=gpu": ("device", "gpu"),
    "fit.adam=3": ("fit.adam", "mapping"), "model.single_layer=2": ("single_layer", "2"), "model.max_experts=0": ("max_experts", "above 0"),
    "model.path=": ("model.path",), "calib.tokens=0": ("calib.tokens", "above 0"), "cache.budget=-1": ("cache.budget", "above 0"),
    "sparsity.support=0": ("sparsity.support", "above 0"), "x.y.z=1": ("unknown key x", "did you mean"), "=1": ("unknown key",),
    "bank.=1": ("unknown key bank.",), "bank.m=[": ("bank.m=[", "YAML"), "fit.lr=*x": ("fit.lr=*x", "YAML"),
    "bank.m.x=3": ("bank.m", "gate"), "model.path=2024-99-99": ("model.path", "YAML"),
}


@pytest.mark.parametrize("row", VALUE_ROWS)
def test_a_value_is_refused_for(row, small, capsys):
    values = [v for v in (f"model.path={small}", *FIT[1:]) if v.partition("=")[0] != row.partition("=")[0]]
    line = refused_whole("fit", "--out", "out", *values, row, capsys=capsys)
    assert all(w in line for w in VALUE_ROWS[row]), line


TRAIN_ROWS = {
    "train.hidden_size=-8": ("train.hidden_size", "above 0"), "train.layers=0": ("train.layers", "above 0"), "train.heads=0": ("train.heads", "above 0"),
    "train.heads=5": ("train.hidden_size", "heads = 10", "32"), "train.kv_heads=3": ("train.heads", "kv_heads", "3"), "train.experts=0": ("train.experts", "above 0"),
    "train.top_k=9": ("train.top_k", "9", "4"), "train.batch=0": ("train.batch", "above 0"), "train.seq_len=1": ("train.seq_len", "2"),
    "train.lr=-1": ("train.lr", "above 0"), "train.autocast=int3": ("int3",), "train.dense_from=nowhere": ("nowhere",), "train.text=nowhere": ("nowhere",),
    "train.dense_steps=-1": ("train.dense_steps", "0 or more"), "train.seed=-1": ("train.seed", "0 or more"), "train.clip=-1": ("train.clip", "above 0"),
}


@pytest.mark.parametrize("row", TRAIN_ROWS)
def test_a_training_is_refused_for(row, words, capsys):
    line = refused_whole("train", "--to", "out", *TRAIN, f"train.text={words}", row, capsys=capsys)
    assert all(w in line for w in TRAIN_ROWS[row]), line


def no_tokenizer(src: Path) -> None:
    for f in src.glob("token*"):
        f.unlink()
    (src / "special_tokens_map.json").unlink(missing_ok=True)


def foreign_tokenizer(src: Path) -> None:
    """A tokenizer that asks to run its own code."""
    no_tokenizer(src)
    (src / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}))
    (src / "mine.py").write_text("open('ran', 'w').close()\nclass Mine: pass\n")


def moments(src: Path, change) -> None:
    """Saved moments of `src` in the file m, changed."""
    tensors = {f"{k}.{l}": torch.ones(s) for l in range(2) for k, s in globe.moment_shapes(Checkpoint(src).dims).items()}
    change(tensors)
    save_file(tensors, "m", metadata={"globe_moments": Checkpoint(src).fingerprint()})


CALIBRATION_ROWS = {
    "an empty text": (lambda src: Path("t.txt").write_text(""), ("t.txt", "none")),
    "a text of blanks": (lambda src: Path("t.txt").write_text(" \n\t"), ("t.txt", "none")),
    "a text of one token": (lambda src: Path("t.txt").write_text("a"), ("2 tokens", "found 1")),
    "a binary text": (lambda src: Path("t.txt").write_bytes(bytes(range(256))), ("t.txt", "UTF-8")),
    "no text": (lambda src: None, ("t.txt", "No such file")),
    "an empty directory": (lambda src: Path("t.txt").mkdir(), ("t.txt", "none")),
    "a name with a NUL byte": (lambda src: Path("c.yaml").write_text('calib: {text: "a\\0b"}'), ("a\\x00b", "text")),
    "no tokenizer": (lambda src: [no_tokenizer(src), Path("t.txt").write_text("some words")], ("src", "tokenizer")),
    "a tokenizer.json of garbage": (lambda src: [write("tokenizer.json", "{]")(src), Path("t.txt").write_text("some words")], ("src", "tokenizer")),
    "a tokenizer with code of its own": (lambda src: [foreign_tokenizer(src), Path("t.txt").write_text("some words")], ("src", "tokenizer")),
    "tokens outside the vocabulary": (lambda src: [edit_tensors(lambda t: t.update({n: t[n][:50].clone() for n in list(t) if n.endswith(
        ("embed_tokens.weight", "lm_head.weight"))}))(src), edit_config(vocab_size=50)(src), Path("t.txt").write_text("some words")], ("token", "50")),
    "an embedding of another size": (lambda src: [edit_config(vocab_size=512)(src), Path("t.txt").write_text("some words")],
                                     ("embed_tokens", "(512, 32)")),
    "no router": (lambda src: [edit_tensors(lambda t: t.pop("model.layers.1.mlp.gate.weight"))(src), Path("t.txt").write_text("some words")],
                  ("model.layers.1.mlp.gate.weight", "none")),
    "NaN in an expert": (lambda src: [put(EXPERT, math.nan, 3)(src), Path("t.txt").write_text("some words")], (EXPERT, "finite", "3")),
    "NaN in the attention": (lambda src: [put("model.layers.1.self_attn.q_proj.weight", math.nan, 3)(src), Path("t.txt").write_text("some words")],
                             ("model.layers.1.self_attn.q_proj.weight", "finite", "3")),
    "activations that overflow": (lambda src: [edit_tensors(lambda t: t["model.layers.1.mlp.experts.2.up_proj.weight"].fill_(3e38))(src),
                                               Path("t.txt").write_text("some words " * 20)], ("layer 1", "finite")),
    "logits that overflow": (lambda src: [edit_tensors(lambda t: t["lm_head.weight"].fill_(3e38))(src),
                                          Path("t.txt").write_text("some words " * 20)], ("logits", "finite")),
    "a shrinkage chosen on one window": (lambda src: [Path("t.txt").write_text("words"), Path("c.yaml").write_text("calib: {text: t.txt, shrink: auto}")],
                                         ("calib.shrink", "2 windows", "found 1")),
    "a calib.load of words": (lambda src: [Path("t.txt").write_text("some words"), Path("m").write_text("nonsense")], ("calib.load", "m")),
    "a calib.load without a layer": (lambda src: moments(src, lambda t: t.pop("inputs.1")), ("calib.load", "inputs.1", "(32, 32)", "none")),
    "a calib.load of another size": (lambda src: moments(src, lambda t: t.update({"gate.0": torch.ones(4, 3)})), ("calib.load", "gate.0", "(4, 16)", "(4, 3)")),
    "a calib.load with NaN": (lambda src: moments(src, lambda t: t["hidden.0"].fill_(math.nan)), ("calib.load", "hidden.0", "finite")),
}


@pytest.mark.parametrize("row", CALIBRATION_ROWS)
def test_a_calibration_is_refused_for(row, small, capsys):
    damage, said = CALIBRATION_ROWS[row]
    shutil.copytree(small, "src")
    damage(Path("src"))
    more = ["calib.load=m"] if Path("m").is_file() else ["--config", "c.yaml"] if Path("c.yaml").is_file() else ["calib.text=t.txt"]
    line = refused_whole("fit", "--out", "out", *FIT[:-1], "calib.tokens=64", "calib.length=8", *more, capsys=capsys, late=True)
    assert all(w in line for w in said), line


def edit_meta(change):
    """Change the description of the run's factors."""
    def damage(f: Path) -> None:
        with safe_open(f, "pt") as g:
            meta = json.loads(g.metadata()["globe"])
        meta = change(meta) or meta
        save_file({k: v.clone() for k, v in load_file(f).items()}, f, metadata={"globe": meta if isinstance(meta, str) else json.dumps(meta)})
    return damage


def edit_factors(change):
    def damage(f: Path) -> None:
        with safe_open(f, "pt") as g:
            meta = g.metadata()
        tensors = {k: v.clone() for k, v in load_file(f).items()}
        change(tensors)
        save_file(tensors, f, metadata=meta)
    return damage


def of_family(**changes):
    return edit_meta(lambda meta: meta["families"]["gate"].update(changes))


IDX, VAL, A_ = "layers.1.gate.idx", "layers.1.gate.val", "layers.1.gate.A"
FACTORS_ROWS = {
    "a config that is a list": (edit_meta(lambda m: m.update(config=[1])), ("description",)),
    "another version": (edit_meta(lambda m: m.update(format_version=99)), ("version 1", "99")),
    "no version": (edit_meta(lambda m: m.pop("format_version") and None), ("version 1", "None")),
    "another model": (edit_meta(lambda m: m.update(fingerprint="0" * 16)), ("fingerprint", "0" * 16)),
    "a description that is a list": (edit_meta(lambda m: [m]), ("factors.safetensors", "description")),
    "a description that is not JSON": (edit_meta(lambda m: "{"), ("factors.safetensors",)),
    "a description nested 100,000 deep": (edit_meta(lambda m: "[" * 100000), ("factors.safetensors",)),
    "no families": (edit_meta(lambda m: m.update(families={})), ("description",)), "a family of another name": (
        edit_meta(lambda m: m["families"].update(left=m["families"].pop("gate"))), ("description",)),
    "a size that is a list": (edit_meta(lambda m: (m["dims"].update(d=[1]), m["families"]["gate"].update(r=2 ** 31))), ("description",)),
    "no experts": (edit_meta(lambda m: m.update(experts={})), ("description",)), "a layer without experts": (
        edit_meta(lambda m: m["experts"].update({"1": []})), ("description",)),
    "an expert out of range": (edit_meta(lambda m: m["experts"]["1"].__setitem__(0, 99)), ("description",)),
    "an expert twice": (edit_meta(lambda m: m["experts"]["1"].__setitem__(0, 1)), ("description",)),
    "a layer that is a word": (edit_meta(lambda m: (m["experts"].update(x=m["experts"].pop("1")), m["families"]["gate"]["group"].update(x=0),
                                                    m["families"]["up"]["group"].update(x=0)) and None), ("description",)),
    "dims missing": (edit_meta(lambda m: m.pop("dims") and None), ("description",)), "dims of words": (
        edit_meta(lambda m: m["dims"].update(p="wide")), ("description",)), "dims negative": (edit_meta(lambda m: m["dims"].update(d=-32)), ("description",)),
    "m of 10^12": (edit_meta(lambda m: [f.update(m=10 ** 12) for f in m["families"].values()] and None), ("bank.gate.0", "1000000000000")),
    "m of 10^30": (edit_meta(lambda m: [f.update(m=10 ** 30) for f in m["families"].values()] and None), ("description",)),
    "10^12 groups": (edit_meta(lambda m: [f.update(groups=10 ** 12) for f in m["families"].values()] and None), ("description",)),
    "a group of a layer that is a word": (edit_meta(lambda m: [f["group"].update(x=0) for f in m["families"].values()] and None), ("description",)),
    "a layer twice, as 1 and 01": (edit_meta(lambda m: (m["experts"].update({"01": [0]}), [f["group"].update({"01": 0}) for f in m["families"].values()])
                                             and None), ("description",)),
    "a scale of 2^64": (of_family(scale=2 ** 64), ("description",)),  # found by atheris: OverflowError
    "a scale of 10^400": (edit_meta(lambda m: '{"format_version": 1, ' + json.dumps(m)[1:].replace('"scale": ', '"scale": 1' + "0" * 400 + ', "was": ')),
                          ("description",)),
    "a group of half": (edit_meta(lambda m: [f["group"].update({"1": 0.5}) for f in m["families"].values()] and None), ("description",)),
    "an activation of another name": (of_family(activation="relu"), ("description",)), "a scale of NaN": (of_family(scale=math.nan), ("description",)),
    "a bank of nobody": (of_family(bank="down"), ("description",)), "a missing tensor": (edit_factors(lambda t: t.pop(IDX)), (IDX, "none")),
    "a tensor too many": (edit_factors(lambda t: t.update(more=torch.zeros(1))), ("more", "not expected")),
    "a wrong shape": (edit_factors(lambda t: t.update({A_: t[A_][:, :-1].clone()})), (A_, "(4, 16, 6)", "(4, 15, 6)")),
    "an index past the bank": (edit_factors(lambda t: t[IDX].fill_(3)), (IDX, "[0, 3)", "3..3")),
    "an index below 0": (edit_factors(lambda t: t[IDX].fill_(-1)), (IDX, "[0, 3)", "-1")),
    "indices of float": (edit_factors(lambda t: t.update({IDX: t[IDX].float()})), (IDX, "int32", "float32")),
    "adapters of int8": (edit_factors(lambda t: t.update({A_: t[A_].to(torch.int8)})), (A_, "float", "int8")),
    "mixtures of NaN": (edit_factors(lambda t: t[VAL].fill_(math.nan)), (VAL, "finite")),
    "a cut file": (lambda f: f.write_bytes(f.read_bytes()[:-9]), ("factors.safetensors",)),
    "an empty file": (lambda f: f.write_bytes(b""), ("factors.safetensors",)),
    "an LFS pointer": (lambda f: f.write_text(LFS), ("factors.safetensors", "git lfs pull")),
    "no file": (lambda f: f.unlink(), ("factors.safetensors", "none")),
    "a config.yaml with tabs": (lambda f: (f.parent / "config.yaml").write_text("a:\n\tb"), ("config.yaml", "YAML")),
    "a config.yaml of a bomb": (lambda f: (f.parent / "config.yaml").write_text(BOMB), ("config.yaml", "anchor")),
    "a config.yaml that is a list": (lambda f: (f.parent / "config.yaml").write_text("[1]"), ("config.yaml", "mapping")),
}


@pytest.mark.parametrize("row", FACTORS_ROWS)
def test_factors_are_refused_for(row, run, capsys):
    damage, said = FACTORS_ROWS[row]
    shutil.copytree(run, "r")
    damage(Path("r/factors.safetensors"))
    line = refused_whole("export", "--factors", "r", "--to", "out", "--no-check", capsys=capsys)
    assert all(w in line for w in said), line


def edit_export(change):
    """Change the description in an export's config.json, given as change(meta)."""
    def damage(src: Path) -> None:
        config = json.loads((src / "config.json").read_text())
        change(config["quantization_config"])
        (src / "config.json").write_text(json.dumps(config))
    return damage


OF = "model.layers.1.mlp.experts."
EXPORT_ROWS = {  # name: (damage to the copy `src` of a globe export, words of load's line)
    "weights cut": (cut(0.5), (WEIGHTS,)), "weights empty": (write(WEIGHTS, b""), (WEIGHTS,)), "header not JSON": (edit_header(b"not json"), (WEIGHTS,)),
    "header length 2^64 - 1": (write(WEIGHTS, b"\xff" * 8 + b"{}"), (WEIGHTS,)), "offsets past the end": (
        edit_header(lambda t: t[OF + "up_A"].update(data_offsets=[0, 2 ** 50])), (WEIGHTS,)),
    "an LFS pointer": (write(WEIGHTS, LFS), (WEIGHTS, "git lfs pull")), "no weights": (dropped(WEIGHTS), ("safetensors",)),
    "a tensor missing": (edit_tensors(lambda t: t.pop(OF + "up_idx")), (OF + "up_idx", "none")),
    "the bank missing": (edit_tensors(lambda t: t.pop("globe_bank.gate_0")), ("globe_bank.gate_0", "none")),
    "a wrong shape": (edit_tensors(lambda t: t.update({OF + "up_A": t[OF + "up_A"][:, :3].clone()})), (OF + "up_A", "expected")),
    "an index past the bank": (edit_tensors(lambda t: t[OF + "up_idx"].fill_(5)), ("layer 1 up_idx", "[0, 5)", "5..5")),
    "an index below 0": (edit_tensors(lambda t: t[OF + "gate_idx"].fill_(-1)), ("layer 1 gate_idx", "-1")),
    "no config.json": (dropped("config.json"), ("config.json", "none")), "config.json not JSON": (write("config.json", "{"), ("config.json", "JSON")),
    "a description that is a list": (edit_config(quantization_config=["globe"]), ("src", "expected a globe export")),
    "another version": (edit_export(lambda q: q.update(format_version=99)), ("version 1", "99")),
    "no families": (edit_export(lambda q: q.pop("families")), ("config.json", "description")),
    "m of 10^30": (edit_export(lambda q: [f.update(m=10 ** 30) for f in q["families"].values()]), ("config.json", "description")),
    "m of 10^9": (edit_export(lambda q: [f.update(m=10 ** 9) for f in q["families"].values()]), ("globe_bank.gate_0", "1000000000")),
    "another width": (edit_export(lambda q: q["dims"].update(p=8)), ("experts, p, d", "8")), "another number of experts": (
        edit_export(lambda q: q["dims"].update(experts=5)), ("experts, p, d", "5")),
    "a layer that is not there": (edit_export(lambda q: (q["dims"]["layers"].append(7), q["experts"].update({"7": [0]}),
                                                         [f["group"].update({"7": 0}) for f in q["families"].values()])), ("layer 7", "none")),
    "another activation": (edit_export(lambda q: [f.update(activation="exec") for f in q["families"].values()]), ("description",)),
    "a model_type of words": (edit_config(model_type="evil"), ("evil",)), "another model_type": (edit_config(model_type="mixtral"), ("config.json",)),
    "a hidden size of words": (edit_config(hidden_size="wide"), ("config.json", "hidden_size")),
    "a vocabulary of 10^13": (edit_config(vocab_size=10 ** 13), ("config.json",)), "an activation unknown to transformers": (
        edit_config(hidden_act="exec"), ("config.json", "exec")),
}
ONLY_LOAD_ROWS = {  # transformers' own loader warns of the first and takes the others
    "a tensor too many": (edit_tensors(lambda t: t.update(more=torch.zeros(1))), ("more", "not expected")),
    "NaN in the bank": (put("globe_bank.gate_0", math.nan, 3), ("globe_bank.gate_0", "finite", "3")),
    "adapters of float8": (edit_tensors(lambda t: t.update({OF + "up_A": t[OF + "up_A"].to(torch.float8_e4m3fn)})), (OF + "up_A", "float8")),
    "a link that leads out": (link_out, (WEIGHTS, "elsewhere.safetensors", "outside")),
    "a million layers": (edit_config(num_hidden_layers=10 ** 6), ("1000000 layers",)),
}


@pytest.mark.parametrize("row", (*EXPORT_ROWS, *ONLY_LOAD_ROWS))
def test_a_globe_export_is_refused_for(row, exports, capsys):
    """load names it; info names it or shows the description; from_pretrained gives no model."""
    damage, said = (EXPORT_ROWS | ONLY_LOAD_ROWS)[row]
    shutil.copytree(exports["qwen2_moe"], "src")
    damage(Path("src"))
    before = snapshot(Path())
    with pytest.raises(UserError) as e:
        globe.load("src")
    assert all(w in str(e.value) for w in said) and str(e.value).isprintable(), str(e.value)
    code, (_, err) = globe.main(["info", "src"]), capsys.readouterr()
    assert code in (0, 2) and "Traceback" not in err and (code == 0 or err.count("\n") == 1)
    if row in EXPORT_ROWS:
        from transformers import AutoModelForCausalLM
        with pytest.raises(Exception):
            AutoModelForCausalLM.from_pretrained("src")
    assert snapshot(Path()) == before


def test_loading_an_export_runs_no_code_of_it_but_globe_py(exports):
    shutil.copytree(exports["qwen2_moe"], "src")
    for name in ("__init__.py", "helper.py", "modeling_qwen2_moe.py", "configuration_globe.py", "tokenization_globe.py", "custom_generate/generate.py"):
        Path("src", name).parent.mkdir(exist_ok=True)
        Path("src", name).write_text("open('ran', 'w').close()\n")
    for name in ("pytorch_model.bin", "training_args.bin"):
        Path("src", name).write_bytes(b"cbuiltins\nopen\n(S'ran'\nS'w'\ntR.")  # a pickle that opens a file
    code = """
seen = set()
sys.addaudithook(lambda event, args: seen.add(args[0].co_filename) if event == "exec" and hasattr(args[0], "co_filename") else None)
if sys.argv[2] == "load":
    import globe
    globe.load(sys.argv[1])(IDS)
else:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)(IDS)
near = (os.path.realpath("src"), os.environ["HF_MODULES_CACHE"])
print(json.dumps(sorted({os.path.basename(f) for f in seen if f.startswith(near)})))
"""
    for how, ran in (("load", []), ("remote code", ["globe.py"])):
        got = python(code, "src", how, path=HERE if how == "load" else None)
        assert got.returncode == 0, got.stderr[-3000:]
        assert [f for f in json.loads(got.stdout) if f != "__init__.py"] == ran and not Path("ran").exists()  # transformers makes empty packages
    copies = list(Path("modules").rglob("globe.py"))
    assert copies and all(c.read_bytes() == Path(globe.__file__).read_bytes() for c in copies)
    assert all(c.read_bytes() == b"" for c in Path("modules").rglob("__init__.py"))


def filled(name: str) -> None:
    Path(name).mkdir()
    Path(name, "mine.txt").write_text("kept")


def using(command: str, *more: str) -> tuple:
    return command, "--factors", "r", "--model", "src", "calib.text=words.txt", "--text=words.txt" if command == "eval" else "bank.m=3", *SPEED, *more


OUTPUT_ROWS = {  # name: (preparation, arguments, words); src is the source, r a finished run
    "fit into the source": (None, ("fit", "--out", "src", *FIT), ("src", "outside")),
    "fit below the source": (None, ("fit", "--out", "src/a/b", *FIT, "--overwrite"), ("src/a/b", "outside")),
    "fit below the source by a link": (lambda: Path("l").symlink_to("src"), ("fit", "--out", "l/a", *FIT, "--overwrite"), ("l/a", "outside")),
    "fit over a directory of the source": (lambda: (Path("d").mkdir(), shutil.move("src", "d/src")),
                                           ("fit", "--out", "d", "model.path=d/src", *FIT[1:], "--overwrite"), ("d", "d/src")),
    "fit over where it stands": (None, ("fit", "--out", ".", *FIT, "--overwrite"), (".",)),
    "fit onto a full directory": (lambda: filled("out"), ("fit", "--out", "out", *FIT), ("out", "exists", "--overwrite")),
    "fit onto a file": (lambda: Path("out").write_text("kept"), ("fit", "--out", "out", *FIT), ("out", "exists")),
    "fit below a file": (lambda: Path("f").write_text("kept"), ("fit", "--out", "f/out", *FIT), ("f",)),
    "fit where nothing can be made": (None, ("fit", "--out", "/proc/globe/out", *FIT), ("/proc/globe",)),
    "sweep over the source": (None, ("fit", "--out", "src", *FIT, "bank.m=2,3", "--overwrite"), ("src", "outside")),
    "sweep over where it stands": (None, ("fit", "--out", ".", *FIT, "bank.m=2,3", "--overwrite"), (".",)),
    "export into the source": (None, ("export", "--factors", "r", "--model", "src", "--to", "src", "--overwrite"), ("src", "outside")),
    "export below the source": (None, ("export", "--factors", "r", "--model", "src", "--to", "src/x"), ("src/x", "outside")),
    "export over its own run": (None, ("export", "--factors", "r", "--to", "r", "--overwrite", "--no-check"), ("r",)),
    "export over the directory of its run": (lambda: (Path("d").mkdir(), shutil.move("r", "d/r")),
                                             ("export", "--factors", "d/r", "--to", "d", "--overwrite", "--no-check"), ("d",)),
    "export onto a full directory": (lambda: filled("out"), ("export", "--factors", "r", "--to", "out"), ("out", "exists", "--overwrite")),
    "export below a file": (lambda: Path("f").write_text("kept"), ("export", "--factors", "r", "--to", "f/out", "--no-check"), ("f",)),
    "train onto a full directory": (lambda: filled("out"), ("train", "--to", "out", *TRAIN), ("out", "exists")),
    "fit resumed into the source": (None, ("fit", "--resume", "--out", "src", *FIT), ("src", "outside")),
    "fit resumed into a full directory": (lambda: filled("out"), ("fit", "--resume", "--out", "out", *FIT), ("out", "exists")),
    "moments over the source's weights": (None, ("fit", "--out", "out", *FIT, "calib.save=src/model.safetensors"), ("src/model.safetensors", "outside")),
    "moments over a file": (lambda: Path("f").write_text("kept"), ("fit", "--out", "out", *FIT, "calib.save=f"), ("f", "exists")),
    "heal over its own run": (None, using("heal", "--out", "r", "--overwrite"), ("r",)),
    "heal resumed over its own run": (None, using("heal", "--out", "r", "--resume"), ("r",)),
    "heal over the directory of its run": (lambda: (Path("d").mkdir(), shutil.move("r", "d/r")),
                                           ("heal", "--factors", "d/r", "--model", "src", "--out", "d", "--overwrite"), ("d",)),
    "heal resumed into the source": (None, using("heal", "--out", "src", "--resume"), ("src", "outside")),
    "heal onto a file": (None, using("heal", "--out", "words.txt"), ("words.txt", "exists")),
    "train resumed into a model": (None, ("train", "--resume", "--to", "src", *TRAIN), ("src", "exists")),
    "train over the dense model it starts from": (None, ("train", "--to", "src", "train.dense_from=src", *TRAIN, "--overwrite"), ("src", "outside")),
    "train over where it stands": (None, ("train", "--to", ".", *TRAIN, "--overwrite"), (".",)),
    "train over the directory it stands in": (None, ("train", "--to", "..", *TRAIN, "--overwrite"), ("..",)),
}


STATE, EVALS = "r/state/gate+up.safetensors", {"ppl_dense": 1, "ppl": 1, "delta_nats": 0, "tokens": 1, "ratio": 1, "model_ratio": 1}


def of_src(*damages):
    return lambda: [damage(Path("src")) for damage in damages]


def fewer_words(src: Path) -> None:
    """A vocabulary smaller than the tokenizer's."""
    edit_tensors(lambda t: t.update({n: t[n][:50].clone() for n in list(t) if n.endswith(("embed_tokens.weight", "lm_head.weight"))}))(src)
    edit_config(vocab_size=50)(src)


def state(change):
    """Change the saved state of the run r."""
    def damage() -> None:
        tensors = {k: v.clone() for k, v in load_file(STATE).items()}
        change(tensors)
        save_file(tensors, STATE)
    return damage


COMMAND_ROWS = {  # likewise
    **{f"{name}, {argv[0]}": (of_src(damage), argv, said) for name, damage, said in (
        ("no head", edit_tensors(lambda t: t.pop("lm_head.weight")), ("lm_head.weight", "none")),
        ("a norm of another size", edit_tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:7].clone()})), ()),
        ("NaN in a norm", put("model.norm.weight", math.nan, 5), ("model.norm.weight", "finite", "5")),
        ("0 attention heads", edit_config(num_attention_heads=0), ("src",)), ("an unknown activation", edit_config(hidden_act="nope"), ("src", "nope")),
        ("a vocabulary of 10^13", edit_config(vocab_size=10 ** 13), ("src",)),
    ) for argv in (using("eval"), using("export", "--to", "out"), using("generate", "--prompt", "ab"), using("report"))
       if (name, argv[0]) != ("NaN in a norm", "eval")},
    "a tokenizer of another model, eval": (of_src(fewer_words), using("eval"), ("token ids", "vocab_size 50")),
    "a tokenizer of another model, generate": (of_src(fewer_words), using("generate", "--prompt", "ab"), ("token ids", "vocab_size 50")),
    "a tokenizer of another model, heal": (of_src(fewer_words), using("heal", "--out", "out"), ("token ids", "vocab_size 50")),
    "NaN in a norm, heal": (of_src(put("model.layers.1.input_layernorm.weight", math.nan, 2)), using("heal", "--out", "out", "calib.length=32", "heal.tokens=256"),
                            ("input_layernorm", "finite")),
    "a tokenizer of another model, the prompt": (of_src(fewer_words), using("generate", "--prompt", "ab", "cache.warmup_tokens=0"), ("vocab_size 50", "98")),
    "no tokens to write": (None, using("generate", "--prompt", "ab", "--max-new-tokens", "0"), ("--max-new-tokens",)),
    "a temperature of NaN": (None, using("generate", "--prompt", "ab", "--temperature", "nan"), ("--temperature", "nan")),
    "a temperature of 10^-320": (None, using("generate", "--prompt", "ab", "--temperature", "1e-320"), ("--temperature",)),
    "a prompt of no text": (None, using("generate", "--prompt", ""), ("--prompt", "none")),
    "a prompt that is not UTF-8": (None, using("generate", "--prompt", "a\udcff"), ("--prompt", "UTF-8")),
    "float64": (None, using("eval", "--dtype", "float64"), ("--dtype", "float64")), "a window of one token": (
        None, using("eval", "eval.length=1"), ("eval.length", "2")),
    "an export as the model": (lambda: edit_config(quantization_config={"quant_method": "globe"})(Path("src")), using("eval"), ("quantized", "globe")),
    **{f"an eval.json of {name}, {argv[0]}": (functools.partial(Path("r/eval.json").write_text, text), argv, ("r/eval.json",)) for name, text in (
        ("a list", "[1]"), ("half a word", "{"), ("a number", '{"t": 3}'), ("words", json.dumps({"t": EVALS | {"ppl": "low"}})),
        ("odd tasks", json.dumps({"t": EVALS | {"tasks": [3]}}))) for argv in (using("eval"), using("export", "--to", "out"), using("report", "--runs", "r"))},
    **{f"a state {name}": (state(change), ("fit", "--resume", "--out", "r"), (STATE, "state")) for name, change in {
        "of nothing": lambda t: [t.pop(k) for k in list(t)[1:]], "without a step": lambda t: t.pop("step"), "of step -5": lambda t: t["step"].fill_(-5),
        "of many steps": lambda t: t.update(step=torch.zeros(3)), "with another bank": lambda t: t.update({"x.B": t["x.B"][:, :2].clone()}),
        "with NaN": lambda t: t["x.B"].fill_(math.nan), "with another mask": lambda t: t.update(mask=t["mask"][:1].clone())}.items()},
    "a state cut short": (lambda: Path(STATE).write_bytes(Path(STATE).read_bytes()[:50]), ("fit", "--resume", "--out", "r"), (STATE,)),
    "a state of another bank": (lambda: Path("r/config.yaml").write_text(re.sub("  m: 3", "  m: 2", Path("r/config.yaml").read_text())),
                                ("fit", "--resume", "--out", "r"), (STATE,)),
    "a training state of nothing": (lambda: (Path("t/state").mkdir(parents=True), save_file({"a": torch.zeros(1)}, "t/state/train.safetensors")),
                                    ("train", "--resume", "--to", "t", *TRAIN), ("t/state", "state")),
    "a sweep's fit.json of nothing": (lambda: (Path("o/m=2").mkdir(parents=True), Path("o/m=2/fit.json").write_text("{}")),
                                      ("fit", "--out", "o", *FIT, "bank.m=2,3"), ("o/m=2", "settings")),
    "info of a description that is a word": (lambda: edit_config(quantization_config="globe")(Path("src")), ("info", "src"), ("src", "quantized")),
    "info of a text": (None, ("info", "words.txt"), ("words.txt", "factors")), "info of a device": (None, ("info", "/dev/null"), ("/dev/null",)),
}


@pytest.mark.parametrize("row", (*OUTPUT_ROWS, *COMMAND_ROWS))
def test_a_command_is_refused_for(row, small, run, words, capsys):
    prepare, argv, said = (OUTPUT_ROWS | COMMAND_ROWS)[row]
    shutil.copytree(small, "src")
    shutil.copytree(run, "r")
    shutil.copy(words, "words.txt")
    if prepare:
        prepare()
    line = refused_whole(*argv, capsys=capsys, late=True)
    assert all(w in line for w in said), line


def test_a_damaged_state_of_a_heal_is_named(small, run, words, capsys):
    Path("h/state").mkdir(parents=True)
    shutil.copy(run / "config.yaml", "h")
    argv = ("heal", "--factors", run, "--out", "h", "--resume", f"calib.text={words}", "calib.length=32", "heal.tokens=256", "heal.steps=1")
    for name in ("stack-000", "step"):
        Path(f"h/state/{name}.safetensors").write_text("x" * 50)
        capsys.readouterr()
        assert globe.main([str(a) for a in argv]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"h/state/{name}.safetensors: expected the saved state" in line, line
        Path(f"h/state/{name}.safetensors").unlink()


BENCH_ROWS = {
    "an unknown suite": (("speed",), ("suite", "'speed'")), "an unknown preset": (("fit", "--preset", "big"), ("--preset", "'big'")),
    "0 repeats": (("compose", "--repeats", "0"), ("--repeats", "0")), "-1 tokens": (("decode", "--tokens", "-1"), ("--tokens", "-1")),
    "a ratio of NaN": (("quality", "--ratio", "nan"), ("--ratio", "nan")), "a result in no directory": (("fit", "--json", "nowhere/x.json"), ("nowhere/x.json",)),
    "a result over a directory": (("fit", "--json", "."), (".",)), "a plot in no directory": (("quality", "--png", "nowhere/x.png"), ("nowhere/x.png",)),
    "a device of words": (("fit", "--device", "gpu"), ("gpu",)), "an unknown setting": (("fit", "--preset", "tiny", "--set", "fit.stepz=3"), ("fit.steps",)),
}


@pytest.mark.parametrize("row", BENCH_ROWS)
def test_a_benchmark_is_refused_for(row, capsys):
    import bench
    (argv, said), before = BENCH_ROWS[row], snapshot(Path())
    assert bench.main(list(argv)) == 2
    out, err = capsys.readouterr()
    line = err.strip().splitlines()[-1]
    assert out == "" and line.startswith("bench.py: ") and all(w in line for w in said) and "Traceback" not in err and snapshot(Path()) == before, err


def test_quality_is_also_measured_on_given_texts_that_are_not_calibrated_on(small):
    import bench
    tokenizer = globe.load_tokenizer(small)
    Path("story.txt").write_text("Once upon a time a small model met a text that nobody had shown it. " * 40)
    windows, calibration = bench.quality_texts(tokenizer, 2, ["story.txt"])
    assert set(windows) >= {"topics", "code", "story"} and windows["story"].shape == (2, 512)
    assert tokenizer.decode(windows["story"][0][:64]) not in calibration
    Path("seen.txt").write_text(globe.builtin_text("train")[1000:6000])
    Path("topics.txt").write_text("a name that is taken")
    for name, said in (("seen.txt", "not calibrated on"), ("topics.txt", "another name"), ("none.txt", "No such file")):
        with pytest.raises(UserError, match=said):
            bench.quality_texts(tokenizer, 2, [name])


def test_a_quality_benchmark_that_was_cut_short_goes_on(small, monkeypatch, capsys):
    import bench
    monkeypatch.setattr(bench, "checkpoint_of", lambda preset, args: globe.Checkpoint(small))
    argv = ["quality", "--ratio", "0.8", "--peers", "svd", "layer-pca", "--json", "q.json", "--set", "calib.tokens=1024", "fit.steps=2"]
    with monkeypatch.context() as m:
        m.setattr(bench, "peer_layer_pca", lambda *_: (_ for _ in ()).throw(UserError("the power failed")))
        assert bench.main([*argv, "--windows", "1"]) == 2 and not Path("q.json").exists()
    part = json.loads(Path("q.json.part").read_text())
    assert {r["variant"] for r in part["rows"]} == {"svd"}
    monkeypatch.setattr(bench, "peer_svd", lambda *_: pytest.fail("svd was measured before"))
    assert bench.main([*argv, "--windows", "1", "--resume"]) == 0 and not Path("q.json.part").exists()
    rows = json.loads(Path("q.json").read_text())["rows"]
    assert [r for r in rows if r["variant"] == "svd"] == part["rows"]
    assert {(r["variant"], r["asked"]) for r in rows} == {(v, 0.8) for v in ("svd", "layer-pca", "globe")}
    Path("q.json").write_text(json.dumps({"rows": [{**r, "asked": 0.6} for r in part["rows"]] + rows}))  # nothing left to measure
    assert bench.main([*argv, "--windows", "1", "--resume"]) == 0
    assert [r["asked"] for r in json.loads(Path("q.json").read_text())["rows"]] == [0.8] * len(rows) + [0.6] * len(part["rows"])
    assert bench.main([*argv, "--windows", "1", "--resume", "--peers", "mobe", "--steps", "2"]) == 0  # another setting: alone
    assert {r["variant"] for r in json.loads(Path("q.json").read_text())["rows"]} == {"mobe", "globe"}
    Path("q.json").write_text('{"rows": 3}')
    for asked, said in (([*argv, "--resume"], "q.json: expected what bench.py wrote"), (["quality", "--resume"], "--resume: expected --json")):
        assert bench.main(asked) == 2 and said in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes into read-only directories")
@pytest.mark.parametrize("argv", (("fit", "--out", "ro/out", *FIT), ("export", "--factors", "r", "--to", "ro/out", "--no-check"),
                                  ("train", "--to", "ro/out", *TRAIN)), ids=("fit", "export", "train"))
def test_a_read_only_place_is_refused_by(argv, small, run, capsys):
    shutil.copytree(small, "src")
    shutil.copytree(run, "r")
    Path("ro").mkdir(mode=0o500)
    assert "ro" in refused_whole(*argv, capsys=capsys, late=True)


@pytest.mark.parametrize("argv", (("fit", "--out", "out", *FIT), ("fit", *FIT), ("export", "--factors", "r", "--to", "out", "--no-check"),
                                  ("export", "--factors", "r", "--to", "out", "--format", "dense", "--no-check"), ("train", "--to", "out", *TRAIN)),
                         ids=("fit", "fit in runs", "export", "export dense", "train"))
def test_a_full_disk_leaves_nothing_behind_of(argv, small, run, words, capsys):
    resource = pytest.importorskip("resource")
    shutil.copytree(small, "src")
    shutil.copytree(run, "r")
    shutil.copy(words, "words.txt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # config.yaml fits, factors and weights do not
    try:
        line = refused_whole(*argv, *["train.text=words.txt"] * (argv[0] == "train"), capsys=capsys, late=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in line, line


# ---- numbers: what a fit makes of degenerate weights ------------------------------------------------------
NUMBERS = {  # name: (what happens to every expert tensor, fit settings)
    "zero weights": (torch.zeros_like, ()), "constant weights": (lambda W: torch.full_like(W, 0.3), ()),
    "constant weights, zscore": (lambda W: torch.full_like(W, 0.3), ("model.normalize=zscore",)),
    "one expert": (lambda W: W, ("model.max_experts=1", "model.single_layer=1")), "more bases than experts": (lambda W: W, ("bank.m=20",)),
    "r above d": (lambda W: W, ("bank.r=40",)), "duplicate experts": (lambda W: torch.linspace(-1, 1, W.numel()).view_as(W).to(W.dtype), ()),
    "scale 1e-8": (lambda W: (W.double() * 1e-8).to(W.dtype), ()), "scale 1e8": (lambda W: (W.double() * 1e8).clamp(
        torch.finfo(W.dtype).min / 4, torch.finfo(W.dtype).max / 4).to(W.dtype), ()),
    "scale 1e-8 unnormalised": (lambda W: (W.double() * 1e-8).to(W.dtype), ("model.normalize=none",)),
    "one huge weight": (lambda W: W.index_fill(0, torch.tensor(0), 3e4), ()),
}


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("row", NUMBERS)
def test_a_fit_ends_finite_and_sensible_on(row, dtype, small, capsys):
    change, settings = NUMBERS[row]
    shutil.copytree(small, "src")
    kind = getattr(torch, dtype)
    edit_tensors(lambda t: t.update({n: change(v.to(kind)) if ".experts." in n else v.to(kind) for n, v in t.items()}))(Path("src"))
    for more in ((), ("bank.activation=silu",), ("bank.init=svd", "fit.method=am")):
        got = answer("fit", "--out", "out", "--overwrite", *FIT, "fit.steps=8", *settings, *more, capsys=capsys)
        assert all(0 <= e <= 1.02 for e in got["rel_frob"].values()), (more, got["rel_frob"])
        factors, ckpt = globe.load_factors("out"), Checkpoint("src")
        for name, f in factors.families.items():
            assert all(torch.isfinite(t.float()).all() for t in (*f.bank, *f.A.values(), *f.val.values())), (more, name)
            W, found = ckpt.expert(name, 1, 0).float(), f.weight(1, 0)
            assert torch.isfinite(found).all() and found.abs().max() <= 4 * W.abs().max() + 1e-30, (more, name)


def test_the_same_seed_gives_the_same_bytes_of_factors_and_another_seed_others(small, words, capsys):
    settings = (f"model.path={small}", *FIT[1:-1], f"calib.text={words}", "calib.tokens=128", "calib.length=32", "model.families=all", "fit.steps=6")
    for out, seed in (("a", 5), ("b", 5), ("c", 6)):
        answer("fit", "--out", out, *settings, f"fit.seed={seed}", capsys=capsys)
    a, b, c = (Path(d, "factors.safetensors").read_bytes() for d in "abc")
    assert a == b != c


# ---- fuzzing: any input ends in a value or in UserError ---------------------------------------------------
CHECKPOINT_FIELDS = {"model_type": "qwen2_moe", "num_hidden_layers": 2, "hidden_size": 8, "moe_intermediate_size": 4, "num_experts": 2,
                     "num_experts_per_tok": 1, "shared_expert_intermediate_size": 4, "mlp_only_layers": [0], "decoder_sparse_step": 1,
                     "quantization_config": None}
GOOD_META = {"format_version": 1, "globe_version": "0", "model_type": "qwen2_moe", "fingerprint": "0", "experts": {"1": [0, 1]}, "config": {},
             "dims": {"layers": [1], "experts": 2, "p": 4, "d": 8, "top_k": 1, "shared": 0}, "families": {"gate": {
                 "m": 2, "r": 3, "s": 1, "groups": 1, "group": {"1": 0}, "activation": "silu", "shift": 0.0, "scale": 1.0, "bank": "gate"}}}
try:
    from hypothesis import HealthCheck, given, settings as fuzz_settings, strategies as st
except ImportError:
    def fuzzed(*_, **__):
        return lambda test: pytest.mark.skip(reason="hypothesis is not installed: pip install hypothesis")(lambda: None)
    st = None
else:
    def fuzzed(*strategies):
        """Small, repeatable, and allowed to share the test's directory between examples."""
        def wrap(test):
            return fuzz_settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))(
                given(*strategies)(test))
        return wrap
    JSON = st.recursive(st.none() | st.booleans() | st.integers(-2 ** 70, 2 ** 70) | st.floats() | st.text(max_size=8),
                        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3), max_leaves=8)
    SECTION = {f.name: [k.name for k in dataclasses.fields(getattr(globe.Config(), f.name))] for f in dataclasses.fields(globe.Config)
               if dataclasses.is_dataclass(getattr(globe.Config(), f.name))}
    CONFIGS = st.sampled_from(sorted(SECTION)).flatmap(lambda s: st.dictionaries(st.sampled_from(SECTION[s]), JSON, max_size=3).map(lambda v: {s: v}))


def value_or_usererror(call) -> None:
    """Runs call(): UserError with one short line, or a value; anything else fails, as does an allocation of 256 MiB."""
    with at_most_more(256 * 2 ** 20):
        try:
            call()
        except UserError as e:
            assert 0 < len(str(e)) < 3000


@contextlib.contextmanager
def at_most_more(size: int):
    """Address space may grow by `size` bytes within the block, where /proc says how much there is; else no limit."""
    if not Path("/proc/self/statm").is_file():
        yield
        return
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="no /proc here to read the address space from")
def test_the_fuzzers_limit_on_memory_bites():
    with pytest.raises(MemoryError):
        value_or_usererror(lambda: bytearray(2 ** 29))


@fuzzed(st and st.text(max_size=60) | CONFIGS.map(json.dumps))
def test_any_text_as_a_config_file_is_read_or_refused(text):
    Path("f.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    value_or_usererror(lambda: load_config("f.yaml"))


@fuzzed(st and st.sampled_from(sorted(CHECKPOINT_FIELDS)), st and JSON)
def test_any_value_in_a_models_config_is_read_or_refused(key, value):
    value_or_usererror(lambda: globe.dims_of(CHECKPOINT_FIELDS | {key: value}))


@fuzzed(st and st.binary(max_size=40), st and st.dictionaries(st.text(max_size=4), JSON, max_size=3), st and st.integers(-4, 4))
def test_any_header_of_safetensors_is_read_or_refused(raw, header, off):
    text = raw + json.dumps(header).encode()
    Path("c").mkdir(exist_ok=True)
    Path("c/config.json").write_text(json.dumps(CHECKPOINT_FIELDS))
    Path("c/m.safetensors").write_bytes((max(0, len(text) + off)).to_bytes(8, "little") + text)
    value_or_usererror(lambda: Checkpoint("c"))


@fuzzed(st and JSON | st.dictionaries(st.just("weight_map"), st.dictionaries(st.text(max_size=4), JSON, max_size=3)))
def test_any_index_is_read_or_refused(table):
    Path("i").mkdir(exist_ok=True)
    Path("i/config.json").write_text(json.dumps(CHECKPOINT_FIELDS))
    Path("i/model.safetensors.index.json").write_text(json.dumps(table))
    value_or_usererror(lambda: Checkpoint("i"))


@fuzzed(st and st.lists(st.sampled_from(("dims", "families", "experts", "p", "gate", "m", "r", "s", "groups", "group", "bank", "1", "layers", "config")),
                        min_size=1, max_size=3), st and JSON)
def test_any_description_of_factors_is_read_or_refused(path, value):
    meta = json.loads(json.dumps(GOOD_META))
    node = meta
    for key in path[:-1]:
        node = node[key] if isinstance(node.get(key), dict) else node
    node[path[-1]] = value
    save_file({"bank.gate.0": torch.zeros(2, 3, 8), "layers.1.gate.A": torch.zeros(2, 4, 3), "layers.1.gate.val": torch.ones(2, 1),
               "layers.1.gate.idx": torch.zeros(2, 1).int()}, "f.safetensors", metadata={"globe": json.dumps(meta)})

    def read() -> None:
        factors = globe.load_factors("f.safetensors")
        assert factors.ratio() > 0 and factors.meta() and all(f.weight(1, 1).shape == (4, 8) for f in factors.families.values())
    value_or_usererror(read)


@slow
def test_memory_is_flat_over_2000_tokens_with_a_tiny_cache(small, tmp_path):
    """In a process of its own: behind a whole suite, the heap's size moves by megabytes whoever asks for memory."""
    if not Path("/proc/self/statm").is_file():
        pytest.skip("no /proc here to read the resident size from")
    globe.save_factors(random_factors(Checkpoint(small)), tmp_path / "factors.safetensors")
    run = in_process(f"""
import json, resource, torch, globe
from pathlib import Path
pages = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2 ** 20
model = globe.assemble(globe.Checkpoint(Path({str(small)!r})), globe.load_factors({str(tmp_path)!r}), cache=globe.CacheConfig(per_layer=1))
seen, ids = [], torch.tensor([[7]])
with torch.no_grad():
    for i in range(20):  # 20 x 100 tokens; each starts from where the last one ended
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, min_new_tokens=100, do_sample=False, pad_token_id=0)
        ids = out[:, -1:]
        seen.append(pages())
        for m in globe.globe_modules(model):
            assert len(m.cache.slot_of) <= m.cache.slots == 1
print(json.dumps(seen))
""")
    assert not run.returncode, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    x = torch.arange(10.0)
    y = torch.tensor(seen[10:])
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()) * 10  # MiB per 1,000 tokens
    assert slope < 1, (slope, seen)


# ======================================================================================================
# Scale: streaming, resuming, several processes
# ======================================================================================================
LONG = [*QUICK, "fit.steps=60", "fit.save_every=3", "sparsity.freeze=0.5", "bank.init=experts", "calib.tokens=512", "calib.length=64"]


def tensors_in(run: str) -> dict:
    return load_file(f"{run}/factors.safetensors")


def launch(*argv, ranks: int = 0) -> subprocess.Popen:
    """globe.py in processes of their own; ranks: so many under torchrun."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen([sys.executable, *start, str(HERE / "globe.py"), *map(str, argv)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=env)


@pytest.mark.parametrize("settings", (["fit.metric=weights"], ["fit.metric=data"], ["fit.metric=data", "bank.scope=layer"],
                                      ["fit.metric=data", "model.families=all", "bank.activation=silu"]), ids=str)
def test_experts_streamed_from_disk_give_the_same_bits_as_experts_in_memory(settings, small, words, capsys, monkeypatch):
    base = [f"model.path={small}", *QUICK, f"calib.text={words}", "fit.batch=2", *settings]
    answer("fit", "--out", "memory", *base, capsys=capsys)
    made = []
    monkeypatch.setattr(globe.Experts, "__init__", lambda self, *a, _old=globe.Experts.__init__, **k: (_old(self, *a, **k), made.append(self))[0])
    answer("fit", "--out", "disk", *base, "fit.budget=1e-6", capsys=capsys)
    assert all(e.kept is None and (e.file is not None) == ("fit.metric=data" in settings) for e in made) and made
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    answer("fit", "--out", "source", *base, "fit.budget=1e-6", capsys=capsys)  # no room: made from the checkpoint in every pass
    assert all(e.file is None for e in made[len(made) // 2:])
    for run in ("disk", "source"):
        for name, t in tensors_in("memory").items():
            assert torch.equal(t, tensors_in(run)[name]), (run, name)
    assert sorted(p.name for p in Path("disk/state").rglob("*") if p.name.startswith(("A-", "L-", "."))) == []


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """What a pass holds of 4 and of 40 layers of equal size is the same: two buffers and one batch's temporaries."""
    held = []
    for layers in (4, 40):
        keys, g = [(l, e) for l in range(layers) for e in range(4)], gen()
        W = {l: torch.randn(8, 12, generator=g) for l in range(layers)}
        experts = Experts(lambda l, e: W[l] + e, keys, budget=1, batch=2, scratch=tmp_path, right={l: torch.eye(12) for l in W})
        fitter = Fitter(experts, load_config(None, ["bank.m=3", "bank.init=random", "fit.steps=2"]), (3, 4))
        fitter.step()
        assert experts.kept is None and experts.file is not None
        held.append(sum(t.numel() for b in experts.buffers.values() for t in (b.values() if isinstance(b, dict) else [b])))
    assert held[0] == held[1] > 0


def test_a_signal_to_end_saves_the_fit(small, capsys, monkeypatch):
    row = globe.Log.row
    monkeypatch.setattr(globe.Log, "row", lambda self, data: (row(self, data), signal.raise_signal(signal.SIGTERM) if data["step"] == 4 else None))
    assert globe.main(["fit", "--out", "cut", f"model.path={small}", *QUICK]) == 130
    assert "go on with: python globe.py fit --resume --out cut" in capsys.readouterr().err
    assert int(globe.read_tensors(Path("cut/state/gate+up.safetensors"))["step"]) == 4


@slow
def test_a_fit_killed_at_random_instants_ends_in_the_same_bits(small, words, capsys):
    """GLOBE_KILLS=20 for the figure in the README. Half of the runs keep their L-BFGS pairs in files."""
    kills = int(os.environ.get("GLOBE_KILLS", 4))
    rng = np.random.default_rng(kills)
    for spill in (False, True):
        base = [f"model.path={small}", *LONG, "fit.steps=300", f"calib.text={words}", "fit.batch=4", *["fit.budget=1e-6"] * spill]
        begin = time.perf_counter()
        answer("fit", "--out", "whole", "--overwrite", *base, capsys=capsys)
        seconds, killed, resumed = time.perf_counter() - begin, 0, 0
        while True:
            fit = launch("fit", "--out", "cut", "--resume", *base)
            if killed < kills // 2:
                log, start = Path("cut/log.jsonl"), time.time()
                while fit.poll() is None and not (log.is_file() and log.stat().st_mtime > start):  # imports are no moment of a fit
                    time.sleep(0.01)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    fit.wait(rng.uniform(0, seconds))
            if fit.returncode is None and killed < kills // 2:
                fit.kill()
                killed, resumed = killed + 1, resumed + ("resumed at step" in fit.communicate()[1])
                continue
            _, err = fit.communicate()
            assert fit.returncode == 0, err
            assert Path("cut/factors.safetensors").read_bytes() == Path("whole/factors.safetensors").read_bytes(), killed
            assert not [p for p in Path("cut").rglob(".*")]  # no half-written file is left
            rows = [[(r["family"], r["step"], r["loss"]) for r in globe.read_rows(Path(run, "log.jsonl"))] for run in ("cut", "whole")]
            assert rows[0] == rows[1]
            shutil.rmtree("cut")
            if killed == kills // 2:
                break
        print(f"{killed} killed, {resumed} of them after a resume")


def test_a_disk_that_fills_up_during_the_fit_says_from_which_step_it_goes_on(small, capsys, monkeypatch):
    resource = pytest.importorskip("resource")
    settings = [f"model.path={small}", *QUICK, "fit.save_every=2", "fit.metric=weights"]
    answer("fit", "--out", "whole", *settings, capsys=capsys)
    row, (soft, hard) = globe.Log.row, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self, data):
        row(self, data)
        if data["step"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    with monkeypatch.context() as patch:
        patch.setattr(globe.Log, "row", full)
        try:
            assert globe.main(["fit", "--out", "cut", *settings]) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "File too large" in line and "the state of step 2 stands; go on with: python globe.py fit --resume --out cut" in line
    answer("fit", "--resume", "--out", "cut", capsys=capsys)
    assert Path("cut/factors.safetensors").read_bytes() == Path("whole/factors.safetensors").read_bytes()


SUMS = """
import random, sys, time, torch, globe
with globe.joined_ranks(torch.device("cpu")):
    rank, world = globe.ranks()
    assert bool(globe.SHARED) == (sys.argv[1] == "shared")
    for k in range(20):
        time.sleep(random.random() * 0.05)  # either may be ahead
        n = [70_000, 2 ** 21, 2 ** 21 + 3, 2 ** 22 + 2 ** 21 + 1][k % 4]
        each = [torch.randn(n, generator=torch.Generator().manual_seed(100 * k + r)) for r in range(world)]
        mine, few = each[rank].clone(), each[rank][:5].double()
        globe.all_sum(mine, few)
        assert torch.allclose(mine, torch.stack(each).sum(0), atol=1e-5) and torch.allclose(few, torch.stack(each).double().sum(0)[:5]), k
"""


@slow
@pytest.mark.parametrize("way, ranks", (("shared", 3), ("full", 2)))
def test_ranks_of_one_host_sum_through_shared_memory(way, ranks, tmp_path):
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm")
    full = "import os\ndef no(*_): raise OSError(28, 'No space left on device')\nos.posix_fallocate = no\n" * (way == "full")
    (tmp_path / "sums.py").write_text(full + SUMS)
    before = set(os.listdir("/dev/shm"))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(tmp_path / "sums.py"), way],
                          env=os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not {f for f in set(os.listdir("/dev/shm")) - before if f.startswith("globe-")}


@pytest.mark.parametrize("argv, word", ((("bank.m=3",), "torchrun"), (("bank.m=2,3",), "one process")))
def test_a_world_without_torchrun_is_refused(argv, word, small, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert globe.main(["fit", "--out", "r", f"model.path={small}", *argv]) == 2
    assert word in capsys.readouterr().err and not Path("r").exists()


def test_a_damaged_state_is_refused_in_one_line(small, capsys):
    assert globe.main(["fit", "--out", "r", f"model.path={small}", *QUICK]) == 0
    path = Path("r/state/gate+up.safetensors")
    whole = path.read_bytes()
    for size in (5, 60, len(whole) - 9):
        path.write_bytes(whole[:size])
        capsys.readouterr()
        assert globe.main(["fit", "--resume", "--out", "r"]) == 2, size
        err = capsys.readouterr().err
        assert "gate+up.safetensors: expected" in err and "Traceback" not in err, err


@slow
def test_two_ranks_fit_what_one_process_fits_and_a_killed_rank_ends_the_job_resumably(small, words, capsys):
    base = [f"model.path={small}", *LONG, f"calib.text={words}", "model.max_experts=3", "model.families=all"]
    few = ["fit.steps=6", "fit.homotopy.every=10"]
    answer("fit", "--out", "one", *base, *few, capsys=capsys)
    two = launch("fit", "--out", "two", *base, *few, ranks=2)
    out, err = two.communicate()
    assert two.returncode == 0, err
    result, = (json.loads(line) for line in out.splitlines() if line.startswith("{"))  # one document, by the first rank
    assert result["factors"] == "two"
    one, both = (globe.read_rows(Path(f"{run}/log.jsonl")) for run in ("one", "two"))
    assert [(r["family"], r["step"]) for r in one] == [(r["family"], r["step"]) for r in both]
    for a, b in zip(one, both):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    for name, t in tensors_in("one").items():
        torch.testing.assert_close(tensors_in("two")[name], t, atol=2e-3 * float(t.abs().max()), rtol=2e-3)
    answer("fit", "--out", "long", *base, capsys=capsys)

    job = launch("fit", "--out", "cut", *base, "fit.steps=100000", ranks=2)
    state = Path("cut/state/gate+up.safetensors")
    while job.poll() is None and not (state.is_file() and globe.read_rows(Path("cut/log.jsonl"))[-1]["step"] > 9):
        time.sleep(0.05)
    workers = [int(p.name) for p in Path("/proc").glob("[0-9]*") if (p / "stat").is_file()
               and (p / "stat").read_text().rpartition(")")[2].split()[1] == str(job.pid)]
    assert len(workers) == 2
    os.kill(max(workers), signal.SIGKILL)
    _, err = job.communicate(timeout=120)
    assert job.returncode != 0 and "another process is gone" in err and 'globe.py", line' not in err, err
    step = int(re.search(r"the state of step (\d+) stands; go on with: python globe.py fit --resume --out cut", err)[1])
    assert step >= 3 and step % 3 == 0
    got = answer("fit", "--resume", "--out", "cut", f"fit.steps={step + 5}", capsys=capsys)  # one process goes on
    assert got["steps"] == step + 5
    three = launch("fit", "--resume", "--out", "cut", f"fit.steps={step + 9}", ranks=3)  # then three, fewer experts than ranks in a layer
    out, err = three.communicate()
    assert three.returncode == 0 and f"resumed at step {step + 5}" in err, err
    rows = globe.read_rows(Path("cut/log.jsonl"))
    for family in {r["family"] for r in rows}:
        assert [r["step"] for r in rows if r["family"] == family] == list(range(1, step + 10))
    assert set(tensors_in("cut")) == set(tensors_in("long"))


@slow
def test_two_ranks_heal_what_one_process_heals(small, run, capsys):
    base = ["heal", "--factors", run, "heal.steps=8", "heal.check_every=4", "heal.tokens=1024", "calib.length=64", "heal.batch=3", "heal.lr=0.002"]
    answer(*base, "--out", "one", capsys=capsys)
    two = launch(*base, "--out", "two", ranks=2)
    out, err = two.communicate()
    assert two.returncode == 0, err
    result, = (json.loads(line) for line in out.splitlines() if line.startswith("{"))
    assert result["factors"] == "two" and result["healed"] == 1 and not list(Path("two/state").glob("*.bin"))
    one, both = (globe.read_rows(Path(f"{name}/log.jsonl")) for name in ("one", "two"))
    assert [r["step"] for r in both] == list(range(1, 9))
    for a, b in zip(one, both):
        for key in {"loss", "held_out"} & set(a):
            assert b[key] == pytest.approx(a[key], rel=1e-3)
    for name, t in tensors_in("one").items():
        torch.testing.assert_close(tensors_in("two")[name], t, atol=2e-3 * float(t.abs().max()), rtol=2e-3)
    few = launch(*base, "--out", "few", "heal.batch=1", ranks=2)
    _, err = few.communicate()
    assert few.returncode != 0 and "heal.batch: expected a window or more for each of 2 processes, found 1" in err and 'globe.py", line' not in err


# ======================================================================================================
# House rules
# ======================================================================================================
def dotted(node: ast.AST) -> str:
    """a.b.c of an attribute chain, else the empty string."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def test_only_the_device_helpers_know_cuda_and_nothing_loads_or_runs_foreign_code():
    source = (HERE / "globe.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    start = next(i for i, line in enumerate(lines, 1) if line.startswith("# Devices:"))
    end = next(i for i, line in enumerate(lines, 1) if i > start + 1 and line.startswith("# ==="))
    for node in ast.walk(ast.parse(source)):
        name = dotted(node) if isinstance(node, ast.Attribute) else ""
        if name.startswith(("torch.cuda.", "torch.mps.", "torch.backends.mps.")):
            assert start < node.lineno < end, f"line {node.lineno}: {name}"
        assert name not in ("torch.load", "pickle.load", "pickle.loads", "yaml.load"), f"line {node.lineno}: {name}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile"), f"line {node.lineno}: {node.func.id}"
    assert not re.search(r"^\s*(#\s*type:\s*ignore|from\s+\S+\s+import\s+\*)", source, re.M)


def test_globe_py_alone_in_an_empty_directory_shows_its_help(tmp_path):
    shutil.copy(HERE / "globe.py", tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    got = subprocess.run([sys.executable, "globe.py", "--help"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert got.returncode == 0 and all(c in got.stdout for c in globe.COMMANDS)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["cache", "globe.py"]  # own_world made the first


def test_a_process_with_wrong_input_exits_2_without_a_traceback(tmp_path):
    got = subprocess.run([sys.executable, str(HERE / "globe.py"), "fit", "model.path=nowhere"], cwd=tmp_path, capture_output=True,
                         text=True, timeout=120)
    assert got.returncode == 2 and got.stdout == "" and "nowhere" in got.stderr and "Traceback" not in got.stderr


def readme_blocks(language: str) -> list:
    text = (HERE / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return [body for lang, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if lang == language]


def test_every_command_line_in_the_readme_parses(capsys):
    lines = [line for block in readme_blocks("sh") + readme_blocks("") for line in re.findall(r"python globe\.py ([^\n&|;]*)", block)]
    assert {"fit", "eval", "export", "generate", "train", "report"} <= {line.split()[0] for line in lines}
    for line in lines:
        args = globe.parse(shlex.split(line, comments=True))
        load_config(args.config and str(HERE / args.config), [o for o in args.overrides if "," not in o])  # a grid's values


def test_the_readmes_recipes_run_as_they_stand(words, monkeypatch, capsys):
    """Every command of the README in order, in one directory, with sizes cut down; then its Python block."""
    import bench
    smaller = {"train": [*TRAIN, f"train.text={words}"], "fit": [*TRAIN, f"train.text={words}", "bank.m=3", "sparsity.support=2",
               "fit.steps=6", "calib.tokens=512", "calib.length=64"], "eval": SPEED, "generate": [*SPEED, "--max-new-tokens", "4"],
               "heal": ["heal.steps=4", "heal.tokens=512", "calib.length=64"], "export": [], "report": [], "info": []}
    fewer = ["--set", *TRAIN, f"train.text={words}", "bank.m=3", "sparsity.support=2", "fit.steps=6", "calib.tokens=512",
             "heal.steps=4", "heal.tokens=2048", "--steps", "6", "--mobe-steps", "6", "--tokens", "4", "--prefill", "16", "--repeats", "1",
             "--windows", "2"]
    seen = set()
    for line in "\n".join(readme_blocks("sh")).splitlines():
        for command in line.split("&&"):
            words_of = shlex.split(command, comments=True)
            if words_of[:2] == ["python", "globe.py"]:
                assert globe.main([*words_of[2:], *smaller[words_of[2]]]) == 0, line
                seen.add(words_of[2])
            elif words_of[:2] == ["python", "bench.py"]:
                assert bench.main([*words_of[2:], *fewer]) == 0, line
                seen.add("bench")
            else:
                assert not words_of or words_of[0] == "pip" or "pytest" in words_of, line
    assert seen == set(smaller) | {"bench"}
    block, = readme_blocks("python")
    script = f"import sys; sys.path.insert(0, {str(HERE)!r})\n{block}"
    got = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert got.returncode == 0 and "hits" in got.stdout, got.stderr
