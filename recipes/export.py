"""Write a trained model as a file that other runtimes read, and check that it still answers alike.

Run:
    python recipes/export.py --model runs/mine --format onnx
    python recipes/export.py --model NAME --format gguf --gguf_type Q8_0 --output model.gguf
    python recipes/export.py --model gpt2 --format hf --dtype bfloat16 --output gpt2-bf16 --prompt "The sea" --json

hf is a transformers folder, safetensors its weights alone, onnx and onnx-int8 are for onnxruntime, pt2 for torch alone,
pte for ExecuTorch, gguf for llama.cpp. The export is opened by its own runtime and asked what its source is asked.
Exit code 1: it answers otherwise, and is kept as PATH.rejected. Which format for what: docs/export.md.
"""

import json as json_format
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse.typing import PositiveFloat

from lightning_modules.command_line import OneLineParser, one_line_errors
from lightning_modules.exports import formats

if TYPE_CHECKING:
    from lightning_modules.exports.parity import Parity


def export(
    prompt: list[str],
    model: str,
    format: formats.Name,
    output: str | None = None,
    overwrite: bool = False,
    dtype: formats.DType | None = None,
    gguf_type: formats.GGUFType = "F16",
    shard_size: str = "5GB",
    tolerance: PositiveFloat | None = None,
    json: bool = False,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> bool:
    """Export a model, compare the export with its source, and print what was found. Returns whether they agree.

    Args:
        prompt: Texts to compare on; left out: a few lines of prose and code.
        model: A run's folder, a transformers folder, or a name on the Hub.
        format: What to write.
        output: File or folder to write; left out: beside the model's folder, named after it and the format.
        overwrite: Replace what is there.
        dtype: Precision of the weights of hf and safetensors; left out: as they were saved.
        gguf_type: Precision of the matrices of gguf.
        shard_size: Largest file of hf.
        tolerance: The largest difference of a logit that passes, or the largest mean KL in nats where weights are
            rounded; left out: 0.001, or 0.01 (bfloat16, float16, F16, Q8_0), 0.05 (onnx-int8), 0.3 (Q4_0).
        json: Print one JSON object.
        tokenizer: Folder or Hub name of a tokenizer, where the model's folder holds none.
        trust_remote_code: Run the code that the model's folder brings along.
    """
    if dtype and format not in ("hf", "safetensors"):
        raise ValueError(f"--dtype is for hf and safetensors; {format} is float32 (gguf: --gguf_type), leave it out")
    formats.require_packages(format)
    if output is not None:
        formats.require_place(Path(output).expanduser(), format, None, overwrite)
    from datamodules import hub
    from lightning_modules.exports.convert import Settings, convert
    from lightning_modules.exports.parity import PROMPTS, batches_of, compare
    from lightning_modules.model_folder import find_folder, load_with_head

    folder = find_folder(model)
    rounded_to = gguf_type if format == "gguf" else dtype
    path = formats.beside(folder, format, rounded_to) if output is None else Path(output).expanduser()
    formats.require_place(path, format, Path(folder).expanduser(), overwrite)
    settings = Settings(format, dtype, gguf_type, shard_size)
    precision = "auto" if format in ("hf", "safetensors") and dtype is None else "float32"
    loaded = load_with_head(model, tokenizer, "cpu", precision, trust_remote_code, hub.is_within_reach)
    batches = batches_of(loaded, prompt or list(PROMPTS), settings.most_tokens, settings.rows)
    with formats.written_whole(path) as partial:
        written_back = convert(loaded, settings, partial)
        parity = compare(loaded, *written_back, batches, settings.tolerance(tolerance))
        written = path if parity.holds else path.with_name(f"{path.name}.rejected")
        formats.put_in_place(partial, written)
    report(parity, formats.weights_in(Path(folder).expanduser()), written, format, as_json=json)
    return parity.holds


def report(parity: "Parity", source_bytes: int | None, written: Path, format: str, as_json: bool) -> None:
    size = formats.weights_in(written)
    if as_json:
        found = asdict(parity) | {"source_bytes": source_bytes, "export_bytes": size, "format": format}
        print(json_format.dumps(found | {"written": str(written)}))
        return
    rows = [("", "source", "export", "")]
    if source_bytes:
        rows.append(("size", f"{source_bytes:,} B", f"{size:,} B", f"{size / source_bytes:.2f}×"))
    for name, (source, export) in parity.seconds.items():
        what = f"{name}, {parity.prompt_tokens} tokens" if name == "prompt" else name
        rows.append((what, f"{source * 1000:.2f} ms", f"{export * 1000:.2f} ms", f"{export / source:.2f}×"))
    for what, source, export, ratio in rows:
        print(f"{what:<24}{source:>16}{export:>16}{ratio:>8}".rstrip())
    by_logits = parity.tolerance.measure == "logits"
    most = f"  at most {parity.tolerance.most:g}"
    print(f"{'max logit difference':<24}{parity.max_logit_difference:>16.2e}{most if by_logits else ''}")
    print(f"{'KL, nats a place':<24}{parity.kl:>16.2e}{'' if by_logits else most}")
    ties = f", {parity.ties} ties" if parity.ties else ""
    print(f"{'same most probable':<24}{parity.same_top:>15.1%}   of {parity.places} places{ties}")
    if parity.greedy_tokens:
        print(f"{'written greedily':<24}{parity.greedy_same:>16} of {parity.greedy_tokens} tokens as transformers does")
    if not parity.same_ids:
        print(f"{'tokenizer':<24}{'other ids':>16}")
    print(f"{'parity':<24}{'holds' if parity.holds else 'FAILS':>16}")
    print(f"{'written':<24}{written}")


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--prompt", nargs="+", default=[], help="Texts to compare on; left out: prose and code.")
    parser.add_function_arguments(export, as_group=False, skip={"prompt", "json", "overwrite"})
    parser.add_argument("--overwrite", action="store_true", help="Replace what is there.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    options = parser.parse_args(arguments)
    with one_line_errors():
        holds = export(**options)
    if not holds:
        sys.exit(1)


if __name__ == "__main__":
    main()
