"""Dual Focus Attention Network for Video Emotion Recognition (Qiu, He, Wang; ICME 2020), whole, in one script.

    python dfan.py                                        # no data: a built-in planted set, a minute and a half
    python dfan.py --data feats/ --dataset ekman          # one fixed split (4.1)
    python dfan.py --data feats/ --dataset videoemotion   # ten random 2/3-1/3 splits, mean accuracy (4.1)
    python dfan.py --data feats/ --reproduce table1       # a table or figure of section 4, beside the paper's numbers
    python dfan.py --predict clip.mp4 --checkpoint out/run0.pt      # your own video: which emotion, when and where

feats/ is what extract_features.py writes. Figure 1 of the paper, for frame t of a video:

      F_o (K objects) --> mean --> LSTM.S --h1--> O.Focus: A_o over the K objects  (1)-(4)
         |                           ^               |
         +---------------------------|--- weighted --> F_o_hat
                                h2 of t-1            |
      F_A, F_S (action, scene) ----------------> S_t = [F_o_hat; F_A; F_S]
         |                                           |
      FF = [F_A; F_S] of all frames              T.Focus: entry t of A_T over the T frames  (8), (9)  <-- h2 of t-1
         |                                           |
         +-- weighted by A_T <-----------------------+
                |
               F_t (7) --> LSTM.T --h2--> P_t, the emotion at t  (5), (6)
                             ^
                     P and h2 of t-1

How to read it. Tensors of section 3 keep the paper's letters: in F_O the capital O is the whole video, in F_o the small
one a frame; hat and bar are suffixes; the blackboard-bold F (action and scene together) is FF. A line that computes an
equation, or a part of one, bears its number, (1) to (10). [R1] to [R15] are rows of the README's table "Where the
paper is silent or ambiguous". What is quoted with a section, as (3.2), is the paper's text. Code counts frames from 0,
the paper from 1.

    B videos in a batch   T frames (the longest of the batch)   K objects a frame   H hidden units   C emotions
    F_A (B,T,2048)   F_S (B,T,365)   F_O (B,T,K,84)   FF (B,T,2413)   A_o (B,T,K)   A_T (B,T)   P (B,T,C)
"""
import argparse
import concurrent.futures
import contextlib
import csv
import datetime
import hashlib
import io
import json
import os
import pickle
import re
import secrets
import sys
import time
import types
import zipfile
import zlib
from pathlib import Path

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")      # the same numbers in every run
if __name__ == "__main__" and int(os.environ.get("WORLD_SIZE", 1)) > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
    del os.environ["OMP_NUM_THREADS"]                 # torchrun's; as many threads as without it: the same numbers
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"         # and the ranks' threads do not hinder each other

try:
    import numpy as np
    import sklearn
    import torch
    from sklearn.metrics import average_precision_score, confusion_matrix
    from sklearn.model_selection import StratifiedShuffleSplit
    from torch import nn
except ImportError as missing:
    print(f"dfan.py: {missing}; pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

BETA = 0.6                                # "we empirically set beta = 0.6" (3.2.2)
FEATURES = ("action", "scene", "objects")  # F_A, F_S, F_O (3.1)
LAST_FRAMES = 10                          # "we count the predictions of the last ten frames" (4.1)
WEEK = datetime.timedelta(days=7)
PAPER_COUNTS = {"ekman": (819, 818)}      # training and validation videos (4.1)
NOT_IN_THE_PAPER = dict(hidden=256, lr=1e-3, batch=16, frames=16000, memory=4.0, epochs=30, clip=1.0)  # with Adam; ours
PLANTED = NOT_IN_THE_PAPER | dict(hidden=32, lr=5e-3, epochs=20)                               # for the planted set


class InputError(Exception):
    """A failure that the user can mend: its one line names the file and the remedy; main() exits with status 2."""


# ======================================================================================================================
# Section 3.2: the DFA cell. The code runs in dependency order (4)(3)(2)(1), (9)(8)(7)(6)(5), (10).
# ======================================================================================================================

def lstm(gates, c):
    """One step of a vanilla LSTM. gates (B,4H): all products and biases added, in PyTorch's order i, f, g, o; c (B,H).

    Returns the new h and c, (B,H) each, and what lstm_backward needs.
    """
    i, f, g, o = gates.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c_new = f * c + i * g
    tanh_c = c_new.tanh()
    return o * tanh_c, c_new, (i, f, g, o, tanh_c, c)


def objects_there(F_O):
    """Which objects are there: (...,K,84) -> (...,K) bool; a missing one is all zero [R3]."""
    return F_O.abs().sum(-1) != 0                                   # faster than (F_O != 0).any(-1)


def mean_object(F_O, there):
    """F_O_bar, the mean over the objects that are there, zero if none is [R3]: (...,K,84), (...,K) -> (...,84)."""
    return F_O.sum(-2) / there.sum(-1, keepdim=True).clamp(min=1)


def as_image(F):
    """(B,T,D) -> (B,D,1,T), the layout of a convolution."""
    return F.transpose(1, 2).unsqueeze(2)


def on_frames(F, W, bias=None):
    """nn.functional.linear for all frames (B,T,D), on a CPU as a convolution of size 1.

    The same product, but oneDNN computes it, on some processors twice as fast as MKL.
    """
    if F.device.type != "cpu" or F.shape[-1] == 0:
        return nn.functional.linear(F, W, bias)
    return nn.functional.conv2d(as_image(F), W[:, :, None, None], bias).squeeze(2).transpose(1, 2)


class DFACell(nn.Module):
    """The Dual Focus Attention cell: "two focus attention modules with two vanilla LSTM cells" (3.2).

    `forward` is one frame. What multiplies a feature is done for the whole video first (`project`); that is exact:
        sum_i A_Ti (W FF_i + b) = W F_t + b          since the A_Ti sum to 1
    (7) with (8) is num / den, two running sums over e_i = exp(G_Ti): num = sum_i e_i (T_in of FF_i), den = sum_i e_i.
    Frame t changes entry t alone; in training (10) moves weight between entries t-1 and t, which leaves den as it is.
    """

    def __init__(self, d_action, d_scene, d_object, hidden, classes, beta=BETA):
        super().__init__()
        self.beta, self.H, self.C, self.widths = beta, hidden, classes, (d_object, d_action, d_scene)
        d_FF = d_action + d_scene
        self.W_oh = nn.Linear(hidden, 1, bias=False)              # (3)  one scalar an object [R2]
        self.W_of = nn.Linear(d_object, 1)                        # (3)  its bias is b_o
        self.S_in = nn.Linear(d_object, 4 * hidden)               # (4)  LSTM.S on F_O_bar: known before the loop
        self.S_h = nn.Linear(2 * hidden, 4 * hidden)              # (4)  LSTM.S on [h2; h1]: h1 is its own state [R1]
        self.W_p = nn.Linear(hidden, classes)                     # (5)  its bias is b_p
        self.T_in = nn.Linear(d_FF, 4 * hidden)                   # (6)  LSTM.T on F_t
        self.T_h = nn.Linear(classes + hidden, 4 * hidden)        # (6)  LSTM.T on [P; h2]: h2 is its own state [R4]
        self.W_Th = nn.Linear(hidden, 1, bias=False)              # (9)
        self.W_Tf = nn.Linear(d_object + d_FF, 1)                 # (9)  on [F_o_hat; F_A; F_S]; its bias is b_T

    def project(self, F_A, F_S, F_O, valid):
        """All that multiplies a feature, for all frames at once; each product is named after its layer.

        F_A (B,T,2048), F_S (B,T,365), F_O (B,T,K,84), valid (B,T,1): 1 for a frame, 0 for padding.
        """
        there, linear = objects_there(F_O), nn.functional.linear                         # (B,T,K)
        W_object, W_A, W_S = self.W_Tf.weight.split(self.widths, -1)
        T_A, T_S = self.T_in.weight.split(self.widths[1:], -1)                           # T_in FF = T_A F_A + T_S F_S
        return types.SimpleNamespace(
            S_in=self.S_in(mean_object(F_O, there)).add_(self.S_h.bias),                 # (4)  (B,T,4H)
            W_of=self.W_of(F_O).squeeze(-1),                                             # (3)  (B,T,K)
            W_Tf_object=F_O @ W_object[0],                                               # (1) in (9)  (B,T,K)
            W_Tf_FF=linear(F_A, W_A, self.W_Tf.bias) + linear(F_S, W_S),                 # (9)  (B,T,1)
            T_in=on_frames(F_A, T_A, self.T_in.bias + self.T_h.bias).add_(                # (7) in (6)  (B,T,4H)
                on_frames(F_S, T_S)),
            valid=valid, absent=-1e4 * (~there).to(F_O.dtype))                           # (2)  exp(-1e4) = 0 [R3]

    def start(self, x, sum_T_in):
        """The state before the first frame: zeros, its P too [R4], and G_T = 0, e = 1, that is, uniform attention [R5].

        x: as in `forward`; sum_T_in (B,4H): the sum of T_in over the video's frames.
        """
        zeros, B = sum_T_in.new_zeros, len(sum_T_in)
        return types.SimpleNamespace(
            h1=zeros(B, self.H), c1=zeros(B, self.H), h2=zeros(B, self.H), c2=zeros(B, self.H), P=zeros(B, self.C),
            e=list(x.valid), num=sum_T_in, den=sum(x.valid))

    def objects_focus(self, t, x, s, y):
        """Frame Objects Focus (3.2.1) at frame t; arguments as in `forward`. Returns F_o_hat, W_Tf applied (B,1)."""
        y.h2h1 = torch.cat([s.h2, s.h1], -1)
        s.h1, s.c1, y.S = lstm(torch.addmm(x.S_in[t], y.h2h1, self.S_h.weight.T), s.c1)  # (4)   (B,H)  [R1]
        y.G_o = torch.tanh(self.W_oh(s.h1) + x.W_of[t])                                  # (3)   (B,K)  [R2]
        y.A_o = torch.softmax(y.G_o + x.absent[t], -1)                                   # (2)   (B,K)  [R3]
        return (x.W_Tf_object[t] * y.A_o).sum(-1, keepdim=True)                          # (1)   (B,1)  W_Tf applied

    def forward(self, t, x, s):
        """Frame t. x: what `project` returns, each entry a tuple over t; s: the state, changed to that after frame t.

        Returns a namespace: logits (B,C), the input of softmax (5), A_o (B,K), and what the gradient needs.
        """
        y = types.SimpleNamespace(mix=None)
        W_Tf_F_o_hat = self.objects_focus(t, x, s, y)
        # --- Time Series Focus (3.2.2)
        y.G_t = torch.tanh(self.W_Th(s.h2) + W_Tf_F_o_hat + x.W_Tf_FF[t])                # (9)   (B,1)  entry t [R5]
        y.e_t = y.G_t.exp() * x.valid[t]                                                 # (8)   A_Tt = e_t / den
        y.rise, s.e[t] = y.e_t - s.e[t], y.e_t                                           #       from exp(0) [R5]
        s.num = s.num + y.rise * x.T_in[t]                                               # (7)   (B,4H)
        s.den = s.den + y.rise                                                           # (8)   (B,1)
        y.T_in_F_t, y.den = s.num / s.den, s.den                                         # (7)   (B,4H) T_in applied
        y.Ph2 = torch.cat([s.P, s.h2], -1)
        s.h2, s.c2, y.T = lstm(torch.addmm(y.T_in_F_t, y.Ph2, self.T_h.weight.T), s.c2)  # (6)   (B,H)  [R4]
        y.logits = self.W_p(s.h2)                                                        # (5)   (B,C)
        s.P = torch.softmax(y.logits, -1)                                                # (5)   (B,C)
        y.h1, y.h2, y.P = s.h1, s.h2, s.P
        # --- attention scrambler: "during the training stage", "mixed after each prediction" (3.2.2)
        if self.training and t > 0:                         # beta a + (1 - beta) b = a + (1 - beta)(b - a); den stays
            y.mix = (1 - self.beta) * x.valid[t] * (s.e[t] - s.e[t - 1])                 # (10)
            s.e[t - 1], s.e[t] = s.e[t - 1] + y.mix, s.e[t] - y.mix                      # (10)  at once [R6]
            s.num = s.num + y.mix * (x.T_in[t - 1] - x.T_in[t])                          # (10)  in (7)
        return y


def unroll(cell, x):
    """The cell over all frames. x: what `project` returns; its entries become tuples over t.

    Returns (logits (B,T,C), A_o (B,T,K) and, after the last frame, e (B,T), den (B,1)), and what each frame returned.
    """
    sum_T_in = (x.valid.transpose(1, 2) @ x.T_in).squeeze(1)
    for name, value in vars(x).items():
        setattr(x, name, value.unbind(1))                 # once: the gradient of x[:, t] would fill a full-size tensor
    s = cell.start(x, sum_T_in)
    ys = [cell(t, x, s) for t in range(len(x.valid))]
    return (torch.stack([y.logits for y in ys], 1), torch.stack([y.A_o for y in ys], 1), torch.cat(s.e, -1), s.den), ys


# ----------------------------------------------------------------------------------------------------------------------
# The gradient of the loop, written out: the lines of DFACell.forward from the last to the first. It equals autograd's
# (a test compares them) and is faster: no graph of some fifty small nodes a frame, and each weight's gradient is one
# product for all frames. Nothing of the method is in this part; skip to DFAN.
# ----------------------------------------------------------------------------------------------------------------------

sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward.default, torch.ops.aten.tanh_backward.default


def softmax_backward(dy, y):
    return torch.ops.aten._softmax_backward_data(dy, y, -1, y.dtype)


def lstm_backward(saved, dh, dc, dgates):
    """From the gradients of the new h and c: writes that of gates (B,4H) into dgates, returns that of the old c."""
    i, f, g, o, tanh_c, c = saved
    dc = dc + tanh_backward(dh * o, tanh_c)
    torch.cat([sigmoid_backward(dc * g, i), sigmoid_backward(dc * c, f), tanh_backward(dc * i, g),
               sigmoid_backward(dh * tanh_c, o)], -1, out=dgates)
    return dc * f


def on_frames_backward(dy, F):
    """The gradient of W of on_frames: (B,T,.), (B,T,D) -> (.,D)."""
    if F.device.type != "cpu":
        return dy.flatten(0, 1).T @ F.flatten(0, 1)
    return nn.grad.conv2d_weight(as_image(F), (dy.shape[-1], F.shape[-1], 1, 1), as_image(dy))[:, :, 0, 0]


class Loop(torch.autograd.Function):
    """The cell over all frames. A "d" before a name: the gradient of the loss with respect to it."""

    @staticmethod
    def run(cell, x):
        """What `unroll` returns first."""
        return Loop.apply(cell, x.valid, x.absent, x.S_in, x.W_of, x.W_Tf_object, x.W_Tf_FF, x.T_in,
                          cell.S_h.weight, cell.T_h.weight, cell.W_oh.weight, cell.W_Th.weight, cell.W_p.weight,
                          cell.W_p.bias)

    @staticmethod
    def forward(ctx, cell, valid, absent, S_in, W_of, W_Tf_object, W_Tf_FF, T_in, *weights):
        ctx.cell, ctx.valid = cell, valid
        ctx.save_for_backward(*weights)
        ctx.x = types.SimpleNamespace(valid=valid, absent=absent, S_in=S_in, W_of=W_of, W_Tf_object=W_Tf_object,
                                      W_Tf_FF=W_Tf_FF, T_in=T_in)
        out, ctx.ys = unroll(cell, ctx.x)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogits, dA_o, de, dden):
        cell, x, ys, zeros = ctx.cell, ctx.x, ctx.ys, torch.zeros_like
        S_h, T_h, W_oh, W_Th, W_p, _ = ctx.saved_tensors
        dlogits, dA_o, de = dlogits.unbind(1), dA_o.unbind(1), list(de.split(1, -1))
        shape = len(ys[0].h1), len(ys), 4 * cell.H                                       # (B,T,4H)
        dS_in, dgates_T, dT_in = ctx.valid.new_empty(shape), ctx.valid.new_empty(shape), ctx.valid.new_zeros(shape)
        dS_in_t, dgates_T_t, dT_in_t = dS_in.unbind(1), dgates_T.unbind(1), dT_in.unbind(1)
        dh1, dc1, dh2, dc2 = (zeros(ys[0].h1) for _ in range(4))
        dP, dnum = zeros(ys[0].P), zeros(ys[0].T_in_F_t)
        for t, y in reversed(list(enumerate(ys))):
            if y.mix is not None:                                                        # (10)
                dmix = (dnum * (x.T_in[t - 1] - x.T_in[t])).sum(-1, keepdim=True) + de[t - 1] - de[t]
                dmix = dmix * (1 - cell.beta) * x.valid[t]
                de[t - 1], de[t] = de[t - 1] - dmix, de[t] + dmix
                torch.mul(y.mix, dnum, out=dT_in_t[t - 1])
                dT_in_t[t].sub_(dT_in_t[t - 1])
            y.dlogits = dlogits[t] + softmax_backward(dP, y.P)                           # (5)
            dc2 = lstm_backward(y.T, torch.addmm(dh2, y.dlogits, W_p), dc2, dgates_T_t[t])  # (6)
            dP, dh2 = (dgates_T_t[t] @ T_h).split([cell.C, cell.H], -1)                  # (6)
            dF_t = dgates_T_t[t] / y.den                                                 # (7)
            dnum, dden = dnum + dF_t, dden - (dF_t * y.T_in_F_t).sum(-1, keepdim=True)   # (7), (8)
            dT_in_t[t].addcmul_(y.rise, dnum)                                            # (7)
            de_t = de[t] + dden + (dnum * x.T_in[t]).sum(-1, keepdim=True)               # (7), (8)
            y.dG_t = tanh_backward(de_t * y.e_t, y.G_t)                                  # (9)  before the tanh
            dA_o_t = torch.addcmul(dA_o[t], y.dG_t, x.W_Tf_object[t])                    # (1)
            y.dG_o = tanh_backward(softmax_backward(dA_o_t, y.A_o), y.G_o)               # (2), (3)  before the tanh
            dh1 = torch.addcmul(dh1, y.dG_o.sum(-1, keepdim=True), W_oh)                 # (3)
            dc1 = lstm_backward(y.S, dh1, dc1, dS_in_t[t])                               # (4)
            dh2_S, dh1 = (dS_in_t[t] @ S_h).split(cell.H, -1)                            # (4)
            dh2 = torch.addcmul(dh2 + dh2_S, y.dG_t, W_Th)                               # (4), (9)
        dT_in.addcmul_(ctx.valid, dnum.unsqueeze(1))                                     # (7)  the sum before frame 0
        frames = lambda name: torch.stack([getattr(y, name) for y in ys], 1)             # (B,T,.)
        rows = lambda v: v.flatten(0, 1)                                                 # (B T,.)
        dG_o, dG_t, h2h1, logits = frames("dG_o"), frames("dG_t"), frames("h2h1"), rows(frames("dlogits"))
        return (None, None, None, dS_in, dG_o, dG_t * frames("A_o"), dG_t, dT_in,
                on_frames_backward(dS_in, h2h1), on_frames_backward(dgates_T, frames("Ph2")),
                rows(dG_o).sum(-1)[None] @ rows(frames("h1")), rows(dG_t).T @ rows(h2h1)[:, :cell.H],
                logits.T @ rows(frames("h2")), logits.sum(0))


class DFAN(nn.Module):
    """The network: the DFA cell run over a video (figure 1).

    Widths d_action, d_scene, d_object of the features (2048, 365, 84 in the paper; any will do), hidden units, classes,
    and beta of (10).
    """

    Cell, unroll = DFACell, staticmethod(Loop.run)          # autograd through `unroll` gives the same, slower

    def __init__(self, d_action, d_scene, d_object, hidden, classes, beta=BETA):
        super().__init__()
        self.cell = self.Cell(d_action, d_scene, d_object, hidden, classes, beta)

    def forward(self, F_A, F_S, F_O, lengths=None):
        """F_A (B,T,d_action), F_S (B,T,d_scene), F_O (B,T,K,d_object), lengths (B,) frames of each video, T if None.

        An object whose features are all zero is not there [R3]. Frames from a video's length on are padding: whatever
        finite numbers they hold change nothing; they are zeros in what is returned, a dict of
            logits (B,T,C)   before the softmax of (5): what the loss takes
            P      (B,T,C)   P_t (5)
            A_T    (B,T)     the time attention (8) as it stands after the video's last frame
            A_o    (B,T,K)   the object attention (2)
        """
        B, T = F_A.shape[:2]
        lengths = torch.as_tensor([T] * B if lengths is None else lengths, device=F_A.device)
        valid = (torch.arange(T, device=F_A.device) < lengths[:, None]).unsqueeze(-1)    # (B,T,1)
        x = self.cell.project(F_A, F_S, F_O, valid.to(F_A.dtype))
        logits, A_o, e, den = self.unroll(self.cell, x)
        logits = logits * valid
        return dict(logits=logits, P=torch.softmax(logits, -1) * valid,                  # (5)
                    A_T=e / den,                                                         # (8)
                    A_o=A_o * (objects_there(F_O) & valid))


# ----------------------------------------------------------------------------------------------------------------------
# The models that Tables 1 and 2 compare with; arguments and results as DFAN's
# ----------------------------------------------------------------------------------------------------------------------

def uniform_attention(there, like):
    """The same weight for each object that is there (...,K), in the type of `like`."""
    return there.to(like.dtype) / there.sum(-1, keepdim=True).clamp(min=1)


class TimeFocusCell(DFACell):
    """T.Focus alone: F_o_hat := F_O_bar and no LSTM.S [R9]."""

    def __init__(self, d_action, d_scene, d_object, hidden, classes, beta=BETA):
        super().__init__(d_action, d_scene, max(1, d_object), hidden, classes, beta)
        del self.W_oh, self.W_of, self.S_in, self.S_h
        self.W_Tf = nn.Linear(d_object + d_action + d_scene, 1)                          # d_object 0: no objects
        self.widths = d_object, d_action, d_scene

    def project(self, F_A, F_S, F_O, valid):
        W_object, W_FF = self.W_Tf.weight.split([self.widths[0], sum(self.widths[1:])], -1)
        FF, there = torch.cat([F_A, F_S], -1), objects_there(F_O)
        return types.SimpleNamespace(
            W_Tf_object=mean_object(F_O, there) @ W_object.T, W_Tf_FF=FF @ W_FF.T + self.W_Tf.bias,     # (9)  (B,T,1)
            T_in=self.T_in(FF) + self.T_h.bias, valid=valid, A_o=uniform_attention(there, F_O))

    def objects_focus(self, t, x, s, y):
        y.A_o = x.A_o[t]
        return x.W_Tf_object[t]


class TimeFocus(DFAN):
    Cell, unroll = TimeFocusCell, staticmethod(lambda cell, x: unroll(cell, x)[0])


class Pooling(nn.Module):
    """Ten uniformly sampled frames of FF, their maximum or mean, a linear softmax [R11]. how: "max" or "avg"."""

    def __init__(self, how, d_action, d_scene, classes):
        super().__init__()
        self.how, self.W = how, nn.Linear(d_action + d_scene, classes)

    def forward(self, F_A, F_S, F_O, lengths=None):
        B, T = F_A.shape[:2]
        lengths = torch.as_tensor([T] * B if lengths is None else lengths, device=F_A.device)
        ten = ((torch.arange(10, device=F_A.device) + 0.5) / 10 * lengths[:, None]).long()     # middles of ten parts
        FF = torch.cat([F_A, F_S], -1)[torch.arange(B, device=F_A.device)[:, None], ten]       # (B,10,2413)
        valid = (torch.arange(T, device=F_A.device) < lengths[:, None]).unsqueeze(-1)
        logits = self.W(FF.amax(1) if self.how == "max" else FF.mean(1)).unsqueeze(1) * valid  # the same at every frame
        return dict(logits=logits, P=torch.softmax(logits, -1) * valid,
                    A_T=F_A.new_zeros(B, T).scatter_add_(1, ten, F_A.new_full((B, 10), 0.1)),
                    A_o=uniform_attention(objects_there(F_O) & valid, F_O))


def make_network(shape, classes, args):
    """The network of --fusion for features of shape (d_action, d_scene, K, d_object)."""
    d_action, d_scene, _, d_object = shape
    if args.fusion in ("max", "avg"):
        return Pooling(args.fusion, d_action, d_scene, classes)
    return (DFAN if args.fusion == "dual" else TimeFocus)(d_action, d_scene, d_object, args.hidden, classes, args.beta)


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

DAMAGED = (OSError, ValueError, TypeError, EOFError, AttributeError, IndexError, RuntimeError, MemoryError,
           zipfile.BadZipFile, zlib.error)


def read_features(path, names):
    """{name: array}, objects (T,K,D), others (T,D), float16 or 32, and the settings (JSON or "{}") of one .npz file.

    Raises InputError, naming the file, if it is truncated, holds pickles, lacks an array, holds NaN or infinity, or if
    its arrays disagree in length.
    """
    redo = "delete it and run extract_features.py again"
    try:
        with np.load(path, allow_pickle=False) as f:
            missing = sorted(set(names) - set(f.files))
            if missing:
                raise InputError(f"{path}: no array {', '.join(missing)} in it, but {', '.join(f.files)}; name others "
                                 f"with --features, or {redo}")
            F = {name: f[name] for name in names}
            F = {name: torch.from_numpy(v if v.dtype == np.float16 else v.astype(np.float32)) for name, v in F.items()}
            settings = str(f["settings"]) if "settings" in f.files else "{}"
            dict(json.loads(settings))
    except DAMAGED as error:
        raise InputError(f"{path}: truncated, or no plain .npz file ({error}); {redo}") from error
    wrong = any(v.dim() != (3 if name == "objects" else 2) or len(v) == 0 for name, v in F.items())
    if wrong or len({len(v) for v in F.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(v.shape)}" for name, v in F.items())
        raise InputError(f"{path}: objects (T,K,D) and the others (T,D) disagree: {shapes}; {redo}")
    for name, v in F.items():
        if not v.isfinite().all():
            raise InputError(f"{path}: NaN or infinity in {name}; {redo}")
    return F, settings


def read_times(path, T):
    """An .npz file's frames: their numbers among the decoded ones (T,), their time stamps (T,). Raises InputError."""
    try:
        with np.load(path, allow_pickle=False) as f:
            numbers, seconds = f["frames"].astype(int), f["seconds"].astype(float)
    except (KeyError, *DAMAGED) as error:
        raise InputError(f"{path}: no frames and seconds in it, which tell when a frame is ({error}); see the README's "
                         "table of the arrays") from error
    if numbers.shape != (T,) or seconds.shape != (T,) or not np.isfinite(seconds).all() or (np.diff(seconds) < 0).any():
        raise InputError(f"{path}: frames and seconds must be {T} rising numbers; see the README's table of the arrays")
    return numbers, seconds


def as_inputs(F, K):
    """F_A, F_S, F_O of the network from {name: array} of the features in use and the number of objects (None: all).

    The first of the (T,D) arrays is F_A, the others together F_S, since only their concatenation FF counts; where
    objects are the only feature, FF := F_O_bar, in S_t too [R10]. Objects lie by falling probability: the first K are
    the top K.
    """
    F = {name: v.float() for name, v in F.items()}
    series = [v for name, v in F.items() if name != "objects"]
    T = len(next(iter(F.values())))
    F_O = F["objects"][:, :K] if "objects" in F else torch.zeros(T, 0, 0)
    F_A, *others = series or [mean_object(F_O, objects_there(F_O))]
    return F_A, torch.cat([*others, torch.zeros(T, 0)], -1), F_O


class Videos:
    """A data set: ids ("class/stem"), labels, lengths, classes, widths {feature: its shape in a frame}."""
    emotional = {}                        # {position: its emotional frames (T,) bool}
    settings, extraction = {}, None       # what made the files; what a checkpoint remembers of it

    def choose(self, features, K):
        """Sets the features in use, the number of objects K (None: all) and shape (d_action, d_scene, K, d_object)."""
        stored = self.widths.get("objects", (0,))[0]
        if "objects" in features and K and K > stored:
            raise InputError(f"--objects {K}: there are {stored} in a frame; ask for fewer")
        self.features, self.K = features, (K or stored) if "objects" in features else 0
        F_A, F_S, F_O = as_inputs({name: torch.zeros(1, *self.widths[name]) for name in features}, self.K)
        self.shape = (F_A.shape[1], F_S.shape[1], *F_O.shape[1:])

    def load(self, i, epoch):
        F = self.arrays(i, epoch)
        return as_inputs({name: F[name] for name in self.features}, self.K)

    def of_run(self, number):
        return self


class Features(Videos):
    """The .npz files below a folder, <class>/<stem>.npz.

    Every file is read once here, so that a bad one is known before training starts. The first `memory` GiB of them stay
    in memory, for all runs; the others are read again when a batch needs them. Raises InputError.
    """

    def __init__(self, folder, features=FEATURES, K=None, memory=0.):
        self.folder, self.kept, room = Path(folder), {}, memory * 2 ** 30
        if not self.folder.is_dir():
            raise InputError(f"{folder}: no such folder; --data takes the folder that extract_features.py wrote")
        paths = []
        for place in sorted(p for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
            files = sorted(p for p in place.iterdir() if p.name.endswith(".npz") and not p.name.startswith("."))
            if not files:
                raise InputError(f"{place}: a class without an .npz; extract its videos, or remove the folder")
            paths += files
        if len({p.parent for p in paths}) < 2:
            raise InputError(f"{folder}: no <class>/<name>.npz of two or more classes in it; --data takes the folder "
                             "that extract_features.py wrote")
        self.ids = [f"{p.parent.name}/{p.name[:-4]}" for p in paths]
        self.classes = sorted({p.parent.name for p in paths})
        self.labels = [self.classes.index(p.parent.name) for p in paths]
        self.paths, self.lengths, self.settings, self.widths, self.largest = paths, [], {}, None, 0.
        for i, path in enumerate(paths):
            F, settings = read_features(path, features)
            widths = {name: tuple(v.shape[1:]) for name, v in F.items()}
            self.widths = self.widths or widths
            if widths != self.widths:
                raise InputError(f"{path}: widths {widths}, but {self.widths} in {paths[0]}; extract both with the "
                                 "same settings")
            self.lengths.append(len(next(iter(F.values()))))
            self.largest = max(self.largest, *(v.float().abs().mean().item() for v in F.values()))
            self.settings.setdefault(settings, path)
            room -= sum(v.numel() * v.element_size() for v in F.values())
            if room >= 0:
                self.kept[i] = F
        if len(self.settings) == 1 and settings != "{}":
            self.extraction = dict(settings=settings, feats=str(folder))
        self.choose(features, K)

    def warnings(self):
        """What a reader of the result must know of these features, a line each."""
        if len(self.settings) > 1:
            two = list(self.settings.values())[:2]
            yield f"features made with different settings: {two[0]} and {two[1]}"
        if self.random():
            yield "features of networks with RANDOM weights: they try the pipeline, their accuracy means nothing"
        if self.largest > 5:
            yield (f"features of mean size {self.largest:.1f}: above about 5 they saturate the LSTMs and nothing is "
                   "learnt; scale them down")

    def random(self):
        return any(json.loads(s).get("random_weights") is not None for s in self.settings)

    def tuned_on(self):
        """The videos that the features' backbones were tuned on (extract_features.py --finetune)."""
        return {identity for s in self.settings for identity in json.loads(s).get("tuned_on") or ()}

    def arrays(self, i, epoch):
        return self.kept[i] if i in self.kept else read_features(self.paths[i], self.features)[0]


class Planted(Videos):
    """A built-in set on which both focuses are needed; the network's parts are known to be right if it is learnt.

    T = 24 frames of K = 8 objects. In each video four snippets of two frames carry the action pattern of an emotion:
    one of the true emotion, three of other emotions. Only in the true snippet is one object a confident "key" (class 0,
    0.95); the others, there and everywhere, are weak detections (0.05 to 0.5) of five classes, class 0 among them.
    Training videos are drawn anew in every epoch, each from (seed, epoch, number) alone.
    """
    T, TRAIN, TEST, STRENGTH = 24, 1000, 500, 1.5
    widths = dict(action=(32,), scene=(8,), objects=(8, 84))
    classes = ["anger", "disgust", "fear", "joy", "sadness", "surprise"]

    def __init__(self, seed, features=FEATURES, K=None):
        self.seed = seed
        self.patterns = np.random.default_rng([seed, 0]).standard_normal((len(self.classes), *self.widths["action"]))
        self.ids = [f"{self.classes[i % 6]}/{i}" for i in range(self.TRAIN + self.TEST)]
        self.labels = [i % 6 for i in range(len(self.ids))]
        self.lengths = [self.T] * len(self.ids)
        self.splits = [(list(range(self.TRAIN)), list(range(self.TRAIN, len(self.ids))))]
        self.emotional = {i: self.draw(i, 0)[3] for i in self.splits[0][1]}
        self.choose(features, K)

    def of_run(self, number):
        return Planted(self.seed + number, self.features, self.K)

    def warnings(self):
        yield "SYNTHETIC data, the planted set; --data FEATS runs on your own"

    def draw(self, i, epoch):
        """One video: F_A, F_S, F_O, the true snippet's frames (T,) bool, and the key object of each frame (T,)."""
        rng = np.random.default_rng([self.seed, 1, epoch if i < self.TRAIN else 0, i])
        label, (K, d_object) = self.labels[i], self.widths["objects"]
        F_A, F_S = (rng.standard_normal((self.T, *self.widths[name])) for name in ("action", "scene"))
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
        order = (-F_O[:, :, :-4].max(-1)).argsort(1)                        # by falling probability, as in a file
        return F_A, F_S, np.take_along_axis(F_O, order[:, :, None], 1), planted, (order == key[:, None]).argmax(1)

    def arrays(self, i, epoch):
        return {name: torch.from_numpy(v.astype(np.float32)) for name, v in zip(FEATURES, self.draw(i, epoch))}


SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".3gp", ".ts")


def read_list(path, ids):
    """Positions in ids of the videos that a split list names, and the lines without features. Raises InputError.

    A line is "class/stem [label]", or "stem [label]" where one class alone has that stem; a video's extension is
    optional. The label is not believed (lists count from 0 or from 1): the folder is the class.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")         # names may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a split list, a text file in UTF-8 ({error})") from error
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
                      for c in (n, n[:n.rindex(".")] if n.lower().endswith((*SUFFIXES, ".npz")) else n)]
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


def read_segments(path, data):
    """{position: its frames in an annotated emotional segment (T,) bool}, and a line for each row that is skipped.

    A CSV file with columns video, class/name.mp4, and key_segment_1, key_segment_2, ..., each empty or from-to in
    minutes'seconds, as 0'3-0'10: the annotations published for Ekman-6. Raises InputError.
    """
    position, emotional, skipped, unknown = {name: i for i, name in enumerate(data.ids)}, {}, [], []
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            reader = csv.DictReader(f)
            rows, names = [(reader.line_num, row) for row in reader], reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV file of segments ({error})") from error
    columns = [c for c in names if c and c.startswith("key_segment")]
    if not columns or "video" not in names:
        raise InputError(f"{path}: no columns video and key_segment_1 in its first line; they hold class/name.mp4 and "
                         "ranges such as 0'3-0'10")
    for number, row in rows:
        video, ranges = (row["video"] or "").strip(), []
        for cell in ((row[c] or "").strip() for c in columns):
            match = re.fullmatch(r"(\d+)'(\d+)\s*-\s*(\d+)'(\d+)", cell)
            start, end = (60 * int(m) + int(s) for m, s in (match.group(1, 2), match.group(3, 4))) if match else (1, 0)
            if start <= end:
                ranges.append((start, end))
            elif cell:
                skipped.append(f"{path}, line {number}: {cell} of {video} is no range from-to in m's; skipped")
        if not any((row[c] or "").strip() for c in columns):
            skipped.append(f"{path}, line {number}: no segment of {video}; skipped")
        stem = os.path.splitext(video)[0] if video.lower().endswith(SUFFIXES) else video
        if stem not in position:
            unknown.append(video)
        elif ranges:
            i = position[stem]
            seconds = read_times(data.paths[i], data.lengths[i])[1]
            inside = np.any([(start <= seconds) & (seconds <= end) for start, end in ranges], 0)
            emotional[i] = inside | emotional.get(i, False)
    if unknown:
        skipped.append(f"{path}: {len(unknown)} rows are of videos without features: {', '.join(unknown[:5])}"
                       f"{', ...' if len(unknown) > 5 else ''}")
    return emotional, skipped


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
            return [check_classes(data, ["--alternate-split"] * 2, order[::2], order[1::2])]
        pairs = [(data.folder / "trainlist01.txt", data.folder / "testlist01.txt")]
        absent = [str(p) for p in pairs[0] if not p.is_file()]
        if absent:
            raise InputError(f"{' and '.join(absent)}: not there; copy the data set's split lists to that place, name "
                             "others with --split TRAIN TEST, or take --alternate-split")
    if args.dataset == "videoemotion" and not pairs:
        few = [c for i, c in enumerate(data.classes) if (y == i).sum() < 3]
        if few:
            raise InputError(f"{data.folder / few[0]}: fewer than 3 videos, which a 2/3-1/3 split of each category "
                             "needs; add videos, or name lists with --split")
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
        splits.append(check_classes(data, files, train, test))
    return splits


def check_classes(data, sources, train, test):
    """(train, test), if each class has a video in either; sources: the names of both. Raises InputError."""
    for part, source in zip((train, test), sources):
        without = set(range(len(data.classes))) - {data.labels[i] for i in part}
        if without:
            raise InputError(f"{source}: no video of class {data.classes[min(without)]} with features; each class "
                             "needs one for training and one for validation")
    return train, test


# ======================================================================================================================
# Training and evaluation
# ======================================================================================================================

def make_batches(indices, lengths, args, rng=None):
    """Lists of at most --batch videos of similar length, padded to --frames frames at most; with an rng, shuffled.

    The order is that of the lengths, each stretched by up to 15 % at random: batches differ from epoch to epoch.
    """
    stretch = 1 + (rng.uniform(0, 0.15, len(indices)) if rng else np.zeros(len(indices)))
    batches, longest = [], 0
    for _, i in sorted((lengths[i] * s, i) for i, s in zip(indices, stretch)):
        longest = max(longest, lengths[i])
        if not batches or len(batches[-1]) == args.batch or (len(batches[-1]) + 1) * longest > args.frames:
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
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
    batches = make_batches(train, data.lengths, args, np.random.default_rng([seed, epoch]))
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
    for *F, lengths, labels, batch in load_batches(data, make_batches(test, data.lengths, args), 0, args.device):
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


def write_whole(path, content):
    """Writes bytes beside their place, then renames: an interruption leaves the old file whole. Raises InputError."""
    part = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(".*.part"):                   # of a process that was killed
            with contextlib.suppress(FileNotFoundError):            # or of one that has just finished it
                if time.time() - other.stat().st_mtime > 86400:
                    other.unlink()
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room or choose another folder, then give "
                         "the command again: finished files are kept") from error


def save(path, checkpoint):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_whole(path, buffer.getbuffer())


CHECKPOINT = dict(model=dict, optimizer=dict, epoch=int, settings=dict, extraction=(dict, type(None)), classes=list,
                  history=list)


def load_checkpoint(path, remedy, entries=CHECKPOINT):
    """The dict with these entries, {name: type}: plain tensors and values, nothing in the file runs. Raises InputError.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except (pickle.UnpicklingError, KeyError, *DAMAGED) as error:
        raise InputError(f"{path}: no checkpoint of this code, or a damaged one; {remedy}") from error
    if not isinstance(saved, dict) or not all(isinstance(saved.get(k, ...), kind) for k, kind in entries.items()):
        raise InputError(f"{path}: no checkpoint of this code (no {', '.join(entries)} in it); {remedy}")
    return saved


def restore(saved, path, device):
    """The network of a checkpoint. Raises InputError."""
    try:
        settings = argparse.Namespace(**saved["settings"])
        model = make_network(settings.shape, len(saved["classes"]), settings)
        model.load_state_dict(saved["model"])
    except DAMAGED as error:
        raise InputError(f"{path}: its tensors do not fit its settings ({' '.join(str(error).split())[:200]}); train "
                         "again") from error
    return model.to(device).eval()


def run(number, data, train, test, args):
    """Trains and evaluates one split; returns the scores of the LAST epoch, "best" (accuracy, epoch) beside them.

    The run's seed is --seed plus its number. With --out, run<number>.pt holds the entries CHECKPOINT after each epoch.
    """
    seed, path = args.seed + number, args.out and Path(args.out, f"run{number}.pt")
    digest = lambda value: hashlib.sha256(json.dumps(value).encode()).hexdigest()
    settings = {k: getattr(args, k) for k in ("hidden", "lr", "batch", "frames", "clip", "beta", "fusion")} | dict(
        features=list(data.features), shape=list(data.shape), seed=seed,
        dataset=args.dataset if args.data else "planted", extraction=digest(sorted(data.settings)),
        videos=digest([[data.ids[i] for i in part] for part in (train, test)]))
    torch.manual_seed(seed)
    model = make_network(data.shape, len(data.classes), args).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    done, history = 0, []
    if path and path.exists():
        saved = load_checkpoint(path, "delete it to start this run anew")
        differs = [k for k in settings if saved["settings"].get(k) != settings[k]]
        differs += ["classes"] * (saved["classes"] != data.classes)
        if differs:
            raise InputError(f"{path}: made with other {', '.join(differs)}; choose another --out")
        if saved["epoch"] > args.epochs:
            raise InputError(f"{path}: has {saved['epoch']} epochs already; ask for --epochs {saved['epoch']} or more, "
                             "or choose another --out")
        try:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        except (KeyError, *DAMAGED) as error:
            raise InputError(f"{path}: its tensors do not fit its settings; delete it to start anew") from error
        done, history = saved["epoch"], saved["history"]
        print(f"run {number}    resumed after epoch {done}")
    elif args.resume:
        print(f"run {number}    no {path} to resume: it starts anew")
    y = [data.labels[i] for i in test]
    for epoch in range(done + 1, args.epochs + 1):
        loss = train_epoch(model, optimizer, data, train, epoch, seed, args)
        emotions, _ = evaluate(model, data, test, args)
        history.append(dict(loss=loss, **scores(y, emotions, data.classes)))
        if path:
            save(path, dict(model=model.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch, settings=settings,
                            extraction=data.extraction, classes=data.classes, history=history))
        print(f"run {number}  epoch {epoch:3d}/{args.epochs}  loss {loss:.4f}  "
              f"accuracy {history[-1]['accuracy']:.4f}  macro {history[-1]['macro']:.4f}{args.mark}", flush=True)
    best = max(range(len(history)), key=lambda i: history[i]["accuracy"])
    result = history[-1] | dict(best=(history[best]["accuracy"], best + 1), seed=seed)
    if data.emotional:
        _, attentions = evaluate(model, data, test, args)
        result["localisation"] = localisation(data, test, attentions)
        if not args.data:
            result["focus"] = focus(data, test, attentions)
    return result


def localisation(data, test, attentions):
    """How well A_T finds the emotional frames, which figure 4 shows and the paper does not measure.

    {measure: (A_T, uniform attention, centre prior)}, the means over those validation videos that have frames inside
    and outside, and their number, "videos". The centre prior is as steep as A_T can be: exp(G) with G falling from 1 in
    the middle to -1 at both ends. Several frames that are the most attended: the hit rate counts the share inside.
    """
    rows = []
    for i, (A_T, _) in zip(test, attentions):
        inside = data.emotional.get(i, np.zeros(1))
        if inside.min() < inside.max():
            T = len(A_T)
            centre = np.exp(1 - 2 * np.linspace(-1, 1, T) ** 2)
            rows.append([(average_precision_score(inside, A), A[inside].sum() / A.sum(), inside[A == A.max()].mean())
                         for A in (A_T, np.full(T, 1 / T), centre)])
    if not rows:
        return dict(videos=0)
    return dict(videos=len(rows)) | dict(zip(MEASURES, np.mean(rows, 0).T.tolist()))


MEASURES = ("average precision over frames", "share of attention inside", "most attended frame inside")


def focus(data, test, attentions):
    """Where the planted set's attentions are: (share, uniform share, limit) on the true frames and on the key objects.

    G is a tanh, so no weight exceeds another by more than e^2: m wanted of N get at most m e / (m e + (N - m) / e).
    """
    limit = lambda m, n: m * np.e / (m * np.e + (n - m) / np.e)
    time, objects = [], []
    for i, (A_T, A_o) in zip(test, attentions):
        planted, key = data.draw(i, 0)[3:]
        time.append(A_T[planted].sum())
        if A_o.shape[1]:
            objects.append(A_o[planted, key[planted]].mean())
    T, K = data.T, data.K
    out = {"time attention on the planted frames": (float(np.mean(time)), 2 / T, limit(2, T))}
    if objects:
        out["object attention on the key object"] = (float(np.mean(objects)), 1 / K, limit(1, K))
    return out


def protocol(data, splits, args):
    """All runs of the protocol, spread over torchrun's ranks; every rank returns the scores of all."""
    results = {number: run(number, data.of_run(number), *splits[number % len(splits)], args)
               for number in range(args.rank, max(args.runs, len(splits)), args.world)}
    if args.world > 1:
        gathered = [None] * args.world
        torch.distributed.all_gather_object(gathered, results)
        results = {number: r for part in gathered for number, r in part.items()}
    return [results[number] for number in sorted(results)]


# ======================================================================================================================
# Section 4: every table and figure of the paper
# ======================================================================================================================

# accuracies in %: (VideoEmotion, Ekman), as the paper prints them
TABLE1 = {("action",): (51.51, 56.42), ("scene",): (39.08, 45.47), ("objects",): (18.74, 23.16),
          ("action", "scene"): (52.78, 56.88), ("action", "scene", "objects"): (53.34, 57.37)}
TABLE2 = {"max": (49.48, 53.12), "avg": (50.02, 54.28), "time": (51.88, 55.93), "dual": (53.34, 57.37)}
FUSIONS = {"max": "Max. Pool", "avg": "Avg. Pool", "time": "T.Focus", "dual": "T.Focus + O.Focus"}
TABLE3 = {"Jiang et al. (Visual Only)": (41.90, None), "Jiang et al. (Visual+Audio)": (46.10, None),
          "ITE": (43.80, 50.90), "Content Fusion Network": (50.60, 51.80), "Kernelized Feature": (49.70, 54.40),
          "Concept Selection": (51.48, 55.62)}
FIGURE2 = (2, 4, 8, 16)                        # objects a frame; the text gives no numbers, only the best, 4
EMOTIONS = {"videoemotion": "anger anticipation disgust fear joy sadness surprise trust",
            "ekman": "anger disgust fear joy sadness surprise"}
FIGURE3 = {                                    # rows: the true emotion, in the order of EMOTIONS; in %
    "videoemotion": "50 1 4 25 1 1 21 1, 6 8 20 8 8 10 42 6, 0 0 65 12 6 3 15 1, 6 1 4 66 9 9 4 2, 2 0 2 9 67 4 18 0, "
                    "1 1 14 18 7 58 4 0, 1 1 1 7 5 0 86 1, 7 0 3 10 17 3 41 17",
    "ekman": "51 9 13 3 8 19, 3 54 18 5 5 14, 7 7 59 6 10 11, 3 4 9 54 6 23, 2 9 10 7 53 20, 11 4 5 8 6 64"}
REPRODUCE = ("table1", "table2", "table3", "figure2", "figure3", "figure4")
GREEN, BLUE, BLACK, GREY, WHITE = (0, 200, 0), (220, 90, 30), (30, 30, 30), (150, 150, 150), (255, 255, 255)  # BGR


def reproduce(data, splits, args):
    """Runs the cells (features, fusion, K) that --reproduce needs, each once, and prints and draws what they show.

    A cell's checkpoints lie in --out/<cell>/: a finished one is read back, an interrupted one goes on. results.json
    holds every cell. On the planted set the paper's numbers (Ekman's) stand beside ours for their order alone.
    """
    if args.reproduce in ("figure4", "all") and args.data:
        if not args.videos:
            raise InputError("--videos: figure4 shows frames; name the folder of videos that was extracted")
        for i in first_of_each_class(data, splits[0][1]):
            read_times(data.paths[i], data.lengths[i])
            find_video(args.videos, data.classes[data.labels[i]], data.paths[i].name[:-4])
    column = 0 if args.dataset == "videoemotion" else 1
    the_papers = args.data and [name.lower() for name in data.classes] == EMOTIONS[args.dataset].split()
    stored = data.widths["objects"][0]
    path, done = Path(args.out, "results.json"), {}
    read_results(path)
    if args.reproduce in ("figure2", "figure3", "figure4", "all"):
        import_cv2()
    if args.reproduce in ("figure2", "all") and stored < min(FIGURE2):
        raise InputError(f"{data.folder}: figure2 cuts the objects to {FIGURE2}, and there is only {stored} a frame")

    def cell(features=FEATURES, fusion="dual", K=stored):
        name = cell_name(features, fusion, K)
        if name not in done:
            cell_args = argparse.Namespace(**vars(args) | dict(
                features=features, fusion=fusion, objects=K, out=str(Path(args.out, name))))
            data.choose(features, K)
            if args.rank == 0:
                print(f"cell     {name}", flush=True)
            done[name] = protocol(data, splits, cell_args)
            if args.rank == 0:
                kept = read_results(path)
                printed = TABLE2[fusion] if features == FEATURES else TABLE1[features]
                write_whole(path, json.dumps(kept | {name: dict(
                    dataset=args.dataset if args.data else "planted", marked=args.mark.strip(), features=features,
                    fusion=fusion, objects=data.K, **{k: getattr(args, k) for k in ("beta", *NOT_IN_THE_PAPER)},
                    **{k: dict(zip(("mean", "std"), mean_std(done[name], k))) for k in ("accuracy", "macro")},
                    paper=printed[column] / 100 if the_papers and K == stored else None,
                    runs=done[name])}, indent=1).encode())
        return done[name]

    def table(title, rows):
        """rows: (name, the paper's pair or None, results or None)."""
        lines.append(f"{title}, {args.dataset if args.data else 'the planted set (SYNTHETIC)'}: accuracy in %, "
                     f"n = {max(args.runs, len(splits))}, up to {stored} objects a frame{args.mark}")
        heads = [("VideoEmotion-8", "Ekman-6")[column] + "*", "ours", "difference", "ours, macro"]
        shares = [] if args.data else ["time share", "object share"]
        lines.append(f"  {'':<28}" + "".join(f"{head:>16}" for head in heads) + "".join(
            f"{head:>15} [uniform, limit]" for head in shares))
        for name, paper, results in rows:
            paper = paper and paper[column]
            entries = [f"{paper:.2f}" if paper else "-"]
            if results:
                difference = 100 * mean_std(results, "accuracy")[0] - paper if the_papers and paper else None
                entries += [in_percent(results, "accuracy"), "-" if difference is None else f"{difference:+.2f}",
                            in_percent(results, "macro")]
                entries += [f"{np.mean([r['focus'][v][0] for r in results]):15.3f} [{uniform:.3f}, {limit:.3f}]  "
                            for v, (_, uniform, limit) in results[0].get("focus", {}).items()]
            lines.append(f"  {name:<28}" + "".join(f"{v:>16}" for v in entries) + (args.mark if results else ""))
        lines.append("  * as the paper prints it" + ("" if the_papers else ", for its order alone: these are not its "
                                                      "classes" if args.data else ", for its order alone"))

    lines, named = [], f"{args.dataset if args.data else 'planted set (SYNTHETIC)'}{args.mark}"
    for what in REPRODUCE if args.reproduce == "all" else (args.reproduce,):
        if what == "table1":
            table("Table 1", [(", ".join(features), paper, cell(features, "dual" if "objects" in features else "time"))
                              for features, paper in TABLE1.items()])
        elif what == "table2":
            table("Table 2", [(FUSIONS[fusion], paper, cell(fusion=fusion)) for fusion, paper in TABLE2.items()])
        elif what == "table3":
            table("Table 3", [(name, paper, None) for name, paper in TABLE3.items()]
                  + [(FUSIONS[fusion], TABLE2[fusion], cell(fusion=fusion)) for fusion in ("time", "dual")])
        elif what == "figure2":
            bars = {K: cell(K=K) for K in FIGURE2 if K <= stored}
            table("Figure 2", [(f"top {K} objects", None, r) for K, r in bars.items()])
            image = draw_bars(named, {f"{K}": mean_std(r, "accuracy") for K, r in bars.items()})
            lines.append("  the paper: K = 16 in its text (3.2.1), 4 the best in its figure (4.2), numbers not printed")
            lines.append("picture  " + picture(args, "figure2.png", image))
        elif what == "figure3":
            confusion = np.mean([r["confusion"] for r in cell()], 0)
            table("Figure 3", [(FUSIONS["dual"], TABLE2["dual"], cell())])
            lines.extend(paper_confusion(data, splits, args, the_papers))
            lines.append("picture  " + picture(args, "figure3.png", draw_confusion(
                named, confusion, data.classes)))
        elif what == "figure4":
            cell()
            checkpoint = Path(args.out, cell_name(FEATURES, "dual", stored), "run0.pt")
            lines.extend([*figure4(data, splits[0][1], args, checkpoint), *localised(cell(), args.mark)])
    if args.rank == 0:
        print("\n".join([*lines, f"written  {path}"]))


def read_results(path):
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it: cells are read back from their checkpoints") from error


def cell_name(features, fusion, K):
    return f"{'+'.join(features)}-{fusion}" + (f"-{K}" if "objects" in features else "")


def mean_std(results, name):
    """Mean and standard deviation over the runs (0 for one run)."""
    values = [r[name] for r in results]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.


def in_percent(results, name):
    mean, std = mean_std(results, name)
    return f"{100 * mean:.2f}" + (f" +/- {100 * std:.2f}" if len(results) > 1 else "")


def paper_confusion(data, splits, args, the_papers):
    """What the paper's own figure 3 adds up to: its headline accuracy is neither mean of its diagonal."""
    rows = [[int(v) for v in row.split()] for row in FIGURE3[args.dataset].split(",")]
    diagonal = np.diag(rows).astype(float)
    yield (f"  the paper's figure 3: its diagonal averages {diagonal.mean():.1f} % over the classes, its headline is "
           f"{TABLE2['dual'][0 if args.dataset == 'videoemotion' else 1]}")
    if the_papers:
        counts = np.bincount([data.labels[i] for i in splits[0][1]], minlength=len(rows))
        yield (f"  weighted by this validation set's class counts ({', '.join(map(str, counts))}) it is "
               f"{(diagonal * counts).sum() / counts.sum():.1f} %")


def picture(args, name, image):
    cv2 = import_cv2()
    path = Path(args.out, name)
    if args.rank == 0:
        write_whole(path, cv2.imencode(".png", image)[1].tobytes())
    return str(path)


def import_cv2():
    """OpenCV, for pictures alone: training needs no libGL. Raises InputError."""
    try:
        import cv2
    except ImportError as error:
        raise InputError(f"pictures need cv2 ({error}); on a server `apt install libgl1`, or `pip uninstall "
                         "opencv-python` and `pip install opencv-python-headless`") from error
    return cv2


def write(image, text, x, y, size=0.5, colour=BLACK, centre=False):
    cv2 = import_cv2()
    text = text.encode("ascii", "replace").decode()                    # its fonts have no other letters
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
    at = (int(x - width / 2), int(y + height / 2)) if centre else (int(x), int(y))
    cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)


def draw_bars(title, bars):
    """Figure 2: {label: (mean, standard deviation)}, accuracies from 0 to 1."""
    cv2 = import_cv2()
    image = np.full((420, max(420, 140 + 120 * len(bars)), 3), 255, np.uint8)
    write(image, title, 110, 28)
    bottom, height = 340, 280
    for tick in range(0, 101, 20):
        y = bottom - height * tick // 100
        cv2.line(image, (70, y), (image.shape[1] - 30, y), GREY if tick else BLACK, 1)
        write(image, f"{tick}", 40, y, centre=True)
    for n, (label, (mean, std)) in enumerate(bars.items()):
        x, y = 130 + 120 * n, bottom - int(height * mean)
        cv2.rectangle(image, (x - 35, y), (x + 35, bottom - 1), BLUE, -1)
        for v in (mean - std, mean + std) if std else ():
            cv2.line(image, (x - 8, int(bottom - height * v)), (x + 8, int(bottom - height * v)), BLACK, 1, cv2.LINE_AA)
        cv2.line(image, (x, int(bottom - height * (mean - std))), (x, int(bottom - height * (mean + std))), BLACK, 1)
        write(image, f"{100 * mean:.2f}", x, int(bottom - height * (mean + std)) - 14, centre=True)
        write(image, label, x, bottom + 20, centre=True)
    write(image, "accuracy, %", 20, 28)
    write(image, "objects a frame, K", image.shape[1] / 2, bottom + 50, centre=True)
    return image


def draw_confusion(title, confusion, classes):
    """Figure 3: rows are the true emotion, normalised; the darker, the more."""
    cv2 = import_cv2()
    left, top, side = 150, 90, 88
    image = np.full((top + side * len(classes) + 20, left + side * len(classes) + 20, 3), 255, np.uint8)
    write(image, f"true \\ predicted{' ' * 6}{title}", 10, 30)
    for i, row in enumerate(confusion):
        write(image, classes[i][:14], 10, top + side * i + side / 2 + 5)
        write(image, classes[i][:12], left + side * i + side / 2, top - 20, 0.45, centre=True)
        for j, v in enumerate(row):
            x, y = left + side * j, top + side * i
            colour = tuple(int(255 + (c - 255) * v) for c in BLUE)
            cv2.rectangle(image, (x, y), (x + side - 2, y + side - 2), colour, -1)
            write(image, f"{v:.2f}", x + side / 2, y + side / 2, 0.5, WHITE if v > 0.6 else BLACK, centre=True)
    return image


def figure4(data, test, args, checkpoint):
    """One picture a class: its first validation video, under the dual network of run 0. Yields a line each."""
    data.choose(FEATURES, None)
    model = restore(load_checkpoint(checkpoint, "delete it to train again"), checkpoint, args.device)
    firsts = first_of_each_class(data, test)
    emotions, attentions = evaluate(model, data, firsts, args)
    for i, emotion, (A_T, A_o) in zip(firsts, emotions, attentions):
        numbers, seconds = read_times(data.paths[i], len(A_T)) if args.data else [np.arange(len(A_T))] * 2
        title = f"{data.ids[i]}: predicted {data.classes[emotion]}{args.mark if args.data else '  SYNTHETIC'}"
        unit = " s" if args.data else ""
        path = picture(args, "figure4-" + data.ids[i].replace("/", "-") + ".png", attention_picture(
            title, A_T, A_o, data.load(i, 0)[2].numpy(), numbers, seconds, unit,
            find_video(args.videos, *data.ids[i].split("/", 1)) if args.data else None))
        yield (f"  {title}; most attended at {seconds[A_T.argmax()]:.1f}{unit or ' (frame)'}, "
               f"{A_T.max() * len(A_T):.2f} times uniform{args.mark}")
        yield f"picture  {path}"


def attention_picture(title, A_T, A_o, F_O, numbers, seconds, unit, video):
    """Figure 4 of one video: the most attended frame of each sixth. video: its path, None for grey frames; unit: of
    `seconds`, " s" or "" for frames."""
    shown = [part[A_T[part].argmax()] for part in np.array_split(np.arange(len(A_T)), min(6, len(A_T)))]
    frames = video_frames(video, numbers[shown]) if video else [np.full((240, 320, 3), 90, np.uint8)] * len(shown)
    boxes = F_O[shown, :, -4:] if F_O.shape[-1] == 84 else F_O[shown, :0]               # another detector's are unknown
    return draw_attention(title, A_T, seconds, unit, shown, frames, boxes, A_o[shown])


def first_of_each_class(data, test):
    return [next(i for i in test if data.labels[i] == c) for c in range(len(data.classes))]


def find_video(folder, emotion, stem):
    """The video of that name below the folder of its class, or the only one of that name. Raises InputError."""
    same = [Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names
            if os.path.splitext(name)[0] == stem and name.lower().endswith(SUFFIXES)]
    of_class = [path for path in same if path.relative_to(folder).parts[0] == emotion]
    if len(of_class or same) != 1:
        raise InputError(f"{Path(folder, emotion)}: {'several videos' if same else 'no video'} {stem} below it; "
                         "--videos is the folder that was extracted")
    return str((of_class or same)[0])


def video_frames(path, numbers):
    """The decoded frames (H,W,3), BGR, of these numbers, rising. Raises InputError."""
    cv2 = import_cv2()
    video, frames, number = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG), [], 0
    while len(frames) < len(numbers) and video.grab():
        if number == numbers[len(frames)]:
            frames.append(video.retrieve()[1])
        number += 1
    video.release()
    if len(frames) < len(numbers):
        raise InputError(f"{path}: frame {numbers[len(frames)]} does not decode; is it the video that was extracted?")
    return frames


def draw_attention(title, A_T, seconds, unit, shown, frames, boxes, A_o):
    """Figure 4: frames with their boxes above the curve of A_T. A box is grey at uniform attention or below, and full
    green at the most that the tanh of (3) allows one of K objects, e / (e + (K - 1) / e).

    A_T (T,), seconds (T,), shown: the frames' positions, frames (H,W,3) each, boxes (n,K,4) from 0 to 1, A_o (n,K).
    """
    cv2 = import_cv2()
    width, height, gap = 300, 200, 10
    full = gap + (width + gap) * len(shown)
    image = np.full((height + 290, max(full, 640), 3), 255, np.uint8)
    write(image, title, gap, 24, 0.6)
    left, right, top, bottom = 90, image.shape[1] - 30, height + 90, height + 235
    start, end = seconds[0], max(seconds[-1], seconds[0] + 1e-3)
    highest = max(A_T.max(), 2 / len(A_T)) * 1.1
    place = lambda t, v: (int(left + (right - left) * (seconds[t] - start) / (end - start)),
                          int(bottom - (bottom - top) * v / highest))
    for n, (t, frame, F_o, weights) in enumerate(zip(shown, frames, boxes, A_o)):
        h, w = frame.shape[:2]
        scale = min(width / w, height / h)
        small = cv2.resize(frame, (max(1, int(w * scale)), max(1, int(h * scale))), interpolation=cv2.INTER_AREA)
        h, w = small.shape[:2]
        there = [k for k in weights.argsort() if weights[k] > 0]                      # the most attended on top
        uniform, most = 1 / max(1, len(there)), np.e / (np.e + (len(there) - 1) / np.e)
        for k in there:
            saturation = np.clip((weights[k] - uniform) / max(most - uniform, 1e-9), 0, 1) if len(there) > 1 else 1
            colour = tuple(int(200 + (c - 200) * saturation) for c in GREEN)
            corners = [int(v * s) for v, s in zip(F_o[k], (w - 1, h - 1, w - 1, h - 1))]
            cv2.rectangle(small, tuple(corners[:2]), tuple(corners[2:]), colour, 1 + int(saturation > 0.5))
        x = gap + (width + gap) * n
        image[40 + (height - h) // 2:40 + (height - h) // 2 + h, x + (width - w) // 2:x + (width - w) // 2 + w] = small
        write(image, f"{seconds[t]:.{1 if unit else 0}f}{unit}", x + width / 2, height + 52, 0.45, centre=True)
        cv2.line(image, (x + width // 2, height + 62), (place(t, 0)[0], top), GREY, 1, cv2.LINE_AA)
        cv2.line(image, (place(t, 0)[0], top), place(t, 0), GREY, 1)
    cv2.rectangle(image, (left, top), (right, bottom), BLACK, 1)
    uniform = place(0, 1 / len(A_T))[1]
    cv2.line(image, (left, uniform), (right, uniform), GREY, 1)
    curve = np.array([place(t, v) for t, v in enumerate(A_T)], np.int32)
    cv2.polylines(image, [curve], False, BLUE, 2, cv2.LINE_AA)
    cv2.circle(image, place(A_T.argmax(), A_T.max()), 4, BLUE, -1, cv2.LINE_AA)
    write(image, "A_T", 10, top - 12)
    for y, label in ((top, f"{highest:.4f}"), (uniform - 7, "uniform"), (uniform + 7, f"{1 / len(A_T):.4f}"),
                     (bottom, "0")):
        write(image, label, 10, y + 4, 0.4)
    step = next(v for v in (m * 10. ** e for e in range(-3, 6) for m in (1, 2, 5)) if v >= (end - start) / 8)
    for v in np.arange(np.ceil(start / step) * step, end + step / 1000, step):
        x = left + (right - left) * (v - start) / (end - start)
        cv2.line(image, (int(x), bottom), (int(x), bottom + 5), BLACK, 1)
        digits = max(0, -int(np.floor(np.log10(step))))
        write(image, f"{v:.{digits}f}{unit}", x, bottom + 20, 0.45, centre=True)
    write(image, "time" if unit else "frame", 10, bottom + 22 + 18, 0.4)
    return image


# ======================================================================================================================
# A video of one's own
# ======================================================================================================================

def predict(args):
    """For each video or .npz of --predict: the emotion, the three most attended moments, the picture of figure 4.

    A video is extracted with the settings that the checkpoint remembers. One that fails is reported and the next is
    taken. Returns the exit status, 2 if any failed. Raises InputError.
    """
    sys.modules.setdefault("dfan", sys.modules[__name__])     # this very script is what extract_features imports
    import extract_features
    saved = load_checkpoint(args.checkpoint, "--checkpoint takes a run0.pt that dfan.py wrote into its --out")
    model, settings = restore(saved, args.checkpoint, args.device), saved["settings"]
    try:
        made = dict(json.loads(saved["extraction"]["settings"])) if saved["extraction"] else {}
    except (KeyError, *DAMAGED) as error:
        raise InputError(f"{args.checkpoint}: no checkpoint of this code, or a damaged one; train again") from error
    networks, failed, stems = None, 0, [Path(source).stem for source in args.predict]
    for source, stem in zip(args.predict, stems):
        name = stem if stems.count(stem) == 1 else f"{Path(source).absolute().parent.name}-{Path(source).name}"
        try:
            path, video, warnings = Path(source), source, []
            if not path.is_file():
                raise InputError(f"{source}: no such file; --predict takes videos, or .npz of extract_features.py")
            if path.suffix == ".npz":
                video = find_video(args.videos, path.absolute().parent.name, stem) if args.videos else None
            else:
                if not made:
                    raise InputError(f"{source}: {args.checkpoint} does not know how its features were made (the "
                                     "planted set, arrays of your own, or mixed settings); give features, as .npz")
                path = Path(args.out, f"{name}.npz")
                warning = extract_features.already_extracted(source, path, made)
                if warning is None:
                    networks = networks or extract_features.remembered(
                        made, (args.weights, saved["extraction"]["feats"]), args.device)
                    warning = extract_features.extract_one(source, path, networks, made)
                warnings.append(warning)
            F, other = read_features(path, settings["features"])
            random = {**made, **json.loads(other)}.get("random_weights") is not None
            if random:
                warnings.insert(0, "features of networks with RANDOM weights: it means nothing")
            if made and other not in ("{}", saved["extraction"]["settings"]):
                raise InputError(f"{source}: not made as the features of {args.checkpoint} were; give the video")
            numbers, seconds = read_times(path, len(next(iter(F.values()))))
            F_A, F_S, F_O = as_inputs(F, settings["shape"][2])
            shape = [F_A.shape[1], F_S.shape[1], *F_O.shape[1:]]
            if shape != settings["shape"]:
                raise InputError(f"{source}: widths of F_A, F_S, F_O {shape}, but {args.checkpoint} was trained on "
                                 f"{settings['shape']}; give features of the same kind")
            with torch.no_grad():
                out = {k: v.cpu() for k, v in model(*(v[None].to(args.device) for v in (F_A, F_S, F_O))).items()}
            if not out["P"].isfinite().all():
                raise InputError(f"{args.checkpoint}: gives NaN; train again")
            A_T, A_o, F_O = out["A_T"][0].numpy(), out["A_o"][0].numpy(), F_O.numpy()
            emotion = saved["classes"][vote(out["P"], torch.tensor([len(A_T)]))[0]]
            sums = out["P"][0, -LAST_FRAMES:].sum(0).tolist()
            found = dict(video=source, emotion=emotion, probabilities=dict(zip(saved["classes"], sums)), moments=[
                dict(seconds=float(seconds[t]), frame=int(numbers[t]), attention=float(A_T[t]),
                     times_uniform=float(A_T[t] * len(A_T)), objects=strongest(A_o[t], F_O[t], extract_features.NAMES))
                for t in moments(A_T, seconds)], warning="; ".join(filter(None, warnings)), features=str(path))
            found["picture"] = picture(args, f"{name}.png", attention_picture(
                f"{source}: {emotion}{'  RANDOM WEIGHTS' if random else ''}", A_T, A_o, F_O, numbers, seconds, " s",
                video))
            print(json.dumps(found) if args.json else in_words(found, min(LAST_FRAMES, len(A_T))), flush=True)
        except (InputError, extract_features.VideoError) as failure:
            failed += 1
            line = str(failure) if str(failure).startswith(str(source)) else f"{source}: {failure}"
            if args.json:
                print(json.dumps(dict(video=source, error=line)), flush=True)
            print(f"dfan.py: {line}", file=sys.stderr, flush=True)
    return 2 if failed else 0


def moments(A_T, seconds, count=3):
    """Positions of the most attended frames, strongest first, no two within a second (or a sixth of a short video)."""
    apart, chosen = min(1., (seconds[-1] - seconds[0]) / 6), []
    for t in (-A_T).argsort(kind="stable"):
        if len(chosen) < count and all(abs(seconds[t] - seconds[c]) >= apart for c in chosen):
            chosen.append(t)
    return chosen


def strongest(A_o, F_O, names, count=3):
    """The most attended objects of a frame: A_o (K,), F_O (K,84), the names of its classes."""
    chosen = [k for k in (-A_o).argsort(kind="stable") if A_o[k] > 0][:count]
    if F_O.shape[-1] != 84:                                         # another detector's: not COCO's classes
        return [dict(object=int(k), attention=float(A_o[k])) for k in chosen]
    return [dict(name=names[F_O[k, :80].argmax()], probability=float(F_O[k, :80].max()), attention=float(A_o[k]),
                 box=F_O[k, 80:].tolist()) for k in chosen]


def in_words(found, voters):
    sums = sorted(found["probabilities"].items(), key=lambda item: -item[1])
    lines = [f"{found['video']}: {found['emotion']}",
             f"  probability, summed over the last {voters} frames: " + ", ".join(f"{c} {v:.2f}" for c, v in sums)]
    for m in found["moments"]:
        objects = [f"{o.get('name', o.get('object'))} {o.get('probability', 0):.2f} (attention {o['attention']:.3f})"
                   for o in m["objects"]]
        lines.append(f"  {m['seconds']:7.1f} s  attention {m['times_uniform']:.2f} times uniform  {', '.join(objects)}")
    lines += [f"  WARNING  {found['warning']}"] if found["warning"] else []
    return "\n".join([*lines, f"  picture {found['picture']}, features {found['features']}"])


# ======================================================================================================================
# Command line
# ======================================================================================================================

def localised(results, mark):
    """The lines of `localisation`, their mean over the runs and its standard deviation."""
    runs = [r["localisation"] for r in results if r.get("localisation", {}).get("videos")]
    if runs:
        yield (f"localisation  in {runs[0]['videos']} validation videos with emotional frames and others: A_T "
               f"(uniform attention, centre prior){mark}")
    for name in MEASURES if runs else ():
        ours, uniform, centre = zip(*(r[name] for r in runs))
        spread = f" +/- {np.std(ours, ddof=1):.3f}" if len(runs) > 1 else ""
        yield (f"localisation  {name}: {np.mean(ours):.3f}{spread}  (uniform {np.mean(uniform):.3f}, centre "
               f"{np.mean(centre):.3f}){mark}")


def report(results, data, mark):
    """Prints the protocol's figures: each run, their mean and standard deviation, and the confusion matrix."""
    for number, r in enumerate(results):
        print(f"result   run {number}  seed {r['seed']}  accuracy {r['accuracy']:.4f}  macro {r['macro']:.4f}  (last "
              f"epoch; best epoch {r['best'][1]}: {r['best'][0]:.4f}, optimistic, since it is picked on the validation "
              f"videos){mark}")
    if len(results) > 1:
        for name in ("accuracy", "macro"):
            values = [r[name] for r in results]
            print(f"result   {name} {np.mean(values):.4f} +/- {np.std(values, ddof=1):.4f}  (mean, standard deviation, "
                  f"n = {len(values)}){mark}")
    print(f"confusion matrix, rows: the true emotion, normalised (figure 3){mark}")
    width = max(map(len, data.classes))
    for name, row in zip(data.classes, np.mean([r["confusion"] for r in results], 0)):
        print(f"  {name:<{width}}  " + "  ".join(f"{v:.2f}" for v in row) + mark)
    for name, (share, uniform, limit) in results[0].get("focus", {}).items():
        print(f"synthetic  {name}: {share:.3f}  (uniform {uniform:.3f}, limit {limit:.3f})")
    for line in localised(results, mark):
        print(line)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     usage="%(prog)s [options]",
                                     epilog="Without --data and --predict it trains on a built-in planted set.",
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26))
    group = parser.add_argument_group("data (4.1)")
    group.add_argument("--data", metavar="FEATS", help="folder that extract_features.py wrote")
    group.add_argument("--dataset", choices=("ekman", "videoemotion"), default="ekman", metavar="NAME",
                       help="ekman: one fixed split (default); videoemotion: ten 2/3-1/3 splits")
    group.add_argument("--split", nargs="+", default=[], metavar=("TRAIN", "TEST"),
                       help="split lists, in pairs (default: trainlist01.txt testlist01.txt in FEATS; videoemotion: "
                            "drawn)")
    group.add_argument("--alternate-split", action="store_true", help="ekman without lists: every second video trains")
    group.add_argument("--allow-missing", action="store_true", help="go on without listed videos that lack features")
    group.add_argument("--allow-leak", action="store_true", help="validate on videos that the backbones were tuned on; "
                       "every number printed is marked")
    group.add_argument("--segments", metavar="CSV", help="annotated emotional segments: does A_T find them? (figure 4)")
    group = parser.add_argument_group("model of the paper")
    group.add_argument("--features", default=",".join(FEATURES), metavar="NAME,...",
                       help="arrays of the .npz to use: any of action, scene, objects (table 1), and your own (T,D) "
                            f"arrays (default: {','.join(FEATURES)})")
    group.add_argument("--fusion", choices=("dual", "time", "avg", "max"), metavar="NAME",
                       help="table 2: dual (T.Focus + O.Focus), time (T.Focus), avg, max (default: dual; time without "
                            "objects)")
    group.add_argument("--objects", type=int, metavar="K", help="objects a frame (3.2.1, figure 2; default: all)")
    group.add_argument("--beta", type=float, default=BETA, metavar="B",
                       help=f"of (10), in [0, 1] (3.2.2; default: {BETA})")
    group = parser.add_argument_group("training (not in the paper; defaults: with --data [on the planted set])")
    for name in NOT_IN_THE_PAPER:
        what = dict(hidden="hidden units H of both LSTMs", lr="learning rate of Adam", batch="videos in a batch",
                    frames="padded frames in a batch: bounds the memory",
                    memory="GiB of features to keep there, the rest is read in every epoch",
                    epochs="passes over the training videos", clip="largest norm of the gradient")[name]
        group.add_argument(f"--{name}", type=type(NOT_IN_THE_PAPER[name]), metavar="N",
                           help=f"{what} (default: {NOT_IN_THE_PAPER[name]} [{PLANTED[name]}])")
    group.add_argument("--runs", type=int, metavar="N", help="runs of different seeds with one split (default: 1 [5 "
                       "with --reproduce]; videoemotion has its ten)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of run 0; run i uses seed + i (default: 0)")
    group.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    group = parser.add_argument_group("output")
    group.add_argument("--out", metavar="DIR", help="folder for checkpoints, run<number>.pt, tables and pictures "
                       "(default: out; the planted set: none)")
    group.add_argument("--resume", action="store_true", help="go on with the checkpoints in --out")
    group.add_argument("--reproduce", choices=(*REPRODUCE, "all"), metavar="WHAT", help="run what a table or figure of "
                       f"section 4 needs, print it beside the paper's numbers: {', '.join(REPRODUCE)}, all")
    group.add_argument("--videos", metavar="DIR", help="folder that was extracted, for the frames of figure 4")
    group = parser.add_argument_group("a video of your own")
    group.add_argument("--predict", nargs="+", metavar="FILE", help="videos, or .npz of extract_features.py: emotion, "
                       "most attended moments and objects, picture")
    group.add_argument("--checkpoint", metavar="FILE", help="the network, out/run0.pt; videos are extracted as its "
                       "features were")
    group.add_argument("--weights", metavar="DIR", help="folder with the backbones' weight files, where they are not "
                       "in torch hub's cache")
    group.add_argument("--json", action="store_true", help="print one JSON object a file")
    args = parser.parse_args(argv)
    given = [name for name in (*NOT_IN_THE_PAPER, "fusion", "objects", "runs") if getattr(args, name) is not None]
    if args.predict and given:
        parser.error(f"--{given[0]}: --predict has it from --checkpoint")
    if bool(args.predict) != bool(args.checkpoint) or (args.weights or args.json) and not args.predict:
        parser.error("--predict and --checkpoint go together; --weights and --json go with them")
    if args.predict and (args.data or args.reproduce or args.segments or args.resume):
        parser.error("--predict takes its network from --checkpoint; it does not train")
    for name, value in (NOT_IN_THE_PAPER if args.data else PLANTED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        if not 0 < getattr(args, name) < 1e30:
            parser.error(f"--{name}: must be greater than 0 and less than 1e30")
    if not 0 <= args.beta <= 1:
        parser.error("--beta: must be in [0, 1]")
    if not 0 <= args.seed < 2 ** 31:
        parser.error("--seed: must be a whole number from 0 to 2147483647")
    if args.out is None and (args.data or args.reproduce or args.predict):
        args.out = "out"
    if args.reproduce and (args.features != ",".join(FEATURES) or args.fusion or args.objects):
        parser.error("--reproduce: sets --features, --fusion and --objects itself")
    args.runs = args.runs or (5 if args.reproduce and not args.data else 1)
    args.features = tuple(name for name in args.features.split(",") if name)
    if {"frames", "seconds", "fps", "settings"} & set(args.features):
        parser.error("--features: frames, seconds, fps and settings describe a file, they are no features")
    if not args.features or len(set(args.features)) < len(args.features):
        parser.error("--features: names of arrays, each once, with commas between them")
    if not args.data and set(args.features) - set(FEATURES):
        parser.error(f"--features: the planted set has {', '.join(FEATURES)}")
    args.fusion = args.fusion or ("dual" if "objects" in args.features else "time")
    if args.fusion == "dual" and "objects" not in args.features:
        parser.error("--fusion dual: O.Focus needs objects among --features")
    if args.objects is not None and args.objects < 1 or args.runs < 1:
        parser.error("--objects and --runs must be at least 1")
    if args.runs > 1 and args.dataset == "videoemotion":
        parser.error("--runs: videoemotion has its ten")
    if args.alternate_split and (args.split or args.dataset != "ekman"):
        parser.error("--alternate-split: for ekman, in place of --split")
    if args.resume and not args.out:
        parser.error("--resume: needs --out, the folder of the checkpoints")
    if not args.data and (args.split or args.alternate_split or args.segments or args.dataset != "ekman"):
        parser.error("--dataset, --split, --alternate-split and --segments need --data")
    return args


def usable(device):
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: not usable here ({str(error).splitlines()[0]})") from error


def check_writable(folder):
    """Raises InputError if files can't be made in the folder, or, where it is not there, in the parent that is."""
    place = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise InputError(f"{folder}: cannot be written to; choose another folder")


def main(argv=None):
    """Returns the exit status. Raises InputError."""
    args = parse_args(argv)
    args.rank, args.world, local = (int(os.environ.get(k, d))
                                    for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    args.device = args.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    usable(args.device)
    for name in ("videos", "weights"):
        if getattr(args, name) and not Path(getattr(args, name)).is_dir():
            raise InputError(f"--{name} {getattr(args, name)}: no such folder")
    if args.out:
        check_writable(args.out)
    if args.predict:
        return predict(args)
    if not args.data:
        torch.set_num_threads(1)                              # products this small lose by sharing
    chosen = args.features, args.objects
    data = Features(args.data, *chosen, args.memory / args.world) if args.data else Planted(args.seed, *chosen)
    splits = make_splits(args, data) if args.data else data.splits
    longest = max(range(len(data.ids)), key=lambda i: data.lengths[i])
    if data.lengths[longest] > args.frames:
        raise InputError(f"{data.ids[longest]}: {data.lengths[longest]} frames, a batch may have --frames "
                         f"{args.frames}; give more (memory grows with it), or extract with a larger --every")
    if args.segments:
        data.emotional, skipped = read_segments(args.segments, data)
        if args.rank == 0:
            print("".join(f"segments {line}\n" for line in skipped), end="", flush=True)
        if not any(i in data.emotional for _, test in splits for i in test):
            raise InputError(f"{args.segments}: no segment of any validation video in it; videos are class/name.mp4, "
                             f"as {data.ids[splits[0][1][0]]}.mp4")
    leaked = sorted({data.ids[i] for _, test in splits for i in test} & data.tuned_on()) if args.data else []
    if leaked and not args.allow_leak:
        raise InputError(f"{args.data}: its backbones were tuned on {len(leaked)} of the validation videos: "
                         f"{', '.join(leaked[:3])}{', ...' if len(leaked) > 3 else ''}; tune on this split's training "
                         "list alone, or have every number marked: --allow-leak")
    args.mark = ("  RANDOM WEIGHTS" if args.data and data.random() else "") + ("  LEAKED" if leaked else "")
    runs = range(max(args.runs, len(splits)))
    existing = [str(p) for i in runs if args.out and (p := Path(args.out, f"run{i}.pt")).exists()]
    if existing and not args.resume and not args.reproduce:
        raise InputError(f"{existing[0]}: there already; --resume goes on with it, another --out keeps it")
    if args.rank == 0:
        print(f"versions torch {torch.__version__}, numpy {np.__version__}, scikit-learn {sklearn.__version__}; "
              f"device {args.device}")
        for line in data.warnings():
            print(f"WARNING  {line}")
        print(f"data     {len(data.ids)} videos of {len(data.classes)} classes ({', '.join(data.classes)})")
        paper = PAPER_COUNTS.get(args.dataset) if args.data else None
        print(f"split    train {len(splits[0][0])} / validation {len(splits[0][1])}"
              + (f" (the paper's Ekman: {paper[0]} / {paper[1]})" if paper else ""), flush=True)
        if args.segments:
            print(f"segments {len(data.emotional)} of the videos have annotated segments", flush=True)
    if args.world > 1:
        torch.distributed.init_process_group("gloo", timeout=WEEK)              # a run may take long
    if args.reproduce:
        reproduce(data, splits, args)
    else:
        results = protocol(data, splits, args)
        if args.rank == 0:
            report(results, data, args.mark)
    if args.world > 1:
        torch.distributed.barrier()                                             # or its threads may abort the exit
        torch.distributed.destroy_process_group()
    return 0


def one_line(text):
    return " ".join(str(text).splitlines())


def command(main):
    """Runs a script's main(): its failures become one line and an exit status."""
    script = Path(sys.argv[0]).name
    for stream in filter(None, (sys.stdout, sys.stderr)):     # names that a terminal cannot show
        stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
        if sys.stdout:                                        # None where it was closed
            sys.stdout.flush()
    except BrokenPipeError:                                   # as in `python dfan.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (InputError, OSError) as failure:                  # OSError: no permission, for instance; it names the file
        print(f"{script}: {one_line(failure)}", file=sys.stderr)
        status = 2
    except (MemoryError, RuntimeError) as failure:
        if "memory" not in str(failure) and not isinstance(failure, MemoryError):
            raise
        print(f"{script}: out of memory ({one_line(failure)[:200]}); give a smaller --batch"
              f"{' or --frames' if script == 'dfan.py' else ''}, or --device cpu", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted; finished files are kept; to go on, give the command again"
              f"{', with --resume if it trained into --out' if script == 'dfan.py' else ''}", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    command(main)
