"""Data sets and tokenisation of text, and nothing else.

`shapes`, the default, is drawn here and needs no file: coloured shapes on plain grounds, still or moving. All
that they show is known exactly, so that what a model claims to have learnt can be checked. Image i is a pure
function of (seed, i): any image can be had at any time, in any order, at any size, on any machine.

Specs:    shapes | cifar10[:PATH] | npz:PATH | folder:PATH | video:PATH | latents:PATH
Splits:   train, test, judge: disjoint ranges of shapes. Files: their own, else every tenth image is test;
          judge is train; latents are one whole in every split.
Letters:  M images, F frames, C channels, H W height and width, h w a grid of latents, B a batch, K classes
Errors:   whatever is wrong with a file, its content or a request is a DataError: one line, path and reason.
Read in this order: the scene, the picture, Captions and words, A data set; then the reader that you need.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import tarfile
import unicodedata
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common

CACHE = Path("runs/data")  # the CIFAR-10 archive and decoded pictures, complete or not there at all
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_MD5 = "c58f30108f718f92721af3b95e74349a"

class DataError(common.UserError, ValueError):
    """Data that cannot be had as asked for: one line with the path and the reason."""

def need(condition, message):
    if not condition:
        raise DataError(message)

@contextlib.contextmanager
def reading(path):
    """Turn whatever a missing or broken file provokes in decoders (zip, tar, JPEG ...) into one DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"cannot be read: {error!r}"
        raise DataError(f"{path}: {reason}") from error

@contextlib.contextmanager
def whole(path):
    """Open for writing a file that then appears at `path` complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with reading(path), open(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

# --- Shapes: the scene ---------------------------------------------------------

COLOURS = {"red": (228, 45, 45), "orange": (250, 140, 20), "yellow": (250, 220, 50), "green": (50, 180, 75),
           "cyan": (60, 205, 225), "blue": (45, 95, 235), "purple": (150, 65, 200), "pink": (250, 130, 190)}
GROUNDS = {"black": (16, 16, 20), "white": (245, 245, 240), "grey": (105, 105, 110), "brown": (88, 52, 30)}
SHAPES = "circle square triangle diamond plus cross star ring heart moon".split()
SIZES, DIRECTIONS = "tiny small medium large huge".split(), "up down left right".split()
PLACES = ["top left", "top right", "bottom left", "bottom right", "centre"]
SPLITS = {"train": 0, "judge": 5 * 10**8, "test": 10**9}  # first index of each
ORDERS = np.array([*itertools.permutations(range(4))])    # of the quadrants
GOLDEN = 0x9E3779B97F4A7C15

def mix(z):
    """The finisher of splitmix64 on a uint64 array; the arithmetic wraps."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

def uniform(index, field, seed=0):
    """float64 in [0, 1), a pure function of its arguments; arrays `index` and `field` broadcast."""
    a = mix(np.array([(seed * GOLDEN + 0x1234567) % 2**64], np.uint64))
    b = mix(np.asarray(index).astype(np.uint64) * np.uint64(GOLDEN) + a)
    step = (np.atleast_1d(field) + 1).astype(np.uint64) * np.uint64(GOLDEN)
    return (mix(b + step) >> np.uint64(40)) / 2.0**24

def scenes(index, objects=(1, 1), mixed=False, frames=1, seed=0):
    """What images `index` (integers, (M,)) show, exactly: a dict of arrays.

    label, count, background (M,); ground (M, 3), its colour in 0..255. A column an object, (M, 4), -1 where
    there is none: shape, colour, size, place (positions in SHAPES, COLOURS ...); x, y (at frame 0, y down)
    and r in sides of the image; angle in radians; shade, a factor on the colour; vx, vy in sides a frame.
    """
    lo, hi = objects
    need(1 <= lo <= hi <= 4, f"shapes: objects {lo},{hi}: give lo,hi with 1 <= lo <= hi <= 4")
    index, j = np.asarray(index, np.int64)[:, None], np.arange(4)
    image = [uniform(index, field, seed) for field in range(4)]
    each = [uniform(index, 8 + 10 * j + field, seed) for field in range(9)]
    label, count = index % 10, lo + (image[0] * (hi - lo + 1)).astype(int)
    low, span = (np.where(j, 0.13, 0.215), np.where(j, 0.045, 0.03)) if mixed else (0.17, 0.06)
    r = low + span * each[2]
    if frames == 1:  # a single object fills a still; in a clip it needs room to move
        r = np.where(count == 1, 0.32 + 0.12 * each[2], r)
    quadrant = ORDERS[(image[2][:, 0] * 24).astype(int)]
    x, y = (np.where(count == 1, r + (1 - 2 * r) * u, 0.25 + 0.5 * corner + (2 * u - 1) * (0.25 - r))
            for corner, u in ((quadrant % 2, each[3]), (quadrant // 2, each[4])))
    speed, heading = 0.02 + 0.04 * each[7], 2 * np.pi * each[8]
    columns = dict(shape=(label + (mixed and j > 0) * (1 + (each[0] * 9).astype(int))) % 10,
                   colour=(each[1] * 8).astype(int), size=np.digitize(r, (0.15, 0.20, 0.32, 0.38)),
                   place=np.where(count == 1, 4, quadrant), x=x, y=y, r=r, angle=(2 * each[5] - 1) * 0.15,
                   shade=1 - 0.12 * each[6], vx=speed * np.cos(heading), vy=speed * np.sin(heading))
    scene = {name: np.where(j < count, column, -1) for name, column in columns.items()}
    background = (image[1][:, 0] * 4).astype(int)
    ground = np.array([*GROUNDS.values()])[background] + 16 * (image[3] - 0.5)
    return dict(scene, label=label[:, 0], count=count[:, 0], background=background, ground=ground)

# --- Shapes: the picture -------------------------------------------------------

def star(x, y):
    """Five points, folded at the axes of symmetry until one straight edge is left."""
    x, y = abs(x), y + 0.05
    for normal in (0.8090, -0.8090):
        fold = 2 * np.maximum(normal * x - 0.5878 * y, 0)
        x, y = x - normal * fold, y + 0.5878 * fold
    dx, dy = 0.52 * 0.5878, 0.52 * 0.8090 - 1
    return ((y - 1.08) * dx - abs(x) * dy) / (dx * dx + dy * dy)**0.5

# Signed distance from (x, y), y up, to each shape's edge, in units of its radius, negative inside.
ROOT = 0.5**0.5
DISTANCE = {
    "circle": lambda x, y: np.sqrt(x * x + y * y) - 0.9,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.78,
    "triangle": lambda x, y: np.maximum(0.8660 * abs(x) + 0.5 * (y + 0.22), -(y + 0.22)) - 0.58,
    "diamond": lambda x, y: 0.527 * (abs(x) / 0.62 + abs(y) - 1),
    "plus": lambda x, y: np.maximum(np.maximum(abs(x), abs(y)) - 0.95, np.minimum(abs(x), abs(y)) - 0.3),
    "cross": lambda x, y: DISTANCE["plus"](ROOT * (x + y), ROOT * (y - x)),
    "star": star,
    "ring": lambda x, y: abs(np.sqrt(x * x + y * y) - 0.7) - 0.2,
    "heart": lambda x, y: np.minimum((abs(x) + abs(y + 0.12) - 0.74) * ROOT,
                                     np.sqrt((abs(x) - 0.37)**2 + (y - 0.25)**2) - 0.74 * ROOT),
    "moon": lambda x, y: np.maximum(np.sqrt(x * x + y * y) - 0.95,
                                    0.78 - np.sqrt((x - 0.42)**2 + (y - 0.12)**2)),
}

def draw(scene, size, frame=0):
    """Paint the scenes at one frame: uint8 (M, 3, H, W), H = W = size."""
    r, room = scene["r"], 1 - 2 * scene["r"]
    # Bouncing between the walls in closed form: frame f needs no frame f-1.
    x, y = (r + room - abs((scene[c] - r + scene["v" + c] * frame) % (2 * room) - room) for c in "xy")
    geometry = np.stack([x, y, r, np.cos(scene["angle"]), np.sin(scene["angle"])]).astype(np.float32)
    paint = (np.array([*COLOURS.values()])[scene["colour"]] * scene["shade"][..., None]).astype(np.float32)
    pixel = (np.arange(size, dtype=np.float32) + 0.5) / size
    image = np.tile(scene["ground"].astype(np.float32)[:, :, None, None], (size, size))
    for j, kind in itertools.product((3, 2, 1, 0), range(10)):  # object 0 last, on top; one shape at a time
        rows = np.flatnonzero(scene["shape"][:, j] == kind)
        if len(rows):
            x, y, r, cos, sin = geometry[:, rows, j, None, None]
            right, up = (pixel - x) / r, (y - pixel[:, None]) / r
            s = DISTANCE[SHAPES[kind]](cos * right + sin * up, cos * up - sin * right)
            cover = np.clip(0.5 - s * (r * size), 0, 1)[:, None]
            part = image[rows]
            image[rows] = part + cover * (paint[rows, j, :, None, None] - part)
    return np.rint(image).astype(np.uint8)

def shapes(index, size=32, objects=(1, 1), mixed=False, frames=1, seed=0):
    """Draw images `index` (integers in any order): uint8 (M, 3, H, W), or clips (M, F, 3, H, W).

    The class is index % 10. `objects` (lo, hi): how many an image holds; `mixed`: only object 0, the largest,
    has the shape of the class. Drawn in blocks that suit the cache; an image is bitwise the same in any.
    """
    index = np.asarray(index, np.int64)
    clips = np.empty((len(index), frames, 3, size, size), np.uint8)
    block = max(1, 2**18 // size**2)
    for start in range(0, len(index), block):
        scene = scenes(index[start:start + block], objects, mixed, frames, seed)
        for frame in range(frames):
            clips[start:start + block, frame] = draw(scene, size, frame)
    return clips if frames > 1 else clips[:, 0]

# --- Captions and words --------------------------------------------------------

WIDE = "\u2e80-\u9fff\uac00-\ud7a3"  # Chinese, Japanese, Korean: a character is a word

def split_words(text):
    """Lower-case words, punctuation marks and <tags> of a text, in order."""
    return re.findall(rf"<\w+>|[{WIDE}]|[^\W{WIDE}]+|[^\w\s]", unicodedata.normalize("NFC", text).lower())

WORDS = [*dict.fromkeys(split_words(" ".join(
    ["a in the , and on background moving", *SIZES, *COLOURS, *SHAPES, *PLACES, *GROUNDS, *DIRECTIONS])))]

class Vocabulary:
    """Words and their ids: 0 padding, 1 start, 2 end, 3 unknown, then the words given (those of captions)."""

    def __init__(self, words=WORDS):
        self.words = ["<pad>", "<start>", "<end>", "<unknown>", *words]
        self.ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, text):
        return [self.ids.get(word, 3) for word in split_words(text)]

    def decode(self, ids):
        """The text up to the first <end>, with spaces as its script wants them."""
        text = " ".join(self.words[i] for i in itertools.takewhile(lambda i: i != 2, ids) if i > 1)
        return re.sub(rf"(?<=[{WIDE}]) (?=[{WIDE}])| (?=,)|(?<= -) | (?=- )", "", text)

def captions(index, objects=(1, 1), mixed=False, frames=1, seed=0):
    """One sentence an image, from the scene and never from pixels: a list of str, of words in WORDS."""
    scene, j = scenes(index, objects, mixed, frames, seed), np.arange(4)
    names = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "place": PLACES}
    size, colour, shape, place = (np.array([*names[key]], object)[scene[key]] for key in names)
    each = "a " + size + " " + colour + " " + shape + " in the " + place
    if frames > 1:
        sideways = abs(scene["vx"]) > abs(scene["vy"])
        heading = np.where(sideways, 2 + (scene["vx"] > 0), scene["vy"] > 0)
        each += ", moving " + np.array(DIRECTIONS, object)[heading]
    count = scene["count"][:, None]
    joint = np.select([j == 0, j == count - 1], ["", " and "], ", ").astype(object)
    ground = np.array([*GROUNDS], object)[scene["background"]]
    return [*(np.where(j < count, joint + each, "").sum(1) + " on a " + ground + " background")]

def caption_ids(index, objects=(1, 1), mixed=False, frames=1, seed=0):
    """The same as integers (M, 17): size, colour, shape, place of objects 0..3 (-1: none), the background."""
    scene = scenes(index, objects, mixed, frames, seed)
    each = np.stack([scene[key] for key in ("size", "colour", "shape", "place")], 2)
    return np.concatenate([each.reshape(len(each), 16), scene["background"][:, None]], 1)

# --- A data set ----------------------------------------------------------------

@dataclass
class Data:
    """Labelled images, clips or latents, in memory or memory-mapped. DataError when the parts do not fit.

    Beside the fields: by_class, a list of K arrays of positions; mean, the images where latent.
    """
    images: np.ndarray                       # uint8 (M, C, H, W) or (M, F, C, H, W); the mean where latent
    labels: np.ndarray                       # int64 (M,)
    classes: list | None = None              # names of the K classes
    captions: list | None = None             # M strings
    name: str = ""
    latent: bool = False                     # mean, logvar ...: float (M, C, h, w) or (M, C, t, h, w)
    logvar: np.ndarray | None = None
    mean_flip: np.ndarray | None = None      # of the mirrored image
    logvar_flip: np.ndarray | None = None
    scale: float = 1.0                       # makes latents of unit variance

    def __post_init__(self):
        labels, count = np.asarray(self.labels), len(self.images)
        need(count and labels.shape == (count,) and labels.dtype.kind in "iu" and labels.min() >= 0,
             f"{self.name}: {count} images, labels {labels.dtype} {labels.shape}: one class number each")
        classes = range(labels.max() + 1) if self.classes is None else self.classes
        need(labels.max() < len(classes), f"{self.name}: label {labels.max()} but {len(classes)} class names")
        need(self.captions is None or len(self.captions) == count, f"{self.name}: captions are not {count}")
        self.labels, self.classes = labels.astype(np.int64), [str(name) for name in classes]
        self.by_class = [np.flatnonzero(labels == k) for k in range(len(classes))]
        self.mean = self.images if self.latent else None

    def __len__(self):
        return len(self.images)

    def pixels(self, index):
        """Images `index` as float32 in [-1, 1]: v / 127.5 - 1."""
        return torch.from_numpy(np.ascontiguousarray(self.images[np.asarray(index)])).float() / 127.5 - 1

    def latents(self, index, flip, noise):
        """scale * (mean + exp(clamp(logvar, -30, 20) / 2) * noise) as float32, of the mirrored images where
        `flip` (bool, (B,)). Without logvar: scale * mean. Without a mirrored copy `flip` idles."""
        index, flip = np.asarray(index), np.asarray(flip, bool)

        def chosen(plain, mirrored):
            rows = np.array(plain[index], np.float32)
            if mirrored is not None:
                rows[flip] = mirrored[index[flip]]
            return torch.from_numpy(rows)

        z = chosen(self.mean, self.mean_flip)
        if self.logvar is not None:
            z = z + torch.exp(chosen(self.logvar, self.logvar_flip).clamp(-30, 20) / 2) * noise
        return self.scale * z

def open_data(spec, split="train", size=32, objects=(1, 1), mixed=False, frames=1, count=20000):
    """Open the data set that `spec` names (see the top of this file): Data.

    shapes: `count` images, or clips of `frames` frames, `objects` and `mixed` as in `shapes`. Files: images
    `size` pixels wide and high, 0 for any; those of a folder are scaled and cropped to it; clips give their
    first `frames` frames, stills when that is 1.
    """
    kind, _, path = spec.partition(":")
    need(split in SPLITS, f"data {spec}: no split {split}: give {', '.join(SPLITS)}")
    if spec == "shapes":
        need(min(size, frames, count) > 0, f"shapes: size {size}, frames {frames}, count {count}: 1 or more")
        index, options = SPLITS[split] + np.arange(count), (objects, mixed, frames)
        return Data(shapes(index, size, *options), index % 10, SHAPES, captions(index, *options), spec)
    readers = {"cifar10": open_pack, "npz": open_pack, "video": open_pack, "folder": open_folder,
               "latents": open_latents}
    need(kind in readers and (path or spec == "cifar10"),
         f"data {spec}: give shapes, cifar10, or KIND:PATH with KIND one of {', '.join(readers)}")
    path = Path(path).expanduser() if path else fetch(CIFAR_URL, CIFAR_MD5)
    data = readers[kind](path, split, size, frames)
    height, width = data.images.shape[-2:]
    need(data.latent or height == width and size in (0, width),
         f"{path}: images are {width}x{height} pixels where {size or 'equal sides'} is asked for")
    return data

# --- Packs: npz files, CIFAR-10 as published -----------------------------------

def fetch(url, md5):
    """Download a file into CACHE, once; return its path."""
    path, digest = CACHE / url.split("/")[-1], hashlib.md5()
    if not path.exists():
        with whole(path) as file, reading(url), urllib.request.urlopen(url, timeout=30) as reply:
            total = int(reply.headers.get("Content-Length") or 0)
            blocks = iter(lambda: reply.read(2**20), b"")
            for block in tqdm(blocks, path.name, total >> 20, unit="MB", disable=None):
                file.write(block)
                digest.update(block)
            got = digest.hexdigest()
            need(got == md5, f"{url}: {file.tell()} of {total} bytes, md5 {got} where {md5} is right; "
                 "a copy from elsewhere is read as cifar10:PATH")
    return path

class ArraysOnly(pickle.Unpickler):
    """Loads pickled containers of numbers, strings and arrays; refuses all else that a pickle could run."""

    def find_class(self, module, name):
        if (module, name) in ((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")):
            return np.empty(0).__reduce__()[0]
        need(module == "numpy" and name in ("ndarray", "dtype"), f"unsafe pickle: {module}.{name}")
        return getattr(np, name)

def batches(path):
    """CIFAR-10 from the published archive or its folder, as the arrays of a pack."""
    pack = {"class_names": "airplane automobile bird cat deer dog frog horse ship truck".split()}
    with contextlib.nullcontext() if path.is_dir() else tarfile.open(path) as archive:
        for part, names in (("train", [f"data_batch_{k}" for k in range(1, 6)]), ("test", ["test_batch"])):
            read = []
            for name in names:
                member = f"cifar-10-batches-py/{name}"
                with archive.extractfile(member) if archive else open(path / name, "rb") as file:
                    read.append(ArraysOnly(file, encoding="bytes").load())
            images = np.concatenate([batch[b"data"] for batch in read])
            pack[part + "_images"] = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            pack[part + "_labels"] = np.concatenate([batch[b"labels"] for batch in read])
    return pack

def arrays(path):
    """The arrays of an npz file, of a folder of .npy files (memory-mapped), or of CIFAR-10."""
    with reading(path):
        if path.name.endswith(".tar.gz") or (path / "test_batch").exists():
            return batches(path)
        if path.is_dir():
            return {file.stem: np.load(file, mmap_mode="r") for file in path.glob("*.npy")}
        with np.load(path) as file:
            return dict(file)

def held_out(count, split):
    """The positions of a split in data that knows none: every tenth is test."""
    return np.flatnonzero((np.arange(count) % 10 == 9) == (split == "test"))

def open_pack(path, split, size, frames):
    """`images` (M, H, W[, C]) or `videos` (M, F, H, W, C), uint8, C = 1 or 3; optional labels, captions and
    class_names. With splits: train_images, test_labels ...; JPEG streams may stand for images."""
    pack, own = arrays(path), "test_" if split == "test" else "train_"
    if own + "scan" in pack:  # JPEGs, one header for all
        head, scan, ends = pack["header"].tobytes(), pack[own + "scan"].tobytes(), pack[own + "offset"]
        jpegs = [io.BytesIO(head + scan[a:b]) for a, b in zip(ends[:-1], ends[1:])]
        pack[own + "images"] = packed(own + "jpeg", path, [path], jpegs, 0).transpose(0, 2, 3, 1)
    kind = next((kind for kind in ("images", "videos") if kind in pack or own + kind in pack), None)
    need(kind, f"{path}: holds {', '.join(pack)}: no images or videos for split {split}")
    own = own if own + kind in pack else ""
    images = pack[own + kind]
    about = f"{path}: {kind} {images.dtype} {images.shape}"
    if kind == "videos":
        need(images.ndim == 5 and images.shape[1] >= frames, f"{about}: no clips of {frames} frames")
        images = images[:, :frames] if frames > 1 else images[:, 0]
    if images.ndim == 3:
        images = images[..., None]
    need(images.dtype == np.uint8 and images.ndim == 4 + (frames > 1) and images.shape[-1] in (1, 3),
         f"{about}: {'clips' if frames > 1 else 'pictures'} in uint8 with 1 or 3 channels, last, are wanted")
    images = np.moveaxis(np.broadcast_to(images, (*images.shape[:-1], 3)), -1, -3)
    rows = slice(None) if own else held_out(len(images), split)
    labels, texts = pack.get(own + "labels", np.zeros(len(images), int)), pack.get(own + "captions", images)
    need(len(labels) == len(texts) == len(images), f"{about}: as many labels and captions are wanted")
    texts = texts[rows].tolist() if own + "captions" in pack else None
    return Data(images[rows], labels[rows], pack.get("class_names"), texts, str(path))

def open_latents(path, split, size, frames):
    """`latents` (M, C, h, w) or (M, C, t, h, w), labels; optional logvar, latents_flip, logvar_flip of that
    shape, class_names and a scalar scale."""
    pack = arrays(path)
    mean, *others = (pack.get(name) for name in ("latents", "logvar", "latents_flip", "logvar_flip"))
    need(mean is not None and "labels" in pack and mean.dtype.kind == "f" and mean.ndim in (4, 5),
         f"{path}: holds {', '.join(pack)}: latents, floats (M, C, [t,] h, w), and labels (M,) are wanted")
    need(all(part is None or part.shape == mean.shape for part in others),
         f"{path}: logvar, latents_flip, logvar_flip must have the shape of latents, {mean.shape}")
    scale = float(pack.get("scale", 1))
    return Data(mean, pack["labels"], pack.get("class_names"), None, str(path), True, *others, scale)

# --- Folders of pictures -------------------------------------------------------

def open_folder(path, split, size, frames):
    """PATH/CLASS/*.jpg, .jpeg, .png; or PATH/train/CLASS/... beside PATH/test or PATH/val."""
    names = ("test", "val") if split == "test" else ("train",)
    own = next((path / name for name in names if (path / name).is_dir()), None)
    root, endings = own or path, (".jpg", ".jpeg", ".png")
    files = sorted(file for file in root.glob("*/*") if file.suffix.lower() in endings)
    need(files and frames == 1, f"{root}: stills in CLASS/*.jpg, *.jpeg, *.png are wanted; clips come in npz")
    classes, labels = np.unique([file.parent.name for file in files], return_inverse=True)
    rows = np.arange(len(files)) if own else held_out(len(files), split)
    files = [files[i] for i in rows]
    images = packed(root.name, (root, size, split == "test"), files, files, size)
    return Data(images, labels[rows], classes, None, str(path))

def packed(name, key, files, sources, size):
    """The pictures in `sources` as one memory-mapped array (M, 3, H, W), decoded once into a file of CACHE.

    Its name says what it holds and the state (size, time) of the `files` it was made from: a changed folder
    gets another one, and the old one goes.
    """
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    what, when = (hashlib.sha256(str(value).encode()).hexdigest()[:12] for value in (key, state))
    path, shape = CACHE / f"{name}-{what}-{when}.npy", None
    if not path.exists():
        with whole(path) as out:
            images = tqdm(decoded(sources, size), f"packing {name}", len(sources), disable=None)
            for source, image in zip(sources, images):
                if shape is None:
                    shape = image.shape
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(sources), *shape)}
                    np.lib.format.write_array_header_1_0(out, header)
                need(image.shape == shape, f"{source}: mixed image sizes {shape}, {image.shape}: scale them")
                out.write(image.tobytes())
        for old in set(CACHE.glob(f"{name}-{what}-*.npy")) - {path}:
            old.unlink()
    return np.load(path, mmap_mode="r")

def decoded(sources, size):
    """Yield pictures as uint8 RGB (3, H, W); unless size is 0, scaled and the centre cut out."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise DataError("JPEG and PNG files need Pillow: pip install pillow") from None

    def picture(source):
        with reading(source), Image.open(source) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            return np.asarray(ImageOps.fit(image, (size, size)) if size else image).transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(sources), 256):
            yield from pool.map(picture, sources[start:start + 256])

# --- Text: WordPiece and GLUE --------------------------------------------------

HAN = ("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf"
       "\U0002f800-\U0002fa1f]")

@functools.lru_cache(maxsize=None)
def spaced(char, cased):
    """BERT's view of a character: Chinese, punctuation stand alone; controls vanish, accents unless cased."""
    kind = unicodedata.category(char)
    if char == "\ufffd" or kind in ("Cc", "Cf", "Mn")[:3 - cased] and char not in "\t\n\r":
        return ""
    alone = re.match(HAN, char) or kind[0] == "P" or "!" <= char <= "~" and not char.isalnum()
    return f" {char} " if alone else char

def read_vocabulary(path):
    """{token: id}, and whether the file itself says that case does not count (None: it says nothing).

    vocab.txt: one token a line, its line number is its id. tokenizer.json: what transformers 5 writes.
    """
    path = Path(path)
    with reading(path):
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return {token: i for i, token in enumerate(text.split("\n")) if token}, None
        stored = json.loads(text)
        model, normalizer = stored["model"], stored.get("normalizer") or {}
        need(model["type"] == "WordPiece", f"{path}: a {model['type']} vocabulary where WordPiece is wanted")
        return {str(token): int(i) for token, i in model["vocab"].items()}, normalizer.get("lowercase")

class WordPiece:
    """BERT's tokenizer. `ids`: a token's id, its line in vocab.txt. Whether case and accents count says
    do_lower_case in tokenizer_config.json beside that file, or else `cased`."""
    def __init__(self, path, cased=False):
        about = Path(path).with_name("tokenizer_config.json")
        self.ids, said = read_vocabulary(path)
        with reading(about):
            known = json.loads(about.read_text(encoding="utf-8") if about.exists() else "{}")
        self.cased = not known.get("do_lower_case", not cased if said is None else said)
        missing = {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} - self.ids.keys()
        need(not missing, f"{path}: no WordPiece vocabulary: lacks {', '.join(sorted(missing))}")
        self.pieces = functools.lru_cache(maxsize=None)(self.pieces)

    def pieces(self, word):
        """Ids of the longest piece that the vocabulary holds, again and again; [UNK] when any part fails."""
        ids, start = [], 0
        while start < len(word):
            mark, ends = "##" if start else "", range(len(word), start, -1)
            end = next((end for end in ends if mark + word[start:end] in self.ids), None)
            if end is None or len(word) > 100:
                return [self.ids["[UNK]"]]
            ids.append(self.ids[mark + word[start:end]])
            start = end
        return ids

    def encode(self, text, pair=None, length=None):
        """[CLS] text [SEP], or [CLS] text [SEP] pair [SEP]: lists ids, types (pair 1), mask (padding 0).
        `length` shortens (the longer text first, at its end) and pads to that many tokens."""
        bodies = []
        for body in (text,) if pair is None else (text, pair):
            body = body if self.cased else unicodedata.normalize("NFD", body.lower())
            words = "".join(spaced(char, self.cased) for char in body).split()
            bodies.append([i for word in words for i in self.pieces(word)])
        while length and sum(map(len, bodies)) + len(bodies) + 1 > length and any(bodies):
            max(reversed(bodies), key=len).pop()
        ids, types = [self.ids["[CLS]"]], [0]
        for kind, body in enumerate(bodies):
            ids += [*body, self.ids["[SEP]"]]
            types += [kind] * (len(body) + 1)
        padding = [0] * ((length or 0) - len(ids))
        return ids + [self.ids["[PAD]"]] * len(padding), types + padding, [1] * len(ids) + padding

def table(path, columns):
    """The rows of a tab-separated file without quoting; row i is line i+1. DataError names a broken line."""
    with reading(path), open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        rows = [line.rstrip("\r\n").split("\t") for line in file]
    need(rows, f"{path}: is empty")
    for number, row in enumerate(rows, 1):
        need(len(row) == columns and "\ufffd" not in "".join(row),
             f"{path}: line {number}: {len(row)} columns where {columns} are wanted, in UTF-8")
    return rows

GLUE = {  # columns of the file, those of the texts, that of the label; the label's values and names in order
    "SST-2": (2, (0,), 1, ("0", "1"), ["negative", "positive"]),
    "CoLA": (4, (3,), 1, ("0", "1"), ["unacceptable", "acceptable"]),
    "MRPC": (5, (3, 4), 0, ("0", "1"), ["different", "equivalent"]),
    "RTE": (4, (1, 2), 3, ("entailment", "not_entailment"), ["entailment", "not_entailment"]),
}

def glue(task, path, split="train"):
    """Texts (pairs of them: MRPC, RTE), labels int64 (M,) and the names of the classes.

    `path` holds TASK/train.tsv and TASK/dev.tsv as GLUE ships them; dev is the test split here.
    """
    need(task in GLUE, f"glue:{task}: give one of {', '.join(GLUE)}")
    columns, places, place, values, names = GLUE[task]
    file = Path(path) / task / ("train.tsv" if split == "train" else "dev.tsv")
    texts, labels = [], []
    for number, row in [*enumerate(table(file, columns), 1)][task != "CoLA":]:  # CoLA alone has no header
        need(row[place] in values and all(row[k].strip() for k in places),
             f"{file}: line {number}: no text, or label {row[place]!r} not in {values}")
        texts.append(tuple(row[k] for k in places) if len(places) > 1 else row[places[0]])
        labels.append(values.index(row[place]))
    return texts, np.array(labels), names

# --- Text: translation ---------------------------------------------------------

# A row a language: how many numbers its pairs with larger languages train on; the digits; the tens, hundred,
# thousand, * standing for the digit; what is irregular, as rewritings in order. They see the parts of a
# number joined by +, with 0 for a zero inside: 1005 is "one thousand+0+0+five".
NUMERALS = {
    "en": (8000, "zero one two three four five six seven eight nine",
           "ten twenty thirty forty fifty sixty seventy eighty ninety", "* hundred", "* thousand",
           [(r"ten\+one", "eleven"), (r"ten\+two", "twelve"), (r"ten\+(\w+)", r"\1teen"), ("threet", "thirt"),
            ("fivet", "fift"), ("eightt", "eight"), (r"ty\+", "ty-")]),
    "zh": (6000, "零 一 二 三 四 五 六 七 八 九", "*十", "*百", "*千",
           [("^一十", "十"), (r"(0\+)+", "零"), (r"\+", "")]),
    "vi": (4000, "không một hai ba bốn năm sáu bảy tám chín", "* mươi", "* trăm", "* nghìn",
           [("một mươi", "mười"), (r"(mươi|mười)\+năm", r"\1+lăm"), (r"mươi\+một", "mươi+mốt"),
            (r"mươi\+bốn", "mươi+tư"), (r"nghìn\+0", "nghìn+không trăm"), (r"trăm\+0", "trăm+lẻ")]),
    "ja": (3000, "零 一 二 三 四 五 六 七 八 九", "*十", "*百", "*千",
           [("一(?=[十百千])", ""), (r"0?\+", "")]),
    "ko": (2000, "영 일 이 삼 사 오 육 칠 팔 구", "*십", "*백", "*천",
           [("일(?=[십백천])", ""), (r"0?\+", "")]),
    "id": (1500, "nol satu dua tiga empat lima enam tujuh delapan sembilan", "* puluh", "* ratus", "* ribu",
           [(r"satu puluh\+(\w+)", r"\1 belas"), ("satu (?=puluh|belas|ratus|ribu)", "se")]),
    "tr": (800, "sıfır bir iki üç dört beş altı yedi sekiz dokuz",
           "on yirmi otuz kırk elli altmış yetmiş seksen doksan", "* yüz", "* bin",
           [("bir (?=yüz|bin)", "")]),
    "eo": (400, "nul unu du tri kvar kvin ses sep ok naŭ", "*dek", "*cent", "* mil",
           [("unu ?(?=dek|cent|mil)", "")]),
    "sw": (200, "sifuri moja mbili tatu nne tano sita saba nane tisa",
           "kumi ishirini thelathini arobaini hamsini sitini sabini themanini tisini", "mia *", "elfu *",
           [(r"0\+", ""), (r"(elfu \w+)\+", r"\1, "), (r"\+", " na ")]),
    "mi": (100, "kore tahi rua toru whā rima ono whitu waru iwa", "* tekau", "* rau", "* mano",
           [(r"\btahi tekau", "tekau"), (r"\btahi (?=rau|mano)", "kotahi "), (r"0\+", ""),
            (r"\+(?!tekau)(\w+)$", r" mā \1")]),
}

def number_words(language, n):
    """n (0..9999) in words: number_words("vi", 1015) = "một nghìn không trăm mười lăm"."""
    _, digits, *powers, rules = NUMERALS[language]
    digits, parts = digits.split(), []
    for power, pattern in zip((1000, 100, 10), reversed(powers)):
        digit = n // power % 10
        words = pattern.replace("*", digits[digit]) if "*" in pattern else pattern.split()[digit - 1]
        if n >= power and n % (10 * power):
            parts.append(words if digit else "0")
    text = "+".join(parts + [digits[n % 10]] * (n % 10 > 0 or n == 0))
    for old, new in rules:
        text = re.sub(old, new, text)
    return text.replace("0+", "").replace("+", " ")

@dataclass
class Pairs:
    """Sentences and their translations as ids of one vocabulary for all languages, 0 after the end."""
    source: np.ndarray      # int64 (M, S): <2xx>, the tag of the language wanted; words; <end>
    target: np.ndarray      # int64 (M, T): <start>, words, <end>
    direction: np.ndarray   # int64 (M,): position in directions
    directions: list        # (from, to)
    vocabulary: Vocabulary

def translation_pairs(split="train", path=None, languages=tuple(NUMERALS), limit=10000, tests=100):
    """Pairs for one model that translates between all languages: number words, or the sentences of a file.

    Numbers lie below `limit`. A tenth is test, the same in all directions, trained on in none, `tests` of it
    in each; a direction trains on as many others as the smaller of its languages has. A file has rows from,
    to, source, target, tabs between; every tenth is test; words its training rows lack are <unknown>. A token
    is a word: a number has ten at most, where spelling would take 60 steps of decoding and a long training.
    """
    if path is None:
        words = {language: [number_words(language, n) for n in range(limit)] for language in languages}
        numbers, rows = np.flatnonzero((uniform(np.arange(limit), 0) < 0.1) == (split == "test")), []
        for k, (a, b) in enumerate(itertools.permutations(languages, 2), 1):
            count = tests if split == "test" else min(NUMERALS[a][0], NUMERALS[b][0])
            chosen = numbers[np.argsort(uniform(numbers, k))[:count]]
            rows += [(a, b, words[a][n], words[b][n]) for n in chosen]
        known = [text for texts in words.values() for text in texts]
    else:
        rows = table(path, 4)
        languages = sorted({language for row in rows for language in row[:2]})
        known = [text for i in held_out(len(rows), "train") for text in rows[i][2:]]
        rows = [rows[i] for i in held_out(len(rows), split)]
    need(rows, f"{path or 'numbers'}: too few rows: none in split {split}")
    tags = [f"<2{language}>" for language in languages]
    vocabulary = Vocabulary(dict.fromkeys([*tags, *split_words(" ".join(known))]))
    encode = functools.lru_cache(maxsize=None)(vocabulary.encode)
    source = [[vocabulary.ids[f"<2{row[1]}>"], *encode(row[2]), 2] for row in rows]
    target = [[1, *encode(row[3]), 2] for row in rows]
    source, target = (np.array([*itertools.zip_longest(*ids, fillvalue=0)]).T for ids in (source, target))
    directions = sorted({(row[0], row[1]) for row in rows})
    direction = np.array([directions.index((row[0], row[1])) for row in rows])
    return Pairs(source, target, direction, directions, vocabulary)
