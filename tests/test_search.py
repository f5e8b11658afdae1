"""Sizes tried in a super-network, and steps done one after the other."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lightning_modules.compression import architecture_search as tried
from lightning_modules.compression import searching
from lightning_modules.compression.architecture_search import Point, Trials
from lightning_modules.compression.onnx_decoder import open_onnx
from lightning_modules.compression.opened import open_model
from lightning_modules.compression.pipeline import Pipeline, read_nodes
from lightning_modules.compression.sizes import Sizes
from lightning_modules.compression.structured import worth_of
from lightning_modules.compression.super_network import Part, Space, SuperNetwork, space_of
from lightning_modules.evaluation.judging import Scored, interval_of_excess, score
from lightning_modules.likelihood import Scorer
from recipes import compress
from tests.distilling import flags_of
from tests.faults import command as started
from tests.test_pruning import FAMILIES, made
from tests.test_quantization import failure

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"

SHARES = (1.0, 0.75, 0.5)


def space_for(whole, batches) -> Space:
    worth = worth_of(whole, batches, 2)
    return space_of(whole.config, SHARES, worth.layers_least_first)


# The super-network


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_is_equal_bit_by_bit_to_what_is_cut_out_and_saved(family, tmp_path):
    whole, batches, auto_class = made(family)
    space, sizes = space_for(whole, batches), None
    for sizes in (space.largest, space.smallest, space.drawn(random.Random(1))):
        part = Part(whole, sizes, space.kept_layers(sizes), auto_class)
        part.network.eval()
        with torch.no_grad(), part.filled() as network:
            inside = network(**batches[0]).logits
        part.cut_out().save_pretrained(tmp_path / "part")
        with torch.no_grad():
            outside = auto_class.from_pretrained(tmp_path / "part").eval()(**batches[0]).logits
            assert torch.equal(inside, outside)
            if sizes == space.largest:
                assert torch.equal(inside, whole(**batches[0]).logits)


@pytest.mark.parametrize("family", ["llama tied", "gpt2", "t5"])
def test_a_parts_gradient_is_the_wholes_at_its_weights_and_zero_elsewhere(family):
    whole, batches, auto_class = made(family)
    space = space_for(whole, batches)
    part = Part(whole, space.smallest, space.kept_layers(space.smallest), auto_class)
    part.network.eval()
    with part.filled() as network:
        network(**batches[0]).logits.square().mean().backward()
    alone = part.cut_out()
    alone.requires_grad_(True)
    alone(**batches[0]).logits.square().mean().backward()
    inner = "intermediate" if family == "bert" else "mlp" if family != "t5" else "wi"
    names = [name for name, p in alone.named_parameters() if p.grad is not None and p.ndim == 2]
    assert any(inner in name for name in names)
    for name in names:
        mine, its = alone.get_parameter(name).grad, whole.get_parameter(part.part.layer_of(name)).grad
        assert torch.isclose(mine.norm(), its.norm(), rtol=1e-4), name
        assert its.count_nonzero() <= mine.numel(), name


def test_the_space_has_the_whole_and_the_smallest_and_rounds_to_what_can_be():
    whole, batches, _ = made("llama")
    space = space_for(whole, batches)
    assert space.largest == Sizes(3, 64, 96, 4) and space.smallest == Sizes(2, 32, 48, 2)
    assert len(space.all()) == len(set(space.all())) == 2 * 3 * 3 * 2
    wide, batches, _ = made("llama tied")  # heads 4, 3, 2; Llama's config wants 64, 48, 32 to divide by them
    assert {(s.width, s.heads) for s in space_for(wide, batches).all()} == {
        (64, 4),
        (64, 2),
        (48, 4),
        (48, 3),
        (48, 2),
        (32, 4),
        (32, 2),
    }
    assert {space.drawn(random.Random(i)) for i in range(300)} <= set(space.all())
    bert, batches, _ = made("bert")
    assert all(sizes.width == 16 * sizes.heads for sizes in space_for(bert, batches).all())


def test_the_layer_that_matters_least_goes_first_in_a_part():
    space = Space((4, 3, 2), (64,), (96,), (4,), (1, 2), True)
    assert space.kept_layers(Sizes(3, 64, 96, 4)) == [0, 2, 3] and space.kept_layers(Sizes(2, 64, 96, 4)) == [0, 3]


def test_a_step_trains_the_whole_the_smallest_and_some_between():
    class Fake(SuperNetwork):
        def __init__(self, step: int):
            torch.nn.Module.__init__(self)
            self.seed, self.between, self._trainer = 0, 2, type("T", (), {"global_step": step})
            self.space = Space((4, 3, 2), (64, 48, 32), (96, 64), (4, 2), (1, 2), True)

        trainer = property(lambda self: self._trainer)
        training_loss = targets = None

    Fake.__abstractmethods__ = frozenset()
    sampled = [Fake(step).sampled() for step in range(8)]
    assert all(sizes[0] == Sizes(4, 64, 96, 4) and sizes[1] == Sizes(2, 32, 64, 2) for sizes in sampled)
    assert len({tuple(sizes) for sizes in sampled}) > 4
    assert Fake(3).sampled() == sampled[3]


# What is chosen


def point(nats: float, latency: float, parameters: float = 0.5, layers: int = 1) -> Point:
    return Point(Sizes(layers), nats, parameters, latency)


def test_the_front_is_of_points_that_none_is_better_than():
    points = [point(1.0, 1.0), point(2.0, 0.5), point(2.5, 0.6), point(3.0, 0.2), point(2.0, 0.5, 0.9)]
    assert tried.front(points) == [points[0], points[1], points[3]]
    assert tried.chosen(points, {"latency": 0.5}) == points[1]
    assert tried.chosen(points, {"latency": 0.1}) is None
    assert not points[0].dominates(points[0])


def test_the_volume_under_a_front_is_what_it_leaves_of_the_worst():
    points = [point(1.0, 1.0), point(2.0, 0.5)]
    assert tried.hypervolume(points, (3.0, 2.0)) == pytest.approx(0.5 * 1.0 + 1.0 * 2.0)
    assert tried.hypervolume([point(1.0, 0.5)], (3.0, 2.0)) > tried.hypervolume(points, (3.0, 2.0))


@pytest.mark.parametrize("budget", [12, 500])
def test_as_many_sizes_are_tried_as_asked_for_and_each_once(budget):
    whole, batches, auto_class = made("nanochat")
    counts: list[int] = []
    trials = Trials(whole, space_for(whole, batches), auto_class, batches, on_found=counts.append)
    found = tried.search(trials, budget)
    assert counts == list(range(1, len(found) + 1))
    assert len({p.sizes for p in found}) == len(found) == min(budget, len(trials.space.all()))
    assert {trials.space.largest, trials.space.smallest} <= {p.sizes for p in found}


class Supposed(Trials):
    """Costs by a formula: width is what the loss depends on, and what is inside costs without a gain."""

    def __init__(self):
        shares = tuple(range(24, 11, -1))
        self.space, self.found = Space(tuple(range(12, 5, -1)), shares, shares, shares, (), True), {}

    def __call__(self, sizes: Sizes) -> Point:
        if sizes not in self.found:
            shares = torch.tensor([sizes.layers / 12, sizes.width / 24, sizes.inner / 24, sizes.heads / 24])
            nats = (torch.tensor([0.4, 1.0, 0.0, 0.2]) * (1 - shares).square()).sum()
            cost = (torch.tensor([0.2, 0.3, 0.3, 0.2]) * shares).sum()
            self.found[sizes] = Point(sizes, float(nats), float(cost), float(cost))
        return self.found[sizes]


def test_the_sizes_that_all_shrink_alike_lie_between_the_ends():
    space = Supposed().space
    found = tried.uniform(space)
    assert len(found) == 5 and not {space.largest, space.smallest} & set(found)
    assert found[2] == Sizes(9, 18, 18, 18)
    assert tried.uniform(Space((8, 7, 6, 5, 4), (320, 160), (9,), (4, 2), (), True))[-1] == Sizes(5, 160, 9, 2)


def test_a_neighbour_is_one_place_away_in_one_dimension():
    space = Space((3, 2), (8, 6, 4), (9,), (4, 3, 2), (), True, must_divide=True)
    assert set(space.neighbours(Sizes(3, 8, 9, 4))) == {Sizes(2, 8, 9, 4)}  # 6 and 8 do not divide by 4 and 3
    assert set(space.neighbours(Sizes(2, 4, 9, 2))) == {Sizes(3, 4, 9, 2), Sizes(2, 6, 9, 2)}
    tied = Space((2,), (8, 4), (9, 8), (2, 1), (), False)
    assert set(tied.neighbours(Sizes(2, 8, 9, 2))) == {Sizes(2, 8, 8, 2), Sizes(2, 4, 9, 1)}


def test_a_search_is_better_than_chance_and_than_shrinking_all_alike():
    trials, by_chance = Supposed(), Supposed()
    found = tried.search(trials, 200)
    drawn = [by_chance(sizes) for sizes in tried.at_random(trials.space, 200, seed=1)]
    assert len(found) == len(drawn) == 200
    volumes = [tried.hypervolume(points, (0.5, 1.0)) for points in (found, drawn)]
    assert volumes[0] > 1.045 * volumes[1]  # NSGA-II alone: 1.033
    alike = [trials(sizes) for sizes in tried.uniform(trials.space)]
    assert all(any(point.dominates(one) for point in found) for one in alike)


def test_what_is_told_is_timed_once_more_and_never_beats_itself(monkeypatch):
    whole, batches, auto_class = made("llama")
    times = iter(range(10_000))
    monkeypatch.setattr(tried, "ratio_of_times", lambda *_: 0.5 + next(times) / 1e5)  # each measurement has another
    trials = Trials(whole, space_for(whole, batches), auto_class, batches)
    points = tried.search(trials, 1000)
    found = searching.findings(trials, points)
    assert {p.sizes for p in found.points} == {p.sizes for p in points} and found.best == tried.front(found.points)
    first = {p.sizes: p.latency for p in points}
    assert all(p.latency != first[p.sizes] for p in found.best if p.sizes != trials.space.largest)
    assert found.uniform == [trials.found[p.sizes] for p in found.uniform]  # one time each, in both tables
    beaten = found.beaten()
    assert all((p in found.best) != (p in beaten) for p in found.uniform)
    assert set(beaten) <= set(found.beaten(("nats", "latency")))


@pytest.mark.parametrize("words", ["latency", "speed=0.5", "latency=2", "latency=fast"])
def test_a_target_that_is_none_is_refused(words):
    with pytest.raises(ValueError, match="pass latency=0.5 or parameters=0.5"):
        searching.parsed_target(words)
    assert searching.parsed_target("latency=0.5,parameters=0.6") == {"latency": 0.5, "parameters": 0.6}


def toy_flags(folder: Path, texts: Path) -> list[str]:
    """Of a training, without what compress.py says itself."""
    unset = {f"model.student.{name}": None for name in ("hidden_size", "intermediate_size")}
    unset |= {f"model.student.{name}": None for name in ("num_hidden_layers", "num_attention_heads")}
    unset |= {"model.student": None, "model.teacher": None, "trainer.default_root_dir": None}
    return flags_of(folder, texts, folder, **unset, **{"trainer.precision": "32-true", "trainer.max_steps": 6})


def test_a_search_leaves_folders_and_goes_on_where_it_was(decoder, texts, tmp_path):
    own = ["search", f"--model={decoder}", "--target=parameters=0.8", "--shares=[1.0,0.5]", "--trials=8", "--rows=2"]
    words = [*own, f"--output={tmp_path / 'out'}", *toy_flags(tmp_path, texts)]
    refused = [word.replace("[1.0,0.5]", "[0.5]") for word in words]  # which leaves nothing that the next has to fit
    process = started(refused, tmp_path / "refused", [sys.executable], script=RECIPES / "compress.py")
    assert process.wait(60) == 2 and "and 1 among them" in (tmp_path / "refused").read_text()
    for log in ("first", "again"):
        process = started(words, tmp_path / log, [sys.executable], script=RECIPES / "compress.py")
        assert process.wait(180) == 0, (tmp_path / log).read_text()[-2000:]
    changed = [word.replace("[1.0,0.5]", "[1.0,0.75]") for word in words]
    process = started(changed, tmp_path / "other", [sys.executable], script=RECIPES / "compress.py")
    assert process.wait(60) == 2 and "was begun with shares" in (tmp_path / "other").read_text()
    said = (tmp_path / "first").read_text()
    assert "step 6" in said and "step 6" not in (tmp_path / "again").read_text()  # trained once
    assert "all dimensions alike" in said and "as many at random" in said
    points = json.loads((tmp_path / "out" / "points.json").read_text())
    chosen = open_model(str(tmp_path / "out" / "chosen"))
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(decoder).parameters())
    assert sum(p.numel() for p in chosen.network.parameters()) <= 0.8 * whole
    assert len(points) == 8 and len(list((tmp_path / "out" / "points").iterdir())) >= 2
    assert len(list((tmp_path / "out" / "uniform").iterdir())) == len(
        json.loads((tmp_path / "out" / "uniform.json").read_text())
    )


# Steps one after the other


def written(folder: Path, nodes: dict) -> Path:
    (folder / "graph.yaml").write_text(yaml.safe_dump({"nodes": nodes}, sort_keys=False))
    return folder / "graph.yaml"


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ({}, "has no nodes"),
        ({"a": "prune"}, "a is no mapping"),
        ({"a": {"verb": "train", "rounds": 2}}, "a has rounds; prune in a node of its own"),
        ({"a": {"verb": "shrink"}}, "a has the verb shrink; pass one of prune, train"),
        ({"a": {"verb": "prune", "model": "b"}}, "a is of b, which comes from nowhere; pass one of source"),
    ],
)
def test_a_graph_that_is_none_is_refused(nodes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        read_nodes(written(tmp_path, nodes))


def test_the_graph_that_comes_along_is_one():
    _, nodes = read_nodes(RECIPES / "compress_pipeline.yaml")
    assert [node.verb for node in nodes] == ["prune", "train", "train", "export", "report"]


@pytest.mark.slow
def test_a_graph_is_done_once_and_goes_on_where_it_failed(decoder, texts, tmp_path, capsys):
    settings = {f.partition("=")[0].removeprefix("--"): f.partition("=")[2] for f in toy_flags(tmp_path, texts)}
    training = {name: value for name, value in settings.items() if not name.startswith("data.path")}
    nodes = {
        "pruned": {"verb": "prune", "layers": 1, "rows": 4},
        "tuned": {"verb": "train", "model": "pruned", **training},
        "few": {"verb": "quantize", "model": "tuned", "scheme": "int4", "rounding": "nearest"},
        "report": {"verb": "report", "model": ["source", "pruned", "tuned", "few"]},
    }
    own = [
        "run",
        f"--model={decoder}",
        f"--data.path={texts}",
        "--data.val_fraction=0.3",
        f"--output={tmp_path / 'out'}",
    ]
    broken = nodes | {"few": nodes["few"] | {"group_size": 5}}
    for graph, code in ((broken, 2), (nodes, 0), (nodes, 0)):
        command = [*own, f"--config={written(tmp_path, graph)}"]
        process = started(command, tmp_path / "log", [sys.executable], script=RECIPES / "compress.py")
        assert process.wait(180) == code, (tmp_path / "log").read_text()[-2000:]
    log = (tmp_path / "log").read_text()
    assert log.count("python recipes/distill.py") + log.count("distill.py fit") == 1  # in the first of three
    assert "--group_size 5 does not divide" in log and log.count("is done already") == 2 + 4
    figures = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert len(figures) == 4 and (tmp_path / "out" / "report" / "report.png").stat().st_size > 10_000
    about = json.loads((tmp_path / "out" / "few" / "compression.json").read_text())
    assert about["source"] == str(decoder)
    assert [step["verb"] for step in about["steps"]] == ["prune", "train", "quantize"]
    changed = nodes | {"pruned": nodes["pruned"] | {"layers": 2}}
    assert "is of another command" in failure([*own, f"--config={written(tmp_path, changed)}"], capsys)


def test_a_step_takes_what_another_left(tmp_path, decoder):
    _, nodes = read_nodes(
        written(tmp_path, {"q": {"verb": "train", "qat": "int2"}, "x": {"verb": "export", "model": "q"}})
    )
    pipeline = Pipeline(RECIPES, str(decoder), tmp_path / "out", {"path": "here"})
    command, left = pipeline.command(nodes[0])
    assert left == tmp_path / "out" / "q" / "model-int2" and "--qat=int2" in command and "--data.path=here" in command
    pipeline.made["q"] = str(left)
    command, _ = pipeline.command(nodes[1])
    assert command[1].endswith("export.py") and str(left) in command and "--data.path=here" not in command


# What is told of models


def test_a_text_by_its_documents_is_the_text(decoder, texts):
    opened = open_model(str(decoder))
    documents = [file.read_text()[:200] for file in sorted(texts.glob("*.txt"))]
    found = score(opened, documents)
    scorer = Scorer(opened.network, opened.tokenizer, False, None, None, None, sample=documents[0])
    total = scorer.score(documents)
    assert found.nats_D.sum() == pytest.approx(total.nats) and found.tokens_D.sum() == total.tokens
    assert found.bits_per_byte == pytest.approx(total.bits_per_byte)
    alone = [score(opened, [document]) for document in documents]
    assert [part.nats_D[0] for part in alone] == pytest.approx(found.nats_D.tolist(), rel=1e-4)


def test_an_interval_holds_what_is_true_of_all_documents():
    numbers = torch.Generator().manual_seed(0)
    nats_D = 100 * torch.rand(64, generator=numbers).numpy()
    reference, worse = Scored(nats_D, nats_D, nats_D), Scored(1.03 * nats_D, nats_D, nats_D)
    assert interval_of_excess(worse, reference) == pytest.approx((3.0, 3.0), rel=1e-4)
    noisy = Scored(nats_D + torch.randn(64, generator=numbers).numpy(), nats_D, nats_D)
    low, high = interval_of_excess(noisy, reference)
    assert low < 100 * (noisy.nats_D.sum() / nats_D.sum() - 1) < high and high - low < 3


def test_a_file_for_onnxruntime_stands_beside_its_source(decoder, texts, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    from recipes import export

    export.main(["--model", str(decoder), "--format", "onnx", "--output", str(tmp_path / "onnx")])
    read = ["--data.path", str(texts), "--data.val_fraction", "0.3", "--output", str(tmp_path / "report")]
    compress.main(["report", "--model", str(decoder), str(tmp_path / "onnx"), *read])
    options = open_onnx(str(tmp_path / "onnx")).network.session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"  # beside what is timed
    figures = list(json.loads((tmp_path / "report" / "report.json").read_text()).values())
    assert figures[1]["nats_per_token"] == pytest.approx(figures[0]["nats_per_token"], rel=1e-4)
    assert figures[1]["bytes"] > 0 and figures[1]["token_ms"] > 0
