"""Dual Focus Attention Network for Video Emotion Recognition (Qiu, He, Wang; ICME 2020), whole, in one file.

    python dfan.py                                  # no data: a built-in planted set, about a minute
    python dfan.py --data feats/ --dataset ekman    # one given split; videoemotion: ten drawn ones (4.1)
    python dfan.py --predict clip.mp4               # your own video: which emotion, when, where

feats/ is what extract_features.py writes. Figure 1 of the paper, for frame t of a video:

  F_o (K objects) --> mean --> LSTM.S --h1--> O.Focus: A_o over the K objects  (1)-(4)
     |                           ^               ^
     +---------------------------|---------------+-- weighted by A_o --> F_o_hat
                            h2 of t-1                                       |
  F_A, F_S (action, scene) ----------------------> S_t = [F_o_hat; F_A; F_S]
     |                                                |
  FF = [F_A; F_S] of all frames            T.Focus: entry t of G_T, then A_T  (8), (9)  <-- h2 of t-1
     |                                                |   ^
     |                                                |   +-- the scrambler, in training, mixes t-1 and t after P_t  (10)
     +-- weighted by A_T <----------------------------+
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
import base64
import csv
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.preprocessing import StandardScaler
from torch import nn

BETA = 0.6          # "we empirically set beta = 0.6" (3.2.2)
OBJECTS = 16        # "In our implementation, we set K = 16." (3.2.1)
LAST_FRAMES = 10    # "we count the predictions of the last ten frames" (4.1)
FEATURES = ("action", "scene", "objects")    # F_A, F_S, F_O: "three kinds of features" (3.1)
NOT_IN_THE_PAPER = dict(                    # ours, each a flag; PLANTED: on the built-in set, which is small
    hidden=(256, "units H of both LSTMs"), lr=(1e-3, "learning rate of Adam"),
    batch=(16, "videos in a batch"), epochs=(30, "passes over the training videos"))
PLANTED = dict(hidden=32, lr=5e-3, epochs=5, out="out/planted")
CLIP = 1.0          # ours too: the most norm of a gradient


# ---- 3.2 Dual Focus Attention Network ----

class DFAN(nn.Module):
    """ "The Dual Focus Attention (DFA) cell consists of two focus attention modules with two vanilla LSTM
    cells" (3.2), run over the frames of a video (figure 1). o_focus=False: T.Focus alone, a row of Table 2 [R9].
    This class is the complete algorithm; everything in `Fast`, below, is just efficiency: same parameters, same results.
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
        P = FF.new_zeros(B, self.W_p.out_features)   # (B,C)    before frame 1: P_0 = 0 is ours [R4]
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
            F_o_hat = torch.einsum("bk,bkd->bd", A_o, F_o)                        # (1)  (B,84)

            # "we use the three modality features of frame t to update the attentions A_T of the entire time
            # series of the video": "S_t is concatenation of the three extracted features" (3.2.2)
            S_t = torch.cat([F_o_hat, F_A[:, t], F_S[:, t]], -1)                  #      (B,2497)
            # "G_T is the glimpse feature of the time"; frame t gives entry t of it [R5]. h2 is of t-1
            G_t = torch.tanh(self.W_Th(h2) + self.W_Tf(S_t))                      # (9)  (B,1)
            E = torch.where(frame == t, G_t.exp() * real, E)                      # (8)  (B,T)  exp(G_T): entry t is new
            # "A_T is the time attention value", a softmax over the video's frames
            A_T = E / E.sum(1, keepdim=True)                                      # (8)  (B,T)
            # "the video features weighted by time attention F_t"
            F_t = torch.einsum("bt,btd->bd", A_T, FF)                             # (7)  (B,2413)
            # "LSTM.T accepts the prediction at the last frame (P_{t-1}) and the video features"
            h2, c2 = self.LSTM_T(torch.cat([P, F_t], -1), (h2, c2))               # (6)  (B,H)  [R4]
            # "predict emotions of the current state P_t"
            logits = self.W_p(h2)                                                 # (5)  (B,C)
            P = torch.softmax(logits, -1)                                         # (5)  (B,C)

            # "we add the attention scrambler on time series during the training stage. The adjacent attention
            # weights A_T will be mixed after each prediction." Both lines use the old weights [R6]; their sum stays
            if self.training and t > 0:
                beta = 1 - (1 - self.beta) * real[:, t]                           #      (B,)   1, no mixing, in padding
                old, A_T = A_T, A_T.clone()                                       #      a copy
                A_T[:, t - 1] = beta * old[:, t - 1] + (1 - beta) * old[:, t]     # (10)
                A_T[:, t] = (1 - beta) * old[:, t - 1] + beta * old[:, t]         # (10)
                E = A_T * E.sum(1, keepdim=True)                                  #      the mixture lasts [R6], E's sum too
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
        real = real_frames(FF, lengths).unsqueeze(-1)  # (B,T,1)
        there, _ = mean_object(F_O)  # (B,T,K)
        n = real.sum(1)  # (B,1)  the videos' own frames
        ten = (2 * torch.arange(10, device=FF.device) + 1) * n.long() // 20  # (B,10)  middles of ten parts
        FF = FF.gather(1, ten.unsqueeze(-1).expand(-1, -1, FF.shape[-1]))  # (B,10,2413)
        pooled = FF.amax(1) if self.how == "max" else FF.mean(1)
        logits = self.W(pooled).unsqueeze(1) * real  # (B,T,C)
        A_o = focus(torch.zeros_like(there), there) * real
        return dict(logits=logits, P=torch.softmax(logits, -1) * real, A_T=real.squeeze(-1) / n, A_o=A_o)


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
    """The (training, validation) positions of each split.
    Ekman: "The dataset provides the training and validation splits." VideoEmotion: "our experiments are conducted
    ten times. Each time we randomly choose 2/3 of the data for training and another 1/3 for validation." (4.1)"""
    if args.split:
        lists = [read_split(path, data) for path in args.split]
        return list(zip(lists[::2], lists[1::2]))
    splits = []
    for seed in range(args.seed, args.seed + 10):
        draw = StratifiedShuffleSplit(1, train_size=2 / 3, random_state=seed)  # 2/3 of each class [R12]
        with about(args.data, "a split needs three videos of each class"):
            splits.append(next(draw.split(data.ids, data.labels)))
    return splits


def batches(data, videos, args, standard, rng=None):
    """Yields [F_A, F_S, F_O], padded with zeros, lengths (B,), labels (B,), positions.
    Videos of about one length share a batch, as padding costs time; an rng varies which, and the order."""
    length = np.array([data.lengths[i] for i in videos])
    if rng:
        length = length * rng.uniform(1, 1.15, len(length))
    order = np.array(videos)[length.argsort(kind="stable")]
    parts = np.array_split(order, -(-len(order) // args.batch))  # of one size: no video weighs more
    if rng:
        sizes = [len(part) for part in parts]
        rng.shuffle(sizes)
        parts = np.split(order, np.cumsum(sizes)[:-1])
        rng.shuffle(parts)
    for batch in parts:
        batch = batch.tolist()
        inputs = [as_inputs(data.load(i), args.features, args.objects, standard) for i in batch]
        F = [nn.utils.rnn.pad_sequence(v, batch_first=True).to(args.device) for v in zip(*inputs)]
        lengths = torch.tensor([data.lengths[i] for i in batch], device=args.device)
        labels = torch.tensor([data.labels[i] for i in batch], device=args.device)
        yield F, lengths, labels, batch


def run(number, data, train, test, args):
    """Trains and evaluates a split, seed --seed + number, from where it stopped. The accuracy is of the LAST epoch."""
    path = Path(args.out, f"run{number}.pt")
    settings = settings_of(number, data, train, test, args)
    torch.manual_seed(settings["seed"])
    model = make_network(settings).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    history = []
    if path.exists():
        saved = resume(path, settings, args.epochs)
        standard = saved["standard"]
        history = saved["history"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(optimizer.state_dict() | dict(state=saved["state"]))
    else:
        standard = column_statistics(data, train, args)
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.monotonic()
        total = 0.
        model.train()
        rng = np.random.default_rng([settings["seed"], epoch])
        for F, lengths, labels, batch in batches(data, train, args, standard, rng):
            out = model(*F, lengths)
            loss = loss_fn(out["logits"], labels, lengths)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            total += loss.item() * len(batch)
        if not np.isfinite(total):
            raise InputError(f"{path}: the loss is {total}; lower --lr, scale objects")
        _, accuracy = evaluate(model, data, test, args, standard)
        history.append(dict(loss=total / len(train), accuracy=accuracy))
        with about(path), whole(path) as file:  # resumed, the same bytes: no param_groups, JSON
            torch.save(dict(settings=settings, model=model.state_dict(), state=optimizer.state_dict()["state"],
                            standard=standard, history=json.dumps(history), data=args.data), file)
        seconds = time.monotonic() - start
        say(f"{path}  epoch {epoch:3d}/{args.epochs}  loss {total / len(train):.4f}  accuracy {accuracy:.4f}  "
            f"{seconds:.1f} s, {seconds * (args.epochs - epoch):.0f} s left", data.marks)
    outputs, accuracy = evaluate(model, data, test, args, standard)  # also where no epoch was left
    return dict(accuracy=accuracy, seed=settings["seed"], checkpoint=str(path), history=history,
                predictions=predictions(data, outputs))


@torch.no_grad()
def evaluate(model, data, videos, args, standard):
    """{video: its outputs without padding, and its emotion, the vote}; the accuracy (4.1)."""
    model.eval()
    outputs = {}
    for F, lengths, _, batch in batches(data, videos, args, standard):
        out = model(*F, lengths)
        emotions = vote(out["P"], lengths).tolist()
        for b, i in enumerate(batch):
            outputs[i] = {name: v[b, :lengths[b]].cpu().numpy() for name, v in out.items()}
            outputs[i]["emotion"] = emotions[b]
    return outputs, float(np.mean([outputs[i]["emotion"] == data.labels[i] for i in videos]))


def protocol(data, splits, args):
    """The scores of all runs: "The average of recognition accuracies over ten experiments" (4.1), or --runs seeds."""
    numbers = range(max(args.runs, len(splits)))
    return Parallel(args.jobs)(delayed(run)(n, data, *splits[n % len(splits)], args) for n in numbers)


# ---- Here the paper's part ends. Now the same network, fast; data; tools. ----

class Fast(DFAN):
    """DFAN with O(T) work in place of O(T^2): all else is DFAN.forward. Frame t changes E = exp(G_T) at t alone, with
    (10) also at t - 1, so the sums over i of (7) and (8) are carried on. LSTM.T's product with F_t is such a sum:
    W F_t = sum_i A_Ti (W FF_i) = num / den. What multiplies features alone is one product before the loop.
    In float64 the same to 1e-12; in float32 the sums drift by 2e-5 in A_T at T = 400."""

    def forward(self, F_A, F_S, F_O, lengths=None):
        B, T, K, d_object = F_O.shape
        C = self.W_p.out_features
        linear = nn.functional.linear
        FF = torch.cat([F_A, F_S], -1)
        real = real_frames(FF, lengths).unsqueeze(-1)  # (B,T,1)
        there, F_O_bar = mean_object(F_O)  # (B,T,K), (B,T,84)
        if self.o_focus:
            W_S = torch.cat([self.LSTM_S.weight_ih, self.LSTM_S.weight_hh], -1)  # on [F_o_bar; h2; h1]
            b_S = self.LSTM_S.bias_ih + self.LSTM_S.bias_hh
            G_F_o = self.W_of(F_O).squeeze(-1).unbind(1)  # T of (B,K)  of (3)
        W_o, W_FF = self.W_Tf.weight.split([d_object, FF.shape[-1]], -1)
        G_F_o_hat = linear(F_O, W_o).squeeze(-1).unbind(1)  # T of (B,K)  of (1) and (9)
        G_FF = linear(FF, W_FF, self.W_Tf.bias).unbind(1)  # T of (B,1)  of (9)
        W_P, W_F = self.LSTM_T.weight_ih.split([C, FF.shape[-1]], -1)
        W_T = torch.cat([W_P, self.LSTM_T.weight_hh], -1).T  # on [P; h2]
        U = linear(FF, W_F, self.LSTM_T.bias_ih + self.LSTM_T.bias_hh)  # (B,T,4H)  of (6)
        num = (real * U).sum(1)  # (B,4H)  sum_i E_i U_i
        den = real.sum(1)  # (B,1)   sum_i E_i
        U_T = U.unbind(1)  # U[:, t] has a slow gradient
        E = list(real.unbind(1))  # T of (B,1)
        h1 = c1 = h2 = c2 = FF.new_zeros(B, self.W_p.in_features)
        P = FF.new_zeros(B, C)
        G_o = FF.new_zeros(B, K)
        outputs = []
        for t in range(T):
            if self.o_focus:
                h1, c1 = lstm_step(linear(torch.cat([F_O_bar[:, t], h2, h1], -1), W_S, b_S), c1)  # (4)
                G_o = torch.tanh(self.W_oh(h1) + G_F_o[t])  # (3)
            A_o = focus(G_o, there[:, t])  # (2)
            G_o_hat = (A_o * G_F_o_hat[t]).sum(-1, keepdim=True)  # (1)
            G_t = torch.tanh(self.W_Th(h2) + G_o_hat + G_FF[t])  # (9)
            e_t = G_t.exp() * real[:, t]
            rise = e_t - E[t]
            E[t] = e_t
            den = den + rise  # (8)
            num = num + rise * U_T[t]  # (7)
            h2, c2 = lstm_step(torch.addmm(num / den, torch.cat([P, h2], -1), W_T), c2)  # (6)
            logits = self.W_p(h2)  # (5)
            P = torch.softmax(logits, -1)  # (5)
            if self.training and t > 0:
                moved = (1 - self.beta) * real[:, t] * (E[t] - E[t - 1])  # (10)
                E[t - 1] = E[t - 1] + moved
                E[t] = E[t] - moved
                num = num + moved * (U_T[t - 1] - U_T[t])
            outputs.append((logits, P, A_o))
        logits, P, A_o = (torch.stack(v, 1) * real for v in zip(*outputs))
        return dict(logits=logits, P=P, A_T=torch.cat(E, -1) / den, A_o=A_o)


def lstm_step(gates, c):
    """The rest of an nn.LSTMCell, after its products: gates i, f, g, o (B,4H), c (B,H) -> h, c."""
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def make_network(settings):
    """A row of Table 2: fusion "max", "avg", "time" (T.Focus) or "dual" (T.Focus + O.Focus)."""
    *widths, d_object = settings["shape"]
    fusion, classes = settings["fusion"], len(settings["classes"])
    if fusion in ("max", "avg"):
        return Pooling(fusion, *widths, classes)
    return Fast(*widths, d_object, settings["hidden"], classes, settings["beta"], o_focus=fusion == "dual")


# ---- Data: feature files, the planted set, split lists ----

# dimensions of an .npz's arrays; all others have 2, (T,D)
DIMENSIONS = dict(objects=3, seconds=1, frames=1, inside=1, pictures=1, aspect=0, video_bytes=0)


def read_features(path, names, others=()):
    """A video's .npz: arrays `names`, float32 tensors; those of `others` that it has; settings; check sums."""
    with about(path, "give a sound .npz"), np.load(path) as file:
        if not set(names) <= set(file):
            raise InputError(f"holds {file.files}, not all of {names}")
        video = {name: file[name] for name in (*names, *others) if name in file}
        settings = {} | json.loads(str(file.get("settings", "{}")))
        check_sums = [file.zip.getinfo(f"{name}.npy").CRC for name in names]
    T = video[names[0]].shape[:1]
    for name, v in video.items():
        dimensions = DIMENSIONS.get(name, 2)
        finite = v.dtype.kind in "biuf" and float(np.abs(v).max(initial=0)) < 1e30
        if v.ndim != dimensions or v.shape[:1] != T[:dimensions] or not v.size or (name in names and v.ndim < 2):
            raise InputError(f"{path}: {name} {v.shape} is not (T,D), objects (T,K,D), inside (T,), of one T")
        if not finite and name != "pictures":
            raise InputError(f"{path}: {name} ({v.dtype}) is not real, below 1e30")
        if name in names:
            video[name] = torch.from_numpy(v.astype(np.float32))
    return video | dict(settings=settings, check_sums=check_sums)


class Features:
    """The files <class>/<name>.npz of a folder, each checked here and read when needed."""

    def __init__(self, folder, names):
        self.names = names
        folders = [p for p in Path(folder).glob("[!.@]*") if p.is_dir() and p.name != "lost+found"]
        self.classes = sorted(p.name for p in folders)
        self.paths = sorted(p for p in Path(folder).glob("*/[!.]*.npz") if p.parent in folders)
        self.ids = [f"{path.parent.name}/{path.stem}" for path in self.paths]
        self.labels = [self.classes.index(path.parent.name) for path in self.paths]
        if len(self.classes) < 2 or not self.paths:
            raise InputError(f"{folder}: --data takes a folder of <class>/<name>.npz, of two classes or more")
        say(f"reading {len(self.paths)} files of {folder}")
        rows = []
        for path in self.paths:
            video = read_features(path, names)
            made = video["settings"] | dict(options=0) | {name: video[name].shape[1:] for name in names}
            rows.append((len(video[names[0]]), video["check_sums"], made))
            first = rows[0][-1]
            differs = [k for k in made | first if made.get(k) != first.get(k)]
            if differs:
                raise InputError(f"{path}: other {', '.join(differs)} than {self.paths[0]}; make it anew")
        self.lengths, self.check_sums, _ = zip(*rows)
        self.extraction = video["settings"]
        self.marks = []  # printed beside every number
        if self.extraction.get("random_weights") is not None:
            self.marks.append("RANDOM WEIGHTS")

    def load(self, i):
        return read_features(self.paths[i], self.names)


class Planted:
    """A built-in set that needs both focuses. Of 24 frames, four snippets of two carry an emotion's action pattern, one
    of them the true one's. Only there the first of 8 objects is a confident key."""
    TRAIN, TEST, T, K = 4000, 500, 24, 8
    classes = ["anger", "disgust", "fear", "joy", "sadness", "surprise"]
    extraction = dict(object_names=["key", "lamp", "chair", "cup", "door"])

    def __init__(self, seed):
        videos = range(self.TRAIN + self.TEST)
        self.seed = seed
        self.marks = ["SYNTHETIC"]
        self.labels = [i % 6 for i in videos]
        self.ids = [f"{self.classes[i % 6]}/{i}" for i in videos]
        self.lengths = [self.T for i in videos]
        self.check_sums = [[] for i in videos]
        self.patterns = 1.5 * np.random.default_rng(seed).standard_normal((6, 32))

    def load(self, i):
        rng = np.random.default_rng([self.seed, i])
        T, K = self.T, self.K
        F_A = rng.standard_normal((T, 32))
        F_S = rng.standard_normal((T, 8))
        what = np.eye(5)[rng.integers(0, 5, (T, K))]  # (T,K,5)  one of five
        probability = rng.uniform(0.05, 0.5, (T, K, 1))
        box = np.sort(rng.uniform(0, 1, (T, K, 2, 2)), 2).reshape(T, K, 4)
        F_O = np.concatenate([what * probability, box], -1)  # (T,K,9)

        snippets = rng.permutation(T // 2)[:4]
        true = self.labels[i]
        wrong = rng.permutation([c for c in range(6) if c != true])
        for snippet, emotion in zip(snippets, [true, *wrong]):
            F_A[2 * snippet:2 * snippet + 2] += self.patterns[emotion]
        inside = np.arange(T) // 2 == snippets[0]
        F_O[inside, 0, :5] = [0.95, 0, 0, 0, 0]
        video = {name: torch.from_numpy(v).float() for name, v in zip(FEATURES, (F_A, F_S, F_O))}
        return video | dict(inside=inside, settings=self.extraction)


def as_inputs(video, features, objects, standard=None):
    """A video's F_A (T,D), its first array, F_S (T,D), its others (only FF counts), F_O (T,K,D).
    standard: of column_statistics, for FF alone: in F_O a row of zeros is no object [R3]."""
    F_O = torch.zeros(len(video[features[0]]), 0, 0)
    if "objects" in features:
        F_O = video["objects"][:, :objects]  # the most probable come first
    series = [video[name] for name in features if name != "objects"]
    series = series or [mean_object(F_O)[1]]  # objects alone: FF := F_O_bar [R10]
    FF = torch.cat(series, -1)
    if standard is not None:
        mean, scale = standard
        FF = (FF - mean) * scale
    d_action = series[0].shape[-1]
    return FF[:, :d_action], FF[:, d_action:], F_O


def column_statistics(data, train, args):
    """Mean and 1 / deviation of FF's columns in the training videos (2,D)."""
    scaler = StandardScaler()
    for i in train:
        F_A, F_S, _ = as_inputs(data.load(i), args.features, args.objects)
        scaler.partial_fit(torch.cat([F_A, F_S], -1).double())
    rounding = np.maximum(1e-6 * np.abs(scaler.mean_), 1e-30)
    scale = (np.sqrt(scaler.var_) > rounding) / scaler.scale_  # 0 for a constant column
    return torch.tensor(np.stack([scaler.mean_, scale])).float()


SUFFIXES = tuple((".mp4 .avi .mkv .webm .mov .flv .wmv .m4v .mpg .mpeg .3gp .ts .mts .m2ts .ogv .vob .asf .gif .3g2 .f4v "
                  ".divx .mxf .m2v").split())


def read_list(path, ids):
    """Positions in ids of a list's videos, and the names of none or several. A line is class/name, or a name that one
    class alone has; a suffix and a label may follow."""
    positions = defaultdict(list)
    for i, video in enumerate(ids):
        for name in {video, video.split("/")[-1]}:
            positions[name].append(i)
    with about(path, "check the path; --dataset videoemotion needs no list"):
        lines = Path(path).read_text(encoding="utf-8-sig").replace("\\", "/").split("\n")
    found, missing = [], []
    for line in filter(None, map(str.strip, lines)):
        unlabelled = re.sub(r"\s+\d+$", "", line)
        spellings = [line, unlabelled]
        spellings += [os.path.splitext(s)[0] for s in spellings if s.lower().endswith(SUFFIXES)]
        hits = next((positions[s] for s in spellings if s in positions), [])
        if len(hits) == 1:
            found += hits
        else:
            missing.append(unlabelled)
    return list(dict.fromkeys(found)), missing


def read_split(path, data):
    found, missing = read_list(path, data.ids)
    if missing:
        data.marks.append(f"{len(missing)} MISSING of {Path(path).name}")
        say(f"missing  {path}: {missing[:5]}; there is {data.ids[0]}")
    return found


def check_splits(data, splits):
    """Prints each split's counts, refuses a wrong one, marks what fine-tuning has seen."""
    for number, (train, test) in enumerate(splits):
        for name, part in (("training", train), ("validation", test)):
            counts = Counter(data.classes[data.labels[i]] for i in part)
            listed = ", ".join(f"{c} {counts[c]}" for c in data.classes)
            say(f"split {number}  {name} {len(part)}: {listed}")
            lacking = set(data.classes) - set(counts)
            if lacking:
                raise InputError(f"split {number}: no {name} video of {min(lacking)}")
        for i in set(train).intersection(test):
            raise InputError(f"{data.ids[i]}: in both lists of split {number}")
    tested = [data.ids[i] for _, test in splits for i in test]
    leaked = set(tested).intersection(data.extraction.get("tuned_on") or [])
    if leaked:
        data.marks.append(f"{len(leaked)} LEAKED")


# ---- Files and checkpoints ----

class InputError(Exception):
    """What the user can mend: "path: reason; remedy", which `command` prints."""


@contextmanager
def about(path, remedy=""):
    """Around a call that opens, parses or writes a user's file: its exception becomes an InputError."""
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.split("\n")[0].split(". ")[0]
        raise InputError(f"{path}: {reason}; {remedy}".rstrip("; ")) from error


@contextmanager
def whole(path, mode="wb", **form):
    """An open file that becomes `path` if the block succeeds; what killed processes left of it goes."""
    path = Path(path)
    os.makedirs(path.parent, exist_ok=True)
    prefix = f".part-{zlib.crc32(os.fsencode(path.name))}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as folder:
        part = Path(folder, path.name)
        with part.open(mode, **form) as file:  # a claim
            yield file
        part.replace(path)
    for left in path.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)


def write_json(path, content):
    with about(path), whole(path, "w") as file:
        file.write(json.dumps(content, allow_nan=False))  # NaN: from features that overflow


def write_csv(path, rows):
    with about(path), whole(path, "w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file).writerows(rows)


def say(line, marks=()):
    """Prints a line and its marks at once: runs side by side do not mix in it."""
    print("  ".join([line, *marks]) + "\n", end="", flush=True)


def settings_of(number, data, train, test, args):
    """What decides what a run learns, and what a prediction needs."""
    options = ("hidden", "lr", "batch", "beta", "fusion", "features", "objects")
    inputs = as_inputs(data.load(train[0]), args.features, args.objects)
    return {name: getattr(args, name) for name in options} | dict(
        seed=args.seed + number, shape=[v.shape[-1] for v in inputs],
        classes=data.classes, extraction=data.extraction, marks=data.marks,
        training=[data.ids[i] for i in train], validation=[data.ids[i] for i in test],
        feature_files=[data.check_sums[i] for i in (*train, *test)])


def load_checkpoint(path):
    """What `run` saved, checked, and its `network`. Raises InputError."""
    with about(path, "no sound checkpoint; give another --checkpoint or --out"):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load compares no check sums
        saved = torch.load(path, map_location="cpu", weights_only=True)
        lacking = {"state", "standard", "features", "objects", "extraction", "marks"} - {*saved, *saved["settings"]}
        if damaged or lacking or not all(v.isfinite().all() for v in saved["model"].values()):
            raise InputError("damaged")
        saved["history"] = json.loads(saved["history"])
        saved["network"] = make_network(saved["settings"]).eval()
        saved["network"].load_state_dict(saved["model"])
    return saved


def resume(path, settings, epochs):
    """The checkpoint to go on from: of these settings, no more epochs."""
    saved = load_checkpoint(path)
    differs = [k for k in settings if k != "marks" and saved["settings"].get(k) != settings[k]]
    if len(saved["history"]) > epochs:
        differs.append("epochs")
    if differs:
        raise InputError(f"{path}: trained with other {', '.join(differs)}; choose another --out")
    return saved


# ---- Section 4: tables and figures ----

# The rows of Table 2. Table 1 is --features, figure 2 --objects; figure 3 is always printed
ROWS = {"Max. Pool": "max", "Avg. Pool": "avg", "T.Focus": "time", "T.Focus + O.Focus": "dual"}


def train_rows(data, splits, args):
    """{row: what its runs return}. The rows of Table 2 have folders of their own."""
    if args.reproduce != "table2":
        return dict(result=protocol(data, splits, args))
    scores = {}
    for row, fusion in ROWS.items():
        if fusion == "dual" and "objects" not in args.features:
            say(f"left out  {row}: no objects in --features")
            continue
        changed = dict(fusion=fusion, out=f"{args.out}/{fusion}")
        scores[row] = protocol(data, splits, argparse.Namespace(**vars(args) | changed))
    return scores


def predictions(data, outputs):
    """[[video, true, predicted, each class's probability: mean of the voting frames], ...]"""
    rows = []
    for i, out in outputs.items():
        probabilities = out["P"][-LAST_FRAMES:].mean(0).tolist()
        true = data.classes[data.labels[i]]
        rows.append([data.ids[i], true, data.classes[out["emotion"]], *probabilities])
    return rows


def print_confusion(scores, data):
    """Figure 3, of the last row's runs: true (down) by predicted."""
    row, runs = list(scores.items())[-1]
    true, predicted = zip(*(p[1:3] for r in runs for p in r["predictions"]))
    say(f"{row:<24}   count" + "".join(f"  {c:>12}" for c in data.classes))
    for c, n in zip(data.classes, confusion_matrix(true, predicted, labels=data.classes)):
        say(f"{c:<24}  {n.sum():>6}" + "".join(f"  {v:>12.2f}" for v in n / n.sum()), data.marks)


def print_table(scores, splits, data):
    """Table 2, or one row: the last epoch's accuracies."""
    say("accuracy in %: mean ± deviation of n runs; to the row above: mean ± standard error")
    overlap = np.mean([len(test) / len(train) for train, test in splits]) if len(splits) > 1 else 0
    above = None
    for row, runs in scores.items():
        n = len(runs)
        accuracy = 100 * np.array([r["accuracy"] for r in runs])
        line = f"{row:<24}  n = {n}  accuracy {accuracy.mean():.2f}"
        if n > 1:
            line += f" ± {accuracy.std(ddof=1):.2f}"
        if above is not None:
            gain = accuracy - above
            line += f"  to the row above {gain.mean():+.2f}"
            if n > 1:  # corrected after Nadeau and Bengio (2003)
                line += f" ± {np.sqrt((1 / n + overlap) * gain.var(ddof=1)):.2f}"
        say(line, data.marks)
        above = accuracy


def write_results(path, scores, data, args):
    """A .json, of one shape for all; predictions.csv beside it."""
    write_json(path, dict(args=vars(args), classes=data.classes, marks=data.marks, rows=scores))
    table = [["row", "run", "video", "true", "predicted", *data.classes]]
    for row, runs in scores.items():
        for number, one in enumerate(runs):
            table += [[row, number, *prediction] for prediction in one["predictions"]]
    write_csv(path.with_name("predictions.csv"), table)


# ---- What, when, where: a video's prediction and its picture (figure 4) ----

def look(video, saved):
    """What a checkpoint's network sees in a video: its .json. Attention: times uniform."""
    settings = saved["settings"]
    made, wanted = (v | dict(options=None) for v in (video["settings"], settings["extraction"]))
    shape = [v.shape[-1] for v in as_inputs(video, settings["features"], settings["objects"])]
    if (video["settings"] and made != wanted) or shape != settings["shape"]:
        raise InputError("not made as the checkpoint's features; make it anew")
    F_A, F_S, F_O = as_inputs(video, settings["features"], settings["objects"], saved["standard"])
    with torch.no_grad():
        out = saved["network"](F_A[None], F_S[None], F_O[None])
    P, A_T, A_o = out["P"][0], out["A_T"][0], out["A_o"][0]
    T, classes = len(P), settings["classes"]
    frames = video.get("frames", np.arange(T)).tolist()
    seconds = video.get("seconds", np.array([])).tolist()
    quarters = torch.arange(T).tensor_split(min(4, T))  # a moment: the most attended frame of each
    return dict(
        emotion=classes[vote(out["P"], [T])[0]], marks=settings["marks"],
        probabilities=dict(zip(classes, P[-LAST_FRAMES:].mean(0).tolist())),
        frames=frames, seconds=seconds,
        times=[f"{s:.1f} s" for s in seconds] or [f"frame {n}" for n in frames],
        attention=(A_T * T).tolist(),
        P=dict(zip(classes, P.T.tolist())),
        objects=[objects_of(F_o, A, settings) for F_o, A in zip(F_O, A_o)],
        moments=[int(q[A_T[q].argmax()]) for q in quarters])


def objects_of(F_o, A_o, settings):
    """A frame's objects, most attended first. F_o (K,D): probabilities of object_names, x1, y1, x2, y2."""
    names = settings["extraction"].get("object_names", [])
    if not names or F_o.shape[-1] != len(names) + 4:  # own features
        return []
    there = int(A_o.count_nonzero())
    objects = []
    for k in A_o.argsort(descending=True, stable=True)[:there]:
        probability, best = F_o[k, :-4].max(0)
        objects.append(dict(
            name=names[best], probability=float(probability),
            attention=float(A_o[k] * there), box=F_o[k, -4:].tolist()))
    return objects


def captions(seen, t):
    """A moment and its first three objects, a line each."""
    objects = seen["objects"][t]
    lines = [f"{seen['times'][t]}, attention {seen['attention'][t]:.2f} x"]
    for rank, o in enumerate(objects[:3], 1):
        lines.append(f"{rank} {o['name']} {o['probability']:.2f}, attention {o['attention']:.2f} x")
    if len(objects) > 1 and objects[0]["attention"] < 1.3:
        lines.append("objects nearly uniform")
    return lines


def print_look(seen):
    likely = Counter(seen["probabilities"]).most_common()
    listed = ", ".join(f"{c} {100 * p:.1f} %" for c, p in likely)
    say(f"{seen['video']}: {seen['emotion']}  (mean of the last frames: {listed})", seen["marks"])
    for t in seen["moments"]:
        say("  " + "; ".join(captions(seen, t)), seen["marks"])


def draw(seen, video):
    """Figure 4, an SVG in pieces. In own units a frame is `aspect` by 1, a panel T wide."""
    title = "  ".join([f"{seen['video']}: {seen['emotion']}", *seen["marks"]])
    A_T = {"attention over time, times uniform": seen["attention"]}
    yield '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1600 890" font-family="sans-serif" font-size="21">'
    yield '<rect width="1600" height="890" fill="white"/>'
    yield text(20, 32, title)
    for column, t in enumerate(seen["moments"]):
        yield from draw_moment(20 + 396 * column, t, seen, video)
    yield from draw_panel(465, 200, A_T, 2 * np.ceil(max(seen["attention"]) / 2), seen, video)
    yield from draw_panel(735, 115, seen["P"], 1, seen, video)
    yield "</svg>"


def text(x, y, words, style=""):
    """Words as XML takes them: no control characters."""
    words = "".join(c if c.isprintable() else "?" for c in words)
    return f'<text x="{x}" y="{y}" {style}>{html.escape(words)}</text>'


def draw_moment(left, t, seen, video):
    """A frame, its boxes, its objects in words. "The saturation degrees of the green boxes indicate the attentions of
    the objects": none at uniform attention, full at four times. Thin: all nearly uniform."""
    aspect = float(video.get("aspect", 16 / 9))
    lines = captions(seen, t)
    yield f'<svg x="{left}" y="50" width="372" height="240" viewBox="0 0 {aspect} 1">'
    yield f'<rect width="{aspect}" height="1" fill="dimgrey"/>'
    if "pictures" in video:
        jpeg = base64.b64encode(video["pictures"][t]).decode()
        yield f'<image width="{aspect}" height="1" href="data:image/jpeg;base64,{jpeg}"/>'
    for rank, o in enumerate(seen["objects"][t][:3], 1):
        x1, y1, x2, y2 = np.multiply(o["box"], [aspect, 1, aspect, 1])
        green = 100 * np.clip((o["attention"] - 1) / 3, 0, 1)
        thick = 0.004 if "objects nearly uniform" in lines else 0.015
        yield (f'<rect x="{x1:.3f}" y="{y1:.3f}" width="{x2 - x1:.3f}" height="{y2 - y1:.3f}" fill="none" '
               f'stroke="hsl(120,{green:.0f}%,60%)" stroke-width="{thick}"/>')
        style = 'font-size=".1" fill="white" stroke="black" stroke-width=".02" paint-order="stroke"'
        yield text(x1 + 0.01, y1 + 0.09, str(rank), style)
    yield "</svg>"
    for n, line in enumerate(lines):
        yield text(left, 316 + 26 * n, line)


def draw_panel(y, height, curves, high, seen, video):
    """Curves over the frames, {name: T values up to high}: "The blue curve illustrates the attentions along the time
    dimension". Shaded: annotated segments."""
    left, width, T = 70, 1470, len(seen["times"])
    shade = "".join(f"M{t} 0h1v{high}h-1z" for t in np.flatnonzero(video.get("inside", [])))
    grid = "".join(f"M{t + .5} 0v{high}" for t in seen["moments"])
    thin = 'vector-effect="non-scaling-stroke"'
    yield (f'<svg x="{left}" y="{y}" width="{width}" height="{height}" viewBox="0 0 {T} {high}" '
           'preserveAspectRatio="none" fill="none">')
    yield f'<path d="{shade}" fill="moccasin"/>'
    yield f'<path d="M0 0h{T}M0 {high / 2}h{T}M0 {high}h{T}{grid}" stroke="lightgrey" {thin}/>'
    colors = [f"hsl({220 + 360 * n // len(curves)},70%,40%)" for n in range(len(curves))]
    for color, values in zip(colors, curves.values()):
        steps = "h1V".join(f"{high - v:.3f}" for v in values)
        yield f'<path d="M0 {steps}h1" stroke="{color}" stroke-width="3" {thin}/>'
    yield "</svg>"
    for n, (color, name) in enumerate(zip(colors, curves)):
        yield text(left + width * n / len(curves), y - 10, name, f'fill="{color}"')
    for part in (0, 0.5, 1):
        t = round(part * (T - 1))
        yield text(left - 8, y + 7 + height * (1 - part), f"{part * high:.3g}", 'text-anchor="end"')
        yield text(left + width * (t + .5) / T, y + height + 22, seen["times"][t], 'text-anchor="middle"')


def show(source, target, video, saved):
    """Prints and writes (.json, .svg) what `look` says, and returns it."""
    seen = dict(video=source) | look(video, saved)
    write_json(f"{target}.json", seen)
    print_look(seen)
    picture = "".join(draw(seen, video))
    with about(f"{target}.svg"), whole(f"{target}.svg", "w", encoding="utf-8") as file:
        file.write(picture)
    say(f"  written  {target}.svg, {target}.json")
    return seen


def predict(args):
    """Shows each video or .npz, past bad ones. Returns the status."""
    names = [Path(source).stem for source in args.predict]
    for name, n in Counter([*names, "results", "table2", "figure4"]).items():
        if n > 1:
            raise InputError(f"--predict {name}: two of one name, or a results file's")
    saved = load_checkpoint(args.checkpoint)
    clips = [source for source in args.predict if source.lower().endswith(SUFFIXES)]
    if clips:
        script = Path(__file__).resolve().with_name("extract_features.py")
        like = ["--like", args.checkpoint, "--device", args.device, "--"]
        subprocess.run([sys.executable, script, *like, *clips, args.out])
    rows = [["clip", "emotion", *saved["settings"]["classes"], "most attended", "marks"]]
    for source, name in zip(args.predict, names):
        path = f"{args.out}/{name}.npz" if source in clips else source
        try:
            video = read_features(path, saved["settings"]["features"], DIMENSIONS)
            if source in clips and video.get("video_bytes") != os.path.getsize(source):
                raise InputError(f"{path} was made from another video; choose another --out")
            seen = show(source, f"{args.out}/{name}", video, saved)
        except (InputError, OSError) as error:
            say(f"FAILED   {source}: {error}")
            continue
        most = seen["times"][np.argmax(seen["attention"])]
        rows.append([source, seen["emotion"], *seen["probabilities"].values(), most, " ".join(seen["marks"])])
    if len(rows) > 1:
        write_csv(f"{args.out}/predicted.csv", rows)
    return int(len(rows) - 1 < len(args.predict))


# ---- Command line ----

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage="dfan.py [options]", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", help=f"folder of features; else a planted set, with {PLANTED}")
    add("--dataset", choices=("ekman", "videoemotion"), default="ekman", help="one given split, or ten drawn")
    add("--split", nargs="+", default=[], help="TRAIN TEST ...; else DATA/*list01.txt")
    add("--features", default=",".join(FEATURES), help="arrays of the .npz")
    numbers = NOT_IN_THE_PAPER | dict(
        beta=(BETA, "of equation (10)"), objects=(OBJECTS, "a frame, at most"), jobs=(1, "runs at once"),
        seed=(0, "of run 0; run i has seed + i"), runs=(1, "of one split; table2 without --data: 5"))
    for name, (default, what) in numbers.items():
        add(f"--{name}", type=type(default), default=default, help=what)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="not of an .npz")
    add("--out", default="out", help="folder of results")
    add("--reproduce", choices=["table2"], help="all its rows")
    add("--predict", nargs="+", default=[], help="videos or .npz")
    add("--checkpoint", default="out/run0.pt", help="of --predict")
    args = parser.parse_args(argv)
    if not args.data and not args.predict:
        parser.set_defaults(**PLANTED, runs=5 if args.reproduce else 1)
        args = parser.parse_args(argv)
    changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    args.features = tuple(args.features.split(","))
    args.fusion = "dual" if "objects" in args.features else "time"
    check_args(args, changed)
    if args.data and args.dataset == "ekman" and not args.split:
        args.split = [f"{args.data}/trainlist01.txt", f"{args.data}/testlist01.txt"]
    return args


def check_args(args, changed):
    """Refuses what cannot be obeyed. changed: the options not as by default."""
    obeyed = dict(
        data=args.data, dataset=args.data and not args.split, split=args.data, checkpoint=args.predict,
        runs=args.dataset == "ekman" and len(args.split) in (0, 2),
        objects="objects" in args.features)
    if args.predict:
        obeyed = dict.fromkeys(vars(args), False) | dict(predict=True, checkpoint=True, device=True, out=True)
    for name in sorted(changed):
        if not obeyed.get(name, True):
            raise InputError(f"--{name}: has no effect here")
    ranges = dict(beta=(0, 1), lr=(1e-30, 1), seed=(0, 2 ** 31), jobs=(1, 1000), hidden=(1, 10 ** 5))
    for name, value in vars(args).items():
        least, most = ranges.get(name, (1, 10 ** 9))
        if type(value) in (int, float) and not least <= value <= most:
            raise InputError(f"--{name} {value}: from {least} to {most}")
    if not args.data and not set(args.features) <= set(FEATURES):
        raise InputError(f"--features {','.join(args.features)}: not of the planted set")
    if args.data and Path(args.out).resolve().is_relative_to(Path(args.data).resolve()):
        raise InputError(f"--out {args.out}: lies in --data")
    with about(f"--device {args.device}"):
        torch.zeros(1, device=args.device)
    with about(f"--out {args.out}", "choose another"):
        os.makedirs(args.out, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    if len(args.split) % 2:
        raise InputError("--split: takes pairs of lists, TRAIN TEST ...")
    for n, path in enumerate(args.split):  # a shell sorts VE_1_Testset.list first
        wrong = ("test", "train")[n % 2]
        if re.search(f"(?<![a-z]){wrong}", Path(path).name.lower()):
            raise InputError(f"--split {path}: {wrong} in its name; TRAIN goes before TEST")


def main(argv=None):
    """Returns the exit status."""
    args = parse_args(argv)
    if args.predict:
        return predict(args)
    if args.data:
        data = Features(args.data, args.features)
        splits = make_splits(data, args)
    else:
        data = Planted(args.seed)
        splits = [(range(data.TRAIN), range(data.TRAIN, len(data.ids)))]
    check_splits(data, splits)
    scores = train_rows(data, splits, args)
    path = Path(args.out, f"{args.reproduce or 'results'}.json")
    write_results(path, scores, data, args)
    print_confusion(scores, data)
    print_table(scores, splits, data)
    say(f"written  {path}, predictions.csv")
    if not args.data and not args.reproduce:
        one = scores["result"][0]
        reached = "as expected" if one["accuracy"] > 0.9 else "below 0.9, unlike the defaults"
        say(f"accuracy {one['accuracy']:.3f}: {reached}", data.marks)
        show(data.ids[-1], f"{args.out}/figure4", data.load(len(data.ids) - 1), load_checkpoint(one["checkpoint"]))
    return 0


def command(main):
    """Runs main, ends with its status; what a user can mend: one line, status 2."""
    if hasattr(sys.stdout, "reconfigure"):  # Jupyter's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # names that a terminal cannot show
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if not re.search("MemoryError|out of memory|allocate|excessive memory", repr(error)):
            raise
        print("no memory left; try a smaller --batch, less at once", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    command(main)
