"""The features of DFAN (section 3.1): one frame in eight of each video through four pretrained networks, to .npz.

    python extract_features.py videos/ feats/            # videos/<class>/<stem>.mp4 -> feats/<class>/<stem>.npz
    python extract_features.py videos/ feats/ --no-flow --detector fasterrcnn_mobilenet_v3_large_320_fpn    # on a CPU
    python extract_features.py videos/ feats/ --finetune videos/trainlist01.txt     # tunes the backbones first (4.1)
    torchrun --nproc-per-node=2 extract_features.py videos/ feats/                  # shares the videos out

One .npz a video, T sampled frames, readable with numpy alone:

    action   (T,2048) float16   F_A: Kinetics-400 TSN ResNet-50, RGB and flow, pooled, the mean of both [R13]
    scene    (T,365)  float16   F_S: outputs of the Places365 ResNet-18
    objects  (T,K,84) float16   F_O: of the K most probable boxes of a COCO detector the 80 class probabilities and
                                x1/W, y1/H, x2/W, y2/H; sorted by probability, zeros where there are fewer boxes [R15]
    frames   (T,)     int64     number of each sampled frame among the decoded ones, from 0
    seconds  (T,)     float64   its time stamp
    fps      ()       float64   frames a second, as the file says
    settings ()       str       JSON: what made the file (networks, weight files and their SHA-256, every, K, version)

Where the paper's networks are not public, the nearest public ones stand in: TSN ResNet-50 for DPN107, OpenCV's DIS flow
for TV-L1, Faster R-CNN for Grid R-CNN (README, "What differs from the paper").
"""
import argparse
import concurrent.futures
import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import sys
import time
from collections import deque
from pathlib import Path

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")         # broken videos are reported here, not by FFmpeg
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

try:
    import cv2
    import numpy as np
    import torch
    from torch import nn
    from torchvision.models import detection, resnet18, resnet50
    from torchvision.models.resnet import Bottleneck
    from torchvision.ops import FrozenBatchNorm2d, batched_nms, clip_boxes_to_image, remove_small_boxes
except ImportError as missing:
    print(f"extract_features.py: {missing}; pip install -r requirements.txt; if it is libGL that is missing: `apt "
          "install libgl1`, or `pip uninstall opencv-python` and `pip install opencv-python-headless`", file=sys.stderr)
    sys.exit(2)

from dfan import (DAMAGED, SUFFIXES, WEEK, InputError, check_writable, command, load_checkpoint, one_line, read_list,
                  save, usable, write_whole)

try:
    import fcntl
except ImportError:                        # Windows: two tunings at once are not kept apart
    fcntl = None

VERSION = 1                                # of the .npz layout
EVERY, K = 8, 16                           # "one frame [...] at every eight frames" (4.1), "K = 16" (3.2.1)
PAIRS, BOUND = 5, 20                       # TSN's flow input: five fields, clipped to +-20 pixels

IMAGES = dict(action_rgb="rgb", action_flow="flow", scene="scene")            # network -> its images in a sample
IMAGENET = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]                  # mean, standard deviation
NORMALISATION = dict(action_rgb=IMAGENET, action_flow=([128.], [128.]), scene=IMAGENET)

OPENMMLAB = ("https://download.openmmlab.com/mmaction/", "https://openmmlab.oss-accelerate.aliyuncs.com/mmaction/")
TSN_RGB = "tsn_imagenet-pretrained-r50_8xb32-1x1x8-100e_kinetics400-rgb"
TSN_FLOW = "tsn_r50_320p_1x1x8_110e_kinetics400_flow"
DETECTORS = {"fasterrcnn_resnet50_fpn_v2": detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
             "fasterrcnn_resnet50_fpn": detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
             "fasterrcnn_mobilenet_v3_large_fpn": detection.FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1,
             "fasterrcnn_mobilenet_v3_large_320_fpn": detection.FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1}
COCO_91 = DETECTORS["fasterrcnn_resnet50_fpn_v2"].meta["categories"]
COCO_80 = [i for i, name in enumerate(COCO_91) if name not in ("__background__", "N/A")]      # the rows of F_O
NAMES = [COCO_91[i] for i in COCO_80]
# fine-tuning (4.1) after TSN; the numbers are not in the paper
TUNED = ("action_rgb", "action_flow", "scene")
SEGMENTS, KEPT, TUNING = 3, 8, dict(epochs=10, lr=1e-3, momentum=0.9, weight_decay=5e-4, batch=8)
# file name -> (addresses, start of its SHA-256)
FILES = {
    "action_rgb": (f"{TSN_RGB}_20220906-2692d16c.pth", "2692d16c",
                   [f"{host}v1.0/recognition/tsn/{TSN_RGB}/" for host in OPENMMLAB]
                   + ["https://huggingface.co/RaphaelLiu/EvalCrafter-Models/resolve/main/"]),
    "action_flow": (f"{TSN_FLOW}_20200705-1f39486b.pth", "1f39486b",
                    [f"{host}recognition/tsn/{TSN_FLOW}/" for host in OPENMMLAB]),
    "scene": ("resnet18_places365.pth.tar", "2f4759217d470da2b803f8f66cd4488a066406b555a5fb95ee9a4663f9f05588",
              ["http://places2.csail.mit.edu/models_places365/"]),
    **{name: (w.url.rsplit("/", 1)[1], w.url.rsplit("-", 1)[1].removesuffix(".pth"), [w.url.rsplit("/", 1)[0] + "/"])
       for name, w in DETECTORS.items()}}


class VideoError(Exception):
    """A video that gives no frames: it is reported, and the run goes on."""


# ======================================================================================================================
# Weights
# ======================================================================================================================

def find_weights(network, folder):
    """The path of a network's weight file and its SHA-256: from --weights, from torch hub's cache, or downloaded.

    Raises InputError, naming the file, its addresses and --weights, if it cannot be had or has another hash.
    """
    name, prefix, addresses = FILES[network]
    cache = Path(torch.hub.get_dir(), "checkpoints")
    path = next((p for p in (Path(folder or cache, name), cache / name) if p.is_file()), cache / name)
    if not path.is_file():
        failures = []
        for address in addresses:
            try:
                cache.mkdir(parents=True, exist_ok=True)
                print(f"download {address + name}", file=sys.stderr)
                torch.hub.download_url_to_file(address + name, str(path), prefix, progress=sys.stderr.isatty())
                break
            except (OSError, RuntimeError) as error:       # no network; wrong hash
                failures.append(str(error))
        else:
            raise InputError(f"cannot download {name} ({failures[0]}); get it from "
                             f"{' or '.join(a + name for a in addresses)} by other means and name its folder with "
                             "--weights DIR (a trial without weights: --random-weights)")
    sha256 = hash_file(path)
    if not sha256.startswith(prefix):
        raise InputError(f"{path}: its SHA-256 is {sha256}, not the published {prefix}...; delete it and get it from "
                         f"{addresses[0] + name}")
    return path, sha256


def find_all(networks, folder):
    """{network: (path, SHA-256)}. Raises InputError for the first that cannot be had, naming the others."""
    if folder and not Path(folder).is_dir():
        raise InputError(f"--weights {folder}: no such folder")
    found, failures = {}, []
    for network in networks:
        try:
            found[network] = find_weights(network, folder)
        except InputError as failure:
            failures.append((FILES[network][0], failure))
    if failures:
        others = ", ".join(name for name, _ in failures[1:])
        raise InputError(f"{failures[0][1]}{f'; the same for {others}' if others else ''}")
    return found


def hash_file(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load_strictly(model, path, rename=lambda key: key):
    """Loads a file of plain tensors, each key renamed, every key accounted for. Raises InputError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict({rename(k): v for k, v in state.get("state_dict", state).items()}, strict=True)
    except (pickle.UnpicklingError, KeyError, *DAMAGED) as error:
        raise InputError(f"{path}: not the weights of this network ({' '.join(str(error).split())[:300]}); delete it "
                         "and get the published file") from error
    return model


def tsn_key(key):
    """A key of mmaction2's TSN, as torchvision's resnet50 calls it."""
    key = key.removeprefix("backbone.").replace("cls_head.fc_cls", "fc")
    key = key.replace("downsample.conv.", "downsample.0.").replace("downsample.bn.", "downsample.1.")
    for n in "123":
        key = key.replace(f"conv{n}.conv.", f"conv{n}.").replace(f"conv{n}.bn.", f"bn{n}.")
    return key


def build_detector(name):
    """A torchvision Faster R-CNN as its published weights expect it: all but the _v2 have frozen batch norm."""
    model = getattr(detection, name)(weights=None, weights_backbone=None)
    if not name.endswith("_v2"):
        eps = 0. if name == "fasterrcnn_resnet50_fpn" else 1e-5                   # as torchvision sets it
        for module in list(model.modules()):
            for child, norm in list(module.named_children()):
                if isinstance(norm, nn.BatchNorm2d):
                    setattr(module, child, FrozenBatchNorm2d(norm.num_features, eps=eps))
    return model


class Networks:
    """The networks of section 3.1 on one device; called with frames, returns their features.

    weights: {network: path}, or a seed (int) for random weights; tuned: {network: state dict} in place of either.
    """

    def __init__(self, names, weights, device, tuned={}):
        self.device, self.models = device, {}
        if not isinstance(weights, dict):
            torch.manual_seed(weights)
        for name in names:
            if name == "scene":
                model, rename = resnet18(num_classes=365), lambda key: key.removeprefix("module.")
            elif name in DETECTORS:
                model, rename = build_detector(name), lambda key: key
            else:
                model, rename = resnet50(num_classes=400), tsn_key
                if name == "action_flow":
                    model.conv1 = nn.Conv2d(2 * PAIRS, 64, 7, stride=2, padding=3, bias=False)
            if isinstance(weights, dict):
                if name not in tuned:
                    load_strictly(model, weights[name], rename)
            elif name in DETECTORS:
                model.roi_heads.score_thresh = 0.                                 # random scores are all about 1/91
            elif name.startswith("action"):
                for block in (m for m in model.modules() if isinstance(m, Bottleneck)):
                    nn.init.constant_(block.bn3.weight, 0.65)                     # features of size 1, not 15
            if name.startswith("action"):
                model.fc = nn.Identity()                                          # pooled features (N,2048)
            if name in tuned:
                model.load_state_dict(tuned[name], strict=True)
            self.models["objects" if name in DETECTORS else name] = model.eval().to(
                device, memory_format=torch.channels_last)                        # as the images are

    def input(self, name, images):
        """What a network takes from its images (N,224,224,.) uint8: (N,.,224,224) float32, normalised."""
        mean, std = NORMALISATION[name]
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float()
        return (x - torch.tensor(mean, device=self.device).view(-1, 1, 1)) / torch.tensor(
            std, device=self.device).view(-1, 1, 1)

    @torch.inference_mode()
    def __call__(self, samples):
        """samples: dicts of read_video. Returns float32 arrays action (N,2048), scene (N,365), objects (N,K,84)."""
        def run(name):
            return self.models[name](self.input(name, np.stack([s[IMAGES[name]] for s in samples])))

        action = run("action_rgb")
        if "action_flow" in self.models:
            action = (action + run("action_flow")) / 2
        scene = run("scene")
        frames = [torch.from_numpy(s["frame"]).to(self.device).permute(2, 0, 1).float() / 255 for s in samples]
        return dict(action=action.cpu().numpy(), scene=scene.cpu().numpy(),
                    objects=detect(self.models["objects"], frames).cpu().numpy())


def detect(model, frames):
    """F_O of each frame: a Faster R-CNN's own steps, but keeping each box's whole row of probabilities.

    frames: list of (3,H,W) in [0, 1]. Returns (N,K,84): 80 probabilities and the corners / (W, H) of the K best boxes.
    """
    images, _ = model.transform(frames)
    features = model.backbone(images.tensors)
    proposals, _ = model.rpn(images, features)
    heads = model.roi_heads
    pooled = heads.box_head(heads.box_roi_pool(features, proposals, images.image_sizes))
    logits, offsets = heads.box_predictor(pooled)
    per_image = [len(p) for p in proposals]
    all_boxes = heads.box_coder.decode(offsets, proposals).view(*logits.shape, 4).split(per_image)   # (R,91,4)
    all_scores = logits.softmax(-1).split(per_image)                                             # (R,91)
    out = torch.zeros(len(frames), K, len(COCO_80) + 4, device=logits.device)
    for F_o, boxes, scores, (height, width) in zip(out, all_boxes, all_scores, images.image_sizes):
        boxes = clip_boxes_to_image(boxes, (height, width))
        row, label = torch.where(scores[:, 1:] > heads.score_thresh)
        label = label + 1                                                                        # 0 is the background
        big = remove_small_boxes(boxes[row, label], 1e-2)
        row, label = row[big], label[big]
        best = batched_nms(boxes[row, label], scores[row, label], label, heads.nms_thresh)[:K]   # sorted by score
        row, label = row[best], label[best]
        F_o[:len(row), :-4] = scores[row][:, COCO_80]
        F_o[:len(row), -4:] = boxes[row, label] / torch.tensor([width, height] * 2, device=boxes.device)
    return out


# ======================================================================================================================
# Video
# ======================================================================================================================

def resize_short(image, side):
    """Scales so that the short side is `side` pixels."""
    h, w = image.shape[:2]
    size = (side, max(side, round(h * side / w))) if w < h else (max(side, round(w * side / h)), side)
    return image if size == (w, h) else cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def centre_crop(image, side=224):
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top:top + side, left:left + side]


def flow_fields(dis, greys):
    """The flow network's input (224,224,10) uint8 from up to six consecutive grey frames: x0, y0, ..., x4, y4.

    A video shorter than six frames repeats its last pair; a single frame does not move.
    """
    still = np.zeros((*greys[0].shape, 2), np.float32)
    fields = [dis.calc(a, b, None) for a, b in itertools.pairwise(greys)] or [still]
    fields += fields[-1:] * (PAIRS - len(fields))
    fields = np.nan_to_num(np.concatenate(fields, -1), nan=0.)                             # DIS on a strip of 16 x 512
    flow = (fields.clip(-BOUND, BOUND) + BOUND) * (255 / (2 * BOUND))
    return centre_crop(resize_short(np.round(flow).astype(np.uint8), 256))


def read_video(path, every, flow):
    """Yields a dict for one decoded frame in `every`, to the end of the stream, whatever the container's frame count.

    number, seconds, fps; frame (H,W,3) uint8 RGB; rgb, scene (224,224,3) uint8; flow (224,224,10) uint8 of the five
    pairs centred on the frame, shifted inwards at the ends of the video. The last dict is {"end": warning, or ""}.
    Raises VideoError.
    """
    if not os.path.isfile(path):
        raise VideoError("no file: a broken link, or something else of that name")
    if not os.fsencode(path).decode(errors="ignore") == str(path):
        raise VideoError("its name is not UTF-8, which crashes OpenCV; rename it")
    video = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
    try:
        if not video.isOpened():
            raise VideoError("OpenCV cannot open it: empty, damaged, or not a video")
        fps, expected = video.get(cv2.CAP_PROP_FPS), video.get(cv2.CAP_PROP_FRAME_COUNT)
        dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST) if flow else None
        greys, waiting, number, last = deque(maxlen=PAIRS + 1), deque(), 0, -1.
        while video.grab():
            if flow or number % every == 0:
                ok, frame = video.retrieve()
                if not ok:
                    break
            if flow:
                grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
                greys.append(resize_short(grey, max(16, min(320, *grey.shape))))       # DIS takes no less than 12
            if number % every == 0:
                seconds = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
                if not last < seconds < float("inf"):             # no time stamps in the stream, or they start anew
                    seconds = max(number / fps, last + every / fps) if fps > 0 else max(float(number), last + every)
                last = seconds
                frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                waiting.append(dict(number=number, seconds=seconds, fps=fps, frame=frame,
                                    rgb=centre_crop(resize_short(frame, 256)),
                                    scene=centre_crop(cv2.resize(frame, (256, 256), interpolation=cv2.INTER_AREA))))
            # the window of frame n is frames n-2 to n+3, from 0 at the earliest: `greys` when its last one is there
            while waiting and (not flow or number >= max(0, waiting[0]["number"] - PAIRS // 2) + PAIRS):
                yield waiting.popleft() | (dict(flow=flow_fields(dis, greys)) if flow else {})
            number += 1
        for sample in waiting:                                    # shifted inwards: the last six frames
            yield sample | dict(flow=flow_fields(dis, greys))
        if number == 0:
            codec = int(video.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True).decode("ascii", "replace")
            raise VideoError(f"no frame decodes (codec {codec.strip(chr(0) + ' ') or 'unknown'}); convert it: "
                             "ffmpeg -i IN -c:v libx264 OUT.mp4")
        short = 0 < expected < 1e9 and number < 0.99 * expected - 2
        yield dict(end=f"only {number} of {expected:.0f} frames decode" if short else "")
    except cv2.error as error:
        raise VideoError(f"OpenCV: {' '.join(str(error).split())}") from error
    finally:
        video.release()


def read_videos(videos, every, flow, batch):
    """Yields (identity, samples, None) for each batch of frames, (identity, None, outcome) at the end of each video."""
    for identity, path in videos.items():
        outcome = ""
        try:
            frames = read_video(path, every, flow)
            while samples := list(itertools.islice(frames, batch)):
                if "end" in samples[-1]:
                    outcome = samples.pop()["end"]
                if samples:
                    yield identity, samples, None
        except VideoError as error:
            outcome = error
        yield identity, None, outcome


def extract(videos, networks, settings, batch=16, seen=lambda identity, n: None):
    """Yields (identity, arrays of the .npz, warning or "") of each video, (identity, None, VideoError) if none come.

    videos: {identity: path}; settings: what the files will say; seen(identity, frames) is told of each batch.
    """
    batches, flow = [], "action_flow" in settings["networks"]
    items = ahead(read_videos(videos, settings["every"], flow, batch))
    for identity, parts, outcome in side_by_side(items, networks):
        if outcome is None:
            batches += [F | {k: np.array([s[k] for s in part]) for k in ("number", "seconds", "fps")}
                        for part, F in parts]
            seen(identity, sum(len(part) for part, _ in parts))
            continue
        if isinstance(outcome, VideoError):
            yield identity, None, outcome
        else:
            F = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
            yield identity, dict(
                **{k: F[k].astype(np.float16) for k in ("action", "scene", "objects")}, frames=F["number"],
                seconds=F["seconds"], fps=F["fps"][0], settings=json.dumps(settings)), outcome
        batches = []


def side_by_side(items, networks):
    """The items of read_videos, in place of the samples of each [(part of them, their features)].

    On a CPU the parts are four frames each and run side by side, each on one core: faster than one batch on all cores,
    and the same numbers for any number of cores. The parts of the next item wait, so that no core does.
    """
    if torch.device(networks.device).type != "cpu":
        for identity, samples, outcome in items:
            yield identity, [(samples, networks(samples))] if samples else [], outcome
        return
    cores, waiting = torch.get_num_threads(), deque()
    torch.set_num_threads(1)
    pool = concurrent.futures.ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for identity, samples, outcome in items:
            parts = [samples[n:n + 4] for n in range(0, len(samples or ()), 4)]
            waiting.append((identity, parts, [pool.submit(networks, part) for part in parts], outcome))
            if len(waiting) > 1:
                yield with_results(*waiting.popleft())
        while waiting:
            yield with_results(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)                            # as after Ctrl-C
        torch.set_num_threads(cores)


def with_results(identity, parts, futures, outcome):
    return identity, [(part, future.result()) for part, future in zip(parts, futures)], outcome


def ahead(iterator):
    """The same items; a thread makes the next while this one is used."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, iterator, None)
        while (item := future.result()) is not None:
            future = thread.submit(next, iterator, None)
            yield item


# ======================================================================================================================
# Files
# ======================================================================================================================

def find_videos(folder):
    """{"class/stem": path} of the videos below a folder, sorted. The class is the first folder. Raises InputError."""
    folder, videos, others = Path(folder), {}, []
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; it holds videos as {folder}/<class>/<name>.mp4")

    def unreadable(error):
        raise error

    for place, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            stem, suffix = os.path.splitext(name)
            parts = Path(place, name).relative_to(folder).parts
            if suffix.lower() not in SUFFIXES:
                others += [name] * (len(parts) > 1)
                continue
            if len(os.fsencode(f"{stem}.npz")) > 255:
                raise InputError(f"{Path(place, name)}: its name is too long for that of an .npz; shorten it")
            if len(parts) < 2:
                raise InputError(f"{folder / name}: in no class folder; move it to {folder}/<class>/{name}")
            identity = f"{parts[0]}/{stem}"
            if identity in videos:
                raise InputError(f"{videos[identity]} and {Path(place, name)} are both {identity}; rename one of them")
            videos[identity] = Path(place, name)
    if not videos:
        raise InputError(f"{folder}: no video below it ({' '.join(SUFFIXES)}); it holds <class>/<name>.mp4")
    if others:
        print(f"skipped  {len(others)} files whose suffix is no video's: {', '.join(others[:5])}"
              f"{', ...' if len(others) > 5 else ''}")
    return dict(sorted(videos.items()))


def is_finished(path, settings):
    """Whether a whole .npz made with these settings is there. Raises InputError if it was made with others."""
    try:
        with np.load(path, allow_pickle=False) as f:
            old = dict(json.loads(str(f["settings"])))
    except (KeyError, *DAMAGED):
        return False                                               # not there, or damaged: made again
    short = lambda v: f"a list of {len(v)}" if isinstance(v, list) else v
    differs = [f"{k} {short(old.get(k))} (now {short(settings.get(k))})" for k in settings | old
               if old.get(k) != settings.get(k)]
    if differs:
        raise InputError(f"{path}: made with other settings: {'; '.join(differs)}; --overwrite makes it again, another "
                         "output folder keeps both")
    return True


def write_features(path, features):
    buffer = io.BytesIO()
    np.savez(buffer, **features)
    write_whole(path, buffer.getbuffer())


class Progress:
    """One line that is rewritten on a terminal, else a line a video."""

    def __init__(self, total):
        self.total, self.done, self.frames, self.start = total, 0, 0, time.monotonic()

    def show(self, identity, end=True):
        spent = time.monotonic() - self.start
        left = f"{spent / self.done * (self.total - self.done) / 60:.1f} min left" if self.done else ""
        line = f"[{self.done}/{self.total}] {identity}  {self.frames / spent:.2f} frames/s  {left}"
        if sys.stdout.isatty():
            print(f"\r\033[K{line[:shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif end:
            print(line, flush=True)

    def say(self, line):
        print(("\r\033[K" if sys.stdout.isatty() else "") + one_line(line), flush=True)


# ======================================================================================================================
# Fine-tuning: "the action and the scene feature extraction networks change the final classification layer and use the
# training set for fine-tuning" (4.1)
# ======================================================================================================================

def keep_images(videos, folder, every, flow):
    """For each training video its images at up to 2 KEPT evenly spaced samples, in folder/<class>/<stem>.npz.

    They are decoded once and kept on disk, about 10 MB a video, until the tuning is over. Returns {identity: path}.
    """
    paths, progress = {identity: folder / f"{identity}.npz" for identity in videos}, Progress(len(videos))
    todo = {identity: path for identity, path in videos.items() if not paths[identity].is_file()}
    progress.done = len(videos) - len(todo)
    for identity, path in todo.items():
        kept, stride = [], 1
        try:
            for n, sample in enumerate(s for s in read_video(path, every, flow) if "end" not in s):
                if n % stride == 0:
                    kept.append({name: sample[name] for name in IMAGES.values() if name in sample})
                    if len(kept) == 2 * KEPT:
                        kept, stride = kept[::2], 2 * stride
                progress.frames += 1
        except VideoError as error:
            raise InputError(f"{path}: {error}; take it off the list of --finetune") from error
        write_features(paths[identity], {name: np.stack([s[name] for s in kept]) for name in kept[0]})
        progress.done += 1
        progress.show(f"tuning   images of {identity}")
    return paths


def tune(name, networks, paths, labels, classes, folder, seed):
    """Trains one backbone, TSN's way: SEGMENTS frames of a video, their scores averaged; returns its state dict.

    action_*: a C-way layer in place of the last; scene: one on the 365 outputs, which stay the features [R14].
    Batch normalisation keeps its statistics. A checkpoint an epoch lies in folder; an interrupted tuning goes on.
    """
    backbone, device, path = networks.models[name], networks.device, folder / f"{name}.pt"
    torch.manual_seed(seed)
    layer = nn.Linear(365 if name == "scene" else 2048, len(classes)).to(device)
    model = nn.Sequential(backbone, nn.Dropout(0. if name == "scene" else 0.5), layer)
    optimizer = torch.optim.SGD(model.parameters(), **{k: TUNING[k] for k in ("lr", "momentum", "weight_decay")})
    done, ids = 0, list(paths)
    if path.exists():
        saved = load_checkpoint(path, "delete it to tune again", dict(model=dict, optimizer=dict, epoch=int))
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["epoch"]
    for epoch in range(done + 1, TUNING["epochs"] + 1):
        rng, total, right = np.random.default_rng([seed, epoch]), 0., 0
        torch.manual_seed(seed + epoch)                                            # of dropout
        model[1].train()
        order = rng.permutation(len(ids))
        for start in range(0, len(ids), TUNING["batch"]):
            batch, images = order[start:start + TUNING["batch"]], []
            for i in batch:
                try:
                    with np.load(paths[ids[i]], allow_pickle=False) as f:
                        kept = f[IMAGES[name]]
                except (KeyError, *DAMAGED) as error:
                    raise InputError(f"{paths[ids[i]]}: damaged; delete it and give the command again") from error
                for part in np.array_split(np.arange(len(kept)), SEGMENTS):
                    image = kept[rng.choice(part) if len(part) else rng.integers(len(kept))]
                    if rng.random() < 0.5:                                         # mirrored: x flows the other way
                        image = image[:, ::-1]
                        if name == "action_flow":
                            image = np.where(np.arange(2 * PAIRS) % 2 == 0, 255 - image, image)
                    images.append(image)
            y = torch.tensor([labels[ids[i]] for i in batch], device=device)
            scores = model(networks.input(name, np.stack(images))).view(len(batch), SEGMENTS, -1).mean(1)
            loss = nn.functional.cross_entropy(scores, y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 20.)                      # as TSN does
            optimizer.step()
            total, right = total + loss.item() * len(batch), right + (scores.argmax(1) == y).sum().item()
        save(path, dict(model=model.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch))
        print(f"tuning   {name}  epoch {epoch}/{TUNING['epochs']}  loss {total / len(ids):.4f}  accuracy on the "
              f"training videos {right / len(ids):.4f}", flush=True)
    model.eval()
    return {k.removeprefix("0."): v.cpu() for k, v in model.state_dict().items() if k.startswith("0.")}


def lock_file(path):
    """An open file that is this process's alone until it is closed or the process ends. Raises InputError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "w")
    if fcntl:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{path}: another process is tuning in this folder; give the command again when it has "
                             "finished") from error
    return lock


def finetune(args, videos, feats, names, weights, files, device):
    """({network: tuned state dict}, the tuned networks' descriptions, the identities they were tuned on).

    The weights lie in feats/finetuned.pt and are used again when list, settings and starting weights are the same.
    """
    ids = list(videos)
    found, missing = read_list(args.finetune, ids)
    if missing:
        raise InputError(f"{args.finetune}: {len(missing)} listed videos are not in {args.videos}: "
                         f"{', '.join(missing[:5])}; add them, or take them off the list")
    train = sorted(ids[i] for i in found)
    classes = sorted({identity.split("/", 1)[0] for identity in train})
    tuned_names = [name for name in names if name in TUNED]
    meta = dict(tuned_on=train, start={name: files[name] for name in tuned_names}, every=args.every, seed=args.seed,
                tuning=TUNING | dict(segments=SEGMENTS, kept=KEPT))
    path, folder = feats / "finetuned.pt", feats / ".finetuning"
    if path.exists():
        saved = load_checkpoint(path, "delete it to tune again", dict(states=dict, meta=dict))
        if saved["meta"] != meta:
            raise InputError(f"{path}: tuned on another list or with other settings; choose another output folder")
        print(f"tuning   {path} is used again")
        shutil.rmtree(folder, ignore_errors=True)                      # if it was killed before this
        states = saved["states"]
    else:
        lock = lock_file(feats / ".finetuning.lock")
        started = folder / "meta.json"
        try:
            other = started.exists() and json.loads(started.read_text()) != meta
        except ValueError:
            other = True
        if other:
            raise InputError(f"{folder}: an interrupted tuning on another list or with other settings; delete it")
        write_whole(started, json.dumps(meta).encode())
        print(f"tuning   {', '.join(tuned_names)} on {len(train)} videos of {len(classes)} classes", flush=True)
        images = keep_images({i: videos[i] for i in train}, folder, args.every, not args.no_flow)
        networks = Networks(tuned_names, weights, device)
        labels = {identity: classes.index(identity.split("/", 1)[0]) for identity in train}
        states = {name: tune(name, networks, images, labels, classes, folder, args.seed) for name in tuned_names}
        save(path, dict(states=states, meta=meta))
        shutil.rmtree(folder)
        lock.close()
    sha256 = hash_file(path)
    return states, {name: f"{path.name} sha256 {sha256}, from {files[name]}" for name in tuned_names}, train


# ======================================================================================================================
# dfan.py --predict
# ======================================================================================================================

def remembered(settings, folders, device):
    """The networks that made features with these settings, the JSON in an .npz. Raises InputError.

    folders: where the weight files may lie and finetuned.pt, None for a folder that was not given.
    """
    if (settings.get("version"), settings.get("K")) != (VERSION, K):
        raise InputError(f"the checkpoint's features are of version {settings.get('version')} with K = "
                         f"{settings.get('K')}, this extract_features.py makes version {VERSION} with {K}; extract and "
                         "train again")
    names, weights, tuned = settings["networks"], settings["random_weights"], {}
    if settings["tuned_on"]:
        places = [Path(folder, "finetuned.pt") for folder in folders if folder]
        path = next((p for p in places if p.is_file() and hash_file(p) in " ".join(names.values())), None)
        if path is None:
            raise InputError(f"{' and '.join(map(str, places))}: not the tuned networks of the checkpoint's features; "
                             "name the folder of their finetuned.pt with --weights DIR")
        tuned = load_checkpoint(path, "tune again", dict(states=dict, meta=dict))["states"]
    if weights is None:
        weights = {name: path for name, (path, _) in find_all(set(names) - set(tuned), folders[0]).items()}
    return Networks(names, weights, device, tuned)


def already_extracted(video, path, settings):
    """The warning, or "", of an earlier extract_one with these arguments, None if there was none.

    Raises InputError if the file is there but is not of this video.
    """
    try:
        with np.load(path, allow_pickle=False) as f:
            made, origin = json.loads(str(f["settings"])), json.loads(str(f["origin"]))
        same = origin["video"] == os.path.abspath(video)
    except FileNotFoundError:
        return None
    except (KeyError, *DAMAGED):
        same = False
    if not same:
        raise InputError(f"{path}: there already, and not of {video}; choose another --out")
    stat = os.stat(video)
    return origin["warning"] if (made, origin["size"], origin["time"]) == (settings, stat.st_size, stat.st_mtime_ns) \
        else None


def extract_one(video, path, networks, settings):
    """Writes the .npz of one video and where it came from, returns a warning or "". Raises InputError, VideoError."""
    (_, features, outcome), = extract({video: video}, networks, settings)
    if features is None:
        raise outcome
    stat = os.stat(video)
    write_features(path, features | dict(origin=json.dumps(dict(
        video=os.path.abspath(video), size=stat.st_size, time=stat.st_mtime_ns, warning=outcome))))
    return outcome


# ======================================================================================================================
# Command line
# ======================================================================================================================

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     usage="%(prog)s videos feats [options]")
    group = parser.add_argument_group("data")
    group.add_argument("videos", help="folder of <class>/<name>.mp4; its split lists (*.txt, *.list) are copied along")
    group.add_argument("feats", help="folder for <class>/<name>.npz")
    group.add_argument("--every", type=int, default=EVERY, help=f"one frame in this many (4.1; default: {EVERY})")
    group = parser.add_argument_group("networks (3.1)")
    group.add_argument("--no-flow", action="store_true", help="F_A of RGB alone")
    group.add_argument("--detector", choices=DETECTORS, default="fasterrcnn_resnet50_fpn_v2", metavar="NAME",
                       help=f"for F_O: {', '.join(DETECTORS)} (default: the first; the last two are bearable on a CPU)")
    group.add_argument("--weights", metavar="DIR", help="folder with weight files, where they cannot be downloaded")
    group.add_argument("--finetune", metavar="TRAINLIST",
                       help="first tune the action and scene networks on these videos (4.1); dfan.py then refuses to "
                            "validate on any of them")
    group.add_argument("--random-weights", action="store_true", help="try the pipeline without weights; means nothing")
    group.add_argument("--seed", type=int, default=0, help="of --random-weights and --finetune (default: 0)")
    group = parser.add_argument_group("running")
    group.add_argument("--overwrite", action="store_true", help="extract finished videos again")
    group.add_argument("--batch", type=int, default=16, help="frames in a batch (default: 16)")
    group.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    args = parser.parse_args(argv)
    if args.every < 1 or args.batch < 1:
        parser.error("--every and --batch must be at least 1")
    if not 0 <= args.seed < 2 ** 31:
        parser.error("--seed: must be a whole number from 0 to 2147483647")
    return args


def main(argv=None):
    """Returns the exit status: 0, or 1 if videos could not be decoded. Raises InputError."""
    args = parse_args(argv)
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = args.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    usable(device)
    videos, feats = find_videos(args.videos), Path(args.feats)
    check_writable(feats)
    if world > 1 and args.finetune and not (feats / "finetuned.pt").exists():
        raise InputError(f"{feats / 'finetuned.pt'}: not there yet, and torchrun's processes would tune one network "
                         "each; give the command once without torchrun, then with it")
    names = ["action_rgb", *([] if args.no_flow else ["action_flow"]), "scene", args.detector]
    if args.random_weights:
        print(f"WARNING  networks with RANDOM weights (seed {args.seed}): these features try the pipeline and mean "
              "nothing")
        weights, files = args.seed, {name: "random" for name in names}
    else:
        found = find_all(names, args.weights)
        weights, files = {name: path for name, (path, _) in found.items()}, {
            name: f"{path.name} sha256 {sha256}" for name, (path, sha256) in found.items()}
    tuned, train = {}, None
    if args.finetune:
        tuned, described, train = finetune(args, videos, feats, names, weights, files, device)
        files = files | described
    videos = dict(list(videos.items())[rank::world])
    settings = dict(version=VERSION, every=args.every, K=K, networks=files,
                    random_weights=args.seed if args.random_weights else None, tuned_on=train)
    out = {identity: feats / f"{identity}.npz" for identity in videos}
    finished = [] if args.overwrite else [i for i in videos if is_finished(out[i], settings)]
    todo = {identity: path for identity, path in videos.items() if identity not in set(finished)}
    for path in sorted(Path(args.videos).iterdir() if rank == 0 else ()):
        if path.suffix in (".txt", ".list") and path.is_file():
            copy = feats / path.name
            if not copy.exists():
                write_whole(copy, path.read_bytes())
            elif copy.read_bytes() != path.read_bytes():
                print(f"kept     {copy}, which differs from {path}")
    for identity in videos:                                    # dfan.py must see a class whose videos all fail
        out[identity].parent.mkdir(parents=True, exist_ok=True)
    print(f"{len(videos)} videos, {len(finished)} finished before, {len(todo)} to do; device {device}", flush=True)
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=WEEK)
    networks = Networks(names, weights, device, tuned) if todo else None
    progress, failures = Progress(len(todo)), {}

    def seen(identity, n):
        progress.frames += n
        progress.show(identity, end=False)

    for identity, features, outcome in extract(todo, networks, settings, args.batch, seen) if todo else ():
        progress.done += 1
        if features is None:
            failures[identity] = outcome
            progress.say(f"FAILED   {videos[identity]}: {outcome}")
        else:
            write_features(out[identity], features)
            if outcome:
                progress.say(f"WARNING  {videos[identity]}: {outcome}; they are kept")
            progress.show(identity)
    if todo:
        progress.say(f"{len(todo) - len(failures)} videos extracted, {len(failures)} failed, {progress.frames} frames "
                     f"sampled in {time.monotonic() - progress.start:.0f} s")
    for identity, failure in failures.items():
        print(one_line(f"failed   {videos[identity]}: {failure}"))
    status = 1 if failures else 0
    if world > 1:                                              # torchrun ends all when one ends with a status
        statuses = [None] * world
        torch.distributed.all_gather_object(statuses, status)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        status = max(statuses)
    return status


if __name__ == "__main__":
    command(main)
