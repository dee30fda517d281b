"""Packaging of fiber_d2. Building or reading its metadata does not need torch."""

import os
import re
import shutil
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def version():
    """What fiber_d2/version.py says, which cannot be imported before torch is installed."""
    text = (ROOT / "fiber_d2" / "version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


class BuildWithConfigs(build_py):
    """Put the recipes of configs/ into wheels as fiber_d2/configs, beside the code they build.

    An editable installation uses the checkout, which has them already.
    """

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "fiber_d2" / "configs"
            shutil.copytree(
                ROOT / "configs",
                target,
                ignore=shutil.ignore_patterns("__pycache__"),
                dirs_exist_ok=True,
            )


@contextmanager
def output_in(path):
    """What happens inside, compilers included, writes to the file ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(path, "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), saved):
                os.dup2(original, descriptor)
                os.close(original)


def compiled_operators():
    """Extensions and commands of setup() that build csrc/, where torch is there.

    FIBER_D2_BUILD_OPS=0 skips it.

    A build that fails leaves an installation without compiled operators, which works.
    """
    if os.environ.get("FIBER_D2_BUILD_OPS", "1") == "0":
        return [], {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        # pip's isolated builds have no torch: --no-build-isolation shows them the one installed.
        return [], {}

    class BuildOperators(BuildExtension):
        def run(self):
            log = ROOT / "build" / "ops.log"
            try:
                with output_in(log):
                    super().run()
            # Whatever a compiler or a missing one does: SystemExit and RuntimeError among it.
            except (Exception, SystemExit) as error:
                sys.stderr.write(
                    f"warning: the compiled operators could not be built ({error}); PyTorch does "
                    f"their work, more slowly. The whole story is in {log}.\n"
                )
                self.extensions = []

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    # Nobody asks for floating-point exceptions, and without them choices need no branches.
    flags = ["-O3", "-fno-trapping-math"]
    if sys.platform == "linux":
        # Compiled for threads but not linked to a library of them: torch has loaded its own.
        flags.append("-fopenmp")
    extension = CppExtension("fiber_d2._C", sources, extra_compile_args=flags)
    return [extension], {"build_ext": BuildOperators}


EXTENSIONS, COMMANDS = compiled_operators()

# Lower bounds only: the tested set is pinned in constraints.txt. Detectron2 is missing on purpose,
# because it is on no package index: tools/install_detectron2.py installs it.
REQUIREMENTS = [
    "torch>=2.1",
    "torchvision>=0.16",
    "numpy>=1.23",
    # Detectron2's drawing imports cv2; the headless build needs no system libraries.
    "opencv-python-headless",
    "Pillow>=9.1",
    "transformers>=4.36",
    "tokenizers>=0.15",
    "huggingface_hub>=0.19",
    "timm>=0.9.12",
    "fvcore>=0.1.5",
    "iopath>=0.1.9",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
    "yacs>=0.1.8",
    "pycocotools>=2.0.6",
    "tabulate",
    "tensorboard",
    "termcolor",
    "tqdm",
]
FAST = ["faster-coco-eval>=1.5"]
# Pure Python, no further requirements; tensorboard brings Werkzeug along anyway.
DEMO = ["waitress>=2.1", "Werkzeug>=2.3"]
# `fiber-d2 export --format onnx` and what runs it.
EXPORT = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime"]
DOCS = ["mkdocs>=1.6", "mkdocstrings-python>=1.16"]

setup(
    name="fiber_d2",
    version=version(),
    description="FIBER, a vision-language model that ties boxes to words, on Detectron2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="fiber_d2 authors",
    license="MIT",
    python_requires=">=3.9",
    packages=find_packages(include=["fiber_d2", "fiber_d2.*"]),
    package_data={
        "fiber_d2.data": ["assets/*.json"],
        "fiber_d2.demo": ["static/*"],
        "fiber_d2.text": ["assets/*.json"],
    },
    ext_modules=EXTENSIONS,
    cmdclass={"build_py": BuildWithConfigs, **COMMANDS},
    install_requires=REQUIREMENTS,
    extras_require={
        "fast": FAST,
        "docs": DOCS,
        "lvis": ["lvis>=0.5.3"],
        "demo": DEMO,
        "export": EXPORT,
        # A headless Chromium without any package of the system. Only a test uses it, in a process
        # of its own: it is under the GPL.
        "browser-test": ["PyQt6-WebEngine"],
        "dev": [*FAST, *DEMO, *DOCS, *EXPORT, "hypothesis>=6", "pytest>=7", "ruff>=0.6", "scipy"],
    },
    entry_points={
        "console_scripts": [
            "fiber-d2 = fiber_d2.cli:main",
            "fiber-d2-train = fiber_d2.engine.main:main",
        ]
    },
)
