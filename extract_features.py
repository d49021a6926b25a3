"""The features of DFAN (section 3.1): one frame in eight of each video through four pretrained networks, to .npz.

    python extract_features.py videos/ feats/        # videos/<class>/<stem>.mp4 -> feats/<class>/<stem>.npz
    python extract_features.py a.mp4 b.mp4 feats/    # single videos -> feats/a.npz, feats/b.npz

Several at once share it out. Of T sampled frames:

    action   (T,2048) float16   F_A: Kinetics-400 TSN ResNet-50, RGB and flow, the mean of both [R13]
    scene    (T,365)  float16   F_S: outputs of the Places365 ResNet-18
    objects  (T,K,84) float16   F_O: a box's 80 COCO probabilities, x1/W, y1/H, x2/W, y2/H; zeros: no box [R15]
    frames, seconds, pictures   (T,) number of the frame among the decoded ones, from 0; time stamp; a small JPEG
    fps, aspect, warning        as the file says; width / height; why the video may be cut off, or ""
    settings, video_bytes       JSON of what made it; size of the video file
"""
import argparse
import errno
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")    # reported here
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault("OPENCV_FFMPEG_READ_ATTEMPTS", "1000000")    # sound between pictures

try:
    import cv2
    import numpy as np
    import torch
    from torch import nn
    from torchvision.models import detection, get_model_weights, resnet18, resnet50
    from torchvision.ops import FrozenBatchNorm2d, batched_nms, clip_boxes_to_image, remove_small_boxes
except ImportError as missing:
    print(f"{missing}; pip install -r requirements.txt; for libGL: apt install libgl1", file=sys.stderr)
    sys.exit(2)

from dfan import SUFFIXES, InputError, about, command, load_checkpoint, read_list, whole

EVERY, K = 8, 16        # "one frame [...] at every eight frames" (4.1), "K = 16" (3.2.1)
PAIRS, BOUND = 5, 20    # TSN's flow input: five fields, clipped to +-20 pixels
TRIES = 20_000          # failures in a row that end a video: 0.2 s
RANK, WORLD, LOCAL = (int(os.environ.get(name, n)) for name, n in (    # torchrun's
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
OPTIONS = dict(every=int, detector=str, no_flow=bool, random_weights=bool, seed=int, tuned=str | None)


# ---- 4.1 Sampling: "one frame is uniformly sampled at every eight frames for feature extraction" ----
class VideoError(Exception):
    """Concerns one video alone: it is reported, and the run goes on."""


def read_video(path, every, flow, warnings):
    """Yields a dict for one decoded frame in `every`, to the end of the stream:
    number, seconds, fps; frame (H,W,3) uint8 RGB; rgb, scene (224,224,3) uint8; flow (224,224,10) uint8 of the
    five pairs centred on the frame, shifted inwards at the ends. Adds to the list `warnings`. Raises VideoError."""
    video = open_video(path)
    fps = video.get(cv2.CAP_PROP_FPS)
    expected = video.get(cv2.CAP_PROP_FRAME_COUNT)
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    greys = deque(maxlen=PAIRS + 1)
    waiting = deque()    # samples whose flow needs later frames
    number, last = 0, -1.
    for frame in decoded_frames(video, every, flow):
        if flow:
            grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
            side = max(32, min(320, *grey.shape))    # below 32 DIS crashes
            greys.append(resize_short(grey, side))
        if number % every == 0:
            seconds = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
            if not last < seconds < float("inf"):    # no time stamps, or they start anew
                rate = fps if fps > 0 else 1
                seconds = max(number / rate, last + every / rate)
            last = seconds
            frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            square = cv2.resize(frame, (256, 256), interpolation=cv2.INTER_AREA)
            waiting.append(dict(number=number, seconds=seconds, fps=fps, frame=frame,
                                rgb=centre_crop(frame), scene=centre_crop(square)))
        # the flow of frame n is of frames n-2 to n+3, from 0 at the earliest
        while waiting and (not flow or number >= max(0, waiting[0]["number"] - PAIRS // 2) + PAIRS):
            yield with_flow(waiting.popleft(), dis, greys)
        number += 1
    for sample in waiting:    # shifted inwards: the last six frames
        yield with_flow(sample, dis, greys)
    if number == 0:
        raise VideoError("no frame decodes (AV1, or damaged); ffmpeg -i IN -c:v libx264 OUT.mp4")
    if number == 1 and fps > 1000:    # the rate of a picture
        raise VideoError("a cover picture; ffmpeg -i IN -map 0:V -map -0:v:0 -c copy OUT.mp4")
    if 0 < expected < 1e9 and number < 0.99 * expected - 2:
        warnings.append(f"{number} of {expected:.0f} frames decode: cut off, or its sound lasts longer")


def open_video(path):
    if not os.path.isfile(path):
        raise VideoError("no file: a broken link, a folder or a pipe")
    if os.fsencode(path).decode(errors="ignore") != str(path):
        raise VideoError("its name is not UTF-8; rename it")
    if not os.access(path, os.R_OK):
        raise VideoError("no permission to read it")
    video = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
    if not video.isOpened():
        raise VideoError("OpenCV cannot open it: empty, damaged or no video")
    return video


def decoded_frames(video, every, flow):
    """Yields all frames that decode, (H,W,3) BGR; None for one that is not needed."""
    number = failures = 0
    while failures < TRIES:    # after a damaged packet the next one goes on
        ok, frame = video.grab(), None
        if ok and (flow or number % every == 0):
            ok, frame = video.retrieve()
        failures += 1
        if ok and (frame is None or frame.shape[:2] != (1, 1)):    # VP9 after damage
            yield frame
            number, failures = number + 1, 0


def resize_short(image, side):
    """The short side gets `side` pixels."""
    h, w = image.shape[:2]
    size = [max(side, round(n * side / min(h, w))) for n in (w, h)]
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def centre_crop(image):
    """The middle 224 x 224 pixels, the short side at 256."""
    image = resize_short(image, 256)
    top, left = [(n - 224) // 2 for n in image.shape[:2]]
    return image[top:top + 224, left:left + 224]


def with_flow(sample, dis, greys):
    """Adds flow, x0, y0, ..., x4, y4, of six grey frames; fewer repeat the last pair."""
    if not greys:
        return sample
    still = np.zeros((*greys[0].shape, 2), np.float32)
    fields = [dis.calc(a, b, None) for a, b in itertools.pairwise(greys)] or [still]
    fields += fields[-1:] * (PAIRS - len(fields))
    flow = np.concatenate(fields, -1).clip(-BOUND, BOUND)
    flow = (flow + BOUND) * (255 / (2 * BOUND))
    return sample | dict(flow=centre_crop(np.round(flow).astype(np.uint8)))


def jpeg(frame):
    """A small picture of a frame, for figure 4: bytes."""
    h, w = frame.shape[:2]
    size = min(max(1, round(144 * w / h)), 1440), 144
    small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 75])[1].tobytes()


# ---- 3.1 Multiple feature extraction ----
IMAGES = dict(action_rgb="rgb", action_flow="flow", scene="scene")
IMAGENET = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]    # mean, standard deviation


@torch.inference_mode()
def features_of(samples, models, device):
    """action (N,2048), scene (N,365), objects (N,K,84), float16, of N dicts of read_video."""
    def output(name):
        images = np.stack([s[IMAGES[name]] for s in samples])
        return models[name](network_input(name, images, device))

    # "with RGB and Optical modalities": "We combine both features"
    action = output("action_rgb")
    if "action_flow" in models:
        action = (action + output("action_flow")) / 2
    # "The network's classification layer's outputs are used as our scene features F_S"
    scene = output("scene")
    # "The top K objects are selected from each frame according to the predicted probabilities."
    frames = [torch.from_numpy(s["frame"]).to(device).permute(2, 0, 1).float() / 255 for s in samples]
    objects = detect(models["objects"], frames)
    F = dict(action=action, scene=scene, objects=objects)
    return {key: v.cpu().numpy().astype(np.float16) for key, v in F.items()}


def network_input(name, images, device):
    """Images (N,224,224,.) uint8 -> (N,.,224,224) float32, normalised."""
    statistics = ([128.], [128.]) if name == "action_flow" else IMAGENET
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in statistics)
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float()
    return (x - mean) / std


def detect(model, frames):
    """ "Each box's feature is the combination of the predicted probability and the encoded coordinates." (3.1)
    A Faster R-CNN's own steps, keeping each box's row of probabilities: list of (3,H,W) in [0, 1] -> (N,K,84)."""
    images, _ = model.transform(frames)
    maps = model.backbone(images.tensors)
    proposals, _ = model.rpn(images, maps)
    heads = model.roi_heads
    heads.box_roi_pool.scales = None    # else the first video's, whatever its shape
    pooled = heads.box_roi_pool(maps, proposals, images.image_sizes)
    logits, offsets = heads.box_predictor(heads.box_head(pooled))
    per_image = [len(p) for p in proposals]
    all_boxes = heads.box_coder.decode(offsets, proposals).view(*logits.shape, 4).split(per_image)    # (R,91,4)
    all_scores = logits.softmax(-1).split(per_image)    # (R,91)
    F_O = torch.zeros(len(frames), K, len(COCO_80) + 4, device=logits.device)
    for F_o, boxes, scores, (height, width) in zip(F_O, all_boxes, all_scores, images.image_sizes):
        boxes = clip_boxes_to_image(boxes, (height, width))
        row, label = torch.where(scores[:, 1:] > heads.score_thresh)
        label = label + 1    # 0: background
        big = remove_small_boxes(boxes[row, label], 1e-2)
        row, label = row[big], label[big]
        best = batched_nms(boxes[row, label], scores[row, label], label, heads.nms_thresh)
        row, label = row[best[:K]], label[best[:K]]    # by score
        F_o[:len(row), :-4] = scores[row][:, COCO_80]
        F_o[:len(row), -4:] = boxes[row, label] / torch.tensor([width, height] * 2, device=boxes.device)
    return F_O


# ---- Weights ----
DETECTORS = {f"fasterrcnn_{name}": get_model_weights(f"fasterrcnn_{name}").COCO_V1 for name in (
    "resnet50_fpn_v2", "resnet50_fpn", "mobilenet_v3_large_fpn", "mobilenet_v3_large_320_fpn")}
PROPOSALS = {name: 150 if name.endswith("320_fpn") else 300 for name in DETECTORS}
COCO_91 = DETECTORS["fasterrcnn_resnet50_fpn_v2"].meta["categories"]
COCO_80 = [i for i, name in enumerate(COCO_91) if name not in ("__background__", "N/A")]
MMACTION = "https://download.openmmlab.com/mmaction/", "https://openmmlab.oss-accelerate.aliyuncs.com/mmaction/"
TSN_RGB = "tsn_imagenet-pretrained-r50_8xb32-1x1x8-100e_kinetics400-rgb"
TSN_FLOW = "tsn_r50_320p_1x1x8_110e_kinetics400_flow"
URLS = {    # tried in turn, never from here; a name ends with the start of the SHA-256
    "action_rgb": [f"{host}v1.0/recognition/tsn/{TSN_RGB}/{TSN_RGB}_20220906-2692d16c.pth" for host in MMACTION],
    "action_flow": [f"{host}recognition/tsn/{TSN_FLOW}/{TSN_FLOW}_20200705-1f39486b.pth" for host in MMACTION],
    "scene": ["http://places2.csail.mit.edu/models_places365/resnet18_places365.pth.tar"],
    **{name: [published.url] for name, published in DETECTORS.items()}}
PLACES_SHA256 = "2f4759217d470da2"
RENAMED = [(r"^(module|backbone)\.", ""), (r"^cls_head\.fc_cls", "fc"), (r"downsample\.conv", "downsample.0"),
           (r"downsample\.bn", "downsample.1"), (r"conv(\d)\.(conv|bn)\.", r"\2\1.")]


def find_weights(network, folder):
    """A weight file, from --weights, torch hub's cache or a download; its name and SHA-256."""
    urls = URLS[network]
    name = urls[0].rsplit("/", 1)[1]
    prefix = PLACES_SHA256 if network == "scene" else re.search(r"-(\w+)\.pth", name)[1]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if folder and Path(folder, name).is_file():
        path = Path(folder, name)
    for url in urls if not path.is_file() else []:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), prefix, sys.stderr.isatty())
            break
        except (OSError, RuntimeError) as error:    # no network; wrong hash
            reason = error
    if not path.is_file():
        raise InputError(f"{name}: {reason}; get it from {' or '.join(urls)}, then --weights DIR; "
                         "or --no-flow, or for a trial --random-weights")
    found = describe(path)
    if f" sha256 {prefix}" not in found:
        raise InputError(f"{path}: {found}; published: {prefix}...; get it again")
    return path, found


def describe(path):
    return f"{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def build(names, weights, seed, device):
    """{"action_rgb", "scene", "objects", ...: network}, in evaluation mode; random without weights."""
    torch.manual_seed(seed)
    models = {}
    for name in names:
        if name in DETECTORS:
            model = build_detector(name)
        elif name == "scene":
            model = resnet18(num_classes=365)
        else:
            model = resnet50(num_classes=400, zero_init_residual=True)    # small features
            model.fc = nn.Identity()    # pooled features (N,2048)
            if name == "action_flow":
                model.conv1 = nn.Conv2d(2 * PAIRS, 64, 7, stride=2, padding=3, bias=False)
        if name in weights:
            load_weights(name, model, weights[name])
        elif name in DETECTORS:
            model.roi_heads.score_thresh = 0.    # random scores are all about 1/91
        model = model.eval().to(device, memory_format=torch.channels_last)
        models["objects" if name in DETECTORS else name] = model
    return models


def build_detector(name):
    """As published: all but the _v2 have frozen batch norm."""
    model = getattr(detection, name)(weights=None, weights_backbone=None, rpn_post_nms_top_n_test=PROPOSALS[name])
    if name.endswith("_v2"):
        return model
    eps = 0. if name == "fasterrcnn_resnet50_fpn" else 1e-5    # as torchvision sets it
    for module in list(model.modules()):
        for child, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, child, FrozenBatchNorm2d(norm.num_features, eps=eps))
    return model


def load_weights(name, model, path):
    """A published file, keys RENAMED to torchvision's, or --finetune's: no key more or less."""
    with about(path, "not the weights of this network; get the published file"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state = saved.get("state") or saved.get("state_dict") or saved
        if name not in DETECTORS:
            for old, new in RENAMED:
                state = {re.sub(old, new, key): v for key, v in state.items()}
        if name.startswith("action"):
            state = {key: v for key, v in state.items() if not key.startswith("fc.")}
        model.load_state_dict(state, strict=True)


# ---- Files ----
def find_videos(folder):
    """{"class/stem": path} of the videos below, through links too, and the OSErrors of folders."""
    videos, passed, unread = {}, Counter(), []
    for place, folders, names in os.walk(folder, onerror=unread.append, followlinks=True):
        above = {os.path.realpath(p) for p in (Path(place), *Path(place).parents)}
        folders[:] = [name for name in folders if os.path.realpath(Path(place, name)) not in above    # a loop
                      and name[0] not in ".@" and name != "lost+found"]    # the system's
        for path in (Path(place, name) for name in names if name[0] != "."):
            top, *below = path.relative_to(folder).parts
            identity = f"{top}/{path.stem}"
            if path.suffix.lower() not in SUFFIXES:
                passed[path.suffix or path.name] += 1
            elif not below:
                raise InputError(f"{path}: in no class folder; make one, or give the folder above")
            elif identity in videos:
                raise InputError(f"{path}: {identity}, as {videos[identity]} is; rename one of them")
            else:
                videos[identity] = path
    if not videos and not unread:
        raise InputError(f"{folder}: no video below it; it holds <class>/<name>.mp4")
    if passed:
        print("no video " + ", ".join(f"{n} {suffix}" for suffix, n in sorted(passed.items())))
    return dict(sorted(videos.items())), unread


def look_around(folder, feats, videos):
    """Counts classes, names features without a video, copies split lists."""
    counts = Counter(identity.split("/")[0] for identity in videos)
    print("classes  " + ", ".join(f"{name} {n}" for name, n in counts.items()))
    made = {f"{path.parent.name}/{path.stem}" for path in feats.glob("[!.]*/[!.]*.npz")}
    gone = sorted(made - videos.keys())
    if gone:
        print(f"WARNING  {len(gone)} features without a video, which drawn splits count: {gone[:3]}")
    for path in folder.glob("*"):
        if path.suffix in (".txt", ".list") and path.is_file():
            copy = feats / path.name
            if copy.exists() and copy.read_bytes() != path.read_bytes():
                print(f"list     {copy} differed from {path}: copied again")
            with suppress(FileNotFoundError), whole(copy) as file:
                file.write(path.read_bytes())


def is_finished(target, video, settings, args):
    """Whether its whole .npz is there. Raises InputError for other settings, or VideoError."""
    try:
        with np.load(target) as f:
            old, size = dict(json.loads(str(f.get("settings", "{}")))), int(f.get("video_bytes", 0))
            if f.zip.testzip() or args.overwrite and target.stat().st_mtime < args.started:
                return False
    except Exception:    # not there, or damaged: made again
        return False
    remedy = "--overwrite, or another output folder"
    changed = [k for k in settings | old if old.get(k) != settings.get(k) and k != "options"]
    differs = [f"{k} {old.get(k)} (now {settings.get(k)})"[:200] for k in changed]
    if differs:
        raise InputError(f"{target}: made otherwise: {'; '.join(differs)}; {remedy}")
    if os.path.isfile(video) and size != video.stat().st_size:
        raise VideoError(f"{target} was made from another video, or it has changed; {remedy}")
    return True


def extract(path, models, settings, args):
    """The arrays of one video's .npz. Raises whatever goes wrong, but no OSError."""
    parts, warnings = [], []
    video_bytes = path.stat().st_size if os.path.isfile(path) else 0
    samples = read_video(path, args.every, not args.no_flow, warnings)
    with ThreadPoolExecutor(1) as reader:
        batch = list(itertools.islice(samples, args.batch))
        while batch:
            following = reader.submit(list, itertools.islice(samples, args.batch))    # reads ahead
            part = features_of(batch, models, args.device)
            part |= {key: np.array([s[key] for s in batch]) for key in ("number", "seconds", "fps")}
            if not args.no_pictures:
                part["pictures"] = [jpeg(s["frame"]) for s in batch]
            parts.append(part)
            height, width = batch[0]["frame"].shape[:2]
            batch = following.result()
    F = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return F | dict(frames=F.pop("number"), fps=F["fps"][0], aspect=width / height, warning="".join(warnings),
                    video_bytes=video_bytes, settings=json.dumps(settings))


# ---- Fine-tuning: "Both the action and the scene feature extraction networks change the final classification layer
# and use the training set for fine-tuning." (4.1) After TSN; the numbers are not in the paper.
SEGMENTS, KEPT = 3, 8
TUNING = dict(epochs=10, batch=8, sgd=dict(lr=1e-3, momentum=0.9, weight_decay=5e-4))


def kept_images(path, every, flow):
    """{"rgb", "scene", "flow": (n,224,224,.) uint8} of up to 2 KEPT evenly spaced samples."""
    kept, stride = [], 1
    for n, sample in enumerate(read_video(path, every, flow, [])):
        if n % stride == 0:
            kept.append({name: sample[name] for name in IMAGES.values() if name in sample})
        if len(kept) == 2 * KEPT:
            kept, stride = kept[::2], 2 * stride
    return {name: np.stack([s[name] for s in kept]) for name in kept[0]}


def draw_images(path, name, rng):
    """TSN's choice: one kept image of each segment, half of them mirrored."""
    with np.load(path) as f:
        kept = f[IMAGES[name]]
    for part in np.array_split(np.arange(len(kept)), SEGMENTS):
        image = kept[rng.choice(part) if len(part) else rng.integers(len(kept))]
        if rng.random() < 0.5:
            image = image[:, ::-1]
            if name == "action_flow":    # x flows the other way
                image = np.where(np.arange(2 * PAIRS) % 2 == 0, 255 - image, image)
        yield image


def tune(name, backbone, images, labels, device, seed):
    """Trains a backbone on mean scores of SEGMENTS frames a video. Returns its state dict.
    A new layer replaces the last; for the scene it follows the 365 outputs, which stay F_S [R14]."""
    torch.manual_seed(seed)
    layer = nn.Linear(365 if name == "scene" else 2048, max(labels) + 1)
    model = nn.Sequential(backbone, nn.Dropout(0. if name == "scene" else 0.5), layer).to(device)
    optimizer = torch.optim.SGD(model.parameters(), **TUNING["sgd"])
    for epoch in range(1, TUNING["epochs"] + 1):
        rng = np.random.default_rng([seed, epoch])
        order = torch.from_numpy(rng.permutation(len(images)))
        for batch in order.split(TUNING["batch"]):
            chosen = [image for i in batch for image in draw_images(images[i], name, rng)]
            y = torch.tensor([labels[i] for i in batch], device=device)
            scores = model(network_input(name, np.stack(chosen), device)).view(len(batch), SEGMENTS, -1).mean(1)
            loss = nn.functional.cross_entropy(scores, y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 20.)
            optimizer.step()
        print(f"tuning   {name}  epoch {epoch}/{TUNING['epochs']}  loss {loss.item():.4f}", flush=True)
    return {key: v.cpu() for key, v in backbone.eval().state_dict().items()}


def finetune(args, videos, names, weights, files):
    """Tunes the networks that feats/tuned_<network>.pt does not hold yet."""
    ids, feats = list(videos), Path(args.feats)
    found, missing = read_list(args.finetune, ids)
    if missing or not found:
        raise InputError(f"{args.finetune}: not in {args.folder}: {missing[:3]}; there is {ids[0]}")
    train = sorted(ids[i] for i in found)
    _, labels = np.unique([identity.split("/")[0] for identity in train], return_inverse=True)
    images = [feats / ".tuning" / f"{args.every}{args.no_flow}" / f"{identity}.npz" for identity in train]
    for name in names:
        path = feats / f"tuned_{name}.pt"
        meta = dict(tuned_on=train, start=files[name], every=args.every, seed=args.seed, tuning=TUNING)
        if path.exists():
            if load_tuned(path, files[name]) != meta:
                raise InputError(f"{path}: tuned on another list or otherwise; another folder")
            continue
        for identity, kept in zip(train, images):
            if kept.exists():
                continue
            print(f"tuning   images of {identity}", flush=True)
            with about(videos[identity], f"take it off {args.finetune}"):
                arrays = kept_images(videos[identity], args.every, not args.no_flow)
            with whole(kept) as file:
                np.savez(file, **arrays)
        backbone = build([name], weights, args.seed, args.device)[name]
        state = tune(name, backbone, images, labels, args.device, args.seed)
        with whole(path) as file:
            torch.save(dict(state=state, meta=meta), file)
    shutil.rmtree(feats / ".tuning", ignore_errors=True)


def load_tuned(path, start):
    with about(path, "--tuned takes a folder that --finetune wrote"):
        meta = torch.load(path, map_location="cpu", weights_only=True)["meta"]
        if meta["start"] != start:
            raise InputError(f"tuned from {meta['start']}, not {start}")
        return meta


# ---- Command line ----
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("videos", nargs="+", help="folder of <class>/<name>.mp4, or videos")
    add("feats", help="folder for <class>/<name>.npz")
    add("--every", type=int, default=EVERY, help="one frame in this many (8, 4.1)")
    add("--no-flow", action="store_true", help="F_A of RGB alone")
    add("--no-pictures", action="store_true", help="no small JPEGs")
    add("--detector", choices=DETECTORS, default=list(DETECTORS)[0], help="the last two suit a CPU")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--weights", metavar="DIR", help="folder of weight files")
    either("--random-weights", action="store_true", help="a trial; means nothing")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--finetune", metavar="TRAINLIST", help="first tune on it (4.1)")
    either("--tuned", metavar="DIR", type=os.path.abspath, help="of tuned networks")
    add("--like", metavar="CHECKPOINT", help="options as of its features")
    add("--seed", type=int, default=0, help="of random weights and --finetune")
    add("--overwrite", action="store_true", help="make all again")
    add("--batch", type=int, default=16, help="frames in a batch (16)")
    add("--device", default="cpu", help="cpu or cuda")
    if torch.cuda.is_available():
        parser.set_defaults(device=f"cuda:{LOCAL % torch.cuda.device_count()}")
    args = parser.parse_args(argv)
    if args.like:
        saved = load_checkpoint(args.like)
        options = saved["settings"]["extraction"].get("options", {})
        for name, kind in OPTIONS.items():    # typed
            if not isinstance(options.get(name), kind) or str(options.get("detector")) not in DETECTORS:
                raise InputError(f"{args.like}: of other features; give an .npz")
            setattr(args, name, options[name])
        if args.tuned and not os.path.isdir(args.tuned):    # moved, with the features
            args.tuned = os.path.abspath(saved["data"])
    first = Path(args.videos[0])
    single = len(args.videos) > 1 or first.suffix.lower() in SUFFIXES and not first.is_dir()
    args.folder = None if single else first
    for folder in filter(None, (args.folder, args.weights)):
        if not Path(folder).is_dir():
            raise InputError(f"{folder}: no such folder")
    if args.every < 1 or args.batch < 1 or not 0 <= args.seed < 2 ** 63:
        parser.error("--every and --batch are 1 or more, --seed 0 to 2^63 - 1")
    if args.seed and not (args.random_weights or args.finetune or args.like) or args.finetune and (single or WORLD > 1):
        parser.error("--seed: of random weights or --finetune; --finetune: a folder, no torchrun")
    args.tuned = os.path.abspath(args.feats) if args.finetune else args.tuned
    with about(f"--device {args.device}", "cpu or cuda"):
        torch.zeros(1, device=args.device)
    return args


def choose_networks(args, videos):
    """{network: path of its weights}, and the settings; dfan.py extracts by their `options`."""
    names = ["action_rgb", "action_flow", "scene", args.detector]
    if args.no_flow:
        names.remove("action_flow")
    weights, files, tuned_on = {}, dict.fromkeys(names, "random"), None
    if args.random_weights:
        print(f"WARNING  networks with RANDOM weights (seed {args.seed}): their features mean nothing")
    else:
        for name in names:
            weights[name], files[name] = find_weights(name, args.weights)
    if args.finetune:
        finetune(args, videos, names[:-1], weights, files)
    if args.tuned:
        for name in names[:-1]:
            weights[name] = Path(args.tuned, f"tuned_{name}.pt")
            tuned_on = load_tuned(weights[name], files[name])["tuned_on"]
            files[name] = f"{describe(weights[name])}, from {files[name]}"
    options = {name: getattr(args, name) for name in OPTIONS}
    return weights, dict(version=3, every=args.every, K=K, networks=files, tuned_on=tuned_on, options=options,
                         random_weights=args.seed if args.random_weights else None,
                         proposals=PROPOSALS[args.detector], object_names=[COCO_91[i] for i in COCO_80])


def work(args, videos, todo, settings, models):
    """Extracts, from an own start on, what no other process works on; then the rest: one may have been killed.
    Returns the lines FAILED and WARNING. Raises InputError."""
    start = RANK * len(todo) // WORLD if WORLD > 1 else random.randrange(len(todo))
    waiting = deque(todo[start:] + todo[:start])
    passed_over = set()
    begun, made, lines = time.monotonic(), 0, []
    while waiting:
        identity = waiting.popleft()
        video, target = videos[identity], Path(args.feats, f"{identity}.npz")
        claimed = any(os.path.exists(part / target.name) for part in target.parent.glob(".part-*"))
        if claimed and identity not in passed_over:
            passed_over.add(identity)
            waiting.append(identity)
            continue
        n, spent = len(todo) - len(waiting), time.monotonic() - begun
        line = f"[{n}/{len(todo)}] {identity}"
        if made:
            line += f"  {spent / (n - 1) * (len(waiting) + 1) / 60:.1f} min left"
        try:
            if is_finished(target, video, settings, args):
                continue
            print(line, flush=True)    # before the work: it may crash
            with whole(target) as file:    # others pass over it
                arrays = extract(video, models, settings, args)
                np.savez(file, **arrays)
        except Exception as error:
            if isinstance(error, FileNotFoundError) and target.exists():
                continue    # another process was faster
            if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:    # of writing
                raise InputError(f"{target}: {error.strerror or error}; the same command goes on") from error
            reason = str(error).strip() or type(error).__name__
            lines.append(f"FAILED   {video}: {reason.splitlines()[0]}")
            print(lines[-1], flush=True)
            continue
        made += 1
        if arrays["warning"]:
            lines.append(f"WARNING  {video}: {arrays['warning']}")
    failed = sum(line.startswith("FAILED") for line in lines)
    print(f"{made} videos extracted, {failed} failed, {len(todo) - made - failed} by another process; "
          f"{time.monotonic() - begun:.0f} s")
    return lines


def main(argv=None):
    """Returns the exit status: 1 if a video or folder failed. Raises InputError."""
    args = parse_args(argv)
    args.started = time.time()
    if args.folder:
        videos, unread = find_videos(args.folder)
        if RANK == 0:
            look_around(args.folder, Path(args.feats), videos)
    else:
        videos, unread = {Path(video).stem: Path(video) for video in args.videos}, []
        if len(videos) < len(args.videos):
            raise InputError(f"two of one name: {', '.join(args.videos)}")
    weights, settings = choose_networks(args, videos)
    todo, lines = [], [f"FAILED   {error.filename}: {error.strerror}" for error in unread]
    of_one = VideoError if args.folder else (VideoError, InputError)    # settings: of all of a folder
    for identity, video in videos.items():
        try:
            if not is_finished(Path(args.feats, f"{identity}.npz"), video, settings, args):
                todo.append(identity)
        except of_one as error:
            lines.append(f"FAILED   {video}: {error}")
    print(f"{len(videos)} videos, {len(videos) - len(todo)} finished before, {len(todo)} to do; device {args.device}", flush=True)
    if todo:
        models = build(settings["networks"], weights, args.seed, args.device)
        lines += work(args, videos, todo, settings, models)
    for line in lines:
        print(line)
    return int(any(line.startswith("FAILED") for line in lines))


if __name__ == "__main__":
    command(main)
