"""Secrets stay out of what a run writes: config.yaml, the model card, W&B, error messages."""

import os
import re

HIDDEN = "<hidden>"
_NAME = (
    r"(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!mask_)(?<!sep_)(?<!cls_)token|secret|passw(?:or)?d|credentials?|\w*_?key"
)
_ENVIRONMENT = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|KEY", re.IGNORECASE)
_SHORTEST = 8
_VALUE = rf"[^\s\"',}}]{{{_SHORTEST},}}"
_PROSE = (
    # https://user:password@host, https://token@host
    (re.compile(rf"(?<=://)(?:[^/\s:@]+:[^\s@]+|[^/\s:@]{{{_SHORTEST},}})(?=@)"), HIDDEN),
    # https://host/path?X-Amz-Signature=value
    (re.compile(rf"([?&](?:X-Amz-[\w-]+|sig|signature|(?:\w+_)?(?:{_NAME}))=)[^&\s\"']+", re.I), rf"\1{HIDDEN}"),
    # Authorization: Bearer value
    (re.compile(rf"(\bBearer[ \t]+){_VALUE}"), rf"\1{HIDDEN}"),
    # --api_key value, API_KEY=value
    (re.compile(rf"(--[\w.-]*(?:{_NAME})(?:[ \t]+|=)[\"']?){_VALUE}", re.I), rf"\1{HIDDEN}"),
    (re.compile(rf"(\b(?:[A-Z]+_)*(?:TOKEN|SECRET|PASSWORD|KEY)=[\"']?){_VALUE}"), rf"\1{HIDDEN}"),
    # Hugging Face, OpenAI, GitHub, Slack, AWS
    (re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|xox[abprs]-|AKIA)[\w-]{12,}"), HIDDEN),
)
# hub_token=value, "access_key": "value"
_SETTING = (re.compile(rf"((?:\b|_)(?:{_NAME})[\"']?[ \t]*[:=][ \t]*[\"']?){_VALUE}", re.I), rf"\1{HIDDEN}")


def redacted(text: str) -> str:
    """Settings, commands and messages without what `redacted_prose` hides and what is set to a secret's name."""
    pattern, replacement = _SETTING
    return pattern.sub(replacement, redacted_prose(text))


def redacted_prose(text: str) -> str:
    """A text without passwords in URLs, what a flag gives to a secret's name, what has a token's well-known form, and
    the values of environment variables that are named like secrets; a "key: function" of ordinary prose stays."""
    for name, value in os.environ.items():
        if _ENVIRONMENT.search(name) and len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    for pattern, replacement in _PROSE:
        text = pattern.sub(replacement, text)
    return text
