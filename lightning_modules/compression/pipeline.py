"""A graph of steps, each of which leaves a folder; what is done is not done again."""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from lightning_modules.command_line import fail
from lightning_modules.compression.training import keep_history
from lightning_modules.model_folder import find_folder

VERBS = ("prune", "train", "quantize", "search", "export", "report")
OF_DOCUMENTS = ("data.separator", "data.max_val_documents")
SOURCE = "source"
"""What all begins with, by the name that nodes know it by."""


@dataclass(frozen=True)
class Node:
    """A step: its flags are those of the verb, by their names."""

    name: str
    verb: str
    models: tuple[str, ...]
    """Names of earlier nodes, or `source`."""
    flags: dict[str, object]


def read_nodes(file: Path) -> tuple[dict[str, object], list[Node]]:
    """What stands beside the nodes, and these in order. Raises ValueError for a graph that is none."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {file} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not isinstance(content.get("nodes"), dict) or not content["nodes"]:
        raise ValueError(f"--config {file} has no nodes; see recipes/compress_pipeline.yaml")
    nodes: list[Node] = []
    for name, settings in content.pop("nodes").items():
        name = str(name)
        if not isinstance(settings, dict):
            raise ValueError(f"{file}: {name} is no mapping; write {{verb: prune, …}}")
        settings = dict(settings)
        verb, models = settings.pop("verb", None), settings.pop("model", SOURCE)
        if verb not in VERBS:
            raise ValueError(f"{file}: {name} has the verb {verb}; pass one of {', '.join(VERBS)}")
        if verb == "train" and (inside := settings.keys() & {"parameters", "rounds"}):
            raise ValueError(f"{file}: {name} has {min(inside)}; prune in a node of its own")
        models = tuple(models) if isinstance(models, list) else (models,)
        known = [SOURCE, *(node.name for node in nodes)]
        if unknown := [model for model in models if model not in known]:
            raise ValueError(
                f"{file}: {name} is of {unknown[0]}, which comes from nowhere; pass one of {', '.join(known)}"
            )
        nodes.append(Node(name, verb, models, settings))
    return content, nodes


class Pipeline:
    """Nodes that are done one after the other.

    Args:
        recipes: The folder of the recipes.
        model: What all begins with.
        output: A folder, with one in it for each node.
        texts: Flags of the text, for the nodes that read some.
    """

    def __init__(self, recipes: Path, model: str, output: Path, texts: dict[str, object]):
        self.recipes, self.output, self.texts = recipes, output, texts
        self.made = {SOURCE: find_folder(model)}
        """By a node's name, the model that it leaves."""

    def run(self, nodes: list[Node]) -> None:
        for number, node in enumerate(nodes, 1):
            print(f"\n{number}/{len(nodes)} {node.name}: {node.verb} of {', '.join(node.models)}", flush=True)
            command, left = self.command(node)
            done = self.output / f"{node.name}.done.json"
            about = {"command": command[1:]}
            if done.is_file() and left.exists():
                if json.loads(done.read_text()) != about:
                    raise ValueError(
                        f"{done} is of another command than this node's; remove it with what follows on it, or pass "
                        "another --output"
                    )
                print(f"is done already: {left}", flush=True)
            else:
                print(shlex.join(["python", *command[1:]]), flush=True)
                if code := subprocess.run(command).returncode:
                    fail(f"{node.name} ended with {code}; the same command goes on there", code)
                if node.verb == "train":
                    before = Path(find_folder(self.made[node.models[0]]))
                    keep_history(before, left, {"verb": "train", "qat": node.flags.get("qat")})
                self.output.mkdir(parents=True, exist_ok=True)
                done.write_text(json.dumps(about, indent=2) + "\n")
            self.made[node.name] = str(left)

    def command(self, node: Node) -> tuple[list[str], Path]:
        """And what it leaves."""
        folder, models = self.output / node.name, [self.made[model] for model in node.models]
        words = [sys.executable, str(self.recipes / "compress.py"), node.verb]
        if node.verb == "export":
            words = [sys.executable, str(self.recipes / "export.py")]
        words += ["--model", *models]
        left = folder
        if node.verb == "train":
            words += [f"--trainer.default_root_dir={folder}", "--ckpt_path=last"]
            qat = node.flags.get("qat")
            left = folder / (f"model-{qat}" if qat else "model")
        else:
            words += [f"--output={folder}"]
            words += ["--overwrite"] if node.verb == "export" else []
            words += ["--overwrite=true"] if node.verb in ("prune", "quantize") else []
        left = folder / "chosen" if node.verb == "search" else left
        flags = {} if node.verb == "export" else {f"data.{name}": value for name, value in self.texts.items()}
        if node.verb == "train":  # which reads rows of text, not documents
            flags = {name: value for name, value in flags.items() if name not in OF_DOCUMENTS}
        flags |= node.flags
        return words + [f"--{name}={as_word(value)}" for name, value in flags.items() if value is not None], left


def as_word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
