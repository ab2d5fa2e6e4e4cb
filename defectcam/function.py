"""The Nuclio function: `init_context` once per worker, `handler` per request. Envelope in, JSON out."""

import json
import os
import signal
import threading
import traceback
from datetime import datetime, timezone

import nuclio_sdk.event

from defectcam.handler import ModelHandler
from defectcam.interactor import to_json
from defectcam.memory import limit_memory
from defectcam.request import parse_request
from defectcam.settings import RequestError

LONGEST_WAIT_S = 3600  # no queue is longer: a time of arrival before that is a clock's mistake
# For the answer under way when the container is stopped. Nuclio's processor takes 5 s more, and Docker kills after 10 s.
LAST_ANSWER_S = 4


def init_context(context):
    """Verify and load the weights; an error here stops the start and says which file and why."""
    context.user_data.model = ModelHandler.from_env(os.environ, context.logger)
    # Nuclio's wrapper would parse JSON by itself, before anything can be refused: 100 MB of "[]," become 2 GB of lists.
    # A version of it that does so in another way goes on doing it.
    deserializer = getattr(nuclio_sdk.event, "_EventDeserializer", None)
    if hasattr(deserializer, "_try_deserialize_json"):
        deserializer._try_deserialize_json = staticmethod(lambda body: body)
    else:
        context.logger.warn("this nuclio_sdk parses JSON before the function can refuse it: large requests need memory")
    if context.user_data.model.device == "cpu":  # CUDA reserves far more than it uses
        limit_memory()
    # Called between two answers. At once, since no library's thread may hold the end up.
    context.platform.set_termination_callback(lambda: os._exit(0))
    context.logger.info(f"ready: {json.dumps(context.user_data.model.describe())}")


def handler(context, event):
    """GET: what runs here. POST: the proposals for the image in the body, or with `pos_points` the outline that was
    clicked, as CVAT wants them."""
    _end_in_time()
    model = context.user_data.model
    # Some versions of Nuclio's wrapper hand over bytes, and other triggers than HTTP have no method.
    method = event.method.decode() if isinstance(event.method, bytes) else event.method or "POST"
    if method in ("GET", "HEAD"):
        return _response(context, 200, model.describe())
    if method != "POST":
        error = f"method is {method}, but must be GET or POST"
        return _response(context, 405, {"error": error}, headers={"Allow": "GET, HEAD, POST"})
    request = None
    try:
        request = parse_request(event.body, model.settings, model.defects)
        event.body = None  # the photo in base64: Nuclio's wrapper holds on to the event
        answer = model.answer(request, waited_s(event.timestamp))
        return _response(context, 200, answer, to_json if request.clicks else _json)
    except RequestError as error:
        context.logger.warn(f"refused: {error}")
        return _response(context, 400, {"error": str(error)})
    except Exception as error:  # while parsing or writing JSON as well: memory may end anywhere
        context.logger.error(traceback.format_exc())
        reason = model.reason(error) or "internal error, see the function's log"
        # A frame must never cost CVAT's whole run: say so on it, go on with the next. A click costs nothing.
        if request and request.clicks:
            return _response(context, 500, {"error": reason})
        return _response(context, 200, model.unprocessed(reason))


def waited_s(arrival: object) -> float:
    """Seconds since an event's arrival, which the processor stamps before the queue; 0 where that cannot be.

    Args:
        arrival: nuclio_sdk's `event.timestamp`: UTC without saying so, cut to whole seconds; 0 where there is none.
    """
    if not isinstance(arrival, datetime):
        return 0.0
    arrival = arrival if arrival.tzinfo else arrival.replace(tzinfo=timezone.utc)
    seconds = (datetime.now(timezone.utc) - arrival).total_seconds()
    return seconds if 0 <= seconds < LONGEST_WAIT_S else 0.0


def _end_in_time():
    """Let the processor's signal to end, SIGUSR1, end this process after LAST_ANSWER_S, although an answer is under way.

    Nuclio's wrapper only looks at the signal between two answers, and sets a handler of its own after `init_context`. It
    goes on to see the signal by the file descriptor that Python writes signals to.
    """

    def end_soon(*_):
        timer = threading.Timer(LAST_ANSWER_S, os._exit, [0])
        timer.daemon = True
        timer.start()

    if threading.current_thread() is threading.main_thread():  # not under `defectcam serve`, which ends by itself
        signal.signal(signal.SIGUSR1, end_soon)


def _json(answer):
    return json.dumps(answer, allow_nan=False, separators=(",", ":"))  # masks are millions of numbers


def _response(context, status, answer, to_text=_json, headers=None):
    return context.Response(
        body=to_text(answer),
        headers=headers or {},
        content_type="application/json",
        status_code=status,
    )
