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
hat and bar are suffixes; the blackboard-bold F (action and scene together) is FF, the script F_t of (7) is F_t. A line
that computes an equation, or makes its parameters, bears its number, (1) to (10). [R1] to [R15] are
rows of the README's table "Where the paper is silent or ambiguous".
Text in quotation marks is the paper's. Code counts frames from 0, the paper from 1.

    B videos in a batch   T frames (the longest of the batch)   K objects a frame   H hidden units   C emotions
    F_A (B,T,2048)   F_S (B,T,365)   F_O (B,T,K,84)   FF (B,T,2413)   A_o (B,T,K)   A_T (B,T)   P (B,T,C)
    (the numbers are the paper's widths; in the loop over t, A_o and P are of frame t and have no T)
"""
import argparse
import contextlib
import csv
import datetime
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
    import torch
    from sklearn.metrics import average_precision_score, confusion_matrix
    from sklearn.model_selection import StratifiedShuffleSplit
    from torch import nn
except ImportError as missing:
    print(f"dfan.py: {missing}; pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

BETA = 0.6                                  # "we empirically set beta = 0.6" (3.2.2)
OBJECTS = 16                                # "In our implementation, we set K = 16." (3.2.1)
LAST_FRAMES = 10                            # "we count the predictions of the last ten frames" (4.1)
FEATURES = ("action", "scene", "objects")   # F_A, F_S, F_O: "three kinds of features" (3.1)
NOT_IN_THE_PAPER = dict(                    # ours: (default, on the planted set, what it is); each is a flag
    hidden=(256, 32, "hidden units H of both LSTMs"),
    lr=(1e-3, 5e-3, "learning rate of Adam"),
    batch=(16, 16, "videos in a batch"),
    epochs=(30, 20, "passes over the training videos"))
CLIP, PADDED_FRAMES = 1.0, 16000            # ours too: norm of the gradient; most frames in a batch of videos


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
            A_T    (B,T)     the time attention (8) as it stands after the last frame; in training after (10)
            A_o    (B,T,K)   the object attention (2)
        """
        B, T, K = F_O.shape[:3]
        FF = torch.cat([F_A, F_S], -1)               # (B,T,2413)  "the concatenation of" both
        real = real_frames(FF, lengths)              # (B,T)    1, or 0 for padding
        there = objects_there(F_O)                   # (B,T,K)  1, or 0 for a missing object [R3]
        F_O_bar = mean_object(F_O, there)            # (B,T,84)
        frame = torch.arange(T, device=FF.device)    # (T,)     to pick entry t
        h1 = c1 = h2 = c2 = FF.new_zeros(B, self.W_p.in_features)         # (B,H)  before the first frame
        P = FF.new_zeros(B, self.W_p.out_features)   # (B,C)    before frame 1: the paper's P_0 = 0 [R4]
        G_o = FF.new_zeros(B, K)                     # stays so, every object alike, if T.Focus is alone [R9]
        E = real                                     # (B,T)    exp(G_T) of (8); G_T = 0 at first [R5]
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
            # "G_T is the glimpse feature of the time" (3.2.2); frame t gives entry t of it [R5]. h2 is of t-1
            G_t = torch.tanh(self.W_Th(h2) + self.W_Tf(S_t))                        # (9)  (B,1)
            E = torch.where(frame == t, G_t.exp() * real, E)                        # (8)  (B,T)  numerator
            # "A_T is the time attention value" (3.2.2), a softmax over the video's frames
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
                beta = 1 - (1 - self.beta) * real[:, t]                             #      (B,)   1 in padding
                old, A_T = A_T, A_T.clone()                                         #      a copy
                A_T[:, t - 1] = beta * old[:, t - 1] + (1 - beta) * old[:, t]       # (10)
                A_T[:, t] = (1 - beta) * old[:, t - 1] + beta * old[:, t]           # (10)
                E = A_T * E.sum(1, keepdim=True)                                    #      it lasts [R6]
            outputs.append((logits, P, A_o))
        logits, P, A_o = (torch.stack(v, 1) * real.unsqueeze(-1) for v in zip(*outputs))      # (B,T,...) each
        return dict(logits=logits, P=P, A_T=A_T, A_o=A_o)


def focus(G, there):
    """Softmax (2) over the objects that are there, zero if none is [R3]: G, there (...,K) -> (...,K).

    G is a tanh or zero, so exp(G) cannot overflow and no maximum need be subtracted.
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

    Then a linear softmax [R11]. how: "max" or "avg". forward is used as DFAN's; each frame has the same P.
    """

    def __init__(self, how, d_action, d_scene, classes):
        super().__init__()
        self.how, self.W = how, nn.Linear(d_action + d_scene, classes)

    def forward(self, F_A, F_S, F_O, lengths=None):
        real, there = real_frames(F_A, lengths).unsqueeze(-1), objects_there(F_O)    # (B,T,1), (B,T,K)
        middles = 2 * torch.arange(10, device=F_A.device) + 1          # of ten parts, in twentieths
        ten = middles * real.sum(1).long() // 20                       # (B,10)
        FF = torch.cat([F_A, F_S], -1)
        FF = FF[torch.arange(len(FF), device=FF.device)[:, None], ten]               # (B,10,2413)
        logits = self.W(FF.amax(1) if self.how == "max" else FF.mean(1))             # (B,C)
        logits = logits.unsqueeze(1) * real                                          # (B,T,C)
        A_T = torch.zeros_like(real[:, :, 0]).scatter_add_(1, ten, torch.full(ten.shape, 0.1).to(real))
        A_o = focus(torch.zeros_like(there), there) * real                           # uniform
        return dict(logits=logits, P=torch.softmax(logits, -1) * real, A_T=A_T, A_o=A_o)


def loss_fn(logits, labels, lengths):
    """Cross-entropy of P_t, averaged over a video's frames, then over videos [R7]. (B,T,C), (B,), (B,) -> scalar."""
    real = real_frames(logits, lengths)                                # (B,T)
    frames = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, None].expand(real.shape), reduction="none")
    return ((frames * real).sum(1) / lengths).mean()


def vote(P, lengths):
    """ "During the inference stage, we count the predictions of the last ten frames and select the emotion that
    appears the most as the final prediction." (4.1)

    P (B,T,C), lengths (B,) -> (B,) emotions. A tie goes to the higher summed probability [R8].
    """
    emotions = []
    for P_video, n in zip(P, lengths):
        last = P_video[max(0, n - LAST_FRAMES):n]                      # (10,C), or fewer
        counts = torch.bincount(last.argmax(-1), minlength=P.shape[-1])
        emotions.append(torch.where(counts == counts.max(), last.sum(0), -1).argmax())
    return torch.stack(emotions)


# ---- 4.1 The two protocols, training and evaluation ----

def make_splits(data, args):
    """The (training, validation) positions of each run of the protocol. Raises InputError.

    Ekman: "The dataset provides the training and validation splits." VideoEmotion: "our experiments are conducted
    ten times. Each time we randomly choose 2/3 of the data for training and another 1/3 for validation." (4.1)
    """
    splits = [[listed(path, data, args) for path in pair] for pair in zip(args.split[::2], args.split[1::2])]
    if args.dataset == "videoemotion" and not splits:
        for seed in range(args.seed, args.seed + 10):
            with about(args.data):
                draw = StratifiedShuffleSplit(1, train_size=2 / 3, random_state=seed)  # of each class [R12]
                splits += draw.split(data.ids, data.labels)
    for number, parts in enumerate(splits):
        for part, name in zip(parts, ("training", "validation")):
            counts = np.bincount([data.labels[i] for i in part], minlength=len(data.classes))
            named = ", ".join(f"{c} {n}" for c, n in zip(data.classes, counts))
            say(f"split {number}  {name} {len(part)}: {named}")
            if 0 in counts:
                raise InputError(f"{args.data}: a class without a {name} video ({named})")
        if both := set(parts[0]) & set(parts[1]):
            raise InputError(f"{args.split[2 * number + 1]}: {data.ids[min(both)]} is in both lists")
    return splits


def make_batches(videos, lengths, args, rng=None):
    """Lists of at most --batch videos of similar length; an rng shuffles them and stretches the lengths a little,
    so that they differ from epoch to epoch."""
    stretch = 1 + (rng.uniform(0, 0.15, len(videos)) if rng else np.zeros(len(videos)))
    batches = [[]]
    for _, i in sorted((lengths[i] * s, i) for i, s in zip(videos, stretch)):
        batch = batches[-1] + [i]
        if batches[-1] and (len(batch) > args.batch or len(batch) * max(lengths[j] for j in batch) > PADDED_FRAMES):
            batches.append([i])
        else:
            batches[-1] = batch
    return [batches[n] for n in rng.permutation(len(batches))] if rng else batches


def load_batches(data, batches, args, standard, epoch=0):
    """Yields [F_A, F_S, F_O], padded with zeros, lengths (B,), labels (B,) and positions of each batch."""
    for batch in batches:
        videos = [as_inputs(data.load(i, epoch)[0], args.features, args.objects, standard) for i in batch]
        F = [nn.utils.rnn.pad_sequence(v, batch_first=True).to(args.device) for v in zip(*videos)]
        lengths, labels = (torch.tensor([v[i] for i in batch], device=args.device) for v in (data.lengths, data.labels))
        yield F, lengths, labels, batch


def run(number, data, train, test, args):
    """Trains and evaluates one split, seed --seed + number; the same command goes on where it stopped.

    Returns the scores of the LAST epoch and what `attention` says. After each epoch --out/run<number>.pt is written.
    """
    seed = args.seed + number
    torch.manual_seed(seed)
    standard = None if args.raw else column_statistics(data, train, args)
    settings = settings_of(data, train, test, args, seed)
    model = make_network(settings, args.literal).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    path, history = resume(number, settings, args, model, optimizer)
    outputs = None
    for epoch in range(len(history) + 1, args.epochs + 1):
        start, total, right = time.monotonic(), 0., 0
        model.train()
        batches = make_batches(train, data.lengths, args, np.random.default_rng([seed, epoch]))
        for F, lengths, labels, batch in load_batches(data, batches, args, standard, epoch):
            out = model(*F, lengths)
            loss = loss_fn(out["logits"], labels, lengths)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            total += loss.item() * len(batch)
            right += (vote(out["P"], lengths) == labels).sum().item()
        if not np.isfinite(total):
            raise InputError(f"run {number}: the loss is {total} in epoch {epoch}; lower --lr ({args.lr})")
        outputs = evaluate(model, data, test, args, standard)
        now = dict(loss=total / len(train), training=right / len(train), **scores(data, test, outputs))
        seconds = time.monotonic() - start
        say(f"run {number}  epoch {epoch:3d}/{args.epochs}  loss {now['loss']:.4f}  accuracy {now['accuracy']:.4f}  macro "
            f"{now['macro']:.4f}  training accuracy {now['training']:.4f}  {seconds:.1f} s", every_rank=True)
        if epoch == 1:
            say(f"run {number}  the other epochs take about {(args.epochs - 1) * seconds:.0f} s", every_rank=True)
        history.append(now)
        torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), standard=standard, history=history,
                        feats=args.data, settings=settings), buffer := io.BytesIO())
        write_whole(path, buffer.getbuffer())
    outputs = outputs or evaluate(model, data, test, args, standard)   # finished before
    return history[-1] | dict(seed=seed, checkpoint=str(path), attention=attention(data, test, outputs))


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


def scores(data, test, outputs):
    """Accuracy (4.1), macro accuracy (mean of the classes' own), confusion matrix, rows normalised (figure 3)."""
    labels, emotions = [data.labels[i] for i in test], [out["emotion"] for out in outputs]
    confusion = confusion_matrix(labels, emotions, labels=range(len(data.classes)), normalize="true")
    return dict(accuracy=float(np.mean(np.equal(labels, emotions))), macro=float(confusion.diagonal().mean()),
                confusion=confusion.tolist())


def protocol(data, splits, args):
    """The scores of all runs, whose mean is "The average of recognition accuracies over ten experiments" (4.1).

    --runs: so many seeds of one split. torchrun's processes share the runs out, and each gets the scores of all.
    """
    rank, world, _ = ranks()
    numbers = range(rank, max(args.runs, len(splits)), world)
    mine = {n: run(n, data, *splits[n % len(splits)], args) for n in numbers}
    results = {n: r for part in gather(mine) for n, r in part.items()}
    return [results[n] for n in sorted(results)]


# ---- Here the paper's part ends. What follows is a faster form of the same network, data, and tools. ----

class Fast(DFAN):
    """DFAN with O(T) work in place of O(T^2), by two identities. Both are exact:

    W F_t + b = sum_i A_Ti (W FF_i + b), since the A_Ti sum to 1: what multiplies a feature is one product for all
    frames, before the loop. And (7), (8) are num / den, two running sums over e_i = exp(G_Ti) of frame i:
    num = sum_i e_i (W FF_i + b), den = sum_i e_i. Frame t changes e_t alone, (10) also e_{t-1}.
    """

    def forward(self, F_A, F_S, F_O, lengths=None):
        FF, H, C = torch.cat([F_A, F_S], -1), self.W_p.in_features, self.W_p.out_features
        d_object, d_FF, linear = F_O.shape[-1], FF.shape[-1], nn.functional.linear
        real, there = real_frames(FF, lengths).unsqueeze(-1), objects_there(F_O)  # (B,T,1), (B,T,K)
        W_P, W_F = self.LSTM_T.weight_ih.split([C, d_FF], -1)
        W_T = torch.cat([W_P, self.LSTM_T.weight_hh], -1)  # on [P; h2]
        T_in = linear(FF, W_F, self.LSTM_T.bias_ih + self.LSTM_T.bias_hh)  # (B,T,4H)  of (6)
        W_Tf_object, W_Tf_FF = self.W_Tf.weight.split([d_object, d_FF], -1)
        G_FF = linear(FF, W_Tf_FF, self.W_Tf.bias).unbind(1)  # (B,T,1)  of (9)
        G_object = (F_O @ W_Tf_object[0]).unbind(1)  # (B,T,K)  of (9)
        if self.o_focus:
            W_F, W_h2 = self.LSTM_S.weight_ih.split([d_object, H], -1)
            W_S = torch.cat([W_h2, self.LSTM_S.weight_hh], -1)  # on [h2; h1]
            S_in = linear(mean_object(F_O, there), W_F, self.LSTM_S.bias_ih + self.LSTM_S.bias_hh).unbind(1)
            G_F_o = self.W_of(F_O).squeeze(-1).unbind(1)  # (B,T,K)  of (3)
        num, den, E = (real * T_in).sum(1), real.sum(1), list(real.unbind(1))
        T_in, real_t, there = T_in.unbind(1), real.unbind(1), there.unbind(1)
        h1 = c1 = h2 = c2 = FF.new_zeros(len(FF), H)
        P, G_o, outputs = FF.new_zeros(len(FF), C), torch.zeros_like(there[0]), []
        for t in range(len(T_in)):
            if self.o_focus:
                h1, c1 = lstm(torch.addmm(S_in[t], torch.cat([h2, h1], -1), W_S.T), c1)  # (4)
                G_o = torch.tanh(self.W_oh(h1) + G_F_o[t])  # (3)
            A_o = focus(G_o, there[t])  # (2)
            F_o_hat = (A_o * G_object[t]).sum(-1, keepdim=True)  # (1)  times W_Tf
            e_t = torch.tanh(self.W_Th(h2) + F_o_hat + G_FF[t]).exp() * real_t[t]  # (9)
            rise, E[t] = e_t - E[t], e_t
            num, den = num + rise * T_in[t], den + rise  # (7), (8)
            h2, c2 = lstm(torch.addmm(num / den, torch.cat([P, h2], -1), W_T.T), c2)  # (6)
            logits = self.W_p(h2)  # (5)
            P = torch.softmax(logits, -1)  # (5)
            if self.training and t > 0:
                mixed = (1 - self.beta) * real_t[t] * (E[t] - E[t - 1])  # (10)
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


def make_network(settings, literal):
    """The network of a run's settings (`settings_of`)."""
    fusion, shape, C = settings["fusion"], settings["shape"], len(settings["classes"])
    if fusion in ("max", "avg"):
        return Pooling(fusion, *shape[:2], C)
    Network = DFAN if literal else Fast
    return Network(*shape, settings["hidden"], C, settings["beta"], o_focus=fusion == "dual")


# ---- Data: feature files, the planted set, split lists ----

SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".3gp", ".ts")


def as_inputs(F, features, objects, standard=None):
    """F_A, F_S, F_O of a video's arrays; features, objects: --features and --objects; the first K are the top K.

    The first (T,D) array is F_A, the others are F_S: only their concatenation FF counts. Objects alone:
    FF := F_O_bar [R10]. standard: what `column_statistics` returned, or None.
    """
    F_O = F["objects"][:, :objects] if "objects" in features else torch.zeros(len(F[features[0]]), 0, 0)
    series = [F[name] for name in features if name != "objects"] or [mean_object(F_O, objects_there(F_O))]
    FF = torch.cat(series, -1)
    if standard is not None:
        FF = (FF - standard[0]) * standard[1]
    return *FF.split([series[0].shape[-1], FF.shape[-1] - series[0].shape[-1]], -1), F_O


def column_statistics(data, train, args):
    """Mean and 1 / deviation (0 for a constant) of FF's columns over the training videos' frames: (2,D)."""
    frames, total, squares = 0, 0., 0.
    for i in train:
        FF = torch.cat(as_inputs(data.load(i)[0], args.features, args.objects)[:2], -1).double()
        frames, total, squares = frames + len(FF), total + FF.sum(0), squares + (FF ** 2).sum(0)
    mean = total / frames
    deviation = (squares / frames - mean ** 2).clamp(min=0).sqrt()
    varies = deviation > 1e-6 * mean.abs()                             # above the rounding of a constant
    return torch.stack([mean, torch.where(varies, 1 / deviation, 0.)]).float()


def read_features(path, names):
    """The arrays of an .npz, float32, objects (T,K,D), others (T,D), and what else it says. Raises InputError."""
    with about(path, "if it is damaged, delete it and extract it again; --features names the arrays"):
        with np.load(path, allow_pickle=False) as f:
            F = {name: torch.from_numpy(f[name].astype(np.float32)) for name in names}
            other = {name: f[name] for name in f.files if name in ("frames", "seconds")}
            settings, warning = (str(f[name]) if name in f.files else "" for name in ("settings", "warning"))
        for name, v in F.items():
            assert v.dim() == 2 + (name == "objects"), f"{name} has the shape {tuple(v.shape)}"
            assert len(v) == len(F[names[0]]) > 0, f"{len(v)} frames of {name}, {len(F[names[0]])} of {names[0]}"
            assert v.isfinite().all(), f"NaN or infinity in {name}"
        settings = json.loads(settings or "{}")
        settings.pop("opencv", None)                                   # recorded, not compared
        return F, other | dict(settings=settings, warning=warning)


class Features:
    """The files <class>/<name>.npz of a folder, each checked here and read when needed. Raises InputError."""

    def __init__(self, folder, names):
        self.names, self.lengths, self.cut_off, self.segments = names, [], [], {}
        self.paths = sorted(p for p in Path(folder).glob("*/*.npz") if "." not in (p.name[0], p.parent.name[0]))
        if not self.paths:
            raise InputError(f"{folder}: no <class>/<name>.npz in it; features of videos: python extract_features.py "
                             f"{folder} feats/")
        self.ids = [f"{p.parent.name}/{p.stem}" for p in self.paths]
        self.classes = sorted(p.name for p in Path(folder).iterdir() if p.is_dir() and p.name[0] != ".")
        self.labels = [self.classes.index(p.parent.name) for p in self.paths]
        for i, path in enumerate(self.paths):
            F, other = self.load(i)
            made = other["settings"] | {name: v.shape[1:] for name, v in F.items()}
            first = first if i else made
            if made != first:
                differs = sorted(k for k in made | first if made.get(k) != first.get(k))
                raise InputError(f"{path}: other {', '.join(differs)} than {self.paths[0]}; extract one of them again")
            self.lengths.append(len(F[names[0]]))
            self.cut_off += [self.ids[i]] if other["warning"] else []
        self.extraction = other["settings"]

    def load(self, i, epoch=0):
        return read_features(self.paths[i], self.names)


class Planted:
    """A built-in set on which both focuses are needed; the network's parts are right if it is learnt.

    T = 24 frames of K = 8 objects. In each video four snippets of two frames carry the action pattern of an
    emotion: one of the true emotion, three of others. Only in the true snippet is one object, the first, a
    confident "key" (class 0, 0.95); all others, there and everywhere, are weak detections (0.05 to 0.5) of five
    classes, class 0 among them. Training videos are drawn anew in every epoch.
    """
    T, K, TRAIN, TEST = 24, 8, 1000, 500
    classes, extraction, cut_off = ["anger", "disgust", "fear", "joy", "sadness", "surprise"], {}, []

    def __init__(self, seed):
        n = self.TRAIN + self.TEST
        self.seed, self.labels, self.lengths = seed, [i % 6 for i in range(n)], [self.T] * n
        self.patterns = 1.5 * np.random.default_rng([seed, 0]).standard_normal((6, 32))
        self.ids = [f"{self.classes[label]}/{i}" for i, label in enumerate(self.labels)]
        self.splits = [(list(range(self.TRAIN)), list(range(self.TRAIN, n)))]
        self.segments = {i: self.load(i)[1]["planted"] for i in range(self.TRAIN, n)}

    def load(self, i, epoch=0):
        rng, T, K = np.random.default_rng([self.seed, 1, epoch if i < self.TRAIN else 0, i]), self.T, self.K
        F_A, F_S, F_O = rng.standard_normal((T, 32)), rng.standard_normal((T, 8)), np.zeros((T, K, 84))
        weak = -np.sort(-rng.uniform(0.05, 0.5, (T, K, 1)), 1)         # the most probable first, as in a file
        np.put_along_axis(F_O, rng.integers(0, 5, (T, K, 1)), weak, 2)
        F_O[:, :, 80:] = np.sort(rng.uniform(0, 1, (T, K, 2, 2)), 2).reshape(T, K, 4)
        others = [c for c in rng.permutation(6) if c != self.labels[i]][:3]
        snippets = rng.permutation(T // 2)[:4]
        for snippet, emotion in zip(snippets, [self.labels[i], *others]):
            F_A[2 * snippet:2 * snippet + 2] += self.patterns[emotion]
        planted = np.arange(T) // 2 == snippets[0]
        F_O[planted, 0, :80] = 0.95 * np.eye(80)[0]
        F = {name: torch.tensor(v, dtype=torch.float32) for name, v in zip(FEATURES, (F_A, F_S, F_O))}
        return F, dict(frames=np.arange(T), seconds=np.arange(T), planted=planted, settings={}, warning="")


def read_list(path, ids):
    """Positions in ids of the videos that a split list names, and the names that are not among them.

    A line is "class/name [label]", or "name [label]" where one class alone has it; a video's suffix is optional.
    The label is not believed (lists count from 0 or from 1): the folder is the class. Raises InputError.
    """
    same = lambda name: unicodedata.normalize("NFC", name.replace("\\", "/"))
    known, found, missing = {}, [], []
    for i, identity in enumerate(map(same, ids)):
        for name in (identity, identity.split("/", 1)[-1]):
            known.setdefault(name, []).append(i)
    suffix = re.compile(rf"({'|'.join(map(re.escape, SUFFIXES))})$", re.IGNORECASE)
    with about(path, "it is a split list in UTF-8; name others with --split TRAIN TEST"):
        for line in filter(None, map(str.strip, Path(path).read_text(encoding="utf-8-sig").split("\n"))):
            names = [same(name) for name in (line, re.sub(r"\s+\d+$", "", line))]    # and without a label
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
            f"{', '.join(missing[:3])}, ... (a line names a video as {data.ids[0]})")
    if missing and not args.allow_missing:
        raise InputError(line + ("; go on without them: --allow-missing" if len(found) > len(missing) else ""))
    if missing:
        say(f"missing  {line}")
    return found


# ---- Files and failures ----

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
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, AssertionError):                      # a library's first sentence
            reason = reason.split(". ")[0][:300]
        raise InputError(f"{path}: {reason}" + (f"; {remedy}" if remedy else "")) from error


MARKS = []                       # "SYNTHETIC", "RANDOM WEIGHTS", "LEAKED": they end every line with a number


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


def load_checkpoint(path):
    """What `run` saved; nothing in the file runs. Raises InputError."""
    with about(path, "it should be a run0.pt of dfan.py; a damaged one may be deleted, to train again"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        assert saved["settings"] and saved["model"] and saved["history"]
        return saved


def settings_of(data, train, test, args, seed):
    """What makes a run's numbers what they are: with other settings a checkpoint is another run's."""
    shape = [v.shape[-1] for v in as_inputs(data.load(train[0])[0], args.features, args.objects)]
    names = ("hidden", "lr", "batch", "beta", "fusion", "features", "objects", "raw")
    return {name: getattr(args, name) for name in names} | dict(
        dataset=args.dataset if args.data else "planted", seed=seed, shape=shape, classes=data.classes,
        extraction=data.extraction, videos=[[data.ids[i] for i in part] for part in (train, test)])


def resume(number, settings, args, model, optimizer):
    """The path of a run's checkpoint and its history so far, model and optimizer set to it. Raises InputError.

    A run of the same settings is used wherever it lies in --out; below it are the rows of --reproduce.
    """
    path = Path(args.out, f"run{number}.pt")
    for other in [path, *sorted(Path(args.root).rglob(path.name))]:
        if other.exists():
            saved = load_checkpoint(other)
            differs = [k for k in settings if saved["settings"].get(k) != settings[k]]
            differs += ["epochs"] * (len(saved["history"]) > args.epochs)
            if not differs:
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                say(f"run {number}  goes on from {other}, epoch {len(saved['history'])}", every_rank=True)
                return other, saved["history"]
            if other == path:
                raise InputError(f"{path}: trained with other {', '.join(differs)}; choose another --out")
    return path, []


# ---- Section 4: tables and figures ----

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
DIAGONALS = ("50 8 65 66 67 58 86 17", "51 54 59 54 53 64")            # of figure 3, in %, emotions by name


def reproduce(data, splits, args):
    """Trains the rows of a table or figure, prints them beside the paper's: {what: {row: summary}}."""
    column, found = ("videoemotion", "ekman").index(args.dataset), {}
    videos, classes = ((1101, 8), (1637, 6))[column]                   # 1,099 of the 1,101 are in circulation
    the_papers = not MARKS and len(data.classes) == classes and abs(sum(map(len, splits[0])) - videos) <= 2
    for what in ROWS if args.reproduce == "all" else [args.reproduce]:
        found[what], lines, first = {}, [], None
        for row, changed, paper in ROWS[what]:
            cell = argparse.Namespace(**vars(args) | changed | dict(out=f"{args.out}/{row.replace(' ', '')}"))
            results = protocol(data, splits, cell)
            found[what][row] = summary(results, data, cell)
            ours, macro = ([100 * r[name] for r in results] for name in ("accuracy", "macro"))
            first = first or ours
            lines.append(f"  {row:<18} paper {paper[column] if paper else '-':>5}  ours {mean_std(ours)}  macro "
                         f"{mean_std(macro)}  minus first row {mean_std(np.subtract(ours, first))}")
            if the_papers and paper:
                lines[-1] += f"  {np.mean(ours) - paper[column]:+.2f} to the paper"
            for name, key in (("segments, share", "A_T"), ("planted object", "A_o")):
                if name in results[0]["attention"]:
                    lines[-1] += f"  {name} {np.mean([r['attention'][name][key] for r in results]):.3f}"
        say(f"{what}: accuracy in %, mean ± standard deviation, n = {len(results)}")
        for line in lines:
            say(line)
        if what == "figure3":
            print_confusion(results, data, splits[0][1])
            say(f"  the paper's diagonal: {DIAGONALS[column]}")
        if what == "figure4":  # the first validation video of each class
            saved = load_checkpoint(results[0]["checkpoint"])
            for _, i in sorted({data.labels[i]: i for i in reversed(splits[0][1])}.items()):
                target = Path(args.out, f"figure4-{data.ids[i].replace('/', '-')}")
                video = find_video(args.videos, data.ids[i]) if args.videos else None
                show(data.ids[i], target, *data.load(i), saved, args, video, data.segments.get(i, ()))
    return found


def mean_std(values):
    return f"{np.mean(values):5.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def summary(results, data, args):
    """What results.json says of the runs of one protocol."""
    values = {name: [r[name] for r in results] for name in ("accuracy", "macro")}
    return dict(settings=vars(args), marks=MARKS, classes=data.classes, runs=results, **{
        name: dict(mean=np.mean(v), std=np.std(v, ddof=1) if len(v) > 1 else 0.) for name, v in values.items()})


def print_confusion(results, data, test):
    """Figure 3: rows are the true emotion, normalised; the mean over the runs."""
    counts = np.bincount([data.labels[i] for i in test], minlength=len(data.classes))
    say(f"{'true / predicted':<18}videos" + "".join(f"{c:>14}" for c in data.classes))
    for c, n, row in zip(data.classes, counts, np.mean([r["confusion"] for r in results], 0)):
        say(f"  {c:<16}{n:>6}" + "".join(f"{v:>14.2f}" for v in row))


def report(results, data, splits):
    """Prints each run, mean and standard deviation, the confusion matrix and what the attention does."""
    for n, r in enumerate(results):
        say(f"result   run {n}  seed {r['seed']}  accuracy {r['accuracy']:.4f}  macro {r['macro']:.4f}  (last epoch)")
    for name in ("accuracy", "macro") if len(results) > 1 else ():
        say(f"result   {name} in %: {mean_std([100 * r[name] for r in results])}  (n = {len(results)})")
    print_confusion(results, data, splits[0][1])
    for name, numbers in results[0]["attention"].items():
        means = {k: np.mean([r["attention"][name][k] for r in results]) for k in numbers}
        say(f"attention  {name}: " + "  ".join(f"{k} {v:.3f}" for k, v in means.items())
            + ("  nearly uniform" if means.get("max/min", 2) < 1.3 else ""))


# ---- What does the attention do? Does A_T find the emotional moments? ----

MEASURES = {                     # of the attention A (T,) on a segment (T,) bool
    "average precision": average_precision_score, "share": lambda segment, A: A[segment].sum() / A.sum(),
    "hit rate": lambda segment, A: segment[A == A.max()].mean()}


def limit_of(m, n):
    """The most attention that m of n can get: G is a tanh, so no weight exceeds another by more than e^2."""
    return m * np.e / (m * np.e + (n - m) / np.e)


def attention(data, test, outputs):
    """{name: {what: number}} on the validation videos: medians of the most attended, means over the segments.

    The centre prior is exp(G), G from 1 in the middle to -1 at both ends.
    """
    rows = {}
    for i, out in zip(test, outputs):
        for name, As in (("frame", out["A_T"][None]), ("object", out["A_o"])):
            As = [A[A > 0] for A in As if (A > 0).sum() > 1]
            spread = [(A.max() * len(A), limit_of(1, len(A)) * len(A), A.max() / A.min()) for A in As]
            if As:
                rows.setdefault(f"most attended {name}", []).append(
                    dict(zip(("times uniform", "limit", "max/min"), np.median(spread, 0))))
        A_T, segment = out["A_T"], data.segments.get(i, np.zeros(1, bool))
        if segment.min() < segment.max():
            priors = dict(A_T=A_T, uniform=np.ones(len(A_T)), centre=np.exp(1 - 2 * np.linspace(-1, 1, len(A_T)) ** 2))
            for name, measure in MEASURES.items():
                rows.setdefault(f"segments, {name}", []).append({who: measure(segment, A) for who, A in priors.items()})
            rows["segments, share"][-1]["limit"] = limit_of(segment.sum(), len(segment))
        if isinstance(data, Planted) and out["A_o"].size:
            share = out["A_o"][segment, :1].sum() / 2
            rows.setdefault("planted object", []).append(dict(A_o=share, uniform=1 / data.K, limit=limit_of(1, data.K)))
    middle = lambda name: np.median if name.startswith("most") else np.mean
    return {name: {k: float(middle(name)([v[k] for v in row])) for k in row[0]} for name, row in rows.items()}


def read_segments(path, data):
    """Annotated emotional segments into data.segments, from a CSV with columns video (class/name.mp4) and
    key_segment_1, ..., each empty or a range in minutes'seconds, as 0'3-0'10. Raises InputError."""
    position, skipped = {name: i for i, name in enumerate(data.ids)}, 0
    with about(path, "it needs the columns video and key_segment_1 with ranges such as 0'3-0'10"):
        rows = csv.DictReader(Path(path).read_text(encoding="utf-8-sig").splitlines())
        for video, cell in [(row["video"], row[k]) for row in rows for k in row if (k or "").startswith("key_seg") and row[k]]:
            i = position.get(os.path.splitext(video)[0])
            match = re.fullmatch(r"(\d+)'(\d+)-(\d+)'(\d+)", cell.replace(" ", ""))
            start, end = [60 * int(m) + int(s) for m, s in (match.group(1, 2), match.group(3, 4))] if match else (1, 0)
            if i is None or start > end:
                skipped += 1
                continue
            seconds = read_features(data.paths[i], ())[1]["seconds"]
            data.segments[i] = (start <= seconds) & (seconds <= end) | data.segments.get(i, False)
        assert data.segments, f"no segment of any of these videos; they are named as {data.ids[0]}.mp4"
    say(f"segments {len(data.segments)} videos have some; {skipped} cells are no range, or of another video")


# ---- Figure 4, and a video of one's own ----

def show(source, target, F, other, saved, args, video=None, inside=()):
    """Prints what the network of a checkpoint sees in one video; writes <target>.json and <target>.png, figure 4.

    F, other: the features; video: its path, for the pictures; inside (T,) bool: a segment. Raises InputError.
    """
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights as weights
    names = [name for name in weights.COCO_V1.meta["categories"] if name not in ("__background__", "N/A")]
    settings, classes, moments = saved["settings"], saved["settings"]["classes"], []
    with about(source, "are these features like those that the network was trained on?"):
        assert {"seconds", "frames"} <= set(other), "it has no arrays seconds and frames"
        seconds, frames = other["seconds"].tolist(), other["frames"].tolist()
        model = make_network(settings, args.literal).eval()
        model.load_state_dict(saved["model"])
        inputs = as_inputs(F, settings["features"], settings["objects"], saved["standard"])
        with torch.no_grad():
            out = {name: v[0].numpy() for name, v in model(*(v[None] for v in inputs)).items()}
        assert np.isfinite(out["P"]).all(), "the network gives NaN"
        assert len(out["P"]) == len(seconds) == len(frames), "frames or seconds of another length"
    P, A_T, F_O = out["P"], out["A_T"] * len(frames), inputs[2].numpy()

    def describe(k, A_o, F_o):
        found = dict(name=f"object {k}", A_o=float(A_o[k]), times_uniform=float(A_o[k] * (A_o > 0).sum()))
        if F_o.shape[-1] == 84:                                        # another detector's columns are unknown
            probabilities, box = np.split(F_o[k], [80])
            found |= dict(name=names[probabilities.argmax()], probability=float(probabilities.max()), box=box.tolist())
        return found

    objects = [[describe(k, A_o, F_o) for k in (-A_o).argsort(kind="stable") if A_o[k] > 0]
               for A_o, F_o in zip(out["A_o"], F_O)]
    for t in (-A_T).argsort(kind="stable"):
        if len(moments) < 3 and all(abs(seconds[t] - m["seconds"]) >= min(1, seconds[-1] / 6) for m in moments):
            moments.append(dict(seconds=seconds[t], frame=frames[t], times_uniform=float(A_T[t]), objects=objects[t][:3]))
    found = dict(video=str(source), emotion=classes[vote(torch.tensor(P[None]), [len(P)])[0]], moments=moments,
                 probabilities=dict(zip(classes, P[-LAST_FRAMES:].mean(0).tolist())), marks=MARKS,
                 warning=other["warning"], seconds=seconds, frames=frames, A_T=out["A_T"].tolist(),
                 P=dict(zip(classes, P.T.tolist())), objects=objects)
    sure = sorted(found["probabilities"].items(), key=lambda pair: -pair[1])
    say(f"{source}: {found['emotion']}  (mean of the last frames: " + ", ".join(f"{c} {100 * p:.1f} %" for c, p in sure) + ")")
    for m in moments:
        say(f"  {m['seconds']:7.1f} s  attention {m['times_uniform']:.2f} times uniform: " + ", ".join(
            f"{o['name']} {o.get('probability', 0):.2f} ({o['times_uniform']:.2f})" for o in m["objects"]))
    flat = ", attention nearly uniform" if A_T.max() < 1.3 * A_T.min() else ""
    say(f"  {target}.png, {target}.json{flat}" + f"  WARNING {other['warning']}" * bool(other["warning"]))
    write_whole(Path(f"{target}.json"), json.dumps(found).encode())
    draw(Path(f"{target}.png"), "  ".join([f"{source}: {found['emotion']}{flat}", *MARKS]), found, video, inside)


def find_video(folder, identity):
    """The video class/name below a folder. Raises InputError."""
    label, name = identity.split("/")
    found = [p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES and p.stem == name and label in p.parts]
    if len(found) != 1:
        raise InputError(f"{folder}: {len(found)} videos are called {identity}; --videos is the extracted folder")
    return found[0]


def video_frames(path, numbers):
    """The decoded frames (H,W,3), BGR, of these numbers, rising; a damaged packet is passed over."""
    import cv2
    os.environ |= dict(OPENCV_FFMPEG_READ_ATTEMPTS="1000000", OPENCV_FFMPEG_LOGLEVEL="-8")
    video, frames, number, failed = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG), [], 0, 0
    while len(frames) < len(numbers) and failed < 200:
        ok, frame = video.read()
        frames += [frame] if ok and number == numbers[len(frames)] else []
        number, failed = number + ok, 0 if ok else failed + 1
    assert len(frames) == len(numbers), f"{path} has no frame {numbers[len(frames)]}; is it the extracted video?"
    return frames


def draw(path, title, found, video, inside):
    """Figure 4: the most attended frame of each quarter with its three most attended boxes, A_T and P over time.

    A box is grey at uniform attention, green at the limit of the tanh. Writes a PNG. Raises InputError.
    """
    with about(path, "pictures need cv2; on a server: pip install opencv-python-headless"):
        import cv2
        A_T, seconds = len(found["A_T"]) * np.array(found["A_T"]), np.array(found["seconds"])
        P, T = np.array(list(found["P"].values())), len(A_T)           # (C,T)
        best = [part[A_T[part].argmax()] for part in np.array_split(np.arange(T), min(4, T))]
        grey = np.full((len(best), 270, 384, 3), 90, np.uint8)
        frames = video_frames(video, [found["frames"][t] for t in best]) if video else grey
        image, blue = np.full((900, 1600, 3), 255, np.uint8), (220, 90, 30)

        def write(text, x, y, image=image, colour=(30, 30, 30)):      # cv2's fonts are ASCII
            cv2.putText(image, text.encode("ascii", "replace").decode(), (int(x), int(y)), 0, 0.7, colour, 1, cv2.LINE_AA)

        write(title, 12, 32)
        for left, t, frame in zip(range(12, 1600, 396), best, frames):
            scale = min(384 / frame.shape[1], 270 / frame.shape[0])
            small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)[:270, :384].copy()
            K = len(found["objects"][t])
            for rank, o in enumerate(found["objects"][t][:3]):
                green = min(max((o["times_uniform"] - 1) / max(limit_of(1, K) * K - 1, 1e-6), 0), 1)
                write(f"{rank + 1} {o['name']} {o['times_uniform']:.2f} x uniform", left, 342 + 26 * rank)
                if "box" not in o:
                    continue
                x1, y1, x2, y2 = (np.array(o["box"]) * np.tile(small.shape[1::-1], 2)).astype(int).tolist()
                cv2.rectangle(small, (x1, y1), (x2, y2), (170 * (1 - green), 170 + 40 * green, 170 * (1 - green)), 3)
                x1, y1 = min(x1, small.shape[1] - 72) + 24 * rank, min(y1, small.shape[0] - 26)
                cv2.rectangle(small, (x1, y1), (x1 + 23, y1 + 25), (0, 0, 0), -1)
                write(f"{rank + 1}", x1 + 5, y1 + 20, small, (255, 255, 255))
            image[46:46 + len(small), left:left + small.shape[1]] = small
            write(f"{seconds[t]:.1f} s", left, 420)
        x = (100 + 1480 * (seconds - seconds[0]) / max(seconds[-1] - seconds[0], 1e-3)).astype(int).tolist()
        high = max(1.1 * A_T.max(), 2)
        y = (690 - 230 * A_T / high).astype(int).tolist()
        for t in np.flatnonzero(inside):
            cv2.rectangle(image, (x[t], 460), (x[min(t + 1, T - 1)], 690), (190, 240, 250), -1)
        for v in {0, 1, int(high)}:
            cv2.line(image, (100, int(690 - 230 * v / high)), (1580, int(690 - 230 * v / high)), (180, 180, 180), 1)
            write(f"{v} x", 40, 697 - 230 * v / high)
        cv2.polylines(image, [np.stack([x, y], 1)], False, blue, 2, cv2.LINE_AA)
        for t in best:
            cv2.circle(image, (x[t], y[t]), 6, blue, -1, cv2.LINE_AA)
        for t in (0, T // 2, T - 1):
            write(f"{seconds[t]:.1f} s", min(x[t], 1520), 716)
        write("A_T, times uniform" + "; shaded: the emotional segment" * bool(np.any(inside)), 100, 452)
        hues = np.array([[[180 * c // len(P), 170, 220]] for c in range(len(P))], np.uint8)
        colours = cv2.cvtColor(hues, cv2.COLOR_HSV2BGR)[:, 0]
        now = np.searchsorted(seconds, np.linspace(seconds[0], seconds[-1], 1480))  # the frame of each column
        image[730:820, 100:1580] = colours[(np.linspace(0, 1, 90)[:, None, None] > P.cumsum(0)[:-1, now].T).sum(-1)]
        write("P", 60, 780)
        for c, name in enumerate(found["P"]):
            cv2.circle(image, (112 + c * 1480 // len(P), 852), 12, colours[c].tolist(), -1, cv2.LINE_AA)
            write(name[:14], 132 + c * 1480 // len(P), 859)
        write_whole(path, cv2.imencode(".png", image)[1].tobytes())


def predict(source, saved, args):
    """Shows one .npz, or one video: its features are extracted as those of the checkpoint were. Raises InputError."""
    path, video, extraction = Path(source), None, saved["settings"]["extraction"]
    if path.suffix.lower() in SUFFIXES and path.is_file():
        if not extraction.get("options"):
            raise InputError(f"{source}: {args.checkpoint} was not trained on features of extract_features.py; give an .npz")
        script, tuned = Path(__file__).with_name("extract_features.py"), extraction["tuned_on"]
        options = [*extraction["options"], *(["--tuned", saved["feats"]] if tuned else []), "--device", args.device]
        if subprocess.run([sys.executable, script, source, args.out, *options]).returncode:
            raise InputError(f"{source}: no features of it, see above")
        path, video = Path(args.out, f"{path.stem}.npz"), path
    elif not path.exists():
        raise InputError(f"{source}: no such file")
    elif path.suffix != ".npz" or path.is_dir():
        raise InputError(f"{source}: neither a video ({' '.join(SUFFIXES)}) nor an .npz of extract_features.py"
                         + f", but a folder; give {source.rstrip('/')}/*.mp4" * path.is_dir())
    F, other = read_features(path, saved["settings"]["features"])
    if other["settings"] and extraction and other["settings"] != extraction:
        raise InputError(f"{source}: not extracted as the features of {args.checkpoint} were; give the video")
    MARKS[:] = ["RANDOM WEIGHTS"] * (other["settings"].get("random_weights") is not None)
    show(source, Path(args.out, path.stem), F, other, saved, args, video)


# ---- Command line ----

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False, usage=(
        "%(prog)s [--data FEATS --dataset NAME] [--reproduce WHAT] [--predict FILE ... --checkpoint FILE] [options]"))
    add = parser.add_argument
    add("--data", metavar="FEATS", help="folder that extract_features.py wrote (default: a built-in planted set)")
    add("--dataset", choices=("videoemotion", "ekman"), default="ekman", help="ten 2/3-1/3 splits, or one fixed split")
    add("--split", nargs="+", default=[], metavar="LIST", help="TRAIN TEST ... (default: FEATS/{train,test}list01.txt)")
    add("--allow-missing", action="store_true", help="go on without listed videos that have no features")
    add("--allow-leak", action="store_true", help="validate on videos that the backbones were tuned on, marked")
    add("--segments", metavar="CSV", help="annotated emotional segments: does A_T find them?")
    add("--raw", action="store_true", help="features as they are, not standardised")
    add("--features", default=",".join(FEATURES), metavar="NAME,...", help="arrays of the .npz, or your own (T,D)")
    add("--fusion", choices=("dual", "time", "avg", "max"), help="table 2 (default: dual; time without objects)")
    add("--objects", type=int, default=OBJECTS, metavar="K", help=f"of a frame, at most (figure 2; default: {OBJECTS})")
    add("--beta", type=float, default=BETA, help=f"of (10) (default: {BETA})")
    add("--literal", action="store_true", help="run the equations as printed (slow; same results to rounding)")
    for name, (default, planted, what) in NOT_IN_THE_PAPER.items():
        add(f"--{name}", type=type(default), help=f"{what} (default: {default}; planted set: {planted})")
    add("--runs", type=int, help="of one split (default: 1; --reproduce on the planted set: 5)")
    add("--seed", type=int, default=0, help="of run 0; run i uses seed + i (default: 0)")
    add("--device", default=f"cuda:{ranks()[2]}" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--out", metavar="DIR", help="checkpoints, results, pictures (default: out; planted set: out/planted)")
    add("--reproduce", choices=(*ROWS, "all"), help="a table or figure of section 4, beside the paper's")
    add("--videos", metavar="DIR", help="folder that was extracted, for the frames of figure 4")
    add("--predict", nargs="+", default=[], metavar="FILE", help="videos or .npz: emotion, moments, picture, JSON")
    add("--checkpoint", metavar="FILE", help="the network of --predict: out/run0.pt")
    args = parser.parse_args(argv)
    for name, (default, planted, _) in NOT_IN_THE_PAPER.items():
        if getattr(args, name) is None:
            setattr(args, name, default if args.data else planted)
    args.features = tuple(args.features.split(","))
    args.fusion = args.fusion or ("dual" if "objects" in args.features else "time")
    args.root = args.out = args.out or ("out" if args.data or args.predict else "out/planted")
    args.runs = args.runs if args.runs is not None else 5 if args.reproduce and not args.data else 1
    if args.data and args.dataset == "ekman" and not args.split:
        args.split = [f"{args.data}/{name}list01.txt" for name in ("train", "test")]
    stems, real = [Path(source).stem for source in args.predict], args.split or args.segments or args.dataset != "ekman"
    for wrong, line in (
            (bool(args.predict) != bool(args.checkpoint), "--predict and --checkpoint go together"),
            (args.predict and (args.data or args.reproduce), "--predict does not train: no --data, no --reproduce"),
            (len(stems) > len(set(stems)), "--predict: two files of one name; predict them into two --out folders"),
            (not args.data and (real or set(args.features) - set(FEATURES)),
             "--dataset, --split, --segments and --features of your own need --data"),
            (len(args.split) % 2, "--split takes pairs of lists: TRAIN TEST"),
            (not 0 <= args.beta <= 1, "--beta: must be in [0, 1]"), (not 0 <= args.seed < 2 ** 31, "--seed: must be in [0, 2^31)"),
            *((not 0 < getattr(args, name) < 1e9, f"--{name}: must be greater than 0")
              for name in (*NOT_IN_THE_PAPER, "runs", "objects"))):
        if wrong:
            parser.error(line)
    return args


def main(argv=None):
    """Returns the exit status. Raises InputError."""
    MARKS.clear()
    args = parse_args(argv)
    with about(f"--device {args.device}"):
        torch.zeros(1, device=args.device)
    with about(args.out, "choose another --out"):
        Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.predict:
        saved = load_checkpoint(args.checkpoint)
        for source in args.predict:
            predict(source, saved, args)
        return 0
    data = Features(args.data, FEATURES if args.reproduce else args.features) if args.data else Planted(args.seed)
    random = data.extraction.get("random_weights") is not None
    MARKS.extend(["SYNTHETIC"] * (not args.data) + ["RANDOM WEIGHTS"] * random)
    say(f"data     {len(data.ids)} videos of {len(data.classes)} classes; torch {torch.__version__}, {args.device}")
    if data.cut_off:
        say(f"WARNING  {len(data.cut_off)} videos may be cut off: {', '.join(data.cut_off[:5])}, ...")
    splits = make_splits(data, args) if args.data else data.splits
    leaked = {data.ids[i] for _, test in splits for i in test} & set(data.extraction.get("tuned_on") or ())
    if leaked and not args.allow_leak:
        raise InputError(f"{args.data}: its backbones were tuned on {len(leaked)} of the validation videos: {min(leaked)}, "
                         "...; tune on this split's training list alone, or have every number marked: --allow-leak")
    MARKS.extend(["LEAKED"] * bool(leaked))
    if args.segments:
        read_segments(args.segments, data)
    if args.reproduce:
        results = reproduce(data, splits, args)
    else:
        runs = protocol(data, splits, args)
        report(runs, data, splits)
        results = summary(runs, data, args)
    path = Path(args.out, "results.json")
    with about(path, "delete it: finished runs are read back from their checkpoints"):
        old = json.loads(path.read_text()) if path.exists() else {}
        write_whole(path, json.dumps(old | results, indent=1).encode())
    say(f"written  {path}; next: python dfan.py " + (
        f"--predict VIDEO --checkpoint {args.out}/run0.pt" if args.data else "--reproduce figure4 --runs 1, or --data FEATS"))
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
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # runs are long
        values = [None] * ranks()[1]
        torch.distributed.all_gather_object(values, value)
    return values


def command(main):
    """Runs a script's main(), exits with its status; a user's failure becomes one line and status 2."""
    script, status = Path(sys.argv[0]).name, 2
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")                  # names that a terminal cannot show
    try:
        status = main()
    except (InputError, OSError) as failure:
        line = f"{script}: {' '.join(str(failure).split())}"
        print(line, file=sys.stderr, flush=True)
        if report_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):   # so that torchrun's report ends in this line
            message = dict(message=line, extraInfo=dict(timestamp=str(int(time.time()))))
            Path(report_file).write_text(json.dumps(dict(message=message)))
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted; finished files are kept; the same command goes on", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    command(main)
