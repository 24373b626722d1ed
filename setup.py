"""`pip install .` gives the module `globe` and the command `globe`; no compiler is needed."""
import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
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
    extras_require={"test": ["pytest", "matplotlib"], "plots": ["matplotlib"], "gguf": ["gguf", "accelerate"]},
    entry_points={"console_scripts": ["globe=globe:main"]},
)
