"""Find what is asked for in images and videos, and draw it."""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from fiber_d2.commands.model_options import (
    WEIGHTS,
    add_device_options,
    add_model_options,
    weights_of,
)
from fiber_d2.data.images import read_pixels
from fiber_d2.drawing import PANEL_SIDE
from fiber_d2.engine.errors import (
    FAILURE_EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    exit_status_of,
    message_of,
)
from fiber_d2.files import save_json
from fiber_d2.predictions import Prediction, coco_dataset
from fiber_d2.predictor import Caption, Classes, Expression, Predictor
from fiber_d2.queries import Query
from fiber_d2.visualization import draw_found, draw_heatmaps, save_png

IMAGES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"))
VIDEOS = frozenset((".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"))
# Words whose heat maps are drawn, of one image.
HEATMAPS = 9
MIN_PICTURE = 64
_WEBCAM = re.compile(r"webcam(?::(\d+))?")

EPILOG = f"""examples:
  fiber-d2 predict photo.jpg --classes cat dog "traffic light" --config C --weights W.pth
  fiber-d2 predict photos/ 'more/*.png' --classes-file names.txt --coco --config C --weights W.pth
  fiber-d2 predict photo.jpg --caption "a man with a dog on a leash" --config C --weights W.pth
  fiber-d2 predict photo.jpg --expression "the man left of the tree" --config C --weights W.pth
  fiber-d2 predict photo.jpg --caption "a man with a dog" --heatmaps --config C --weights W.pth
  fiber-d2 predict ride.mp4 --classes car --every 5 --config C --weights W.pth
  fiber-d2 predict webcam --caption "a cup on a table" --frames 100 --config C --weights W.pth
  fiber-d2 predict photo.jpg --classes cat --json --no-pictures > found.json
Without --config and --weights the model of the quickstart answers ({WEIGHTS}).
Exit status: 0 fine, 1 where some of the images could not be read, 2 for a mistake in the command,
130 after Ctrl-C, which keeps what was found until then.
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="image, folder, pattern, video file, or "
        "webcam (webcam:1 is the second)")  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--classes", nargs="+", metavar="NAME", help="names to look for")
    what.add_argument("--classes-file", metavar="F", help="the same, one name a line")
    what.add_argument("--caption", metavar="TEXT", help="a sentence, whose noun phrases are sought")
    what.add_argument("--expression", metavar="TEXT", help="what describes one object")
    add("--template", metavar="TEXT", help="words around class names, such as 'a {} on a road'")
    add_model_options(parser)
    add("--output", default="output/predict", metavar="DIR", help="default: %(default)s")
    add("--threshold", type=float, default=0.4, help="lowest score (default: %(default)s); an "
        "expression's best box is shown whatever its score")  # fmt: skip
    add("--max-detections", type=int, metavar="N", help="of an image at most")
    add("--best", action="store_true", help="only the best box of each class or phrase")
    add("--batch-size", type=int, default=4, metavar="N", help="default: %(default)s")
    add_device_options(parser)
    add("--every", type=int, default=1, metavar="N", help="of a video, every Nth frame")
    add("--frames", type=int, metavar="N", help="of a video, so many of them at most (default: "
        "all; of a webcam until Ctrl-C)")  # fmt: skip
    add("--coco", action="store_true", help="write coco.json as well")
    add("--json", action="store_true", help="print predictions.json instead of a summary")
    add("--no-pictures", action="store_true", help="write numbers only")
    add("--heatmaps", action="store_true", help="of images, draw as well where each word is seen "
        f"(of many classes those found, {HEATMAPS} at most)")  # fmt: skip
    add("--picture-size", type=int, default=2 * PANEL_SIDE, metavar="PIXELS", help="longer side "
        "of the image in pictures (default: %(default)s); 0 for its own")  # fmt: skip
    return parser


def question_of(args: argparse.Namespace) -> Query:
    """
    Raises:
        FileNotFoundError, ValueError: no such file of classes, or nothing to look for.
    """
    if args.template and not (args.classes or args.classes_file):
        raise ValueError("--template goes with --classes or --classes-file.")
    if args.caption is not None:
        return Caption(args.caption)
    if args.expression is not None:
        return Expression(args.expression)
    names = args.classes
    if args.classes_file:
        if not os.path.isfile(args.classes_file):
            raise FileNotFoundError(f"--classes-file {args.classes_file} does not exist.")
        lines = Path(args.classes_file).read_text(encoding="utf-8").splitlines()
        names = [line.strip() for line in lines if line.strip()]
        if not names:
            raise ValueError(f"--classes-file {args.classes_file} holds no name.")
    return Classes(names, templates=args.template)


def find_inputs(inputs: Sequence[str]) -> list[str]:
    """The files that inputs stand for, each once, in order.

    Raises:
        FileNotFoundError: an input that stands for none.
    """
    found: list[str] = []
    for given in inputs:
        if _WEBCAM.fullmatch(given) and not os.path.exists(given):
            paths = [given]
        elif os.path.isdir(given):
            paths = sorted(str(p) for p in Path(given).rglob("*") if _kind(p) and p.is_file())
        elif os.path.isfile(given):
            paths = [given]
        else:
            paths = sorted(p for p in glob.glob(given, recursive=True) if os.path.isfile(p))
        if not paths:
            raise FileNotFoundError(f"{given} is no image or video, nor are there any in it.")
        found += paths
    return list(dict.fromkeys(found))


def _kind(path: str | os.PathLike[str]) -> str | None:
    if _WEBCAM.fullmatch(os.fspath(path)):
        return "video"
    extension = os.path.splitext(path)[1].lower()
    return "video" if extension in VIDEOS else "image" if extension in IMAGES else None


class Answers:
    """Asks the predictor, draws, and keeps what was found.

    Args:
        predictor: asked.
        question: what.
        args: the command's.
    """

    def __init__(self, predictor: Predictor, question: Query, args: argparse.Namespace) -> None:
        self.predictor, self.question, self.args = predictor, question, args
        self.output = Path(args.output)
        self.found: dict[str, Prediction] = {}
        self.failed = 0
        self._is_expression = isinstance(question, Expression)
        self._caption = getattr(question, "text", "") or ", ".join(question.words)
        self._names: set[str] = set()

    def ask(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """Images are BGR."""
        found = self.predictor(
            list(images),
            self.question,
            threshold=0.0 if self._is_expression else self.args.threshold,
            max_detections=self.args.max_detections,
        )
        return [one.best() for one in found] if self.args.best or self._is_expression else found

    def picture(self, image: np.ndarray, found: Prediction) -> np.ndarray:
        instances = found.instances
        return draw_found(
            np.ascontiguousarray(image[:, :, ::-1]),
            instances.pred_boxes.tensor.numpy(),
            found.words,
            instances.scores.tolist(),
            order=found.targets,
            caption=self._caption,
            panel_side=self.args.picture_size or None,
        )

    def heatmaps(self, image: np.ndarray, found: Prediction) -> np.ndarray:
        """Where words are seen: all, or of many those that were found, the best first."""
        words = None
        if len(found.targets) > HEATMAPS:
            words = list(dict.fromkeys([*found.words, *found.targets]))[:HEATMAPS]
        return draw_heatmaps(
            np.ascontiguousarray(image[:, :, ::-1]),
            self.predictor.token_heatmaps(image, self.question, words),
            caption=self._caption,
        )

    def do_images(self, paths: Sequence[str]) -> None:
        batch = []
        for path in tqdm(paths, unit="image", disable=None):
            try:
                batch.append((path, read_pixels(path, "BGR")))
            except (FileNotFoundError, ValueError) as error:
                self._fail(error)
            if len(batch) == self.args.batch_size:
                self._finish(batch)
                batch = []
        self._finish(batch)

    def _finish(self, batch: Sequence[tuple[str, np.ndarray]]) -> None:
        for (path, image), found in zip(batch, self.ask([image for _, image in batch])):
            self.found[path] = found
            if not self.args.no_pictures:
                save_png(self.output / "pictures" / self._name(path, ".png"),
                         self.picture(image, found))  # fmt: skip
            if self.args.heatmaps:
                save_png(self.output / "pictures" / self._name(path, "_heatmap.png"),
                         self.heatmaps(image, found))  # fmt: skip

    def do_video(self, path: str) -> None:
        with closing(_Video(path, self.args.every, self.args.frames)) as video:
            if not video.opened:
                self._fail(ValueError(f"The video {path} cannot be opened by OpenCV."))
                return
            writer = None
            try:
                for number, frame in tqdm(video, total=video.total, unit="frame", disable=None):
                    (found,) = self.ask([frame])
                    self.found[f"{path}#{number}"] = found
                    if self.args.no_pictures:
                        continue
                    picture = self.picture(frame, found)[:, :, ::-1]
                    if writer is None:
                        writer = self._writer(path, video.rate, picture)
                    writer.write(np.ascontiguousarray(picture))
            finally:
                if writer is not None:
                    writer.release()

    def _writer(self, path: str, rate: float, picture: np.ndarray) -> Any:
        target = self.output / "pictures" / self._name(path, ".mp4")
        target.parent.mkdir(parents=True, exist_ok=True)
        size = picture.shape[1::-1]
        writer = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
        if not writer.isOpened():
            raise ValueError(f"OpenCV cannot write {target}: give --no-pictures.")
        return writer

    def _name(self, path: str, extension: str) -> str:
        """A file name for a picture; files of one name in several folders get different ones."""
        stem = re.sub(r"[^\w.-]+", "_", Path(path).stem)
        name, number = stem, 1
        while name + extension in self._names:
            number += 1
            name = f"{stem}_{number}"
        self._names.add(name + extension)
        return name + extension

    def _fail(self, error: Exception) -> None:
        self.failed += 1
        sys.stderr.write(f"left out: {message_of(error)}\n")


class _Video:
    """Every Nth frame of a file or webcam, BGR, with its number; at most so many."""

    def __init__(self, path: str, every: int, most: int | None) -> None:
        webcam = _WEBCAM.fullmatch(path)
        self._capture = cv2.VideoCapture(int(webcam[1] or 0) if webcam else path)
        self._every, self._most = every, most
        self.opened = self._capture.isOpened()
        self.rate = (self._capture.get(cv2.CAP_PROP_FPS) or 25.0) / every
        frames = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.total = -(-frames // every) if frames > 0 else most
        if self.total is not None and most is not None:
            self.total = min(self.total, most)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        number = 0
        while (self._most is None or number < self._most * self._every) and self._capture.grab():
            if number % self._every == 0:
                there, frame = self._capture.retrieve()
                if there:
                    yield number, frame
            number += 1

    def close(self) -> None:
        self._capture.release()


def run(args: argparse.Namespace) -> int:
    for option in ("batch_size", "every", "frames"):
        number = getattr(args, option)
        if number is not None and number < 1:
            raise ValueError(f"--{option.replace('_', '-')} is {number}, but is at least 1.")
    if args.picture_size and args.picture_size < MIN_PICTURE:
        raise ValueError(
            f"--picture-size is {args.picture_size}, but is 0 or at least {MIN_PICTURE}."
        )
    if args.heatmaps and args.no_pictures:
        raise ValueError("--heatmaps are pictures: leave --no-pictures out.")
    question = question_of(args)
    paths = find_inputs(args.inputs)
    predictor = Predictor(
        args.config,
        weights_of(args),
        device=args.device,
        precision=args.precision,
        batch_size=args.batch_size,
        overrides=args.opts,
    )
    answers = Answers(predictor, question, args)
    status = 0
    try:
        answers.do_images([path for path in paths if _kind(path) != "video"])
        for path in paths:
            if _kind(path) == "video":
                answers.do_video(path)
    except KeyboardInterrupt:
        status = INTERRUPTED_EXIT_CODE
        sys.stderr.write("interrupted: what was found so far is kept\n")
    output, found = answers.output, answers.found
    everything = {name: one.to_dict() for name, one in found.items()}
    save_json(everything, output / "predictions.json")
    if args.coco:
        save_json(coco_dataset(found, question.words), output / "coco.json")
    if args.json:
        sys.stdout.write(json.dumps(everything) + "\n")
    else:
        sys.stdout.write(f"{summary_of(found, args.threshold)}: {output}\n")
    return status or (FAILURE_EXIT_CODE if answers.failed else 0)


def summary_of(found: Mapping[str, Prediction], threshold: float) -> str:
    """How many boxes were found, and where there are none what may be the reason."""
    boxes = sum(len(one.instances) for one in found.values())
    text = f"{boxes} box{'' if boxes == 1 else 'es'} in {len(found)} image"
    text += "" if len(found) == 1 else "s"
    if found and not boxes:
        text += f" (no score reaches {threshold:g}; --threshold lowers that)"
    return text


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The program; its exit status."""
    args = build_parser(prog).parse_args(argv)
    return exit_status_of(lambda: run(args), f"{prog or 'predict'}: ")
