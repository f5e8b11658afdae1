"""Secrets stay out of what a run writes: config.yaml, the model card, W&B, error messages."""

import os
import re

HIDDEN = "<hidden>"
_NAME = (
    r"(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!mask_)(?<!sep_)(?<!cls_)token|secret|passw(?:or)?d|credentials?|\w*_?key"
)
_ENVIRONMENT = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|KEY", re.IGNORECASE)
_SHORTEST = 8
_PATTERNS = (
    # https://user:password@host
    (re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"), HIDDEN),
    # --api_key value, hub_token=value, "access_key": "value"
    (
        re.compile(rf"((?:\b|_)(?:{_NAME})[\"']?(?:\s*[:=]\s*|\s+)[\"']?)[^\s\"',}}]{{{_SHORTEST},}}", re.I),
        rf"\1{HIDDEN}",
    ),
    # Hugging Face, OpenAI, GitHub, Slack, AWS
    (re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|xox[abprs]-|AKIA)[\w-]{12,}"), HIDDEN),
)


def redacted(text: str) -> str:
    """The text without passwords in URLs, what stands behind a secret's name, what has a token's well-known form, and
    the values of environment variables that are named like secrets."""
    for name, value in os.environ.items():
        if _ENVIRONMENT.search(name) and len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
