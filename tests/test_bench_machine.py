"""What results say of the machine they are from."""

import torch

from fastamp.benchmarking import machine

CPU = torch.device("cpu")
CPUINFO = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: {family}
model\t\t: {model}
model name\t: AMD EPYC
stepping\t: 1
cpu MHz\t\t: 2596.120

processor\t: 1
cpu family\t: 99
"""


def pretend(monkeypatch, folder, *, family: int, model: int) -> None:
    (folder / "cpuinfo").write_text(CPUINFO.format(family=family, model=model))
    monkeypatch.setattr(machine, "CPUINFO", folder / "cpuinfo")


def test_processors_of_one_name_are_told_apart(monkeypatch, tmp_path):
    pretend(monkeypatch, tmp_path, family=26, model=2)
    assert machine.describe(CPU) == {
        "type": "cpu",
        "name": "AMD EPYC",
        "tag": "cpu-amd-epyc-26-2",
        "family": 26,
        "model": 2,
        "stepping": 1,
    }
    pretend(monkeypatch, tmp_path, family=25, model=1)
    assert machine.describe(CPU)["tag"] == "cpu-amd-epyc-25-1"


def test_a_system_that_says_nothing_of_its_processor_has_a_name_all_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "nothing")
    facts = machine.describe(CPU)
    assert facts["name"]
    assert facts["tag"].startswith("cpu-")
    assert {facts[name] for name in ("family", "model", "stepping")} == {None}


def test_versions_are_those_of_all_that_decides_the_numbers():
    found = machine.versions()
    assert {"python", "torch", "fastamp", "triton", "transformers", "liger_kernel", "cuda", "driver"} == found.keys()
    assert found["torch"] == torch.__version__
    assert found["driver"] is None or torch.cuda.is_available()
