#!/usr/bin/env python3
"""Put a working Detectron2 into the Python environment that runs this script.

Detectron2 itself is on no package index, and building the official one takes a C++ compiler and
minutes. This project uses none of its compiled operators, so by default this script makes a
pure-Python wheel of Detectron2 0.6 out of a pinned source distribution: it downloads the file,
checks its sha256, applies the source edits listed in ``EDITS`` (each has to match exactly once),
builds ``detectron2-0.6+pure`` and installs it. It takes about a quarter of a minute.

A Detectron2 that can already be imported is left alone. torch has to be installed first.

    python tools/install_detectron2.py                      # the default described above
    python tools/install_detectron2.py --sdist FILE         # the same from a file at hand
    python tools/install_detectron2.py --official PATH_OR_URL   # compile the official one instead
    python tools/install_detectron2.py --force              # replace what is installed

Only the standard library is needed, and nothing else of this repository.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

SDIST = "pb1-detectron2==0.6"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
MAX_UNPACKED_BYTES = 100 * 2**20


class Edit(NamedTuple):
    """Replace ``old`` by ``new`` in ``file``; ``old`` must be there exactly once."""

    file: str
    old: str
    new: str


# Per file: (old text, new text).
EDITS_BY_FILE: dict[str, list[tuple[str, str]]] = {
    # No compiled extension, no stray top-level packages, requirements that exist today.
    "setup.py": [
        (
            "import torch\n"
            "from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension\n\n"
            'torch_ver = [int(x) for x in torch.__version__.split(".")[:2]]\n'
            'assert torch_ver >= [1, 8], "Requires PyTorch >= 1.8"\n',
            "",
        ),
        ('name="pb1-detectron2"', 'name="detectron2"'),
        ("version=get_version()", 'version="0.6+pure"'),
        ('exclude=("configs", "tests*"))', 'include=("detectron2", "detectron2.*"))'),
        ("get_model_zoo_configs()}", '["configs/**/*.yaml", "configs/**/*.py"]}'),
        ('"iopath>=0.1.7,<0.1.10"', '"iopath>=0.1.7"'),
        ('"black==21.4b2"', '"black"'),
        ('        "future",  # used by caffe2\n', ""),
        ('        "pydot",  # used to save caffe2 SVGs\n', ""),
        (
            "    ext_modules=get_extensions(),\n"
            '    cmdclass={"build_ext": torch.utils.cpp_extension.BuildExtension},\n',
            "",
        ),
    ],
    # Pillow 10 dropped the alias LINEAR.
    "detectron2/data/transforms/transform.py": [("Image.LINEAR", "Image.BILINEAR")],
    # setuptools 81 dropped pkg_resources.
    "detectron2/model_zoo/model_zoo.py": [
        ("import pkg_resources\n", "from importlib.resources import files\n"),
        (
            "pkg_resources.resource_filename(\n"
            '        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
            'str(files("detectron2.model_zoo").joinpath("configs", config_path))',
        ),
    ],
    # numpy 1.24 dropped np.int, np.float, np.str and np.bool (np.bool came back in numpy 2).
    "detectron2/data/build.py": [
        ("(num_classes,), dtype=np.int)", "(num_classes,), dtype=int)"),
        ('"iscrowd", 0)], dtype=np.int', '"iscrowd", 0)], dtype=int'),
    ],
    "detectron2/data/datasets/pascal_voc.py": [("dtype=np.str)", "dtype=str)")],
    "detectron2/evaluation/pascal_voc_evaluation.py": [
        ('["difficult"] for x in R]).astype(np.bool)', '["difficult"] for x in R]).astype(bool)'),
    ],
    "detectron2/evaluation/sem_seg_evaluation.py": [
        ("array(output, dtype=np.int)", "array(output, dtype=int)"),
        ("array(Image.open(f), dtype=np.int)", "array(Image.open(f), dtype=int)"),
        (
            "acc = np.full(self._num_classes, np.nan, dtype=np.float)",
            "acc = np.full(self._num_classes, np.nan, dtype=float)",
        ),
        (
            "iou = np.full(self._num_classes, np.nan, dtype=np.float)",
            "iou = np.full(self._num_classes, np.nan, dtype=float)",
        ),
        ("diagonal()[:-1].astype(np.float)", "diagonal()[:-1].astype(float)"),
        ("[:-1, :-1], axis=0).astype(np.float)", "[:-1, :-1], axis=0).astype(float)"),
        ("[:-1, :-1], axis=1).astype(np.float)", "[:-1, :-1], axis=1).astype(float)"),
    ],
    "detectron2/structures/masks.py": [
        ("np.zeros((height, width)).astype(np.bool)", "np.zeros((height, width), dtype=bool)"),
        ("decode(rle).astype(np.bool)", "decode(rle).astype(bool)"),
        ("asarray(keep, dtype=np.bool)", "asarray(keep, dtype=bool)"),
    ],
    "detectron2/utils/visualizer.py": [
        ("!= empty_ids[0]).numpy().astype(np.bool)", "!= empty_ids[0]).numpy().astype(bool)"),
        ("== sid).numpy().astype(np.bool), sinfo", "== sid).numpy().astype(bool), sinfo"),
        ("== sid).numpy().astype(np.bool)\n", "== sid).numpy().astype(bool)\n"),
    ],
    "detectron2/utils/video_visualizer.py": [
        ("(len(instances),), dtype=np.bool)", "(len(instances),), dtype=bool)"),
    ],
    # Python 3.11 does not sample from a set; sorting keeps the choice reproducible.
    "detectron2/data/common.py": [
        (
            "sample(self._fallback_candidates, k=1)",
            "sample(sorted(self._fallback_candidates), k=1)",
        ),
    ],
    # torch warns about a missing argument (1.10), and about the old storage classes (2.0).
    "detectron2/modeling/anchor_generator.py": [
        ("meshgrid(shifts_y, shifts_x)", 'meshgrid(shifts_y, shifts_x, indexing="ij")'),
    ],
    "detectron2/utils/comm.py": [
        (
            "    storage = torch.ByteStorage.from_buffer(buffer)\n"
            "    tensor = torch.ByteTensor(storage).to(device=device)\n",
            "    tensor = torch.frombuffer(bytearray(buffer), dtype=torch.uint8).to(device)\n",
        ),
    ],
    # Several processes on machines without a GPU.
    "detectron2/engine/launch.py": [
        (
            '    assert torch.cuda.is_available(), "cuda is not available. '
            'Please check your installation."\n',
            "    has_gpu = torch.cuda.is_available()\n",
        ),
        ('backend="NCCL"', 'backend="NCCL" if has_gpu else "GLOO"'),
        (
            "    assert num_gpus_per_machine <= torch.cuda.device_count()\n"
            "    torch.cuda.set_device(local_rank)\n",
            "    if has_gpu:\n"
            "        assert num_gpus_per_machine <= torch.cuda.device_count()\n"
            "        torch.cuda.set_device(local_rank)\n",
        ),
    ],
    "detectron2/engine/defaults.py": [
        (
            'if "device_ids" not in kwargs:',
            'if "device_ids" not in kwargs and next(model.parameters()).is_cuda:',
        ),
    ],
    # The fast COCO evaluation is a compiled operator: score with pycocotools.
    "detectron2/evaluation/coco_evaluation.py": [
        ("self._use_fast_impl = use_fast_impl", "self._use_fast_impl = False"),
    ],
}
EDITS = tuple(Edit(file, *pair) for file, pairs in EDITS_BY_FILE.items() for pair in pairs)

STUB_FILE = "detectron2/_C.py"
STUB = '''"""Stands in for the compiled extension, which this pure-Python build does not have."""


def get_compiler_version():
    return "not compiled (pure-Python build)"


def get_cuda_version():
    return "not available"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise ImportError(
        f"the Detectron2 operator '{name}' is compiled code and this is the pure-Python build of "
        "Detectron2 0.6; install the official Detectron2 to use it"
    )
'''

PROBE = """
import os
import detectron2, detectron2.layers, detectron2.modeling, detectron2.data.transforms
import detectron2.engine, detectron2.evaluation, detectron2.model_zoo
from detectron2.utils import comm
kind = "main" if hasattr(comm, "create_local_process_group") else "release"
print(f"Detectron2 {detectron2.__version__} ({kind}) in {os.path.dirname(detectron2.__file__)}")
"""


class InstallError(RuntimeError):
    """A reason to stop that is told in one line."""


def say(message: str) -> None:
    print(f"[detectron2] {message}", flush=True)


def last_line(text: str) -> str:
    """The line of a command's output that names the error: an 'ERROR'/'Error' one, or the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR:", "error:")) or "Error: " in line]
    return (errors or lines or ["no output"])[-1]


def run_quietly(command: list[str], *, cwd: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, text=True, capture_output=True, check=False
    )


def pip(*arguments: str, purpose: str) -> None:
    """Run pip of this interpreter; its output is shown only when it fails."""
    result = run_quietly([sys.executable, "-m", "pip", *arguments])
    if result.returncode != 0:
        output = result.stdout + result.stderr
        sys.stderr.write(output)
        raise InstallError(f"{purpose} failed: {last_line(output)}")


def find_installed() -> tuple[str | None, str | None]:
    """(description, None) if one works, (None, import error) if it fails, else (None, None).

    A separate process in an empty directory looks, so that a folder named detectron2 below the
    current directory does not count and nothing stays imported here.
    """
    with tempfile.TemporaryDirectory() as empty:
        there = run_quietly(
            [
                sys.executable,
                "-c",
                "import importlib.util as u, sys; sys.exit(u.find_spec('detectron2') is None)",
            ],
            cwd=empty,
        )
        if there.returncode != 0:
            return None, None
        probe = run_quietly([sys.executable, "-c", PROBE], cwd=empty)
    if probe.returncode == 0:
        return last_line(probe.stdout), None
    return None, last_line(probe.stderr)


def download(folder: Path) -> Path:
    """Fetch the pinned source distribution with pip, which checks the hash before opening it."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{SDIST} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
    pip(
        *("download", "-q", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"),
        *("--require-hashes", "-r", str(requirements), "-d", str(folder)),
        purpose=f"downloading {SDIST} (fetch it elsewhere and pass --sdist FILE if need be)",
    )
    files = sorted(folder.glob("*.tar.gz"))
    if len(files) != 1:
        raise InstallError(f"pip download left {len(files)} .tar.gz files for {SDIST}, expected 1")
    return files[0]


def check_hash(sdist: Path, expected: str = SDIST_SHA256) -> None:
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if digest != expected:
        raise InstallError(f"{sdist} has sha256 {digest}, expected {expected}: not used")


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack plain files and folders, none of them outside ``folder``; return the top folder."""
    folder.mkdir(parents=True, exist_ok=True)
    root = folder.resolve()
    total = 0
    with tarfile.open(sdist, "r:gz") as archive:
        for member in archive:
            target = (root / member.name).resolve()
            if root not in target.parents or not (member.isfile() or member.isdir()):
                raise InstallError(f"{sdist} holds the unsafe entry {member.name!r}: not unpacked")
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            total += member.size
            if total > MAX_UNPACKED_BYTES:
                raise InstallError(f"{sdist} unpacks to more than {MAX_UNPACKED_BYTES} bytes")
            target.parent.mkdir(parents=True, exist_ok=True)
            source = archive.extractfile(member)
            if source is None:
                raise InstallError(f"{sdist}: cannot read the entry {member.name!r}")
            with source, open(target, "wb") as out:
                shutil.copyfileobj(source, out)
    tops = [path for path in root.iterdir() if path.is_dir()]
    if len(tops) != 1:
        raise InstallError(f"{sdist} has {len(tops)} top folders, expected 1")
    return tops[0]


def apply_edits(tree: Path, edits: tuple[Edit, ...] = EDITS) -> None:
    """Apply every edit, or none.

    Raises:
        InstallError: names the first edit whose old text is not there exactly once.
    """
    texts: dict[str, str] = {}
    for number, edit in enumerate(edits, start=1):
        where = f"edit {number} of {len(edits)} ({edit.file}: {edit.old.strip()[:60]!r})"
        if edit.file not in texts:
            try:
                texts[edit.file] = (tree / edit.file).read_text(encoding="utf-8")
            except FileNotFoundError:
                raise InstallError(f"{where}: there is no such file") from None
        count = texts[edit.file].count(edit.old)
        if count != 1:
            raise InstallError(f"{where}: its text occurs {count} times, expected 1")
        texts[edit.file] = texts[edit.file].replace(edit.old, edit.new)
    for file, text in texts.items():
        (tree / file).write_text(text, encoding="utf-8")


def write_stub(tree: Path) -> None:
    stub = tree / STUB_FILE
    if stub.exists():
        raise InstallError(f"{STUB_FILE} is in the source distribution already, expected not")
    stub.write_text(STUB, encoding="utf-8")


def install_pure(sdist: Path | None) -> None:
    """Build the pure-Python wheel in a temporary folder and install it."""
    with tempfile.TemporaryDirectory(prefix="detectron2-") as temporary:
        work = Path(temporary)
        if sdist is None:
            say(f"downloading {SDIST}")
            sdist = download(work)
        elif not sdist.is_file():
            raise InstallError(f"there is no file {sdist} (--sdist)")
        check_hash(sdist)
        tree = unpack(sdist, work / "source")
        apply_edits(tree)
        write_stub(tree)
        say(f"sha256 as expected, {len(EDITS)} source edits applied; building the wheel")
        pip(
            *("wheel", "-q", "--no-build-isolation", "--no-deps", str(tree), "-w", str(work)),
            purpose="building the Detectron2 wheel",
        )
        (wheel,) = work.glob("detectron2-*.whl")
        say(f"installing {wheel.name}")
        # Two steps: what it requires without touching what is there, then the wheel itself, which
        # has to replace a broken one of the same version too.
        pip("install", "-q", str(wheel), purpose="installing what Detectron2 requires")
        pip(
            *("install", "-q", "--no-deps", "--force-reinstall", str(wheel)),
            purpose="installing Detectron2",
        )


def install_official(source: str) -> None:
    say(f"compiling the official Detectron2 from {source} (this takes minutes)")
    pip(
        *("install", "-q", "--no-build-isolation", "--force-reinstall", "--no-deps", source),
        purpose=f"building Detectron2 from {source}",
    )
    pip("install", "-q", "--no-build-isolation", source, purpose="installing what it requires")


def check_requirements() -> None:
    for name in ("torch", "setuptools", "wheel"):
        if importlib.util.find_spec(name) is None:
            raise InstallError(f"{name} is not installed for {sys.executable}: install it first")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--sdist", type=Path, metavar="FILE", help=f"a copy of {SDIST}")
    source.add_argument("--official", metavar="PATH_OR_URL", help="build this Detectron2 instead")
    parser.add_argument("--force", action="store_true", help="replace an installed Detectron2")
    args = parser.parse_args(argv)
    try:
        found, problem = find_installed()
        if found and not args.force:
            say(f"{found}: left as it is")
            return 0
        if problem and not args.force:
            raise InstallError(f"a Detectron2 is installed but fails: {problem} (--force replaces)")
        check_requirements()
        if args.official:
            install_official(args.official)
        else:
            install_pure(args.sdist)
        found, problem = find_installed()
        if not found:
            raise InstallError(f"installed, but its import fails: {problem}")
        say(f"ready: {found}")
    except (InstallError, OSError, tarfile.TarError) as error:
        print(f"[detectron2] error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
