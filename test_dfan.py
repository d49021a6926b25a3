"""Tests of dfan.py and extract_features.py: python -m pytest -q. The benchmark: python test_dfan.py [--quick].
The readings of the paper that were not taken, on the planted set: python test_dfan.py --readings. Twenty kills of
extraction and of training: python test_dfan.py --faults.

The oracle below is written from the paper and from the README's readings [R1]-[R8], not from dfan.py: one video at a
time, loops over t and i, float64, no identity used.
"""
import concurrent.futures
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision

import dfan
import extract_features as extract

HERE = Path(__file__).resolve().parent
BETA = 0.6


@pytest.fixture(autouse=True)
def same_threads():
    """dfan.main sets one thread for the planted set; convolutions round otherwise with another number."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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


def oracle(cell, F_A, F_S, F_O, training, o_focus=True):
    """Equations (1)-(10) for one video; F_A (T,D), F_S (T,D), F_O (T,K,D). Returns logits, P, A_T at the end, A_o.

    Without O.Focus, F_o_hat is the mean of the objects that are there, and there is no LSTM.S [R9].
    """
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
        A_o = np.zeros(K)
        if o_focus:
            h1, c1 = lstm_cell(*w["S_in"], *w["S_h"], F_O_bar, np.concatenate([h2, h1]), c1)                    # (4)
        elif there:
            A_o[there] = 1 / len(there)
        if there and o_focus:
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
    for p in net.parameters():                                    # larger than the default: nothing is nearly linear
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


@pytest.mark.parametrize("training", [False, True])
def test_t_focus_alone_is_the_paper_without_o_focus(training):
    torch.manual_seed(1)
    net = dfan.TimeFocus(7, 5, 6, 4, 3).double().train(training)
    assert {name for name, _ in net.cell.named_children()} == {"W_p", "T_in", "T_h", "W_Th", "W_Tf"}
    F_A, F_S, F_O, lengths = make_batch([9, 4, 1])
    out = net(F_A, F_S, F_O, lengths)
    for b, n in enumerate(lengths):
        expected = oracle(net.cell, *(v[b, :n].numpy() for v in (F_A, F_S, F_O)), training, o_focus=False)
        for name, value in zip(("logits", "P", "A_T", "A_o"), expected):
            assert np.abs(out[name][b, :n].detach().numpy() - value).max() < 1e-12, name
            assert (out[name][b, n:] == 0).all()


@pytest.mark.parametrize("how, pool", [("max", np.max), ("avg", np.mean)])
def test_pooling_takes_ten_uniform_frames(how, pool):
    net = dfan.Pooling(how, 7, 5, 3).double()
    W, b = (p.detach().numpy() for p in (net.W.weight, net.W.bias))
    F_A, F_S, F_O, lengths = make_batch([40, 10, 3])
    out = net(F_A, F_S, F_O, lengths)
    for video, frames in enumerate([range(2, 40, 4), range(10), [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]]):
        FF = np.concatenate([F_A[video].numpy(), F_S[video].numpy()], -1)[list(frames)]
        n = lengths[video]
        assert np.allclose(out["logits"][video, :n].detach().numpy(), W @ pool(FF, axis=0) + b)
        assert (out["P"][video, n:] == 0).all() and np.allclose(out["P"][video, :n].sum(-1).detach().numpy(), 1)
        assert np.allclose(out["A_T"][video].numpy(), np.bincount(list(frames), minlength=40) / 10)


def test_gradients_against_finite_differences():
    net = make_net().train()
    F_A, F_S, F_O, lengths = make_batch([5, 3])
    labels = torch.tensor([2, 0])
    value = lambda: dfan.loss_fn(net(F_A, F_S, F_O, lengths)["logits"], labels, lengths)
    value().backward()
    for name, p in net.named_parameters():
        flat, step = p.data.view(-1), 1e-6
        for i in range(0, len(flat), max(1, len(flat) // 7)):
            old = flat[i].item()
            flat[i] = old + step
            up = value().item()
            flat[i] = old - step
            down = value().item()
            flat[i] = old
            assert abs((up - down) / (2 * step) - p.grad.view(-1)[i].item()) < 1e-7, (name, i)


@pytest.mark.parametrize("training", [False, True])
def test_the_loops_gradient_is_autograds(training):
    """Of everything that the network returns, not of the loss alone; autograd goes through DFACell.forward."""
    net = make_net().train(training)
    *F, lengths = make_batch([7, 3, 5])
    valid = (torch.arange(7) < lengths[:, None]).unsqueeze(-1).double()
    plain, _ = dfan.unroll(net.cell, net.cell.project(*F, valid))
    written = dfan.Loop.run(net.cell, net.cell.project(*F, valid))
    weights = [torch.randn(v.shape, dtype=v.dtype) for v in plain]
    grads = []
    for out in (plain, written):
        assert all(torch.allclose(a, b) for a, b in zip(out, plain))
        net.zero_grad()
        sum((v * w).sum() for v, w in zip(out, weights)).backward(retain_graph=True)
        grads.append([p.grad.clone() for p in net.parameters()])
    for (name, _), a, b in zip(net.named_parameters(), *grads):
        assert (a - b).abs().max() < 1e-12 * (1 + a.abs().max()) and a.abs().max() > 0, name


def test_gradients_reach_every_parameter_and_the_features():
    net = make_net().train()
    *F, lengths = make_batch([6, 4])
    F = [v.requires_grad_() for v in F]
    dfan.loss_fn(net(*F, lengths)["logits"], torch.tensor([1, 2]), lengths).backward()
    assert all(v.grad.abs().sum() > 0 for v in (*net.parameters(), *F))
    assert F[0].grad[1, 4:].abs().sum() == 0, "padding has no gradient"


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(training):
    net = make_net(torch.float32).train(training)
    F_A, F_S, F_O, lengths = make_batch([9, 4, 6], dtype=torch.float32)
    for v in (F_A, F_S, F_O):
        v[1, 4:] = 1e6                                            # what lies in the padding is not looked at
    out = net(F_A, F_S, F_O, lengths)
    for b, n in enumerate(lengths):
        alone = net(F_A[b:b + 1, :n], F_S[b:b + 1, :n], F_O[b:b + 1, :n])
        for name in out:
            assert (out[name][b, :n] - alone[name][0]).abs().max() < 1e-6, (name, b)


def test_attentions_are_distributions():
    *F, lengths = make_batch([9, 4], K=5)
    for training in (False, True):
        out = make_net().train(training)(*F, lengths)
        assert torch.allclose(out["A_T"].sum(1), torch.ones(2, dtype=torch.float64))
        there = (F[2] != 0).any(-1)
        assert (out["A_o"][~there] == 0).all() and (out["A_o"][:, 1] == 0).all()
        some = there.any(-1) & (torch.arange(9) < lengths[:, None])
        assert torch.allclose(out["A_o"].sum(-1)[some], torch.ones((), dtype=torch.float64))


def test_scrambler_trains_only_and_beta_one_is_off():
    *F, lengths = make_batch([8])
    net = make_net()
    still, mixed = net.eval()(*F)["A_T"], net.train()(*F)["A_T"]
    assert (still - mixed).abs().max() > 1e-3
    off = make_net(beta=1.0).train()(*F)["A_T"]
    assert torch.allclose(off, still)
    one = [v[:, :1] for v in F]
    assert torch.equal(net.train()(*one)["A_T"], torch.ones(1, 1, dtype=torch.float64)), "nothing to mix at frame 0"


def test_lstm_is_pytorchs():
    cell = make_net().cell
    for in_half, h_half, size in ((cell.S_in, cell.S_h, 6), (cell.T_in, cell.T_h, 12)):
        ours = torch.nn.LSTMCell(size, 4).double()
        x, h, c = (torch.randn(2, n, dtype=torch.float64) for n in (size, 4, 4))
        with torch.no_grad():
            for theirs, mine in ((ours.weight_ih, in_half.weight), (ours.bias_ih, in_half.bias),
                                 (ours.weight_hh, h_half.weight[:, -4:]), (ours.bias_hh, h_half.bias)):
                theirs.copy_(mine)
        other = torch.zeros(2, h_half.in_features - 4, dtype=torch.float64)
        got = dfan.lstm(in_half(x) + h_half(torch.cat([other, h], -1)), c)[:2]
        assert all(torch.allclose(a, b) for a, b in zip(got, ours(x, (h, c))))


def test_parameters_have_the_papers_names_and_widths():
    net = dfan.DFAN(2048, 365, 84, 256, 6)
    shapes = {name: tuple(p.weight.shape) for name, p in net.cell.named_children()}
    assert shapes == dict(W_oh=(1, 256), W_of=(1, 84), S_in=(1024, 84), S_h=(1024, 512), W_p=(6, 256),
                          T_in=(1024, 2413), T_h=(1024, 262), W_Th=(1, 256), W_Tf=(1, 2497))
    assert net.cell.beta == 0.6


def test_loss_averages_frames_then_videos():
    logits = torch.randn(2, 5, 3, dtype=torch.float64)
    P = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(-1, keepdims=True)
    expected = (-np.log(P[0, :5, 2]).mean() - np.log(P[1, :2, 0]).mean()) / 2
    assert abs(dfan.loss_fn(logits, torch.tensor([2, 0]), torch.tensor([5, 2])).item() - expected) < 1e-12


def test_vote():
    def P(*emotions, sure=0.6):
        return [[sure if c == e else (1 - sure) / 2 for c in range(3)] for e in emotions]

    cases = [(P(*[0] * 20, *[1] * 6, *[2] * 4), 30, 1),                        # the last ten alone count
             (P(*[0] * 10, *[2] * 15), 10, 0),                                 # padding does not
             (P(*[0] * 9, 0) + P(*[1] * 5, sure=0.8) + P(*[2] * 9), 15, 1),    # 5 to 5: the higher summed probability
             (P(2, 2, 0), 3, 2),                                               # shorter than ten
             (P(0) + P(1, sure=0.9), 2, 1), (P(0, sure=0.9) + P(1), 2, 0)]
    T = max(len(p) for p, _, _ in cases)
    batch = torch.zeros(len(cases), T, 3)
    for b, (p, _, _) in enumerate(cases):
        batch[b, :len(p)] = torch.tensor(p)
    assert dfan.vote(batch, torch.tensor([n for _, n, _ in cases])).tolist() == [e for _, _, e in cases]


def test_scores_are_the_papers():
    labels, emotions = [0, 0, 0, 1, 1, 2], np.array([0, 0, 1, 1, 0, 2])
    got = dfan.scores(labels, emotions, ["a", "b", "c"])
    assert got["accuracy"] == 4 / 6 and abs(got["macro"] - (2 / 3 + 1 / 2 + 1) / 3) < 1e-12
    assert np.allclose(got["confusion"], [[2 / 3, 1 / 3, 0], [1 / 2, 1 / 2, 0], [0, 0, 1]])


def test_every_equation_and_reading_is_tagged():
    step = inspect.getsource(dfan.DFACell)
    source, readme = (HERE / "dfan.py").read_text(), (HERE / "README.md").read_text()
    extract = (HERE / "extract_features.py").read_text()
    for n in range(1, 11):
        assert any(f"({n})" in line.partition("#")[2] for line in step.splitlines()), f"equation ({n})"
    for n in range(1, 16):
        assert f"R{n} " in readme, f"README: reading R{n}"
        assert f"[R{n}]" in source + extract, f"no line carries [R{n}]"


# ----------------------------------------------------------------------------------------------------------------------
# Data, split lists, protocols
# ----------------------------------------------------------------------------------------------------------------------

WIDTHS = (7, 5, 6)


def write_feats(folder, classes=("anger", "joy"), n=4, K=3, seed=0, stems=None):
    """Small feature files whose action feature carries the class; lists of odd and even videos beside them."""
    rng = np.random.default_rng(seed)
    ids = []
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            T = int(rng.integers(3, 15))
            stem = stems[i] if stems else f"{name}_{i}"
            F = dict(action=rng.standard_normal((T, 7)) + 2 * np.eye(7)[c], scene=rng.standard_normal((T, 5)),
                     objects=rng.random((T, K, 6)))
            np.savez(folder / name / f"{stem}.npz", **{k: v.astype(np.float16) for k, v in F.items()})
            ids.append(f"{name}/{stem}")
    (folder / "trainlist01.txt").write_text("".join(f"{i} 1\n" for i in ids[::2]))
    (folder / "testlist01.txt").write_text("".join(f"{i} 1\n" for i in ids[1::2]))
    return folder


def run_main(*argv):
    small = [] if "--predict" in argv else ["--hidden", "4", "--epochs", "2", "--batch", "4"]
    dfan.main([*small, *map(str, argv)])


def error_of(*argv):
    with pytest.raises(dfan.InputError) as caught:
        run_main(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


LISTS = {
    "plain": "anger/a 1\njoy/b 2\n", "no label": "anger/a\njoy/b\n", "no last newline": "anger/a 1\njoy/b 2",
    "CRLF": "anger/a 1\r\njoy/b 2\r\n", "labels from 0": "anger/a 0\njoy/b 1\n",
    "extension": "anger/a.mp4 1\njoy/b.npz\n", "BOM": "\ufeffanger/a 1\njoy/b 2\n", "bare stems": "a 1\nb\n",
    "blank lines, twice": "\nanger/a 1\n\njoy/b 2\nanger/a 1\n",
    "tabs": "anger/a\t1\njoy/b\t2\n", "wrong label": "anger/a 2\njoy/b 1\n"}


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS)
def test_list_formats(tmp_path, text):
    (tmp_path / "list.txt").write_text(text, encoding="utf-8", newline="")
    assert dfan.read_list(tmp_path / "list.txt", ["anger/a", "anger/c", "joy/b"]) == ([0, 2], [])


def test_awkward_names(tmp_path):
    ids = ["anger/Ten [Part1].mp4", "anger/v1", "anger/v1.0", "joy/it's 2", "joy/it's", "joy/Fun & more (HD)", "joy/7"]
    for line, expected in (("anger/Ten [Part1].mp4 1", 0), ("anger/Ten [Part1].mp4.mp4", 0), ("anger/v1.0 1", 2),
                           ("anger/v1.mp4 1", 1), ("joy/it's 2 4", 3), ("joy/it's 2", 3), ("joy/it's 4", 4),
                           ("Fun & more (HD) 4", 5), ("7 4", 6), ("7", 6)):
        (tmp_path / "list.txt").write_text(line)
        assert dfan.read_list(tmp_path / "list.txt", ids) == ([expected], []), line
    (tmp_path / "list.txt").write_text("anger/v1.7 1\nanger/it's\nsadness/v1 5\n")
    never_another = ([], ["anger/v1.7", "anger/it's", "sadness/v1"])
    assert dfan.read_list(tmp_path / "list.txt", ids) == never_another


def test_list_errors(tmp_path):
    feats = write_feats(tmp_path / "f", stems=["1", "2", "3", "4"])
    (tmp_path / "bad.txt").write_text("1 1\n")
    assert "anger/1 and joy/1" in error_of("--data", feats, "--split", tmp_path / "bad.txt", feats / "testlist01.txt")
    (tmp_path / "bad.txt").write_text("")
    assert "empty" in error_of("--data", feats, "--split", tmp_path / "bad.txt", feats / "testlist01.txt")
    (tmp_path / "bad.txt").write_text("anger/1\nanger/9 1\njoy/1\n")
    e = error_of("--data", feats, "--split", tmp_path / "bad.txt", feats / "testlist01.txt")
    assert "1 listed videos" in e and "anger/9" in e and "--allow-missing" in e
    assert "in both" in error_of("--data", feats, "--split", feats / "testlist01.txt", feats / "testlist01.txt")
    (tmp_path / "bad.txt").write_text("anger/1\nanger/9")
    e = error_of("--data", feats, "--split", tmp_path / "bad.txt", feats / "testlist01.txt", "--allow-missing")
    assert "no video of class joy" in e
    assert "pairs" in error_of("--data", feats, "--split", feats / "testlist01.txt")
    assert "nowhere.txt" in error_of("--data", feats, "--split", tmp_path / "nowhere.txt", feats / "testlist01.txt")
    (feats / "trainlist01.txt").unlink()
    assert "trainlist01.txt" in (e := error_of("--data", feats)) and "--alternate-split" in e


def test_allow_missing_counts_and_names(tmp_path, capsys):
    feats = write_feats(tmp_path / "f")
    with open(feats / "trainlist01.txt", "a") as f:
        f.write("anger/lost_one 1\n")
    run_main("--data", feats, "--allow-missing", "--out", tmp_path / "o")
    out = capsys.readouterr().out
    assert "1 videos" in out and "anger/lost_one" in out and "train 4 / validation 4" in out and "819 / 818" in out


def test_alternate_split_is_named(tmp_path, capsys):
    feats = write_feats(tmp_path / "f", n=5)
    (feats / "trainlist01.txt").unlink()
    args = dfan.parse_args(["--data", str(feats), "--alternate-split"])
    data = dfan.Features(feats)
    (train, test), = dfan.make_splits(args, data)
    order = sorted(data.ids)
    assert [data.ids[i] for i in train] == order[::2] and [data.ids[i] for i in test] == order[1::2]
    assert "not the data set's own lists" in capsys.readouterr().out


def test_videoemotion_splits(tmp_path):
    feats = write_feats(tmp_path / "f", ("Anger", "Fear", "Joy"), n=9)
    data = dfan.Features(feats)
    splits = dfan.make_splits(dfan.parse_args(["--data", str(feats), "--dataset", "videoemotion", "--seed", "5"]), data)
    assert len(splits) == 10 and len({tuple(sorted(train)) for train, _ in splits}) == 10
    for train, test in splits:
        assert sorted(train + test) == list(range(27))
        assert np.bincount([data.labels[i] for i in train]).tolist() == [6, 6, 6]


def test_videoemotion_published_lists(tmp_path):
    feats = write_feats(tmp_path / "f", stems=["1", "2", "3", "4"])
    for c in ("anger", "joy"):
        for i in range(1, 5):
            (feats / c / f"{i}.npz").rename(feats / c / f"{i + 4 * (c == 'joy')}.npz")
    files = []
    for k, (train, test) in enumerate([((1, 2, 5, 6), (3, 4, 7, 8)), ((3, 4, 7, 8), (1, 2, 5, 6))]):
        for name, numbers in (("Trainset", train), ("Testset", test)):
            files.append(tmp_path / f"VE_{k}_{name}.list")
            files[-1].write_text("".join(f"{n} {int(n > 4)}\r\n" for n in numbers), newline="")
    args = dfan.parse_args(["--data", str(feats), "--dataset", "videoemotion", "--split", *map(str, files)])
    splits = dfan.make_splits(args, dfan.Features(feats))
    assert splits == [([0, 1, 4, 5], [2, 3, 6, 7]), ([2, 3, 6, 7], [0, 1, 4, 5])]


def test_bad_features_name_the_file(tmp_path):
    feats = write_feats(tmp_path / "f")
    good = dict(np.load(feats / "joy/joy_0.npz"))
    bad = feats / "joy/joy_0.npz"
    for change, word in ((dict(scene=good["scene"] * np.float16(np.nan)), "NaN"),
                         (dict(scene=good["scene"][1:]), "disagree"),
                         (dict(action=good["action"] + np.float16(np.inf)), "infinity"),
                         (dict(objects=np.array([{}, 1], object)), "plain .npz"),
                         (dict(action=good["action"][:, :3]), "widths")):
        np.savez(bad, **good | change)
        assert word in (e := error_of("--data", feats)) and "joy_0.npz" in e, word
    np.savez(bad, action=good["action"])
    assert "no array objects, scene" in error_of("--data", feats)
    np.savez(bad, **good)
    whole = bad.read_bytes()
    for damaged in (whole[:len(whole) // 2], b"", b"not a zip"):
        bad.write_bytes(damaged)
        assert "joy_0.npz" in error_of("--data", feats)
    (tmp_path / "empty").mkdir()
    assert "empty" in error_of("--data", tmp_path / "empty")
    assert "nowhere" in error_of("--data", tmp_path / "nowhere")
    few = write_feats(tmp_path / "few", n=2)
    assert "fewer than 3" in error_of("--data", few, "--dataset", "videoemotion")
    (few / "fear").mkdir()
    assert "fear: a class without an .npz" in error_of("--data", few)
    assert "two or more classes" in error_of("--data", write_feats(tmp_path / "one", classes=("joy",)))


def test_writing_at_once(tmp_path):
    def write(n):
        for i in range(100):
            dfan.write_whole(tmp_path / f"{i % 3}", b"%d" % n * 1000)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert {p.name for p in tmp_path.iterdir()} == set("012")
    assert all(len(set(p.read_bytes())) == 1 and p.stat().st_size == 1000 for p in tmp_path.iterdir())


def test_nothing_in_an_npz_runs(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    feats = write_feats(tmp_path / "f")
    good = dict(np.load(feats / "joy/joy_0.npz"))
    np.savez(feats / "joy/joy_0.npz", **good | dict(action=np.array([Trap()], object)))
    error_of("--data", feats)
    torch.save(dict(model=Trap()), tmp_path / "run0.pt")
    with pytest.raises(dfan.InputError, match="run0.pt"):
        dfan.load_checkpoint(tmp_path / "run0.pt", "delete it")
    assert not (tmp_path / "ran").exists()


def test_batches_cover_and_group(tmp_path):
    lengths = list(np.random.default_rng(0).lognormal(5.7, 0.75, 500).astype(int) + 1)
    args = dfan.parse_args(["--data", "f", "--frames", "9000"])
    batches = dfan.make_batches(range(500), lengths, args, np.random.default_rng([0, 1]))
    assert sorted(i for b in batches for i in b) == list(range(500)) and max(map(len, batches)) == 16
    assert max(len(b) * max(lengths[i] for i in b) for b in batches) <= 9000 < 16 * max(lengths)
    again = dfan.make_batches(range(500), lengths, args, np.random.default_rng([0, 1]))
    other = dfan.make_batches(range(500), lengths, args, np.random.default_rng([0, 2]))
    assert batches == again != other
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert padded < 1.15 * sum(lengths)


def test_what_can_be_known_before_training_is_said_before(tmp_path, capsys):
    feats, videos = write_feats(tmp_path / "f"), tmp_path / "v"
    videos.mkdir()
    (tmp_path / "file").touch()
    common = "--data", feats, "--out", tmp_path / "o"
    for argv, word in ((["--out", tmp_path / "file/o"], "cannot be written to"),
                       (["--videos", tmp_path / "w"], "no such"), (["--objects", "9"], "there are 3"),
                       (["--reproduce", "figure4"], "name the folder"),
                       (["--reproduce", "figure4", "--videos", videos], "frames and seconds"),
                       (["--features", "action,audio"], "name others with --features")):
        assert word in error_of(*common, *argv), argv
        assert "epoch" not in capsys.readouterr().out
    run_main(*common, "--resume")
    assert "starts anew" in capsys.readouterr().out
    assert "ask for --epochs 2" in error_of(*common, "--resume", "--epochs", "1")
    (tmp_path / "o/results.json").write_text("{")
    assert "results.json: damaged" in error_of(*common, "--reproduce", "table3")


def test_a_video_longer_than_a_batch_is_named(tmp_path):
    feats = write_feats(tmp_path / "f")
    assert "--frames 3" in (e := error_of("--data", feats, "--frames", "3")) and "anger/anger_" in e


def test_resume_is_the_uninterrupted_run(tmp_path, capsys):
    feats = write_feats(tmp_path / "f", n=8)
    common = ["--data", str(feats), "--hidden", "4", "--batch", "4", "--epochs"]
    dfan.main(common + ["5", "--out", str(tmp_path / "a")])
    whole = capsys.readouterr().out
    dfan.main(common + ["2", "--out", str(tmp_path / "b")])
    capsys.readouterr()
    dfan.main(common + ["5", "--out", str(tmp_path / "b"), "--resume"])
    resumed = capsys.readouterr().out
    assert whole[whole.index("run 0  epoch   3"):] == resumed[resumed.index("run 0  epoch   3"):]
    a, b = (torch.load(tmp_path / d / "run0.pt", weights_only=True) for d in "ab")
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]) and a["history"] == b["history"]
    assert a["classes"] == ["anger", "joy"] and a["settings"]["hidden"] == 4 and a["epoch"] == 5
    assert "--resume" in error_of("--data", feats, "--out", tmp_path / "a")
    assert "other" in error_of("--data", feats, "--out", tmp_path / "a", "--resume", "--lr", "0.5")
    remade = write_feats(tmp_path / "g", n=8)
    for path in remade.rglob("*.npz"):
        np.savez(path, **dict(np.load(path)), settings=json.dumps(dict(every=4)))
    assert "other extraction" in error_of("--data", remade, "--hidden", "4", "--batch", "4", "--epochs", "9", "--out",
                                          tmp_path / "a", "--resume")
    (tmp_path / "a/run0.pt").write_bytes((tmp_path / "a/run0.pt").read_bytes()[:1000])
    assert "damaged" in error_of("--data", feats, "--out", tmp_path / "a", "--resume")


def test_last_epoch_is_reported_not_the_best(tmp_path, capsys):
    feats = write_feats(tmp_path / "f", n=8)
    dfan.main(["--data", str(feats), "--hidden", "4", "--batch", "4", "--epochs", "6", "--lr", "0.3",
               "--out", str(tmp_path / "o")])
    out = capsys.readouterr().out
    last = [line for line in out.splitlines() if "epoch   6/6" in line][0].split("accuracy ")[1].split()[0]
    assert f"accuracy {last}" in [line for line in out.splitlines() if line.startswith("result")][0]


def test_feature_subsets_and_top_k():
    F = dict(action=torch.rand(6, 7), scene=torch.rand(6, 5), objects=torch.rand(6, 4, 8), audio=torch.rand(6, 3))
    pick = lambda *names, K=None: dfan.as_inputs({name: F[name] for name in names}, K)
    F_A, F_S, F_O = pick("action", "scene", "objects", K=2)
    assert F_A is F["action"] and torch.equal(F_S, F["scene"]) and torch.equal(F_O, F["objects"][:, :2])
    F_A, F_S, F_O = pick("action", "scene", "objects", "audio")
    assert torch.equal(torch.cat([F_A, F_S], -1), torch.cat([F["action"], F["scene"], F["audio"]], -1))
    F["objects"][0, 3] = F["objects"][1] = 0
    F_A, F_S, F_O = pick("objects")                                            # FF := F_O_bar [R10]
    assert torch.allclose(F_A[0], F["objects"][0, :3].mean(0)) and torch.allclose(F_A[2], F["objects"][2].mean(0))
    assert (F_A[1] == 0).all() and F_S.shape == (6, 0)
    F_A, F_S, F_O = pick("scene")
    assert F_A is F["scene"] and F_S.shape == (6, 0) and F_O.shape == (6, 0, 0)


def test_subsets_run_and_what_cannot_is_refused(tmp_path, capsys):
    feats = write_feats(tmp_path / "f")
    for path in feats.rglob("*.npz"):
        F = dict(np.load(path))
        T = len(F["action"])
        np.savez(path, **F, audio=np.ones((T, 2), np.float16), short=np.ones((1, 1)), flat=np.ones(T))
    for n, argv in enumerate((["--features", "objects"], ["--features", "action"],
                              ["--features", "scene,objects,audio"], ["--fusion", "max"],
                              ["--fusion", "avg", "--features", "audio"], ["--objects", "2"], ["--fusion", "time"])):
        run_main("--data", feats, *argv, "--out", tmp_path / f"o{n}")
    saved = [torch.load(tmp_path / f"o{n}/run0.pt", weights_only=True) for n in range(7)]
    assert [saved[n]["model"]["cell.T_in.weight"].shape[1] for n in (0, 1, 2)] == [6, 7, 5 + 2]
    assert saved[5]["settings"]["shape"] == [7, 5, 2, 6] and "cell.S_h.weight" not in saved[6]["model"]
    for argv, word in ((["--features", "smell"], "no array smell"), (["--objects", "9"], "--objects 9"),
                       (["--features", "action,short"], "disagree"), (["--features", "flat"], "disagree")):
        assert word in error_of("--data", feats, *argv, "--out", tmp_path / "x")
    for argv in (["--features", ""], ["--features", "action,action"], ["--objects", "0"], ["--features", "audio"],
                 ["--features", "action", "--fusion", "dual"], ["--reproduce", "table1", "--objects", "2"]):
        with pytest.raises(SystemExit):
            dfan.main(argv)
        assert argv[0] in capsys.readouterr().err


def test_reproduce_runs_each_cell_once_and_keeps_it(tmp_path, capsys, monkeypatch):
    feats, out = write_feats(tmp_path / "f", dfan.EMOTIONS["ekman"].split(), n=2), tmp_path / "o"
    argv = ["--data", feats, "--out", out, "--runs", "2", "--reproduce"]
    run_main(*argv, "table1")
    first = capsys.readouterr().out
    assert first.count("epoch   2/2") == 5 * 2 and "56.42" in first and "n = 2" in first
    trained = []
    monkeypatch.setattr(dfan, "train_epoch", (lambda old: lambda *a: trained.append(a) or old(*a))(dfan.train_epoch))
    run_main(*argv, "table1")
    assert not trained and first[first.index("Table 1"):] == (again := capsys.readouterr().out)[again.index("Table 1"):]
    run_main(*argv, "table2")
    assert len(trained) == 3 * 2 * 2, "the dual cell is Table 1's last row"
    printed = capsys.readouterr().out
    kept = json.loads((out / "results.json").read_text())
    assert len(kept) == 5 + 3
    for name, cell in kept.items():
        runs = [torch.load(out / name / f"run{i}.pt", weights_only=True)["history"][-1]["accuracy"] for i in range(2)]
        assert np.allclose([cell["accuracy"]["mean"], cell["accuracy"]["std"]], [np.mean(runs), np.std(runs, ddof=1)])
        assert cell["marked"] == "" and cell["hidden"] == 4
    assert kept["action+scene-time"]["paper"] == 0.5688 and kept["action+scene+objects-max-3"]["paper"] == 0.5312
    line = [v for v in printed.splitlines() if v.startswith("  Avg. Pool")][0].split()
    ours = 100 * kept["action+scene+objects-avg-3"]["accuracy"]["mean"]
    assert line[2] == "54.28" and line[3] == f"{ours:.2f}" and line[6] == f"{ours - 54.28:+.2f}"
    capsys.readouterr()
    assert "--videos" in error_of(*argv, "figure4")
    assert "--videos" in error_of(*argv, "all", "--videos", tmp_path / "nowhere")


def test_the_papers_figure_3_and_its_headline():
    """The issue's own arithmetic: the diagonals average 52.1 % and 55.8 % over the classes."""
    for dataset, mean, size in (("videoemotion", 52.1, 8), ("ekman", 55.8, 6)):
        rows = np.array([[int(v) for v in row.split()] for row in dfan.FIGURE3[dataset].split(",")])
        assert rows.shape == (size, size) and abs(np.diag(rows).mean() - mean) < 0.06
        assert 98 <= rows.sum(1).min() and rows.sum(1).max() <= 108, "as the printed rows do"


def test_figures_on_videos_and_on_the_planted_set(tmp_path, monkeypatch):
    monkeypatch.setattr(dfan.Planted, "TRAIN", 30)
    monkeypatch.setattr(dfan.Planted, "TEST", 12)
    run_main("--reproduce", "figure4", "--runs", "1", "--out", tmp_path / "p")
    assert len(list((tmp_path / "p").glob("figure4-*.png"))) == 6
    feats = write_feats(tmp_path / "f", n=4)
    for path in feats.rglob("*.npz"):
        F = dict(np.load(path))
        T = len(F["action"])
        np.savez(path, **F | dict(objects=np.random.default_rng(0).random((T, 3, 84)).astype(np.float16)),
                 frames=8 * np.arange(T), seconds=np.arange(T) / 3)
        write_video(tmp_path / "v" / path.parent.name / f"{path.name[:-4]}.avi", 8 * T, 64, 80)
    run_main("--data", feats, "--reproduce", "figure4", "--videos", tmp_path / "v", "--out", tmp_path / "o")
    pictures = sorted((tmp_path / "o").glob("figure4-*.png"))
    assert [p.name for p in pictures] == ["figure4-anger-anger_1.png", "figure4-joy-joy_1.png"]
    image = cv2.imread(str(pictures[0])).astype(int)
    assert (image[..., 1] - image[..., [0, 2]].max(-1) > 80).sum() > 200, "green boxes"
    assert (image[..., 0] - image[..., 2] > 100).sum() > 200, "a blue curve"
    run_main("--data", feats, "--reproduce", "figure2", "--out", tmp_path / "o")
    run_main("--data", feats, "--reproduce", "figure3", "--out", tmp_path / "o")
    assert all((tmp_path / "o" / f"figure{n}.png").is_file() for n in (2, 3))
    shutil.rmtree(tmp_path / "v/joy")
    again = "--data", feats, "--reproduce", "figure4", "--out", tmp_path / "o", "--videos", tmp_path / "v"
    assert "joy_1" in error_of(*again)


def test_planted_set_is_what_it_says():
    data = dfan.Planted(3)
    for i in (0, 7, 1200):
        F_A, F_S, F_O, planted, key = data.draw(i, 4)
        again = data.draw(i, 4)
        assert all(np.array_equal(a, b) for a, b in zip((F_A, F_S, F_O, planted, key), again))
        assert planted.sum() == 2 and np.diff(np.flatnonzero(planted)) == [1]
        keys = F_O[:, :, 0] == 0.95
        assert keys.sum() == 2 and all(keys[t, key[t]] for t in np.flatnonzero(planted))
        assert (F_O[..., :80].max(-1)[~keys] <= 0.5).all() and (F_O[..., :80].max(-1) >= 0.05).all()
        fits = F_A @ data.patterns.T / (data.patterns ** 2).sum(1)        # 1.5 where a pattern lies
        pair = fits.reshape(12, 2, 6).mean(1)
        assert {int(pair[p].argmax()) for p in np.argsort(pair.max(1))[-4:]} >= {data.labels[i]}
        assert pair[np.flatnonzero(planted)[0] // 2].argmax() == data.labels[i]
    assert not np.array_equal(data.draw(0, 1)[0], data.draw(0, 2)[0]), "training videos are drawn anew"
    assert np.array_equal(data.draw(1200, 1)[0], data.draw(1200, 2)[0]), "validation videos are not"


# ----------------------------------------------------------------------------------------------------------------------
# The command lines, as their user runs them
# ----------------------------------------------------------------------------------------------------------------------

def shell(*argv, cwd=None, env=None, check=None):
    done = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, cwd=cwd,
                          env=os.environ | (env or {}))
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    return done


def test_planted_command_same_seed_twice(tmp_path):
    argv = [sys.executable, HERE / "dfan.py", "--epochs", "1"]
    both = [subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (p.communicate()[0] for p in both)
    assert [p.returncode for p in both] == [0, 0] and first == second
    assert "SYNTHETIC" in first and "uniform 0.083, limit 0.402" in first
    assert "uniform 0.125, limit 0.514" in first and not list(tmp_path.iterdir())
    assert "most attended frame inside" in first and "(uniform 0.083, centre " in first


def test_torchrun_gives_the_same_numbers(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(18):                                           # sizes at which the number of threads is seen
        path = tmp_path / "f" / "abcdef"[i % 6] / f"{i}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{name: rng.standard_normal(size, np.float32).astype(np.float16) for name, size in (
            ("action", (30, 256)), ("scene", (30, 5)), ("objects", (30, 4, 6)))})
    argv = [HERE / "dfan.py", "--data", tmp_path / "f", "--dataset", "videoemotion", "--hidden", "256", "--batch", "3",
            "--epochs", "2", "--device", "cpu", "--out"]
    alone = shell(*argv, tmp_path / "alone", check=0)
    spread = shell("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *argv, tmp_path / "spread")
    results = [[line for line in done.stdout.splitlines() if line.startswith("result")] for done in (alone, spread)]
    assert len(results[0]) == 12 and results[0] == results[1]
    assert len({line.split("seed")[1].split()[0] for line in results[0][:10]}) == 10
    for number in range(10):
        a, b = (torch.load(tmp_path / name / f"run{number}.pt", weights_only=True) for name in ("alone", "spread"))
        assert a["history"] == b["history"] and all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())


def test_errors_are_one_line_and_exit_2(tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    for script, argv in (("dfan.py", ["--data", nowhere]), ("extract_features.py", [nowhere, tmp_path])):
        done = shell(HERE / script, *argv, check=2)
        assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith(f"{script}: {nowhere}")
    assert "cuda:99" in error_of("--device", "cuda:99")
    for argv in (["--beta", "2"], ["--lr", "nan"], ["--resume"], ["--dataset", "videoemotion"], ["--seed", "-1"],
                 ["--epochs", "0"]):
        with pytest.raises(SystemExit) as stop:
            dfan.main(argv)
        assert stop.value.code == 2 and argv[0] in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# extract_features.py
# ----------------------------------------------------------------------------------------------------------------------

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
    wide, at = texture(), 17                                       # it moves between frames 17 and 18, by 4 pixels
    video = cv2.VideoWriter(str(tmp_path / "v.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 24, (128, 96))
    for t in range(30):
        video.write(np.roll(wide, -4 * (t > at), 1)[:, :128])
    video.release()
    samples, _ = samples_of(tmp_path / "v.mp4")
    for s in samples:
        x = (s["flow"].reshape(224, 224, 5, 2)[60:160, 60:160, :, 0].mean((0, 1)) / 255 * 40 - 20).round(1)
        first = min(max(0, s["number"] - 2), 30 - 6)               # pairs n-2 to n+2, shifted inwards at the ends
        expected = [-4 if first + i == at else 0 for i in range(5)]
        assert np.abs(x - expected).max() < 0.7, (s["number"], x)
    assert [s["number"] for s in samples] == [0, 8, 16, 24]


def test_flow_scale_and_short_videos(tmp_path):
    for n, moving in ((1, False), (3, True), (6, True)):
        flow = samples_of(write_video(tmp_path / f"{n}.mp4", n))[0][0]["flow"].astype(float)[60:160, 60:160]
        expected = 127.5 + (-2 if moving else 0) * 255 / 40
        assert np.abs(flow[..., ::2].mean((0, 1)) - expected).max() < 4, n
        assert np.abs(flow[..., 1::2].mean((0, 1)) - 127.5).max() < 2, n

    class Fast:                                                    # 30 pixels to the left, 10 down
        def calc(self, a, b, _):
            return np.full((*a.shape, 2), [-30, 10], np.float32)
    fast = extract.flow_fields(Fast(), [np.zeros((64, 80), np.uint8)] * 6)
    assert (fast[..., ::2] == 0).all() and (fast[..., 1::2] == round(30 * 255 / 40)).all(), "clipped at -20 pixels"


def test_sizes_of_every_kind(tmp_path):
    for h, w in ((16, 16), (2, 64), (64, 2), (17, 33), (600, 32), (340, 640)):
        write_video(tmp_path / f"{h}x{w}.avi", 7, h, w, codec="FFV1")
        samples, _ = samples_of(tmp_path / f"{h}x{w}.avi")
        assert samples[0]["rgb"].shape == (224, 224, 3) and samples[0]["flow"].shape == (224, 224, 10)


def test_detector_rows_are_the_models_own_detections():
    torch.manual_seed(0)
    networks = extract.Networks([SMALL], 0, "cpu")
    model = networks.models["objects"]
    model.roi_heads.score_thresh = 0.011                          # of random scores, about 1/91, some and not all
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
    if key.startswith("fc."):
        return "cls_head.fc_cls." + key[3:]
    parts = key.split(".")
    if parts[-2] == "0" and "downsample" in key:
        parts[-2:] = ["conv", parts[-1]]
    elif parts[-2] == "1" and "downsample" in key:
        parts[-2:] = ["bn", parts[-1]]
    elif parts[-2].startswith("conv"):
        parts[-2:] = [parts[-2], "conv", parts[-1]]
    else:
        parts[-2:] = ["conv" + parts[-2][2:], "bn", parts[-1]]
    return "backbone." + ".".join(parts)


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
    x = torch.from_numpy(np.stack([s["rgb"] for s in samples])).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    y = torch.from_numpy(np.stack([s["flow"] for s in samples])).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        pooled = []
        for name, v in (("action_rgb", x), ("action_flow", (y - 128) / 128)):
            *_, fc = (model := models[name].eval()).children()
            pooled.append(torch.nn.Sequential(*list(model.children())[:-1])(v).flatten(1))
        assert np.allclose(f["action"], ((pooled[0] + pooled[1]) / 2).numpy(), rtol=1e-3, atol=1e-3)
    s = torch.from_numpy(np.stack([s["scene"] for s in samples])).permute(0, 3, 1, 2) / 255
    s = (s - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        assert np.allclose(f["scene"], models["scene"].eval()(s).numpy(), rtol=1e-3, atol=1e-3)
    settings = json.loads(str(f["settings"]))
    assert settings["every"] == 8 and settings["K"] == 16 and settings["random_weights"] is None
    for name in ("action_rgb", "action_flow", "scene", SMALL):
        assert hashlib.sha256((folder / extract.FILES[name][0]).read_bytes()).hexdigest() in settings["networks"][name]
    networks = extract.remembered(settings, (folder, None), "cpu")
    extract.extract_one(tmp_path / "v/joy/a.mp4", tmp_path / "again.npz", networks, settings)
    assert_same_arrays(tmp_path / "again.npz", tmp_path / "f/joy/a.npz")


def test_weights_errors(tmp_path, published, monkeypatch):
    folder, _ = published
    write_video(tmp_path / "v/joy/a.mp4", 9)
    for name in os.listdir(folder):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    argv = [str(tmp_path / "v"), str(tmp_path / "f"), "--weights", str(tmp_path), *TRY[1:]]
    name, prefix, addresses = extract.FILES["scene"]
    with open(tmp_path / name, "ab") as f:
        f.write(b"x")
    with pytest.raises(extract.InputError, match="SHA-256"):
        extract.main(argv)
    partial = torch.load(folder / name, weights_only=True)         # one tensor short, and one too many
    for change in ("missing", "extra"):
        state = dict(partial["state_dict"])
        state.pop("module.conv1.weight") if change == "missing" else state.update({"module.more": torch.ones(1)})
        torch.save(dict(state_dict=state), tmp_path / name)
        sha256 = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        monkeypatch.setitem(extract.FILES, "scene", (name, sha256, addresses))
        with pytest.raises(extract.InputError, match="not the weights"):
            extract.main(argv)
    assert not list((tmp_path / "f").glob("*/*.npz"))


def test_every_detector_builds_with_its_published_layout():
    """Frozen batch norm has no counter, plain batch norm has one: the published files differ in that."""
    for name in extract.DETECTORS:
        keys = extract.build_detector(name).state_dict().keys()
        assert any(k.endswith("num_batches_tracked") for k in keys) == name.endswith("_v2"), name
    assert len(extract.COCO_80) == 80


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Both classes' videos, three each, extracted once with random weights."""
    folder = tmp_path_factory.mktemp("extracted")
    for i in range(6):
        write_video(folder / "v" / ("anger", "joy")[i % 2] / f"clip[{i}].v1.mp4", 10 + 9 * i, seed=i)
    (folder / "v/trainlist01.txt").write_text("".join(f"{('anger', 'joy')[i % 2]}/clip[{i}].v1 1\n" for i in range(4)))
    (folder / "v/testlist01.txt").write_text("".join(f"{('anger', 'joy')[i % 2]}/clip[{i}].v1 1\n" for i in (4, 5)))
    done = shell(HERE / "extract_features.py", folder / "v", folder / "f", *TRY, check=0)
    return folder, done.stdout


def test_from_videos_to_accuracy(extracted, tmp_path):
    folder, printed = extracted
    assert printed.startswith("WARNING") and "RANDOM" in printed and "6 videos extracted, 0 failed" in printed
    f = np.load(folder / "f/joy/clip[5].v1.npz", allow_pickle=False)
    T = len(range(0, 55, 8))
    assert {k: (f[k].shape, f[k].dtype.kind) for k in f.files} == dict(
        action=((T, 2048), "f"), scene=((T, 365), "f"), objects=((T, 16, 84), "f"), frames=((T,), "i"),
        seconds=((T,), "f"), fps=((), "f"), settings=((), "U"))
    scores = f["objects"][..., :80].max(-1)
    assert (np.diff(scores, axis=1) <= 2e-3).all() and scores[:, 0].min() > 0, "the most probable first"
    trained = shell(HERE / "dfan.py", "--data", folder / "f", "--epochs", "2", "--hidden", "8", "--out", tmp_path,
                    "--device", "cpu", check=0).stdout
    assert "RANDOM" in trained and "train 4 / validation 2" in trained and "accuracy" in trained


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


def test_finetuning_and_the_leak_guard(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(extract.TUNING, "epochs", 2)
    for i in range(4):
        path = write_video(tmp_path / "v" / ("anger", "joy")[i % 2] / f"{i}.mp4", 20, seed=i)
    ids = [f"{('anger', 'joy')[i % 2]}/{i}" for i in range(4)]
    (tmp_path / "v/trainlist01.txt").write_text("\n".join(ids[:2]))
    (tmp_path / "v/testlist01.txt").write_text("\n".join(ids[2:]))
    (tmp_path / "other.txt").write_text("\n".join(ids[1:3]))
    argv = [str(tmp_path / "v"), str(tmp_path / "f"), *TRY, "--no-flow", "--finetune"]

    class Killed(Exception):
        pass

    def killed_after_one_epoch(path, checkpoint):
        save(path, checkpoint)
        if path.name == "scene.pt":
            raise Killed
    save = extract.save
    monkeypatch.setattr(extract, "save", killed_after_one_epoch)
    with pytest.raises(Killed):
        extract.main([*argv, str(tmp_path / "v/trainlist01.txt")])
    monkeypatch.setattr(extract, "save", save)
    capsys.readouterr()
    assert extract.main([*argv, str(tmp_path / "v/trainlist01.txt")]) == 0
    out = capsys.readouterr().out
    assert "scene  epoch 2/2" in out and "scene  epoch 1/2" not in out and "action_rgb  epoch" not in out, "it went on"
    assert not (tmp_path / "f/.finetuning").exists()
    states = torch.load(tmp_path / "f/finetuned.pt", weights_only=True)["states"]
    fresh = extract.Networks(["action_rgb", "scene", SMALL], 0, "cpu").models
    changed = {name: not torch.equal(states[name]["layer4.1.conv1.weight"], fresh[name].layer4[1].conv1.weight)
               for name in ("action_rgb", "scene")}
    assert all(changed.values()) and states["scene"]["fc.weight"].shape == (365, 512)
    fresh["scene"].load_state_dict(states["scene"])
    samples, _ = samples_of(path, flow=False)
    x = torch.from_numpy(np.stack([s["scene"] for s in samples])).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        assert np.allclose(np.load(tmp_path / "f/joy/3.npz")["scene"], fresh["scene"](x), rtol=2e-3, atol=2e-3)
    assert json.loads(str(np.load(tmp_path / "f/joy/3.npz")["settings"]))["tuned_on"] == ids[:2]

    assert extract.main([*argv, str(tmp_path / "v/trainlist01.txt")]) == 0
    assert "used again" in (out := capsys.readouterr().out) and "4 finished before, 0 to do" in out
    with pytest.raises(extract.InputError, match="finetuned.pt: tuned on another list"):
        extract.main([*argv, str(tmp_path / "other.txt")])
    run_main("--data", tmp_path / "f", "--out", tmp_path / "o1")
    assert "LEAKED" not in capsys.readouterr().out
    predict = ["--predict", str(path), "--checkpoint", str(tmp_path / "o1/run0.pt"), "--out", str(tmp_path / "p")]
    assert dfan.main(predict) == 0, "extracted with the tuned networks"
    assert_same_arrays(tmp_path / "p/3.npz", tmp_path / "f/joy/3.npz")
    (tmp_path / "f/finetuned.pt").rename(tmp_path / "finetuned.pt")
    (tmp_path / "p/3.npz").unlink()
    capsys.readouterr()
    assert dfan.main(predict) == 2 and "finetuned.pt with --weights DIR" in capsys.readouterr().err
    assert dfan.main([*predict, "--weights", str(tmp_path)]) == 0
    (tmp_path / "finetuned.pt").rename(tmp_path / "f/finetuned.pt")
    capsys.readouterr()
    leak = "--data", tmp_path / "f", "--split", tmp_path / "v/testlist01.txt", tmp_path / "v/trainlist01.txt"
    assert "2 of the validation videos: anger/0" in error_of(*leak)
    run_main(*leak, "--allow-leak", "--out", tmp_path / "o2")
    printed = capsys.readouterr().out
    numbers = printed[printed.index("run 0  epoch"):].splitlines()
    assert len(numbers) == 2 + 1 + 1 + 2 and all(line.endswith("LEAKED") for line in numbers)


def test_broken_videos_are_listed_and_the_rest_goes_on(tmp_path):
    good = write_video(tmp_path / "v/joy/good.mp4", 40, 240, 320)
    whole = good.read_bytes()
    (tmp_path / "v/joy/empty.mp4").write_bytes(b"")
    (tmp_path / "v/joy/garbage.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "v/joy/no_index.mp4").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "v/joy/._good.mp4").write_bytes(b"not looked at")
    cut = write_video(tmp_path / "v/joy/tail.avi", 80, 240, 320, codec="MJPG")
    cut.write_bytes(cut.read_bytes()[:cut.stat().st_size // 2])
    done = shell(HERE / "extract_features.py", tmp_path / "v", tmp_path / "f", *TRY, "--no-flow", check=1)
    assert sorted(p.name for p in (tmp_path / "f/joy").iterdir()) == ["good.npz", "tail.npz"]
    failed = [line for line in done.stdout.splitlines() if line.startswith("failed")]
    assert [Path(line.split(": ")[0]).name for line in failed] == ["empty.mp4", "garbage.mp4", "no_index.mp4"]
    assert "tail.avi: only" in done.stdout and 3 <= len(np.load(tmp_path / "f/joy/tail.npz")["frames"]) < 10
    assert "action_flow" not in json.loads(str(np.load(tmp_path / "f/joy/good.npz")["settings"]))["networks"]


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
    assert "no class folder" in error(tmp_path / "v")
    (tmp_path / "v/a.avi").unlink()
    done = shell(HERE / "extract_features.py", tmp_path / "v", tmp_path / "f", "--weights", tmp_path, check=2,
                 env=dict(TORCH_HOME=str(tmp_path / "cache"), http_proxy="http://127.0.0.1:9",
                          https_proxy="http://127.0.0.1:9"))
    last = done.stderr.strip().splitlines()[-1]
    assert "2692d16c.pth" in last and "https://download.openmmlab.com" in last and "--weights DIR" in last


# ----------------------------------------------------------------------------------------------------------------------
# In a user's hands: localisation, prediction, faults
# ----------------------------------------------------------------------------------------------------------------------

def average_precision(inside, A):
    """The area under the precision-recall steps, thresholds falling over the distinct values."""
    area, recall = 0., 0.
    for threshold in sorted(set(A), reverse=True):
        chosen = A >= threshold
        new = (chosen & inside).sum() / inside.sum()
        area, recall = area + (new - recall) * (chosen & inside).sum() / chosen.sum(), new
    return area


def test_localisation_measures():
    rng = np.random.default_rng(0)
    data = dfan.Planted(0)
    data.emotional = {3: np.array([0, 0, 1, 1, 0], bool), 5: np.array([1, 0, 0, 0], bool), 6: np.ones(4, bool),
                      8: np.zeros(4, bool)}
    A = {i: rng.dirichlet(np.ones(len(v))).astype(np.float32) for i, v in data.emotional.items()} | {9: np.ones(7) / 7}
    out = dfan.localisation(data, list(A), [(a, None) for a in A.values()])
    assert out["videos"] == 2, "nothing to find where all frames are emotional, or none"
    both = [(A[i], data.emotional[i]) for i in (3, 5)]
    ap, share, hit = (out[name] for name in dfan.MEASURES)
    assert np.isclose(ap[0], np.mean([average_precision(inside, a) for a, inside in both]))
    assert np.isclose(share[0], np.mean([a[inside].sum() for a, inside in both]))
    assert np.isclose(hit[0], np.mean([inside[a.argmax()] for a, inside in both]))
    time_share = (2 / 5 + 1 / 4) / 2
    assert np.allclose([ap[1], share[1], hit[1]], time_share), "uniform attention: the share of time in all three"
    x = np.linspace(-1, 1, 5)
    centre = np.exp(1 - 2 * x ** 2)
    assert np.isclose(centre.max() / centre.min(), np.e ** 2) and hit[2] == 0.5
    perfect = dfan.localisation(data, [3], [(np.array([.1, .1, .35, .35, .1]), None)])
    assert [perfect[name][0] for name in dfan.MEASURES] == pytest.approx([1, 0.7, 1])


def test_segments_file(tmp_path, capsys):
    feats = write_feats(tmp_path / "f")
    for path in feats.rglob("*.npz"):
        F = dict(np.load(path))
        T = len(F["action"])
        np.savez(path, **F, frames=8 * np.arange(T), seconds=58 + np.arange(T) / 3)
    (tmp_path / "s.csv").write_text(
        "\ufeffvideo,key_segment_1,key_segment_2,key_segment_3,key_length,video_length\r\n"
        "anger/anger_1.mp4,0'58-0'59,1'0-1'1,,0'2,0'9\r\n"
        "\"joy/joy_1.mp4\",0'0-'029,0'59-1'0,,,\r\njoy/joy_3.mp4,,,,,\r\n"
        "joy/joy_2.mp4,0'9-0'5,,,,\r\n\"fear/no, not here.mp4\",0'1-0'2,,,,\r\nshort\r\n")
    data = dfan.Features(feats)
    emotional, skipped = dfan.read_segments(tmp_path / "s.csv", data)
    ids = {data.ids[i]: v for i, v in emotional.items()}
    assert list(ids) == ["anger/anger_1", "joy/joy_1"]
    for name, ranges in (("anger/anger_1", ((58, 59), (60, 61))), ("joy/joy_1", ((59, 60),))):
        seconds = np.load(feats / f"{name}.npz")["seconds"]
        assert ids[name].tolist() == [any(a <= s <= b for a, b in ranges) for s in seconds]
    assert [line.split(": ")[0].split(", ")[1] for line in skipped[:-1]] == ["line 3", "line 4", "line 5", "line 7"]
    assert "2 rows are of videos without features: fear/no, not here.mp4, short" in skipped[-1]
    assert "0'0-'029 of joy/joy_1.mp4" in skipped[0]
    run_main("--data", feats, "--segments", tmp_path / "s.csv", "--out", tmp_path / "o")
    printed = capsys.readouterr().out
    assert printed.count("segments ") == 6 and printed.count("localisation") == 4
    (tmp_path / "other.csv").write_text("video,key_segment_1\nanger/anger_0.mp4,0'0-0'9\n")
    (tmp_path / "none.csv").write_text("name,from,to\n")
    (tmp_path / "nothing.csv").write_text("")
    assert "no columns video" in error_of("--data", feats, "--segments", tmp_path / "nothing.csv")
    assert "no segment of any validation video" in error_of("--data", feats, "--segments", tmp_path / "other.csv")
    assert "no columns video" in error_of("--data", feats, "--segments", tmp_path / "none.csv")
    assert "nowhere.csv" in error_of("--data", feats, "--segments", tmp_path / "nowhere.csv")


@pytest.fixture(scope="module")
def trained(extracted, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    shell(HERE / "dfan.py", "--data", extracted[0] / "f", "--epochs", "2", "--hidden", "8", "--out", out, "--device",
          "cpu", check=0)
    return out / "run0.pt"


def test_predict(extracted, trained, tmp_path, capsys):
    folder, _ = extracted
    clip = tmp_path / "clip.mp4"
    shutil.copy(folder / "v/joy/clip[5].v1.mp4", clip)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    common = ["--checkpoint", trained, "--device", "cpu", "--out", tmp_path / "o"]
    done = shell(HERE / "dfan.py", "--predict", clip, tmp_path / "broken.mp4", folder / "f/joy/clip[5].v1.npz", *common,
                 "--json", check=2)
    assert [line for line in done.stderr.splitlines() if "dfan.py" in line] == [
        f"dfan.py: {tmp_path / 'broken.mp4'}: OpenCV cannot open it: empty, damaged, or not a video"]
    video, broken, features = map(json.loads, done.stdout.splitlines())
    assert "cannot open" in broken["error"] and "RANDOM" in video["warning"]
    assert_same_arrays(tmp_path / "o/clip.npz", folder / "f/joy/clip[5].v1.npz")          # as remembered
    for key in ("emotion", "probabilities", "moments"):
        assert video[key] == features[key]

    saved = torch.load(trained, weights_only=True)                 # the same by hand, from the paper's definitions
    F = np.load(tmp_path / "o/clip.npz")
    net = dfan.DFAN(2048, 365, 84, 8, 2)
    net.load_state_dict(saved["model"])
    with torch.no_grad():
        out = net.eval()(*(torch.from_numpy(F[k].astype(np.float32))[None] for k in ("action", "scene", "objects")))
    P, A_T, A_o = (out[k][0].numpy() for k in ("P", "A_T", "A_o"))
    assert list(video["probabilities"]) == ["anger", "joy"]
    assert np.allclose(list(video["probabilities"].values()), P.sum(0)), "seven frames, all among the last ten"
    counts = np.bincount(P.argmax(1), minlength=2)
    assert video["emotion"] == ("anger", "joy")[counts.argmax()]
    first = video["moments"][0]
    t = int(A_T.argmax())
    assert len(video["moments"]) == 3 and first["seconds"] == F["seconds"][t] and first["frame"] == 8 * t
    assert np.isclose(first["attention"], A_T[t]) and np.isclose(first["times_uniform"], A_T[t] * len(A_T))
    k = int(A_o[t].argmax())
    names = [n for n in torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
             if n not in ("__background__", "N/A")]
    assert first["objects"][0]["name"] == names[F["objects"][t, k, :80].argmax()]
    assert np.allclose(first["objects"][0]["box"], F["objects"][t, k, 80:])
    assert cv2.imread(video["picture"]).shape[1] > 1000

    def predicted(path, status):
        assert dfan.main([str(a) for a in ("--predict", path, *common)]) == status
        return capsys.readouterr()

    made = (tmp_path / "o/clip.npz").stat().st_mtime_ns
    told = predicted(clip, 0).out
    assert (tmp_path / "o/clip.npz").stat().st_mtime_ns == made, "features that are there are not made again"
    (tmp_path / "z").mkdir()
    shutil.copy(clip, tmp_path / "z/clip.mp4")
    assert "clip.npz: there already, and not of" in predicted(tmp_path / "z/clip.mp4", 2).err
    os.utime(clip)
    predicted(clip, 0)
    assert (tmp_path / "o/clip.npz").stat().st_mtime_ns > made, "but those of a changed video are"
    assert f"{clip}: {video['emotion']}" in told and f"{first['seconds']:.1f} s" in told
    other = dict(F) | dict(settings=str(F["settings"]).replace('"every": 8', '"every": 4'))
    np.savez(tmp_path / "other.npz", **other)
    del other["seconds"]
    np.savez(tmp_path / "timeless.npz", **other | dict(settings="{}"))
    np.savez(tmp_path / "short.npz", **dict(F) | dict(seconds=F["seconds"][1:]))
    np.savez(tmp_path / "nan.npz", **dict(F) | dict(seconds=F["seconds"] * np.nan))
    for name, word in (("other.npz", "not made as the features"), ("timeless.npz", "frames and seconds"),
                       ("short.npz", "must be 7 rising"), ("nan.npz", "must be 7 rising"),
                       ("nowhere.mp4", "no such file")):
        assert word in (e := predicted(tmp_path / name, 2).err) and f"dfan.py: {tmp_path / name}" in e


def test_moments_are_apart():
    seconds = np.arange(300) * 8 / 30
    A_T = np.exp(-(seconds - 40) ** 2 / 50) + 0.5 * np.exp(-(seconds - 10) ** 2)
    chosen = dfan.moments(A_T, seconds)
    assert chosen[0] == A_T.argmax() and len(chosen) == 3
    assert min(abs(seconds[a] - seconds[b]) for a in chosen for b in chosen if a != b) >= 1
    for T in range(1, 30):
        assert len(dfan.moments(np.random.default_rng(T).random(T), np.arange(T) / 25)) == min(T, 3)


def test_checkpoints_that_are_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dfan.Planted, "TRAIN", 30)
    monkeypatch.setattr(dfan.Planted, "TEST", 12)

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    clip = write_video(tmp_path / "clip.mp4", 3)
    path = tmp_path / "run0.pt"
    predict = ["--predict", clip, "--checkpoint", path, "--out", tmp_path / "o"]
    run_main("--out", tmp_path / "planted", "--epochs", "1")
    whole = (tmp_path / "planted/run0.pt").read_bytes()
    saved = torch.load(tmp_path / "planted/run0.pt", weights_only=True)
    assert "cannot be read" in error_of(*predict)
    for content in (Trap(), dict(saved, model=Trap()), saved["model"], [1], dict(saved, settings={}),
                    dict(saved, model={}), dict(saved, settings=saved["settings"] | dict(hidden="8"))):
        torch.save(content, path)
        assert "run0.pt" in error_of(*predict)
    for content in (b"", b"garbage", whole[:1000], whole[:-1000]):
        path.write_bytes(content)
        assert "run0.pt" in error_of(*predict)
        assert "run0.pt" in error_of("--out", tmp_path, "--resume")
    assert not (tmp_path / "ran").exists()
    path.write_bytes(whole)
    capsys.readouterr()
    assert dfan.main([str(a) for a in predict]) == 2 and "planted set" in capsys.readouterr().err


def as_y4m(path, n, h, w, space):
    """Raw video, in a file of any name: C444, C422, C420jpeg, Cmono."""
    planes = dict(C444=3 * h * w, C422=2 * h * w, C420jpeg=h * w * 3 // 2, Cmono=h * w)[space]
    rng = np.random.default_rng(0)
    path.write_bytes(f"YUV4MPEG2 W{w} H{h} F24:1 {space}\n".encode()
                     + b"".join(b"FRAME\n" + rng.integers(0, 256, planes, np.uint8).tobytes() for _ in range(n)))


def rotated(content, turn):
    """An MP4 whose track header says: show it turned by 90, 180 or 270 degrees."""
    at = content.index(b"tkhd") + 4 + 40                            # version 0: the matrix follows 40 bytes
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[turn]
    matrix = np.array([cos, sin, 0, -sin, cos, 0, 0, 0, 0x4000], ">i4") * np.array([0x10000] * 9, ">i8")
    return content[:at] + matrix.astype(">i4").tobytes() + content[at + 36:]


def with_variable_frame_rate(content):
    """An MP4 in which every second frame lasts three times as long: another time-to-sample table, no edit list."""
    content = content.replace(b"edts", b"free")
    at = content.index(b"stts") - 4
    size, n, delta = (int.from_bytes(content[at + k:at + k + 4], "big") for k in (0, 16, 20))
    entries = b"".join(np.array([1, delta * (1 + 2 * (i % 2))], ">u4").tobytes() for i in range(n))
    table = (16 + len(entries)).to_bytes(4, "big") + b"stts" + bytes(4) + n.to_bytes(4, "big") + entries
    grown = bytearray(content)
    for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        start = content.index(box) - 4
        old = int.from_bytes(content[start:start + 4], "big")
        grown[start:start + 4] = (old + len(table) - size).to_bytes(4, "big")
    return bytes(grown[:at]) + table + bytes(grown[at + size:])


ODD_NAMES = ["clip[1]", "a.b..c", "it's", 'say "hi"', "\U0001f600", "-dash", "--help", "with space", "n" * 200, "a&b;c",
             "u\u0308mlaut", "100%d %s", "img%03d", "$HOME", "`x`", "#1", "*", "?", "back\\slash", "tab\there", "a,b",
             "line\u2028sep", "(1)", "{2}", "~", "CON", "x=y", "@", "name 7", "dot at the end."]


def odd_videos(folder):
    """About a hundred videos of every bad kind: ({identity: frames} of the good, {identity} of the broken)."""
    rng, joy = np.random.default_rng(0), folder / "joy"
    base = write_video(joy / "base.mp4", 20, 64, 80).read_bytes()
    mjpg = write_video(joy / "mjpg.avi", 20, 64, 80, codec="MJPG").read_bytes()
    good = {"joy/base": 20, "joy/mjpg": 20}
    for n in (1, 2, 7, 8):
        write_video(joy / f"{n} frames.mp4", n, 64, 80)
        good[f"joy/{n} frames"] = n
    for h, w in ((17, 33), (2, 64), (64, 2), (16, 16), (400, 8)):
        write_video(joy / f"{h}x{w}.avi", 3, h, w, codec="FFV1")
        good[f"joy/{h}x{w}"] = 3
    for space in ("C444", "C422", "C420jpeg", "Cmono"):
        as_y4m(joy / f"{space}.mp4", 9, 48, 64, space)
        good[f"joy/{space}"] = 9
    for turn in (90, 180, 270):
        (joy / f"turned {turn}.mp4").write_bytes(rotated(base, turn))
        good[f"joy/turned {turn}"] = 20
    (joy / "variable.mp4").write_bytes(with_variable_frame_rate(base))
    (joy / "SUFFIX.MP4").write_bytes(base)
    (joy / "deep/er").mkdir(parents=True)
    (joy / "deep/er/nested.mkv").write_bytes(write_video(folder / ".x.mkv", 20, 64, 80, codec="FFV1").read_bytes())
    good |= {"joy/variable": 20, "joy/SUFFIX": 20, "joy/nested": 20}
    odd = folder / "it's [odd] \U0001f600"
    odd.mkdir()
    one = write_video(folder / ".one.mp4", 2, 64, 80).read_bytes()
    for name in ODD_NAMES:
        (odd / f"{name}.mp4").write_bytes(one)
        good[f"{odd.name}/{name}"] = 2
    with open(os.fsencode(odd) + b"/\xff\xfe.mp4", "wb") as f:    # OpenCV 5.0 crashes on such a name
        f.write(one)

    broken = {}
    wav = b"RIFF" + (36 + 8000).to_bytes(4, "little") + b"WAVEfmt " + bytes.fromhex(
        "10000000 0100 0100 401f0000 401f0000 0100 0800") + b"data" + (8000).to_bytes(4, "little") + rng.bytes(8000)
    broken |= dict(empty=b"", zeros=bytes(5000), text=b"not a video\n" * 99, html=b"<!DOCTYPE html><html></html>",
                   zip=b"PK\3\4" + rng.bytes(500), audio=wav, header=base[:28], pickle=b"\x80\x04\x95" + rng.bytes(99),
                   playlist=b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n", concat=b"ffconcat version 1.0\nfile x\n")
    broken |= {f"garbage {n}": rng.bytes(10 ** (n % 5 + 1)) for n in range(8)}
    broken |= {f"ftyp {n}": base[:32] + rng.bytes(3000) for n in range(4)}
    broken |= {f"cut {n}": base[:len(base) * n // 8] for n in range(1, 8)}
    for name, content in broken.items():
        (joy / f"{name}.mp4").write_bytes(content)
    (joy / "dangling.mp4").symlink_to(joy / "nowhere.mp4")
    os.mkfifo(joy / "pipe.mp4")
    for n in range(1, 8):                                           # some of these decode in part: either will do
        (joy / f"tail {n}.avi").write_bytes(mjpg[:len(mjpg) * n // 8])
    for n in range(12):
        bad = bytearray(base)
        for at in rng.integers(0, len(base), 30):
            bad[at] = rng.integers(256)
        (joy / f"bits {n}.mp4").write_bytes(bytes(bad))
    return good, {f"joy/{name}" for name in (*broken, "dangling", "pipe")} | {f"{odd.name}/\udcff\udcfe"}


def test_a_hundred_odd_videos(tmp_path):
    good, broken = odd_videos(tmp_path / "v")
    files = [p for p in (tmp_path / "v").rglob("*.*") if not p.name.startswith(".") and not p.is_dir()]
    assert len(files) >= 100
    done = shell(HERE / "extract_features.py", tmp_path / "v", tmp_path / "f", *TRY, "--no-flow", "--every", "16",
                 check=1, env=dict(PYTHONIOENCODING="ascii"))
    lines = [line.encode().decode("unicode_escape") for line in done.stdout.splitlines() if line.startswith("failed")]
    failed = {"/".join(line[9:].split(".mp4: ")[0].split(".avi: ")[0].split("/")[-2:]) for line in lines}
    assert broken <= failed and failed - broken <= {f"joy/{k} {n}" for k in ("tail", "bits") for n in range(12)}
    made = {str(p.relative_to(tmp_path / "f"))[:-4]: p for p in (tmp_path / "f").rglob("*") if p.is_file()}
    assert len(made) + len(failed) == len(files), "none is lost"
    for identity, n in good.items():
        assert np.load(made[identity])["frames"].tolist() == list(range(0, n, 16)), identity
    seconds = np.load(made["joy/variable"])["seconds"]
    assert seconds[1] == pytest.approx(16 * 2 / 24, abs=0.05), "1, 3, 1, 3, ... frame times: stamps, not numbers"
    folders = {p.stem: p.relative_to(tmp_path / "v").parts[0] for p in files}
    assert len(folders) == len(files) and all(identity.split("/")[0] == folders[p.stem] for identity, p in made.items())
    dfan.Features(tmp_path / "f")


LISTS_OF_EVERY_KIND = {
    # content, and the videos that it names, None: an error
    "CR alone": (b"anger/anger_0 1\rjoy/joy_0 2\r", 2), "UTF-16": ("anger/anger_0\njoy/joy_0".encode("utf-16"), None),
    "latin-1": ("anger/anger_0\njoy/jo\xe9".encode("latin-1"), None), "empty": (b"", None), "blank": (b" \n\t\n", None),
    "BOM alone": (b"\xef\xbb\xbf", None), "NUL": (b"anger/anger_0\0 1\njoy/joy_0\n", None),
    "garbage": (bytes(range(256)) * 9, None), "one long line": (b"x" * 10 ** 6, None),
    "labels alone": (b"1\n2\n3\n", None), "classes alone": (b"anger\njoy\n", None),
    "unknown class": (b"anger/anger_0 1\nhate/joy_0 2\n", None), "unknown video": (b"anger/anger_99 1\n", None),
    "wrong class": (b"joy/anger_0 1\n", None), "commas": (b"anger/anger_0,1\njoy/joy_0,2\n", None),
    "quotes": (b'"anger/anger_0" 1\n', None), "case": (b"Anger/Anger_0 1\n", None),
    "backslash": (b"anger\\anger_0 1\n", None), "negative label": (b"anger/anger_0 -1\n", None),
    "float label": (b"anger/anger_0 1.0\n", None), "spaces around": (b"  anger/anger_0   1  \n\tjoy/joy_0\t\n", 2),
    "duplicates": (b"anger/anger_0 1\n" * 50 + b"joy/joy_0\n" * 50, 2),
    "no newline": (b"anger/anger_0 1\njoy/joy_0 2", 2),
    "upper extension": (b"anger/anger_0.MP4 1\njoy/joy_0.AVI", 2),
    "CRLF, BOM": (b"\xef\xbb\xbfanger/anger_0 1\r\njoy/joy_0 2\r\n", 2),
    "CRLF, blank": (b"\r\n\r\nanger/anger_0\r\n\r\njoy/joy_0\r\n", 2), "one class": (b"anger/anger_0 1\n", None),
    "path": (b"/data/anger/anger_0.mp4 1\n", None), "bare": (b"anger_0\njoy_0\n", 2),
    "many labels": (b"anger/anger_0 1 2 3\n", None)}


def test_lists_of_every_kind(tmp_path, capsys):
    feats = write_feats(tmp_path / "f")
    test = tmp_path / "test.txt"
    test.write_text("anger/anger_1\njoy/joy_1\n")
    for name, (content, named) in LISTS_OF_EVERY_KIND.items():
        path = tmp_path / f"{name}.txt"
        path.write_bytes(content)
        argv = ["--data", feats, "--split", path, test, "--out", tmp_path / name, "--epochs", "1"]
        if named:
            run_main(*argv)
            assert f"train {named} / validation 2" in capsys.readouterr().out, name
        else:
            assert name in error_of(*argv), name
            assert "lost" not in capsys.readouterr().out
    (tmp_path / "folder.txt").mkdir()
    assert "folder.txt" in error_of("--data", feats, "--split", tmp_path / "folder.txt", test)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk(extracted, tmp_path):
    folder, _ = extracted
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=72k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        done = shell(HERE / "extract_features.py", folder / "v", disk / "f", *TRY, check=2)
        assert len(done.stderr.splitlines()) == 1 and "No space left" in done.stderr and ".npz" in done.stderr
        made = sorted((disk / "f").glob("*/*.npz"))
        assert 1 <= len(made) < 6 and not list(disk.rglob(".*.part"))
        assert all(p.read_bytes() == (folder / "f" / p.relative_to(disk / "f")).read_bytes() for p in made)
        shutil.rmtree(disk / "f")
        done = shell(HERE / "dfan.py", "--data", folder / "f", "--hidden", "8", "--out", disk / "o", "--epochs", "1",
                     check=2)
        assert len(done.stderr.splitlines()) == 1 and "run0.pt: cannot be written (No space left" in done.stderr
        assert not [p for p in disk.rglob("*") if p.is_file()]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_extractions_at_once(extracted, tmp_path):
    folder, _ = extracted
    for kind in "vf":
        shutil.copytree(folder / kind / "joy", tmp_path / kind / "joy", ignore=shutil.ignore_patterns("clip?5*"))
    (tmp_path / "f").rename(tmp_path / "whole")
    argv = [sys.executable, HERE / "extract_features.py", tmp_path / "v", tmp_path / "f", *TRY]
    both = [subprocess.Popen(argv, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert_same_files(tmp_path / "whole", tmp_path / "f")


def test_torchrun_shares_the_videos_out(extracted, tmp_path):
    folder, _ = extracted
    shutil.copytree(folder / "v", tmp_path / "v")
    (tmp_path / "v/anger/a-broken.mp4").write_bytes(b"no video")
    done = shell("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", HERE / "extract_features.py",
                 tmp_path / "v", tmp_path / "f", *TRY)
    assert done.returncode == 1 and done.stdout.count("FAILED") == 1, done.stdout + done.stderr
    assert_same_files(folder / "f", tmp_path / "f")


def test_two_tunings_at_once_are_kept_apart(tmp_path):
    held = extract.lock_file(tmp_path / ".lock")
    with pytest.raises(extract.InputError, match="another process is tuning"):
        extract.lock_file(tmp_path / ".lock")
    held.close()
    extract.lock_file(tmp_path / ".lock").close()


def assert_same_arrays(a, b):
    """The same to the bit, but for "origin", which --predict adds."""
    a, b = (dict(np.load(path)) for path in (a, b))
    a.pop("origin", None)
    assert a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in b)


def assert_same_files(a, b):
    files = [{str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file() and p.suffix != ".part"}
             for f in (a, b)]
    assert files[0] and files[0] == files[1]


def killed(argv, seconds, rng):
    """Runs a command and kills it -9 at a random moment of its first so many seconds. Whether it was still running."""
    victim = subprocess.Popen([sys.executable, *map(str, argv)], stdout=subprocess.DEVNULL)
    try:
        victim.wait(rng.uniform(0, seconds))
    except subprocess.TimeoutExpired:
        victim.kill()
        victim.wait()
        return True
    assert victim.returncode == 0
    return False


def kill_extraction(folder, work, times, seed=0):
    """Kills an extraction again and again, each time going on with what is there; the end is the undisturbed one."""
    rng, argv = np.random.default_rng(seed), [HERE / "extract_features.py", folder / "v", work, *TRY]
    kills = ends = 0
    while kills < times:
        if killed(argv, 14, rng):
            kills += 1
        else:                                                       # it came to its end: compare, begin anew
            assert_same_files(folder / "f", work)
            shutil.rmtree(work)
            ends += 1
    shell(*argv, check=0)
    assert_same_files(folder / "f", work)
    return kills, ends + 1


def kill_training(feats, work, times, epochs, seed=0):
    rng = np.random.default_rng(seed)
    argv = [HERE / "dfan.py", "--data", feats, "--hidden", "4", "--batch", "2", "--epochs", epochs, "--out"]
    undisturbed = shell(*argv, work / "whole", check=0).stdout
    kills = ends = 0
    while kills < times or not ends:
        if kills < times and killed([*argv, work / "killed", "--resume"], 6, rng):
            kills += 1
            continue
        resumed = shell(*argv, work / "killed", "--resume", check=0).stdout
        assert undisturbed[undisturbed.index("result"):] == resumed[resumed.index("result"):]
        a, b = (torch.load(work / name / "run0.pt", weights_only=True) for name in ("whole", "killed"))
        assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items()) and a["history"] == b["history"]
        shutil.rmtree(work / "killed")
        ends += 1
    return kills, ends


def test_killed_extraction_goes_on_to_the_same_files(extracted, tmp_path):
    kill_extraction(extracted[0], tmp_path / "f", 1)


def test_killed_training_goes_on_to_the_same_numbers(tmp_path):
    kill_training(write_feats(tmp_path / "f", n=8), tmp_path, 1, epochs=20)


def faults(times=20):
    """Twenty kills of each."""
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        for i in range(6):
            write_video(work / "v" / ("anger", "joy")[i % 2] / f"{i}.mp4", 10 + 30 * i, seed=i)
        shell(HERE / "extract_features.py", work / "v", work / "f", *TRY, check=0)
        print("FAULTS   extraction: %d kills, %d ends, all files byte-identical" % kill_extraction(
            work, work / "killed", times), flush=True)
        print("FAULTS   training: %d kills, %d ends, all numbers identical" % kill_training(
            write_feats(work / "t", n=8), work, times, epochs=60), flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The table of the README's section Speed: python test_dfan.py [--quick]
# ----------------------------------------------------------------------------------------------------------------------

def literal(net, F_A, F_S, F_O, labels):
    """The equations step by step, with autograd and no identity: every sum over i and every product where it stands."""
    cell, (B, T) = net.cell, F_A.shape[:2]
    FF, H = torch.cat([F_A, F_S], -1), cell.W_p.in_features
    h1 = c1 = h2 = c2 = F_A.new_zeros(B, H)
    P, A_T = F_A.new_zeros(B, cell.W_p.out_features), F_A.new_full((B, T), 1 / T)
    G_T, logits = F_A.new_zeros(B, T), []
    for t in range(T):
        h1, c1, _ = dfan.lstm(cell.S_in(F_O[:, t].mean(1)) + cell.S_h(torch.cat([h2, h1], -1)), c1)
        A_o = torch.tanh(cell.W_oh(h1) + cell.W_of(F_O[:, t]).squeeze(-1)).softmax(-1)
        F_o_hat = torch.bmm(A_o.unsqueeze(1), F_O[:, t]).squeeze(1)
        G_t = torch.tanh(cell.W_Th(h2) + cell.W_Tf(torch.cat([F_o_hat, F_A[:, t], F_S[:, t]], -1)))
        A_T = torch.cat([G_T[:, :t], G_t, G_T[:, t + 1:]], 1).softmax(1)
        F_t = torch.bmm(A_T.unsqueeze(1), FF).squeeze(1)
        h2, c2, _ = dfan.lstm(cell.T_in(F_t) + cell.T_h(torch.cat([P, h2], -1)), c2)
        logits.append(cell.W_p(h2))
        P = logits[-1].softmax(-1)
        if t > 0:
            a, b = A_T[:, t - 1:t], A_T[:, t:t + 1]
            A_T = torch.cat([A_T[:, :t - 1], BETA * a + (1 - BETA) * b, (1 - BETA) * a + BETA * b, A_T[:, t + 1:]], 1)
        G_T = A_T.log() + (G_T[:, -1:] - A_T[:, -1:].log())        # the glimpse whose softmax A_T is
    return dfan.loss_fn(torch.stack(logits, 1), labels, torch.full((B,), T))


def row(ratio, what, *seconds):
    print(f"{ratio:6.2f}  {what:<76}" + " / ".join(f"{s:.3g}" for s in seconds), flush=True)


def recurrence(B, T, rounds, literally=0, H=256):
    """Forward and backward of DFAN, of a two-layer nn.LSTM and, in as many rounds as said, of the literal equations,
    alternating: medians, and the fastest rounds, since memory that goes back to the system and is asked for anew makes
    single rounds slow."""
    torch.manual_seed(0)
    F_A, F_S, F_O = torch.randn(B, T, 2048), torch.randn(B, T, 365), torch.rand(B, T, 16, 84)
    labels = torch.randint(0, 6, (B,))
    net, lstm = dfan.DFAN(2048, 365, 84, H, 6).train(), torch.nn.LSTM(2413, H, 2, batch_first=True)
    FF, lengths = torch.cat([F_A, F_S], -1), torch.full((B,), T)
    forms = dict(dfan=lambda: dfan.loss_fn(net(F_A, F_S, F_O, lengths)["logits"], labels, lengths),
                 lstm=lambda: lstm(FF)[0].sum())
    if literally:
        forms["literal"] = lambda: literal(net, F_A, F_S, F_O, labels)
        assert abs(forms["literal"]().item() - forms["dfan"]().item()) < 1e-5
    seconds = {name: [] for name in forms}
    for n in range(rounds + 1):                                     # the first warms up
        for name, form in forms.items():
            if name == "literal" and n > literally:
                continue
            start = time.perf_counter()
            form().backward()
            if n:
                seconds[name].append(time.perf_counter() - start)
    median = {name: float(np.median(v)) for name, v in seconds.items()}
    for a, b, what in (("dfan", "lstm", "dfan.py / nn.LSTM"),
                       ("literal", "dfan", "equations taken literally / dfan.py")):
        if a in median:
            fastest = min(seconds[a]), min(seconds[b])
            row(median[a] / median[b], f"{what}, B={B}, T={T} (fastest: {fastest[0] / fastest[1]:.2f})",
                median[a], median[b])


def peak():
    """MiB at most in use so far, on Linux; resource's ru_maxrss would start at the parent's."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def peak_memory(T, B=16):
    """MiB that one forward and backward needs above its features; in a process of its own."""
    F = torch.randn(B, T, 2048), torch.randn(B, T, 365), torch.rand(B, T, 16, 84)
    net, before = dfan.DFAN(2048, 365, 84, 256, 6).train(), peak()
    labels, lengths = torch.zeros(B, dtype=torch.long), torch.full((B,), T)
    dfan.loss_fn(net(*F, lengths)["logits"], labels, lengths).backward()
    return peak() - before


def lengths_of(n):
    """Ekman-6's lengths: mean 403 sampled frames, 95 % below 1,050, the longest 4,260."""
    lengths = (np.random.default_rng(3).lognormal(5.65, 0.8, 819).astype(int) + 1).clip(2, 4260)
    lengths[0] = 4260
    return lengths[-n:]


def epoch(n):
    """A training epoch over n such videos, from disk and from memory; in a process of its own for its peak memory."""
    rng, lengths = np.random.default_rng(0), lengths_of(n)
    with tempfile.TemporaryDirectory() as work:
        for i, T in enumerate(lengths):
            F = dict(action=rng.standard_normal((T, 2048), np.float32), scene=rng.standard_normal((T, 365), np.float32),
                     objects=rng.random((T, 16, 84), np.float32))
            path = Path(work, str(i % 6), f"{i}.npz")
            path.parent.mkdir(exist_ok=True)
            np.savez(path, **{k: v.astype(np.float16) for k, v in F.items()})
        os.sync()
        args, seconds, highest = dfan.parse_args(["--data", work]), {}, {}
        args.device = "cpu"
        for memory in (0., 1e3):
            data = dfan.Features(work, memory=memory)
            torch.manual_seed(0)
            model = dfan.make_network(data.shape, 6, args)
            for path in data.paths if hasattr(os, "posix_fadvise") else ():
                with open(path, "rb") as f:                         # not from the system's cache
                    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            dfan.train_epoch(model, torch.optim.Adam(model.parameters()), data, range(n), 1, 0, args)
            seconds[memory] = time.perf_counter() - start
            highest[memory] = peak() / 1024
    row(seconds[0.] / seconds[1e3], f"an epoch, {n} videos, {lengths.sum()} frames: from disk / in memory",
        *seconds.values())
    row(highest[0.], f"GiB, peak memory of the process, --frames {args.frames} (all in memory: {highest[1e3]:.2f})")


def padding():
    args, lengths = dfan.parse_args(["--data", "."]), lengths_of(819)
    batches = dfan.make_batches(range(819), lengths, args, np.random.default_rng(0))
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    row(padded / lengths.sum(), f"frames with padding / frames, 819 videos in {len(batches)} batches", padded,
        lengths.sum())


def extraction(detector, seconds):
    """One video of 640 x 360 with networks of random weights: everything to the .npz / the networks' forwards alone."""
    with tempfile.TemporaryDirectory() as work:
        path = write_video(Path(work, "a.mp4"), int(30 * seconds), 360, 640, fps=30.)
        names = ["action_rgb", "action_flow", "scene", detector]
        networks = extract.Networks(names, 0, "cpu")
        networks.models["objects"].roi_heads.score_thresh = 0.05    # as with trained weights: few boxes pass
        settings = dict(every=8, networks=dict.fromkeys(names, ""))
        samples, _ = samples_of(path)
        parts = [samples[n:n + 4] for n in range(0, len(samples), 4)]

        def timed(work):
            start = time.perf_counter()
            result = work()
            return time.perf_counter() - start, result

        alone, prepared = {}, {}                                    # one core a part, as the extraction does it
        with concurrent.futures.ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for name, model in networks.models.items():
                if name == "objects":
                    prepare = lambda part: [torch.from_numpy(s["frame"]).permute(2, 0, 1).float() / 255 for s in part]
                    forward = torch.inference_mode()(lambda x: extract.detect(networks.models["objects"], x))
                else:
                    prepare = lambda part: networks.input(name, np.stack([s[extract.IMAGES[name]] for s in part]))
                    forward = torch.inference_mode()(model)
                prepared[name], inputs = timed(lambda: list(pool.map(prepare, parts)))
                list(pool.map(forward, inputs[:2]))                 # warms up
                alone[name], _ = timed(lambda: list(pool.map(forward, inputs)))
        whole, (_, features, _) = timed(lambda: next(extract.extract({"a": path}, networks, settings)))
        saving, _ = timed(lambda: extract.write_features(Path(work, "a.npz"), features))
        decoding, _ = timed(lambda: samples_of(path, flow=False))
        flow = timed(lambda: samples_of(path))[0] - decoding
        total = sum(alone.values())
    row((whole + saving) / total, f"extraction / its networks' forwards alone, {detector}", whole + saving, total)
    row((whole + saving) / seconds * 60, "  seconds a minute of video at 30 frames a second")
    for what, spent in (*alone.items(), ("normalising", sum(prepared.values())), ("decoding and scaling", decoding),
                        ("flow", flow), ("saving", saving)):
        row(spent / total, f"  {what} / the forwards alone", spent)


def in_a_process(function, *args):
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def benchmark(quick=False):
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratios first, then their seconds")
    padding()
    if quick:
        recurrence(16, 100, 3, 3)
        recurrence(16, 400, 3)
        in_a_process(epoch, 48)
        extraction(SMALL, 4)
        return
    for B in (16, 1, 32):
        for T in (400, 100, 1600, 4260):
            recurrence(B, T, 5, {400: 5, 100: 5, 1600: 2}.get(T, 0) if B == 16 else 0)
    memory = {T: in_a_process(peak_memory, T) for T in (100, 400, 1600, 4260)}
    row(memory[1600] / memory[400], "memory at T=1600 / at T=400; MiB above the features at T = 100, 400, 1600, 4260",
        *memory.values())
    in_a_process(epoch, 819)
    for detector in reversed(extract.DETECTORS):
        extraction(detector, 10)


# ----------------------------------------------------------------------------------------------------------------------
# The readings that DFAN does not take, on the planted set: python test_dfan.py --readings
# ----------------------------------------------------------------------------------------------------------------------

class OverwritesAll(dfan.DFACell):
    """(9) read as T numbers a frame: W_Tf maps S_t to the T positions, and frame t overwrites the whole series [R5]."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        T = dfan.Planted.T
        self.W_Th, self.W_Tf = torch.nn.Linear(self.H, T, bias=False), torch.nn.Linear(self.W_Tf.in_features, T)

    def project(self, F_A, F_S, F_O, valid):
        one = self.W_Tf
        self.W_Tf = torch.nn.Linear(one.in_features, 1)                # what the parent projects with it is not used
        x = super().project(F_A, F_S, F_O, valid)
        self.W_Tf, x.F_O, x.FF = one, F_O, torch.cat([F_A, F_S], -1)
        x.all_T_in, x.all_valid = (v.unsqueeze(1).expand(-1, F_A.shape[1], -1, -1) for v in (x.T_in, valid))
        return x

    def forward(self, t, x, s):
        y = type(s)()
        self.objects_focus(t, x, s, y)
        F_o_hat = (y.A_o.unsqueeze(-1) * x.F_O[t]).sum(1)
        G_T = torch.tanh(self.W_Th(s.h2) + self.W_Tf(torch.cat([F_o_hat, x.FF[t]], -1)))
        e = G_T.exp() * x.all_valid[t].squeeze(-1)
        if self.training and t > 0:
            mixed = e.clone()
            mixed[:, t - 1] = self.beta * e[:, t - 1] + (1 - self.beta) * e[:, t]
            mixed[:, t] = (1 - self.beta) * e[:, t - 1] + self.beta * e[:, t]
            e = mixed
        s.e, s.den = list(e.split(1, -1)), e.sum(-1, keepdim=True)
        F_t = (e.unsqueeze(-1) * x.all_T_in[t]).sum(1) / s.den
        s.h2, s.c2, _ = dfan.lstm(torch.addmm(F_t, torch.cat([s.P, s.h2], -1), self.T_h.weight.T), s.c2)
        y.logits = self.W_p(s.h2)
        s.P = y.logits.softmax(-1)
        return y


class StartsEmpty(dfan.DFACell):
    """The softmax (8) over the frames seen so far, in place of uniform weights before the first frame [R5]."""

    def start(self, x, sum_T_in):
        s = super().start(x, torch.zeros_like(sum_T_in))
        s.e, s.den = [torch.zeros_like(v) for v in s.e], torch.zeros_like(s.den)
        return s


class MixesInTurn(dfan.DFACell):
    """(10) read as a program: its second line takes what the first has written [R6]."""

    def forward(self, t, x, s):
        beta, self.beta = self.beta, 1.
        y = super().forward(t, x, s)
        self.beta = beta
        if self.training and t > 0:
            a, b = s.e[t - 1], s.e[t]
            s.e[t - 1] = beta * a + (1 - beta) * b
            s.e[t] = (1 - beta) * s.e[t - 1] + beta * b
            s.num = s.num + (s.e[t - 1] - a) * x.T_in[t - 1] + (s.e[t] - b) * x.T_in[t]
            s.den = s.den + s.e[t - 1] - a + s.e[t] - b
        return y


def last_frame_loss(logits, labels, lengths):
    """Cross-entropy of the last frame's P_t alone [R7]."""
    return torch.nn.functional.cross_entropy(logits[torch.arange(len(logits)), lengths - 1], labels)


READINGS = {"ours": {}, "(9): T numbers a frame, all overwritten [R5]": dict(cell=OverwritesAll),
            "(8): over the frames seen so far [R5]": dict(cell=StartsEmpty),
            "(10): one line after the other [R6]": dict(cell=MixesInTurn),
            "(10) left out: beta = 1 [R6]": dict(beta=1.),
            "loss: the last frame alone [R7]": dict(loss=last_frame_loss)}


def network_of(cell):
    """DFAN with another cell; autograd goes through its forward."""
    return type("Net", (dfan.DFAN,), dict(Cell=cell, unroll=staticmethod(lambda cell, x: dfan.unroll(cell, x)[0])))


@pytest.mark.parametrize("cell", [OverwritesAll, StartsEmpty, MixesInTurn])
def test_other_readings_run_and_differ(cell):
    lengths = torch.tensor([24, 20])
    *F, _ = make_batch([24, 20], dtype=torch.float32)
    outs = []
    for kind in (dfan.DFACell, cell):
        torch.manual_seed(1)
        net = network_of(kind)(7, 5, 6, 4, 3).train()
        outs.append(net(*F, lengths))
        dfan.loss_fn(outs[-1]["logits"], torch.tensor([0, 1]), lengths).backward()
        assert torch.allclose(outs[-1]["A_T"].sum(1), torch.ones(2))
        assert all(p.grad.isfinite().all() for p in net.parameters())
    assert (outs[0]["logits"] - outs[1]["logits"]).abs().max() > 1e-6


def try_reading(name, seed):
    """One run on the planted set under one reading: accuracy, time share, object share."""
    change = READINGS[name]
    args = dfan.parse_args(["--seed", str(seed), *(["--beta", str(change["beta"])] if "beta" in change else [])])
    args.device, args.mark = "cpu", ""
    torch.set_num_threads(1)
    dfan.loss_fn = change.get("loss", dfan.loss_fn)
    if "cell" in change:
        net = network_of(change["cell"])
        dfan.make_network = lambda shape, C, a: net(shape[0], shape[1], shape[3], a.hidden, C, a.beta)
    data = dfan.Planted(seed)
    result = dfan.run(0, data, *data.splits[0], args)
    return [result["accuracy"], *(share for share, _, _ in result["focus"].values())]


def readings(seeds=3):
    print("reading, on the planted set: accuracy, time share (uniform 0.083), object share (uniform 0.125); "
          f"mean +/- standard deviation, n = {seeds}")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), max_tasks_per_child=1,
                                                mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {name: [pool.submit(try_reading, name, seed) for seed in range(seeds)] for name in READINGS}
        for name, futures in jobs.items():
            values = np.array([f.result() for f in futures])
            print(f"READING  {name:<46}" + "".join(
                f"{m:8.3f} +/- {s:.3f}" for m, s in zip(values.mean(0), values.std(0, ddof=1))), flush=True)


if __name__ == "__main__":
    tasks = {"": benchmark, "--quick": lambda: benchmark(quick=True), "--readings": readings, "--faults": faults}
    if " ".join(sys.argv[1:]) not in tasks:
        sys.exit("usage: python test_dfan.py [--quick | --readings | --faults]; the tests: python -m pytest -q")
    tasks[" ".join(sys.argv[1:])]()
