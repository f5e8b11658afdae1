"""Continue a text, token by token, with any causal or encoder-decoder model.

Run:
    python recipes/generate.py --model runs/pretrain-DATE --prompt "def " --max_new_tokens 64
    python recipes/generate.py --model gpt2 --prompt "The sea" "The moon" --temperature 0.7 --top_p 0.9 --seed 1
    python recipes/generate.py --model DIR --num_beams 4 < prompt.txt

The text goes to stdout; notes, speed and the seed go to stderr.
"""

import random
import sys
import time
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from lightning_modules.command_line import OneLineParser, one_line_errors

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from lightning_modules.model_folder import LoadedModel


class Printer:
    """Prints a text as its tokens arrive. `generate` calls `put` and `end`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt_ids: list[int]):
        self.tokenizer = tokenizer
        self.ids = list(prompt_ids)
        # Some tokenizers decode a token differently at the start of a text: the tokens from `anchor` are decoded with
        # every new one, and what is beyond the text of those up to `printed` is new.
        self.anchor = max(0, len(self.ids) - 8)
        self.printed = len(self.ids)
        self.seen_prompt = False

    def put(self, tokens) -> None:
        if not self.seen_prompt:
            self.seen_prompt = True
            return
        self.ids += tokens.tolist()
        self.write(hold_back=True)

    def end(self) -> None:
        self.write(hold_back=False)
        print(flush=True)

    def write(self, hold_back: bool) -> None:
        before = self.decode(self.ids[self.anchor : self.printed])
        text = self.decode(self.ids[self.anchor :])
        if hold_back and text.endswith("\N{REPLACEMENT CHARACTER}"):
            return  # the rest of the character is still to come
        print(text[len(before) :], end="", flush=True)
        self.anchor, self.printed = max(self.anchor, self.printed - 8), len(self.ids)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def read_prompts(prompts: list[str]) -> list[str]:
    """The prompts given; where there are none, what is piped in, as one prompt without its last line end."""
    if not prompts:
        if sys.stdin.isatty():
            raise ValueError('no prompt; pass --prompt "def ", or pipe a text in')
        prompts = [sys.stdin.read().removesuffix("\n")]
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ValueError(f"the prompt {prompt!r} is not UTF-8; convert it (iconv -t UTF-8)")
    return prompts


def encode(loaded: "LoadedModel", prompt: str) -> list[int]:
    """The prompt as the model saw its texts begin; what ends a text is left off where the model goes on writing."""
    tokenizer = loaded.tokenizer
    ids = tokenizer(prompt)["input_ids"]
    if loaded.kind == "causal":
        plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        while len(ids) > len(plain) and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
            ids.pop()
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = ids or [start]
    if ids in ([], [None]):
        raise ValueError(f"the prompt {prompt!r} has no tokens, and the tokenizer has none to begin a text; write more")
    known = loaded.model.get_input_embeddings().num_embeddings
    if max(ids) >= known:
        raise ValueError(f"the tokenizer gives id {max(ids)}, the model knows {known} ids; pass its own by --tokenizer")
    return ids


def room_for(loaded: "LoadedModel", ids: list[int], max_new_tokens: int) -> int:
    """How many new tokens the model's positions allow, with a note where that is fewer than asked for."""
    limit = loaded.max_positions
    if limit is None:
        return max_new_tokens
    if len(ids) > limit or (loaded.kind == "causal" and len(ids) == limit):
        raise ValueError(f"the prompt has {len(ids)} tokens, and {loaded.folder} {limit} positions; shorten it")
    # The last new token is never read, so it needs no position.
    room = limit - len(ids) + 1 if loaded.kind == "causal" else limit
    if room < max_new_tokens:
        print(f"note: stops after {room} new tokens: the model has {limit} positions", file=sys.stderr)
    return min(room, max_new_tokens)


def generate(
    prompt: list[str],
    model: str,
    max_new_tokens: PositiveInt = 64,
    temperature: NonNegativeFloat = 0.8,
    top_k: NonNegativeInt = 0,
    top_p: float = 1.0,
    num_beams: PositiveInt = 1,
    seed: int | None = None,
    tokenizer: str | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Continue each prompt and print it.

    Args:
        prompt: One text or several; left out: standard input.
        model: A run's folder, a transformers folder, or a name on the Hub.
        max_new_tokens: Tokens to write at most; less where the model ends the text or has no more positions.
        temperature: Below 1 prefers the probable tokens, 0 takes the most probable one.
        top_k: Sample among the so many most probable tokens; 0: among all.
        top_p: Sample among the most probable tokens that together have this probability.
        num_beams: Above 1: beam search instead of sampling, printed when it is done.
        seed: The same seed writes the same text; left out: another text each time, its seed printed.
        tokenizer: Folder or Hub name of a tokenizer, where the model's folder holds none.
        device: Where to compute.
        dtype: Precision of the weights; auto: as they were saved.
        trust_remote_code: Run the code that the model's folder brings along.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"--top_p {top_p}: it must lie above 0 and not above 1")
    prompts = read_prompts(prompt)
    from datamodules import hub
    from lightning_modules.model_folder import load

    loaded = load(model, tokenizer, device, dtype, trust_remote_code, hub.is_within_reach)
    if loaded.kind == "masked":
        raise ValueError(f"{loaded.folder} is a masked language model, which fills gaps and does not continue a text")
    from transformers import GenerationConfig

    model_ends = loaded.model.generation_config.eos_token_id
    seed = random.randrange(2**31) if seed is None else seed
    for number, text in enumerate(prompts):
        ids = encode(loaded, text)
        settings = GenerationConfig(
            max_new_tokens=room_for(loaded, ids, max_new_tokens),
            num_beams=num_beams,
            do_sample=temperature > 0 and num_beams == 1,
            temperature=temperature or 1.0,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=loaded.tokenizer.eos_token_id if model_ends is None else model_ends,
            pad_token_id=loaded.tokenizer.pad_token_id or 0,
        )
        if number:
            print()
        if loaded.kind == "causal":
            print(text, end="", flush=True)
        tokens, seconds = write(loaded, ids, settings, seed)
        print(f"[{tokens} tokens, {tokens / seconds:.0f} tokens/s, seed {seed}]", file=sys.stderr)


def write(loaded: "LoadedModel", ids: list[int], settings: "GenerationConfig", seed: int) -> tuple[int, float]:
    """Prints the continuation of `ids`; returns how many tokens it has and the seconds they took."""
    import torch

    torch.manual_seed(seed)
    printer = Printer(loaded.tokenizer, ids if loaded.kind == "causal" else [])
    inputs = torch.tensor([ids], device=loaded.model.device)
    begin = time.perf_counter()
    with torch.inference_mode():
        (sequence,) = loaded.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=settings,
            streamer=printer if settings.num_beams == 1 else None,
        )
    new = sequence[len(ids) if loaded.kind == "causal" else 1 :].cpu()
    if settings.num_beams > 1:
        printer.put(inputs)
        printer.put(new)
        printer.end()
    return len(new), time.perf_counter() - begin


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--prompt", nargs="+", default=[], help="One text or several; left out: standard input.")
    parser.add_function_arguments(generate, as_group=False, skip={"prompt"})
    options = parser.parse_args(arguments)
    try:
        with one_line_errors():
            generate(**options)
    except KeyboardInterrupt:
        print()
        sys.exit(130)


if __name__ == "__main__":
    main()
