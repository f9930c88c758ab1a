"""Whether public weights can be had, asked before the libraries that fetch them retry for a minute."""

from __future__ import annotations

import logging
import os
import socket
from urllib.parse import urlsplit

from freqmask.errors import UserError

_SECONDS = 5.0
_ENDPOINT = "https://huggingface.co"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def check_public(name: str, option: str) -> None:
    """Refuse early where timm's weights are neither here nor within reach.

    Args:
        name: a timm model.
        option: what the complaint calls it, such as ``model (timm:resnet50)``.

    Raises:
        UserError: timm has no weights of that name, or there is no way to them.
    """
    import timm

    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UserError(f"{option}: timm has no public weights of {name}; random:{name} begins without")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not the user's concern
    if not config.hf_hub_id or is_cached(str(config.hf_hub_id)):
        return
    check_reachable(f"{option}: the public weights of {name}")


def is_cached(repository: str) -> bool:
    """Whether the weights of a repository lie in the hub's cache on this machine."""
    from huggingface_hub import try_to_load_from_cache

    repository = repository.split("@")[0]
    return any(isinstance(try_to_load_from_cache(repository, name), str) for name in _WEIGHTS)


def check_reachable(what: str) -> None:
    """Refuse where the hub does not answer.

    Args:
        what: cannot be had then, the beginning of the sentence.

    Raises:
        UserError: offline by choice, or no connection within five seconds.
    """
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        raise UserError(f"{what} cannot be reached: HF_HUB_OFFLINE is set; unset it or use a local folder")
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return  # only the proxy knows
    address = urlsplit(os.environ.get("HF_ENDPOINT", _ENDPOINT))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"{what} cannot be reached: no connection to {address.hostname} ({error.strerror or error}); "
            "check the network, or use a local folder"
        ) from error
