"""Dual Focus Attention Network for Video Emotion Recognition (Qiu, He, Wang; ICME 2020), whole, in one script.

    python dfan.py                                        # no data: a built-in planted set, about a minute on two cores
    python dfan.py --data feats/ --dataset ekman          # one fixed split (4.1)
    python dfan.py --data feats/ --dataset videoemotion   # ten random 2/3-1/3 splits, mean accuracy (4.1)

feats/ is what extract_features.py writes. Figure 1 of the paper, for frame t of a video:

          F_o (K objects) ---> mean ---> LSTM.S ---h1---> O.Focus: A_o over the K objects  (1)-(4)
             |                             ^                 |
             +-----------------------------|--- weighted --> F_o_hat
                                        h2 of t-1            |
          F_A, F_S (action, scene) --------|-----------> S_t = [F_o_hat; F_A; F_S]
             |                             |                 |
          FF = [F_A; F_S] of all frames    +----------> T.Focus: entry t of A_T over the T frames  (8), (9)
             |                             |                 |
             +--- weighted by A_T --- F_t (7) ---> LSTM.T ---h2---> P_t, the emotion at t  (5), (6)
                                       P of t-1 ---^

How to read it. Tensors of section 3 keep the paper's letters: capital O is the whole video, small o one frame; hat and
bar are suffixes; the blackboard-bold F (action and scene together) is FF. A line that computes the left-hand side of
an equation ends in its number, (1) to (10). [R1] to [R15] are rows of the README's table "Where the paper is silent or
ambiguous". Text in double quotes is the paper's. Code counts frames from 0, the paper from 1.

    B videos in a batch   T frames (the longest of the batch)   K objects a frame   H hidden units   C emotions
    F_A (B,T,2048)   F_S (B,T,365)   F_O (B,T,K,84)   FF (B,T,2413)   A_o (B,T,K)   A_T (B,T)   P (B,T,C)
"""
import argparse
import concurrent.futures
import hashlib
import json
import os
import pickle
import sys
import types
import zipfile
import zlib
from pathlib import Path

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")      # the same numbers for any number of threads (torchrun sets one)

import numpy as np
import sklearn
import torch
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import StratifiedShuffleSplit
from torch import nn

BETA = 0.6                                # "we empirically set beta = 0.6" (3.2.2)
LAST_FRAMES = 10                          # "we count the predictions of the last ten frames" (4.1)
PAPER_COUNTS = {"ekman": (819, 818)}      # training and validation videos (4.1)
NOT_IN_THE_PAPER = dict(hidden=256, lr=1e-3, batch=16, epochs=30, clip=1.0)      # chosen here; the optimizer is Adam
PLANTED = NOT_IN_THE_PAPER | dict(hidden=32, lr=5e-3, epochs=20)                 # the same for the planted set


class InputError(Exception):
    """A failure that the user can mend: its one line names the file and the remedy; main() exits with status 2."""


# ======================================================================================================================
# Section 3.2: the DFA cell. The code runs in dependency order (4)(3)(2)(1), (9)(8)(7)(6)(5), (10).
# ======================================================================================================================

def lstm(gates, c):
    """One step of a vanilla LSTM. gates (B,4H): input and recurrent half added, in PyTorch's order i, f, g, o; c (B,H).

    Returns the new h and c, (B,H) each, and what lstm_backward needs.
    """
    i, f, g, o = gates.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c_new = f * c + i * g
    tanh_c = c_new.tanh()
    return o * tanh_c, c_new, (i, f, g, o, tanh_c, c)


class DFACell(nn.Module):
    """The Dual Focus Attention cell: "two focus attention modules with two vanilla LSTM cells" (3.2).

    `forward` is one frame. Each linear map of a feature is applied to the whole video before the loop (`project`); by
    linearity that is exact: the sum over i of A_Ti times W FF_i equals W times the sum. (7) and (8) are a ratio of two
    running sums, with e_i = exp(G_Ti): num = sum of e_i FF_i (T_in applied) and den = sum of e_i; frame t changes entry
    t alone.
    """

    def __init__(self, d_action, d_scene, d_object, hidden, classes, beta=BETA):
        super().__init__()
        self.beta, self.H, self.C, self.d_object = beta, hidden, classes, d_object
        d_FF = d_action + d_scene
        self.W_oh = nn.Linear(hidden, 1, bias=False)              # (3)  one scalar an object [R2]
        self.W_of = nn.Linear(d_object, 1)                        # (3)  its bias is b_o
        self.S_in = nn.Linear(d_object, 4 * hidden)               # (4)  LSTM.S, input half
        self.S_h = nn.Linear(2 * hidden, 4 * hidden)              # (4)  LSTM.S, recurrent half: [h2; h1] [R1]
        self.W_p = nn.Linear(hidden, classes)                     # (5)  its bias is b_p
        self.T_in = nn.Linear(d_FF, 4 * hidden)                   # (6)  LSTM.T, input half
        self.T_h = nn.Linear(classes + hidden, 4 * hidden)        # (6)  LSTM.T, recurrent half: [P; h2] [R4]
        self.W_Th = nn.Linear(hidden, 1, bias=False)              # (9)
        self.W_Tf = nn.Linear(d_object + d_FF, 1)                 # (9)  on [F_o_hat; F_A; F_S]; its bias is b_T

    def project(self, F_A, F_S, F_O, valid):
        """All that multiplies a feature, for all frames at once.

        F_A (B,T,2048), F_S (B,T,365), F_O (B,T,K,84), valid (B,T,1): 1 for a frame, 0 for padding.
        """
        def on_FF(W, bias):                                                              # W FF = W_A F_A + W_S F_S
            W_A, W_S = W.split([F_A.shape[-1], F_S.shape[-1]], -1)
            return nn.functional.linear(F_A, W_A, bias).add_(F_S @ W_S.T)

        there = (F_O != 0).any(-1)                                                       # (B,T,K)  [R3]
        F_O_bar = F_O.sum(2) / there.sum(2, keepdim=True).clamp(min=1)                   # (B,T,84) mean of those there
        W_Tf_object, W_Tf_FF = self.W_Tf.weight.split([self.d_object, F_A.shape[-1] + F_S.shape[-1]], -1)
        return types.SimpleNamespace(
            S_in=self.S_in(F_O_bar),                                                     # (4)  (B,T,4H)
            W_of=self.W_of(F_O).squeeze(-1),                                             # (3)  (B,T,K)
            W_Tf_object=F_O @ W_Tf_object[0],                                            # (1) in (9)  (B,T,K)
            W_Tf_FF=on_FF(W_Tf_FF, self.W_Tf.bias),                                      # (9)  (B,T,1)
            T_in=on_FF(self.T_in.weight, self.T_in.bias),                                # (7)  (B,T,4H)
            valid=valid, there=there, absent=torch.where(there, 0., -1e4))               # (2)  exp(-1e4) = 0

    def start(self, x, sum_T_in):
        """The state before frame 0: zeros, P_0 = 0 [R4] and G_T = 0, that is, uniform attention over the video [R5].

        x: as in `forward`; sum_T_in (B,4H): the sum of T_in over the video's frames.
        """
        zeros, B = sum_T_in.new_zeros, len(sum_T_in)
        return types.SimpleNamespace(
            h1=zeros(B, self.H), c1=zeros(B, self.H), h2=zeros(B, self.H), c2=zeros(B, self.H), P=zeros(B, self.C),
            e=list(x.valid), num=sum_T_in, den=sum(x.valid))

    def forward(self, t, x, s):
        """Frame t. x: what `project` returns, each entry a tuple over t; s: the state, changed to that after frame t.

        Returns a namespace: logits (B,C), the input of softmax (5), A_o (B,K), and what the gradient needs.
        """
        y = types.SimpleNamespace(mix=None)
        # --- Frame Objects Focus (3.2.1)
        y.h2h1 = torch.cat([s.h2, s.h1], -1)
        s.h1, s.c1, y.S = lstm(x.S_in[t] + self.S_h(y.h2h1), s.c1)                       # (4)   (B,H)  [R1]
        y.G_o = torch.tanh(self.W_oh(s.h1) + x.W_of[t])                                  # (3)   (B,K)  [R2]
        y.A_o = torch.softmax(y.G_o + x.absent[t], -1)                                   # (2)   (B,K)  [R3]
        F_o_hat = (x.W_Tf_object[t] * y.A_o).sum(-1, keepdim=True)                       # (1)   (B,1)  W_Tf applied
        # --- Time Series Focus (3.2.2)
        y.G_t = torch.tanh(self.W_Th(s.h2) + F_o_hat + x.W_Tf_FF[t])                     # (9)   (B,1)  entry t [R5]
        y.e_t = y.G_t.exp() * x.valid[t]                                                 # (8)   A_Tt = e_t / den
        s.num = s.num + (y.e_t - x.valid[t]) * x.T_in[t]                                 # (7)   (B,4H) e_t was 1
        s.den = s.den + (y.e_t - x.valid[t])                                             # (8)   (B,1)
        y.F_t, y.den = s.num / s.den, s.den                                              # (7)   (B,4H) T_in applied
        y.Ph2 = torch.cat([s.P, s.h2], -1)
        s.h2, s.c2, y.T = lstm(y.F_t + self.T_h(y.Ph2), s.c2)                            # (6)   (B,H)  [R4]
        y.logits = self.W_p(s.h2)                                                        # (5)   (B,C)
        s.P = torch.softmax(y.logits, -1)                                                # (5)   (B,C)
        y.h1, y.h2, y.P = s.h1, s.h2, s.P
        # --- attention scrambler: "during the training stage", "mixed after each prediction"
        s.e[t] = y.e_t
        if self.training and t > 0:
            y.mix = (1 - self.beta) * x.valid[t] * (s.e[t] - s.e[t - 1])                 # den, the sum, stays
            s.e[t - 1], s.e[t] = s.e[t - 1] + y.mix, s.e[t] - y.mix                      # (10)  at once [R6]
            s.num = s.num + y.mix * (x.T_in[t - 1] - x.T_in[t])                          # (10)  in (7)
        return y


# ----------------------------------------------------------------------------------------------------------------------
# The gradient of the loop, written out: the lines of DFACell.forward from the last to the first. It equals autograd's
# (a test compares them) and is faster: no graph of some fifty small nodes a frame, and each weight's gradient is one
# product for all frames. Nothing of the method is below; a reader may skip to DFAN.
# ----------------------------------------------------------------------------------------------------------------------

sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward.default, torch.ops.aten.tanh_backward.default


def softmax_backward(dy, y):
    return y * (dy - (dy * y).sum(-1, keepdim=True))


def lstm_backward(saved, dh, dc, dgates):
    """From the gradients of the new h and c: writes that of gates (B,4H) into dgates, returns that of the old c."""
    i, f, g, o, tanh_c, c = saved
    dc = dc + tanh_backward(dh * o, tanh_c)
    torch.cat([sigmoid_backward(dc * g, i), sigmoid_backward(dc * c, f), tanh_backward(dc * i, g),
               sigmoid_backward(dh * tanh_c, o)], -1, out=dgates)
    return dc * f


class Loop(torch.autograd.Function):
    """The cell over all frames. A "d" before a name: the gradient of the loss with respect to it."""

    @staticmethod
    def run(cell, x):
        """x: what `project` returns. Returns logits (B,T,C), A_o (B,T,K) and, at the end, e (B,T), den (B,1)."""
        return Loop.apply(cell, x.valid, x.absent, x.S_in, x.W_of, x.W_Tf_object, x.W_Tf_FF, x.T_in,
                          cell.S_h.weight, cell.S_h.bias, cell.T_h.weight, cell.T_h.bias, cell.W_oh.weight,
                          cell.W_Th.weight, cell.W_p.weight, cell.W_p.bias)

    @staticmethod
    def forward(ctx, cell, valid, absent, S_in, W_of, W_Tf_object, W_Tf_FF, T_in, *_):
        x = types.SimpleNamespace(
            valid=valid.unbind(1), absent=absent.unbind(1), S_in=S_in.unbind(1), W_of=W_of.unbind(1),
            W_Tf_object=W_Tf_object.unbind(1), W_Tf_FF=W_Tf_FF.unbind(1), T_in=T_in.unbind(1))
        s = cell.start(x, (valid.transpose(1, 2) @ T_in).squeeze(1))
        ys = [cell(t, x, s) for t in range(len(x.valid))]
        ctx.cell, ctx.x, ctx.ys, ctx.valid = cell, x, ys, valid
        return torch.stack([y.logits for y in ys], 1), torch.stack([y.A_o for y in ys], 1), torch.cat(s.e, -1), s.den

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogits, dA_o, de, dden):
        cell, x, ys, zeros = ctx.cell, ctx.x, ctx.ys, torch.zeros_like
        dlogits, dA_o, de = dlogits.unbind(1), dA_o.unbind(1), list(de.split(1, -1))
        dS_in, dgates_T, dT_in = (ctx.valid.new_zeros(*dA_o[0].shape[:1], len(ys), 4 * cell.H) for _ in range(3))
        dS_in_t, dgates_T_t, dT_in_t = dS_in.unbind(1), dgates_T.unbind(1), dT_in.unbind(1)
        dh1, dc1, dh2, dc2 = (zeros(ys[0].h1) for _ in range(4))
        dP, dnum = zeros(ys[0].P), zeros(ys[0].F_t)
        for t, y in reversed(list(enumerate(ys))):
            if y.mix is not None:                                                        # (10)
                dmix = (dnum * (x.T_in[t - 1] - x.T_in[t])).sum(-1, keepdim=True) + de[t - 1] - de[t]
                dmix = dmix * (1 - cell.beta) * x.valid[t]
                de[t - 1], de[t] = de[t - 1] - dmix, de[t] + dmix
                torch.mul(y.mix, dnum, out=dT_in_t[t - 1])
                dT_in_t[t].sub_(dT_in_t[t - 1])
            y.dlogits = dlogits[t] + softmax_backward(dP, y.P)                           # (5)
            dc2 = lstm_backward(y.T, dh2 + y.dlogits @ cell.W_p.weight, dc2, dgates_T_t[t])     # (6)
            dP, dh2 = (dgates_T_t[t] @ cell.T_h.weight).split([cell.C, cell.H], -1)      # (6)
            dF_t = dgates_T_t[t] / y.den                                                 # (7)
            dnum, dden = dnum + dF_t, dden - (dF_t * y.F_t).sum(-1, keepdim=True)        # (7), (8)
            dT_in_t[t].addcmul_(y.e_t - x.valid[t], dnum)                                # (7)
            de_t = de[t] + dden + (dnum * x.T_in[t]).sum(-1, keepdim=True)               # (8)
            y.dG_t = tanh_backward(de_t * y.e_t, y.G_t)                                  # (9)  before the tanh
            dA_o_t = dA_o[t] + y.dG_t * x.W_Tf_object[t]                                 # (1)
            y.dG_o = tanh_backward(softmax_backward(dA_o_t, y.A_o), y.G_o)               # (2), (3)  before the tanh
            dh1 = dh1 + y.dG_o.sum(-1, keepdim=True) * cell.W_oh.weight                  # (3)
            dc1 = lstm_backward(y.S, dh1, dc1, dS_in_t[t])                               # (4)
            dh2_S, dh1 = (dS_in_t[t] @ cell.S_h.weight).split(cell.H, -1)                # (4)
            dh2 = dh2 + dh2_S + y.dG_t * cell.W_Th.weight                                # (4), (9)
        dT_in.addcmul_(ctx.valid, dnum.unsqueeze(1))                                     # (7)  the sum before frame 0
        frames = lambda name: torch.stack([getattr(y, name) for y in ys], 1)             # (B,T,.)
        rows = lambda v: v.flatten(0, 1)                                                 # (B T,.)
        dG_o, dG_t, h2h1 = frames("dG_o"), frames("dG_t"), rows(frames("h2h1"))
        S, T, logits = rows(dS_in), rows(dgates_T), rows(frames("dlogits"))
        return (None, None, None, dS_in, dG_o, dG_t * frames("A_o"), dG_t, dT_in,
                S.T @ h2h1, S.sum(0), T.T @ rows(frames("Ph2")), T.sum(0),
                rows(dG_o).sum(-1)[None] @ rows(frames("h1")), rows(dG_t).T @ h2h1[:, :cell.H],
                logits.T @ rows(frames("h2")), logits.sum(0))


class DFAN(nn.Module):
    """The network: the DFA cell run over a video (figure 1).

    Widths d_action, d_scene, d_object of the features (2048, 365, 84 in the paper; any will do), hidden units, classes,
    and beta of (10).
    """

    def __init__(self, d_action, d_scene, d_object, hidden, classes, beta=BETA):
        super().__init__()
        self.cell = DFACell(d_action, d_scene, d_object, hidden, classes, beta)

    def forward(self, F_A, F_S, F_O, lengths=None):
        """F_A (B,T,d_action), F_S (B,T,d_scene), F_O (B,T,K,d_object), lengths (B,) frames of each video, T if None.

        An object whose features are all zero is not there [R3]. Frames from a video's length on are padding: whatever
        numbers they hold change nothing; they are zeros in what is returned, a dict of
            logits (B,T,C)   before the softmax of (5): what the loss takes
            P      (B,T,C)   P_t (5)
            A_T    (B,T)     the time attention (8) as it stands after the video's last frame
            A_o    (B,T,K)   the object attention (2)
        """
        B, T = F_A.shape[:2]
        lengths = torch.as_tensor([T] * B if lengths is None else lengths, device=F_A.device)
        valid = (torch.arange(T, device=F_A.device) < lengths[:, None]).unsqueeze(-1)    # (B,T,1)
        x = self.cell.project(F_A, F_S, F_O, valid.to(F_A.dtype))
        logits, A_o, e, den = Loop.run(self.cell, x)
        logits = logits * valid
        return dict(logits=logits, P=torch.softmax(logits, -1) * valid, A_T=e / den, A_o=A_o * (x.there & valid))


def loss_fn(logits, labels, lengths):
    """Cross-entropy of P_t, averaged over a video's frames, then over videos [R7]. (B,T,C), (B,), (B,) -> scalar."""
    B, T, C = logits.shape
    frames = nn.functional.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(T), reduction="none").view(B, T)
    valid = torch.arange(T, device=logits.device) < lengths[:, None]
    return ((frames * valid).sum(1) / lengths).mean()


def vote(P, lengths):
    """"we count the predictions of the last ten frames and select the emotion that appears the most" (4.1).

    P (B,T,C), lengths (B,) -> (B,) emotions. Fewer frames vote in a shorter video; a tie goes to the emotion with the
    higher summed probability [R8].
    """
    emotions = []
    for P_video, n in zip(P, lengths.tolist()):
        last = P_video[max(0, n - LAST_FRAMES):n]
        counts = torch.bincount(last.argmax(-1), minlength=P.shape[-1]).tolist()
        sums = last.sum(0).tolist()
        emotions.append(max(range(len(counts)), key=lambda c: (counts[c], sums[c])))
    return torch.tensor(emotions)


# ======================================================================================================================
# Data: feature files, split lists (4.1), the planted set
# ======================================================================================================================

def read_features(path):
    """F_A (T,D), F_S (T,D), F_O (T,K,D) in float32 and the settings (JSON text, "" if none) of one .npz file.

    Raises InputError, naming the file, if it is truncated, holds pickles, lacks an array, holds NaN or infinity, or if
    its arrays disagree in length.
    """
    redo = "delete it and run extract_features.py again"
    try:
        with np.load(path, allow_pickle=False) as f:
            missing = {"action", "scene", "objects"} - set(f.files)
            if missing:
                raise InputError(f"{path}: no array {', '.join(sorted(missing))} in it; {redo}")
            F = [torch.from_numpy(f[name].astype(np.float32)) for name in ("action", "scene", "objects")]
            settings = str(f["settings"]) if "settings" in f.files else ""
    except (ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: truncated, or no plain .npz file ({error}); {redo}") from error
    if [v.dim() for v in F] != [2, 2, 3] or len({len(v) for v in F}) > 1 or len(F[0]) == 0:
        shapes = ", ".join(str(tuple(v.shape)) for v in F)
        raise InputError(f"{path}: action (T,D), scene (T,D) and objects (T,K,D) disagree: {shapes}; {redo}")
    for name, v in zip(("action", "scene", "objects"), F):
        if not v.isfinite().all():
            raise InputError(f"{path}: NaN or infinity in {name}; {redo}")
    return *F, settings


class Features:
    """The .npz files below a folder, <class>/<stem>.npz. They are read when a batch needs them, not kept in memory.

    ids ("class/stem"), labels, lengths, classes (the folders' names, sorted), shape (d_action, d_scene, K, d_object).
    Every file is read once here, so that a bad one is known before training starts. Raises InputError.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{folder}: no such folder; --data takes the folder that extract_features.py wrote")
        paths = sorted(p for p in self.folder.glob("*/*") if p.name.endswith(".npz") and not p.name.startswith("."))
        if not paths:
            raise InputError(f"{folder}: no <class>/<name>.npz in it; run extract_features.py videos/ {folder} first")
        self.ids = [f"{p.parent.name}/{p.name[:-4]}" for p in paths]
        self.classes = sorted({p.parent.name for p in paths})
        self.labels = [self.classes.index(p.parent.name) for p in paths]
        self.paths, self.lengths, self.settings, self.shape, self.largest = paths, [], {}, None, 0.
        for path in paths:
            F_A, F_S, F_O, settings = read_features(path)
            shape = (F_A.shape[1], F_S.shape[1], *F_O.shape[1:])
            self.shape = self.shape or shape
            if shape != self.shape:
                raise InputError(f"{path}: widths (action, scene, K, object) {shape}, but {self.shape} in {paths[0]}; "
                                 "extract both with the same settings")
            self.lengths.append(len(F_A))
            self.largest = max(self.largest, F_A.abs().mean().item(), F_S.abs().mean().item())
            self.settings.setdefault(settings, path)

    def warnings(self):
        """What a reader of the result must know of these features, a line each."""
        if len(self.settings) > 1:
            two = list(self.settings.values())[:2]
            yield f"features made with different settings: {two[0]} and {two[1]}"
        if any(s and json.loads(s).get("random_weights") is not None for s in self.settings):
            yield "features of networks with RANDOM weights: they try the pipeline, their accuracy means nothing"

        if self.largest > 5:
            yield (f"action or scene features of mean size {self.largest:.1f}: above about 5 they saturate the LSTMs "
                   "and nothing is learnt; scale them down")

    def load(self, i, epoch):
        return read_features(self.paths[i])[:3]


class Planted:
    """A built-in set on which both focuses are needed; the network's parts are known to be right if it is learnt.

    T = 24 frames of K = 8 objects. In each video four snippets of two frames carry the action pattern of an emotion:
    one of the true emotion, three of other emotions. Only in the true snippet is one object a confident "key" (class 0,
    0.95); the others, there and everywhere, are weak detections (0.05 to 0.5) of five classes, class 0 among them.
    Training videos are drawn anew in every epoch, each from (seed, epoch, number) alone.
    """
    T, K, TRAIN, TEST, STRENGTH = 24, 8, 1000, 500, 1.5
    shape = (32, 8, K, 84)
    classes = ["anger", "disgust", "fear", "joy", "sadness", "surprise"]

    def __init__(self, seed):
        self.seed = seed
        self.patterns = np.random.default_rng([seed, 0]).standard_normal((len(self.classes), self.shape[0]))
        self.ids = [f"{self.classes[i % 6]}/{i}" for i in range(self.TRAIN + self.TEST)]
        self.labels = [i % 6 for i in range(len(self.ids))]
        self.lengths = [self.T] * len(self.ids)
        self.splits = [(list(range(self.TRAIN)), list(range(self.TRAIN, len(self.ids))))]

    def warnings(self):
        yield "SYNTHETIC data, the planted set; --data FEATS runs on your own"

    def draw(self, i, epoch):
        """One video: F_A, F_S, F_O, the true snippet's frames (T,) bool, and the key object of each frame (T,)."""
        rng = np.random.default_rng([self.seed, 1, epoch if i < self.TRAIN else 0, i])
        label, (d_action, d_scene, K, d_object) = self.labels[i], self.shape
        F_A, F_S = rng.standard_normal((self.T, d_action)), rng.standard_normal((self.T, d_scene))
        F_O = np.zeros((self.T, K, d_object))
        frame, box = np.indices((self.T, K))
        F_O[frame, box, rng.integers(0, 5, (self.T, K))] = rng.uniform(0.05, 0.5, (self.T, K))
        F_O[:, :, -4:] = rng.uniform(0, 1, (self.T, K, 4))
        others = [c for c in rng.permutation(len(self.classes)) if c != label][:3]
        starts = 2 * rng.permutation(self.T // 2)[:4]
        for start, emotion in zip(starts, [label, *others]):
            F_A[start:start + 2] += self.STRENGTH * self.patterns[emotion]
        planted, key = np.zeros(self.T, bool), rng.integers(0, K, self.T)
        planted[starts[0]:starts[0] + 2] = True
        for t in np.flatnonzero(planted):
            F_O[t, key[t], :-4] = 0
            F_O[t, key[t], 0] = 0.95
        return F_A, F_S, F_O, planted, key

    def load(self, i, epoch):
        return [torch.from_numpy(v.astype(np.float32)) for v in self.draw(i, epoch)[:3]]


SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".3gp", ".ts", ".npz")


def read_list(path, ids):
    """Positions in ids of the videos that a split list names, and the lines without features. Raises InputError.

    A line is "class/stem [label]", or "stem [label]" where one class alone has that stem; a video's extension is
    optional. The label is not believed (lists count from 0 or from 1): the folder is the class.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a split list ({error})") from error
    position, stems = {name: i for i, name in enumerate(ids)}, {}
    for i, name in enumerate(ids):
        stems.setdefault(name.split("/", 1)[1], []).append(i)
    found, missing = {}, []
    for number, line in enumerate((line.strip() for line in lines), 1):
        if not line:
            continue
        *name, label = line.rsplit(None, 1)
        name = name[0] if name and label.isdigit() else line
        candidates = [c for n in (line, name)
                      for c in (n, n[:n.rindex(".")] if n.lower().endswith(SUFFIXES) else n)]
        hit = next((position[c] for c in candidates if c in position), None)
        if hit is None:
            same = next((stems[c] for c in candidates if c in stems), [])
            if len(same) > 1:
                raise InputError(f"{path}, line {number}: {' and '.join(ids[i] for i in same)} are both called {name}; "
                                 "write class/name")
            hit = same[0] if same else None
        if hit is None:
            missing.append(name)
        else:
            found[hit] = number
    if not found and not missing:
        raise InputError(f"{path}: an empty split list")
    return list(found), missing


def make_splits(args, data):
    """The (train, validation) positions of every run of the protocol (4.1): one for ekman, ten for videoemotion."""
    pairs, y = list(zip(args.split[::2], args.split[1::2])), np.array(data.labels)
    if len(args.split) % 2:
        raise InputError("--split takes pairs of files: TRAIN TEST [TRAIN TEST ...]")
    if args.dataset == "ekman" and not pairs:
        if args.alternate_split:
            print("split    alternating: identities sorted as strings, odd positions train (not the data set's own "
                  "lists)")
            order = sorted(range(len(data.ids)), key=lambda i: data.ids[i])
            return [(order[::2], order[1::2])]
        pairs = [(data.folder / "trainlist01.txt", data.folder / "testlist01.txt")]
        absent = [str(p) for p in pairs[0] if not p.is_file()]
        if absent:
            raise InputError(f"{' and '.join(absent)}: not there; copy the data set's split lists to that place, name "
                             "others with --split TRAIN TEST, or take --alternate-split")
    if args.dataset == "videoemotion" and not pairs:
        few = [c for i, c in enumerate(data.classes) if (y == i).sum() < 3]
        if few:
            raise InputError(f"{data.folder / few[0]}: fewer than 3 videos; a 2/3-1/3 split of each category needs 3")
        seeds = [args.seed + i for i in range(10)]
        print(f"split    2/3-1/3 of each category [R12], seeds {seeds[0]} to {seeds[-1]}")
        return [tuple(v.tolist() for v in next(StratifiedShuffleSplit(1, train_size=2 / 3, random_state=s).split(y, y)))
                for s in seeds]
    if args.dataset == "ekman" and len(pairs) > 1:
        raise InputError("--split: one pair for ekman; several pairs go with --dataset videoemotion")
    splits = []
    for files in pairs:
        (train, lost_train), (test, lost_test) = (read_list(path, data.ids) for path in files)
        for path, lost in zip(files, (lost_train, lost_test)):
            if lost and not args.allow_missing:
                raise InputError(f"{path}: {len(lost)} listed videos have no features in {data.folder}: "
                                 f"{', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}; extract them, or go on "
                                 "without: --allow-missing")
            if lost:
                print(f"missing  {len(lost)} videos of {path} have no features: {', '.join(lost)}")
        if set(train) & set(test):
            raise InputError(f"{files[1]}: {data.ids[min(set(train) & set(test))]} is in {files[0]} too; "
                             "a video cannot be in both")
        splits.append((train, test))
    for (train, test), files in zip(splits, pairs):
        for part, path in ((train, files[0]), (test, files[1])):
            without = [c for i, c in enumerate(data.classes) if not (y[part] == i).any()]
            if without:
                raise InputError(f"{path}: no video of class {without[0]} with features; each class needs one in "
                                 "either list")
    return splits


# ======================================================================================================================
# Training and evaluation
# ======================================================================================================================

def make_batches(indices, lengths, size, rng=None):
    """Lists of at most `size` videos of similar length, so that padding is short; with an rng, shuffled.

    The order is that of the lengths, each stretched by up to 15 % at random: batches differ from epoch to epoch.
    """
    stretch = 1 + (rng.uniform(0, 0.15, len(indices)) if rng else np.zeros(len(indices)))
    near = [i for _, i in sorted((lengths[i] * s, i) for i, s in zip(indices, stretch))]
    batches = [near[n:n + size] for n in range(0, len(near), size)]
    return [batches[n] for n in rng.permutation(len(batches))] if rng else batches


def load_batches(data, batches, epoch, device):
    """Yields (F_A, F_S, F_O, lengths, labels, positions), padded with zeros; a thread reads one batch ahead."""
    def load(batch):
        videos = [data.load(i, epoch) for i in batch]
        return [nn.utils.rnn.pad_sequence(list(v), batch_first=True) for v in zip(*videos)]

    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(load, batches[0])
        for n, batch in enumerate(batches):
            F = ahead.result()
            if n + 1 < len(batches):
                ahead = reader.submit(load, batches[n + 1])
            lengths, labels = (torch.tensor([values[i] for i in batch]) for values in (data.lengths, data.labels))
            yield *(v.to(device) for v in (*F, lengths, labels)), batch


def train_epoch(model, optimizer, data, train, epoch, seed, args):
    """One pass over the training videos; the order is a function of (seed, epoch) alone. Returns the mean loss."""
    model.train()
    total = 0.
    batches = make_batches(train, data.lengths, args.batch, np.random.default_rng([seed, epoch]))
    for *F, lengths, labels, batch in load_batches(data, batches, epoch, args.device):
        loss = loss_fn(model(*F, lengths)["logits"], labels, lengths)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        total += loss.item() * len(batch)
    if not np.isfinite(total):
        raise InputError(f"the loss is {total} in epoch {epoch}: lower --lr (it is {args.lr})")
    return total / len(train)


@torch.no_grad()
def evaluate(model, data, test, args):
    """Votes and attentions on the validation videos: (emotions (N,), [(A_T (T,), A_o (T,K))]), in the order of test."""
    model.eval()
    emotions, attentions = {}, {}
    for *F, lengths, labels, batch in load_batches(data, make_batches(test, data.lengths, args.batch), 0, args.device):
        out = model(*F, lengths)
        for n, (i, emotion) in enumerate(zip(batch, vote(out["P"], lengths).tolist())):
            emotions[i] = emotion
            attentions[i] = [out[name][n, :data.lengths[i]].cpu().numpy() for name in ("A_T", "A_o")]
    return np.array([emotions[i] for i in test]), [attentions[i] for i in test]


def scores(labels, emotions, classes):
    """Accuracy (4.1), macro accuracy (mean of the classes' own), confusion matrix with rows normalised (figure 3)."""
    confusion = confusion_matrix(labels, emotions, labels=range(len(classes)), normalize="true")
    return dict(accuracy=float((np.array(labels) == emotions).mean()), macro=float(confusion.diagonal().mean()),
                confusion=confusion.tolist())


def save(path, checkpoint):
    """Writes the checkpoint beside its place and renames it, so that an interruption leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        torch.save(checkpoint, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path):
    """The checkpoint (plain tensors and values: nothing in the file runs). Raises InputError if it is not one."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{path}: no checkpoint of dfan.py, or a damaged one; delete it to start this run "
                         "anew") from error


def run(number, data, train, test, args):
    """Trains and evaluates one split; returns the scores of the LAST epoch, "best" (accuracy, epoch) beside them.

    The run's seed is --seed plus its number. With --out, run<number>.pt holds model, optimizer, epoch, settings,
    classes and history after each epoch.
    """
    seed, path = args.seed + number, args.out and Path(args.out, f"run{number}.pt")
    settings = {k: getattr(args, k) for k in ("hidden", "lr", "batch", "clip", "beta")} | dict(
        shape=list(data.shape), seed=seed, dataset=args.dataset if args.data else "planted",
        videos=hashlib.sha256(json.dumps([[data.ids[i] for i in part] for part in (train, test)]).encode()).hexdigest())
    d_action, d_scene, _, d_object = data.shape
    torch.manual_seed(seed)
    model = DFAN(d_action, d_scene, d_object, args.hidden, len(data.classes), args.beta).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    done, history = 0, []
    if path and path.exists():
        saved = load_checkpoint(path)
        differs = [k for k in settings if saved["settings"].get(k) != settings[k]]
        if differs or saved["classes"] != data.classes or saved["epoch"] > args.epochs:
            raise InputError(f"{path}: made with other {', '.join(differs) or 'classes or more epochs'}; "
                             "choose another --out")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done, history = saved["epoch"], saved["history"]
        print(f"run {number}    resumed after epoch {done}")
    y = [data.labels[i] for i in test]
    for epoch in range(done + 1, args.epochs + 1):
        loss = train_epoch(model, optimizer, data, train, epoch, seed, args)
        emotions, _ = evaluate(model, data, test, args)
        history.append(dict(loss=loss, **scores(y, emotions, data.classes)))
        if path:
            save(path, dict(model=model.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch, settings=settings,
                            classes=data.classes, history=history))
        print(f"run {number}  epoch {epoch:3d}/{args.epochs}  loss {loss:.4f}  "
              f"accuracy {history[-1]['accuracy']:.4f}  macro {history[-1]['macro']:.4f}", flush=True)
    best = max(range(len(history)), key=lambda i: history[i]["accuracy"])
    return history[-1] | dict(best=(history[best]["accuracy"], best + 1), seed=seed), model


def focus(model, data, test, args):
    """Where the planted set's attentions are: (share, uniform share, limit) on the true frames and on the key objects.

    G is a tanh, so no weight exceeds another by more than e^2: m wanted of N get at most m e / (m e + (N - m) / e).
    """
    limit = lambda m, n: m * np.e / (m * np.e + (n - m) / np.e)
    time, objects = [], []
    for i, (A_T, A_o) in zip(test, evaluate(model, data, test, args)[1]):
        planted, key = data.draw(i, 0)[3:]
        time.append(A_T[planted].sum())
        objects.append(A_o[planted, key[planted]].mean())
    T, K = data.T, data.K
    return {"time attention on the planted frames": (np.mean(time), 2 / T, limit(2, T)),
            "object attention on the key object": (np.mean(objects), 1 / K, limit(1, K))}


# ======================================================================================================================
# Command line
# ======================================================================================================================

def report(results, data, args):
    """Prints the protocol's figures: each run, their mean and standard deviation, and the confusion matrix."""
    for number, r in enumerate(results):
        print(f"result   run {number}  seed {r['seed']}  accuracy {r['accuracy']:.4f}  macro {r['macro']:.4f}  (last "
              f"epoch; best epoch {r['best'][1]}: {r['best'][0]:.4f}, optimistic, since it is picked on the validation "
              "videos)")
    if len(results) > 1:
        for name in ("accuracy", "macro"):
            values = [r[name] for r in results]
            print(f"result   {name} {np.mean(values):.4f} +/- {np.std(values, ddof=1):.4f}  (mean, standard deviation, "
                  f"n = {len(values)})")
    print("confusion matrix, rows: the true emotion, normalised (figure 3)")
    width = max(map(len, data.classes))
    for name, row in zip(data.classes, np.mean([r["confusion"] for r in results], 0)):
        print(f"  {name:<{width}}  " + "  ".join(f"{v:.2f}" for v in row))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     epilog="Without --data it runs on a built-in planted set.")
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="FEATS", help="folder that extract_features.py wrote")
    group.add_argument("--dataset", choices=("ekman", "videoemotion"), default="ekman",
                       help="protocol of section 4.1: one fixed split, or ten 2/3-1/3 splits (default: ekman)")
    group.add_argument("--split", nargs="+", default=[], metavar=("TRAIN", "TEST"),
                       help="split lists, in pairs (default: trainlist01.txt testlist01.txt in FEATS; videoemotion: "
                            "drawn)")
    group.add_argument("--alternate-split", action="store_true", help="ekman without lists: every second video trains")
    group.add_argument("--allow-missing", action="store_true", help="go on without listed videos that have no features")
    group = parser.add_argument_group("from the paper")
    group.add_argument("--beta", type=float, default=BETA, help=f"of (10), in [0, 1] (3.2.2; default: {BETA})")
    group = parser.add_argument_group("not in the paper (chosen here; the planted set's own value in brackets)")
    for name, kind in (("hidden", int), ("lr", float), ("batch", int), ("epochs", int), ("clip", float)):
        what = dict(hidden="hidden units H of both LSTMs", lr="learning rate of Adam", batch="videos in a batch",
                    epochs="passes over the training videos", clip="largest norm of the gradient")[name]
        group.add_argument(f"--{name}", type=kind, help=f"{what} (default: {NOT_IN_THE_PAPER[name]} [{PLANTED[name]}])")
    group = parser.add_argument_group("output")
    group.add_argument("--out", help="folder for checkpoints, run<number>.pt (default: out; the planted set: none)")
    group.add_argument("--resume", action="store_true", help="go on with the checkpoints in --out")
    group.add_argument("--seed", type=int, default=0, help="of run 0; run i uses seed + i (default: 0)")
    group.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    args = parser.parse_args(argv)
    for name, value in (NOT_IN_THE_PAPER if args.data else PLANTED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        if not 0 < getattr(args, name) < float("inf"):
            parser.error(f"--{name}: must be greater than 0")
    if not 0 <= args.beta <= 1:
        parser.error("--beta: must be in [0, 1]")
    if not 0 <= args.seed < 2 ** 31:
        parser.error("--seed: must be a whole number from 0 to 2147483647")
    if args.data and args.out is None:
        args.out = "out"
    if args.resume and not args.out:
        parser.error("--resume: needs --out, the folder of the checkpoints")
    if not args.data and (args.split or args.alternate_split or args.dataset != "ekman"):
        parser.error("--dataset, --split and --alternate-split need --data")
    return args


def main(argv=None):
    args = parse_args(argv)
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    args.device = args.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device}: not usable here ({str(error).splitlines()[0]})") from error
    if not args.data:
        torch.set_num_threads(1)                              # products this small lose by sharing
    data = Features(args.data) if args.data else Planted(args.seed)
    splits = make_splits(args, data) if args.data else data.splits
    existing = [str(p) for i in range(len(splits)) if args.out and (p := Path(args.out, f"run{i}.pt")).exists()]
    if existing and not args.resume:
        raise InputError(f"{existing[0]}: there already; --resume goes on with it, another --out keeps it")
    if rank == 0:
        print(f"versions torch {torch.__version__}, numpy {np.__version__}, scikit-learn {sklearn.__version__}; "
              f"device {args.device}")
        for line in data.warnings():
            print(f"WARNING  {line}")
        print(f"data     {len(data.ids)} videos of {len(data.classes)} classes ({', '.join(data.classes)})")
        paper = PAPER_COUNTS.get(args.dataset) if args.data else None
        print(f"split    train {len(splits[0][0])} / validation {len(splits[0][1])}"
              + (f" (the paper's Ekman: {paper[0]} / {paper[1]})" if paper else ""), flush=True)
    results = {}
    for number in range(rank, len(splits), world):            # under torchrun the runs are spread over the ranks
        results[number], model = run(number, data, *splits[number], args)
    if world > 1:
        torch.distributed.init_process_group("gloo")
        gathered = [None] * world
        torch.distributed.all_gather_object(gathered, results)
        torch.distributed.destroy_process_group()
        results = {number: r for part in gathered for number, r in part.items()}
    if rank == 0:
        report([results[number] for number in sorted(results)], data, args)
        if not args.data:
            for name, (share, uniform, limit) in focus(model, data, splits[0][1], args).items():
                print(f"synthetic  {name}: {share:.3f}  (uniform {uniform:.3f}, limit {limit:.3f})")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as failure:          # OSError: a full disk, no permission; it names the file itself
        print(f"dfan.py: {failure}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("dfan.py: interrupted; with --out, --resume goes on after the last finished epoch", file=sys.stderr)
        sys.exit(130)
