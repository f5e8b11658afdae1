"""Put runs or models beside each other: how good, how large, how fast, how sure, how alike, how biased.

Run:
    python recipes/compare.py runs/mine runs/mine/model-int4
    python recipes/compare.py runs/a runs/b gpt2 --data.val_path held_out/ --contrasts crows_pairs_anonymized.csv
    python recipes/compare.py runs/a runs/b --x parameters --y bits_per_byte --output runs/comparison

The first is what the others are measured against, on the same documents: an interval that holds 0 tells no difference.
"""

from pathlib import Path

from jsonargparse.typing import PositiveInt

from datamodules.held_out import Texts, documents
from lightning_modules.command_line import OneLineParser, one_line_errors


def compare(
    models: list[str],
    data: Texts,
    contrasts: Path | None = None,
    energy: bool | None = None,
    x: list[str] | str | None = None,
    y: str | None = None,
    output: str | None = None,
    max_contrasts: PositiveInt | None = None,
) -> None:
    """Judge models and print the table; with --output also write it, and a page.

    Args:
        models: Runs' folders, transformers folders, names on the Hub, or decoders for onnxruntime.
        data: Where the text is, by whose held-out part they are judged.
        contrasts: Pairs of sentences by which bias is measured: CrowS-Pairs' file, or WinoBias' folder.
        energy: Whether to measure joules. Left out: where codecarbon is installed.
        x: Of the page's pictures what costs, such as parameters, bytes, bytes_in_memory, prompt_ms, token_ms, joules.
            text_joules (of models that do not write). Several as '[bytes, token_ms]', which it is where it is left out.
        y: What is bought: bits_per_byte, a metric of the task, prefers_stereotype, and all others of compare.json.
            Left out: bits per byte, or the metric that the runs were kept by.
        output: A folder for compare.html, compare.json and compare.txt.
        max_contrasts: Measure bias by so many pairs, spread evenly.
    """
    if twice := [name for place, name in enumerate(models) if name in models[:place]]:
        raise ValueError(f"{twice[0]} is there twice; name it once")
    from datamodules import hub
    from lightning_modules import energy as meters
    from lightning_modules.compression.onnx_decoder import open_any
    from lightning_modules.evaluation.judged_table import table
    from lightning_modules.evaluation.judging import Wanted, judge, validated

    if energy and not meters.is_installed():
        raise ValueError("--energy needs codecarbon, which is not installed: pip install -e '.[energy]'")
    pairs = read_contrasts(contrasts, max_contrasts) if contrasts else []
    found = {name: open_any(name, hub.is_within_reach) for name in models}
    scored = any(one.scores_text for one in found.values())
    tasks = validated(found)
    if not tasks:  # whose metrics have names of their own
        require_figures([*axes_of(x), *([y] if y else [])])
    wanted = Wanted(predictions=scored, contrasts=pairs, energy=meters.is_wanted() if energy is None else energy)
    judged = judge(found, documents(data, "val") if scored else [], tasks, wanted)
    print(table(judged), flush=True)
    axes = chosen_axes(judged, x, y)
    if output is not None:
        write(judged, axes, Path(output))
        print(f"files  {output}: compare.html, compare.json, compare.txt")


def read_contrasts(path: Path, most: int | None) -> list:
    from datamodules.bias_rows import read_crows_pairs, read_winobias
    from datamodules.files import BadRows

    if path.is_dir():
        found = list(read_winobias(sorted(path.glob("*_stereotyped_*"))))
    elif path.is_file():
        found = list(read_crows_pairs(path, BadRows(skip=False)))
    else:
        raise FileNotFoundError(f"no such file or folder: --contrasts {path}")
    if not found:
        raise ValueError(f"--contrasts {path} has no pairs; pass CrowS-Pairs' file, or WinoBias' folder")
    count = min(most or len(found), len(found))
    return [found[place * len(found) // count] for place in range(count)]


def axes_of(x: list[str] | str | None) -> list[str]:
    return [x] if isinstance(x, str) else x or []


def require_figures(names: list[str]) -> None:
    """Raises ValueError for one that no model has, before any is judged."""
    import difflib

    from lightning_modules.evaluation.judged_table import FIGURES

    for name in names:
        if name not in FIGURES:
            near = difflib.get_close_matches(name, FIGURES, n=1)
            told = f"did you mean {near[0]}?" if near else f"figures are {', '.join(FIGURES)}"
            raise ValueError(f"{name} is no figure of a model; {told}")


def chosen_axes(judged: list, x: list[str] | str | None, y: str | None) -> list[tuple[str, str]]:
    """Raises ValueError for a figure that there is not."""
    first, all_of = judged[0], {name: one for one in reversed(judged) for name in one.figures}
    quality = y or ("bits_per_byte" if "bits_per_byte" in first.figures else first.metric)
    costs = axes_of(x) or ["bytes", "token_ms" if "token_ms" in first.figures else "prompt_ms"]
    for name in [*costs, *([quality] if quality else [])]:
        if name not in all_of:
            raise ValueError(f"{name} is a figure of none of them; they have {', '.join(all_of)}")
    return [(cost, quality) for cost in costs] if quality else []


def write(judged: list, axes: list[tuple[str, str]], folder: Path) -> None:
    import json
    import shlex
    import sys

    from lightning_modules.evaluation.judged_table import table
    from lightning_modules.pages.comparison_page import comparison_page
    from lightning_modules.redaction import redacted

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.txt").write_text(table(judged) + "\n")
    (folder / "compare.json").write_text(json.dumps({one.name: one.summary() for one in judged}, indent=2) + "\n")
    about = redacted(shlex.join(["python", *sys.argv]))
    (folder / "compare.html").write_text(comparison_page(judged, axes, about))


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("models", nargs="+", help="Runs or models; the first is the measure.")
    parser.add_function_arguments(compare, as_group=False, skip={"models"})
    options = parser.instantiate(parser.parse_args(arguments))
    with one_line_errors():
        compare(**options)


if __name__ == "__main__":
    main()
