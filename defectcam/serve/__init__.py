"""The function over HTTP without Nuclio, and a page to try it out: `defectcam serve`.

In: a module with `init_context(context)` and `handler(context, event)`, such as `defectcam.function`.
Out: a Starlette app that keeps to what Nuclio's processor and its Python wrapper do with such a module: the
same Context, Event and Response objects, the same reading of bodies, limits, queue and error answers. One
worker, as in function.yaml: each event waits for its turn. What differs: no eventTimeout ends a handler that
hangs, and a bare list is answered as JSON (with a warning) where Nuclio takes it for a batch of answers. Browsers are
led to the page, see `defectcam.serve.tryout`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import logging
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import nuclio_sdk
import nuclio_sdk.logger
import uvicorn
from nuclio_sdk.event import EventDeserializerKinds
from nuclio_sdk.json_encoder import Encoder
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from defectcam import function
from defectcam.request import MAX_BODY_BYTES
from defectcam.serve.tryout import Tryout
from defectcam.settings import RequestError, variables_help
from defectcam.weights import WeightsError

QUEUE_SECONDS = 110.0  # of function.yaml, which gives the reasons; a test holds the two together
PAGE = "/tryout"  # the path of the try-out page
LAST_ANSWER_S = 8  # for the answers under way when the command is stopped: Docker kills after 10 s

EXAMPLE = """example:
  defectcam serve --port 8080 --log-dir out/tryout &     # then open http://127.0.0.1:8080/ in a browser
  printf '{"image": "%s"}' "$(base64 -w0 photo.jpg)" > request.json
  curl -H 'Content-Type: application/json' --data-binary @request.json http://127.0.0.1:8080/
"""


def create_app(
    module: ModuleType, max_body_bytes: int = MAX_BODY_BYTES, queue_seconds: float = QUEUE_SECONDS
) -> Starlette:
    """Run the module's `init_context` and return the app that passes every request on to its `handler`.

    Args:
        module: with `handler(context, event)` and, if it needs one, `init_context(context)`.
        max_body_bytes: a longer body is answered with 400, the handler never sees it.
        queue_seconds: how long a request waits for the worker before it is answered with 503.

    Raises:
        Exception: whatever `init_context` raises.
    """
    worker = _Worker(module, max_body_bytes, queue_seconds)
    routes = [Route("/{path:path}", worker)]
    if model := getattr(worker.context.user_data, "model", None):  # other handlers have no page
        routes.insert(0, Mount(PAGE, Tryout(model, worker.run).app()))
        worker.has_page = True
    return Starlette(routes=routes)


def run(host: str = "127.0.0.1", port: int = 8080) -> None:
    """Serve the function until interrupted, then end this process within LAST_ANSWER_S."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # PyTorch reads it when it is loaded; see function.yaml
    try:
        app = create_app(function)
    except (RequestError, WeightsError) as error:
        sys.exit(str(error))
    uvicorn.run(app, host=host, port=port, http="h11", ws="none", timeout_graceful_shutdown=LAST_ANSWER_S)
    os._exit(0)  # Python would wait for the worker's thread


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam serve`."""
    parser = argparse.ArgumentParser(
        prog="defectcam serve",
        description="Serve the function over HTTP as Nuclio would, without Nuclio. In a browser, the same address shows a page "
        "to try it out on your own photos. Photos stay on this machine.",
        epilog=f"{EXAMPLE}\n{variables_help(['ADVCAM_DB'])}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", default=8080, type=int, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--log-dir", type=Path, help="folder for photos reviewed on the page and for all answers (default: $ADVCAM_LOG_DIR)"
    )
    args = parser.parse_args(argv)
    if args.log_dir:
        os.environ["ADVCAM_LOG_DIR"] = str(args.log_dir)
    run(args.host, args.port)


class _Worker:
    """An ASGI app around one context: Nuclio's HTTP trigger, worker and Python wrapper in one."""

    def __init__(self, module: ModuleType, max_body_bytes: int, queue_seconds: float) -> None:
        self.handler = module.handler
        self.max_body_bytes = max_body_bytes
        self.queue_seconds = queue_seconds
        self.has_page = False
        self.turn = asyncio.Lock()
        self.trigger = nuclio_sdk.TriggerInfo("http", "myHttpTrigger")
        logger = nuclio_sdk.Logger(logging.DEBUG)
        logger.set_handler("default", sys.stderr, nuclio_sdk.logger.HumanReadableFormatter())
        self.context = nuclio_sdk.Context(logger, nuclio_sdk.Platform("local"), "0", self.trigger)
        # One thread for all calls: what init_context sets for its thread (torch does) holds for the handler.
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nuclio-worker")
        if hasattr(module, "init_context"):
            self.thread.submit(module.init_context, self.context).result()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        is_browser = request.method == "GET" and scope["path"] in ("/", PAGE) and "text/html" in request.headers.get("accept", "")
        response = RedirectResponse(f"{PAGE}/") if self.has_page and is_browser else await self._respond(request)
        await response(scope, receive, send)

    async def run(self, work: Callable, *arguments: object) -> object:
        """What `work` returns, called in the worker's thread when it is its turn."""
        async with self.turn:
            return await asyncio.get_running_loop().run_in_executor(self.thread, work, *arguments)

    async def _respond(self, request: Request) -> Response:
        try:
            body = await _read_body(request, self.max_body_bytes)
        except ClientDisconnect:
            body = None  # the client has gone
        if body is None:
            return Response("Error when parsing request", 400, media_type="text/plain")
        arrival = time.time()  # as on the processor: the body is here, the queue comes after
        try:
            async with asyncio.timeout(self.queue_seconds):
                await self.turn.acquire()
        except TimeoutError:
            return Response(status_code=503)
        try:  # also for a caller who has gone meanwhile: the processor does not notice that either
            return await asyncio.get_running_loop().run_in_executor(self.thread, self._handle, request, body, arrival)
        finally:
            self.turn.release()

    def _handle(self, request: Request, body: bytes, arrival: float) -> Response:
        encode = Encoder().encode
        try:
            output = self.handler(self.context, _to_event(request, body, arrival, self.trigger))
            if isinstance(output, list):
                self.context.logger.warn("a bare list was returned: Nuclio takes it for a batch of answers")
            answer = nuclio_sdk.Response.from_entrypoint_output(encode, output)
        except Exception as error:
            text = f'Exception caught in handler - "{error}": {traceback.format_exc()}'
            self.context.logger.error(text)
            answer = nuclio_sdk.Response.from_entrypoint_output(encode, (500, text))
        return _to_http(answer)


async def _read_body(request: Request, limit: int) -> bytes | None:
    """The body, or None once it is known to be over the limit (uvicorn drops what still comes)."""
    if int(request.headers.get("content-length", 0)) > limit:
        return None
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            return None
    return bytes(body)


def _to_event(request: Request, body: bytes, arrival: float, trigger: nuclio_sdk.TriggerInfo) -> nuclio_sdk.Event:
    """The request as the wrapper gets it from the processor, by the SDK's own rule for JSON bodies."""
    message = {
        "body": body,
        "content_type": request.headers.get("content-type", ""),
        "fields": dict(request.query_params),
        "headers": {name.title(): value for name, value in request.headers.items()},
        "id": str(uuid.uuid4()),
        "method": request.method,
        "num_shards": 0,
        "path": request.scope["path"],
        "shard_id": -1,
        "size": len(body),
        "timestamp": arrival,
        "trigger": {"kind": trigger.kind, "name": trigger.name},
        "type": "",
        "type_version": "",
        "url": "",
        "version": "",
    }
    return nuclio_sdk.Event.deserialize(message, kind=EventDeserializerKinds.msgpack)


def _to_http(answer: dict) -> Response:
    """The wrapper's answer as the processor sends it; its content type comes before one among its headers."""
    body = answer["body"].encode()
    if answer["body_encoding"] == "base64":
        body = base64.b64decode(body)
    headers = {name.lower(): str(value) for name, value in answer["headers"].items()}
    headers["content-type"] = answer["content_type"]
    return Response(body, answer["status_code"], headers)

