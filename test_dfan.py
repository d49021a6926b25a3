"""Tests of dfan.py: python -m pytest -q test_dfan.py.  Its speed: python test_dfan.py --speed.
The readings of the paper that were not taken, on the planted set: python test_dfan.py --readings.

The oracle comes first. It is written from the paper and from the README's readings [R1] to [R9], not from dfan.py:
numpy in float64, one video at a time, loops over frames t and i, nothing rearranged.
"""
import contextlib
import hashlib
import inspect
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import unicodedata
from argparse import Namespace
from pathlib import Path

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

HERE = Path(__file__).parent
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

MODES = pytest.mark.parametrize("training", [False, True])


def make_net(Network=dfan.DFAN, training=False, **changed):
    torch.manual_seed(1)
    net = Network(**dict(d_action=7, d_scene=5, d_object=6, hidden=4, classes=3) | changed).double().train(training)
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
@MODES
@pytest.mark.parametrize("o_focus, K, d_object", [(True, 3, 6), (True, 1, 6), (False, 3, 6), (False, 0, 0)])
def test_network_is_the_paper(Network, training, o_focus, K, d_object):
    net = make_net(Network, training, o_focus=o_focus, d_object=d_object)
    F_A, F_S, F_O, lengths = make_batch([9, 4, 1, 12, 2], K, d_object)
    for v in (F_A, F_S, F_O):
        v[1, 4:], v[4, 2:] = 1e6, -1e6  # padding changes nothing
    out = net(F_A, F_S, F_O, lengths)
    for b, n in enumerate(lengths):
        expected = oracle(net, *(v[b, :n].numpy() for v in (F_A, F_S, F_O)), training, o_focus)
        for name, value in expected.items():
            got = out[name][b].detach().numpy()
            assert got[:n].shape == value.shape and np.abs(got[:n] - value).max(initial=0) < 1e-12, (name, b)
            assert (got[n:] == 0).all(), f"{name}: zero where there is padding"


@MODES
@pytest.mark.parametrize("o_focus", [True, False])
@pytest.mark.parametrize("Networks", [(dfan.DFAN, dfan.Fast), (dfan.Fast, dfan.DFAN)])
def test_fast_is_dfan_with_its_gradients(training, o_focus, Networks):
    one = make_net(Networks[0], training, o_focus=o_focus)
    other = Networks[1](7, 5, 6, 4, 3, o_focus=o_focus).double().train(training)
    other.load_state_dict(one.state_dict())  # of one into the other
    *F, lengths = make_batch([7, 3, 5])
    weights, grads, outs = None, [], []
    for net in (one, other):
        inputs = [v.clone().requires_grad_() for v in F]
        out = net(*inputs, lengths)
        weights = weights or {k: torch.randn_like(v) for k, v in out.items()}
        sum((out[k] * weights[k]).sum() for k in out).backward()
        outs.append(out)
        grads.append(dict(net.named_parameters()) | dict(zip(("F_A", "F_S", "F_O"), inputs)))
    assert all((outs[0][k] - outs[1][k]).abs().max() < 1e-12 for k in outs[0])
    for name, p in grads[0].items():
        assert (p.grad - grads[1][name].grad).abs().max() < 1e-12 * (1 + p.grad.abs().max()), name
        assert p.grad.abs().max() > 0, f"{name} is not reached"


@pytest.mark.parametrize("how, pool", [("max", np.max), ("avg", np.mean)])
def test_pooling_takes_ten_uniform_frames(how, pool):
    net = dfan.Pooling(how, 7, 5, 3).double()
    W, b = (p.detach().numpy() for p in (net.W.weight, net.W.bias))
    F_A, F_S, F_O, lengths = make_batch([40, 10, 3])
    out = net(F_A, F_S, F_O, lengths)
    for video, frames in enumerate([range(2, 40, 4), range(10), [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]]):
        FF, n = np.concatenate([F_A[video].numpy(), F_S[video].numpy()], -1)[list(frames)], lengths[video]
        logits = W @ pool(FF, axis=0) + b
        assert np.allclose(out["logits"][video, :n].detach().numpy(), logits)
        assert np.allclose(out["P"][video, :n].detach().numpy(), softmax(logits)) and (out["P"][video, n:] == 0).all()
        assert np.allclose(out["A_T"][video, :n].numpy(), 1 / n) and (out["A_T"][video, n:] == 0).all()


def test_loss_averages_frames_then_videos():
    logits = torch.randn(2, 5, 3, dtype=torch.float64)
    P = [[softmax(v) for v in video] for video in logits.numpy()]
    expected = (-np.mean([np.log(P[0][t][2]) for t in range(5)]) - np.mean([np.log(P[1][t][0]) for t in range(2)])) / 2
    assert abs(dfan.loss_fn(logits, torch.tensor([2, 0]), torch.tensor([5, 2])).item() - expected) < 1e-12


def test_vote():
    def P(*emotions, sure=0.6):
        return [[sure if c == e else (1 - sure) / 2 for c in range(3)] for e in emotions]

    cases = [(P(*[0] * 20, *[1] * 6, *[2] * 4), 30, 1),  # the last ten alone count
             (P(*[0] * 10, *[2] * 15), 10, 0),  # padding does not
             (P(*[0] * 10) + P(*[1] * 5, sure=0.8) + P(*[2] * 5), 20, 1),  # 5 to 5: the higher sum
             (P(*[0] * 5, sure=0.5) + P(*[1] * 5), 10, 1),
             (P(*[0] * 3, sure=0.99) + P(*[1] * 4, sure=0.4), 7, 1),  # but a count beats any sum
             (P(2, 2, 0), 3, 2), (P(0) + P(1, sure=0.9), 2, 1), (P(0, sure=0.9) + P(1), 2, 0)]
    batch = torch.zeros(len(cases), 30, 3)
    for b, (p, _, _) in enumerate(cases):
        batch[b, :len(p)] = torch.tensor(p)
    assert dfan.vote(batch, torch.tensor([n for _, n, _ in cases])).tolist() == [e for _, _, e in cases]


def test_scores():
    class Net(nn.Module):
        def forward(self, F_A, F_S, F_O, lengths):
            return dict(P=F_A)  # the action feature is the prediction

    labels, emotions = [0, 0, 0, 1, 1, 2], (0, 0, 1, 1, 0, 2)
    data = Namespace(labels=labels, lengths=[1] * 6, classes="abc", load=lambda i, _: (dict(
        action=torch.eye(3)[emotions[i], None], scene=torch.zeros(1, 1), objects=torch.zeros(1, 0, 84)), {}))
    args = Namespace(features=dfan.FEATURES, objects=16, batch=4, device="cpu")
    outputs, got = dfan.evaluate(Net(), data, range(6), args, None)
    assert got["accuracy"] == 4 / 6 and abs(got["macro"] - (2 / 3 + 1 / 2 + 1) / 3) < 1e-12
    assert np.allclose(got["confusion"], [[2 / 3, 1 / 3, 0], [1 / 2, 1 / 2, 0], [0, 0, 1]])
    assert sorted(outputs) == list(range(6)) and outputs[5]["P"].tolist() == [[0, 0, 1]]


# ---- The readings that were not taken: each is one line of DFAN.forward ----

def with_line(old, new):
    """DFAN with one line of forward replaced; comments and indentation aside."""
    lines = textwrap.dedent(inspect.getsource(dfan.DFAN.forward)).splitlines()
    found = [n for n, line in enumerate(lines) if line.split("#")[0].strip() == old]
    assert len(found) == 1, f"{len(found)} lines of DFAN.forward are: {old}"
    lines[found[0]] = lines[found[0]].split(old)[0] + new
    scope = {}
    exec("\n".join(lines), vars(dfan), scope)
    return type("Reading", (dfan.DFAN,), scope)


def map_to_positions(T):
    """[R5] W_Tf gives T numbers: every frame writes the whole series."""
    Reading = with_line("E = torch.where(frame == t, G_t.exp() * real, E)", "E = G_t.exp() * real")

    def __init__(self, *a, **kw):
        dfan.DFAN.__init__(self, *a, **kw)
        self.W_Tf = nn.Linear(self.W_Tf.in_features, T)
    Reading.__init__ = __init__
    return Reading


READINGS = {"R5 (8) over the frames seen so far": lambda T: with_line("E = real", "E = torch.zeros_like(real)"),
            "R5 W_Tf to T positions": map_to_positions,
            "R6 (10) one line after the other": lambda T: with_line(
                "A_T[:, t] = (1 - beta) * old[:, t - 1] + beta * old[:, t]",
                "A_T[:, t] = (1 - beta) * A_T[:, t - 1] + beta * old[:, t]")}


def last_frame_loss(logits, labels, lengths):
    """[R7] the loss of the last frame alone."""
    return nn.functional.cross_entropy(logits[torch.arange(len(logits)), lengths - 1], labels)


@pytest.mark.parametrize("reading", READINGS)
def test_rejected_readings_run_and_differ(reading):
    *F, lengths = make_batch([8, 8, 5])
    ours, theirs = make_net(training=True)(*F, lengths), make_net(READINGS[reading](8), True)(*F, lengths)
    for name in ("logits", "A_T"):
        assert theirs[name].isfinite().all() and (ours[name] - theirs[name]).abs().max() > 1e-3, name
    same = with_line("E = real", "E = real")
    assert torch.equal(make_net(same, True)(*F, lengths)["A_T"], ours["A_T"]), "the replacement is all that differs"


def readings():
    """Trains our reading and each of the others on the planted set, three seeds each, and prints a table."""
    kept = dfan.Fast, dfan.loss_fn
    rows = {name: (reading(dfan.Planted.T), kept[1]) for name, reading in READINGS.items()}
    rows = {"ours": kept, **rows, "R7 last frame's loss": (kept[0], last_frame_loss)}
    print(f"{'reading, 3 seeds, planted set':<34}{'accuracy':>18}{'planted frames':>16}{'planted object':>16}")
    for name, (dfan.Fast, dfan.loss_fn) in rows.items():
        with tempfile.TemporaryDirectory() as out:
            with contextlib.redirect_stdout(io.StringIO()):
                dfan.main(["--runs", "3", "--out", out])
            found = json.loads(Path(out, "results.json").read_text())
        frames, boxes = (np.mean([r["attention"][name][A] for r in found["runs"]])
                         for name, A in (("segments", "A_T"), ("planted object", "A_o")))
        accuracy = f"{found['accuracy']['mean']:.3f} ± {found['accuracy']['std']:.3f}"
        print(f"{name:<34}{accuracy:>18}{frames:>16.3f}{boxes:>16.3f}", flush=True)
    dfan.Fast, dfan.loss_fn = kept
    print(f"{'uniform':<52}{2 / 24:>16.3f}{1 / 8:>16.3f}\n{'limit':<52}{dfan.limit_of(2, 24):>16.3f}{dfan.limit_of(1, 8):>16.3f}")


# ---- Features: standardised by the training videos, chosen, damaged ----

def write_feats(folder, classes=("anger", "joy"), n=4, K=3, d_object=6, **settings):
    """Small feature files whose action feature carries the class; lists of even and odd videos beside them."""
    rng, ids = np.random.default_rng(0), []
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            T = int(rng.integers(3, 15))
            F = dict(action=3 + rng.standard_normal((T, 7)) + 2 * np.eye(7)[c], scene=rng.standard_normal((T, 5)),
                     objects=rng.random((T, K, d_object)))
            np.savez(folder / name / f"{name}_{i}.npz", **{k: v.astype(np.float16) for k, v in F.items()},
                     frames=8 * np.arange(T), seconds=np.arange(T) / 3, inside=np.arange(T) < 2, settings=json.dumps(settings))
            ids.append(f"{name}/{name}_{i}")
    (folder / "trainlist01.txt").write_text("".join(f"{i} 1\n" for i in ids[::2]))
    (folder / "testlist01.txt").write_text("".join(f"{i} 1\n" for i in ids[1::2]))
    return folder


def change(path, **arrays):
    with np.load(path) as f:
        whole = dict(f)
    np.savez(path, **whole | arrays)


def train(*argv):
    """dfan.main in this process, small and on the CPU. Returns what --out holds of run 0."""
    small = {"--hidden": 4, "--epochs": 2, "--batch": 4, "--device": "cpu"}
    argv = [str(a) for a in argv]
    argv += [str(v) for pair in small.items() if pair[0] not in argv for v in pair]
    dfan.main(argv)
    path = Path(argv[argv.index("--out") + 1], "run0.pt")
    return torch.load(path, weights_only=True) if path.exists() else None


def error_of(*argv):
    with pytest.raises(dfan.InputError) as caught:
        train(*argv)
    return " ".join(str(caught.value).split())


def same_run(a, b):
    return a["history"] == b["history"] and all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())


def test_statistics_are_of_training_videos_only(tmp_path):
    feats = write_feats(tmp_path / "f")
    first = train("--data", feats, "--out", tmp_path / "a")
    FF = np.concatenate([np.concatenate([f["action"], f["scene"]], 1).astype(float) for f in (
        np.load(feats / f"{c}/{c}_{i}.npz") for c in ("anger", "joy") for i in (0, 2))])
    assert np.allclose(first["standard"].numpy(), [FF.mean(0), 1 / FF.std(0)], rtol=1e-5)
    for path in [*feats.glob("*/*_1.npz"), *feats.glob("*/*_3.npz")]:
        change(path, action=np.load(path)["action"] * 3 + 7)
    second = train("--data", feats, "--out", tmp_path / "b")
    assert torch.equal(first["standard"], second["standard"])
    assert all(torch.equal(v, second["model"][k]) for k, v in first["model"].items())
    change(path := feats / "joy/joy_0.npz", action=np.load(path)["action"] * 3 + 7)
    assert not torch.equal(train("--data", feats, "--out", tmp_path / "c")["standard"], first["standard"])


def test_constant_columns_stay_zero(tmp_path):
    feats = write_feats(tmp_path / "f")
    for path in feats.glob("*/*.npz"):
        action = np.load(path)["action"].astype(np.float32)
        action[:, 2] = 1e3 + 0.7 if path.stem[-1] in "02" else action[:, 2]  # varies in validation alone
        change(path, action=action)
    args = dfan.parse_args(["--data", str(feats)])
    data = dfan.Features(feats, args.features)
    standard = dfan.column_statistics(data, [0, 2, 4, 6], args)
    for F, _ in map(data.load, range(8)):
        F_A, F_S, F_O = dfan.as_inputs(F, args.features, args.objects, standard)
        assert (F_A[:, 2] == 0).all() and (F_A[:, 1] != 0).any() and torch.equal(F_O, F["objects"])


def test_objects_alone_learn_where_the_mean_object_decides(tmp_path):
    feats, rng = write_feats(tmp_path / "f", n=12), np.random.default_rng(0)
    for path in feats.glob("*/*.npz"):
        F_O = 0.9 + 0.02 * rng.random((6, 3, 6)).astype(np.float32)
        F_O[:, :, 0] += 0.03 * (path.parent.name == "joy")
        change(path, **{k: np.load(path)[k][:1].repeat(6, 0) for k in ("action", "scene", "frames", "seconds", "inside")}, objects=F_O)
    common = "--data", feats, "--features", "objects", "--epochs", 12, "--lr", 0.02, "--hidden", 8
    ours, raw = (train(*common, *v, "--out", tmp_path / n)["history"][-1] for n, v in (("a", []), ("b", ["--raw"])))
    assert ours["accuracy"] >= 0.9 and ours["loss"] < 0.3 < 0.5 < raw["loss"]


def test_bad_features_name_the_file(tmp_path):
    feats = write_feats(tmp_path / "f", every=8)
    bad = feats / "joy/joy_0.npz"
    whole, F = bad.read_bytes(), dict(np.load(bad))
    error = lambda: error_of("--data", feats, "--out", tmp_path / "o")
    for changed, word in ((dict(scene=F["scene"] * np.float16(np.nan)), "NaN"), (dict(scene=F["scene"][1:]), "one T"),
                          (dict(action=F["action"][:, :3]), "other action"), (dict(action=F["action"][:, 0]), "(T,D)"),
                          ({k: v[:0] for k, v in F.items() if v.ndim}, "one T"),
                          (dict(seconds=F["seconds"][1:]), "one T"), (dict(settings=json.dumps(dict(every=4))), "every")):
        change(bad, **changed)
        assert word in (e := error()) and str(bad) in e, word
        bad.write_bytes(whole)
    change(bad, settings=json.dumps(dict(every=4)))
    assert "anger_0.npz" in error(), "both files are named"
    np.savez(bad, **{k: v for k, v in F.items() if k != "scene"})
    assert "scene" in (e := error()) and str(bad) in e
    for damaged in (whole[:len(whole) // 2], b"", b"not a zip"):
        bad.write_bytes(damaged)
        assert str(bad) in error()
    bad.write_bytes(whole)
    change(bad, settings=json.dumps(dict(every=8, opencv="4.1")))
    train("--data", feats, "--out", tmp_path / "o")


def test_nothing_in_a_file_runs(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    feats = write_feats(tmp_path / "f")
    change(feats / "joy/joy_0.npz", action=np.array([Trap()], object))
    assert "joy_0.npz" in error_of("--data", feats, "--out", tmp_path / "o")
    torch.save(dict(model=Trap()), tmp_path / "run0.pt")
    with pytest.raises(dfan.InputError, match="run0.pt"):
        dfan.load_checkpoint(tmp_path / "run0.pt")
    assert not (tmp_path / "ran").exists()


# ---- Split lists and protocols ----

LISTS = {
    "labels from 1": "anger/a 1\njoy/b 2\n", "labels from 0": "anger/a 0\njoy/b 1\n", "no label": "anger/a\njoy/b\n",
    "no last newline": "anger/a 1\njoy/b 2", "CRLF": "anger/a 1\r\njoy/b 2\r\n", "suffix": "anger/a.mp4 1\njoy/b.AVI\n",
    "BOM": "\ufeffanger/a 1\njoy/b 2\n", "stems": "a 1\nb\n", "backslashes": "anger\\a.mp4 1\njoy\\b 2\n",
    "blank lines, twice": "\nanger/a 1\n\njoy/b 2\nanger/a 1\n", "tabs": "anger/a\t1\njoy/b\t2\n"}


def listed(tmp_path, text, ids):
    (tmp_path / "list.txt").write_text(text, encoding="utf-8", newline="")
    return dfan.read_list(tmp_path / "list.txt", ids)


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS)
def test_list_formats(tmp_path, text):
    assert listed(tmp_path, text, ["anger/a", "anger/c", "joy/b"]) == ([0, 2], [])


def test_awkward_names(tmp_path):
    ids = ["anger/Ten [Part1].mp4", "anger/v1", "anger/v1.0", "joy/it's 2", "joy/it's", "joy/Fun & more (HD)", "joy/7",
           unicodedata.normalize("NFD", "joy/Café"), unicodedata.normalize("NFC", "joy/Über")]
    for line, expected in (("anger/Ten [Part1].mp4 1", 0), ("anger/Ten [Part1].mp4.mp4", 0), ("anger/v1.0 1", 2),
                           ("anger/v1.mp4 1", 1), ("joy/it's 2 4", 3), ("joy/it's 2", 3), ("joy/it's 4", 4),
                           ("Fun & more (HD) 4", 5), ("7 4", 6), ("7", 6),
                           (unicodedata.normalize("NFC", "joy/Café 4"), 7), (unicodedata.normalize("NFD", "Über.mp4"), 8)):
        assert listed(tmp_path, line, ids) == ([expected], []), line
    lost = ["anger/v1.7", "anger/it's", "sadness/v1"]
    assert listed(tmp_path, "\n".join(f"{name} 1" for name in lost), ids) == ([], lost), "never another video"
    assert listed(tmp_path, "a 1\n", ["anger/a", "joy/a"]) == ([], ["a"]), "a name of two classes"


def test_lists_that_do_not_fit(tmp_path, capsys):
    feats, a, b = write_feats(tmp_path / "f"), tmp_path / "a.txt", tmp_path / "b.txt"
    error = lambda *more: error_of("--data", feats, "--split", a, b, "--out", tmp_path / "o", *more)
    a.write_text("anger/anger_0 1\njoy/joy_0 2\nanger/lost 1\n")
    b.write_text("anger/anger_1\njoy/joy_1\n")
    train("--data", feats, "--split", a, b, "--out", tmp_path / "m")
    printed = capsys.readouterr().out
    assert f"missing  {a}: anger/lost" in printed and "training 2: anger 1, joy 1" in printed
    assert all(v.endswith("1 MISSING") for v in printed.splitlines() if v.startswith(("run", "result")))
    a.write_text("anger/anger_0\njoy/joy_0\njoy/joy_1\n")
    assert "joy/joy_1" in (e := error()) and "both" in e
    a.write_text("videos/x/y.mp4 1\nanger/anger_0\n")
    assert "class without a video" in (e := error()) and "training 1: anger 1, joy 0" in e
    (feats / "trainlist01.txt").unlink()
    assert "--split" in (e := error_of("--data", feats, "--out", tmp_path / "o")) and "trainlist01.txt" in e
    (feats / "fear").mkdir()
    assert "fear 0" in error(), "an empty folder is a class too"


def test_videoemotion_draws_ten_splits(tmp_path, capsys):
    feats = write_feats(tmp_path / "f", ("Anger", "Fear", "Joy"), n=9)
    args = dfan.parse_args(["--data", str(feats), "--dataset", "videoemotion", "--seed", "5"])
    data = dfan.Features(feats, args.features)
    splits = dfan.make_splits(data, args)
    assert len(splits) == 10 and len({tuple(sorted(train)) for train, _ in splits}) == 10
    for training, test in splits:
        assert sorted([*training, *test]) == list(range(27))
        assert np.bincount([data.labels[i] for i in training]).tolist() == [6, 6, 6]
    printed = capsys.readouterr().out
    assert printed.count("training 18: Anger 6, Fear 6, Joy 6") == printed.count("validation 9: Anger 3, Fear 3, Joy 3") == 10
    few = write_feats(tmp_path / "few", n=1)
    assert "least populated" in error_of("--data", few, "--dataset", "videoemotion", "--out", tmp_path / "o")


# ---- The same command goes on; results ----

TWO = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"


def shell(*argv, status=0, torchrun=(), **env):
    done = subprocess.run([sys.executable, *torchrun, *map(str, argv)], capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == status, done.stdout + done.stderr
    assert torchrun or "Traceback" not in done.stderr  # torchrun's report has its own
    return done


def test_the_same_command_goes_on(tmp_path, capsys):
    common = "--data", write_feats(tmp_path / "f", n=8), "--epochs"
    whole = train(*common, 4, "--out", tmp_path / "a")
    uninterrupted = capsys.readouterr().out
    half = train(*common, 2, "--out", tmp_path / "b")
    capsys.readouterr()
    assert len(half["history"]) == 2 and same_run(whole, train(*common, 4, "--out", tmp_path / "b"))
    result = lambda text: [line for line in text.splitlines() if line.startswith("result")]
    assert result(uninterrupted) == result(capsys.readouterr().out) != []
    assert "other hidden, lr;" in error_of(*common, 4, "--out", tmp_path / "a", "--lr", 0.5, "--hidden", 5)
    assert "other epochs" in error_of(*common, 3, "--out", tmp_path / "a")
    for path in (tmp_path / "f").glob("*/*.npz"):
        change(path, settings=json.dumps(dict(every=4)))
    assert "other extraction;" in error_of(*common, 4, "--out", tmp_path / "a")
    (tmp_path / "a/run0.pt").write_bytes((tmp_path / "a/run0.pt").read_bytes()[:1000])
    assert f"{tmp_path / 'a/run0.pt'}" in error_of(*common, 4, "--out", tmp_path / "a")


def test_killed_training_goes_on_to_the_same_numbers(tmp_path):
    argv = ["--data", write_feats(tmp_path / "f", n=8), "--epochs", 60, "--hidden", 4, "--batch", 4, "--device", "cpu"]
    path = tmp_path / "killed/run0.pt"
    victim = subprocess.Popen([sys.executable, HERE / "dfan.py", *map(str, argv), "--out", path.parent],
                              stdout=subprocess.DEVNULL)
    while not path.exists():
        assert victim.poll() is None
        time.sleep(0.01)
    victim.kill()
    assert victim.wait() == -9
    assert 0 < len(torch.load(path, weights_only=True)["history"]) < 60
    assert same_run(train(*argv, "--out", path.parent), train(*argv, "--out", tmp_path / "whole"))


def test_two_processes_give_the_numbers_of_one(tmp_path):
    argv = [HERE / "dfan.py", "--data", write_feats(tmp_path / "f", n=6), "--dataset", "videoemotion", "--hidden", 4,
            "--epochs", 2, "--device", "cpu", "--out"]
    results = [[line for line in shell(*argv, tmp_path / out, torchrun=start).stdout.splitlines() if line.startswith("result")]
               for start, out in (((), "alone"), (TWO, "spread"))]
    assert len(results[0]) == 4 and results[0] == results[1]
    for n in range(10):
        assert same_run(*(torch.load(tmp_path / out / f"run{n}.pt", weights_only=True) for out in ("alone", "spread")))
    (tmp_path / "spread/run1.pt").write_bytes(b"damaged")
    report = shell(*argv, tmp_path / "spread", status=1, torchrun=TWO).stderr
    assert f"dfan.py: {tmp_path / 'spread/run1.pt'}" in report and 'dfan.py", line' not in report, "no traceback of ours"


def test_results_and_last_epoch(tmp_path, capsys, monkeypatch):
    accuracies, evaluate = iter([0.2, 0.9, 0.4] * 2), dfan.evaluate

    def fixed(*a):
        outputs, scores = evaluate(*a)
        return outputs, scores | dict(accuracy=next(accuracies))
    monkeypatch.setattr(dfan, "evaluate", fixed)
    train("--data", write_feats(tmp_path / "f"), "--epochs", 3, "--runs", 2, "--out", tmp_path / "o")
    printed = capsys.readouterr().out
    assert re.search(r"last epoch: .* n = 2\nresult +accuracy 40\.00 ± 0\.00 ", printed)
    found = json.loads((tmp_path / "o/results.json").read_text())
    assert found["accuracy"] == dict(mean=0.4, std=0) and [r["accuracy"] for r in found["runs"]] == [0.4, 0.4]
    assert found["macro"]["mean"] == np.mean([r["macro"] for r in found["runs"]])
    assert np.isclose(found["macro"]["std"], np.std([r["macro"] for r in found["runs"]], ddof=1))
    assert [r["seed"] for r in found["runs"]] == [0, 1] and found["classes"] == ["anger", "joy"] and found["marks"] == []
    assert np.allclose(np.sum(found["runs"][1]["confusion"], 1), 1) and found["settings"]["hidden"] == 4
    lengths = [len(np.load(tmp_path / f"f/{c}/{c}_{i}.npz")["action"]) for c in ("anger", "joy") for i in (1, 3)]
    assert np.isclose(found["runs"][0]["attention"]["segments"]["uniform"], np.mean(2 / np.array(lengths)))
    assert found["settings"]["split"] == [f"{tmp_path}/f/{name}list01.txt" for name in ("train", "test")]


def test_marks(tmp_path, capsys):
    def numbers(**settings):
        train("--data", write_feats(tmp_path / str(settings), **settings), "--out", tmp_path / f"{settings} out")
        lines = [v for v in capsys.readouterr().out.splitlines() if re.match("run|result|  ", v)]
        assert len(lines) > 6
        return lines
    assert all(v.endswith("  RANDOM WEIGHTS") for v in numbers(random_weights=0))
    leaked = dict(tuned_on=["anger/anger_0", "joy/joy_1"])
    assert all(v.endswith("  1 LEAKED") for v in numbers(**leaked)), "joy_1 is a validation video"
    assert json.loads((tmp_path / f"{leaked} out/results.json").read_text())["marks"] == ["1 LEAKED"]
    assert not any("LEAKED" in v for v in numbers(tuned_on=["joy/joy_0"])), "tuned on training videos alone"


def test_reproduce_runs_a_cell_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dfan.Planted, "TRAIN", 30)
    monkeypatch.setattr(dfan.Planted, "TEST", 12)
    out = tmp_path / "o"
    train("--out", out, "--epochs", 1)
    made = lambda: {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.rglob("*.pt")}
    first = made()
    train("--out", out, "--epochs", 1, "--runs", 1, "--reproduce", "table2")
    second, printed = made(), capsys.readouterr().out
    assert sorted(second) == ["Avg.Pool/run0.pt", "Max.Pool/run0.pt", "T.Focus/run0.pt", "run0.pt"]
    assert second["run0.pt"] == first["run0.pt"], "the last row was there already"
    assert all(paper in printed for paper in ("53.12", "54.28", "55.93", "57.37")) and "to the paper" not in printed
    train("--out", out, "--epochs", 1, "--runs", 1, "--reproduce", "table2")
    train("--out", out, "--epochs", 1, "--runs", 1, "--reproduce", "figure4")
    assert made() == second and capsys.readouterr().out.count("55.93") == 1
    pictures = sorted(out.rglob("figure4-*.png"))
    assert len(pictures) == 6 and all(p.read_bytes()[:4] == b"\x89PNG" for p in pictures)
    assert cv2.imread(str(pictures[0])).shape == (900, 1600, 3)
    train("--out", out, "--epochs", 1, "--runs", 2, "--reproduce", "table2")
    table = json.loads((out / "results.json").read_text())
    assert set(table) == {"Max. Pool", "Avg. Pool", "T.Focus", "T.Focus + O.Focus"}
    runs = [[r["accuracy"] for r in table[row]["runs"]] for row in ("T.Focus", "Max. Pool")]
    gain = table["T.Focus"]["minus first row"]
    assert np.isclose(gain["mean"], np.mean(np.subtract(*runs))) and np.isclose(gain["std"], np.std(np.subtract(*runs), ddof=1))


def test_attention_and_its_shares(tmp_path, capsys, monkeypatch):
    A_o = np.array([[0.5, 0.25, 0.25, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    outputs = {i: dict(A_T=np.array(a), A_o=A_o)
               for i, a in enumerate(([0.25, 0.25, 0.5], [0.2, 0.2, 0.6], [0.1, 0.1, 0.8]))}
    inside = {0: np.array([0, 0, 1], bool), 1: np.array([1, 1, 0], bool)}
    found = dfan.attention(Namespace(inside=inside), outputs)
    frame, boxes = found["most attended frame"], found["most attended object"]
    assert np.allclose([frame["times uniform"], frame["max/min"]], [1.8, 3])
    assert np.allclose(list(boxes.values()), [1.5, 3 * np.e / (np.e + 2 / np.e), 2])
    assert np.allclose([found["segments"]["A_T"], found["segments"]["uniform"]], [(0.5 + 0.4) / 2, 1 / 2])
    assert np.isclose(found["segments"]["limit"], (np.e / (np.e + 2 / np.e) + 2 * np.e / (2 * np.e + 1 / np.e)) / 2)
    feats = write_feats(tmp_path / "f")
    for spread, flat in ((1.29, True), (1.31, False)):
        said = iter([{}, {"most attended frame": {"times uniform": 1.8, "max/min": spread}}])  # not of every run
        monkeypatch.setattr(dfan, "attention", lambda *_: next(said))
        train("--data", feats, "--runs", 2, "--out", tmp_path / "o")
        line = next(v for v in capsys.readouterr().out.splitlines() if "most attended frame" in v)
        assert "times uniform 1.800" in line and ("nearly uniform" in line) == flat


# ---- A video of one's own ----

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    feats = write_feats(folder / "f", d_object=84, every=8)
    train("--data", feats, "--out", folder / "o")
    return feats, folder / "o/run0.pt"


def predicted(capsys, *argv):
    """What --predict prints, and its error."""
    error = ""
    try:
        dfan.main(["--device", "cpu", "--predict", *map(str, argv)])
    except dfan.InputError as failure:
        error = str(failure)
    return capsys.readouterr().out, error


def test_predict_says_what_when_and_where(trained, tmp_path, capsys):
    feats, checkpoint = trained
    source, T = feats / "joy/joy_1.npz", len(np.load(feats / "joy/joy_1.npz")["action"])
    printed, error = predicted(capsys, source, "--checkpoint", checkpoint, "--out", tmp_path)
    found, saved, F = json.loads((tmp_path / "joy_1.json").read_text()), torch.load(checkpoint, weights_only=True), np.load(source)
    assert not error and f"{source}: {found['emotion']}" in printed and "times uniform" in printed

    FF = np.concatenate([np.concatenate([f["action"], f["scene"]], 1).astype(float) for f in (  # by hand
        np.load(feats / f"{c}/{c}_{i}.npz") for c in ("anger", "joy") for i in (0, 2))])
    x = (np.concatenate([F["action"], F["scene"]], 1) - FF.mean(0)) / FF.std(0)
    net = dfan.DFAN(7, 5, 84, 4, 2).double()
    net.load_state_dict(saved["model"])
    out = oracle(net, x[:, :7], x[:, 7:], F["objects"].astype(float), False)
    assert np.allclose(found["A_T"], out["A_T"], atol=1e-5)
    assert np.allclose(np.transpose([found["P"]["anger"], found["P"]["joy"]]), out["P"], atol=1e-5)
    last = out["P"][-10:]
    assert np.allclose([found["probabilities"][c] for c in ("anger", "joy")], last.mean(0), atol=1e-5)
    assert found["emotion"] == ("anger", "joy")[np.bincount(last.argmax(1), minlength=2).argmax()]
    assert len(found["seconds"]) == len(found["A_T"]) == len(found["objects"]) == T and found["marks"] == []
    assert all(len(v) == 3 for v in found["objects"])
    first, t = max(found["moments"], key=lambda m: m["times_uniform"]), out["A_T"].argmax()
    k = out["A_o"][t].argmax()
    assert first["seconds"] == F["seconds"][t] and first["frame"] == 8 * t
    assert [m["frame"] // 8 for m in found["moments"]] == [
        part[out["A_T"][part].argmax()] for part in np.array_split(np.arange(T), 4)], "of each quarter"
    assert np.isclose(first["times_uniform"], out["A_T"][t] * T, atol=1e-4)
    assert first["objects"][0]["name"] == extract.COCO_91[extract.COCO_80[F["objects"][t, k, :80].argmax()]]
    assert np.allclose(first["objects"][0]["box"], F["objects"][t, k, 80:]) and (tmp_path / "joy_1.png").stat().st_size > 1000


def test_predict_overwrites_nothing_given_and_refuses(trained, tmp_path, capsys):
    feats, checkpoint = trained
    more = "--checkpoint", checkpoint, "--out", tmp_path
    shutil.copy(feats / "joy/joy_1.npz", tmp_path / "x.npz")
    (tmp_path / "y.png").write_bytes(b"a picture")
    (tmp_path / "y.mp4").write_bytes(b"no video")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert not predicted(capsys, tmp_path / "x.npz", *more)[1]
    for source, word in ((tmp_path / "y.png", ".npz"), (feats, "FOLDER/*.mp4"), (tmp_path / "none.npz", "not there"),
                         (tmp_path / "y.mp4", "was not trained on")):
        error = predicted(capsys, source, *more)[1]
        assert word in error and error.startswith(f"{source}: "), error
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    for changed, word in ((dict(settings=json.dumps(dict(every=4))), "not extracted as"), (dict(seconds=np.zeros(2)), "one T"),
                          (dict(action=np.zeros((len(np.load(tmp_path / "x.npz")["scene"]), 3))), "training")):
        shutil.copy(feats / "joy/joy_1.npz", tmp_path / "x.npz")
        change(tmp_path / "x.npz", **changed)
        error = predicted(capsys, tmp_path / "x.npz", *more)[1]
        assert word in error and "x.npz" in error, error
    assert "none.pt" in predicted(capsys, tmp_path / "x.npz", "--checkpoint", tmp_path / "none.pt")[1]


# ---- The command line ----

def test_errors_are_one_line_and_status_2(tmp_path, monkeypatch):
    feats = write_feats(tmp_path / "f")
    done = shell(HERE / "dfan.py", "--data", tmp_path / "nowhere", "--out", tmp_path / "o", status=2)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("dfan.py: ") and "nowhere" in done.stderr
    monkeypatch.setattr(dfan, "loss_fn", lambda logits, *_: logits.sum() * float("nan"))
    assert "the loss is nan" in (e := error_of("--data", feats, "--out", tmp_path / "o")) and "--lr" in e
    monkeypatch.undo()
    assert "cuda:99" in error_of("--device", "cuda:99", "--out", tmp_path / "o")
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in error_of("--data", feats, "--out", tmp_path / "file/o")
    assert "smell" in error_of("--data", feats, "--features", "action,smell", "--out", tmp_path / "o")


@pytest.mark.parametrize("argv", ["--beta 2", "--lr nan", "--seed -1", "--epochs 0", "--objects 0", "--features audio",
                                  "--resume", "--split a", "--epochs x"])
def test_wrong_options(argv, capsys, monkeypatch):
    monkeypatch.setattr(dfan, "Planted", None)  # nothing is trained, even where this fails
    with pytest.raises(SystemExit) as stop:
        dfan.main(argv.split())
    assert stop.value.code == 2 and argv.split()[0] in capsys.readouterr().err


def test_planted_command_twice(tmp_path):
    argv = [sys.executable, HERE / "dfan.py", "--epochs", "1", "--device", "cpu", "--out"]
    both = [subprocess.Popen([*argv, tmp_path / name], stdout=subprocess.PIPE, text=True) for name in "ab"]
    first, second = (re.sub(r"[\d.]+ s\b|\S*/[ab]/\S*", "", p.communicate()[0]) for p in both)
    assert [p.returncode for p in both] == [0, 0] and first == second
    assert "uniform 0.083  limit 0.402  SYNTHETIC" in first and "uniform 0.125  limit 0.514  SYNTHETIC" in first


# ---- Extraction ----

SMALL = "fasterrcnn_mobilenet_v3_large_320_fpn"
TRY = ["--random-weights", "--detector", SMALL, "--device", "cpu"]


def texture(h=96, w=128, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (max(1, h // 4), max(1, w // 2), 3), np.uint8)
    return cv2.resize(noise, (2 * w, h), interpolation=cv2.INTER_CUBIC)


def write_video(path, n, h=96, w=128, shift=2, fps=24., seed=0, codec="mp4v"):
    """n frames of a texture that moves `shift` pixels to the left a frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wide = texture(h, w, seed)
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, (w, h))
    assert video.isOpened()
    for t in range(n):
        video.write(np.roll(wide, -shift * t, 1)[:, :w])
    video.release()
    return path


def samples_of(path, every=8, flow=True):
    *samples, last = extract.read_video(path, every, flow)
    return samples, last["end"]


def normalised(samples, name):
    """ImageNet's mean and deviation, as torchvision's models want them."""
    x = torch.from_numpy(np.stack([s[name] for s in samples])).permute(0, 3, 1, 2) / 255
    return (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def test_one_frame_in_eight_to_the_end(tmp_path):
    for n in (1, 5, 8, 9, 33):
        samples, warning = samples_of(write_video(tmp_path / f"{n}.mp4", n), flow=n != 8)
        assert [s["number"] for s in samples] == list(range(0, n, 8)) and not warning
        assert np.allclose([s["seconds"] for s in samples], np.arange(0, n, 8) / 24, atol=1e-3)
        assert samples[0]["fps"] == 24
    decoded = cv2.VideoCapture(str(tmp_path / "33.mp4"))
    frames = [decoded.read()[1] for _ in range(33)]
    for s in samples:
        assert np.array_equal(s["frame"][..., ::-1], frames[s["number"]])
        assert s["rgb"].shape == s["scene"].shape == (224, 224, 3) and s["flow"].shape == (224, 224, 10)


def test_flow_is_of_the_five_pairs_around_the_frame(tmp_path):
    """The texture stands still but for one pair: which samples see it, and in which of their five fields?"""
    wide, at = texture(), 17  # it moves between frames 17 and 18, by 4 pixels
    video = cv2.VideoWriter(str(tmp_path / "v.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 24, (128, 96))
    for t in range(30):
        video.write(np.roll(wide, -4 * (t > at), 1)[:, :128])
    video.release()
    samples, _ = samples_of(tmp_path / "v.mp4")
    for s in samples:
        x = (s["flow"].reshape(224, 224, 5, 2)[60:160, 60:160, :, 0].mean((0, 1)) / 255 * 40 - 20).round(1)
        first = min(max(0, s["number"] - 2), 30 - 6)  # pairs n-2 to n+2, shifted inwards at the ends
        expected = [-4 if first + i == at else 0 for i in range(5)]
        assert np.abs(x - expected).max() < 0.7, (s["number"], x)
    assert [s["number"] for s in samples] == [0, 8, 16, 24]


def test_detector_rows_are_the_models_own_detections():
    torch.manual_seed(0)
    model = extract.build([SMALL], {}, 0, "cpu")["objects"]
    model.roi_heads.score_thresh = 0.011  # of random scores, about 1/91, some and not all
    frames = [torch.rand(3, 120, 160) for _ in range(2)]
    with torch.inference_mode():
        F_O, theirs = extract.detect(model, frames), model(frames)
    categories = extract.DETECTORS[SMALL].meta["categories"]
    names = [c for c in categories if c not in ("__background__", "N/A")]
    assert len(names) == 80
    for F_o, own in zip(F_O, theirs):
        n = min(16, len(own["scores"]))
        assert n > 0 and (F_o[n:] == 0).all()
        for row, score, label, box in zip(F_o[:n], own["scores"], own["labels"], own["boxes"]):
            if categories[label] != "N/A":
                assert row[names.index(categories[label])] == score
            assert torch.allclose(row[-4:], box / torch.tensor([160, 120, 160, 120]), atol=1e-5)
        assert (F_o[:n, :80].sum(1) <= 1).all()


def as_mmaction2(key):
    """The same parameter in mmaction2's TSN, from the layouts in its model zoo."""
    for old, new in ((r"downsample\.0", "downsample.conv"), (r"downsample\.1", "downsample.bn"),
                     (r"\bconv(\d)\.", r"conv\1.conv."), (r"\bbn(\d)\.", r"conv\1.bn.")):
        key = re.sub(old, new, key)
    return "cls_head.fc_cls." + key[3:] if key.startswith("fc.") else "backbone." + key


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A --weights folder whose files have the published layouts (not values), and their hashes in FILES."""
    folder, old = tmp_path_factory.mktemp("weights"), dict(extract.FILES)
    torch.manual_seed(7)
    resnet18, resnet50 = torchvision.models.resnet18, torchvision.models.resnet50
    models = dict(action_rgb=resnet50(num_classes=400), action_flow=resnet50(num_classes=400),
                  scene=resnet18(num_classes=365))
    models["action_flow"].conv1 = torch.nn.Conv2d(10, 64, 7, stride=2, padding=3, bias=False)
    for name, model in models.items():
        rename = (lambda k: "module." + k) if name == "scene" else as_mmaction2
        torch.save(dict(state_dict={rename(k): v for k, v in model.state_dict().items()}, meta=dict(epoch=1)),
                   folder / old[name][0])
    detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    torch.save({k: v for k, v in detector.state_dict().items() if not k.endswith("num_batches_tracked")},
               folder / old[SMALL][0])
    for name in (*models, SMALL):
        sha256 = hashlib.sha256((folder / old[name][0]).read_bytes()).hexdigest()
        extract.FILES[name] = (old[name][0], sha256[:8], old[name][2])
    yield folder, models
    extract.FILES.update(old)


def test_published_layouts_load_strictly_and_features_are_theirs(tmp_path, published):
    folder, models = published
    write_video(tmp_path / "v/joy/a.mp4", 20)
    assert extract.main([str(tmp_path / "v"), str(tmp_path / "f"), "--weights", str(folder), *TRY[1:]]) == 0
    f = np.load(tmp_path / "f/joy/a.npz")
    samples, _ = samples_of(tmp_path / "v/joy/a.mp4")
    assert f["frames"].tolist() == [0, 8, 16] and f["action"].dtype == np.float16
    y = (torch.from_numpy(np.stack([s["flow"] for s in samples])).permute(0, 3, 1, 2).float() - 128) / 128
    with torch.inference_mode():
        pooled = []
        for name, v in (("action_rgb", normalised(samples, "rgb")), ("action_flow", y)):
            *_, fc = (model := models[name].eval()).children()
            pooled.append(torch.nn.Sequential(*list(model.children())[:-1])(v).flatten(1))
        assert np.allclose(f["action"], ((pooled[0] + pooled[1]) / 2).numpy(), rtol=1e-3, atol=1e-3)
        scene = models["scene"].eval()(normalised(samples, "scene"))
        assert np.allclose(f["scene"], scene.numpy(), rtol=1e-3, atol=1e-3)
    settings = json.loads(str(f["settings"]))
    assert settings["every"] == 8 and settings["K"] == 16 and settings["random_weights"] is None
    for name in ("action_rgb", "action_flow", "scene", SMALL):
        assert hashlib.sha256((folder / extract.FILES[name][0]).read_bytes()).hexdigest() in settings["networks"][name]
    again = [str(tmp_path / "v/joy/a.mp4"), str(tmp_path / "one"), *settings["options"], "--weights", str(folder)]
    assert extract.main(again) == 0, "one video, by the options that its settings record"
    assert (tmp_path / "one/a.npz").read_bytes() == (tmp_path / "f/joy/a.npz").read_bytes()


def test_weights_errors(tmp_path, published, monkeypatch):
    write_video(tmp_path / "v/joy/a.mp4", 9)
    shutil.copytree(published[0], tmp_path / "w")
    argv = [str(tmp_path / "v"), str(tmp_path / "f"), "--weights", str(tmp_path / "w"), *TRY[1:]]
    path, prefix, addresses = tmp_path / "w" / extract.FILES["scene"][0], *extract.FILES["scene"][1:]
    state = torch.load(path, weights_only=True)["state_dict"]
    short = {k: v for k, v in state.items() if k != "module.conv1.weight"}
    for changed in (short, state | {"module.more": torch.ones(1)}):
        torch.save(dict(state_dict=changed), path)
        with pytest.raises(extract.InputError, match="SHA-256"):
            extract.main(argv)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(extract.FILES, "scene", (path.name, sha256, addresses))
        with pytest.raises(extract.InputError, match="not the weights of this network"):
            extract.main(argv)
    assert not list((tmp_path / "f").glob("*/*.npz"))


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Both classes' videos, three each, extracted once with random weights."""
    folder = tmp_path_factory.mktemp("extracted")
    for i in range(6):
        write_video(folder / "v" / ("anger", "joy")[i % 2] / f"clip[{i}].v1.mp4", 10 + 9 * i, seed=i)
    (folder / "v/trainlist01.txt").write_text("".join(f"{('anger', 'joy')[i % 2]}/clip[{i}].v1 1\n" for i in range(4)))
    (folder / "v/testlist01.txt").write_text("".join(f"{('anger', 'joy')[i % 2]}/clip[{i}].v1 1\n" for i in (4, 5)))
    done = shell(HERE / "extract_features.py", folder / "v", folder / "f", *TRY, status=0)
    return folder, done.stdout


def test_from_videos_to_accuracy(extracted, tmp_path):
    folder, printed = extracted
    assert printed.startswith("classes  anger 3, joy 3") and "RANDOM" in printed and "6 videos extracted, 0 failed" in printed
    f = np.load(folder / "f/joy/clip[5].v1.npz", allow_pickle=False)
    T = len(range(0, 55, 8))
    assert {k: (f[k].shape, f[k].dtype.kind) for k in f.files} == dict(
        action=((T, 2048), "f"), scene=((T, 365), "f"), objects=((T, 16, 84), "f"), frames=((T,), "i"),
        seconds=((T,), "f"), fps=((), "f"), warning=((), "U"), video_bytes=((), "i"), settings=((), "U"))
    scores = f["objects"][..., :80].max(-1)
    assert (np.diff(scores, axis=1) <= 2e-3).all() and scores[:, 0].min() > 0, "the most probable first"
    trained = shell(HERE / "dfan.py", "--data", folder / "f", "--epochs", "2", "--hidden", "8", "--out", tmp_path,
                    "--device", "cpu", status=0).stdout
    assert "RANDOM" in trained and "training 4: anger 2, joy 2" in trained and "\nresult " in trained


def test_rerun_skips_and_settings_are_kept_apart(extracted, tmp_path, capsys):
    folder, _ = extracted
    shutil.copytree(folder / "f", tmp_path / "f")
    argv = [str(folder / "v"), str(tmp_path / "f"), *TRY]
    assert extract.main(argv) == 0 and "6 finished before, 0 to do" in capsys.readouterr().out
    with pytest.raises(extract.InputError, match="every 8 .now 4..*--overwrite"):
        extract.main([*argv, "--every", "4"])
    broken = tmp_path / "f/joy/clip[1].v1.npz"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:5000])
    (tmp_path / "f/joy/clip[3].v1.npz").unlink()
    assert extract.main(argv) == 0 and "4 finished before, 2 to do" in capsys.readouterr().out
    assert broken.read_bytes() == whole, "made again, byte for byte"
    assert extract.main([*argv, "--overwrite", "--every", "16"]) == 0
    assert np.load(broken)["frames"].tolist() == [0, 16]


def test_a_codec_that_opens_but_does_not_decode(tmp_path):
    """OpenCV opens AV1 and decodes none of it: an MP4 that says it holds AV1."""
    path = write_video(tmp_path / "a.mp4", 20)
    path.write_bytes(path.read_bytes().replace(b"mp4v", b"av01").replace(b"esds", b"free"))
    assert cv2.VideoCapture(str(path)).isOpened()
    with pytest.raises(extract.VideoError, match="no frame decodes .codec AV01.*ffmpeg"):
        list(extract.read_video(path, 8, False))


def test_extraction_input_errors(tmp_path):
    def error(*argv):
        with pytest.raises(extract.InputError) as caught:
            extract.main([str(a) for a in (*argv, tmp_path / "f", *TRY)])
        assert "\n" not in str(caught.value) and not list((tmp_path / "f").rglob("*.npz"))
        return str(caught.value)

    (tmp_path / "v/joy").mkdir(parents=True)
    assert "nowhere" in error(tmp_path / "nowhere") and "no video" in error(tmp_path / "v")
    (tmp_path / "v/joy/a.mp4").touch()
    (tmp_path / "v/joy/a.avi").touch()
    assert "a.avi" in (e := error(tmp_path / "v")) and "a.mp4" in e and "joy/a" in e
    (tmp_path / "v/joy/a.avi").rename(tmp_path / "v/a.avi")
    assert "give the folder above" in error(tmp_path / "v")
    (tmp_path / "v/a.avi").unlink()
    done = shell(HERE / "extract_features.py", tmp_path / "v", tmp_path / "f", "--weights", tmp_path, status=2,
                 TORCH_HOME=str(tmp_path / "cache"), http_proxy="http://127.0.0.1:9",
                 https_proxy="http://127.0.0.1:9")
    last = done.stderr.strip().splitlines()[-1]
    assert "2692d16c.pth" in last and "https://download.openmmlab.com" in last and "--weights DIR" in last


def test_a_damaged_packet_does_not_end_the_video(tmp_path):
    path = write_video(tmp_path / "a.avi", 60, codec="MJPG")
    content = bytearray(path.read_bytes())
    frames = [i for i in range(len(content) - 4) if content[i:i + 4] == b"00dc"]
    for at in frames[20:23]:  # three JPEGs of zeros
        size = int.from_bytes(content[at + 4:at + 8], "little")
        content[at + 8:at + 8 + size] = bytes(size)
    path.write_bytes(content)
    samples, _ = samples_of(path, flow=False)
    assert [s["number"] for s in samples] == list(range(0, 57, 8)), "numbers count the 57 frames that decode"


def test_a_promise_of_more_frames_is_no_failure(tmp_path):
    path = write_video(tmp_path / "a.avi", 40, codec="MJPG")
    content = path.read_bytes()
    at = content.index(b"avih") + 8 + 16  # dwTotalFrames of the main header
    stream = content.index(b"strh") + 8 + 32  # dwLength of the stream
    promised = (400).to_bytes(4, "little")
    path.write_bytes(content[:at] + promised + content[at + 4:stream] + promised + content[stream + 4:])
    samples, warning = samples_of(path, flow=False)
    assert len(samples) == 5 and (not warning or "40 frames decode" in warning and "sound or its index" in warning)


def test_a_cover_picture_is_refused_and_a_picture_like_film_is_not(tmp_path, monkeypatch):
    path = write_video(tmp_path / "one.avi", 1, codec="MJPG")
    assert len(samples_of(path, flow=False)[0]) == 1
    grabs = iter([True] + [False] * 999)  # what OpenCV says of a cover: one frame, 90000 fps
    said = {cv2.CAP_PROP_FPS: 90000., cv2.CAP_PROP_FRAME_COUNT: 180000.}
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: Namespace(
        isOpened=lambda: True, get=lambda what: said.get(what, 0.), grab=lambda: next(grabs),
        retrieve=lambda: (True, np.zeros((48, 64, 3), np.uint8))))
    with pytest.raises(extract.VideoError, match="cover picture.*ffmpeg"):
        list(extract.read_video(path, 8, False))


def test_odd_videos(tmp_path):
    """Deep in folders, with odd names; text, archives and pipes that are no video."""
    joy = tmp_path / "v/joy"
    base = write_video(joy / "base.MP4", 20, 64, 80).read_bytes()
    cut = write_video(joy / "tail.avi", 80, 240, 320, codec="MJPG")
    cut.write_bytes(cut.read_bytes()[:cut.stat().st_size // 2])
    (joy / "._base.mp4").write_bytes(b"not looked at")
    (joy / "deep/er").mkdir(parents=True)
    for name in ("deep/er/nested", "clip[1] & it's.v1", "\U0001f600", "--help", "100%d", "name 7", "dot at the end."):
        (joy / f"{name}.mp4").write_bytes(base)
    good = {p for p in joy.rglob("[!.]*.*") if p.is_file()}
    broken = dict(empty=b"", zeros=bytes(5000), text=b"not a video\n" * 99, zip=b"PK\3\4" + bytes(500), header=base[:28],
                  cut=base[:len(base) // 2], ftyp=base[:32] + np.random.default_rng(0).bytes(3000))
    for name, content in broken.items():
        (joy / f"{name}.mp4").write_bytes(content)
    (joy / "dangling.mp4").symlink_to(joy / "nowhere.mp4")
    os.mkfifo(joy / "pipe.mp4")
    with open(os.fsencode(joy) + b"/\xff.mp4", "wb") as f:  # OpenCV 5.0 crashes on such a name
        f.write(base)
    done = shell(HERE / "extract_features.py", tmp_path / "v", tmp_path / "f", *TRY, "--no-flow", "--every", "20", status=1)
    failed = {line.split(".mp4: ")[0].split("/")[-1] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert failed == {*broken, "dangling", "pipe", "\\udcff"}
    made = {p.name for p in (tmp_path / "f/joy").iterdir()}
    assert made == {f"{p.name[:-len(p.suffix)]}.npz" for p in good}
    assert "one class alone, joy" in done.stdout
    warning = str(np.load(tmp_path / "f/joy/tail.npz")["warning"])
    assert "cut off, or its sound" in warning and done.stdout.splitlines()[-1].endswith(f"tail.avi: {warning}")
    assert "action_flow" not in json.loads(str(np.load(tmp_path / "f/joy/base.npz")["settings"]))["networks"]


def test_finetuning(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(extract.TUNING, "epochs", 1)
    ids = [f"{('anger', 'joy')[i % 2]}/{i}" for i in range(4)]
    for i, identity in enumerate(ids):
        path = write_video(tmp_path / f"v/{identity}.mp4", 20, seed=i)
    for name, listed_ids in (("trainlist01", ids[:2]), ("testlist01", ids[2:]), ("other", ids[1:3]), ("lost", [ids[0], "joy/9"])):
        (tmp_path / f"v/{name}.txt").write_text("\n".join(listed_ids))
    run = lambda name: extract.main([str(tmp_path / "v"), str(tmp_path / "f"), *TRY, "--no-flow", "--finetune",
                                     str(tmp_path / f"v/{name}.txt")])

    def killed_in_scene(name, *rest):
        if name == "scene":
            raise KeyboardInterrupt
        return tune(name, *rest)
    tune = extract.tune
    monkeypatch.setattr(extract, "tune", killed_in_scene)
    with pytest.raises(KeyboardInterrupt):
        run("trainlist01")
    monkeypatch.setattr(extract, "tune", tune)
    capsys.readouterr()
    assert run("trainlist01") == 0
    out = capsys.readouterr().out
    assert "scene  epoch 1/1" in out and "action_rgb  epoch" not in out and "tuned_action_rgb.pt is used again" in out
    state = torch.load(tmp_path / "f/tuned_scene.pt", weights_only=True)["state"]
    fresh = extract.build(["scene"], {}, 0, "cpu")["scene"]
    assert not torch.equal(state["layer4.1.conv1.weight"], fresh.layer4[1].conv1.weight)
    fresh.load_state_dict(state)
    with torch.inference_mode():
        scene = fresh(normalised(samples_of(path, flow=False)[0], "scene"))
    assert np.allclose(np.load(tmp_path / "f/joy/3.npz")["scene"], scene, rtol=2e-3, atol=2e-3)
    assert json.loads(str(np.load(tmp_path / "f/joy/3.npz")["settings"]))["tuned_on"] == ids[:2]
    for name, word in (("other", "tuned on another list"), ("lost", "lost.txt: not in .*joy/9")):
        with pytest.raises(extract.InputError, match=word):
            run(name)

    train("--data", tmp_path / "f", "--epochs", 1, "--out", tmp_path / "o1")
    assert "LEAKED" not in capsys.readouterr().out
    assert not predicted(capsys, path, "--checkpoint", tmp_path / "o1/run0.pt", "--out", tmp_path / "p")[1]
    assert (tmp_path / "p/3.npz").read_bytes() == (tmp_path / "f/joy/3.npz").read_bytes(), "with the tuned networks"


def test_predict_a_video(extracted, tmp_path):
    folder, _ = extracted
    shell(HERE / "dfan.py", "--data", folder / "f", "--epochs", "1", "--hidden", "4", "--out", tmp_path / "o", status=0)
    clip = write_video(tmp_path / "my clip.mp4", 30, seed=9)
    ask = [HERE / "dfan.py", "--predict", clip, tmp_path / "none.mp4", "--checkpoint", tmp_path / "o/run0.pt", "--out",
           tmp_path / "p"]
    done = shell(*ask, status=2)
    assert "RANDOM WEIGHTS" in done.stdout and "none.mp4" in done.stderr.splitlines()[-1]
    found = json.loads((tmp_path / "p/my clip.json").read_text())
    assert found["seconds"] == pytest.approx([0, 8 / 24, 16 / 24, 1], abs=1e-3) and found["marks"] == ["RANDOM WEIGHTS"]
    assert cv2.imread(str(tmp_path / "p/my clip.png")).shape == (900, 1600, 3)
    other = write_video(tmp_path / "other/my clip.mp4", 50, seed=8)
    done = shell(*ask[:2], other, *ask[4:], status=2)
    assert "made from another video" in done.stderr, "nothing is written over another video's features"


def test_killed_extraction_goes_on_to_the_same_files(extracted, tmp_path):
    argv = [HERE / "extract_features.py", extracted[0] / "v", tmp_path / "f", *TRY]
    victim = subprocess.Popen([sys.executable, *map(str, argv)], stdout=subprocess.DEVNULL)
    while victim.poll() is None and not list((tmp_path / "f").glob("*/*.npz")):
        time.sleep(0.1)
    victim.kill()
    assert victim.wait() == -9
    assert "finished before" in shell(*argv, status=0).stdout
    for path in (extracted[0] / "f").glob("*/*.npz"):
        assert path.read_bytes() == (tmp_path / "f" / path.parent.name / path.name).read_bytes()


# ---- python test_dfan.py --speed ----

def speed(B=16, T=400, rounds=5, literal_rounds=1):
    F, y = (torch.randn(B, T, 2048), torch.randn(B, T, 365), torch.rand(B, T, 16, 84)), torch.arange(B) % 6
    lengths, W_p = torch.full((B,), T), nn.Linear(256, 6)
    lstm = nn.LSTM(2048 + 365 + 84, 256, num_layers=2, batch_first=True)  # on [F_A; F_S; mean object], to compare with
    two_layers = lambda F_A, F_S, F_O, _: dict(logits=W_p(lstm(torch.cat([F_A, F_S, F_O.mean(2)], -1))[0]))
    nets = {"nn.LSTM": two_layers, "Fast": dfan.Fast(2048, 365, 84, 256, 6), "literal": dfan.DFAN(2048, 365, 84, 256, 6)}
    seconds = {name: [] for name in nets}
    for n in range(rounds + 1):  # the first does not count
        for name, net in nets.items():
            if name != "literal" or 0 < n <= literal_rounds:
                start = time.process_time()
                dfan.loss_fn(net(*F, lengths)["logits"], y, lengths).backward()
                seconds[name] += [time.process_time() - start] if n else []
    middle = {name: statistics.median(v) for name, v in seconds.items()}
    print(f"forward and backward, B={B}, T={T}, H=256, K=16, {torch.get_num_threads()} threads: CPU seconds, median")
    for name, v in middle.items():
        print(f"  {name:<8} {v:7.2f}   {min(seconds[name]):.2f} to {max(seconds[name]):.2f} in {len(seconds[name])} rounds")
    print(f"literal / Fast {middle['literal'] / middle['Fast']:.2f}   Fast / nn.LSTM {middle['Fast'] / middle['nn.LSTM']:.2f}")


if __name__ == "__main__":
    for name, function in (("--speed", speed), ("--readings", readings)):
        if name in sys.argv:
            function()
