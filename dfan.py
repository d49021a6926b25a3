"""Dual Focus Attention Network for Video Emotion Recognition (Qiu, He, Wang; ICME 2020), whole, in one file.

    python dfan.py                                        # no data: a built-in planted set, about a minute
    python dfan.py --data feats/ --dataset ekman          # one fixed split; videoemotion: ten drawn ones (4.1)
    python dfan.py --predict clip.mp4                     # your own video: which emotion, when, where

feats/ is what extract_features.py writes. Figure 1 of the paper, for frame t of a video:

  F_o (K objects) --> mean --> LSTM.S --h1--> O.Focus: A_o over the K objects  (1)-(4)
     |                           ^               |
     +---------------------------|--- weighted --> F_o_hat
                            h2 of t-1            |
  F_A, F_S (action, scene) ----------------> S_t = [F_o_hat; F_A; F_S]
     |                                           |
  FF = [F_A; F_S] of all frames              T.Focus: entry t of G_T, then A_T  (8), (9)  <-- h2 of t-1
     |                                           |
     +-- weighted by A_T <-----------------------+
            |
           F_t (7) --> LSTM.T --h2--> P_t, the emotion at t  (5), (6)
                         ^
                 P and h2 of t-1

Names are the paper's letters: F_O is the whole video's, F_o a frame's; hat and bar are suffixes; the blackboard-bold F
(action and scene together) is FF, the script F_t of (7) is F_t. A line that computes an equation, or makes its
parameters, bears its number, (1) to (10). [R1] and so on are rows of the README's table "Where the paper is silent or
ambiguous". Text in quotation marks is the paper's. Code counts frames from 0, the paper from 1.

    B videos in a batch   T frames (the longest of the batch)   K objects a frame   H hidden units   C emotions
    F_A (B,T,2048)   F_S (B,T,365)   F_O (B,T,K,84)   FF (B,T,2413)   A_o (B,T,K)   A_T (B,T)   P (B,T,C)
    (the paper's widths; in the loop over t, A_o and P are of frame t and have no T)
"""
import argparse
import atexit
import contextlib
import datetime
import io
import json
import os
import re
import subprocess
import sys
import time
import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.preprocessing import StandardScaler
from torch import nn

BETA = 0.6                                  # "we empirically set beta = 0.6" (3.2.2)
OBJECTS = 16                                # "In our implementation, we set K = 16." (3.2.1)
LAST_FRAMES = 10                            # "we count the predictions of the last ten frames" (4.1)
FEATURES = ("action", "scene", "objects")   # F_A, F_S, F_O: "three kinds of features" (3.1)
NOT_IN_THE_PAPER = dict(                    # ours, each a flag; PLANTED: on the built-in set, which is small
    hidden=(256, "hidden units H of both LSTMs"), lr=(1e-3, "learning rate of Adam"),
    batch=(16, "videos in a batch"), epochs=(30, "passes over the training videos"))
PLANTED = dict(hidden=32, lr=5e-3, epochs=20, out="out/planted")
CLIP = 1.0                                  # ours too: the most norm of a gradient


# ---- 3.2 Dual Focus Attention Network ----

class DFAN(nn.Module):
    """ "The Dual Focus Attention (DFA) cell consists of two focus attention modules with two vanilla LSTM
    cells" (3.2), run over the frames of a video (figure 1). o_focus=False: T.Focus alone, a row of Table 2 [R9].
    This class is the complete algorithm. `Fast`, below, has the same parameters and results: just efficiency.
    """

    def __init__(self, d_action, d_scene, d_object, hidden, classes, beta=BETA, o_focus=True):
        super().__init__()
        d_FF = d_action + d_scene
        self.beta, self.o_focus = beta, o_focus
        if o_focus:
            self.W_oh = nn.Linear(hidden, 1, bias=False)            # (3)
            self.W_of = nn.Linear(d_object, 1)                      # (3)  its bias is b_o
            self.LSTM_S = nn.LSTMCell(d_object + hidden, hidden)    # (4)  on [F_o_bar; h2] [R1]
        self.W_p = nn.Linear(hidden, classes)                       # (5)  its bias is b_p
        self.LSTM_T = nn.LSTMCell(classes + d_FF, hidden)           # (6)  on [P; F_t] [R4]
        self.W_Th = nn.Linear(hidden, 1, bias=False)                # (9)
        self.W_Tf = nn.Linear(d_object + d_FF, 1)                   # (9)  on S_t; its bias is b_T

    def forward(self, F_A, F_S, F_O, lengths=None):
        """F_A (B,T,d_action), F_S (B,T,d_scene), F_O (B,T,K,d_object), lengths (B,) of the videos, T if None.

        An object whose features are all zero is not there [R3]. Frames from a video's length on are padding: no
        finite number there changes anything. Returns a dict, zero where there is padding:
            logits (B,T,C)   before the softmax of (5): what the loss takes
            P      (B,T,C)   P_t (5)
            A_T    (B,T)     the time attention (8) after the last frame; in training after (10)
            A_o    (B,T,K)   the object attention (2)
        """
        B, T, K = F_O.shape[:3]
        FF = torch.cat([F_A, F_S], -1)               # (B,T,2413)  "the concatenation of" both
        real = real_frames(FF, lengths)              # (B,T)    1, or 0 for padding
        there, F_O_bar = mean_object(F_O)            # (B,T,K)  1, or 0 for a missing object [R3]; (B,T,84)
        frame = torch.arange(T, device=FF.device)    # (T,)     to pick entry t
        h1 = c1 = h2 = c2 = FF.new_zeros(B, self.W_p.in_features)         # (B,H)  before the first frame
        P = FF.new_zeros(B, self.W_p.out_features)   # (B,C)    before frame 1: the paper's P_0 = 0 [R4]
        G_o = FF.new_zeros(B, K)                     # stays so, every object alike, if T.Focus is alone [R9]
        E = real                                     # (B,T)    exp(G_T) of (8): G_T = 0 at first [R5]; 0 in padding
        outputs = []
        for t in range(T):
            # "LSTM.S accepts not only the average of all object features F_o_bar, but also the hidden values
            # on time dimension from LSTM.T (h2 of t-1)" (3.2.1)
            F_o, F_o_bar = F_O[:, t], F_O_bar[:, t]
            if self.o_focus:
                h1, c1 = self.LSTM_S(torch.cat([F_o_bar, h2], -1), (h1, c1))      # (4)  (B,H)  [R1]
                # "G_oi is the glimpse features of the objects"
                G_o = torch.tanh(self.W_oh(h1) + self.W_of(F_o).squeeze(-1))      # (3)  (B,K)  [R2]
            # "A_o is the attention value of each object at frame t"
            A_o = focus(G_o, there[:, t])                                         # (2)  (B,K)  [R3]
            # "The weighted objects' features F_o_hat is calculated by"
            F_o_hat = (A_o.unsqueeze(-1) * F_o).sum(1)                            # (1)  (B,84)

            # "we use the three modality features of frame t to update the attentions A_T of the entire time
            # series of the video": "S_t is concatenation of the three extracted features" (3.2.2)
            S_t = torch.cat([F_o_hat, F_A[:, t], F_S[:, t]], -1)                  #      (B,2497)
            # "G_T is the glimpse feature of the time"; frame t gives entry t of it [R5]. h2 is of t-1
            G_t = torch.tanh(self.W_Th(h2) + self.W_Tf(S_t))                      # (9)  (B,1)
            E = torch.where(frame == t, G_t.exp() * real, E)                      # (8)  (B,T)  exp(G_T): entry t is new
            # "A_T is the time attention value", a softmax over the video's frames
            A_T = E / E.sum(1, keepdim=True)                                      # (8)  (B,T)
            # "the video features weighted by time attention F_t"
            F_t = (A_T.unsqueeze(-1) * FF).sum(1)                                 # (7)  (B,2413)
            # "LSTM.T accepts the prediction at the last frame (P_{t-1}) and the video features"
            h2, c2 = self.LSTM_T(torch.cat([P, F_t], -1), (h2, c2))               # (6)  (B,H)  [R4]
            # "predict emotions of the current state P_t"
            logits = self.W_p(h2)                                                 # (5)  (B,C)
            P = torch.softmax(logits, -1)                                         # (5)  (B,C)

            # "we add the attention scrambler on time series during the training stage. The adjacent attention
            # weights A_T will be mixed after each prediction." Both lines use the old weights [R6]
            if self.training and t > 0:
                beta = 1 - (1 - self.beta) * real[:, t]                           #      (B,)   1, no mixing, in padding
                old, A_T = A_T, A_T.clone()                                       #      a copy
                A_T[:, t - 1] = beta * old[:, t - 1] + (1 - beta) * old[:, t]     # (10)
                A_T[:, t] = (1 - beta) * old[:, t - 1] + beta * old[:, t]         # (10)
                E = A_T * E.sum(1, keepdim=True)                                  #      the mixture lasts [R6]
            outputs.append((logits, P, A_o))
        logits, P, A_o = (torch.stack(v, 1) * real.unsqueeze(-1) for v in zip(*outputs))  # (B,T,...) each
        return dict(logits=logits, P=P, A_T=A_T, A_o=A_o)


def focus(G, there):
    """Softmax (2) over the objects there, zero if none is [R3]. G (...,K) is a tanh or zero: exp(G) cannot overflow."""
    e = G.exp() * there
    return e / e.sum(-1, keepdim=True).clamp(min=1e-9)


def real_frames(F, lengths):
    """1 for the frames of a video, 0 for padding: F (B,T,...), lengths (B,), None without padding -> (B,T)."""
    B, T = F.shape[:2]
    lengths = torch.as_tensor([T] * B if lengths is None else lengths, device=F.device)
    return (torch.arange(T, device=F.device) < lengths[:, None]).to(F.dtype)


def mean_object(F_O):
    """F_O (...,K,84) -> 1 for an object, 0 for a row of zeros [R3] (...,K); F_O_bar, the mean of those there (...,84)."""
    there = (F_O.abs().sum(-1) != 0).to(F_O.dtype)
    return there, F_O.sum(-2) / there.sum(-1, keepdim=True).clamp(min=1)


class Pooling(nn.Module):
    """ "For Max and Average pooling, we uniformly sample 10 frames from visual features for pooling" (Table 2), then
    a linear softmax [R11]. how: "max" or "avg". Used as DFAN is; every frame has the same P and attention."""

    def __init__(self, how, d_action, d_scene, classes):
        super().__init__()
        self.how, self.W = how, nn.Linear(d_action + d_scene, classes)

    def forward(self, F_A, F_S, F_O, lengths=None):
        FF = torch.cat([F_A, F_S], -1)
        real, there = real_frames(FF, lengths).unsqueeze(-1), mean_object(F_O)[0]  # (B,T,1), (B,T,K)
        T = real.sum(1)  # (B,1)  the videos' own
        ten = (2 * torch.arange(10, device=FF.device) + 1) * T.long() // 20  # (B,10)  middles of ten parts
        FF = FF.gather(1, ten.unsqueeze(-1).expand(-1, -1, FF.shape[-1]))  # (B,10,2413)
        logits = self.W(FF.amax(1) if self.how == "max" else FF.mean(1)).unsqueeze(1) * real  # (B,T,C)
        P, A_o = torch.softmax(logits, -1) * real, focus(torch.zeros_like(there), there) * real
        return dict(logits=logits, P=P, A_T=real.squeeze(-1) / T, A_o=A_o)


def loss_fn(logits, labels, lengths):
    """Cross-entropy of P_t, averaged over a video's frames, then over videos [R7]. (B,T,C), (B,), (B,) -> scalar."""
    real = real_frames(logits, lengths)  # (B,T)
    frames = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, None].expand(real.shape), reduction="none")
    return ((frames * real).sum(1) / lengths).mean()


def vote(P, lengths):
    """ "During the inference stage, we count the predictions of the last ten frames and select the emotion that
    appears the most as the final prediction." (4.1) A tie goes to the higher sum [R8]. (B,T,C), (B,) -> (B,)."""
    emotions = []
    for P_video, n in zip(P, lengths):
        last = P_video[max(0, n - LAST_FRAMES):n]  # (10,C), or fewer
        counts = torch.bincount(last.argmax(-1), minlength=P.shape[-1])
        emotions.append(torch.where(counts == counts.max(), last.sum(0), -1).argmax())
    return torch.stack(emotions)


# ---- 4.1 The two protocols, training and evaluation ----

def make_splits(data, args):
    """The (training, validation) positions of each run.
    Ekman: "The dataset provides the training and validation splits." VideoEmotion: "our experiments are conducted
    ten times. Each time we randomly choose 2/3 of the data for training and another 1/3 for validation." (4.1)"""
    lists = []
    for path in args.split:
        found, missing = read_list(path, data.ids)
        lists.append(found)
        if missing:
            MARKS.append(f"{len(missing)} MISSING")
            say(f"missing  {path}: {', '.join(missing[:5])}, ...; there are {data.ids[0]}, ...")
    splits = list(zip(lists[::2], lists[1::2]))
    with about(" ".join(args.split) or args.data):
        splits = splits or [  # 2/3 of each class [R12]
            next(StratifiedShuffleSplit(1, train_size=2 / 3, random_state=seed).split(data.ids, data.labels))
            for seed in range(args.seed, args.seed + 10)]
        for number, parts in enumerate(splits):
            for name, part in zip(("training", "validation"), parts):
                counts = np.bincount([data.labels[i] for i in part], minlength=len(data.classes))
                line = f"split {number}  {name} {len(part)}: " + ", ".join(f"{c} {n}" for c, n in zip(data.classes, counts))
                say(line)
                assert counts.all(), f"a class without a video: {line}"
            both = sorted(set(parts[0]) & set(parts[1]))
            assert not both, f"in both lists of split {number}: {data.ids[both[0]]}"
    return splits


def batches(data, videos, args, standard, rng=None, epoch=0):
    """Yields [F_A, F_S, F_O], padded with zeros, lengths (B,), labels (B,), positions; an rng shuffles the batches."""
    stretch = rng.uniform(1, 1.15, len(videos)) if rng else np.ones(len(videos))
    order = [i for _, i in sorted((data.lengths[i] * s, i) for i, s in zip(videos, stretch))]
    starts = np.arange(0, len(order), args.batch)
    for start in rng.permutation(starts) if rng else starts:
        batch = order[start:start + args.batch]
        inputs = [as_inputs(data.load(i, epoch)[0], args.features, args.objects, standard) for i in batch]
        F = [nn.utils.rnn.pad_sequence(v, batch_first=True).to(args.device) for v in zip(*inputs)]
        lengths, labels = (torch.tensor([v[i] for i in batch], device=args.device) for v in (data.lengths, data.labels))
        yield F, lengths, labels, batch


def run(number, data, train, test, args):
    """Trains and evaluates one split, seed --seed + number; the same command goes on where it stopped.
    Returns the scores of the LAST epoch and what `attention` says. Each epoch writes --out/run<number>.pt."""
    settings, path, saved = resume(number, data, train, test, args)
    history = saved.get("history", [])
    outputs = None
    torch.manual_seed(settings["seed"])
    standard = saved["standard"] if saved else None if args.raw else column_statistics(data, train, args)
    model = make_network(settings, args.literal).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    for epoch in range(len(history) + 1, args.epochs + 1):
        start, total, right = time.monotonic(), 0., 0
        model.train()
        rng = np.random.default_rng([settings["seed"], epoch])
        for F, lengths, labels, batch in batches(data, train, args, standard, rng, epoch):
            out = model(*F, lengths)
            loss = loss_fn(out["logits"], labels, lengths)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            total += loss.item() * len(batch)
            right += (vote(out["P"], lengths) == labels).sum().item()
        if not np.isfinite(total):
            raise InputError(f"{path}: the loss is {total} in epoch {epoch}; lower --lr ({args.lr})")
        outputs, scores = evaluate(model, data, test, args, standard)
        now = {"loss": total / len(train), "training accuracy": right / len(train)} | scores
        seconds = time.monotonic() - start
        say(f"run {number}  epoch {epoch:3d}/{args.epochs}  "
            + "  ".join(f"{name} {v:.4f}" for name, v in now.items() if name != "confusion")
            + f"  {seconds:.1f} s, {seconds * (args.epochs - epoch):.0f} s left", every_rank=True)
        history.append(now)
        torch.save(dict(settings=settings, model=model.state_dict(), optimizer=optimizer.state_dict(), standard=standard,
                        history=history), buffer := io.BytesIO())
        write_whole(path, buffer.getvalue())
    outputs = outputs or evaluate(model, data, test, args, standard)[0]  # finished before
    return history[-1] | dict(seed=settings["seed"], checkpoint=str(path), attention=attention(data, outputs))


@torch.no_grad()
def evaluate(model, data, videos, args, standard):
    """Each video's outputs, numpy, without padding; accuracy (4.1), the mean of the classes' own, confusion (figure 3)."""
    model.eval()
    outputs, emotions = {}, {}
    for F, lengths, _, batch in batches(data, videos, args, standard):
        out = model(*F, lengths)
        emotions |= zip(batch, vote(out["P"], lengths).tolist())
        for b, i in enumerate(batch):
            outputs[i] = {name: v[b, :lengths[b]].cpu().numpy() for name, v in out.items()}
    labels, emotions = np.array([(data.labels[i], emotions[i]) for i in videos]).T
    confusion = confusion_matrix(labels, emotions, labels=range(len(data.classes)), normalize="true")
    return outputs, dict(accuracy=float(np.mean(labels == emotions)), macro=float(confusion.diagonal().mean()),
                         confusion=confusion.tolist())


def protocol(data, splits, args):
    """The scores of all runs: "The average of recognition accuracies over ten experiments" (4.1), or --runs seeds."""
    rank, world, _ = ranks()  # torchrun's processes share the runs out
    numbers = range(rank, max(args.runs, len(splits)), world)
    mine = {n: run(n, data, *splits[n % len(splits)], args) for n in numbers}
    results = {n: r for part in gather(mine) for n, r in part.items()}
    return [results[n] for n in sorted(results)]


# ---- Here the paper's part ends. What follows is the same network, fast, then data and tools. ----

class Fast(DFAN):
    """DFAN with O(T) work in place of O(T^2), by two identities, both exact.
    W F_t + b = sum_i A_Ti (W FF_i + b), as the A_Ti sum to 1: one product for all frames, before the loop.
    (7), (8) are num / den, sums of e_i (W FF_i + b) and of e_i = exp(G_Ti): frame t changes e_t, (10) also e_{t-1}."""

    def forward(self, F_A, F_S, F_O, lengths=None):
        FF, C, linear = torch.cat([F_A, F_S], -1), self.W_p.out_features, nn.functional.linear
        real = real_frames(FF, lengths).unsqueeze(-1)  # (B,T,1)
        there, F_o_bar = mean_object(F_O)  # (B,T,K), (B,T,84)
        W_P, W_FF = self.LSTM_T.weight_ih.split([C, FF.shape[-1]], -1)
        W_T = torch.cat([W_P, self.LSTM_T.weight_hh], -1)  # on [P; h2]
        T_in = linear(FF, W_FF, self.LSTM_T.bias_ih + self.LSTM_T.bias_hh)  # (B,T,4H)  of (6)
        W_F_o, W_S = self.W_Tf.weight.split([F_O.shape[-1], FF.shape[-1]], -1)
        G_FF = linear(FF, W_S, self.W_Tf.bias)  # (B,T,1)  of (9)
        G_object = F_O @ W_F_o[0]  # (B,T,K)  of (9)
        G_F_o = self.W_of(F_O).squeeze(-1) if self.o_focus else there  # (B,T,K)  of (3)
        num, den, E = (real * T_in).sum(1), real.sum(1), list(real.unbind(1))
        frames = (v.unbind(1) for v in (T_in, real, there, F_o_bar, G_FF, G_object, G_F_o))  # v[:, t] is slow backwards
        T_in, real_t, there, F_o_bar, G_FF, G_object, G_F_o = frames
        h1 = c1 = h2 = c2 = FF.new_zeros(len(FF), self.W_p.in_features)
        P, G_o, outputs = FF.new_zeros(len(FF), C), torch.zeros_like(there[0]), []
        for t in range(len(T_in)):
            if self.o_focus:
                h1, c1 = self.LSTM_S(torch.cat([F_o_bar[t], h2], -1), (h1, c1))  # (4)
                G_o = torch.tanh(self.W_oh(h1) + G_F_o[t])  # (3)
            A_o = focus(G_o, there[t])  # (2)
            G_hat = (A_o * G_object[t]).sum(-1, keepdim=True)  # (1)  times W_Tf
            e_t = torch.tanh(self.W_Th(h2) + G_hat + G_FF[t]).exp() * real_t[t]  # (9)
            rise, E[t] = e_t - E[t], e_t
            num, den = num + rise * T_in[t], den + rise  # (7), (8)
            i, f, g, o = torch.addmm(num / den, torch.cat([P, h2], -1), W_T.T).chunk(4, -1)  # (6)
            c2 = torch.sigmoid(f) * c2 + torch.sigmoid(i) * torch.tanh(g)
            h2 = torch.sigmoid(o) * torch.tanh(c2)
            logits = self.W_p(h2)  # (5)
            P = torch.softmax(logits, -1)  # (5)
            if self.training and t > 0:
                mixed = (1 - self.beta) * real_t[t] * (E[t] - E[t - 1])  # (10)
                E[t - 1], E[t] = E[t - 1] + mixed, E[t] - mixed
                num = num + mixed * (T_in[t - 1] - T_in[t])
            outputs.append((logits, P, A_o))
        logits, P, A_o = (torch.stack(v, 1) * real for v in zip(*outputs))
        return dict(logits=logits, P=P, A_T=torch.cat(E, -1) / den, A_o=A_o)


def make_network(settings, literal):
    fusion, shape, C = settings["fusion"], settings["shape"], len(settings["classes"])
    if fusion in ("max", "avg"):
        return Pooling(fusion, *shape[:2], C)
    return (DFAN if literal else Fast)(*shape, settings["hidden"], C, settings["beta"], fusion == "dual")


# ---- Data: feature files, the planted set, split lists ----

SUFFIXES = tuple(".mp4 .avi .mkv .webm .mov .flv .wmv .m4v .mpg .mpeg .3gp .ts".split())


def as_inputs(F, features, objects, standard=None):
    """F_A: a video's first array, F_S: the others (only FF counts), F_O: the top K. Objects alone: FF := F_O_bar [R10]."""
    F_O = F["objects"][:, :objects] if "objects" in features else torch.zeros(len(F[features[0]]), 0, 0)
    series = [F[name] for name in features if name != "objects"] or [mean_object(F_O)[1]]
    FF, d_action = torch.cat(series, -1), series[0].shape[-1]
    if standard is not None:
        FF = (FF - standard[0]) * standard[1]
    return FF[:, :d_action], FF[:, d_action:], F_O


def column_statistics(data, train, args):
    """Mean and 1 / deviation (0 for a constant) of FF's columns over the training videos' frames: (2,D)."""
    columns = StandardScaler()
    for i in train:
        columns.partial_fit(torch.cat(as_inputs(data.load(i)[0], args.features, args.objects)[:2], -1).double())
    return torch.tensor(np.stack([columns.mean_, (columns.var_ > (1e-6 * columns.mean_) ** 2) / columns.scale_])).float()


def read_features(path, names):
    """The arrays of an .npz, float32: objects (T,K,D), others (T,D); and a dict of what else it says."""
    with about(path, "damaged, or other --features?"), np.load(path, allow_pickle=False) as f:
        F = {name: torch.from_numpy(f[name].astype(np.float32)) for name in names}
        other = {k: f[k].astype(v) for k, v in (("frames", int), ("seconds", float), ("inside", bool)) if k in f}
        shapes = {name: tuple(v.shape) for name, v in (F | other).items()}
        same = len({shape[0] for shape in shapes.values()}) == 1 and len(F[names[0]]) > 0
        assert same and all(v.dim() == 2 + (k == "objects") for k, v in F.items()), f"not (T,D), (T,K,D) of one T: {shapes}"
        assert all(v.isfinite().all() for v in F.values()), "NaN or infinity"
        settings = json.loads(str(f["settings"])) if "settings" in f else {}
        settings.pop("opencv", None)  # recorded, not compared
        if settings.get("random_weights") is not None and "RANDOM WEIGHTS" not in MARKS:
            MARKS.append("RANDOM WEIGHTS")
        return F, other | dict(settings=settings)


class Features:
    """The files <class>/<name>.npz of a folder, each checked here and read when needed."""

    def __init__(self, folder, names):
        self.paths = sorted(Path(folder).glob("[!.]*/[!.]*.npz"))
        with about(folder):
            assert self.paths, f"no <class>/<name>.npz; for videos: python extract_features.py {folder} feats/"
        self.names, self.inside, self.lengths = names, {}, []
        self.ids = [f"{p.parent.name}/{p.stem}" for p in self.paths]
        self.classes = sorted(p.name for p in Path(folder).glob("[!.]*") if p.is_dir())
        self.labels = [self.classes.index(p.parent.name) for p in self.paths]
        for i, path in enumerate(self.paths):
            F, other = self.load(i)
            made = other["settings"] | {name: v.shape[1:] for name, v in F.items()}
            first = first if i else made
            if differs := [k for k in made | first if made.get(k) != first.get(k)]:
                raise InputError(f"{path}: other {', '.join(differs)} than {self.paths[0]}")
            self.lengths.append(len(F[names[0]]))
            self.inside[i] = other.get("inside")
        self.extraction = other["settings"]

    def load(self, i, epoch=0):
        return read_features(self.paths[i], self.names)


class Planted:
    """A built-in set on which both focuses are needed: T = 24 frames of K = 8 objects, drawn anew in each epoch.
    Four two-frame snippets carry the action pattern of an emotion, one the true one's. Only there is the first object a
    confident "key" (class 0, 0.95); all others are weak detections (0.05 to 0.5) of five classes, 0 among them."""
    T, K, TRAIN, TEST = 24, 8, 1000, 500
    classes, extraction = ["anger", "disgust", "fear", "joy", "sadness", "surprise"], {}

    def __init__(self, seed):
        n = self.TRAIN + self.TEST
        self.seed, self.labels, self.lengths = seed, [i % 6 for i in range(n)], [self.T] * n
        self.ids = [f"{self.classes[label]}/{i}" for i, label in enumerate(self.labels)]
        self.patterns = 1.5 * np.random.default_rng([seed, 0]).standard_normal((6, 32))
        self.inside = {i: self.load(i)[1]["inside"] for i in range(self.TRAIN, n)}

    def load(self, i, epoch=0):
        rng, T, K = np.random.default_rng([self.seed, 1, epoch if i < self.TRAIN else 0, i]), self.T, self.K
        F_A, F_S, F_O = rng.standard_normal((T, 32)), rng.standard_normal((T, 8)), np.zeros((T, K, 84))
        np.put_along_axis(F_O, rng.integers(0, 5, (T, K, 1)), rng.uniform(0.05, 0.5, (T, K, 1)), 2)
        F_O[:, :, 80:] = np.sort(rng.uniform(0, 1, (T, K, 2, 2)), 2).reshape(T, K, 4)
        others = [c for c in rng.permutation(6) if c != self.labels[i]][:3]
        snippets = rng.permutation(T // 2)[:4]
        for snippet, emotion in zip(snippets, [self.labels[i], *others]):
            F_A[2 * snippet:2 * snippet + 2] += self.patterns[emotion]
        inside = np.arange(T) // 2 == snippets[0]
        F_O[inside, 0, :80] = 0.95 * np.eye(80)[0]
        return {name: torch.tensor(v).float() for name, v in zip(FEATURES, (F_A, F_S, F_O))}, dict(inside=inside)


def read_list(path, ids):
    """Positions in ids of the videos that a split list names, and the names that are not there.
    A line: class/name, or a name that one class alone has; suffix and label may follow, not believed."""
    same = lambda name: unicodedata.normalize("NFC", name.replace("\\", "/"))
    bare = lambda name: name[:name.rindex(".")] if name.lower().endswith(SUFFIXES) else name
    known, found, missing = defaultdict(list), [], []
    for i, identity in enumerate(map(same, ids)):
        for name in {identity, identity.split("/")[-1]}:
            known[name].append(i)
    with about(path, "name lists with --split TRAIN TEST"):
        for line in filter(None, map(str.strip, Path(path).read_text(encoding="utf-8-sig").split("\n"))):
            names = [same(line), same(re.sub(r"\s+\d+$", "", line))]
            hits = next((known[n] for n in (*names, *map(bare, names)) if n in known), [])
            found += hits if len(hits) == 1 else []
            missing += [names[1]] if len(hits) != 1 else []
    return list(dict.fromkeys(found)), missing


class InputError(Exception):
    """A failure that the user can mend, in one line that names the file."""


@contextlib.contextmanager
def about(path, remedy=""):
    """Whatever goes wrong inside becomes an InputError: the path, the reason, the remedy."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        if not isinstance(error, AssertionError):
            reason = reason.split(". ")[0][:300]  # a library's first sentence
        raise InputError(f"{path}: {reason}" + f"; {remedy}" * bool(remedy)) from error


MARKS = []  # "SYNTHETIC", "RANDOM WEIGHTS", "LEAKED", "3 MISSING": they end every line with a number


def say(line, every_rank=False):
    """Prints a line, marked; of torchrun's processes the first prints, unless every_rank."""
    if every_rank or ranks()[0] == 0:
        print("  ".join([line, *MARKS]), flush=True)


def write_whole(path, content):
    """Writes bytes beside their place, then renames: the old file or the new one, whole."""
    with about(path, "make room, or choose another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.parent / f".{os.getpid()}.part"
        part.write_bytes(content)
        part.replace(path)


def load_checkpoint(path):
    """What `run` saved; no code of it runs."""
    with about(path, "train first; if damaged, delete it"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        assert saved["settings"]
        return saved


def resume(number, data, train, test, args):
    """A run's settings, the path of its checkpoint, and the checkpoint or {}: it is used wherever it lies in --out."""
    settings = {k: vars(args)[k] for k in "hidden lr batch beta fusion features objects raw".split()} | dict(
        seed=args.seed + number, classes=data.classes, extraction=data.extraction,
        shape=[v.shape[-1] for v in as_inputs(data.load(train[0])[0], args.features, args.objects)],
        videos=[[data.ids[i] for i in part] for part in (train, test)])
    path = Path(args.out, f"run{number}.pt")
    for other in sorted(path.parents[bool(args.reproduce)].rglob(path.name), key=lambda p: p != path):
        saved = load_checkpoint(other)
        differs = [k for k in settings if saved["settings"].get(k) != settings[k]]
        differs += ["epochs"] * (len(saved["history"]) > args.epochs)
        if not differs:
            say(f"run {number}  goes on from {other}, epoch {len(saved['history'])}", every_rank=True)
            return settings, other, saved
        if other == path:
            raise InputError(f"{path}: trained with other {', '.join(differs)}; choose another --out")
    return settings, path, {}


# ---- Section 4: tables and figures ----

BOTH = (53.34, 57.37)  # accuracies in %: VideoEmotion, Ekman, as the paper prints them
ROWS = {  # what: (row, the settings that make it, the paper's accuracies or None)
    "table1": [("action", dict(features=("action",), fusion="time"), (51.51, 56.42)),
               ("scene", dict(features=("scene",), fusion="time"), (39.08, 45.47)),
               ("objects", dict(features=("objects",)), (18.74, 23.16)),
               ("action+scene", dict(features=("action", "scene"), fusion="time"), (52.78, 56.88)),
               ("all", {}, BOTH)],
    "table2": [("Max. Pool", dict(fusion="max"), (49.48, 53.12)), ("Avg. Pool", dict(fusion="avg"), (50.02, 54.28)),
               ("T.Focus", dict(fusion="time"), (51.88, 55.93)), ("T.Focus + O.Focus", {}, BOTH)],
    "figure2": [(f"top {K} objects", dict(objects=K), None) for K in (2, 4, 8, 16)],
    **dict.fromkeys(("figure3", "figure4"), [("T.Focus + O.Focus", {}, BOTH)])}


def report(what, data, splits, args):
    """Trains the rows of a table or figure, or the one of the options (what None): {row: what results.json says of it}."""
    found, lines = {}, []
    for row, changed, paper in ROWS.get(what, [("result", {}, None)]):
        out = f"{args.out}/{row.replace(' ', '')}" if what else args.out
        cell = argparse.Namespace(**vars(args) | changed | dict(out=out))
        results = protocol(data, splits, cell)
        for name in dict.fromkeys(name for r in results for name in r["attention"]):
            numbers = [r["attention"][name] for r in results if name in r["attention"]]
            means = {k: np.mean([n[k] for n in numbers]) for k in numbers[0]}
            say(f"{row:<18}  {name}: " + "  ".join(f"{k} {v:.3f}" for k, v in means.items())
                + "  nearly uniform" * bool(means.get("max/min", 2) < 1.3))
        found[row] = dict(settings=vars(cell), marks=MARKS, classes=data.classes, runs=results)
        values = {name: np.array([r[name] for r in results]) for name in ("accuracy", "macro")}
        if what:
            first = values["accuracy"] if len(found) == 1 else first
            values["minus first row"] = values["accuracy"] - first
        lines.append(f"{row:<18}")
        for name, v in values.items():
            found[row][name] = dict(mean=v.mean(), std=v.std(ddof=len(v) > 1))
            lines[-1] += f"  {name} {100 * v.mean():5.2f} ± {100 * v.std(ddof=len(v) > 1):.2f}"
        lines[-1] += f"  paper {paper[args.dataset == 'ekman']}" if paper else ""
    counts = np.bincount([data.labels[i] for i in splits[0][1]], minlength=len(data.classes))
    say(f"{'true / predicted':<18}videos" + "".join(f"{c:>14}" for c in data.classes))  # figure 3, the last row's
    for c, n, values in zip(data.classes, counts, np.mean([r["confusion"] for r in results], 0)):
        say(f"  {c:<16}{n:>6}" + "".join(f"{v:>14.2f}" for v in values))
    if what == "figure4":  # the first validation video of each class
        saved = load_checkpoint(results[0]["checkpoint"])
        for i in {data.labels[i]: i for i in reversed(splits[0][1])}.values():
            show(data.ids[i], Path(args.out, f"figure4-{data.ids[i].replace('/', '-')}"), *data.load(i), saved, args)
    for line in (f"{what or 'last epoch'}: in %, mean ± standard deviation, n = {len(results)}", *lines):
        say(line)
    return found


def limit_of(m, n):
    """The most attention that m of n can get: G is a tanh, so no weight is more than e^2 times another."""
    return m * np.e / (m * np.e + (n - m) / np.e)


def attention(data, outputs):
    """{what: {who: number}} of the validation videos: medians of the most attended, mean shares in segments."""
    rows = defaultdict(list)
    for i, out in outputs.items():
        inside, A_o, K = data.inside.get(i), out["A_o"], out["A_o"].shape[-1]
        for name, As in (("frame", out["A_T"][None]), ("object", A_o)):
            for w in (A[A > 0] for A in As if (A > 0).sum() > 1):
                rows[f"most attended {name}"].append({
                    "times uniform": w.max() * len(w), "limit": limit_of(1, len(w)) * len(w), "max/min": w.max() / w.min()})
        if inside is not None and 0 < inside.mean() < 1:
            rows["segments"].append(dict(
                A_T=out["A_T"][inside].sum(), uniform=inside.mean(), limit=limit_of(inside.sum(), len(inside))))
        if isinstance(data, Planted) and A_o.size:
            rows["planted object"].append(dict(A_o=A_o[inside, 0].mean(), uniform=1 / K, limit=limit_of(1, K)))
    return {name: {who: float((np.median if name.startswith("most") else np.mean)([v[who] for v in row])) for who in row[0]}
            for name, row in rows.items()}


def show(source, target, F, other, saved, args, video=None):
    """Prints what a checkpoint's network sees in a video; writes <target>.json and <target>.png."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights as weights
    names = [name for name in weights.COCO_V1.meta["categories"] if name not in ("__background__", "N/A")]
    settings, classes, objects = saved["settings"], saved["settings"]["classes"], []
    with about(source, "are its features like the training's?"):
        model = make_network(settings, args.literal).eval()
        model.load_state_dict(saved["model"])
        F_A, F_S, F_O = as_inputs(F, settings["features"], settings["objects"], saved["standard"])
        with torch.no_grad():
            out = {name: v[0].numpy() for name, v in model(F_A[None], F_S[None], F_O[None]).items()}
    P, A_T = out["P"], out["A_T"] * len(F_A)
    seconds, frames = (np.array(other.get(name, range(len(P)))).tolist() for name in ("seconds", "frames"))
    for A_o, F_o in zip(out["A_o"], F_O.numpy()):  # another detector's columns are unknown
        there = [k for k in (-A_o).argsort(kind="stable") if A_o[k] > 0 and F_o.shape[-1] == 84]
        objects.append([dict(name=names[F_o[k, :80].argmax()], probability=float(F_o[k, :80].max()), A_o=float(A_o[k]),
                             times_uniform=float(A_o[k] * len(there)), box=F_o[k, 80:].tolist()) for k in there])
    best = [part[A_T[part].argmax()] for part in np.array_split(range(len(P)), min(4, len(P)))]  # of each quarter
    moments = [dict(seconds=seconds[t], frame=frames[t], times_uniform=float(A_T[t]), objects=objects[t][:3]) for t in best]
    last = dict(zip(classes, P[-LAST_FRAMES:].mean(0).tolist()))
    found = dict(video=str(source), emotion=classes[vote(torch.tensor(P[None]), [len(P)])[0]], probabilities=last,
                 moments=moments, marks=MARKS, seconds=seconds, frames=frames, A_T=out["A_T"].tolist(),
                 P=dict(zip(classes, P.T.tolist())), objects=objects)
    flat = ", attention nearly uniform" * bool(A_T.max() < 1.3 * A_T.min())
    say(f"{source}: {found['emotion']}  (mean of the last frames: "
        + ", ".join(f"{c} {100 * p:.1f} %" for c, p in sorted(last.items(), key=lambda pair: -pair[1])) + f"){flat}")
    for m in sorted(moments, key=lambda m: -m["times_uniform"])[:3]:
        say(f"  {m['seconds']:7.1f} s  attention {m['times_uniform']:.2f} times uniform: " + ", ".join(
            f"{o['name']} {o['probability']:.2f} ({o['times_uniform']:.2f})" for o in m["objects"]))
    write_whole(Path(f"{target}.json"), json.dumps(found).encode())
    title = "  ".join([f"{source}: {found['emotion']}{flat}", *MARKS])
    draw(Path(f"{target}.png"), title, A_T, P, found, video, other.get("inside", np.zeros(len(P), bool)))
    say(f"  {target}.png, {target}.json")


def draw(path, title, A_T, P, found, video, inside):
    """Figure 4: the moments' frames, A_T and P over time. A box is grey at uniform attention, green at 4 times."""
    with about(path, "pictures need cv2; on a server: pip install opencv-python-headless"):
        import cv2
    (T, C), image, moments = P.shape, np.full((900, 1600, 3), 255, np.uint8), found["moments"]
    frames = [] if video else [np.full((270, 384, 3), 90, np.uint8)] * 4
    os.environ["OPENCV_FFMPEG_READ_ATTEMPTS"] = "1000000"
    decoder, number, failed = video and cv2.VideoCapture(os.path.abspath(video), cv2.CAP_FFMPEG), 0, 0
    while len(frames) < len(moments) and failed < 200:  # past damaged packets
        ok, frame = decoder.read()
        frames += [frame] if ok and number == moments[len(frames)]["frame"] else []
        number, failed = number + ok, 0 if ok else failed + 1

    def write(text, x, y, colour=(30, 30, 30), thick=1):  # cv2's fonts are ASCII
        cv2.putText(image, text.encode("ascii", "replace").decode(), (int(x), int(y)), 0, 0.7, colour, thick, cv2.LINE_AA)

    write(title, 12, 32)
    for left, moment, frame in zip(range(12, 1600, 396), moments, frames):
        scale = min(384 / frame.shape[1], 270 / frame.shape[0])
        small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        h, w = small.shape[:2]
        image[46:46 + h, left:left + w] = small
        for x, y in ((left, 420), (100 + 1480 * found["frames"].index(moment["frame"]) // T, 716)):
            write(f"{moment['seconds']:.1f} s", x, y)
        for rank, o in enumerate(moment["objects"], 1):
            green = np.clip((o["times_uniform"] - 1) / 3, 0, 1)
            x1, y1, x2, y2 = (np.array(o["box"]) * [w, h, w, h] + [left, 46, left, 46]).astype(int).tolist()
            cv2.rectangle(image, (x1, y1), (x2, y2), (170 * (1 - green), 170 + 40 * green, 170 * (1 - green)), 3)
            x, y = min(x1, left + w - 72) + 24 * rank - 20, min(y1, h + 20) + 22
            cv2.rectangle(image, (x - 4, y - 19), (x + 16, y + 5), (0, 0, 0), -1)
            write(str(rank), x, y, (255, 255, 255))
            write(f"{rank} {o['name']} {o['times_uniform']:.2f} x uniform", left, 316 + 26 * rank)
    now, high = np.arange(1480) * T // 1480, max(1.1 * A_T.max(), 2)  # the frame of each column
    curve = image[460:691, 100:1580]
    curve[:, inside[now]] = (190, 240, 250)
    for v in range(int(high) + 1):
        curve[int(230 - 230 * v / high)] = 180
        write(f"{v} x", 40, 697 - 230 * v / high)
    line = np.stack([np.arange(1480), 230 - 230 * A_T[now] / high], 1).astype(int)
    cv2.polylines(curve, [line], False, (220, 90, 30), 2, cv2.LINE_AA)
    write("A_T in times uniform, and P" + "; shaded: a segment" * bool(inside.any()), 100, 452)
    colours = cv2.applyColorMap((np.arange(C)[None] * 255 // C).astype(np.uint8), cv2.COLORMAP_TURBO)[0] * 0.8
    image[730:820, 100:1580] = colours[(np.linspace(0, 1, 90)[:, None, None] > P.cumsum(1)[now, :-1]).sum(-1)]
    for x, name, colour in zip(range(100, 1580, 1480 // C), found["P"], colours.tolist()):
        write(name[:14], x, 859, colour, 2)
    write_whole(path, cv2.imencode(".png", image)[1].tobytes())


def predict(source, saved, args):
    """Shows an .npz, or a video, whose features it extracts as the checkpoint's were."""
    path, video, extraction = Path(source), None, saved["settings"]["extraction"]
    with about(source):
        assert path.is_file() and path.suffix.lower() in (".npz", *SUFFIXES), (
            "not there, or neither an .npz nor a video; of a folder give FOLDER/*.mp4")
        if path.suffix.lower() in SUFFIXES:
            assert "options" in extraction, f"{args.checkpoint} was not trained on features of extract_features.py"
            script = Path(__file__).with_name("extract_features.py")
            line = [sys.executable, script, source, args.out, *extraction["options"], "--device", args.device]
            assert subprocess.run(line).returncode == 0, "no features of it, see above"
            path, video = Path(args.out, f"{path.stem}.npz"), path
        F, other = read_features(path, saved["settings"]["features"])
        assert other["settings"] in ({}, extraction), f"not extracted as the features of {args.checkpoint} were"
    show(source, Path(args.out, path.stem), F, other, saved, args, video)


# ---- Command line ----

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", help="features (default: a planted set)")
    add("--dataset", choices=("videoemotion", "ekman"), default="ekman", help="ten drawn splits, or a fixed one")
    add("--split", nargs="+", default=[], help="TRAIN TEST ... (default: FEATS/*list01.txt)")
    add("--raw", action="store_true", help="features not standardised")
    add("--features", default=",".join(FEATURES), help="arrays of the .npz")
    add("--fusion", choices=("dual", "time", "avg", "max"), help="table 2 (default: dual)")
    add("--objects", type=int, default=OBJECTS, help=f"of a frame, at most (default: {OBJECTS})")
    add("--beta", type=float, default=BETA, help=f"of (10) (default: {BETA})")
    add("--literal", action="store_true", help="the equations as printed (slow)")
    for name, (default, what) in NOT_IN_THE_PAPER.items():
        add(f"--{name}", type=type(default), default=default, help=f"{what} (default: {default})")
    add("--runs", type=int, default=1, help="seeds of one split (default: 1)")
    add("--seed", type=int, default=0, help="of run 0; run i has seed + i")
    add("--device", default=f"cuda:{ranks()[2]}" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--out", default="out", help="default: out; planted set: out/planted")
    add("--reproduce", choices=ROWS, help="a table or figure, beside the paper's")
    add("--predict", nargs="+", default=[], help="videos or .npz")
    add("--checkpoint", default="out/run0.pt", help="of --predict")
    args = parser.parse_args(argv)
    if not args.data and not args.predict:
        parser.set_defaults(**PLANTED, runs=5 if args.reproduce else 1)
        args = parser.parse_args(argv)
    args.features = FEATURES if args.reproduce else tuple(args.features.split(","))
    args.fusion = args.fusion if args.fusion and not args.reproduce else "dual" if "objects" in args.features else "time"
    if args.data and args.dataset == "ekman" and not args.split:
        args.split = [f"{args.data}/{name}list01.txt" for name in ("train", "test")]
    if not all(getattr(args, name) > 0 for name in (*NOT_IN_THE_PAPER, "runs", "objects")) or args.seed < 0:
        parser.error("numbers must be positive; --seed may be 0")
    if not 0 <= args.beta <= 1 or len(args.split) % 2 or not args.data and set(args.features) - set(FEATURES):
        parser.error("--beta must be in [0, 1], --split takes pairs of lists, --features of your own need --data")
    return args


def main(argv=None):
    args = parse_args(argv)
    MARKS[:] = [] if args.data or args.predict else ["SYNTHETIC"]
    with about(f"--device {args.device}"):
        torch.zeros(1, device=args.device)
    if args.predict:
        saved = load_checkpoint(args.checkpoint)
        for source in args.predict:
            predict(source, saved, args)
        return
    data = Features(args.data, args.features) if args.data else Planted(args.seed)
    splits = make_splits(data, args) if args.data else [(range(data.TRAIN), range(data.TRAIN, len(data.ids)))]
    leaked = {data.ids[i] for _, test in splits for i in test} & set(data.extraction.get("tuned_on") or ())
    MARKS.extend([f"{len(leaked)} LEAKED"] * bool(leaked))  # by fine-tuning
    found = report(args.reproduce, data, splits, args)
    out, last = Path(args.out, "results.json"), list(found.values())[-1]
    write_whole(out, json.dumps(found if args.reproduce else last, indent=1).encode())
    more = f"--predict VIDEO --checkpoint {last['runs'][0]['checkpoint']}" if args.data else "--reproduce figure4 --runs 1"
    say(f"written  {out}; next: python dfan.py {more}")


def ranks():
    """torchrun's rank, number of processes and rank on this machine."""
    return tuple(int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def gather(value):
    """[value of each of torchrun's processes], or [value]."""
    values = [value] * ranks()[1]
    with about("torchrun", "another process ended: see its line"):
        if len(values) > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # runs are long
            atexit.register(torch.distributed.destroy_process_group)
        if len(values) > 1:
            torch.distributed.all_gather_object(values, value)
    return values


def command(main):
    """Runs a script's main(), exits with its status; a user's failure becomes one line and status 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names that a terminal cannot show
    try:
        sys.exit(main())
    except (InputError, OSError, KeyboardInterrupt) as failure:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(failure).split()) or 'interrupted'}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    command(main)
