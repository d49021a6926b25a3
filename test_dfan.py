"""Tests of dfan.py and extract_features.py: python -m pytest -q. Three experiments stand at the end:

    python test_dfan.py --readings [NAME ...]    # readings of the paper that were not taken, on the planted set
    python test_dfan.py --speed                  # of the networks
    python test_dfan.py --extraction             # of extraction, each detector

The oracle comes first. It is written from the paper and from the README's readings [R1] to [R9], not from dfan.py:
numpy in float64, one video at a time, loops over frames t and i, nothing rearranged.
"""
import contextlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
import zlib
from argparse import Namespace
from functools import partial
from pathlib import Path
from unittest.mock import DEFAULT, Mock, patch

if __name__ != "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # the networks here are small
import cv2
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import dfan
import extract_features as extract

HERE = Path(dfan.__file__).parent
BETA = 0.6


# ---- The paper, once more ----

def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def lstm_step(w, name, x, h, c):
    """One step of a vanilla LSTM with the weights of an nn.LSTMCell: its rows are the gates i, f, g, o."""
    gates = w[name + ".weight_ih"] @ x + w[name + ".bias_ih"] + w[name + ".weight_hh"] @ h + w[name + ".bias_hh"]
    i, f, g, o = np.split(gates, 4)
    sigmoid = lambda v: 1 / (1 + np.exp(-v))
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def oracle(net, F_A, F_S, F_O, training, o_focus=True):
    """Equations (1) to (10) for one video: F_A (T,D), F_S (T,D), F_O (T,K,D) -> logits, P, A_T at the end, A_o."""
    w = {name: p.detach().double().numpy() for name, p in net.named_parameters()}
    T, K, d_object = F_O.shape
    C, H = w["W_p.weight"].shape
    h1, c1, h2, c2, P = np.zeros(H), np.zeros(H), np.zeros(H), np.zeros(H), np.zeros(C)  # P_0 = 0 [R4]
    G_T = np.zeros(T)  # uniform attention over the whole video [R5]
    outputs = []
    for t in range(T):
        there = [i for i in range(K) if np.any(F_O[t, i] != 0)]  # [R3]
        F_o_bar = np.zeros(d_object)
        for i in there:
            F_o_bar += F_O[t, i] / len(there)
        A_o = np.zeros(K)
        if o_focus:
            h1, c1 = lstm_step(w, "LSTM_S", np.concatenate([F_o_bar, h2]), h1, c1)           # (4) [R1]
            G_o = [np.tanh(w["W_oh.weight"] @ h1 + w["W_of.weight"] @ F_O[t, i] + w["W_of.bias"]).item()
                   for i in there]                                                           # (3) [R2]
            A_o[there] = softmax(np.array(G_o)) if there else 0                              # (2)
            F_o_hat = np.zeros(d_object)
            for i in range(K):
                F_o_hat += A_o[i] * F_O[t, i]                                                # (1)
        else:
            A_o[there], F_o_hat = 1 / max(len(there), 1), F_o_bar  # [R9]
        S_t = np.concatenate([F_o_hat, F_A[t], F_S[t]])
        G_T[t] = np.tanh(w["W_Th.weight"] @ h2 + w["W_Tf.weight"] @ S_t + w["W_Tf.bias"]).item()     # (9)
        A_T = softmax(G_T)                                                                   # (8)
        F_t = np.zeros(F_A.shape[1] + F_S.shape[1])
        for i in range(T):
            F_t += A_T[i] * np.concatenate([F_A[i], F_S[i]])                                 # (7)
        h2, c2 = lstm_step(w, "LSTM_T", np.concatenate([P, F_t]), h2, c2)                    # (6) [R4]
        logits = w["W_p.weight"] @ h2 + w["W_p.bias"]
        P = softmax(logits)                                                                  # (5)
        if training and t > 0:
            before, now = A_T[t - 1], A_T[t]
            A_T[t - 1] = BETA * before + (1 - BETA) * now                                    # (10)
            A_T[t] = (1 - BETA) * before + BETA * now                                        # (10)
            # it lasts [R6]: the glimpses whose softmax is the mixture
            G_T[[t - 1, t]] += np.log(A_T[[t - 1, t]]) - np.log([before, now])
        outputs.append((logits, P, A_o))
    logits, P, A_o = (np.array(v) for v in zip(*outputs))
    return dict(logits=logits, P=P, A_T=A_T, A_o=A_o)


# ---- The network ----

def make_net(Network=dfan.DFAN, training=False, **changed):
    torch.manual_seed(1)
    sizes = dict(d_action=7, d_scene=5, d_object=6, hidden=4, classes=3)
    net = Network(**sizes | changed).double().train(training)
    for p in net.parameters():  # larger than usual: nothing is nearly linear
        nn.init.normal_(p, std=0.7)
    return net


def make_batch(lengths, K=3, d_object=6):
    g = torch.Generator().manual_seed(2)
    B, T = len(lengths), max(lengths)
    F_A, F_S = (torch.randn(B, T, d, generator=g, dtype=torch.float64) for d in (7, 5))
    F_O = torch.rand(B, T, K, d_object, generator=g, dtype=torch.float64)
    F_O[torch.rand(B, T, K, generator=g) < 0.3] = 0  # boxes that are not there
    F_O[:, 1:2] = 0  # a frame without any
    return F_A, F_S, F_O, torch.tensor(lengths)


@pytest.mark.parametrize("Network", [dfan.DFAN, dfan.Fast])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("o_focus, K, d_object", [(True, 3, 6), (True, 1, 6), (False, 3, 6), (False, 0, 0)])
def test_network_is_the_paper(Network, training, o_focus, K, d_object):
    net = make_net(Network, training, o_focus=o_focus, d_object=d_object)
    F_A, F_S, F_O, lengths = make_batch([9, 4, 1, 12, 2], K, d_object)
    for v in (F_A, F_S, F_O):
        v[1, 4:] = 1e6  # padding changes nothing
        v[4, 2:] = -1e6
    out = net(F_A, F_S, F_O, lengths)
    for b, n in enumerate(lengths):
        inputs = (v[b, :n].numpy() for v in (F_A, F_S, F_O))
        for name, value in oracle(net, *inputs, training, o_focus).items():
            got = out[name][b].detach().numpy()
            assert got[:n].shape == value.shape, name
            assert np.abs(got[:n] - value).max(initial=0) < 1e-12, (name, b)
            assert (got[n:] == 0).all(), f"{name}: zero where there is padding"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("o_focus", [True, False])
def test_fast_is_dfan_with_its_gradients(training, o_focus):
    *F, lengths = make_batch([7, 3, 5])
    sides = []
    for Network in (dfan.DFAN, dfan.Fast):
        net = make_net(Network, training, o_focus=o_focus)
        inputs = [v.clone().requires_grad_() for v in F]
        named = dict(net.named_parameters()) | dict(zip("ASO", inputs))
        out = net(*inputs, lengths)
        torch.manual_seed(3)
        loss = sum((v * torch.randn_like(v)).sum() for v in out.values())
        grads = torch.autograd.grad(loss, list(named.values()))
        sides.append(out | dict(zip(named, grads)))
    for name, value in sides[0].items():
        largest = value.abs().max()
        assert (value - sides[1][name]).abs().max() < 1e-12 * (1 + largest), name
        assert largest > 0, f"{name} is not reached"


def test_loss_averages_frames_then_videos():
    logits = torch.randn(2, 5, 3, dtype=torch.float64)
    P = [[softmax(v) for v in video] for video in logits.numpy()]
    first = -np.mean([np.log(P[0][t][2]) for t in range(5)])
    second = -np.mean([np.log(P[1][t][0]) for t in range(2)])
    loss = dfan.loss_fn(logits, torch.tensor([2, 0]), torch.tensor([5, 2]))
    assert abs(loss.item() - (first + second) / 2) < 1e-12


def P_of(emotions, sure=0.6):
    return [[sure if c == int(e) else (1 - sure) / 2 for c in range(3)] for e in emotions]


@pytest.mark.parametrize("P, n, emotion", [
    (P_of("0" * 20 + "1111112222"), 30, 1),  # the last ten alone count
    (P_of("0" * 10 + "2" * 15), 10, 0),  # padding does not
    (P_of("0" * 10) + P_of("11111", 0.8) + P_of("22222"), 20, 1),  # 5 to 5: the higher sum
    (P_of("000", 0.99) + P_of("1111", 0.4), 7, 1),  # but a count beats any sum
    (P_of("220"), 3, 2), (P_of("0") + P_of("1", 0.9), 2, 1), (P_of("0", 0.9) + P_of("1"), 2, 0)])
def test_vote(P, n, emotion):
    assert dfan.vote(torch.tensor([P]), [n]).tolist() == [emotion]


@pytest.mark.parametrize("lengths", [[20] * 35, range(10, 360, 10)])
def test_batches(lengths):
    videos = [dict(action=torch.zeros(n, 1)) for n in lengths]
    data = Namespace(lengths=lengths, labels=[0] * 35, load=videos.__getitem__)
    args = Namespace(features=("action",), objects=16, batch=16, device="cpu")
    small = np.zeros(35)
    for epoch in range(200):
        rng = np.random.default_rng(epoch)
        parts = sorted([part for *_, part in dfan.batches(data, range(35), args, None, rng)], key=max)
        assert sorted(map(len, parts)) == [11, 12, 12]
        assert sorted(sum(parts, [])) == list(range(35)), "each video once an epoch"
        assert max(parts[0]) - min(parts[0]) < 20 or lengths[0] == 20, "similar lengths together"
        small[min(parts, key=len)] += 1
    assert small.max() < 0.5 * 200, "one batch of three is small: no video is in it each time"


# ---- The readings that were not taken: python test_dfan.py --readings [NAME ...] ----
# Each is a change of DFAN, or of loss_fn: its equation and words, then its lines. "- old": this line of ours goes;
# "= x = new": the line goes that gives x; "+ new" stands in the place of the last one. All else is ours.
# For videos of one length, as the planted set's are: what padding does is not looked after.

RESCORED = """
        - E = real
        + E, S = real, torch.cat([F_O_bar, FF], -1)                    # (B,T,2497)  the mean object, until a visit
        - G_t = torch.tanh(self.W_Th(h2) + self.W_Tf(S_t))
        + S = torch.where(frame[:, None] == t, S_t[:, None], S)
        + G_T = torch.tanh(self.W_Th(h2) + self.W_Tf(S).squeeze(-1))   # (B,T)
        - E = torch.where(frame == t, G_t.exp() * real, E)"""

T_NUMBERS = """
        = self.W_Tf = nn.Linear(d_object + d_FF, Planted.T)
        - E = torch.where(frame == t, G_t.exp() * real, E)
        + E = G_t.exp() * real"""

READINGS = {
    "rescore": "(9) every frame scored anew at each t" + RESCORED + """
        + E = G_T.exp() * real""",
    "rescore-seen": "(9) every frame seen so far scored anew at each t" + RESCORED + """
        + E = G_T.exp() * real * (frame <= t)""",
    "score-first": """(9) every frame scored once at the start, entry t anew at its visit
        - E = real
        + G_T = torch.tanh(self.W_Tf(torch.cat([F_O_bar, FF], -1)).squeeze(-1))
        + E = G_T.exp() * real""",
    "vector": """(3), (9) a scoring vector: v' tanh(W h + W F + b)
        = self.W_oh = nn.Linear(hidden, hidden, bias=False)
        + self.v_o = nn.Linear(hidden, 1, bias=False)
        = self.W_of = nn.Linear(d_object, hidden)
        = self.W_Th = nn.Linear(hidden, hidden, bias=False)
        + self.v_T = nn.Linear(hidden, 1, bias=False)
        = self.W_Tf = nn.Linear(d_object + d_FF, hidden)
        - G_o = torch.tanh(self.W_oh(h1) + self.W_of(F_o).squeeze(-1))
        + G_o = self.v_o(torch.tanh(self.W_oh(h1)[:, None] + self.W_of(F_o))).squeeze(-1)
        = G_t = self.v_T(torch.tanh(self.W_Th(h2) + self.W_Tf(S_t)))""",
    "T-numbers": "(9) W_Tf gives T numbers: every frame writes the whole series" + T_NUMBERS,
    "T-numbers-both": "(9) W_Tf and W_Th give T numbers" + T_NUMBERS + """
        = self.W_Th = nn.Linear(hidden, Planted.T, bias=False)""",
    "seen": """(8) over the frames seen so far
        - E = real
        + E = torch.zeros_like(real)""",
    "unseen-low": """(8) frames not yet seen at G = -1
        - E = real
        + E = real * np.exp(-1)""",
    "mix-before": """(10) before P_t: (7), (6) and (5) take the mixture
        - F_t = torch.einsum("bt,btd->bd", A_T, FF)
        - h2, c2 = self.LSTM_T(torch.cat([P, F_t], -1), (h2, c2))
        - logits = self.W_p(h2)
        - P = torch.softmax(logits, -1)
        - outputs.append((logits, P, A_o))
        + F_t = torch.einsum("bt,btd->bd", A_T, FF)
        + h2, c2 = self.LSTM_T(torch.cat([P, F_t], -1), (h2, c2))
        + logits = self.W_p(h2)
        + P = torch.softmax(logits, -1)
        + outputs.append((logits, P, A_o))""",
    "mix-none": """(10) left out
        - if self.training and t > 0:
        + if False:""",
    "mix-in-turn": """(10) its second line takes the first one's result
        - A_T[:, t] = (1 - beta) * old[:, t - 1] + beta * old[:, t]
        + A_T[:, t] = (1 - beta) * A_T[:, t - 1] + beta * old[:, t]""",
    "mix-all": """(10) all neighbouring pairs, from the first to the last
        - if self.training and t > 0:
        + for t in range(1, T if self.training else 0):""",
    "state": """(4) h2 is LSTM.S's state, in place of h1
        = self.LSTM_S = nn.LSTMCell(d_object, hidden)
        = h1, c1 = self.LSTM_S(F_o_bar, (h2, c1))""",
    "state-both": """(4) h2 and c2 are LSTM.S's state, in place of h1 and c1
        = self.LSTM_S = nn.LSTMCell(d_object, hidden)
        = h1, c1 = self.LSTM_S(F_o_bar, (h2, c2))""",
    "one-hot": """(6) takes the emotion of t-1, one-hot, in place of P
        - h2, c2 = self.LSTM_T(torch.cat([P, F_t], -1), (h2, c2))
        + emotion = nn.functional.one_hot(P.argmax(-1), P.shape[-1]) * (t > 0)
        + h2, c2 = self.LSTM_T(torch.cat([emotion, F_t], -1), (h2, c2))""",
    "uniform-start": """(6) P_0 = 1/C
        - P = FF.new_zeros(B, self.W_p.out_features)
        + P = FF.new_zeros(B, self.W_p.out_features) + 1 / self.W_p.out_features""",
    "no-W_oh": """(3) W_oh = 0: LSTM.S has no effect
        - G_o = torch.tanh(self.W_oh(h1) + self.W_of(F_o).squeeze(-1))
        + G_o = torch.tanh(self.W_of(F_o).squeeze(-1))""",
    "no-W_Th": """(9) W_Th = 0: LSTM.T does not steer T.Focus
        = G_t = torch.tanh(self.W_Tf(S_t))"""}

LOSSES = {
    "loss-last": """loss of the last frame
        - return ((frames * real).sum(1) / lengths).mean()
        + return frames[torch.arange(len(frames)), lengths - 1].mean()""",
    "loss-ten": """loss of the last ten frames
        - return ((frames * real).sum(1) / lengths).mean()
        + real = real - real_frames(logits, lengths - LAST_FRAMES)
        + return ((frames * real).sum(1) / real.sum(1)).mean()""",
    "loss-mean": """loss of the mean P of the last ten frames
        - return ((frames * real).sum(1) / lengths).mean()
        + real = real - real_frames(logits, lengths - LAST_FRAMES)
        + P = torch.einsum("bt,btc->bc", real, logits.softmax(-1)) / real.sum(1, keepdim=True)
        + return nn.functional.nll_loss(P.log(), labels)"""}


def with_lines(original, changes):
    """A class or function of dfan.py, changed as above; comments and indentation aside."""
    lines = inspect.getsource(original).splitlines()
    code = [line.split("#")[0].strip() for line in lines]
    for sign, line in re.findall(r"^ *([-=+]) (.*)", changes, re.MULTILINE):
        if sign in "-=":
            start = line if sign == "-" else line.split(" = ")[0] + " = "
            found = [n for n, own in enumerate(code) if own == line or sign == "=" and own.startswith(start)]
            assert len(found) == 1, f"{len(found)} lines of {original.__name__} are: {start}"
            n = found[0]
            indent = lines[n].split(code[n])[0]
            lines[n] = ""
        if sign in "=+":
            lines[n] += f"{indent}{line}\n"
    scope = {}
    exec("\n".join(lines), vars(dfan), scope)
    return scope[original.__name__]


# The first frame, from 0, whose P is another; 0 for all others: (10), say, acts on the next frame.
FIRST = {"mix-before": 1, "mix-none": 2, "mix-in-turn": 2, "mix-all": 1, "one-hot": 1, "no-W_Th": 1}


@pytest.mark.parametrize("name", READINGS)
def test_reading_runs_and_differs(name):
    *F, lengths = make_batch([dfan.Planted.T, dfan.Planted.T, 5])
    Reading = with_lines(dfan.DFAN, READINGS[name])
    for training in (True, False):
        ours = make_net(training=training)(*F, lengths)
        theirs = make_net(Reading, training)(*F, lengths)
        assert all(v.isfinite().all() for v in theirs.values())
        assert all(v.shape == ours[k].shape for k, v in theirs.items())
        moved = (theirs["P"] - ours["P"]).abs().amax((0, 2))  # (T,)
        if name.startswith("mix") and not training:
            assert moved.max() == 0, "(10) is for training only"
        else:
            assert (moved > 1e-6).nonzero().min() == FIRST.get(name, 0)
            assert (theirs["A_T"] - ours["A_T"]).abs().max() > 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_loss_reading_runs_and_differs(name):
    loss_fn = with_lines(dfan.loss_fn, LOSSES[name])
    logits = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(3))
    for n, same in ((1, True), (12, False)):  # of one frame they are all one
        inputs = logits[:, :n], torch.tensor([2, 0]), torch.tensor([n, min(n, 11)])
        ours, theirs = dfan.loss_fn(*inputs), loss_fn(*inputs)
        assert theirs.isfinite() and torch.allclose(ours, theirs) == same


def test_one_video_by_hand():
    """The README's table: the variables of DFAN.forward at each of three frames."""
    Traced = with_lines(dfan.DFAN, """
        - P = torch.softmax(logits, -1)
        + P = torch.softmax(logits, -1)
        + self.kept.append(dict(locals()))
        - outputs.append((logits, P, A_o))
        + outputs.append((logits, P, A_o))
        + self.kept[-1]["E after (10)"] = E""")
    net = Traced(d_action=1, d_scene=0, d_object=1, hidden=1, classes=2).double().requires_grad_(False)
    net.kept = []
    for p in net.parameters():
        p.zero_()                                                 # but for these:
    net.W_of.weight[:] = 2                                        # G_o = tanh(2 F_o)
    net.W_Tf.weight[:] = torch.tensor([4, 1])                     # G_t = tanh(4 F_o_hat + F_A - 2)
    net.W_Tf.bias[:] = -2
    net.LSTM_T.bias_ih[:] = torch.tensor([1000, -1000, 0, 1000])  # i = 1, f = 0, o = 1
    net.LSTM_T.weight_ih[2, 2] = 2                                # h2 = tanh(tanh(2 F_t))
    net.W_p.weight[:] = torch.tensor([[2], [-2]])                 # P = softmax(2 h2, -2 h2)
    F_A = torch.tensor([-0.5, 1, -1], dtype=torch.float64)
    F_O = torch.tensor([[0.2, 0.1], [0.9, 0.1], [0.3, 0.2]], dtype=torch.float64)
    for training in (True, False):
        net.train(training)(F_A.view(1, 3, 1), torch.zeros(1, 3, 0), F_O.view(1, 3, 2, 1))
    names = ["A_o", "F_o_hat", "G_t", "E", "A_T", "F_t", "h2", "P", "E after (10)"]
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert f"| t | {' | '.join(names)} |" in readme
    for t, kept in zip([1, 2, 3, "3, without (10)"], net.kept[:3] + net.kept[5:]):
        cells = [" ".join(f"{v:.3f}" for v in kept[name].flatten()) for name in names]
        assert f"| {t} | {' | '.join(cells)} |" in readme
    assert [kept["P"].argmax().item() for kept in net.kept[3:]] == [1, 0, 0], "sad, joy, joy"


# ---- Features, in a folder f; results go to a folder o ----

@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_feats(folder="f", classes=("anger", "joy"), n=4, K=3, d_object=6, **settings):
    """Small feature files whose action feature carries the class; lists of even and odd videos beside them."""
    rng = np.random.default_rng(0)
    ids = [f"{name}/{name}_{i}" for name in classes for i in range(n)]
    for number, identity in enumerate(ids):
        path = Path(folder, f"{identity}.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        T = int(rng.integers(3, 15))
        F = dict(action=rng.normal(size=(T, 7)), scene=rng.random((T, 5)), objects=rng.random((T, K, d_object)))
        F["action"][:, number // n] += 2
        F["scene"][:, 4] = 0.7  # a constant column
        half = {name: v.astype(np.float16) for name, v in F.items()}
        np.savez(path, **half, frames=8 * np.arange(T), seconds=np.arange(T) / 3,
                 inside=np.arange(T) < 2, settings=json.dumps(settings))
    for name in ("lost+found", "@eaDir", ".x"):  # no classes
        Path(folder, name).mkdir(exist_ok=True)
    for name, part in (("train", ids[::2]), ("test", ids[1::2])):
        Path(folder, f"{name}list01.txt").write_text("".join(f"{i} 1\n" for i in part))


def change(path, **arrays):
    np.savez(path, **dict(np.load(path)) | arrays)


SMALL = "--hidden 4 --epochs 2 --batch 4 --device cpu"


def train(*argv):
    """dfan.main in this process, small; words or whole commands. Returns what --out holds of run 0."""
    argv = f"{SMALL} {' '.join(map(str, argv))}".split()
    dfan.main(argv)
    path = Path(argv[argv.index("--out") + 1], "run0.pt")
    return dfan.load_checkpoint(path) if path.exists() else None


def predict(line):
    return dfan.main(f"--device cpu --out . --predict {line}".split())


def refusal(call, *argv):
    with pytest.raises(dfan.InputError) as caught:
        call(*argv)
    return str(caught.value)


def test_bad_features_are_named():
    write_feats(n=1, every=8)
    path = Path("f/joy/joy_0.npz")
    whole = path.read_bytes()
    F = dict(np.load(path))
    scene, seconds = F["scene"], F["seconds"]
    read = partial(refusal, dfan.read_features, path, dfan.FEATURES, dfan.DIMENSIONS)
    for changed in [
            dict(scene=scene + np.nan), dict(scene=scene[1:]), dict(scene=scene + 1j), dict(objects=scene),
            dict(scene=scene.astype("M8[s]")), dict(scene=scene[:, 0]), dict(scene=scene.astype(str)),
            dict(inside=seconds + np.nan), dict(pictures=np.array([b"x"])), dict(scene=np.array([None])),
            {k: v[:0] for k, v in F.items() if v.ndim}, dict(settings="[[1,2]]"), dict(scene=scene[:, :0])]:
        np.savez(path, **F | changed)
        assert read().startswith(f"{path}: "), changed
    for damaged in (whole[:len(whole) // 2], b"", b"not a zip"):
        path.write_bytes(damaged)
        assert read().startswith(f"{path}: "), damaged
    np.savez(path, **F)
    assert "seconds" in refusal(dfan.read_features, path, ["seconds"]), "no (T,D), though there"
    F.pop("scene")
    np.savez(path, **F)
    assert "holds ['action', 'objects', 'frames', 'seconds', 'inside', 'settings'], not all of" in read()


def test_statistics_are_of_training_videos_only():
    F = np.random.default_rng(0).normal(size=(3, 9, 5))  # the last of three videos is for validation
    F[:, :, 1] = 0.7
    F[:, :, 2] *= 1e-33
    F[:2, :, 3] = 1e3 + 0.7
    videos = [dict(action=F_A, scene=F_S) for F_A, F_S in zip(*torch.from_numpy(F).float().split([2, 3], -1))]
    args = Namespace(features=("action", "scene"), objects=16)
    mean, scale = dfan.column_statistics(Namespace(load=videos.__getitem__), [0, 1], args).numpy()
    assert np.allclose(mean, F[:2].mean((0, 1)), rtol=1e-5)
    deviation = F[:2].std((0, 1))
    assert np.allclose(scale[[0, 4]], 1 / deviation[[0, 4]], rtol=1e-5)
    assert scale[1:4].tolist() == [0, 0, 0], "constant columns become zero"


# ---- Split lists and protocols ----

def test_lists_name_videos():
    ids = ["x/a [1].mp4", "x/v1", "x/v1.0", "y/it's 2", "y/it's", "y/7", "y/Café", "x/z", "y/z"]
    lines = {
        "x/v1 1\ny/7": [1, 5], "x/v1.mp4 1\r\nx\\v1.0\t0\r\n": [1, 2], "\ufeffv1\n\nv1 1\n7 2": [1, 5],
        "x/a [1].mp4 1": [0], "x/a [1].mp4.MP4": [0], "it's 2": [3], "y/it's 2 4": [3], "y/it's 4": [4],
        "Café.avi 4": [6], "x/v1.7\nx/it's\nz": []}  # never another video, none of two
    for text, expected in lines.items():
        Path("list.txt").write_text(text, encoding="utf-8", newline="")
        found, missing = dfan.read_list("list.txt", ids)
        assert found == expected, text
        assert missing == ([] if found else text.split("\n")), text


def test_lists_that_do_not_fit(capsys):
    write_feats()
    training = Path("f/trainlist01.txt")
    command = "--data f --out o"
    train(command, "--split", training.rename("latest.txt"), "f/testlist01.txt")
    message = refusal(train, command)
    assert "f/trainlist01.txt: " in message
    assert "--dataset videoemotion" in message
    assert "a folder of <class>/<name>.npz" in refusal(train, "--data one.npz --out o"), "what --data is"
    training.write_text("anger/anger_0\njoy/joy_0\njoy/joy_1\n")
    assert refusal(train, command).startswith("joy/joy_1: in both lists")
    training.write_text("videos/x/y.mp4 1\nanger/anger_0\n")
    assert "split 0: no training video of joy" in refusal(train, command)
    assert "missing  f/trainlist01.txt: ['videos/x/y.mp4']" in capsys.readouterr().out


def test_videoemotion_draws_ten_splits():
    write_feats(n=9)
    data = dfan.Features("f", dfan.FEATURES)
    splits = dfan.make_splits(data, Namespace(split=[], seed=5, data="f"))
    assert len({tuple(sorted(training)) for training, _ in splits}) == 10
    for training, test in splits:
        assert sorted([*training, *test]) == list(range(18))
        assert np.bincount([data.labels[i] for i in training]).tolist() == [6, 6]
    write_feats(classes=["calm"], n=1)
    assert "needs three videos of each class" in refusal(train, "--data f --dataset videoemotion --out o")


# ---- The same command goes on ----

def assert_same_run(a, b):
    assert a["history"] == b["history"]
    for name, v in a["model"].items():
        assert torch.equal(v, b["model"][name]), name


def test_broken_checkpoints_are_named():
    write_feats()
    saved = train("--data f --out o")
    path = Path("o/run0.pt")
    good = path.read_bytes()
    weight = saved["model"]["W_p.weight"].numpy()
    place = good.index(weight.tobytes())
    one_bit = good[:place] + bytes([good[place] ^ 64]) + good[place + 1:]
    weight[0, 0] = np.inf
    lacking = {key: value for key, value in saved.items() if key != "standard"}
    for content in (good[:1000], b"", b'{"model": 1}', one_bit, {"epoch": 3}, [1], saved, lacking):
        torch.save(content, path)
        if isinstance(content, bytes):
            path.write_bytes(content)
        message = refusal(train, "--data f --out o")
        assert message.startswith("o/run0.pt: "), content
        assert not re.search("delete|remove", message), "it may be a result"


def test_two_jobs_give_the_numbers_of_one(capsys):
    write_feats(n=3)
    argv = f"{SMALL} --data f --dataset videoemotion --out o".split()
    script = [sys.executable, HERE / "dfan.py", *argv, "--jobs", "2"]
    two = subprocess.run(script, stdout=subprocess.PIPE, text=True).stdout
    shutil.move("o", "two")
    train(*argv)
    one = capsys.readouterr().out
    for n in range(10):
        assert_same_run(*(torch.load(f"{o}/run{n}.pt", weights_only=True) for o in ("o", "two")))
    one, two = (sorted(re.sub(r"[\d.]+ s, \d+ s left", "", v).splitlines()) for v in (one, two))
    assert one == two, "each line whole"


def test_killed_training_goes_on_to_the_same_results():
    write_feats(n=8)
    argv = f"{SMALL} --data f --out o --epochs 40".split()
    more = [*argv, "--epochs", "41"]
    undisturbed = train(*more)
    assert len(undisturbed["history"]) == 41
    results = Path("o/results.json").read_bytes()
    shutil.rmtree("o")
    Path(f"o/.part-{zlib.crc32(b'run0.pt')}-before").mkdir(parents=True)  # left by another kill
    victim = subprocess.Popen([sys.executable, HERE / "dfan.py", *argv], stdout=subprocess.DEVNULL)
    while not Path("o/run0.pt").exists():
        assert victim.poll() is None
        time.sleep(0.01)
    victim.kill()
    assert victim.wait() == -9
    assert len(dfan.load_checkpoint("o/run0.pt")["history"]) < 40
    assert_same_run(train(*more), undisturbed)
    assert Path("o/results.json").read_bytes() == results
    assert not list(Path("o").glob(".part-*"))
    message = refusal(train, *more, "--lr 0.5 --hidden 5")
    assert message.startswith("o/run0.pt: trained with other hidden, lr;")
    assert "other epochs;" in refusal(train, *argv), "fewer"
    change("f/joy/joy_1.npz", scene=np.load("f/joy/joy_1.npz")["scene"] + 1)
    assert "other feature_files;" in refusal(train, *more), "of the same names"


# ---- Results ----

def numbers(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if re.search(r"\d\.\d", line)]


def read_json(path):
    return json.loads(Path(path).read_text(), parse_constant=pytest.fail)  # no NaN


@pytest.mark.parametrize("mark, settings, more", [
    ("RANDOM WEIGHTS", dict(random_weights=0), ""), ("1 MISSING of trainlist01.txt", {}, "x/lost 1\n"),
    ("1 LEAKED", dict(tuned_on=["anger/anger_0", "joy/joy_1"]), "")])
def test_marks_stand_on_every_number(capsys, mark, settings, more):
    write_feats(**settings)
    Path("f/trainlist01.txt").write_text(Path("f/trainlist01.txt").read_text() + more)
    train("--data f --out o")
    change("f/joy/joy_1.npz", settings="{}")  # unmarked: the network's mark goes on
    predict("f/joy/joy_1.npz --checkpoint o/run0.pt")
    for line in numbers(capsys):
        assert line.endswith(f"  {mark}")
    for path in ("o/results.json", "joy_1.json"):
        assert read_json(path)["marks"] == [mark]


def test_results_are_of_the_last_epoch(capsys, monkeypatch):
    accuracies = iter([0.2, 0.9, 0.4, 0.4, 0.2, 0.9, 0.6, 0.6])  # three epochs and the last once more, twice
    evaluate = dfan.evaluate
    monkeypatch.setattr(dfan, "evaluate", lambda *args: (evaluate(*args)[0], next(accuracies)))
    write_feats()
    train("--data f --epochs 3 --runs 2 --out o")
    assert re.search(r"\nresult +n = 2  accuracy 50\.00 ± 14\.14\n", capsys.readouterr().out)
    runs = read_json("o/results.json")["rows"]["result"]
    assert [r["accuracy"] for r in runs] == [0.4, 0.6]
    assert [e["accuracy"] for e in runs[1]["history"]] == [0.2, 0.9, 0.6]


def test_tables_by_hand(capsys):
    """Two rows of two runs: 50 and 60 %, 70 and 60 %."""
    def table(runs=2, splits=1):
        scores = {"Max. Pool": [0.5, 0.6], "Avg. Pool": [0.7, 0.6]}
        scores = {row: [dict(accuracy=a) for a in pair[:runs]] for row, pair in scores.items()}
        dfan.print_table(scores, [(range(20), range(10))] * splits, Namespace(marks=[]))
        return " ".join(numbers(capsys))

    assert "65.00 ± 7.07  to the row above +10.00 ± 10.00" in table(), "sqrt(1/2 * 200)"
    assert "+10.00 ± 14.14" in table(splits=2), "Nadeau and Bengio: sqrt((1/2 + 10/20) * 200)"
    assert "±" not in table(runs=1)
    # figure 3, of two runs of the last row: of three angry videos one is taken for joy, of two joyful ones both
    runs = [dict(predictions=[["a", "anger", predicted, 0.5], ["j", "joy", "anger", 0.5]][:n])
            for predicted, n in (("anger", 2), ("joy", 2), ("anger", 1))]
    dfan.print_confusion(dict(first=[], last=runs), Namespace(classes=["anger", "joy"], marks=["M"]))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [["last", "count", "anger", "joy"], ["anger", "3", "0.67", "0.33", "M"], ["joy", "2", "1.00", "0.00", "M"]]


def test_planted_set_with_its_check_picture_and_table_2(capsys, monkeypatch):
    monkeypatch.setattr(dfan.Planted, "TRAIN", 12)
    monkeypatch.setattr(dfan.Planted, "TEST", 6)
    dfan.main("--epochs 1 --device cpu".split())
    assert "below 0.9" in capsys.readouterr().out
    assert read_json("out/planted/figure4.json")["objects"][0][0]["name"] in dfan.Planted.extraction["object_names"]
    assert Path("out/planted/figure4.svg").exists()
    train("--features scene --reproduce table2 --out o")
    assert "left out  T.Focus + O.Focus: no objects" in capsys.readouterr().out
    assert list(read_json("o/table2.json")["rows"]) == ["Max. Pool", "Avg. Pool", "T.Focus"]
    assert dfan.load_checkpoint("o/avg/run0.pt")["settings"]["fusion"] == "avg"


# ---- Prediction and its picture ----

NAMES = ["key", "lamp", "chair", "cup", "door"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write_feats(folder / "f", d_object=9, every=8, object_names=NAMES)
    train(f"--data {folder}/f --out {folder}/o")
    return folder


def test_predictions_are_the_oracle(trained, capsys):
    F = np.load(trained / "f/joy/joy_1.npz")
    files = [*map(np.load, sorted(trained.glob("f/*/*_[02].npz"))), F]
    *training, FF = [np.concatenate([f["action"], f["scene"]], 1).astype(float) for f in files]
    training = np.concatenate(training)
    deviation = training.std(0)
    deviation[-1] = np.inf  # the constant column becomes zero
    x = (FF - training.mean(0)) / deviation
    net = dfan.DFAN(7, 5, 9, 4, 2)
    net.load_state_dict(torch.load(trained / "o/run0.pt", weights_only=True)["model"])
    out = oracle(net, x[:, :7], x[:, 7:], F["objects"].astype(float), False)
    votes = np.bincount(out["P"][-10:].argmax(1), minlength=2)
    emotion = ("anger", "joy")[votes.argmax()]
    np.savez("narrow.npz", **dict(F) | dict(action=F["scene"]))
    checkpoint = f"--checkpoint {trained}/o/run0.pt"
    assert predict(f"narrow.npz none.npz notes.txt {trained}/f/joy/joy_1.npz {checkpoint}") == 1
    failed = re.findall(r"^FAILED   (\w+)\.\w+: ", capsys.readouterr().out, re.MULTILINE)
    assert failed == ["narrow", "none", "notes"], "the others are predicted"
    assert refusal(predict, f"x/a.npz a.npz {checkpoint}").startswith("--predict a: two of one name")
    assert refusal(predict, f"a.npz results.npz {checkpoint}").startswith("--predict results: ")
    found = read_json("joy_1.json")
    assert found["emotion"] == emotion
    assert np.allclose(found["attention"], out["A_T"] * len(out["A_T"]), atol=1e-4)
    assert np.allclose(found["P"]["joy"], out["P"][:, 1], atol=1e-5)
    assert np.allclose(list(found["probabilities"].values()), out["P"][-10:].mean(0), atol=1e-5)
    for A_o, F_o, objects in zip(out["A_o"], F["objects"].astype(float), found["objects"]):
        order = A_o.argsort()[::-1]
        assert np.allclose([o["attention"] for o in objects], 3 * A_o[order], atol=1e-4)
        assert [o["name"] for o in objects] == [NAMES[F_o[k, :5].argmax()] for k in order]
        assert np.allclose([o["box"] for o in objects], F_o[order, 5:])
    header, *rows = [line.split(",") for line in Path(trained, "o/predictions.csv").read_text().splitlines()]
    assert header == ["row", "run", "video", "true", "predicted", "anger", "joy"]
    row = next(row for row in rows if row[2] == "joy/joy_1")
    assert row[:5] == ["result", "0", "joy/joy_1", "joy", emotion]
    assert np.allclose([float(p) for p in row[5:]], out["P"][-10:].mean(0), atol=1e-5)
    run = read_json(trained / "o/results.json")["rows"]["result"][0]
    assert run["accuracy"] == np.mean([row[3] == row[4] for row in rows])


def test_picture():
    SVG = "{http://www.w3.org/2000/svg}"
    box = [0.1, 0.2, 0.5, 0.6]
    objects = [[dict(name=name, probability=.9, attention=a, box=box) for name, a in zip(NAMES, attention)]
               for attention in [(2.5, 1, 0.4)] * 7 + [(1.29, 1, 0.71)]]
    seen = dict(
        video="\U0001f600 <&\"'\x07\udcff", emotion="joy", marks=["LEAKED"], moments=[0, 7], objects=objects,
        attention=np.linspace(0.5, 1.5, 8), P={"jo\x01y<": [1] * 8}, times=[f"{t}.0 s" for t in range(8)])
    jpegs = np.array([b"jpeg %d" % t for t in range(8)])
    root = ET.fromstring("".join(dfan.draw(seen, dict(aspect=2, pictures=jpegs))))
    words = [text.text for text in root.iter(f"{SVG}text")]
    first, last, A_T, _ = root.findall(f"{SVG}svg")
    assert words[0] == "\U0001f600 <&\"'??: joy  LEAKED"
    boxes = first.findall(f"{SVG}rect[@fill='none']")
    places = [[float(box.get(key)) for key in ("x", "y", "width", "height")] for box in boxes]
    assert places == [[0.2, 0.2, 0.8, 0.4]] * 3, "box times aspect"
    assert boxes[0].get("stroke") == "hsl(120,50%,60%)", "2.5 is half of the way from 1 to 4"
    assert "1 key 0.90, attention 2.50 x" in words
    assert last.find(f"{SVG}image").get("href") == "data:image/jpeg;base64,anBlZyA3", "jpeg 7"
    curve = [p.get("d") for p in A_T.iter(f"{SVG}path")][-1]
    heights = [2 - float(y) for y in re.findall(r"(?:M0 |V)([\d.]+)", curve)]
    assert np.allclose(heights, np.linspace(0.5, 1.5, 8), atol=2e-3)
    assert {"0", "0.5", "1", "2", "0.0 s", "7.0 s"} <= set(words), "the axes' numbers"
    assert words.count("objects nearly uniform") == 1, "at the last moment"
    alone = seen | dict(objects=[objects[7][:1]])
    assert "objects nearly uniform" not in dfan.captions(alone, 0), "one object gets all"


# ---- The command line ----

@pytest.mark.parametrize("line", [
    "--beta 2", "--lr nan", "--lr 2", "--seed -1", "--seed 12345678901234567890", "--epochs 0", "--epochs x",
    "--objects 0", "--features audio", "--resume", "--split a b", "--split a --data f", "--out f/o --data f",
    "--out file/o", "--device cuda:99", "--reproduce table3", "--objects 4 --features scene --data f",
    "--checkpoint x", "--dataset videoemotion", "--runs 2 --dataset videoemotion --data f",
    "--runs 2 --data f --split a b c d", "--dataset videoemotion --split a b --data f",
    "--split Testset Trainset --data f", "--data f --predict x"])
def test_wrong_options(line, capsys, monkeypatch):
    Path("file").touch()
    monkeypatch.setattr(dfan, "train_rows", None)  # nothing is trained, even where this fails
    with pytest.raises(SystemExit, match="^2$"):
        dfan.command(partial(dfan.main, line.split()))
    said = capsys.readouterr().err.removeprefix("usage: dfan.py [options]\n")
    assert said.count("\n") == 1
    assert line.split()[0] in said


@pytest.mark.parametrize("error, said", [
    (MemoryError(), "--batch"), (RuntimeError("CPUAllocator: can't allocate memory"), "--batch"),
    (torch.cuda.OutOfMemoryError("out of memory"), "--batch"), (KeyboardInterrupt(), "same command"),
    (ZeroDivisionError(), ""), (RuntimeError("sizes differ"), ""), (AssertionError(), "")])
@pytest.mark.parametrize("line", ["--data {0}/f", "--predict {0}/f/joy/joy_1.npz --checkpoint {0}/o/run0.pt"])
def test_what_the_network_raises(trained, capsys, monkeypatch, error, said, line):
    monkeypatch.setattr(dfan, "focus", Mock(side_effect=error))
    with pytest.raises(SystemExit if said else type(error)):  # a fault of ours is a traceback
        dfan.command(partial(dfan.main, line.format(trained).split()))
    assert re.fullmatch(f".*{said}.*\n" if said else "", capsys.readouterr().err)


def test_a_fault_in_the_drawing_is_a_traceback(trained, monkeypatch):
    monkeypatch.setattr(dfan, "draw_panel", Mock(side_effect=ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        predict(f"{trained}/f/joy/joy_1.npz --checkpoint {trained}/o/run0.pt")


@pytest.mark.parametrize("flag, end, said", [
    ("-O", "", r"\w+/\w+: in both lists .*\n"), ("", ">&-", ""), ("", "| head -1", "")])
def test_as_a_script(flag, end, said):
    write_feats()
    if flag:
        shutil.copy("f/trainlist01.txt", "f/testlist01.txt")
    line = f"{sys.executable} {flag} {HERE}/dfan.py {SMALL} --data f --out o {end}"
    assert re.fullmatch(said, subprocess.run(["bash", "-c", line], capture_output=True, text=True).stderr)


# ---- Extraction, from a folder v to a folder f ----

DETECTOR = "fasterrcnn_mobilenet_v3_large_320_fpn"
TRY = f"--random-weights --detector {DETECTOR} --device cpu"


def run_on(line):
    return extract.main(f"{TRY} {line}".split())


def touch(*paths):
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_video(path, n=9, h=48, w=64, codec="mp4v", seed=0, shifts=None):
    """n frames of a texture that moves to the left, 2 pixels a frame or as `shifts` says."""
    touch(path)
    noise = np.random.default_rng(seed).integers(0, 256, (max(1, h // 4), w // 2, 3), np.uint8)
    wide = cv2.resize(noise, (2 * w, h), interpolation=cv2.INTER_CUBIC)
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 24., (w, h))
    for shift in shifts or range(0, 2 * n, 2):
        video.write(np.roll(wide, -shift, 1)[:, :w])
    video.release()


def samples_of(path, every=8, flow=True):
    return list(extract.read_video(path, every, flow, []))


def normalised(samples, name):
    x = torch.from_numpy(np.stack([s[name] for s in samples])).permute(0, 3, 1, 2) / 255
    return torchvision.transforms.functional.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize("n, flow", [(1, True), (5, True), (8, False), (33, True)])
def test_one_frame_in_eight_to_the_end(n, flow):
    write_video("a.mp4", n)
    samples = samples_of("a.mp4", flow=flow)
    assert [s["number"] for s in samples] == list(range(0, n, 8))
    assert [s["seconds"] for s in samples] == pytest.approx(np.arange(0, n, 8) / 24, abs=1e-3)
    video = cv2.VideoCapture("a.mp4")
    frames = [video.read()[1] for _ in range(n)]
    for s in samples:
        assert np.array_equal(s["frame"][..., ::-1], frames[s["number"]])
        assert s["rgb"].shape == s["scene"].shape == (224, 224, 3)
        assert not flow or s["flow"].shape == (224, 224, 10)


def test_flow_is_of_the_five_pairs_around_the_frame():
    at = 17  # the one move: after this frame, by 4 pixels
    write_video("a.mp4", h=96, w=128, shifts=[4 * (t > at) for t in range(30)])
    for s in samples_of("a.mp4"):
        fields = s["flow"].reshape(224, 224, 5, 2)[60:160, 60:160, :, 0]
        x = fields.mean((0, 1)) / 255 * 40 - 20
        first = min(max(0, s["number"] - 2), 30 - 6)  # shifted inwards at the ends
        expected = [-4 if first + i == at else 0 for i in range(5)]
        assert np.abs(x - expected).max() < 0.7, s["number"]


def test_detector_rows_are_the_models_own_detections():
    model = extract.build([DETECTOR], {}, 0, "cpu")["objects"]
    model.roi_heads.score_thresh = 0.011  # of random scores, about 1/91, some and not all
    frames = [torch.rand(3, 120, 160) for _ in range(2)]
    with torch.inference_mode():
        theirs = model(frames)
        model.roi_heads.box_roi_pool.scales = None  # as in a new model
        extract.detect(model, [torch.rand(3, 20, 2000)])  # another video, first
        F_O = extract.detect(model, frames)
    for F_o, own in zip(F_O, theirs):
        n = min(16, len(own["scores"]))
        assert n > 0
        assert (F_o[n:] == 0).all()
        assert torch.allclose(F_o[:n, -4:], own["boxes"][:n] / torch.tensor([160, 120, 160, 120]), atol=1e-5)
        for row, score, label in zip(F_o, own["scores"], own["labels"]):
            if label in extract.COCO_80:
                assert row[extract.COCO_80.index(label)] == score


def as_mmaction2(key):
    """The same parameter in mmaction2's TSN, from the layouts in its model zoo."""
    for old, new in ((r"downsample\.0", "downsample.conv"), (r"downsample\.1", "downsample.bn"),
                     (r"\bconv(\d)\.", r"conv\1.conv."), (r"\bbn(\d)\.", r"conv\1.bn.")):
        key = re.sub(old, new, key)
    return "cls_head.fc_cls." + key[3:] if key.startswith("fc.") else "backbone." + key


def publish(network, state, monkeypatch):
    """A weight file with the hash that extract_features.py will expect of it. Returns its path."""
    torch.save(state, "new.pth")
    sha256 = extract.describe(Path("new.pth")).split()[-1]
    path = Path("new.pth").rename(f"{network}-{sha256[:8]}.pth")
    monkeypatch.setitem(extract.URLS, network, [f"http://127.0.0.1:9/{path}"])
    if network == "scene":
        monkeypatch.setattr(extract, "PLACES_SHA256", sha256)
    return path


def test_published_layouts_load_and_features_are_theirs(capsys, monkeypatch):
    vision = torchvision.models
    rgb, flow = vision.resnet50(num_classes=400), vision.resnet50(num_classes=400)
    flow.conv1 = nn.Conv2d(10, 64, 7, stride=2, padding=3, bias=False)
    scene = vision.resnet18(num_classes=365)
    detector = getattr(vision.detection, DETECTOR)(weights=None, weights_backbone=None)
    for name, model, rename in (("action_rgb", rgb, as_mmaction2), ("action_flow", flow, as_mmaction2),
                                ("scene", scene, "module.{}".format), (DETECTOR, detector, str)):
        state = model.eval().state_dict()
        state = {rename(key): v for key, v in state.items() if "num_batches" not in key}
        path = publish(name, dict(state_dict=state), monkeypatch)
    write_video("v/joy/a.mp4")
    write_video("v/joy/thin.avi", 2, 2, 1400, "MJPG")  # a network's RuntimeError
    assert extract.main(f"v f --weights . --device cpu --detector {DETECTOR}".split()) == 1
    assert re.search(r"\] joy/thin.*\nFAILED   v/joy/thin.avi: \w", capsys.readouterr().out)
    assert os.listdir("f/joy") == ["a.npz"], "which it does not end"
    f = np.load("f/joy/a.npz")
    assert f"{path} sha256" in str(f["settings"])
    samples = samples_of("v/joy/a.mp4")
    fields = torch.from_numpy(np.stack([s["flow"] for s in samples])).permute(0, 3, 1, 2)
    rgb.fc = flow.fc = nn.Identity()
    with torch.inference_mode():
        action = (rgb(normalised(samples, "rgb")) + flow((fields - 128.) / 128)) / 2
        outputs = scene(normalised(samples, "scene"))
    assert f["action"] == pytest.approx(action.numpy(), rel=1e-3, abs=1e-3)
    assert f["scene"] == pytest.approx(outputs.numpy(), rel=1e-3, abs=1e-3)


def test_wrong_weights_are_refused(monkeypatch):
    state = extract.build(["scene"], {}, 0, "cpu")["scene"].state_dict()
    path = publish("scene", state | dict(more=torch.ones(1)), monkeypatch)
    said = refusal(extract.build, ["scene"], dict(scene=path), 0, "cpu")
    assert "not the weights of this network" in said
    path.write_bytes(b"")
    assert re.search("sha256.*published", refusal(extract.find_weights, "scene", "."))
    monkeypatch.setenv("TORCH_HOME", "cache")
    said = refusal(extract.find_weights, "scene", "nowhere")
    assert re.search("scene.*pth: <urlopen error.*get it from http.*--weights DIR", said)


def start():
    argv = [sys.executable, "-O", HERE / "extract_features.py", "v", "f", *TRY.split()]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def test_two_processes_share_a_folder_for_training(capsys):
    ids = [f"{('anger', 'joy')[i % 2]}/clip[{i}].v1" for i in range(12)]
    for i, identity in enumerate(ids):
        size = {7: (16, 256), 9: (20, 2000)}.get(i, (48, 64))  # DIS crashes below 32 rows
        write_video(f"v/{identity}.mp4", 30 if i == 5 else 8, *size, seed=i)
    for name, listed in dict(train=ids[:8], test=ids[8:]).items():
        Path(f"v/{name}list01.txt").write_text("\n".join(listed))
    both = [start(), start()]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    works = [len(re.findall(r"\n\[.*clip", text)) for text in printed]
    assert min(works) >= 1
    assert 12 <= sum(works) <= 14
    assert len(list(Path("f").glob("*/*.npz"))) == 12
    assert not list(Path("f").glob("**/.part-*"))
    f = np.load("f/joy/clip[5].v1.npz")
    assert {name: (f[name].dtype, f[name].shape) for name in dfan.FEATURES} == dict(
        action=("float16", (4, 2048)), scene=("float16", (4, 365)), objects=("float16", (4, 16, 84)))
    scores = f["objects"][..., :80].max(-1)
    assert (np.diff(scores, axis=1) <= 2e-3).all(), "the most probable first"
    assert f["frames"].tolist() == [0, 8, 16, 24]
    assert f["aspect"] == pytest.approx(64 / 48)
    settings = json.loads(str(f["settings"]))
    assert settings["proposals"] == 150
    assert settings["object_names"][::79] == ["person", "toothbrush"]
    samples = samples_of("v/joy/clip[5].v1.mp4", flow=False)
    for jpeg, sample in zip(f["pictures"], samples, strict=True):
        picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        assert np.abs(picture - cv2.resize(sample["frame"], (192, 144)).astype(int)).mean() < 10
    train("--data f --out o")
    assert "training 8: anger 4, joy 4" in capsys.readouterr().out


def test_a_killed_run_goes_on_to_the_same_bytes(capsys):
    for i in range(5):
        write_video(f"v/joy/{i}.mp4", 8, seed=i)
    assert run_on("v whole") == 0
    victim = start()
    for line in victim.stdout:
        if line.startswith("[3/5]"):
            break
    time.sleep(0.2)
    victim.kill()
    assert victim.wait() == -9
    assert run_on("v f") == 0
    assert "2 finished before, 3 to do" in capsys.readouterr().out
    made, whole = ({path.name: path.read_bytes() for path in Path(f, "joy").iterdir()} for f in ("f", "whole"))
    assert made == whole


@pytest.fixture
def quick(monkeypatch):
    """Networks that cost nothing."""
    def features_of(samples, models, device):
        return dict.fromkeys(dfan.FEATURES, np.array([[s["rgb"].mean()] for s in samples]))

    monkeypatch.setattr(extract, "build", Mock())
    monkeypatch.setattr(extract, "features_of", features_of)


def test_processes_of_torchrun_share_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", Mock(return_value=True))
    monkeypatch.setattr(torch.cuda, "device_count", Mock(return_value=2))
    monkeypatch.setattr(torch, "zeros", Mock())
    for local in range(4):
        monkeypatch.setattr(extract, "LOCAL", local)
        assert extract.parse_args(["a.mp4", "f"]).device == f"cuda:{local % 2}"


def test_finished_damaged_and_stale(quick, capsys):
    paths = [Path(f"f/joy/{name}.npz") for name in "abc"]
    for path in paths:
        write_video(f"v/joy/{path.stem}.mp4", 8)
    Path("v/train.txt").write_text("joy/b")
    run_on("v f")
    made = [path.read_bytes() for path in paths]
    flipped = bytearray(made[0])
    flipped[made[0].index(b"JFIF") + 50] ^= 1  # one bit of a picture
    paths[0].write_bytes(flipped)
    paths[1].write_bytes(made[1][:999])
    assert run_on("v f") == 0
    assert "1 finished before, 2 to do" in capsys.readouterr().out
    assert [path.read_bytes() for path in paths] == made
    assert re.search("every 8 .now 4..*--overwrite", refusal(run_on, "v f --every 4"))
    assert run_on("v f --overwrite --every 4") == 0
    assert np.load(paths[2])["frames"].tolist() == [0, 4]
    np.savez(paths[0], audio=np.ones((3, 4)))  # the user's own
    assert "a.npz: made otherwise: " in refusal(run_on, "v f --every 4")
    Path("v/train.txt").write_text("calm/b")
    Path("v/joy").rename("v/calm")
    assert run_on("v f") == 0
    out = capsys.readouterr().out
    assert "train.txt differed" in out
    assert Path("f/train.txt").read_text() == "calm/b"
    assert "WARNING  3 features without a video, which drawn splits count: ['joy/a', " in out


def test_single_videos_and_what_ends_a_run(quick, capsys, monkeypatch):
    write_video("a.mp4", 60)
    shutil.copy("a.mp4", "--overwrite.mp4")
    assert run_on("--batch 2 -- a.mp4 none.mp4 --overwrite.mp4 f") == 1
    assert "FAILED   none.mp4: no file" in capsys.readouterr().out
    assert sorted(os.listdir("f")) == ["--overwrite.npz", "a.npz"]
    assert run_on("--batch 100 a.mp4 one") == 0
    assert Path("f/a.npz").read_bytes() == Path("one/a.npz").read_bytes(), "whatever the batch"
    write_video("other/a.mp4", 20)
    assert run_on("other/a.mp4 f") == 1
    assert "other/a.mp4: f/a.npz was made from another video" in capsys.readouterr().out
    assert "a.npz: Not a directory" in refusal(run_on, "a.mp4 a.mp4/f")
    monkeypatch.setattr(np, "savez", Mock(side_effect=OSError(28, "No space left on device")))
    assert "a.npz: No space left on device" in refusal(run_on, "a.mp4 full")
    assert not os.listdir("full")


def test_odd_files(quick, capsys):
    write_video("v/joy/base.MP4")
    base = Path("v/joy/base.MP4").read_bytes()
    good = "clip[1] & it's.v1", "\U0001f600", "--help", "100%d", "end."
    broken = dict(empty=b"", zeros=bytes(5000), half=base[:len(base) // 2],
                  av1=base.replace(b"mp4v", b"av01").replace(b"esds", b"free"))
    for name, content in (dict.fromkeys(good, base) | broken).items():
        Path(f"v/joy/{name}.mp4").write_bytes(content)
    Path(os.fsdecode(b"v/joy/\xff.mp4")).write_bytes(base)  # OpenCV 5.0 crashes on it
    long = "n" * 252  # with .npz 256 characters
    Path(f"v/joy/{long}.ts").write_bytes(base)
    Path("v/joy/dangling.mp4").symlink_to("nowhere.mp4")
    Path("v/joy/loop.mp4").symlink_to("loop.mp4")
    os.mkfifo("v/joy/pipe.mp4")
    sys.stdout.reconfigure(errors="backslashreplace")
    assert run_on("v f") == 1
    out = capsys.readouterr().out
    failed = set(re.findall(r"\nFAILED   .*/(.*)\.\w+: ", out))
    assert failed == {*broken, long, "\\udcff", "dangling", "loop", "pipe"}
    assert {p.stem for p in Path("f/joy").iterdir()} == {"base", *good}
    assert re.search("av1.mp4: no frame decodes .AV1.*ffmpeg", out)


def test_what_is_no_video(quick, capsys, monkeypatch):
    new = ".mts .m2ts .ogv .vob .asf .gif .3g2 .f4v .divx .mxf .m2v .MP4".split()
    touch(*(f"v/joy/{i}{suffix}" for i, suffix in enumerate(new)))
    touch("v/joy/deep/b.mp4", "v/joy/x.docx", "v/._a.mp4", "elsewhere/c.mkv", "v/old.txt/x.docx")
    touch("v/lost+found/a.mp4", "v/@eaDir/a.mp4", "v/.x/a.mp4", "v/joy/y.mp4/x.docx")
    os.mkfifo("v/pipe.list")
    Path("v/linked").symlink_to("../elsewhere")
    Path("v/joy/up").symlink_to("..")  # loops of links
    Path("v/joy/deep/back").symlink_to("../../../elsewhere")
    Path("elsewhere/across").symlink_to("../v/joy/deep")
    assert run_on("v f") == 1
    out = capsys.readouterr().out
    assert "no video 3 .docx, 1 .list" in out
    assert f"classes  joy {len(new) + 2}, linked 2" in out
    assert set(re.findall(r"\n\[.*\] (\w+/[a-z])", out)) == {"joy/b", "joy/c", "linked/b", "linked/c"}
    monkeypatch.setattr(os, "scandir", Mock(side_effect=PermissionError(13, "denied", "v/closed")))
    assert run_on("v f") == 1
    assert "FAILED   v/closed: denied" in capsys.readouterr().out


def test_damage_does_not_end_the_video_and_a_cover_is_none(monkeypatch):
    write_video("a.avi", 700, codec="MJPG")
    packets = Path("a.avi").read_bytes().split(b"00dc")
    for n in range(31, 631):  # zeros in place of JPEGs, after their size
        packets[n] = packets[n][:4] + bytes(len(packets[n]) - 4)
    Path("a.avi").write_bytes(b"00dc".join(packets))
    assert len(samples_of("a.avi", 1, False)) == 100
    frame, pixel = np.zeros((48, 64, 3), np.uint8), np.zeros((1, 1, 3), np.uint8)

    def decoded(fps, *frames):
        video = Mock()
        video.get.return_value = fps
        video.grab.side_effect = [True] * len(frames) + [False] * extract.TRIES
        video.retrieve.side_effect = [(True, frame) for frame in frames]
        monkeypatch.setattr(cv2, "VideoCapture", Mock(return_value=video))
        return samples_of("a.avi", 1)

    assert [s["frame"].shape for s in decoded(25., frame, pixel, pixel, frame)] == [(48, 64, 3)] * 2
    with pytest.raises(extract.VideoError, match="cover picture.*ffmpeg"):
        decoded(90000., frame)


@pytest.mark.parametrize("line, said", [
    ("nowhere f", "nowhere: no such folder"), ("flat f", "flat/a.mp4.*give the folder above"),
    ("empty f", "no video below it"), ("twice f", "a.(avi|mp4): joy/a, as .* is; rename"),
    ("a.mp4 b/a.mp4 f", "two of one name"), ("v f --weights v --random-weights", "not allowed with"),
    ("v f --seed 1", "--seed"), ("v f --every 0", "1 or more")])
def test_refused_in_one_line(capsys, line, said):
    touch("v/joy/a.mp4", "twice/joy/a.mp4", "twice/joy/a.avi", "flat/a.mp4", "empty/joy/.a.mp4")
    with pytest.raises(SystemExit, match="^2$"):
        dfan.command(partial(extract.main, line.split()))
    assert re.search(said, capsys.readouterr().err.splitlines()[-1])


def test_a_checkpoints_options_are_taken(monkeypatch):
    options = dict(every=4, detector=DETECTOR, no_flow=True, random_weights=True, seed=3, tuned=None)
    saved = dict(settings=dict(extraction=dict(options=options)), data="moved")
    monkeypatch.setattr(extract, "load_checkpoint", Mock(return_value=saved))
    parse = partial(extract.parse_args, "--device cpu --like c.pt a.mp4 f".split())
    assert vars(parse()).items() >= options.items()
    options["tuned"] = "/gone"
    assert parse().tuned == os.path.abspath("moved")
    for changed in (dict(every=None), dict(every="8"), dict(detector="yolo"), dict(tuned=1)):
        saved["settings"]["extraction"]["options"] = options | changed
        assert refusal(parse) == "c.pt: of other features; give an .npz", changed


def test_from_finetuning_to_prediction(monkeypatch):
    monkeypatch.setitem(extract.TUNING, "epochs", 1)
    tune = Mock(wraps=extract.tune, side_effect=[DEFAULT, KeyboardInterrupt, DEFAULT])
    monkeypatch.setattr(extract, "tune", tune)
    ids = ["anger/0", "joy/1", "anger/2", "joy/3"]
    for i, identity in enumerate(ids):
        write_video(f"v/{identity}.mp4", 8, seed=i)
    for name, listed in dict(train=ids[:2], test=ids[2:], other=ids[1:3]).items():
        Path(f"v/{name}list01.txt").write_text("\n".join(listed))
    line = "v f --no-flow --finetune v/trainlist01.txt"
    with pytest.raises(KeyboardInterrupt):
        run_on(line)
    assert run_on(line) == 0
    assert [call.args[0] for call in tune.mock_calls] == ["action_rgb", "scene", "scene"]
    assert "tuned on another list" in refusal(run_on, line.replace("train", "other"))
    assert "tuned from random, not x" in refusal(extract.load_tuned, "f/tuned_scene.pt", "x"), "or it would lose its mark"
    f = dict(np.load("f/joy/3.npz"))
    assert json.loads(str(f["settings"]))["tuned_on"] == ids[:2]
    network = extract.build(["scene"], dict(scene="f/tuned_scene.pt"), 0, "cpu")["scene"]
    untuned = extract.build(["scene"], {}, 0, "cpu")["scene"]
    assert not torch.equal(network.fc.bias, untuned.fc.bias)
    with torch.inference_mode():
        scene = network(normalised(samples_of("v/joy/3.mp4"), "scene")).numpy()
    assert f["scene"] == pytest.approx(scene, rel=2e-3, abs=2e-3)
    Path("f").rename("moved")
    train("--data moved --out o")
    line = f"{sys.executable} {HERE}/dfan.py --predict bad.mp4 v/joy/3.mp4 --checkpoint o/run0.pt --device cpu --out ."
    assert subprocess.run(line.split(), env=os.environ | dict(PYTHONOPTIMIZE="1")).returncode == 1
    assert np.array_equal(np.load("3.npz")["scene"], f["scene"]), "with the tuned networks"
    assert read_json("3.json")["marks"] == ["RANDOM WEIGHTS"]


# ---- Experiments ----

def shares(checkpoint):
    """Of the planted validation videos: the attention on the true frames, two of 24, and there on the key, one of 8."""
    saved, data = dfan.load_checkpoint(checkpoint), dfan.Planted(0)
    args = Namespace(batch=100, features=dfan.FEATURES, objects=16, device="cpu")
    outputs, _ = dfan.evaluate(saved["network"], data, range(data.TRAIN, len(data.ids)), args, saved["standard"])
    pairs = []
    for i, out in outputs.items():
        inside = data.load(i)["inside"]
        pairs.append((out["A_T"][inside].sum(), out["A_o"][inside, 0].mean()))
    return np.mean(pairs, 0)


def readings(names):
    """Trains ours and each reading, or those named, on the planted set, three seeds each. Prints a Markdown table."""
    rows = {"ours": "ours"} | READINGS | LOSSES
    print("| name | eq., reading | accuracy in % | frames | object |\n| --- | --- | --- | --- | --- |", flush=True)
    for name in names or rows:
        what = rows[name].splitlines()[0]
        Fast = with_lines(dfan.DFAN, READINGS[name]) if name in READINGS else dfan.Fast
        loss_fn = with_lines(dfan.loss_fn, LOSSES[name]) if name in LOSSES else dfan.loss_fn
        with (patch.multiple(dfan, Fast=Fast, loss_fn=loss_fn), tempfile.TemporaryDirectory() as out,
              contextlib.redirect_stdout(io.StringIO())):
            dfan.main(["--runs", "3", "--out", out])
            found = json.loads(Path(out, "results.json").read_text())["rows"]["result"]
            frames, box = np.mean([shares(r["checkpoint"]) for r in found], 0)
        accuracies = 100 * np.array([r["accuracy"] for r in found])
        accuracy = f"{accuracies.mean():.1f} ± {accuracies.std(ddof=1):.1f}"
        print(f"| {name} | {what} | {accuracy} | {frames:.3f} | {box:.3f} |", flush=True)


def speed(B=16, T=400, rounds=5):
    """CPU seconds of a forward and a backward pass: medians of interleaved rounds, after one that does not count."""
    torch.set_num_threads(1)  # those of several threads count their waiting
    sizes = 2048, 365, 84, 256, 6
    F = torch.randn(B, T, 2048), torch.randn(B, T, 365), torch.rand(B, T, 16, 84)
    lengths = torch.full((B,), T)
    lstm = nn.LSTM(2048 + 365 + 84, 256, num_layers=2, batch_first=True)  # on [F_A; F_S; mean F_o]
    nets = {
        "nn.LSTM": lambda F_A, F_S, F_O, _: dict(logits=lstm(torch.cat([F_A, F_S, F_O.mean(2)], -1))[0]),
        "Fast": dfan.Fast(*sizes), "literal": dfan.DFAN(*sizes)}
    shown = subprocess.run("git show 3ea36d5:dfan.py", shell=True, cwd=HERE, capture_output=True)
    if shown.returncode == 0:  # an older network, where git has it
        old = {"__name__": "old"}
        exec(shown.stdout, old)
        nets["3ea36d5"] = old["DFAN"](*sizes)
    seconds = {name: [] for name in nets}
    for _ in range(rounds + 1):
        for name, net in nets.items():
            start = time.process_time()
            dfan.loss_fn(net(*F, lengths)["logits"], torch.arange(B) % 6, lengths).backward()
            seconds[name].append(time.process_time() - start)
    median = {name: float(np.median(v[1:])) for name, v in seconds.items()}
    print(f"B={B}, T={T}, H=256, K=16, {torch.get_num_threads()} thread, CPU seconds: {median}")
    for one, other in (("Fast", "nn.LSTM"), ("literal", "Fast"), ("Fast", "3ea36d5")):
        if other in median:
            print(f"{one} / {other} {median[one] / median[other]:.2f}")


def extraction(seconds=4):
    """Wall seconds a minute of video (640 x 360, 30 frames a second) with each detector; random weights."""
    in_turn = lambda executor, *call: Namespace(result=partial(*call))  # a submit that reads when asked for it
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name, "v.mp4")
    write_video(path, 30 * seconds, 360, 640)
    samples = samples_of(path)
    for detector in extract.DETECTORS:
        args = extract.parse_args(f"{path} f --batch 4 --device cpu --detector {detector}".split())
        models = extract.build(["action_rgb", "action_flow", "scene", detector], {}, 0, "cpu")
        extract.features_of(samples[:4], models, "cpu")  # does not count
        times = [time.monotonic()]
        for i in range(0, len(samples), 4):
            extract.features_of(samples[i:i + 4], models, "cpu")
        times.append(time.monotonic())
        extract.extract(path, models, {}, args)
        times.append(time.monotonic())
        with patch.object(extract.ThreadPoolExecutor, "submit", in_turn):
            extract.extract(path, models, {}, args)
        times.append(time.monotonic())
        networks, ahead, waiting = np.diff(times) * 60 / seconds
        print(f"{detector}: {ahead:.0f} s a minute; / in turn {ahead / waiting:.3f}; / networks {ahead / networks:.2f}")


if __name__ == "__main__":
    if "--readings" in sys.argv:
        readings(sys.argv[sys.argv.index("--readings") + 1:])
    if "--speed" in sys.argv:
        speed()
    if "--extraction" in sys.argv:
        extraction()
