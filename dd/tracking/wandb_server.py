"""Whether a Weights & Biases server answers."""

import http.client
import urllib.error
import urllib.request

__all__ = ["answers"]

SECONDS = 3.0


def answers(url: str, seconds: float = SECONDS) -> bool:
    """Whether anything at this address answers a request in time, whatever it says.

    Args:
        url: of the server.
        seconds: to wait for a connection, and for an answer.
    """
    if not url.startswith(("http://", "https://")):
        return False
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310
    try:
        urllib.request.urlopen(request, timeout=seconds).close()  # noqa: S310
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True
