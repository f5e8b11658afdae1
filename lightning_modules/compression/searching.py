"""The steps of a search: the ordered model, its super-network, the points that are tried and those that are written."""

import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from lightning_modules.compression import architecture_search as tried
from lightning_modules.compression import opened as folders
from lightning_modules.compression import sizes as dimensions
from lightning_modules.compression.calibration import calibration_batches
from lightning_modules.compression.reordering import reorder
from lightning_modules.compression.structured import worth_of
from lightning_modules.compression.super_network import Space, space_of

MODULES = {
    AutoModelForCausalLM: "CausalSuperNetwork",
    AutoModelForMaskedLM: "MaskedSuperNetwork",
    AutoModelForSeq2SeqLM: "DenoisingSuperNetwork",
}

SECONDS_BETWEEN = 20
"""Of two lines of progress."""


def parsed_target(words: str) -> dict[str, float]:
    """latency=0.5,parameters=0.6. Raises ValueError for anything else."""
    found = {}
    for word in words.split(","):
        name, _, value = word.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1.0
        if name not in ("latency", "parameters") or not 0 < found[name] <= 1:
            raise ValueError(f"--target {word}: pass latency=0.5 or parameters=0.5, shares of the whole model")
    return found


def write_ordered(source: folders.Opened, folder: Path, texts: list[str], rows: int, shares: tuple[float, ...]) -> None:
    """The model with what matters most first, and which sizes of it there are."""
    folders.require_dense(source)
    if source.auto_class not in MODULES:
        raise ValueError(f"--model {source.folder} says labels; a search is for language models")
    if not shares or not all(0 < share <= 1 for share in shares) or max(shares) < 1:
        raise ValueError(f"--shares {list(shares)}: pass shares up to 1, and 1 among them")
    network = source.network
    dimensions.smaller_config(network, dimensions.Sizes(), list(range(dimensions.sizes_of(network.config).layers)))
    dimensions.require_parts(network.config)
    batches = calibration_batches(network, source.tokenizer, texts, rows)
    depth = dimensions.sizes_of(network.config).layers
    worth = worth_of(network, batches, max(1, round(depth * min(shares))))
    reorder(network, worth.orders)
    space = space_of(network.config, tuple(sorted(shares, reverse=True)), worth.layers_least_first)
    with folders.written_whole(folder, source, {"verb": "reorder"}) as temporary:
        network.to(source.stored).save_pretrained(temporary)
        space.save(temporary)


def command(recipes: Path, folder: Path, rest: list[str]) -> list[str]:
    """Of the training of the super-network."""
    ordered = str(folder / "ordered")
    auto_class = folders.auto_class_of(ordered, dimensions.config_of(ordered))
    given = {word.partition("=")[0] for word in rest}
    words = [sys.executable, str(recipes / "distill.py"), "fit"]
    if not given & {"--config", "-c"}:
        words += ["--config", str(recipes / "distill_compressed.yaml")]
    words += [f"--model=lightning_modules.compression.super_network.{MODULES[auto_class]}"]
    words += [f"--model.student={ordered}"]
    if "--model.teacher" not in given:
        words += [f"--model.teacher={folders.done_so_far(ordered)['source']}"]
    words += ["--comparison.control=false", f"--trainer.default_root_dir={folder / 'super'}", "--ckpt_path=last"]
    return words + rest


def measured(folder: Path, documents: list[str], rows: int) -> tried.Trials:
    """What measures sizes of the trained super-network on held-out text."""
    trained = folders.open_model(str(folder / "super"))
    batches = calibration_batches(trained.network, trained.tokenizer, documents, rows)
    space, mask_id = Space.read(folder / "ordered"), trained.tokenizer.mask_token_id
    return tried.Trials(trained.network, space, trained.auto_class, batches, mask_id, Told())


class Told:
    """Says now and then how many sizes were measured, chance's and those that shrink alike too."""

    def __init__(self):
        self._start = self._last = time.monotonic()

    def __call__(self, count: int) -> None:
        if (now := time.monotonic()) - self._last >= SECONDS_BETWEEN:
            self._last = now
            print(f"measured  {count} sizes in {now - self._start:.0f} s", flush=True)


@dataclass(frozen=True)
class Findings:
    """What a search ends with: all points, the front, and the sizes that all shrink alike."""

    points: list[tried.Point]
    best: list[tried.Point]
    uniform: list[tried.Point]

    def beaten(self, costs: tuple[str, ...] = tried.COSTS) -> list[tried.Point]:
        return [point for point in self.uniform if any(other.dominates(point, costs) for other in self.best)]


def findings(trials: tried.Trials, points: list[tried.Point]) -> Findings:
    """With the latency of the front and of the sizes that shrink alike measured once more, by more turns."""
    uniform = [trials.timed_again(trials(sizes)) for sizes in tried.uniform(trials.space)]
    best: list[tried.Point] = []
    while (now := tried.front([trials.found[point.sizes] for point in points])) != best:
        best = now
        for point in best:  # of which some may then be none of the front
            trials.timed_again(point)
    return Findings([trials.found[point.sizes] for point in points], best, uniform)


def tell(trials: tried.Trials, found: Findings, budget: int) -> None:
    """The front, and what other ways to choose would have found."""
    space, points = trials.space, found.points
    print(
        f"tried  {len(points)} of {len(space.all())} sizes; none is better in loss, parameters and latency than these:"
    )
    print("\n".join(tried.rows(found.best)))
    counts = [len(found.beaten(costs)) for costs in (("nats", "parameters"), ("nats", "latency"), tried.COSTS)]
    print(
        f"\nall dimensions alike: of {len(found.uniform)} another is better in loss and parameters than {counts[0]}, "
        f"in loss and latency than {counts[1]}, in all three than {counts[2]}"
    )
    print("\n".join(tried.rows(found.uniform)))
    drawn = [trials(sizes) for sizes in tried.at_random(space, min(budget, len(points)), seed=1)]
    worst = max(p.nats for p in [*points, *drawn]), max(p.latency for p in [*points, *drawn])
    volumes = [tried.hypervolume(some, worst) for some in (points, drawn)]
    if volumes[0]:
        print(f"\nas many at random: {volumes[1] / volumes[0]:.3f} of the volume under the front of loss and latency")


def write_points(trials: tried.Trials, points: list[tried.Point], folder: Path) -> dict[tried.Point, Path]:
    """A folder for each, as it was measured."""
    source = folders.open_model(str(folder.parent / "super"))
    names = {}
    for point in points:
        s = point.sizes
        names[point] = folder / f"{s.layers}x{s.width}x{s.inner}x{s.heads}"
        source.network = trials.part(s).cut_out()
        step = {"verb": "search", "sizes": vars(s), "nats": point.nats}
        with folders.written_whole(names[point], source, step) as temporary:
            source.network.to(source.stored).save_pretrained(temporary)
    return names


def write_chosen(names: dict[tried.Point, Path], target: dict[str, float], folder: Path) -> None:
    """Once more the one that is chosen for the target."""
    found = tried.chosen(list(names), target)
    told = ", ".join(f"{name} ≤ {value:g}" for name, value in target.items())
    if found is None:
        print(f"\nfiles  {folder / 'points'}\nnone of the sizes has {told}; pass smaller --shares, or another --target")
        return
    shutil.rmtree(folder / "chosen", ignore_errors=True)
    shutil.copytree(names[found], folder / "chosen")
    print(f"\n{told}: {found.nats:.4f} nats a token, parameters {found.parameters:.3f}, latency {found.latency:.2f}")
    print(f"files  {folder / 'points'}, {folder / 'uniform'}, {folder / 'chosen'}")
    print(f"next   python recipes/compress.py train --model {shlex.quote(str(folder / 'chosen'))}")
