"""`import fastamp` is quick and needs neither Triton, nor transformers, nor a GPU."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import HAS_GPU

import fastamp
from fastamp import __main__
from fastamp.backend import uses_triton

OPTIONAL = ("triton", "transformers", "datasets")
COMMAND_LINE = ("click", "rich", "plotext")
PAPER = ("scipy", "matplotlib", "filelock")
HEAVY = (*OPTIONAL, *COMMAND_LINE, *PAPER, "numpy", "fastamp.kernels")

STEP = """
logits = torch.randn(4, 3, requires_grad=True)
fastamp.AMPLoss()(logits, torch.tensor([0, 1, 2, 0])).backward()
assert logits.grad.abs().sum() > 0
"""


def uninstall(*packages: str) -> str:
    """A path finder that finds none of these packages, as where they are not installed."""
    return f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in {packages} else find(name, path, target)
PathFinder.find_spec = find_spec
"""


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints, with Triton not interpreting unless asked to."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "hide",
    [uninstall(*OPTIONAL), f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))"],
    ids=["absent", "blocked"],
)
def test_without_triton_and_transformers_it_imports_and_trains(hide):
    refusal = python(
        f"""
{hide}
import torch, fastamp
{STEP}
try:
    fastamp.set_backend("triton")
except RuntimeError as error:
    print(error)
"""
    )
    assert refusal == "backend 'triton' was asked for, but the package triton is not installed"


def test_the_library_needs_no_package_of_the_command_line():
    python(
        f"""
{uninstall(*COMMAND_LINE, *PAPER, "numpy")}
import torch, fastamp
{STEP}
fastamp.functional.amp_cross_entropy, fastamp.reference.amp
"""
    )


def test_neither_does_hugging_face():
    pytest.importorskip("transformers")
    python(f"{uninstall(*COMMAND_LINE, 'scipy')}\nimport fastamp\nfastamp.hf.AMPTrainer, fastamp.hf.sent_loss")


def test_a_command_without_its_packages_names_what_brings_them(monkeypatch):
    assert {*__main__.PACKAGES} == {*COMMAND_LINE}
    for package in COMMAND_LINE:
        monkeypatch.setattr(__main__, "find_spec", lambda name, package=package: None if name == package else True)
        with pytest.raises(SystemExit, match=re.escape(f'not installed: {package}; pip install "fastamp[cli]"')):
            __main__.main()


def test_the_papers_experiments_without_their_package_name_what_brings_it():
    said = python(
        f"""
{uninstall("filelock")}
from click.testing import CliRunner
from fastamp.cli import main
print(CliRunner().invoke(main, ["paper", "--help"]).output)
"""
    )
    assert said == "Error: No module named 'filelock'; pip install \"fastamp[paper]\""


def test_the_import_loads_only_what_it_needs_and_asks_for_no_gpu():
    """Counted, for the time that it takes depends on what else the machine does."""
    lazy, imported, stepped = python(
        f"""
import sys, fastamp
print("torch" in sys.modules, set(fastamp.__all__) <= set(dir(fastamp)))
import torch
def refuse(*args, **kwargs):
    raise AssertionError("something was asked of the GPU at import")
right = {{}}
for name in ("is_available", "device_count", "current_device", "get_device_properties", "init", "_lazy_init"):
    right[name] = getattr(torch.cuda, name)
    setattr(torch.cuda, name, refuse)
before = set(sys.modules)
fastamp.AMPLoss(), fastamp.functional, fastamp.reference, fastamp.Mix, fastamp.set_backend
print(*set(sys.modules) - before)
for name, function in right.items():
    setattr(torch.cuda, name, function)
{STEP}
print(*set(sys.modules) - before)
"""
    ).splitlines()
    assert lazy == "False True"  # torch waits until a name is used
    assert {name.split(".")[0] for name in imported.split()} - {"fastamp", *sys.stdlib_module_names} == set()
    assert "fastamp.loss" in stepped.split()
    assert not [name for name in stepped.split() if name.startswith(HEAVY)]


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fastamp' has no attribute 'AMP'"):
        fastamp.AMP  # noqa: B018 - the access is the test


def test_a_backend_holds_to_the_end_of_its_block_or_until_further_notice():
    x = torch.zeros(1)
    with fastamp.set_backend("torch"):
        assert not uses_triton(x)
        with fastamp.set_backend("auto"):
            assert not uses_triton(x)  # on the CPU
        if fastamp.backend.has_triton() and fastamp.backend.interpreting():
            fastamp.set_backend("triton")
            assert uses_triton(x)
    assert not uses_triton(x)


def test_an_unknown_backend_is_refused_and_changes_nothing():
    with fastamp.set_backend("torch"):
        with pytest.raises(ValueError, match="backend must be one of 'auto', 'torch', 'triton'; got 'cuda'"):
            fastamp.set_backend("cuda")
        assert not uses_triton(torch.zeros(1))


def test_a_block_that_raises_gives_the_backend_back():
    with fastamp.set_backend("torch"), pytest.raises(KeyError), fastamp.set_backend("auto"):
        raise KeyError
    assert not uses_triton(torch.zeros(1))


def test_a_triton_that_cannot_be_imported_names_the_other_backend(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('GLIBC_2.34 not found')")
    refusal = python(
        """
import torch, fastamp
fastamp.set_backend("triton")
try:
    fastamp.AMPLoss()(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64))
except ImportError as error:
    print(error)
""",
        TRITON_INTERPRET="1",
        PYTHONPATH=str(tmp_path),
    )
    assert refusal == 'GLIBC_2.34 not found; fastamp.set_backend("torch") computes the same without Triton'


@pytest.mark.skipif(HAS_GPU, reason="Triton finds a driver")
def test_a_triton_that_finds_no_gpu_driver_names_the_other_backend():
    pytest.importorskip("triton", reason="the package triton is not installed")
    refusal = python(
        """
import torch, fastamp.backend
fastamp.backend.interpreting = lambda: True  # whereas its kernels are not interpreted
fastamp.set_backend("triton")
try:
    fastamp.AMPLoss()(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64))
except RuntimeError as error:
    print(error)
"""
    )
    assert refusal.startswith("Triton is installed, but cannot run this kernel here: RuntimeError: 0 active drivers")
    assert refusal.endswith('fastamp.set_backend("torch") computes the same without Triton')


def test_triton_refuses_cpu_tensors_outside_its_interpreter():
    pytest.importorskip("triton", reason="the package triton is not installed")
    refusal = python(
        """
import torch, fastamp
with fastamp.set_backend("triton"):
    try:
        fastamp.AMPLoss()(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64))
    except RuntimeError as error:
        print(error)
"""
    )
    assert refusal.startswith("backend 'triton' takes CUDA and ROCm tensors")
    assert refusal.endswith("got a tensor on cpu")
