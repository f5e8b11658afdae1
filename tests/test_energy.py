"""What a run draws: measured or estimated, and never a silent zero."""

import json
import socket
from types import SimpleNamespace

import pytest
import torch

from lightning_modules import energy
from lightning_modules.callbacks.energy import Energy, in_words
from tests.faults import SCRIPT
from tests.finetuning import run as recipe

pytest.importorskip("codecarbon")


@pytest.fixture
def no_network(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refused)


def busy(times: int = 300_000) -> int:
    return sum(range(times))


def test_a_meter_adds_up_and_needs_no_network(no_network):
    meter = energy.Meter()
    meter.start()
    busy()
    busy(5_000_000)  # what is younger than 50 ms is not read again
    first = meter.read()
    busy(5_000_000)
    second = meter.stop()
    assert 0 < first.joules < second.joules and 0 < first.co2e_grams < second.co2e_grams
    assert second == meter.stop()  # once more changes nothing
    assert second.by.startswith(("measured: ", "estimated: "))


def test_co2e_is_that_of_the_country_or_of_the_world():
    per_kwh = {}
    for country in (None, "DEU", "NOR"):
        meter = energy.Meter(country)
        meter.start()
        busy()
        drawn = meter.stop()
        per_kwh[country] = drawn.co2e_grams / drawn.kwh
    assert per_kwh[None] == pytest.approx(475, rel=0.01)
    assert per_kwh["NOR"] < per_kwh["DEU"] < per_kwh[None]


def test_one_call_is_a_part_of_all():
    assert 0 < energy.joules_of(busy, 5).joules < energy.joules_of(lambda: busy(3_000_000), 5).joules


def drawn(corpus, folder, *more: str) -> dict[str, object]:
    """What a toy run says of its energy."""
    flags = {"data.path": corpus, "data.tokenizer": "bytes", "data.seq_len": 32, "data.batch_size": 4}
    flags |= {"trainer.val_check_interval": 2, "trainer.default_root_dir": folder}
    flags |= {"energy.country": "DEU", "samples.max_new_tokens": 0}
    recipe("fit", *(f"--{name}={value}" for name, value in flags.items()), *more, script=SCRIPT)
    return json.loads((folder / "summary.json").read_text())["energy"]


def test_a_run_says_what_it_drew(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_LM_ENERGY", "on")
    found = drawn(corpus, tmp_path, "--trainer.max_steps=2")
    assert found["joules"] > 0 and found["kwh"] == pytest.approx(found["joules"] / 3.6e6, rel=0.02)
    assert found["co2e_grams"] == pytest.approx(381 * found["kwh"], rel=0.02)
    assert found["joules_per_million_tokens"] == pytest.approx(found["joules"] * 1e6 / (2 * 4 * 32), rel=0.05)
    assert "energy" in (tmp_path / "config.yaml").read_text()


def test_a_run_that_goes_on_adds_to_what_it_had(corpus, tmp_path, monkeypatch):
    """With a meter of ten joules a process."""
    monkeypatch.setenv("LIGHTNING_LM_ENERGY", "on")
    monkeypatch.setattr(energy.Meter, "start", lambda self: None)
    for name in ("read", "stop"):
        monkeypatch.setattr(energy.Meter, name, lambda self: energy.Energy(10.0, 2.0, "estimated: ten"))
    assert drawn(corpus, tmp_path, "--trainer.max_steps=2")["joules"] == 10
    both = drawn(corpus, tmp_path, "--trainer.max_steps=4", "--ckpt_path=last")
    assert both["joules"] == 20 and both["co2e_grams"] == 4 and both["by"] == "estimated: ten"


def test_a_checkpoint_of_the_end_has_all_and_a_run_that_is_over_keeps_it():
    callback = Energy(measure=True)
    callback.before, callback.drawn = energy.Energy(5, 1, "estimated: x"), energy.Energy(25, 3, "estimated: x")
    taken_up = Energy(measure=True)
    taken_up.load_state_dict(callback.state_dict())
    assert taken_up.summary(100)["energy"]["joules"] == 25 and taken_up.summary(100)["energy"]["by"] == "estimated: x"


def test_ranks_add_up_whatever_each_machine_has(monkeypatch):
    """One without codecarbon takes part in the sum, or the others would wait for it."""
    asked = []
    trainer = SimpleNamespace(local_rank=0, num_nodes=2, is_global_zero=True)
    trainer.strategy = SimpleNamespace(reduce=lambda figures, reduce_op: asked.append(reduce_op) or figures)
    callback = Energy(measure=False)
    callback.on_train_start(trainer, SimpleNamespace(device=torch.device("cpu")))
    callback.on_train_end(trainer, SimpleNamespace(device="cpu"))
    assert asked == ["sum"] and callback.drawn is None


@pytest.mark.parametrize(
    ("gpu", "rapl", "works", "said"),
    [
        (True, False, "cpu", "estimated: CPU by its rating and load, memory by its size (measured: GPU)"),
        (True, False, "cuda", "measured: GPU (estimated: CPU by its rating and load, memory by its size)"),
        (False, True, "cpu", "measured: CPU (estimated: memory by its size)"),
        (False, False, "cpu", "estimated: CPU by its rating and load, memory by its size"),
    ],
)
def test_what_is_measured_is_what_computes(gpu, rapl, works, said, monkeypatch):
    monkeypatch.setattr("codecarbon.core.gpu.is_gpu_details_available", lambda: gpu)
    monkeypatch.setattr("codecarbon.core.cpu.is_rapl_available", lambda: rapl)
    assert energy.how(works) == said
    assert energy.Energy(by=said).is_estimate == said.startswith("estimated")


def test_what_was_not_measured_is_said(monkeypatch):
    assert energy.is_wanted() is False  # in tests
    assert "not measured" in Energy().words(100) and Energy().summary(100) == {}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--energy.measure needs codecarbon"):
        Energy(measure=True)


def test_a_meter_that_fails_is_no_zero(monkeypatch, capsys):
    callback = Energy(measure=True)
    monkeypatch.setattr(energy.Meter, "start", lambda self: None)
    trainer = SimpleNamespace(local_rank=0, num_nodes=1, is_global_zero=True)
    trainer.strategy = SimpleNamespace(reduce=lambda figures, reduce_op: figures)
    module = SimpleNamespace(device=torch.device("cpu"))
    callback.on_train_start(trainer, module)
    callback.on_train_end(trainer, module)
    assert "could not be measured" in capsys.readouterr().err
    assert callback.summary(10) == {} and "could not be measured" in callback.words(10)


def test_a_meter_that_breaks_ends_no_run(monkeypatch, capsys):
    import codecarbon

    def broken(*_, **__):
        raise RuntimeError("no counter")

    monkeypatch.setattr(codecarbon, "OfflineEmissionsTracker", broken)
    meter = energy.Meter()
    meter.start()
    assert meter.read().joules == meter.stop().joules == 0
    assert "no energy is measured: RuntimeError: no counter" in capsys.readouterr().err


def test_joules_are_told_in_units_that_leave_few_digits():
    assert [in_words(joules) for joules in (0.0123, 3.456, 2345, 7.8e6)] == ["0.012 J", "3.46 J", "2.35 kJ", "7.8 MJ"]
