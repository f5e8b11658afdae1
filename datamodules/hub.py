"""Whether the Hugging Face Hub can be reached, asked once in place of a minute of retries."""

import socket
import urllib.request
from functools import cache
from urllib.parse import urlsplit


@cache
def is_within_reach() -> bool:
    """Whether a connection to the Hub opens within five seconds; behind a proxy it is taken to."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT)
    if urllib.request.getproxies().get(address.scheme):
        return True
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=5).close()
    except OSError:
        return False
    return True


def look_only_here_where_it_is_out_of_reach() -> None:
    """Libraries then look into their caches at once, and do not retry for half a minute."""
    from huggingface_hub import constants

    if not is_within_reach():
        constants.HF_HUB_OFFLINE = True
