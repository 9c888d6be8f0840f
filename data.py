"""Data sets and tokenisation of text, and nothing else.

`shapes`, the default, is drawn here and needs no file: coloured shapes on plain grounds, still or moving. All
that they show is known exactly, so that what a model claims to have learnt can be checked. Image i is a pure
function of (seed, i): any image can be had at any time, in any order, at any size, on any machine.

Specs:    shapes                  procedural, at any size
          cifar10[:PATH]          downloaded, or the archive, its folder or an npz of it
          npz:PATH, video:PATH    arrays: images or clips, labels, captions, names (open_pack)
          folder:PATH             pictures in CLASS/..., with or without train/ and test/ above (open_folder)
          latents:PATH            means and log-variances that an encoder left (open_latents)
          glue:TASK:PATH          texts with labels or scores, as GLUE ships them (open_texts)
          squad:PATH              questions on passages: SQuAD 2.0 (open_texts)
          translation_pairs()     sentences with their translations
Splits:   train, test, judge: disjoint ranges of shapes. judge trains the classifiers that judge samples
          (common.judge). Files: their own, else every tenth image is test; judge is train; latents are one
          whole in every split. All splits have the class list of train.
Letters:  M images, F frames, C channels, H W height and width, h w a grid of latents, B a batch, K classes
Errors:   whatever is wrong with a file, its content or a request is a DataError: one line, path and reason.
Memory:   arrays of files are memory-mapped: they cost the memory of what a batch reads of them.
Read in this order: the scene, the picture, Captions and words, A data set; then the reader that you need.
"""

import contextlib
import functools
import hashlib
import inspect
import io
import itertools
import json
import mmap
import os
import pickle
import re
import shutil
import struct
import tarfile
import tempfile
import unicodedata
import urllib.request
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import common
from common import UserError, require

import numpy as np
import torch
from tqdm import tqdm

CACHE = Path("runs/data")  # downloads, decoded pictures, unpacked arrays: complete or not there at all
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_MD5 = "c58f30108f718f92721af3b95e74349a"

DataError = UserError  # data that cannot be had as asked for: one line with the path and the reason

# --- Shapes: the scene ---------------------------------------------------------

COLOURS = {
    "red": (228, 45, 45), "orange": (250, 140, 20), "yellow": (250, 220, 50), "green": (50, 180, 75),
    "cyan": (60, 205, 225), "blue": (45, 95, 235), "purple": (150, 65, 200), "pink": (250, 130, 190),
}
GROUNDS = {"black": (16, 16, 20), "white": (245, 245, 240), "grey": (105, 105, 110), "brown": (88, 52, 30)}
# Image i shows shape i % 10: with another number of shapes every image, label and caption changes.
SHAPES = ["circle", "square", "triangle", "diamond", "plus", "cross", "star", "ring", "heart", "moon"]
SIZES = ["tiny", "small", "medium", "large", "huge"]
SIZE_LIMITS = (0.15, 0.20, 0.32, 0.38)                     # radii at which one size ends and the next begins
PLACES = ["top left", "top right", "bottom left", "bottom right", "centre"]
DIRECTIONS = ["up", "down", "left", "right"]
SPLITS = {"train": 0, "judge": 5 * 10**8, "test": 10**9}   # the first index of each
ORDERS = np.array([*itertools.permutations(range(4))])     # of the quadrants, (24, 4)
GOLDEN = 0x9E3779B97F4A7C15                                # 2^64 over the golden ratio


def mix(z):
    """The finisher of splitmix64 (Steele, Lea, Flood 2014) on a uint64 array; the arithmetic wraps."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(index, field, seed=0):
    """float64 in [0, 1), a pure function of its arguments; arrays `index` and `field` broadcast.

    The seed and the index, hashed, choose a stream of numbers; field f takes number f of it, of 24 bits.
    """
    a = mix(np.array([(seed * GOLDEN + 0x1234567) % 2**64], np.uint64))
    b = mix(np.asarray(index).astype(np.uint64) * np.uint64(GOLDEN) + a)
    step = (np.atleast_1d(field) + 1).astype(np.uint64) * np.uint64(GOLDEN)
    return (mix(b + step) >> np.uint64(40)) / 2.0**24


def scenes(index, objects=(1, 1), mixed=False, frames=1, seed=0):
    """What images `index` (integers, (M,)) show, exactly: a dict of arrays.

    label, count, background  (M,), integers: the class, how many objects, position in GROUNDS
    ground                    (M, 3), the background's colour in 0..255
    shape, colour, size, place  (M, 4), a column an object: positions in SHAPES, COLOURS, SIZES, PLACES
    x, y, r                   (M, 4), centre at frame 0 (y down) and radius, in sides of the image
    angle, shade              (M, 4), in radians; a factor on the colour
    vx, vy                    (M, 4), in sides a frame

    All (M, 4) hold -1 where there is no object. `objects` (lo, hi) with 1 <= lo <= hi <= 4, or DataError.
    """
    lo, hi = objects
    require(1 <= lo <= hi <= 4, f"shapes: objects {lo},{hi}: give lo,hi with 1 <= lo <= hi <= 4")
    index = np.asarray(index, np.int64)[:, None]
    j = np.arange(4)

    # Fields 0..3 of an index belong to the image, 8 + 10 j + 0..8 to its object j; those between are free.
    of_image = [uniform(index, field, seed) for field in range(4)]                      # each (M, 1)
    of_object = [uniform(index, 8 + 10 * j + field, seed) for field in range(9)]        # each (M, 4)
    u_count, u_ground, u_order, u_light = of_image
    u_shape, u_colour, u_radius, u_x, u_y, u_angle, u_shade, u_speed, u_heading = of_object
    label = index % 10                                                                  # (M, 1)
    count = lo + (u_count * (hi - lo + 1)).astype(int)
    alone = count == 1
    if mixed:  # object 0, the largest, has the shape of the class, the others have any other shape
        shape = np.where(j == 0, label, (label + 1 + (u_shape * 9).astype(int)) % 10)
        r = np.where(j == 0, 0.215 + 0.03 * u_radius, 0.13 + 0.045 * u_radius)
    else:
        shape = label
        r = 0.17 + 0.06 * u_radius
    if frames == 1:  # a single object fills a still; in a clip it needs room to move
        r = np.where(alone, 0.32 + 0.12 * u_radius, r)

    def centre(corner, u):
        """A coordinate: anywhere for one object; else corner 0: left or upper half, 1: the other."""
        return np.where(alone, r + (1 - 2 * r) * u, 0.25 + 0.5 * corner + (2 * u - 1) * (0.25 - r))

    quadrant = ORDERS[(u_order[:, 0] * 24).astype(int)]                                 # (M, 4)
    speed = 0.02 + 0.04 * u_speed
    heading = 2 * np.pi * u_heading
    columns = {
        "shape": shape,
        "colour": (u_colour * 8).astype(int),
        "size": np.digitize(r, SIZE_LIMITS),
        "place": np.where(alone, PLACES.index("centre"), quadrant),
        "x": centre(quadrant % 2, u_x),
        "y": centre(quadrant // 2, u_y),
        "r": r,
        "angle": (2 * u_angle - 1) * 0.15,
        "shade": 1 - 0.12 * u_shade,
        "vx": speed * np.cos(heading),
        "vy": speed * np.sin(heading),
    }
    scene = {name: np.where(j < count, column, -1) for name, column in columns.items()}
    scene["label"] = label[:, 0]
    scene["count"] = count[:, 0]
    scene["background"] = (u_ground[:, 0] * 4).astype(int)
    scene["ground"] = np.array([*GROUNDS.values()])[scene["background"]] + 16 * (u_light - 0.5)
    return scene


# --- Shapes: the picture -------------------------------------------------------

HALF_ROOT = 0.5**0.5


# Each of the next ten functions: the signed distance from points (x, y), y up, to the edge of a shape around
# the origin, in units of its radius; negative inside. x and y are arrays that broadcast. Only near the edge
# must it be exact: a pixel is covered by 1/2 - its distance in pixels, cut off at 0 and 1. Numbers: .8660 is
# cos 30 degrees, .8090 and .5878 cos and sin 36, .527 is (1 + 1 / .62^2)^(-1/2); the rest is chosen by eye.
def circle(x, y):
    """A disc of radius 0.9."""
    return np.sqrt(x * x + y * y) - 0.9


def square(x, y):
    """Half a side is 0.78."""
    return np.maximum(abs(x), abs(y)) - 0.78


def triangle(x, y):
    """Equilateral, on its base: three sides at 0.58 from a point below the centre."""
    y = y + 0.22
    return np.maximum(0.8660 * abs(x) + 0.5 * y, -y) - 0.58


def diamond(x, y):
    """Higher than it is wide: its corners lie at 0.62 and 1."""
    return 0.527 * (abs(x) / 0.62 + abs(y) - 1)


def plus(x, y):
    """Two bars of length 1.9 and width 0.6."""
    long = np.maximum(abs(x), abs(y))
    short = np.minimum(abs(x), abs(y))
    return np.maximum(long - 0.95, short - 0.3)


def cross(x, y):
    """A plus, turned by 45 degrees."""
    return plus(HALF_ROOT * (x + y), HALF_ROOT * (y - x))


def star(x, y):
    """Five points, folded at the axes of symmetry until one straight edge is left."""
    x = abs(x)
    y = y + 0.05
    for normal in (0.8090, -0.8090):
        fold = 2 * np.maximum(normal * x - 0.5878 * y, 0)
        x = x - normal * fold
        y = y + 0.5878 * fold
    dx = 0.52 * 0.5878              # the edge runs from the tip (0, 1.08) in this direction
    dy = 0.52 * 0.8090 - 1
    return ((y - 1.08) * dx - abs(x) * dy) / (dx * dx + dy * dy)**0.5


def ring(x, y):
    """Between the radii 0.5 and 0.9."""
    return abs(np.sqrt(x * x + y * y) - 0.7) - 0.2


def heart(x, y):
    """A square on its corner and two discs on its upper sides."""
    corner = (abs(x) + abs(y + 0.12) - 0.74) * HALF_ROOT
    discs = np.sqrt((abs(x) - 0.37)**2 + (y - 0.25)**2) - 0.74 * HALF_ROOT
    return np.minimum(corner, discs)


def moon(x, y):
    """A disc without another disc."""
    disc = np.sqrt(x * x + y * y) - 0.95
    bite = np.sqrt((x - 0.42)**2 + (y - 0.12)**2)
    return np.maximum(disc, 0.78 - bite)


DISTANCE = {
    "circle": circle, "square": square, "triangle": triangle, "diamond": diamond, "plus": plus,
    "cross": cross, "star": star, "ring": ring, "heart": heart, "moon": moon,
}


def draw(scene, size, frame=0):
    """Paint the scenes at one frame: uint8 (M, 3, H, W), H = W = size.

    Object by object and shape by shape over all images that show it: few large operations on arrays.
    """
    r = scene["r"]
    room = 1 - 2 * r

    def bounced(start, velocity):
        """A coordinate between the walls at `frame`, in closed form: frame f needs no frame f-1."""
        return r + room - abs((start - r + velocity * frame) % (2 * room) - room)

    x = bounced(scene["x"], scene["vx"])
    y = bounced(scene["y"], scene["vy"])
    geometry = np.stack([x, y, r, np.cos(scene["angle"]), np.sin(scene["angle"])]).astype(np.float32)
    colour = np.array([*COLOURS.values()])[scene["colour"]]                             # (M, 4, 3)
    paint = (colour * scene["shade"][..., None]).astype(np.float32)
    pixel = (np.arange(size, dtype=np.float32) + 0.5) / size
    image = np.tile(scene["ground"].astype(np.float32)[:, :, None, None], (size, size))
    for j in (3, 2, 1, 0):  # object 0 last, on top of all others
        for kind, name in enumerate(SHAPES):
            rows = np.flatnonzero(scene["shape"][:, j] == kind)
            if len(rows) == 0:
                continue
            x, y, r_j, cos, sin = geometry[:, rows, j, None, None]                      # each (m, 1, 1)
            # from pixels into the object's own frame: about its centre, in its radius, y up, turned back
            # (angles are counter-clockwise)
            right = (pixel - x) / r_j
            up = (y - pixel[:, None]) / r_j
            distance = DISTANCE[name](cos * right + sin * up, cos * up - sin * right)   # (m, H, W)
            cover = np.clip(0.5 - distance * (r_j * size), 0, 1)[:, None]               # of each pixel
            below = image[rows]
            image[rows] = below + cover * (paint[rows, j, :, None, None] - below)
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
WORD = re.compile(rf"<\w+>|[{WIDE}]|[^\W{WIDE}]+|[^\w\s]")  # a <tag>, such a character, other letters, a mark


def split_words(text):
    """Lower-case words, punctuation marks and <tags> of a text, in order: a list of str."""
    return WORD.findall(unicodedata.normalize("NFC", text).lower())


SENTENCE = ["a in the , and on background moving"]  # what captions say beside the names
WORDS = list(dict.fromkeys(split_words(" ".join(
    [*SENTENCE, *SIZES, *COLOURS, *SHAPES, *PLACES, *GROUNDS, *DIRECTIONS]))))


PAD, START, END, UNKNOWN = range(4)  # the first ids of every vocabulary


class Vocabulary:
    """Words and their ids: 0 padding, 1 start, 2 end, 3 unknown, then the words given (those of captions)."""

    def __init__(self, words=WORDS):
        """words: an iterable of different str."""
        self.words = ["<pad>", "<start>", "<end>", "<unknown>", *words]
        self.ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, text):
        """The ids of a text's words: a list of int, without start and end."""
        return [self.ids.get(word, UNKNOWN) for word in split_words(text)]

    def decode(self, ids):
        """The text up to the first <end>, with spaces as its script wants them."""
        words = []
        for i in ids:
            if i == END:
                break
            if i > END:
                words.append(self.words[i])
        text = " ".join(words)
        text = re.sub(rf"(?<=[{WIDE}]) (?=[{WIDE}])", "", text)     # none inside Chinese
        text = re.sub(r" (?=,)", "", text)                          # none before a comma
        return re.sub(r"(?<= -) | (?=- )", "", text)                # none around a hyphen


def captions(index, objects=(1, 1), mixed=False, frames=1, seed=0):
    """One sentence an image, from the scene and never from pixels: a list of str, of words in WORDS."""
    scene = scenes(index, objects, mixed, frames, seed)
    colours = [*COLOURS]
    grounds = [*GROUNDS]
    sentences = []
    for i, count in enumerate(scene["count"]):
        phrases = []
        for j in range(count):
            size = SIZES[scene["size"][i, j]]
            colour = colours[scene["colour"][i, j]]
            shape = SHAPES[scene["shape"][i, j]]
            place = PLACES[scene["place"][i, j]]
            phrase = f"a {size} {colour} {shape} in the {place}"
            if frames > 1:
                phrase += f", moving {direction(scene['vx'][i, j], scene['vy'][i, j])}"
            phrases.append(phrase)
        text = phrases[-1]
        if count > 1:
            text = ", ".join(phrases[:-1]) + " and " + text
        sentences.append(f"{text} on a {grounds[scene['background'][i]]} background")
    return sentences


def direction(vx, vy):
    """The word for the larger component of a velocity (numbers, y down)."""
    if abs(vx) > abs(vy):
        return "right" if vx > 0 else "left"
    return "down" if vy > 0 else "up"


# --- A data set ----------------------------------------------------------------

@dataclass
class Data:
    """Labelled images, clips or latents, in memory or memory-mapped. DataError when the parts do not fit.

    images (M, C, H, W) or (M, F, C, H, W): uint8; where `latent` the means, floats (M, C, h, w) or
    (M, C, t, h, w). Without `classes` the labels found in training are numbered: 7, 107, 207 become 0, 1, 2.
    Beside the fields: by_class, a list of K arrays of positions; mean, the images where latent.
    """

    images: np.ndarray
    labels: np.ndarray                       # (M,), integers from 0 up
    classes: list | None = None              # names of the K classes
    captions: list | None = None             # M strings
    name: str = ""                           # as --data has it
    latent: bool = False
    logvar: np.ndarray | None = None         # these three: of the shape of the means
    mean_flip: np.ndarray | None = None      # of the mirrored image
    logvar_flip: np.ndarray | None = None
    scale: float | torch.Tensor = 1.0        # makes latents of unit variance; one a channel: (C, 1, 1)
    train_labels: np.ndarray | None = None   # those of the training split, unless this is it
    pictures: np.ndarray | None = None       # what the latents are of, uint8 (M, 3, H, W); else the images

    def __post_init__(self):
        count = len(self.images)
        labels = np.asarray(self.labels)
        about = f"{self.name}: {count} {self.kind}, labels {labels.dtype} {labels.shape}"
        fits = count and labels.shape == (count,) and labels.dtype.kind in "iu" and labels.min() >= 0
        require(fits, f"{about}: one class number each, from 0 up, is wanted")
        if self.classes is None:
            self.classes = np.unique(labels if self.train_labels is None else self.train_labels)
            foreign = np.setdiff1d(labels, self.classes)
            require(len(foreign) == 0, f"{self.name}: label {foreign[:1]} of the test split is not in train")
            labels = np.searchsorted(self.classes, labels)
        K = len(self.classes)
        require(labels.max() < K, f"{self.name}: label {labels.max()} but {K} class names")
        fits = self.captions is None or len(self.captions) == count
        require(fits, f"{self.name}: captions are not {count}")
        self.labels = labels.astype(np.int64)
        self.classes = [str(name) for name in self.classes]
        ends = np.bincount(labels, minlength=K).cumsum()
        self.by_class = np.split(labels.argsort(kind="stable"), ends[:-1])
        self.mean = self.images if self.latent else None
        self.pictures = self.pictures if self.latent else self.images

    def __len__(self):
        return len(self.images)

    @property
    def kind(self):
        """What the data set holds, in one word."""
        return "latents" if self.latent else "images"

    def summary(self):
        """The same with counts: "540 images, 2 classes (a, b)"."""
        names = self.classes
        if len(names) > 12:
            names = [*names[:3], "...", names[-1]]
        noun = "class" if len(names) == 1 else "classes"
        return f"{len(self)} {self.kind}, {len(self.classes)} {noun} ({', '.join(names)})"

    def bytes(self, index, device="cpu"):
        """Images `index` (B,) as they are stored, uint8, on the device. Of latents their `pictures`.

        To a GPU they travel as bytes, a quarter of what floats weigh, while the host goes on.
        """
        images = np.ascontiguousarray(self.pictures[np.asarray(index)])
        release(self.pictures)
        return send(torch.from_numpy(images), device)

    def pixels(self, index, device="cpu"):
        """Images `index` (B,) as float32 in [-1, 1], made on the device: v / 127.5 - 1. Of latents their
        `pictures`."""
        if torch.device(device).type != "cpu":
            return self.bytes(index, device).float().div_(127.5).sub_(1)
        index = np.asarray(index)
        floats = np.empty((len(index), *self.pictures.shape[1:]), np.float32)
        for row, i in zip(floats, index):                   # image by image: each fits the cache
            np.take(FLOATS, self.pictures[i], out=row, mode="clip")
        release(self.pictures)
        return torch.from_numpy(floats)

    def latents(self, index, flip, noise, device="cpu"):
        """Latents `index` (B,) as float32: scale * (mean + exp(clamp(logvar, -30, 20) / 2) * noise).

        Those of the mirrored image where `flip` (bool, (B,)); without a mirrored copy `flip` is ignored.
        Without logvar: scale * mean, and `noise` (of the latents' shape, or a number) is ignored. Computed on
        the device.
        """
        index = np.asarray(index)
        flip = np.asarray(flip, bool)

        def chosen(plain, mirrored):
            rows = np.array(plain[index])
            if mirrored is not None:
                rows[flip] = mirrored[index[flip]]
            release(plain)
            release(mirrored)
            return send(torch.from_numpy(rows), device).float()

        z = chosen(self.mean, self.mean_flip)
        if self.logvar is not None:
            logvar = chosen(self.logvar, self.logvar_flip)
            z = z + torch.exp(logvar.clamp(-30, 20) / 2) * torch.as_tensor(noise, device=device)
        return torch.as_tensor(self.scale, device=device) * z


FLOATS = np.arange(256, dtype=np.float32) / np.float32(127.5) - 1        # of each byte, its float in [-1, 1]


def send(tensor, device):
    """A CPU tensor on the device; to a GPU from pinned memory, so that the host need not wait."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Rows:
    """Chosen rows of an array in a file, read from it when they are asked for; no copy of them is kept."""

    def __init__(self, base, rows):
        self.base = base
        self.rows = rows
        self.shape = (len(rows), *base.shape[1:])
        self.ndim = base.ndim
        self.size = int(np.prod(self.shape))
        self.dtype = base.dtype

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        first, *others = index if isinstance(index, tuple) else (index,)
        return self.base[(self.rows[first], *others)]

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype)


def release(array):
    """Give back memory: to read a number of an array in a file, the system maps up to 1 MB around it."""
    while hasattr(array, "base"):
        array = array.base
    if isinstance(array, mmap.mmap) and hasattr(array, "madvise"):
        array.madvise(mmap.MADV_DONTNEED)


def held_out(count, split, about="data", kind="images"):
    """The positions (integers, sorted) of a split in data that knows none: every tenth is test.

    DataError where the split is empty, which says how many of a `kind` there are in all.
    """
    tenth = np.arange(count) % 10 == 9
    rows = np.flatnonzero(tenth == (split == "test"))
    require(len(rows), f"{about}: split {split}: 0 {kind} of {count}; without its own, test is every tenth")
    return rows


def describe(splits):
    """What {"train": Data or Pairs, ...} hold, in one line: "540 images, 2 classes (a, b), test 60"."""
    first, *others = splits
    counts = [f", {name} {len(splits[name])}" for name in others]
    return splits[first].summary() + "".join(counts)


def require_images(dataset, split, least, why):
    """UserError where a split is too small: "test split of folder:x: 3 images; FID needs 10".

    dataset: Data or Pairs; split: what it is called; why: who needs at least `least` of it.
    """
    found = f"{split} split of {dataset.name}: {len(dataset)} {dataset.kind}"
    require(len(dataset) >= least, f"{found}; {why} needs {least}")


def open_data(spec, split="train", size=32, objects=(1, 1), mixed=False, frames=1, count=20000):
    """Open the data set that `spec` names (see the top of this file): Data, or a DataError.

    shapes: `count` images, or clips of `frames` frames, `objects` and `mixed` as in `shapes`. Files: images
    `size` pixels wide and high, 0 for any; those of a folder are scaled and cropped to it; clips give their
    first `frames` frames, stills when that is 1.
    """
    kind, _, path = spec.partition(":")
    require(split in SPLITS, f"data {spec}: no split {split}: give {', '.join(SPLITS)}")
    if spec == "shapes":
        fits = min(size, frames, count) > 0
        require(fits, f"shapes: size {size}, frames {frames}, count {count}: 1 or more")
        index = SPLITS[split] + np.arange(count)
        images = shapes(index, size, objects, mixed, frames)
        return Data(images, index % 10, SHAPES, captions(index, objects, mixed, frames), spec)
    readers = {"cifar10": open_pack, "npz": open_pack, "video": open_pack, "folder": open_folder,
               "latents": open_latents}
    require(kind in readers and (path or spec == "cifar10"),
            f"data {spec}: give shapes, cifar10, or KIND:PATH with KIND one of {', '.join(readers)}")
    path = Path(path).expanduser() if path else fetch(CIFAR_URL, CIFAR_MD5)
    data = readers[kind](path, split, size, frames)
    data.name = spec
    height, width = data.images.shape[-2:]
    fits = data.latent or (height == width and size in (0, width))
    require(fits, f"{path}: images are {width}x{height} pixels where {size or 'equal sides'} is asked for")
    return data


# --- Files and the cache -------------------------------------------------------
# The cache holds what takes long to make and is the same every time: a download, decoded pictures, arrays
# without their compression. Files appear in it whole or not at all, so that processes may share it. It may be
# deleted at any time.

@contextlib.contextmanager
def reading(path):
    """Turn whatever a missing or broken file provokes in decoders (zip, tar, JPEG ...) into one DataError.

    It names `path`, and the system's reason where there is one. A DataError from within passes as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"cannot be read: {error!r}"
        raise DataError(f"{path}: {reason}") from error


@functools.cache
def say(text):
    """Print a line, on rank 0 alone, and once a process: each split of a file would say the same."""
    if common.rank() == 0:
        tqdm.write(text.encode(errors="backslashreplace").decode())  # names of files may hold any bytes


def digest(value):
    """Twelve hexadecimal digits that stand for a value made of strings and numbers."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def cache_path(name):
    """Where a file of the cache is, or may be made: the Path in CACHE.

    Where CACHE cannot be written, as in a read-only checkout, the system's temporary folder stands in for it.
    """
    spare = Path(tempfile.gettempdir(), "papers-data")
    with contextlib.suppress(OSError):  # whether that went well is asked next
        CACHE.mkdir(parents=True, exist_ok=True)
    if (CACHE / name).exists() or os.access(CACHE, os.W_OK):
        return CACHE / name
    say(f"{CACHE}: cannot be written: downloads and decoded data go to {spare}")
    return spare / name


def cached(name, key, files, write, load):
    """load(path) of a file of the cache, which write(file) makes unless it is there already.

    Its name tells what it holds, `key`, and the state (size, time) of the `files` that it was made from: when
    they change, a new one is made and the old one goes. It appears complete or not at all; one that was cut
    short later is made anew. write may raise DataError, which then is this function's.
    """
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    stem = re.sub(r"[^\w.-]", "_", Path(name).stem, flags=re.ASCII)[:40] + f"-{digest(key)}-"
    path = cache_path(stem + digest(state) + Path(name).suffix)
    if path.exists():
        try:
            return load(path)
        except Exception as error:  # whatever the bytes provoke
            say(f"{path}: damaged ({error}): made anew")
    common.write_atomic(path, write)
    for old in path.parent.glob(f"{stem}*{path.suffix}"):
        if old != path:
            old.unlink(missing_ok=True)
    return load(path)


def fetch(url, md5):
    """Download a file into the cache, once; return its path. DataError where not all of it arrives."""
    path = cache_path(url.split("/")[-1])

    def write(file):
        got = hashlib.md5()
        with reading(url), urllib.request.urlopen(url, timeout=30) as reply:
            total = int(reply.headers.get("Content-Length") or 0)
            blocks = iter(lambda: reply.read(2**20), b"")
            for block in tqdm(blocks, path.name, total >> 20, unit="MB", disable=None):
                file.write(block)
                got.update(block)
        size = f"{url}: {file.tell()} of {total} bytes"
        right = f"md5 {got.hexdigest()} where {md5} is right"
        require(got.hexdigest() == md5, f"{size}, {right}; a copy from elsewhere is read as cifar10:PATH")

    if not path.exists():
        common.write_atomic(path, write)
    return path


# --- Packs: npz files, CIFAR-10 as published -----------------------------------
# A pack is {name: array}, whatever it was read from. Its arrays lie in a file that is memory-mapped: a batch
# costs the memory of its rows, and all processes of a machine share what the system keeps of the file.

class ArraysOnly(pickle.Unpickler):
    """Loads pickled containers of numbers, strings and arrays; refuses all else that a pickle could run."""

    def find_class(self, module, name):
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]      # it, wherever this version of numpy keeps it
        require(module == "numpy" and name in ("ndarray", "dtype"), f"unsafe pickle: {module}.{name}")
        return getattr(np, name)


def cifar_arrays(path):
    """CIFAR-10 from the published archive or its folder, as the arrays of a pack: {name: array}."""
    files = {}
    with reading(path):
        if path.is_dir():
            files = {file.name: file.read_bytes() for file in path.glob("*_batch*")}
        else:
            with tarfile.open(path) as archive:
                for member in archive:
                    if "_batch" in Path(member.name).name:
                        files[Path(member.name).name] = archive.extractfile(member).read()
        pack = {"class_names": "airplane automobile bird cat deer dog frog horse ship truck".split()}
        for part, names in (("train", [f"data_batch_{k}" for k in range(1, 6)]), ("test", ["test_batch"])):
            missing = set(names) - files.keys()
            require(not missing, f"{path}: lacks {', '.join(sorted(missing))}")
            batches = [ArraysOnly(io.BytesIO(files[name]), encoding="bytes").load() for name in names]
            images = np.concatenate([batch[b"data"] for batch in batches])
            pack[part + "_images"] = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            pack[part + "_labels"] = np.concatenate([batch[b"labels"] for batch in batches])
    return pack


def mapped(path):
    """The arrays of an npz file without compression, memory-mapped in it: {name: array}.

    An npz is a zip file of .npy files; what is not compressed stands in it as it would stand alone, so that
    the system can map it. np.load reads it all into memory instead.
    """
    found = {}
    read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename:
                continue
            # A local header of 30 bytes, of which the last four are the lengths of a name and an extra field.
            file.seek(info.header_offset + 26)
            file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
            version, _ = np.lib.format.read_magic(file)
            shape, fortran, dtype = read_header[version](file)
            require(not dtype.hasobject, f"{path}: {name} holds Python objects (allow_pickle)")
            found[name] = np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
    return found


def unpack(path, out):
    """Copy an npz file, without its compression, into the open file `out`, in pieces of 1 MiB.

    Python compares the checksum of each array at its end.
    """
    with reading(path), zipfile.ZipFile(path) as archive, zipfile.ZipFile(out, "w") as copy:
        for name in archive.namelist():
            with archive.open(name) as source, copy.open(name, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 2**20)


def open_arrays(path):
    """The arrays of an npz file, a folder of .npy files, or CIFAR-10 as published: {name: array}.

    They are memory-mapped; what is compressed is unpacked first, once, into the cache.
    """
    key = str(path.absolute())
    with reading(path):
        if path.name.endswith(".tar.gz") or (path / "test_batch").exists():
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            return cached("cifar10.npz", key, files, lambda out: np.savez(out, **cifar_arrays(path)), mapped)
        if path.is_dir():
            return {file.stem: np.load(file, mmap_mode="r") for file in path.glob("*.npy")}
        with zipfile.ZipFile(path) as archive:
            compressed = any(info.compress_type for info in archive.infolist())
        if compressed:
            return cached(path.name, key, [path], lambda out: unpack(path, out), mapped)
        return mapped(path)


def check_finite(array, path, name):
    """DataError with the index of the first NaN, infinity or giant in a mapped array: `name` in `path`.

    Found before training, it has a name; later it would be a loss that is no number, at a chance step.
    """
    for start in range(0, array.size, 2**20):
        count = min(2**20, array.size - start)
        place = array.offset + start * array.itemsize
        values = np.fromfile(array.filename, array.dtype, count, offset=place)  # the map itself stays unread
        bad = np.flatnonzero(~(abs(values.astype(float)) <= 1 / common.SMALLEST))
        if len(bad):
            order = "C" if array.flags.c_contiguous else "F"
            index = np.unravel_index(start + bad[0], array.shape, order)
            raise DataError(f"{path}: {name}{[*map(int, index)]} is {values[bad[0]]}: numbers are wanted, "
                            f"below {1 / common.SMALLEST:.0e} in size")


TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # of a test split, the best first
PICTURES = ("images", "videos", "scan")                         # one of these makes a pack
LATENTS = ("latents", "logvar", "latents_flip", "logvar_flip")  # the first alone must be there


def open_pack(path, split, size, frames):
    """Pictures or clips in arrays. The pack at `path` (see open_arrays) holds, for splits of its own,

    train_images, test_images   uint8 (M, H, W) or (M, H, W, C), C = 1 or 3
    train_videos, test_videos   uint8 (M, F, H, W, C), in their place
    train_scan, train_offset    JPEG files in their place, in a form of our own: header (of all) +
                                scan[offset[i]:offset[i + 1]]
    train_labels, test_labels   (M,), integers; without any there is one class
    train_captions ...          (M,), strings; optional
    class_names                 (K,), strings; optional

    test_ may read val_, valid_ or validation_. Names without such a beginning are training data; without a
    test split every tenth image is test.
    """
    pack = open_arrays(path)
    prefixes = ("train_", "", *(f"{name}_" for name in TEST_NAMES))
    splits = [prefix for prefix in prefixes if any(prefix + kind in pack for kind in PICTURES)]
    train, *tests = splits or [None]
    require(train in ("train_", ""), f"{path}: holds {', '.join(pack)}: no images or videos to train on")
    own = tests[0] if tests and split == "test" else train
    images = pack_images(pack, own, path, frames)
    half = train + "labels" in pack and own + "labels" not in pack
    require(not half, f"{path}: has {train}labels but no {own}labels")
    labels = pack_labels(pack, own, len(images), path)
    train_labels = pack_labels(pack, train, len(images), path)      # the count matters where there are none
    texts = pack.get(own + "captions", ())
    fits = len(labels) == len(images) and len(texts) in (0, len(images))
    require(fits, f"{path}: {own}images {images.shape}: as many labels and captions are wanted")
    if not tests:
        rows = held_out(len(images), split, path)
        train_labels = labels[held_out(len(images), "train", path)]
        images = Rows(images, rows)
        labels = labels[rows]
        texts = texts[rows] if len(texts) else texts
    texts = [str(text) for text in texts] or None
    return Data(images, labels, pack.get("class_names"), texts, str(path), train_labels=train_labels)


def pack_images(pack, own, path, frames):
    """The images (M, 3, H, W) or clips (M, F, 3, H, W) of the split whose names begin with `own`: a view."""
    if own + "scan" in pack:
        head = pack["header"].tobytes()
        scan = pack[own + "scan"].tobytes()
        ends = pack[own + "offset"]
        jpegs = [io.BytesIO(head + scan[a:b]) for a, b in zip(ends[:-1], ends[1:])]
        images = packed(f"{own}jpeg", str(path.absolute()), [path], jpegs, 0)
        pack = {own + "images": images.transpose(0, 2, 3, 1)}
    kind = "images" if own + "images" in pack else "videos"
    images = pack[own + kind]
    about = f"{path}: {own}{kind} {images.dtype} {images.shape}"
    if kind == "videos":
        require(images.ndim == 5 and images.shape[1] >= frames, f"{about}: no clips of {frames} frames")
        images = images[:, :frames] if frames > 1 else images[:, 0]
    if images.ndim == 3:
        images = images[..., None]
    wanted, ndim = ("clips", 5) if frames > 1 else ("pictures", 4)
    fits = images.dtype == np.uint8 and images.ndim == ndim and images.shape[-1] in (1, 3)
    require(fits, f"{about}: {wanted} in uint8 with 1 or 3 channels, last, are wanted")
    in_colour = np.broadcast_to(images, (*images.shape[:-1], 3))  # grey three times, without a copy
    return np.moveaxis(in_colour, -1, -3)


def pack_labels(pack, own, count, path):
    """labels (M,) of a split; zeros where the pack has none. DataError where they may have another name.

    A label under a name that nobody reads would make all images one class, without a word.
    """
    if own + "labels" in pack:
        return pack[own + "labels"]
    for name, array in pack.items():
        read = name.endswith(("images", "videos", "captions", "class_names", "header", "scan", "offset"))
        likely = array.shape[:1] == (count,) and not read       # of any type: numbers, names, one-hot rows
        require(not likely and "label" not in name, f"{path}: holds {', '.join(pack)}: no {own}labels; "
                f"name integers (M,) so; without any {name}, all would be one class")
    return np.zeros(count, int)


def open_latents(path, split, size, frames):
    """What an encoder left of images: the pack at `path` (see open_arrays) holds

    latents                     floats (M, C, h, w) or (M, C, t, h, w): the means
    logvar                      of the same shape: log-variances; optional, like all that follows
    latents_flip, logvar_flip   of the same shape: those of the mirrored images
    scale                       a number, or one a channel: makes latents of unit variance
    images                      uint8 (M, H, H, 1 or 3): the images, for networks that read them beside
    class_names                 (K,), strings

    and labels (M,), integers. Every split is the whole. NaN and infinity are a DataError.
    """
    pack = open_arrays(path)
    parts = {name: pack[name] for name in LATENTS if name in pack}
    mean = parts.get("latents", np.empty(0))
    fits = mean.ndim in (4, 5) and mean.dtype.kind == "f" and "labels" in pack
    wanted = "latents, floats (M, C, [t,] h, w), and labels (M,) are wanted"
    require(fits, f"{path}: holds {', '.join(pack)}: {wanted}")
    for name, part in parts.items():
        require(part.shape == mean.shape, f"{path}: {name} must have the shape of latents, {mean.shape}")

    scale = np.ravel(pack.get("scale", 1.0))
    fits = len(scale) in (1, mean.shape[1]) and scale.dtype.kind in "fiu"
    sane = fits and all(common.SMALLEST <= abs(number) <= 1 / common.SMALLEST for number in scale)
    bounds = f"{common.SMALLEST} to {1 / common.SMALLEST:.0e} in size"
    require(sane, f"{path}: scale {scale}: one number, or one a channel, is wanted, {bounds}")
    if len(scale) == 1:
        scale = scale.item()
    else:
        scale = torch.tensor(scale).float().view(-1, *[1] * (mean.ndim - 2))            # (C, 1, 1)

    pictures = pack_images(pack, "", path, 1) if "images" in pack else None
    fits = pictures is None or pictures[:, 0].shape == (len(mean), pictures.shape[3], pictures.shape[3])
    require(fits, f"{path}: images: a square one for each of the {len(mean)} latents is wanted")

    def check(out):
        for name, part in parts.items():
            check_finite(part, path, name)

    if mean.nbytes < 2**24:
        check(None)
    else:  # an empty file in the cache says that this state of the file is known to be good
        files = sorted({Path(part.filename) for part in parts.values()})
        cached(path.name + ".checked", str(path.absolute()), files, check, Path)
    return Data(mean, pack["labels"], pack.get("class_names"), None, str(path), True, parts.get("logvar"),
                parts.get("latents_flip"), parts.get("logvar_flip"), scale, pictures=pictures)


# --- Folders of pictures -------------------------------------------------------
# Decoding a batch of pictures takes longer than a step of a small model. So a folder is decoded once, at the
# size that is asked for, into one array of the cache, which is memory-mapped from then on.

def pillow():
    """Pillow's modules Image and ImageOps. The package is optional: DataError where it is missing."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise DataError("pictures in files need Pillow: pip install pillow") from None
    return Image, ImageOps


@functools.cache
def endings():
    """The endings (".png" ...) of the files that Pillow decodes."""
    try:
        Image, _ = pillow()
    except DataError:  # decoding will say so
        return {".jpg", ".jpeg", ".png"}
    unread = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow knows, but cannot decode
    formats = Image.registered_extensions().items()
    return {ending for ending, name in formats if name in {*Image.OPEN, "MPO"} - unread}


def find_pictures(path):
    """The pictures below a folder at any depth, as sorted tuples of names; a Counter of what is left out.

    Hidden files and folders are left out, and what Pillow does not read. Links to other folders are followed.
    The order depends on nothing but names. OSError where a folder cannot be read.
    """

    def stop(error):
        raise error

    pictures = []
    left = Counter()
    for where, folders, files in os.walk(path, onerror=stop, followlinks=True):
        here = Path(where)
        for names in (folders, files):
            visible = [name for name in names if not name.startswith(".")]
            left["hidden"] += len(names) - len(visible)
            names[:] = visible
        # A link to a folder in which it lies itself would never end.
        folders[:] = [name for name in folders if not here.resolve().is_relative_to((here / name).resolve())]
        for name in files:
            ending = Path(name).suffix.lower()
            if ending in endings():
                pictures.append((*here.relative_to(path).parts, name))
            else:
                left[f"of type {ending or 'unknown'}"] += 1
    return sorted(pictures), left


def arranged(path, pictures):
    """Which pictures train and which test: two lists of (class, picture); the second is None for no split.

    A split is a folder of class folders; a folder called train or test that holds pictures is a class.
    """
    splits = {}
    for picture in pictures:
        if len(picture) > 2:
            splits.setdefault(picture[0].lower(), []).append((picture[1], picture))
    tests = [splits[name] for name in TEST_NAMES if name in splits]
    test = tests[0] if tests else None
    if "train" in splits:
        return splits["train"], test
    labelled = [(picture[0], picture) for picture in pictures if len(picture) > 1]
    require(not test or len(test) < len(labelled), f"{path}: a test split, but no train/CLASS/... beside it")
    return labelled or [(path.resolve().name, picture) for picture in pictures], None


def open_folder(path, split, size, frames):
    """Pictures in folders:

    PATH/CLASS/...          every tenth picture is test
    PATH/train/CLASS/...    beside PATH/test/CLASS/... (or val, valid, validation), or else as above
    PATH/NAME.png ...       without class folders: one class

    Every file type that Pillow reads, at any depth below the class. What is left out is said, with a count.
    """
    with reading(path):
        pictures, left = find_pictures(path)
    fits = pictures and frames == 1
    require(fits, f"{path}: stills in CLASS/*.jpg, *.png ... are wanted; clips come in npz")
    train, test = arranged(path, pictures)
    left["in other folders"] = len(pictures) - len(train) - len(test or ())
    text = ", ".join(f"{count} {what}" for what, count in left.items() if count)
    if text:
        say(f"{path}: left out: {text}")

    chosen = test if split == "test" else train
    if test is None:
        chosen = [train[i] for i in held_out(len(train), split, path)]
        train = [train[i] for i in held_out(len(train), "train", path)]
    classes = sorted({name for name, _ in train})
    numbers = {name: k for k, name in enumerate(classes)}
    for name, _ in chosen:
        require(name in numbers, f"{path}: class {name} is in the test split, but none of train's")
    labels = np.array([numbers[name] for name, _ in chosen])
    files = [path.joinpath(*picture) for _, picture in chosen]
    key = (str(path.absolute()), size, split == "test")
    return Data(packed(path.resolve().name, key, files, files, size), labels, classes, None, str(path))


def packed(name, key, files, sources, size):
    """The pictures in `sources` as one memory-mapped array (M, 3, H, W), decoded once into the cache.

    The `files` are those they come from. The way to RGB is part of the key: when it changes, all are
    decoded anew.
    """

    def write(out):
        shape = None
        images = tqdm(decoded(sources, size), f"packing {name}", len(sources), disable=None)
        for source, image in zip(sources, images):
            if shape is None:  # the head of a .npy file; behind it the images, one by one
                shape = image.shape
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(sources), *shape)}
                np.lib.format.write_array_header_1_0(out, header)
            require(image.shape == shape, f"{source}: mixed image sizes {shape}, {image.shape}: scale them")
            out.write(image.tobytes())

    recipe = inspect.getsource(rgb) + inspect.getsource(eight_bits)
    return cached(f"{name}.npy", (key, recipe), files, write, functools.partial(np.load, mmap_mode="r"))


def decoded(sources, size):
    """Yield pictures as uint8 RGB (3, H, W); unless size is 0, scaled and the centre cut out.

    A source is a path or an open file. Of an animation or several pages the first counts.
    """
    Image, ImageOps = pillow()

    def picture(source):
        with reading(source), Image.open(source) as image:
            image = rgb(image, source)
            if size:
                image = ImageOps.fit(image, (size, size))
            return np.asarray(image).transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(sources), 256):
            yield from pool.map(picture, sources[start:start + 256])


def rgb(image, about):
    """An open picture of any of Pillow's modes as 8-bit RGB, upright.

    What is transparent lies on white: the colour under full transparency, which may be any, does not show.
    More than 8 bits are scaled (eight_bits); Pillow itself would cut them off at 255. `about` is for errors.
    """
    Image, ImageOps = pillow()
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    clear = image.info.get("transparency")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        grey = eight_bits(values, sixteen, about)
        if isinstance(clear, int):
            grey[values == clear] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if clear is not None or image.mode in ("LA", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def eight_bits(values, sixteen, about):
    """Numbers (H, W) of more than 8 bits as uint8. DataError where they are not finite or exceed 16 bits.

    Full scale is 65535 for `sixteen` bits. Other files do not say theirs: it is the first of 1 (for floats
    alone), 255 and 65535 that no number exceeds.
    """
    # the first of those that are not finite, if there is one
    for row, column in np.argwhere(~np.isfinite(values))[:1]:
        raise DataError(f"{about}: pixel [{row}, {column}] is {values[row, column]}: numbers are wanted")
    low = values.min()
    high = values.max()
    require(low >= 0 and high <= 65535, f"{about}: values {low} to {high}: 8 or 16 bits from 0 up are read")
    top = 65535
    if high <= 255 and not sixteen:
        top = 255
    if high <= 1 and values.dtype.kind == "f":
        top = 1
    return np.rint(values * (255 / top)).astype(np.uint8)


# --- Text: WordPiece, GLUE and SQuAD --------------------------------------------
# A text becomes words (spaced), words become pieces of the vocabulary (pieces), and pieces its ids (encode).
# Each piece keeps its place, the characters of the text that it stands for: an answer is cut from the text.

HAN = ("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf"
       "\U0002f800-\U0002fa1f]")
UNBROKEN = re.compile(r"[\S\x0b\x0c\x1c-\x1f\x85]+")         # no white space; controls are none: they vanish


@functools.cache
def spaced(char, cased):
    """BERT's view of a character: Chinese, punctuation stand alone; controls vanish, accents unless cased."""
    kind = unicodedata.category(char)
    gone = kind in ("Cc", "Cf") or (kind == "Mn" and not cased)
    if char == "\ufffd" or (gone and char not in "\t\n\r"):
        return ""
    symbol = "!" <= char <= "~" and not char.isalnum()
    if symbol or kind.startswith("P") or re.match(HAN, char):
        return f" {char} "
    return char


class WordPiece:
    """BERT's tokenizer (Devlin et al. 2019). `ids`: a token's id, its line in vocab.txt.

    `path` is vocab.txt, or tokenizer.json as newer files have it. do_lower_case in tokenizer_config.json
    beside that file says whether case and accents count; without it tokenizer.json, or else `cased`.
    """

    def __init__(self, path, cased=False):
        path = Path(path)
        config = path.with_name("tokenizer_config.json")
        lower = not cased
        with reading(path):
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                stored = json.loads(text)
                model = stored["model"]
                fits = model["type"] == "WordPiece"
                require(fits, f"{path}: a {model['type']} vocabulary where WordPiece is wanted")
                self.ids = model["vocab"]
                lower = (stored.get("normalizer") or {}).get("lowercase", lower)
            else:
                self.ids = {token: i for i, token in enumerate(text.split("\n")) if token}
        if config.exists():
            with reading(config):
                lower = json.loads(config.read_text(encoding="utf-8")).get("do_lower_case", lower)
        self.cased = not lower
        missing = {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} - self.ids.keys()
        require(not missing, f"{path}: no WordPiece vocabulary: lacks {', '.join(sorted(missing))}")
        self.stretch = functools.cache(self.stretch)

    def pieces(self, word):
        """The longest piece that the vocabulary holds, again and again: (id, first, end), places in the word.

        The whole word is [UNK] when any part fails.
        """
        unknown = [(self.ids["[UNK]"], 0, len(word))]
        if len(word) > 100:
            return unknown
        found = []
        start = 0
        while start < len(word):
            mark = "##" if start else ""
            end = len(word)
            while end > start and mark + word[start:end] not in self.ids:
                end -= 1
            if end == start:
                return unknown
            found.append((self.ids[mark + word[start:end]], start, end))
            start = end
        return found

    def stretch(self, text):
        """Pieces of a text without white space: (id, first, end) each, places in the text."""
        lower = text if self.cased else text.lower()
        if len(lower) != len(text):                         # one of the few capitals of two small letters
            lower = [char.lower() for char in text]
        line = ""
        places = []                                         # of the characters of the line
        for place, char in enumerate(lower):
            for part in char if self.cased else unicodedata.normalize("NFD", char):
                shown = spaced(part, self.cased)
                line += shown
                places += [place] * len(shown)
        found = []
        for word in re.finditer(r"\S+", line):
            own = places[word.start():word.end()]
            found += [(i, own[first], own[end - 1] + 1) for i, first, end in self.pieces(word[0])]
        return found

    def body(self, text):
        """The ids of a text, without [CLS] and [SEP], and the places [(first, end), ...] they stand for."""
        ids = []
        places = []
        for found in UNBROKEN.finditer(text):
            for i, first, end in self.stretch(found[0]):
                ids.append(i)
                places.append((found.start() + first, found.start() + end))
        return ids, places

    def encode(self, text, pair=None, length=None):
        """[CLS] text [SEP], or [CLS] text [SEP] pair [SEP]: lists ids, types (pair 1), mask (padding 0).

        `length` shortens (the longer text first, at its end) and pads to that many tokens.
        """
        bodies = [self.body(text)[0]]
        if pair is not None:
            bodies.append(self.body(pair)[0])
        if length:
            room = max(0, length - 1 - len(bodies))         # beside [CLS] and one [SEP] each
            while sum(map(len, bodies)) > room:
                max(reversed(bodies), key=len).pop()
        return self.joined(bodies, length)

    def joined(self, bodies, length=None):
        """[CLS], then each of the lists of ids and a [SEP]: lists ids, types, mask, padded to `length`."""
        ids = [self.ids["[CLS]"]]
        types = [0]
        for kind, body in enumerate(bodies):
            ids += [*body, self.ids["[SEP]"]]
            types += [kind] * (len(body) + 1)
        mask = [1] * len(ids)
        padding = (length or 0) - len(ids)
        return ids + [self.ids["[PAD]"]] * padding, types + [0] * padding, mask + [0] * padding


@dataclass
class Texts:
    """Tokenised texts, pairs of them, or questions beside a part of a passage each."""

    tokens: np.ndarray                   # int32 (M, 3, T): ids, types (1: second text), mask (0: padding)
    labels: np.ndarray                   # classes int64 (M,), scores float32 (M,), or ends int64 (M, 2)
    classes: list                        # names of the classes; none for scores and ends
    name: str = ""                       # as --data has it
    questions: list | None = None        # of SQuAD
    windows: np.ndarray | None = None    # int64 (M, 2): question, shift: token t is t + shift of its passage
    kind = "texts"

    def __len__(self):
        return len(self.tokens)

    def summary(self):
        """What it holds, in words: "12 texts, 2 classes (different, equivalent)"."""
        return Data.summary(self) if self.classes else f"{len(self)} texts"


def open_texts(spec, split, pieces, length):
    """Open glue:TASK:PATH or squad:PATH as Texts of `length` tokens, by a WordPiece; or a DataError."""
    kind, _, path = spec.partition(":")
    if kind == "squad":
        questions = squad(path, split)
        tokens, ends, windows = squad_windows(questions, pieces, length)
        return Texts(tokens, ends, [], spec, questions, windows)
    task, _, path = path.partition(":")
    texts, labels, classes = glue(task, path, split)
    tokens = np.zeros((len(texts), 3, length), np.int32)
    for row, text in zip(tokens, texts):
        row[:] = pieces.encode(*([text] if isinstance(text, str) else text), length=length)
    return Texts(tokens, labels, classes, spec)


def table(path, columns, skip=False):
    """The rows of a tab-separated file without quoting; row i is line i+1. DataError names a broken line.

    With `skip` a row that is cut short or has an empty cell becomes an empty list; how many is said.
    """
    with reading(path), open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        rows = [line.rstrip("\r\n").split("\t") for line in file]
    require(rows, f"{path}: is empty")
    short = 0
    for number, row in enumerate(rows, 1):
        if skip and (len(row) < columns or "" in row):
            short += 1
            row.clear()
            continue
        fits = len(row) == columns and "\ufffd" not in "".join(row)
        require(fits, f"{path}: line {number}: {len(row)} columns where {columns} are wanted, in UTF-8")
    if short:
        say(f"{path}: left out: {short} rows that lack a column or a text")
    return rows


# Of each task: the columns of the training file and of the other; those of the texts, that of the label; the
# label's values and their names, in the order of the class numbers; none: it is a score. All but CoLA have a
# header.
ENTAILED = ("entailment", "not_entailment")
INFERENCE = ("entailment", "neutral", "contradiction")
GLUE = {
    "SST-2": ((2, 2), (0,), 1, ("0", "1"), ["negative", "positive"]),
    "CoLA": ((4, 4), (3,), 1, ("0", "1"), ["unacceptable", "acceptable"]),
    "MRPC": ((5, 5), (3, 4), 0, ("0", "1"), ["different", "equivalent"]),
    "QQP": ((6, 6), (3, 4), 5, ("0", "1"), ["different", "duplicate"]),
    "STS-B": ((10, 10), (7, 8), 9, (), []),
    "MNLI": ((12, 16), (8, 9), -1, INFERENCE, [*INFERENCE]),
    "MNLI-mm": ((12, 16), (8, 9), -1, INFERENCE, [*INFERENCE]),
    "QNLI": ((4, 4), (1, 2), 3, ENTAILED, [*ENTAILED]),
    "RTE": ((4, 4), (1, 2), 3, ENTAILED, [*ENTAILED]),
    "WNLI": ((4, 4), (1, 2), 3, ("0", "1"), ["not_entailment", "entailment"]),
}
FILES = {"MNLI": "MNLI/dev_matched.tsv", "MNLI-mm": "MNLI/dev_mismatched.tsv"}  # else TASK/dev.tsv


def parse_label(text, values):
    """The number of a class, or without `values` a score from 0 to 5; None: the text is no label."""
    if values:
        return values.index(text) if text in values else None
    fits = re.fullmatch(r"[0-5](\.[0-9]+)?", text) and float(text) <= 5
    return float(text) if fits else None


def glue(task, path, split="train"):
    """Texts (pairs of them where a task has two), labels (M,) and the names of the classes.

    Labels are int64; of STS-B they are scores, float32, and there are no names. `path` holds TASK/train.tsv
    and TASK/dev.tsv as GLUE ships them (Wang et al. 2019); dev is the test split here, of MNLI the matched
    one, of MNLI-mm the other. QQP has rows that are cut short or lack a text: they are left out, with a
    count. DataError names a broken line.
    """
    require(task in GLUE, f"glue:{task}: give one of {', '.join(GLUE)}")
    columns, text_columns, label_column, values, names = GLUE[task]
    if split == "train":
        file = Path(path) / task.removesuffix("-mm") / "train.tsv"
    else:
        file = Path(path) / FILES.get(task, f"{task}/dev.tsv")
    rows = table(file, columns[split != "train"], skip=task == "QQP")
    first = 0 if task == "CoLA" else 1
    texts = []
    labels = []
    for number, row in enumerate(rows[first:], first + 1):
        if not row:
            continue
        parts = tuple(row[k] for k in text_columns)
        label = parse_label(row[label_column], values)
        fits = label is not None and all(part.strip() for part in parts)
        known = values or "0 to 5"
        require(fits, f"{file}: line {number}: no text, or label {row[label_column]!r} not in {known}")
        texts.append(parts if len(parts) > 1 else parts[0])
        labels.append(label)
    return texts, np.array(labels, np.int64 if values else np.float32), names


@dataclass
class Question:
    """A question of SQuAD 2.0; one without answers cannot be answered from its passage."""

    id: str
    text: str
    passage: str
    answers: list                     # (text, its first character in the passage)
    places: np.ndarray | None = None  # int (n, 2): characters [first, end) of each token of the passage


def squad(path, split="train"):
    """The Questions of SQuAD 2.0 (Rajpurkar et al. 2018): train-v2.0.json or dev-v2.0.json in `path`.

    Training questions whose answer does not stand where the file says are left out, with a count.
    """
    file = Path(path, f"{'train' if split == 'train' else 'dev'}-v2.0.json")
    questions = []
    lost = 0
    with reading(file):
        for article in json.loads(file.read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                passage = paragraph["context"]
                for asked in paragraph["qas"]:
                    answers = [(answer["text"], answer["answer_start"]) for answer in asked["answers"]]
                    if split == "train" and not all(passage.startswith(*answer) for answer in answers):
                        lost += 1
                        continue
                    questions.append(Question(asked["id"], asked["question"], passage, answers))
    require(questions, f"{file}: holds no questions")
    if lost:
        say(f"{file}: left out: {lost} questions whose answer stands elsewhere in the passage")
    return questions


def squad_windows(questions, pieces, length, stride=128, longest=64):
    """Every question beside each part of its passage: tokens, labels and windows of Texts; gives places.

    [CLS] question [SEP] part [SEP]. A part is as long as fits and begins `stride` tokens behind the one
    before; a question is cut behind its first `longest` tokens (both as BERT's own code). Labels: the first
    and last token of the first answer; where the part does not hold all of it, 0 and 0, which is [CLS].
    """
    body = functools.lru_cache(maxsize=1)(pieces.body)      # questions on one passage follow one another
    tokens = []
    labels = []
    windows = []
    for number, question in enumerate(questions):
        asked = pieces.body(question.text)[0][:longest]
        ids, question.places = body(question.passage)
        before = len(asked) + 2                             # tokens in front of the part
        room = length - before - 1
        require(room > 0, f"length {length}: no room for a passage beside {len(asked)} tokens of a question")
        step = min(stride, room)
        answer = answer_tokens(question)
        for start in range(0, max(1, len(ids) - room + step), step):
            row = pieces.joined([asked, ids[start:start + room]], length)
            whole = answer and start <= answer[0] and answer[1] < start + room
            tokens.append(np.array(row, np.int32))
            labels.append([token - start + before for token in answer] if whole else [0, 0])
            windows.append([number, start - before])
    return np.array(tokens), np.array(labels), np.array(windows)


def answer_tokens(question):
    """[first, last] token of the first answer among those of the passage; [] where there is none."""
    for text, first in question.answers[:1]:
        touched = [i for i, (a, b) in enumerate(question.places) if a < first + len(text) and b > first]
        return touched[:1] + touched[-1:]
    return []


# --- Text: translation ---------------------------------------------------------

# A row a language: how many training pairs it has with each larger language; the digits; the tens, hundred,
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

MOST = 10_000  # numbers from 0 to 9,999 have words


def number_words(language, n):
    """n (0..9999) in words: number_words("vi", 1015) = "một nghìn không trăm mười lăm". DataError beyond."""
    require(0 <= n < MOST, f"{n}: words are known for 0 to {MOST - 1}")
    _, digits, tens, hundred, thousand, rules = NUMERALS[language]
    digits = digits.split()
    parts = []
    for power, pattern in ((1000, thousand), (100, hundred), (10, tens)):
        digit = n // power % 10
        if n < power or n % (10 * power) == 0:
            continue
        if digit == 0:
            parts.append("0")
        elif "*" in pattern:
            parts.append(pattern.replace("*", digits[digit]))
        else:
            parts.append(pattern.split()[digit - 1])
    if n % 10 or n == 0:
        parts.append(digits[n % 10])
    text = "+".join(parts)
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
    name: str = ""          # as --data has it
    kind = "pairs"

    def __len__(self):
        return len(self.source)

    def summary(self):
        """What it holds, in words: "7200 pairs, 90 directions"."""
        return f"{len(self)} pairs, {len(self.directions)} directions"


def parse_limit(text):
    """How many numbers `numbers:TEXT` means, all for no text: an int from 2 to 10,000, or a DataError.

    ASCII digits alone: other scripts' digits and signs are refused.
    """
    text = str(text) or str(MOST)
    fits = re.fullmatch(r"[0-9]{1,5}", text) and 2 <= int(text) <= MOST
    require(fits, f"numbers:{text}: give 2 to {MOST}: words are known for 0 to {MOST - 1}")
    return int(text)


def number_rows(split, languages, limit, tests):
    """Rows (from, to, source, target) of a split, as str, and all texts that may occur in any.

    Which numbers are test depends on the number alone, so that none of them is in training in any direction.
    """
    words = {language: [number_words(language, n) for n in range(limit)] for language in languages}
    for_tests = uniform(np.arange(limit), 0) < 0.1
    numbers = np.flatnonzero(for_tests == (split == "test"))
    rows = []
    for k, (a, b) in enumerate(itertools.permutations(languages, 2), 1):
        count = tests if split == "test" else min(NUMERALS[a][0], NUMERALS[b][0])
        chosen = numbers[np.argsort(uniform(numbers, k))[:count]]
        rows += [(a, b, words[a][n], words[b][n]) for n in chosen]
    return rows, [text for texts in words.values() for text in texts]


def translation_pairs(split="train", path=None, languages=tuple(NUMERALS), limit=MOST, tests=100):
    """Pairs for one model that translates between all languages: number words, or the sentences of a file.

    Numbers lie below `limit`. A tenth of them is for tests alone, the same in all directions; each direction
    tests on `tests` of these. It trains on others: as many as the smaller of its two languages has pairs.
    A file has rows from, to, source, target, tabs between. Every tenth is test; words that its training rows
    lack are <unknown>. A token is a word: a number has ten at most, where spelling would take 60 steps of
    decoding and a long training. DataError where a split is empty, a line broken or the limit too large.
    """
    name = f"numbers:{limit}"
    if path is None:
        rows, known = number_rows(split, languages, parse_limit(limit), tests)
        require(rows, f"{name}: too few rows: none in split {split}")
    else:
        name = f"tsv:{path}"
        table_rows = table(path, 4)
        languages = sorted({language for row in table_rows for language in row[:2]})
        known = [text for i in held_out(len(table_rows), "train", path, "rows") for text in table_rows[i][2:]]
        rows = [table_rows[i] for i in held_out(len(table_rows), split, path, "rows")]
    tags = [f"<2{language}>" for language in languages]
    vocabulary = Vocabulary(dict.fromkeys([*tags, *split_words(" ".join(known))]))
    encode = functools.cache(vocabulary.encode)
    source = [[vocabulary.ids[f"<2{row[1]}>"], *encode(row[2]), END] for row in rows]
    target = [[START, *encode(row[3]), END] for row in rows]
    ways = [(row[0], row[1]) for row in rows]
    directions = sorted(set(ways))
    direction = np.array([directions.index(way) for way in ways])
    return Pairs(padded(source), padded(target), direction, directions, vocabulary, name)


def padded(rows):
    """Lists of ids as one array int64 (M, the longest), 0 behind each."""
    return np.array([*itertools.zip_longest(*rows, fillvalue=PAD)]).T
