"""Dual Focus Attention Network for Video Emotion Recognition (Qiu, He, Wang; ICME 2020), whole, in one file.

    python dfan.py                                        # no data: a built-in planted set, about a minute
    python dfan.py --data feats/ --dataset ekman          # one fixed split (4.1)
    python dfan.py --data feats/ --dataset videoemotion   # ten random 2/3-1/3 splits, mean accuracy (4.1)
    python dfan.py --data feats/ --reproduce table2       # a table or figure of section 4, beside the paper's
    python dfan.py --predict clip.mp4 --checkpoint out/run0.pt    # your own video: which emotion, when, where

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

How to read it. Names are the paper's letters: in F_O the capital O is the whole video, in F_o the small one a frame;
hat and bar are suffixes; the blackboard-bold F (action and scene together) is FF. A line that computes an equation
bears its number, (1) to (10). [R1] to [R15] are rows of the README's table "Where the paper is silent or ambiguous".
Text in quotation marks is the paper's. Code counts frames from 0, the paper from 1.

    B videos in a batch   T frames (the longest of the batch)   K objects a frame   H hidden units   C emotions
    F_A (B,T,2048)   F_S (B,T,365)   F_O (B,T,K,84)   FF (B,T,2413)   A_o (B,T,K)   A_T (B,T)   P (B,T,C)
"""
import argparse
import contextlib
import csv
import datetime
import hashlib
import io
import json
import os
import re
import secrets
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

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

BETA = 0.6                                  # "we empirically set beta = 0.6" (3.2.2)
LAST_FRAMES = 10                            # "we count the predictions of the last ten frames" (4.1)
FEATURES = ("action", "scene", "objects")   # F_A, F_S, F_O: "three kinds of features" (3.1)
NOT_IN_THE_PAPER = dict(                    # ours: (default, on the planted set, what it is); each is a flag
    hidden=(256, 32, "hidden units H of both LSTMs"),
    lr=(1e-3, 5e-3, "learning rate of Adam"),
    batch=(16, 16, "videos in a batch"),
    epochs=(30, 20, "passes over the training videos"))
CLIP = 1.0                                  # ours too: largest norm of the gradient
PADDED_FRAMES = 16000                       # and the most frames in a batch, which bounds the memory


# ---- 3.2 Dual Focus Attention Network ----

class DFAN(nn.Module):
    """ "The Dual Focus Attention (DFA) cell consists of two focus attention modules with two vanilla LSTM
    cells" (3.2), run over the frames of a video (figure 1).

    d_action, d_scene, d_object: widths of the features (2048, 365, 84 in the paper; any will do); beta of (10).
    o_focus=False is T.Focus alone, a row of Table 2 [R9]. This class is the complete algorithm. `Fast`, below,
    has the same parameters and gives the same results; everything else there is just efficiency.
    """

    def __init__(self, d_action, d_scene, d_object, hidden, classes, beta=BETA, o_focus=True):
        super().__init__()
        d_FF = d_action + d_scene
        self.beta, self.o_focus = beta, o_focus
        if o_focus:
            self.W_oh = nn.Linear(hidden, 1, bias=False)                # (3)
            self.W_of = nn.Linear(d_object, 1)                          # (3)  its bias is b_o
            self.LSTM_S = nn.LSTMCell(d_object + hidden, hidden)        # (4)  on [F_o_bar; h2] [R1]
        self.W_p = nn.Linear(hidden, classes)                           # (5)  its bias is b_p
        self.LSTM_T = nn.LSTMCell(classes + d_FF, hidden)               # (6)  on [P; F_t] [R4]
        self.W_Th = nn.Linear(hidden, 1, bias=False)                    # (9)
        self.W_Tf = nn.Linear(d_object + d_FF, 1)                       # (9)  on S_t; its bias is b_T

    def forward(self, F_A, F_S, F_O, lengths=None):
        """F_A (B,T,d_action), F_S (B,T,d_scene), F_O (B,T,K,d_object), lengths (B,) of the videos, T if None.

        An object whose features are all zero is not there [R3]. Frames from a video's length on are padding:
        whatever finite numbers they hold change nothing. Returns a dict, zero where there is padding:
            logits (B,T,C)   before the softmax of (5): what the loss takes
            P      (B,T,C)   P_t (5)
            A_T    (B,T)     the time attention (8) as it stands after the last frame
            A_o    (B,T,K)   the object attention (2)
        """
        B, T, K = F_O.shape[:3]
        FF = torch.cat([F_A, F_S], -1)               # (B,T,2413)  "the concatenation of" both
        real = real_frames(FF, lengths)              # (B,T)    1, or 0 for padding
        there = objects_there(F_O)                   # (B,T,K)  1, or 0 for a missing object [R3]
        F_O_bar = mean_object(F_O, there)            # (B,T,84)
        frame = torch.arange(T, device=FF.device)    # (T,)
        h1 = c1 = h2 = c2 = FF.new_zeros(B, self.W_p.in_features)
        P = FF.new_zeros(B, self.W_p.out_features)   # P_0 = 0 [R4]
        G_o = FF.new_zeros(B, K)                     # stays so, every object alike, if T.Focus is alone [R9]
        E = real                                     # (B,T)  exp(G_T); G_T starts at 0, uniform [R5]
        outputs = []
        for t in range(T):
            # "LSTM.S accepts not only the average of all object features F_o_bar, but also the hidden values
            # on time dimension from LSTM.T (h2 of t-1)" (3.2.1)
            F_o, F_o_bar = F_O[:, t], F_O_bar[:, t]
            if self.o_focus:
                h1, c1 = self.LSTM_S(torch.cat([F_o_bar, h2], -1), (h1, c1))        # (4)  (B,H)  [R1]
                # "G_oi is the glimpse features of the objects" (3.2.1)
                G_o = torch.tanh(self.W_oh(h1) + self.W_of(F_o).squeeze(-1))        # (3)  (B,K)  [R2]
            # "A_o is the attention value of each object at frame t" (3.2.1)
            A_o = focus(G_o, there[:, t])                                           # (2)  (B,K)  [R3]
            # "The weighted objects' features F_o_hat is calculated by" (3.2.1)
            F_o_hat = (A_o.unsqueeze(-1) * F_o).sum(1)                              # (1)  (B,84)

            # "we use the three modality features of frame t to update the attentions A_T of the entire time
            # series of the video": "S_t is concatenation of the three extracted features" (3.2.2)
            S_t = torch.cat([F_o_hat, F_A[:, t], F_S[:, t]], -1)                    #      (B,2497)
            # "G_T is the glimpse feature of the time" (3.2.2); frame t gives entry t of it [R5]
            G_t = torch.tanh(self.W_Th(h2) + self.W_Tf(S_t))                        # (9)  (B,1)
            E = torch.where(frame == t, G_t.exp() * real, E)                        #      (B,T)
            # "A_T is the time attention value" (3.2.2), a softmax over all T frames
            A_T = E / E.sum(1, keepdim=True)                                        # (8)  (B,T)
            # "the video features weighted by time attention F_t" (3.2.2)
            F_t = (A_T.unsqueeze(-1) * FF).sum(1)                                   # (7)  (B,2413)
            # "LSTM.T accepts the prediction at the last frame (P_{t-1}) and the video features" (3.2.2)
            h2, c2 = self.LSTM_T(torch.cat([P, F_t], -1), (h2, c2))                 # (6)  (B,H)  [R4]
            # "predict emotions of the current state P_t" (3.2.2)
            logits = self.W_p(h2)                                                   # (5)  (B,C)
            P = torch.softmax(logits, -1)                                           # (5)  (B,C)

            # "we add the attention scrambler on time series during the training stage. The adjacent attention
            # weights A_T will be mixed after each prediction." (3.2.2); both lines use the old weights [R6]
            if self.training and t > 0:
                beta = 1 - (1 - self.beta) * real[:, t]                             #      1 for padding
                old, A_T = A_T, A_T.clone()
                A_T[:, t - 1] = beta * old[:, t - 1] + (1 - beta) * old[:, t]       # (10)
                A_T[:, t] = (1 - beta) * old[:, t - 1] + beta * old[:, t]           # (10)
                E = A_T * E.sum(1, keepdim=True)                                    #      it lasts [R6]
            outputs.append((logits, P, A_o))
        logits, P, A_o = (torch.stack(v, 1) * real.unsqueeze(-1) for v in zip(*outputs))
        return dict(logits=logits, P=P, A_T=A_T, A_o=A_o)


def focus(G, there):
    """Softmax (2) over the objects that are there, zero if none is [R3]: G, there (B,K) -> (B,K).

    G is a tanh, so exp(G) cannot overflow and no maximum need be subtracted.
    """
    e = G.exp() * there
    return e / e.sum(-1, keepdim=True).clamp(min=1e-9)


def real_frames(F, lengths):
    """1 for the frames of a video, 0 for padding: F (B,T,...), lengths (B,) or None -> (B,T)."""
    B, T = F.shape[:2]
    if lengths is None:
        return F.new_ones(B, T)
    lengths = torch.as_tensor(lengths, device=F.device)
    return (torch.arange(T, device=F.device) < lengths[:, None]).to(F.dtype)


def objects_there(F_O):
    """1 for an object, 0 for a row of zeros, "no object" [R3]: (...,K,84) -> (...,K)."""
    return (F_O.abs().sum(-1) != 0).to(F_O.dtype)


def mean_object(F_O, there):
    """F_O_bar, the mean of the objects there, zero if none is [R3]: (...,K,84), (...,K) -> (...,84)."""
    return F_O.sum(-2) / there.sum(-1, keepdim=True).clamp(min=1)


class Pooling(nn.Module):
    """ "For Max and Average pooling, we uniformly sample 10 frames from visual features for pooling" (Table 2).

    Then a linear softmax [R11]. how: "max" or "avg". Arguments and results as DFAN's; each frame has the same P.
    """

    def __init__(self, how, d_action, d_scene, classes):
        super().__init__()
        self.how, self.W = how, nn.Linear(d_action + d_scene, classes)

    def forward(self, F_A, F_S, F_O, lengths=None):
        real, there = real_frames(F_A, lengths), objects_there(F_O)
        lengths = real.sum(1, keepdim=True).long()                                # (B,1)
        middles = 2 * torch.arange(10, device=F_A.device) + 1                     # of ten parts, in twentieths
        ten = middles * lengths // 20                                             # (B,10)
        FF = torch.cat([F_A, F_S], -1)
        FF = FF[torch.arange(len(FF), device=FF.device)[:, None], ten]            # (B,10,2413)
        logits = self.W(FF.amax(1) if self.how == "max" else FF.mean(1))          # (B,C)
        logits = logits.unsqueeze(1) * real.unsqueeze(-1)                         # (B,T,C)
        A_T = torch.zeros_like(real).scatter_add_(1, ten, torch.full(ten.shape, 0.1).to(real))
        A_o = focus(torch.zeros_like(there), there) * real.unsqueeze(-1)          # uniform
        return dict(logits=logits, P=torch.softmax(logits, -1) * real.unsqueeze(-1), A_T=A_T, A_o=A_o)


def loss_fn(logits, labels, lengths):
    """Cross-entropy of P_t, averaged over a video's frames, then over videos [R7]. (B,T,C), (B,), (B,) -> scalar."""
    real = real_frames(logits, lengths)                                           # (B,T)
    labels = labels[:, None].expand(real.shape)
    frames = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")      # (B,T)
    return ((frames * real).sum(1) / lengths).mean()


def vote(P, lengths):
    """ "During the inference stage, we count the predictions of the last ten frames and select the emotion that
    appears the most as the final prediction." (4.1)

    P (B,T,C), lengths (B,) -> (B,) emotions. A tie goes to the higher summed probability [R8].
    """
    emotions = []
    for P_video, n in zip(P, lengths):
        last = P_video[max(0, n - LAST_FRAMES):n]                                 # (10,C), or fewer
        counts = torch.bincount(last.argmax(-1), minlength=P.shape[-1])
        emotions.append(torch.where(counts == counts.max(), last.sum(0), -1).argmax())
    return torch.stack(emotions)


# ---- 4.1 The two protocols, training and evaluation ----

def make_splits(data, args):
    """The (training, validation) positions of each run of the protocol, lists of int. Raises InputError.

    Ekman: "The dataset provides the training and validation splits." VideoEmotion: "our experiments are conducted
    ten times. Each time we randomly choose 2/3 of the data for training and another 1/3 for validation." (4.1)
    """
    splits = []
    if args.dataset == "videoemotion" and not args.split:
        for seed in range(args.seed, args.seed + 10):
            with about(args.data, "each class needs three videos or more"):
                draw = StratifiedShuffleSplit(1, train_size=2 / 3, random_state=seed)    # of each class [R12]
                splits += [tuple(v.tolist() for v in part) for part in draw.split(data.ids, data.labels)]
    for path, other in zip(args.split[::2], args.split[1::2]):
        splits.append((listed(path, data, args), listed(other, data, args)))
        both = set(splits[-1][0]) & set(splits[-1][1])
        if both:
            raise InputError(f"{other}: {data.ids[min(both)]} is in {path} too; a video cannot be in both")
    for number, parts in enumerate(splits):
        for part, name in zip(parts, ("training", "validation")):
            counts = np.bincount([data.labels[i] for i in part], minlength=len(data.classes))
            named = ", ".join(f"{c} {n}" for c, n in zip(data.classes, counts))
            if 0 in counts:
                raise InputError(f"{args.data}: run {number} has a class without a {name} video ({named})")
            say(f"split {number}  {name} {len(part)}: {named}")
    return splits


def make_batches(videos, lengths, args, rng=None):
    """Lists of at most --batch videos of similar length, and at most PADDED_FRAMES; shuffled with an rng.

    The rng also stretches each length by up to 15 %, so that batches differ from epoch to epoch.
    """
    stretch = 1 + (rng.uniform(0, 0.15, len(videos)) if rng else np.zeros(len(videos)))
    batches = [[]]
    for _, i in sorted((lengths[i] * s, i) for i, s in zip(videos, stretch)):
        batch = batches[-1] + [i]
        if len(batch) > args.batch or len(batch) * max(lengths[j] for j in batch) > PADDED_FRAMES:
            batches.append([i])
        else:
            batches[-1] = batch
    return [batches[n] for n in rng.permutation(len(batches))] if rng else batches


def load_batches(data, batches, args, standard, epoch=0):
    """Yields F = (F_A, F_S, F_O), padded with zeros, lengths (B,), labels (B,), positions of each batch."""
    for batch in batches:
        videos = [as_inputs(data.load(i, epoch), args, standard) for i in batch]
        F = [nn.utils.rnn.pad_sequence(v, batch_first=True).to(args.device) for v in zip(*videos)]
        lengths, labels = (torch.tensor([v[i] for i in batch], device=args.device) for v in (data.lengths, data.labels))
        yield F, lengths, labels, batch


def run(number, data, train, test, args):
    """Trains and evaluates one split, seed --seed + number; the same command goes on where it stopped.

    Returns the scores of the LAST epoch and, beside them, "best": (accuracy, epoch), "seed", "attention".
    After each epoch --out/run<number>.pt holds model, optimizer, settings, classes, history and the like.
    """
    seed = args.seed + number
    torch.manual_seed(seed)
    standard = None if args.raw else column_statistics(data, train, args)
    settings = settings_of(data, train, test, args, seed)
    model = make_network(settings["shape"], len(data.classes), args).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    path, history = resume(number, settings, args, model, optimizer)
    labels, outputs = [data.labels[i] for i in test], None
    for epoch in range(len(history) + 1, args.epochs + 1):
        start, total, right = time.monotonic(), 0., 0
        model.train()
        batches = make_batches(train, data.lengths, args, np.random.default_rng([seed, epoch]))
        for F, lengths, y, batch in load_batches(data, batches, args, standard, epoch):
            out = model(*F, lengths)
            loss = loss_fn(out["logits"], y, lengths)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            total += loss.item() * len(batch)
            right += (vote(out["P"], lengths) == y).sum().item()
        if not np.isfinite(total):
            raise InputError(f"run {number}: the loss is {total} in epoch {epoch}; lower --lr ({args.lr})")
        outputs = evaluate(model, data, test, args, standard)
        emotions = [out["emotion"] for out in outputs]
        history.append(dict(loss=total / len(train), training_accuracy=right / len(train),
                            seconds=time.monotonic() - start, **scores(labels, emotions, data.classes)))
        say(epoch_line(number, history, args), every_rank=True)
        if epoch == 1:
            say(f"run {number}  the other epochs take about {(args.epochs - 1) * history[0]['seconds']:.0f} s", True)
        save(path, model=model.state_dict(), optimizer=optimizer.state_dict(), standard=standard, history=history,
             classes=data.classes, extraction=data.extraction, feats=args.data, settings=settings)
    best = max(range(args.epochs), key=lambda i: history[i]["accuracy"])
    outputs = outputs or evaluate(model, data, test, args, standard)          # finished before: read back
    return history[-1] | dict(best=(history[best]["accuracy"], best + 1), seed=seed, checkpoint=str(path),
                              attention=attention(outputs, args), **found_moments(data, test, outputs))


@torch.no_grad()
def evaluate(model, data, videos, args, standard):
    """The network's outputs for each video, numpy arrays without padding, and "emotion", the vote (int)."""
    model.eval()
    outputs = {}
    for F, lengths, _, batch in load_batches(data, make_batches(videos, data.lengths, args), args, standard):
        out = model(*F, lengths)
        for b, (i, emotion) in enumerate(zip(batch, vote(out["P"], lengths))):
            outputs[i] = {name: v[b, :lengths[b]].cpu().numpy() for name, v in out.items()} | dict(emotion=int(emotion))
    return [outputs[i] for i in videos]


def scores(labels, emotions, classes):
    """Accuracy (4.1), macro accuracy (mean of the classes' own), confusion matrix, rows normalised (figure 3)."""
    confusion = confusion_matrix(labels, emotions, labels=range(len(classes)), normalize="true")
    return dict(accuracy=float(np.mean(np.equal(labels, emotions))), macro=float(confusion.diagonal().mean()),
                confusion=confusion.tolist())


def protocol(data, splits, args):
    """The scores of all runs: "The average of recognition accuracies over ten experiments" (4.1).

    torchrun's processes share the runs out, and each gets the scores of all.
    """
    rank, world, _ = ranks()
    numbers = range(rank, max(args.runs, len(splits)), world)
    mine = {n: run(n, data.of_run(n), *splits[n % len(splits)], args) for n in numbers}
    results = {n: r for part in gather(mine) for n, r in part.items()}
    return [results[n] for n in sorted(results)]


# ---- Here the paper's part ends. What follows is data, a faster form of the same network, and tools. ----

# ---- Fast: the same network ----

class Fast(DFAN):
    """DFAN with O(T) work in place of O(T^2), by two identities. Both are exact:

    W F_t + b = sum_i A_Ti (W FF_i + b), since the A_Ti sum to 1: what multiplies a feature is one product for all
    frames, before the loop. And (7), (8) are num / den, two running sums over e_i = exp(G_Ti) of frame i:
    num = sum_i e_i (W FF_i + b), den = sum_i e_i. Frame t changes e_t alone, (10) also e_{t-1}.
    """

    def forward(self, F_A, F_S, F_O, lengths=None):
        FF, H, C = torch.cat([F_A, F_S], -1), self.W_p.in_features, self.W_p.out_features
        d_object, d_FF = F_O.shape[-1], FF.shape[-1]
        real, there = real_frames(FF, lengths).unsqueeze(-1), objects_there(F_O)         # (B,T,1), (B,T,K)
        linear = nn.functional.linear
        W_P, W_F = self.LSTM_T.weight_ih.split([C, d_FF], -1)
        W_T = torch.cat([W_P, self.LSTM_T.weight_hh], -1)                                # on [P; h2]
        T_in = linear(FF, W_F, self.LSTM_T.bias_ih + self.LSTM_T.bias_hh)                # (B,T,4H)  of (6)
        W_Tf_object, W_Tf_FF = self.W_Tf.weight.split([d_object, d_FF], -1)
        G_FF = linear(FF, W_Tf_FF, self.W_Tf.bias).unbind(1)                             # (B,T,1)  of (9)
        G_object = (F_O @ W_Tf_object[0]).unbind(1)                                      # (B,T,K)  of (9)
        if self.o_focus:
            W_F, W_h2 = self.LSTM_S.weight_ih.split([d_object, H], -1)
            W_S = torch.cat([W_h2, self.LSTM_S.weight_hh], -1)                           # on [h2; h1]
            S_in = linear(mean_object(F_O, there), W_F, self.LSTM_S.bias_ih + self.LSTM_S.bias_hh).unbind(1)
            G_F_o = self.W_of(F_O).squeeze(-1).unbind(1)                                 # (B,T,K)  of (3)
        num, den, E = (real * T_in).sum(1), real.sum(1), list(real.unbind(1))
        T_in, real_t, there = T_in.unbind(1), real.unbind(1), there.unbind(1)
        h1 = c1 = h2 = c2 = FF.new_zeros(len(FF), H)
        P, G_o, outputs = FF.new_zeros(len(FF), C), torch.zeros_like(there[0]), []
        for t in range(len(T_in)):
            if self.o_focus:
                h1, c1 = lstm(torch.addmm(S_in[t], torch.cat([h2, h1], -1), W_S.T), c1)  # (4)
                G_o = torch.tanh(self.W_oh(h1) + G_F_o[t])                               # (3)
            A_o = focus(G_o, there[t])                                                   # (2)
            F_o_hat = (A_o * G_object[t]).sum(-1, keepdim=True)                          # (1)  times W_Tf
            e_t = torch.tanh(self.W_Th(h2) + F_o_hat + G_FF[t]).exp() * real_t[t]        # (9)
            rise, E[t] = e_t - E[t], e_t
            num, den = num + rise * T_in[t], den + rise                                  # (7), (8)
            h2, c2 = lstm(torch.addmm(num / den, torch.cat([P, h2], -1), W_T.T), c2)     # (6)
            logits = self.W_p(h2)                                                        # (5)
            P = torch.softmax(logits, -1)                                                # (5)
            if self.training and t > 0:
                mixed = (1 - self.beta) * real_t[t] * (E[t] - E[t - 1])                  # (10)
                E[t - 1], E[t] = E[t - 1] + mixed, E[t] - mixed
                num = num + mixed * (T_in[t - 1] - T_in[t])
            outputs.append((logits, P, A_o))
        logits, P, A_o = (torch.stack(v, 1) * real for v in zip(*outputs))
        return dict(logits=logits, P=P, A_T=torch.cat(E, -1) / den, A_o=A_o)


def lstm(gates, c):
    """One step of nn.LSTMCell from its gates (B,4H), products and biases added, and c (B,H): the new h and c."""
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def make_network(shape, classes, args):
    """The network of --fusion. shape: widths (d_action, d_scene, d_object) of the features; classes: C."""
    if args.fusion in ("max", "avg"):
        return Pooling(args.fusion, *shape[:2], classes)
    Network = DFAN if args.literal else Fast
    return Network(*shape, args.hidden, classes, args.beta, o_focus=args.fusion == "dual")


# ---- Data: feature files, split lists, the planted set ----

SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".3gp", ".ts")


def as_inputs(F, args, standard=None):
    """F_A, F_S, F_O of a video from {name: array} and --features, --objects; the first K objects are the top K.

    The first of the (T,D) arrays is F_A, the others together are F_S: only their concatenation FF counts. Objects
    alone: FF := F_O_bar [R10]. standard: what `column_statistics` returned, or None.
    """
    F_O = F["objects"][:, :args.objects] if "objects" in args.features else torch.zeros(len(next(iter(F.values()))), 0, 0)
    series = [F[name] for name in args.features if name != "objects"] or [mean_object(F_O, objects_there(F_O))]
    FF = torch.cat(series, -1)
    if standard is not None:
        FF = (FF - standard[0]) * standard[1]
    d_action = series[0].shape[-1]
    return FF[:, :d_action], FF[:, d_action:], F_O


def column_statistics(data, train, args):
    """Mean and 1/deviation (0 for a constant) of FF's columns over the training videos' frames: (2,D)."""
    frames, total, squares, first = 0, 0., 0., None
    for i in train:
        FF = torch.cat(as_inputs(data.load(i, 0), args)[:2], -1).double()
        first = FF[0] if first is None else first
        frames, total, squares = frames + len(FF), total + (FF - first).sum(0), squares + ((FF - first) ** 2).sum(0)
    mean = first + total / frames
    deviation = (squares / frames - (total / frames) ** 2).clamp(min=0).sqrt()
    varies = deviation > 1e-6 * mean.abs()                            # above what float32 rounds
    return torch.stack([mean, torch.where(varies, 1 / deviation, 0.)]).float()


def read_features(path, names):
    """{name: tensor float32}, objects (T,K,D), others (T,D), of one .npz file, and what else it holds.

    Raises InputError if it is truncated, holds pickles, lacks an array, or if an array is not finite.
    """
    with about(path, "delete it and run extract_features.py again, or name other arrays with --features"):
        with np.load(path, allow_pickle=False) as f:
            F = {name: torch.from_numpy(f[name].astype(np.float32)) for name in names}
            other = {name: f[name] for name in f.files if name in ("frames", "seconds", "settings", "warning")}
        for name, v in F.items():
            assert v.dim() == 2 + (name == "objects") and len(v) > 0, f"{name} has the shape {tuple(v.shape)}"
            assert len(v) == len(F[names[0]]), f"{name} has {len(v)} frames, {names[0]} {len(F[names[0]])}"
            assert v.isfinite().all(), f"NaN or infinity in {name}"
        settings = json.loads(str(other.get("settings", "{}")))
        return F, other | dict(settings={k: v for k, v in settings.items() if k != "opencv"})


class Features:
    """The .npz files below a folder, <class>/<stem>.npz: ids ("class/stem"), labels, lengths, classes.

    Every file is checked once, here, and read again when a batch needs it. Raises InputError.
    """
    segments = {}                                        # {position: its emotional frames (T,) bool}

    def __init__(self, folder, names):
        found = [p for p in sorted(Path(folder).glob("*/*")) if "." not in (p.name[0], p.parent.name[0])]
        self.paths = [p for p in found if p.suffix == ".npz"]
        if not self.paths:
            videos = any(p.suffix.lower() in SUFFIXES for p in found)
            raise InputError(f"{folder}: no <class>/<name>.npz in it" + (
                f", but videos; extract them: python extract_features.py {folder} feats/" if videos else
                "; --data takes the folder that extract_features.py wrote"))
        self.ids = [f"{p.parent.name}/{p.name[:-4]}" for p in self.paths]
        self.classes = sorted(p.name for p in Path(folder).iterdir() if p.is_dir() and p.name[0] != ".")
        self.labels = [self.classes.index(p.parent.name) for p in self.paths]
        self.names, self.lengths, self.cut_off, self.extraction = names, [], [], None
        for path, identity in zip(self.paths, self.ids):
            F, other = read_features(path, names)
            made = other["settings"] | {"widths": [v.shape[1:] for v in F.values()]}
            self.made = made if not self.lengths else self.made
            differs = sorted(k for k in made | self.made if made.get(k) != self.made.get(k))
            if differs:
                raise InputError(f"{path}: extracted with other {', '.join(differs)} than {self.paths[0]}; extract "
                                 "one of them again")
            self.lengths.append(len(F[names[0]]))
            self.cut_off += [identity] if str(other.get("warning", "")) else []
            self.extraction = other["settings"]

    def load(self, i, epoch):
        return read_features(self.paths[i], self.names)[0]

    def of_run(self, number):
        return self


class Planted:
    """A built-in set on which both focuses are needed; the network's parts are right if it is learnt.

    T = 24 frames of K = 8 objects. In each video four snippets of two frames carry the action pattern of an
    emotion: one of the true emotion, three of others. Only in the true snippet is one object a confident "key"
    (class 0, 0.95); all others, there and everywhere, are weak detections (0.05 to 0.5) of five classes, class 0
    among them. Training videos are drawn anew in every epoch, each from (seed, epoch, number) alone.
    """
    T, K, TRAIN, TEST, STRENGTH = 24, 8, 1000, 500, 1.5
    classes, extraction = ["anger", "disgust", "fear", "joy", "sadness", "surprise"], {}

    def __init__(self, seed):
        self.seed = seed
        self.patterns = np.random.default_rng([seed, 0]).standard_normal((6, 32))
        self.labels = [i % 6 for i in range(self.TRAIN + self.TEST)]
        self.ids = [f"{self.classes[label]}/{i}" for i, label in enumerate(self.labels)]
        self.lengths = [self.T] * len(self.ids)
        self.splits = [(list(range(self.TRAIN)), list(range(self.TRAIN, len(self.ids))))]
        self.segments = {i: self.draw(i, 0)[3] for i in self.splits[0][1]}

    def of_run(self, number):
        return Planted(self.seed + number)

    def load(self, i, epoch):
        return {name: torch.tensor(v, dtype=torch.float32) for name, v in zip(FEATURES, self.draw(i, epoch))}

    def draw(self, i, epoch):
        """One video: F_A, F_S, F_O, the true snippet's frames (T,) bool, each frame's key object (T,)."""
        rng = np.random.default_rng([self.seed, 1, epoch if i < self.TRAIN else 0, i])
        T, K = self.T, self.K
        F_A, F_S = rng.standard_normal((T, 32)), rng.standard_normal((T, 8))
        F_O = np.zeros((T, K, 84))
        frame, box = np.indices((T, K))
        F_O[frame, box, rng.integers(0, 5, (T, K))] = rng.uniform(0.05, 0.5, (T, K))
        F_O[:, :, 80:] = rng.uniform(0, 1, (T, K, 4))
        others = [c for c in rng.permutation(6) if c != self.labels[i]][:3]
        starts = 2 * rng.permutation(T // 2)[:4]
        for start, emotion in zip(starts, [self.labels[i], *others]):
            F_A[start:start + 2] += self.STRENGTH * self.patterns[emotion]
        planted, key = np.zeros(T, bool), rng.integers(0, K, T)
        planted[starts[0]:starts[0] + 2] = True
        for t in np.flatnonzero(planted):
            F_O[t, key[t], :80] = 0
            F_O[t, key[t], 0] = 0.95
        order = (-F_O[:, :, :80].max(-1)).argsort(1)                  # by falling probability, as in a file
        return F_A, F_S, np.take_along_axis(F_O, order[:, :, None], 1), planted, (order == key[:, None]).argmax(1)


def read_list(path, ids):
    """Positions in ids of the videos that a split list names, and the names that are not among them.

    A line is "class/stem [label]", or "stem [label]" where one class alone has it; a video's suffix is optional.
    The label is not believed (lists count from 0 or from 1): the folder is the class. Raises InputError.
    """
    same = lambda name: unicodedata.normalize("NFC", name.replace("\\", "/"))
    known = {}
    for i, identity in enumerate(ids):
        for name in (same(identity), same(identity).split("/", 1)[-1]):
            known.setdefault(name, []).append(i)
    suffix = re.compile(rf"({'|'.join(map(re.escape, SUFFIXES))})$", re.IGNORECASE)
    found, missing = [], []
    with about(path, "it is a split list in UTF-8; name others with --split TRAIN TEST"):
        for line in filter(None, map(str.strip, Path(path).read_text(encoding="utf-8-sig").split("\n"))):
            names = [same(name) for name in (line, re.sub(r"\s+\d+$", "", line))]   # and without a label
            hits = next((known[n] for n in (*names, *(suffix.sub("", n) for n in names)) if n in known), [])
            assert len(hits) < 2, f"{' and '.join(ids[i] for i in hits)} are both called {names[1]}; write class/name"
            found += hits
            missing += [] if hits else [names[1]]
        assert found or missing, "an empty split list"
    return list(dict.fromkeys(found)), missing


def listed(path, data, args):
    """The positions of a list's videos. InputError if some have no features, unless --allow-missing."""
    found, missing = read_list(path, data.ids)
    line = (f"{path}: {len(missing)} of {len(found) + len(missing)} listed videos have no features in {args.data}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} (known is, for instance, {data.ids[0]})")
    if missing and args.allow_missing and found:
        say(f"missing  {line}")
    elif missing:
        most = len(found) > len(missing)
        raise InputError(f"{line}; " + ("extract them, or go on without: --allow-missing" if most else
                                        f"a line names a video as {data.ids[0]}; is it another data set's list?"))
    return found


# ---- Files and failures ----

class InputError(Exception):
    """A failure that the user can mend: one line that names the file; `command` ends with status 2."""


@contextlib.contextmanager
def about(path, remedy=""):
    """Whatever goes wrong inside becomes an InputError: the path, the reason, the remedy."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{path}: {reason}" + (f"; {remedy}" if remedy else "")) from error


MARKS = []                       # "RANDOM WEIGHTS", "LEAKED": what a reader of any number must know


def say(line, every_rank=False):
    """Prints a line, marked; of torchrun's processes the first prints, unless every_rank."""
    if every_rank or ranks()[0] == 0:
        print("  ".join([line, *MARKS]), flush=True)


def write_whole(path, content):
    """Writes bytes beside their place, then renames: the old file or the new one, whole. Raises InputError."""
    part = path.parent / f".{secrets.token_hex(8)}.part"
    with about(path, "make room, or choose another folder; finished files are kept"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_results(out, results):
    """Adds entries to results.json in a folder. Raises InputError."""
    path = Path(out, "results.json")
    with about(path, "delete it: finished runs are read back from their checkpoints"):
        old = json.loads(path.read_text()) if path.exists() else {}
        write_whole(path, json.dumps(old | results, indent=1).encode())
    return path


def save(path, **checkpoint):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_whole(path, buffer.getbuffer())


def load_checkpoint(path):
    """What `run` saved: plain tensors and values, nothing in the file runs. Raises InputError."""
    with about(path, "no run0.pt of dfan.py, or a damaged one; delete it to train again"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        assert saved["settings"] and saved["model"] and saved["history"] and saved["classes"]
        return saved


def settings_of(data, train, test, args, seed):
    """What makes a run's numbers what they are; with other settings a checkpoint is another run's."""
    F_A, F_S, F_O = as_inputs(data.load(train[0], 0), args)
    if (args.objects or 0) > F_O.shape[1] and "objects" in args.features:
        raise InputError(f"--objects {args.objects}: there are {F_O.shape[1]} in a frame of {args.data}")
    digest = lambda value: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    names = ("hidden", "lr", "batch", "beta", "fusion", "features", "objects", "raw")
    return {name: getattr(args, name) for name in names} | dict(
        seed=seed, shape=[v.shape[-1] for v in (F_A, F_S, F_O)], classes=data.classes,
        dataset=args.dataset if args.data else "planted", extraction=digest(data.extraction),
        videos=digest([[data.ids[i] for i in part] for part in (train, test)]))


def epoch_line(number, history, args):
    h = history[-1]
    return (f"run {number}  epoch {len(history):3d}/{args.epochs}  loss {h['loss']:.4f}  accuracy {h['accuracy']:.4f}  "
            f"macro {h['macro']:.4f}  training accuracy {h['training_accuracy']:.4f}  {h['seconds']:.1f} s")


def resume(number, settings, args, model, optimizer):
    """The path of a run's checkpoint, and its history so far, printed again. Raises InputError.

    A run of the same settings is used wherever it lies in --out; below it are the cells of --reproduce.
    """
    path = Path(args.out, f"run{number}.pt")
    for other in [path, *sorted(Path(args.root).rglob(path.name))]:
        if other.exists():
            saved = load_checkpoint(other)
            differs = [k for k in settings if saved["settings"].get(k) != settings[k]]
            if not differs and len(saved["history"]) <= args.epochs:
                with about(other, "delete it to train again"):
                    model.load_state_dict(saved["model"])
                    optimizer.load_state_dict(saved["optimizer"])
                say(f"run {number}  goes on from {other}", True)
                for epoch in range(1, len(saved["history"]) + 1):
                    say(epoch_line(number, saved["history"][:epoch], args), True)
                return other, saved["history"]
            if other == path:
                raise InputError(f"{path}: trained with other {', '.join(differs or ['epochs'])}; choose another --out")
    return path, []


# ---- Section 4: tables and figures; does A_T find the emotional moments? ----

EMOTIONS = {"videoemotion": ["anger", "anticipation", "disgust", "fear", "joy", "sadness", "surprise", "trust"],
            "ekman": ["anger", "disgust", "fear", "joy", "sadness", "surprise"]}
BOTH = (53.34, 57.37)            # accuracies in %: VideoEmotion, Ekman, as the paper prints them
ROWS = {                         # what: (row, the settings that make it, the paper's accuracies or None)
    "table1": [("action", dict(features=("action",), fusion="time"), (51.51, 56.42)),
               ("scene", dict(features=("scene",), fusion="time"), (39.08, 45.47)),
               ("objects", dict(features=("objects",)), (18.74, 23.16)),
               ("action+scene", dict(features=("action", "scene"), fusion="time"), (52.78, 56.88)),
               ("all", {}, BOTH)],
    "table2": [("Max. Pool", dict(fusion="max"), (49.48, 53.12)), ("Avg. Pool", dict(fusion="avg"), (50.02, 54.28)),
               ("T.Focus", dict(fusion="time"), (51.88, 55.93)), ("T.Focus + O.Focus", {}, BOTH)],
    "figure2": [(f"top {K} objects", dict(objects=K), None) for K in (2, 4, 8, 16)],
    "figure3": [("T.Focus + O.Focus", {}, BOTH)],
    "figure4": [("T.Focus + O.Focus", {}, BOTH)]}
FIGURE3 = {                      # rows: the true emotion, in %
    "videoemotion": "50 1 4 25 1 1 21 1, 6 8 20 8 8 10 42 6, 0 0 65 12 6 3 15 1, 6 1 4 66 9 9 4 2, 2 0 2 9 67 4 18 0, "
                    "1 1 14 18 7 58 4 0, 1 1 1 7 5 0 86 1, 7 0 3 10 17 3 41 17",
    "ekman": "51 9 13 3 8 19, 3 54 18 5 5 14, 7 7 59 6 10 11, 3 4 9 54 6 23, 2 9 10 7 53 20, 11 4 5 8 6 64"}


def reproduce(data, splits, args):
    """Trains the rows of a table or figure, each once, and prints them beside the paper's numbers."""
    column = 0 if args.dataset == "videoemotion" else 1
    videos = sum(map(len, splits[0]))
    the_papers = (args.data and not MARKS and data.classes == EMOTIONS[args.dataset]
                  and abs(videos - (1101, 1637)[column]) <= 2)         # 1,099 of 1,101 are in circulation
    for what in ROWS if args.reproduce == "all" else [args.reproduce]:
        rows = {}
        for name, changed, _ in ROWS[what]:
            cell = argparse.Namespace(**vars(args) | changed | dict(out=Path(args.out, name.replace(" ", ""))))
            rows[name] = protocol(data, splits, cell)
        say(f"{what}, {args.dataset if args.data else 'planted set (SYNTHETIC)'}: accuracy in %, "
            f"mean ± standard deviation, n = {len(rows[name])}")
        say(f"  {'':<18}{'paper':>8}{'ours':>16}{'macro':>16}{'minus first row':>18}"
            + ("" if args.data else "   attention on planted frames, object"))
        accuracies = {name: 100 * np.array([r["accuracy"] for r in results]) for name, results in rows.items()}
        first = next(iter(accuracies.values()))
        for name, _, paper in ROWS[what]:
            line = f"  {name:<18}{f'{paper[column]:.2f}' if paper else '-':>8}{mean_std(accuracies[name]):>16}"
            line += f"{mean_std([100 * r['macro'] for r in rows[name]]):>16}{mean_std(accuracies[name] - first):>18}"
            line += "".join(f"  {np.mean(v):.3f}" for v in zip(*(r.get("planted", []) for r in rows[name])))
            say(line + (f"  {accuracies[name].mean() - paper[column]:+.2f} to the paper" if the_papers and paper else ""))
        write_results(args.out, {what: {name: summary(rows[name], data, argparse.Namespace(**vars(args) | changed))
                                         for name, changed, _ in ROWS[what]}})
        if what == "figure3":
            print_confusion(rows[name], data, splits[0][1])
            say("the paper's, in %: " + FIGURE3[args.dataset])
        if what == "figure4":
            draw_first_videos(data, splits[0][1], args, rows[name][0]["checkpoint"])
    return rows[name]


def mean_std(values):
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def summary(results, data, args):
    """What results.json says of the runs of one protocol."""
    return dict(settings={k: v for k, v in vars(args).items() if k not in ("root", "device")}, marks=MARKS,
                classes=data.classes, runs=results,
                **{k: dict(mean=float(np.mean(v)), std=float(np.std(v, ddof=1)) if len(v) > 1 else 0.)
                   for k in ("accuracy", "macro") for v in [[r[k] for r in results]]})


def print_confusion(results, data, test):
    """Figure 3: rows are the true emotion, normalised; the mean over the runs."""
    width = max(9, *(len(c) + 2 for c in data.classes))
    counts = np.bincount([data.labels[i] for i in test], minlength=len(data.classes))
    say(f"{'true / predicted':<18}{'videos':>7}" + "".join(f"{c:>{width}}" for c in data.classes))
    for c, n, row in zip(data.classes, counts, np.mean([r["confusion"] for r in results], 0)):
        say(f"  {c:<16}{n:>7}" + "".join(f"{v:>{width}.2f}" for v in row))


def report(results, data, splits):
    """Prints each run, mean and standard deviation, the confusion matrix and what the attention does."""
    for number, r in enumerate(results):
        say(f"result   run {number}  seed {r['seed']}  accuracy {r['accuracy']:.4f}  macro {r['macro']:.4f}  (last epoch; "
            f"best epoch {r['best'][1]}: {r['best'][0]:.4f}, optimistic, picked on the validation videos)")
    for name in ("accuracy", "macro") if len(results) > 1 else ():
        values = [r[name] for r in results]
        say(f"result   {name} {np.mean(values):.4f} +/- {np.std(values, ddof=1):.4f}  (mean, deviation, n = {len(values)})")
    print_confusion(results, data, splits[0][1])
    for name in results[0]["attention"]:
        most, limit, spread = np.median([r["attention"][name] for r in results], 0)
        say(f"attention  most attended {name}: {most:.2f} times uniform (median of the validation videos; limit "
            f"{limit:.2f})" + (", nearly uniform" if spread < 1.3 else ""))
    for name, (m, n) in dict(frames=(2, Planted.T), object=(1, Planted.K)).items() if "planted" in results[0] else ():
        share = np.mean([r["planted"][name == "object"] for r in results])
        say(f"synthetic  attention on the planted {name}: {share:.3f}  (uniform {m / n:.3f}, limit {limit_of(m, n):.3f})")
    for name in MEASURES if "moments" in results[0] else ():
        ours, uniform, centre = np.mean([r["moments"][name] for r in results], 0)
        say(f"localisation  {name}: {ours:.3f}  (uniform {uniform:.3f}, centre {centre:.3f})")


def limit_of(m, n):
    """The most attention that m of n can get: G is a tanh, so no weight exceeds another by more than e^2."""
    return m * np.e / (m * np.e + (n - m) / np.e)


def attention(outputs, args):
    """{"frame", "object": (the most attended in times uniform, its limit, max/min)}, medians over videos."""
    spread = lambda A: (A.max() * len(A), limit_of(1, len(A)) * len(A), A.max() / A.min())
    objects = [[spread(A[A > 0]) for A in out["A_o"] if (A > 0).sum() > 1] for out in outputs]
    rows = dict(frame=[spread(out["A_T"]) for out in outputs if out["A_T"].min() > 0],
                object=[np.median(v, 0) for v in objects if v and args.fusion == "dual"])
    return {name: np.median(v, 0).tolist() for name, v in rows.items() if v}


MEASURES = ("average precision over frames", "share of attention inside", "most attended frame inside")


def found_moments(data, test, outputs):
    """How well A_T finds the emotional frames: {"moments": {measure: (A_T, uniform attention, centre prior)}}.

    Means over the videos that have frames inside and outside. The centre prior is exp(G), G from 1 in the middle
    to -1 at both ends. The planted set adds "planted": shares on the true frames and on the key object.
    """
    rows, planted = [], []
    for i, out in zip(test, outputs):
        A_T, inside = out["A_T"], data.segments.get(i, np.zeros(1))
        if inside.min() < inside.max():
            centre = np.exp(1 - 2 * np.linspace(-1, 1, len(A_T)) ** 2)
            rows.append([(average_precision_score(inside, A), A[inside].sum() / A.sum(), inside[A == A.max()].mean())
                         for A in (A_T, np.ones(len(A_T)), centre)])
        if isinstance(data, Planted):
            key = data.draw(i, 0)[4]
            A_key = [A[key[t]] for t, A in enumerate(out["A_o"]) if inside[t] and key[t] < len(A)]
            planted.append([A_T[inside].sum(), *([np.mean(A_key)] if A_key else [])])
    means = lambda v: np.mean(v, 0).T.tolist()
    return ({"moments": dict(zip(MEASURES, means(rows)))} if rows else {}) | ({"planted": means(planted)} if planted else {})


def read_segments(path, data):
    """Annotated emotional segments into data.segments, from a CSV with columns video (class/name.mp4) and
    key_segment_1, ..., each empty or a range in minutes'seconds, as 0'3-0'10. Raises InputError."""
    position, bad, unknown, data.segments = {name: i for i, name in enumerate(data.ids)}, 0, 0, {}
    with about(path, "it needs the columns video and key_segment_1 with ranges such as 0'3-0'10"):
        with open(path, encoding="utf-8-sig", newline="") as f:
            rows = list(csv.DictReader(f))
        cells = [(row["video"].strip(), v.strip()) for row in rows for k, v in row.items()
                 if k and k.startswith("key_segment") and v and v.strip()]
        for video, cell in cells:
            i = position.get(os.path.splitext(video)[0], position.get(video))
            match = re.fullmatch(r"(\d+)'(\d+)\s*-\s*(\d+)'(\d+)", cell)
            a, b, c, d = map(int, match.groups()) if match else (1, 0, 0, 0)
            bad += 60 * a + b > 60 * c + d
            unknown += i is None
            if i is not None and 60 * a + b <= 60 * c + d:
                seconds = read_features(data.paths[i], ())[1]["seconds"]
                inside = (60 * a + b <= seconds) & (seconds <= 60 * c + d)
                data.segments[i] = inside | data.segments.get(i, False)
        assert data.segments, f"no segment of any of these videos; they are named as {data.ids[0]}.mp4"
    say(f"segments {len(data.segments)} videos have some; skipped: {bad} cells that are no range, {unknown} of other videos")


# ---- Figure 4, and a video of one's own ----

def coco_names():
    """The 80 classes of F_O's probabilities, in its order."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights as weights
    return [name for name in weights.COCO_V1.meta["categories"] if name not in ("__background__", "N/A")]


def find_video(folder, identity):
    """The video class/stem below a folder, or the only one of that stem. Raises InputError."""
    label, stem = identity.split("/", 1)
    same = [p for p in Path(folder).rglob("*") if p.stem == stem and p.suffix.lower() in SUFFIXES]
    of_class = [p for p in same if label in p.parts[:-1]] or same
    if len(of_class) != 1:
        raise InputError(f"{folder}: {len(of_class)} videos are called {identity}; --videos is the extracted folder")
    return of_class[0]


def video_frames(path, numbers):
    """The decoded frames (H,W,3), BGR, of these numbers, rising; a damaged packet is passed over."""
    os.environ.setdefault("OPENCV_FFMPEG_READ_ATTEMPTS", "1000000")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    with about(path, "is it the video that was extracted?"):
        import cv2
        video, frames, number, failed = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG), [], 0, 0
        while len(frames) < len(numbers) and failed < 200:
            ok, wanted = video.grab(), number == numbers[len(frames)]
            if ok and wanted:
                ok, frame = video.retrieve()
            if ok:
                frames += [frame] if wanted else []
                number, failed = number + 1, 0
            else:
                failed += 1
        assert len(frames) == len(numbers), f"frame {numbers[len(frames)]} does not decode"
        return frames


def strongest(A_o, F_o, names, count=3):
    """The most attended objects of a frame, strongest first: A_o (K,), F_o (K,84)."""
    n = (A_o > 0).sum()
    chosen = [k for k in (-A_o).argsort(kind="stable")[:count] if A_o[k] > 0]
    if F_o.shape[-1] != 84:                                           # another detector's classes are unknown
        return [dict(name=f"object {k}", A_o=float(A_o[k]), times_uniform=float(A_o[k] * n)) for k in chosen]
    return [dict(name=names[F_o[k, :80].argmax()], probability=float(F_o[k, :80].max()), A_o=float(A_o[k]),
                 times_uniform=float(A_o[k] * n), box=F_o[k, 80:].tolist()) for k in chosen]


def draw(path, title, out, F_O, numbers, seconds, unit, video, classes, inside=None):
    """Figure 4: the most attended frame of each quarter with its three most attended boxes, A_T and P over time.

    A box is grey at uniform attention and full green at the limit of the tanh. seconds (T,), in `unit`; inside (T,)
    bool or None: shaded frames; video: its path, or None for grey frames. Writes a PNG. Raises InputError.
    """
    with about(path, "pictures need cv2; on a server: pip install opencv-python-headless, or apt install libgl1"):
        import cv2
    A_T, width, height, left, right, top, bottom = out["A_T"] * len(out["A_T"]), 384, 260, 100, 1580, 450, 690
    image = np.full((900, 1600, 3), 255, np.uint8)

    def write(text, x, y, size=0.7, colour=(30, 30, 30)):
        text = text.encode("ascii", "replace").decode()               # its fonts have no other letters
        cv2.putText(image, text, (int(x), int(y)), cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)

    def at(t, v):
        span = max(seconds[-1] - seconds[0], 1e-3)
        return int(left + (right - left) * (seconds[t] - seconds[0]) / span), int(bottom - (bottom - top) * v / highest)

    write(title, 12, 34, 0.9)
    highest = max(1.1 * A_T.max(), 2)
    for t in np.flatnonzero(inside) if inside is not None else ():
        cv2.rectangle(image, at(t, 0), (at(min(t + 1, len(A_T) - 1), 0)[0], top), (190, 240, 250), -1)
    shown = [part[A_T[part].argmax()] for part in np.array_split(np.arange(len(A_T)), min(4, len(A_T)))]
    frames = video_frames(video, numbers[shown]) if video else [np.full((260, 384, 3), 90, np.uint8)] * len(shown)
    names = coco_names()
    for n, (t, frame) in enumerate(zip(shown, frames)):
        scale = min(width / frame.shape[1], height / frame.shape[0])
        small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)[:height, :width].copy()
        there, x = (out["A_o"][t] > 0).sum(), 12 + 396 * n
        most = limit_of(1, max(there, 1)) * there - 1
        tags = []
        for rank, o in enumerate(strongest(out["A_o"][t], F_O[t], names)):
            green = np.clip((o["times_uniform"] - 1) / most, 0, 1) if there > 1 else 0
            colour = tuple(int(170 + (c - 170) * green) for c in (0, 210, 0))
            write(f"{rank + 1} {o['name']} {o['times_uniform']:.2f} x uniform", x, 342 + 26 * rank)
            if "box" in o:
                size = np.tile(small.shape[1::-1], 2) - 1
                x1, y1, x2, y2 = (np.array(o["box"]) * size).astype(int).tolist()
                cv2.rectangle(small, (x1, y1), (x2, y2), colour, 3)
                tag = min(x1, size[0] - 74), max(y1, 24)
                while any(abs(tag[0] - a) < 24 and abs(tag[1] - b) < 24 for a, b in tags):
                    tag = tag[0] + 25, tag[1]
                tags.append(tag)
                cv2.rectangle(small, (tag[0], tag[1] - 24), (tag[0] + 24, tag[1]), colour, -1)
                cv2.putText(small, str(rank + 1), (tag[0] + 4, tag[1] - 4), 0, 0.7, (0, 0, 0), 2, cv2.LINE_AA)
        image[50:50 + len(small), x:x + small.shape[1]] = small
        write(f"{seconds[t]:.{1 if unit else 0}f}{unit}", x, 420)
        cv2.circle(image, at(t, A_T[t]), 6, (220, 90, 30), -1, cv2.LINE_AA)
    for v in sorted({0, 1, int(highest)}):
        cv2.line(image, (left, at(0, v)[1]), (right, at(0, v)[1]), (180, 180, 180), 1)
        write(f"{v} x", 40, at(0, v)[1] + 7)
    cv2.polylines(image, [np.array([at(t, v) for t, v in enumerate(A_T)])], False, (220, 90, 30), 2, cv2.LINE_AA)
    flat = ", nearly uniform" if A_T.max() < 1.3 * A_T.min() else ""
    write(f"A_T, times uniform{flat}" + ("; shaded: the emotional segment" if inside is not None else ""), left, top - 8)
    hues = [[[180 * c // len(classes), 170, 220]] for c in range(len(classes))]
    colours = cv2.cvtColor(np.array(hues, np.uint8), cv2.COLOR_HSV2BGR)[:, 0]
    column = np.searchsorted(seconds, np.linspace(seconds[0], seconds[-1], right - left))
    level = np.linspace(0, 1, 90, endpoint=False)[:, None, None]
    image[730:820, left:right] = colours[(level >= out["P"].cumsum(-1)[column][None, :, :-1]).sum(-1)]
    for t in (0, len(A_T) // 2, len(A_T) - 1):
        write(f"{seconds[t]:.{1 if unit else 0}f}{unit}", min(at(t, 0)[0], 1520), bottom + 26)
    write("P", 60, 780)
    for c, name in enumerate(classes):
        x = left + c * (right - left) // len(classes)
        cv2.rectangle(image, (x, 840), (x + 24, 864), colours[c].tolist(), -1)
        write(name[:14], x + 32, 859)
    write_whole(path, cv2.imencode(".png", image)[1].tobytes())


def draw_first_videos(data, test, args, checkpoint):
    """Figure 4 of the first validation video of each class, by the network of run 0."""
    saved = load_checkpoint(checkpoint)
    model, settings = restore(saved, args)
    for c, name in enumerate(data.classes):
        i = next(i for i in test if data.labels[i] == c)
        out, = evaluate(model, data, [i], settings, saved["standard"])
        numbers = seconds = np.arange(data.lengths[i])
        if args.data:
            other = read_features(data.paths[i], ())[1]
            numbers, seconds = other["frames"], other["seconds"]
        path = Path(args.out, f"figure4-{data.ids[i].replace('/', '-')}.png")
        title = "  ".join([f"{data.ids[i]}: predicted {data.classes[out['emotion']]}", *MARKS,
                           *([] if args.data else ["SYNTHETIC"])])
        draw(path, title, out, data.load(i, 0)["objects"].numpy(), numbers, seconds, " s" if args.data else "",
             find_video(args.videos, data.ids[i]) if args.data else None, data.classes, data.segments.get(i))
        say(f"picture  {path}  {title}")


def restore(saved, args):
    """The network of a checkpoint and its settings."""
    settings = argparse.Namespace(**saved["settings"], device=args.device, literal=args.literal)
    model = make_network(settings.shape, len(saved["classes"]), settings).to(args.device)
    model.load_state_dict(saved["model"])
    saved["standard"] = None if saved["standard"] is None else saved["standard"].cpu()
    return model.eval(), settings


def predict(source, saved, args):
    """One video or .npz, by the network of a checkpoint: prints its emotion and the most attended moments.

    name.json and name.png go into --out. Raises InputError.
    """
    path, video = Path(source), None
    with about(args.checkpoint, "train again"):
        model, settings = restore(saved, args)
    if path.is_dir():
        raise InputError(f"{source}: a folder; give its videos: --predict {source.rstrip('/')}/*.mp4")
    stem, suffix = os.path.splitext(path.name)
    if suffix.lower() in SUFFIXES and path.is_file():
        options, video = saved["extraction"].get("options"), path
        if not options:
            raise InputError(f"{source}: {args.checkpoint} was not trained on features of extract_features.py, so give "
                             "features, an .npz")
        tuned = ["--tuned", saved["feats"]] if saved["extraction"]["tuned_on"] else []
        script = Path(__file__).with_name("extract_features.py")
        if subprocess.run([sys.executable, script, source, args.out, *options, *tuned, "--device", args.device],
                          stdout=subprocess.DEVNULL).returncode:
            raise InputError(f"{source}: no features of it, see above")
        path = Path(args.out, f"{stem}.npz")
    elif suffix != ".npz":
        raise InputError(f"{source}: --predict takes videos ({' '.join(SUFFIXES)}) and .npz of extract_features.py")
    elif args.videos:
        video = find_video(args.videos, f"{path.absolute().parent.name}/{stem}")
    F, other = read_features(path, settings.features)
    if other["settings"] and saved["extraction"] and other["settings"] != saved["extraction"]:
        raise InputError(f"{source}: not extracted as the features of {args.checkpoint} were; give the video")
    with about(source, "give features like those that the network was trained on"):
        F = as_inputs(F, settings, saved["standard"])
        with torch.no_grad():
            out = {k: v[0].cpu().numpy() for k, v in model(*(v[None].to(args.device) for v in F)).items()}
        assert np.isfinite(out["P"]).all(), f"{args.checkpoint} gives NaN"
        numbers, seconds = other["frames"], other["seconds"].astype(float)
        assert len(numbers) == len(seconds) == len(out["A_T"]), "frames or seconds of another length"
    classes, F_O, T, names = saved["classes"], F[2].numpy(), len(seconds), coco_names()
    emotion = classes[vote(torch.tensor(out["P"][None]), [T])[0]]
    sure = sorted(zip(out["P"][-LAST_FRAMES:].mean(0).tolist(), classes), reverse=True)
    marks = ["RANDOM WEIGHTS"] if other["settings"].get("random_weights") is not None else []
    title = "  ".join([f"{source}: {emotion}", *marks])
    print(title, "  (mean of the last frames: " + ", ".join(f"{c} {100 * p:.1f} %" for p, c in sure) + ")", sep="")
    apart, moments = min(1., (seconds[-1] - seconds[0]) / 6), []
    for t in (-out["A_T"]).argsort(kind="stable"):
        if len(moments) < 3 and all(abs(seconds[t] - m["seconds"]) >= apart for m in moments):
            moments.append(dict(seconds=float(seconds[t]), frame=int(numbers[t]), times_uniform=float(out["A_T"][t] * T),
                                objects=strongest(out["A_o"][t], F_O[t], names)))
            print(f"  {seconds[t]:7.1f} s  attention {moments[-1]['times_uniform']:.2f} times uniform: " + ", ".join(
                f"{o['name']} {o.get('probability', 0):.2f} ({o['times_uniform']:.2f})" for o in moments[-1]["objects"]))
    if out["A_T"].max() < 1.3 * out["A_T"].min():
        print("  the attention is nearly uniform: no moment stands out")
    found = dict(video=source, emotion=emotion, probabilities={c: p for p, c in sure}, moments=moments, marks=marks,
                 warning=str(other.get("warning", "")), seconds=seconds.tolist(), A_T=out["A_T"].tolist(),
                 P={c: out["P"][:, n].tolist() for n, c in enumerate(classes)},
                 objects=[strongest(a, f, names, None) for a, f in zip(out["A_o"], F_O)])
    if found["warning"]:
        print(f"  WARNING  {found['warning']}")
    write_whole(Path(args.out, f"{stem}.json"), json.dumps(found).encode())
    draw(Path(args.out, f"{stem}.png"), title, out, F_O, numbers, seconds, " s", video, classes)
    print(f"  picture {Path(args.out, stem)}.png, series {Path(args.out, stem)}.json")


# ---- Command line ----

def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        usage="%(prog)s [--data FEATS --dataset NAME] [--reproduce WHAT] [--predict FILE ... --checkpoint FILE] [options]",
        epilog="Without --data and --predict it trains on a built-in planted set.")
    add = parser.add_argument
    add("--data", metavar="FEATS", help="folder that extract_features.py wrote")
    add("--dataset", choices=("ekman", "videoemotion"), default="ekman", help="one fixed split, or ten 2/3-1/3 splits")
    add("--split", nargs="+", default=[], metavar="LIST", help="TRAIN TEST [TRAIN TEST ...] (default: FEATS/trainlist01.txt, "
        "testlist01.txt; videoemotion: drawn)")
    add("--allow-missing", action="store_true", help="go on without listed videos that have no features")
    add("--allow-leak", action="store_true", help="validate on videos that the backbones were tuned on; marks every number")
    add("--segments", metavar="CSV", help="annotated emotional segments: does A_T find them?")
    add("--raw", action="store_true", help="features as they are, not standardised")
    add("--features", default=",".join(FEATURES), metavar="NAME,...", help="arrays of the .npz (table 1), or your own (T,D)")
    add("--fusion", choices=("dual", "time", "avg", "max"), help="table 2 (default: dual, time without objects)")
    add("--objects", type=int, metavar="K", help="objects a frame (3.2.1, figure 2; default: all)")
    add("--beta", type=float, default=BETA, help=f"of (10), in [0, 1] (default: {BETA})")
    add("--literal", action="store_true", help="run the equations as printed (slow; same results to rounding)")
    for name, (default, planted, what) in NOT_IN_THE_PAPER.items():
        add(f"--{name}", type=type(default), metavar="N", help=f"{what} (default: {default}; planted set: {planted})")
    add("--runs", type=int, metavar="N", help="runs of different seeds with one split (default: 1; --reproduce on the "
        "planted set: 5)")
    add("--seed", type=int, default=0, help="of run 0; run i uses seed + i (default: 0)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--out", metavar="DIR", help="checkpoints, results, pictures (default: out; planted: out/planted)")
    add("--reproduce", choices=(*ROWS, "all"), help="a table or figure of section 4, beside the paper's")
    add("--videos", metavar="DIR", help="folder that was extracted, for the frames of figure 4")
    add("--predict", nargs="+", metavar="FILE", help="videos or .npz: emotion, moments, picture, JSON")
    add("--checkpoint", metavar="FILE", help="the network of --predict: out/run0.pt")
    args = parser.parse_args(argv)
    for name, (default, planted, _) in NOT_IN_THE_PAPER.items():
        if args.predict and getattr(args, name) is not None:
            parser.error(f"--{name}: --predict has it from --checkpoint")
        if getattr(args, name) is None:
            setattr(args, name, default if args.data else planted)
        if not 0 < getattr(args, name) < 1e9:
            parser.error(f"--{name}: must be greater than 0")
    args.features = tuple(args.features.split(","))
    args.fusion = args.fusion or ("dual" if "objects" in args.features else "time")
    args.out = args.out or ("out" if args.data or args.predict else "out/planted")
    args.root = args.out
    if args.data and args.dataset == "ekman" and not args.split:
        args.split = [str(Path(args.data, name)) for name in ("trainlist01.txt", "testlist01.txt")]
    args.runs = args.runs or (5 if args.reproduce and not args.data else 1)
    for wrong, line in (
            (bool(args.predict) != bool(args.checkpoint), "--predict and --checkpoint go together"),
            (args.predict and (args.data or args.reproduce), "--predict does not train: no --data, no --reproduce"),
            (not 0 <= args.beta <= 1, "--beta: must be in [0, 1]"),
            (not 0 <= args.seed < 2 ** 31, "--seed: must be a whole number from 0 to 2147483647"),
            (args.runs < 1 or args.objects is not None and args.objects < 1, "--runs and --objects: must be at least 1"),
            (len(args.split) % 2, "--split takes pairs of lists: TRAIN TEST"),
            (args.dataset == "ekman" and len(args.split) > 2, "--split: one pair for ekman"),
            (args.dataset == "videoemotion" and args.runs > 1, "--runs: videoemotion has its ten"),
            (args.fusion == "dual" and "objects" not in args.features, "--fusion dual needs objects among --features"),
            (not args.data and set(args.features) - set(FEATURES), "--features: the planted set has action, scene, objects"),
            (not args.data and (args.split or args.segments or args.dataset != "ekman"), "--dataset, --split and "
             "--segments need --data"),
            (args.data and args.reproduce in ("figure4", "all") and not args.videos, "figure4 needs --videos DIR")):
        if wrong:
            parser.error(line)
    return args


def main(argv=None):
    """Returns the exit status. Raises InputError."""
    MARKS.clear()
    args = parse_args(argv)
    args.device = args.device or (f"cuda:{ranks()[2]}" if torch.cuda.is_available() else "cpu")
    with about(f"--device {args.device}"):
        torch.zeros(1, device=args.device)
    with about(args.out, "choose another --out"):
        Path(args.out).mkdir(parents=True, exist_ok=True)
        assert os.access(args.out, os.W_OK), "cannot be written to"
    if args.predict:
        stems = [os.path.splitext(os.path.basename(source))[0] for source in args.predict]
        twice = next((s for s in stems if stems.count(s) > 1), None)
        if twice:
            raise InputError(f"{twice}: the name of two files; predict them into two --out folders")
        saved, status = load_checkpoint(args.checkpoint), 0
        for source in args.predict:
            try:
                predict(source, saved, args)
            except InputError as failure:
                print(f"dfan.py: {failure}", file=sys.stderr, flush=True)
                status = 2
        return status
    say(f"versions torch {torch.__version__}, numpy {np.__version__}, scikit-learn {sklearn.__version__}; {args.device}")
    data = Features(args.data, FEATURES if args.reproduce else args.features) if args.data else Planted(args.seed)
    if data.extraction.get("random_weights") is not None:
        MARKS.append("RANDOM WEIGHTS")
    say(f"data     {len(data.ids)} videos of {len(data.classes)} classes" + ("" if args.data else ", SYNTHETIC"))
    if args.data and data.cut_off:
        say(f"WARNING  {len(data.cut_off)} videos may be cut off: {', '.join(data.cut_off[:5])}, ...")
    splits = make_splits(data, args) if args.data else data.splits
    tuned_on = set(data.extraction.get("tuned_on") or ())
    leaked = sorted({data.ids[i] for _, test in splits for i in test} & tuned_on)
    if leaked and not args.allow_leak:
        raise InputError(f"{args.data}: its backbones were tuned on {len(leaked)} of the validation videos: {leaked[0]}, "
                         "...; tune on this split's training list alone, or have every number marked: --allow-leak")
    MARKS.extend(["LEAKED"] * bool(leaked))
    if args.segments:
        read_segments(args.segments, data)
    if args.reproduce:
        reproduce(data, splits, args)
    else:
        results = protocol(data, splits, args)
        report(results, data, splits)
        write_results(args.out, summary(results, data, args))
    say(f"written  {args.out}/: run0.pt, results.json; next: " + (
        f"python dfan.py --predict VIDEO --checkpoint {args.out}/run0.pt" if args.data else
        "python dfan.py --reproduce figure4, or your own features: python dfan.py --data FEATS"))
    return 0


def ranks():
    """torchrun's rank, number of processes and rank on this machine."""
    return tuple(int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def gather(value):
    """[value of each of torchrun's processes], or [value]. Raises InputError if another has ended."""
    if ranks()[1] == 1:
        return [value]
    with about("torchrun", "another of its processes has ended: its line says why"):
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))    # runs are long
        values = [None] * ranks()[1]
        torch.distributed.all_gather_object(values, value)
    return values


def command(main):
    """Runs a script's main(), exits with its status; a user's failure becomes one line and status 2."""
    script, status = Path(sys.argv[0]).name, 2
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")                 # names that a terminal cannot show
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:                                           # as in `python dfan.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as failure:
        line = f"{script}: {' '.join(str(failure).split())}"
        print(line, file=sys.stderr, flush=True)
        if report_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # so that torchrun's report ends in this line
            message = dict(message=line, extraInfo=dict(timestamp=str(int(time.time()))))
            Path(report_file).write_text(json.dumps(dict(message=message)))
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted; finished files are kept; the same command goes on", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    command(main)
