"""Tests of dfan.py and extract_features.py: python -m pytest -q. The benchmark of the recurrence: python test_dfan.py.

The oracle below is written from the paper and from the README's readings [R1]-[R8], not from dfan.py: one video at a
time, loops over t and i, float64, no identity used.
"""
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dfan

HERE = Path(__file__).resolve().parent
BETA = 0.6


# ----------------------------------------------------------------------------------------------------------------------
# The paper, literally
# ----------------------------------------------------------------------------------------------------------------------

def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def lstm_cell(W_in, b_in, W_h, b_h, x, h_in, c):
    i, f, g, o = np.split(W_in @ x + b_in + W_h @ h_in + b_h, 4)
    sigmoid = lambda v: 1 / (1 + np.exp(-v))
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def oracle(cell, F_A, F_S, F_O, training):
    """Equations (1)-(10) for one video; F_A (T,D), F_S (T,D), F_O (T,K,D). Returns logits, P, A_T at the end, A_o."""
    w = {name: (p.weight.detach().double().numpy(), 0. if p.bias is None else p.bias.detach().double().numpy())
         for name, p in cell.named_children()}
    T, K = F_O.shape[:2]
    H, C = w["W_p"][0].shape[1], w["W_p"][0].shape[0]
    h1, c1, h2, c2, P = np.zeros(H), np.zeros(H), np.zeros(H), np.zeros(H), np.zeros(C)
    A_T = np.full(T, 1 / T)                                      # G = 0 everywhere: uniform [R5]
    G_T = np.zeros(T)
    out = []
    for t in range(T):
        there = [i for i in range(K) if np.any(F_O[t, i] != 0)]
        F_O_bar = sum((F_O[t, i] for i in there), np.zeros(F_O.shape[2])) / max(1, len(there))
        h1, c1 = lstm_cell(*w["S_in"], *w["S_h"], F_O_bar, np.concatenate([h2, h1]), c1)                        # (4)
        A_o = np.zeros(K)
        if there:
            G_o = [np.tanh(w["W_oh"][0] @ h1 + w["W_of"][0] @ F_O[t, i] + w["W_of"][1]).item() for i in there]  # (3)
            A_o[there] = softmax(np.array(G_o))                                                                 # (2)
        F_o_hat = sum(F_O[t, i] * A_o[i] for i in range(K))                                                     # (1)
        S_t = np.concatenate([F_o_hat, F_A[t], F_S[t]])
        G_T[t] = np.tanh(w["W_Th"][0] @ h2 + w["W_Tf"][0] @ S_t + w["W_Tf"][1]).item()                          # (9)
        A_T = softmax(G_T)                                                                                      # (8)
        F_t = sum(np.concatenate([F_A[i], F_S[i]]) * A_T[i] for i in range(T))                                  # (7)
        h2, c2 = lstm_cell(*w["T_in"], *w["T_h"], F_t, np.concatenate([P, h2]), c2)                             # (6)
        logits = w["W_p"][0] @ h2 + w["W_p"][1]
        P = softmax(logits)                                                                                     # (5)
        if training and t > 0:
            old = A_T.copy()
            A_T[t - 1] = BETA * old[t - 1] + (1 - BETA) * old[t]                                                # (10)
            A_T[t] = (1 - BETA) * old[t - 1] + BETA * old[t]
            # it persists: the glimpse whose softmax is the mixed attention, up to the constant that softmax ignores
            constant = G_T[0] - np.log(old[0])
            G_T = np.log(A_T) + constant
        out.append((logits, P, A_o))
    logits, P, A_o = (np.array(v) for v in zip(*out))
    return logits, P, A_T, A_o


def make_net(dtype=torch.float64, **kw):
    torch.manual_seed(1)
    net = dfan.DFAN(**dict(d_action=7, d_scene=5, d_object=6, hidden=4, classes=3) | kw).to(dtype)
    for p in net.parameters():                                    # larger than the default, so that nothing is nearly linear
        torch.nn.init.normal_(p, std=0.7)
    return net


def make_batch(lengths, K=3, dtype=torch.float64, widths=(7, 5, 6), seed=2):
    g = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(lengths)
    F_A, F_S = (torch.randn(B, T, d, generator=g, dtype=dtype) for d in widths[:2])
    F_O = torch.rand(B, T, K, widths[2], generator=g, dtype=dtype)
    F_O[torch.rand(B, T, K, generator=g) < 0.3] = 0               # boxes that are not there
    F_O[:, 1] = 0                                                 # a frame with none
    return F_A, F_S, F_O, torch.tensor(lengths)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_network_is_the_paper(training, dtype, tolerance):
    net = make_net(dtype).train(training)
    F_A, F_S, F_O, lengths = make_batch([9, 4, 1, 12, 2], dtype=dtype)
    out = net(F_A, F_S, F_O, lengths)
    for b, n in enumerate(lengths):
        expected = oracle(net.cell, *(v[b, :n].double().numpy() for v in (F_A, F_S, F_O)), training)
        for name, value in zip(("logits", "P", "A_T", "A_o"), expected):
            got = out[name][b].detach().double().numpy()
            assert np.abs(got[:n] - value).max() < tolerance, (name, b)
            assert (got[n:] == 0).all(), f"{name}: padding must hold zeros"
