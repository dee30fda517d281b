"""The demo as a WSGI application: a page, its examples, and one question at a time.

Nothing of a request is a path: pages and examples are read when the program starts, and are found
by their names and numbers. Nothing that is uploaded is kept.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from werkzeug.exceptions import (
    BadRequest,
    Forbidden,
    HTTPException,
    NotFound,
    RequestEntityTooLarge,
)
from werkzeug.routing import Map, Rule
from werkzeug.wrappers import Request, Response

from fiber_d2.colors import WordColors
from fiber_d2.demo.examples import Example
from fiber_d2.demo.limits import Limits
from fiber_d2.demo.questions import KINDS, understand
from fiber_d2.demo.turns import BusyError, GoneError, TooSlowError, Turns
from fiber_d2.demo.uploads import FORMATS, UploadError, decode, open_upload
from fiber_d2.engine.errors import message_of
from fiber_d2.predictions import Prediction
from fiber_d2.queries import Query

logger = logging.getLogger(__name__)

PAGE = {
    "": ("index.html", "text/html; charset=utf-8"),
    "demo.css": ("demo.css", "text/css; charset=utf-8"),
    "demo.js": ("demo.js", "text/javascript; charset=utf-8"),
}
# The page needs nothing from elsewhere, and may not.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
RETRY_SECONDS = 2
# Beside the picture: text, kind, and what a multipart message has around them.
_FORM_BYTES = 64 * 2**10

Ask = Callable[[Image.Image, Query], Prediction]


class WrongNameError(HTTPException):
    """This is no server of the name that was asked (Werkzeug has it since 3.1)."""

    code = 421


class DemoApp:
    """
    Args:
        ask: the model: an RGB picture and a query in, boxes out. Called from one thread, for one
            question at a time. Raises ValueError for a text that it cannot use.
        model: what the page says of the model.
        examples: pictures to begin with.
        limits: of requests.
        threshold: where the page's slider stands at first.
        hosts: names under which the demo may be reached, besides "localhost" and IP addresses.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        model: str,
        examples: Sequence[Example] = (),
        limits: Limits | None = None,
        threshold: float = 0.4,
        hosts: Collection[str] = (),
    ) -> None:
        self.ask, self.examples = ask, list(examples)
        self.limits = limits or Limits()
        self.hosts = {"localhost", *(host.lower() for host in hosts)}
        self.turns = Turns(self.limits.waiting, self.limits.timeout)
        static = files("fiber_d2.demo") / "static"
        self._page = {
            name: (static.joinpath(file).read_bytes(), kind) for name, (file, kind) in PAGE.items()
        }
        self._about = {
            "model": model,
            "threshold": threshold,
            "kinds": list(KINDS),
            "formats": list(FORMATS),
            "limits": {
                "upload_bytes": self.limits.upload_bytes,
                "pixels": self.limits.pixels,
                "characters": self.limits.characters,
                "timeout": self.limits.timeout,
            },
            "examples": [{"name": one.name, "texts": one.texts} for one in self.examples],
        }
        self._rules = Map(
            [
                *(Rule(f"/{name}", endpoint=f"page {name}", methods=["GET"]) for name in PAGE),
                Rule("/api/about", endpoint="about", methods=["GET"]),
                Rule("/api/examples/<int(max=999):number>", endpoint="example", methods=["GET"]),
                Rule("/api/predict", endpoint="predict", methods=["POST"]),
            ]
        )

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        request = Request(environ)
        request.max_content_length = self.limits.upload_bytes + _FORM_BYTES
        request.max_form_memory_size = _FORM_BYTES
        request.max_form_parts = 8
        try:
            response = self._respond(request)
        except HTTPException as error:
            response = _failure(error.description or error.name, error.code or 500)
            for name, value in error.get_headers(environ):
                if name == "Allow":
                    response.headers[name] = value
        except Exception:
            logger.exception("a request failed: %s %s", request.method, request.path)
            response = _failure("Something went wrong here; the program's log says what.", 500)
        response.headers.update(HEADERS)
        response.headers.setdefault("Cache-Control", "no-store")
        return response(environ, start_response)

    def close(self) -> None:
        self.turns.close()

    def _respond(self, request: Request) -> Response:
        self._check_host(request)
        endpoint, values = self._rules.bind_to_environ(request.environ).match()
        if endpoint == "predict":
            _check_origin(request)
            return self._predict(request)
        if endpoint == "about":
            return _json(self._about)
        if endpoint == "example":
            if values["number"] >= len(self.examples):
                raise NotFound(f"There are {len(self.examples)} examples.")
            return Response(self.examples[values["number"]].png, content_type="image/png")
        content, kind = self._page[endpoint.partition(" ")[2]]
        return Response(content, content_type=kind, headers={"Cache-Control": "no-cache"})

    def _check_host(self, request: Request) -> None:
        """Refuse names that a stranger's name server may have pointed here (DNS rebinding)."""
        try:
            host = urlsplit(f"//{request.environ.get('HTTP_HOST', '')}").hostname or ""
        except ValueError:
            host = ""
        if host not in self.hosts and not _is_address(host):
            raise WrongNameError(
                f"This demo does not answer to the name {host!r}: use its address, or start it "
                "with --allow-host NAME."
            )

    def _predict(self, request: Request) -> Response:
        begin = time.monotonic()
        data, text, kind = self._form(request)
        try:
            question = understand(text, kind)
            image = open_upload(data, max_pixels=self.limits.pixels)
        except UploadError as error:
            return _failure(str(error), error.status)
        except ValueError as error:
            return _failure(message_of(error), 422)
        seconds: dict[str, float] = {}

        def answer() -> Prediction:
            started = time.monotonic()
            seconds["waited"] = started - begin
            # Here and not before, so that only one picture's pixels are in memory.
            pixels = decode(image)
            decoded = time.monotonic()
            seconds["decoded"] = decoded - started
            found = self.ask(pixels, question.query)
            seconds["predicted"] = time.monotonic() - decoded
            return found

        is_gone = request.environ.get("waitress.client_disconnected", lambda: False)
        try:
            found = self.turns.run(answer, is_gone=is_gone)
        except UploadError as error:
            return _failure(str(error), error.status)
        except ValueError as error:
            return _failure(message_of(error), 422)
        except (BusyError, GoneError) as error:
            response = _failure(f"Busy: {error} Try again in a moment.", 503)
            response.headers["Retry-After"] = str(RETRY_SECONDS)
            return response
        except TooSlowError as error:
            return _failure(f"{error} Try a smaller picture or fewer words.", 504)
        # As in the pictures of `fiber-d2 predict`.
        colors = WordColors([found.targets]).of(found.targets)
        return _json(
            {
                **found.to_dict(),
                "kind": kind,
                "pieces": [{"text": text, "target": target} for text, target in question.pieces],
                "colors": ["#" + bytes(colors[words]).hex() for words in found.targets],
                "seconds": seconds,
            }
        )

    def _form(self, request: Request) -> tuple[bytes, str, str]:
        """The picture's file, the text and the kind of question."""
        limits = self.limits
        too_large = f"The file is larger than {limits.upload_bytes / 2**20:g} MB, the limit here."
        try:
            file, form = request.files.get("image"), request.form
        except RequestEntityTooLarge:
            raise RequestEntityTooLarge(too_large) from None
        if file is None or "text" not in form:
            raise BadRequest(
                "A question is a multipart/form-data message with a file `image`, a `text`, and a "
                f"`kind` ({', '.join(KINDS)}; {KINDS[0]} where there is none)."
            )
        data = file.read(limits.upload_bytes + 1)
        if len(data) > limits.upload_bytes:
            raise RequestEntityTooLarge(too_large)
        text = form["text"]
        if len(text) > limits.characters:
            raise RequestEntityTooLarge(
                f"The text has {len(text)} characters, and {limits.characters} are the limit."
            )
        return data, text, form.get("kind", KINDS[0])


def _check_origin(request: Request) -> None:
    """Refuse what a page from elsewhere sends through a visitor's browser."""
    origin = request.headers.get("Origin")
    site = request.headers.get("Sec-Fetch-Site", "same-origin")
    host = request.environ.get("HTTP_HOST", "").lower()
    own = origin is None or origin.lower() in (f"http://{host}", f"https://{host}")
    if not own or site not in ("same-origin", "none"):
        raise Forbidden("This was sent by a page from elsewhere, which may not use the demo.")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _json(value: Mapping[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(value), status=status, content_type="application/json")


def _failure(message: str, status: int) -> Response:
    return _json({"error": message}, status)
