"""`pip install .` gives the module `globe`, the command `globe` and, where torch can be imported, the
operators.

pip's build isolation has no torch: the package is then pure Python, and the operators are built at first
use where csrc/ is beside globe.py. With them: `pip install --no-build-isolation .`; GLOBE_CUDA=0/1 overrides
whether CUDA is built, which else depends on CUDA_HOME. The library keeps to torch's stable ABI: one wheel
serves every torch from 2.10 and Python from 3.10.
"""
import os
import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
TRAIN = ["accelerate", "peft"]


def extension() -> dict:
    """setup()'s arguments for csrc/, or none where torch is not there to build with."""
    try:
        from torch.utils import cpp_extension
    except ImportError:
        return {}
    want = os.environ.get("GLOBE_CUDA", "1" if cpp_extension.CUDA_HOME else "0")
    if want not in ("0", "1"):
        raise SystemExit(f"GLOBE_CUDA: expected 0 or 1, found {want!r}")
    if want == "1" and not cpp_extension.CUDA_HOME:
        raise SystemExit("GLOBE_CUDA=1: no CUDA toolkit found; set CUDA_HOME")
    # without CUDA in torch itself a library that calls it could not be loaded
    cuda = want == "1" and ("GLOBE_CUDA" in os.environ or cpp_extension.torch.version.cuda is not None)
    define = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
    common = ["-O3", "-std=c++17", *define]
    flags = {"cxx": ["-g0", *common], "nvcc": ["-DUSE_CUDA", *common]}
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    sources = ["csrc/globe_ops.cpp"] + ["csrc/globe_ops.cu"] * cuda
    headers = ["csrc/globe_ops.h", "csrc/cpu_kernels.h", "csrc/coded.h"]
    module = make("globe_ops", sources, depends=headers, extra_compile_args=flags, py_limited_api=True)
    build = cpp_extension.BuildExtension.with_options(use_ninja=False)
    return {"ext_modules": [module], "cmdclass": {"build_ext": build},
            "options": {"bdist_wheel": {"py_limited_api": "cp310"}}}


setup(
    name="globe-moe",
    version=re.search(r'^__version__ = "(.+)"', (here / "globe.py").read_text(encoding="utf-8"), re.M)[1],
    description="Shrink the experts of Mixture-of-Experts language models; stay a drop-in Hugging Face model",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    py_modules=["globe"],
    install_requires=["torch>=2.10", "safetensors", "transformers>=5", "numpy", "tqdm", "PyYAML"],
    extras_require={
        "train": TRAIN,
        "test": ["pytest", "pytest-xdist", "hypothesis", "matplotlib", "gguf", *TRAIN],
        "plots": ["matplotlib"],
        "gguf": ["gguf", "accelerate"],
        "peers": ["gguf", "hqq"],
    },
    entry_points={"console_scripts": ["globe=globe:main"]},
    **extension(),
)
