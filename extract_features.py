"""The features of DFAN (section 3.1): one frame in eight of each video through four pretrained networks, to .npz.

    python extract_features.py videos/ feats/            # videos/<class>/<stem>.mp4 -> feats/<class>/<stem>.npz
    python extract_features.py clip.mp4 feats/           # one video -> feats/clip.npz

Of T sampled frames, readable with numpy alone:

    action   (T,2048) float16   F_A: Kinetics-400 TSN ResNet-50, RGB and flow, pooled, the mean of both [R13]
    scene    (T,365)  float16   F_S: outputs of the Places365 ResNet-18
    objects  (T,K,84) float16   F_O: of the K most probable boxes 80 COCO probabilities and x1/W, y1/H, x2/W, y2/H;
                                zeros where there are fewer boxes [R15]
    frames, seconds (T,)        number of each sampled frame among the decoded ones, from 0; its time stamp
    fps, warning, video_bytes   frames a second, as the file says; why it may be cut off, or ""; size of the video file
    settings                    JSON of what made it: networks, hashes, every, K, options, versions
"""
import argparse
import collections
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")                # broken videos are reported here, not by FFmpeg
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault("OPENCV_FFMPEG_READ_ATTEMPTS", "1000000")      # packets of sound between two pictures

try:
    import cv2
    import numpy as np
    import torch
    from torch import nn
    from torchvision.models import detection, get_model_weights, resnet18, resnet50
    from torchvision.ops import FrozenBatchNorm2d, batched_nms, clip_boxes_to_image, remove_small_boxes
except ImportError as missing:
    print(f"extract_features.py: {missing}; pip install -r requirements.txt, or for libGL: apt install libgl1", file=sys.stderr)
    sys.exit(2)

from dfan import SUFFIXES, InputError, about, command, gather, ranks, read_list, write_whole

EVERY, K = 8, 16                           # "one frame [...] at every eight frames" (4.1), "K = 16" (3.2.1)
PAIRS, BOUND = 5, 20                       # TSN's flow input: five fields, clipped to +-20 pixels
TRIES = 200                                # failures in a row that end a video


# ---- 4.1 Sampling: "one frame is uniformly sampled at every eight frames for feature extraction" ----
class VideoError(Exception):
    """A video that gives no frames: it is reported, and the run goes on."""


def read_video(path, every, flow):
    """Yields a dict for one decoded frame in `every`, to the end of the stream, whatever the container's count.

    number, seconds, fps; frame (H,W,3) uint8 RGB; rgb, scene (224,224,3) uint8; flow (224,224,10) uint8 of the
    five pairs centred on the frame, shifted inwards at the ends of the video. The last dict is {"end": warning,
    or ""}. After a damaged packet the next one goes on. Raises VideoError.
    """
    if not os.path.isfile(path):
        raise VideoError("no file: a broken link, or something else of that name")
    if os.fsencode(path).decode(errors="ignore") != str(path):
        raise VideoError("its name is not UTF-8, which crashes OpenCV; rename it")
    video = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
    if not video.isOpened():
        raise VideoError("OpenCV cannot open it: empty, damaged, or not a video")
    fps, expected = video.get(cv2.CAP_PROP_FPS), video.get(cv2.CAP_PROP_FRAME_COUNT)
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    greys, waiting = collections.deque(maxlen=PAIRS + 1), collections.deque()
    number, failures, last = 0, 0, -1.
    while failures < TRIES:
        ok, frame = video.grab(), None
        if ok and (flow or number % every == 0):
            ok, frame = video.retrieve()
        if not ok:
            failures += 1
            continue
        failures = 0
        if flow:
            grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
            greys.append(resize_short(grey, max(16, min(320, *grey.shape))))          # DIS takes no less than 12
        if number % every == 0:
            seconds = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
            if not last < seconds < float("inf"):                     # no time stamps, or they start anew
                seconds = max(number / fps, last + every / fps) if fps > 0 else max(float(number), last + every)
            last = seconds
            frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            waiting.append(dict(number=number, seconds=seconds, fps=fps, frame=frame,
                                rgb=centre_crop(frame),
                                scene=centre_crop(cv2.resize(frame, (256, 256), interpolation=cv2.INTER_AREA))))
        # the window of frame n is frames n-2 to n+3, from 0 at the earliest: `greys` when its last one is there
        while waiting and (not flow or number >= max(0, waiting[0]["number"] - PAIRS // 2) + PAIRS):
            yield waiting.popleft() | (dict(flow=flow_fields(dis, greys)) if flow else {})
        number += 1
    for sample in waiting:                                            # shifted inwards: the last six frames
        yield sample | dict(flow=flow_fields(dis, greys))
    if number == 0:
        codec = int(video.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True).decode("ascii", "replace")
        raise VideoError(f"no frame decodes (codec {codec.strip(chr(0) + ' ') or 'unknown'}); convert it: "
                         "ffmpeg -i IN -c:v libx264 OUT.mp4")
    if number == 1 and fps > 1000:                                    # the rate of a picture, not of a film
        raise VideoError("its first stream is a cover picture; drop it: ffmpeg -i IN -map 0:V -map -0:v:0 -c copy OUT.mp4")
    short = 0 < expected < 1e9 and number < 0.99 * expected - 2
    yield dict(end=f"{number} frames decode, the container says {expected:.0f}: cut off, or its sound or its index "
                   "lasts longer" if short else "")


def resize_short(image, side):
    """Scales so that the short side is `side` pixels."""
    h, w = image.shape[:2]
    size = max(side, round(w * side / min(h, w))), max(side, round(h * side / min(h, w)))
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def centre_crop(image):
    """The middle 224 x 224 pixels, the short side at 256."""
    image = resize_short(image, 256)
    top, left = (image.shape[0] - 224) // 2, (image.shape[1] - 224) // 2
    return image[top:top + 224, left:left + 224]


def flow_fields(dis, greys):
    """The flow network's input (224,224,10) uint8, x0, y0, ..., x4, y4, of six grey frames; fewer repeat the last pair."""
    still = np.zeros((*greys[0].shape, 2), np.float32)
    fields = [dis.calc(a, b, None) for a, b in itertools.pairwise(greys)] or [still]
    fields += fields[-1:] * (PAIRS - len(fields))
    fields = np.nan_to_num(np.concatenate(fields, -1), nan=0.)                       # DIS on a strip of 16 x 512
    flow = (fields.clip(-BOUND, BOUND) + BOUND) * (255 / (2 * BOUND))
    return centre_crop(np.round(flow).astype(np.uint8))


# ---- 3.1 Multiple feature extraction ----
IMAGES = dict(action_rgb="rgb", action_flow="flow", scene="scene")        # network -> its images in a sample
IMAGENET = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]              # mean, standard deviation


@torch.inference_mode()
def features_of(samples, models, device):
    """action (N,2048), scene (N,365), objects (N,K,84), float32, of N dicts of read_video."""
    run = lambda name: models[name](network_input(name, np.stack([s[IMAGES[name]] for s in samples]), device))
    # "two different action recognition networks with RGB and Optical modalities": "We combine both features"
    action = run("action_rgb")
    if "action_flow" in models:
        action = (action + run("action_flow")) / 2
    # "The network's classification layer's outputs are used as our scene features F_S"
    scene = run("scene")
    # "The top K objects are selected from each frame according to the predicted probabilities."
    frames = [torch.from_numpy(s["frame"]).to(device).permute(2, 0, 1).float() / 255 for s in samples]
    objects = detect(models["objects"], frames)
    return dict(action=action.cpu().numpy(), scene=scene.cpu().numpy(), objects=objects.cpu().numpy())


def network_input(name, images, device):
    """Images (N,224,224,.) uint8 -> (N,.,224,224) float32, normalised."""
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (IMAGENET if name != "action_flow" else ([128.], [128.])))
    return (torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() - mean) / std


def detect(model, frames):
    """ "Each box's feature is the combination of the predicted probability and the encoded coordinates." (3.1)

    A Faster R-CNN's own steps, keeping each box's whole row of probabilities. frames: list of (3,H,W) in [0, 1].
    Returns (N,K,84): 80 probabilities and the corners / (W, H) of the K best boxes.
    """
    images, _ = model.transform(frames)
    features = model.backbone(images.tensors)
    proposals, _ = model.rpn(images, features)
    heads = model.roi_heads
    logits, offsets = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals, images.image_sizes)))
    per_image = [len(p) for p in proposals]
    all_boxes = heads.box_coder.decode(offsets, proposals).view(*logits.shape, 4).split(per_image)      # (R,91,4)
    all_scores = logits.softmax(-1).split(per_image)                                                    # (R,91)
    out = torch.zeros(len(frames), K, len(COCO_80) + 4, device=logits.device)
    for F_o, boxes, scores, (height, width) in zip(out, all_boxes, all_scores, images.image_sizes):
        boxes = clip_boxes_to_image(boxes, (height, width))
        row, label = torch.where(scores[:, 1:] > heads.score_thresh)
        label = label + 1                                                                               # 0: background
        big = remove_small_boxes(boxes[row, label], 1e-2)
        row, label = row[big], label[big]
        best = batched_nms(boxes[row, label], scores[row, label], label, heads.nms_thresh)[:K]          # by score
        row, label = row[best], label[best]
        F_o[:len(row), :-4] = scores[row][:, COCO_80]
        F_o[:len(row), -4:] = boxes[row, label] / torch.tensor([width, height] * 2, device=boxes.device)
    return out


# ---- Weights ----
DETECTORS = {f"fasterrcnn_{name}": get_model_weights(f"fasterrcnn_{name}").COCO_V1 for name in (
    "resnet50_fpn_v2", "resnet50_fpn", "mobilenet_v3_large_fpn", "mobilenet_v3_large_320_fpn")}
COCO_91 = DETECTORS["fasterrcnn_resnet50_fpn_v2"].meta["categories"]
COCO_80 = [i for i, name in enumerate(COCO_91) if name not in ("__background__", "N/A")]             # the rows of F_O
# mmaction2's host was reported back on 9 June 2026 after outages; its bucket and the others were never seen from here
OPENMMLAB = ("https://download.openmmlab.com/mmaction/", "https://openmmlab.oss-accelerate.aliyuncs.com/mmaction/")
TSN_RGB = "tsn_imagenet-pretrained-r50_8xb32-1x1x8-100e_kinetics400-rgb"
TSN_FLOW = "tsn_r50_320p_1x1x8_110e_kinetics400_flow"
FILES = {                                  # network -> file name, start of its SHA-256, addresses
    "action_rgb": (f"{TSN_RGB}_20220906-2692d16c.pth", "2692d16c",
                   [f"{host}v1.0/recognition/tsn/{TSN_RGB}/" for host in OPENMMLAB]
                   + ["https://huggingface.co/RaphaelLiu/EvalCrafter-Models/resolve/main/"]),
    "action_flow": (f"{TSN_FLOW}_20200705-1f39486b.pth", "1f39486b",
                    [f"{host}recognition/tsn/{TSN_FLOW}/" for host in OPENMMLAB]),
    "scene": ("resnet18_places365.pth.tar", "2f4759217d470da2b803f8f66cd4488a066406b555a5fb95ee9a4663f9f05588",
              ["http://places2.csail.mit.edu/models_places365/"]),
    **{name: (w.url.rsplit("/", 1)[1], w.url.rsplit("-", 1)[1].removesuffix(".pth"), [w.url.rsplit("/", 1)[0] + "/"])
       for name, w in DETECTORS.items()}}


def find_weights(network, folder):
    """The path of a network's weight file and its SHA-256: from --weights, torch hub's cache, or downloaded.

    Raises InputError.
    """
    name, prefix, addresses = FILES[network]
    cache = Path(torch.hub.get_dir(), "checkpoints")
    path = next((p for p in (Path(folder or cache, name), cache / name) if p.is_file()), cache / name)
    for address in addresses:
        if not path.is_file():
            try:
                cache.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(address + name, str(path), prefix, progress=sys.stderr.isatty())
            except (OSError, RuntimeError) as error:                  # no network; wrong hash
                reason = error
    if not path.is_file():
        lone = "; it has one host and no mirror, --no-flow goes without" if network == "action_flow" else ""
        raise InputError(f"cannot download {name} ({reason}); get it from {' or '.join(a + name for a in addresses)} "
                         f"and name its folder with --weights DIR{lone}; a trial without weights: --random-weights")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if not sha256.startswith(prefix):
        raise InputError(f"{path}: its SHA-256 is {sha256}, not the published {prefix}...; delete it and get it again")
    return path, sha256


# the keys of Places365 and of mmaction2's TSN -> torchvision's
RENAMED = [(r"^(module|backbone)\.", ""), (r"^cls_head\.fc_cls", "fc"), (r"downsample\.conv", "downsample.0"),
           (r"downsample\.bn", "downsample.1"), (r"conv(\d)\.(conv|bn)\.", r"\2\1.")]


def build_detector(name):
    """A torchvision Faster R-CNN as its published weights expect it: all but the _v2 have frozen batch norm."""
    model = getattr(detection, name)(weights=None, weights_backbone=None)
    if not name.endswith("_v2"):
        eps = 0. if name == "fasterrcnn_resnet50_fpn" else 1e-5                      # as torchvision sets it
        for module in list(model.modules()):
            for child, norm in list(module.named_children()):
                if isinstance(norm, nn.BatchNorm2d):
                    setattr(module, child, FrozenBatchNorm2d(norm.num_features, eps=eps))
    return model


def build(names, weights, seed, device, tuned=None):
    """{"action_rgb", "scene", "objects", ...: network} in evaluation mode; the action networks without their last layer.

    weights: {network: path}, empty for random weights of this seed; tuned: {network: state dict} in place of either.
    """
    torch.manual_seed(seed)
    models = {}
    for name in names:
        if name == "scene":
            model = resnet18(num_classes=365)
        elif name in DETECTORS:
            model = build_detector(name)
        else:
            model = resnet50(num_classes=400, zero_init_residual=True)     # random features of size 1, not 15
        if name == "action_flow":
            model.conv1 = nn.Conv2d(2 * PAIRS, 64, 7, stride=2, padding=3, bias=False)
        if weights and name not in (tuned or {}):
            with about(weights[name], "these are not the weights of this network; get the published file"):
                state = torch.load(weights[name], map_location="cpu", weights_only=True)
                state = state.get("state_dict", state)
                for old, new in () if name in DETECTORS else RENAMED:
                    state = {re.sub(old, new, k): v for k, v in state.items()}
                model.load_state_dict(state, strict=True)
        elif name in DETECTORS:
            model.roi_heads.score_thresh = 0.                         # random scores are all about 1/91
        if name.startswith("action"):
            model.fc = nn.Identity()                                  # pooled features (N,2048)
        if name in (tuned or {}):
            model.load_state_dict(tuned[name])
        models["objects" if name in DETECTORS else name] = model.eval().to(device, memory_format=torch.channels_last)
    return models


# ---- Files ----
def find_videos(folder):
    """{"class/stem": path} of the videos below a folder, sorted; {"stem": path} of one video. Raises InputError."""
    folder, videos = Path(folder), {}
    if folder.is_file() and folder.suffix.lower() in SUFFIXES:
        return {folder.name[:-len(folder.suffix)]: folder}
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; it holds videos as {folder}/<class>/<name>.mp4")
    for path in sorted(Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names):
        parts = path.relative_to(folder).parts
        if path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in parts):
            identity = f"{parts[0]}/{path.name[:-len(path.suffix)]}"
            with about(path):
                assert len(parts) > 1, (f"in no class folder; give the folder above, {folder.absolute().parent}, if "
                                        f"{folder.absolute().name} is a class, or move it to {folder}/<class>/")
                assert identity not in videos, f"{identity}, as {videos.get(identity)} is; rename one of them"
            videos[identity] = path
    with about(folder):
        assert videos, f"no video below it ({' '.join(SUFFIXES)}); it holds <class>/<name>.mp4"
    counts = collections.Counter(identity.split("/")[0] for identity in videos)
    print("classes  " + ", ".join(f"{name} {n}" for name, n in sorted(counts.items())))
    if len(counts) == 1:
        print(f"WARNING  one class alone, {list(counts)[0]}: {folder} is probably one folder too high or too low")
    return dict(sorted(videos.items()))


def is_finished(path, video, settings):
    """Whether a whole .npz of this video, made with these settings, is there. Raises InputError if it is another's."""
    try:
        with np.load(path, allow_pickle=False) as f:
            old, size = json.loads(str(f["settings"])), int(f["video_bytes"])
    except Exception:                                                 # not there, or damaged: made again
        return False
    differs = [f"{k} {old.get(k)} (now {settings.get(k)})"[:200] for k in settings | old
               if old.get(k) != settings.get(k) and k not in ("opencv", "options")]
    if differs:
        raise InputError(f"{path}: made with other settings: {'; '.join(differs)}; --overwrite makes it again, another "
                         "output folder keeps both")
    if video.is_file() and size != video.stat().st_size:
        raise InputError(f"{path}: made from another video of that name, or the video has changed; --overwrite makes it "
                         "again, another output folder keeps both")
    return True


def extract(path, models, settings, batch, device):
    """The arrays of one video's .npz. Raises VideoError."""
    parts = []
    samples = read_video(path, settings["every"], "action_flow" in models)
    while chunk := list(itertools.islice(samples, batch)):
        warning = chunk.pop()["end"] if "end" in chunk[-1] else ""
        if chunk:
            F = features_of(chunk, models, device)
            parts.append(F | {k: np.array([s[k] for s in chunk]) for k in ("number", "seconds", "fps")})
    F = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    features = {k: F[k].astype(np.float16) for k in ("action", "scene", "objects")}
    return dict(**features, frames=F["number"], seconds=F["seconds"], fps=F["fps"][0], warning=warning,
                video_bytes=np.int64(os.path.getsize(path)), settings=json.dumps(settings))


# ---- Fine-tuning: "Both the action and the scene feature extraction networks change the final classification layer
# and use the training set for fine-tuning." (4.1) After TSN; the numbers are not in the paper.
SEGMENTS, KEPT, TUNING = 3, 8, dict(epochs=10, lr=1e-3, momentum=0.9, weight_decay=5e-4, batch=8)


def kept_images(path, every, flow):
    """{"rgb", "scene", "flow": (n,224,224,.) uint8}: up to 2 KEPT evenly spaced samples of a video."""
    kept, stride = [], 1
    for n, sample in enumerate(s for s in read_video(path, every, flow) if "end" not in s):
        if n % stride == 0:
            kept.append({name: sample[name] for name in IMAGES.values() if name in sample})
        if len(kept) == 2 * KEPT:
            kept, stride = kept[::2], 2 * stride
    return {name: np.stack([s[name] for s in kept]) for name in kept[0]}


def tune(name, backbone, images, labels, classes, device, seed):
    """Trains one backbone, TSN's way: SEGMENTS frames of a video, their scores averaged; returns its state dict.

    images: paths of what kept_images gave, labels (N,). action_*: a C-way layer in place of the last; scene: one on
    the 365 outputs, which stay the features [R14]. Batch normalisation keeps its statistics.
    """
    torch.manual_seed(seed)
    layer = nn.Linear(365 if name == "scene" else 2048, classes)
    model = nn.Sequential(backbone, nn.Dropout(0. if name == "scene" else 0.5), layer).to(device)
    optimizer = torch.optim.SGD(model.parameters(), TUNING["lr"], TUNING["momentum"], weight_decay=TUNING["weight_decay"])
    for epoch in range(1, TUNING["epochs"] + 1):
        rng, total, right = np.random.default_rng([seed, epoch]), 0., 0
        model[1].train()
        order = rng.permutation(len(images))
        for batch in (order[n:n + TUNING["batch"]] for n in range(0, len(order), TUNING["batch"])):
            chosen = []
            for i in batch:
                with np.load(images[i]) as f:
                    kept = f[IMAGES[name]]
                for part in np.array_split(np.arange(len(kept)), SEGMENTS):
                    image = kept[rng.choice(part) if len(part) else rng.integers(len(kept))]
                    if rng.random() < 0.5:                            # mirrored: x flows the other way
                        image = image[:, ::-1]
                        if name == "action_flow":
                            image = np.where(np.arange(2 * PAIRS) % 2 == 0, 255 - image, image)
                    chosen.append(image)
            y = torch.tensor([labels[i] for i in batch], device=device)
            scores = model(network_input(name, np.stack(chosen), device)).view(len(batch), SEGMENTS, -1).mean(1)
            loss = nn.functional.cross_entropy(scores, y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 20.)         # as TSN does
            optimizer.step()
            total, right = total + loss.item() * len(batch), right + (scores.argmax(1) == y).sum().item()
        print(f"tuning   {name}  epoch {epoch}/{TUNING['epochs']}  loss {total / len(images):.4f}  training accuracy "
              f"{right / len(images):.4f}", flush=True)
    return {k: v.cpu() for k, v in backbone.eval().state_dict().items()}


def finetune(args, videos, names, weights, files, device):
    """Tunes the networks that feats/tuned_<network>.pt does not hold yet. Raises InputError."""
    ids, feats = list(videos), Path(args.feats)
    found, missing = read_list(args.finetune, ids)
    if missing or not found:
        raise InputError(f"{args.finetune}: not in {args.videos}: {missing[:3]}; there is {ids[0]}")
    train = sorted(ids[i] for i in found)
    classes = sorted({identity.split("/")[0] for identity in train})
    labels = [classes.index(identity.split("/")[0]) for identity in train]
    images = [feats / ".tuning" / f"{identity}.npz" for identity in train]
    for name in names:
        path = feats / f"tuned_{name}.pt"
        meta = dict(tuned_on=train, start=files[name], every=args.every, seed=args.seed, tuning=TUNING)
        if path.exists():
            with about(path, "tuned on another list or with other settings: choose another output folder"):
                assert torch.load(path, weights_only=True)["meta"] == meta, "made otherwise"
            print(f"tuning   {path} is used again")
            continue
        if ranks()[1] > 1:
            raise InputError(f"{path}: not there yet; give the command once without torchrun, then with it")
        for identity, kept in zip(train, images):
            with about(videos[identity], f"take it off {args.finetune}"):
                if not kept.exists():
                    print(f"tuning   images of {identity}", flush=True)
                    np.savez(buffer := io.BytesIO(), **kept_images(videos[identity], args.every, not args.no_flow))
                    write_whole(kept, buffer.getvalue())
        backbone = build([name], weights, args.seed, device)[name]
        state = tune(name, backbone, images, labels, len(classes), device, args.seed)
        torch.save(dict(state=state, meta=meta), buffer := io.BytesIO())
        write_whole(path, buffer.getvalue())
    shutil.rmtree(feats / ".tuning", ignore_errors=True)


# ---- Command line ----
def main(argv=None):
    """Returns the exit status: 0, or 1 if videos could not be decoded. Raises InputError."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("videos", help="folder of <class>/<name>.mp4, whose split lists (*.txt, *.list) are copied along; or one video")
    add("feats", help="folder for <class>/<name>.npz")
    add("--every", type=int, default=EVERY, help=f"one frame in this many (4.1; default: {EVERY})")
    add("--no-flow", action="store_true", help="F_A of RGB alone")
    add("--detector", choices=DETECTORS, default="fasterrcnn_resnet50_fpn_v2", help="for F_O; the last two suit a CPU")
    add("--weights", metavar="DIR", help="folder with weight files, where they cannot be downloaded")
    add("--finetune", metavar="TRAINLIST", help="first tune the action and scene networks on these videos (4.1)")
    add("--tuned", metavar="DIR", help="take the networks that --finetune put into DIR")
    add("--random-weights", action="store_true", help="try the pipeline without weights; means nothing")
    add("--seed", type=int, default=0, help="of --random-weights and --finetune (default: 0)")
    add("--overwrite", action="store_true", help="extract finished videos again")
    add("--batch", type=int, default=16, help="frames in a batch (default: 16)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    args = parser.parse_args(argv)
    if args.every < 1 or args.batch < 1 or args.seed < 0:
        parser.error("--every and --batch must be at least 1, --seed at least 0")
    rank, world, local = ranks()
    device = args.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    with about(f"--device {device}"):
        torch.zeros(1, device=device)
    videos, feats = find_videos(args.videos), Path(args.feats)
    names = ["action_rgb", *([] if args.no_flow else ["action_flow"]), "scene", args.detector]
    options = ["--every", str(args.every), "--detector", args.detector] + ["--no-flow"] * args.no_flow
    weights, files = {}, {name: "random" for name in names}
    if args.random_weights:
        print(f"WARNING  networks with RANDOM weights (seed {args.seed}): their features mean nothing")
        options += ["--random-weights", "--seed", str(args.seed)]
    for name in () if args.random_weights else names:
        weights[name], sha256 = find_weights(name, args.weights)
        files[name] = f"{weights[name].name} sha256 {sha256}"
    tuned, tuned_on = {}, None
    if args.finetune:
        finetune(args, videos, [name for name in names if name in IMAGES], weights, files, device)
    for name in [name for name in names if name in IMAGES] if args.finetune or args.tuned else ():
        path = Path(args.tuned or feats, f"tuned_{name}.pt")
        with about(path, "--tuned takes the folder of features that --finetune wrote"):
            saved = torch.load(path, map_location="cpu", weights_only=True)
            tuned[name], tuned_on = saved["state"], saved["meta"]["tuned_on"]
        files[name] = f"{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}, from {files[name]}"
    options += ["--tuned", os.path.abspath(args.tuned or feats)] if tuned else []
    settings = dict(version=2, every=args.every, K=K, networks=files, tuned_on=tuned_on, options=options,
                    random_weights=args.seed if args.random_weights else None, opencv=cv2.__version__)
    out = {identity: feats / f"{identity}.npz" for identity in list(videos)[rank::world]}
    finished = lambda identity: not args.overwrite and is_finished(out[identity], videos[identity], settings)
    todo = [identity for identity in out if not finished(identity)]
    for path in sorted(Path(args.videos).glob("*")) if rank == 0 else ():
        if path.suffix in (".txt", ".list") and not (feats / path.name).exists():
            write_whole(feats / path.name, path.read_bytes())
    with about(feats, "choose another output folder"):
        for path in out.values():                                     # dfan.py must see a class whose videos all fail
            path.parent.mkdir(parents=True, exist_ok=True)
    print(f"{len(out)} videos, {len(out) - len(todo)} finished before, {len(todo)} to do; device {device}", flush=True)
    models = build(names, weights, args.seed, device, tuned) if todo else {}
    random.Random(os.getpid()).shuffle(todo)                          # two extractions at once rarely meet
    start, frames, failures, warnings, elsewhere = time.monotonic(), 0, [], [], 0
    for n, identity in enumerate(todo, 1):
        if finished(identity):                                        # by another process, meanwhile
            elsewhere += 1
            continue
        try:
            arrays = extract(videos[identity], models, settings, args.batch, device)
            np.savez(buffer := io.BytesIO(), **arrays)
            write_whole(out[identity], buffer.getvalue())
        except (VideoError, cv2.error) as error:
            failures.append(" ".join(f"FAILED   {videos[identity]}: {error}".split("\n")))
            print(failures[-1], flush=True)
            continue
        frames += len(arrays["frames"])
        warnings += [f"WARNING  {videos[identity]}: {arrays['warning']}"] * bool(arrays["warning"])
        spent = time.monotonic() - start
        print(f"[{n}/{len(todo)}] {identity}  {frames / spent:.2f} frames/s  {spent / n * (len(todo) - n) / 60:.1f} min left",
              flush=True)
    if todo:
        print(f"{len(todo) - len(failures) - elsewhere} videos extracted, {len(failures)} failed, {frames} frames sampled in "
              f"{time.monotonic() - start:.0f} s" + (f", {elsewhere} by another process" if elsewhere else ""))
    for line in failures + warnings:
        print(line)
    return max(gather(1 if failures else 0))                          # together: torchrun ends all when one ends


if __name__ == "__main__":
    command(main)
